"""MonteCLoRA on PEFT's layers: what `patch` attaches, what the user configures, and the loss.

Every adapted matrix A (or B) is replaced in each training forward by ``A + c Σᵢ πᵢ Zᵢ L`` with learned
variances and mixture weights (``monteclora_math.py``). PEFT's sampler modules keep the learned parameters, so
checkpoints are PEFT's, both ways. What PEFT's samplers buffer is dropped, and ``buffer_size`` is ignored:
noise is a function of counters here, drawn for all layers in two launches, and refilling a buffer from it
would give the same numbers.

Paper: Seth et al., "Robust and efficient fine-tuning of LLMs with Bayesian reparameterization of
low-rank adaptation" (TMLR 2025).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.monteclora_bank import MontecloraBank, add_hooks, remove_hooks
from bayeslora.monteclora_options import OPTION_NAMES, MontecloraOptions


def _adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Return the config of every MonteCLoRA adapter in ``model``, by adapter name."""
    found: dict[str, Any] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            found |= {n: c for n, c in configs.items() if getattr(c, "monteclora_config", None) is not None}
    return found


def check_layers(model: nn.Module, find: Callable[[nn.Module, str], list[Any]]) -> None:
    """Refuse a model in which layers of a MonteCLoRA adapter are plain LoRA and would stay so.

    Args:
        model: the model that is being patched.
        find: gives the layers of ``model`` that a bank can serve, by adapter name.

    Raises:
        ValueError: naming the kinds of layers and how many there are.
    """
    from peft.tuners.lora.layer import LoraLayer

    for adapter in _adapter_configs(model):
        served = {id(layer) for layer in find(model, adapter)}
        plain: Counter[str] = Counter()
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and (
                adapter in layer.lora_A or adapter in layer.lora_embedding_A
            ):
                variant = getattr(layer, "lora_variant", {}).get(adapter)
                if id(layer) not in served and type(variant).__name__ != "MontecloraLinearVariant":
                    base = type(layer.get_base_layer()).__name__
                    plain[
                        f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__} on {base}"
                    ] += 1
        if plain:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in plain.items())
            raise ValueError(
                f"adapter {adapter!r} has a monteclora_config, but PEFT trains these of its layers as plain "
                f"LoRA: {kinds}. Load the base model unquantized or by bitsandbytes, or target other layers, "
                "or use LoRA with bayeslora.IVON"
            )


def _ensure_sampler(layer: Any, adapter: str, config: Any) -> None:
    """Make the sampler that PEFT did not make, and empty the buffer of one that it did.

    PEFT puts it off until a model's weights are there, and makes none on a quantized base.
    """
    from peft.tuners.lora.variants import MontecloraLinearVariant

    if adapter not in getattr(layer, "lora_monteclora_sampler", ()):
        small = replace(config.monteclora_config, buffer_size=1)
        MontecloraLinearVariant.init(layer, adapter, replace(config, monteclora_config=small))
        layer._lora_monteclora_config[adapter] = config.monteclora_config
        layer.lora_monteclora_sampler[adapter].sampler.buffer_size = config.monteclora_config.buffer_size
        layer.lora_monteclora_sampler[adapter].train(layer.training)
    buffered = layer.lora_monteclora_sampler[adapter].sampler
    buffered.buffer, buffered.index = [], buffered.buffer_size  # PEFT's own forward would fill it again


