"""MonteCLoRA on PEFT's layers: law, gradients, checkpointing, files, options, PEFT's defects."""

import copy
import pickle

import pytest
import torch
from monteclora_models import BATCH, bank_of, gradients, patched_model, peft_model, tiny_llama
from peft import (
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from scipy import stats
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import bayeslora
from bayeslora import lora_group, lora_linear
from bayeslora.kernels import monteclora_twin
from bayeslora.patching import FusedLoraLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # fp32, the same terms in another order


def _matrices(model, draws):
    """A_eff of the first layer over many draws, (draws, r, K)."""
    part = bank_of(model).parts[0]
    out = []
    with torch.no_grad():
        for _ in range(draws):
            part.refresh(True)
            out.append(part.current.outputs[0].clone())
    return torch.stack(out)


ONE_LAYER = {"target_modules": r".*layers\.0\.self_attn\.q_proj"}


def _step(model):
    model.zero_grad()
    loss = model(**BATCH).loss
    (loss + bayeslora.monteclora_loss(model)).backward()
    return loss.detach(), gradients(model)


# ---- the forward -------------------------------------------------------------------------------


def test_patch_takes_the_layers_and_eval_is_peft_at_the_mean():
    theirs, ours = peft_model().eval(), patched_model().eval()
    assert sum(type(m) is FusedLoraLinear for m in ours.modules()) == 6
    with torch.no_grad():
        torch.testing.assert_close(ours(**BATCH).logits, theirs(**BATCH).logits, **CLOSE)
        assert torch.equal(ours(**BATCH).logits, ours(**BATCH).logits)


def test_a_training_forward_is_plain_lora_with_the_perturbed_matrices():
    model = patched_model()
    seen = {}
    bank = bank_of(model)
    for part in bank.parts:
        inner = part.perturbed
        part.perturbed = lambda site, inner=inner: seen.setdefault(site, inner(site))
    logits = model(**BATCH).logits
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        for i, layer in enumerate(bank_of(plain).layers):
            before = layer.lora_A["default"].weight
            assert not torch.equal(before, seen[i])
            before.copy_(seen[i])
        torch.testing.assert_close(plain(**BATCH).logits, logits, **CLOSE)


def test_the_network_without_its_head_is_a_forward_of_one_draw():
    whole, backbone = patched_model(), patched_model()
    results = []
    for step in range(1, 3):
        hidden = (
            whole(input_ids=BATCH["input_ids"], output_hidden_states=True).hidden_states[-1],
            backbone.get_base_model().model(input_ids=BATCH["input_ids"]).last_hidden_state,
        )
        results = []
        for model, found in zip((whole, backbone), hidden, strict=True):
            model.zero_grad()
            (found.square().mean() + bayeslora.monteclora_loss(model)).backward()
            results.append([found.detach(), *gradients(model).values()])
            assert bank_of(model).parts[0].counter.item() == step
            assert not bank_of(model)._running
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


def test_layers_of_a_part_of_the_network_draw_where_they_are_all_called():
    first = {"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"}
    model = patched_model(first)
    layer = model.get_base_model().model.layers[0]
    scopes = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert scopes[-1].endswith("layers.0.self_attn")
    assert next(n for n, m in model.named_modules() if m is layer) in scopes
    model(**BATCH)
    assert bank_of(model).parts[0].counter.item() == 1


def test_noise_changes_with_every_forward_and_follows_the_seed():
    model, again, other = patched_model(), patched_model(), patched_model(options={"seed": 6})
    with torch.no_grad():
        first, second = model(**BATCH).logits, model(**BATCH).logits
        assert not torch.equal(first, second)
        assert torch.equal(again(**BATCH).logits, first)
        assert torch.equal(again(**BATCH).logits, second)
        assert not torch.equal(other(**BATCH).logits, first)


def test_the_seed_comes_from_torchs_generator():
    def fresh(seed):
        model = peft_model()
        torch.manual_seed(seed)
        return bank_of(bayeslora.patch(model)).seed

    assert fresh(3) == fresh(3) != fresh(4)


def test_q_k_and_v_still_share_one_call(monkeypatch):
    calls = []
    apply_layers = lora_linear.apply_layers
    monkeypatch.setattr(
        lora_group,
        "apply_layers",
        lambda x, layers, *rest: calls.append(len(layers)) or apply_layers(x, layers, *rest),
    )
    _step(patched_model())
    assert calls == [3, 3]


@pytest.mark.parametrize("options", [{}, {"estimator": "mixture"}, {"perturb": "both"}, {"outer_samples": 2}])
def test_covariance_of_the_perturbed_matrix_is_its_formula(options):
    """E[ΔΔ'] = c² E‖π‖² r v_j per element; E‖π‖² = Σ α(α+1) / (α₀ (α₀+1)); M outer samples divide it by M."""
    model = patched_model(ONE_LAYER, options)
    layer = bank_of(model).layers[0]
    sampler = layer.lora_monteclora_sampler["default"]
    a = layer.lora_A["default"].weight
    delta = (_matrices(model, 500) - a.detach()).double()
    alpha = sampler.expert_weights_prior.double().exp()
    squared = (alpha * (alpha + 1)).sum() / (alpha.sum() * (alpha.sum() + 1))
    v = torch.exp(2 * sampler.std_prior.double())
    expected = 0.05**2 * squared * 3 * v / options.get("outer_samples", 1)
    # 4 standard errors of the mean of 500 chi-squares of 3, times a random ‖π‖², are 16%.
    assert torch.allclose(delta.square().mean((0, 2)), expected.detach(), rtol=0.16)
    assert abs(delta.mean()) < 4 * expected.mean().sqrt() / delta.numel() ** 0.5
    across = delta[:, 0] * delta[:, 1]
    assert abs(across.mean()) < 0.1 * expected.mean()


def _coefficient_problem(estimator, draws):
    """The gradient of f = Σ_k (A_eff - t)² in s and e over many draws of one small matrix."""
    model = patched_model(ONE_LAYER, {"estimator": estimator, "seed": 11}, sample_scaler=0.3)
    part = bank_of(model).parts[0]
    values, d_std, d_prior = [], [], []
    for _ in range(draws):
        part.refresh(True)
        held = part.sampler(0)
        out = part.current.outputs[0]
        grads = torch.autograd.grad(out.square().sum(), (held.std_prior, held.expert_weights_prior))
        values.append(out.detach()[0, :2])
        d_std.append(grads[0])
        d_prior.append(grads[1])
    return torch.stack(values), torch.stack(d_std), torch.stack(d_prior)


def test_collapsed_and_mixture_agree_in_law_and_in_expected_gradient():
    one, many = _coefficient_problem("collapsed", 300), _coefficient_problem("mixture", 300)
    for i in range(2):
        assert stats.ks_2samp(one[0][:, i].numpy(), many[0][:, i].numpy()).pvalue > 1e-3
    for a, b in zip(one[1:], many[1:], strict=True):
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all()


def test_the_collapsed_estimator_varies_less_where_weights_are_learned():
    """The reason for the default: the mixture's weights also choose between draws (11 to 13 times)."""
    total = {}
    for estimator in ("collapsed", "mixture"):
        model = patched_model(options={"estimator": estimator})
        found = []
        for _ in range(40):
            model.zero_grad()
            model(**BATCH).loss.backward()
            grads = gradients(model)
            found.append(torch.cat([g for n, g in grads.items() if "expert_weights_prior" in n]))
        total[estimator] = torch.stack(found).var(0).sum()
    assert total["mixture"] > 3 * total["collapsed"]


@pytest.mark.parametrize("options", [{}, {"estimator": "mixture"}, {"perturb": "both", "outer_samples": 2}])
def test_gradients_are_finite_differences_with_the_noise_held_fixed(options):
    """In fp64; the logistic normal, whose noise does not depend on α (the exact one's has its own test)."""
    model = patched_model(options={"dirichlet": "logistic_normal", **options}, kl_loss_weight=0.01).double()
    bank = bank_of(model)
    bank._build()
    part = bank.parts[0]
    part.counter.fill_(3)

    def loss():
        part.refresh(False)
        return sum((m + 0.1).square().sum() for m in part.current.outputs) + bank.loss()

    loss().backward()
    grads = gradients(model)
    assert len(grads) == 6 * (4 if "perturb" in options else 3)
    for name, parameter in model.named_parameters():
        if name not in grads:
            continue
        flat = parameter.data.view(-1)
        index = int(grads[name].abs().argmax())
        at, step, values = flat[index].item(), 1e-5, []
        for sign in (1, -1):
            flat[index] = at + sign * step
            with torch.no_grad():
                values.append(loss().item())
        flat[index] = at
        difference = (values[0] - values[1]) / (2 * step)
        assert grads[name].view(-1)[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-7), name


def test_only_the_wanted_gradients_are_computed(monkeypatch):
    model = patched_model()
    calls = []
    inner = monteclora_twin.coefficient_gradient
    monkeypatch.setattr(
        monteclora_twin, "coefficient_gradient", lambda *a, **k: calls.append(1) or inner(*a, **k)
    )
    _, full = _step(model)
    assert len(calls) == 1  # one launch for all layers
    for name, parameter in model.named_parameters():
        if "sampler" in name:
            parameter.requires_grad_(False)
    bank_of(model).parts[0].counter.zero_()
    model.zero_grad()
    model(**BATCH).loss.backward()
    assert len(calls) == 1
    name = next(n for n in full if "lora_B" in n)
    assert torch.equal(gradients(model)[name], full[name])


# ---- gradient checkpointing: PEFT's noise depends on a Python counter --------------------------


def _checkpointed(model, reentrant):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("options", [{}, {"perturb": "both", "estimator": "mixture"}])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_noise(reentrant, options):
    loss, expected = _step(patched_model(options=options))
    checkpointed, found = _step(_checkpointed(patched_model(options=options), reentrant))
    torch.testing.assert_close(checkpointed, loss, **CLOSE)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


def test_pefts_checkpointing_recomputes_other_noise():
    """The defect that the test above is about."""

    def step(reentrant):
        model = peft_model(buffer_size=50)
        if reentrant is not None:
            model = _checkpointed(model, reentrant)
        torch.manual_seed(3)
        for layer in model.modules():
            if hasattr(layer, "lora_monteclora_sampler"):
                layer.lora_monteclora_sampler["default"].sampler._refill_buffer()
        model(**BATCH).loss.backward()
        return gradients(model)

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    plain = step(None)[name]
    assert torch.equal(step(None)[name], plain)
    assert (step(True)[name] - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_checkpointed_forwards_before_one_backward_are_refused(reentrant):
    model = _checkpointed(patched_model(), reentrant)
    losses = [model(**BATCH).loss for _ in range(2)]
    with pytest.raises(RuntimeError, match="2 forwards of MonteCLoRA layers"):
        sum(losses).backward()
    del losses
    model.zero_grad()
    _step(model)  # and it goes on


def test_checkpointed_forwards_each_with_its_backward_may_overlap_in_memory():
    model = _checkpointed(patched_model(), False)
    first = model(**BATCH)
    first.loss.backward()
    model.zero_grad()
    _, found = _step(model)  # `first` still holds its graph
    plain = patched_model()
    plain(**BATCH)
    _, expected = _step(plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


# ---- PEFT's files, copies, unpatching ----------------------------------------------------------


def test_checkpoints_are_pefts_both_ways(tmp_path):
    theirs, ours = peft_model(), patched_model()
    _step(ours)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(0.01)
    assert get_peft_model_state_dict(ours).keys() == get_peft_model_state_dict(theirs).keys()
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(theirs).unload(), tmp_path, is_trainable=True)
    expected = get_peft_model_state_dict(ours)
    for name, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**BATCH).logits, ours.eval()(**BATCH).logits, **CLOSE)
    back = patched_model()
    set_peft_model_state_dict(back, get_peft_model_state_dict(theirs))
    for name, value in get_peft_model_state_dict(back).items():
        assert torch.equal(value, get_peft_model_state_dict(theirs)[name]), name


