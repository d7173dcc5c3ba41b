"""MonteCLoRA however a model is called: cut off, in parts, without labels, differentiated again."""

import copy
import logging
import types

import pytest
import torch
from monteclora_models import BATCH, TOKENS, bank_of, gradients, patched_model, peft_model
from peft import LoraConfig, MontecloraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

import bayeslora
from bayeslora.monteclora_bank import _share_of_batch

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _draws(model):
    return bank_of(model).parts[0].counter.item()


def _checkpointed(model, reentrant):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("entry", ["whole", "network"])
def test_a_forward_after_an_interrupted_one_draws(entry):
    """torch runs no forward hooks on KeyboardInterrupt."""
    model = patched_model()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**BATCH)
    hook.remove()
    network = model.get_base_model().model
    call = (lambda: model(**BATCH)) if entry == "whole" else (lambda: network(BATCH["input_ids"]))
    with torch.no_grad():
        first, second = call()[0], call()[0]
        assert _draws(model) == 3
        assert not torch.equal(first, second)
        for parameter in model.parameters():
            parameter.zero_()
        assert not call()[0].equal(second)  # nothing stale is read


def _t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    lora = LoraConfig(r=2, target_modules=["q", "k", "v"], monteclora_config=MontecloraConfig(num_samples=4))
    return bayeslora.patch(get_peft_model(T5ForConditionalGeneration(config), lora)).train()


def test_an_encoder_alone_is_a_forward_of_one_draw():
    model = _t5()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert _draws(model) == 1
    base = model.get_base_model()
    memory = base.encoder(input_ids=TOKENS)
    assert _draws(model) == 2
    base.decoder(input_ids=TOKENS, encoder_hidden_states=memory[0])
    assert _draws(model) == 3
    hooked = [name for name, module in base.named_modules() if module._forward_pre_hooks]
    assert [name for name in hooked if "." not in name] == ["", "encoder", "decoder"]
    assert all("SelfAttention" in name or "EncDec" in name for name in hooked if "." in name)  # LoraGroup's


@pytest.mark.parametrize("reentrant", [False, True])
def test_parts_called_by_themselves_are_told_apart_under_checkpointing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = _t5()
        bayeslora.configure_monteclora(model, seed=1, sample_scaler=1.0)
        if checkpointing:
            _checkpointed(model, reentrant)
        base = model.get_base_model()
        memory = base.encoder(input_ids=TOKENS)
        model(encoder_outputs=memory, labels=TOKENS).loss.backward()
        found.append(gradients(model))
        assert _draws(model) == 2
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **CLOSE)


def test_shared_towers_are_hooked_once():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.towers = nn.ModuleDict({"query": block, "text": block, "other": copy.deepcopy(block)})

        def forward(self, x):
            return sum(tower(x) for tower in self.towers.values())

    config = LoraConfig(
        r=2, target_modules=r".*towers\..*\.[01]", monteclora_config=MontecloraConfig(num_samples=2)
    )
    model = bayeslora.patch(get_peft_model(Towers(), config)).train()
    towers = model.get_base_model().towers
    assert [len(towers[name]._forward_pre_hooks) for name in towers] == [1, 1, 1]
    x = torch.randn(3, 4)
    model(x)
    assert _draws(model) == 1
    towers["other"](x)
    assert _draws(model) == 2


