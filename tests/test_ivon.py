"""The IVON optimizer: the ivon-opt oracle, the protocols, what it survives, and what it refuses."""

import copy
import io
import math

import ivon as ivon_opt
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bayeslora import IVON
from bayeslora.kernels import noise_twin

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))


def _model(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.to(device, dtype)


def _loss(model, part=slice(None)):
    p = next(model.parameters())
    return cross_entropy(model(X[part].to(p.device, p.dtype)).float(), Y[part].to(p.device))


def _optimizer(model, **settings):
    return IVON(model.parameters(), **{"lr": 0.1, "ess": 50.0, "hess_init": 0.25, **settings})


def _train(model, opt, steps):
    for _ in range(steps):
        opt.zero_grad()
        with opt.sampled_params(train=True):
            _loss(model).backward()
        opt.step()


def _values(model):
    return [p.detach().clone() for p in model.parameters()]


def _equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# ---- the oracle ----------------------------------------------------------------------------------


def _random_settings(index):
    g = torch.Generator().manual_seed(100 + index)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=g))]

    return {
        "lr": pick([0.01, 0.1, 0.5]),
        "ess": pick([50.0, 300.0, 1e4]),  # less makes the run chaotic: one ulp grows to 1e-7 in 100 steps
        "hess_init": pick([0.125, 0.5, 1.0]),
        "beta1": pick([0.0, 0.5, 0.9]),
        "beta2": pick([0.99, 0.999, 0.9999]),
        "weight_decay": pick([0.0, 2.0**-10, 2.0**-6]),
        "mc_samples": pick([1, 1, 2, 3]),
        "hess_approx": pick(["price", "price", "gradsq"]),
        "clip_radius": pick([math.inf, 0.1, 1.0]),
        "debias": pick([True, False]),
        "rescale_lr": pick([True, False]),
    }