def test_unpatch_gives_peft_back_with_its_own_sampling():
    model = patched_model()
    _step(model)
    bayeslora.unpatch(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(**BATCH).logits, model(**BATCH).logits)
        torch.testing.assert_close(model.eval()(**BATCH).logits, peft_model().eval()(**BATCH).logits, **CLOSE)
    with pytest.raises(ValueError, match=r"bayeslora.patch\(model\)"):
        bayeslora.monteclora_loss(model)


def test_copies_and_pickles_sample_by_themselves():
    model = patched_model()
    _step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bank_of(other) is not bank_of(model)
        assert all(layer in set(other.modules()) for layer in bank_of(other).layers)
        with torch.no_grad():
            expected = other(**BATCH).logits
        assert not torch.equal(expected, other(**BATCH).logits)


def test_pefts_model_cannot_be_copied_after_a_forward():
    model = peft_model()
    model(**BATCH).loss.backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)


def test_patching_again_keeps_the_bank():
    model = patched_model()
    bank = bank_of(model)
    assert bank_of(bayeslora.patch(model)) is bank
    assert sum(len(m._forward_pre_hooks) for m in (model, model.base_model)) == 2


def test_moving_and_casting_rebuilds_the_tables():
    model = patched_model()
    _step(model)
    model.to(torch.bfloat16)
    _, grads = _step(model)
    assert {g.dtype for g in grads.values()} == {torch.bfloat16}
    assert bank_of(model).parts[0].counter.item() == 2


