"""Layers of one module that read the same input (q, k and v; gate and up) computed in one call.

A Python autograd function costs the host more than PEFT's own operators do, so what helps small batches
is to call it less often. `patch` finds the layers by their names and gives each parent module one
`LoraGroup` for them. Within one call of the parent, the first of them that is called computes all of
them and parks the others' outputs; each takes its own when it is called. Nothing is assumed of the
parent's forward: a parked output is handed out only if a call of the layer itself, there and then, would
compute it, which needs

- the same tensor object as input, at the same version (no change in place in between);
- the same weights at the same versions, scaling and dropout, read anew from the layer that is called;
- the same grad mode, dtype under autocast, CUDA stream, thread and saved-tensor hooks, the last so that a
  part of the parent under gradient checkpointing never takes a result from outside of that part.

Otherwise the layer computes its output by itself. Two hooks on the parent open the group when a call of
it starts and drop whatever is parked when it ends, also by an exception: nothing outlives the call, and
layers called from anywhere else are not grouped. Which layers are computed together depends on the model
and the call alone, never on what earlier calls did: a recomputation repeats its forward exactly.
"""

import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .lora_linear import apply_layers
from .lora_passes import Layer

_logger = logging.getLogger("bayeslora")

_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, Whisper, ViT, ...
    ("q_proj", "kv_a_proj_with_mqa"),  # DeepSeek
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),  # BERT, RoBERTa
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("to_q", "to_k", "to_v"),  # diffusers
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),  # T5 v1.1
    ("w1", "w3"),
)
"""Names of sibling layers that read one tensor; in cross attention the first, the query, reads another."""

_CROSS_ATTENTION = re.compile(r"cross|enc_?dec|encoder_attn|encoder_attention|attn2", re.IGNORECASE)

