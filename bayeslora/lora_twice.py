"""The gradients of a LoRA term in torch's own operators, which a second derivative, or a mode, can follow.

Equation, with x ``(..., M, K)``, A ``(..., r, K)``, B ``(..., N, r)``, d = drop(x)::

    y = s d Aᵀ Bᵀ      h = s d Aᵀ      dh = s dy B
    dx = drop'(dh A)   dA = dhᵀ d      dB = dyᵀ h

The backward of every fused function is this where `lora_watched.backward_is_watched` says so. It is made of
the tensors that forward was given, through which torch comes to what they depend on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lora_products import cast, dropout_ops


def masked(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return `dropout_ops`' dropout of x; x itself without a seed."""
    if seed is None:
        return x
    ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    return torch.where(dropout_ops(x).dropout(ones, p, seed) != 0, x * (1.0 / (1.0 - p)), 0.0)


def lora_gradients(
    dy: Tensor,
    x: Tensor | None,
    hidden: Tensor | None,
    adapter: Sequence[Tensor | None],
    dtypes: tuple[torch.dtype, torch.dtype],
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx in dy's dtype, dA and dB, each where it is needed.

    Args:
        dy: ``(..., M, N)``.
        x: ``(..., M, K)``, in dy's dtype; None where A is frozen.
        hidden: h, read where x is None: as an output of the forward it leads to x, too.
        adapter: A and B, any floating dtype; each may be None where no needed gradient depends on it.
        dtypes: of dA and dB.
        scaling: s.
        dropout_p: probability of dropping an element.
        seed: of the mask; None without dropout.
        needs: whether dx, dA and dB are needed.
    """
    needs_x, needs_a, needs_b = needs
    dx = da = db = None
    factors: list[Any] = [None if part is None else cast(part, dy.dtype) for part in adapter]
    lora_a, lora_b = factors
    d: Any = None if x is None else masked(x, dropout_p, seed)
    h: Any = hidden
    if needs_x or needs_a:
        dh = (dy @ lora_b) * scaling
        if needs_x:
            dx = masked(dh @ lora_a, dropout_p, seed)
        if needs_a:
            da = cast(dh.mT @ d, dtypes[0])
    if needs_b:
        if d is not None and torch.is_grad_enabled():
            h = (d @ lora_a.mT) * scaling
        db = cast(dy.mT @ h, dtypes[1])
    return dx, da, db


class _Once(torch.autograd.Function):
    """See `once`."""

    @staticmethod
    def forward(ctx: Any, what: str, gradient: Tensor, *_sources: Tensor) -> Tensor:  # type: ignore[override]
        ctx.what = what
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(f"{ctx.what} cannot be differentiated twice")


def once(what: str, gradient: Tensor, sources: Iterable[Tensor | None]) -> Tensor:
    """Return a gradient that was made without a graph, so that to differentiate it is an error.

    Args:
        what: is differentiated, for the message.
        gradient: any tensor.
        sources: what it depends on. Each leads to the error, where torch would else find a zero.
    """
    if not torch.is_grad_enabled():
        return gradient
    return _Once.apply(what, gradient, *[source for source in sources if source is not None])
