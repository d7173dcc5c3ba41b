"""Casts of several small tensors in one launch, in Triton.

Equation: ``outᵢ = dtype(sourceᵢ)``, rounded to nearest even, for up to `MOST` pairs of any sizes.

A and B of a layer that computes in another dtype than theirs are cast at every call. They are small (0.1 to
0.5 MB) and few, so what counts is that enough programs share them: a program takes BLOCK elements of one
pair. Bytes moved: source and out once each.
"""

from collections.abc import Sequence
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, cdiv

_BLOCK = 2048
MOST = 6
"""Pairs that one launch takes: A and B of three layers."""


@triton.jit
def _cast_part(out_ptr, source_ptr, numel, BLOCK: tl.constexpr):
    """Cast one program's BLOCK elements of one pair."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    value = tl.load(source_ptr + element, mask=inside)
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cast_kernel(
    out_0,  # [numel_0], and so on
    source_0,
    numel_0,
    out_1,
    source_1,
    numel_1,
    out_2,
    source_2,
    numel_2,
    out_3,
    source_3,
    numel_3,
    out_4,
    source_4,
    numel_4,
    out_5,
    source_5,
    numel_5,
    PARTS: tl.constexpr,  # pairs that are given; the others are None
    BLOCK: tl.constexpr,
):
    """Cast BLOCK elements of the pair that the second program index names."""
    outs = (out_0, out_1, out_2, out_3, out_4, out_5)
    sources = (source_0, source_1, source_2, source_3, source_4, source_5)
    numels = (numel_0, numel_1, numel_2, numel_3, numel_4, numel_5)
    for part in tl.static_range(PARTS):
        if tl.program_id(1) == part:
            _cast_part(outs[part], sources[part], numels[part], BLOCK)


@cache
def _launcher(parts: int) -> Launcher:
    return Launcher(_cast_kernel, {"PARTS": parts, "BLOCK": _BLOCK})


def copy_cast(outs: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write every source into its out, in the out's dtype: one launch.

    Args:
        outs: one to `MOST` contiguous tensors on one GPU, floating-point.
        sources: contiguous tensors of the same sizes, of any floating-point dtypes.
    """
    args: list[Tensor | int | None] = []
    largest = 0
    for out, source in zip(outs, sources, strict=True):
        numel = source.numel()
        args += (out, source, numel)
        largest = max(largest, numel)
    parts = len(outs)
    args += (None,) * (3 * (MOST - parts))
    if largest:
        _launcher(parts)((cdiv(largest, _BLOCK), parts), *args)
