"""Fused parts of the LoRA linear layer, in Triton: dropout that is drawn again instead of stored.

Equation (the whole layer is in ``lora_linear_twin.py``, which states the same in plain torch)::

    drop(x) = x · keep / (1 - p)        keep = word(m·K + k) >= min(round(p · 2^32), 2^32 - 1)

``word`` is the Philox word of the noise contract (``noise.py``), key = the call's 64-bit seed, draw =
stream = 0. The seed is read from device memory: no host synchronisation, and a replayed CUDA graph in
which the seed is drawn draws fresh masks.

Layout: everything is a flat, contiguous range of M·K elements; a program takes BLOCK of them.
Bytes moved per element of x, with b bytes an element: ``dropout`` 2b, ``dropout_add_`` 3b; no mask.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, cdiv
from .lora_linear_twin import keep_threshold
from .noise import interleave4, philox4x

_BLOCK = 1024


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(
    out_ptr,  # [numel]
    x_ptr,  # [numel]
    seed_ptr,  # [] int64
    numel,
    threshold,
    scale,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``x · keep · scale`` to ``out``, or add it where ACCUMULATE; fp32 inside, one rounding."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    inside = element < numel
    zero = tl.full((), 0, tl.uint32)
    w0, w1, w2, w3 = philox4x(tl.load(seed_ptr), zero, zero, start // 4 + tl.arange(0, BLOCK // 4))
    keep = interleave4(w0, w1, w2, w3) >= threshold.to(tl.uint32)
    x = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(keep, x * scale, 0.0)
    if ACCUMULATE:
        value += tl.load(out_ptr + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=inside)


@cache
def _launcher(accumulate: bool) -> Launcher:
    return Launcher(_dropout_kernel, {"ACCUMULATE": accumulate, "BLOCK": _BLOCK})


def _launch(out: Tensor, x: Tensor, p: float, seed: Tensor, accumulate: bool) -> Tensor:
    numel = x.numel()
    if numel:
        grid = (cdiv(numel, _BLOCK),)
        _launcher(accumulate)(grid, out, x, seed, numel, keep_threshold(p), 1.0 / (1.0 - p))
    return out


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return ``x · keep / (1 - p)``, with zeros (not NaN · 0) where elements are dropped. One launch.

    Args:
        x: ``(M, K)``, or any shape whose row-major order is that of ``(M, K)``; fp32, fp16 or bf16.
        p: probability of dropping an element, in [0, 1).
        seed: int64 scalar on ``x``'s device, the key of the mask.

    Returns:
        A contiguous tensor of ``x``'s shape and dtype; the product is rounded once.
    """
    x = x.contiguous()
    return _launch(torch.empty_like(x), x, p, seed, accumulate=False)


def dropout_add_(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Add ``x · keep / (1 - p)`` to ``out`` in place and return it. One launch, one rounding.

    Args:
        out: contiguous, ``x``'s shape.
        x: as for `dropout`.
        p: as for `dropout`.
        seed: as for `dropout`.
    """
    assert out.is_contiguous()
    return _launch(out, x.contiguous(), p, seed, accumulate=True)
