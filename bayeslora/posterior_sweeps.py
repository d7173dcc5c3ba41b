"""How a posterior's predictions change with what is pruned and with the scale of its variance.

The paper's Figure 3 (pruning by uncertainty against pruning at random) and Table 6 (scale of the variance
at test time): Cong et al., "Improving LoRA with variational learning" (2025). `Posterior.prune_sweep` and
`Posterior.variance_sweep` run these.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import metrics
from .ivon_distributed import is_sharded
from .metrics import _BAR, _GUIDE, _INK, _require, _tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .posterior import Posterior

Predictions = Callable[..., tuple[Tensor, Tensor]]
"""Called with ``num_samples`` and ``variance_scale``; returns class probabilities and labels."""

_TITLES = {"accuracy": "accuracy", "ece": "ECE", "nll": "NLL (nats)", "brier": "Brier score"}
UNCERTAINTY, RANDOM = "uncertainty", "random"


@dataclass(frozen=True)
class Sweep:
    """Measurements along one setting.

    Attributes:
        setting: what was varied: ``"ratio"`` or ``"variance_scale"``.
        rows: one dict a measurement: the setting, ``"how"``, ``"seed"`` (of random pruning) and the
            metrics ``"accuracy"``, ``"ece"``, ``"nll"`` and ``"brier"``.
    """

    setting: str
    rows: list[dict[str, Any]] = field(repr=False)

    def groups(self) -> dict[str, dict[float, list[dict[str, Any]]]]:
        """Return the rows by ``"how"`` and by the setting's value, both in order of appearance."""
        found: dict[str, dict[float, list[dict[str, Any]]]] = {}
        for row in self.rows:
            found.setdefault(row["how"], {}).setdefault(row[self.setting], []).append(row)
        return found

    def table(self) -> str:
        """Return a Markdown table; several seeds of one setting as mean ± standard deviation."""
        names = [name for name in _TITLES if name in self.rows[0]]
        lines = [f"| {self.setting.replace('_', ' ')} | how | {' | '.join(_TITLES[n] for n in names)} |"]
        lines.append("|" + " --- |" * (len(names) + 2))
        for how, by_value in self.groups().items():
            for value, rows in by_value.items():
                cells = [_cell([row[name] for row in rows]) for name in names]
                lines.append(f"| {value:g} | {how} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def plot(
        self,
        path: str | PathLike[str] | None = None,
        *,
        names: Sequence[str] = ("accuracy", "ece", "nll"),
        title: str | None = None,
    ) -> Figure:
        """Draw each metric along the setting, one panel a metric, and save it when ``path`` is given.

        Args:
            path: image file to write; its suffix picks the format.
            names: which metrics.
            title: line above the panels.
        """
        figure = _require("matplotlib.figure").Figure(
            figsize=(3.4 * len(names), 3.2), layout="constrained", facecolor="white"
        )
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, name in zip(panels, names, strict=True):
            for how, by_value in self.groups().items():
                color = _GUIDE if how == RANDOM else _BAR
                values = list(by_value)
                cells = [[row[name] for row in rows] for rows in by_value.values()]
                axis.plot(values, [statistics.mean(c) for c in cells], "o-", color=color, label=how, ms=3)
                if any(len(c) > 1 for c in cells):
                    low, high = [min(c) for c in cells], [max(c) for c in cells]
                    axis.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
            axis.set(xlabel=self.setting.replace("_", " "), ylabel=_TITLES[name])
            _tidy(axis)
        panels[0].legend(fontsize=8, frameon=False)
        if title:
            figure.suptitle(title, color=_INK)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        return figure


