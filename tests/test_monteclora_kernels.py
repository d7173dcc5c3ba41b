"""MonteCLoRA's samplers: kernel and twin agree, their laws, and gradients with the noise held fixed."""

import numpy as np
import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from scipy import special, stats

from bayeslora import samplers
from bayeslora.kernels import monteclora, monteclora_twin, noise_twin
from bayeslora.kernels.monteclora_plan import PerturbPlan, Site

DRAWS = 100_000
SIGNIFICANT = 1e-3  # some thirty tests of right laws: each may be unlucky at 1%; a wrong law gives 1e-20
SITES = [Site(3, 1023, False, 5), Site(4, 7, True, 6), Site(1, 2050, False, 9), Site(5, 64, True, 2)]
# fp32 sums of the same terms; bf16 and fp16 are rounded once from such a sum.
CLOSE = {
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},  # the normals themselves are fp32
    torch.float32: {"rtol": 2e-5, "atol": 5e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}


def _gamma_inputs(numel, device="cpu"):
    element = torch.arange(numel, device=device)
    return torch.full((numel,), 3, device=device), element


@pytest.mark.parametrize("seed", [0, -7, 2**63 + 11])
def test_log_gamma_agrees_with_twin(seed, device):
    concentration = torch.logspace(-2, 4, 777, dtype=torch.float64)
    stream, element = _gamma_inputs(777)
    twin = monteclora_twin.log_gamma(concentration, stream, element, seed=seed, draw=4)
    out = monteclora.log_gamma(
        concentration.to(device), stream.to(device), element.to(device), seed=seed, draw=4
    )
    assert torch.isfinite(twin).all()
    torch.testing.assert_close(out.cpu(), twin, rtol=1e-10, atol=1e-10)


def test_log_gamma_reads_its_draw_from_device_memory(device):
    concentration = torch.full((64,), 0.7, dtype=torch.float64, device=device)
    stream, element = _gamma_inputs(64, device)
    draw = torch.tensor([9], device=device)
    for module in (monteclora, monteclora_twin):
        a = module.log_gamma(concentration, stream, element, seed=1, draw=draw)
        b = module.log_gamma(concentration, stream, element, seed=1, draw=9)
        assert torch.equal(a, b)
        assert not torch.equal(a, module.log_gamma(concentration, stream, element, seed=1, draw=10))


@pytest.mark.parametrize("r", [1, 8, 32, 64])
def test_chi_square_follows_its_law(r):
    w = samplers.chi_square(torch.full((DRAWS,), float(r)), seed=r, stream=1)
    assert stats.kstest(w.numpy(), stats.chi2(r).cdf).pvalue > SIGNIFICANT
    assert abs(w.mean() - r) < 4 * (2 * r / DRAWS) ** 0.5


@pytest.mark.parametrize("a", [0.05, 0.5, 1.0, 50.0, 1e5])
def test_gamma_follows_its_law_also_deep_in_the_tail(a):
    stream, element = _gamma_inputs(DRAWS)
    log_g = monteclora_twin.log_gamma(
        torch.full((DRAWS,), a, dtype=torch.float64), stream, element, seed=17, draw=0
    )
    assert torch.isfinite(log_g).all()
    # P(ln g <= t) by the limit law where g underflows.
    low = log_g.numpy() < -30
    with np.errstate(under="ignore"):
        cdf = special.gammainc(a, np.exp(np.clip(log_g.numpy(), -30, None)))
    cdf[low] = np.exp(a * log_g.numpy()[low] - special.gammaln(a + 1))
    assert stats.kstest(cdf, "uniform").pvalue > SIGNIFICANT


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 50.0])
def test_dirichlet_follows_its_law(alpha):
    concentration = torch.tensor([alpha, 2 * alpha, 0.5 * alpha, alpha], dtype=torch.float64)
    pi = samplers.dirichlet(concentration.expand(DRAWS, 4), seed=3)
    assert (pi.sum(-1) - 1).abs().max() < 1e-12
    torch.manual_seed(0)
    theirs = torch.distributions.Dirichlet(concentration).sample((DRAWS,))
    for i in range(4):
        assert stats.ks_2samp(pi[:, i].numpy(), theirs[:, i].numpy()).pvalue > SIGNIFICANT
        marginal = stats.beta(concentration[i].item(), (concentration.sum() - concentration[i]).item())
        inner = pi[:, i].clamp(1e-300, 1 - 1e-16)
        assert stats.kstest(inner.numpy(), marginal.cdf).pvalue > SIGNIFICANT


