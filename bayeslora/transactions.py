"""All or nothing: files that are replaced together, and objects that are changed together.

A save is written into a folder beside the files that it replaces, synced to the disk, and made by one
rename: a process that is killed before it leaves the old files, after it the new ones. What is left to do
then, moving them into place, is finished by whoever reads or writes the folder next (:func:`settle`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_STAGED, _MADE, _OBSOLETE = ".saving-", ".saved", ".obsolete"
_CONTAINERS = (dict, OrderedDict, list, set)


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def whole_save(folder: Path, obsolete: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty folder; what is written into it replaces the files of those names in ``folder`` at once.

    Other files in ``folder`` stay. If the body fails, or the process is killed, the old files stay too.

    Args:
        folder: made if it does not exist.
        obsolete: names of files in ``folder`` that go, unless the body writes them.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    for left in folder.glob(f"{_STAGED}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=folder))
    try:
        yield staged
        gone = [name for name in obsolete if not (staged / name).exists()]
        (staged / _OBSOLETE).write_text("\n".join(gone), encoding="utf-8")
        for path in (*staged.rglob("*"), staged):
            _sync(path)
        staged.rename(folder / _MADE)  # from here on the new save is the one
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    _sync(folder)
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a save that was made but not moved into place; every reader of ``folder`` calls this first."""
    made = folder / _MADE
    if not made.is_dir():
        return
    with suppress(FileNotFoundError):  # another process settles it too
        for name in (made / _OBSOLETE).read_text(encoding="utf-8").splitlines():
            (folder / name).unlink(missing_ok=True)
        for file in [path for path in made.rglob("*") if path.is_file() and path.name != _OBSOLETE]:
            place = folder / file.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        _sync(folder)
    shutil.rmtree(made, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # of folders, not every file system can
            raise
    finally:
        os.close(handle)


# ---- objects -------------------------------------------------------------------------------------


@contextmanager
def unchanged_on_failure(
    model: nn.Module | None = None,
    tensors: Iterable[Tensor] = (),
    objects: Iterable[Any] = (),
    *,
    always: bool = False,
) -> Iterator[None]:
    """Put everything back as it was if the body raises, whatever it raises.

    Args:
        model: its modules, their classes and attributes (one level into dictionaries, lists and sets), which
            tensors are its parameters, which memory they have and whether they require gradients.
        tensors: their contents, which are copied; those of the model's other tensors are not put back.
        objects: their attributes, as the model's.
        always: put it back in any case.
    """
    before = _Before(model, tensors, objects)
    kept = False
    try:
        try:
            yield
            kept = not always
        finally:
            if not kept:
                before.put_back()
    except BaseException:
        if not kept:
            before.put_back()  # an interrupt may have come into the middle of it
        raise


class _Before:
    """How things were."""

    def __init__(self, model: nn.Module | None, tensors: Iterable[Tensor], objects: Iterable[Any]) -> None:
        modules = [] if model is None else list(model.modules())
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        self._things = [(thing, type(thing), _attributes(thing)) for thing in (*modules, *objects)]
        self._parameters = [(p, p.data, p.requires_grad) for p in parameters]
        self._contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._done = False

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them so again; a second call does what an interrupted first one did not."""
        if self._done:
            return
        for thing, kind, attributes in self._things:
            _put_back(thing, kind, attributes)
        for p, data, requires_grad in self._parameters:
            if type(p) is nn.Parameter and p.data_ptr() != data.data_ptr():
                p.data = data
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for tensor, value in self._contents:
            tensor.copy_(value)
        self._done = True


def _attributes(thing: Any) -> list[tuple[str, Any, Any]]:
    """Return name, value and a copy of the content of each attribute."""
    return [(n, v, v.copy() if type(v) in _CONTAINERS else None) for n, v in vars(thing).items()]


def _put_back(thing: Any, kind: type, attributes: list[tuple[str, Any, Any]]) -> None:
    if type(thing) is not kind:
        thing.__class__ = kind
    own = vars(thing)
    own.update({name: value for name, value, _ in attributes})
    for name in own.keys() - {name for name, _, _ in attributes}:
        del own[name]
    for _, value, content in attributes:
        if content is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