class _InjectedNoise:
    """Stands in for ``torch.randn`` inside ivon-opt: gives it the noise that our optimizer draws."""

    def __init__(self, params, seed):
        groups = [torch.arange((p.numel() + 3) // 4) for p in params]
        self.group = torch.cat(groups)
        self.stream = torch.cat([torch.full_like(g, i) for i, g in enumerate(groups)])
        kept = [torch.arange(4 * g.numel()) < p.numel() for g, p in zip(groups, params, strict=True)]
        self.kept = torch.cat(kept)
        self.seed, self.draw = seed, 0

    def __call__(self, numel, device=None, dtype=None):
        normals = noise_twin.randn4x(self.seed, self.draw, self.stream, self.group)
        return torch.stack(normals, dim=-1).view(-1)[self.kept].to(device, dtype)


def _oracle_run(settings, dtype, monkeypatch):
    model = _model(dtype)
    noise = _InjectedNoise(list(model.parameters()), seed=11)
    opt = ivon_opt.IVON(model.parameters(), **settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", noise)
        for _ in range(100):
            for _ in range(settings["mc_samples"]):
                noise.draw += 1
                with opt.sampled_params(train=True):
                    opt.zero_grad()
                    _loss(model).backward()
            opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _own_run(settings, dtype, device):
    model = _model(dtype, device)
    opt = IVON(model.parameters(), **settings, seed=11)

    def closure():
        opt.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    for _ in range(100):
        opt.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


@pytest.mark.parametrize("index", range(24))
def test_follows_ivon_opt(index, device, monkeypatch):
    settings = _random_settings(index)
    truth = _oracle_run(settings, torch.float64, monkeypatch)
    # fp64: only the order of summation differs on the CPU. (On a GPU the noise, which is fp32 in both,
    # may differ in its last bit, and 100 steps amplify it.)
    own = _own_run(settings, torch.float64, device)
    torch.testing.assert_close(own, truth, rtol=0, atol=1e-11 if device.type == "cpu" else 1e-5)
    # fp32: bounded by ivon-opt's own error against fp64, and a few roundings of the largest weight.
    oracle_error = float((_oracle_run(settings, torch.float32, monkeypatch).double() - truth).abs().max())
    error = float((_own_run(settings, torch.float32, device).double() - truth).abs().max())
    assert error <= 4 * oracle_error + 2e-6 * float(truth.abs().max())


# ---- protocols -----------------------------------------------------------------------------------


def test_train_step_eval_is_the_same_run_as_the_context_manager(device):
    one, two = _model(device=device), _model(device=device)
    opt_one, opt_two = _optimizer(one), _optimizer(two)
    _train(one, opt_one, 5)
    for _ in range(5):
        opt_two.train()
        opt_two.train()  # idempotent
        opt_two.zero_grad()
        _loss(two).backward()
        opt_two.eval()
        opt_two.step()
    assert _equal(_values(one), _values(two))


@pytest.mark.parametrize("protocol", ["context", "train"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_is_the_full_batch(protocol, set_to_none):
    whole, parts = _model(torch.float64), _model(torch.float64)
    opt_whole, opt_parts = _optimizer(whole), _optimizer(parts)
    halves = [slice(0, 12), slice(12, 24)]
    for _ in range(4):
        _train(whole, opt_whole, 1)
        opt_parts.zero_grad(set_to_none=set_to_none)
        if protocol == "context":
            with opt_parts.sampled_params(train=True):
                for half in halves:
                    (_loss(parts, half) / 2).backward()
        else:
            for half in halves:
                opt_parts.train()
                (_loss(parts, half) / 2).backward()
                opt_parts.eval()  # an evaluation between micro-batches
        opt_parts.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_zero_grad_between_samples_loses_no_sample():
    inside, outside = _model(), _model()
    opt_inside, opt_outside = _optimizer(inside), _optimizer(outside)
    for _ in range(3):
        for _ in range(2):
            with opt_inside.sampled_params(train=True):
                opt_inside.zero_grad()
                _loss(inside).backward()
            opt_outside.zero_grad()
            with opt_outside.sampled_params(train=True):
                _loss(outside).backward()
        opt_inside.step()
        opt_outside.step()
    assert _equal(_values(inside), _values(outside))


def test_step_reads_clipped_gradients():
    model = _model()
    opt = _optimizer(model, beta1=0.0)
    with opt.sampled_params(train=True):
        (_loss(model) * 1e3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    opt.step()
    norm = sum(opt.state[p]["momentum"].square().sum() for p in model.parameters()).sqrt()
    torch.testing.assert_close(float(norm), 1e-2, rtol=1e-3, atol=0)


def test_closure_with_and_without_its_own_context():
    own, plain, driven = _model(), _model(), _model()
    opts = [_optimizer(m, mc_samples=2) for m in (own, plain, driven)]

    def closure_own():
        with opts[0].sampled_params(train=True):
            opts[0].zero_grad()
            loss = _loss(own)
            loss.backward()
        return loss

    def closure_plain(model=plain, opt=opts[1]):
        opt.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    for _ in range(3):
        first = opts[0].step(closure_own)
        second = opts[1].step(closure_plain)
        assert torch.equal(first, second)
        opts[2].train()
        opts[2].step(lambda: closure_plain(driven, opts[2]))
    assert _equal(_values(own), _values(plain))
    assert _equal(_values(own), _values(driven))


def test_parameters_hold_the_mean_at_rest_and_the_sample_inside(device):
    model = _model(torch.bfloat16, device)
    opt = _optimizer(model)
    _train(model, opt, 2)
    mean = _values(model)
    for p in model.parameters():
        assert opt.state[p]["mean"].dtype == opt.state[p]["hess"].dtype == torch.float32
        assert torch.equal(opt.state[p]["mean"].bfloat16(), p)
    with opt.sampled_params(train=True):
        sample = _values(model)
        assert not _equal(sample, mean)
        with opt.sampled_params(seed=3):
            assert not _equal(_values(model), sample)
        assert _equal(_values(model), sample)
        _loss(model).backward()
    assert _equal(_values(model), mean)


def test_exception_inside_a_context_restores_the_mean():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 2)
    mean = _values(model)
    for train in (True, False):
        with pytest.raises(KeyError), opt.sampled_params(train=train):
            raise KeyError
        assert _equal(_values(model), mean)
    with pytest.raises(RuntimeError, match="no sample drawn"):
        opt.step()


def test_evaluation_samples_leave_the_run_as_it_was():
    quiet, busy = _model(), _model()
    opt_quiet, opt_busy = _optimizer(quiet), _optimizer(busy)
    for _ in range(3):
        _train(quiet, opt_quiet, 1)
        opt_busy.zero_grad()
        with opt_busy.sampled_params(train=True):
            _loss(busy).backward()
        with opt_busy.sampled_params():
            first = _values(busy)
        with opt_busy.sampled_params():
            assert not _equal(_values(busy), first)
        opt_busy.step()
    assert _equal(_values(quiet), _values(busy))


def test_a_first_sample_in_inference_mode_leaves_a_state_that_trains():
    """Lightning's sanity check evaluates in inference mode before the first step."""
    runs = []
    for evaluated in (False, True):
        model = _model()
        opt = _optimizer(model)
        if evaluated:
            with torch.inference_mode(), opt.sampled_params(seed=1):
                _loss(model)
        _train(model, opt, 3)
        runs.append(_values(model))
    assert _equal(*runs)


def test_variance_scale_scales_the_deviation():
    model = _model(torch.float64)
    opt = _optimizer(model)
    mean = _values(model)
    with opt.sampled_params(seed=1):
        one = [p - m for p, m in zip(_values(model), mean, strict=True)]
    with opt.sampled_params(seed=1, variance_scale=4.0):
        two = [p - m for p, m in zip(_values(model), mean, strict=True)]
    with opt.sampled_params(seed=1, variance_scale=0.0):
        assert _equal(_values(model), mean)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-9, atol=1e-12)


def test_backward_after_the_sample_is_gone_is_an_error():
    model = _model()
    opt = _optimizer(model)
    with opt.sampled_params(train=True):
        loss = _loss(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what it works with --------------------------------------------------------------------------


def test_groups_dtypes_frozen_and_unused_parameters(device):
    model = _model(device=device)
    model[2].to(torch.float64)
    frozen, unused = nn.Parameter(torch.ones(3, device=device)), nn.Parameter(torch.ones(2, device=device))
    frozen.requires_grad_(False)
    opt = IVON(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[2].parameters(), frozen, unused]}],
        lr=0.5,
        ess=50.0,
    )
    before = _values(model)
    for _ in range(3):
        opt.train()
        assert torch.equal(frozen, torch.ones_like(frozen))
        model[2](model[1](model[0](X.to(device))).double()).square().mean().backward()
        opt.step()
        opt.zero_grad()
    after = _values(model)
    assert _equal(before[:2], after[:2])  # learning rate 0
    assert not any(torch.equal(p, q) for p, q in zip(before[2:], after[2:], strict=True))
    assert torch.equal(unused, torch.ones_like(unused))
    assert opt.state[unused]["hess"].eq(1.0).all()
    assert frozen not in opt.state
    assert opt.state[model[2].weight]["hess"].dtype == torch.float64


def test_nonfinite_gradient_in_one_dtype_skips_all_dtypes():
    model = _model()
    model[2].to(torch.float64)
    opt = _optimizer(model)
    before = _values(model)
    opt.train()
    model[2](model[1](model[0](X)).double()).square().mean().backward()
    model[0].bias.grad[1] = math.nan
    opt.step()
    assert _equal(before, _values(model))
    assert opt.skipped_steps == 1
    opt.zero_grad()
    opt.train()
    model[2](model[1](model[0](X)).double()).square().mean().backward()
    opt.step()
    assert opt.skipped_steps == 1
    assert not _equal(before, _values(model))


def test_nonfinite_gradients_pass_if_asked():
    model = _model()
    opt = _optimizer(model, skip_nonfinite=False)
    opt.train()
    _loss(model).backward()
    model[0].bias.grad[1] = math.nan
    opt.step()
    assert opt.skipped_steps == 0
    assert model[0].bias[1].isnan()


def test_absurd_finite_gradient_does_not_poison_the_hessian(device):
    model = _model(device=device)
    opt = _optimizer(model, clip_radius=1.0)
    opt.train()
    _loss(model).backward()
    model[0].weight.grad.fill_(1e25)
    opt.step()
    _train(model, opt, 2)
    assert all(torch.isfinite(opt.state[p]["hess"]).all() for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_lr_scheduler_and_later_group():
    model = _model()
    opt = IVON(model[0].parameters(), lr=0.1, ess=50.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step else 1.0)
    opt.train()
    _loss(model).backward()
    opt.step()
    scheduler.step()
    before = _values(model)
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.1, "hess_init": 0.5})
    _train(model, opt, 1)
    after = _values(model)
    assert _equal(before[:2], after[:2])
    assert not _equal(before[2:], after[2:])
    assert opt.state[model[2].bias]["hess"].sub(0.5).abs().max() < 0.1


@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(unscale, device):
    plain, scaled = _model(device=device), _model(device=device)
    opt_plain, opt_scaled = _optimizer(plain), _optimizer(scaled)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for step in range(4):
        with opt_plain.sampled_params(train=True):
            opt_plain.zero_grad()
            _loss(plain).backward()
        if step == 2:
            plain[0].bias.grad[0] = math.inf
        opt_plain.step()
        opt_scaled.zero_grad()
        with opt_scaled.sampled_params(train=True):
            scaler.scale(_loss(scaled)).backward()
        if step == 2:
            scaled[0].bias.grad[0] = math.inf
        if unscale:
            scaler.unscale_(opt_scaled)
        scaler.step(opt_scaled)
        scaler.update()
    assert opt_plain.skipped_steps == opt_scaled.skipped_steps == 1
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_grad_scaler_with_several_samples(device):
    plain, scaled = _model(device=device), _model(device=device)
    opt_plain, opt_scaled = _optimizer(plain), _optimizer(scaled)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for _ in range(2):
        with opt_plain.sampled_params(train=True):
            _loss(plain).backward()
        with opt_scaled.sampled_params(train=True):
            scaler.scale(_loss(scaled)).backward()
    opt_plain.step()
    scaler.step(opt_scaled)
    scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for _ in range(2):
        with opt_scaled.sampled_params(train=True):
            scaler.scale(_loss(scaled)).backward()
    scaler.unscale_(opt_scaled)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(opt_scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(dtype, device):
    straight = _model(dtype, device)
    opt = _optimizer(straight, seed=5)
    _train(straight, opt, 3)
    with opt.sampled_params():
        pass
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = _model(dtype, device)
    opt_resumed = _optimizer(resumed, seed=77, lr=9.0)
    resumed.load_state_dict(saved["model"])
    opt_resumed.load_state_dict(saved["opt"])
    for model, o in ((straight, opt), (resumed, opt_resumed)):
        _train(model, o, 3)
    assert _equal(_values(straight), _values(resumed))
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        for key in ("mean", "momentum", "hess"):
            assert torch.equal(opt.state[p][key], opt_resumed.state[q][key])
            assert opt_resumed.state[q][key].dtype == torch.float32
    with opt.sampled_params(), opt_resumed.sampled_params():
        assert _equal(_values(straight), _values(resumed))


def test_state_saved_inside_a_step_draws_the_same_sample_again():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 2)
    mean = _values(model)
    opt.train()
    sample = _values(model)
    state = copy.deepcopy(opt.state_dict())
    other = _model()
    with torch.no_grad():
        for p, m in zip(other.parameters(), mean, strict=True):
            p.copy_(m)
    opt_other = _optimizer(other)
    opt_other.load_state_dict(state)
    opt_other.train()
    assert _equal(_values(other), sample)


@pytest.mark.parametrize("order", ["weights first", "state first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", ["first sample", "second sample", "evaluation sample"])
def test_weights_saved_inside_a_step_come_back_as_the_mean(order, dtype, held):
    model = _model(dtype)
    opt = _optimizer(model)
    _train(model, opt, 2)
    mean = copy.deepcopy({k: opt.state[p]["mean"] for k, p in model.named_parameters()})
    at_rest = _values(model)
    if held == "second sample":
        with opt.sampled_params(train=True):
            _loss(model).backward()
    with opt.sampled_params(train=held != "evaluation sample"):
        assert not _equal(_values(model), at_rest)
        saved = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), saved)
        saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    other = _model(dtype)
    opt_other = _optimizer(other)
    if order == "weights first":
        other.load_state_dict(weights)
    opt_other.load_state_dict(state)
    other.load_state_dict(weights)
    opt_other.train()
    opt_other.eval()
    assert _equal(_values(other), at_rest)
    for name, p in other.named_parameters():
        assert torch.equal(opt_other.state[p]["mean"], mean[name])