def test_pefts_sampler_cannot_be_bf16():
    model = peft_model().to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"same dtype|expected scalar type"):  # as torch's version words it
        model(**BATCH)


# ---- memory ------------------------------------------------------------------------------------


def _tensor_bytes(value, seen):
    if isinstance(value, torch.Tensor):
        fresh = value.untyped_storage().data_ptr() not in seen
        seen.add(value.untyped_storage().data_ptr())
        return value.untyped_storage().nbytes() if fresh else 0
    if isinstance(value, dict):
        return sum(_tensor_bytes(v, seen) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(v, seen) for v in value)
    return 0


def test_no_buffer_grows_with_the_layers_size():
    theirs, ours = peft_model(buffer_size=40), patched_model(buffer_size=40)
    _step(ours)
    buffers = [m.sampler.buffer for m in theirs.modules() if type(m).__name__ == "MontecloraSampler"]
    assert _tensor_bytes(buffers, set()) > 40 * 6 * 4 * 32 * 3 * 4
    assert not any(m.sampler.buffer for m in ours.modules() if type(m).__name__ == "MontecloraSampler")
    bank = bank_of(ours)
    small = 0
    for part in bank.parts:
        assert not part.current.outputs
        state = {**vars(part), **vars(part.tables), **vars(part.source), **vars(part.current.noise)}
        small += _tensor_bytes(list(state.values()), set())
    assert small < 40 * 8 * 6 * (3 + 4)  # some tables of (r + N) numbers a layer


