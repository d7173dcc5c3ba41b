"""Swap PEFT's LoRA Linear layers for fused ones in place, and back.

A patched layer changes its class and nothing else: parameters, submodules, state-dict keys and hooks
stay, and it is still a ``peft.tuners.lora.Linear`` by ``isinstance``. Each call decides anew whether the
fused forward (``lora_linear.py``) can serve it; where it cannot, PEFT's own forward does.
"""

import functools
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.compiler import is_compiling

from .lora_chain import chain, chain_serves, plain
from .lora_group import LoraCall, LoraGroup, add_groups, remove_groups
from .lora_linear import apply_layers
from .lora_samples import OPEN, NotBatched, current_pass
from .lora_watched import call_is_watched, dispatch_modes, is_foreign
from .monteclora import attach as attach_monteclora
from .monteclora import check_layers as check_monteclora
from .monteclora import detach as detach_monteclora

_logger = logging.getLogger("bayeslora")

_Model = TypeVar("_Model", bound=nn.Module)

_FLOAT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_NUMBERS = frozenset({float, int})
_NOTHING: dict[str, Any] = {}
_BNB_LAYERS = "peft.tuners.lora.bnb"  # importing it needs bitsandbytes
_QUANTIZED_MODULES = frozenset({"aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao"})
_VARIANT_NAMES = {
    "ALoraLinearVariant": "aLoRA",
    "DoraLinearVariant": "DoRA",
    "MontecloraLinearVariant": "MonteCLoRA",
}


