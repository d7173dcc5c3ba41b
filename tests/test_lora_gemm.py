"""The GEMM with a LoRA step and the table of routes, against fp64 truth."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from bayeslora.kernels import lora_gemm as ops
from bayeslora.kernels import lora_gemm_twin as twin
from bayeslora.kernels import lora_routes

CUDA = torch.cuda.is_available()
# The interpreter multiplies bf16 tiles as if they were integers: bf16 is tested on GPUs alone.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
TILES = ops.Tiles(128, 128, 64, 4, 3, per_sm=2) if CUDA else ops.Tiles(32, 32, 32, 4, 2, group_m=2)
# Both sides round sums of products of half-precision numbers once or twice; a norm over few elements varies.
SLACK = 1.5
FLOOR = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}  # one rounding, where the reference happens to be exact


def draw(*shape, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def transposed(weight):
    """Return the same matrix with the other memory order."""
    return weight.t().contiguous().t()


def assert_as_accurate(got, plain, truth):
    assert error(got, truth) <= SLACK * error(plain, truth) + FLOOR[got.dtype] / 8


def doubled(factors, bias, hidden, lora_b):
    pairs = [(x.double(), w.double()) for x, w in factors]
    return pairs, None if bias is None else bias.double(), hidden.double(), lora_b.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "r", "bias"),
    [
        (1, 8, 8, 1, True),
        (63, 104, 72, 3, False),
        (100, 64, 136, 16, True),
        (257, 40, 24, 8, False),
        (33, 72, 40, 64, True),
        (40, 48, 16, 100, False),
    ],
)
def test_tma_kernel(m, n, k, r, bias, mirrored, dtype, device):
    x, weight, hidden, lora_b = (
        draw(*s, dtype=dtype, device=device) for s in ((m, k), (n, k), (m, r), (n, r))
    )
    vector = draw(n, dtype=dtype, device=device) if bias else None
    factors = ((x, transposed(weight) if mirrored else weight),)
    out = torch.full((m, n), math.nan, dtype=dtype, device=device)
    assert ops.fits_tma(factors, out)
    got = ops.gemm_tma(factors, vector, hidden, lora_b, out, TILES)
    plain = ops.gemm_cublas(factors, vector, hidden, lora_b, torch.empty_like(out))
    assert got is out
    assert_as_accurate(got, plain, twin.lora_gemm_sum(*doubled(factors, vector, hidden, lora_b)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [(24, 40), (40, 8, 72)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_several_factors(terms, mirrored, dtype, device):
    m, n, r = 70, 56, 24
    factors = [
        (draw(m, k, dtype=dtype, device=device), draw(n, k, dtype=dtype, device=device)) for k in terms
    ]
    factors = [(x, transposed(w) if mirrored else w) for x, w in factors]
    hidden, lora_b = draw(m, r, dtype=dtype, device=device), draw(n, r, dtype=dtype, device=device)
    out = torch.full((m, n), math.nan, dtype=dtype, device=device)
    got = ops.gemm_tma(factors, None, hidden, lora_b, out, TILES)
    plain = ops.gemm_cublas(factors, None, hidden, lora_b, torch.empty_like(out))
    assert_as_accurate(got, plain, twin.lora_gemm_sum(*doubled(factors, None, hidden, lora_b)))


def test_strided_operands_and_nothing_written_outside(device):
    m, n, k, r = 50, 40, 48, 5
    x = draw(m, 2 * k, device=device)[:, :k]
    weight = draw(n, k, device=device)
    hidden, lora_b = draw(m, 3 * r, device=device)[:, r : 2 * r], draw(r, n, device=device).t()
    buffer = torch.full((m + 2, 2 * n), 7.0, device=device, dtype=torch.float16)
    out = buffer[1:-1, :n]
    ops.gemm_tma(((x, weight),), None, hidden, lora_b, out, TILES)
    truth = twin.lora_gemm_sum(*doubled(((x, weight),), None, hidden, lora_b))
    assert error(out, truth) < 1e-3
    buffer[1:-1, :n] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize(
    ("m", "n", "k"), [(5, 8, 9), (5, 9, 8), (0, 8, 8), (5, 7, 7)], ids=["K", "N", "empty", "both"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_tma_cannot_address_falls_back(m, n, k, dtype, device, monkeypatch):
    monkeypatch.setattr(ops, "gemm_route", lambda *_, **__: tuple(TILES))
    x, weight, hidden, lora_b = (
        draw(*s, dtype=dtype, device=device) for s in ((m, k), (n, k), (m, 2), (n, 2))
    )
    got = ops.lora_gemm(x, weight, None, hidden, lora_b)
    truth = twin.lora_gemm(x.double(), weight.double(), None, hidden.double(), lora_b.double())
    torch.testing.assert_close(got.double(), truth, rtol=1e-2, atol=1e-2)


def test_misaligned_rows_do_not_fit(device):
    x, out = draw(4, 24, device=device), draw(4, 8, device=device)
    assert ops.fits_tma(((x[:, 8:16], draw(8, 8, device=device)),), out)
    assert not ops.fits_tma(((x[:, 1:9], draw(8, 8, device=device)),), out)
    assert not ops.fits_tma(((x[:, ::3], draw(8, 8, device=device)),), out)
    mixed = ((x[:, :8], draw(8, 8, device=device)), (x[:, :16], draw(16, 8, device=device).t()))
    assert not ops.fits_tma(mixed, out)


def test_routes_reach_the_kernel(device, monkeypatch):
    x, weight, hidden, lora_b = (draw(*s, device=device) for s in ((40, 16), (24, 16), (40, 4), (24, 4)))
    monkeypatch.setattr(ops, "gemm_route", lambda *_, **__: tuple(TILES))
    got = ops.lora_gemm(x, weight, None, hidden, lora_b)
    want = ops.gemm_tma(((x, weight),), None, hidden, lora_b, torch.empty_like(got), TILES)
    assert torch.equal(got, want)


@pytest.fixture
def table(monkeypatch):
    """A table of one device on which the tiles of (1024, 4096) fill 128 multiprocessors once."""
    rows = {(1024, 4096, 512, 16): (1, 2), (4096, 4096, 512, 16): (3, 4), (4096, 4096, 512, 64): (5, 6)}
    narrow = {(1024, 0, 512, 16): (7, 8)}
    entry = {
        "dtype": "torch.bfloat16",
        "multiprocessors": 128,
        "routes": {"gemm_nk": rows, "xa": narrow},
    }
    monkeypatch.setattr(lora_routes, "TABLE", {"GPU": entry})
    monkeypatch.setattr(lora_routes, "_SAME_CHIP", {"same chip": "GPU"})
    lora_routes.lookup.cache_clear()
    yield
    lora_routes.lookup.cache_clear()


@pytest.mark.parametrize(
    ("case", "route"),
    [
        (("GPU", "gemm_nk", 1024, 4096, 512, 16), (1, 2)),
        (("GPU", "gemm_nk", 1024, 4096, 512, 5), (1, 2)),
        (("GPU", "gemm_nk", 4096, 4096, 512, 17), (5, 6)),
        (("GPU", "gemm_nk", 4096, 4096, 512, 65), "cublas"),  # a rank above all
        (("GPU", "gemm_nk", 1200, 4096, 512, 16), "cublas"),  # near, but its last wave is 17% full
        (("GPU", "gemm_nk", 4096, 4096, 600, 16), (3, 4)),  # near, and full
        (("GPU", "gemm_nk", 1 << 20, 4096, 512, 16), (3, 4)),  # more rows than measured
        (("GPU", "gemm_nk", 512, 4096, 512, 16), "cublas"),  # fewer
        (("GPU", "gemm_nk", 4096, 4096, 1024, 16), "cublas"),  # another K
        (("GPU", "gemm_kn", 1024, 4096, 512, 16), "cublas"),  # an operation never measured
        (("GPU", "xa", 1100, 0, 512, 8), (7, 8)),
        (("other", "gemm_nk", 1024, 4096, 512, 16), "cublas"),
        (("same chip", "gemm_nk", 1024, 4096, 512, 16), (1, 2)),
    ],
)
def test_lookup_is_conservative(case, route, table):
    name, op, m, n, k, r = case
    assert lora_routes.lookup(name, torch.bfloat16, op, m, n, k, r) == route
    assert lora_routes.lookup(name, torch.float16, op, m, n, k, r) == route
    assert lora_routes.lookup(name, torch.float32, op, m, n, k, r) == "cublas"


def test_the_committed_table_is_well_formed():
    from bayeslora.kernels.lora_routes_table import TABLE

    layer = ("forward", "backward")
    for entry in TABLE.values():
        for op, rows in entry["routes"].items():
            assert op in (*layer, "gemm_nk", "gemm_kn", "xa", "dy", "da")
            for key, route in rows.items():
                assert len(key) == 4
                assert route in ("cublas", "products", "overlap") if op in layer else route
