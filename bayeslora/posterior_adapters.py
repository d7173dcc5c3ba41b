"""Which layer, adapter and side a tensor belongs to: found in the modules that hold it, never in its name.

PEFT's layers keep their tensors by adapter, as in ``layer.lora_A["default"].weight``; so do its heads
(``modules_to_save``), its models (what all layers share) and its prompt encoders. Names do not tell: an
adapter may be called "0" beside ``layers.0``, and one tensor may lie in several layers. Two tensors are one
where their memory is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .ties import memory

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from .posterior import Posterior

_CONTAINERS = ("ModuleDict", "ParameterDict", "BufferDict")  # by adapter; the last is PEFT's
_REWRITING = ("pissa", "corda", "olora", "loftq", "lora_ga")
_OF_THE_REWRITING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")


class Place(NamedTuple):
    """Where a tensor of an adapter lies: ``layer.side[adapter].inner``.

    Attributes:
        path: the layer's name in the model.
        layer: PEFT's layer, head, model or prompt model.
        side: the container's name, as "lora_A".
        adapter: the adapter's name.
        inner: the tensor's name in what the container holds for the adapter, as "weight"; or "".
        tensor: a parameter or a buffer.
    """

    path: str
    layer: Any
    side: str
    adapter: str
    inner: str
    tensor: Tensor

    @property
    def name(self) -> str:
        """The tensor's name in the model's ``state_dict``."""
        return ".".join(part for part in (self.path, self.side, self.adapter, self.inner) if part)

    @property
    def key(self) -> str:
        """The same for every adapter: the name without the adapter's."""
        return ".".join(part for part in (self.path, self.side, self.inner) if part)


def places(model: nn.Module) -> list[Place]:
    """Return the place of every tensor of every adapter in ``model``; one that is tied has several."""
    if "peft" not in sys.modules:
        return []
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper, BaseTuner, PeftModel)
    is_kind: dict[type, bool] = {}  # by type: asking is slow
    found: list[Place] = []
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, layer = waiting.pop()
        if layer in seen:
            continue
        seen.add(layer)
        kind, inside = type(layer), []
        if kind not in is_kind:
            is_kind[kind] = isinstance(layer, kinds)
        for side, held in layer._modules.items():
            if held is None:
                continue
            if is_kind[kind] and type(held).__name__ in _CONTAINERS:
                found += [Place(path, layer, side, *where) for where in _held_by(held)]
            inside.append((f"{path}.{side}" if path else side, held))
        waiting += reversed(inside)
    return found


