"""What IVON accepts: ranges of its arguments, and saved states that fit its parameters.

Each check comes before anything is changed, and names the argument, what it got and what it wants.
``ivon_distributed.py`` holds the checks of the engine that trains.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from bayeslora.ivon_setup import check_setup
from bayeslora.ivon_state import STATE_KEYS, ties_of
from bayeslora.kernels.param_bucket import state_dtype

_logger = logging.getLogger("bayeslora")

EVAL_DRAWS = 1 << 31
"""Draws from here on belong to evaluation; training draws count from 1."""

LAST_DRAW = EVAL_DRAWS - (1 << 20)
"""The last training draw, with room for those that are drawn before the host learns of it."""

_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max

# The kernels compute in fp32: what is larger or smaller is infinite or zero there.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("finite and >= 0 (in float32)", lambda v: 0.0 <= v <= _MOST),
    "ess": ("finite and > 0 (in float32)", lambda v: _LEAST <= v <= _MOST),
    "hess_init": ("finite and > 0 (in float32)", lambda v: _LEAST <= v <= _MOST),
    "beta1": ("in [0, 1]", lambda v: 0.0 <= v <= 1.0),
    "beta2": ("in [0, 1]", lambda v: 0.0 <= v <= 1.0),
    "weight_decay": ("finite and >= 0 (in float32)", lambda v: 0.0 <= v <= _MOST),
    "clip_radius": ("> 0 (in float32), or infinite", lambda v: _LEAST <= v <= _MOST or v == math.inf),
}

_COUNTERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("an integer in [0, 2^62]", lambda v: _is_integer(v, 0, 1 << 62)),
    "skipped": ("an integer in [0, 2^62]", lambda v: _is_integer(v, 0, 1 << 62)),
    "draws": (f"an integer in [0, {LAST_DRAW}]", lambda v: _is_integer(v, 0, LAST_DRAW)),
    "eval_draws": ("an integer in [0, 2^31)", lambda v: _is_integer(v, 0, EVAL_DRAWS - 1)),
    "seed": ("an integer of 64 bits", lambda v: _is_integer(v, -(1 << 63), (1 << 64) - 1)),
    "beta1_power": ("in [0, 1]", lambda v: isinstance(v, (int, float)) and 0.0 <= v <= 1.0),
    "held": ("None, or the seed, draw, scale and kind of a sample", lambda v: v is None or _is_noise(v)),
}


def _is_integer(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_noise(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    seed, draw, scale, train = value
    numbers = _is_integer(seed, -(1 << 63)) and _is_integer(draw, 0, (1 << 32) - 1)
    return numbers and isinstance(scale, (int, float)) and 0.0 <= scale < math.inf and isinstance(train, bool)


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


def check_group(group: Mapping[str, Any], debias: bool) -> None:
    """Check the ranges of a group's hyperparameters.

    Args:
        group: of the optimizer.
        debias: see :class:`~bayeslora.IVON`.

    Raises:
        ValueError: naming the first that is out of range.
        TypeError: naming the first that is not a number; text is none, though it may read as one.
    """
    values = {}
    for name, (range_text, fits) in _RANGES.items():
        values[name] = _number(name, group[name])
        if not fits(values[name]):
            raise ValueError(f"{name} must be {range_text}, got {group[name]!r}")
    precision = values["ess"] * (values["hess_init"] + values["weight_decay"])
    if not _LEAST <= precision <= _MOST:
        raise ValueError(
            "the precision ess * (hess_init + weight_decay) must be finite and > 0 in float32, "
            f"got {precision!r}"
        )
    if debias and values["beta1"] == 1.0:
        raise ValueError("beta1 must be less than 1 with debias=True, which divides by 1 - beta1^t; got 1.0")


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (str, bytes, bool)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except OverflowError:
            return math.nan
        except (TypeError, ValueError, RuntimeError):  # a tensor or array of several numbers
            pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def say_flat_prior(groups: Sequence[Mapping[str, Any]], weight_decay: float) -> None:
    """Log it if all parameter groups have set ``weight_decay`` to 0 themselves, as HF Trainer's do."""
    if weight_decay and all(g["weight_decay"] == 0.0 for g in groups if g["params"]):
        _logger.warning(
            "IVON: the parameter groups set weight_decay=0 in place of %r, so the prior is flat. HF Trainer "
            "makes its groups from TrainingArguments(weight_decay=...): set it there, or pass Trainer an "
            "IVON of your own, optimizers=(opt, None)",
            weight_decay,
        )


# ---- saved states --------------------------------------------------------------------------------


