"""The fused LoRA linear op against its twin, an explicit-mask reference and fp64 truth."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bayeslora import lora_products
from bayeslora.kernels import lora_linear_twin as twin
from bayeslora.kernels.noise_twin import random_words
from bayeslora.lora_linear import apply_layers, lora_linear
from bayeslora.lora_passes import LoraWeights

# The op's error against fp64 truth may be `factor` times the twin's own at that dtype, plus `floor`, both
# relative to the largest element of the truth.
SLACK = {
    # The op folds s into a product and adds into y, so it rounds in other places, not more often; a
    # maximum over few elements varies by about 3. Floor: one rounding where the twin happens to be exact.
    torch.float32: (3.0, 2.0**-23),
    torch.float16: (3.0, 2.0**-10),
    torch.bfloat16: (3.0, 2.0**-7),
}
# torch says so of the first product in autograd's own thread, whoever asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
SCALING = 1.7  # not a power of two: folding it somewhere else would show


def _seed(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


def _inputs(m, n, k, r, dtype, device, *, adapter_dtype=None, bias=True):
    """x, W, bias, A, B and dy with entries of order 1, drawn on the CPU; x, A and B require gradients."""
    generator = torch.Generator().manual_seed(m + 7 * n + 31 * k + 101 * r)

    def draw(*shape, fan_in=1, to=dtype):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
        return values.to(device=device, dtype=to)

    adapter_dtype = adapter_dtype or dtype
    return {
        "x": draw(m, k).requires_grad_(),
        "weight": draw(n, k, fan_in=k),
        "bias": draw(n) if bias else None,
        "lora_a": draw(r, k, fan_in=k, to=adapter_dtype).requires_grad_(),
        "lora_b": draw(n, r, fan_in=r, to=adapter_dtype).requires_grad_(),
    }, draw(m, n)


def _results(function, inputs, dy, dtype=None, **arguments):
    """y, dx, dA, dB of ``function``, on copies of the inputs cast to ``dtype``."""
    copies = {
        name: None
        if value is None
        else value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }
    y = function(**copies, scaling=SCALING, **arguments)
    leaves = [copies[name] for name in ("x", "lora_a", "lora_b")]
    return dict(
        zip(("y", "dx", "dA", "dB"), (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True)
    )


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def _assert_as_accurate_as_the_twin(inputs, dy, dtype, **arguments):
    got = _results(lora_linear, inputs, dy, **arguments)
    plain = _results(twin.lora_linear, inputs, dy, **arguments)
    truth = _results(twin.lora_linear, inputs, dy, torch.float64, **arguments)
    factor, floor = SLACK[dtype]
    for name, value in got.items():
        assert value.dtype == plain[name].dtype
        assert value.shape == plain[name].shape
        bound = factor * _error(plain[name], truth[name]) + floor
        assert _error(value, truth[name]) <= bound, (name, _error(value, truth[name]), bound)


@pytest.fixture
def nan_filled_outputs(monkeypatch):
    """Fill every tensor that the op allocates with NaN: what it does not write, shows."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **k: new_empty(self, *size, **k).fill_(math.nan)
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "r", "bias"),
    [
        (1, 1, 1, 1, True),
        (1, 100, 63, 3, False),
        (63, 1, 100, 16, True),
        (100, 63, 1023, 3, True),
        (63, 1023, 100, 64, False),
        (1023, 100, 63, 16, True),
        (100, 100, 1, 1, False),
        (5, 33, 40, 256, True),
    ],
)
def test_results_and_gradients(m, n, k, r, bias, dtype, dropout_p, device, nan_filled_outputs):
    inputs, dy = _inputs(m, n, k, r, dtype, device, bias=bias)
    _assert_as_accurate_as_the_twin(inputs, dy, dtype, dropout_p=dropout_p, seed=_seed(5, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_adapters_in_fp32_under_half_precision_activations(dtype, dropout_p, device):
    inputs, dy = _inputs(100, 63, 64, 16, dtype, device, adapter_dtype=torch.float32)
    _assert_as_accurate_as_the_twin(inputs, dy, dtype, dropout_p=dropout_p, seed=_seed(5, device))


@pytest.mark.parametrize("shape", [(63,), (5, 63), (2, 3, 63), (2, 3, 2, 63), (0, 63), (2, 0, 63)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions_and_empty_batches(shape, dropout_p, bias, device):
    inputs, _ = _inputs(12, 100, 63, 3, torch.float32, device, bias=bias)
    inputs["x"] = inputs["x"].detach()[: math.prod(shape[:-1])].reshape(shape).requires_grad_()
    dy = torch.ones(*shape[:-1], 100, device=device)
    seed = _seed(3, device)
    got = _results(lora_linear, inputs, dy, dropout_p=dropout_p, seed=seed)
    want = _results(twin.lora_linear, inputs, dy, dropout_p=dropout_p, seed=seed)
    for name, value in got.items():
        torch.testing.assert_close(
            value, want[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat(1, 2)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, dim=0)[::2],
        lambda x: x[:1].expand(4, -1),
        lambda x: x.view(4, 3, -1).transpose(0, 1),
    ],
    ids=["column-major", "padded rows", "strided rows", "expanded", "transposed batch"],
)
def test_strides_of_x_and_dy_change_nothing(view, dropout_p, device):
    inputs, _ = _inputs(12, 7, 10, 3, torch.float32, device)
    x, dy = view(inputs["x"].detach()), view(torch.arange(84.0, device=device).view(12, 7))
    assert not x.is_contiguous()
    arguments = {"scaling": SCALING, "dropout_p": dropout_p, "seed": _seed(3, device)}
    rest = [inputs[name] for name in ("weight", "bias", "lora_a", "lora_b")]
    results = []
    for layout in (lambda t: t, torch.Tensor.contiguous):
        leaf = layout(x).requires_grad_()
        y = lora_linear(leaf, *rest, **arguments)
        results.append([y, *torch.autograd.grad(y, [leaf, rest[2], rest[3]], layout(dy))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_weight_may_be_a_transposed_view(device):
    inputs, dy = _inputs(12, 7, 10, 3, torch.float32, device)
    stored = inputs["weight"].t().contiguous()
    want = _results(lora_linear, inputs, dy)
    rest = {name: value for name, value in inputs.items() if name != "weight"}
    y = lora_linear(**rest, weight=stored.t(), scaling=SCALING)
    torch.testing.assert_close(y, want["y"])
    torch.testing.assert_close(torch.autograd.grad(y, inputs["x"], dy)[0], want["dx"])


def test_gradients_are_those_of_the_function_computed(device):
    inputs, _ = _inputs(3, 5, 7, 2, torch.float64, device)
    seed = _seed(11, device)

    def function(x, a, b):
        return lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, 0.4, seed)

    assert torch.autograd.gradcheck(function, (inputs["x"], inputs["lora_a"], inputs["lora_b"]))


@pytest.mark.parametrize(
    "needed",
    [{"x"}, {"lora_a"}, {"lora_b"}, {"x", "lora_b"}, set()],
    ids=lambda names: "+".join(sorted(names)) or "none",
)
def test_only_needed_gradients_are_computed_and_saved_for(needed, device):
    inputs, dy = _inputs(6, 5, 7, 2, torch.float32, device)
    full = _results(lora_linear, inputs, dy)
    for name in ("x", "lora_a", "lora_b"):
        inputs[name] = inputs[name].detach().requires_grad_(name in needed)
    y = lora_linear(**inputs, scaling=SCALING)
    assert y.requires_grad == bool(needed)
    if not needed:
        return
    x, hidden, seed, lora_a, lora_b, weight, *watched = y.grad_fn.saved_tensors
    assert (x is not None) == ("lora_a" in needed)
    assert (weight is not None) == (lora_a is not None) == ("x" in needed)
    assert (lora_b is not None) == bool({"x", "lora_a"} & needed)
    assert (hidden is not None) == ("lora_b" in needed)
    assert seed is None
    assert len(watched) == 2 * bool({"x", "lora_a"} & needed)
    y.backward(dy)
    for name, gradient in (("x", "dx"), ("lora_a", "dA"), ("lora_b", "dB")):
        if name in needed:
            torch.testing.assert_close(inputs[name].grad, full[gradient])
        else:
            assert inputs[name].grad is None


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "x", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_change_in_place_before_backward_is_an_error(name, dtype, device):
    """Also where backward reads a copy of the adapter in another dtype."""
    inputs, dy = _inputs(6, 5, 7, 2, dtype, device, adapter_dtype=torch.float32)
    inputs["x"] = inputs["x"] * 1
    y = lora_linear(**inputs, scaling=SCALING)
    with torch.no_grad():
        inputs[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        y.backward(dy)


def test_the_output_may_be_changed_in_place(device):
    inputs, dy = _inputs(6, 5, 7, 2, torch.float32, device)
    inputs["x"] = inputs["x"].detach().view(2, 3, 7).requires_grad_()
    want = torch.autograd.grad(
        lora_linear(**inputs, scaling=SCALING) * 3 + 1, inputs["lora_b"], dy.view(2, 3, 5)
    )
    y = lora_linear(**inputs, scaling=SCALING)
    y *= 3
    y += 1
    torch.testing.assert_close(torch.autograd.grad(y, inputs["lora_b"], dy.view(2, 3, 5)), want)


def test_a_run_on_fake_tensors_leaves_nothing_behind(device):
    """As tools do that estimate memory: nothing of theirs may turn up in a later, real call."""
    for mode in (FakeTensorMode(), nullcontext()):
        with mode:
            x = torch.randn(4, 8, dtype=torch.float16, device=device, requires_grad=True)
            weight, a, b = (x.new_ones(shape) for shape in ((6, 8), (2, 8), (6, 2)))
            y = lora_linear(x, weight, None, a, b, SCALING)
            (dx,) = torch.autograd.grad(y.sum(), x)
    assert not isinstance(dx, FakeTensor)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "needed",
    [{"x"}, {"lora_a"}, {"lora_b"}, {"x", "lora_b"}, {"lora_a", "lora_b"}, {"x", "lora_a", "lora_b"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_second_derivatives(needed, dropout_p, device):
    inputs, _ = _inputs(3, 5, 7, 2, torch.float64, device)
    leaves = [inputs[name].detach().requires_grad_(name in needed) for name in ("x", "lora_a", "lora_b")]
    seed = _seed(11, device)

    def function(x, a, b):
        y = lora_linear(x.view(1, 3, 7), inputs["weight"], inputs["bias"], a, b, SCALING, dropout_p, seed)
        return y if "lora_b" in needed else y.square()  # else linear: its second derivative is zero

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_are_as_accurate_as_the_twins(dtype, device):
    """Through casts as well: fp32 adapters, and under autocast x too."""
    inputs, dy = _inputs(33, 20, 24, 4, torch.float32, device)
    seed = _seed(3, device)

    def derivatives(function, dtype):
        leaves = [inputs[name].detach().clone().requires_grad_() for name in ("x", "lora_a", "lora_b")]
        base = inputs["weight"].to(dtype), inputs["bias"].to(dtype)
        y = function(leaves[0].to(dtype), *base, *leaves[1:], SCALING, 0.3, seed)
        first = torch.autograd.grad(y, leaves, dy.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)

    got, plain = (derivatives(function, dtype) for function in (lora_linear, twin.lora_linear))
    truth = derivatives(twin.lora_linear, torch.float64)
    factor, floor = SLACK[dtype]
    for value, own, true in zip(got, plain, truth, strict=True):
        assert _error(value, true.double()) <= factor * _error(own, true.double()) + floor


BAD_ARGUMENTS = {
    "width of x": ({"x": torch.zeros(3, 6)}, ValueError, r"x has shape \(3, 6\).*must be 7"),
    "scalar x": ({"x": torch.zeros(())}, ValueError, r"x has shape \(\).*must be 7"),
    "width of A": ({"lora_a": torch.zeros(2, 6)}, ValueError, r"lora_a has shape \(2, 6\); pass \(r, 7\)"),
    "rank of B": ({"lora_b": torch.zeros(5, 3)}, ValueError, r"lora_b has shape \(5, 3\); pass \(5, 2\)"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); pass \(5,\)"),
    "trainable weight": (
        {"weight": torch.zeros(5, 7, requires_grad=True)},
        ValueError,
        r"requires_grad_\(False\)",
    ),
    "trainable bias": ({"bias": torch.zeros(5, requires_grad=True)}, ValueError, r"requires_grad_\(False\)"),
    "negative p": ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0.1; pass .* \[0, 1\)"),
    "p of 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; pass .* \[0, 1\)"),
    "p not a number": ({"dropout_p": math.nan}, ValueError, r"dropout_p is nan"),
    "dtype of seed": (
        {"seed": torch.tensor(1, dtype=torch.int32)},
        ValueError,
        r"seed is a torch.int32.*int64 scalar",
    ),
    "shape of seed": ({"seed": torch.tensor([1])}, ValueError, r"seed is .* shape \(1,\).*int64 scalar"),
    "dtype of x": (
        {"x": torch.zeros(3, 7, dtype=torch.bfloat16)},
        TypeError,
        r"x is torch.bfloat16 but weight is",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_name_themselves_and_draw_nothing(case):
    changed, error, message = BAD_ARGUMENTS[case]
    inputs, _ = _inputs(3, 5, 7, 2, torch.float32, torch.device("cpu"))
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lora_linear(**{**inputs, "scaling": SCALING, "dropout_p": 0.5, **changed})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_computes_as_linear_layers_do(dropout_p, backward_inside, device):
    inputs, dy = _inputs(64, 63, 100, 16, torch.float32, device)
    seed = _seed(2, device)
    arguments = {"scaling": SCALING, "dropout_p": dropout_p, "seed": seed}
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_linear(**inputs, **arguments)
    leaves = [inputs[name] for name in ("x", "lora_a", "lora_b")]
    with torch.autocast(
        device.type, torch.float16 if backward_inside else torch.bfloat16, enabled=backward_inside
    ):
        gradients = torch.autograd.grad(y, leaves, dy.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.float32] * 3

    rounded = {k: v.detach().bfloat16().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    rounded_dy = dy.bfloat16()
    plain = _results(twin.lora_linear, rounded, rounded_dy, dropout_p=dropout_p, seed=seed)
    truth = _results(twin.lora_linear, rounded, rounded_dy, torch.float64, dropout_p=dropout_p, seed=seed)
    factor, floor = SLACK[torch.bfloat16]
    for name, value in zip(("y", "dx", "dA", "dB"), (y, *gradients), strict=True):
        assert _error(value, truth[name]) <= factor * _error(plain[name], truth[name]) + floor, name


def test_forward_without_autocast_then_backward_inside_it(device):
    inputs, dy = _inputs(12, 5, 7, 2, torch.float32, device)
    want = _results(lora_linear, inputs, dy)
    y = lora_linear(**inputs, scaling=SCALING)
    with torch.autocast(device.type, torch.bfloat16):
        got = torch.autograd.grad(y, [inputs[name] for name in ("x", "lora_a", "lora_b")], dy)
    for value, name in zip(got, ("dx", "dA", "dB"), strict=True):
        assert torch.equal(value, want[name])


def _mask(numel: int, p: float, seed: int) -> torch.Tensor:
    return random_words(numel, seed=seed, draw=0, stream=0) >= round(p * 2**32)


@pytest.fixture
def kernels():
    return pytest.importorskip("bayeslora.kernels.lora_linear", reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("numel", "p"), [(1, 0.5), (63, 0.5), (100, 0.9), (1023, 0.1), (2 * 1023, 0.6)])
def test_kernel_draws_the_mask_of_the_contract(numel, p, dtype, device, kernels, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, math.nan))
    seed = -(2**62) + 12345
    keep = _mask(numel, p, seed).to(device)
    x = torch.linspace(1.0, 2.0, numel, device=device).to(dtype)
    got = kernels.dropout(x, p, _seed(seed, device))
    assert torch.equal(got != 0, keep)
    want = twin.dropout(x, p, _seed(seed, device))
    # The interpreter truncates to bf16 where a GPU rounds to nearest: one unit in the last place.
    ulp = 2.0**-7 if dtype == torch.bfloat16 and device.type == "cpu" else 0.0
    torch.testing.assert_close(got, want, rtol=ulp, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_adds_in_place_and_writes_nothing_else(dtype, device, kernels):
    buffer = torch.full((1100,), 7.0, device=device, dtype=dtype)
    out, x = buffer[:1023].view(33, 31), torch.linspace(1.0, 2.0, 1023, device=device).to(dtype).view(33, 31)
    truth = 7.0 + twin.dropout(x.double(), 0.5, _seed(9, device))
    assert kernels.dropout_add_(out, x, 0.5, _seed(9, device)) is out
    # One rounding of a number below 16: half an ulp is 2^-20 and 2^-5; the interpreter truncates bf16.
    torch.testing.assert_close(
        out.double(), truth, rtol=0.0, atol=2.0**-20 if dtype == torch.float32 else 2.0**-4
    )
    assert (buffer[1023:] == 7.0).all()


def test_a_word_at_the_threshold_keeps_its_element(device, kernels):
    x, at = torch.ones(100, device=device), 37
    word = random_words(100, seed=4, draw=0, stream=0)[at].item()
    for module in (kernels, twin):
        assert module.dropout(x, word / 2**32, _seed(4, device))[at] != 0
        assert module.dropout(x, (word + 1) / 2**32, _seed(4, device))[at] == 0


@pytest.mark.parametrize("block", [16, 64, 512, 2048])
def test_mask_does_not_depend_on_the_block_size(block, device, kernels):
    numel, p = 1023, 0.3
    x, out = torch.ones(numel, device=device), torch.empty(numel, device=device)
    kernels._dropout_kernel[(-(-numel // block),)](
        out, x, _seed(4, device), numel, twin.keep_threshold(p), 1.0, ACCUMULATE=False, BLOCK=block
    )
    assert torch.equal(out.bool(), _mask(numel, p, 4).to(device))


def test_dropped_infinities_and_nans_become_zeros(device, kernels):
    x = torch.full((256,), math.nan, device=device)
    for module in (kernels, twin):
        got = module.dropout(x, 0.5, _seed(4, device))
        assert torch.equal(got == 0, ~_mask(256, 0.5, 4).to(device))


@pytest.mark.parametrize("p", [0.0, 2.0**-33, 1.0 - 2.0**-53])
def test_extreme_probabilities(p, device, kernels):
    """p = 0 and a p that rounds to 0 keep all; the largest p keeps (but for 1 word in 2^32) nothing."""
    x = torch.ones(100, device=device)
    for module in (kernels, twin):
        assert torch.equal(module.dropout(x, p, _seed(0, device)), torch.zeros_like(x) if p > 0.5 else x)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_keep_rate_follows_the_law(p):
    """Kept elements, and pairs of elements kept, are within 4.5 standard deviations of the law."""
    n = 4 * 10**5
    keep = _mask(n, p, seed=1)
    torch.testing.assert_close(twin.dropout(torch.ones(n), p, torch.tensor(1)).bool(), keep)
    q = 1.0 - p
    assert abs(keep.double().mean().item() - q) < 4.5 * math.sqrt(p * q / n)
    for lag in (1, 2, 4, 64):
        both = (keep[lag:] & keep[:-lag]).double().mean().item()
        assert abs(both - q * q) < 4.5 * math.sqrt(q * q * (1 - q * q) * 3 / n)


def test_dropout_is_unbiased_and_has_the_variance_of_its_law(device):
    inputs, _ = _inputs(2, 5, 20, 3, torch.float32, device)
    p, draws = 0.3, 600
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack(
            [lora_linear(**inputs, scaling=SCALING, dropout_p=p) for _ in range(draws)]
        ).double()
        expected = lora_linear(**inputs, scaling=SCALING).double()
        product = SCALING * (inputs["lora_b"] @ inputs["lora_a"]).double()
        variance = p / (1 - p) * inputs["x"].double().square() @ product.square().t()
    z = (samples.mean(0) - expected) / (variance / draws).sqrt()
    assert z.abs().max() < 4.0
    assert ((samples.var(0) / variance) - 1).abs().max() < 5 * math.sqrt(2 / draws)


def test_gradients_are_consistent_with_the_mask_that_was_drawn(device):
    m, n, k, r, p = 6, 5, 11, 2, 0.4
    inputs, dy = _inputs(m, n, k, r, torch.float64, device)
    got = _results(lora_linear, inputs, dy, dropout_p=p, seed=_seed(77, device))
    x, w, bias, a, b = (inputs[name].detach() for name in ("x", "weight", "bias", "lora_a", "lora_b"))
    mask = _mask(m * k, p, 77).to(device).view(m, k) / (1 - p)
    want = {
        "y": x @ w.T + bias + SCALING * (x * mask) @ a.T @ b.T,
        "dx": dy @ w + SCALING * (dy @ b @ a) * mask,
        "dA": SCALING * (dy @ b).T @ (x * mask),
        "dB": SCALING * dy.T @ ((x * mask) @ a.T),
    }
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_the_seed_is_drawn_from_torchs_generator(device):
    inputs, _ = _inputs(6, 5, 7, 2, torch.float32, device)

    def forward(**arguments):
        return lora_linear(**inputs, scaling=SCALING, dropout_p=0.5, **arguments)

    torch.manual_seed(1)
    first, second = forward(), forward()
    torch.manual_seed(1)
    assert torch.equal(forward(), first)
    with torch.no_grad():
        assert torch.equal(forward(), second)
    assert not torch.equal(first, second)
    assert torch.equal(forward(seed=_seed(8, device)), forward(seed=_seed(8, device)))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    inputs, dy = _inputs(64, 64, 64, 8, torch.bfloat16, device, adapter_dtype=torch.float32)
    lora_linear(**inputs, scaling=SCALING, dropout_p=0.5).backward(dy)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora_linear(**inputs, scaling=SCALING, dropout_p=0.5).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_replayed_graph_draws_fresh_masks_and_their_gradients(device):
    inputs, dy = _inputs(64, 64, 64, 8, torch.float32, device)
    leaves = [inputs[name] for name in ("x", "lora_a", "lora_b")]

    def step():
        y = lora_linear(**inputs, scaling=SCALING, dropout_p=0.5)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([value.clone() for value in static])
    assert all(not torch.equal(first, second) for first, second in zip(*replays, strict=True))
    for y, dx, _, _ in replays:  # ⟨dy, y_lora⟩ = ⟨dx_lora, x⟩ holds only if both used the same mask
        base = {**inputs, "lora_b": torch.zeros_like(inputs["lora_b"])}
        y_lora = y - lora_linear(**base, scaling=SCALING)
        dx_lora = dx - dy @ inputs["weight"]
        torch.testing.assert_close((dy * y_lora).sum(), (dx_lora * inputs["x"]).sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
def test_gradients_of_fp32_adapters_are_not_rounded_to_half(device):
    inputs, dy = _inputs(512, 64, 64, 8, torch.bfloat16, device, adapter_dtype=torch.float32)
    got = _results(lora_linear, inputs, dy)
    for name in ("dA", "dB"):
        assert not torch.equal(got[name].bfloat16().float(), got[name])


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device, kernels):
    numel, tail = 2**31 + 4096, 2**13
    x = torch.ones(numel, dtype=torch.bfloat16, device=device)
    got = kernels.dropout(x, 0.5, _seed(6, device))[-tail:]
    words = random_words(tail, seed=6, draw=0, stream=0, offset=numel - tail, device=device)
    assert torch.equal(got.bool(), words >= 2**31)


def test_fewer_rows_take_the_routes_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(lora_products, "uses_triton", lambda device: True)
    monkeypatch.setattr("bayeslora.kernels.lora_routes.layer_route", lambda *_: "overlap")
    weights = [torch.empty(8, 16, dtype=torch.bfloat16)]

    def route(rows: int, recording: bool) -> str | None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
        x = torch.empty(rows, 16, dtype=torch.bfloat16)
        return lora_products.kernel_route("forward", x, weights, 8)

    rows = [lora_products._CAPTURED_ROWS - 1, lora_products._CAPTURED_ROWS, lora_products._KERNEL_ROWS]
    assert [route(m, recording=False) for m in rows] == [None, None, "overlap"]
    assert [route(m, recording=True) for m in rows] == [None, "overlap", "overlap"]


@pytest.mark.gpu
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("widths", [(3072,), (3072, 1024, 1024), (8192, 8192)], ids=["one", "qkv", "gate_up"])
def test_measured_routes_agree_with_cublas(widths, adapter_dtype, monkeypatch):
    """Large layers take the project's own kernels where the table says so; results agree to rounding."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, dtype=torch.bfloat16, scale=1.0):
        return torch.randn(shape, generator=generator, device="cuda").mul_(scale).to(dtype)

    k, m, r = 3072, 4096, 16
    weights = [draw(n, k, scale=k**-0.5) for n in widths]
    adapters = [
        (draw(r, k, dtype=adapter_dtype, scale=k**-0.5), draw(n, r, dtype=adapter_dtype)) for n in widths
    ]
    x, dys = draw(4, m // 4, k), [draw(4, m // 4, n) for n in widths]
    runs = []
    for rows in (m, m + 1):  # with the project's kernels, and without
        monkeypatch.setattr(lora_products, "_KERNEL_ROWS", rows)
        inputs = [x.clone().requires_grad_()]
        inputs += [t.clone().requires_grad_() for pair in adapters for t in pair]
        layers = [LoraWeights(w, None, inputs[1 + 2 * i], inputs[2 + 2 * i]) for i, w in enumerate(weights)]
        outputs = apply_layers(inputs[0], layers, 2.0, 0.0)
        runs.append([*outputs, *torch.autograd.grad(outputs, inputs, dys)])
    for ours, cublas in zip(*runs, strict=True):
        assert ours.dtype == cublas.dtype
        error = (ours.double() - cublas.double()).norm() / cublas.double().norm()
        assert error < 6e-3  # two bf16 roundings of the same sums
