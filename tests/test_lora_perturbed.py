"""The LoRA layer with a posterior sample a group of rows: against its twin, fp64 truth, one pass a sample."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bayeslora import lora_perturbed
from bayeslora.kernels import lora_perturbed as kernels
from bayeslora.kernels import lora_perturbed_twin as twin
from bayeslora.kernels.lora_perturbed_twin import Perturbation
from bayeslora.lora_linear import lora_linear

SCALING = 1.7
# The op's error against fp64 truth: `factor` times the twin's own at that dtype, plus `floor`, relative to
# the largest element of the truth. Both round h, the samples and the result once; sums run in other orders.
# Floor in fp32: the logarithm, root and sine of one word differ between kernel and torch in the last bits.
SLACK = {torch.float32: (3.0, 2.0**-18), torch.float16: (3.0, 2.0**-10), torch.bfloat16: (3.0, 2.0**-7)}
# The interpreter multiplies bf16 tiles as if they were integers: bf16 products are tested on GPUs alone.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
NAMES = ("y", "dx", "dA", "dB", "da_std", "db_std")
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")


@pytest.fixture
def triton_path(monkeypatch):
    """Take the kernels also without a GPU, through Triton's interpreter."""
    monkeypatch.setattr(lora_perturbed, "uses_triton", lambda device: True)


