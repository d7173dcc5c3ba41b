"""A posterior on disk, beside PEFT's adapter: written and read as a whole, and checked before it is used.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own (the mean, in fp32), so the folder
loads in plain PEFT. ``posterior.safetensors`` holds the fp32 Hessian of each parameter under PEFT's key,
infinite where pruned; ``posterior_config.json`` the rest, and the digests of all: files of two saves, or
changed ones, are refused. Nothing is unpickled. peft is imported on use.

:func:`save_posterior` writes a folder and :func:`read_folder` reads one, with the checks of
``posterior_checks.py``; ``posterior_loading.py`` puts what was read into a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from bayeslora.folders import recover, replaced_folder
from bayeslora.ivon_distributed import is_sharded, whole
from bayeslora.posterior_adapters import adapter_of, alone, check_adapter_name, file_keys, places
from bayeslora.posterior_checks import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIGESTED,
    FORMAT_VERSION,
    POSTERIOR_CONFIG,
    POSTERIOR_WEIGHTS,
    SavedFolder,
    check_common,
    check_digests,
    check_gaussian,
    config_digest,
    file_digest,
)
from bayeslora.posterior_lifecycle import wrapped_hint

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from bayeslora.posterior import Posterior

README = "README.md"


# ---- writing -------------------------------------------------------------------------------------


def save_posterior(posterior: Posterior, path: str | PathLike[str]) -> None:
    """Write a posterior and its adapter; see :meth:`Posterior.save_pretrained`."""
    model = require_peft(posterior.model)
    gaussians = posterior.parameters
    if not gaussians:
        raise ValueError("the posterior has no sampled parameter; give IVON some that it perturbs")
    adapter, keys = keys_of(
        model, {name: g.parameter for name, g in gaussians.items()} | trained_fixed(posterior)
    )
    entries: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}  # the stream is one where the tensor is
    for name, g in gaussians.items():
        check_gaussian(repr(name), g.mean, g.hess, g.ess, g.weight_decay)
        for key in keys[name]:
            tied = {"tied_to": first[g.stream]} if g.stream in first else {}
            entries[key] = {"stream": g.stream, "ess": g.ess, "weight_decay": g.weight_decay, **tied}
            first.setdefault(g.stream, key)
    hess = {key: g.hess for name, g in gaussians.items() for key in keys[name]}
    values = {name: g.mean for name, g in gaussians.items()}
    write_folder(posterior, path, adapter, values, hess, {"method": "ivon", "parameters": entries})


def keys_of(
    model: PeftModel, tensors: Mapping[str, Tensor], adapter: str | None = None
) -> tuple[str, dict[str, list[str]]]:
    """Return the adapter of the tensors, and PEFT's file keys of each: several where it is tied.

    Args:
        model: a PEFT model.
        tensors: some of its parameters, by name.
        adapter: None for the one that they are of.

    Raises:
        ValueError: one of them would not come back from PEFT's file; says why.
    """
    adapter = adapter_of(model, tensors.values()) if adapter is None else adapter
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, list[str]] = {}
    for name, key in file_keys(model, adapter).items():
        if name in named:
            found.setdefault(id(named[name]), []).append(key)
    for name, tensor in tensors.items():
        if id(tensor) in found:
            continue
        if any(place.tensor is tensor for place in places(model)):
            kind = getattr(model.peft_config[adapter].peft_type, "value", "")
            raise ValueError(
                f"{name!r} is trained, but PEFT's file of a {kind} adapter does not hold it as it is, only "
                "what is computed from it, so a posterior could not be loaded again; keep opt.state_dict()"
            )
        raise ValueError(
            f"{name!r} is trained but not part of the adapter {adapter!r}, so PEFT would not save it; "
            "name its module in LoraConfig(modules_to_save=[...]) or freeze it"
        )
    return adapter, {name: found[id(tensor)] for name, tensor in tensors.items()}


def trained_fixed(posterior: Posterior) -> dict[str, Tensor]:
    """Return what is trained and not sampled, by name; PEFT must save it too."""
    return {name: f.tensor for name, f in posterior.fixed.items() if f.tensor.requires_grad}


def write_folder(
    posterior: Posterior,
    path: str | PathLike[str],
    adapter: str,
    values: Mapping[str, Tensor],
    beside: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write PEFT's files with the posterior in place, and ours beside them, as one save.

    Args:
        posterior: an IVON or MonteCLoRA posterior of a PEFT model.
        path: the folder.
        adapter: its adapter.
        values: name and mean of what is sampled; what is fixed comes from ``posterior.fixed``.
        beside: what ``posterior.safetensors`` holds, by PEFT's key.
        config: what ``posterior_config.json`` holds, beside version, pruned ratios and digests.
    """
    check_adapter_name(adapter)
    model: Any = posterior.model
    values = {**{name: fixed.value for name, fixed in posterior.fixed.items()}, **values}
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinity, which no posterior can; it is not saved")
    keys, folder = file_keys(model, adapter), Path(path)
    own = folder if adapter == "default" else folder / adapter  # as PEFT has it
    with posterior.sample(0, variance_scale=0.0), alone(model, adapter) as state:
        state.update({name: whole(state[name]) for name in keys})
        state.update(_by_every_name(model, values, keys))
        if any(map(is_sharded, model.parameters())) and dist.get_rank() != 0:
            return
        with replaced_folder(own) as staged:
            if (folder / README).is_file():  # PEFT brings it up to date
                shutil.copyfile(folder / README, staged / README)
            model.save_pretrained(str(staged), selected_adapters=[adapter], state_dict=state)
            if own != folder:
                (staged / README).replace(folder / README)
                for file in (staged / adapter).iterdir():
                    file.replace(staged / file.name)
                (staged / adapter).rmdir()
            if model.peft_config[adapter].is_prompt_learning:  # PEFT has not looked at the state
                held = load((staged / ADAPTER_WEIGHTS).read_bytes())
                _save(staged / ADAPTER_WEIGHTS, {**held, **{key: state[name] for name, key in keys.items()}})
            _save(staged / POSTERIOR_WEIGHTS, beside)
            pruned = [float(ratio) for ratio in posterior.pruned]
            written = {"format_version": FORMAT_VERSION, **config, "pruned": pruned}
            written["files"] = {name: file_digest(name, (staged / name).read_bytes()) for name in DIGESTED}
            written["digest"] = config_digest(written)
            text = json.dumps(written, indent=2) + "\n"
            (staged / POSTERIOR_CONFIG).write_text(text, encoding="utf-8")


