"""The skinny products of a LoRA layer, in Triton: each wide operand is read once.

Equation, r at most a few hundred, M rows::

    h  = s x Aᵀ                               skinny_xa    x (M, K), A (r, K)
    dh = s dy B        dB = dyᵀ h             skinny_dy    dy (M, N), B (N, r), h (M, r): one pass over dy
    dA = dhᵀ x                                skinny_da    dh (M, r), x (M, K)

These products move bytes; their arithmetic is nothing. Bytes with b an element: b M K, b M N, b M K,
where cuBLAS's calls move b M K, 2 b M N, b M K and reach less of the bandwidth.
Layers that share x have a dh each, made by one launch (`_skinny_xas_kernel`): M rows of one alone leave half
of a GPU idle.

Layout. `_skinny_xa_kernel`: a program takes BLOCK_M rows and all K terms, cut into GROUPS parts that its
warps sum apart and add at the end: no second launch. `_skinny_tall_kernel`: a program takes a range of
rows and BLOCK_N columns of the wide operand. It keeps its part of dB in registers over all its rows, and
writes per row-block its part of dh; `_sum_parts_kernel` then sums the parts (fp32), in their order.
Parts of dB: ranges · N r; of dh: N/BLOCK_N · M r. No atomics: same inputs, same bits.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .launch import Launcher, cdiv, next_power_of_2
from .lora_routes import skinny_route

_HALF = (torch.bfloat16, torch.float16)
_SUM_BLOCK = 512
_MOST_PAIRS = 3  # q, k and v


class RowTiles(NamedTuple):
    """Compile-time choices of `_skinny_xa_kernel`; a route's numbers, in this order."""

    block_m: int
    block_k: int  # terms a step, over all groups
    groups: int  # 1: one product over block_k terms
    warps: int
    stages: int


