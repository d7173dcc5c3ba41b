"""What the commands share: progress on stderr, tables on stdout, checks of folders, metrics.json."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from . import __version__, finetune
from .data import check_labels
from .folders import recover, write_file

__all__ = [
    "Reporter",
    "check_file",
    "check_installed",
    "check_output",
    "environment",
    "metrics_table",
    "pairs_table",
    "say",
    "split_labels",
    "stopped_with",
    "versions",
    "write_metrics",
]

_SECONDS_BETWEEN_LINES = 10.0
_PACKAGES = ("torch", "triton", "peft", "transformers")

_COLUMNS = {
    "accuracy": ("accuracy", lambda v: f"{100 * v:.1f}%"),
    "ece": ("ECE", lambda v: f"{100 * v:.1f}%"),
    "nll": ("NLL", lambda v: f"{v:.3f}"),
    "brier": ("Brier", lambda v: f"{v:.3f}"),
    "seconds_per_step": ("s/step", lambda v: f"{v:.2f}"),
}


class Reporter:
    """Names each stage of the work and shows how far it is.

    On a terminal a bar a stage; elsewhere one line when a stage begins, one when it ends, and between them
    one at every tenth of it, where that is ten seconds after the last.

    Args:
        hush: keep the libraries' own bars and warnings off stderr meanwhile (not with
            ``BAYESLORA_DEBUG``); pass False where a download's bar is worth seeing.
    """

    def __init__(self, *, hush: bool = True) -> None:
        self.console = Console(file=sys.stderr)  # bound now, so that it is not hushed itself
        self._hush = hush and not os.environ.get("BAYESLORA_DEBUG")
        self._cleanup = ExitStack()
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage, self._began, self._last = "", 0.0, ""
        self._told = self._tenths = 0.0

    def __enter__(self) -> Reporter:
        self._bars.start()
        self._cleanup.callback(self._bars.stop)
        if self._hush:
            self._cleanup.enter_context(redirect_stderr(io.StringIO()))
            self._cleanup.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._cleanup.close()

    def notice(self, stage: str) -> None:
        """Finish the stage in progress and begin another."""
        self._finish()
        self._stage, self._began, self._last = stage, time.perf_counter(), ""
        self._told, self._tenths = self._began, 0
        if self.console.is_terminal:
            self._task = self._bars.add_task(stage, total=None, note="")
        else:
            say(self.console, f"{stage} ...")

    def tell(self, text: str) -> None:
        """Finish the stage in progress and print a line, whatever is hushed."""
        self._finish()
        say(self.console, text)

    def warn(self, text: str) -> None:
        """Print a warning, whatever is hushed."""
        self.tell(f"warning: {text}")

    def on_progress(self, progress: finetune.Progress) -> None:
        """Show how far the stage is; a training stage shows its loss too."""
        note = "" if progress.loss is None else f"loss {progress.loss:.3f}"
        self._last = f"{progress.step}/{progress.total} {note}".strip()
        if self._task is not None:
            self._bars.update(self._task, completed=progress.step, total=progress.total, note=note)
            return
        now, tenths = time.perf_counter(), 10 * progress.step // progress.total
        if self._tenths < tenths < 10 and now - self._told >= _SECONDS_BETWEEN_LINES:
            left = (now - self._began) * (progress.total / progress.step - 1)
            say(self.console, f"{self._stage}: {self._last}, about {left:.0f} s left")
            self._told, self._tenths = now, tenths

    def _finish(self) -> None:
        if not self._stage:
            return
        seconds = time.perf_counter() - self._began
        if self._task is not None:
            self._bars.update(self._task, total=self._bars.tasks[self._task].total or 1)
            self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
            self._bars.stop_task(self._task)
        else:
            say(self.console, f"{self._stage}: {self._last}, {seconds:.1f} s".replace(": ,", ":"))
        self._stage, self._task = "", None


def metrics_table(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the table of measured rows, each with a ``name`` and any of the known columns."""
    rows = list(rows)
    table = Table(title=title, title_justify="left")
    table.add_column("")
    shown = [key for key in _COLUMNS if any(key in row for row in rows)]
    for key in shown:
        table.add_column(_COLUMNS[key][0], justify="right")
    for row in rows:
        table.add_row(str(row["name"]), *(_COLUMNS[key][1](row[key]) for key in shown))
    return table


def pairs_table(pairs: Mapping[str, str]) -> Table:
    """Return a two-column table of names and values."""
    table = Table(show_header=False, box=None)
    for name, value in pairs.items():
        table.add_row(name, value)
    return table


def say(console: Console, text: str) -> None:
    """Print a plain line: no markup, no highlighting, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def split_labels(labels: str | None) -> tuple[str, ...] | None:
    """Return the choices that an option names, with commas between them."""
    return None if labels is None else check_labels(labels.split(","))


@contextmanager
def stopped_with(text: str) -> Iterator[None]:
    """Let Ctrl-C say what it leaves; of several around each other, the innermost says it."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = error.args or (text,)
        raise


def check_installed(*packages: str) -> None:
    """Raise ``ModuleNotFoundError`` now, not after the training, for a package that is needed later."""
    for name in packages:
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f'{name} is not installed; pip install "bayeslora[demo]" brings it', name=name
            )


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise ``ValueError`` for an output folder that cannot be written, or holds a run or model to keep."""
    _check_folder("--output", path, path)
    recover(path)
    if (path / "config.json").exists():  # transformers would load the adapter with the model from then on
        raise ValueError(f"--output {str(path)!r} holds a model (config.json); pass another folder")
    if not overwrite and (path / "adapter_config.json").exists():
        raise ValueError(
            f"--output {str(path)!r} already holds an adapter; pass --overwrite or another folder"
        )


def check_file(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise ``ValueError`` now, not after the work, for a file that cannot be written."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {str(path)!r} must end in {' or '.join(suffixes)}")
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "pipe or a device"
        raise ValueError(f"{option} {str(path)!r} is a {kind}; pass a file")
    _check_folder(option, path, path.parent)


def _check_folder(option: str, path: Path, folder: Path) -> None:
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ValueError(f"{option} {str(path)!r} cannot be made: {str(nearest)!r} is a file; pass a folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        cause = f"nothing can be written to {str(nearest)!r} ({error.strerror})"
        raise ValueError(f"{option} {str(path)!r} cannot be made: {cause}") from error


def versions() -> dict[str, str]:
    """Return the versions a result depends on; a package that is not there is ``"not installed"``."""
    found = {"bayeslora": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(device: Any) -> dict[str, Any]:
    """Return what a measurement should name: versions, device, threads."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {"versions": versions(), "device": name, "threads": torch.get_num_threads()}


def write_metrics(path: Path, rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write ``{"rows": [...], **facts}`` as JSON, null for what is not finite."""
    text = json.dumps({"rows": list(rows), **facts})
    finite = json.loads(text, parse_constant=lambda name: None)  # NaN is no JSON
    write_file(path, json.dumps(finite, indent=2) + "\n")