def _by_every_name(
    model: nn.Module, values: Mapping[str, Tensor], keys: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the values, also under the other names of tied tensors that are in the file."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values_by_id = {id(tensor): values[name] for name, tensor in named if name in values}
    return {n: values_by_id[id(tensor)] for n, tensor in named if n in keys and id(tensor) in values_by_id}


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, also of one tensor that has several keys: it is saved under each.
    copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    save_file(copies, file, metadata={"format": "pt"})


def require_peft(model: nn.Module) -> PeftModel:
    """Return the model.

    Raises:
        TypeError: it is not PEFT's.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"save_pretrained needs a PEFT model (peft.get_peft_model), got {type(model).__name__}"
            f"{wrapped_hint(model) or '; for other models keep opt.state_dict()'}"
        )
    return model


# ---- reading -------------------------------------------------------------------------------------


@torch.inference_mode(False)  # the tensors outlive the caller's context
def read_folder(
    path: str | PathLike[str], methods: Mapping[str, Callable[[SavedFolder], None]]
) -> SavedFolder:
    """Read a posterior's folder and check all that can be checked without a model.

    Args:
        path: a folder that :func:`write_folder` wrote.
        methods: what checks the config and the tensors, by the saved method.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, holds what no posterior can be, or is not of this save.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; pass one made by Posterior.save_pretrained")
    recover(folder)
    for name in (*DIGESTED, POSTERIOR_CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder / name)!r} is missing; a posterior's folder has it")
    config = _read_json(folder / POSTERIOR_CONFIG)
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{str(folder / POSTERIOR_CONFIG)!r} has format_version {version!r}; this version reads up to "
            f"{FORMAT_VERSION}"
        )
    data = {name: (folder / name).read_bytes() for name in DIGESTED}
    _read_json(folder / ADAPTER_CONFIG)
    values, beside = (_tensors(folder / name, data[name]) for name in (ADAPTER_WEIGHTS, POSTERIOR_WEIGHTS))
    saved = SavedFolder(folder, config, _adapter_config(folder), values, beside)
    method = config.get("method")
    if not isinstance(method, str) or method not in methods:
        raise ValueError(f"{saved.file(POSTERIOR_CONFIG)} has method {method!r}, not one of {[*methods]}")
    check_common(saved)
    methods[method](saved)
    if version > 1 or "digest" in config:
        check_digests(saved, data)
    return saved


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(file)!r} holds a {type(found).__name__}, not the names and values of a config"
        )
    return found


def _adapter_config(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"{str(folder / ADAPTER_CONFIG)!r} is no adapter's config that this PEFT reads: {error!r}"
        ) from error


def _tensors(file: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{str(file)!r} is damaged or truncated: {error}") from error
