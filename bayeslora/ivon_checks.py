"""What IVON accepts: ranges of its arguments, and saved states that fit its parameters.

Each check comes before anything is changed, and names the argument, what it got and what it wants.
``ivon_distributed.py`` holds the checks of the engine that trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch import Tensor

from bayeslora.ivon_state import STATE_KEYS

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("finite and >= 0", lambda v: 0.0 <= v < math.inf),
    "ess": ("finite and > 0", lambda v: 0.0 < v < math.inf),
    "hess_init": ("finite and > 0", lambda v: 0.0 < v < math.inf),
    "beta1": ("in [0, 1]", lambda v: 0.0 <= v <= 1.0),
    "beta2": ("in [0, 1]", lambda v: 0.0 <= v <= 1.0),
    "weight_decay": ("finite and >= 0", lambda v: 0.0 <= v < math.inf),
    "clip_radius": ("> 0", lambda v: v > 0.0),
}


def check_settings(mc_samples: int, hess_approx: str, seed: int) -> None:
    """Check the arguments that hold for all parameter groups.

    Raises:
        ValueError: naming the first that is out of range.
        TypeError: ``seed`` is not an integer.
    """
    if not (isinstance(mc_samples, int) and mc_samples >= 1):
        raise ValueError(f"mc_samples must be an integer >= 1, got {mc_samples!r}")
    if hess_approx not in ("price", "gradsq"):
        raise ValueError(f"hess_approx must be 'price' or 'gradsq', got {hess_approx!r}")
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must fit 64 bits, got {seed!r}")


def check_group(group: dict[str, Any]) -> None:
    """Check the ranges of a group's hyperparameters.

    Raises:
        ValueError: naming the first that is out of range.
        TypeError: naming the first that is not a number; text is none, though it may read as one.
    """
    for name, (range_text, fits) in _RANGES.items():
        if isinstance(group[name], str) or not hasattr(group[name], "__float__"):
            raise TypeError(f"{name} must be a number, got {group[name]!r}")
        if not fits(float(group[name])):
            raise ValueError(f"{name} must be {range_text}, got {group[name]!r}")


def check_saved_state(
    param_groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Check a saved state against the parameters.

    Returns:
        Each parameter that has a saved state, and that state. (Parameters go by their order: torch's
        distributed checkpoints call them by name, ``state_dict()`` by number.)

    Raises:
        ValueError: naming what does not fit.
    """
    for group in state_dict["param_groups"]:
        for name in _RANGES:
            if name not in group:
                raise ValueError(
                    f"state_dict has a parameter group without {name!r}: it is not from bayeslora.IVON"
                )
    sizes = [len(g["params"]) for g in param_groups]
    saved = [len(g["params"]) for g in state_dict["param_groups"]]
    if sizes != saved:
        raise ValueError(f"state_dict has parameter groups of sizes {saved}, this optimizer has {sizes}")
    saved_names = [name for group in state_dict["param_groups"] for name in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    by_name = dict(zip(saved_names, params, strict=True))
    for name, values in state_dict["state"].items():
        for key in STATE_KEYS:
            if not isinstance(values, dict) or key not in values:
                raise ValueError(
                    f"state_dict of parameter {name} has no {key!r}: it is not from bayeslora.IVON"
                )
            if values[key].shape != by_name[name].shape:
                raise ValueError(
                    f"state_dict: {key!r} of parameter {name} has shape {tuple(values[key].shape)}, "
                    f"the parameter has {tuple(by_name[name].shape)}"
                )
    return [(by_name[name], values) for name, values in state_dict["state"].items()]
