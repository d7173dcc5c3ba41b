"""Model families people train: patched as PEFT computes them, five IVON steps, posterior to disk and back."""

from typing import NamedTuple

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from bayeslora import IVON, Posterior, patch
from bayeslora.patching import FusedLoraLinear

VOCAB = 40
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Family(NamedTuple):
    model: type
    config: hf.PretrainedConfig
    targets: list[str]
    fused: int
    heads: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**_DECODER), _ALL_LINEAR, 14),
    "qwen2": Family(hf.Qwen2ForCausalLM, hf.Qwen2Config(**_DECODER), _ALL_LINEAR, 14),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_DECODER), _ALL_LINEAR, 14),
    "gemma2": Family(hf.Gemma2ForCausalLM, hf.Gemma2Config(**_DECODER), _ALL_LINEAR, 14),
    "gemma3": Family(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_DECODER), _ALL_LINEAR, 14),
    "mistral": Family(
        hf.MistralForCausalLM, hf.MistralConfig(**_DECODER, sliding_window=4), ["q_proj", "v_proj"], 4
    ),
    "gpt2": Family(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=16),
        ["c_attn", "c_proj", "c_fc"],
        8,
    ),
    "roberta": Family(
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**_ENCODER, max_position_embeddings=16, num_labels=3),
        ["query", "value"],
        4,
        ("classifier",),
    ),
    "deberta": Family(
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(
            **_ENCODER,
            max_position_embeddings=16,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            num_labels=3,
        ),
        ["query_proj", "key_proj", "value_proj"],
        6,
        ("classifier", "pooler"),
    ),
    "t5": Family(
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        ["q", "v"],
        12,
    ),
    "vit": Family(
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            num_labels=3,
        ),
        ["q_proj", "v_proj", "query", "value"],  # by transformers version
        4,
        ("classifier",),
    ),
}


def _base(family, device):
    torch.manual_seed(0)
    config = family.config
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name in ("attn_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return family.model(config).to(device)


def _peft(family, device):
    base = _base(family, device)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=family.targets, modules_to_save=list(family.heads) or None)
    return get_peft_model(base, config).train()


def _batch(family, device):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCAB, (3, 6), generator=generator)
    labels = torch.tensor([0, 2, 1])
    if family.model is hf.ViTForImageClassification:
        batch = {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator), "labels": labels}
    else:
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        batch["labels"] = labels if family.heads else tokens
    return {name: value.to(device) for name, value in batch.items()}


def _head(name):
    return "modules_to_save" in name


def _optimizer(model, perturb_head=True):
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if not _head(n)]}]
    heads = [p for n, p in trained if _head(n)]
    if heads:
        groups.append({"params": heads, "perturb": perturb_head})
    return IVON(groups, lr=0.05, ess=1000.0, hess_init=0.1, clip_radius=0.5, rescale_lr=False, seed=3)


def _train(model, opt, batch, steps=5):
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        with opt.sampled_params(train=True):
            loss = model(**batch).loss
            loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_as_with_peft_and_its_posterior_round_trips(name, device, tmp_path):
    family = FAMILIES[name]
    batch = _batch(family, device)
    model = patch(_peft(family, device))
    assert sum(type(m) is FusedLoraLinear for m in model.modules()) == family.fused
    opt = _optimizer(model)
    with torch.no_grad():
        before = model(**batch).loss.item()
    losses = _train(model, opt, batch)
    with torch.no_grad():
        assert model(**batch).loss.item() < before
    reference = _peft(family, device)
    expected = _train(reference, _optimizer(reference), batch)
    assert losses == pytest.approx(expected, rel=1e-4)

    posterior = opt.posterior(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(posterior.parameters) == trained
    assert any(_head(n) for n in trained) == bool(family.heads)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_base(family, device), tmp_path)
    query = {k: v for k, v in batch.items() if k != "labels" or name == "t5"}
    for p, q in ((posterior, loaded), (loaded, posterior)):
        torch.testing.assert_close(p.predict(query, 2, seed=5), q.predict(query, 2, seed=5))
    mean = posterior.predict(query, 1, variance_scale=0.0)
    assert not torch.allclose(mean, posterior.predict(query, 1, seed=5), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.heads])
def test_a_head_that_is_not_perturbed_trains_at_its_mean(name, device, tmp_path):
    family = FAMILIES[name]
    batch = _batch(family, device)
    model = patch(_peft(family, device))
    opt = _optimizer(model, perturb_head=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for inside in (opt.sampled_params(train=True), opt.sampled_params(seed=1)):
        with inside:
            changed = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
        assert changed == {n for n in before if not _head(n)}
    _train(model, opt, batch)
    assert all(not p.equal(before[n]) for n, p in model.named_parameters() if n in before and _head(n))

    posterior = opt.posterior(model)
    assert set(posterior.parameters) == {n for n in before if not _head(n)}
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_base(family, device), tmp_path)
    query = {k: v for k, v in batch.items() if k != "labels"}
    torch.testing.assert_close(posterior.predict(query, 2), loaded.predict(query, 2))


def test_a_head_that_is_not_perturbed_is_momentum_descent_with_a_fixed_hessian():
    weight = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 10, dtype=torch.float64))
    group = {"params": [weight], "perturb": False}
    opt = IVON([group], lr=0.1, ess=10.0, hess_init=0.5, beta1=0.8, weight_decay=0.01, rescale_lr=False)
    mean, momentum = weight.detach().clone(), torch.zeros(10, dtype=torch.float64)
    for t in range(1, 5):
        with opt.sampled_params(train=True):
            assert torch.equal(weight, mean)
            (weight**4).sum().backward()
        opt.step()
        opt.zero_grad()
        momentum = 0.8 * momentum + 0.2 * 4 * mean**3
        mean = mean - 0.1 * (momentum / (1 - 0.8**t) + 0.01 * mean) / (0.5 + 0.01)
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-12, atol=1e-14)
        mean = weight.detach().clone()
    assert torch.equal(opt.state[weight]["hess"], torch.full_like(mean, 0.5))
