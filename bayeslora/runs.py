"""A fine-tuning run on disk: the adapter, its posterior if it has one, and the task it was trained on.

The folder is a PEFT adapter (it loads in plain PEFT as the mean) with ``bayeslora_task.json`` beside it:
base model, scoring and prompt template, so that evaluation asks questions as training did, and the SHA-256
of the adapter's weights, so that a task never passes for another adapter's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .data import check_labels, check_text, parse_json
from .finetune import check_dtype, load_model
from .folders import recover, replaced_folder
from .scoring import check_max_length, check_template

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["Run", "Task", "load_run", "read_task", "save_run", "sha256"]

TASK_FILE = "bayeslora_task.json"
POSTERIOR_FILES = ("posterior_config.json", "posterior.safetensors")
_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_STALE = (*POSTERIOR_FILES, "adapter_model.bin", "metrics.json")  # an earlier run's, where the new has none
_TASK_FORMAT = 1
_TASK_BYTES = 1 << 20


@dataclass(frozen=True)
class Task:
    """What ``evaluate`` needs, beside the adapter, to ask questions as training did.

    Attributes:
        base_model: hub id, folder or ``.gguf`` file.
        scoring: one of :data:`bayeslora.scoring.METHODS`.
        template: the prompt.
        max_length: longest input in tokens; None for no limit.
        dtype: the base model's.
        training: how it was trained, for the reader.
        labels: choices of every row that names none itself.

    Raises:
        ValueError: an attribute is of the wrong type or out of range.
    """

    base_model: str
    scoring: str
    template: str
    max_length: int | None = None
    dtype: str = "float32"
    training: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_text("base_model", self.base_model)
        check_text("template", self.template)
        check_template(self.scoring, self.template)
        check_max_length(self.max_length)
        check_dtype(self.dtype)
        if not isinstance(self.training, dict):
            raise ValueError(f"training must be an object; got {type(self.training).__name__}")
        if self.labels is not None:
            object.__setattr__(self, "labels", check_labels(self.labels))


@dataclass(frozen=True)
class Run:
    """A saved fine-tuning, loaded: ``posterior`` is None for a plain adapter."""

    model: nn.Module
    tokenizer: Any
    task: Task
    posterior: Posterior | None


def save_run(output: str | Path, model: Any, task: Task, posterior: Posterior | None = None) -> None:
    """Write a folder :func:`load_run` and plain PEFT load: adapter, posterior if there is one, task.

    A run in the folder is kept until this one is whole; other files in it stay.
    """
    own_card = (Path(output) / _CARD).exists() and not (Path(output) / _CONFIG).exists()
    with replaced_folder(output, drop=_STALE) as folder:
        if posterior is None:
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            posterior.save_pretrained(folder)
        if own_card:  # the user's, not an earlier adapter's
            (folder / _CARD).unlink(missing_ok=True)
        names = [name for name in (_WEIGHTS, *POSTERIOR_FILES) if (folder / name).exists()]
        files = {"files": {name: sha256(folder / name) for name in names}}
        text = json.dumps({"format": _TASK_FORMAT, **asdict(task), **files}, indent=2)
        (folder / TASK_FILE).write_text(text + "\n", encoding="utf-8")


def read_task(directory: str | Path) -> Task:
    """Return the task a run was saved with; ``ValueError`` says which file is missing or wrong."""
    return _read(Path(directory))[0]


def load_run(directory: str | Path, *, device: torch.device, base_model: str | None = None) -> Run:
    """Load a saved run: base model, adapter, and posterior when the folder has one.

    Args:
        directory: folder written by :func:`save_run`.
        device: where to put the model.
        base_model: use this base instead of the recorded one (it moved, say).

    Raises:
        ValueError: a file is missing or wrong, or the folder was written to meanwhile.
    """
    from .patching import patch

    folder = Path(directory)
    task, files = _read(folder)
    base, tokenizer = load_model(base_model or task.base_model, device=device, dtype=task.dtype)
    try:
        model, posterior = _adapted(base, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files raise whatever their readers stumble over
        cause = str(error) or type(error).__name__
        raise ValueError(f"the adapter in {str(folder)!r} could not be loaded: {cause}") from error
    if _read(folder) != (task, files):
        raise ValueError(f"{folder} was written to while it was read; try again")
    return Run(patch(model).eval(), tokenizer, task, posterior)


def _adapted(base: Any, folder: Path) -> tuple[Any, Posterior | None]:
    """The base with the folder's adapter, and the posterior if there is one."""
    if any((folder / name).exists() for name in POSTERIOR_FILES):
        from .posterior import Posterior

        posterior = Posterior.from_pretrained(base, folder)
        return posterior.model, posterior
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)), None


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(folder: Path) -> tuple[Task, dict[str, str] | None]:
    """The task, and the digests of the files that belong to it (None from before they were kept)."""
    if not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} does not exist; pass the --output of bayeslora finetune")
    recover(folder)
    path = folder / TASK_FILE
    for needed in (path, folder / _CONFIG, folder / _WEIGHTS):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing; {str(folder)!r} was not saved by bayeslora finetune")
    try:
        task, files = _parse(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a bayeslora task file: {error}") from error
    for name in (_WEIGHTS, *POSTERIOR_FILES):
        found = sha256(folder / name) if (folder / name).is_file() else None
        if files is not None and found != files.get(name):
            cause = "is missing" if found is None else f"is not the one that {TASK_FILE} was saved with"
            raise ValueError(
                f"{folder / name} {cause}; the folder holds files of two runs, or not all of one"
            )
    return task, files


def _parse(path: Path) -> tuple[Task, dict[str, str] | None]:
    if path.stat().st_size > _TASK_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes; at most {_TASK_BYTES} are read")
    values = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected an object; got {type(values).__name__}")
    version, files = values.get("format"), values.get("files")
    if version != _TASK_FORMAT or isinstance(version, bool):
        raise ValueError(f"it has format {version!r}; this version reads format {_TASK_FORMAT}")
    names = [f.name for f in fields(Task)]
    missing = [name for name in names if name not in values and name != "labels"]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    if "files" in values and not isinstance(files, dict):
        raise ValueError(f"files must be an object; got {type(files).__name__}")
    return Task(**{name: values[name] for name in names if name in values}), files
