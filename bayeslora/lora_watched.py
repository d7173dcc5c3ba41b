"""What follows a call and knows modules' calls or torch's own operators alone: a fused layer has neither.

Asked at every call, by a host that a GPU may be waiting for: a few reads of state that torch keeps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module
from torch.utils._device import DeviceContext

_forward_hooks, _forward_pre_hooks = module._global_forward_hooks, module._global_forward_pre_hooks
_backward_hooks, _backward_pre_hooks = module._global_backward_hooks, module._global_backward_pre_hooks
_transforms = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_function_modes, _function_mode = torch._C._len_torch_function_stack, torch._C._get_function_stack_at

dispatch_modes = torch._C._len_torch_dispatch_stack
"""How many modes there are that see operators below autograd: fake tensors, selective checkpointing."""


def call_is_watched() -> bool:
    """Tell whether PEFT's own forward is to serve a call, for something that follows modules or functions.

    Hooks on all modules, ``torch.func``, dual tensors, ``torch.jit.trace``, and modes that replace functions
    but for a default device, which is one too.
    """
    if is_compiling():  # Dynamo compiles anew where a length changes, and calls no backward hooks
        return _transforms() or len(_forward_hooks) > 0 or len(_forward_pre_hooks) > 0
    if _forward_hooks or _forward_pre_hooks or _backward_hooks or _backward_pre_hooks:
        return True
    if _transforms() or forward_ad._current_level >= 0 or _is_tracing():
        return True
    modes = _function_modes()
    return modes > 0 and any(type(_function_mode(i)) is not DeviceContext for i in range(modes))


def is_foreign(x: Any) -> bool:
    """Tell whether x is no tensor, or of a class with operators of its own (DTensor, fake tensors)."""
    kind = type(x)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return not isinstance(x, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def backward_is_watched() -> bool:
    """Tell whether a backward is to be made of torch's own operators.

    For a graph of its own (``create_graph=True``), a dispatch mode, ``is_grads_batched=True``, dual tensors.
    """
    if torch.is_grad_enabled() or dispatch_modes():
        return True
    return _transforms() or forward_ad._current_level >= 0