# ---- options -----------------------------------------------------------------------------------


def test_resample_step_draws_once_until_a_parameter_changes():
    model = patched_model(options={"resample": "step"})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    first = model(**BATCH).loss
    assert torch.equal(model(**BATCH).loss, first)
    first.backward()
    assert torch.equal(model(**BATCH).loss, first)
    optimizer.step()
    model(**BATCH)
    assert bank_of(model).parts[0].counter.item() == 2


def test_sparse_mixture_keeps_the_largest_weight():
    from bayeslora import monteclora_math as mm

    noise = mm.Noise(torch.ones(1, 3), torch.randn(1, 5, 4).double(), exact=True)
    alpha = torch.rand(5, 4).double()
    dense, sparse = mm.mixture_weights(alpha, noise, False), mm.mixture_weights(alpha, noise, True)
    assert ((sparse > 0).sum(-1) == 1).all()
    assert torch.equal(sparse.amax(-1), dense.amax(-1))
    _step(patched_model(options={"sparse": True}))


def test_post_hoc_mode_trains_the_mean_and_then_the_priors():
    model = patched_model(options={"mode": "mean"})
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, model(**BATCH).logits)
    assert bayeslora.monteclora_loss(model).item() == 0.0
    model(**BATCH).loss.backward()
    assert all("lora_A" in n or "lora_B" in n for n in gradients(model))
    model.zero_grad()
    bayeslora.configure_monteclora(model, mode="priors")
    _, grads = _step(model)
    assert grads and all("sampler" in n for n in grads)
    bayeslora.configure_monteclora(model, mode="joint")
    assert len(_step(model)[1]) == 6 * 4