class FusedLoraLinear(PeftLoraLinear):
    """A PEFT LoRA Linear layer whose forward and backward are one autograd function.

    Not constructed: `patch` assigns it as the class of an existing layer.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer; arguments and result are those of PEFT's own forward."""
        if OPEN.any:
            y = _sampled_forward(self, x, args, kwargs)
            if y is not None:
                return y
        if not (args or kwargs):
            call = _served_call(self, x)
            if call is not None:
                return _fused_forward(self, x, call)
            if "_is_replica" in self.__dict__:
                _say_that_replicas_are_pefts()
        return super().forward(x, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        """Restore a copied or unpickled layer; it joins the copy of its group."""
        super().__setstate__(state)
        _fused_layers.add(self)
        if "_lora_group" in self.__dict__:
            group, index = self.__dict__["_lora_group"]
            group.join(index, self)


_fused_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All there are, copies too: with the last of them inductor's pass goes."""

# What PEFT's tools print, and others filter on. Pickles go by ``__qualname__``.
FusedLoraLinear.__name__ = PeftLoraLinear.__name__


@functools.cache
def _say_that_replicas_are_pefts() -> None:
    """Log once a process that ``nn.DataParallel`` takes the fused forward away: copies hold no parameters."""
    _logger.warning(
        "nn.DataParallel (HF Trainer's way where it sees several GPUs and no launcher) runs the LoRA layers "
        "by PEFT's own forward; start with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES"
    )


def _active_adapters(layer: Any) -> list[str]:
    """Return the names of the active adapters that ``layer`` holds."""
    active = layer._active_adapter
    held = layer._modules["lora_A"]._modules
    return [name for name in ((active,) if isinstance(active, str) else active) if name in held]


def _weight_is_transposed(base_type: type) -> bool | None:
    """Tell how a base layer's class stores its weight; None for a class that is not supported."""
    if base_type is nn.Linear:
        return False
    if (base_type.__module__, base_type.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return True
    return None


def _is_altered(module: nn.Module) -> bool:
    """Tell whether calling ``module`` does more than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _unsupported_base(base: Any) -> str | None:
    """Return why the fused forward cannot stand in for the base layer, or None if it can."""
    if _weight_is_transposed(type(base)) is None:
        return f"base layer {type(base).__name__}"
    if _is_altered(base):
        return "hooks or an own forward on the base layer"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOAT_DTYPES:
        return "base weight of another tensor class or dtype"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "trainable base layer"
    return None


def _unsupported_adapter(lora_a: Any, lora_b: Any, dropout: Any) -> str | None:
    """Return why the fused forward cannot stand in for the adapter's submodules, or None if it can."""
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"adapter layers {type(lora_a).__name__} and {type(lora_b).__name__}"
    if type(dropout) is not nn.Identity and not (type(dropout) is nn.Dropout and dropout.p < 1.0):
        return f"dropout {dropout}"
    if _is_altered(lora_a) or _is_altered(lora_b) or _is_altered(dropout):
        return "hooks or an own forward on the adapter"
    a, b = lora_a._parameters, lora_b._parameters
    if a["bias"] is not None or b["bias"] is not None:
        return "bias in the adapter"
    if type(a.get("weight")) is not nn.Parameter or type(b.get("weight")) is not nn.Parameter:
        return "adapter weight of another tensor class"
    return None


def _unsupported(layer: Any, adapter: str) -> str | None:
    """Return why the fused forward cannot serve ``layer`` with ``adapter``, or None if it can.

    For `patch` to say; at every call `_served_call` asks the same.
    """
    if adapter in layer.lora_variant and adapter not in layer.__dict__.get("_monteclora", ()):
        name = type(layer.lora_variant[adapter]).__name__
        return _VARIANT_NAMES.get(name, name.removesuffix("LinearVariant"))
    return _unsupported_parts(layer, adapter)


def _unsupported_parts(layer: Any, adapter: str) -> str | None:
    """Return why the fused forward cannot serve the layer's submodules and scaling, or None if it can."""
    if type(layer.scaling[adapter]) not in _NUMBERS:
        return "scaling that is not a number"
    modules: Any = layer._modules
    return _unsupported_base(modules["base_layer"]) or _unsupported_adapter(
        modules["lora_A"]._modules[adapter],
        modules["lora_B"]._modules[adapter],
        modules["lora_dropout"]._modules[adapter],
    )


def _served_call(layer: Any, x: Tensor) -> LoraCall | None:
    """Return all that ``layer(x)`` depends on, or None where PEFT's own forward is to serve the call."""
    return None if call_is_watched() else _unwatched_call(layer, x)


def _unwatched_call(layer: Any, x: Tensor, dtype: torch.dtype | None = None) -> LoraCall | None:  # noqa: PLR0911 - flat: see below
    """Return all that ``layer(x)`` depends on, or None where PEFT's own forward is to serve the call.

    Served is a layer with one active adapter of which `_unsupported` knows no fault, unmerged, and an input
    that fits it; PEFT's forward reports what is wrong with any other. Everything is asked at every call,
    by a host that a GPU may be waiting for: so one flat function, of few calls, over modules' dictionaries.
    ``dtype`` is what another layer computes in that reads x as well.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    modules = layer._modules
    held = modules["lora_A"]._modules
    active = layer._active_adapter
    if type(active) is not list or len(active) != 1:
        active = _active_adapters(layer)
        if len(active) != 1:
            return None
    adapter = active[0]
    if adapter not in held:
        return None
    drawn = layer.__dict__.get("_monteclora", _NOTHING).get(adapter)
    if drawn is None and adapter in layer.lora_variant:
        return None
    base, a, b = modules["base_layer"], held[adapter], modules["lora_B"]._modules[adapter]
    dropout = modules["lora_dropout"]._modules[adapter]
    for module in (base, a, b, dropout):
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
    transposed = False if type(base) is nn.Linear else _weight_is_transposed(type(base))
    has_dropout = type(dropout) is nn.Dropout
    if transposed is None or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    if not (dropout.p < 1.0 if has_dropout else type(dropout) is nn.Identity):
        return None
    base_tensors, a_tensors, b_tensors = base._parameters, a._parameters, b._parameters
    weight, bias = base_tensors.get("weight"), base_tensors.get("bias")
    lora_a, lora_b, scaling = a_tensors.get("weight"), b_tensors.get("weight"), layer.scaling[adapter]
    if not (type(weight) is type(lora_a) is type(lora_b) is nn.Parameter and weight.dtype in _FLOAT_DTYPES):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if a_tensors["bias"] is not None or b_tensors["bias"] is not None or type(scaling) not in _NUMBERS:
        return None
    if dtype is not weight.dtype or layer.in_features != x.shape[-1]:
        dtype = _dtype_of_call(layer, x, weight)
        if dtype is None:
            return None
    if drawn is not None:
        lora_a, lora_b = drawn[0].matrices(drawn[1], lora_a, lora_b)
    dropout_p = dropout.p if has_dropout and dropout.training else 0.0
    return LoraCall(weight, bias, lora_a, lora_b, transposed, scaling, dropout_p, dtype)


def _dtype_of_call(layer: Any, x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype that ``layer(x)`` is computed in, or None for an input that does not fit the layer."""
    if is_foreign(x):
        return None
    shape = x.shape
    if not shape or shape[-1] != layer.in_features:
        return None
    dtype = x.dtype
    if torch._C._is_any_autocast_enabled() and dtype != torch.float64:
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return dtype if dtype == weight.dtype else None


def _sibling_call(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> LoraCall | None:
    """Return what a plain call ``layer(x)`` would compute, or None if the fused forward would not serve it.

    ``dtype`` is what its sibling computes in. Hooks that may replace the input count as not served; those
    that see the output are called with it.
    """
    if type(layer) is not FusedLoraLinear:
        return None
    own = layer.__dict__
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    if "forward" in own or (OPEN.any and _is_sampled(layer)):
        return None
    return _unwatched_call(layer, x, dtype)


def _fused_forward(layer: PeftLoraLinear, x: Tensor, call: LoraCall) -> Tensor:
    compiling = is_compiling()
    if not compiling and dispatch_modes():
        return plain(x, call)
    if chain_serves(x, call, compiling):
        return chain(x, call)
    if "_lora_group" in layer.__dict__ and not compiling:
        group: LoraGroup
        group, index = layer.__dict__["_lora_group"]
        y = group.output(index, layer, x, call, _sibling_call)
        if y is not None:
            return y
    return apply_layers(x, (call.tensors(),), call.scaling, call.dropout_p, None, call.dtype)[0]


def _is_sampled(layer: Any) -> bool:
    """Tell whether this thread is in a pass that has samples of ``layer``."""
    own = current_pass()
    return own is not None and layer in own.layers


def _sampled_forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Apply the layer with a posterior sample for each group of rows; None where it has no samples here.

    Whoever opened the pass has checked that the fused forward serves the layer; that is asked again here, as
    at any call, and whether its adapter is still the active one. A compiled graph asks when it runs.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not _is_sampled(layer):
        return None
    call = None if args or kwargs else _served_call(layer, x)
    if compiling:
        if call is None or call.dropout_p or torch.is_grad_enabled():
            return None
        from .lora_perturbed_ops import sampled_lora_linear

        return sampled_lora_linear(x, *call.tensors(), call.scaling, call.dtype)
    own: Any = current_pass()
    if call is None or _active_adapters(layer) != [own.layers[layer].adapter]:
        raise NotBatched(f"a call of {type(layer).__name__} that the fused forward does not serve")
    return own.output(layer, x, call.tensors()[0], call.bias, call.scaling, call.dtype)


def _lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _held_adapters(layer: LoraLayer) -> set[str]:
    return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}


def _fused_kind(kind: type) -> type | None:
    """Return the class that `patch` gives a layer of class ``kind``, or None for one that it leaves."""
    if kind in (PeftLoraLinear, FusedLoraLinear):
        return FusedLoraLinear
    if kind.__module__ in (_BNB_LAYERS, "bayeslora.lora_quantized") and _BNB_LAYERS in sys.modules:
        from .lora_quantized import FUSED_KINDS

        return kind if kind in FUSED_KINDS.values() else FUSED_KINDS.get(kind)
    return None


def _reason_to_leave(layer: LoraLayer, adapter_name: str | None) -> str | None:
    """Return why `patch` leaves ``layer`` to PEFT, or None if it swaps its class."""
    kind = type(layer)
    if _fused_kind(kind) is None:
        if kind.__module__.rpartition(".")[2] in _QUANTIZED_MODULES:
            return f"quantized base ({type(layer.get_base_layer()).__name__})"
        return kind.__name__
    if "forward" in layer.__dict__:
        return "an own forward on the layer"
    adapters = _active_adapters(layer) if adapter_name is None else [adapter_name]
    unsupported = _unsupported
    if kind not in (PeftLoraLinear, FusedLoraLinear):
        from .lora_quantized import unsupported
    reasons = [unsupported(layer, name) for name in adapters if name in layer.lora_A]
    if not reasons:
        return "no such adapter in the layer"
    return None if None in reasons else reasons[0]


def _montecloras(model: nn.Module, adapter: str) -> list[Any]:
    """Return the layers whose MonteCLoRA adapter of that name the fused forward can serve, in order.

    On a bitsandbytes base PEFT has made them plain LoRA layers.
    """
    found: list[Any] = []
    for layer in _lora_layers(model):
        if adapter not in layer.lora_A or _fused_kind(type(layer)) is None or "forward" in layer.__dict__:
            continue
        if isinstance(layer, PeftLoraLinear):
            variant = type(layer.lora_variant.get(adapter)).__name__
            if variant == "MontecloraLinearVariant" and _unsupported_parts(layer, adapter) is None:
                found.append(layer)
        else:
            from .lora_quantized import unsupported

            if unsupported(layer, adapter) is None:
                found.append(layer)
    return found


def patch(model: _Model, adapter_name: str | None = None) -> _Model:
    """Swap the class of every PEFT LoRA Linear layer that the fused forward supports, in place.

    Training, saving, loading, merging, switching and disabling adapters work as before. A patched layer
    computes its LoRA term in the activations' dtype (autocast's under autocast), also where the adapter is
    fp32. Layers of one module that read the same input (q, k and v; gate and up) are computed in one call
    and then share one dropout mask, where PEFT draws one a layer. Under ``torch.compile`` a pass over
    inductor's graphs does so for layers without dropout, in ``torch._inductor.config``'s place
    ``post_grad_custom_pre_pass`` unless somebody's own is there.

    Layers whose ``LoraConfig`` has a ``monteclora_config`` draw their noise together, once a forward of
    ``model`` (see `bayeslora.configure_monteclora`), and PEFT's ``MontecloraTrainerMixin`` gets the loss of
    `bayeslora.monteclora_loss`. On a bitsandbytes base, where PEFT makes them plain LoRA layers without a
    word, `patch` adds the learned priors: build the optimizer, and load saved priors, afterwards.

    A layer uses PEFT's own forward whenever the call is one that the fused forward does not cover: merged
    or disabled adapters, several active adapters, ``adapter_names`` batches, DoRA and other variants, a
    bias in the adapter, hooks on the layer's submodules or on all modules, a trainable base layer, the copies
    that ``nn.DataParallel`` makes (one log line says so then), ``torch.func``, forward-mode derivatives,
    ``torch.jit.trace``, modes that replace functions, tensors with operators of their own. Under a dispatch
    mode (selective checkpointing) torch's own operators serve. Of a quantized base layer PEFT's forward is
    kept too, but for bitsandbytes', where the base product stays theirs and the LoRA part is fused
    (``lora_quantized.py``). Logs one line, at INFO to the logger "bayeslora", that says how many layers were
    patched and how many were left and why.

    Args:
        model: a model with LoRA layers: a ``PeftModel``, or any module that contains some.
        adapter_name: the adapter that decides which layers are supported; None for the active one.

    Returns:
        ``model`` itself. Patching again changes nothing; `unpatch` undoes it.

    Raises:
        ValueError: ``model`` has no LoRA layers, or none of them holds ``adapter_name``, or PEFT trains
            some of a MonteCLoRA adapter's layers as plain LoRA without saying so (a quantized base) and
            they cannot be fused.
    """
    layers = list(_lora_layers(model))
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no LoRA layers; "
            "add some first: model = peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    if adapter_name is not None:
        held = sorted(set().union(*map(_held_adapters, layers)))
        if adapter_name not in held:
            raise ValueError(f"adapter_name is {adapter_name!r}; the model's adapters are {held}")
    check_monteclora(model, _montecloras)
    attach_monteclora(model, _montecloras)
    left: Counter[str] = Counter()
    for layer in layers:
        reason = _reason_to_leave(layer, adapter_name)
        if reason is None:
            layer.__class__ = _fused_kind(type(layer))  # type: ignore[assignment]
            _fused_layers.add(layer)  # type: ignore[arg-type]
        else:
            left[reason] += 1
    add_groups(model, FusedLoraLinear)
    _group_compiled_layers()
    patched = len(layers) - left.total()
    detail = ", ".join(f"{reason}: {count}" for reason, count in left.most_common())
    _logger.info(
        "patched %d of %d LoRA layers%s", patched, len(layers), f"; left to PEFT: {detail}" if left else ""
    )
    return model


def _group_compiled_layers() -> None:
    """Have inductor group the layers of compiled models, where this torch has a place for the pass."""
    try:
        from .lora_graph_pass import install  # torch.compile's own modules, which only a patched model needs

        install()
    except (ImportError, AttributeError) as error:
        _logger.debug("compiled layers are not grouped: %s", error)


def unpatch(model: _Model) -> _Model:
    """Give every layer that `patch` changed its own class back, in place; return ``model`` itself.

    With the last patched layer of the process inductor's pass goes as well.
    """
    remove_groups(model)
    detach_monteclora(model)
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = PeftLoraLinear  # type: ignore[assignment]
        elif type(module).__module__ == "bayeslora.lora_quantized":
            module.__class__ = type(module).__bases__[-1]  # type: ignore[assignment]
        _fused_layers.discard(module)
    if not _fused_layers and (graph_pass := sys.modules.get("bayeslora.lora_graph_pass")) is not None:
        graph_pass.remove()
    return model
