"""The noise of all MonteCLoRA layers of one adapter, drawn together once a forward.

A `MontecloraBank` belongs to one adapter of one model. Two hooks on the model open it when a forward
starts, which draws the chi-square and Dirichlet variates of all layers in one launch and their perturbed
matrices in another, and close it when the forward ends. Layers ask it for their matrices (`matrices`).

A layer that gradient checkpointing runs again gets the matrices of its forward. Two forwards through
checkpointed layers that wait for one backward cannot be told apart, and raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.monteclora_options import MontecloraOptions, check_scaler
from bayeslora.monteclora_part import Part

_logger = logging.getLogger("bayeslora")

_TOKEN = "bayeslora.monteclora"
_device_dtype_shape = attrgetter("device", "dtype", "shape")


class MontecloraBank:
    """All MonteCLoRA layers of one adapter; see the module's docstring.

    Args:
        layers: PEFT's LoRA Linear layers with a sampler for ``adapter``, in the model's order.
        adapter: its name.
        options: see `bayeslora.configure_monteclora`.
    """

    def __init__(self, layers: Sequence[Any], adapter: str, options: MontecloraOptions) -> None:
        self.layers, self.adapter = list(layers), adapter
        self._adapters: list[Any] = [layer._modules["lora_A"]._modules for layer in self.layers]
        self.seed = int(torch.randint(2**62, (), device="cpu")) if options.seed is None else options.seed
        self.options = MontecloraOptions()
        self.paused = False
        self.home: tuple[nn.Module, str] | None = None
        """The parent of the first layer, and the layer's name there."""
        self._draws = 0
        self._running: list[nn.Module] = []  # modules in whose call we are, from the outermost
        self.loss_weight: Tensor | float = 1.0
        self._said: set[str] = set()
        self.set_options(options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": [], "loss_weight": 1.0}

    def set_options(self, options: MontecloraOptions) -> None:
        """Take other options; the count of draws goes on."""
        if options.seed is not None:
            self.seed = options.seed
        before, self.options = self.options.mode, options
        self._build()
        if options.mode != before:
            for layer in self.layers:
                a, b, priors = self._trainable(layer)
                for parameter in (a, b):
                    parameter.requires_grad_(options.mode != "priors")
                for parameter in priors:
                    parameter.requires_grad_(options.mode != "mean")

    def _trainable(self, layer: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        modules = layer._modules
        a, b = (modules[name]._modules[self.adapter].weight for name in ("lora_A", "lora_B"))
        return a, b, list(modules["lora_monteclora_sampler"]._modules[self.adapter].parameters())

    def _traits(self) -> list[Any]:
        weights = [modules[self.adapter]._parameters["weight"] for modules in self._adapters]
        return list(map(_device_dtype_shape, weights))

    @torch.inference_mode(False)  # what is made there could not be written to in training
    def _build(self) -> None:
        counts = {part.device: part.counter for part in getattr(self, "parts", [])}
        members: dict[Any, list[int]] = {}
        self._built_for = self._traits()
        for i, (device, dtype, _) in enumerate(self._built_for):
            members.setdefault((device, dtype), []).append(i)
        self.parts, self._place = [], {}
        for indices in members.values():
            layers = [self.layers[i] for i in indices]
            part = Part(layers, self.adapter, indices, self.options, self.seed)
            part.counter.fill_(self._draws) if part.device not in counts else part.counter.copy_(
                counts[part.device]
            )
            for position, i in enumerate(indices):
                self._place[i] = (part, position)
            self.parts.append(part)
        self._versions: list[int] | None = None
        self.set_scale()

    def set_scale(self) -> None:
        """Write c to the device, where also a recorded CUDA graph reads it."""
        value = self.scale_of(self.options)
        for part in self.parts:
            part.scale.fill_(value)

    def scale_of(self, options: MontecloraOptions) -> float:
        """Return what c would be now; ``ValueError`` if a schedule gives no such number."""
        scaler = options.sample_scaler
        if callable(scaler):
            return check_scaler(scaler(self._draws))
        return self.parts[0].sampler(0).sample_scaler if scaler is None else scaler

    # ---- the forward ---------------------------------------------------------------------------------

    def samples(self) -> bool:
        """Tell whether a forward here and now is perturbed."""
        return (
            not self.paused and self.options.mode != "mean" and any(layer.training for layer in self.layers)
        )

    def _in_use(self) -> bool:
        """Tell whether the adapter is active, on layers that are still the model's."""
        for layer, adapters in zip(self.layers, self._adapters, strict=True):
            active = layer._active_adapter
            named = self.adapter == active if isinstance(active, str) else self.adapter in active
            if named and self.adapter in adapters and not layer._disable_adapters:
                return not self._unloaded()
        return False

    def _unloaded(self) -> bool:
        """Tell whether PEFT has put the base layers back (``merge_and_unload``, ``unload``)."""
        if self.home is None:
            return False
        parent, name = self.home
        return parent._modules.get(name) is self.layers[0]._modules["base_layer"]

    def perturbs(self, layer: Any) -> bool:
        """Tell whether a call of ``layer`` here and now is perturbed."""
        return layer.training and not self.paused and self.options.mode != "mean"

    def open(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Start a forward of the model: its forward-pre hook."""
        if torch.compiler.is_compiling():
            return _eager(self.open, module, args, kwargs)
        if self._unloaded():
            return remove_hooks(module, self)
        if "_is_replica" in module.__dict__ and self.samples():
            raise RuntimeError(
                "MonteCLoRA's layers share one draw, which the threads of nn.DataParallel cannot; start with "
                "torchrun or accelerate, or set CUDA_VISIBLE_DEVICES"
            )
        if module in self._running:
            self._running.clear()  # of a call that was interrupted: torch then runs no hooks
        self._running.append(module)
        if len(self._running) == 1 and torch._C._current_graph_task_id() == -1:
            self.loss_weight = _share_of_batch(module, kwargs)
            transformed = torch._C._are_functorch_transforms_active()  # then PEFT's own layers run
            if self.samples() and self._in_use() and not transformed:
                self.refresh()
                if kwargs.get("num_items_in_batch") is not None and kwargs.get("labels") is None:
                    self._say_once(
                        "num_items_in_batch came without labels (label_smoothing_factor, "
                        "compute_loss_func), so a micro-batch's share of its step is unknown and each counts "
                        "MonteCLoRA's loss in full: under gradient accumulation lower kl_loss_weight"
                    )

    def close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """End a forward of the model: its forward hook, also called (without output) on an exception."""
        if torch.compiler.is_compiling():
            return _eager(self.close, module, args, kwargs, output)
        if module in self._running:
            del self._running[self._running.index(module) :]
        if self._running or torch._C._current_graph_task_id() != -1 or not self.samples():
            return
        nodes = list(_graph_nodes(output))
        for part in self.parts:
            if part.current is not None:
                for node in nodes:  # whichever of them a loss is made of keeps the draw for a recomputation
                    node.metadata.setdefault(_TOKEN, []).append(part.current)
            part.release()
        if self.options.add_loss and self._in_use():
            self._add_loss(output, bool(nodes))

    def _add_loss(self, output: Any, trains: bool) -> None:
        """Add the variational loss to the loss in a model's output; say once where there is none."""
        is_dict = isinstance(output, dict)
        loss = output.get("loss") if is_dict else getattr(output, "loss", None)
        if loss is None:
            if trains:
                self._say_once(
                    "add_loss=True, but the model returned no loss to add to (Trainer's "
                    "label_smoothing_factor and compute_loss_func take the labels away), so the variational "
                    "loss is left out; set add_loss=False and use PEFT's MontecloraTrainerMixin or "
                    "bayeslora.monteclora_loss(model)"
                )
            return
        loss = loss + self.weighted_loss().to(loss.dtype)
        if is_dict:
            output["loss"] = loss
        else:
            output.loss = loss

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _logger.warning(text)

    def refresh(self) -> None:
        """Perturb every layer's matrices, by a new draw unless this optimizer step has one."""
        if self._traits() != self._built_for:
            self._build()
        if self.options.mode == "priors":
            for layer in self.layers:  # PEFT's set_adapter() thaws all of an adapter
                for parameter in self._trainable(layer)[:2]:
                    parameter.requires_grad_(False)
        advance = True
        if self.options.resample == "step":
            versions = [p._version for layer in self.layers for p in self._all_parameters(layer)]
            cleared = [part.gradients_cleared() for part in self.parts]
            advance, self._versions = versions != self._versions or any(cleared), versions
        if advance:
            self._draws += 1
            if callable(self.options.sample_scaler):
                self.set_scale()
        for part in self.parts:
            part.refresh(advance)

    def _all_parameters(self, layer: Any) -> list[Tensor]:
        a, b, priors = self._trainable(layer)
        return [a, b, *priors]

    def matrices(self, index: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands in A's and B's places in a call of layer ``index``."""
        if torch.compiler.is_compiling():
            return _eager(self.matrices, index, a, b)
        if not self.perturbs(self.layers[index]):
            return a, b
        part, i = self._place[index]
        drawn = self._running and part.current is not None and part.current.outputs
        if not drawn and torch._C._current_graph_task_id() == -1:
            self.refresh()  # called by itself, or made active since the forward of the model began
        if not part.perturbs_b:
            return part.perturbed(i), b
        b = part.perturbed(i + len(part.layers) * part.perturbs_a)
        return part.perturbed(i) if part.perturbs_a else a, b

    # ---- the loss ------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """Return the variational loss, the mean over sites, an fp32 scalar (fp64 for fp64 adapters)."""
        sites = sum(len(part.plan.sites) for part in self.parts)
        total, *others = (part.loss(sites) for part in self.parts)
        for other in others:
            total = total + other.to(total.device, total.dtype)
        return total

    def weighted_loss(self) -> Tensor:
        """Return the loss times the last forward's share of its optimizer step's tokens."""
        weight = self.loss_weight
        if not isinstance(weight, Tensor) and weight == 1.0:
            return self.loss()
        return self.loss() * (weight.to(self.parts[0].device) if isinstance(weight, Tensor) else weight)


@torch.compiler.disable
def _eager(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method outside the graph that is being compiled."""
    return method(*arguments)


def _share_of_batch(module: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """Return the part of an accumulated batch that a forward holds.

    A trainer that gives the model ``num_items_in_batch`` has it divide the loss by that, not by the number
    of micro-batches; so must the variational loss, which is added to each.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    shifted = kwargs.get("shift_labels")
    if isinstance(shifted, Tensor):
        labels = shifted
    elif _shifts_labels(module):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / items


def _shifts_labels(module: nn.Module) -> bool:
    """Tell whether a model's loss is that of the next token, and leaves out the first label."""
    get_base = getattr(module, "get_base_model", None)
    base = get_base() if get_base is not None else module
    if "CausalLM" in type(base).__name__:
        return True
    encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return getattr(base, "loss_type", None) == "ForConditionalGeneration" and not encoder_decoder


def _graph_nodes(output: Any, levels: int = 3) -> Iterator[Any]:
    """Yield the nodes of the graph that a model's output comes from; containers may be nested."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output.grad_fn
    elif levels:
        if isinstance(output, dict):
            values: Iterable[Any] = output.values()
        else:
            values = output if isinstance(output, list | tuple) else getattr(output, "__dict__", {}).values()
        for value in values:
            yield from _graph_nodes(value, levels - 1)


def add_hooks(model: nn.Module, bank: MontecloraBank) -> None:
    """Open and close ``bank`` with every forward of ``model``."""
    model.register_forward_pre_hook(bank.open, with_kwargs=True)
    model.register_forward_hook(bank.close, with_kwargs=True, always_call=True)


def remove_hooks(module: nn.Module, bank: MontecloraBank | None = None) -> None:
    """Take out what `add_hooks` put in, for ``bank`` or for all."""
    hook_dicts: list[dict[int, Callable[..., Any]]] = [module._forward_pre_hooks, module._forward_hooks]
    for hooks in hook_dicts:
        owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
        for key in [k for k, o in owners.items() if isinstance(o, MontecloraBank) and bank in (None, o)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
