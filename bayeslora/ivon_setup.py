r"""IVON's hyperparameters from AdamW's learning rate and the first gradients: :meth:`IVON.like_adamw`.

AdamW needs a learning rate; IVON also needs ``ess``, ``hess_init`` and ``clip_radius``, which the papers
search for. Here they follow from what those searches agree on (the recipes of Cong et al. 2024 and 2025).
With σ the posterior's standard deviation, P = 1/σ² = λ (h + δ) its precision, s the root mean square of the
trained weights, g² the mean squared gradient and c the mean curvature E[g z/σ] over the first steps::

    P   = (snr / s)²                                  the signal-to-noise ratio s/σ is ``snr``; known at once
    h0  = c + ½ (1-β2) λ g²                           the mean of h does not move: E[h'] = h
    λ   = max(num_data, 2P / (b + sqrt(b² + 2 (1-β2) g² P))),   b = c + δ         both: λ (h0 + δ) = P
    ξ   = clip_ratio · g / h0                         a gradient of clip_ratio · g takes the largest step
    lr' = step_ratio · lr / ξ                         step_ratio · lr is the largest step

The second line sets the mean of IVON's update of h to zero, (1-β2)(c - h) + ½ (1-β2)² E[(f - h)²]/(h + δ)
with E[(f - h)²] ≈ g² P: the noise of the estimate f holds h up where the curvature alone would not.

**Step.** Most elements take the largest step, with the sign of their gradients' running mean; AdamW's take
m/√v of its learning rate. In noise of unit variance and with β1 = 0.9 that has a root mean square of
√((1-β1)/(1+β1)) = 0.23, and moves a weight by √t in t steps; the signs, which stay for longer, by
√(1 + (4/π) Σ_k arcsin β1^k) = 3.6 times as much. Where gradients agree both move by lr. ``step_ratio`` lies
between the two, 1/3.6 and 1.

**Loss under sampling.** E[L(m + σz)] - L(m) = ½ Σ c σ² to second order, and g z/σ estimates c without a
second forward pass. Where ½ Σ g σz, less twice its standard error, exceeds ``max_gap``, λ is raised in
proportion. That is watched in the first ``setup_steps`` steps, and again for four steps whenever the number
of steps has doubled; watched steps wait for the device once and are not part of a CUDA graph.

Everything decided, and the sums it is decided from, lies in ``param_groups`` as plain numbers, so a
checkpoint resumes exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bayeslora.ivon_distributed import whole
from bayeslora.ivon_state import ties_of
from bayeslora.kernels.param_bucket import ParamBucket

if TYPE_CHECKING:
    from bayeslora.ivon import IVON

_logger = logging.getLogger("bayeslora")

_WINDOW = 4  # watched steps each time the number of steps has doubled
_FIRST_CLIP = 1.0  # until the first gradient has been seen; no update is made with it
_TAKEN = ("ess", "hess_init", "clip_radius", "rescale_lr")

Group = dict[str, Any]


class Choice(NamedTuple):
    """What the equations of this module give."""

    ess: float
    hess_init: float
    clip_radius: float


def choose(
    precision: float,
    grad_sq: float,
    curvature: float,
    *,
    num_data: float,
    beta2: float,
    weight_decay: float,
    clip_ratio: float,
) -> Choice:
    """Solve for ``ess``, ``hess_init`` and ``clip_radius``; see the module's equations.

    Args:
        precision: P = 1/σ² that is wanted.
        grad_sq: mean squared gradient, > 0.
        curvature: mean curvature; a negative one counts as zero.
        num_data: least ``ess``.
        beta2: momentum of the Hessian.
        weight_decay: δ.
        clip_ratio: gradient that takes the largest step, as a fraction of the root mean square.
    """
    curvature = max(curvature, 0.0)
    noise = 0.5 * (1.0 - beta2) * grad_sq
    b = curvature + weight_decay
    root = b + math.sqrt(b * b + 4.0 * noise * precision)
    ess = max(num_data, 2.0 * precision / root) if root > 0.0 else num_data
    hess_init = curvature + noise * ess
    if hess_init <= 0.0:  # beta2 = 1 and no curvature: the precision alone says what h is
        hess_init = max(precision / ess - weight_decay, precision * 1e-6 / ess)
    return Choice(ess, hess_init, clip_ratio * math.sqrt(grad_sq) / hess_init)


def like_adamw(
    cls: type[IVON],
    params: Iterable[Any],
    lr: float | Tensor,
    num_data: int,
    *,
    snr: float,
    clip_ratio: float,
    max_gap: float,
    setup_steps: int,
    step_ratio: float,
    **settings: Any,
) -> IVON:
    """Make the optimizer that :meth:`IVON.like_adamw` documents."""
    positive = {"snr": snr, "clip_ratio": clip_ratio, "max_gap": max_gap, "step_ratio": step_ratio}
    for name, value in positive.items():
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value!r}")
    if not float(num_data) >= 1.0 or math.isinf(num_data):
        raise ValueError(f"num_data must be the number of training examples, >= 1, got {num_data!r}")
    if not (isinstance(setup_steps, int) and setup_steps >= 1):
        raise ValueError(f"setup_steps must be an integer >= 1, got {setup_steps!r}")
    for name in _TAKEN:
        if name in settings:
            raise ValueError(f"like_adamw chooses {name} itself; for one of your own use IVON(...)")
    if settings.get("prior") is not None:
        raise ValueError(
            "like_adamw chooses the first precision, which a prior fixes; use IVON(..., prior=...)"
        )
    if settings.get("hess_approx", "price") != "price":
        raise ValueError(f"like_adamw needs hess_approx='price', got {settings['hess_approx']!r}")
    opt = cls(params, lr, ess=float(num_data), rescale_lr=False, clip_radius=_FIRST_CLIP, **settings)
    for name in Choice._fields:
        if any(group[name] != opt.defaults[name] for group in opt.param_groups):
            raise ValueError(f"like_adamw chooses {name} itself, also for a group; take it out of the groups")
    signal = _signal(opt.param_groups)
    precision = (snr / signal) ** 2
    hess = precision / num_data - float(opt.defaults["weight_decay"])
    chosen = {"hess_init": max(hess, 1e-6 * precision / num_data), "step_lr": float(step_ratio)}
    for group in (opt.defaults, *opt.param_groups):
        group.update(chosen)
    opt.param_groups[0].update(
        setup_steps=setup_steps,
        setup_step=0,
        setup_num_data=float(num_data),
        setup_precision=precision,
        setup_snr=float(snr),
        setup_signal=signal,
        setup_clip_ratio=float(clip_ratio),
        setup_max_gap=float(max_gap),
        **dict.fromkeys(_SUMS, 0.0),
    )
    return opt


_SUMS = ("setup_seen", "setup_grad_sq", "setup_curvature", "setup_gap", "setup_gap_var", "setup_gap_seen")
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_COUNTS = ("setup_steps", "setup_step")
_GIVEN = tuple(
    f"setup_{name}" for name in ("precision", "snr", "signal", "clip_ratio", "max_gap", "num_data")
)


def check_setup(group: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Check what :func:`like_adamw` has left in a saved group, if anything.

    Args:
        group: the saved group.
        head: the first of the saved groups, which has the sums and what was given.

    Raises:
        ValueError: naming what is missing or out of range.
    """
    fields = ("step_lr", *((*_COUNTS, *_GIVEN, *_SUMS) if group is head else ()))
    found = [name for name in fields if name in group]
    for name in fields if len(found) > 1 or "setup_steps" in head else ():
        if name not in group:
            raise ValueError(f"{name!r} of like_adamw is missing")
    for name in found:
        value = group[name]
        fits = isinstance(value, int if name in _COUNTS else (int, float)) and abs(value) <= _MOST
        if name not in ("setup_curvature", "setup_gap"):
            fits = fits and value >= (0.0 if name in _SUMS or name == "setup_step" else _LEAST)
        if not fits:
            raise ValueError(f"{name} is out of range: {value!r}")


