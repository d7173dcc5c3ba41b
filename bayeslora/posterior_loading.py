"""A posterior from disk into a model: checked against it first, and then put in as a whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayeslora.ivon_distributed import is_sharded
from bayeslora.kernels.param_bucket import state_dtype
from bayeslora.posterior import Posterior
from bayeslora.posterior_adapters import (
    active_adapter,
    add_beside,
    alone,
    check_adapter_name,
    file_keys,
    places,
    rewriting,
)
from bayeslora.posterior_checks import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    POSTERIOR_CONFIG,
    POSTERIOR_WEIGHTS,
    SavedFolder,
    check_gaussian,
    check_ivon,
)
from bayeslora.posterior_files import read_folder
from bayeslora.posterior_gaussian import GaussianParameter, fixed_tensors
from bayeslora.ties import memory
from bayeslora.transactions import unchanged_on_failure

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# What an adapter computes, beside its tensors.
_MEANING = (
    "lora_alpha", "use_rslora", "alpha_pattern", "alpha", "scaling", "projection_prng_key", "projection_seed",
    "random_loc_seed", "random_seed",
)  # fmt: skip
_UNKNOWN_BASE = ("corda", "lora_ga")


def load_posterior(
    model: nn.Module, path: str | PathLike[str], adapter_name: str | None = None, is_trainable: bool = False
) -> Posterior:
    """Load a posterior and its adapter; see :meth:`Posterior.from_pretrained`."""
    from bayeslora import monteclora_posterior

    if adapter_name is not None:
        check_adapter_name(adapter_name)
    saved = read_folder(path, {"ivon": check_ivon, "monteclora": monteclora_posterior.check_saved})
    if saved.config["method"] == "ivon":
        return put_into(model, saved, adapter_name, is_trainable, _build)
    if adapter_name is not None:
        raise ValueError("adapter_name is for IVON posteriors; a MonteCLoRA one takes the active adapter")
    return monteclora_posterior.load_monteclora(model, saved, is_trainable)


@torch.inference_mode(False)  # the adapter outlives the caller's context
def put_into(
    model: Any,
    saved: SavedFolder,
    adapter_name: str | None,
    is_trainable: bool,
    build: Callable[[PeftModel, SavedFolder, str], Posterior],
) -> Posterior:
    """Put a folder's adapter into a model and build the posterior, or leave the model as it was.

    Args:
        model: as for :meth:`Posterior.from_pretrained`, like the next and ``is_trainable``.
        saved: the folder.
        adapter_name: the adapter that takes it, added where it is not there.
        is_trainable: leave it trainable.
        build: writes the weights into the adapter and returns the posterior.
    """
    from peft import PeftModel

    config, peft_model = copy.deepcopy(saved.adapter_config), isinstance(model, PeftModel)
    adapter = adapter_name or (active_adapter(model) if peft_model else "default")
    config.inference_mode = not is_trainable
    with unchanged_on_failure(model):
        if not peft_model:
            _check_base_is_known(saved)
            written = _check_by_adding(model, saved, adapter)
        elif adapter in model.peft_config:
            _check_meaning(saved, model, adapter)
            own = [place.tensor for place in places(model) if place.adapter == adapter]
            held = _held(model, saved, adapter).values()
            written = [*{memory(tensor): tensor for tensor in (*own, *held)}.values()]
        else:
            _check_base_fits(saved, model)
            written = _check_by_adding(model, saved, adapter)
        with unchanged_on_failure(model, written):
            if not peft_model or adapter not in model.peft_config:
                model = _added(model, saved, adapter, config)
            posterior = build(model, saved, adapter)
            if is_trainable or (peft_model and adapter_name is not None):
                model.set_adapter(adapter)
    return posterior


# ---- whether it fits -----------------------------------------------------------------------------


def _check_by_adding(model: nn.Module, saved: SavedFolder, adapter: str) -> list[Tensor]:
    """Add the adapter without memory, compare shapes, and take it out again.

    Returns:
        Tensors of the model itself that adding it for real, or its file, writes into.

    Raises:
        ValueError: it does not fit.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    config: Any = copy.deepcopy(saved.adapter_config)
    rewrites = bool(rewriting(config)) and not isinstance(model, PeftModel)
    if rewrites:
        config.init_lora_weights = False
    own = {memory(p) for p in model.parameters()}
    with unchanged_on_failure(model, always=True):
        try:
            with torch.device("meta"):  # whatever rank the config asks for
                added = _added(model, saved, adapter, config, low_cpu_mem_usage=True)
            held = _held(added, saved, adapter)
        except RuntimeError:  # some kinds of adapters need memory: they are compared once they have it
            return []
        for key, value in held.items():
            if key in saved.values:
                _check_shape(saved, key, value)
        written = [value for value in held.values() if memory(value) in own]
        if rewrites:
            layers = [layer for layer in added.modules() if isinstance(layer, BaseTunerLayer)]
            written += [p for layer in layers for p in layer.get_base_layer().parameters()]
    return written


