"""The base product and the LoRA product as one operation, in plain torch: what ``lora_gemm.py`` computes."""

from collections.abc import Sequence

from torch import Tensor


def lora_gemm_sum(
    factors: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``Σᵢ xᵢ Wᵢᵀ + bias + hidden Bᵀ``; ``factors`` are pairs ``(M, Kᵢ)`` and ``(N, Kᵢ)``."""
    result = sum((x @ weight.t() for x, weight in factors), hidden @ lora_b.t())
    result = result if bias is None else result + bias
    return result if out is None else out.copy_(result)


def lora_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + hidden Bᵀ``; with ``weight.t()`` and ``lora_a.t()``, ``dy W + dh A``.

    Args:
        x: ``(M, K)``.
        weight: ``(N, K)``, any strides.
        bias: ``(N,)`` or None.
        hidden: ``(M, r)``, the scaling already in it.
        lora_b: ``(N, r)``, any strides.
        out: ``(M, N)``, where to write; None allocates.
    """
    return lora_gemm_sum(((x, weight),), bias, hidden, lora_b, out)