@pytest.fixture
def nan_filled_outputs(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def filled(self, *size, **keywords):
        out = new_empty(self, *size, **keywords)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def _inputs(groups, rows, n, k, r, dtype, device, adapter_dtype=None, bias=True):
    generator = torch.Generator().manual_seed(groups + 3 * rows + 7 * n + 31 * k + 101 * r)

    def draw(*shape, fan_in=1, to=dtype):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
        return values.to(device=device, dtype=to)

    adapter_dtype = adapter_dtype or dtype
    tensors = {
        "x": draw(groups, rows, k).requires_grad_(),
        "weight": draw(n, k, fan_in=k),
        "bias": draw(n) if bias else None,
        "lora_a": draw(r, k, fan_in=k, to=adapter_dtype).requires_grad_(),
        "lora_b": draw(n, r, fan_in=r, to=adapter_dtype).requires_grad_(),
        "a_std": draw(r, k, fan_in=k, to=torch.float32).abs_().requires_grad_(),
        "b_std": draw(n, r, fan_in=r, to=torch.float32).abs_().requires_grad_(),
    }
    seeds = torch.arange(groups, device=device) * 7 - 3  # a negative seed too
    draws = torch.arange(groups, device=device) % 3
    return tensors, (seeds, draws, 5, 1), draw(groups, rows, n)


def _results(function, tensors, sample, dy, dtype=None, **arguments):
    copies = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }
    stds = copies.pop("a_std"), copies.pop("b_std")
    perturbation = Perturbation(*stds, *sample)
    y = function(**copies, scaling=SCALING, perturbation=perturbation, **arguments)
    leaves = [copies["x"], copies["lora_a"], copies["lora_b"], *stds]
    return dict(zip(NAMES, (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def _error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def _assert_as_accurate_as_the_twin(tensors, sample, dy, dtype, **arguments):
    got = _results(lora_linear, tensors, sample, dy, **arguments)
    plain = _results(twin.perturbed_lora_linear, tensors, sample, dy, **arguments)
    truth = _results(twin.perturbed_lora_linear, tensors, sample, dy, torch.float64, **arguments)
    factor, floor = SLACK[dtype]
    for name, value in got.items():
        assert value.dtype == plain[name].dtype
        assert value.shape == plain[name].shape
        bound = factor * _error(plain[name], truth[name]) + floor
        assert _error(value, truth[name]) <= bound, (name, _error(value, truth[name]), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "rows", "n", "k", "r", "bias"),
    [
        (1, 1, 1, 1, 1, True),
        (3, 1, 100, 63, 3, False),  # decoding: one row a group; no whole groups of four
        (2, 17, 63, 100, 16, True),
        (5, 63, 36, 132, 4, False),
        (1, 150, 128, 64, 64, True),
        (2, 3, 40, 33, 100, False),
        (2, 5, 33, 40, 256, True),
    ],
)
def test_results_and_gradients(groups, rows, n, k, r, bias, dtype, device, triton_path, nan_filled_outputs):
    tensors, sample, dy = _inputs(groups, rows, n, k, r, dtype, device, bias=bias)
    _assert_as_accurate_as_the_twin(tensors, sample, dy, dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fp32_adapters_and_dropout(dropout_p, device, triton_path):
    tensors, sample, dy = _inputs(2, 9, 24, 20, 8, HALF, device, adapter_dtype=torch.float32)
    seed = torch.tensor(5, device=device)
    _assert_as_accurate_as_the_twin(tensors, sample, dy, HALF, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_one_pass_a_sample(dtype, device, triton_path):
    """Each group's output is the plain layer's with that group's sample written into A and B."""
    tensors, (seeds, draws, a_stream, b_stream), _ = _inputs(4, 6, 48, 40, 8, dtype, device)
    t = {name: None if v is None else v.detach() for name, v in tensors.items()}
    perturbation = Perturbation(t["a_std"], t["b_std"], seeds, draws, a_stream, b_stream)
    base = (t["weight"], t["bias"])
    together = lora_linear(t["x"], *base, t["lora_a"], t["lora_b"], SCALING, perturbation=perturbation)
    a = kernels.sample_factors(t["lora_a"], t["a_std"], seeds, draws, a_stream, dtype)
    b = kernels.sample_factors(t["lora_b"], t["b_std"], seeds, draws, b_stream, dtype)
    apart = torch.stack([lora_linear(t["x"][g], *base, a[g], b[g], SCALING) for g in range(4)])
    rounding = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
    assert _error(together, apart.double()) <= rounding
    assert _error(together[0], apart[1].double()) > 10 * rounding  # other samples, other outputs


@pytest.mark.parametrize("shape", [(1,), (7,), (33, 31), (64, 36)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_written_samples_are_the_contract_s(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(*shape, generator=generator).to(device)
    std = torch.rand(*shape, generator=generator).to(device)
    seeds, draws = torch.tensor([0, -1, 2**40], device=device), torch.tensor([0, 1, 2**32 - 1], device=device)
    got = kernels.sample_factors(mean, std, seeds, draws, 9, dtype)
    want = twin.sample_factors(mean, std, seeds, draws, 9, dtype)
    assert got.dtype == dtype
    # One unit in the last place of bf16 (the interpreter truncates); in fp32 the last bits of z.
    torch.testing.assert_close(got, want, rtol=2.0**-7 if dtype == torch.bfloat16 else 3e-6, atol=3e-6)


def test_zero_deviation_is_the_plain_layer(device, triton_path):
    tensors, sample, dy = _inputs(3, 5, 24, 20, 8, torch.float32, device)
    tensors["a_std"], tensors["b_std"] = (
        torch.zeros_like(tensors[k]).requires_grad_() for k in ("lora_a", "lora_b")
    )
    got = _results(lora_linear, tensors, sample, dy)
    plain = {name: t for name, t in tensors.items() if not name.endswith("std")}
    y = lora_linear(**plain, scaling=SCALING)
    want = (y, *torch.autograd.grad(y, [plain[k] for k in ("x", "lora_a", "lora_b")], dy))
    for name, value in zip(NAMES[:4], want, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_recomputes_the_same_samples(device, triton_path):
    tensors, sample, dy = _inputs(2, 5, 24, 20, 8, torch.float32, device)

    def rerun(**arguments):
        return checkpoint(lora_linear, **arguments, use_reentrant=False)

    got, want = (_results(f, tensors, sample, dy) for f in (rerun, lora_linear))
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_empty_batch_and_no_grad(device, triton_path):
    tensors, sample, _ = _inputs(2, 4, 24, 20, 8, torch.float32, device)
    tensors["x"] = tensors["x"].detach()[:, :0].requires_grad_()
    results = _results(lora_linear, tensors, sample, torch.ones(2, 0, 24, device=device))
    assert results["y"].shape == (2, 0, 24)
    assert all((results[name] == 0).all() for name in NAMES[2:])
    tensors, sample, _ = _inputs(2, 4, 24, 20, 8, torch.float32, device)
    perturbation = Perturbation(tensors.pop("a_std"), tensors.pop("b_std"), *sample)
    with torch.no_grad():
        y = lora_linear(**tensors, scaling=SCALING, perturbation=perturbation)
    assert not y.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_changed_in_place(bias, device, triton_path):
    tensors, sample, dy = _inputs(2, 4, 24, 20, 8, torch.float32, device, bias=bias)
    perturbation = Perturbation(tensors.pop("a_std"), tensors.pop("b_std"), *sample)

    def layer():
        return lora_linear(**tensors, scaling=SCALING, perturbation=perturbation)

    want = torch.autograd.grad(layer() * 3 + 1, tensors["lora_b"], dy)
    y = layer()
    y *= 3
    y += 1
    torch.testing.assert_close(torch.autograd.grad(y, tensors["lora_b"], dy), want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_second_derivatives(dropout_p, device, triton_path):
    """Of the norm of all gradients, in x, A, B and both deviations: as the twin's, which torch makes."""
    tensors, sample, dy = _inputs(2, 4, 24, 20, 8, torch.float32, device)
    seed = torch.tensor(5, device=device)
    results = []
    for function in (lora_linear, twin.perturbed_lora_linear):
        t = {name: v.detach().requires_grad_(v.requires_grad) for name, v in tensors.items()}
        leaves = [t[name] for name in ("x", "lora_a", "lora_b", "a_std", "b_std")]
        perturbation = Perturbation(t.pop("a_std"), t.pop("b_std"), *sample)
        y = function(**t, scaling=SCALING, perturbation=perturbation, dropout_p=dropout_p, seed=seed)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for got, want in zip(*results, strict=True):
        assert _error(got, want.double()) < 2e-5  # sums in another order, and the last bits of z


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_std": torch.ones(8, 21)}, "a_std has shape"),
        ({"b_std": torch.ones(8, 24)}, "b_std has shape"),
        ({"seeds": torch.zeros(2)}, "seeds is a torch.float32"),
        ({"draws": torch.zeros(3, dtype=torch.int64)}, "seeds has 2 elements and draws 3"),
        (dict.fromkeys(("seeds", "draws"), torch.zeros(5, dtype=torch.int64)), "multiple of"),
        (dict.fromkeys(("seeds", "draws"), torch.zeros(0, dtype=torch.int64)), "one of each"),
    ],
)  # fmt: skip
def test_bad_perturbations_are_refused(change, message):
    tensors, sample, _ = _inputs(2, 4, 24, 20, 8, torch.float32, torch.device("cpu"))
    perturbation = Perturbation(tensors.pop("a_std"), tensors.pop("b_std"), *sample)
    with pytest.raises(ValueError, match=message):
        lora_linear(**tensors, scaling=SCALING, perturbation=perturbation._replace(**change))