class TallTiles(NamedTuple):
    """Compile-time choices of `_skinny_tall_kernel`; a route's numbers, in this order."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int  # aimed at: sets how many row-blocks one program takes


@triton.jit
def _xa_rows(
    hidden_ptr,  # [M, rank]
    x_ptr,  # [M, K]
    a_ptr,  # [rank, K]
    scale,
    M,
    K,
    rank,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_hm,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Write ``scale · x Aᵀ`` for a program's BLOCK_M rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.arange(0, R)
    if GROUPS == 1:
        ks = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
        a_ptrs = a_ptr + rs[None, :].to(tl.int64) * stride_ar + ks[:, None] * stride_ak
        x_mask, a_mask = rows[:, None] < M, rs[None, :] < rank
        x_ks, a_ks = ks[None, :], ks[:, None]
        acc = tl.zeros((BLOCK_M, R), tl.float32)
    else:
        PART: tl.constexpr = BLOCK_K // GROUPS
        ks = tl.arange(0, GROUPS)[:, None] * PART + tl.arange(0, PART)[None, :]
        x_ptrs = x_ptr + rows[None, :, None] * stride_xm + ks[:, None, :] * stride_xk
        a_ptrs = a_ptr + rs[None, None, :].to(tl.int64) * stride_ar + ks[:, :, None] * stride_ak
        x_mask, a_mask = rows[None, :, None] < M, rs[None, None, :] < rank
        x_ks, a_ks = ks[:, None, :], ks[:, :, None]
        acc = tl.zeros((GROUPS, BLOCK_M, R), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (x_ks < K - k), other=0.0)
            a = tl.load(a_ptrs, mask=a_mask & (a_ks < K - k), other=0.0)
        acc = tl.dot(x, a, acc)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    if GROUPS > 1:
        acc = tl.sum(acc, axis=0)
    h_ptrs = hidden_ptr + rows[:, None] * stride_hm + rs[None, :]
    out = (acc * scale).to(hidden_ptr.dtype.element_ty)
    tl.store(h_ptrs, out, mask=(rows[:, None] < M) & (rs[None, :] < rank))


@triton.jit
def _skinny_xa_kernel(
    hidden_ptr,  # [M, rank]
    x_ptr,  # [M, K]
    a_ptr,  # [rank, K]
    scale,
    M,
    K,
    rank,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_hm,
    R: tl.constexpr,  # rank rounded up to a power of two >= 16
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    OVERLAP: tl.constexpr,  # let a dependent kernel start at once; it waits for hidden itself
):
    """Write ``scale · x Aᵀ`` for BLOCK_M rows."""
    if OVERLAP:
        gdc_launch_dependents()
    _xa_rows(
        hidden_ptr, x_ptr, a_ptr, scale, M, K, rank, stride_xm, stride_xk, stride_ar, stride_ak, stride_hm,
        R, BLOCK_M, BLOCK_K, GROUPS, EVEN_K,
    )  # fmt: skip


@triton.jit
def _skinny_xas_kernel(
    hidden_0,  # [M, rank_0]: columns of one tensor, as the others
    x_0,  # [M, K_0]
    a_0,  # [rank_0, K_0]
    K_0,
    rank_0,
    stride_xm_0,
    stride_ar_0,
    stride_ak_0,
    hidden_1,  # the same of a second pair of factors, or None, and of a third
    x_1,
    a_1,
    K_1,
    rank_1,
    stride_xm_1,
    stride_ar_1,
    stride_ak_1,
    hidden_2,
    x_2,
    a_2,
    K_2,
    rank_2,
    stride_xm_2,
    stride_ar_2,
    stride_ak_2,
    scale,
    M,
    stride_hm,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,  # programs that share a row-block: a pair each, the last one all that are left
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write ``scale · xᵢ Aᵢᵀ`` of several pairs for BLOCK_M rows; R, EVEN_K and OVERLAP as above."""
    if OVERLAP:
        gdc_launch_dependents()
    hiddens, xs, a_s = (hidden_0, hidden_1, hidden_2), (x_0, x_1, x_2), (a_0, a_1, a_2)
    Ks, ranks, strides_xm = (K_0, K_1, K_2), (rank_0, rank_1, rank_2), (stride_xm_0, stride_xm_1, stride_xm_2)
    strides_ar, strides_ak = (stride_ar_0, stride_ar_1, stride_ar_2), (stride_ak_0, stride_ak_1, stride_ak_2)
    for pair in tl.static_range(PAIRS):
        if tl.program_id(1) == min(pair, LANES - 1):
            _xa_rows(
                hiddens[pair], xs[pair], a_s[pair], scale, M, Ks[pair], ranks[pair], strides_xm[pair], 1,
                strides_ar[pair], strides_ak[pair], stride_hm, R, BLOCK_M, BLOCK_K, 1, EVEN_K,
            )  # fmt: skip