def test_pefts_weights_are_not_dirichlet():
    """The defect: a logistic normal in the Dirichlet's place."""
    sampler = MontecloraSampler(2, 2, num_samples=4, buffer_size=1, device="cpu")
    alpha = torch.full((4,), 0.5)
    torch.manual_seed(0)
    draws = torch.stack([sampler.dirichlet_reparameterization(alpha, torch.randn(4)) for _ in range(3000)])
    first = draws.softmax(-1)[:, 0].detach().numpy()
    assert stats.kstest(first, stats.beta(0.5, 1.5).cdf).pvalue < 1e-10
    ours = samplers.dirichlet(alpha.expand(3000, 4), seed=1)[:, 0].numpy()
    assert stats.kstest(ours, stats.beta(0.5, 1.5).cdf).pvalue > SIGNIFICANT


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0, 50.0])
def test_dirichlet_gradient_is_that_of_the_inverse_distribution_function(alpha):
    """With u = F(g; a) held fixed, g(a) is F's inverse: a finite difference without our formulas."""
    base = np.array([alpha, 1.3 * alpha, 0.6 * alpha, 2.0 * alpha])
    concentration = torch.tensor(base, requires_grad=True)
    pi = samplers.dirichlet(concentration, seed=21)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((pi * weights).sum(), concentration)
    element = torch.arange(4)
    log_g = monteclora_twin.log_gamma(
        torch.tensor(base), torch.zeros_like(element), element, seed=21, draw=0
    ).numpy()
    u = special.gammainc(base, np.exp(log_g))

    def value(a):
        g = special.gammaincinv(a, u)
        return float((g / g.sum() * weights.numpy()).sum())

    for i in range(4):
        step = 1e-5 * base[i]
        up, down = base.copy(), base.copy()
        up[i] += step
        down[i] -= step
        # torch's gamma gradient is good to about 1e-4 between its regimes.
        assert gradient[i].item() == pytest.approx((value(up) - value(down)) / (2 * step), rel=2e-3, abs=1e-5)


