"""LoRA layers that share an input, forward and backward by each route, against fp64 truth."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from bayeslora.kernels import lora_layer as ops
from bayeslora.kernels import lora_layer_twin as twin
from bayeslora.kernels import lora_overlap
from bayeslora.kernels.lora_gemm import Tiles
from bayeslora.kernels.lora_skinny import RowTiles

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
# The interpreter multiplies bf16 tiles as if they were integers: bf16 is tested on GPUs alone.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
SCALE = 1.7
CASES = [
    (100, (72,), 136, (3,)),
    (257, (40,), 24, (8,)),
    (70, (24, 48), 40, (3, 5)),
    (33, (24, 16, 48), 40, (16, 16, 16)),
]


@pytest.fixture(autouse=True)
def small_tiles_in_the_interpreter(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(lora_overlap, "_GEMM_TILES", Tiles(32, 32, 32, 4, 2, group_m=2))
        monkeypatch.setattr(lora_overlap, "_row_tiles", lambda _: RowTiles(32, 32, 1, 4, 2))
        monkeypatch.setattr(lora_overlap, "_pair_tiles", lambda _: lora_overlap.PairTiles(32, 32, 4, 2, 20))


class Operands:
    def __init__(self, m, widths, k, ranks, dtype, device, bias=True):
        generator = torch.Generator().manual_seed(m)

        def draw(*shape, fan_in=1):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
            return values.to(device=device, dtype=dtype)

        self.x, self.lora_a = draw(m, k), draw(sum(ranks), k, fan_in=k)
        self.layers = [
            (draw(n, k, fan_in=k), draw(n) if bias else None, draw(n, r))
            for n, r in zip(widths, ranks, strict=True)
        ]
        self.dys, self.hidden = [draw(m, n) for n in widths], draw(m, sum(ranks))

    def run(self, module, forward, backward, dtype=None, gradient_dtype=torch.float32):
        """Return the ys, hidden, dx, dA and the dBs."""

        def to(t):
            return t if t is None or dtype is None else t.to(dtype)

        x, hidden, lora_a, dys = to(self.x), to(self.hidden), to(self.lora_a), [to(dy) for dy in self.dys]
        layers = [tuple(to(t) for t in layer) for layer in self.layers]
        outs = [torch.full_like(dy, math.nan) for dy in dys]
        dx = torch.full_like(x, math.nan)
        weights, lora_bs = [w for w, _, _ in layers], [b for _, _, b in layers]
        h = getattr(module, forward)(x, layers, lora_a, SCALE, outs)
        backward = getattr(module, backward)
        found = backward(dys, x, weights, hidden, lora_a, lora_bs, SCALE, gradient_dtype, dx)
        h, (da, dbs) = (h[1], found[1:]) if isinstance(h, tuple) else (h, found)
        return [*outs, h, dx, da, *dbs]


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_as_accurate(got, plain, truth):
    for value, reference, want in zip(got, plain, truth, strict=True):
        assert value.dtype == reference.dtype
        # Sums in another order and roundings in another place; a floor for what fp32 leaves.
        assert error(value, want) <= 1.5 * error(reference, want) + 2.0**-20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("route", ["products", "overlap"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_routes_agree_with_truth(case, route, bias, dtype, device, monkeypatch):
    if route == "overlap" and not HOPPER:
        if CUDA:
            pytest.skip("dependent launches need Hopper")
        # The interpreter has no launches to overlap: the same kernels, in turn.
        monkeypatch.setattr(ops.forward_overlapped, "__defaults__", (False,))
        monkeypatch.setattr(ops.backward_overlapped, "__defaults__", (False,))
    operands = Operands(*case, dtype, device, bias)
    name = "overlapped" if route == "overlap" else route
    got = operands.run(ops, f"forward_{name}", f"backward_{name}")
    plain = operands.run(ops, "forward_cublas", "backward_cublas")
    truth = operands.run(twin, "lora_forward", "lora_backward", torch.float64, torch.float64)
    assert_as_accurate(got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_public_functions_on_a_device_never_measured(dtype, device, monkeypatch):
    monkeypatch.setattr("bayeslora.kernels.lora_routes.TABLE", {})
    operands = Operands(20, (7, 9), 11, (2, 3), dtype, device)
    layers, x, a = operands.layers, operands.x, operands.lora_a
    ys, hidden = ops.lora_forward(x, layers, a, SCALE)
    dx, da, dbs = ops.lora_backward(
        operands.dys,
        x,
        [w for w, _, _ in layers],
        operands.hidden,
        a,
        [b for _, _, b in layers],
        SCALE,
        dtype,
    )
    truth = operands.run(twin, "lora_forward", "lora_backward", torch.float64, torch.float64)
    for value, want in zip((*ys, hidden, dx, da, *dbs), truth, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("route", ["products", "overlap"])
def test_operands_that_do_not_fit_take_cublas(route, device):
    operands = Operands(20, (7,), 11, (3,), torch.float16, device)
    ys, hidden = ops.lora_forward(operands.x, operands.layers, operands.lora_a, SCALE, route=route)
    truth = operands.run(twin, "lora_forward", "lora_backward", torch.float64, torch.float64)
    for value, want in zip((*ys, hidden), truth[:2], strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("r", [8, 16, 32, 64])
@pytest.mark.parametrize("widths", [(1024,), (1024, 512, 512)], ids=str)
def test_overlapped_kernels_wait_for_what_they_read(r, widths, device):
    """Many layers back to back over changing inputs: the same bits as the same kernels run in turn."""
    if not HOPPER or len(widths) * r > lora_overlap.MAX_RANK:
        pytest.skip("dependent launches need Hopper, and a total rank of at most 64")
    sets = [
        Operands(2048 + 8 * i, widths, 1024, (r,) * len(widths), torch.bfloat16, device) for i in range(3)
    ]
    runs = [(i % 3, sets[i % 3].run(ops, "forward_overlapped", "backward_overlapped")) for i in range(12)]
    in_turn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.forward_overlapped, "__defaults__", (False,))
        patch.setattr(ops.backward_overlapped, "__defaults__", (False,))
        for i, operands in enumerate(sets):
            in_turn[i] = operands.run(ops, "forward_overlapped", "backward_overlapped")
    for i, values in runs:
        for value, want in zip(values, in_turn[i], strict=True):
            assert torch.equal(value, want)


@pytest.mark.gpu
def test_overlapped_kernels_in_a_graph(device):
    if not HOPPER:
        pytest.skip("dependent launches need Hopper")
    operands = Operands(2048, (1024,), 1024, (16,), torch.bfloat16, device)
    want = operands.run(ops, "forward_overlapped", "backward_overlapped")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = operands.run(ops, "forward_overlapped", "backward_overlapped")
    for _ in range(3):
        for tensor in static:
            tensor.fill_(math.nan)
        graph.replay()
        for value, expected in zip(static, want, strict=True):
            assert torch.equal(value, expected)
