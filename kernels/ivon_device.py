"""Device functions of the kernels in ``ivon_kernels.py``: addresses, mixed-dtype loads, one tile's update."""

import triton
import triton.language as tl

from bayeslora.kernels import param_bucket as pb
from bayeslora.kernels.noise import randn_block

ROW_WIDTH = tl.constexpr(pb.ROW_WIDTH)
PARAM_PTR, START, NUMEL = tl.constexpr(pb.PARAM_PTR), tl.constexpr(pb.START), tl.constexpr(pb.NUMEL)
GROUP_START, STREAM = tl.constexpr(pb.GROUP_START), tl.constexpr(pb.STREAM)
PARAM_GROUP, DTYPE_CODE = tl.constexpr(pb.PARAM_GROUP), tl.constexpr(pb.DTYPE)
FIRST_TILE = tl.constexpr(pb.FIRST_TILE)
HYPER_WIDTH = tl.constexpr(pb.HYPER_WIDTH)
LR, BETA1, BETA2 = tl.constexpr(pb.LR), tl.constexpr(pb.BETA1), tl.constexpr(pb.BETA2)
WEIGHT_DECAY, ESS = tl.constexpr(pb.WEIGHT_DECAY), tl.constexpr(pb.ESS)
CLIP_RADIUS, VARIANCE_SCALE = tl.constexpr(pb.CLIP_RADIUS), tl.constexpr(pb.VARIANCE_SCALE)
GRAD_WIDTH = tl.constexpr(pb.GRAD_WIDTH)
STEP, SKIPPED, DRAWS = tl.constexpr(pb.STEP), tl.constexpr(pb.SKIPPED), tl.constexpr(pb.DRAWS)
NONFINITE, ARRIVED = tl.constexpr(pb.NONFINITE), tl.constexpr(pb.ARRIVED)
DONE = tl.constexpr(pb.DONE)


@triton.jit
def typed_pointer(address, DTYPE: tl.constexpr, REGULAR: tl.constexpr):
    """Return an address as a pointer; REGULAR promises that it is a multiple of 16 bytes."""
    ptr = address.to(tl.pointer_type(DTYPE))
    if REGULAR:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_as(address, dtype_code, index, mask, DTYPE: tl.constexpr, REGULAR: tl.constexpr):
    """Load elements of a tensor known by address and dtype code (see DTYPE_CODES), cast to DTYPE."""
    if dtype_code == 0:
        value = tl.load(typed_pointer(address, tl.float32, REGULAR) + index, mask=mask, other=0.0).to(DTYPE)
    elif dtype_code == 1:
        value = tl.load(typed_pointer(address, tl.bfloat16, REGULAR) + index, mask=mask, other=0.0).to(DTYPE)
    elif dtype_code == 2:
        value = tl.load(typed_pointer(address, tl.float16, REGULAR) + index, mask=mask, other=0.0).to(DTYPE)
    else:
        value = tl.load(typed_pointer(address, tl.float64, REGULAR) + index, mask=mask, other=0.0).to(DTYPE)
    return value


@triton.jit
def store_as(address, dtype_code, index, value, mask, REGULAR: tl.constexpr):
    """Store elements to a tensor known by address and dtype code, cast to its dtype."""
    if dtype_code == 0:
        tl.store(typed_pointer(address, tl.float32, REGULAR) + index, value.to(tl.float32), mask=mask)
    elif dtype_code == 1:
        tl.store(typed_pointer(address, tl.bfloat16, REGULAR) + index, value.to(tl.bfloat16), mask=mask)
    elif dtype_code == 2:
        tl.store(typed_pointer(address, tl.float16, REGULAR) + index, value.to(tl.float16), mask=mask)
    else:
        tl.store(typed_pointer(address, tl.float64, REGULAR) + index, value.to(tl.float64), mask=mask)


@triton.jit
def round_as(value, dtype_code, DTYPE: tl.constexpr):
    """Round to the dtype of a code and back to DTYPE."""
    if dtype_code == 0:
        rounded = value.to(tl.float32).to(DTYPE)
    elif dtype_code == 1:
        rounded = value.to(tl.bfloat16).to(DTYPE)
    elif dtype_code == 2:
        rounded = value.to(tl.float16).to(DTYPE)
    else:
        rounded = value
    return rounded


@triton.jit
def locate(rows_ptr, tile_tensor_ptr, tile, BLOCK: tl.constexpr, REGULAR: tl.constexpr):
    """Return (tensor, row pointer, element index, flat position, mask, first noise group) of a tile.

    REGULAR promises what ``ParamBucket.regular`` says, so that loads are 16 bytes wide.
    """
    tensor = tl.load(tile_tensor_ptr + tile).to(tl.int64)
    row_ptr = rows_ptr + tensor * ROW_WIDTH
    within = (tile - tl.load(row_ptr + FIRST_TILE)) * BLOCK
    start = tl.load(row_ptr + START)
    numel = tl.load(row_ptr + NUMEL)
    if REGULAR:
        start = tl.multiple_of(start, 8)
        numel = tl.multiple_of(numel, 8)
        index = within + tl.arange(0, BLOCK)
        mask = index < numel
    else:
        index = within - start % 4 + tl.arange(0, BLOCK)  # a shard may begin inside a group of four
        mask = (index >= 0) & (index < numel)
    group_start = tl.load(row_ptr + GROUP_START) + within // 4
    return tensor, row_ptr, index, start + index, mask, group_start