_thread = threading.get_ident
_top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class LoraCall(NamedTuple):
    """All that a layer's output depends on besides its input."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    transposed: bool
    """Whether ``weight`` is stored as ``(K, N)``."""
    scaling: float
    dropout_p: float
    dtype: torch.dtype
    """The one the call is computed in: autocast's, or x's."""

    def tensors(self) -> Layer:
        """Return the tensors as `apply_layers` takes them."""
        if self.transposed:
            return self.weight.t(), self.bias, self.lora_a, self.lora_b
        return self[:4]

    def versions(self) -> tuple[int, ...]:
        """Return the versions of the tensors, which every change in place increments."""
        bias = 0 if self.bias is None else self.bias._version
        return self.weight._version, bias, self.lora_a._version, self.lora_b._version

    def is_same(self, other: "LoraCall") -> bool:
        """Tell whether ``other`` has the same tensors, by identity, and the same numbers."""
        return (
            self.weight is other.weight
            and self.bias is other.bias
            and self.lora_a is other.lora_a
            and self.lora_b is other.lora_b
            and self[4:] == other[4:]
        )

    def is_beside(self, x: Tensor) -> bool:
        """Tell whether the tensors are where ``x`` is."""
        return x.device == self.weight.device == self.lora_a.device == self.lora_b.device


class _Parked(NamedTuple):
    """Outputs computed ahead, by member; each is taken once."""

    x: Tensor
    context: tuple[Any, ...]
    outputs: dict[int, tuple[LoraCall, tuple[int, ...], Tensor]]


class LoraGroup:
    """Up to ``size`` layers of one parent module; see the module's docstring.

    Holds its layers weakly: a layer can be copied, pickled and freed without its siblings. Copies of the
    layers join the group's copy by `join`.
    """

    def __init__(self, size: int) -> None:
        self._members: list[Callable[[], nn.Module | None] | None] = [None] * size
        self._scope: tuple[Any, ...] | None = None
        self._parked: _Parked | None = None

    def __reduce__(self) -> tuple[type["LoraGroup"], tuple[int]]:
        return LoraGroup, (len(self._members),)

    def join(self, index: int, layer: nn.Module) -> None:
        """Make ``layer`` the member ``index`` unless there is one."""
        member = self._members[index]
        if member is None or member() is None:
            self._members[index] = weakref.ref(layer)

    def _is_left(self, parent: nn.Module) -> bool:
        """Tell whether no member is ``parent``'s child any more (PEFT's ``merge_and_unload``, ``unload``)."""
        if "_is_replica" in parent.__dict__:  # of nn.DataParallel: its hooks are the original's
            return False
        children = parent._modules.values()
        for member in self._members:  # noqa: SIM110 - half of the time, and as a rule the first is there
            if member is not None and member() in children:
                return False
        return True

    def open(self, parent: nn.Module, _args: Any) -> None:
        """Start a call of the parent: its forward-pre hook, which takes itself out when it has no use."""
        if not torch.compiler.is_compiling():
            if self._is_left(parent):
                return _remove_hooks(parent, self)
            self._parked = None
            self._scope = (_thread(), _top_saved_tensors_hooks(True))

    def close(self, parent: nn.Module, _args: Any, output: Any) -> None:
        """End a call of the parent: its forward hook, also called (without output) on an exception."""
        if not torch.compiler.is_compiling():
            parked, self._parked, self._scope = self._parked, None, None
            if parked is not None and output is not None:
                _logger.debug(
                    "%s: outputs computed ahead were not used: %s", type(parent).__name__, [*parked.outputs]
                )

    def output(
        self,
        index: int,
        layer: nn.Module,
        x: Tensor,
        call: LoraCall,
        sibling_call: Callable[[nn.Module, Tensor, torch.dtype], LoraCall | None],
    ) -> Tensor | None:
        """Return the output of ``layer`` for ``x``, parked or computed now with its siblings'.

        Args:
            index: ``layer``'s.
            layer: the member that is called.
            x: its input.
            call: what its output depends on.
            sibling_call: gives the same of a sibling that is called with ``x`` next, to be computed in
                ``call``'s dtype, or None where the fused forward could not serve that call.

        Returns:
            The output; None where there is nothing to share, and the layer computes it by itself.
        """
        member = self._members[index]
        if self._scope is None or member is None or member() is not layer:
            return None
        if self._scope != (_thread(), _top_saved_tensors_hooks(True)):
            return None
        if type(x) is not Tensor or x.is_inference():  # inference tensors have no version
            return None
        stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
        context = x._version, torch.is_grad_enabled(), stream
        parked = self._parked
        if parked is not None and parked.x is x and parked.context == context:
            ahead = parked.outputs.pop(index, None)
            if not parked.outputs:
                self._parked = None
            if ahead is not None and ahead[0].is_same(call) and ahead[1] == call.versions():
                return ahead[2]
        calls = {index: call}
        for i, sibling in self._others(index):
            other = sibling_call(sibling, x, call.dtype)
            if other is not None and other[5:] == call[5:] and other.is_beside(x):
                calls[i] = other
        if len(calls) == 1:
            return None
        return self._compute(index, x, context, calls)

    def _others(self, index: int) -> Iterator[tuple[int, nn.Module]]:
        for i, member in enumerate(self._members):
            layer = None if i == index or member is None else member()
            if layer is not None:
                yield i, layer

    def _compute(self, index: int, x: Tensor, context: tuple[Any, ...], calls: dict[int, LoraCall]) -> Tensor:
        order = sorted(calls)  # the same bits whichever layer is called first
        call = calls[index]
        layers = [calls[i].tensors() for i in order]
        results = apply_layers(x, layers, call.scaling, call.dropout_p, None, call.dtype)
        outputs = dict(zip(order, results, strict=True))
        own = outputs.pop(index)
        parked = {i: (calls[i], calls[i].versions(), y) for i, y in outputs.items()}
        self._parked = _Parked(x, context, parked)
        return own


def find_groups(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield parent modules and their child layers, of class ``kind``, whose names say they read one tensor.

    Args:
        model: the module to search.
        kind: the class of the layers, which have ``in_features``.
    """
    for path, parent in model.named_modules():
        children = {name: child for name, child in parent._modules.items() if type(child) is kind}
        is_cross = bool(_CROSS_ATTENTION.search(".".join(path.split(".")[-2:])))
        taken: set[nn.Module] = set()
        for names in _SAME_INPUT:
            readers = names[1:] if is_cross and len(names) == 3 else names
            layers: list[Any] = [children[name] for name in readers if name in children]
            layers = [layer for layer in layers if layer not in taken]
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                taken.update(layers)
                yield parent, layers


def _remove_hooks(parent: nn.Module, group: LoraGroup | None = None) -> None:
    """Take the hooks of ``group``, or of every group, out of ``parent``."""
    hooks: Sequence[Any] = (parent._forward_pre_hooks, parent._forward_hooks)
    for dictionary in hooks:
        for key, hook in list(dictionary.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, LoraGroup) and group in (None, owner):
                del dictionary[key]
                parent._forward_hooks_always_called.pop(key, None)


def add_groups(model: nn.Module, kind: type[nn.Module]) -> None:
    """Group the layers of class ``kind`` in ``model``, in place; regroups where there are groups."""
    remove_groups(model)
    for parent, layers in find_groups(model, kind):
        group = LoraGroup(len(layers))
        free = [layer for layer in layers if "_lora_group" not in layer.__dict__]  # not of another parent
        for index, layer in enumerate(free):
            layer.__dict__["_lora_group"] = (group, index)
            group.join(index, layer)
        parent.register_forward_pre_hook(group.open)
        parent.register_forward_hook(group.close, always_call=True)


def remove_groups(model: nn.Module) -> None:
    """Take out of ``model`` everything that `add_groups` put in."""
    for module in model.modules():
        module.__dict__.pop("_lora_group", None)
        _remove_hooks(module)
