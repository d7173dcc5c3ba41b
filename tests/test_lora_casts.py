"""Casts of adapters in one launch are torch's casts, bit for bit."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from bayeslora import lora_products
from bayeslora.kernels import lora_casts
from bayeslora.lora_passes import cast_adapters

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TO = [dtype for dtype in DTYPES if CUDA or dtype != torch.bfloat16]  # the interpreter cuts off, not rounds
SIZES = [(3,), (16, 129), (1,), (64, 96), (0, 5), (2049,)]


def draw(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("to", TO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_are_torchs(dtype, to, device):
    for count in range(1, lora_casts.MOST + 1):
        sources = [draw(size, dtype, device, seed=i) for i, size in enumerate(SIZES[:count])]
        outs = [torch.full_like(source, 7.0, dtype=to) for source in sources]
        lora_casts.copy_cast(outs, sources)
        for out, source in zip(outs, sources, strict=True):
            assert torch.equal(out, source.to(to))


def test_extremes_and_halfway_values_round_as_torchs(device):
    numbers = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3.4e38, 65520.0, 65519.0, 6e-8]
    halfway = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    source = torch.tensor([*numbers, *halfway], device=device)
    for dtype in TO:
        out = torch.empty_like(source, dtype=dtype)
        lora_casts.copy_cast([out], [source])
        torch.testing.assert_close(out, source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_pairs_of_several_dtypes_and_parts_of_a_tensor(device):
    whole = torch.full((9, 11), 7.0, dtype=torch.float16, device=device)
    sources = [draw((2, 11), torch.float32, device), draw((5, 11), torch.bfloat16, device)]
    lora_casts.copy_cast([whole[1:3], whole[3:8]], sources)
    assert torch.equal(whole[1:8], torch.cat([source.half() for source in sources]))
    assert (whole[[0, 8]] == 7.0).all()


@pytest.fixture
def recording(monkeypatch):
    """As while a CUDA graph is recorded: before, torch's launch costs the host less."""
    monkeypatch.setattr(lora_products, "uses_triton", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("layers", [1, 3, 4])  # four are more pairs than a launch takes
@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_stacked_and_cast(layers, transposed, device, recording):
    lora_as = [draw((i + 2, 20), torch.float32, device, seed=i) for i in range(layers)]
    lora_bs = [draw((30, i + 2), torch.float32, device, seed=9 + i) for i in range(layers)]
    if transposed:
        lora_bs = [lora_b.t().contiguous().t() for lora_b in lora_bs]
    stacked, bs = cast_adapters(lora_as, lora_bs, torch.float16)
    assert torch.equal(stacked, torch.cat(lora_as).half())
    assert all(torch.equal(b, lora_b.half()) for b, lora_b in zip(bs, lora_bs, strict=True))
    assert all(b.is_contiguous() for b in bs)


def test_adapters_of_the_dtype_are_not_copied():
    a, b = torch.zeros(4, 20), torch.zeros(30, 4)
    stacked, (same,) = cast_adapters([a], [b], torch.float32)
    assert stacked is a
    assert same is b


def test_one_launch_for_three_layers(recording, monkeypatch):
    calls = []
    monkeypatch.setattr(lora_casts, "copy_cast", lambda outs, _: calls.append(len(outs)))
    cast_adapters([torch.zeros(4, 20)] * 3, [torch.zeros(30, 4)] * 3, torch.float16)
    assert calls == [6]
