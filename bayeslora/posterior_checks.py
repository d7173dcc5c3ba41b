"""What was read of a posterior's folder, and whether it is whole, of one save, and a posterior at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig

FORMAT_VERSION = 2  # 1 had no digests
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
POSTERIOR_CONFIG = "posterior_config.json"
POSTERIOR_WEIGHTS = "posterior.safetensors"
DIGESTED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, POSTERIOR_WEIGHTS)

# Of adapter_config.json, what may be edited: where the base is, and who wrote it.
_NOT_IN_DIGEST = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SavedFolder:
    """A folder that was read; its tensors are copies.

    Args:
        path: the folder.
        config: ``posterior_config.json``.
        adapter_config: ``adapter_config.json``, as PEFT understands it.
        values: ``adapter_model.safetensors``.
        beside: ``posterior.safetensors``.
    """

    path: Path
    config: dict[str, Any]
    adapter_config: PeftConfig
    values: dict[str, Tensor]
    beside: dict[str, Tensor]

    def file(self, name: str) -> str:
        """Return a file's path, quoted, as messages name it."""
        return repr(str(self.path / name))


# ---- of one save ---------------------------------------------------------------------------------


def file_digest(name: str, data: bytes) -> str:
    """Return the digest of a file; of PEFT's config, of what decides what the adapter computes."""
    if name == ADAPTER_CONFIG:
        data = _canonical({k: v for k, v in json.loads(data).items() if k not in _NOT_IN_DIGEST})
    return hashlib.sha256(data).hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the digest of ``posterior_config.json``: of all that it holds but the digest."""
    return hashlib.sha256(_canonical({k: v for k, v in config.items() if k != "digest"})).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def check_digests(saved: SavedFolder, data: Mapping[str, bytes]) -> None:
    """Check that the files are those of one save, as it wrote them.

    Raises:
        ValueError: naming the file.
    """
    file = saved.file(POSTERIOR_CONFIG)
    if saved.config.get("digest") != config_digest(saved.config):
        raise ValueError(f"{file} has been changed since it was saved: its 'digest' does not fit the rest")
    digests = saved.config.get("files")
    for name in DIGESTED:
        if not isinstance(digests, dict) or digests.get(name) != file_digest(name, data[name]):
            raise ValueError(
                f"{saved.file(name)} is of another save than {file}, or has been changed since; save the "
                "posterior again"
            )


# ---- a posterior ---------------------------------------------------------------------------------


def check_common(saved: SavedFolder) -> None:
    """Check what every method saves: PEFT's tensors are real and finite, pruned ratios are ratios.

    Raises:
        ValueError: naming the file and the key.
    """
    for key, value in saved.values.items():
        if value.is_floating_point() or value.is_complex():
            _check_float(saved, ADAPTER_WEIGHTS, key, value)
        if not bool(value.isfinite().all()):
            raise ValueError(f"{saved.file(ADAPTER_WEIGHTS)}: {key!r} holds NaN or infinity")
    pruned = saved.config.get("pruned")
    if not isinstance(pruned, list) or not all(_is_number(ratio) and 0 <= ratio < 1 for ratio in pruned):
        raise ValueError(f"{saved.file(POSTERIOR_CONFIG)} has pruned={pruned!r}, not ratios in [0, 1)")


def check_ivon(saved: SavedFolder) -> None:
    """Check what is saved of an IVON posterior: entries, Hessians and means agree, and could be learned.

    Raises:
        ValueError: naming the file and the key.
    """
    entries = saved.config.get("parameters")
    file, hess_file = saved.file(POSTERIOR_CONFIG), saved.file(POSTERIOR_WEIGHTS)
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{file}: 'parameters' must list tensors of {ADAPTER_WEIGHTS}, got {entries!r}")
    streams: dict[int, str] = {}
    for key, entry in entries.items():
        _check_entry(f"{file}: the entry of {key!r}", entry)
        for name, tensors in ((ADAPTER_WEIGHTS, saved.values), (POSTERIOR_WEIGHTS, saved.beside)):
            if key not in tensors:
                raise ValueError(f"{saved.file(name)} has no tensor {key!r}, which {POSTERIOR_CONFIG} lists")
            _check_float(saved, name, key, tensors[key])
        mean, hess = saved.values[key], saved.beside[key]
        if mean.shape != hess.shape:
            raise ValueError(
                f"{hess_file}: {key!r} has shape {tuple(hess.shape)}, "
                f"in {ADAPTER_WEIGHTS} it has {tuple(mean.shape)}"
            )
        numbers = float(entry["ess"]), float(entry["weight_decay"])
        check_gaussian(f"{hess_file}: {key!r}", mean, hess, *numbers)
        first = streams.setdefault(entry["stream"], key)
        if first != key:
            _check_tied(saved, key, first)
    if extra := saved.beside.keys() - entries.keys():
        raise ValueError(f"{hess_file}: {min(extra)!r} is not listed in {POSTERIOR_CONFIG}")


def check_gaussian(where: str, mean: Tensor, hess: Tensor, ess: float, weight_decay: float) -> None:
    """Check that a Gaussian is one that can be sampled; h alone may be negative.

    Raises:
        ValueError: the mean is not finite, or the precision λ (h + δ) not positive.
    """
    if not bool(mean.isfinite().all()):
        raise ValueError(f"{where} has a mean that holds NaN or infinity")
    if not bool((ess * (hess + weight_decay) > 0).all()):
        raise ValueError(f"{where} has a Hessian that is not positive with weight_decay {weight_decay} added")
    if bool((mean[torch.isinf(hess)] != 0).any()):
        raise ValueError(f"{where} has a pruned element (infinite Hessian) whose mean is not zero")


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}, not stream, ess and weight_decay")
    for name in ("stream", "ess", "weight_decay"):
        if name not in entry:
            raise ValueError(f"{where} has no {name!r}")
    stream, ess, weight_decay = entry["stream"], entry["ess"], entry["weight_decay"]
    if type(stream) is not int or not 0 <= stream < 1 << 32:
        raise ValueError(f"{where} has stream={stream!r}, not an integer from 0 below 2^32")
    if not _is_number(ess) or not 0 < ess <= _LARGEST:
        raise ValueError(f"{where} has ess={ess!r}, not a finite number > 0")
    if not _is_number(weight_decay) or not 0 <= weight_decay <= _LARGEST:
        raise ValueError(f"{where} has weight_decay={weight_decay!r}, not a finite number >= 0")


def _check_tied(saved: SavedFolder, key: str, first: str) -> None:
    """Check that a tensor that shares its noise with an earlier one is the same tensor."""
    entry, other = (saved.config["parameters"][name] for name in (key, first))
    if {**entry, "tied_to": first} != {**other, "tied_to": first} or entry.get("tied_to") != first:
        raise ValueError(
            f"{saved.file(POSTERIOR_CONFIG)}: {key!r} and {first!r} both have stream {entry['stream']}"
        )
    for name, tensors in ((ADAPTER_WEIGHTS, saved.values), (POSTERIOR_WEIGHTS, saved.beside)):
        if not torch.equal(tensors[key], tensors[first]):
            raise ValueError(f"{saved.file(name)}: {key!r} is not the same as {first!r}, which it is tied to")


def _check_float(saved: SavedFolder, name: str, key: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise ValueError(f"{saved.file(name)}: {key!r} has dtype {value.dtype}, not one of {_FLOATS}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
