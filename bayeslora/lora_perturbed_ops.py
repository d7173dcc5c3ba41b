"""A LoRA linear layer in a graph of ``torch.compile`` while samples share a pass, as one operator.

Which samples, and whether this thread is in a pass at all, is asked when the graph runs: a graph holds no
sample, and serves every number of them. For inference: it has no gradient.
"""

import torch
from torch import Tensor

from .lora_linear import apply_layers
from .lora_samples import current_pass
from .operators import operator


# In a CUDA graph it would replay the samples that were there at the recording.
@operator("sampled_lora_linear", tags=(torch.Tag.cudagraph_unsafe,))
def sampled_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return y ``(..., N)`` in ``dtype``: with the samples of this thread's pass, else with A and B."""
    own = current_pass()
    layer = None if own is None else own.by_address.get((lora_a.data_ptr(), lora_b.data_ptr()))
    if own is None or layer is None:
        return apply_layers(x, ((weight, bias, lora_a, lora_b),), scaling, dtype=dtype)[0]
    return own.output(layer, x, weight, bias, scaling, dtype)


@torch.library.register_fake("bayeslora::sampled_lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
