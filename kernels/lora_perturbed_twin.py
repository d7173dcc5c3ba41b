"""LoRA layer under several posterior samples at once, in plain torch: specification, oracle and CPU path.

Equation, for G groups of rows (the sequences of a batch), each with a sample of its own::

    A_g = A + σ_A ⊙ z(seed_g, stream_A, draw_g)          (r, K)
    B_g = B + σ_B ⊙ z(seed_g, stream_B, draw_g)          (N, r)
    y_g = x_g Wᵀ + bias + s · drop(x_g) A_gᵀ B_gᵀ

z is the noise contract's (``noise.py``), its element the index in the row-major A or B; each sample is
rounded once, to x's dtype, as a sample written into the weights would be. So a batch in which every
sequence has its own sample gives what one pass a sample would, ``G`` times.

Papers: Shen et al., "Variational learning is effective for large deep networks" (ICML 2024), for the
Gaussian over weights; Graves, "Practical variational inference for neural networks" (NeurIPS 2011), for the
gradient of its standard deviation, ``dσ = dθ ⊙ z``.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .lora_linear_twin import dropout
from .noise_twin import randn


class Perturbation(NamedTuple):
    """The Gaussian around a layer's A and B, and which sample of it each group of rows takes."""

    a_std: Tensor
    """``(r, K)``, standard deviation of A, any floating dtype."""
    b_std: Tensor
    """``(N, r)``, standard deviation of B."""
    seeds: Tensor
    """``(G,)`` int64, the 64-bit name of each group's sample."""
    draws: Tensor
    """``(G,)`` int64, the draw count of each group's sample (0 for a named posterior sample)."""
    a_stream: int
    """Noise stream of A."""
    b_stream: int
    """Noise stream of B."""


def sample_factors(
    mean: Tensor, std: Tensor, seeds: Tensor, draws: Tensor, stream: int, dtype: torch.dtype
) -> Tensor:
    """Return ``mean + std ⊙ z`` of each group, rounded once.

    Args:
        mean: A or B, any shape; computed in fp32 (in fp64 where ``dtype`` is that).
        std: ``mean``'s shape.
        seeds: ``(G,)`` int64.
        draws: ``(G,)`` int64.
        stream: the tensor's noise stream.
        dtype: of the result.

    Returns:
        ``(G, *mean.shape)``.
    """
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    noise = [
        randn(mean.numel(), seed=seed, draw=draw, stream=stream, device=mean.device)
        for seed, draw in zip(seeds.tolist(), draws.tolist(), strict=True)
    ]
    z = torch.stack(noise).view(-1, *mean.shape).to(inside)
    return (mean.to(inside) + std.to(inside) * z).to(dtype)


def perturbed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    perturbation: Perturbation,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Apply the layer, one torch operation a term; differentiable by torch itself, in x, A, B and both σ.

    Args:
        x: ``(G·b, ..., K)``: the first dimension is cut into G equal groups of rows.
        weight: ``(N, K)``, ``x``'s dtype.
        bias: ``(N,)`` or None, ``x``'s dtype.
        lora_a: ``(r, K)``, any floating dtype.
        lora_b: ``(N, r)``, any floating dtype.
        scaling: the factor s of the LoRA term.
        perturbation: the standard deviations and the samples.
        dropout_p: probability of dropping an element of the LoRA term's input, in [0, 1).
        seed: int64 scalar, the key of the dropout mask; needed where ``dropout_p`` is not 0.

    Returns:
        ``(G·b, ..., N)``, ``x``'s dtype.
    """
    p = perturbation
    a = sample_factors(lora_a, p.a_std, p.seeds, p.draws, p.a_stream, x.dtype)
    b = sample_factors(lora_b, p.b_std, p.seeds, p.draws, p.b_stream, x.dtype)
    if dropout_p == 0.0:
        dropped = x
    elif seed is not None:
        dropped = dropout(x, dropout_p, seed)
    else:
        raise ValueError(f"seed is None with dropout_p={dropout_p}; pass an int64 scalar tensor")
    groups = dropped.reshape(len(p.seeds), -1, x.shape[-1])
    lora = (groups @ a.mT) @ b.mT * scaling
    return F.linear(x, weight, bias) + lora.reshape(*x.shape[:-1], weight.shape[0])
