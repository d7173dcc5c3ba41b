"""MonteCLoRA's closed forms: gradients against autograd and finite differences; how little a step calls."""

import pytest
import torch
from monteclora_models import BATCH, bank_of, patched_model
from torch.profiler import ProfilerActivity, profile

import bayeslora
from bayeslora import monteclora_math as mm
from bayeslora.monteclora_part import _Loss
from bayeslora.monteclora_terms import DrawTerms, Priors

N = 4
SCALE = torch.tensor(0.3, dtype=torch.float64)
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # fp64, the same formulas in another order
CASES = [
    # ranks, copies, outer samples, exact Dirichlet, sparse
    ([3, 3], 1, 1, True, False),
    ([2, 5, 1], 1, 1, True, True),
    ([3, 3], 2, 2, True, False),
    ([2, 4], 2, 3, False, True),
    ([3, 3], 1, 2, False, False),
]


def _problem(ranks, copies, outer, exact, sparse, spread=0.7):
    """Flat priors, tables and noise of a few sites; some variances and one α at their floors."""
    generator = torch.Generator().manual_seed(2)
    layers, rows = len(ranks), sum(ranks) * copies
    tables = mm.SiteTables(ranks, copies, range(layers * copies), torch.device("cpu"))
    flat = spread * torch.randn(sum(ranks) + layers * N, generator=generator, dtype=torch.float64)
    flat[1], flat[-1] = -6.0, -15.0
    chi_square = 3.0 * torch.rand(outer, rows, generator=generator, dtype=torch.float64) + 0.1
    weights = torch.randn(outer, layers * copies, N, generator=generator, dtype=torch.float64)
    return flat, tables, mm.Noise(chi_square, weights, exact=exact)


def _definitions(flat, tables, noise, sparse):
    """Variances, α and π as `monteclora_math` defines them, for autograd."""
    rows = sum(tables.site_ranks) // tables.copies
    s, e = flat[:rows], flat[rows:].view(-1, N)
    alpha = tables.per_copy(mm.concentrations(e))
    variances = mm.row_variances(s, tables, noise.chi_square)
    return s, alpha, variances, mm.mixture_weights(alpha, noise, sparse)


def _defined_loss(flat, tables, noise, sparse, prior, weight, use_entropy):
    s, alpha, variances, weights = _definitions(flat, tables, noise, sparse)
    kl = mm.gaussian_kl(variances, tables, N) + mm.wishart_kl(s, tables) + mm.dirichlet_kl(alpha, prior)
    entropy = weights.square().sum() / weights.shape[0] if use_entropy else 0.0
    return weight * kl.sum() + entropy


@pytest.mark.parametrize("collapsed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_coefficients_and_their_gradient_are_those_of_the_definition(case, collapsed):
    flat, tables, noise = _problem(*case)
    sparse = case[-1]
    flat.requires_grad_()
    _, _, variances, weights = _definitions(flat, tables, noise, sparse)
    expected = mm.coefficients(variances, weights, SCALE, tables, collapsed)
    terms = DrawTerms(Priors(flat, tables, N), noise, sparse)
    found = terms.coefficients(SCALE, collapsed)
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    d_kappa = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, flat, d_kappa)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(terms.gradient(d_kappa), gradient, **EXACT)


