"""A posterior on disk, beside PEFT's adapter.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own (the mean, in fp32), so the folder
loads in plain PEFT. ``posterior.safetensors`` holds the fp32 Hessian of each parameter under PEFT's key,
infinite where pruned; ``posterior_config.json`` the rest. Nothing is unpickled. peft is imported on use.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayeslora.ivon_distributed import is_sharded, whole
from bayeslora.kernels.param_bucket import state_dtype
from bayeslora.posterior import Posterior
from bayeslora.posterior_gaussian import GaussianParameter
from bayeslora.posterior_lifecycle import wrapped_hint

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT_VERSION = 1
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
POSTERIOR_CONFIG = "posterior_config.json"
POSTERIOR_WEIGHTS = "posterior.safetensors"


def save_posterior(posterior: Posterior, path: str | PathLike[str]) -> None:
    """Write a posterior and its adapter; see :meth:`Posterior.save_pretrained`."""
    model = _require_peft(posterior.model)
    adapter, keys = _adapter_of(posterior, model)
    outside = [name for name in posterior.parameters if name not in keys]
    if outside:
        raise ValueError(
            f"{outside[0]!r} is trained but not part of the adapter {adapter!r}, so PEFT would not save it; "
            "name its module in LoraConfig(modules_to_save=[...]) or freeze it"
        )
    by_name = dict(model.named_parameters())
    by_id = {id(by_name[name]): g.mean.float() for name, g in posterior.parameters.items()}
    every = model.named_parameters(remove_duplicate=False)  # PEFT saves tied ones under each of their names
    means = {name: by_id[id(p)] for name, p in every if id(p) in by_id}
    state = model.state_dict()
    sharded = any(map(is_sharded, state.values()))
    state = {name: whole(value) if name in keys else value for name, value in state.items()}
    if sharded and dist.get_rank() != 0:
        return
    folder = Path(path)
    model.save_pretrained(str(folder), selected_adapters=[adapter], state_dict={**state, **means})
    if adapter != "default":
        folder = folder / adapter
    hess = {keys[name]: g.hess.float().contiguous().cpu() for name, g in posterior.parameters.items()}
    save_file(hess, folder / POSTERIOR_WEIGHTS, metadata={"format": "pt"})
    config = {
        "format_version": FORMAT_VERSION,
        "method": "ivon",
        "pruned": posterior.pruned,
        "parameters": {
            keys[name]: {"stream": g.stream, "ess": g.ess, "weight_decay": g.weight_decay}
            for name, g in posterior.parameters.items()
        },
    }
    (folder / POSTERIOR_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_posterior(model: nn.Module, path: str | PathLike[str], adapter_name: str | None = None) -> Posterior:
    """Load a posterior and its adapter; see :meth:`Posterior.from_pretrained`."""
    from peft import PeftModel

    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; pass one made by Posterior.save_pretrained")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, POSTERIOR_CONFIG, POSTERIOR_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder / name)!r} is missing; a posterior's folder has it")
    config = _read_config(folder / POSTERIOR_CONFIG)
    if config.get("method") == "monteclora":
        from bayeslora.monteclora_posterior import load_monteclora

        if adapter_name is not None:
            raise ValueError("adapter_name is for IVON posteriors; a MonteCLoRA one takes the active adapter")
        return load_monteclora(model, folder, config)
    mean = _read_tensors(folder / ADAPTER_WEIGHTS)
    hess = _read_tensors(folder / POSTERIOR_WEIGHTS)
    _check_agreement(folder, config, mean, hess)
    if not isinstance(model, PeftModel):
        return _load_onto_base(model, folder, config, mean, hess, adapter_name or "default")
    if adapter_name is None or adapter_name in model.peft_config:
        adapter = _active_adapter(model) if adapter_name is None else adapter_name
        posterior = _load_into(model, folder, config, mean, hess, adapter)
    else:
        posterior = _load_beside(model, folder, config, mean, hess, adapter_name)
    if adapter_name is not None:
        model.set_adapter(adapter_name)
    return posterior


def _load_beside(
    model: PeftModel,
    folder: Path,
    config: dict[str, Any],
    mean: dict[str, Tensor],
    hess: dict[str, Tensor],
    adapter: str,
) -> Posterior:
    """Load into a new adapter, which is taken out again if it does not fit."""
    from peft import PeftConfig

    try:
        model.add_adapter(adapter, PeftConfig.from_pretrained(str(folder)))
        return _load_into(model, folder, config, mean, hess, adapter)
    except ValueError:
        if adapter in model.peft_config:
            model.delete_adapter(adapter)
            _unwrap_empty(model)
        raise


def _unwrap_empty(model: nn.Module) -> None:
    """Put base layers back where no adapter is left: PEFT leaves their wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer) and not any(
                len(getattr(child, held)) for held in child.adapter_layer_names
            ):
                setattr(parent, name, child.get_base_layer())


