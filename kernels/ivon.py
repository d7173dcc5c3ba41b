"""IVON, the Improved Variational Online Newton optimizer, as two Triton launches a step.

With λ = ess, δ = weight_decay, z ~ N(0, I) by the noise contract of ``noise.py``::

    σ  = 1 / sqrt(λ (h + δ));   θ = m + σ z                                   sample
    f  = g z sqrt(λ (h + δ))   (price)      or      f = λ g²   (gradsq)       curvature estimate
    M' = β1 M + (1-β1) g
    h' = β2 h + (1-β2) f + (1-β2)²/2 · (h - f)² / (h + δ)
    m' = m - lr · clip((M'/(1-β1^t) + δ m) / (h' + δ), ±clip_radius)

Papers: Shen et al., "Variational learning is effective for large deep networks" (ICML 2024, Algorithm 1);
Cong et al., "Variational low-rank adaptation using IVON" (2024).

Layout: one launch covers every tensor of a :class:`ParamBucket` (flat fp32 state, parameters and
gradients of any floating dtype through a pointer table). A program handles tiles of ``BLOCK`` flat
positions. Bytes a parameter, bf16 weights: the sample reads m, h, w and writes w (12); the step reads
g, M, h, m and writes M, h, m, w (28), and the check for non-finite gradients reads g once more (2 to 4).

``ivon_twin.py`` states the same in plain torch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayeslora.kernels import param_bucket as pb
from bayeslora.kernels.noise import randn_block
from bayeslora.kernels.param_bucket import BLOCK, ParamBucket

_NUM_WARPS = 4
_BLOCKS_PER_SM = 2  # 128 threads of at most 255 registers: two blocks always fit one multiprocessor

_ROW_WIDTH = tl.constexpr(pb.ROW_WIDTH)
_PARAM_PTR, _START, _NUMEL = tl.constexpr(pb.PARAM_PTR), tl.constexpr(pb.START), tl.constexpr(pb.NUMEL)
_GROUP_START, _STREAM = tl.constexpr(pb.GROUP_START), tl.constexpr(pb.STREAM)
_PARAM_GROUP, _DTYPE = tl.constexpr(pb.PARAM_GROUP), tl.constexpr(pb.DTYPE)
_FIRST_TILE = tl.constexpr(pb.FIRST_TILE)
_HYPER_WIDTH = tl.constexpr(pb.HYPER_WIDTH)
_LR, _BETA1, _BETA2 = tl.constexpr(pb.LR), tl.constexpr(pb.BETA1), tl.constexpr(pb.BETA2)
_WEIGHT_DECAY, _ESS = tl.constexpr(pb.WEIGHT_DECAY), tl.constexpr(pb.ESS)
_CLIP_RADIUS, _VARIANCE_SCALE = tl.constexpr(pb.CLIP_RADIUS), tl.constexpr(pb.VARIANCE_SCALE)
_GRAD_WIDTH = tl.constexpr(pb.GRAD_WIDTH)
_STEP, _SKIPPED, _DRAWS = tl.constexpr(pb.STEP), tl.constexpr(pb.SKIPPED), tl.constexpr(pb.DRAWS)
_NONFINITE, _ARRIVED = tl.constexpr(pb.NONFINITE), tl.constexpr(pb.ARRIVED)
_DONE = tl.constexpr(pb.DONE)


@triton.jit
def _load_as(address, dtype_code, index, mask, DTYPE: tl.constexpr):
    """Load elements of a tensor known by address and dtype code (see DTYPE_CODES), cast to DTYPE."""
    if dtype_code == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0).to(DTYPE)
    elif dtype_code == 1:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + index, mask=mask, other=0.0).to(DTYPE)
    elif dtype_code == 2:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0).to(DTYPE)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float64)) + index, mask=mask, other=0.0).to(DTYPE)
    return value


@triton.jit
def _store_as(address, dtype_code, index, value, mask):
    """Store elements to a tensor known by address and dtype code, cast to its dtype."""
    if dtype_code == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + index, value.to(tl.float32), mask=mask)
    elif dtype_code == 1:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + index, value.to(tl.bfloat16), mask=mask)
    elif dtype_code == 2:
        tl.store(address.to(tl.pointer_type(tl.float16)) + index, value.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float64)) + index, value.to(tl.float64), mask=mask)


@triton.jit
def _round_as(value, dtype_code, DTYPE: tl.constexpr):
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
def _locate(rows_ptr, tile_tensor_ptr, tile, BLOCK: tl.constexpr):
    """Return (tensor, row pointer, element index, mask, first noise group) of a tile."""
    tensor = tl.load(tile_tensor_ptr + tile).to(tl.int64)
    row_ptr = rows_ptr + tensor * _ROW_WIDTH
    within = (tile - tl.load(row_ptr + _FIRST_TILE)) * BLOCK
    shift = tl.load(row_ptr + _START) % 4  # a shard may begin inside a group of four
    index = within - shift + tl.arange(0, BLOCK)
    mask = (index >= 0) & (index < tl.load(row_ptr + _NUMEL))
    group_start = tl.load(row_ptr + _GROUP_START) + within // 4
    return tensor, row_ptr, index, mask, group_start


@triton.jit
def _hyper(hyper_ptr, row_ptr, column: tl.constexpr):
    return tl.load(hyper_ptr + tl.load(row_ptr + _PARAM_GROUP) * _HYPER_WIDTH + column)


@triton.jit(do_not_specialize=["seed", "draw"])
def _ivon_sample_kernel(
    rows_ptr,  # int64 [tensors, ROW_WIDTH]
    tile_tensor_ptr,  # int32 [tiles]
    mean_ptr,  # DTYPE [size]
    hess_ptr,  # DTYPE [size]
    hyper_ptr,  # fp64 [groups, HYPER_WIDTH]
    control_ptr,  # int64 [CONTROL_WIDTH]
    seed,
    draw,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    ADOPT: tl.constexpr,
    PERTURB: tl.constexpr,
    TRAIN: tl.constexpr,
):
    tile = tl.program_id(0)
    draw = draw.to(tl.int64)
    if TRAIN:
        draw += tl.load(control_ptr + _DRAWS)
    _, row_ptr, index, mask, group_start = _locate(rows_ptr, tile_tensor_ptr, tile, BLOCK)
    address = tl.load(row_ptr + _PARAM_PTR)
    code = tl.load(row_ptr + _DTYPE)
    flat = tl.load(row_ptr + _START) + index
    mean = tl.load(mean_ptr + flat, mask=mask, other=0.0)
    if ADOPT:
        held = _load_as(address, code, index, mask, DTYPE)
        changed = _round_as(mean, code, DTYPE) != held
        mean = tl.where(changed, held, mean)
        tl.store(mean_ptr + flat, mean, mask=mask & changed)
    if PERTURB:
        hess = tl.load(hess_ptr + flat, mask=mask, other=1.0)
        decay = _hyper(hyper_ptr, row_ptr, _WEIGHT_DECAY).to(DTYPE)
        ess = _hyper(hyper_ptr, row_ptr, _ESS).to(DTYPE)
        variance_scale = _hyper(hyper_ptr, row_ptr, _VARIANCE_SCALE).to(DTYPE)
        variance = variance_scale / (ess * (hess + decay))
        z = randn_block(seed, draw, tl.load(row_ptr + _STREAM), group_start, BLOCK).to(DTYPE)
        mean += tl.sqrt(variance) * z
    _store_as(address, code, index, mean, mask)


@triton.jit
def _curvature(
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
    if PRICE:
        z = randn_block(seed, draw, stream, group_start, BLOCK).to(DTYPE)
        f = grad * z * tl.sqrt(ess * (hess + decay))
    else:
        f = ess * grad * grad
    return f


@triton.jit(do_not_specialize=["seed", "draw", "count"])
def _ivon_fold_kernel(
    rows_ptr,  # int64 [tensors, ROW_WIDTH]
    tile_tensor_ptr,  # int32 [tiles]
    grads_ptr,  # int64 [tensors, GRAD_WIDTH]: address, dtype code, active
    hess_ptr,  # DTYPE [size]
    avg_grad_ptr,  # DTYPE [size]
    avg_curvature_ptr,  # DTYPE [size]
    hyper_ptr,  # fp64 [groups, HYPER_WIDTH]
    control_ptr,  # int64 [CONTROL_WIDTH]
    seed,
    draw,
    count,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRICE: tl.constexpr,
):
    tile = tl.program_id(0)
    tensor, row_ptr, index, mask, group_start = _locate(rows_ptr, tile_tensor_ptr, tile, BLOCK)
    flat = tl.load(row_ptr + _START) + index
    grad = _load_grad(grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE, False)
    hess = tl.load(hess_ptr + flat, mask=mask, other=1.0)
    decay = _hyper(hyper_ptr, row_ptr, _WEIGHT_DECAY).to(DTYPE)
    ess = _hyper(hyper_ptr, row_ptr, _ESS).to(DTYPE)
    stream = tl.load(row_ptr + _STREAM)
    draw = draw.to(tl.int64) + tl.load(control_ptr + _DRAWS)
    f = _curvature(grad, hess, decay, ess, seed, draw, stream, group_start, BLOCK, DTYPE, PRICE)
    avg_grad = tl.load(avg_grad_ptr + flat, mask=mask, other=0.0)
    avg_curvature = tl.load(avg_curvature_ptr + flat, mask=mask, other=0.0)
    count = count.to(DTYPE)
    tl.store(avg_grad_ptr + flat, avg_grad + (grad - avg_grad) / count, mask=mask)
    tl.store(avg_curvature_ptr + flat, avg_curvature + (f - avg_curvature) / count, mask=mask)


@triton.jit
def _load_grad(
    grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE: tl.constexpr, AVERAGED: tl.constexpr
):
    if AVERAGED:
        grad = tl.load(avg_grad_ptr + flat, mask=mask, other=0.0)
    else:
        address = tl.load(grads_ptr + tensor * _GRAD_WIDTH)
        code = tl.load(grads_ptr + tensor * _GRAD_WIDTH + 1)
        grad = tl.zeros_like(index).to(DTYPE)
        if address != 0:
            grad = _load_as(address, code, index, mask, DTYPE)
    return grad


@triton.jit
def _flag_nonfinite(
    rows_ptr,
    tile_tensor_ptr,
    num_tiles,
    grads_ptr,
    avg_grad_ptr,
    control_ptr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    """Raise the flag ``control[NONFINITE]`` if this program's tiles hold a gradient that is not finite."""
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tensor, row_ptr, index, mask, _ = _locate(rows_ptr, tile_tensor_ptr, tile, BLOCK)
        flat = tl.load(row_ptr + _START) + index
        grad = _load_grad(grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE, AVERAGED)
        bad |= (~(tl.abs(grad) < float("inf"))).to(tl.int32)
    if tl.max(bad, axis=0) != 0:
        tl.atomic_max(control_ptr + _NONFINITE, 1)