def _cell(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


@contextmanager
def pruned(posterior: Posterior, ratio: float, random_seed: int | None = None) -> Iterator[None]:
    """Prune for as long as the context is open; put mean, Hessian and parameters back at the end.

    Args:
        posterior: an IVON posterior.
        ratio: fraction of each matrix, in [0, 1).
        random_seed: prune as many elements chosen at random instead of the least certain ones.
    """
    gaussians = list(posterior.parameters.values())
    before = [(g.parameter.detach().clone(), g.mean.clone(), g.hess.clone()) for g in gaussians]
    history = list(posterior.pruned)
    try:
        order = None if random_seed is None else torch.Generator().manual_seed(random_seed)
        posterior._prune(ratio, order)
        yield
    finally:
        with torch.no_grad():
            for g, (parameter, mean, hess) in zip(gaussians, before, strict=True):
                g.parameter.copy_(parameter)
                g.mean.copy_(mean)
                g.hess.copy_(hess)
        posterior.pruned[:] = history
        posterior._writer.forget()


def prune_sweep(
    posterior: Posterior,
    data: Predictions | Iterable[tuple[Any, Tensor]],
    ratios: Sequence[float],
    num_samples: int,
    random_seeds: Sequence[int],
) -> Sweep:
    """Measure the predictions at each pruning ratio; see :meth:`Posterior.prune_sweep`."""
    _require_gaussians(posterior)
    ratios = [float(ratio) for ratio in ratios]
    for ratio in ratios:
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"ratios must be in [0, 1), got {ratio!r}")
    if not ratios:
        raise ValueError("ratios is empty: pass at least one")
    if num_samples < 0:
        raise ValueError(f"num_samples must be >= 0, got {num_samples!r}")
    predictions = _predictions(posterior, data)
    rows: list[dict[str, Any]] = []
    for how, seeds in ((UNCERTAINTY, [None]), (RANDOM, list(random_seeds))):
        for ratio in ratios:
            for seed in seeds:
                with pruned(posterior, ratio, seed):
                    values = _measure(predictions, num_samples, 1.0)
                rows.append({"ratio": ratio, "how": how, "seed": seed, **values})
    return Sweep("ratio", rows)


def variance_sweep(
    posterior: Posterior,
    data: Predictions | Iterable[tuple[Any, Tensor]],
    scales: Sequence[float],
    num_samples: int,
) -> Sweep:
    """Measure the predictions at each scale of the variance; see :meth:`Posterior.variance_sweep`."""
    scales = [float(scale) for scale in scales]
    for scale in scales:
        if not 0.0 <= scale < math.inf:
            raise ValueError(f"scales must be finite and >= 0, got {scale!r}")
    if not scales:
        raise ValueError("scales is empty: pass at least one")
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples!r}")
    predictions = _predictions(posterior, data)
    rows: list[dict[str, Any]] = []
    for scale in scales:
        values = _measure(predictions, 0 if scale == 0.0 else num_samples, scale)
        how = "mean" if scale == 0.0 else f"{num_samples} samples"
        rows.append({"variance_scale": scale, "how": how, "seed": None, **values})
    return Sweep("variance_scale", rows)


def _measure(predictions: Predictions, num_samples: int, variance_scale: float) -> dict[str, float]:
    probs, labels = predictions(num_samples=num_samples, variance_scale=variance_scale)
    return metrics.summary(probs, labels)


def _predictions(posterior: Posterior, data: Predictions | Iterable[tuple[Any, Tensor]]) -> Predictions:
    """Return ``data`` itself where it predicts, or predictions on its batches."""
    if callable(data):
        return data
    batches = list(data)
    if not batches:
        raise ValueError("data is empty: pass (batch, labels) pairs")

    def predict(*, num_samples: int, variance_scale: float) -> tuple[Tensor, Tensor]:
        scale = variance_scale if num_samples else 0.0
        count = max(num_samples, 1)
        probs = [posterior.predict(batch, count, variance_scale=scale).cpu() for batch, _ in batches]
        return torch.cat(probs), torch.cat([torch.as_tensor(labels).cpu() for _, labels in batches])

    return predict


def _require_gaussians(posterior: Posterior) -> None:
    if not posterior.parameters or any(is_sharded(g.parameter) for g in posterior.parameters.values()):
        raise TypeError("prune_sweep needs an IVON posterior whose parameters are whole on this process")