def check_saved_state(
    param_groups: Sequence[dict[str, Any]], state_dict: Any, debias: bool
) -> dict[Any, dict[str, Tensor]]:
    """Check a saved state against the parameters.

    Args:
        param_groups: the optimizer's.
        state_dict: what is to be loaded.
        debias: see :class:`~bayeslora.IVON`.

    Returns:
        The new state of each parameter that has one: copies, on its device and in its state's dtype. What
        else ``state_dict["state"]`` holds comes after it, as it is. (Parameters go by their order: torch's
        distributed checkpoints call them by name, ``state_dict()`` by number.)

    Raises:
        ValueError: naming what does not fit.
    """
    groups, state = _parts(state_dict)
    for i, group in enumerate(groups):
        for name in (*_RANGES, *_COUNTERS, "params"):
            if name not in group:
                raise ValueError(
                    f"state_dict has a parameter group without {name!r}: it is not from bayeslora.IVON"
                )
        _check_saved_group(f"state_dict: parameter group {i}", group, groups[0], debias)
    if "setup_steps" in groups[0] and not any(group.get("perturb", True) for group in groups):
        raise ValueError("state_dict: IVON.like_adamw needs a perturbed group, all have perturb=False")
    sizes, saved = [len(g["params"]) for g in param_groups], [len(g["params"]) for g in groups]
    if sizes != saved:
        raise ValueError(f"state_dict has parameter groups of sizes {saved}, this optimizer has {sizes}")
    members = [(name, group) for group in groups for name in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    if len({repr(name) for name, _ in members}) != len(members):
        raise ValueError("state_dict names a parameter twice in its groups")
    states: dict[Any, dict[str, Tensor]] = {}
    for p, (name, group) in zip(params, members, strict=True):
        if name in state:
            states[p] = _state_of(p, name, state[name], group, debias)
    _check_count(groups, state)
    _check_tied(param_groups, params, states)
    names = {name for name, _ in members}
    return {**states, **{key: value for key, value in state.items() if key not in names}}


def _parts(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, (list, tuple)) or not groups or not all(isinstance(g, Mapping) for g in groups):
        raise ValueError("state_dict['param_groups'] must be a list of dicts: it is not from bayeslora.IVON")
    if not isinstance(state, Mapping):
        raise ValueError("state_dict['state'] must be a dict: it is not from bayeslora.IVON")
    return list(groups), state


def _check_saved_group(where: str, group: Mapping[str, Any], head: Mapping[str, Any], debias: bool) -> None:
    try:
        check_group(group, debias)
        check_setup(group, head)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    for name, (text, fits) in _COUNTERS.items():
        if not fits(group[name]):
            raise ValueError(f"{where}: {name} must be {text}, got {group[name]!r}")
    perturb = group.get("perturb", None if "states" in group else True)  # older ones left out what is True
    if not isinstance(perturb, int) or perturb not in (0, 1):
        raise ValueError(f"{where}: perturb must be True or False, got {perturb!r}")
    params = group["params"]
    if not isinstance(params, (list, tuple)) or not all(isinstance(name, (int, str)) for name in params):
        raise ValueError(f"{where}: params must be a list of numbers or names, got {params!r}")


def _check_count(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Check that no parameter's state has gone: one without a state would begin anew."""
    for i, group in enumerate(groups):
        found, saved = sum(name in state for name in group["params"]), group.get("states", 0)
        if not _is_integer(saved, 0, found):
            raise ValueError(
                f"state_dict: parameter group {i} has states of {found} parameters, saved were {saved!r}"
            )


def _state_of(p: Tensor, name: Any, saved: Any, group: Mapping[str, Any], debias: bool) -> dict[str, Tensor]:
    """Return copies of a parameter's saved tensors, checked."""
    dtype, new = state_dtype(p.dtype), {}
    for key in STATE_KEYS:
        if not isinstance(saved, Mapping) or key not in saved:
            raise ValueError(f"state_dict of parameter {name} has no {key!r}: it is not from bayeslora.IVON")
        value, what = saved[key], f"state_dict: {key!r} of parameter {name}"
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{what} must be a dense tensor, got {_kind(value)}")
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{what} must be float32 or float64, got {value.dtype}: digits are lost")
        if value.shape != p.shape:
            raise ValueError(f"{what} has shape {tuple(value.shape)}, the parameter has {tuple(p.shape)}")
        new[key] = value.detach().to(p.device, dtype, copy=True)
        if not bool(_local(new[key]).isfinite().all()):
            raise ValueError(f"{what} holds NaN or infinity")
    hess = _local(new["hess"])
    if hess.numel() > 0:
        shifted = torch.stack(torch.aminmax(hess)) + float(group["weight_decay"])  # as the kernels round it
        least, most = (shifted * float(group["ess"])).tolist()
        if not (least >= torch.finfo(dtype).tiny and most < math.inf):
            raise ValueError(
                f"state_dict: 'hess' of parameter {name} gives precisions ess * (hess + weight_decay) from "
                f"{least!r} to {most!r}; they must be finite and > 0"
            )
        bias = 1.0 - float(group["beta1_power"]) * float(group["beta1"]) if debias else 1.0
        update = _local(new["momentum"]) / bias / (hess + float(group["weight_decay"]))
        if not bool(update.abs_().clamp_(max=float(group["clip_radius"])).isfinite().all()):
            raise ValueError(f"state_dict: 'momentum' of parameter {name} gives an update that is not finite")
    return new


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _kind(value: Any) -> str:
    return f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _check_tied(
    param_groups: Sequence[dict[str, Any]], params: Sequence[Tensor], states: Mapping[Any, dict[str, Tensor]]
) -> None:
    for i, tie in ties_of(param_groups).items():
        own, first = states.get(params[i]), states.get(params[tie.first])
        if own is None or first is None:
            continue
        for key in STATE_KEYS:
            if not torch.equal(_local(tie.as_first(own[key])), _local(first[key])):
                raise ValueError(
                    f"state_dict: parameters {tie.first} and {i} share one memory, but their {key!r} differ"
                )
