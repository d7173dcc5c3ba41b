"""A LoRA layer as a chain of torch's own operators, for eager calls in which the GPU waits for the host.

Equation, with x viewed as ``(M, K)``::

    y = x Wᵀ + bias                y += s (x Aᵀ) Bᵀ

Three products forward, the last with the sum and the factor in its epilogue. The fused function
(``lora_linear.py``) asks less of the GPU, but it is Python, forward and backward; this chain's backward is
torch's own, in C++, and costs the host a third less than the fused function's (``bench/NOTES.md``). So small
layers and small batches take the chain: as long as the GPU is done first, its extra passes cost nothing.
While a CUDA graph is recorded, and under ``torch.compile``, the host does not count, and the fused function
serves.

dA, dB and dx are rounded where torch rounds them, as in PEFT's layers; the chain can be differentiated
twice.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import lora_products
from .lora_group import LoraCall

_DEVICES = frozenset({"cuda"})
_MULTIPLICATIONS = 2**36
"""M N K up to which the host is taken to be the slower: 0.6 ms for an H100's base, forward + backward."""


def waits_for_the_host(x: Tensor, call: LoraCall) -> bool:
    """Tell whether the chain serves a layer's call: a small one, eager, without dropout, all of one dtype."""
    if torch.compiler.is_compiling():  # first: what follows would be guards on the shape
        return False
    if call.dropout_p != 0.0 or x.device.type not in _DEVICES or type(x) is not Tensor:
        return False
    weight, bias, lora_a, lora_b = call[:4]
    dtype = x.dtype
    if lora_a.dtype != dtype or lora_b.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    if rows >= lora_products._KERNEL_ROWS or rows * weight.numel() > _MULTIPLICATIONS:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def chain(x: Tensor, call: LoraCall) -> Tensor:
    """Return the layer's output ``(..., N)`` from x ``(..., K)``, all of one dtype; torch differentiates."""
    weight = call.weight.t() if call.transposed else call.weight
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, weight, call.bias)
    y.addmm_(F.linear(flat, call.lora_a), call.lora_b.t(), alpha=call.scaling)
    return y.view(*x.shape[:-1], y.shape[1])