def test_sample_scaler_may_be_a_schedule():
    model = patched_model(options={"sample_scaler": lambda draws: 0.0 if draws == 1 else 0.05})
    plain = copy.deepcopy(model.eval())(**BATCH).logits
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, plain, **CLOSE)
        assert (model(**BATCH).logits - plain).abs().max() > 1e-3
    scale = bank_of(model).parts[0].scale
    bayeslora.configure_monteclora(model, sample_scaler=0.25)
    assert bank_of(model).parts[0].scale is scale and scale.item() == 0.25


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "best"}, ValueError, "estimator must be one of"),
        ({"outer_samples": 0}, ValueError, "outer_samples must be an integer >= 1"),
        ({"sample_scaler": -1.0}, ValueError, "sample_scaler must be finite"),
        ({"seed": 1.5}, ValueError, "seed must be an integer"),
        ({"seed": 1 << 64}, ValueError, "seed must be an integer that fits 64 bits"),
        ({"sample_scaler": lambda draws: -1.0}, ValueError, "sample_scaler must be finite"),
        ({"buffer": 3}, TypeError, "no option 'buffer'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    model = patched_model()
    before = bank_of(model).options
    with pytest.raises(error, match=message):
        bayeslora.configure_monteclora(model, **options)
    assert bank_of(model).options == before


@pytest.mark.parametrize("merged", [True, False])
def test_an_unloaded_model_is_left_alone(merged):
    """The layers that PEFT took out stay in train mode, and would add their loss to every forward."""
    losses = []
    for add_loss in (True, False):
        model = patched_model(options={"add_loss": add_loss})
        model(**BATCH)
        bare = (model.merge_and_unload() if merged else model.unload()).eval()
        losses.append(bare(**BATCH).loss)
    assert torch.equal(*losses)
    hooks = [*bare._forward_pre_hooks.values(), *bare._forward_hooks.values()]
    assert not [hook for hook in hooks if type(hook.__self__).__name__ == "MontecloraBank"]


def test_a_deleted_adapter_leaves_the_others_at_work():
    model = patched_model()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("plain")
    expected = model(**BATCH).logits
    model.delete_adapter("default")
    assert torch.equal(model(**BATCH).logits, expected)


def test_an_adapter_added_after_patch_is_named():
    model = patched_model()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"\['second'\] have no .*patch\(model\) again"):
        bayeslora.monteclora_loss(model)


def test_different_ranks_and_a_second_adapter():
    model = patched_model({"rank_pattern": {"k_proj": 5}})
    _, grads = _step(model)
    assert {g.shape[0] for n, g in grads.items() if "std_prior" in n} == {3, 5}
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("second", config)
    bayeslora.patch(model)
    model.set_adapter("second")
    _, grads = _step(model)
    assert all(".second." in n for n in grads)


def test_all_linear_layers_with_dropout_in_bf16_autocast():
    model = patched_model({"target_modules": "all-linear", "lora_dropout": 0.1})
    assert len(bank_of(model).layers) == 14
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = _step(model)
    assert torch.isfinite(loss)
    assert len(grads) == 14 * 4
    assert all(
        g.dtype == torch.float32 and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values()
    )