@triton.jit
def hyper(hyper_ptr, row_ptr, column: tl.constexpr):
    """Return one hyperparameter, fp64, of a tensor's parameter group."""
    return tl.load(hyper_ptr + tl.load(row_ptr + PARAM_GROUP) * HYPER_WIDTH + column)


@triton.jit
def curvature(
    grad,
    hess,
    decay,
    ess,
    seed,
    draw,
    stream,
    group_start,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRICE: tl.constexpr,
):
    """Return the curvature estimate f of a tile: Price's theorem, or squared gradients."""
    if PRICE:
        z = randn_block(seed, draw, stream, group_start, BLOCK).to(DTYPE)
        f = grad * z * tl.sqrt(ess * (hess + decay))
    else:
        f = ess * grad * grad
    return f


@triton.jit
def load_grad(
    grads_ptr,
    avg_grad_ptr,
    tensor,
    index,
    flat,
    mask,
    DTYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
    REGULAR: tl.constexpr,
):
    """Return a tile's gradient, or its running mean over samples; zero where the tensor has none."""
    if AVERAGED:
        grad = tl.load(avg_grad_ptr + flat, mask=mask, other=0.0)
    else:
        address = tl.load(grads_ptr + tensor * GRAD_WIDTH)
        code = tl.load(grads_ptr + tensor * GRAD_WIDTH + 1)
        grad = tl.zeros_like(index).to(DTYPE)
        if address != 0:
            grad = load_as(address, code, index, mask, DTYPE, REGULAR)
    return grad


@triton.jit
def flag_nonfinite(
    rows_ptr,
    tile_tensor_ptr,
    num_tiles,
    grads_ptr,
    avg_grad_ptr,
    control_ptr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
    REGULAR: tl.constexpr,
):
    """Raise the flag ``control[NONFINITE]`` if this program's tiles hold a gradient that is not finite."""
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tensor, _, index, flat, mask, _ = locate(rows_ptr, tile_tensor_ptr, tile, BLOCK, REGULAR)
        grad = load_grad(grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE, AVERAGED, REGULAR)
        bad |= (~(tl.abs(grad) < float("inf"))).to(tl.int32)
    if tl.max(bad, axis=0) != 0:
        tl.atomic_max(control_ptr + NONFINITE, 1)


@triton.jit
def update_tile(
    tile,
    inverse_scale,
    skip,
    rows_ptr,
    tile_tensor_ptr,
    grads_ptr,
    mean_ptr,
    momentum_ptr,
    hess_ptr,
    avg_grad_ptr,
    avg_curvature_ptr,
    hyper_ptr,
    beta1_power_ptr,
    seed,
    draw,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRICE: tl.constexpr,
    AVERAGED: tl.constexpr,
    DEBIAS: tl.constexpr,
    REGULAR: tl.constexpr,
):
    """Update one tile's state and parameters, or only put the mean back where ``skip`` or no gradient."""
    tensor, row_ptr, index, flat, mask, group_start = locate(rows_ptr, tile_tensor_ptr, tile, BLOCK, REGULAR)
    mean = tl.load(mean_ptr + flat, mask=mask, other=0.0)
    if (skip == 0) & (tl.load(grads_ptr + tensor * GRAD_WIDTH + 2) != 0):
        beta1, beta2 = hyper(hyper_ptr, row_ptr, BETA1), hyper(hyper_ptr, row_ptr, BETA2)
        decay = hyper(hyper_ptr, row_ptr, WEIGHT_DECAY).to(DTYPE)
        ess = hyper(hyper_ptr, row_ptr, ESS).to(DTYPE)
        grad = load_grad(grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE, AVERAGED, REGULAR)
        grad *= inverse_scale
        hess = tl.load(hess_ptr + flat, mask=mask, other=1.0)
        if AVERAGED:
            f = tl.load(avg_curvature_ptr + flat, mask=mask, other=0.0) * inverse_scale
            if not PRICE:
                f *= inverse_scale
        else:
            stream = tl.load(row_ptr + STREAM)
            f = curvature(grad, hess, decay, ess, seed, draw, stream, group_start, BLOCK, DTYPE, PRICE)
        momentum = tl.load(momentum_ptr + flat, mask=mask, other=0.0)
        momentum = beta1.to(DTYPE) * momentum + (1.0 - beta1).to(DTYPE) * grad
        gap = hess - f
        half_square = (0.5 * (1.0 - beta2) * (1.0 - beta2)).to(DTYPE)
        new_hess = beta2.to(DTYPE) * hess + (1.0 - beta2).to(DTYPE) * f
        new_hess += half_square * (gap * gap) / (hess + decay)
        hess = tl.where(tl.abs(new_hess) < float("inf"), new_hess, hess)
        debiased = momentum
        if DEBIAS:
            power = tl.load(beta1_power_ptr + tl.load(row_ptr + PARAM_GROUP)) * beta1
            debiased = momentum / (1.0 - power).to(DTYPE)
        clip_radius = hyper(hyper_ptr, row_ptr, CLIP_RADIUS).to(DTYPE)
        direction = (debiased + decay * mean) / (hess + decay)
        direction = tl.minimum(tl.maximum(direction, -clip_radius), clip_radius)
        mean -= hyper(hyper_ptr, row_ptr, LR).to(DTYPE) * direction
        tl.store(momentum_ptr + flat, momentum, mask=mask)
        tl.store(hess_ptr + flat, hess, mask=mask)
        tl.store(mean_ptr + flat, mean, mask=mask)
    store_as(tl.load(row_ptr + PARAM_PTR), tl.load(row_ptr + DTYPE_CODE), index, mean, mask, REGULAR)