class _WritesToData(torch.optim.SGD):
    """As schedule-free optimizers and bitsandbytes' do, which changes no tensor's version."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


def test_resample_step_draws_anew_where_an_optimizer_changes_no_version():
    model = patched_model(options={"resample": "step"})
    optimizer = _WritesToData([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        for _ in range(2):  # micro-batches
            model(**BATCH).loss.backward()
            assert _draws(model) == step
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_may_be_differentiated_again_is_told_apart(reentrant):
    model = _checkpointed(patched_model(), reentrant)
    kept = model(**BATCH).loss
    kept.backward(retain_graph=True)
    again = gradients(model)
    model.zero_grad()
    kept.backward(retain_graph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, again[name], **CLOSE)
    model(**BATCH)
    other = model(**BATCH).loss
    with pytest.raises(RuntimeError, match=r"2 forwards of MonteCLoRA layers.* retain_graph=True"):
        kept.backward()
    del kept
    model.zero_grad()
    other.backward()
    plain = patched_model()
    for _ in range(3):
        loss = plain(**BATCH).loss
    loss.backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_without_a_graph_are_not_waited_for(reentrant):
    found = []
    for model in (patched_model(), _checkpointed(patched_model(), reentrant)):
        with torch.no_grad():
            model(**BATCH)
        loss = model(**BATCH).loss
        with torch.no_grad():  # as the old policy's, or a teacher's
            model(**BATCH)
            model(**BATCH)
        loss.backward()
        found.append(gradients(model))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_whole_models_under_checkpoint(reentrant):
    def run(forwards, call):
        model = patched_model()
        x = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        loss = [
            call(lambda e: model(inputs_embeds=e, labels=TOKENS).loss, x * i) for i in range(1, 1 + forwards)
        ]
        sum(loss).backward()
        return gradients(model)

    def checkpointed(function, x):
        return checkpoint(function, x, use_reentrant=reentrant)

    expected, found = run(1, lambda function, x: function(x)), run(1, checkpointed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    with pytest.raises(RuntimeError, match="2 forwards of MonteCLoRA layers"):
        run(2, checkpointed)


class _Nested(nn.Module):
    """A model whose output is not PEFT's or transformers'."""

    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, **batch):
        return self.wrap(self.inner(**batch))


@pytest.mark.parametrize(
    ("wrap", "loss_of"),
    [
        (lambda out: {"head": [{"loss": out.loss}]}, lambda out: out["head"][0]["loss"]),
        (lambda out: types.SimpleNamespace(it=(None, out.loss)), lambda out: out.it[1]),
        (lambda out: out, lambda out: out.logits.square().mean()),  # and the output's own loss is dropped
    ],
)
def test_a_draw_lives_as_long_as_what_is_made_of_it(wrap, loss_of):
    found = []
    for checkpointing in (False, True):
        inner = peft_model()
        model = bayeslora.patch(_Nested(inner, wrap))
        bayeslora.configure_monteclora(model, seed=5)
        if checkpointing:
            _checkpointed(inner, True)
        loss = loss_of(model(**BATCH))
        with torch.no_grad():
            model(**BATCH)
        loss.backward()
        found.append(gradients(model))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **CLOSE)


def test_post_hoc_priors_train_alone_after_an_adapter_is_set_again():
    model = patched_model(options={"mode": "priors"})
    model.set_adapter("default")
    model(**BATCH).loss.backward()
    assert gradients(model)
    assert all("lora_monteclora_sampler" in name for name in gradients(model))


def test_functorch_takes_pefts_layers():
    model = patched_model()
    given = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (), BATCH).loss)(given)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert _draws(model) == 0


def test_a_sample_in_inference_mode_after_a_cast_leaves_a_model_that_trains():
    model = patched_model().to(torch.float64)
    with torch.inference_mode():
        model(**BATCH)
    (model(**BATCH).loss + bayeslora.monteclora_loss(model)).backward()
    assert _draws(model) == 2


def test_a_loss_that_cannot_be_added_is_said_once(caplog):
    model = patched_model(options={"add_loss": True})
    with caplog.at_level(logging.WARNING, "bayeslora"):
        model(**BATCH)
        with torch.no_grad():
            model(input_ids=TOKENS)
        assert not caplog.records
        for _ in range(2):
            model(input_ids=TOKENS)
    assert [
        r.message.startswith("add_loss=True, but the model returned no loss") for r in caplog.records
    ] == [True]


def test_a_share_that_cannot_be_known_is_said_once(caplog):
    model = patched_model()
    with caplog.at_level(logging.WARNING, "bayeslora"):
        for _ in range(2):
            model(input_ids=TOKENS, num_items_in_batch=torch.tensor(5))
    assert ["came without labels" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize(
    ("name", "loss_type", "encoder_decoder", "expected"),
    [
        ("AForCausalLM", "ForCausalLM", False, 3),
        ("AForConditionalGeneration", "ForConditionalGeneration", False, 3),
        ("AForConditionalGeneration", "ForConditionalGeneration", True, 4),
        ("AForTokenClassification", "ForTokenClassification", False, 4),
    ],
)
def test_a_micro_batchs_share_counts_the_labels_that_the_loss_reads(
    name, loss_type, encoder_decoder, expected
):
    config = types.SimpleNamespace(is_encoder_decoder=encoder_decoder)
    model = type(name, (nn.Module,), {"loss_type": loss_type, "config": config})()
    labels = torch.tensor([[1, 2, -100, 3, 4]])
    share = _share_of_batch(model, {"labels": labels, "num_items_in_batch": 12})
    assert share.item() == pytest.approx(expected / 12)
    shifted = torch.tensor([[2, -100, 3, 4, -100]])
    given = {"labels": labels, "shift_labels": shifted, "num_items_in_batch": 12}
    assert _share_of_batch(model, given).item() == pytest.approx(3 / 12)
