"""The LoRA term under several posterior samples at once, perturbed inside the kernels, in Triton.

Equation (the whole layer is in ``lora_perturbed_twin.py``, which states the same in plain torch). Rows come
in G equal groups, each with a sample θ_g = mean + std ⊙ z_g of its own; with θ (W, r) for B and its
mirror (r, W) for A::

    perturbed_down    h_g    = s x_g A_gᵀ          (and backward  dh_g  = s dy_g B_g)
    perturbed_up_     y_g   += h_g B_gᵀ            (and backward  dx_g += dh_g A_g)
    perturbed_grads   dmean  = Σ_g dθ_g            dstd = Σ_g dθ_g ⊙ z_g
                      dB_g   = dy_gᵀ h_g           dA_g = dh_gᵀ x_g
    sample_factors    θ_g                          written out, for callers that use them often

A and B are perturbed as they are loaded, by the noise contract (``noise.py``); samples are never in memory.

Layout. A program of ``down`` takes BLOCK_M rows of one group and a range of the W terms; ranges are
summed in order by a second launch where there are too few rows to fill the GPU. A program of ``up``
makes its tile of θ_g once and takes a range of the group's rows. A program of ``grads`` takes BLOCK_W
columns and a range of groups, whose sums are again added in order. No atomics: same inputs, same bits.

Bytes with b an element: ``down`` b M W + 8 r W a block of rows (from L2); ``up`` 2 b M W; ``grads`` b M W.
Normals drawn: r W for each block of rows (``down``), range of rows (``up``) or group (``grads``).
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, cdiv, next_power_of_2
from .lora_gemm import padded_rank
from .lora_skinny import sum_parts
from .noise import interleave4, randn4x

_SAMPLE_BLOCK = 1024
_PROGRAMS = 264  # two for each multiprocessor of a large GPU


class Noise(NamedTuple):
    """Which sample each group takes: seeds and draws ``(G,)`` int64 on the device; the tensor's stream."""

    seeds: Tensor
    draws: Tensor
    stream: int