def _scopes(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules whose call is a forward of ``layers``, or of a part of them that a user may call.

    Of a PEFT model these are itself, what PEFT wraps, the network in that without its head, and where the
    layers lie in several parts of that (encoder and decoder, towers), the parts; not each of a row of blocks.
    """
    wanted, seen = set(layers), {model}
    waiting = [model]
    while waiting:
        scope = waiting.pop(0)
        if not isinstance(scope, nn.ModuleList | nn.ModuleDict):  # nobody calls these
            yield scope
        inside = [child for child in scope.children() if child not in wanted and child not in seen]
        parts = [child for child in inside if len(wanted.intersection(child.modules())) > 1]
        if len(parts) == 1 or not isinstance(scope, nn.ModuleList | nn.Sequential):
            seen.update(parts)
            waiting += parts


def attach(model: nn.Module, find: Callable[[nn.Module, str], list[Any]]) -> None:
    """Give every MonteCLoRA adapter of ``model`` a bank; those that have one keep it.

    Args:
        model: the model that is being patched.
        find: gives the layers of ``model`` that a bank can serve, by adapter name.
    """
    from peft.tuners.lora.model import LoraModel

    for adapter, config in _adapter_configs(model).items():
        layers = [
            layer for layer in find(model, adapter) if layer.lora_A[adapter].weight.device.type != "meta"
        ]
        if not layers or all(adapter in layer.__dict__.get("_monteclora", ()) for layer in layers):
            continue
        for layer in layers:
            _ensure_sampler(layer, adapter, config)
        bank = MontecloraBank(layers, adapter, MontecloraOptions())
        places = ((m, n) for m in model.modules() for n, child in m._modules.items() if child is layers[0])
        bank.home = next(places, None)
        for index, layer in enumerate(layers):
            layer.__dict__.setdefault("_monteclora", {})[adapter] = (bank, index)
        for scope in _scopes(model, layers):
            add_hooks(scope, bank)
    banks = _banks(model)
    for module in model.modules():
        if banks and isinstance(module, LoraModel):
            module.__dict__["_get_monteclora_loss"] = TrainerLoss(module)


def detach(model: nn.Module) -> None:
    """Take out of ``model`` what `attach` put in, but for learned priors."""
    for module in model.modules():
        module.__dict__.pop("_monteclora", None)
        module.__dict__.pop("_get_monteclora_loss", None)
        remove_hooks(module)


class TrainerLoss:
    """What PEFT's ``MontecloraTrainerMixin`` calls in place of ``LoraModel._get_monteclora_loss``.

    Layers that are left to PEFT's own forward contribute PEFT's own terms.
    """

    def __init__(self, lora_model: Any) -> None:
        self._lora_model = lora_model
        self._banks = _banks(lora_model)
        layers = [m for m in lora_model.modules() if hasattr(m, "lora_monteclora_sampler")]
        self._layers = [(m.__dict__, m.lora_monteclora_sampler._modules) for m in layers]

    def __call__(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return the loss of the named adapters (None: the active ones), averaged over their layers."""
        names = self._lora_model.active_adapters if adapter_names is None else adapter_names
        wanted = [names] if isinstance(names, str) else list(names)
        losses = [
            (_bank_loss(bank), _world_size(bank), len(bank.layers))
            for bank in self._banks
            if bank.adapter in wanted
        ]
        for attributes, samplers in self._layers:
            for adapter in wanted:
                if adapter in samplers and adapter not in attributes.get("_monteclora", ()):
                    kl, entropy = samplers[adapter].get_variational_loss()
                    losses.append((kl + entropy, 1, 1))
        if len(losses) == 1:
            loss, share, _ = losses[0]
            return loss if share == 1 else loss * share
        count = sum(layers for _, _, layers in losses)
        return sum(loss * share * layers for loss, share, layers in losses) / count if losses else 0.0


def _world_size(bank: MontecloraBank) -> int:
    """Return by what a share of the tokens of all processes must be multiplied, before they average."""
    if isinstance(bank.loss_weight, Tensor) and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _bank_loss(bank: MontecloraBank) -> Tensor | float:
    return bank.weighted_loss() if bank.samples() and not bank.options.add_loss else 0.0


def _banks(model: nn.Module) -> list[MontecloraBank]:
    found: dict[int, MontecloraBank] = {}
    for module in model.modules():
        for bank, _ in module.__dict__.get("_monteclora", {}).values():
            found[id(bank)] = bank
    return list(found.values())


def _chosen_banks(model: nn.Module, adapter_name: str | None) -> list[MontecloraBank]:
    banks = _banks(model)
    if not banks:
        raise ValueError(
            f"model ({type(model).__name__}) has no MonteCLoRA layers that bayeslora runs; give LoraConfig a "
            "monteclora_config and call bayeslora.patch(model)"
        )
    if adapter_name is None:
        active: set[str] = set()
        for bank in banks:
            names = bank.layers[0]._active_adapter
            active |= {names} if isinstance(names, str) else set(names)
        chosen = [bank for bank in banks if bank.adapter in active]
        if not chosen:
            raise ValueError(
                f"the active adapters {sorted(active)} have no MonteCLoRA layers that bayeslora runs, but "
                f"{[b.adapter for b in banks]}; call bayeslora.patch(model) again after adding an adapter, "
                "or pass adapter_name"
            )
        return chosen
    chosen = [bank for bank in banks if bank.adapter == adapter_name]
    if not chosen:
        raise ValueError(
            f"adapter_name is {adapter_name!r}; the MonteCLoRA adapters are {[b.adapter for b in banks]}"
        )
    return chosen


def monteclora_loss(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """Return MonteCLoRA's variational loss, to be added to the task's.

    The mean over layers of ``η (KL_gauss + KL_wishart + KL_dir) + Σ π²`` (the last where ``use_entropy``), at
    the noise of the last forward; closed forms over all layers at once, computed in fp64. It has a graph of
    its own: both losses can be differentiated together or one after the other. Under gradient accumulation
    divide it as the task's loss; where a trainer gives the model ``num_items_in_batch``, it is already
    weighted by the micro-batch's share of the tokens, so that a step's micro-batches count it once together.

    Args:
        model: a patched model with MonteCLoRA layers.
        adapter_name: the adapter; None for the active ones.

    Returns:
        An fp32 scalar tensor (fp64 for fp64 adapters); zero in eval mode, in mode "mean", and with
        ``add_loss=True`` (where the model's own loss has it).

    Raises:
        ValueError: the model has no such layers.

    Paper: Seth et al., "Robust and efficient fine-tuning of LLMs with Bayesian reparameterization of
    low-rank adaptation" (TMLR 2025).
    """
    total, *others = (_bank_loss(bank) for bank in _chosen_banks(model, adapter_name))
    for loss in others:
        total = total + loss
    return total if isinstance(total, Tensor) else torch.zeros((), device=next(model.parameters()).device)


def configure_monteclora(model: nn.Module, adapter_name: str | None = None, **options: Any) -> None:
    """Choose how a patched model's MonteCLoRA layers sample; what is not named stays as it is.

    ::

        bayeslora.configure_monteclora(model, resample="step", estimator="mixture")

    Draws are counted from 1 in every process: give a resumed run another ``seed``. A recorded CUDA graph
    keeps the options it was recorded with, but for ``sample_scaler``.

    Args:
        model: a patched model with MonteCLoRA layers.
        adapter_name: the adapter; None for the active ones.
        **options: any of

            - ``estimator``: "collapsed" (one Gaussian of the mixture's law, the default) or "mixture".
            - ``dirichlet``: "exact" (the default) or "logistic_normal" (PEFT's approximation).
            - ``resample``: a new draw each "forward" (the default, as in the paper) or each "step" (when a
              parameter has changed since, or its gradient was taken and cleared).
            - ``perturb``: "A" (the default), "B" or "both", with the same learned priors.
            - ``outer_samples``: M >= 1 draws of variances and weights, N components each, averaged.
            - ``sparse``: only the component with the largest weight is active.
            - ``mode``: "joint" (the default); "mean" trains A and B without noise, then "priors"
              freezes them and trains the priors: the post-hoc mode. Build the optimizer afterwards.
            - ``sample_scaler``: c, a number >= 0, or a function of the number of draws made so far (which
              a replayed CUDA graph does not call: there, set numbers).
            - ``add_loss``: add the variational loss to the ``loss`` of the model's own output, as
              plain HF Trainer needs.
            - ``seed``: 64-bit key of the noise (default: from torch's generator when patched).

    Raises:
        ValueError: an option's value is out of range, or the model has no such layers.
        TypeError: an option of another name.
    """
    unknown = set(options) - set(OPTION_NAMES)
    if unknown:
        raise TypeError(f"configure_monteclora has no option {sorted(unknown)[0]!r}; it has {OPTION_NAMES}")
    wanted = [(bank, replace(bank.options, **options)) for bank in _chosen_banks(model, adapter_name)]
    for bank, chosen in wanted:
        bank.scale_of(chosen)
    for bank, chosen in wanted:
        if set(options) == {"sample_scaler"}:  # keeps the memory that a recorded CUDA graph reads
            bank.options = chosen
            bank.set_scale()
        else:
            bank.set_options(chosen)
