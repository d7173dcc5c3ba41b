"""What a user may choose about MonteCLoRA beyond PEFT's ``MontecloraConfig``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

CHOICES = {
    "estimator": ("collapsed", "mixture"),
    "dirichlet": ("exact", "logistic_normal"),
    "resample": ("forward", "step"),
    "perturb": ("A", "B", "both"),
    "mode": ("joint", "mean", "priors"),
}


@dataclass(frozen=True)
class MontecloraOptions:
    """The options of `bayeslora.configure_monteclora`, which documents them."""

    estimator: str = "collapsed"
    dirichlet: str = "exact"
    resample: str = "forward"
    perturb: str = "A"
    mode: str = "joint"
    outer_samples: int = 1
    sparse: bool = False
    add_loss: bool = False
    seed: int | None = None
    sample_scaler: float | Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not (isinstance(self.outer_samples, int) and self.outer_samples >= 1):
            raise ValueError(f"outer_samples must be an integer >= 1, got {self.outer_samples!r}")
        if self.seed is not None and not (isinstance(self.seed, int) and -(1 << 63) <= self.seed < 1 << 64):
            raise ValueError(f"seed must be an integer that fits 64 bits, got {self.seed!r}")
        scaler = self.sample_scaler
        if scaler is not None and not callable(scaler):
            check_scaler(scaler)


def check_scaler(scaler: float) -> float:
    """Return a noise scale, or raise ``ValueError`` if it is negative or not finite."""
    if not 0.0 <= scaler < math.inf:
        raise ValueError(f"sample_scaler must be finite and >= 0, got {scaler!r}")
    return float(scaler)


OPTION_NAMES = tuple(field.name for field in fields(MontecloraOptions))
