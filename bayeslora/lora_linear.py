"""LoRA linear layers that read one input, as one autograd function with a fused forward and backward.

Equation, for layers i = 1..n, with x viewed as ``(M, K)``, Wᵢ ``(Nᵢ, K)`` frozen, Aᵢ ``(rᵢ, K)``,
Bᵢ ``(Nᵢ, rᵢ)``, d = drop(x) (``kernels/lora_linear_twin.py`` defines ``drop`` and is the plain-torch twin
of one layer); A, h and dh stack the layers' parts, R = Σ rᵢ::

    h  = s d Aᵀ                yᵢ  = x Wᵢᵀ + biasᵢ + hᵢ Bᵢᵀ
    dh = s [dyᵢ Bᵢ]            dx  = Σ dyᵢ Wᵢ + drop'(dh A)
    dA = dhᵀ d                 dBᵢ = dyᵢᵀ hᵢ

One layer is three products forward and five backward; n layers are 2 n + 1 and 3 n + 2, where n separate
calls make 3 n and 5 n and add n - 1 gradients of x. x is read for h, drawn dropout for and multiplied
with dh once for all of them. Saved for backward: x, h ``(M, R)`` and the adapters in the dtype of the
computation; the mask is drawn again from the call's seed. A backward that is itself differentiated, or that
a mode follows, makes its gradients by ``lora_twice.py``.

Everything runs in x's dtype, or in autocast's where that is on; gradients of A and B come back in their
own dtypes, accumulated in fp32. Under ``torch.compile`` the same arithmetic is the operator of
``lora_ops.py``.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .lora_passes import Layer, LoraWeights, Needs, Saved, all_gradients, backward, columns, forward, ranks_of
from .lora_products import cast
from .lora_twice import lora_gradients, masked
from .lora_watched import backward_is_watched

if TYPE_CHECKING:
    from .kernels.lora_perturbed_twin import Perturbation

_SEED_RANGE = 2**63 - 1


@cache
def _all_needed(n: int) -> tuple[bool, ...]:
    """Return ``needs_input_grad`` of a call of n layers all of whose gradients are wanted."""
    return (True, *(False,) * 5, *(True,) * (2 * n))


def _needed(
    x: Tensor,
    hidden: Tensor,
    seed: Tensor | None,
    lora_a: Tensor,
    lora_bs: Sequence[Tensor],
    weights: Sequence[Tensor],
    adapters: Sequence[Tensor],
    needs: Needs,
) -> list[Tensor | None]:
    """Return what backward reads where not every gradient is wanted, and what autograd is to watch."""
    needs_a = True in needs.a
    nothing = [None] * len(weights)
    return [
        x if needs_a else None,
        hidden if True in needs.b else None,
        seed,
        lora_a if needs.x else None,
        *(lora_bs if needs.x or needs_a or len(weights) > 1 else nothing),  # their sizes cut h
        *(weights if needs.x else nothing),
        *(adapters if needs.x or needs_a else ()),
    ]


class LoRALinearFunction(torch.autograd.Function):
    """`apply_layers` with gradients; ``dtype`` is the one everything is computed in.

    Autograd looks at the tensors that it is given one by one, so of the layers' it is given A and B alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        layers: Sequence[Layer],
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute the outputs and keep what backward needs; ``adapters`` are the layers' A and B in turn."""
        outputs, hidden, lora_a, lora_bs = forward(x, layers, scaling, dropout_p, seed, dtype)
        wanted = ctx.needs_input_grad
        needs = None  # all of them
        weights = [layer[0] for layer in layers]
        if seed is None and wanted == _all_needed(len(layers)):
            saved = [x, hidden, None, lora_a, *lora_bs, *weights]
            if lora_a is not adapters[0]:
                # For second derivatives, and for autograd to see a change in place: backward reads copies.
                saved += adapters
        else:
            needs = Needs(wanted[0], wanted[6::2], wanted[7::2])
            saved = _needed(x, hidden, seed, lora_a, lora_bs, weights, adapters, needs)
            if needs.by_hidden:
                outputs = (*outputs, hidden)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        dtypes = [(lora_a.dtype, lora_b.dtype) for _, _, lora_a, lora_b in layers]
        ctx.settings = needs, dtypes, scaling, dropout_p, x.shape
        return outputs

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x and of every A and B, each only where it is needed."""
        needs, dh = ctx.settings[0], None
        if needs is not None and needs.by_hidden:
            *dys, dh = dys  # type: ignore[assignment]
        given = [dy for dy in dys if dy is not None]
        if not given and dh is None:
            return (None,) * len(ctx.needs_input_grad)
        watched = dh is not None or backward_is_watched()
        if not (watched or torch._C._is_any_autocast_enabled()):
            return _gradients(ctx, dys, given)
        device = given[0].device if dh is None else dh.device
        with torch.autocast(device.type, enabled=False):  # every dtype was settled in forward
            return _watched_gradients(ctx, dys, given, dh) if watched else _gradients(ctx, dys, given)


# `Function.apply` without its care for functorch, whose transforms `patch` leaves to PEFT: a tenth of the
# host time of a call.
_apply = super(torch.autograd.Function, LoRALinearFunction).apply


def _gradients(ctx: Any, dys: Sequence[Tensor | None], given: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return `LoRALinearFunction.backward`'s result; ``given`` are those of ``dys`` that are not None."""
    n = len(dys)
    needs, adapter_dtypes, scaling, dropout_p, x_shape = ctx.settings
    complete = len(given) == n
    x, hidden, seed, lora_a, *rest = ctx.saved_tensors if complete else _saved_tensors(ctx, dys, given)
    flat = x if x is None or len(x_shape) == 2 else x.view(-1, x_shape[-1])
    lora_bs, weights = rest[:n], rest[n : 2 * n]
    dx: Tensor | None
    das: Sequence[Tensor | None]
    dbs: Sequence[Tensor | None]
    if needs is None and complete:
        dx, das, dbs = all_gradients(given, flat, hidden, lora_a, lora_bs, weights, adapter_dtypes, scaling)
    else:
        saved = Saved(flat, hidden, seed, lora_a, lora_bs, weights)
        needs = needs or Needs(True, [True] * n, [True] * n)
        dx, das, dbs = backward(dys, saved, needs, adapter_dtypes, scaling, dropout_p)
    if dx is not None:
        dx = dx.view(x_shape)
    if n == 1:
        return dx, None, None, None, None, None, das[0], dbs[0]
    pairs = chain.from_iterable(zip(das, dbs, strict=True))
    return dx, None, None, None, None, None, *pairs


