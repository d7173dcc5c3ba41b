"""Forward and backward of one LoRA layer with the skinny products hidden behind the GEMM (Hopper).

Equation (``lora_linear_twin.py``)::

    h  = s x Aᵀ       y  = x Wᵀ + bias + h Bᵀ
    dh = s dy B       dx = dy W + dh A       dA = dhᵀ x       dB = dyᵀ h

The skinny products move bytes and leave the tensor cores idle; the GEMM does the opposite. Programmatic
dependent launch lets a kernel start while the one before it on the stream still runs:

1. h (or dh): says at its start that the next kernel may start;
2. the GEMM: starts at once beside it, and waits for it before its first LoRA step, at a tile's end;
3. dA and dB together: starts once every GEMM program has passed that wait, in the shared memory and
   registers that the GEMM leaves free, and only its first program waits for the GEMM, so that whatever
   follows on the stream follows both;
4. the sum of the parts of dA and dB, in order: an ordinary launch.

One stream, no events, four launches backward and two forward. Layers that share x (q, k and v; gate and
up) share the launch of h, that of their dh, the GEMM of dx, whose K loop runs over all their dy, and dA's.
Bytes as in ``lora_skinny.py``, with dy read three times (dh, GEMM, dB); parts of dA and dB: ranges ·
(N + K) r floats.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import Launcher, Plans, cdiv
from .lora_gemm import Tiles, fits_tma, gemm_tma, padded_rank, rows_fit
from .lora_skinny import RowTiles, sum_parts, xa_triton, xas_triton

_MAX_ROWS = 2048  # in one fp32 accumulator: tensor cores truncate, and their error grows with its length
MAX_RANK = 64  # wider ranks leave the GEMM's neighbours no room


class PairTiles(NamedTuple):
    """Compile-time choices of `_tall_pair_kernel`."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int  # aimed at: as many as run beside the GEMM at a time