def test_weights_changed_after_a_save_inside_a_step_are_taken():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 2)
    opt.train()
    state = copy.deepcopy(opt.state_dict())
    other = _model()
    opt_other = _optimizer(other)
    opt_other.load_state_dict(state)
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(0.5)
    opt_other.train()
    opt_other.eval()
    assert all((p == 0.5).all() for p in other.parameters())


def test_a_group_added_before_the_step_of_a_sample_joins_the_next():
    runs = []
    for late in (False, True):
        model = _model()
        opt = IVON(model[0].parameters(), lr=0.1, ess=50.0)
        with opt.sampled_params(train=True):
            _loss(model).backward()
        group = {"params": list(model[2].parameters()), "lr": 0.2}
        if late:
            opt.step()
        opt.add_param_group(group)
        if not late:
            opt.step()
        _train(model, opt, 2)
        runs.append(_values(model))
    assert _equal(*runs)


@pytest.mark.parametrize("clear", ["zero_grad", "zero", "model", None])
def test_a_closure_adds_to_no_gradient_of_before(clear):
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 1)  # leaves its gradients behind
    before, state = _values(model), copy.deepcopy(opt.state_dict()["state"])

    def closure():
        if clear == "model":
            model.zero_grad()
        elif clear is not None:
            opt.zero_grad(set_to_none=clear == "zero_grad")
        loss = _loss(model)
        loss.backward()
        return loss

    if clear is not None:
        opt.step(closure)
        assert not _equal(_values(model), before)
        return
    with pytest.raises(RuntimeError, match="gradients that were there before were not cleared"):
        opt.step(closure)
    assert _equal(_values(model), before)
    for index, values in opt.state_dict()["state"].items():
        assert all(torch.equal(values[key], state[index][key]) for key in values)
    opt.zero_grad()
    opt.step(closure)


