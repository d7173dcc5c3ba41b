"""The skinny products of a LoRA layer, against fp64 truth."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from bayeslora.kernels import lora_skinny as ops
from bayeslora.kernels import lora_skinny_twin as twin

CUDA = torch.cuda.is_available()
# The interpreter multiplies bf16 tiles as if they were integers: bf16 is tested on GPUs alone.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
# One rounding of an fp32 sum: half a unit in the last place, relative to the norm less.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
SHAPES = [(1, 8, 1), (63, 40, 3), (100, 136, 16), (257, 72, 24), (33, 1024, 64)]
TALL = [ops.TallTiles(64, 64, 4, 2, 1), ops.TallTiles(64, 64, 4, 2, 7), ops.TallTiles(64, 128, 4, 2, 100)]


def draw(*shape, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("m", "k", "r"), [*SHAPES, (5, 63, 2)])
def test_xa(m, k, r, groups, dtype, device):
    x, a = draw(m, k, dtype=dtype, device=device), draw(r, k, dtype=dtype, device=device)
    tiles = ops.RowTiles(16, 128, groups, 4, 2) if groups > 1 else ops.RowTiles(64, 64, 1, 4, 3)
    truth = twin.skinny_xa(x.double(), a.double(), 1.7)
    for operand in (a, a.t().contiguous().t()):
        assert error(ops.xa_triton(x, operand, 1.7, tiles), truth) <= ROUNDING[dtype]


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_xa_writes_the_columns_it_is_given(overlap, device):
    x, a = draw(70, 72, device=device), draw(5, 72, device=device)
    buffer = torch.full((70, 16), 7.0, dtype=torch.float16, device=device)
    ops.xa_triton(x, a, 1.0, ops.RowTiles(64, 64, 1, 4, 2), overlap, buffer[:, 4:9])
    assert error(buffer[:, 4:9], x.double() @ a.double().t()) <= ROUNDING[torch.float16]
    assert (buffer[:, :4] == 7.0).all()
    assert (buffer[:, 9:] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 6, 100])  # one, two and three programs a row-block
@pytest.mark.parametrize("widths", [(40,), (72, 24), (128, 40, 63), (64, 64, 128)], ids=str)
def test_several_pairs_in_one_launch(widths, programs, dtype, device):
    ranks, m = (3, 16, 8)[: len(widths)], 150
    xs = [draw(m, k, dtype=dtype, device=device) for k in widths]
    as_ = [draw(r, k, dtype=dtype, device=device) for r, k in zip(ranks, widths, strict=True)]
    as_[-1] = as_[-1].t().contiguous().t()
    buffer = torch.full((m, 32), 7.0, dtype=dtype, device=device)
    outs = buffer[:, 2 : 2 + sum(ranks)].split(ranks, dim=1)
    pairs = list(zip(xs, as_, strict=True))
    ops.xas_triton(pairs, 1.7, ops.RowTiles(64, 64, 1, 4, 2), programs, outs)
    for out, (x, a) in zip(outs, pairs, strict=True):
        assert error(out, twin.skinny_xa(x.double(), a.double(), 1.7)) <= ROUNDING[dtype]
        assert torch.equal(out, ops.xa_triton(x, a, 1.7, ops.RowTiles(64, 64, 1, 4, 2)))
    assert (buffer[:, :2] == 7.0).all()
    assert (buffer[:, 2 + sum(ranks) :] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", TALL, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_one_pass_over_dy(m, n, r, tiles, dtype, device):
    dy, hidden, lora_b = (draw(*s, dtype=dtype, device=device) for s in ((m, n), (m, r), (n, r)))
    dh, db = ops.dy_triton(dy, hidden, lora_b, 1.7, torch.float32, tiles)
    want_dh, want_db = twin.skinny_dy(dy.double(), hidden.double(), lora_b.double(), 1.7, torch.float64)
    assert error(dh, want_dh) <= ROUNDING[dtype]
    assert error(db, want_db) <= ROUNDING[torch.float32]
    assert (dh.dtype, db.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", TALL, ids=str)
@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
def test_one_pass_over_x(m, k, r, tiles, dtype, device):
    dh, x = draw(m, r, dtype=dtype, device=device), draw(m, k, dtype=dtype, device=device)
    da = ops.da_triton(dh, x, torch.float32, tiles)
    assert error(da, twin.skinny_da(dh.double(), x.double(), torch.float64)) <= ROUNDING[torch.float32]


def test_same_inputs_same_bits(device):
    dy, hidden, lora_b = (draw(*s, device=device) for s in ((1023, 72), (1023, 8), (72, 8)))
    runs = [ops.dy_triton(dy, hidden, lora_b, 1.0, torch.float32, TALL[1]) for _ in range(3)]
    for dh, db in runs[1:]:
        assert torch.equal(dh, runs[0][0])
        assert torch.equal(db, runs[0][1])


@pytest.mark.parametrize("view", ["odd width", "column-major", "float32", "float64", "empty"])
def test_public_functions_fall_back(view, device, monkeypatch):
    tiles = {"xa": tuple(ops.RowTiles(64, 64, 1, 4, 2)), "dy": tuple(TALL[0]), "da": tuple(TALL[0])}
    monkeypatch.setattr(ops, "skinny_route", lambda op, *_: tiles[op])
    m, n, r = (0 if view == "empty" else 20), (41 if view == "odd width" else 40), 4
    dtype = getattr(torch, view) if view.startswith("float") else torch.float16
    wide = draw(m, n, dtype=dtype, device=device)
    wide = wide.t().contiguous().t() if view == "column-major" else wide
    thin, small = draw(m, r, dtype=dtype, device=device), draw(n, r, dtype=dtype, device=device)
    got = (
        ops.skinny_xa(wide, small.t(), 1.7),
        *ops.skinny_dy(wide, thin, small, 1.7, dtype),
        ops.skinny_da(thin, wide, dtype),
    )
    double = (wide.double(), thin.double(), small.double())
    want = (
        twin.skinny_xa(double[0], double[2].t(), 1.7),
        *twin.skinny_dy(*double, 1.7, torch.float64),
        twin.skinny_da(double[1], double[0], torch.float64),
    )
    for value, truth in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-2, atol=2e-2)


def test_routes_reach_the_kernels(device, monkeypatch):
    called = []
    tiles = {"xa": tuple(ops.RowTiles(64, 64, 1, 4, 2)), "dy": tuple(TALL[0]), "da": tuple(TALL[0])}
    monkeypatch.setattr(ops, "skinny_route", lambda op, *_: called.append(op) or tiles[op])
    monkeypatch.setattr(ops, "scaled_mm", None)
    monkeypatch.setattr(ops, "mm_as", None)
    wide, thin, small = draw(20, 40, device=device), draw(20, 4, device=device), draw(40, 4, device=device)
    ops.skinny_xa(wide, small.t(), 1.0)
    ops.skinny_dy(wide, thin, small, 1.0, torch.float32)
    ops.skinny_da(thin, wide, torch.float32)
    assert called == ["xa", "dy", "da"]
