"""Forward and backward of LoRA linear layers that read one input; no autograd here.

Equations: see ``lora_linear.py``, which makes an autograd function of these; ``lora_ops.py`` makes operators
for ``torch.compile`` of them. Which implementation runs each product, ``lora_products.py`` decides.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lora_products import (
    base_plus_lora,
    cast,
    copy_cast,
    dropout_ops,
    hidden_gradient,
    input_gradient,
    kernel_route,
    scaled_product,
    tall_product,
)


class LoraWeights(NamedTuple):
    """The tensors of one layer: weight ``(N, K)``, bias ``(N,)`` or None, A ``(r, K)`` and B ``(N, r)``."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor


Layer = LoraWeights | tuple[Tensor, Tensor | None, Tensor, Tensor]
"""The tensors of one layer as the passes take them: only ever unpacked."""


Adapters = tuple[Tensor, Sequence[Tensor]]
"""The layers' A stacked, ``(R, K)``, and each one's B, in the dtype of the computation."""


def _operands(
    layers: Sequence[Layer], dtype: torch.dtype, adapters: Adapters | None
) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Tensor, Sequence[Tensor]]:
    """Return the layers' weights, biases, A stacked and B in ``dtype``: at most one launch for A and B."""
    if len(layers) == 1 and adapters is None:
        ((weight, bias, lora_a, lora_b),) = layers
        if weight.dtype == lora_a.dtype == lora_b.dtype == dtype and (bias is None or bias.dtype == dtype):
            return (weight,), (bias,), lora_a, (lora_b,)
    weights, biases, a_parts, b_parts = [], [], [], []
    for weight, bias, lora_a, lora_b in layers:
        weights.append(cast(weight, dtype))
        biases.append(None if bias is None else cast(bias, dtype))
        a_parts.append(lora_a)
        b_parts.append(lora_b)
    return weights, biases, *(adapters or cast_adapters(a_parts, b_parts, dtype))


def cast_adapters(lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], dtype: torch.dtype) -> Adapters:
    """Return the layers' A stacked and B, in ``dtype``: at most one launch."""
    single = len(lora_as) == 1
    one_dtype = True
    for lora_a, lora_b in zip(lora_as, lora_bs, strict=True):
        one_dtype = one_dtype and lora_a.dtype == lora_b.dtype == dtype
    if one_dtype:
        return lora_as[0] if single else torch.cat(list(lora_as)), lora_bs
    ranks = [part.shape[0] for part in lora_as]
    stacked = lora_as[0].new_empty(sum(ranks), lora_as[0].shape[1], dtype=dtype)
    copies = [torch.empty_like(part, dtype=dtype, memory_format=torch.contiguous_format) for part in lora_bs]
    copy_cast([*([stacked] if single else stacked.split_with_sizes(ranks)), *copies], [*lora_as, *lora_bs])
    return stacked, copies


def forward(
    x: Tensor,
    layers: Sequence[Layer],
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    adapters: Adapters | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Sequence[Tensor]]:
    """Compute every layer's output ``(..., Nᵢ)`` from x ``(..., K)``, contiguous and in ``dtype``.

    ``adapters`` are what `cast_adapters` returns of the layers' A and B, from a caller that has them.

    Returns:
        The outputs, none of which is a view, as autograd counts; and what a backward may need, all in
        ``dtype``: h ``(M, R)``, the layers' A stacked ``(R, K)``, and their B.
    """
    *leading, k = x.shape
    flat = x if len(leading) == 1 else x.view(-1, k)
    weights, biases, lora_a, lora_bs = _operands(layers, dtype, adapters)
    route = kernel_route("forward", flat, weights, lora_a.shape[0]) if seed is None else None
    if route is not None:
        from .kernels.lora_layer import lora_forward

        ys = tuple(x.new_empty(*leading, weight.shape[0]) for weight in weights)
        outs = [y.view(-1, y.shape[-1]) for y in ys]
        tensors = list(zip(weights, biases, lora_bs, strict=True))
        return ys, lora_forward(flat, tensors, lora_a, scaling, outs, route)[1], lora_a, lora_bs
    dropped = flat if seed is None else dropout_ops(flat).dropout(flat, dropout_p, seed)
    hidden = scaled_product(dropped, lora_a.t(), scaling)
    if len(layers) == 1:
        ys = (base_plus_lora(flat, leading, weights[0], biases[0], hidden, lora_bs[0]),)
    else:
        parts = zip(weights, biases, columns(hidden, ranks_of(lora_bs)), lora_bs, strict=True)
        ys = tuple([base_plus_lora(flat, leading, *operands) for operands in parts])
    return ys, hidden, lora_a, lora_bs


