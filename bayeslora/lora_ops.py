"""The LoRA linear layer as operators that ``torch.compile`` keeps whole: no graph break, one node a layer.

``bayeslora::lora_linear`` and ``bayeslora::lora_linear_backward`` are ``forward`` and ``backward`` of
``lora_passes.py`` for one layer, with shapes for tracing and the one as the other's gradient. The same of
several layers that read one tensor, ``bayeslora::lora_linear_group`` and its ``_backward``, stand in graphs
that ``lora_graph_pass.py`` has gone over. There ``bayeslora::cast_adapters`` casts A and B of all layers, and
every operator gets its own as ``adapters``: A stacked, then each B, in the dtype of the computation.

Eager code does not come here: calling a registered operator costs more host time than the autograd function.
"""

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from .lora_passes import Adapters, Layer, LoraWeights, Needs, Saved, backward, cast_adapters, forward
from .lora_products import cast
from .lora_twice import lora_gradients
from .operators import operator


def _given(adapters: Sequence[Tensor] | None) -> Adapters | None:
    return None if adapters is None else (adapters[0], adapters[1:])


@operator(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
    "Tensor? seed, ScalarType dtype, Tensor[]? adapters) -> (Tensor, Tensor)",
)
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    adapters: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return y ``(..., N)`` and h ``(M, r)``, in ``dtype``."""
    layer = LoraWeights(weight, bias, lora_a, lora_b)
    x = cast(x, dtype).contiguous()
    (y,), hidden, _, _ = forward(x, (layer,), scaling, dropout_p, seed, dtype, _given(adapters))
    return y, hidden


@torch.library.register_fake("bayeslora::lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    adapters: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    y = x.new_empty(*leading, weight.shape[0], dtype=dtype)
    return y, x.new_empty(math.prod(leading), lora_a.shape[0], dtype=dtype)


@operator(
    "lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor hidden, float scaling, "
    "float dropout_p, Tensor? seed, bool needs_x, bool needs_a, bool needs_b, Tensor[]? adapters) "
    "-> (Tensor, Tensor, Tensor)",
)
def _lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
    adapters: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dA and dB; an empty tensor for each that is not needed."""
    dtype = dy.dtype
    flat = cast(x, dtype).reshape(-1, x.shape[-1])
    both = _given(adapters) or cast_adapters([lora_a], [lora_b], dtype)
    saved = Saved(flat, hidden, seed, *both, [weight])
    needs = Needs(needs_x, [needs_a], [needs_b])
    dtypes = [(lora_a.dtype, lora_b.dtype)]
    with torch.autocast(dy.device.type, enabled=False):
        dx, (da,), (db,) = backward([dy], saved, needs, dtypes, scaling, dropout_p)
    return (
        x.new_empty(0) if dx is None else cast(dx, x.dtype).view(x.shape),
        lora_a.new_empty(0) if da is None else da,
        lora_b.new_empty(0) if db is None else db,
    )


@torch.library.register_fake("bayeslora::lora_linear_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
    adapters: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((x, needs_x), (lora_a, needs_a), (lora_b, needs_b))
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in wanted)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, scaling, dropout_p, seed, *_ = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], seed)
    ctx.set_materialize_grads(False)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p