def _load_onto_base(
    model: nn.Module,
    folder: Path,
    config: dict[str, Any],
    mean: dict[str, Tensor],
    hess: dict[str, Tensor],
    adapter: str,
) -> Posterior:
    from peft import PeftConfig, get_peft_model

    peft_config = PeftConfig.from_pretrained(str(folder))
    trained = [p for p in model.parameters() if p.requires_grad]  # PEFT freezes them
    try:
        with torch.inference_mode(False):  # the adapter outlives the caller's context
            peft_model = get_peft_model(model, peft_config, adapter)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{str(folder / ADAPTER_CONFIG)!r} does not fit the model: {error}") from error
    try:
        return _load_into(peft_model, folder, config, mean, hess, adapter)
    except ValueError:
        peft_model.unload()  # take the adapter out again: the base model is as it was
        for p in trained:
            p.requires_grad_(True)
        raise


def _load_into(
    model: PeftModel,
    folder: Path,
    config: dict[str, Any],
    mean: dict[str, Tensor],
    hess: dict[str, Tensor],
    adapter: str,
) -> Posterior:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    names = {key: name for name, key in _peft_keys(model, adapter).items()}
    by_name = dict(model.named_parameters())
    held = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if mean.keys() - held.keys():  # PEFT adds embeddings that LoRA targets or that were resized
        held |= {key: value for key, value in _embeddings(model, adapter).items() if key in mean}
    expected = {key: tuple(value.shape) for key, value in held.items()}  # parameters, and buffers if any
    _check_scaling(folder, model, adapter)
    _check_shapes(folder / ADAPTER_WEIGHTS, {k: tuple(v.shape) for k, v in mean.items()}, expected)
    set_peft_model_state_dict(model, dict(mean), adapter_name=adapter)
    parameters = {}
    for key, entry in config["parameters"].items():
        p = by_name[names[key]]
        dtype = state_dtype(p.dtype)
        with torch.inference_mode(False):  # what is pruned later, outside of it
            held_mean, held_hess = mean[key].to(p.device, dtype), hess[key].to(p.device, dtype)
        parameters[names[key]] = GaussianParameter(
            parameter=p,
            mean=held_mean,
            hess=held_hess,
            stream=int(entry["stream"]),
            ess=float(entry["ess"]),
            weight_decay=float(entry["weight_decay"]),
        )
    return Posterior(model, parameters, pruned=list(config["pruned"]))


def _embeddings(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return what PEFT saves with the embeddings' base weights included."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=True
    )
    return found


def _check_scaling(folder: Path, model: PeftModel, adapter: str) -> None:
    """Check that the adapter scales B A as the saved one: shapes do not tell."""
    from peft import PeftConfig

    saved, own = PeftConfig.from_pretrained(str(folder)), model.peft_config[adapter]
    for name in ("lora_alpha", "use_rslora", "alpha_pattern"):
        found, wanted = getattr(saved, name, None), getattr(own, name, None)
        if found != wanted:
            raise ValueError(
                f"{str(folder / ADAPTER_CONFIG)!r} has {name}={found!r}, the model's adapter {adapter!r} "
                f"{wanted!r}; pass adapter_name with a new name, or the base model"
            )


