"""The base product and the LoRA product in one GEMM, in Triton for Hopper's copy engine (TMA).

Equation, M rows, N columns, K terms and a rank-r update::

    y = x Wᵀ + bias + hidden Bᵀ        forward:   x (M, K), W (N, K), hidden = s x Aᵀ (M, r), B (N, r)
    dx = dy W + dh A                   backward:  the same with W.t(), A.t() for W, B
    dx = Σᵢ dyᵢ Wᵢ + dh A              of layers that share x (q, k and v; gate and up)

The update is one more step of each tile's K loop, so y is written once and never read: ``addmm_`` after
a product reads and writes it again. Bytes moved with b an element: b (M K + N K + M N + (M + N) r).

Layout: persistent, one or two programs a multiprocessor, tiles of BLOCK_M × BLOCK_N in groups of
GROUP_M rows of tiles, so that tiles in flight share rows of x and columns of W in L2. x, W and y go
through tensor descriptors, which fill what lies outside with zeros and do not write it: ragged M, N, K
need no masks, but rows must be 16-byte aligned (`fits_tma`). hidden, B and bias are small and go through
pointers: any rank, any strides.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import Launcher, cdiv, next_power_of_2
from .lora_routes import gemm_route

_MAX_FACTORS = 3  # q, k and v
_MAX_REGISTERS = 192  # a thread's, where another kernel is to run beside this one
_DESCRIPTOR_RANK = 64  # from here on the LoRA operands of a tile take too many registers on their way


class Tiles(NamedTuple):
    """Compile-time choices of the kernel; a route's numbers, in this order."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 1  # programs a multiprocessor holds at a time
    group_m: int = 8


@triton.jit
def _store_tile(y_desc, acc, row, col, bias_ptr, N, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the bias to a tile and store it, rounding once."""
    if HAS_BIAS:
        cols = col + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y_desc.store([row, col], acc.to(y_desc.dtype))


@triton.jit
def _k_loop(acc, x_desc, w_desc, row, col, K, WEIGHT_NK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return ``acc + x Wᵀ`` for one tile."""
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])
        if WEIGHT_NK:  # noqa: SIM108 - as a ternary, both sides would be compiled
            w = w_desc.load([col, k]).T
        else:
            w = w_desc.load([k, col])
        acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def _lora_step(
    acc,
    hidden,  # [M, rank]: pointer, or descriptor
    lora_b,  # [N, rank]: pointer, or descriptor (of [rank, N] where the weight is [K, N])
    row,
    col,
    M,
    N,
    rank,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    WEIGHT_NK: tl.constexpr,
    LORA_DESC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
):
    """Return ``acc + hidden Bᵀ`` for one tile; ranks are padded to R with zeros."""
    if LORA_DESC:
        h = hidden.load([row, 0])
        if WEIGHT_NK:  # noqa: SIM108 - as above
            b = lora_b.load([col, 0]).T
        else:
            b = lora_b.load([0, col])
    else:
        rows, cols, rs = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, R)
        h_ptrs = hidden + rows[:, None].to(tl.int64) * stride_hm + rs[None, :] * stride_hr
        b_ptrs = lora_b + cols[None, :].to(tl.int64) * stride_bn + rs[:, None].to(tl.int64) * stride_br
        h = tl.load(h_ptrs, mask=(rows[:, None] < M) & (rs[None, :] < rank), other=0.0)
        b = tl.load(b_ptrs, mask=(cols[None, :] < N) & (rs[:, None] < rank), other=0.0)
    return tl.dot(h, b, acc)