def _watched_gradients(
    ctx: Any, dys: Sequence[Tensor | None], given: Sequence[Tensor], dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return `_gradients`' result in torch's own operators, from the tensors that forward was given.

    ``dh`` is the gradient of h, which there is in the backward of a backward.
    """
    n = len(dys)
    _, dtypes, scaling, dropout_p, x_shape = ctx.settings
    x, hidden, seed, lora_a, *rest = _saved_tensors(ctx, dys, given)
    needs_x, *needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[6:]
    flat = None if x is None else x.view(-1, x_shape[-1])
    ranks = ranks_of(rest[:n]) if n > 1 else [0]  # of a single layer B may be None
    parts = [None] * n if hidden is None else columns(hidden, ranks)
    adapters = rest[2 * n :] or [lora_a, rest[0]] * n  # of several layers they are saved where they are read
    dxs = [] if dh is None else [masked(dh @ lora_a * scaling, dropout_p, seed)]
    gradients: list[Tensor | None] = [None] * (2 * n)
    for i, dy in enumerate(dys):
        if dy is not None:
            own, flat_dy = slice(2 * i, 2 * i + 2), dy.reshape(-1, dy.shape[-1])
            dx, *gradients[own] = lora_gradients(
                flat_dy,
                flat,
                parts[i],
                adapters[own],
                dtypes[i],
                scaling,
                dropout_p,
                seed,
                (needs_x, *needs[own]),
            )
            if dx is not None:
                dxs += dx, flat_dy @ cast(rest[n + i], dy.dtype)
    dx = sum(dxs[1:], dxs[0]).view(x_shape) if dxs else None
    return dx, None, None, None, None, None, *gradients


class _Kept(NamedTuple):
    """What a node has saved, for the outputs that are still to be differentiated."""

    saved: Sequence[Tensor | None]
    versions: Sequence[int]
    left: set[int]


def _saved_tensors(ctx: Any, dys: Sequence[Tensor | None], given: Sequence[Tensor]) -> Sequence[Any]:
    """Return what forward saved, also where outputs are differentiated in several backward passes.

    The outputs share a node, and torch frees what it has saved with the first pass through it.
    """
    needs = ctx.settings[0]
    if len(given) == len(dys) or (needs is not None and needs.by_hidden):  # h would keep its own node alive
        return ctx.saved_tensors
    asked = {i for i, dy in enumerate(dys) if dy is not None}
    kept = getattr(ctx, "kept", None)
    if kept is None or not asked <= kept.left or kept.versions != _versions(kept.saved):
        saved = ctx.saved_tensors  # an error where they are freed
        kept = _Kept(saved, _versions(saved), set(range(len(dys))))
    if not torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
        kept.left.difference_update(asked)
    ctx.kept = kept if kept.left else None
    return kept.saved


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype a linear layer computes in here and now: autocast's, or the one x and W share."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}; cast one of them, or call under torch.autocast"
        )
    return x.dtype


def _check(x: Tensor, layer: LoraWeights, dropout_p: float, seed: Tensor | None) -> None:
    weight, bias, lora_a, lora_b = layer
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


def _mask_seed(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """Return the key of the dropout mask, drawn where the caller names none; None without dropout."""
    if dropout_p == 0.0:
        return None
    return torch.randint(_SEED_RANGE, (), device=x.device) if seed is None else seed


def apply_layers(
    x: Tensor,
    layers: Sequence[Layer],
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Apply several layers to one input: as `lora_linear` applied to each, with one dropout mask for all.

    Its arguments are not checked. The outputs share one node of the autograd graph. Each may all the same be
    differentiated in a backward pass of its own; where every A is frozen, with ``retain_graph=True``.

    Args:
        x: ``(..., K)``, as for `lora_linear`.
        layers: the tensors of each layer, at least one; any ranks and output sizes.
        scaling: the factor of every layer's LoRA term.
        dropout_p: as for `lora_linear`.
        seed: as for `lora_linear`.
        dtype: what `compute_dtype` says of ``x`` and the first ``weight``, from a caller that has asked.

    Returns:
        One ``(..., Nᵢ)`` a layer, in ``x``'s dtype or autocast's; none of them shares memory with another.

    Raises:
        TypeError: ``x`` and the first ``weight`` differ in dtype and autocast is off.
    """
    if dtype is None:
        dtype = compute_dtype(x, layers[0][0])
    if dropout_p != 0.0 or seed is not None:
        seed = _mask_seed(x, dropout_p, seed)
    if is_compiling():
        from .lora_ops import compiled_lora_linear

        return tuple(compiled_lora_linear(x, layer, scaling, dropout_p, seed, dtype) for layer in layers)
    # Here, so that torch differentiates the cast, and backward saves what the function was given.
    x = cast(x, dtype).contiguous()
    if torch.is_grad_enabled():
        call = LoRALinearFunction.apply if torch._C._are_functorch_transforms_active() else _apply
        adapters = layers[0][2:] if len(layers) == 1 else [part for layer in layers for part in layer[2:]]
        return call(x, layers, scaling, dropout_p, seed, dtype, *adapters)[: len(layers)]
    return forward(x, layers, scaling, dropout_p, seed, dtype)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    perturbation: "Perturbation | None" = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ``, differentiable in x, A and B.

    With a ``perturbation`` each group of rows has a posterior sample of A and B of its own, drawn by the
    noise contract inside the kernels, and the standard deviations get gradients too.

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
        perturbation: standard deviations of A and B, and the seed and draw of each of the G groups that
            ``x``'s first dimension is cut into; None for A and B as they are.

    Returns:
        ``(..., N)``, in ``x``'s dtype or autocast's.

    Raises:
        ValueError: a shape does not fit, ``weight`` or ``bias`` requires a gradient, ``dropout_p`` is
            outside [0, 1), ``seed`` is not an int64 scalar on ``x``'s device, or ``perturbation`` does not
            fit A, B or the first dimension of ``x``.
        TypeError: ``x`` and ``weight`` differ in dtype and autocast is off.
    """
    layer = LoraWeights(weight, bias, lora_a, lora_b)
    _check(x, layer, dropout_p, seed)
    if perturbation is not None:
        from .lora_perturbed import check_perturbation, perturbed_layer

        check_perturbation(x, layer, perturbation)
        seed = _mask_seed(x, dropout_p, seed)
        return perturbed_layer(x, layer, scaling, perturbation, dropout_p, seed, compute_dtype(x, weight))
    return apply_layers(x, (layer,), scaling, dropout_p, seed)[0]
