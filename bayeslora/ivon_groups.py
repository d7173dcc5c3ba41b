"""IVON's parameter groups: torch's, in which the state can be read where ivon-opt keeps it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from bayeslora.kernels.param_bucket import state_dtype

_READ = ("hess", "momentum")


class ParamGroup(dict[str, Any]):
    """A parameter group that also answers to ``group["hess"]`` and ``group["momentum"]``.

    They are flat, of all the group's tensors in a row, and read-only copies: the state itself is
    ``opt.state[p]["hess"]``. They are no entries, and not saved with the group.

    Args:
        group: its entries.
        optimizer: whose group it is; not kept alive.
    """

    __slots__ = ("_optimizer",)

    def __init__(self, group: dict[str, Any], optimizer: Any) -> None:
        super().__init__(group)
        self._optimizer = weakref.ref(optimizer)

    def __missing__(self, name: str) -> Tensor:
        optimizer = self._optimizer()
        if name not in _READ or optimizer is None:
            raise KeyError(name)
        states = optimizer._started_state()
        with torch.inference_mode():  # what is made here refuses to be written
            parts = [
                states[p][name].flatten()
                if states.get(p)
                else torch.full(
                    (p.numel(),),
                    float(self["hess_init"]) if name == "hess" else 0.0,
                    dtype=state_dtype(p.dtype),
                    device=p.device,
                )
                for p in self["params"]
            ]
            return torch.cat(parts)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in _READ:
            raise TypeError(f"group[{name!r}] can only be read; write to opt.state[p][{name!r}], in place")
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy, or what is pickled, belongs to no optimizer
