"""The skinny products of a LoRA layer in plain torch: what ``lora_skinny.py`` computes in fewer passes."""

import torch
from torch import Tensor


def skinny_xa(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return ``scale · x Aᵀ``, ``(M, r)``, for x ``(M, K)`` and A ``(r, K)``."""
    return x @ a.t() * scale


def skinny_dy(
    dy: Tensor, hidden: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``scale · dy B`` ``(M, r)`` and ``dyᵀ hidden`` ``(N, r)``, the second in ``dtype``.

    Args:
        dy: ``(M, N)``.
        hidden: ``(M, r)``, with the scaling in it.
        lora_b: ``(N, r)``.
        scale: factor of the first result.
        dtype: of the second result.
    """
    return dy @ lora_b * scale, (dy.t() @ hidden).to(dtype)


def skinny_da(dh: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``dhᵀ x``, ``(r, K)``, in ``dtype``, for dh ``(M, r)`` and x ``(M, K)``."""
    return (dh.t() @ x).to(dtype)