@pytest.mark.parametrize("use_entropy", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_those_of_the_definition(case, use_entropy):
    flat, tables, noise = _problem(*case)
    sparse = case[-1]
    flat.requires_grad_()
    expected = _defined_loss(flat, tables, noise, sparse, 0.1, 0.02, use_entropy)
    priors = Priors(flat, tables, N)
    value, gradient = priors.loss(DrawTerms(priors, noise, sparse), 0.1, 0.02, use_entropy)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    (truth,) = torch.autograd.grad(expected, flat)
    # ψ'(1e-6) enters with a factor that is zero; torch's ψ' itself is good to 1e-9.
    torch.testing.assert_close(gradient, truth, rtol=1e-7, atol=1e-9)


class _Kappa(torch.autograd.Function):
    """κ of flat priors with `DrawTerms`' gradient, as the perturbation has it."""

    @staticmethod
    def forward(ctx, flat, tables, noise, sparse, collapsed):
        ctx.terms = DrawTerms(Priors(flat, tables, N), noise, sparse)
        return ctx.terms.coefficients(SCALE, collapsed).clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.terms.gradient(grad), None, None, None, None


@pytest.mark.parametrize("collapsed", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if not case[3]])
def test_gradients_are_finite_differences_with_the_noise_held_fixed(case, collapsed):
    """The logistic normal, whose noise does not depend on α; implicit gradients have a test of their own."""
    flat, tables, noise = _problem(*case, spread=0.3)
    sparse = case[-1]

    def loss(flat):
        priors = Priors(flat, tables, N)
        value, gradient = priors.loss(DrawTerms(priors, noise, sparse), 0.5, 0.1, True)
        return _Loss.apply(flat, value, gradient)

    assert torch.autograd.gradcheck(loss, (flat.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: _Kappa.apply(x, tables, noise, sparse, collapsed), (flat,))


def test_the_loss_follows_priors_that_changed_after_the_forward():
    model = patched_model()
    model(**BATCH)
    before = bayeslora.monteclora_loss(model)
    with torch.no_grad():
        bank_of(model).layers[-1].lora_monteclora_sampler["default"].std_prior.add_(0.5)
    part = bank_of(model).parts[0]
    flat = torch.cat(part.prior_parameters()).double()
    first = part.sampler(0)
    expected = _defined_loss(
        flat, part.tables, part.current.noise, False, first.dirichlet_prior, first.kl_loss_weight, True
    )
    found = bayeslora.monteclora_loss(model)
    torch.testing.assert_close(found.double(), expected / len(part.plan.sites), rtol=1e-6, atol=0.0)
    assert not torch.equal(found, before)


def test_frozen_matrices_and_priors_get_no_gradient():
    model, free = patched_model(), patched_model()
    layers = bank_of(model).layers
    samplers = [layer.lora_monteclora_sampler["default"] for layer in layers]
    frozen = [layers[0].lora_A["default"].weight, samplers[1].std_prior, samplers[2].expert_weights_prior]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for one in (model, free):
        (one(**BATCH).loss + bayeslora.monteclora_loss(one)).backward()
    expected = dict(free.named_parameters())
    assert all(parameter.grad is None for parameter in frozen)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-6, atol=1e-9)


def test_a_single_matrix_is_not_perturbed_in_place():
    model = patched_model({"target_modules": r".*layers\.0\.self_attn\.q_proj"})
    weight = bank_of(model).layers[0].lora_A["default"].weight
    before = weight.detach().clone()
    bank_of(model).refresh()
    assert torch.equal(weight, before)
    assert not torch.equal(bank_of(model).parts[0].current.outputs[0], before)


# ---- what a step calls: the host's time, which an eager step of few tokens waits for -------------------


def _operators(fn):
    """The operators that were called from outside of operators, and the autograd functions that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        fn()
    events = found.events()
    called = [e for e in events if e.name.startswith("aten::")]
    called = [e for e in called if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return len(called), sum(e.name.startswith("autograd::engine::evaluate_function") for e in events)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_calls_of_a_step_are_few_and_do_not_grow_with_the_layers(targets, monkeypatch):
    """Bounds: 45 operators to draw and perturb, 60 for the loss and its gradient, and what autograd adds.

    Backward runs the noise's function, the loss's, the priors', and hands each parameter its gradient.
    """
    from bayeslora.kernels import monteclora_twin

    made = {}  # the kernels are one launch each; their twins loop over the sites

    def log_gamma(concentration, *_, **__):
        return made.setdefault("log_gamma", torch.zeros_like(concentration))

    def coefficient_gradient(plan, *_, **__):
        return made.setdefault("gradient", torch.zeros(plan.num_rows, 1))

    monkeypatch.setattr(monteclora_twin, "log_gamma", log_gamma)
    monkeypatch.setattr(monteclora_twin, "perturb_", lambda *_, **__: None)
    monkeypatch.setattr(monteclora_twin, "coefficient_gradient", coefficient_gradient)
    model = patched_model({"target_modules": targets})
    bank = bank_of(model)
    count = len(bank.layers)

    def backward():
        outputs = bank.parts[0].current.outputs
        torch.autograd.backward(
            [*outputs, bank.loss()], [*torch.zeros(count, *outputs[0].shape), torch.ones(())]
        )

    for _ in range(2):  # tables and zeros are made once
        bank.refresh()
        bank.loss()
        backward()
        model.zero_grad()
        bank.refresh()
    assert _operators(bank.refresh)[0] <= 45
    assert _operators(bank.loss)[0] <= 60
    operators, functions = _operators(backward)
    assert functions <= 4 + 3 * count  # and A, s and e of each layer
    assert operators <= 60 + 35 + 3 * 2 * count  # a leaf detaches its gradient, or copies it
