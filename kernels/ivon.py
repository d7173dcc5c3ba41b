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

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from bayeslora.kernels.launch import Launcher
from bayeslora.kernels.noise import randn_block
from bayeslora.kernels.param_bucket import BLOCK, DenseGrads, ParamBucket

_NUM_WARPS = 4
_BLOCKS_PER_SM = 8  # resident blocks of the cooperative launch: 8 x 128 threads x 64 registers fill one
_MAX_REGISTERS = 64


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
    REGULAR: tl.constexpr,
):
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
    REGULAR: tl.constexpr,
):
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
    REGULAR: tl.constexpr,
):
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
    REGULAR: tl.constexpr,
):
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


def _triton_dtype(bucket: ParamBucket) -> tl.dtype:
    return tl.float64 if bucket.dtype == torch.float64 else tl.float32


def _signed64(seed: int) -> int:
    """Return the int64 with the same 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


@cache
def _launcher(kernel: Any, dtype: tl.dtype, resident: bool, **flags: bool) -> Launcher:
    """Return the launcher of a kernel for its compile-time choices.

    Args:
        kernel: one of the above.
        dtype: of the state.
        resident: whether the whole grid must be on the GPU at once.
        flags: the kernel's other ``constexpr`` parameters.
    """
    options: dict[str, Any] = {"launch_cooperative_grid": True, "maxnreg": _MAX_REGISTERS} if resident else {}
    return Launcher(kernel, {"BLOCK": BLOCK, "DTYPE": dtype, **flags}, num_warps=_NUM_WARPS, **options)


def _resident_programs(bucket: ParamBucket, num_tiles: int) -> int:
    """Return a grid that is resident as a whole (the interpreter runs one program after the other)."""
    if bucket.device.type != "cuda":
        return 1
    return min(num_tiles, _BLOCKS_PER_SM * bucket.multiprocessors)


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
    if bucket.size == 0:
        return
    if adopt:
        bucket.stage_in()
    name = "sample", seed, draw, train, adopt, perturb
    _, launch = bucket.launches.get(name, (None, None))
    if launch is None:
        rows, tile_tensor = bucket.tiles
        launcher = _launcher(
            _ivon_sample_kernel, _triton_dtype(bucket), False,
            ADOPT=adopt, PERTURB=perturb, TRAIN=train, REGULAR=bucket.regular,
        )  # fmt: skip
        launch = launcher.bind(
            (tile_tensor.numel(),), rows, tile_tensor, bucket.mean, bucket.hess, bucket.hyper, bucket.control,
            _signed64(seed), draw,
        )  # fmt: skip
        if train or not perturb:  # evaluation samples do not come back
            bucket.launches[name] = None, launch
    launch()
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
    if bucket.size == 0:
        return
    rows, tile_tensor = bucket.tiles
    avg_grad, avg_curvature = bucket.averages()
    dense = _dense(grads)
    table, aligned = bucket.grad_rows(dense, None)
    regular = bucket.regular and aligned
    launcher = _launcher(_ivon_fold_kernel, _triton_dtype(bucket), False, PRICE=price, REGULAR=regular)
    launcher(
        (tile_tensor.numel(),), rows, tile_tensor, table, bucket.hess, avg_grad, avg_curvature, bucket.hyper,
        bucket.control, _signed64(seed), draw, count,
    )  # fmt: skip


def ivon_check(bucket: ParamBucket, grads: Sequence[Tensor | None] | None) -> None:
    """Raise the flag ``bucket.control[NONFINITE]`` if a gradient holds a NaN or an infinity, in one launch.

    Args:
        bucket: the tensors.
        grads: a gradient of each tensor or None; None altogether for the running means.
    """
    if bucket.size == 0:
        return
    rows, tile_tensor = bucket.tiles
    averaged = grads is None
    dense = _dense([None] * len(bucket.params) if grads is None else grads)
    table, aligned = bucket.grad_rows(dense, None)
    regular = bucket.regular and aligned
    num_tiles = tile_tensor.numel()
    avg_grad = bucket.averages()[0] if averaged else bucket.mean
    _launcher(_ivon_check_kernel, _triton_dtype(bucket), False, AVERAGED=averaged, REGULAR=regular)(
        (_resident_programs(bucket, num_tiles),),
        rows,
        tile_tensor,
        num_tiles,
        table,
        avg_grad,
        bucket.control,
    )


def ivon_step(
    bucket: ParamBucket,
    grads: Sequence[Tensor | None] | None,
    active: Sequence[bool] | None,
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
        active: whether each tensor takes part (None: those with a gradient); the others keep state and mean.
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
    if bucket.size == 0:
        return
    averaged = grads is None
    dense = _dense([None] * len(bucket.params) if grads is None else grads)
    table, aligned = bucket.grad_rows(dense, active)
    amp = grad_scale is not None, found_inf is not None
    name = "step", seed, draw, draws, price, averaged, debias, check, aligned, *amp
    bound_to, launch = bucket.launches.get(name, (None, None))
    if launch is None or bound_to is not table or any(amp):
        regular = bucket.regular and aligned
        launcher = _launcher(
            _ivon_step_kernel, _triton_dtype(bucket), bucket.device.type == "cuda", PRICE=price,
            AVERAGED=averaged, DEBIAS=debias, CHECK=check, SCALED=amp[0], FOUND_INF=amp[1], REGULAR=regular,
        )  # fmt: skip
        launch = _bind_step(bucket, launcher, table, averaged, grad_scale, found_inf, (seed, draw, draws))
        if not any(amp) and not bucket.recording:
            bucket.launches[name] = table, launch
    launch()
    bucket.stage_out()


def _bind_step(
    bucket: ParamBucket,
    launcher: Launcher,
    table: Tensor,
    averaged: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    numbers: tuple[int, int, int],
) -> Callable[[], None]:
    """Return the step's launch with all its arguments; ``numbers`` are seed, draw and draws."""
    rows, tile_tensor = bucket.tiles
    num_tiles = tile_tensor.numel()
    avg_grad, avg_curvature = bucket.averages() if averaged else (bucket.mean, bucket.mean)
    seed, draw, draws = numbers
    return launcher.bind(
        (_resident_programs(bucket, num_tiles),),
        rows,
        tile_tensor,
        num_tiles,
        table,
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
    )


def _dense(grads: Sequence[Tensor | None]) -> DenseGrads:
    return grads if isinstance(grads, DenseGrads) else DenseGrads(grads)
