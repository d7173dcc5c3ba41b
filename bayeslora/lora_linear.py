"""The LoRA linear layer as one autograd function with a fused forward and backward.

Equation, with x viewed as ``(M, K)``, W ``(N, K)`` frozen, A ``(r, K)``, B ``(N, r)``, d = drop(x)
(``kernels/lora_linear_twin.py`` defines ``drop`` and is the plain-torch twin of the whole layer)::

    h  = s d Aᵀ                y  = x Wᵀ + bias + h Bᵀ
    dh = s dy B                dx = dy W + drop'(dh A)
    dA = dhᵀ d                 dB = dyᵀ h

Saved for backward: x and h ``(M, r)``; the mask is drawn again from the call's seed. The products are
cuBLAS's: three in forward and five in backward, with s in the epilogue of the two skinny ones and both
sums in the epilogue of a product or in the dropout kernel. Beyond the base layer's own traffic forward
moves ``M K + 2 M N`` elements (x read for h, y read and written) and backward ``3 M K + 2 M N``.

Everything runs in x's dtype, or in autocast's where that is on; gradients of A and B come back in their
own dtypes, accumulated in fp32.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kernels import lora_linear_twin

_HAS_TRITON = find_spec("triton") is not None
_HALF = (torch.bfloat16, torch.float16)
_SEED_RANGE = 2**63 - 1


def _backend(x: Tensor) -> ModuleType:
    """Return the module that draws dropout: Triton on a GPU; the twin elsewhere, and for fp64."""
    if x.is_cuda and x.dtype != torch.float64 and _HAS_TRITON:
        from .kernels import lora_linear

        return lora_linear
    return lora_linear_twin


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)`` without the call where there is nothing to do: this is host-bound code."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``scaling · a b`` in one launch, rounded once."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0.0, alpha=scaling)


def _mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a b`` in ``dtype``; a half-precision product goes to fp32 unrounded where cuBLAS can."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in _HALF:
        return torch.mm(a, b, out_dtype=dtype)
    return _cast(torch.mm(a, b), dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y ``(..., N)``, x as ``(M, K)`` and h ``(M, r)``, all in ``dtype``."""
    flat = _cast(x, dtype).reshape(-1, x.shape[-1])
    dropped = flat if seed is None else _backend(flat).dropout(flat, dropout_p, seed)
    hidden = _scaled_mm(dropped, _cast(lora_a, dtype).t(), scaling)
    y = flat.new_empty(*x.shape[:-1], weight.shape[0])
    rows = y.view(-1, weight.shape[0])  # y itself must not be a view: callers may change it in place
    if bias is None:
        torch.mm(flat, _cast(weight, dtype).t(), out=rows)
    else:
        torch.addmm(_cast(bias, dtype), flat, _cast(weight, dtype).t(), out=rows)
    rows.addmm_(hidden, _cast(lora_b, dtype).t())
    return y, flat, hidden


class LoRALinearFunction(torch.autograd.Function):
    """`lora_linear` after its checks; ``dtype`` is the one everything is computed in."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Compute y and keep what backward needs."""
        y, flat, hidden = _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, dtype)
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        # A and B themselves are saved, not their casts, so that autograd sees them change in place.
        ctx.save_for_backward(
            flat if needs_a else None,
            weight if needs_x else None,
            lora_a if needs_x else None,
            lora_b if needs_x or needs_a else None,
            hidden if needs_b else None,
            seed,
        )
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.x_shape, ctx.x_dtype, ctx.a_dtype, ctx.b_dtype = x.shape, x.dtype, lora_a.dtype, lora_b.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, A and B, each only where it is needed."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            with torch.no_grad():
                gradients = _backward(ctx, dy)
            return _DifferentiableOnce.apply(dy.new_empty(0).requires_grad_(), *gradients)
        return _backward(ctx, dy)