@triton.jit
def _skinny_tall_kernel(
    wide_part_ptr,  # [ranges, N, rank], or [ranges, rank, N] where TRANSPOSED
    dh_part_ptr,  # [N / BLOCK_N, M, rank] where WITH_DH
    dy_ptr,  # [M, N]
    h_ptr,  # [M, rank]
    b_ptr,  # [N, rank] where WITH_DH
    M,
    N,
    rank,
    blocks,  # row-blocks a range holds
    stride_dym,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    WITH_DH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,  # rank rounded up to a power of two >= 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write one range's part of ``dyᵀ h`` and, per row-block, one column block's part of ``dy B``."""
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    cols, rs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, R)
    in_n, in_r = cols < N, rs < rank
    if WITH_DH:
        b_ptrs = b_ptr + cols[:, None].to(tl.int64) * stride_bn + rs[None, :] * stride_br
        b = tl.load(b_ptrs, mask=in_n[:, None] & in_r[None, :], other=0.0)
    acc = tl.zeros((BLOCK_N, R), tl.float32)
    first = pid_m.to(tl.int64) * blocks * BLOCK_M
    for start in range(first, min(first + blocks * BLOCK_M, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        in_m = rows < M
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
        dy = tl.load(dy_ptrs, mask=in_m[:, None] & in_n[None, :], other=0.0)
        h_ptrs = h_ptr + rows[:, None] * stride_hm + rs[None, :] * stride_hr
        h = tl.load(h_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)
        acc = tl.dot(dy.T, h, acc)
        if WITH_DH:
            part_ptrs = dh_part_ptr + (pid_n.to(tl.int64) * M + rows[:, None]) * rank + rs[None, :]
            tl.store(part_ptrs, tl.dot(dy, b), mask=in_m[:, None] & in_r[None, :])
    part_ptr = wide_part_ptr + pid_m.to(tl.int64) * N * rank
    if TRANSPOSED:
        part_ptrs = part_ptr + rs[None, :].to(tl.int64) * N + cols[:, None]
    else:
        part_ptrs = part_ptr + cols[:, None].to(tl.int64) * rank + rs[None, :]
    tl.store(part_ptrs, acc, mask=in_n[:, None] & in_r[None, :])


@triton.jit
def _sum_parts(out_ptr, part_ptr, block, numel, parts, scale, BLOCK: tl.constexpr):
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptr + element, mask=inside, other=0.0)
        part_ptr += numel
    tl.store(out_ptr + element, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts_kernel(
    wide_ptr,  # [wide_numel]
    dh_ptr,  # [dh_numel] where WITH_DH
    wide_part_ptr,  # [wide_parts, wide_numel]
    dh_part_ptr,  # [dh_parts, dh_numel] where WITH_DH
    wide_numel,
    dh_numel,
    wide_parts,
    dh_parts,
    scale,
    WITH_DH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts of dB or dA, and of dh, the latter times ``scale``; one order, fp32, one rounding."""
    block = tl.program_id(0)
    wide_blocks = tl.cdiv(wide_numel, BLOCK)
    if block < wide_blocks:
        _sum_parts(wide_ptr, wide_part_ptr, block, wide_numel, wide_parts, 1.0, BLOCK)
    elif WITH_DH:
        _sum_parts(dh_ptr, dh_part_ptr, block - wide_blocks, dh_numel, dh_parts, scale, BLOCK)


def _padded_rank(r: int) -> int:
    return max(16, next_power_of_2(r))


@cache
def _xa_launcher(tiles: RowTiles, rank: int, even_k: bool, overlap: bool) -> Launcher:
    constants = {
        "R": rank, "BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k, "GROUPS": tiles.groups,
        "EVEN_K": even_k, "OVERLAP": overlap,
    }  # fmt: skip
    return Launcher(_skinny_xa_kernel, constants, num_warps=tiles.warps, num_stages=tiles.stages)


@cache
def _xas_launcher(
    tiles: RowTiles, pairs: int, lanes: int, rank: int, even_k: bool, overlap: bool
) -> Launcher:
    constants = {
        "PAIRS": pairs, "LANES": lanes, "R": rank, "BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k,
        "EVEN_K": even_k, "OVERLAP": overlap,
    }  # fmt: skip
    return Launcher(_skinny_xas_kernel, constants, num_warps=tiles.warps, num_stages=tiles.stages)


@cache
def _tall_launcher(tiles: TallTiles, rank: int, with_dh: bool) -> Launcher:
    constants = {
        "WITH_DH": with_dh, "TRANSPOSED": not with_dh, "R": rank, "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }  # fmt: skip
    return Launcher(_skinny_tall_kernel, constants, num_warps=tiles.warps, num_stages=tiles.stages)


@cache
def _sum_launcher(with_dh: bool) -> Launcher:
    return Launcher(_sum_parts_kernel, {"WITH_DH": with_dh, "BLOCK": _SUM_BLOCK}, num_warps=4)


def sum_parts(
    wide: Tensor,
    wide_parts: Tensor,
    parts: int,
    dh: Tensor | None = None,
    dh_parts: Tensor | None = None,
    dh_count: int = 0,
    scale: float = 1.0,
) -> None:
    """Write ``Σ wide_parts`` to ``wide`` and, where given, ``scale · Σ dh_parts`` to ``dh``: one launch.

    Args:
        wide: any shape, contiguous.
        wide_parts: fp32, ``parts`` times ``wide``'s elements.
        parts: how many to sum, in their order.
        dh: a second result, or None.
        dh_parts: fp32, ``dh_count`` times ``dh``'s elements.
        dh_count: how many parts ``dh`` has.
        scale: factor of ``dh``.
    """
    both = dh is not None
    dh, dh_parts = (wide, wide_parts) if dh is None or dh_parts is None else (dh, dh_parts)
    dh_numel = dh.numel() if both else 0
    grid = (cdiv(wide.numel(), _SUM_BLOCK) + cdiv(dh_numel, _SUM_BLOCK),)
    _sum_launcher(both)(grid, wide, dh, wide_parts, dh_parts, wide.numel(), dh_numel, parts, dh_count, scale)


def xa_triton(
    x: Tensor,
    a: Tensor,
    scale: float,
    tiles: RowTiles,
    overlap: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Run `_skinny_xa_kernel`; arguments as for `skinny_xa`, ``overlap`` as for `lora_gemm.gemm_tma`."""
    (m, k), r = x.shape, a.shape[0]
    hidden = x.new_empty(m, r) if out is None else out
    launch = _xa_launcher(tiles, _padded_rank(r), k % tiles.block_k == 0, overlap)
    launch(
        (cdiv(m, tiles.block_m),),
        hidden, x, a, scale, m, k, r, *x.stride(), *a.stride(), hidden.stride(0),
    )  # fmt: skip
    return hidden


def xas_triton(
    pairs: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    tiles: RowTiles,
    programs: int,
    outs: Sequence[Tensor],
    overlap: bool = False,
) -> None:
    """Write ``scale · xᵢ Aᵢᵀ`` of one to three pairs: one launch.

    Args:
        pairs: ``(M, Kᵢ)``, rows contiguous, and ``(rᵢ, Kᵢ)``, any strides.
        scale: factor of the results.
        tiles: of `_skinny_xas_kernel`, ``groups`` 1.
        programs: that run at a time; with fewer row-blocks than that, pairs get programs of their own.
        outs: ``(M, rᵢ)`` each, columns of one tensor.
        overlap: as for `lora_gemm.gemm_tma`.
    """
    m = pairs[0][0].shape[0]
    row_blocks = cdiv(m, tiles.block_m)
    lanes = max(1, min(len(pairs), programs // row_blocks))
    args: list[Tensor | int | None] = []
    for (x, a), out in zip(pairs, outs, strict=True):
        args += (out, x, a, x.shape[1], a.shape[0], x.stride(0), *a.stride())
    args += (None,) * (8 * (_MOST_PAIRS - len(pairs)))
    rank = max(_padded_rank(a.shape[0]) for _, a in pairs)
    even_k = all(x.shape[1] % tiles.block_k == 0 for x, _ in pairs)
    launch = _xas_launcher(tiles, len(pairs), lanes, rank, even_k, overlap)
    launch((row_blocks, lanes), *args, scale, m, outs[0].stride(0))


def _tall(
    wide: Tensor,
    thin: Tensor,
    lora_b: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    tiles: TallTiles,
) -> tuple[Tensor, Tensor]:
    """Return ``wideᵀ thin`` (transposed where lora_b is None) and ``scale · wide B``: two launches."""
    (m, n), r = wide.shape, thin.shape[1]
    with_dh = lora_b is not None
    row_blocks, col_blocks = cdiv(m, tiles.block_m), cdiv(n, tiles.block_n)
    blocks = cdiv(row_blocks * col_blocks, tiles.programs)
    ranges = cdiv(row_blocks, blocks)
    parts = wide.new_empty(ranges * n * r + (col_blocks * m * r if with_dh else 0), dtype=torch.float32)
    dh_parts = parts[ranges * n * r :]
    out = wide.new_empty((n, r) if with_dh else (r, n), dtype=dtype)
    dh = wide.new_empty(m if with_dh else 0, r)
    _tall_launcher(tiles, _padded_rank(r), with_dh)(
        (col_blocks, ranges),
        parts, dh_parts, wide, thin, lora_b, m, n, r, blocks, wide.stride(0), *thin.stride(),
        *((0, 0) if lora_b is None else lora_b.stride()),
    )  # fmt: skip
    if with_dh:
        sum_parts(out, parts, ranges, dh, dh_parts, col_blocks, scale)
    else:
        sum_parts(out, parts, ranges)
    return out, dh


def dy_triton(
    dy: Tensor, hidden: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype, tiles: TallTiles
) -> tuple[Tensor, Tensor]:
    """Run the one pass over dy; arguments as for `skinny_dy`."""
    db, dh = _tall(dy, hidden, lora_b, scale, dtype, tiles)
    return dh, db


def da_triton(dh: Tensor, x: Tensor, dtype: torch.dtype, tiles: TallTiles) -> Tensor:
    """Run the one pass over x for dA; arguments as for `skinny_da`."""
    return _tall(x, dh, None, 1.0, dtype, tiles)[0]


def _fits(wide: Tensor, *others: Tensor) -> bool:
    """Return whether the kernels take the operands: half precision, 16-byte aligned rows, not empty."""
    return (
        wide.dtype in _HALF
        and all(other.dtype == wide.dtype and other.numel() for other in others)
        and wide.numel() > 0
        and wide.stride(1) == 1
        and wide.stride(0) % 8 == 0
        and wide.data_ptr() % 16 == 0
    )


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``scale · a b`` by cuBLAS, in one launch, rounded once."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0.0, alpha=scale)


def mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a b`` in ``dtype`` by cuBLAS; a half-precision product goes to fp32 unrounded."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in _HALF:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def skinny_xa(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return ``scale · x Aᵀ`` by the route that the table gives for the device and shape.

    ``dh = s dy B`` alone is ``skinny_xa(dy, lora_b.t(), s)``. Layers that share x pass their A stacked,
    ``(Σr, K)``, and read x once.

    Args:
        x: ``(M, K)``.
        a: ``(r, K)``, ``x``'s dtype, any strides.
        scale: factor of the result.

    Returns:
        ``(M, r)``, contiguous, ``x``'s dtype.
    """
    numbers = skinny_route("xa", x, a.shape[0])
    if isinstance(numbers, str) or not _fits(x, a):
        return scaled_mm(x, a.t(), scale)
    return xa_triton(x, a, scale, RowTiles(*numbers))


def skinny_dy(
    dy: Tensor, hidden: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``dh = scale · dy B`` and ``dB = dyᵀ hidden`` by the route that the table gives.

    Args:
        dy: ``(M, N)``.
        hidden: ``(M, r)``, ``dy``'s dtype, any strides, the scaling already in it.
        lora_b: ``(N, r)``, likewise.
        scale: factor of dh.
        dtype: dtype of dB; the product is accumulated in fp32 and rounded once.

    Returns:
        dh ``(M, r)`` in ``dy``'s dtype and dB ``(N, r)`` in ``dtype``.
    """
    numbers = skinny_route("dy", dy, hidden.shape[1])
    if isinstance(numbers, str) or not _fits(dy, hidden, lora_b):
        return scaled_mm(dy, lora_b, scale), mm_as(dy.t(), hidden, dtype)
    return dy_triton(dy, hidden, lora_b, scale, dtype, TallTiles(*numbers))


def skinny_da(dh: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``dA = dhᵀ x`` by the route that the table gives.

    Args:
        dh: ``(M, r)``, any strides, the scaling already in it.
        x: ``(M, K)``, ``dh``'s dtype.
        dtype: dtype of dA; the product is accumulated in fp32 and rounded once.

    Returns:
        ``(r, K)`` in ``dtype``.
    """
    numbers = skinny_route("da", x, dh.shape[1])
    if isinstance(numbers, str) or not _fits(x, dh):
        return mm_as(dh.t(), x, dtype)
    return da_triton(dh, x, dtype, TallTiles(*numbers))
