"""IVON in plain torch: the specification of the kernels behind ``ivon.py``, and the path of CPUs.

Equations, paper and layout: see ``ivon.py``. Every function has the signature of the Triton function of
the same name and does the same to a :class:`~bayeslora.kernels.param_bucket.ParamBucket`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslora.kernels import noise_twin
from bayeslora.kernels.param_bucket import (
    BETA1,
    BETA2,
    CLIP_RADIUS,
    DRAWS,
    ESS,
    LR,
    NONFINITE,
    SKIPPED,
    STEP,
    VARIANCE_SCALE,
    WEIGHT_DECAY,
    ParamBucket,
)

_CHUNK = 1 << 14  # noise groups drawn at once: keeps the integer temporaries in the cache


def _noise(bucket: ParamBucket, seed: int, draw: int) -> Tensor:
    """Return the noise of every flat position, ``[bucket.size]``, in the state's dtype.

    The last draw is kept: on a CPU its memory is cheap, and the step needs the sample's noise again.
    """
    if bucket.twin_noise is not None and bucket.twin_noise[:2] == (seed, draw):
        return bucket.twin_noise[2]
    group, stream = bucket.noise_counters
    out = torch.empty(bucket.size, dtype=bucket.dtype, device=bucket.device)
    for i in range(0, group.numel(), _CHUNK):
        normals = noise_twin.randn4x(seed, draw, stream[i : i + _CHUNK], group[i : i + _CHUNK])
        out[4 * i : 4 * (i + _CHUNK)] = torch.stack(normals, dim=-1).view(-1)
    bucket.twin_noise = seed, draw, out
    return out


def _train_draw(bucket: ParamBucket, draw: int) -> int:
    return int(bucket.control[DRAWS]) + draw


def _spans(bucket: ParamBucket, active: Sequence[bool]) -> list[tuple[int, slice]]:
    """Return (parameter group, flat range) of each run of active tensors that share a group."""
    spans: list[tuple[int, slice]] = []
    ends = [*bucket.starts[1:], bucket.size]
    for i, start in enumerate(bucket.starts):
        if not active[i]:
            continue
        group = bucket.param_groups[i]
        if spans and spans[-1][0] == group and spans[-1][1].stop == start:
            spans[-1] = group, slice(spans[-1][1].start, ends[i])
        else:
            spans.append((group, slice(start, ends[i])))
    return spans


def _all_spans(bucket: ParamBucket) -> list[tuple[int, slice]]:
    return _spans(bucket, [True] * len(bucket.params))


def _scatter(bucket: ParamBucket, flat: Tensor, active: Sequence[bool]) -> None:
    for i, param in enumerate(bucket.params):
        if active[i]:
            param.copy_(bucket.view(flat, i))


def _gather(bucket: ParamBucket, tensors: Sequence[Tensor | None]) -> Tensor:
    flat = torch.zeros(bucket.size, dtype=bucket.dtype, device=bucket.device)
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            bucket.view(flat, i).copy_(tensor)
    return flat


def _adopt(bucket: ParamBucket) -> None:
    for i, param in enumerate(bucket.params):
        mean = bucket.view(bucket.mean, i)
        changed = mean.to(param.dtype) != param
        mean.copy_(torch.where(changed, param.to(bucket.dtype), mean))


@torch.no_grad()
def ivon_sample(
    bucket: ParamBucket, *, seed: int, draw: int, train: bool = False, adopt: bool = True
) -> None:
    """Write a posterior sample into the parameters. See :func:`bayeslora.kernels.ivon.ivon_sample`."""
    if adopt:
        _adopt(bucket)
    noise = _noise(bucket, seed, _train_draw(bucket, draw) if train else draw)
    sample = torch.empty_like(noise)
    hyper = bucket.hyper_values()
    for group, span in _all_spans(bucket):
        values = hyper[group]
        precision = (bucket.hess[span] + values[WEIGHT_DECAY]).mul_(values[ESS])
        std = precision.reciprocal_().mul_(values[VARIANCE_SCALE]).sqrt_()
        torch.addcmul(bucket.mean[span], noise[span], std, out=sample[span])
    _scatter(bucket, sample, [True] * len(bucket.params))


@torch.no_grad()
def ivon_restore(bucket: ParamBucket) -> None:
    """Write the mean into the parameters. See :func:`bayeslora.kernels.ivon.ivon_restore`."""
    _scatter(bucket, bucket.mean, [True] * len(bucket.params))


def _curvature(
    bucket: ParamBucket, grad: Tensor, span: slice, values: list[float], noise: Tensor | None
) -> Tensor:
    if noise is None:
        return grad.square().mul_(values[ESS])
    scale = (bucket.hess[span] + values[WEIGHT_DECAY]).mul_(values[ESS]).sqrt_()
    return scale.mul_(noise[span]).mul_(grad)


@torch.no_grad()
def ivon_fold(
    bucket: ParamBucket, grads: Sequence[Tensor | None], *, seed: int, draw: int, count: int, price: bool
) -> None:
    """Fold a sample's gradient into the running means. See :func:`bayeslora.kernels.ivon.ivon_fold`."""
    avg_grad, avg_curvature = bucket.averages()
    if count == 1:  # what an earlier step left there may be NaN
        avg_grad.zero_()
        avg_curvature.zero_()
    flat = _gather(bucket, grads)
    noise = _noise(bucket, seed, _train_draw(bucket, draw)) if price else None
    hyper = bucket.hyper_values()
    for group, span in _all_spans(bucket):
        curvature = _curvature(bucket, flat[span], span, hyper[group], noise)
        avg_grad[span].lerp_(flat[span], 1.0 / count)
        avg_curvature[span].lerp_(curvature, 1.0 / count)