def _signal(groups: Sequence[Group]) -> float:
    """Return the root mean square of the perturbed weights, of tensors that are not all zero."""
    squares = count = 0.0
    ties = ties_of(groups)
    every = [(p, group) for group in groups for p in group["params"]]
    for i, (p, group) in enumerate(every):
        if i not in ties and p.requires_grad and group.get("perturb", True):
            square = float(whole(p.detach()).double().square().sum())
            squares += square
            count += p.numel() if square > 0.0 else 0
    if not 0.0 < squares < math.inf:
        raise ValueError(
            "like_adamw takes the posterior's scale from the weights' own, and those given are all zero (or "
            "not finite); pass LoRA's A and B together, or use IVON(...)"
        )
    return math.sqrt(squares / count)


def is_watched(group: Group) -> bool:
    """Return whether the next step's gradients are looked at; ``group`` is the optimizer's first."""
    first = group.get("setup_steps")
    if first is None:
        return False
    step = group["setup_step"]
    if step < first or group["setup_seen"] < first:
        return True
    doublings = int(math.log2(step // first))
    return doublings >= 1 and step - (first << doublings) < _WINDOW


class _Sums(NamedTuple):
    """Sums over the elements of one parameter group, of one step."""

    elements: float
    grad_sq: float
    curvature: float
    gap: float
    gap_var: float


def watch(opt: IVON, buckets: Sequence[ParamBucket], active: set[int], grad_scale: Tensor | None) -> None:
    """Look at the running means of gradient and curvature of this step, and adjust the hyperparameters.

    Args:
        opt: made by :func:`like_adamw`; a sample was drawn, and its gradients are in the running means.
        buckets: the optimizer's.
        active: the streams that had a gradient.
        grad_scale: of a GradScaler: what the gradients are multiplied with.
    """
    groups = opt.param_groups
    scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    table = _device_sums(groups, buckets, active, opt._store.shard_groups).tolist()
    sums = [_Sums(n, g * scale**2, c * scale, d * scale, v * scale**2) for n, g, c, d, v in table]
    head, samples = groups[0], max(opt._samples.drawn, 1)
    total = _Sums(*map(sum, zip(*_perturbed(groups, sums), strict=True)))
    if not all(map(math.isfinite, total)) or total.grad_sq <= 0.0:
        return  # the step is skipped, or there was nothing to see
    if head["setup_seen"] < head["setup_steps"]:
        _set_up(opt, buckets, sums, total)
    else:
        head["setup_gap"] += total.gap
        head["setup_gap_var"] += total.gap_var / samples
        head["setup_gap_seen"] += 1
        if not is_watched({**head, "setup_step": head["setup_step"] + 1}):
            _judge(opt)


def _perturbed(groups: Sequence[Group], sums: Sequence[_Sums]) -> list[_Sums]:
    return [s for group, s in zip(groups, sums, strict=True) if group.get("perturb", True)]


def _device_sums(
    groups: Sequence[Group],
    buckets: Sequence[ParamBucket],
    active: set[int],
    shard_groups: Sequence[dist.ProcessGroup],
) -> Tensor:
    """Return each group's :class:`_Sums`, fp64 ``(groups, 5)``, on the first bucket's device."""
    home = buckets[0].device
    found = torch.zeros(len(groups), len(_Sums._fields), dtype=torch.float64, device=home)
    for bucket in buckets:
        grad, curvature = bucket.averages()
        for i, (stream, index) in enumerate(zip(bucket.streams, bucket.param_groups, strict=True)):
            if stream not in active:
                continue
            g, f, h = (bucket.view(flat, i) for flat in (grad, curvature, bucket.hess))
            group = groups[index]
            variance = 1.0 / (float(group["ess"]) * (h + group["weight_decay"]))
            square = g.square()
            values = (square.sum(), f.sum(), 0.5 * (f * variance).sum(), 0.25 * (square * variance).sum())
            row = torch.stack([v.double() for v in values])
            found[index, 0] += g.numel()
            found[index, 1:] += row.to(home)
    for process_group in shard_groups:
        dist.all_reduce(found, group=process_group)
    return found


def _set_up(opt: IVON, buckets: Sequence[ParamBucket], sums: Sequence[_Sums], total: _Sums) -> None:
    """Choose from all gradients seen so far, and start the Hessian there."""
    groups, head = opt.param_groups, opt.param_groups[0]
    head["setup_seen"] += 1
    head["setup_grad_sq"] += total.grad_sq / total.elements
    head["setup_curvature"] += total.curvature / total.elements
    grad_sq, curvature = (head[name] / head["setup_seen"] for name in ("setup_grad_sq", "setup_curvature"))
    precision = head["setup_precision"]
    gap = 0.5 * total.elements * curvature / precision
    error = 0.5 * math.sqrt(total.elements * grad_sq / precision / head["setup_seen"])
    raised = gap - 2.0 * error > head["setup_max_gap"]
    if raised:
        precision *= gap / head["setup_max_gap"]
    main = next(group for group in groups if group.get("perturb", True))
    choice = choose(
        precision,
        grad_sq,
        curvature,
        num_data=head["setup_num_data"],
        beta2=main["beta2"],
        weight_decay=main["weight_decay"],
        clip_ratio=head["setup_clip_ratio"],
    )
    for group, own in zip(groups, sums, strict=True):
        group.update(choice._asdict())
        if not group.get("perturb", True) and own.grad_sq > 0.0:  # the same clipping at its own gradients
            group["hess_init"] *= math.sqrt(own.grad_sq / own.elements / grad_sq)
    opt.defaults.update(choice._asdict())
    for bucket in buckets:
        for i, index in enumerate(bucket.param_groups):
            bucket.view(bucket.hess, i).fill_(groups[index]["hess_init"])
    if head["setup_seen"] == head["setup_steps"]:
        _report(head, choice, main["weight_decay"], grad_sq, curvature, gap if raised else None)


def _report(
    head: Group, choice: Choice, decay: float, grad_sq: float, curvature: float, gap: float | None
) -> None:
    std = 1.0 / math.sqrt(choice.ess * (choice.hess_init + decay))
    why_ess = f"for |weight|/std {head['setup_snr']:.3g}"
    if choice.ess <= head["setup_num_data"]:
        why_ess = f"num_data; |weight|/std {head['setup_signal'] / std:.3g} is above {head['setup_snr']:.3g}"
    if gap is not None:
        why_ess += f", raised since a sample's loss was {gap:.3g} above the mean's"
    _logger.info(
        "IVON.like_adamw after %d steps: gradients %.3g, weights %.3g (root mean squares), mean curvature "
        "%.3g. ess %.4g (%s); hess_init %.4g (the mean Hessian then stays); clip_radius %.4g (gradient %.3g "
        "takes the largest step, %.3g lr); posterior std %.3g",
        head["setup_steps"],
        math.sqrt(grad_sq),
        head["setup_signal"],
        curvature,
        choice.ess,
        why_ess,
        choice.hess_init,
        choice.clip_radius,
        head["setup_clip_ratio"] * math.sqrt(grad_sq),
        head["step_lr"],
        std,
    )


def take_defaults(opt: IVON) -> None:
    """Let a group that is added later begin with what was chosen, which lies in the groups that are there."""
    groups = opt.param_groups
    if "setup_steps" in groups[0]:
        main = next(group for group in groups if group.get("perturb", True))
        opt.defaults.update({name: main[name] for name in (*Choice._fields, "step_lr")})


def _judge(opt: IVON) -> None:
    """At the end of a watched window: raise λ if the loss under sampling is too far above the mean's."""
    groups, head = opt.param_groups, opt.param_groups[0]
    seen = head["setup_gap_seen"]
    gap, error = head["setup_gap"] / seen, math.sqrt(head["setup_gap_var"]) / seen
    head.update(setup_gap=0.0, setup_gap_var=0.0, setup_gap_seen=0.0)
    if gap - 2.0 * error <= head["setup_max_gap"]:
        return
    factor = gap / head["setup_max_gap"]
    for group in groups:
        group["ess"] *= factor
    take_defaults(opt)
    _logger.warning(
        "IVON.like_adamw at step %d: a sample's loss is about %.3g above the mean's, more than max_gap %.3g: "
        "ess raised to %.4g",
        head["setup_step"] + 1,
        gap,
        head["setup_max_gap"],
        head["ess"],
    )