def _added(
    model: Any, saved: SavedFolder, adapter: str, config: PeftConfig, *, low_cpu_mem_usage: bool = False
) -> PeftModel:
    """Add an adapter to a base model or beside others; return the PEFT model.

    Raises:
        ValueError: PEFT cannot.
    """
    from peft import PeftModel, get_peft_model

    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter, low_cpu_mem_usage=low_cpu_mem_usage)  # type: ignore
        add_beside(model, adapter, config, low_cpu_mem_usage=low_cpu_mem_usage)
        return model
    except (RuntimeError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{saved.file(ADAPTER_CONFIG)} does not fit the model: {reason}") from error


def _held(model: PeftModel, saved: SavedFolder, adapter: str) -> dict[str, Tensor]:
    """Return the adapter's tensors by PEFT's key: parameters, and buffers if there are any."""
    from peft import get_peft_model_state_dict

    with alone(model, adapter) as state:
        held: dict[str, Tensor] = get_peft_model_state_dict(
            model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False
        )
        if saved.values.keys() - held.keys():  # PEFT adds embeddings that LoRA targets or that were resized
            more = get_peft_model_state_dict(
                model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=True
            )
            held |= {key: value for key, value in more.items() if key in saved.values}
    return held


def _check_shapes(saved: SavedFolder, held: dict[str, Tensor]) -> None:
    file = saved.file(ADAPTER_WEIGHTS)
    for key, value in held.items():
        if key not in saved.values:
            shape = tuple(value.shape)
            raise ValueError(f"{file} has no tensor {key!r}, which the model has with shape {shape}")
        _check_shape(saved, key, value)
    for key, value in saved.values.items():
        if key not in held:
            raise ValueError(f"{file}: {key!r} of shape {tuple(value.shape)} is not in the model's adapter")


def _check_shape(saved: SavedFolder, key: str, held: Tensor) -> None:
    file, found = saved.file(ADAPTER_WEIGHTS), saved.values[key]
    if found.shape != held.shape:
        raise ValueError(
            f"{file}: {key!r} has shape {tuple(found.shape)}, in the model it has {tuple(held.shape)}"
        )
    if found.is_floating_point() != held.is_floating_point():
        raise ValueError(f"{file}: {key!r} has dtype {found.dtype}, in the model {held.dtype}")


def _check_meaning(saved: SavedFolder, model: PeftModel, adapter: str) -> None:
    """Check that the adapter computes with its tensors what the saved one did: shapes do not tell."""
    config, own = saved.adapter_config, model.peft_config[adapter]
    values: dict[str, Any] = {n: (getattr(config, n, None), getattr(own, n, None)) for n in _MEANING}
    values["a base changed by"] = rewriting(config)[:1], rewriting(own)[:1]
    for name, (found, wanted) in values.items():
        if found != wanted:
            raise ValueError(
                f"{saved.file(ADAPTER_CONFIG)} has {name}={found!r}, the model's adapter {adapter!r} "
                f"{wanted!r}; pass adapter_name with a new name, or the base model"
            )


def _check_base_fits(saved: SavedFolder, model: PeftModel) -> None:
    wanted = rewriting(saved.adapter_config)
    if wanted and wanted not in [rewriting(config) for config in model.peft_config.values()]:
        raise ValueError(
            f"{saved.file(ADAPTER_CONFIG)} is of an adapter whose start ({wanted[0]}) changes the base that "
            f"the model's adapters {[*model.peft_config]} need; load it onto a base model of its own"
        )


def _check_base_is_known(saved: SavedFolder) -> None:
    wanted = rewriting(saved.adapter_config)
    if wanted and wanted[0].startswith(_UNKNOWN_BASE):
        raise ValueError(
            f"{saved.file(ADAPTER_CONFIG)} is of an adapter whose start ({wanted[0]}) changed the base by "
            "what the folder does not hold; load it into the PEFT model that was trained"
        )


# ---- what is built -------------------------------------------------------------------------------


def write_weights(model: PeftModel, saved: SavedFolder, adapter: str) -> None:
    """Write the file's tensors into the adapter, and check that they have arrived.

    Raises:
        ValueError: the adapter has other tensors, or holds something else afterwards.
    """
    from peft import set_peft_model_state_dict

    _check_shapes(saved, _held(model, saved, adapter))
    set_peft_model_state_dict(model, dict(saved.values), adapter_name=adapter)
    for key, value in _held(model, saved, adapter).items():
        if not is_sharded(value) and not torch.equal(value, saved.values[key].to(value.device, value.dtype)):
            raise ValueError(
                f"{saved.file(ADAPTER_WEIGHTS)}: {key!r} does not arrive in the model: PEFT or the model "
                "puts something else in its place"
            )


def _build(model: PeftModel, saved: SavedFolder, adapter: str) -> Posterior:
    _check_shapes(saved, _held(model, saved, adapter))
    names = {key: name for name, key in file_keys(model, adapter).items()}
    every = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    own_names = {id(p): name for name, p in model.named_parameters()}
    gaussians: dict[str, GaussianParameter] = {}
    seen: dict[Any, str] = {}
    for key, entry in saved.config["parameters"].items():
        p = every.get(names.get(key, ""))
        if p is None:
            raise ValueError(f"{saved.file(POSTERIOR_CONFIG)}: PEFT does not load {key!r} as it is saved")
        first = seen.setdefault(memory(p), key)
        if first != key:
            if entry.get("tied_to") != first:
                raise ValueError(
                    f"{saved.file(POSTERIOR_CONFIG)}: {key!r} and {first!r} are two tensors; in the model "
                    "they are one"
                )
            continue
        mean, hess = (
            tensors[key].to(p.device, state_dtype(p.dtype)) for tensors in (saved.values, saved.beside)
        )
        ess, weight_decay = float(entry["ess"]), float(entry["weight_decay"])
        check_gaussian(f"{saved.file(POSTERIOR_WEIGHTS)}: {key!r}", mean, hess, ess, weight_decay)
        stream = entry["stream"]
        gaussians[own_names[id(p)]] = GaussianParameter(p, mean, hess, stream, ess, weight_decay)
    values = {memory(every[n]): saved.values[key].to(every[n].device) for key, n in names.items()}
    write_weights(model, saved, adapter)
    fixed = fixed_tensors(model, [g.parameter for g in gaussians.values()], values)
    return Posterior(model, gaussians, [*saved.config["pruned"]], fixed)