def ranks_of(lora_bs: Sequence[Tensor]) -> list[int]:
    """Return each layer's rank."""
    return [lora_b.shape[1] for lora_b in lora_bs]


def columns(stacked: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """Return each layer's columns of ``(M, R)``."""
    return (stacked,) if len(ranks) == 1 else stacked.split_with_sizes(ranks, 1)


class Saved(NamedTuple):
    """What `backward` reads; a tensor that no needed gradient depends on may be None.

    Of several layers every B is there: h and dA are cut at their ranks.
    """

    flat: Tensor | None
    hidden: Tensor | None
    seed: Tensor | None
    lora_a: Tensor | None
    lora_bs: Sequence[Tensor]
    weights: Sequence[Tensor]


class Needs(NamedTuple):
    """Which gradients are wanted: x's, and each layer's A and B."""

    x: bool
    a: Sequence[bool]
    b: Sequence[bool]

    @property
    def by_hidden(self) -> bool:
        """Whether dB depends on an x that is not kept, since every A is frozen.

        h is then an output of the function: through it a second derivative comes to x.
        """
        return self.x and True in self.b and True not in self.a


def backward(
    dys: Sequence[Tensor | None],
    saved: Saved,
    needs: Needs,
    adapter_dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Return dx ``(M, K)`` in the computation's dtype, and dA and dB of each layer in their own.

    Args:
        dys: ``(..., Nᵢ)``, at least one; None for an output that the loss does not depend on, whose
            adapter then gets no gradient.
        saved: of the forward.
        needs: which gradients to compute; the others are None.
        adapter_dtypes: of each layer's A and B.
        scaling: of the forward.
        dropout_p: of the forward.
    """
    given = [dy for dy in dys if dy is not None]
    complete = needs.x and saved.seed is None and not (False in needs.a or False in needs.b)
    if complete and len(given) == len(dys):
        flat, hidden, _, lora_a, lora_bs, weights = saved
        assert flat is not None and hidden is not None and lora_a is not None
        return all_gradients(given, flat, hidden, lora_a, lora_bs, weights, adapter_dtypes, scaling)
    flat_dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
    ranks = ranks_of(saved.lora_bs) if len(dys) > 1 else [0]  # of a single layer B may be None
    used = [i for i, dy in enumerate(flat_dys) if dy is not None]
    wants_a = any(needs.a[i] for i in used)
    da: list[Tensor | None] = [None] * len(dys)
    db: list[Tensor | None] = [None] * len(dys)
    if any(needs.b[i] for i in used):
        assert saved.hidden is not None
        for i, part in enumerate(columns(saved.hidden, ranks)):
            dy = flat_dys[i]
            if dy is not None and needs.b[i]:
                db[i] = tall_product(dy, part, adapter_dtypes[i][1])
    dh = _hidden_gradients(flat_dys, saved.lora_bs, ranks, scaling) if needs.x or wants_a else None
    if dh is not None and wants_a:
        assert saved.flat is not None
        da = _a_gradients(dh, saved, ranks, needs, used, adapter_dtypes, dropout_p)
    dx = None
    if dh is not None and needs.x:
        assert saved.lora_a is not None
        used_dys = [dy for dy in flat_dys if dy is not None]
        weights = [cast(saved.weights[i], dh.dtype) for i in used]
        if saved.seed is None:
            dx = input_gradient(used_dys, weights, (dh, saved.lora_a))
        else:
            dx = input_gradient(used_dys, weights)
            dropout_ops(dx).dropout_add_(dx, torch.mm(dh, saved.lora_a), dropout_p, saved.seed)
    return dx, da, db


def all_gradients(
    dys: Sequence[Tensor],
    flat: Tensor,
    hidden: Tensor,
    lora_a: Tensor,
    lora_bs: Sequence[Tensor],
    weights: Sequence[Tensor],
    adapter_dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    scaling: float,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Return what `backward` does, of a forward without dropout, where every gradient is wanted.

    Training's usual call: the same products in a straight line.
    """
    a_dtype, b_dtype = adapter_dtypes[0]
    one_dtype = len(dys) == 1 or all(pair == (a_dtype, b_dtype) for pair in adapter_dtypes[1:])
    flat_dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    ranks = ranks_of(lora_bs)
    dtype = flat.dtype
    weights = [weight if weight.dtype == dtype else weight.to(dtype) for weight in weights]
    if one_dtype and a_dtype == b_dtype:
        route = kernel_route("backward", flat, weights, lora_a.shape[0])
        if route is not None:
            from .kernels.lora_layer import lora_backward

            dx, stacked, dbs = lora_backward(
                flat_dys, flat, weights, hidden, lora_a, lora_bs, scaling, a_dtype, route=route
            )
            return dx, _rows_of(stacked, ranks), dbs
    dh = _hidden_gradients(flat_dys, lora_bs, ranks, scaling)
    if len(dys) == 1:
        db = [tall_product(flat_dys[0], hidden, b_dtype)]
    else:
        parts = zip(flat_dys, columns(hidden, ranks), adapter_dtypes, strict=True)
        db = [tall_product(dy, part, own) for dy, part, (_, own) in parts]
    # A product over A's of two dtypes is made in the wider one and rounded from there.
    widest = a_dtype if one_dtype else max((a for a, _ in adapter_dtypes), key=lambda dtype: dtype.itemsize)
    da = _rows_of(tall_product(dh, flat, widest), ranks)
    if not one_dtype:
        da = [cast(part, a) for part, (a, _) in zip(da, adapter_dtypes, strict=True)]
    return input_gradient(flat_dys, weights, (dh, lora_a)), da, db


def _rows_of(stacked: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """Return each layer's rows of ``(R, K)``."""
    return [stacked] if len(ranks) == 1 else stacked.split_with_sizes(ranks)


def _hidden_gradients(
    flat_dys: Sequence[Tensor | None], lora_bs: Sequence[Tensor], ranks: list[int], scaling: float
) -> Tensor:
    """Return dh ``(M, R)``, zero in the columns of unused outputs."""
    if len(flat_dys) == 1 and flat_dys[0] is not None:
        return scaled_product(flat_dys[0], lora_bs[0], scaling)
    like = next(dy for dy in flat_dys if dy is not None)
    dh = like.new_empty(like.shape[0], sum(ranks))
    for part, dy, lora_b in zip(columns(dh, ranks), flat_dys, lora_bs, strict=True):
        if dy is None:
            part.zero_()
        else:
            hidden_gradient(part, dy, lora_b, scaling)
    return dh


def _a_gradients(
    dh: Tensor,
    saved: Saved,
    ranks: list[int],
    needs: Needs,
    used: Sequence[int],
    adapter_dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    dropout_p: float,
) -> list[Tensor | None]:
    """Return dA of each layer: rows of one product over all of them."""
    flat, seed = saved.flat, saved.seed
    assert flat is not None
    dropped = flat if seed is None else dropout_ops(flat).dropout(flat, dropout_p, seed)
    wanted = [i in used and needs.a[i] for i in range(len(needs.a))]
    dtypes = {a for (a, _), want in zip(adapter_dtypes, wanted, strict=True) if want}
    # A product over A's of two dtypes is made in the wider one and rounded from there.
    product = tall_product(dh, dropped, max(dtypes, key=lambda dtype: dtype.itemsize))
    parts = _rows_of(product, ranks)
    return [
        cast(part, a) if want else None
        for part, (a, _), want in zip(parts, adapter_dtypes, wanted, strict=True)
    ]
