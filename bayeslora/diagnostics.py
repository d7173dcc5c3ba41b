"""What an IVON run looks like from inside: variance, signal-to-noise, clipped steps, loss at a sample.

Everything is computed from the state when it is asked for, with one wait for the device; between two such
calls training pays nothing. ``bayeslora.DiagnosticsCallback`` logs it through HF Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .ivon_state import STATE_KEYS
from .metrics import _BAR, _GAP, _GUIDE, _require, _tidy
from .posterior import find_ivon

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .ivon import IVON

__all__ = ["diagnose", "loss_gap", "plot"]

QUANTILES = (0.05, 0.5, 0.95)
_MOST = 1 << 20  # elements that quantiles are taken of: an even subset of a larger state


class _Part(NamedTuple):
    """One parameter's state, flat, and its group."""

    name: str
    mean: Tensor
    momentum: Tensor
    hess: Tensor
    group: dict[str, Any]
    beta1_power: Tensor | float


@torch.no_grad()
def diagnose(optimizer: Any, model: nn.Module | None = None) -> dict[str, float]:
    """Return the state of an IVON run as plain numbers.

    With σ² = 1/(λ (h + δ)) of each element: ``ivon/variance_mean``, ``ivon/variance_q05`` (and ``q50``,
    ``q95``), ``ivon/snr`` and ``ivon/snr/<parameter>``, the mean of |m|/σ; ``ivon/clipped``, the fraction of
    elements whose last update was clipped; ``ivon/ess``.

    The fraction of clipped updates is that of |M/(1-β1^t) + δ m| >= clip_radius (h + δ), from the state as
    the last step left it. That is the step's own test, but for m, which has moved by that step: an element
    counts wrongly only if δ times its step decides.

    Args:
        optimizer: a :class:`bayeslora.IVON`, also one wrapped by accelerate, after at least one step. With
            FSDP2 this rank's shards are measured.
        model: its ``named_parameters`` name the parameters; without it they are numbered.

    Raises:
        TypeError: the optimizer is not IVON.
        ValueError: it has taken no step yet.
    """
    parts = list(_parts(find_ivon(optimizer), model))
    if not parts:
        raise ValueError("the optimizer has no state yet: call diagnose after a step")
    device = parts[0].mean.device
    variances, snr_sums, clipped, counts = [], [], [], [part.mean.numel() for part in parts]
    for part in parts:
        group = part.group
        precision = float(group["ess"]) * (part.hess + group["weight_decay"])
        variances.append((1.0 / precision).to(device))
        snr_sums.append((part.mean.abs() * precision.sqrt()).sum().to(device))
        clipped.append(_clipped(part).sum().to(device))
    variance = torch.cat([v.float() for v in variances])
    quantiles = variance[:: -(-variance.numel() // _MOST)].quantile(
        torch.tensor(QUANTILES, device=device, dtype=variance.dtype)
    )
    mean_variance = sum(v.double().sum() for v in variances) / sum(counts)
    packed = torch.cat(
        [
            torch.stack([torch.as_tensor(mean_variance), *quantiles.double()]),
            torch.stack(snr_sums).double(),
            torch.stack(clipped).double(),
        ]
    ).tolist()
    found = {"ivon/variance_mean": packed[0]}
    for quantile, value in zip(QUANTILES, packed[1:4], strict=True):
        found[f"ivon/variance_q{round(100 * quantile):02d}"] = value
    snr, cut = packed[4 : 4 + len(parts)], packed[4 + len(parts) :]
    found["ivon/snr"] = sum(snr) / sum(counts)
    found["ivon/clipped"] = sum(cut) / sum(counts)
    found["ivon/ess"] = float(parts[0].group["ess"])
    for part, value, count in zip(parts, snr, counts, strict=True):
        found[f"ivon/snr/{part.name}"] = value / count
    return found


def _clipped(part: _Part) -> Tensor:
    decay = part.group["weight_decay"]
    update = part.momentum / (1.0 - part.beta1_power) + decay * part.mean
    # The step divides and clips; a relative slack of fp32 keeps rounding from hiding an update at the edge.
    return update.abs() >= part.group["clip_radius"] * (part.hess + decay) * (1.0 - 1e-6)


def _parts(opt: IVON, model: nn.Module | None) -> Iterator[_Part]:
    names = {} if model is None else {id(p): _short(name) for name, p in model.named_parameters()}
    powers = {}
    for bucket in opt._store.within_step():
        for p, index in zip(bucket.owners, bucket.param_groups, strict=True):
            powers[id(p)] = bucket.beta1_power[index] if opt.debias else 0.0
    number = -1
    for group in opt.param_groups:
        for p in group["params"]:
            number += 1
            state = opt.state.get(p)
            if state and group.get("perturb", True) and id(p) in powers:
                mean, momentum, hess = (_local(state[k]).flatten() for k in STATE_KEYS)
                name = names.get(id(p), str(number))
                yield _Part(name, mean, momentum, hess, group, powers[id(p)])


def _local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _short(name: str) -> str:
    """Leave out of a PEFT parameter's name what all of them share."""
    name = name.removeprefix("base_model.model.").removesuffix(".weight")
    return name.removesuffix(".default")


@torch.no_grad()
def loss_gap(
    optimizer: Any,
    loss: Callable[[], Tensor],
    *,
    seeds: Sequence[int] = (0,),
) -> dict[str, float]:
    """Return the loss at the mean and at posterior samples, on the same batch.

    The training run is left as it was: the samples are evaluation samples.

    Args:
        optimizer: a :class:`bayeslora.IVON`, also one wrapped by accelerate.
        loss: computes a scalar loss of the model as its parameters are.
        seeds: the samples; their losses are averaged.

    Returns:
        ``ivon/loss_at_mean``, ``ivon/loss_at_sample`` and ``ivon/loss_gap``, their difference.

    Raises:
        TypeError: the optimizer is not IVON.
        ValueError: ``seeds`` is empty.
    """
    if not seeds:
        raise ValueError("seeds is empty: pass at least one")
    opt = find_ivon(optimizer)
    with opt.sampled_params(seed=0, variance_scale=0.0):
        at_mean = loss().double()
    at_sample = torch.zeros_like(at_mean)
    for seed in seeds:
        with opt.sampled_params(seed=seed):
            at_sample += loss().double() / len(seeds)
    mean, sample = torch.stack([at_mean, at_sample]).tolist()
    return {"ivon/loss_at_mean": mean, "ivon/loss_at_sample": sample, "ivon/loss_gap": sample - mean}


def plot(
    history: Sequence[Mapping[str, Any]],
    path: str | PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw variance, signal-to-noise, clipped updates and losses along training.

    Args:
        history: dicts with ``"step"`` and what :func:`diagnose` and :func:`loss_gap` return, as in
            ``trainer.state.log_history``; others are left out.
        path: image file to write; its suffix picks the format.
        title: line above the panels.

    Returns:
        The matplotlib figure, not attached to any display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install "bayeslora[demo]"``).
        ValueError: no entry comes from :func:`diagnose`.
    """
    rows = [row for row in history if "ivon/variance_mean" in row]
    if not rows:
        raise ValueError("history has no entries of diagnose(): train with bayeslora.DiagnosticsCallback")
    figure = _require("matplotlib.figure").Figure(
        figsize=(13.5, 3.2), layout="constrained", facecolor="white"
    )
    variance, snr, clipped, losses = figure.subplots(1, 4)
    steps = [row["step"] for row in rows]
    low, middle, high = ([row[f"ivon/variance_q{round(100 * q):02d}"] for row in rows] for q in QUANTILES)
    variance.fill_between(steps, low, high, color=_BAR, alpha=0.2, linewidth=0, label="5% to 95%")
    variance.plot(steps, middle, color=_BAR, label="median")
    variance.plot(steps, [row["ivon/variance_mean"] for row in rows], "--", color=_GAP, label="mean")
    variance.set(title="variance", yscale="log")
    for key in rows[-1]:
        if key.startswith("ivon/snr/"):
            snr.plot(
                steps, [row.get(key, float("nan")) for row in rows], color=_GUIDE, linewidth=0.5, alpha=0.6
            )
    snr.plot(steps, [row["ivon/snr"] for row in rows], color=_BAR, linewidth=2, label="all")
    snr.set(title="signal to noise, each parameter")
    clipped.plot(steps, [row["ivon/clipped"] for row in rows], color=_BAR, label="clipped")
    clipped.set(title="fraction of updates clipped", ylim=(0, 1))
    with_losses = [row for row in rows if "ivon/loss_at_mean" in row]
    for key, color in (("loss_at_mean", _BAR), ("loss_at_sample", _GAP)):
        values = [row[f"ivon/{key}"] for row in with_losses]
        losses.plot([row["step"] for row in with_losses], values, color=color, label=key.replace("_", " "))
    losses.set(title="loss")
    for axis in (variance, snr, clipped, losses):
        axis.set_xlabel("step")
        axis.legend(fontsize=8, frameon=False)
        _tidy(axis)
    if title:
        figure.suptitle(title)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
