"""LoRA on a bitsandbytes base, 8-bit or 4-bit: the base product is theirs, the LoRA part ours.

Equation, with base = W_q x + bias as bitsandbytes computes it, x viewed as ``(M, K)``, A ``(r, K)``,
B ``(N, r)``, d = drop(x)::

    h  = s d Aᵀ                    y  = base + h Bᵀ
    dh = s dy B                    dx = drop'(dh A)  (the base's own part is added by autograd)
    dA = dhᵀ d                     dB = dyᵀ h        d base = dy

Two products forward, the second with the sum in its epilogue, and four backward, in the dtype of the
base's output (autocast's under autocast); PEFT computes in the adapter's dtype, fp32 as a rule, and casts,
scales and adds in passes of their own. Imports peft's bitsandbytes classes: only loaded for models that have
some.
"""

from typing import Any

import torch
from peft.tuners.lora import bnb
from torch import Tensor

from .lora_chain import added
from .lora_passes import Needs
from .lora_products import cast, dropout_ops, scaled_product, tall_product
from .lora_twice import lora_gradients, masked
from .lora_watched import backward_is_watched, call_is_watched, dispatch_modes, is_foreign
from .patching import _VARIANT_NAMES, _active_adapters, _unsupported_adapter

_SEED_RANGE = 2**63 - 1


class LoRAAddFunction(torch.autograd.Function):
    """``base + s drop(x) Aᵀ Bᵀ`` and its gradients; see the module's docstring."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        base: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return y ``(..., N)`` in ``base``'s dtype, computed in x's; x is contiguous."""
        dtype = x.dtype
        flat = x.view(-1, x.shape[-1])
        a, b = cast(lora_a, dtype), cast(lora_b, dtype)
        hidden = scaled_product(_dropped(flat, dropout_p, seed), a.t(), scaling)
        if base.dtype == dtype:
            y = torch.empty(base.shape, dtype=dtype, device=base.device)  # not a view: callers may change it
            flat_y = y.view(-1, base.shape[-1])
            torch.addmm(base.reshape(flat_y.shape), hidden, b.t(), out=flat_y)
        else:
            y = base + torch.mm(hidden, b.t()).to(base.dtype).view(base.shape)
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        both = needs_x or needs_a
        ctx.save_for_backward(
            x if needs_a else None,
            hidden if needs_b else None,
            seed,
            a if needs_x else None,
            b if both else None,
            *((lora_a, lora_b) if both else (None, None)),
        )
        ctx.settings = scaling, dropout_p, x.shape, dtype, lora_a.dtype, lora_b.dtype
        ctx.set_materialize_grads(False)
        return (y, hidden) if Needs(needs_x, [needs_a], [needs_b]).by_hidden else (y,)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of base, x, A and B; dh is h's, in the backward of a backward."""
        like = dy if dh is None else dh
        if like is None:
            return (None,) * 7
        watched = dh is not None or backward_is_watched()
        gradients = _watched_gradients if watched else _gradients
        if not torch._C._is_any_autocast_enabled():
            return gradients(ctx, dy, dh)
        with torch.autocast(like.device.type, enabled=False):
            return gradients(ctx, dy, dh)


