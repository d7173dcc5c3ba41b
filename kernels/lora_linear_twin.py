"""LoRA linear layer in plain torch: the specification of the fused one, its oracle, and its CPU path.

Equation (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022)::

    y       = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ
    drop(x) = x · keep / (1 - p)
    keep    = word(m·K + k) >= min(round(p · 2^32), 2^32 - 1)          element (m, k) of x viewed as (M, K)

``word`` is the Philox word of the noise contract (``noise.py``) with the layer call's own 64-bit seed as
the key and draw = stream = 0: the mask is a pure function of (seed, m·K + k), independent of device,
dtype, memory format and launch grid, and is drawn again wherever it is needed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .noise_twin import random_words


def keep_threshold(p: float) -> int:
    """Return the smallest Philox word that keeps its element: ``round(p·2^32)``, at most ``2^32 - 1``."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return ``x · keep / (1 - p)``, with zeros (not NaN · 0) where elements are dropped.

    Args:
        x: ``(M, K)``, or any shape whose row-major order is that of ``(M, K)``; any floating dtype.
        p: probability of dropping an element, in [0, 1).
        seed: int64 scalar, the key of the mask.

    Returns:
        A contiguous tensor of ``x``'s shape and dtype; the product is rounded once.
    """
    words = random_words(x.numel(), seed=int(seed), draw=0, stream=0, device=x.device).view(x.shape)
    return torch.where(words >= keep_threshold(p), x * (1.0 / (1.0 - p)), 0.0)


def dropout_add_(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Add ``x · keep / (1 - p)`` to ``out`` in place and return it; arguments as for `dropout`."""
    return out.add_(dropout(x, p, seed))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Apply the layer, one torch operation a term; differentiable by torch itself, as often as wanted.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``, ``x``'s dtype.
        bias: ``(N,)`` or None, ``x``'s dtype.
        lora_a: ``(r, K)``, any floating dtype; cast to ``x``'s.
        lora_b: ``(N, r)``, any floating dtype; cast to ``x``'s.
        scaling: the factor s of the LoRA term.
        dropout_p: probability of dropping an element of the LoRA term's input, in [0, 1).
        seed: int64 scalar, the key of the mask; needed where ``dropout_p`` is not 0.

    Returns:
        ``(..., N)``, ``x``'s dtype.
    """
    if dropout_p == 0.0:
        dropped = x
    elif seed is not None:
        dropped = dropout(x, dropout_p, seed)
    else:
        raise ValueError(f"seed is None with dropout_p={dropout_p}; pass an int64 scalar tensor")
    hidden = F.linear(dropped, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + F.linear(hidden, lora_b.to(x.dtype)) * scaling