def _held_by(container: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield adapter, inner name and tensor of what a container holds."""
    for adapter, tensor in _direct(container):
        yield adapter, "", tensor
    for adapter, part in container._modules.items():
        if part is not None and part._modules:
            for path, module in part.named_modules(remove_duplicate=False):
                yield from (
                    (adapter, f"{path}.{name}".lstrip("."), tensor) for name, tensor in _direct(module)
                )
        elif part is not None:  # the usual case, in which generators would take most of the time
            yield from ((adapter, name, tensor) for name, tensor in _direct(part))


def _direct(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in own if tensor is not None]


def places_by_memory(model: nn.Module) -> dict[Any, list[Place]]:
    """Return the places of every adapter's tensors, together where the memory is one."""
    found: dict[Any, list[Place]] = {}
    for place in places(model):
        found.setdefault(memory(place.tensor), []).append(place)
    return found


def places_of(posterior: Posterior) -> dict[str, list[Place]]:
    """Return the places of each of the posterior's parameters, by its name; several where it is tied.

    Found once: a search through a large model takes longer than a pass of few tokens.
    """
    if posterior._places is None:
        held, names = places_by_memory(posterior.model), posterior.mean.keys()
        named = ((name, p) for name, p in posterior.model.named_parameters() if name in names)
        posterior._places = {name: held.get(memory(p), []) for name, p in named}
    return posterior._places


def homes(posterior: Posterior) -> list[tuple[Any, str]]:
    """Return PEFT's layers and heads that hold the posterior's parameters, and the adapter they are of."""
    found = (place for held in places_of(posterior).values() for place in held)
    # What all layers share lies in PEFT's model, which is not merged or switched itself.
    layers = ((p.layer, p.adapter) for p in found if hasattr(type(p.layer), "merged_adapters"))
    return list(dict.fromkeys(layers))


def adapter_of(model: PeftModel, tensors: Iterable[Tensor]) -> str:
    """Return the adapter that all of the tensors belong to, but for those of the base model.

    Raises:
        ValueError: they belong to several, or to none and there is not one active adapter.
    """
    held = places_by_memory(model)
    adapters = [{place.adapter for place in held[key]} for key in map(memory, tensors) if key in held]
    if not adapters:
        return active_adapter(model)
    common = set.intersection(*adapters)
    if len(common) != 1:
        raise ValueError(
            f"the posterior's parameters are not those of one adapter of {list(model.peft_config)}"
        )
    return common.pop()


def active_adapter(model: PeftModel) -> str:
    """Return the active adapter.

    Raises:
        ValueError: several are active, or none.
    """
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise ValueError(f"one adapter must be active, got {adapters}; call model.set_adapter(name)")
    return adapters[0]


def check_adapter_name(name: Any) -> None:
    """Refuse names that cannot be a module's and a folder's.

    Raises:
        TypeError: it is no string.
        ValueError: it is empty, or holds a dot or a separator of paths.
    """
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a string, got {name!r}")
    if not name or any(mark in name for mark in "./\\\0"):
        raise ValueError(
            f"{name!r} cannot be an adapter's name, which is a folder's too: leave out dots, '/' and '\\'"
        )


# ---- PEFT's file of one adapter ------------------------------------------------------------------


@contextmanager
def alone(model: PeftModel, adapter: str) -> Iterator[dict[str, Any]]:
    """Show PEFT one adapter only, and yield the model's state dict without the others.

    PEFT leaves out of an adapter's file whatever has another adapter's name in its own: beside an adapter
    "0" all of ``layers.0``.
    """
    shown: Any = model
    configs, active = shown.peft_config, shown.active_adapter
    if len(configs) == 1:
        yield model.state_dict()
        return
    others = {place.name for place in places(model) if place.adapter in configs and place.adapter != adapter}
    try:
        shown.peft_config, shown.active_adapter = {adapter: configs[adapter]}, adapter
        yield {name: value for name, value in model.state_dict().items() if name not in others}
    finally:
        shown.peft_config, shown.active_adapter = configs, active


def file_keys(model: PeftModel, adapter: str) -> dict[str, str]:
    """Return PEFT's file key of each tensor that the adapter's file holds as it is, by its name in the model.

    Tied tensors have a name and a key for each place. A tensor is missing that PEFT does not save, or of
    which it saves something else: of a prompt encoder, what that computes.
    """
    from peft import get_peft_model_state_dict

    with alone(model, adapter) as state:
        saved = get_peft_model_state_dict(
            model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False
        )
    names = {id(value): name for name, value in state.items()}
    found = {names[id(value)]: key for key, value in saved.items() if id(value) in names}
    if model.peft_config[adapter].is_prompt_learning:  # read from the encoder, not from the state dict
        encoder = {n: v for n, v in state.items() if n.startswith(f"prompt_encoder.{adapter}.")}
        for key, value in saved.items():
            found |= {n: key for n, v in encoder.items() if torch.equal(v.cpu(), value.cpu())}
    return found


# ---- adapters that are added ---------------------------------------------------------------------


def rewriting(config: PeftConfig) -> tuple[Any, ...]:
    """Return how PEFT changes the base's weights when it adds such an adapter; empty: not at all.

    PiSSA, OLoRA, CorDA and LoRA-GA subtract the adapter's start from the base; LoftQ and KaSA round it. The
    name of that comes first, then what else decides the change.
    """
    init: Any = getattr(config, "init_lora_weights", None)
    how = init.lower() if isinstance(init, str) and init.lower().startswith(_REWRITING) else None
    if getattr(config, "kasa_config", None) is not None:
        how = "kasa"
    if how is None:
        return ()
    values = (getattr(config, name, None) for name in _OF_THE_REWRITING)
    return how, *(sorted(value) if isinstance(value, list | set) else value for value in values)


def add_beside(
    model: PeftModel, adapter: str, config: PeftConfig, *, low_cpu_mem_usage: bool = False
) -> None:
    """Add an adapter, whose weights are then written, and leave the base's weights alone.

    Where the config's initialisation would change them, that was done when the model got its first adapter.
    """
    added = copy.deepcopy(config)
    if rewriting(config):
        added.init_lora_weights = False  # type: ignore[attr-defined]
    before = [(p, p.data) for p in model.parameters() if type(p) is nn.Parameter]
    model.add_adapter(adapter, added, low_cpu_mem_usage=low_cpu_mem_usage)
    for p, data in before:
        if p.data_ptr() != data.data_ptr():
            p.data = data
    if rewriting(config):  # whoever loads its file onto the bare base needs it
        model.peft_config[adapter].init_lora_weights = config.init_lora_weights  # type: ignore[attr-defined]