def test_a_closure_takes_gradients_of_zeros_for_none():
    runs = []
    for zeros in (False, True):
        model = _model()
        opt = _optimizer(model)
        _train(model, opt, 1)
        model.zero_grad(set_to_none=not zeros)
        opt.step(lambda model=model: _loss(model).backward())
        runs.append(_values(model))
    assert _equal(*runs)


def test_deepcopy_goes_on_like_the_original():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 2)
    twin, opt_twin = copy.deepcopy((model, opt))
    _train(model, opt, 2)
    _train(twin, opt_twin, 2)
    assert _equal(_values(model), _values(twin))


def test_loading_weights_or_moving_dtype_between_steps():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 2)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    with opt.sampled_params():
        pass
    assert model[0].weight.eq(3.0).all()
    model.to(torch.bfloat16)
    _train(model, opt, 1)
    assert model[0].weight.dtype == torch.bfloat16
    assert opt.state[model[0].weight]["mean"].dtype == torch.float32
    hess = opt.state[model[0].weight]["hess"]
    assert not hess.eq(0.25).any()  # kept, not started anew


def test_hooks_of_torch_optimizers_fire():
    model = _model()
    opt = _optimizer(model)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append("step"))
    _train(model, opt, 2)
    assert calls == ["step", "step"]