@triton.jit
def _element_normals(seed, draw, stream, element):
    """Return the normals of any elements: four times the work of whole groups of four."""
    z0, z1, z2, z3 = randn4x(seed, draw, stream, element // 4)
    lane = element % 4
    return tl.where(lane < 2, tl.where(lane == 0, z0, z1), tl.where(lane == 2, z2, z3))


@triton.jit
def _normals(
    seed,
    draw,
    stream,
    first,  # first of the W indices
    width,
    rank,
    WIDE_FIRST: tl.constexpr,  # θ is (W, r), not (r, W)
    QUADS: tl.constexpr,  # its rows are whole groups of four elements
    BLOCK_W: tl.constexpr,
    R: tl.constexpr,
):
    """Return z of a tile of θ: ``[BLOCK_W, R]``, or ``[R, BLOCK_W]`` where θ is (r, W)."""
    if WIDE_FIRST:
        rows = (first + tl.arange(0, BLOCK_W)).to(tl.int64)
        row_length = rank
        column = 0
    else:
        rows = tl.arange(0, R).to(tl.int64)
        row_length = width
        column = first
    COLUMNS: tl.constexpr = R if WIDE_FIRST else BLOCK_W
    if QUADS:
        group = (rows[:, None] * row_length + column) // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        z0, z1, z2, z3 = randn4x(seed, draw, stream, group)
        z = interleave4(z0, z1, z2, z3)
    else:
        element = rows[:, None] * row_length + column + tl.arange(0, COLUMNS)[None, :]
        z = _element_normals(seed, draw, stream, element)
    return z


@triton.jit
def _offsets(first, width, rank, WIDE_FIRST: tl.constexpr, BLOCK_W: tl.constexpr, R: tl.constexpr):
    """Return the offsets of a tile of θ in its memory, and which lie inside."""
    ws, rs = (first + tl.arange(0, BLOCK_W)).to(tl.int64), tl.arange(0, R).to(tl.int64)
    if WIDE_FIRST:
        offsets = ws[:, None] * rank + rs[None, :]
        inside = (ws < width)[:, None] & (rs < rank)[None, :]
    else:
        offsets = rs[:, None] * width + ws[None, :]
        inside = (rs < rank)[:, None] & (ws < width)[None, :]
    return offsets, inside


@triton.jit
def _sampled_tile(
    mean_ptr,
    std_ptr,
    seed,
    draw,
    stream,
    first,
    width,
    rank,
    DTYPE: tl.constexpr,
    WIDE_FIRST: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    R: tl.constexpr,
):
    """Return a tile of θ = mean + std ⊙ z, rounded once; zero outside."""
    offsets, inside = _offsets(first, width, rank, WIDE_FIRST, BLOCK_W, R)
    mean = tl.load(mean_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    z = _normals(seed, draw, stream, first, width, rank, WIDE_FIRST, QUADS, BLOCK_W, R)
    return (mean + std * z).to(DTYPE)


@triton.jit(do_not_specialize=["stream"])
def _perturbed_down_kernel(
    out_ptr,  # [M, rank], or parts [splits, M, rank] fp32
    x_ptr,  # [M, width]
    mean_ptr,  # [width, rank], or [rank, width]
    std_ptr,  # the same
    seeds_ptr,  # [G] int64
    draws_ptr,  # [G] int64
    stream,
    scale,
    rows_in_group,
    width,
    rank,
    stride_xm,
    split_width,  # terms a program sums: a multiple of BLOCK_W
    part_numel,  # M * rank
    WIDE_FIRST: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    R: tl.constexpr,  # rank rounded up to a power of two >= 16
):
    """Write ``scale · x_g θ_g`` for BLOCK_M rows of a group, over one range of the terms."""
    blocks = tl.cdiv(rows_in_group, BLOCK_M)
    group, split = tl.program_id(0) // blocks, tl.program_id(1)
    seed, draw = tl.load(seeds_ptr + group), tl.load(draws_ptr + group)
    within = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = within < rows_in_group
    rows = group.to(tl.int64) * rows_in_group + within
    ws, rs = tl.arange(0, BLOCK_W), tl.arange(0, R)
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    first = split * split_width
    for w in range(first, min(first + split_width, width), BLOCK_W):
        x_ptrs = x_ptr + rows[:, None] * stride_xm + (w + ws)[None, :]
        x = tl.load(x_ptrs, mask=in_m[:, None] & ((w + ws) < width)[None, :], other=0.0)
        theta = _sampled_tile(
            mean_ptr, std_ptr, seed, draw, stream, w, width, rank, x.dtype, WIDE_FIRST, QUADS, BLOCK_W, R
        )
        if not WIDE_FIRST:
            theta = theta.T
        acc = tl.dot(x, theta, acc, input_precision="ieee")
    out_ptrs = out_ptr + split.to(tl.int64) * part_numel + rows[:, None] * rank + rs[None, :]
    value = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, value, mask=in_m[:, None] & (rs < rank)[None, :])


@triton.jit(do_not_specialize=["stream"])
def _perturbed_up_kernel(
    out_ptr,  # [M, width]
    hidden_ptr,  # [M, rank]
    mean_ptr,  # [width, rank], or [rank, width]
    std_ptr,  # the same
    seeds_ptr,  # [G] int64
    draws_ptr,  # [G] int64
    stream,
    rows_in_group,
    rows_in_range,  # rows a program takes: a multiple of BLOCK_M
    width,
    rank,
    stride_om,
    WIDE_FIRST: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    R: tl.constexpr,
):
    """Add ``h_g θ_gᵀ`` to BLOCK_W columns of a range of a group's rows."""
    ranges = tl.cdiv(rows_in_group, rows_in_range)
    group, first_w = tl.program_id(0) // ranges, tl.program_id(1) * BLOCK_W
    seed, draw = tl.load(seeds_ptr + group), tl.load(draws_ptr + group)
    theta = _sampled_tile(
        mean_ptr, std_ptr, seed, draw, stream, first_w, width, rank,
        hidden_ptr.dtype.element_ty, WIDE_FIRST, QUADS, BLOCK_W, R,
    )  # fmt: skip
    if WIDE_FIRST:
        theta = theta.T
    ws, rs = first_w + tl.arange(0, BLOCK_W), tl.arange(0, R)
    first = tl.program_id(0) % ranges * rows_in_range
    for start in range(first, min(first + rows_in_range, rows_in_group), BLOCK_M):
        within = start + tl.arange(0, BLOCK_M)
        in_m = within < rows_in_group
        rows = group.to(tl.int64) * rows_in_group + within
        h_ptrs = hidden_ptr + rows[:, None] * rank + rs[None, :]
        hidden = tl.load(h_ptrs, mask=in_m[:, None] & (rs < rank)[None, :], other=0.0)
        out_ptrs = out_ptr + rows[:, None] * stride_om + ws[None, :]
        inside = in_m[:, None] & (ws < width)[None, :]
        out = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
        out = tl.dot(hidden, theta, out, input_precision="ieee")
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stream"])
def _perturbed_grads_kernel(
    mean_part_ptr,  # [ranges, numel] fp32
    std_part_ptr,  # the same
    wide_ptr,  # [M, width]
    thin_ptr,  # [M, rank]
    seeds_ptr,  # [G] int64
    draws_ptr,  # [G] int64
    stream,
    groups,
    groups_in_range,
    rows_in_group,
    width,
    rank,
    stride_wm,
    WIDE_FIRST: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    R: tl.constexpr,
):
    """Write one range's part of Σ dθ_g and Σ dθ_g ⊙ z_g for BLOCK_W columns."""
    first_w, part = tl.program_id(0) * BLOCK_W, tl.program_id(1)
    ws, rs = first_w + tl.arange(0, BLOCK_W), tl.arange(0, R)
    if WIDE_FIRST:  # noqa: SIM108 - as a ternary, both shapes would have to agree
        mean_acc = tl.zeros((BLOCK_W, R), tl.float32)
    else:
        mean_acc = tl.zeros((R, BLOCK_W), tl.float32)
    std_acc = tl.zeros_like(mean_acc)
    first_group = part * groups_in_range
    for group in range(first_group, min(first_group + groups_in_range, groups)):
        acc = tl.zeros_like(mean_acc)
        for start in range(0, rows_in_group, BLOCK_M):
            within = start + tl.arange(0, BLOCK_M)
            in_m = within < rows_in_group
            rows = tl.cast(group, tl.int64) * rows_in_group + within
            wide_ptrs = wide_ptr + rows[:, None] * stride_wm + ws[None, :]
            wide = tl.load(wide_ptrs, mask=in_m[:, None] & (ws < width)[None, :], other=0.0)
            thin_ptrs = thin_ptr + rows[:, None] * rank + rs[None, :]
            thin = tl.load(thin_ptrs, mask=in_m[:, None] & (rs < rank)[None, :], other=0.0)
            if WIDE_FIRST:
                acc = tl.dot(wide.T, thin, acc, input_precision="ieee")
            else:
                acc = tl.dot(thin.T, wide, acc, input_precision="ieee")
        seed, draw = tl.load(seeds_ptr + group), tl.load(draws_ptr + group)
        mean_acc += acc
        std_acc += acc * _normals(seed, draw, stream, first_w, width, rank, WIDE_FIRST, QUADS, BLOCK_W, R)
    offsets, inside = _offsets(first_w, width, rank, WIDE_FIRST, BLOCK_W, R)
    offsets += part.to(tl.int64) * width * rank
    tl.store(mean_part_ptr + offsets, mean_acc, mask=inside)
    tl.store(std_part_ptr + offsets, std_acc, mask=inside)


@triton.jit(do_not_specialize=["stream"])
def _sample_factors_kernel(
    out_ptr,  # [G, numel]
    mean_ptr,  # [numel]
    std_ptr,  # [numel]
    seeds_ptr,  # [G] int64
    draws_ptr,  # [G] int64
    stream,
    numel,
    BLOCK: tl.constexpr,
):
    """Write one block of one group's θ."""
    group = tl.program_id(1)
    seed, draw = tl.load(seeds_ptr + group), tl.load(draws_ptr + group)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    inside = element < numel
    z0, z1, z2, z3 = randn4x(seed, draw, stream, start // 4 + tl.arange(0, BLOCK // 4))
    mean = tl.load(mean_ptr + element, mask=inside, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + element, mask=inside, other=0.0).to(tl.float32)
    theta = (mean + std * interleave4(z0, z1, z2, z3)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + group.to(tl.int64) * numel + element, theta, mask=inside)


def _block_w(rank: int) -> int:
    """Return the columns of a tile of θ: 2,048 to 8,192 elements of it in registers."""
    return max(32, min(128, 4096 // rank))


def _block_m(rows: int, rank: int, most: int = 128) -> int:
    return max(16, min(next_power_of_2(rows), most if rank <= 64 else 32))


@cache
def _num_stages(device: torch.device) -> int:
    """Return how many tiles are in flight: as many as fit a block's shared memory, at every rank and dtype.

    227 KB on Hopper, 163 on an A100, 99 on GPUs for desktops.
    """
    if device.type != "cuda":
        return 3
    memory = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return 3 if memory >= 200 << 10 else 2 if memory >= 128 << 10 else 1


@cache
def _launcher(
    kernel: Any, rank: int, wide_first: bool, quads: bool, block_m: int, num_stages: int
) -> Launcher:
    constants = {
        "WIDE_FIRST": wide_first, "QUADS": quads, "BLOCK_M": block_m, "BLOCK_W": _block_w(rank), "R": rank,
    }  # fmt: skip
    num_warps = 8 if rank > 64 or block_m > 64 else 4
    return Launcher(kernel, constants, num_warps=num_warps, num_stages=num_stages)


def _kernel_for(kernel: Any, mean: Tensor, wide_first: bool, block_m: int) -> Launcher:
    """Return ``kernel`` for θ, or for a gradient of its shape."""
    shape = mean.shape
    rank = padded_rank(shape[1 if wide_first else 0])
    return _launcher(kernel, rank, wide_first, shape[1] % 4 == 0, block_m, _num_stages(mean.device))


@cache
def _sample_launcher() -> Launcher:
    return Launcher(_sample_factors_kernel, {"BLOCK": _SAMPLE_BLOCK}, num_warps=4)


def perturbed_down(
    x: Tensor, mean: Tensor, std: Tensor, noise: Noise, scale: float, *, wide_first: bool
) -> Tensor:
    """Return ``h_g = scale · x_g A_gᵀ`` of every group: one launch, or two where rows are few.

    Args:
        x: ``(M, W)``, fp32, bf16 or fp16, rows contiguous; G equal groups of rows, M ≥ 1.
        mean: ``(r, W)``, or ``(W, r)`` where ``wide_first``; contiguous, fp32, bf16 or fp16.
        std: ``mean``'s shape, contiguous.
        noise: which sample each group takes.
        scale: factor of the result.
        wide_first: backward's ``dh_g = scale · dy_g B_g`` passes B ``(N, r)`` with True.

    Returns:
        ``(M, r)``, contiguous, ``x``'s dtype.
    """
    (m, width), groups = x.shape, noise.seeds.numel()
    rank = mean.shape[1 if wide_first else 0]
    rows = m // groups
    block_m = _block_m(rows, rank)
    block_w = _block_w(padded_rank(rank))
    blocks = groups * cdiv(rows, block_m)
    steps = cdiv(width, block_w)
    splits = max(1, min(steps, _PROGRAMS // blocks))
    split_steps = cdiv(steps, splits)
    splits = cdiv(steps, split_steps)
    out = x.new_empty(m, rank)
    parts = out if splits == 1 else x.new_empty(splits * m * rank, dtype=torch.float32)
    _kernel_for(_perturbed_down_kernel, mean, wide_first, block_m)(
        (blocks, splits), parts, x, mean, std, noise.seeds, noise.draws, noise.stream, scale, rows, width,
        rank, x.stride(0), split_steps * block_w, m * rank,
    )  # fmt: skip
    if splits > 1:
        sum_parts(out, parts, splits)
    return out


def perturbed_up_(
    out: Tensor, hidden: Tensor, mean: Tensor, std: Tensor, noise: Noise, *, wide_first: bool
) -> Tensor:
    """Add ``h_g B_gᵀ`` to every group of ``out`` in place and return it: one launch.

    Args:
        out: ``(M, W)``, rows contiguous; accumulated in fp32, rounded once.
        hidden: ``(M, r)``, contiguous, ``out``'s dtype.
        mean: ``(W, r)`` where ``wide_first``, else ``(r, W)``: backward's ``dx_g += dh_g A_g`` passes A so.
        std: ``mean``'s shape, contiguous.
        noise: which sample each group takes.
        wide_first: the orientation of ``mean``.
    """
    (m, width), groups = out.shape, noise.seeds.numel()
    rows = m // groups
    block_m = _block_m(rows, hidden.shape[1])
    columns = cdiv(width, _block_w(padded_rank(hidden.shape[1])))
    blocks = cdiv(rows, block_m)
    ranges = max(1, min(blocks, _PROGRAMS // (columns * groups)))
    in_range = cdiv(blocks, ranges) * block_m
    _kernel_for(_perturbed_up_kernel, mean, wide_first, block_m)(
        (groups * cdiv(rows, in_range), columns), out, hidden, mean, std, noise.seeds, noise.draws,
        noise.stream, rows, in_range, width, hidden.shape[1], out.stride(0),
    )  # fmt: skip
    return out


def perturbed_grads(wide: Tensor, thin: Tensor, noise: Noise, *, wide_first: bool) -> tuple[Tensor, Tensor]:
    """Return ``Σ_g dθ_g`` and ``Σ_g dθ_g ⊙ z_g``, the gradients of mean and std: two launches.

    Args:
        wide: ``(M, W)``, rows contiguous: dy for B, x for A.
        thin: ``(M, r)``, contiguous, ``wide``'s dtype: h for B, dh for A.
        noise: which sample each group takes.
        wide_first: whether θ is ``(W, r)`` (B) or ``(r, W)`` (A).

    Returns:
        Two fp32 tensors of θ's shape.
    """
    (m, width), (_, rank), groups = wide.shape, thin.shape, noise.seeds.numel()
    out = wide.new_empty(2, *((width, rank) if wide_first else (rank, width)), dtype=torch.float32)
    rows = m // groups
    block_m = _block_m(rows, rank, most=64)
    columns = cdiv(width, _block_w(padded_rank(rank)))
    in_range = cdiv(groups, max(1, min(groups, _PROGRAMS // columns)))
    ranges = cdiv(groups, in_range)
    numel = width * rank
    parts = out if ranges == 1 else wide.new_empty(2, ranges, numel, dtype=torch.float32)
    _kernel_for(_perturbed_grads_kernel, out[0], wide_first, block_m)(
        (columns, ranges), parts[0], parts[1], wide, thin, noise.seeds, noise.draws, noise.stream, groups,
        in_range, rows, width, rank, wide.stride(0),
    )  # fmt: skip
    if ranges > 1:
        for i in (0, 1):
            sum_parts(out[i], parts[i], ranges)
    return out[0], out[1]


def sample_factors(
    mean: Tensor, std: Tensor, seeds: Tensor, draws: Tensor, stream: int, dtype: torch.dtype
) -> Tensor:
    """Write ``mean + std ⊙ z`` of each group, rounded once; arguments as for the twin's. One launch."""
    mean, std = mean.contiguous(), std.contiguous()
    out = mean.new_empty(seeds.numel(), *mean.shape, dtype=dtype)
    if out.numel():
        grid = (cdiv(mean.numel(), _SAMPLE_BLOCK), seeds.numel())
        _sample_launcher()(grid, out, mean, std, seeds, draws, stream, mean.numel())
    return out
