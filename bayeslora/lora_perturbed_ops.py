"""The LoRA linear layer under several posterior samples as an operator that ``torch.compile`` keeps whole.

For inference: it has no gradient. Eager code calls ``lora_perturbed.perturbed_layer``, which this is.
"""

import torch
from torch import Tensor

from .kernels.lora_perturbed_twin import Perturbation
from .lora_linear import LoraWeights
from .lora_perturbed import perturbed_layer
from .operators import operator


@operator("perturbed_lora_linear")
def perturbed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    a_std: Tensor,
    b_std: Tensor,
    seeds: Tensor,
    draws: Tensor,
    a_stream: int,
    b_stream: int,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return y ``(..., N)`` in ``dtype``; arguments as for `perturbed_layer`, without dropout."""
    layer = LoraWeights(weight, bias, lora_a, lora_b)
    perturbation = Perturbation(a_std, b_std, seeds, draws, a_stream, b_stream)
    return perturbed_layer(x, layer, scaling, perturbation, 0.0, None, dtype)


@torch.library.register_fake("bayeslora::perturbed_lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    a_std: Tensor,
    b_std: Tensor,
    seeds: Tensor,
    draws: Tensor,
    a_stream: int,
    b_stream: int,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
