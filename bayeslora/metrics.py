"""Accuracy and calibration of class probabilities.

Everything takes ``probs`` of shape ``(N, C)`` (rows that sum to one; a class a question does not have
holds zero) and ``labels`` of shape ``(N,)`` (the index of the right class), and returns fractions in
[0, 1] or nats, never percent. They may lie on any device, in any floating dtype and any integer dtype.
A ``ValueError`` says which of the two does not fit, and how.

torchmetrics computes accuracy and matplotlib draws; both come with
``pip install "bayeslora[demo]"`` and are imported on first use (``ModuleNotFoundError`` without them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ReliabilityBins",
    "accuracy",
    "brier",
    "ece",
    "nll",
    "reliability_bins",
    "reliability_diagram",
    "summary",
]

_INK, _BAR, _GAP, _GUIDE = "#1f2933", "#3b7dd8", "#e4572e", "#7b8794"


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose most probable class is the label, in [0, 1].

    Args:
        probs: ``(N, C)`` class probabilities.
        labels: ``(N,)`` right classes.

    Raises:
        ValueError: ``probs`` are no probabilities, or ``labels`` do not fit them.
    """
    probs, labels = _checked(probs, labels)
    classification = _require("torchmetrics.functional.classification")
    return float(
        classification.multiclass_accuracy(probs, labels, num_classes=probs.shape[1], average="micro")
    )


