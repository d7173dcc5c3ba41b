"""Entry point of the ``bayeslora`` command: run it, and turn expected errors into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDED = ("typer", "rich")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 an error, 2 wrong usage.

    An expected error (bad input, a missing package or file, a full GPU) is one line on stderr; with
    ``BAYESLORA_DEBUG=1`` in the environment it is a traceback.

    Args:
        args: the words after ``bayeslora``; None takes them from the process.
    """
    try:
        from .cli_app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        return _fail(f'the bayeslora command needs {package}; pip install "bayeslora[demo]" brings it')
    try:
        status = app(args=None if args is None else list(args), prog_name="bayeslora", standalone_mode=False)
    except Exception as error:
        if os.environ.get("BAYESLORA_DEBUG"):
            raise
        line = _expected(error)
        if line is None:
            raise
        return _fail(line, getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    return status if isinstance(status, int) else 0


def _expected(error: Exception) -> str | None:
    """The one line that says what went wrong, or None for what only a bug can cause."""
    if hasattr(error, "format_message"):  # wrong usage, found by the command-line parser
        return f"{error.format_message()} (see --help)".replace("\n", " ")
    if type(error).__name__ == "Abort":
        return "stopped"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU is out of memory; lower --batch-size and raise --grad-accumulation, or pass --device cpu"
        )
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _fail(line: str, status: int = 1) -> int:
    sys.stderr.write(f"error: {line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
