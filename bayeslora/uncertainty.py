"""What a posterior does not know: entropies, mutual information, selective prediction, foreign inputs.

With p_s the probabilities under posterior sample s = 1 … S and p̄ their mean, in nats::

    total      H[p̄]                        predictive entropy
    aleatoric  (1/S) Σ_s H[p_s]            expected entropy: what every sample finds uncertain
    epistemic  total - aleatoric           mutual information: what the samples disagree on, >= 0

Everything takes probabilities ``(S, ..., C)``, as ``posterior.predict(..., average=False)`` returns them: of
classes ``(S, N, C)``, of a question's choices (0 where it has no such choice), or of tokens ``(S, N, T, V)``.

Papers: Depeweg et al., "Decomposition of uncertainty in Bayesian deep learning" (ICML 2018); Malinin and
Gales, "Uncertainty estimation in autoregressive structured prediction" (ICLR 2021); Geifman and El-Yaniv,
"Selective classification for deep neural networks" (NeurIPS 2017), for risk and coverage.

torchmetrics computes the AUROC and matplotlib draws: ``pip install "bayeslora[demo]"``
(``ModuleNotFoundError`` without them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .metrics import _BAR, _GAP, _GUIDE, _INK, _require, _tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "RiskCoverage",
    "SequenceUncertainty",
    "Uncertainty",
    "decompose",
    "ood_auroc",
    "ood_plot",
    "risk_coverage",
    "risk_coverage_plot",
    "sequence_scores",
]

_COLORS = (_BAR, _GAP, _GUIDE, "#2a9d6f", "#8a5cd1", "#c9a227")


@dataclass(frozen=True)
class Uncertainty:
    """Scores of each input, in nats, all of one shape ``(...)``.

    Attributes:
        total: predictive entropy.
        aleatoric: expected entropy.
        epistemic: mutual information of the prediction and the weights.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