def test_gpt2s_transposed_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64))
    config = LoraConfig(
        r=3, target_modules=["c_attn"], fan_in_fan_out=True, monteclora_config=MontecloraConfig(buffer_size=1)
    )
    model = bayeslora.patch(get_peft_model(base, config)).train()
    for layer in bank_of(model).layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    _, grads = _step(model)
    assert len(grads) == 4
    assert all(g.abs().sum() > 0 for g in grads.values())


def test_compiled_models_sample_as_eager_ones():
    eager = patched_model()
    compiled = torch.compile(patched_model(), backend="aot_eager")
    for _ in range(2):
        expected, loss = eager(**BATCH).loss, compiled(**BATCH).loss
        torch.testing.assert_close(loss, expected, **CLOSE)
    expected.backward()
    loss.backward()
    found = gradients(compiled._orig_mod)
    for name, gradient in gradients(eager).items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)


@pytest.mark.gpu
def test_a_replayed_graph_draws_fresh_noise():
    model = patched_model(options={"add_loss": True, "sample_scaler": 1.0}).cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, capturable=True)
    step = bayeslora.capture_step(model, optimizer)
    batch = {name: value.cuda() for name, value in BATCH.items()}
    for _ in range(2):
        model(**batch).loss.backward()  # eager first, on another stream
    losses = [step(batch).item() for _ in range(8)]
    assert step.captured == 1
    assert len(set(losses)) == 8
    assert bank_of(model).parts[0].counter.item() == 10


def test_a_forward_makes_its_own_gradient_accumulators():
    """One kept from an earlier forward would run on that one's stream."""
    model = patched_model()
    prior = bank_of(model).layers[0].lora_monteclora_sampler["default"].std_prior
    model(**BATCH).loss.backward()
    earlier = prior.expand_as(prior).grad_fn.next_functions[0][0]
    earlier.metadata["seen"] = True
    del earlier
    model(**BATCH).loss.backward()
    assert "seen" not in prior.expand_as(prior).grad_fn.next_functions[0][0].metadata


def test_layers_called_by_themselves_are_perturbed():
    layer = bank_of(patched_model()).layers[0]
    x = torch.randn(2, 32)
    assert not torch.equal(layer(x), layer(x))
    layer(x).sum().backward()
    assert layer.lora_monteclora_sampler["default"].std_prior.grad is not None


def _on_4_bit():
    """A tiny model whose q, k and v are nf4; PEFT's adapters there are plain LoRA."""
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny_llama(hidden_size=64)  # bitsandbytes needs blocks of 64 whole on some CPUs
    for block in base.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(block.self_attn, name)
            quantized = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4"
            )
            quantized.load_state_dict(linear.state_dict())
            setattr(block.self_attn, name, quantized.to("cpu"))
    base.is_loaded_in_4bit = True
    config = LoraConfig(
        r=3,
        target_modules=["q_proj", "k_proj", "v_proj"],
        monteclora_config=MontecloraConfig(sample_scaler=0.05),
    )
    adapted = get_peft_model(base, config)
    assert not any("monteclora" in name for name in adapted.state_dict())  # PEFT says nothing
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return adapted.train()


def test_4_bit_layers_that_peft_trains_as_plain_lora_are_monteclora(tmp_path):
    theirs = _on_4_bit()
    with torch.no_grad():
        assert torch.equal(theirs(**BATCH).logits, theirs(**BATCH).logits)  # the defect
    model = bayeslora.patch(theirs)
    bayeslora.configure_monteclora(model, seed=5)
    assert len(bank_of(model).layers) == 6
    _, grads = _step(model)
    assert len(grads) == 6 * 4
    assert all(g.abs().sum() > 0 for g in grads.values())
    with torch.no_grad():
        assert not torch.equal(model(**BATCH).logits, model(**BATCH).logits)
        assert torch.equal(model.eval()(**BATCH).logits, model(**BATCH).logits)  # last: bitsandbytes repacks
    posterior = bayeslora.Posterior.from_monteclora(model)
    posterior.save_pretrained(tmp_path)
    loaded = bayeslora.Posterior.from_pretrained(_on_4_bit(), tmp_path)
    inputs = {"input_ids": BATCH["input_ids"]}
    # bitsandbytes may round activations to bf16, which turns PEFT's last bits and ours into a few of those
    torch.testing.assert_close(loaded.predict(inputs, 2), posterior.predict(inputs, 2), rtol=0.01, atol=1e-4)


