"""A LoRA layer as a chain of torch's own operators, for calls in which the GPU waits for the host.

Equation, with x viewed as ``(M, K)``::

    y = x Wᵀ + bias                y += s (x Aᵀ) Bᵀ

Three products, the last with the sum and the factor in its epilogue. It serves where the fused function
(``lora_linear.py``), which asks less of the GPU, has nothing to give back for being Python: calls without
gradients (decoding, evaluation) and compiled calls, which inductor sees through and differentiates, both only
as long as the layer and the batch are so small that the GPU is done first and the extra passes cost nothing.
While a CUDA graph is recorded the host does not count, and the fused function serves. Eager training is the
function's: there the chain's backward in C++ saved no time (``bench/NOTES.md``), and it rounds dA and dB to
x's dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import lora_products
from .lora_group import LoraCall
from .lora_products import cast

_EAGER_DEVICES = frozenset({"cuda"})
_MULTIPLICATIONS = 2**36
"""M N K up to which the host is taken to be the slower: 0.6 ms for an H100's base, forward + backward."""


def chain_serves(x: Tensor, call: LoraCall, compiling: bool) -> bool:
    """Tell whether the chain serves a call: a small one, compiled or without gradients, no dropout.

    Under autocast only where that is the dtype of x and W.
    """
    if not compiling and torch.is_grad_enabled():
        return False  # eager training, where this question costs too
    if call.dropout_p != 0.0 or not (compiling or _serves_eager(x)):
        return False
    if not call.dtype == x.dtype == call.weight.dtype:  # autocast's is another
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return rows < lora_products._KERNEL_ROWS and rows * call.weight.numel() <= _MULTIPLICATIONS


def _serves_eager(x: Tensor) -> bool:
    if x.device.type not in _EAGER_DEVICES or type(x) is not Tensor:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def plain(x: Tensor, call: LoraCall) -> Tensor:
    """Return the output as PEFT makes it, for a mode that follows operators.

    Selective checkpointing keeps what operators return, and runs none again that it has kept: none may write
    into memory that it is given, and no kernel pass it by.
    """
    weight = call.weight.t() if call.transposed else call.weight
    x, bias = cast(x, call.dtype), None if call.bias is None else cast(call.bias, call.dtype)
    base = F.linear(x, cast(weight, call.dtype), bias)
    return added(base, x, call.lora_a, call.lora_b, call.scaling, call.dropout_p)


def added(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    """Return ``base + s drop(x) Aᵀ Bᵀ`` for `plain`, dropout being torch's own."""
    x = F.dropout(x, dropout_p)
    return base + F.linear(F.linear(x, cast(lora_a, x.dtype)), cast(lora_b, x.dtype)) * scaling


def chain(x: Tensor, call: LoraCall) -> Tensor:
    """Return the output ``(..., N)`` of x ``(..., K)``, in its dtype; torch differentiates it, also twice."""
    weight = call.weight.t() if call.transposed else call.weight
    bias = None if call.bias is None else cast(call.bias, x.dtype)
    lora_a, lora_b = cast(call.lora_a, x.dtype), cast(call.lora_b, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, weight, bias).addmm_(F.linear(flat, lora_a), lora_b.t(), alpha=call.scaling)
    return y.view(*x.shape[:-1], y.shape[1])
