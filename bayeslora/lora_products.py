"""The matrix products of a LoRA layer: the one place that decides which implementation runs each of them.

Everything here takes 2-D tensors of one dtype on one device, records no gradients and makes no decision
about autograd; ``lora_passes.py`` is made of these. Each is cuBLAS's, with the scaling or the sum in the
product's epilogue, but for layers (and groups of layers) whose shape was measured to be faster with the
project's own kernels: `kernel_route` says which, and ``kernels/lora_layer.py`` runs them whole.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._backend import uses_triton
from .kernels import lora_linear_twin

_unsafe_view = torch.ops.aten._unsafe_view.default
_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)
_KERNEL_ROWS = 4096  # below, a launch of ours costs the host more than it saves the GPU (bench/NOTES.md)
_CAPTURED_ROWS = 1024  # the same in a CUDA graph, where the host does not count


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)`` without the call where there is nothing to do: this is host-bound code."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def copy_cast(outs: list[Tensor], sources: list[Tensor]) -> None:
    """Write every source into its out, contiguous and of its size, in the out's dtype: as a rule one launch.

    torch's launch takes a block for 65,536 elements, one or two a matrix of an adapter, and ours costs the
    host more: it serves while a CUDA graph is recorded.
    """
    if uses_triton(outs[0].device) and torch.cuda.is_current_stream_capturing():
        from .kernels import lora_casts

        few = len(outs) <= lora_casts.MOST
        if few and all(type(source) in _PLAIN and source.is_contiguous() for source in sources):
            return lora_casts.copy_cast(outs, sources)
    torch._foreach_copy_(outs, sources)


def dropout_ops(x: Tensor) -> ModuleType:
    """Return the module that draws dropout for ``x``: Triton on a GPU; the twin elsewhere, and for fp64."""
    if uses_triton(x.device) and x.dtype != torch.float64:
        from .kernels import lora_linear

        return lora_linear
    return lora_linear_twin


def kernel_route(direction: str, x: Tensor, weights: Sequence[Tensor], r: int) -> str | None:
    """Return the route of ``kernels/lora_layer.py`` for layers that read x, or None for the products here.

    While a CUDA graph is recorded the routes count from fewer rows on, since a replay costs no host time.

    Args:
        direction: "forward" or "backward".
        x: ``(M, K)``.
        weights: ``(Nᵢ, K)`` of each layer.
        r: the layers' ranks together.
    """
    rows = x.shape[0]
    if rows < _CAPTURED_ROWS or x.dtype not in _HALF or not uses_triton(x.device):
        return None
    if rows < _KERNEL_ROWS and not torch.cuda.is_current_stream_capturing():
        return None
    from .kernels.lora_routes import CUBLAS, layer_route

    route = layer_route(direction, x, sum(weight.shape[0] for weight in weights), x.shape[1], r)
    return None if route == CUBLAS else route


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return ``s · left right``, rounded once, in one launch: h = s x Aᵀ, dh = s dy B."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0.0, alpha=scaling)


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x Wᵀ + bias``, ``(..., N)``, which is not a view, as autograd counts."""
    if bias is None or x.dim() == 2:
        return F.linear(x, weight, bias)
    # torch's own way from here gives a view
    return _unsafe_view(F.linear(x.view(-1, x.shape[-1]), weight, bias), (*x.shape[:-1], weight.shape[0]))


def base_plus_lora(
    x: Tensor, leading: Sequence[int], weight: Tensor, bias: Tensor | None, hidden: Tensor, lora_b: Tensor
) -> Tensor:
    """Return ``x Wᵀ + bias + h Bᵀ`` as ``(*leading, N)``, x being ``(M, K)``, in memory of its own.

    Not a view, as autograd counts: callers may change it in place. Records no gradients.
    """
    n = weight.shape[0]
    y = x.new_empty(*leading, n)
    flat = y if len(leading) == 1 else y.view(-1, n)
    if bias is None:
        torch.mm(x, weight.t(), out=flat)
    else:
        torch.addmm(bias, x, weight.t(), out=flat)
    flat.addmm_(hidden, lora_b.t())
    return y


def hidden_gradient(out: Tensor, dy: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Write ``dh = s dy B`` to ``out`` ``(M, r)``, which may have padded rows, and return it."""
    return out.addmm_(dy, lora_b, beta=0.0, alpha=scaling)


def tall_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``leftᵀ right``, a sum over M rows, in ``dtype``: dA = dhᵀ x and dB = dyᵀ h.

    A half-precision product goes to fp32 unrounded where cuBLAS can.
    """
    if left.is_cuda and dtype == torch.float32 and left.dtype in _HALF:
        return torch.mm(left.t(), right, out_dtype=dtype)
    return cast(torch.mm(left.t(), right), dtype)


def input_gradient(
    dys: Sequence[Tensor], weights: Sequence[Tensor], lora: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return ``Σ dyᵢ Wᵢ + dh A``, ``(M, K)``, each sum in the epilogue of a product.

    Args:
        dys: ``(M, Nᵢ)`` each, at least one.
        weights: ``(Nᵢ, K)`` each.
        lora: dh ``(M, R)`` and A ``(R, K)``, or None for the base's part alone.
    """
    dx = torch.mm(dys[0], weights[0])
    for i in range(1, len(dys)):
        dx.addmm_(dys[i], weights[i])
    return dx if lora is None else dx.addmm_(*lora)
