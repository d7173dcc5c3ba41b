"""Which implementation runs where: Triton kernels on CUDA, their plain-torch twins elsewhere."""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Keep ``torch.compile`` out of a function: ``torch.compiler.disable``, imported where it is needed."""
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(_Function, call)


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def uses_triton(device: torch.device) -> bool:
    """Return whether tensors on ``device`` go through the Triton kernels."""
    return device.type == "cuda" and _triton_installed()


def ivon_kernels(device: torch.device) -> ModuleType:
    """Return the module with IVON's operations for ``device`` (triton is imported only where it runs)."""
    name = "ivon" if uses_triton(device) else "ivon_twin"
    return import_module(f"bayeslora.kernels.{name}")


def monteclora_kernels(device: torch.device) -> ModuleType:
    """Return the module with MonteCLoRA's samplers for ``device``."""
    name = "monteclora" if uses_triton(device) else "monteclora_twin"
    return import_module(f"bayeslora.kernels.{name}")