@pytest.mark.gpu
def test_devices_together():
    model = _model()
    model[2].cuda()
    opt = _optimizer(model)
    before = _values(model)
    for value in (math.nan, None):
        opt.zero_grad()
        opt.train()
        model[2](model[1](model[0](X)).cuda()).square().mean().backward()
        if value is not None:
            model[2].bias.grad[0] = value
        opt.step()
        assert _equal(before, _values(model)) == (value is not None)
    assert opt.skipped_steps == 1


@pytest.mark.gpu
def test_steady_state_has_no_host_sync():
    model = _model(device="cuda")
    opt = _optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
    x, y = X.cuda(), Y.cuda()
    for step in range(6):
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            opt.zero_grad()
            with opt.sampled_params(train=True):
                cross_entropy(model(x), y).backward()
            opt.step()
            scheduler.step()
        finally:
            if step == 5:
                torch.cuda.set_sync_debug_mode("default")
    assert opt.skipped_steps == 0


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("ess", 0.0),
        ("hess_init", 0.0),
        ("beta1", 1.5),
        ("beta2", -0.1),
        ("weight_decay", -1e-9),
        ("clip_radius", 0.0),
        ("mc_samples", 0),
        ("mc_samples", 1.5),
        ("hess_approx", "fisher"),
        ("seed", 1 << 64),
    ],
)
def test_hyperparameters_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        _optimizer(_model(), **{name: value})