@triton.jit
def _tall_pair_kernel(
    out0_ptr,  # parts of the first product: [ranges, width0, rank0] or [ranges, rank0, width0]
    wide0_ptr,  # [M, width0]
    thin0_ptr,  # [M, rank0]
    width0,
    rank0,
    stride_wm0,
    stride_tm0,
    stride_tr0,
    stride_oc0,
    stride_or0,
    out1_ptr,  # the same of the second; width1 is 0 where there is none
    wide1_ptr,
    thin1_ptr,
    width1,
    rank1,
    stride_wm1,
    stride_tm1,
    stride_tr1,
    stride_oc1,
    stride_or1,
    M,
    rows_in_range,
    R: tl.constexpr,  # the larger rank rounded up to a power of two >= 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write one range's part of ``wideᵀ thin`` for BLOCK_N columns of one of two products."""
    if OVERLAP:
        gdc_launch_dependents()
    pid, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks0 = tl.cdiv(width0, BLOCK_N)
    if pid < blocks0:
        width, rank, col, wide_ptr, thin_ptr, out_ptr = (
            width0,
            rank0,
            pid * BLOCK_N,
            wide0_ptr,
            thin0_ptr,
            out0_ptr,
        )
        stride_wm, stride_tm, stride_tr, stride_oc, stride_or = (
            stride_wm0,
            stride_tm0,
            stride_tr0,
            stride_oc0,
            stride_or0,
        )
    else:
        width, rank, col, wide_ptr, thin_ptr, out_ptr = (
            width1, rank1, (pid - blocks0) * BLOCK_N, wide1_ptr, thin1_ptr, out1_ptr,
        )  # fmt: skip
        stride_wm, stride_tm, stride_tr, stride_oc, stride_or = (
            stride_wm1,
            stride_tm1,
            stride_tr1,
            stride_oc1,
            stride_or1,
        )
    cols, rs = col + tl.arange(0, BLOCK_N), tl.arange(0, R)
    in_c, in_r = cols < width, rs < rank
    acc = tl.zeros((BLOCK_N, R), tl.float32)
    first = part * rows_in_range
    for start in range(first, min(first + rows_in_range, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        in_m = rows < M
        wide_ptrs = wide_ptr + rows[:, None] * stride_wm + cols[None, :]
        wide = tl.load(wide_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)
        thin_ptrs = thin_ptr + rows[:, None] * stride_tm + rs[None, :] * stride_tr
        thin = tl.load(thin_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)
        acc = tl.dot(wide.T, thin, acc)
    out_ptrs = out_ptr + part * width * rank + cols[:, None].to(tl.int64) * stride_oc
    tl.store(out_ptrs + rs[None, :].to(tl.int64) * stride_or, acc, mask=in_c[:, None] & in_r[None, :])
    if OVERLAP:  # noqa: SIM102 - OVERLAP is known when compiling
        if pid + part == 0:  # this kernel ends after the one beside it
            gdc_wait()


class TallProduct(NamedTuple):
    """A product ``wideᵀ thin`` over M rows: dB = dyᵀ h, or dA = dhᵀ x where ``transposed``."""

    wide: Tensor  # (M, width), rows contiguous
    thin: Tensor  # (M, r)
    transposed: bool  # whether the result is (r, width), not (width, r)

    @property
    def numel(self) -> int:
        """Elements of the result."""
        return self.wide.shape[1] * self.thin.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The result's."""
        width, r = self.wide.shape[1], self.thin.shape[1]
        return (r, width) if self.transposed else (width, r)

    def arguments(self, parts: Tensor) -> tuple[Tensor | int, ...]:
        """Return the kernel's arguments."""
        width, r = self.wide.shape[1], self.thin.shape[1]
        strides = (1, width) if self.transposed else (r, 1)
        return (parts, self.wide, self.thin, width, r, self.wide.stride(0), *self.thin.stride(), *strides)


@cache
def _pair_launcher(tiles: PairTiles, rank: int, overlap: bool) -> Launcher:
    constants = {"R": rank, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "OVERLAP": overlap}
    return Launcher(
        _tall_pair_kernel, constants, num_warps=tiles.warps, num_stages=tiles.stages, launch_pdl=overlap
    )


class TallPlan(NamedTuple):
    """One or two tall products, with memory for their parts and results."""

    pair: Sequence[TallProduct]
    rows_in_range: int
    ranges: int
    parts: Sequence[Tensor]
    outs: Sequence[Tensor]


@cache
def _tall_ranges(m: int, widths: tuple[int, ...], tiles: PairTiles) -> tuple[int, int]:
    """Return the rows of a range, and how many ranges one or two products over M rows are cut into."""
    columns = sum(cdiv(width, tiles.block_n) for width in widths)
    row_blocks = cdiv(m, tiles.block_m)
    blocks = cdiv(row_blocks, max(1, tiles.programs // columns))
    blocks = min(blocks, _MAX_ROWS // tiles.block_m)
    return blocks * tiles.block_m, cdiv(row_blocks, blocks)


def plan_tall(products: Sequence[TallProduct], dtype: torch.dtype, tiles: PairTiles) -> list[TallPlan]:
    """Allocate what products need, two by two; results in ``dtype``."""
    wide = products[0].wide
    pairs = [products[i : i + 2] for i in range(0, len(products), 2)]
    cuts = [_tall_ranges(wide.shape[0], tuple(p.wide.shape[1] for p in pair), tiles) for pair in pairs]
    sizes = [ranges * p.numel for pair, (_, ranges) in zip(pairs, cuts, strict=True) for p in pair]
    aligned = [cdiv(size, 4) * 4 for size in sizes]  # every part starts at a multiple of 16 bytes
    parts = wide.new_empty(sum(aligned), dtype=torch.float32).split_with_sizes(aligned)
    outs = [wide.new_empty(product.shape, dtype=dtype) for product in products]
    return [
        TallPlan(pair, rows, ranges, parts[2 * i : 2 * i + 2], outs[2 * i : 2 * i + 2])
        for i, (pair, (rows, ranges)) in enumerate(zip(pairs, cuts, strict=True))
    ]


def _launch_parts(plan: TallPlan, tiles: PairTiles, overlap: bool) -> None:
    """Write the parts: one launch."""
    pair, first = plan.pair, plan.pair[0]
    columns = sum(cdiv(product.wide.shape[1], tiles.block_n) for product in pair)
    none = (plan.parts[0], first.wide, first.thin, 0, 0, 0, 0, 0, 0, 0)
    rank = max(padded_rank(product.thin.shape[1]) for product in pair)
    _pair_launcher(tiles, rank, overlap)(
        (columns, plan.ranges),
        *first.arguments(plan.parts[0]),
        *(pair[1].arguments(plan.parts[1]) if len(pair) == 2 else none),
        first.wide.shape[0],
        plan.rows_in_range,
    )


def launch_tall(plans: Sequence[TallPlan], tiles: PairTiles, overlap: bool = False) -> None:
    """Compute the planned products: two launches each, first all the parts and then all the sums.

    With ``overlap`` the kernel just before on the stream must be `gemm_tma`'s with ``overlap``, and the
    only operand not complete before *that* one may be the hidden that it waited for.
    """
    for plan in plans:
        _launch_parts(plan, tiles, overlap)
    for plan in plans:
        if len(plan.outs) == 2:
            (out, second), (parts, second_parts) = plan.outs, plan.parts
            sum_parts(out, parts, plan.ranges, second, second_parts, plan.ranges)
        else:
            sum_parts(plan.outs[0], plan.parts[0], plan.ranges)


def tall_products(
    products: Sequence[TallProduct], dtype: torch.dtype, tiles: PairTiles, overlap: bool = False
) -> list[Tensor]:
    """Return the products in ``dtype``: `plan_tall` and `launch_tall`."""
    plans = plan_tall(products, dtype, tiles)
    launch_tall(plans, tiles, overlap)
    return [out for plan in plans for out in plan.outs]


_plans = Plans()
_GEMM_TILES = Tiles(128, 256, 64, 8, 3)  # 180 KB of shared memory: 47 KB left for the kernels beside it


def _row_tiles(r: int) -> RowTiles:
    """Return tiles that fit beside the GEMM: 41 KB at r 16, 33 KB at r 64."""
    return RowTiles(64, 128, 1, 4, 2) if r <= 16 else RowTiles(64, 64, 1, 4, 2)


def _pair_tiles(r: int) -> PairTiles:
    """Return tiles that fit beside the GEMM: 37 KB at r 16, 33 KB at r 64."""
    return PairTiles(64, 128, 4, 2, 132) if r <= 16 else PairTiles(32, 64, 4, 4, 132)


def fits_overlap(factors: Sequence[tuple[Tensor, Tensor]], out: Tensor, r: int) -> bool:
    """Return whether the overlapped kernels take these operands; r is the sum of the ranks."""
    return 0 < r <= MAX_RANK and fits_tma(factors, out)


def forward_overlapped(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    lora_a: Tensor,
    scale: float,
    outs: Sequence[Tensor],
    overlap: bool = True,
) -> Tensor | None:
    """Write each layer's y and return hidden: one launch for it and one a layer.

    Args:
        x: ``(M, K)``.
        layers: weight ``(N, K)``, bias or None and B ``(N, r)`` of each layer that reads x.
        lora_a: ``(Σr, K)``, the layers' A one below the other.
        scale: the scaling of the LoRA term.
        outs: ``(M, N)`` a layer.
        overlap: False runs the same kernels in turn.

    Returns:
        h ``(M, Σr)``; None, with nothing done, where the kernels do not take these operands.
    """
    hidden = x.new_empty(x.shape[0], lora_a.shape[0])
    owns = _columns(hidden, [lora_b for _, _, lora_b in layers])

    def launches() -> bool:
        operands = zip(layers, outs, strict=True)
        if not all(fits_overlap(((x, layer[0]),), out, lora_a.shape[0]) for layer, out in operands):
            return False
        xa_triton(x, lora_a, scale, _row_tiles(lora_a.shape[0]), overlap, hidden)
        first = True
        for (weight, bias, lora_b), own, out in zip(layers, owns, outs, strict=True):
            gemm_tma(((x, weight),), bias, own, lora_b, out, _GEMM_TILES, overlap and first)
            first = False
        return True

    given = [x, lora_a, *(tensor for layer in layers for tensor in layer), *outs]
    return hidden if _plans.run(("forward", scale, overlap), given, owns, launches) else None


def _columns(stacked: Tensor, lora_bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return each layer's columns of ``(M, Σr)``; the first has the address of the whole."""
    if len(lora_bs) == 1:
        return (stacked,)
    return stacked.split_with_sizes([lora_b.shape[1] for lora_b in lora_bs], 1)


def backward_overlapped(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    lora_a: Tensor,
    lora_bs: Sequence[Tensor],
    scale: float,
    dtype: torch.dtype,
    dx: Tensor,
    overlap: bool = True,
) -> tuple[Tensor, list[Tensor]] | None:
    """Write dx and return dA ``(Σr, K)`` and each layer's dB, or None; as `forward_overlapped`."""
    total = lora_a.shape[0]
    dh = dys[0].new_empty(dys[0].shape[0], total)
    parts_of_dh, parts_of_h = _columns(dh, lora_bs), _columns(hidden, lora_bs)
    products = [TallProduct(x, dh, transposed=True)]
    products += [TallProduct(dy, own, transposed=False) for dy, own in zip(dys, parts_of_h, strict=True)]
    tiles = _pair_tiles(total)
    tall = plan_tall(products, dtype, tiles)

    def launches() -> bool:
        factors = [(dy, weight.t()) for dy, weight in zip(dys, weights, strict=True)]
        if not (fits_overlap(factors, dx, total) and rows_fit(x)):
            return False
        pairs = [(dy, lora_b.t()) for dy, lora_b in zip(dys, lora_bs, strict=True)]
        widest = max(lora_b.shape[1] for lora_b in lora_bs)
        xas_triton(pairs, scale, _row_tiles(widest), tiles.programs, parts_of_dh, overlap)
        gemm_tma(factors, None, dh, lora_a.t(), dx, _GEMM_TILES, overlap)
        launch_tall(tall, tiles, overlap)
        return True

    given = [x, lora_a, dx, *parts_of_h, *dys, *weights, *lora_bs]
    made = [*parts_of_dh, *(tensor for plan in tall for tensor in (*plan.parts, *plan.outs))]
    if not _plans.run(("backward", scale, dtype, overlap), given, made, launches):
        return None
    da, *dbs = (out for plan in tall for out in plan.outs)
    return da, dbs
