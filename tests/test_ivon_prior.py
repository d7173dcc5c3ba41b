"""IVON with an earlier posterior as its prior: the equations, the conjugate answer, what stays as it was."""

import copy

import pytest
import torch
from torch import nn

from bayeslora import IVON, Posterior
from bayeslora.kernels import noise_twin


def _model(numel=64, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Linear(numel // 2, 2, bias=False, dtype=dtype)
    return model


def _prior(model, ess=30.0):
    posterior = IVON(model.parameters(), lr=0.1, ess=ess, hess_init=0.5).posterior(model)
    generator = torch.Generator().manual_seed(3)
    for g in posterior.parameters.values():
        g.hess.copy_(torch.rand(g.hess.shape, generator=generator, dtype=g.hess.dtype) + 0.2)
        g.mean.copy_(torch.randn(g.mean.shape, generator=generator, dtype=g.mean.dtype))
    return posterior


def _loss(model, target):
    return 0.5 * (model.weight - target).square().sum()


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("mc_samples", [1, 2])
@pytest.mark.parametrize("protocol", ["context", "train"])
def test_steps_follow_the_equations(hess_approx, mc_samples, protocol):
    if protocol == "train" and mc_samples > 1:
        pytest.skip("train() draws one sample a step")
    model = _model()
    prior = _prior(model)
    m0, pi0 = prior.mean["weight"].clone(), 1 / prior.variance["weight"]
    target = torch.randn_like(m0)
    lr, ess, beta1, beta2, clip = 0.05, 12.0, 0.8, 0.9, 0.7
    opt = IVON(
        model.parameters(), lr=lr, ess=ess, hess_init=0.3, beta1=beta1, beta2=beta2, clip_radius=clip,
        rescale_lr=False, hess_approx=hess_approx, seed=5, prior=prior,
    )  # fmt: skip
    d = pi0 / ess
    m, momentum, hess, draw = model.weight.detach().clone(), torch.zeros_like(m0), 0.3 + d, 0
    for step in range(1, 5):
        grads, curvatures = [], []
        for _ in range(mc_samples):
            draw += 1
            z = noise_twin.randn(m.numel(), seed=5, draw=draw, stream=0).double().view_as(m)
            g = m + z / (ess * hess).sqrt() - target
            grads.append(g)
            curvatures.append(g * z * (ess * hess).sqrt() if hess_approx == "price" else ess * g * g)
            if protocol == "context":
                with opt.sampled_params(train=True):
                    _loss(model, target).backward()
            else:
                opt.train()
                _loss(model, target).backward()
        opt.step()
        opt.zero_grad()
        g = sum(grads) / mc_samples + d * (m - m0)
        f = sum(curvatures) / mc_samples + d
        momentum = beta1 * momentum + (1 - beta1) * g
        hess = beta2 * hess + (1 - beta2) * f + 0.5 * (1 - beta2) ** 2 * (hess - f) ** 2 / hess
        m = m - lr * (momentum / (1 - beta1**step) / hess).clamp(-clip, clip)
        torch.testing.assert_close(model.weight.detach(), m)
        torch.testing.assert_close(opt.state[model.weight]["hess"], hess)
    after = opt.posterior(model)
    torch.testing.assert_close(1 / after.variance["weight"], ess * hess)


def test_it_finds_the_conjugate_posterior():
    model = nn.Linear(2000, 2, bias=False)
    posterior = IVON(model.parameters(), lr=0.1, ess=40.0, hess_init=0.5, weight_decay=0.0).posterior(model)
    posterior.parameters["weight"].mean[0] = 3.0  # precision 20 everywhere
    posterior.parameters["weight"].mean[1] = -1.0
    ess, curvature, target = 10.0, 2.0, 1.0  # data of precision 20
    opt = IVON(
        model.parameters(), lr=0.05, ess=ess, hess_init=2.0, beta2=0.99, rescale_lr=False, prior=posterior
    )
    for _ in range(600):
        with opt.sampled_params(train=True):
            (0.5 * curvature * (model.weight - target).square().sum()).backward()
        opt.step()
        opt.zero_grad()
    after = opt.posterior(model)
    for row, wanted in ((0, (20 * 3.0 + 20 * 1.0) / 40), (1, (20 * -1.0 + 20 * 1.0) / 40)):
        assert after.mean["weight"][row].mean() == pytest.approx(wanted, abs=0.02)
        precision = 1 / after.variance["weight"][row]
        assert precision.mean() == pytest.approx(40.0, rel=0.1)  # the step's square biases it upwards


def test_a_scaled_step_is_the_plain_one():
    results = []
    for scale in (None, 64.0):
        model = _model(dtype=torch.float32)
        opt = IVON(model.parameters(), lr=0.05, ess=12.0, prior=_prior(model), beta2=0.9)
        for _ in range(3):
            with opt.sampled_params(train=True):
                (_loss(model, 1.0) * (scale or 1.0)).backward()
            if scale is not None:
                opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
            opt.step()
            opt.zero_grad()
        results.append((model.weight.detach(), opt.state[model.weight]["hess"]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_it_resumes_and_copies():
    model = _model()
    opt = IVON(model.parameters(), lr=0.05, ess=12.0, prior=_prior(model), beta2=0.9)

    def run(model, opt, steps):
        for _ in range(steps):
            with opt.sampled_params(train=True):
                _loss(model, 1.0).backward()
            opt.step()
            opt.zero_grad()

    run(model, opt, 2)
    twin, twin_opt = copy.deepcopy((model, opt))
    other = copy.deepcopy(model)
    resumed = IVON(other.parameters(), lr=0.05, ess=12.0, prior=_prior(other), beta2=0.9)
    resumed.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, twin_opt), (other, resumed)):
        run(m, o, 2)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.weight, other.weight)


def test_the_prior_does_not_move_and_holds_back_forgetting():
    model = _model()
    prior = _prior(model)
    m0 = prior.mean["weight"].clone()
    with torch.no_grad():
        model.weight.copy_(m0)
    far = {}
    for name in ("with", "without"):
        student = copy.deepcopy(model)
        own = Posterior(student, copy.deepcopy(prior.parameters))
        own.parameters["weight"].parameter = student.weight
        given = {"prior": own} if name == "with" else {}
        opt = IVON(student.parameters(), lr=0.05, ess=12.0, rescale_lr=False, **given)
        for _ in range(100):
            with opt.sampled_params(train=True):
                _loss(student, 5.0).backward()
            opt.step()
            opt.zero_grad()
        far[name] = float((student.weight - m0).norm())
    assert far["with"] < 0.7 * far["without"]
    assert torch.equal(prior.mean["weight"], m0)


def test_bad_priors():
    model = _model()
    prior = _prior(model)
    with pytest.raises(TypeError, match="prior must be an IVON posterior, got str"):
        IVON(model.parameters(), lr=0.1, ess=1.0, prior="x")
    other = _model()
    with pytest.raises(ValueError, match=r"no Gaussian of a trained parameter of shape \(2, 32\)"):
        IVON(other.parameters(), lr=0.1, ess=1.0, prior=prior)
    head = nn.Linear(2, 2)
    groups = [{"params": model.parameters()}, {"params": head.parameters(), "perturb": False}]
    opt = IVON(groups, lr=0.1, ess=1.0, weight_decay=0.1, prior=prior)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.1]
    with pytest.raises(ValueError, match="which a prior fixes"):
        IVON.like_adamw(model.parameters(), lr=0.1, num_data=10, prior=prior)
    prior.prune(0.2)
    with pytest.raises(ValueError, match="'weight' has pruned elements"):
        IVON(model.parameters(), lr=0.1, ess=1.0, prior=prior)


@pytest.mark.gpu
def test_the_kernels_follow_the_twin():
    results = []
    for device in ("cpu", "cuda"):
        model = _model(dtype=torch.float32).to(device)
        prior = _prior(copy.deepcopy(model).cpu())
        for g in prior.parameters.values():
            g.parameter, g.mean, g.hess = model.weight, g.mean.to(device), g.hess.to(device)
        opt = IVON(model.parameters(), lr=0.05, ess=12.0, prior=prior, beta2=0.9)
        for _ in range(4):
            with opt.sampled_params(train=True):
                _loss(model, 1.0).backward()
            opt.step()
            opt.zero_grad()
        results.append((model.weight.detach().cpu(), opt.state[model.weight]["hess"].cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
