"""An adapter's folder replaced as a whole: after an accident at any moment it is the old one or the new one.

As in::

    with replaced_folder(path) as staging:
        save(staging)

1. The files are written to ``path/.bayeslora-new`` and synced, while the old ones stay.
2. One rename, to ``path/.bayeslora-whole``, decides: from here on the new files are the folder's.
3. ``adapter_config.json``, without which PEFT, transformers and bayeslora take a folder for no adapter, is
   removed; the files move to their places; the new ``adapter_config.json`` comes last. So nobody takes files
   of two saves for one.

The next start, or the next reader that asks :func:`recover`, finishes 3 and clears what 1 left. The folder
itself stays where it is, with all other files in it: it may be a mount point, or where the user is, and its
parent may be closed. Imports neither torch nor peft.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes are not kept apart there
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked_folder", "recover", "replaced_folder", "write_file"]

_MARKER = "adapter_config.json"
_STAGING, _WHOLE, _LOCK = ".bayeslora-new", ".bayeslora-whole", ".bayeslora-lock"
_held: set[Path] = set()


@contextmanager
def replaced_folder(path: str | os.PathLike[str], drop: Collection[str] = ()) -> Iterator[Path]:
    """Give an empty folder to write files to; at the end they replace those of the same name in ``path``.

    On an error, which is passed on, ``path`` is as it was.

    Args:
        path: the folder, made if it does not exist.
        drop: names that are removed from it where the new files do not have them.

    Raises:
        ValueError: another process writes to the folder, or one of the files is a folder, the old or new.
    """
    with locked_folder(path) as folder:
        staging = folder / _STAGING
        staging.mkdir()
        try:
            yield staging
            for name in drop:
                if not (staging / name).exists():
                    (staging / name).mkdir()  # an empty folder says: no such file
            for new in staging.iterdir():
                if (folder / new.name).is_dir() or (new.is_dir() and any(new.iterdir())):
                    raise ValueError(f"{folder / new.name} is a folder; files alone are replaced")
                if new.is_file():
                    _sync(new)
            _sync(staging)
            staging.rename(folder / _WHOLE)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _finish(folder)


@contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make the folder, finish or clear what an accident left in it, and keep other processes from writing.

    The lock ends with its process, however that ends. A folder that was made here and is still empty at
    the end is removed again.

    Raises:
        ValueError: another process writes to the folder.
    """
    folder = Path(path)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if key in _held:
        yield folder
        return
    lock = folder / _LOCK
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, folder)
        _held.add(key)
        try:
            _finish(folder)
            shutil.rmtree(folder / _STAGING, ignore_errors=True)
            yield folder
        finally:
            _held.discard(key)
            with suppress(OSError):
                lock.unlink()
    finally:
        os.close(descriptor)
        with suppress(OSError):
            for place in made:
                place.rmdir()


def recover(path: str | os.PathLike[str]) -> None:
    """Finish a replacement that was cut short after it was decided; call it before reading the folder.

    Raises:
        ValueError: another process is writing to the folder now.
    """
    if (Path(path) / _WHOLE).is_dir():
        with locked_folder(path):
            pass


def write_file(path: Path, text: str) -> None:
    """Write a file, UTF-8, as a whole: after an accident it holds the old text or the new one."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.bayeslora-new")
    try:
        new.write_text(text, encoding="utf-8")
        _sync(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _take(descriptor: int, folder: Path) -> None:
    """Lock the open file; file systems without locks do without."""
    busy = ValueError(f"another process is writing to {folder}; wait for its end or pass another folder")
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    except OSError:
        return
    if os.fstat(descriptor).st_nlink == 0:  # its holder has just ended, and removed it
        raise busy


def _finish(folder: Path) -> None:
    """Move the decided files to their places; each step may already have been done."""
    whole = folder / _WHOLE
    if not whole.is_dir() or whole.is_symlink():
        return
    _sync(folder)
    if (whole / _MARKER).exists():
        (folder / _MARKER).unlink(missing_ok=True)
    for new in sorted(whole.iterdir(), key=lambda new: new.name == _MARKER):
        if new.is_dir():
            (folder / new.name).unlink(missing_ok=True)
            new.rmdir()
        else:
            new.replace(folder / new.name)
    _sync(folder)
    whole.rmdir()


def _sync(path: Path) -> None:
    """Have a file's contents, or a folder's entries, reach the disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not every system syncs folders
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