def test_bad_groups_and_params():
    with pytest.raises(ValueError, match="beta1"):
        IVON([{"params": [torch.zeros(2)], "beta1": 2.0}], lr=0.1, ess=1.0)
    with pytest.raises(TypeError, match=r"floating-point.*int64"):
        IVON([torch.zeros(2, dtype=torch.int64)], lr=0.1, ess=1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", "1e-3"), ("ess", None), ("clip_radius", [1.0]), ("seed", 1.5)]
)
def test_hyperparameters_that_are_no_numbers(name, value):
    """PyYAML reads 1e-3 as text, which float() would take."""
    with pytest.raises(TypeError, match=f"^{name} must be"):
        _optimizer(_model(), **{name: value})


def test_step_without_a_sample_says_what_to_write():
    model = _model()
    opt = _optimizer(model)
    _loss(model).backward()
    before = _values(model)
    with pytest.raises(RuntimeError, match=r"sampled_params\(train=True\)"):
        opt.step()
    assert _equal(before, _values(model))


def test_misused_samples():
    opt = _optimizer(_model())
    with pytest.raises(ValueError, match="evaluation"), opt.sampled_params(train=True, seed=1):
        pass
    with pytest.raises(ValueError, match="variance_scale"), opt.sampled_params(variance_scale=-1.0):
        pass
    opt.train()
    with pytest.raises(RuntimeError, match="one sample at a time"), opt.sampled_params(train=True):
        pass
    with pytest.raises(ValueError, match=r"opt\.eval"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize("change", ["freeze", "cast"])
def test_parameter_changed_between_samples_of_a_step_is_an_error(change):
    model = _model()
    opt = _optimizer(model)
    for _ in range(2):
        with opt.sampled_params(train=True):
            _loss(model).backward()
    if change == "freeze":
        model[2].bias.requires_grad_(False)
        with pytest.raises(RuntimeError, match="between the Monte Carlo samples"), opt.sampled_params(True):
            pass
    else:
        model.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="between the Monte Carlo samples"):
            opt.step()
    _train(model, opt, 1)  # the step was given up; the next one is sound
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("damage", ["shape", "key", "groups", "AdamW", "ivon-opt"])
def test_load_state_dict_that_does_not_fit_changes_nothing(damage):
    model, other = _model(), _model()
    opt, opt_other = _optimizer(model), _optimizer(other)
    _train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    if damage == "shape":
        state["state"][1]["hess"] = torch.zeros(8)
    elif damage == "key":
        del state["state"][1]["hess"]
    elif damage == "groups":
        state["param_groups"][0]["params"].pop()
    elif damage == "AdamW":  # before its first step there is no state that could not be IVON's
        state = torch.optim.AdamW(model.parameters()).state_dict()
    else:
        state = ivon_opt.IVON(model.parameters(), lr=0.1, ess=10.0).state_dict()
    _train(other, opt_other, 1)
    before = copy.deepcopy(opt_other.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        opt_other.load_state_dict(state)
    after = opt_other.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, values in before["state"].items():
        assert all(torch.equal(values[k], after["state"][index][k]) for k in values)