@triton.jit
def _lora_gemm_kernel(
    y_desc,  # [M, N], blocks of BLOCK_M, BLOCK_N / 2
    x_desc,  # [M, K], blocks of BLOCK_M, BLOCK_K
    w_desc,  # [N, K], blocks of BLOCK_N, BLOCK_K; or [K, N], blocks of BLOCK_K, BLOCK_N
    x1_desc,  # [M, K1], or None: a second pair of factors
    w1_desc,  # [N, K1] or [K1, N]
    x2_desc,  # [M, K2], or None: a third
    w2_desc,  # [N, K2] or [K2, N]
    bias_ptr,  # [N]
    hidden,  # [M, rank]: pointer, or descriptor
    lora_b,  # [N, rank]: pointer, or descriptor (of [rank, N] where the weight is [K, N])
    M,
    N,
    K,
    K1,
    K2,
    rank,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    HAS_BIAS: tl.constexpr,
    WEIGHT_NK: tl.constexpr,  # whether w_desc is [N, K]
    R: tl.constexpr,  # rank rounded up to a power of two >= 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    LORA_DESC: tl.constexpr,  # whether hidden and lora_b are descriptors
    OVERLAP: tl.constexpr,  # whether this kernel was started before the one that writes hidden ended
):
    """Write y, tile by tile; accumulation in fp32, one rounding."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles_in_group = GROUP_M * tiles_n
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = tile // tiles_in_group * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        row = (first_m + tile % tiles_in_group % group_m) * BLOCK_M
        col = tile % tiles_in_group // group_m * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _k_loop(acc, x_desc, w_desc, row, col, K, WEIGHT_NK, BLOCK_K)
        if x1_desc is not None:
            acc = _k_loop(acc, x1_desc, w1_desc, row, col, K1, WEIGHT_NK, BLOCK_K)
        if x2_desc is not None:
            acc = _k_loop(acc, x2_desc, w2_desc, row, col, K2, WEIGHT_NK, BLOCK_K)
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        acc = _lora_step(
            acc, hidden, lora_b, row, col, M, N, rank, stride_hm, stride_hr, stride_bn, stride_br,
            WEIGHT_NK, LORA_DESC, BLOCK_M, BLOCK_N, R,
        )  # fmt: skip
        HALF: tl.constexpr = BLOCK_N // 2  # in two pieces: less shared memory
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _store_tile(y_desc, left, row, col, bias_ptr, N, HAS_BIAS, HALF)
        _store_tile(y_desc, right, row, col + HALF, bias_ptr, N, HAS_BIAS, HALF)


def padded_rank(r: int) -> int:
    """Return the rank a tensor-core product takes: a power of two, at least 16."""
    return max(16, next_power_of_2(r))


def rows_fit(tensor: Tensor) -> bool:
    """Return whether the rows of a matrix are contiguous and start at multiples of 16 bytes."""
    size = tensor.element_size()
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * size % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def fits_tma(factors: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
    """Return whether the copy engine can address every factor and ``out``: 16-byte aligned rows."""
    weights_fit = all(rows_fit(w) for _, w in factors) or all(rows_fit(w.t()) for _, w in factors)
    return (
        out.dtype in (torch.bfloat16, torch.float16)
        and len(factors) <= _MAX_FACTORS
        and out.numel() > 0
        and all(x.numel() > 0 for x, _ in factors)
        and weights_fit
        and rows_fit(out)
        and all(rows_fit(x) for x, _ in factors)
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _programs(device: torch.device, per_sm: int, tiles: int) -> int:
    return min(_multiprocessors(device) * per_sm, tiles)


@cache
def _launcher(
    tiles: Tiles, has_bias: bool, weight_nk: bool, rank: int, lora_desc: bool, overlap: bool
) -> Launcher:
    order = 1 if weight_nk else -1  # of a block's sizes along N and along the terms
    blocks = {"y_desc": [tiles.block_m, tiles.block_n // 2]}
    for i in ("", "1", "2"):
        blocks[f"x{i}_desc"] = [tiles.block_m, tiles.block_k]
        blocks[f"w{i}_desc"] = [tiles.block_n, tiles.block_k][::order]
    if lora_desc:
        blocks |= {"hidden": [tiles.block_m, rank], "lora_b": [tiles.block_n, rank][::order]}
    constants = {
        "HAS_BIAS": has_bias, "WEIGHT_NK": weight_nk, "R": rank, "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m,
        "LORA_DESC": lora_desc, "OVERLAP": overlap,
    }  # fmt: skip
    return Launcher(
        _lora_gemm_kernel, constants, blocks=blocks, num_warps=tiles.warps, num_stages=tiles.stages,
        launch_pdl=overlap, maxnreg=_MAX_REGISTERS if overlap else None,
    )  # fmt: skip


def gemm_tma(
    factors: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    out: Tensor,
    tiles: Tiles,
    overlap: bool = False,
) -> Tensor:
    """Run the kernel; arguments as for `lora_gemm_sum`, which must have asked `fits_tma`.

    With ``overlap`` the kernel may start while the one launched just before it on the stream still runs:
    that one must be `xa_triton`'s, writing ``hidden``, which is all that this one waits for.
    """
    (m, n), r, rank = out.shape, hidden.shape[1], padded_rank(hidden.shape[1])
    weight_nk = rows_fit(factors[0][1])
    terms = [x.shape[1] for x, _ in factors]
    stored_b = lora_b if weight_nk else lora_b.t()
    lora_desc = rank >= _DESCRIPTOR_RANK and rows_fit(hidden) and rows_fit(stored_b)
    operands = [t for x, weight in factors for t in (x, weight if weight_nk else weight.t())]
    launch = _launcher(tiles, bias is not None, weight_nk, rank, lora_desc, overlap)
    launch(
        (_programs(out.device, tiles.per_sm, cdiv(m, tiles.block_m) * cdiv(n, tiles.block_n)),),
        out,
        *operands,
        *[None] * (2 * _MAX_FACTORS - len(operands)),
        bias,
        hidden,
        stored_b if lora_desc else lora_b,
        m,
        n,
        *terms,
        *[0] * (_MAX_FACTORS - len(terms)),
        r,
        *hidden.stride(),
        *lora_b.stride(),
    )
    return out


def gemm_cublas(
    factors: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    out: Tensor,
) -> Tensor:
    """One cuBLAS call a product; all but the first read and write ``out`` again."""
    (x, weight), *others = factors
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    for x, weight in others:
        out.addmm_(x, weight.t())
    return out.addmm_(hidden, lora_b.t())


def lora_gemm_sum(
    factors: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``Σᵢ xᵢ Wᵢᵀ + bias + hidden Bᵀ`` by the route that the table gives for the device and shape.

    The gradient of an input that layers share: ``Σ dyᵢ Wᵢ + dh A``, with ``(dyᵢ, Wᵢ.t())`` as factors, dh
    and A those of all layers side by side, and ``A.t()`` for ``lora_b``.

    Args:
        factors: pairs ``(M, Kᵢ)`` and ``(N, Kᵢ)``, at least one; weights all of one orientation.
        bias: as for `lora_gemm`.
        hidden: as for `lora_gemm`.
        lora_b: as for `lora_gemm`.
        out: as for `lora_gemm`.
    """
    x, weight = factors[0]
    n, k = weight.shape[0], sum(x.shape[1] for x, _ in factors)
    if out is None:
        out = x.new_empty(x.shape[0], n)
    numbers = gemm_route(x, n, k, hidden.shape[1], mirrored=weight.stride(0) == 1)
    if isinstance(numbers, str) or not fits_tma(factors, out):
        return gemm_cublas(factors, bias, hidden, lora_b, out)
    return gemm_tma(factors, bias, hidden, lora_b, out, Tiles(*numbers))


def lora_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + hidden Bᵀ`` by the route that the table gives for the device and shape.

    Backward's ``dx = dy W + dh A`` is ``lora_gemm(dy, weight.t(), None, dh, lora_a.t())``.

    Args:
        x: ``(M, K)``, any dtype that torch multiplies; the TMA route takes bf16 and fp16.
        weight: ``(N, K)``, ``x``'s dtype, any strides; a transposed view is read as it lies.
        bias: ``(N,)``, ``x``'s dtype, or None.
        hidden: ``(M, r)``, ``x``'s dtype, any strides, the scaling already in it.
        lora_b: ``(N, r)``, likewise.
        out: ``(M, N)``, where to write; None allocates.

    Returns:
        ``(M, N)``, ``x``'s dtype.
    """
    return lora_gemm_sum(((x, weight),), bias, hidden, lora_b, out)
