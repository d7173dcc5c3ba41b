"""How a fine-tuning run trains: every option, its default, and its check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["TrainSettings", "check_prediction"]

OPTIMIZERS = ("ivon", "adamw")
ESS_PER_ROW = 200.0
LIKE_ADAMW = "like-adamw"
_COMMON = {"hess_init": 5e-3, "beta2": 0.9998, "weight_decay": 1e-6}
PRESETS: dict[str, dict[str, float]] = {  # without ess: ESS_PER_ROW times the rows
    LIKE_ADAMW: {"lr": 2e-4, "beta2": 0.9998, "weight_decay": 1e-6},
    "rows": {**_COMMON, "lr": 1e-2, "clip_radius": 0.02},
    "commonsense": {**_COMMON, "lr": 5e-4, "clip_radius": 0.1},
    "glue": {**_COMMON, "lr": 1e-2, "clip_radius": 0.02, "ess": 5e6},
    "gsm8k": {**_COMMON, "lr": 3e-2, "clip_radius": 0.01, "beta2": 0.99999, "ess": 1e7},
}
_ADAMW = {"lr": 2e-4, "weight_decay": 0.0}
_CHOSEN = ("ess", "hess_init", "clip_radius")  # by like_adamw itself
_EPOCHS = 3.0
_IVON_ONLY = ("preset", "beta2", *_CHOSEN)


@dataclass(frozen=True)
class TrainSettings:
    """Options of :func:`bayeslora.finetune.train`.

    IVON has presets. ``"like-adamw"`` takes a learning rate that works for AdamW and chooses the rest from
    the first gradients (:meth:`bayeslora.IVON.like_adamw`); ``"rows"`` fixes them, with an effective sample
    size of 200 a row; ``"commonsense"``, ``"glue"`` and ``"gsm8k"`` are recipes of the IVON-LoRA papers. The
    fixed ones have ``rescale_lr=False``: there ``lr · clip_radius`` is the most one weight can move in one
    step, which makes it comparable with AdamW's learning rate (1e-2 · 0.02 = 2e-4).

    Attributes:
        optimizer: ``"ivon"`` or ``"adamw"``.
        preset: where IVON's options come from that are None here; None is ``"rows"`` if one of ``ess``,
            ``hess_init`` and ``clip_radius`` is given, else ``"like-adamw"``, which chooses those itself.
        lr: peak learning rate; None is the preset's (``"rows"``: 1e-2), and 2e-4 for AdamW.
        steps: optimizer steps; None derives them from ``epochs``.
        epochs: passes over the training rows when ``steps`` is None; None is 3.
        batch_size: questions in one forward and backward pass.
        grad_accumulation: passes in one optimizer step.
        warmup: share of the steps over which the learning rate rises linearly, before it falls linearly.
        weight_decay: IVON's δ (the prior's precision over ``ess``) or AdamW's decay; None is 1e-6 and 0.
        ess: IVON's effective sample size λ; the posterior's standard deviation is
            ``1 / sqrt(ess (hess + weight_decay))``. 200 times the training rows is a tempered posterior: the
            papers use 1e6 for OpenBookQA's 4957 rows (202 a row) and 5e5 for ARC-Easy's 2251 (222), and
            between 106 and 781 elsewhere.
        hess_init: IVON's initial Hessian, h0.
        beta2: IVON's Hessian momentum.
        clip_radius: IVON's bound on one element of the preconditioned update.
        r: LoRA rank.
        lora_alpha: LoRA scaling is ``lora_alpha / r``.
        dropout: LoRA dropout probability.
        target_modules: names of the layers to adapt, or ``["all-linear"]``; None is PEFT's choice for the
            architecture (query and value projections in most).
        seed: of LoRA's initialization, the data order, dropout and IVON's noise.
    """

    optimizer: str = "ivon"
    preset: str | None = None
    lr: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    grad_accumulation: int = 1
    warmup: float = 0.06
    weight_decay: float | None = None
    ess: float | None = None
    hess_init: float | None = None
    beta2: float | None = None
    clip_radius: float | None = None
    r: int = 8
    lora_alpha: int = 16
    dropout: float = 0.1
    target_modules: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        given = [name for name in _CHOSEN if getattr(self, name) is not None]
        if self.preset == LIKE_ADAMW and given:
            raise ValueError(f"preset {LIKE_ADAMW} chooses {given[0]} itself; take preset rows to set it")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"pass steps or epochs, not both; got steps={self.steps}, epochs={self.epochs}")
        for name in ("steps", "batch_size", "grad_accumulation", "r"):
            _check(name, getattr(self, name), "at least 1", lambda v: v >= 1)
        for name in ("lr", "epochs", "ess", "hess_init", "clip_radius", "lora_alpha"):
            _check(name, getattr(self, name), "greater than 0", lambda v: v > 0)
        for name in ("warmup", "beta2", "dropout"):
            _check(name, getattr(self, name), "in [0, 1)", lambda v: 0 <= v < 1)
        _check("weight_decay", self.weight_decay, "at least 0", lambda v: v >= 0)
        _check("seed", self.seed, "in [0, 2^64)", lambda v: 0 <= v < 1 << 64)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; name at least one layer or leave it out")

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, once ``steps`` is known."""
        return round(self.warmup * (self.steps or 0))

    def resolved(self, num_rows: int) -> TrainSettings:
        """Return a copy in which every default that depends on the optimizer or the data is filled in."""
        epochs = _EPOCHS if self.epochs is None else self.epochs
        per_step = self.batch_size * self.grad_accumulation
        steps = max(1, math.ceil(epochs * num_rows / per_step)) if self.steps is None else self.steps
        defaults: dict[str, Any] = dict(_ADAMW)
        if self.optimizer == "ivon":
            given = any(getattr(self, name) is not None for name in _CHOSEN)
            preset = self.preset or ("rows" if given else LIKE_ADAMW)
            fixed = {} if preset == LIKE_ADAMW else {"ess": ESS_PER_ROW * num_rows}
            defaults = {"preset": preset, **fixed, **PRESETS[preset]}
        taken = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, steps=steps, epochs=None, **taken)

    def as_dict(self) -> dict[str, Any]:
        """Return the options in use as plain values: IVON's own are left out for AdamW."""
        unused = _IVON_ONLY if self.optimizer == "adamw" else ()
        return {name: value for name, value in asdict(self).items() if name not in unused}


def check_prediction(
    *, num_samples: int = 0, variance_scale: float = 1.0, prune: float = 0.0, seed: int = 0
) -> None:
    """Raise ``ValueError`` for options of prediction that are out of range."""
    _check("seed", seed, "in [0, 2^64)", lambda v: 0 <= v < 1 << 64)
    _check("num_samples", num_samples, "at least 0", lambda v: v >= 0)
    _check("variance_scale", variance_scale, "greater than 0", lambda v: v > 0)
    _check("prune", prune, "in [0, 1)", lambda v: 0 <= v < 1)


def _check(name: str, value: float | None, bounds: str, holds: Callable[[float], bool]) -> None:
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} must be {bounds}; got {value}")