class _DifferentiableOnce(torch.autograd.Function):
    """Pass gradients on, and raise where someone differentiates through them.

    ``once_differentiable`` would say so only where dy requires a gradient, and else leave out without a
    word that dx depends on A and B.
    """

    @staticmethod
    def forward(_ctx: Any, _source: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            "the fused LoRA layer cannot be differentiated twice; "
            "use PEFT's own layers for second derivatives: bayeslora.unpatch(model)"
        )


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_autocast_enabled(dy.device.type):  # every dtype was settled in forward
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy)
    return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    flat, weight, lora_a, lora_b, hidden, seed = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    dx = da = db = None
    dtype = dy.dtype
    dy = dy.reshape(-1, dy.shape[-1])
    if needs_b:
        db = _mm_as(dy.t(), hidden, ctx.b_dtype)
    if needs_x or needs_a:
        dh = _scaled_mm(dy, _cast(lora_b, dtype), ctx.scaling)
    if needs_a:
        dropped = flat if seed is None else _backend(flat).dropout(flat, ctx.dropout_p, seed)
        da = _mm_as(dh.t(), dropped, ctx.a_dtype)
    if needs_x:
        dx = torch.mm(dy, _cast(weight, dtype))
        if seed is None:
            dx.addmm_(dh, _cast(lora_a, dtype))
        else:
            _backend(dx).dropout_add_(dx, torch.mm(dh, _cast(lora_a, dtype)), ctx.dropout_p, seed)
        dx = _cast(dx, ctx.x_dtype).view(ctx.x_shape)
    return dx, None, None, da, db, None, None, None, None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}; cast one of them, or call under torch.autocast"
        )
    return x.dtype


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last size must be {k}, weight's {(n, k)}")
    r = lora_a.shape[0]
    if lora_a.shape != (r, k):
        raise ValueError(f"lora_a has shape {tuple(lora_a.shape)}; pass (r, {k}) for a weight of {(n, k)}")
    if lora_b.shape != (n, r):
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; pass {(n, r)}, after lora_a's r = {r}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; pass {(n,)} for a weight of {(n, k)}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight or bias requires a gradient; freeze it with requires_grad_(False)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; pass a probability in [0, 1)")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device):
        raise ValueError(
            f"seed is a {seed.dtype} tensor of shape {tuple(seed.shape)} on {seed.device}; "
            f"pass an int64 scalar tensor on {x.device}, or None"
        )


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
    """Return ``x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ``, differentiable once in x, A and B.

    Args:
        x: ``(..., K)``, fp32, bf16, fp16 or fp64; any strides, may be empty.
        weight: ``(N, K)``, frozen, ``x``'s dtype (any under autocast); may be a transposed view.
        bias: ``(N,)``, frozen, or None.
        lora_a: ``(r, K)``, any floating dtype; cast to the dtype of the computation.
        lora_b: ``(N, r)``, likewise.
        scaling: the factor of the LoRA term, ``lora_alpha / r`` as a rule.
        dropout_p: probability of dropping an element of the LoRA term's input, in [0, 1).
        seed: int64 scalar tensor on ``x``'s device that names the mask. None draws one from the device's
            own generator, so that ``torch.manual_seed`` governs it, gradient checkpointing recomputes with
            the same mask, and a replayed CUDA graph draws fresh ones.

    Returns:
        ``(..., N)``, in ``x``'s dtype or autocast's.

    Raises:
        ValueError: a shape does not fit, ``weight`` or ``bias`` requires a gradient, ``dropout_p`` is
            outside [0, 1), or ``seed`` is not an int64 scalar on ``x``'s device.
        TypeError: ``x`` and ``weight`` differ in dtype and autocast is off.
    """
    _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    dtype = _compute_dtype(x, weight)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(_SEED_RANGE, (), device=x.device)
    if torch.is_grad_enabled():
        return LoRALinearFunction.apply(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, dtype)
    return _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, dtype)[0]
