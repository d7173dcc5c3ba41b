"""LoRA layers' forward and backward on a GPU, by the route that the table gives (no autograd here).

Equation (``lora_linear_twin.py``), s the scaling::

    h  = s x Aᵀ       y  = x Wᵀ + bias + h Bᵀ
    dh = s dy B       dx = dy W + dh A       dA = dhᵀ x       dB = dyᵀ h

Layers that share x (q, k and v; gate and up) go together: one h, one dx, one dA; a single layer is a
group of one.

Routes: "cublas", one call a product, the sums in the epilogue of ``addmm_``; "products", each product by its
own route (``lora_gemm.py``, ``lora_skinny.py``); "overlap", the kernels of ``lora_overlap.py``. Which one,
``lora_routes.py`` says. Bytes moved, with b an element: "cublas" reads and writes each y, and dx, once more
than it must: 2 b M N a layer forward, 2 b M K for each product but the first backward.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .lora_gemm import gemm_cublas, lora_gemm, lora_gemm_sum
from .lora_overlap import backward_overlapped, forward_overlapped
from .lora_routes import CUBLAS, OVERLAP, PRODUCTS, layer_route
from .lora_skinny import mm_as, scaled_mm, skinny_da, skinny_dy, skinny_xa


def forward_cublas(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    lora_a: Tensor,
    scale: float,
    outs: Sequence[Tensor],
) -> Tensor:
    """Write each layer's y and return hidden: one cuBLAS call, and two a layer."""
    hidden = scaled_mm(x, lora_a.t(), scale)
    first = 0
    for (weight, bias, lora_b), out in zip(layers, outs, strict=True):
        r = lora_b.shape[1]
        gemm_cublas(((x, weight),), bias, hidden[:, first : first + r], lora_b, out)
        first += r
    return hidden


def backward_cublas(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    lora_a: Tensor,
    lora_bs: Sequence[Tensor],
    scale: float,
    dtype: torch.dtype,
    dx: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Write dx and return dA and each layer's dB: three cuBLAS calls a layer, and two."""
    dh = dys[0].new_empty(dys[0].shape[0], lora_a.shape[0])
    dbs, first = [], 0
    for dy, lora_b in zip(dys, lora_bs, strict=True):
        own = slice(first, first + lora_b.shape[1])
        dh[:, own].addmm_(dy, lora_b, beta=0.0, alpha=scale)
        dbs.append(mm_as(dy.t(), hidden[:, own], dtype))
        first = own.stop
    factors = [(dy, weight.t()) for dy, weight in zip(dys, weights, strict=True)]
    gemm_cublas(factors, None, dh, lora_a.t(), dx)
    return mm_as(dh.t(), x, dtype), dbs


def forward_products(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    lora_a: Tensor,
    scale: float,
    outs: Sequence[Tensor],
) -> Tensor:
    """As `forward_cublas`, each product by its own route."""
    hidden = skinny_xa(x, lora_a, scale)
    first = 0
    for (weight, bias, lora_b), out in zip(layers, outs, strict=True):
        r = lora_b.shape[1]
        lora_gemm(x, weight, bias, hidden[:, first : first + r], lora_b, out)
        first += r
    return hidden


def backward_products(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    lora_a: Tensor,
    lora_bs: Sequence[Tensor],
    scale: float,
    dtype: torch.dtype,
    dx: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """As `backward_cublas`, each product by its own route."""
    parts, dbs, first = [], [], 0
    for dy, lora_b in zip(dys, lora_bs, strict=True):
        part, db = skinny_dy(dy, hidden[:, first : first + lora_b.shape[1]], lora_b, scale, dtype)
        parts.append(part)
        dbs.append(db)
        first += lora_b.shape[1]
    dh = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    factors = [(dy, weight.t()) for dy, weight in zip(dys, weights, strict=True)]
    lora_gemm_sum(factors, None, dh, lora_a.t(), dx)
    return skinny_da(dh, x, dtype), dbs


# The overlapped ones return None where their kernels do not take the operands.
_FORWARD: dict[str, Callable[..., Tensor | None]] = {
    CUBLAS: forward_cublas,
    PRODUCTS: forward_products,
    OVERLAP: forward_overlapped,
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, list[Tensor]] | None]] = {
    CUBLAS: backward_cublas,
    PRODUCTS: backward_products,
    OVERLAP: backward_overlapped,
}


def lora_forward(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    lora_a: Tensor,
    scale: float,
    outs: Sequence[Tensor] | None = None,
    route: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return ``y = x Wᵀ + bias + h Bᵀ`` of each layer that reads x, and ``h = scale · x Aᵀ`` of all.

    Args:
        x: ``(M, K)``, on a GPU.
        layers: of each: weight ``(N, K)`` of any strides, bias ``(N,)`` or None, B ``(N, r)``; ``x``'s dtype.
        lora_a: ``(Σr, K)``, the layers' A one below the other, ``x``'s dtype.
        scale: the scaling of the LoRA term.
        outs: ``(M, N)`` a layer, where y goes; None allocates.
        route: "cublas", "products" or "overlap"; None asks the table.

    Returns:
        the ys ``(M, N)`` and h ``(M, Σr)``, in ``x``'s dtype.
    """
    if outs is None:
        outs = [x.new_empty(x.shape[0], weight.shape[0]) for weight, _, _ in layers]
    r = lora_a.shape[0]
    if route is None:
        route = layer_route("forward", x, sum(weight.shape[0] for weight, _, _ in layers), x.shape[1], r)
    hidden = _FORWARD[route](x, layers, lora_a, scale, outs)
    if hidden is None:
        hidden = forward_cublas(x, layers, lora_a, scale, outs)
    return list(outs), hidden


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
    """Return ``dx = Σ dy W + dh A``, ``dA = dhᵀ x`` and each ``dB = dyᵀ h``, with ``dh = scale · dy B``.

    Args:
        dys: ``(M, N)`` of each layer, on a GPU, ``x``'s dtype.
        x: ``(M, K)``.
        weights: ``(N, K)`` of each layer, any strides but all of one orientation.
        hidden: ``(M, Σr)``, forward's h.
        lora_a: ``(Σr, K)``, the layers' A one below the other.
        lora_bs: ``(N, r)`` of each layer.
        scale: the scaling of the LoRA term.
        dtype: dtype of dA and dB: accumulated in fp32, rounded once.
        dx: ``(M, K)``, where dx goes; None allocates.
        route: as for `lora_forward`.

    Returns:
        dx ``(M, K)`` in ``x``'s dtype, dA ``(Σr, K)`` and each dB ``(N, r)`` in ``dtype``.
    """
    n, k, r = sum(weight.shape[0] for weight in weights), x.shape[1], lora_a.shape[0]
    if dx is None:
        dx = x.new_empty(x.shape[0], k)
    if route is None:
        route = layer_route("backward", x, n, k, r)
    operands = (dys, x, weights, hidden, lora_a, lora_bs, scale, dtype, dx)
    da, dbs = _BACKWARD[route](*operands) or backward_cublas(*operands)
    return dx, da, dbs