def test_calls_that_would_be_plain_lora_are_refused():
    model = bayeslora.patch(_on_4_bit())
    layer = bank_of(model).layers[0]
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="would train it as plain LoRA"):
        model(**BATCH)
    model.eval()(**BATCH)


def test_other_quantized_layers_are_refused():
    model = peft_model()
    layer = next(m for m in model.modules() if hasattr(m, "lora_monteclora_sampler"))
    layer.__class__ = type("HqqLoraLinear", (PeftLoraLinear,), {"__module__": "peft.tuners.lora.hqq"})
    del layer.lora_variant["default"]
    with pytest.raises(ValueError, match=r"plain LoRA: hqq.HqqLoraLinear on Linear: 1\."):
        bayeslora.patch(model)
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())


def test_hooked_layers_stay_pefts_and_count_in_the_loss():
    model = peft_model()
    hooked = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    hooked.base_layer.register_forward_hook(lambda *_: None)
    bayeslora.patch(model)
    assert len(bank_of(model).layers) == 5
    model(**BATCH)
    total = model.base_model._get_monteclora_loss()
    kl, entropy = hooked.lora_monteclora_sampler["default"].get_variational_loss()
    expected = (5 * bayeslora.monteclora_loss(model) + kl + entropy) / 6
    torch.testing.assert_close(total, expected)


def test_a_module_that_is_no_peft_model_can_be_patched():
    inner = peft_model().base_model.model
    block = nn.Sequential(inner)
    with pytest.raises(ValueError, match="no MonteCLoRA layers"):
        bayeslora.monteclora_loss(block)


# ---- what follows operators --------------------------------------------------------------------


def _hessian_times_one(model):
    """Of the loss in the adapters; by attention that has a second derivative."""
    model.base_model.model.set_attn_implementation("eager")
    matrices = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    first = torch.autograd.grad(model(**BATCH).loss, matrices, create_graph=True)
    return torch.autograd.grad(sum(gradient.sum() for gradient in first), matrices)


def test_second_derivatives_in_the_adapters():
    """They are those of plain LoRA at the matrices that were drawn."""
    model, plain = patched_model(), peft_model().eval()
    got = _hessian_times_one(model)
    part, parameters = bank_of(model).parts[0], dict(plain.named_parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    for site, drawn in enumerate(part.plan.views(part.current.flat)):
        parameters[names[id(part.matrix(site))]].data.copy_(drawn)
    for value, want in zip(got, _hessian_times_one(plain), strict=True):
        torch.testing.assert_close(value, want, **CLOSE)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("of", ["task", "variational loss"])
def test_second_derivatives_in_the_priors_are_an_error(of, checkpointed):
    model = patched_model()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    priors = [p for n, p in model.named_parameters() if n.endswith("std_prior")]
    task = model(**BATCH).loss
    loss = task if of == "task" else bayeslora.monteclora_loss(model)
    first = torch.autograd.grad(loss, priors, create_graph=True)
    with pytest.raises(RuntimeError, match="MonteCLoRA's priors cannot be differentiated twice"):
        sum(gradient.sum() for gradient in first).backward()


def test_selective_checkpointing_repeats_the_noise():
    def keep_products(_context, operator, *_arguments, **_keywords):
        kept = operator is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    model = patched_model()
    model.enable_input_require_grads()
    results = [_step(model)]
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(keep_products)}
    )
    bank = bank_of(model)
    bank._draws = 0
    for part in bank.parts:
        part.counter.zero_()
    results.append(_step(model))
    assert results[1][0] == pytest.approx(results[0][0].item(), rel=1e-5)
    assert results[1][1].keys() == results[0][1].keys()
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, **CLOSE)