@dataclass(frozen=True)
class SequenceUncertainty:
    """Scores of generated sequences, in nats a token; see `sequence_scores`.

    Attributes:
        tokens: scores ``(N, T)`` of each token; 0 where the mask is.
        sequence: their means ``(N,)`` over each sequence's tokens.
        nll: ``(N,)``, ``-(1/T) log (1/S) Σ_s Π_t p_s(y_t)``, the sequence's under the posterior predictive.
        spread: ``(N,)``, standard deviation of the samples' own ``-(1/T) log Π_t p_s(y_t)``.
    """

    tokens: Uncertainty
    sequence: Uncertainty
    nll: Tensor
    spread: Tensor


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate of the predictions that are kept, the most certain first.

    Attributes:
        coverage: ``(N,)`` fp64, share of the inputs that are answered: 1/N … 1.
        risk: ``(N,)`` fp64, error rate among them; equal scores count as in random order.
        aurc: mean of the risk over the coverages.
        excess: ``aurc`` less that of the best order of the same errors.
    """

    coverage: Tensor = field(repr=False)
    risk: Tensor = field(repr=False)
    aurc: float
    excess: float


def decompose(probs: Tensor) -> Uncertainty:
    """Split the predictive entropy of S samples' probabilities ``(S, ..., C)``.

    Returns:
        Scores ``(...)`` in nats, fp32 (fp64 for fp64 ``probs``).

    Raises:
        ValueError: ``probs`` is not floating, has fewer than two dimensions, or its rows are no
            probabilities.

    >>> agree = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    >>> differ = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> decompose(agree).epistemic, decompose(differ).epistemic
    (tensor([0.]), tensor([0.6931]))
    """
    probs = _checked(probs, 2)
    total = _entropy(probs.mean(0))
    aleatoric = _entropy(probs).mean(0)
    return Uncertainty(total, aleatoric, (total - aleatoric).clamp_min(0.0))


def sequence_scores(probs: Tensor, tokens: Tensor, mask: Tensor | None = None) -> SequenceUncertainty:
    """Return scores of each token and of each sequence that was generated.

    Run the sequences through every sample, ``posterior.predict(ids, S, average=False)``, and pass the
    probabilities at the positions that predict the generated tokens: ``probs[:, :, prompt - 1 : -1]`` for
    ``tokens = ids[:, prompt:]``.

    Args:
        probs: ``(S, N, T, V)``, of the next token under each sample.
        tokens: ``(N, T)`` int64, the tokens that followed.
        mask: ``(N, T)``, True on real tokens; None for all.

    Raises:
        ValueError: a shape does not fit, a token is out of range, or a sequence has no real token.

    >>> probs = torch.tensor([[[[0.9, 0.1]]], [[[0.5, 0.5]]]])
    >>> sequence_scores(probs, torch.tensor([[0]])).nll  # -log((0.9 + 0.5) / 2)
    tensor([0.3567])
    """
    probs = _checked(probs, 4)
    if tokens.shape != probs.shape[1:3] or tokens.is_floating_point():
        wanted = tuple(probs.shape[1:3])
        raise ValueError(f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; pass integers {wanted}")
    tokens = tokens.to(probs.device, torch.int64)
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(probs.device).bool()
    if keep.shape != tokens.shape or not bool(keep.any(-1).all()):
        raise ValueError(f"mask has shape {tuple(keep.shape)}; pass {tuple(tokens.shape)}, one True a row")
    safe = tokens.masked_fill(~keep, 0)
    if int(safe.min()) < 0 or int(safe.max()) >= probs.shape[-1]:
        raise ValueError(
            f"tokens must lie in [0, {probs.shape[-1] - 1}]; got {int(safe.min())} to {int(safe.max())}"
        )
    count = keep.sum(-1)
    by_token = decompose(probs)
    scores = [s.masked_fill(~keep, 0.0) for s in (by_token.total, by_token.aleatoric, by_token.epistemic)]
    chosen = probs.gather(-1, safe.expand(len(probs), -1, -1).unsqueeze(-1)).squeeze(-1)
    logs = chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log().masked_fill(~keep, 0.0).sum(-1)
    joint = logs.logsumexp(0) - torch.log(torch.tensor(float(len(probs)), device="cpu"))
    spread = (logs / count).std(0, correction=0)
    return SequenceUncertainty(
        Uncertainty(*scores), Uncertainty(*(s.sum(-1) / count for s in scores)), -joint / count, spread
    )


def risk_coverage(scores: Tensor, errors: Tensor) -> RiskCoverage:
    """Return the risk-coverage curve of answering the inputs with the smallest scores only.

    Args:
        scores: ``(N,)``, larger where less certain (an entropy, or 1 - confidence).
        errors: ``(N,)``, whether (or how much) the prediction is wrong.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.

    >>> risk_coverage(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0, 1, 0])).risk
    tensor([0.0000, 0.0000, 0.3333], dtype=torch.float64)
    """
    scores, errors = _vector("scores", scores), _vector("errors", errors)
    if scores.shape != errors.shape:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, errors {tuple(errors.shape)}; pass one each"
        )
    values, group = scores.unique(return_inverse=True)
    size = torch.bincount(group, minlength=len(values))
    mean_error = torch.bincount(group, errors, minlength=len(values)) / size
    risk, coverage = _curve(mean_error.repeat_interleave(size))
    best = _curve(errors.sort().values)[0].mean()
    aurc = float(risk.mean())
    return RiskCoverage(coverage, risk, aurc, aurc - float(best))


def ood_auroc(in_scores: Tensor, out_scores: Tensor) -> float:
    """Return the AUROC of telling foreign inputs by their larger scores: 0.5 is chance, 1 perfect.

    Args:
        in_scores: ``(N,)``, of inputs like those trained on.
        out_scores: ``(M,)``, of foreign ones.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.

    >>> ood_auroc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 5.0]))
    0.833...
    """
    parts = _vector("in_scores", in_scores), _vector("out_scores", out_scores)
    both = torch.cat(parts)
    rank = both.unique(return_inverse=True)[1]  # torchmetrics would squash scores outside of [0, 1]
    foreign = torch.cat([torch.zeros_like(parts[0]), torch.ones_like(parts[1])]).long()
    auroc = _require("torchmetrics.functional.classification").binary_auroc
    return float(auroc(rank.double() / max(len(both), 2), foreign))


def risk_coverage_plot(
    curves: Mapping[str, tuple[Tensor, Tensor]],
    *,
    title: str | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw risk against coverage, one line a name, and save it when ``path`` is given.

    Args:
        curves: ``{name: (scores (N,), errors (N,))}``, as for `risk_coverage`.
        title: line above.
        path: image file to write; its suffix picks the format.

    Returns:
        The matplotlib figure, not attached to any display.

    Raises:
        ValueError: ``curves`` is empty, or as `risk_coverage`.

    >>> risk_coverage_plot({"entropy": (torch.rand(9), torch.ones(9))}).axes[0].get_xlabel()
    'coverage (share of the inputs answered)'
    """
    if not curves:
        raise ValueError("curves is empty: pass at least one {name: (scores, errors)}")
    figure = _require("matplotlib.figure").Figure(figsize=(5.2, 4.0), layout="constrained")
    axis = figure.subplots()
    for color, (name, (scores, errors)) in zip(_cycled(len(curves)), curves.items(), strict=True):
        curve = risk_coverage(scores, errors)
        axis.plot(curve.coverage, curve.risk, color=color, label=f"{name} (AURC {curve.aurc:.3f})")
    axis.set(xlim=(0, 1), ylim=(0, None))
    axis.set_xlabel("coverage (share of the inputs answered)")
    axis.set_ylabel("risk (error rate among them)")
    return _finish(figure, axis, title, path)