@torch.no_grad()
def ivon_check(bucket: ParamBucket, grads: Sequence[Tensor | None] | None) -> None:
    """Raise the bucket's non-finite flag. See :func:`bayeslora.kernels.ivon.ivon_check`."""
    tensors = [bucket.averages()[0]] if grads is None else [g for g in grads if g is not None]
    for tensor in tensors:
        bad = ~torch.isfinite(tensor).all()
        bucket.control[NONFINITE].clamp_(min=bad.to(torch.int64))


@torch.no_grad()
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
    """Update state and parameters. See :func:`bayeslora.kernels.ivon.ivon_step`."""
    if check:
        ivon_check(bucket, grads)
    skip = bool(bucket.control[NONFINITE]) or (found_inf is not None and bool(found_inf))
    bucket.control[NONFINITE] = 0
    bucket.control[SKIPPED if skip else STEP] += 1
    if active is None:
        active = [True] * len(bucket.params) if grads is None else [g is not None for g in grads]
    if not skip:
        _update(bucket, grads, active, seed, draw, price, debias, grad_scale)
    bucket.control[DRAWS] += draws
    _scatter(bucket, bucket.mean, [True] * len(bucket.params))


def _update(
    bucket: ParamBucket,
    grads: Sequence[Tensor | None] | None,
    active: Sequence[bool],
    seed: int,
    draw: int,
    price: bool,
    debias: bool,
    grad_scale: Tensor | None,
) -> None:
    inverse_scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    hyper = bucket.hyper_values()
    for group, values in enumerate(hyper):
        bucket.beta1_power[group] *= values[BETA1]
    bias = (1.0 - bucket.beta1_power).tolist() if debias else [1.0] * len(hyper)
    if grads is None:
        avg_grad, avg_curvature = bucket.averages()
        flat = avg_grad * inverse_scale
        curvature_scale = inverse_scale if price else inverse_scale**2
    else:
        flat = _gather(bucket, grads).mul_(inverse_scale)
        noise = _noise(bucket, seed, _train_draw(bucket, draw)) if price else None
    for group, span in _spans(bucket, active):
        if grads is None:
            curvature = avg_curvature[span] * curvature_scale
        else:
            curvature = _curvature(bucket, flat[span], span, hyper[group], noise)
        _update_span(bucket, span, flat[span], curvature, hyper[group], bias[group])


def _update_span(
    bucket: ParamBucket, span: slice, grad: Tensor, curvature: Tensor, values: list[float], bias: float
) -> None:
    if bucket.momentum is None:
        raise RuntimeError("a bucket without momentum cannot be stepped")
    mean, momentum, hess = bucket.mean[span], bucket.momentum[span], bucket.hess[span]
    beta2, decay = values[BETA2], values[WEIGHT_DECAY]
    momentum.mul_(values[BETA1]).add_(grad, alpha=1.0 - values[BETA1])
    correction = (hess - curvature).square_().div_(hess + decay).mul_(0.5 * (1.0 - beta2) ** 2)
    new_hess = correction.add_(curvature, alpha=1.0 - beta2).add_(hess, alpha=beta2)
    hess.copy_(torch.where(torch.isfinite(new_hess), new_hess, hess))
    direction = (momentum / bias).add_(mean, alpha=decay).div_(hess + decay)
    mean.sub_(direction.clamp_(-values[CLIP_RADIUS], values[CLIP_RADIUS]), alpha=values[LR])
