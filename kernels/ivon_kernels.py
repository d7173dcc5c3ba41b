"""The kernels of IVON, one a launch: sample, fold, check and step. ``ivon.py`` launches them.

Equations, papers and layout: see ``ivon.py``. ``ivon_device.py`` holds what they do to one tile; here is
what a launch does with its tiles, and with the counters in ``control``. The tables ``rows`` and
``tile_tensor``, of a :class:`~bayeslora.kernels.param_bucket.ParamBucket`, say where the tensors are.
"""

import triton
import triton.language as tl

from bayeslora.kernels.ivon_device import (
    ARRIVED,
    BETA1,
    DONE,
    DRAWS,
    DTYPE_CODE,
    ESS,
    HYPER_WIDTH,
    NONFINITE,
    PARAM_PTR,
    SKIPPED,
    STEP,
    STREAM,
    VARIANCE_SCALE,
    WEIGHT_DECAY,
    curvature,
    flag_nonfinite,
    hyper,
    load_as,
    load_grad,
    locate,
    round_as,
    store_as,
    update_tile,
)
from bayeslora.kernels.noise import randn_block


@triton.jit(do_not_specialize=["seed", "draw"])
def ivon_sample_kernel(
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
    REGULAR: tl.constexpr,
):
    """Write the sample (or, without PERTURB, the mean) into one tile's parameters."""
    tile = tl.program_id(0)
    draw = draw.to(tl.int64)
    if TRAIN:
        draw += tl.load(control_ptr + DRAWS)
    _, row_ptr, index, flat, mask, group_start = locate(rows_ptr, tile_tensor_ptr, tile, BLOCK, REGULAR)
    address = tl.load(row_ptr + PARAM_PTR)
    code = tl.load(row_ptr + DTYPE_CODE)
    mean = tl.load(mean_ptr + flat, mask=mask, other=0.0)
    if ADOPT:
        held = load_as(address, code, index, mask, DTYPE, REGULAR)
        changed = round_as(mean, code, DTYPE) != held
        mean = tl.where(changed, held, mean)
        tl.store(mean_ptr + flat, mean, mask=mask & changed)
    if PERTURB:
        hess = tl.load(hess_ptr + flat, mask=mask, other=1.0)
        decay = hyper(hyper_ptr, row_ptr, WEIGHT_DECAY).to(DTYPE)
        ess = hyper(hyper_ptr, row_ptr, ESS).to(DTYPE)
        variance_scale = hyper(hyper_ptr, row_ptr, VARIANCE_SCALE).to(DTYPE)
        std = tl.sqrt(variance_scale) * tl.rsqrt(ess * (hess + decay))
        z = randn_block(seed, draw, tl.load(row_ptr + STREAM), group_start, BLOCK).to(DTYPE)
        mean += std * z
    store_as(address, code, index, mean, mask, REGULAR)


@triton.jit(do_not_specialize=["seed", "draw", "count"])
def ivon_fold_kernel(
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
    REGULAR: tl.constexpr,
):
    """Take one tile's gradient, and its curvature, into the running means over samples."""
    tile = tl.program_id(0)
    tensor, row_ptr, index, flat, mask, group_start = locate(rows_ptr, tile_tensor_ptr, tile, BLOCK, REGULAR)
    grad = load_grad(grads_ptr, avg_grad_ptr, tensor, index, flat, mask, DTYPE, False, REGULAR)
    hess = tl.load(hess_ptr + flat, mask=mask, other=1.0)
    decay = hyper(hyper_ptr, row_ptr, WEIGHT_DECAY).to(DTYPE)
    ess = hyper(hyper_ptr, row_ptr, ESS).to(DTYPE)
    stream = tl.load(row_ptr + STREAM)
    draw = draw.to(tl.int64) + tl.load(control_ptr + DRAWS)
    f = curvature(grad, hess, decay, ess, seed, draw, stream, group_start, BLOCK, DTYPE, PRICE)
    avg_grad = tl.load(avg_grad_ptr + flat, mask=mask, other=0.0)
    avg_curvature = tl.load(avg_curvature_ptr + flat, mask=mask, other=0.0)
    avg_grad = tl.where(count == 1, 0.0, avg_grad)  # what an earlier step left there may be NaN
    avg_curvature = tl.where(count == 1, 0.0, avg_curvature)
    count = count.to(DTYPE)
    tl.store(avg_grad_ptr + flat, avg_grad + (grad - avg_grad) / count, mask=mask)
    tl.store(avg_curvature_ptr + flat, avg_curvature + (f - avg_curvature) / count, mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def ivon_check_kernel(
    rows_ptr,  # int64 [tensors, ROW_WIDTH]
    tile_tensor_ptr,  # int32 [tiles]
    num_tiles,
    grads_ptr,  # int64 [tensors, GRAD_WIDTH]: address, dtype code, active
    avg_grad_ptr,  # DTYPE [size]
    control_ptr,  # int64 [CONTROL_WIDTH]
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
    REGULAR: tl.constexpr,
):
    """Raise the flag ``control[NONFINITE]`` if a gradient is not finite."""
    flag_nonfinite(
        rows_ptr,
        tile_tensor_ptr,
        num_tiles,
        grads_ptr,
        avg_grad_ptr,
        control_ptr,
        BLOCK,
        DTYPE,
        AVERAGED,
        REGULAR,
    )


@triton.jit(do_not_specialize=["seed", "draw", "draws", "num_tiles", "num_groups"])
def ivon_step_kernel(
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
    REGULAR: tl.constexpr,
):
    """Check all gradients (if CHECK), then update every tile or none, and advance the counters."""
    if CHECK:
        flag_nonfinite(
            rows_ptr,
            tile_tensor_ptr,
            num_tiles,
            grads_ptr,
            avg_grad_ptr,
            control_ptr,
            BLOCK,
            DTYPE,
            AVERAGED,
            REGULAR,
        )
        # Every program is resident (a cooperative launch), so all of them can wait for the last.
        tl.debug_barrier()
        tl.atomic_add(control_ptr + ARRIVED, 1, sem="acq_rel")
        while tl.atomic_add(control_ptr + ARRIVED, 0, sem="acquire") < tl.num_programs(0):
            pass
        tl.debug_barrier()
    skip = tl.atomic_add(control_ptr + NONFINITE, 0, sem="acquire")
    if FOUND_INF:
        skip += (tl.load(found_inf_ptr) != 0).to(tl.int64)
    draw = draw.to(tl.int64) + tl.load(control_ptr + DRAWS)
    inverse_scale = tl.full([], 1.0, DTYPE)
    if SCALED:
        inverse_scale = 1.0 / tl.load(grad_scale_ptr).to(DTYPE)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        update_tile(
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
            REGULAR,
        )
    tl.debug_barrier()
    if tl.atomic_add(control_ptr + DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        # The last program out: nobody reads the counters any more.
        if skip == 0:
            tl.store(control_ptr + STEP, tl.load(control_ptr + STEP) + 1)
            for group in range(num_groups):
                beta1 = tl.load(hyper_ptr + group * HYPER_WIDTH + BETA1)
                tl.store(beta1_power_ptr + group, tl.load(beta1_power_ptr + group) * beta1)
        else:
            tl.store(control_ptr + SKIPPED, tl.load(control_ptr + SKIPPED) + 1)
        tl.store(control_ptr + DRAWS, tl.load(control_ptr + DRAWS) + draws)
        tl.store(control_ptr + NONFINITE, 0)
        tl.store(control_ptr + ARRIVED, 0)
        tl.store(control_ptr + DONE, 0)
