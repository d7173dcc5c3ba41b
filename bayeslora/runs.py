"""A fine-tuning run on disk: the adapter, its posterior if it has one, and the task it was trained on.

The folder is a PEFT adapter (it loads in plain PEFT as the mean) with ``bayeslora_task.json`` beside it:
base model, scoring and prompt template, so that evaluation asks questions as training did.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .finetune import load_model
from .scoring import check_template

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["Run", "Task", "load_run", "read_task", "save_run"]

TASK_FILE = "bayeslora_task.json"
POSTERIOR_FILES = ("posterior_config.json", "posterior.safetensors")
_TASK_FORMAT = 1


@dataclass(frozen=True)
class Task:
    """What ``evaluate`` needs, beside the adapter, to ask questions as training did."""

    base_model: str
    scoring: str
    template: str
    max_length: int | None = None
    dtype: str = "float32"
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A saved fine-tuning, loaded: ``posterior`` is None for a plain adapter."""

    model: nn.Module
    tokenizer: Any
    task: Task
    posterior: Posterior | None


def save_run(output: str | Path, model: Any, task: Task, posterior: Posterior | None = None) -> None:
    """Write a folder :func:`load_run` and plain PEFT load: adapter, posterior if there is one, task."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if posterior is None:
        for name in POSTERIOR_FILES:  # an earlier run's posterior would not belong to this mean
            (folder / name).unlink(missing_ok=True)
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        posterior.save_pretrained(folder)
    text = json.dumps({"format": _TASK_FORMAT, **asdict(task)}, indent=2)
    (folder / TASK_FILE).write_text(text + "\n", encoding="utf-8")


def read_task(directory: str | Path) -> Task:
    """Return the task a run was saved with; ``ValueError`` says which file is missing or wrong."""
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"folder {str(directory)!r} does not exist; pass the --output of bayeslora finetune")
    path = folder / TASK_FILE
    for needed in (path, folder / "adapter_config.json"):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing; {str(directory)!r} was not saved by bayeslora finetune")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format")
        task = Task(**{f.name: values[f.name] for f in fields(Task)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a bayeslora task file: {error!r}") from error
    if version != _TASK_FORMAT:
        raise ValueError(f"{path} has format {version}; this version reads format {_TASK_FORMAT}")
    check_template(task.scoring, task.template)
    return task


def load_run(directory: str | Path, *, device: torch.device, base_model: str | None = None) -> Run:
    """Load a saved run: base model, adapter, and posterior when the folder has one.

    Args:
        directory: folder written by :func:`save_run`.
        device: where to put the model.
        base_model: use this base instead of the recorded one (it moved, say).
    """
    from .patching import patch

    task = read_task(directory)
    base, tokenizer = load_model(base_model or task.base_model, device=device, dtype=task.dtype)
    posterior = None
    if any((Path(directory) / name).exists() for name in POSTERIOR_FILES):
        from .posterior import Posterior

        posterior = Posterior.from_pretrained(base, directory)
        model = patch(posterior.model)
    else:
        from peft import PeftModel

        model = patch(PeftModel.from_pretrained(base, str(directory)))
    return Run(model.eval(), tokenizer, task, posterior)