def ece(probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Return the expected calibration error, in [0, 1].

    ``ECE = Σ_b (n_b / N) |accuracy_b - confidence_b|`` over ``num_bins`` equal bins of the top class's
    probability (Guo et al. 2017, https://arxiv.org/abs/1706.04599), those of :func:`reliability_bins`.

    Args:
        probs: ``(N, C)`` class probabilities.
        labels: ``(N,)`` right classes.
        num_bins: bins that split [0, 1], >= 1.

    Raises:
        ValueError: ``probs`` are no probabilities, ``labels`` do not fit them, or ``num_bins`` is not >= 1.
    """
    return reliability_bins(probs, labels, num_bins).ece  # torchmetrics gives exactly 1 a bin of its own


def nll(probs: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood of the labels, ``-mean log p(label)``, in nats.

    A label given probability zero counts as the smallest normal number of the dtype, so that one
    impossible row does not turn the mean into infinity.

    Args:
        probs: ``(N, C)`` class probabilities.
        labels: ``(N,)`` right classes.

    Raises:
        ValueError: ``probs`` are no probabilities, or ``labels`` do not fit them.
    """
    probs, labels = _checked(probs, labels)
    chosen = probs.gather(1, labels[:, None]).squeeze(1)
    return float(-chosen.clamp_min(torch.finfo(probs.dtype).tiny).log().mean())


def brier(probs: Tensor, labels: Tensor) -> float:
    """Return the Brier score over all classes, ``mean Σ_c (p_c - [c = label])²``, in [0, 2].

    This is Brier's own definition ("Verification of forecasts expressed in terms of probability", 1950);
    for two classes it is twice the score of the positive class alone.

    Args:
        probs: ``(N, C)`` class probabilities.
        labels: ``(N,)`` right classes.

    Raises:
        ValueError: ``probs`` are no probabilities, or ``labels`` do not fit them.
    """
    probs, labels = _checked(probs, labels)
    target = torch.nn.functional.one_hot(labels, probs.shape[1]).to(probs.dtype)
    return float((probs - target).square().sum(dim=1).mean())


def summary(probs: Tensor, labels: Tensor, num_bins: int = 15) -> dict[str, float]:
    """Return ``{"accuracy", "ece", "nll", "brier"}`` of one set of predictions.

    Args:
        probs: ``(N, C)`` class probabilities.
        labels: ``(N,)`` right classes.
        num_bins: of :func:`ece`.

    Raises:
        ValueError: as :func:`ece`.
    """
    return {
        "accuracy": accuracy(probs, labels),
        "ece": ece(probs, labels, num_bins),
        "nll": nll(probs, labels),
        "brier": brier(probs, labels),
    }


@dataclass(frozen=True)
class ReliabilityBins:
    """Predictions grouped by the top class's probability.

    Attributes:
        edges: ``(B + 1,)`` fp64, bin edges from 0 to 1.
        confidence: ``(B,)`` fp64, mean top probability; NaN for an empty bin.
        accuracy: ``(B,)`` fp64, share that was right; NaN for an empty bin.
        count: ``(B,)`` int64, rows in the bin.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def ece(self) -> float:
        """The expected calibration error these bins give, in [0, 1]."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((self.count.double() / self.count.sum() * gap).sum())


def reliability_bins(probs: Tensor, labels: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Group predictions into ``num_bins`` equal bins ``[low, high)`` of confidence; the last holds 1 too.

    Args:
        probs: ``(N, C)`` class probabilities.
        labels: ``(N,)`` right classes.
        num_bins: B >= 1.

    Returns:
        The bins, from which :attr:`ReliabilityBins.ece` follows.

    Raises:
        ValueError: as :func:`ece`.
    """
    probs, labels = _checked(probs, labels)
    _check_bins(num_bins)
    confidence, predicted = probs.double().max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device="cpu")
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, num_bins - 1)
    count = torch.bincount(index, minlength=num_bins)
    correct = (predicted == labels).double()
    return ReliabilityBins(
        edges=edges,
        confidence=torch.bincount(index, confidence, num_bins) / count,
        accuracy=torch.bincount(index, correct, num_bins) / count,
        count=count,
    )


def reliability_diagram(
    predictions: Mapping[str, tuple[Tensor, Tensor]],
    *,
    num_bins: int = 10,
    title: str | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw accuracy against confidence, one panel a model, and save it when ``path`` is given.

    A bar is the accuracy of one bin; the red outline is the gap to the bin's mean confidence, so a
    calibrated model shows none. Below each panel, the share of the predictions in each bin.

    Args:
        predictions: ``{name: (probs (N, C), labels (N,))}``, drawn left to right.
        num_bins: bins that split [0, 1].
        title: line above the panels.
        path: image file to write; its suffix picks the format (.png, .pdf, .svg).

    Returns:
        The matplotlib figure, not attached to any display.

    Raises:
        ValueError: ``predictions`` is empty, or as :func:`ece`.
    """
    if not predictions:
        raise ValueError("predictions is empty: pass at least one {name: (probs, labels)}")
    bins = {name: reliability_bins(p, y, num_bins) for name, (p, y) in predictions.items()}
    figure = _require("matplotlib.figure").Figure(
        figsize=(4.2 * len(bins), 5.4), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(2, len(bins), squeeze=False, sharex=True, sharey="row", height_ratios=[4, 1])
    for column, (name, one) in enumerate(bins.items()):
        probs, labels = predictions[name]
        _draw_reliability(axes[0, column], one, f"{name}\nECE {100 * ece(probs, labels):.1f}%")
        _draw_counts(axes[1, column], one)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share")
    if title:
        figure.suptitle(title, color=_INK)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _draw_reliability(axis: Axes, bins: ReliabilityBins, title: str) -> None:
    """Bars of accuracy, outlined gaps to the confidence, and the diagonal of perfect calibration."""
    filled = bins.count > 0
    left, width = bins.edges[:-1][filled].numpy(), 1 / len(bins.count)
    right_share, confidence = bins.accuracy[filled].numpy(), bins.confidence[filled].numpy()
    axis.bar(left, right_share, width, align="edge", color=_BAR, edgecolor="white", label="accuracy")
    axis.bar(
        left,
        abs(confidence - right_share),
        width,
        bottom=confidence.clip(max=right_share),
        align="edge",
        facecolor=(*_rgb(_GAP), 0.18),
        edgecolor=_GAP,
        hatch="////",
        linewidth=1.0,
        label="gap to confidence",
    )
    axis.plot([0, 1], [0, 1], "--", color=_GUIDE, linewidth=1.2, label="perfect calibration")
    axis.set(xlim=(0, 1), ylim=(0, 1), title=title)
    axis.legend(loc="upper left", fontsize=8, frameon=False)
    _tidy(axis)


def _draw_counts(axis: Axes, bins: ReliabilityBins) -> None:
    """The share of the predictions in each bin, under the reliability bars."""
    share = (bins.count / bins.count.sum()).numpy()
    axis.bar(bins.edges[:-1].numpy(), share, 1 / len(share), align="edge", color=_GUIDE, edgecolor="white")
    axis.set(ylim=(0, None), xlabel="confidence (probability of the chosen answer)")
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#e4e7eb", linewidth=0.6)


def _rgb(color: str) -> tuple[float, float, float]:
    return _require("matplotlib.colors").to_rgb(color)


def _checked(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU, floating and int64, or say which one is wrong and how."""
    probs, labels = torch.as_tensor(probs).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if probs.ndim != 2 or not probs.is_floating_point() or probs.shape[1] < 2:
        raise ValueError(
            f"probs must be floating with shape (N, C), C >= 2; got {probs.dtype} {tuple(probs.shape)}"
        )
    if labels.shape != probs.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({len(probs)},), one a row of probs; "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("probs and labels are empty: there is nothing to measure")
    probs = probs.float() if probs.dtype in (torch.float16, torch.bfloat16) else probs
    if int(labels.min()) < 0 or int(labels.max()) >= probs.shape[1]:
        raise ValueError(
            f"labels must lie in [0, {probs.shape[1] - 1}]; got {int(labels.min())} to {int(labels.max())}"
        )
    if not bool(torch.isfinite(probs).all()):
        raise ValueError("probs holds NaN or infinity: check the model's outputs")
    total = probs.sum(dim=1)
    if probs.min() < 0 or (total - 1).abs().max() > 1e-2:
        raise ValueError(
            f"rows of probs must be non-negative and sum to 1; got sums from {total.min():.4g} to "
            f"{total.max():.4g} (pass logits through softmax first)"
        )
    return probs.clamp(max=1.0), labels.long()


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1; got {num_bins}")


def _require(module: str) -> Any:
    """Import an optional dependency, or say which install brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f'{package} is not installed; pip install "bayeslora[demo]" brings it', name=error.name
        ) from error
