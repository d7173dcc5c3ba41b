"""A LoRA layer as a chain of torch's own operators, for calls in which the GPU waits for the host.

Equation, with x viewed as ``(M, K)``::

    y = x Wᵀ + bias                y += s (x Aᵀ) Bᵀ

Three products forward, the last with the sum and the factor in its epilogue. The fused function
(``lora_linear.py``) asks less of the GPU, but it is Python, forward and backward, eager and as the operator
that ``torch.compile`` calls. The chain's backward is torch's own, in C++, and compiled it is inductor's
(``bench/NOTES.md``: what that costs the host, as far as measured). So small layers and small batches take the
chain: as long as the GPU is done first, its extra passes cost nothing. While a CUDA graph is recorded the
host does not count, and the fused function serves.

dA, dB and dx are rounded where torch rounds them, as in PEFT's layers; the eager chain can be differentiated
twice.
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


def chain_serves(x: Tensor, call: LoraCall) -> bool:
    """Tell whether the chain serves a layer's call: a small one, without dropout, in x's and W's dtype.

    Eager with gradients, the adapter must have that dtype too, or autocast be on (whose products round
    gradients as the chain does): else those of the fused function would be the more accurate.
    """
    if call.dropout_p != 0.0:
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and not torch.get_autocast_dtype(x.device.type) == x.dtype == call.weight.dtype:
        return False
    if not (torch.compiler.is_compiling() or _serves_eager(x, call, autocast)):
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return rows < lora_products._KERNEL_ROWS and rows * call.weight.numel() <= _MULTIPLICATIONS


def _serves_eager(x: Tensor, call: LoraCall, autocast: bool) -> bool:
    if x.device.type not in _EAGER_DEVICES or type(x) is not Tensor:
        return False
    one_dtype = call.lora_a.dtype == x.dtype == call.lora_b.dtype
    if not one_dtype and not autocast and torch.is_grad_enabled():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def chain(x: Tensor, call: LoraCall) -> Tensor:
    """Return the layer's output ``(..., N)`` in the dtype of x ``(..., K)``; torch differentiates it."""
    weight = call.weight.t() if call.transposed else call.weight
    bias = None if call.bias is None else cast(call.bias, x.dtype)
    lora_a, lora_b = cast(call.lora_a, x.dtype), cast(call.lora_b, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, weight, bias).addmm_(F.linear(flat, lora_a), lora_b.t(), alpha=call.scaling)
    return y.view(*x.shape[:-1], y.shape[1])