def ood_plot(
    scores: Mapping[str, tuple[Tensor, Tensor]],
    *,
    title: str | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw the ROC curve of telling foreign inputs, one line a score, and save it when ``path`` is given.

    Args:
        scores: ``{name: (in_scores (N,), out_scores (M,))}``, as for `ood_auroc`.
        title: line above.
        path: image file to write; its suffix picks the format.

    Returns:
        The matplotlib figure, not attached to any display.

    Raises:
        ValueError: ``scores`` is empty, or as `ood_auroc`.

    >>> ood_plot({"entropy": (torch.rand(9), torch.rand(9))}).axes[0].get_ylabel()
    'foreign inputs found'
    """
    if not scores:
        raise ValueError("scores is empty: pass at least one {name: (in_scores, out_scores)}")
    figure = _require("matplotlib.figure").Figure(figsize=(4.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for color, (name, (inside, outside)) in zip(_cycled(len(scores)), scores.items(), strict=True):
        parts = _vector("in_scores", inside), _vector("out_scores", outside)
        thresholds = torch.cat(parts).unique().flip(0)
        rates = []
        for part in parts:
            below = torch.searchsorted(part.sort().values, thresholds)
            rates.append(torch.cat([thresholds.new_zeros(1), 1 - below.double() / len(part)]))
        label = f"{name} (AUROC {ood_auroc(inside, outside):.3f})"
        axis.plot(rates[0], rates[1], color=color, label=label)
    axis.plot([0, 1], [0, 1], "--", color=_GUIDE, linewidth=1.0)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_xlabel("own inputs taken for foreign")
    axis.set_ylabel("foreign inputs found")
    return _finish(figure, axis, title, path)


def _entropy(probs: Tensor) -> Tensor:
    return -torch.xlogy(probs, probs).sum(-1)


def _curve(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return risk and coverage of errors in the order of answering."""
    count = torch.arange(1, len(errors) + 1, dtype=torch.float64, device="cpu")
    return errors.cumsum(0) / count, count / len(errors)


def _cycled(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def _finish(figure: Figure, axis: object, title: str | None, path: str | PathLike[str] | None) -> Figure:
    axis.legend(fontsize=8, frameon=False)  # type: ignore[attr-defined]
    if title:
        axis.set_title(title, color=_INK)  # type: ignore[attr-defined]
    _tidy(axis)  # type: ignore[arg-type]
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _vector(name: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach().cpu().double()
    if values.dim() != 1 or not len(values):
        raise ValueError(f"{name} has shape {tuple(values.shape)}; pass (N,) with N >= 1")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return values


def _checked(probs: Tensor, least_dim: int) -> Tensor:
    if not isinstance(probs, Tensor) or not probs.is_floating_point() or probs.dim() < least_dim:
        shape = tuple(probs.shape) if isinstance(probs, Tensor) else type(probs).__name__
        wanted = "(S, N, T, V)" if least_dim == 4 else "(S, ..., C)"
        raise ValueError(f"probs must be a floating tensor {wanted}; got {shape}")
    probs = probs.detach()
    probs = probs.float() if probs.dtype in (torch.float16, torch.bfloat16) else probs
    if not probs.numel():
        raise ValueError(f"probs is empty: {tuple(probs.shape)}")
    off = (probs.sum(-1) - 1).abs().max()
    if not float(off) < 1e-2 or float(probs.min()) < 0:
        raise ValueError(
            "rows of probs must be non-negative and sum to 1 (pass logits through softmax first)"
        )
    return probs