def test_log_gamma_gradient_is_finite_and_continuous_at_the_limit_law():
    a = torch.full((3,), 0.01, dtype=torch.float64, requires_grad=True)
    log_g = torch.tensor([-1e4, -20.0001, -19.9999], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(samplers.LogGammaGradient.apply(a, log_g).sum(), a)
    assert torch.isfinite(gradient).all()
    assert gradient[1].item() == pytest.approx(gradient[2].item(), rel=1e-4)


def test_expected_dirichlet_gradient_is_the_gradient_of_the_expectation():
    """E π_0 = α_0 / Σα, so dE/dα is known in closed form."""
    alpha = torch.tensor([0.4, 1.5, 0.7], dtype=torch.float64, requires_grad=True)
    pi = samplers.dirichlet(alpha.expand(DRAWS, 3), seed=8)
    (gradient,) = torch.autograd.grad(pi[:, 0].mean(), alpha)
    total = alpha.sum().item()
    exact = [(total - 0.4) / total**2, -0.4 / total**2, -0.4 / total**2]
    assert gradient.tolist() == pytest.approx(exact, abs=4e-3)


def test_wishart_follows_its_law():
    torch.manual_seed(0)
    scale_tril = torch.linalg.cholesky(torch.cov(torch.randn(4, 30, dtype=torch.float64)))
    w = samplers.wishart(5.5, scale_tril, DRAWS, seed=2)
    theirs = torch.distributions.Wishart(df=torch.tensor(5.5).double(), scale_tril=scale_tril)
    sample = theirs.sample((DRAWS,))
    scale = scale_tril @ scale_tril.T
    assert torch.allclose(w.mean(0), 5.5 * scale, atol=0.05)
    for i, j in [(0, 0), (3, 3), (2, 0), (3, 2)]:
        assert stats.ks_2samp(w[:, i, j].numpy(), sample[:, i, j].numpy()).pvalue > SIGNIFICANT
    for i in range(4):
        standard = (w[:, i, i] / scale[i, i]).numpy()
        assert stats.kstest(standard, stats.chi2(5.5).cdf).pvalue > SIGNIFICANT
    assert torch.linalg.eigvalsh(w[:100]).min() > 0


def test_wishart_diagonal_of_the_identity_is_independent_chi_square():
    """Why MonteCLoRA needs no matrices: the diagonal of Wishart(r, I)."""
    w = samplers.wishart(3, torch.eye(3), DRAWS, seed=6).diagonal(dim1=1, dim2=2)
    for i in range(3):
        assert stats.kstest(w[:, i].numpy(), stats.chi2(3).cdf).pvalue > SIGNIFICANT
    assert (torch.corrcoef(w.T) - torch.eye(3)).abs().max() < 4.5 / DRAWS**0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samplers.gamma(torch.tensor([0.0]), seed=0), "concentration must be positive"),
        (lambda: samplers.dirichlet(torch.tensor([1.0, float("inf")]), seed=0), "positive and finite"),
        (lambda: samplers.wishart(2.0, torch.eye(3), 1, seed=0), "df must be > 2"),
        (lambda: samplers.wishart(4.0, torch.zeros(2, 3), 1, seed=0), "square matrix"),
        (lambda: samplers.wishart(4.0, torch.eye(3), 0, seed=0), "num_samples must be >= 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _problem(dtype, components, device="cpu"):
    plan = PerturbPlan(SITES, torch.device(device))
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(plan.size, generator=generator, dtype=torch.float64).to(dtype)
    coefficients = torch.rand(plan.num_rows, components, generator=generator)
    return plan, flat.to(device), coefficients.to(device)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_perturb_agrees_with_twin(dtype, components, device):
    plan, flat, coefficients = _problem(dtype, components, device)
    cpu_plan, expected, cpu_coefficients = _problem(dtype, components)
    monteclora.perturb_(plan, flat, coefficients, seed=-3, draw=2)
    monteclora_twin.perturb_(cpu_plan, expected, cpu_coefficients, seed=-3, draw=2)
    torch.testing.assert_close(flat.cpu(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coefficient_gradient_agrees_with_twin(dtype, components, device):
    plan, grad, _ = _problem(dtype, components, device)
    cpu_plan, cpu_grad, _ = _problem(dtype, components)
    out = monteclora.coefficient_gradient(plan, grad, components, seed=5, draw=1)
    truth = monteclora_twin.coefficient_gradient(cpu_plan, cpu_grad.double(), components, seed=5, draw=1)
    # Sums of up to 2050 products in fp32.
    torch.testing.assert_close(out.double().cpu(), truth, rtol=1e-4, atol=2e-3)


def test_coefficient_gradient_is_the_derivative_of_the_perturbation():
    plan, flat, coefficients = _problem(torch.float64, 2)
    weights = torch.randn(plan.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradient = monteclora_twin.coefficient_gradient(plan, weights, 2, seed=5, draw=1)

    def value(kappa):
        out = flat.clone()
        monteclora_twin.perturb_(plan, out, kappa, seed=5, draw=1)
        return (out * weights).sum()

    kappa = coefficients.double()
    for row, n in [(0, 0), (4, 1), (plan.num_rows - 1, 0)]:
        step = torch.zeros_like(kappa)
        step[row, n] = 0.5  # the perturbation is linear in kappa: any step is exact
        difference = (value(kappa + step) - value(kappa - step)).item()
        assert gradient[row, n].item() == pytest.approx(difference, rel=1e-9)


def test_noise_is_that_of_the_contract_and_does_not_depend_on_the_other_sites():
    plan = PerturbPlan(SITES, torch.device("cpu"))
    flat = torch.zeros(plan.size)
    ones = torch.zeros(plan.num_rows, 2)
    ones[:, 1] = 1.0
    monteclora_twin.perturb_(plan, flat, ones, seed=5, draw=1)
    first = plan.by_rows(flat, 0)
    stream = noise_twin.randn(2 * 3 * 1024, seed=5, draw=1, stream=5).view(2, 3, 1024)
    assert torch.equal(first, stream[1, :, :1023])
    alone = PerturbPlan(SITES[1:2], torch.device("cpu"))
    single = torch.zeros(alone.size)
    monteclora_twin.perturb_(alone, single, ones[:4], seed=5, draw=1)
    assert torch.equal(alone.view(single, 0), plan.view(flat, 1))