def _require_peft(model: nn.Module) -> PeftModel:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"save_pretrained needs a PEFT model (peft.get_peft_model), got {type(model).__name__}"
            f"{wrapped_hint(model) or '; for other models keep opt.state_dict()'}"
        )
    return model


def _active_adapter(model: PeftModel) -> str:
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise ValueError(f"one adapter must be active, got {adapters}; call model.set_adapter(name)")
    return adapters[0]


def _adapter_of(posterior: Posterior, model: PeftModel) -> tuple[str, dict[str, str]]:
    """Return the adapter that holds all of the posterior's parameters (or the active one), and its keys."""
    for adapter in model.peft_config:
        try:
            keys = _peft_keys(model, adapter)
        except KeyError:  # PEFT's, for an adapter without the trainable tokens that another one has
            continue
        if keys.keys() >= posterior.parameters.keys():
            return adapter, keys
    adapter = _active_adapter(model)
    return adapter, _peft_keys(model, adapter)


def _peft_keys(model: PeftModel, adapter: str) -> dict[str, str]:
    """Return PEFT's file key of each parameter that the adapter saves, by parameter name."""
    from peft import get_peft_model_state_dict

    # PEFT alone knows how it renames: let it rename a state dict whose values carry their own names.
    every = dict(model.named_parameters(remove_duplicate=False))  # a tied one under each of its names
    probe = {name: torch.tensor(i, device="cpu") for i, name in enumerate(every)}
    names = list(probe)
    saved = get_peft_model_state_dict(
        model, state_dict=dict(probe), adapter_name=adapter, save_embedding_layers=False
    )
    return {names[int(value)]: key for key, value in saved.items() if value.dim() == 0}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{str(file)!r} has format_version {found!r}; this version reads {FORMAT_VERSION}")
    for key in ("parameters", "pruned"):
        if key not in config:
            raise ValueError(f"{str(file)!r} has no key {key!r}")
    if config.get("method") == "monteclora":
        return config
    for key, entry in config["parameters"].items():
        missing = {"stream", "ess", "weight_decay"} - set(entry)
        if missing:
            raise ValueError(f"{str(file)!r}: the entry of {key!r} has no {sorted(missing)[0]!r}")
    return config


@torch.inference_mode(False)
def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged or truncated: {error}") from error


def _check_agreement(
    folder: Path, config: dict[str, Any], mean: dict[str, Tensor], hess: dict[str, Tensor]
) -> None:
    """Check that the three files speak of the same tensors."""
    for key in config["parameters"]:
        for name, tensors in ((ADAPTER_WEIGHTS, mean), (POSTERIOR_WEIGHTS, hess)):
            if key not in tensors:
                raise ValueError(
                    f"{str(folder / name)!r} has no tensor {key!r}, which {POSTERIOR_CONFIG} lists"
                )
        if mean[key].shape != hess[key].shape:
            raise ValueError(
                f"{str(folder / POSTERIOR_WEIGHTS)!r}: {key!r} has shape {tuple(hess[key].shape)}, "
                f"in {ADAPTER_WEIGHTS} it has {tuple(mean[key].shape)}"
            )
        if not bool((hess[key] > 0).all()):
            raise ValueError(
                f"{str(folder / POSTERIOR_WEIGHTS)!r}: {key!r} has a Hessian that is not positive"
            )


def _check_shapes(
    file: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    for key, shape in expected.items():
        if key not in found:
            raise ValueError(f"{str(file)!r} has no tensor {key!r}, which the model has with shape {shape}")
        if found[key] != shape:
            raise ValueError(f"{str(file)!r}: {key!r} has shape {found[key]}, in the model it has {shape}")
    for key, shape in found.items():
        if key not in expected:
            raise ValueError(f"{str(file)!r}: {key!r} of shape {shape} is not in the model's adapter")