def _dropped(flat: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return flat if seed is None else dropout_ops(flat).dropout(flat, dropout_p, seed)


def _gradients(ctx: Any, dy: Any, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, hidden, seed, a, b, *_ = ctx.saved_tensors
    scaling, dropout_p, x_shape, dtype, a_dtype, b_dtype = ctx.settings
    _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
    flat_dy = cast(dy, dtype).reshape(-1, dy.shape[-1])
    dx = da = db = None
    if needs_b:
        db = tall_product(flat_dy, hidden, b_dtype)
    if needs_x or needs_a:
        dh = scaled_product(flat_dy, b, scaling)
        if needs_a:
            da = tall_product(dh, _dropped(x.view(-1, x_shape[-1]), dropout_p, seed), a_dtype)
        if needs_x:
            dx = _dropped(torch.mm(dh, a), dropout_p, seed).view(x_shape)
    return dy, dx, da, db, None, None, None


def _watched_gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, hidden, seed, a, _, *adapter = ctx.saved_tensors
    scaling, dropout_p, x_shape, dtype, *dtypes = ctx.settings
    dx = da = db = None
    if dy is not None:
        flat = None if x is None else x.view(-1, x_shape[-1])
        flat_dy, needs = cast(dy, dtype).reshape(-1, dy.shape[-1]), ctx.needs_input_grad[1:4]
        dx, da, db = lora_gradients(flat_dy, flat, hidden, adapter, dtypes, scaling, dropout_p, seed, needs)
    if dh is not None:
        through = masked(dh @ a * scaling, dropout_p, seed)
        dx = through if dx is None else dx + through
    return dy, None if dx is None else dx.view(x_shape), da, db, None, None, None


def add_lora(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    """Return ``base + scaling · drop(x) Aᵀ Bᵀ``, differentiable in all four tensors.

    Args:
        base: ``(..., N)``, any floating dtype; the result has it.
        x: ``(..., K)``, any floating dtype.
        lora_a: ``(r, K)``, any floating dtype.
        lora_b: ``(N, r)``, likewise.
        scaling: the factor of the LoRA term.
        dropout_p: probability of dropping an element of the LoRA term's input, in [0, 1); the mask's seed
            comes from the device's own generator.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
    seed = None if dropout_p == 0.0 else torch.randint(_SEED_RANGE, (), device=x.device)
    x = cast(x, dtype).contiguous()
    return LoRAAddFunction.apply(base, x, lora_a, lora_b, scaling, dropout_p, seed)[0]


def unsupported(layer: Any, adapter: str) -> str | None:
    """Return why the LoRA part of ``layer`` with ``adapter`` cannot be fused, or None if it can."""
    if adapter in layer.lora_variant:
        name = type(layer.lora_variant[adapter]).__name__
        return _VARIANT_NAMES.get(name, name.removesuffix("LinearVariant"))
    if type(layer.scaling[adapter]) not in (float, int):
        return "scaling that is not a number"
    modules = layer._modules
    return _unsupported_adapter(
        modules["lora_A"]._modules[adapter],
        modules["lora_B"]._modules[adapter],
        modules["lora_dropout"]._modules[adapter],
    )


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    """Return the layer's output, or None where PEFT's own forward is to serve the call."""
    if layer._disable_adapters or layer.merged_adapters or torch.compiler.is_compiling():
        return None
    if call_is_watched() or is_foreign(x) or x.dim() == 0 or x.shape[-1] != layer.in_features:
        return None
    adapters = _active_adapters(layer)
    if len(adapters) != 1 or unsupported(layer, adapters[0]) is not None:
        return None
    modules = layer._modules
    dropout = modules["lora_dropout"]._modules[adapters[0]]
    p = dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
    lora_a = modules["lora_A"]._modules[adapters[0]]._parameters["weight"]
    lora_b = modules["lora_B"]._modules[adapters[0]]._parameters["weight"]
    if "_monteclora" in layer.__dict__ and adapters[0] in layer._monteclora:
        bank, index = layer._monteclora[adapters[0]]
        lora_a, lora_b = bank.matrices(index, lora_a, lora_b)
    add = added if dispatch_modes() else add_lora
    return add(modules["base_layer"](x), x, lora_a, lora_b, layer.scaling[adapters[0]], p)


def _refuse_plain_lora(layer: Any) -> None:
    """Raise where PEFT's own forward, which knows no MonteCLoRA on these bases, would leave its noise out."""
    if layer._disable_adapters or layer.merged_adapters or "_monteclora" not in layer.__dict__:
        return
    for adapter in _active_adapters(layer):
        if adapter in layer._monteclora and layer._monteclora[adapter][0].perturbs(layer):
            raise RuntimeError(
                "this call of a MonteCLoRA layer on a quantized base needs PEFT's own forward "
                "(torch.compile, several active adapters, adapter_names or hooks), which "
                "would train it as plain LoRA"
            )


class _FusedForward:
    """The forward of both kinds; not constructed, `patch` assigns the class of an existing layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer; arguments and result are those of PEFT's own forward."""
        y = None if args or kwargs else _forward(self, x)
        if y is None:
            _refuse_plain_lora(self)
        return super().forward(x, *args, **kwargs) if y is None else y  # type: ignore[misc]


FUSED_KINDS: dict[type, type] = {}
"""The fused class of each of PEFT's bitsandbytes LoRA classes that this installation has."""

if hasattr(bnb, "Linear8bitLt"):

    class FusedLora8bit(_FusedForward, bnb.Linear8bitLt):
        """PEFT's LoRA layer on an int8 base with a fused LoRA part."""

    FusedLora8bit.__name__ = "Linear8bitLt"  # see `patching.FusedLoraLinear`
    FUSED_KINDS[bnb.Linear8bitLt] = FusedLora8bit

if hasattr(bnb, "Linear4bit"):

    class FusedLora4bit(_FusedForward, bnb.Linear4bit):
        """PEFT's LoRA layer on a 4-bit base (nf4, fp4) with a fused LoRA part."""

    FusedLora4bit.__name__ = "Linear4bit"
    FUSED_KINDS[bnb.Linear4bit] = FusedLora4bit
