"""Entry point of the ``bayeslora`` command: run it, and turn what goes wrong into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDED = ("typer", "rich")
_LONGEST = 1000  # characters of an error's line


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 1: an error; 2: wrong usage; 130: stopped by Ctrl-C. What went wrong is one line on stderr; with
    ``BAYESLORA_DEBUG=1`` in the environment it is a traceback.

    Args:
        args: the words after ``bayeslora``; None takes them from the process.
    """
    try:
        from .cli_app import Stopped, app

        try:
            words = None if args is None else list(args)
            status = app(args=words, prog_name="bayeslora", standalone_mode=False)
        except Stopped as stopped:
            return _fail(f"stopped; {stopped}" if str(stopped) else "stopped", 130)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except Exception as error:
        if os.environ.get("BAYESLORA_DEBUG"):
            raise
        return _fail(_line(error), getattr(error, "exit_code", 1))
    return status if isinstance(status, int) else 0


def _line(error: Exception) -> str:
    """The one line that says what went wrong."""
    text = " ".join(str(error).split())
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if hasattr(error, "format_message"):  # wrong usage, found by the command-line parser
        text = " ".join(f"{error.format_message()} (see --help)".split())
    elif missing in _NEEDED:
        text = f'the bayeslora command needs {missing}; pip install "bayeslora[demo]" brings it'
    elif type(error).__name__ == "OutOfMemoryError":
        text = (
            "the GPU is out of memory; lower --batch-size and raise --grad-accumulation, or pass --device cpu"
        )
    elif isinstance(error, MemoryError):
        text = f"out of memory {text}"
    elif "No space left on device" in text or "Disk quota exceeded" in text:
        text = f"the disk is full; what was being written is as it was before ({text})"
    elif not isinstance(error, (ValueError, OSError, ModuleNotFoundError)) or not text:
        text = f"{type(error).__name__}: {text} (BAYESLORA_DEBUG=1 shows where)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _fail(line: str, status: int = 1) -> int:
    sys.stderr.write(f"error: {line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
