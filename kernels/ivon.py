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
import triton.language as tl
from torch import Tensor

from bayeslora.kernels.ivon_kernels import (
    ivon_check_kernel,
    ivon_fold_kernel,
    ivon_sample_kernel,
    ivon_step_kernel,
)
from bayeslora.kernels.launch import Launcher
from bayeslora.kernels.param_bucket import BLOCK, DenseGrads, ParamBucket

_NUM_WARPS = 4
_BLOCKS_PER_SM = 8  # resident blocks of the cooperative launch: 8 x 128 threads x 64 registers fill one
_MAX_REGISTERS = 64


def _triton_dtype(bucket: ParamBucket) -> tl.dtype:
    return tl.float64 if bucket.dtype == torch.float64 else tl.float32


def _signed64(seed: int) -> int:
    """Return the int64 with the same 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


@cache
def _launcher(kernel: Any, dtype: tl.dtype, resident: bool, **flags: bool) -> Launcher:
    """Return the launcher of a kernel for its compile-time choices.

    Args:
        kernel: one of ``ivon_kernels.py``.
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
            ivon_sample_kernel, _triton_dtype(bucket), False,
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
    launcher = _launcher(ivon_fold_kernel, _triton_dtype(bucket), False, PRICE=price, REGULAR=regular)
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
    _launcher(ivon_check_kernel, _triton_dtype(bucket), False, AVERAGED=averaged, REGULAR=regular)(
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
            ivon_step_kernel, _triton_dtype(bucket), bucket.device.type == "cuda", PRICE=price,
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