@triton.jit(do_not_specialize=["num_tiles"])
def _ivon_check_kernel(
    rows_ptr,  # int64 [tensors, ROW_WIDTH]
    tile_tensor_ptr,  # int32 [tiles]
    num_tiles,
    grads_ptr,  # int64 [tensors, GRAD_WIDTH]: address, dtype code, active
    avg_grad_ptr,  # DTYPE [size]
    control_ptr,  # int64 [CONTROL_WIDTH]
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    _flag_nonfinite(
        rows_ptr, tile_tensor_ptr, num_tiles, grads_ptr, avg_grad_ptr, control_ptr, BLOCK, DTYPE, AVERAGED
    )


@triton.jit
def _update_tile(
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
):
    """Update one tile's state and parameters, or only put the mean back where ``skip`` or no gradient."""
    tensor, row_ptr, index, mask, group_start = _locate(rows_ptr, tile_tensor_ptr, tile, BLOCK)
    flat = tl.load(row_ptr + _START) + index
    mean = tl.load(mean_ptr + flat, mask=mask, other=0.0)
    if (skip == 0) & (tl.load(grads_ptr + tensor * _GRAD_WIDTH + 2) != 0):
        beta1, beta2 = _hyper(hyper_ptr, row_ptr, _BETA1), _hyper(hyper_ptr, row_ptr, _BETA2)
        decay = _hyper(hyper_ptr, row_ptr, _WEIGHT_DECAY).to(DTYPE)
        ess = _hyper(hyper_ptr, row_ptr, _ESS).to(DTYPE)
        grad = _load_grad(grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE, AVERAGED) * inverse_scale
        hess = tl.load(hess_ptr + flat, mask=mask, other=1.0)
        if AVERAGED:
            f = tl.load(avg_curvature_ptr + flat, mask=mask, other=0.0) * inverse_scale
            if not PRICE:
                f *= inverse_scale
        else:
            stream = tl.load(row_ptr + _STREAM)
            f = _curvature(grad, hess, decay, ess, seed, draw, stream, group_start, BLOCK, DTYPE, PRICE)
        momentum = tl.load(momentum_ptr + flat, mask=mask, other=0.0)
        momentum = beta1.to(DTYPE) * momentum + (1.0 - beta1).to(DTYPE) * grad
        gap = hess - f
        half_square = (0.5 * (1.0 - beta2) * (1.0 - beta2)).to(DTYPE)
        new_hess = beta2.to(DTYPE) * hess + (1.0 - beta2).to(DTYPE) * f
        new_hess += half_square * (gap * gap) / (hess + decay)
        hess = tl.where(tl.abs(new_hess) < float("inf"), new_hess, hess)
        debiased = momentum
        if DEBIAS:
            power = tl.load(beta1_power_ptr + tl.load(row_ptr + _PARAM_GROUP)) * beta1
            debiased = momentum / (1.0 - power).to(DTYPE)
        clip_radius = _hyper(hyper_ptr, row_ptr, _CLIP_RADIUS).to(DTYPE)
        direction = (debiased + decay * mean) / (hess + decay)
        direction = tl.minimum(tl.maximum(direction, -clip_radius), clip_radius)
        mean -= _hyper(hyper_ptr, row_ptr, _LR).to(DTYPE) * direction
        tl.store(momentum_ptr + flat, momentum, mask=mask)
        tl.store(hess_ptr + flat, hess, mask=mask)
        tl.store(mean_ptr + flat, mean, mask=mask)
    _store_as(tl.load(row_ptr + _PARAM_PTR), tl.load(row_ptr + _DTYPE), index, mean, mask)


@triton.jit(do_not_specialize=["seed", "draw", "draws", "num_tiles", "num_groups"])
def _ivon_step_kernel(
    rows_ptr,  # int64 [tensors, ROW_WIDTH]
    tile_tensor_ptr,  # int32 [tiles]
    num_tiles,
    grads_ptr,  # int64 [tensors, GRAD_WIDTH]: address, dtype code, active
    mean_ptr,  # DTYPE [size]
    momentum_ptr,  # DTYPE [size]
    hess_ptr,  # DTYPE [size]
    avg_grad_ptr,  # DTYPE [size], read if AVERAGED
    avg_curvature_ptr,  # DTYPE [size], read if AVERAGED
    hyper_ptr,  # fp64 [groups, HYPER_WIDTH]
    beta1_power_ptr,  # fp64 [groups]: β1^(steps taken)
    num_groups,
    control_ptr,  # int64 [CONTROL_WIDTH]
    grad_scale_ptr,  # fp32 [1], read if SCALED
    found_inf_ptr,  # fp32 [1], read if FOUND_INF
    seed,
    draw,
    draws,  # training samples of this step
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRICE: tl.constexpr,
    AVERAGED: tl.constexpr,
    DEBIAS: tl.constexpr,
    CHECK: tl.constexpr,
    SCALED: tl.constexpr,
    FOUND_INF: tl.constexpr,
):
    if CHECK:
        _flag_nonfinite(
            rows_ptr, tile_tensor_ptr, num_tiles, grads_ptr, avg_grad_ptr, control_ptr, BLOCK, DTYPE, AVERAGED
        )
        # Every program is resident (a cooperative launch), so all of them can wait for the last.
        tl.debug_barrier()
        tl.atomic_add(control_ptr + _ARRIVED, 1, sem="acq_rel")
        while tl.atomic_add(control_ptr + _ARRIVED, 0, sem="acquire") < tl.num_programs(0):
            pass
        tl.debug_barrier()
    skip = tl.atomic_add(control_ptr + _NONFINITE, 0, sem="acquire")
    if FOUND_INF:
        skip += (tl.load(found_inf_ptr) != 0).to(tl.int64)
    draw = draw.to(tl.int64) + tl.load(control_ptr + _DRAWS)
    inverse_scale = tl.full([], 1.0, DTYPE)
    if SCALED:
        inverse_scale = 1.0 / tl.load(grad_scale_ptr).to(DTYPE)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        _update_tile(
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
            BLOCK,
            DTYPE,
            PRICE,
            AVERAGED,
            DEBIAS,
        )
    tl.debug_barrier()
    if tl.atomic_add(control_ptr + _DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        # The last program out: nobody reads the counters any more.
        if skip == 0:
            tl.store(control_ptr + _STEP, tl.load(control_ptr + _STEP) + 1)
            for group in range(num_groups):
                beta1 = tl.load(hyper_ptr + group * _HYPER_WIDTH + _BETA1)
                tl.store(beta1_power_ptr + group, tl.load(beta1_power_ptr + group) * beta1)
        else:
            tl.store(control_ptr + _SKIPPED, tl.load(control_ptr + _SKIPPED) + 1)
        tl.store(control_ptr + _DRAWS, tl.load(control_ptr + _DRAWS) + draws)
        tl.store(control_ptr + _NONFINITE, 0)
        tl.store(control_ptr + _ARRIVED, 0)
        tl.store(control_ptr + _DONE, 0)


def _triton_dtype(bucket: ParamBucket) -> tl.dtype:
    return tl.float64 if bucket.dtype == torch.float64 else tl.float32


def _signed64(seed: int) -> int:
    """Return the int64 with the same 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _on_device(bucket: ParamBucket) -> AbstractContextManager[object]:
    return torch.cuda.device(bucket.device) if bucket.device.type == "cuda" else nullcontext()


def _resident_programs(bucket: ParamBucket, num_tiles: int) -> int:
    """Return a grid that is resident as a whole (the interpreter runs one program after the other)."""
    if bucket.device.type != "cuda":
        return 1
    multiprocessors = torch.cuda.get_device_properties(bucket.device).multi_processor_count
    return min(num_tiles, _BLOCKS_PER_SM * multiprocessors)


def ivon_sample(
    bucket: ParamBucket, *, seed: int, draw: int, train: bool = False, adopt: bool = True
) -> None:
    """Write the posterior sample ``m + sqrt(variance_scale) · σ z`` into the parameters, in one launch.

    Args:
        bucket: the tensors. ``bucket.set_hyper`` must have been called.
        seed: 64-bit key of the noise.
        draw: index of the sample; with ``train``, its number within the current step (1, 2, ...), to
            which the device adds the draws of the steps before.
        train: see ``draw``.
        adopt: the parameters hold the mean now; where one does not equal the stored mean (somebody
            loaded weights), the stored mean takes its value.
    """
    _launch_sample(bucket, seed, draw, train=train, adopt=adopt, perturb=True)


def ivon_restore(bucket: ParamBucket) -> None:
    """Write the mean into the parameters, in one launch."""
    _launch_sample(bucket, 0, 0, train=False, adopt=False, perturb=False)


def _launch_sample(
    bucket: ParamBucket, seed: int, draw: int, *, train: bool, adopt: bool, perturb: bool
) -> None:
    rows, tile_tensor = bucket.tiles
    if tile_tensor.numel() == 0:
        return
    if adopt:
        bucket.stage_in()
    with _on_device(bucket):
        _ivon_sample_kernel[(tile_tensor.numel(),)](
            rows,
            tile_tensor,
            bucket.mean,
            bucket.hess,
            bucket.hyper,
            bucket.control,
            _signed64(seed),
            draw,
            BLOCK=BLOCK,
            DTYPE=_triton_dtype(bucket),
            ADOPT=adopt,
            PERTURB=perturb,
            TRAIN=train,
            num_warps=_NUM_WARPS,
        )
    bucket.stage_out()


def ivon_fold(
    bucket: ParamBucket, grads: Sequence[Tensor | None], *, seed: int, draw: int, count: int, price: bool
) -> None:
    """Fold the gradient of one Monte Carlo sample into the running means of gradient and curvature.

    Args:
        bucket: the tensors.
        grads: a gradient of each tensor, or None (counted as zero).
        seed: 64-bit key of the sample's noise.
        draw: number of the sample within the current step.
        count: how many samples the means hold with this one; 1 starts them.
        price: the curvature estimate, Price's theorem (True) or squared gradients (False).
    """
    rows, tile_tensor = bucket.tiles
    if tile_tensor.numel() == 0:
        return
    avg_grad, avg_curvature = bucket.averages()
    with _on_device(bucket):
        _ivon_fold_kernel[(tile_tensor.numel(),)](
            rows,
            tile_tensor,
            bucket.grad_rows(_dense(grads), [g is not None for g in grads]),
            bucket.hess,
            avg_grad,
            avg_curvature,
            bucket.hyper,
            bucket.control,
            _signed64(seed),
            draw,
            count,
            BLOCK=BLOCK,
            DTYPE=_triton_dtype(bucket),
            PRICE=price,
            num_warps=_NUM_WARPS,
        )


def ivon_check(bucket: ParamBucket, grads: Sequence[Tensor | None] | None) -> None:
    """Raise the flag ``bucket.control[NONFINITE]`` if a gradient holds a NaN or an infinity, in one launch.

    Args:
        bucket: the tensors.
        grads: a gradient of each tensor or None; None altogether for the running means.
    """
    rows, tile_tensor = bucket.tiles
    if tile_tensor.numel() == 0:
        return
    averaged = grads is None
    dense = [None] * len(bucket.params) if grads is None else _dense(grads)
    with _on_device(bucket):
        _ivon_check_kernel[(_resident_programs(bucket, tile_tensor.numel()),)](
            rows,
            tile_tensor,
            tile_tensor.numel(),
            bucket.grad_rows(dense, [g is not None for g in dense]),
            bucket.averages()[0] if averaged else bucket.mean,
            bucket.control,
            BLOCK=BLOCK,
            DTYPE=_triton_dtype(bucket),
            AVERAGED=averaged,
            num_warps=_NUM_WARPS,
        )


def ivon_step(
    bucket: ParamBucket,
    grads: Sequence[Tensor | None] | None,
    active: Sequence[bool],
    *,
    seed: int,
    draw: int,
    draws: int,
    price: bool,
    debias: bool,
    check: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update mean, momentum and Hessian and leave the mean in the parameters, in one launch.

    The launch is cooperative: it first checks all gradients (if ``check``), waits for all programs, and
    then updates everything or nothing. The counters of ``bucket.control`` and ``beta1_power`` advance on
    the device.

    Args:
        bucket: the tensors.
        grads: a gradient of each tensor or None; None altogether to step from the running means that
            :func:`ivon_fold` made.
        active: whether each tensor takes part; the others keep state and mean.
        seed: 64-bit key of the sample at which the gradients were taken.
        draw: number of that sample within the step.
        draws: samples drawn in the step; the device's count advances by it.
        price: the curvature estimate, Price's theorem (True) or squared gradients (False).
        debias: divide the momentum by ``1 - β1^t``.
        check: skip the whole step if a gradient is not finite. Without it, a flag that
            :func:`ivon_check` raised is obeyed all the same.
        grad_scale: fp32 scalar tensor by which the gradients are to be divided (AMP).
        found_inf: fp32 scalar tensor; the step is skipped where it is not zero (AMP).
    """
    rows, tile_tensor = bucket.tiles
    if tile_tensor.numel() == 0:
        return
    averaged = grads is None
    dense = [None] * len(bucket.params) if grads is None else _dense(grads)
    avg_grad, avg_curvature = bucket.averages() if averaged else (bucket.mean, bucket.mean)
    with _on_device(bucket):
        _ivon_step_kernel[(_resident_programs(bucket, tile_tensor.numel()),)](
            rows,
            tile_tensor,
            tile_tensor.numel(),
            bucket.grad_rows(dense, active),
            bucket.mean,
            bucket.momentum,
            bucket.hess,
            avg_grad,
            avg_curvature,
            bucket.hyper,
            bucket.beta1_power,
            bucket.beta1_power.numel(),
            bucket.control,
            bucket.mean if grad_scale is None else grad_scale,
            bucket.mean if found_inf is None else found_inf,
            _signed64(seed),
            draw,
            draws,
            BLOCK=BLOCK,
            DTYPE=_triton_dtype(bucket),
            PRICE=price,
            AVERAGED=averaged,
            DEBIAS=debias,
            CHECK=check,
            SCALED=grad_scale is not None,
            FOUND_INF=found_inf is not None,
            num_warps=_NUM_WARPS,
            **({"launch_cooperative_grid": True} if check and bucket.device.type == "cuda" else {}),
        )
    bucket.stage_out()


def _dense(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [g if g is None or g.is_contiguous() else g.contiguous() for g in grads]
