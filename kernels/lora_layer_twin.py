"""LoRA layers that share their input, in plain torch: what ``lora_layer.py`` computes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_forward(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    lora_a: Tensor,
    scale: float,
    outs: Sequence[Tensor] | None = None,
    route: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return each ``y = x Wᵀ + bias + h Bᵀ`` and ``h = scale · x Aᵀ``; arguments as in ``lora_layer.py``."""
    del route  # there is one
    hidden = x @ lora_a.t() * scale
    own = hidden.split([lora_b.shape[1] for _, _, lora_b in layers], dim=1)
    ys = [
        x @ w.t() + h @ b.t() + (0 if bias is None else bias)
        for (w, bias, b), h in zip(layers, own, strict=True)
    ]
    return ys if outs is None else [out.copy_(y) for out, y in zip(outs, ys, strict=True)], hidden


def lora_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    lora_a: Tensor,
    lora_bs: Sequence[Tensor],
    scale: float,
    dtype: torch.dtype,
    dx: Tensor | None = None,
    route: str | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return dx, dA and each dB; arguments as in ``lora_layer.py``."""
    del route  # there is one
    own = hidden.split([lora_b.shape[1] for lora_b in lora_bs], dim=1)
    dh = torch.cat([dy @ lora_b * scale for dy, lora_b in zip(dys, lora_bs, strict=True)], dim=1)
    result = dh @ lora_a
    for dy, weight in zip(dys, weights, strict=True):
        result = result + dy @ weight
    result = result if dx is None else dx.copy_(result)
    dbs = [(dy.t() @ h).to(dtype) for dy, h in zip(dys, own, strict=True)]
    return result, (dh.t() @ x).to(dtype), dbs