def _backward(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, weight, lora_a, lora_b, hidden, seed = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph=True, by a backend that leaves the backward to torch
        return _followed_backward(ctx, dy, (needs_x, needs_a, needs_b))
    dx, da, db = _lora_linear_backward(
        dy,
        x,
        weight,
        lora_a,
        lora_b,
        hidden,
        ctx.scaling,
        ctx.dropout_p,
        seed,
        needs_x,
        needs_a,
        needs_b,
        None,
    )
    gradients = (dx if needs_x else None, None, None, da if needs_a else None, db if needs_b else None)
    return *gradients, None, None, None, None, None


def _followed_backward(ctx: Any, dy: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, _, seed = ctx.saved_tensors
    with torch.autocast(dy.device.type, enabled=False):
        flat = cast(x, dy.dtype).reshape(-1, x.shape[-1])
        flat_dy, dtypes = dy.reshape(-1, dy.shape[-1]), (lora_a.dtype, lora_b.dtype)
        dx, da, db = lora_gradients(
            flat_dy, flat, None, (lora_a, lora_b), dtypes, ctx.scaling, ctx.dropout_p, seed, needs
        )
        if dx is not None:
            dx = cast(dx + flat_dy @ cast(weight, dy.dtype), x.dtype).view(x.shape)
    return dx, None, None, da, db, None, None, None, None, None


torch.library.register_autograd("bayeslora::lora_linear", _backward, setup_context=_setup_context)


@operator(
    "lora_linear_group",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_as, Tensor[] lora_bs, "
    "float scaling, ScalarType dtype, Tensor[]? adapters) -> Tensor[]",
)
def _lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float,
    dtype: torch.dtype,
    adapters: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Return every layer's y as `_lora_linear` without dropout, then their h side by side ``(M, Σr)``."""
    layers = [LoraWeights(*parts) for parts in zip(weights, biases, lora_as, lora_bs, strict=True)]
    x = cast(x, dtype).contiguous()
    ys, hidden, _, _ = forward(x, layers, scaling, 0.0, None, dtype, _given(adapters))
    return [*ys, hidden]


@torch.library.register_fake("bayeslora::lora_linear_group")
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float,
    dtype: torch.dtype,
    adapters: Sequence[Tensor] | None,
) -> list[Tensor]:
    leading = x.shape[:-1]
    ys = [x.new_empty(*leading, weight.shape[0], dtype=dtype) for weight in weights]
    ranks = sum(lora_a.shape[0] for lora_a in lora_as)
    return [*ys, x.new_empty(math.prod(leading), ranks, dtype=dtype)]


@operator(
    "lora_linear_group_backward",
    "(Tensor[] dys, Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] hidden, "
    "float scaling, bool needs_x, Tensor[]? adapters) -> Tensor[]",
)
def _lora_linear_group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hidden: Sequence[Tensor],
    scaling: float,
    needs_x: bool,
    adapters: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Return dx (empty where it is not needed), summed over the layers; dA ``(Σr, K)``; every dB.

    The layers' A have one dtype. ``hidden`` are the forward's columns; apart in memory, they are copied.
    """
    dtype, wanted = dys[0].dtype, [True] * len(dys)
    flat = cast(x, dtype).reshape(-1, x.shape[-1])
    both = _given(adapters) or cast_adapters(lora_as, lora_bs, dtype)
    saved = Saved(flat, _joined(hidden, 1), None, *both, weights)
    dtypes = [(a.dtype, b.dtype) for a, b in zip(lora_as, lora_bs, strict=True)]
    with torch.autocast(dys[0].device.type, enabled=False):
        dx, das, dbs = backward(dys, saved, Needs(needs_x, wanted, wanted), dtypes, scaling, 0.0)
    gradients = [_apart(part) for part in (_joined(das, 0), *dbs)]  # type: ignore[arg-type]
    return [x.new_empty(0) if dx is None else cast(dx, x.dtype).view(x.shape), *gradients]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return matrices joined, contiguous: without a copy where they are the parts of one, in order."""
    first, size = parts[0], list(parts[0].shape)
    storage, strides, offset = first.untyped_storage().data_ptr(), first.stride(), first.storage_offset()
    size[dim] = sum(part.shape[dim] for part in parts)
    for part in parts:
        where = part.untyped_storage().data_ptr(), part.stride(), part.storage_offset()
        if where != (storage, strides, offset):
            return torch.cat(list(parts), dim)
        offset += part.shape[dim] * strides[dim]
    joined = first.as_strided(size, strides)
    return joined if joined.is_contiguous() else torch.cat(list(parts), dim)


def _apart(part: Tensor) -> Tensor:
    """Return ``part`` in memory of its own: an operator's outputs may not share theirs."""
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


@torch.library.register_fake("bayeslora::lora_linear_group_backward")
def _(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hidden: Sequence[Tensor],
    scaling: float,
    needs_x: bool,
    adapters: Sequence[Tensor] | None,
) -> list[Tensor]:
    dx = x.new_empty(x.shape if needs_x else (0,))
    da = lora_as[0].new_empty(sum(lora_a.shape[0] for lora_a in lora_as), x.shape[-1])
    return [dx, da, *(lora_b.new_empty(lora_b.shape) for lora_b in lora_bs)]


@operator("cast_adapters", "(Tensor[] sources, int[] counts, ScalarType dtype) -> Tensor[]")
def _cast_adapters(sources: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return matrices in ``dtype``, each the next ``counts[i]`` sources one below the other; few launches."""
    outs = _empty_matrices(sources, counts, dtype)
    rows = iter([source.shape[0] for source in sources])
    copies = [out.split_with_sizes(list(islice(rows, n))) for out, n in zip(outs, counts, strict=True)]
    torch._foreach_copy_(list(chain.from_iterable(copies)), list(sources))
    return outs


@torch.library.register_fake("bayeslora::cast_adapters")
def _empty_matrices(sources: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    outs, left = [], iter(sources)
    for count in counts:
        parts = list(islice(left, count))
        outs.append(parts[0].new_empty(sum(p.shape[0] for p in parts), parts[0].shape[1], dtype=dtype))
    return outs


def compiled_lora_linear(
    x: Tensor, layer: Layer, scaling: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Apply one layer as an operator; arguments are checked by the caller."""
    return _lora_linear(x, *layer, float(scaling), dropout_p, seed, dtype, None)[0]
