"""The ``bayeslora`` command: its sub-commands, put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from . import __version__
from ._backend import uses_triton
from .cli_bench import bench
from .cli_demo import demo
from .cli_evaluate import evaluate, predict
from .cli_finetune import finetune
from .cli_support import pairs_table, versions
from .finetune import resolve_device

__all__ = ["Stopped", "app"]


class Stopped(Exception):
    """Ctrl-C, past typer, which would end without a word; its text says what is left."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(str(error)) from error


app = typer.Typer(
    name="bayeslora",
    cls=_Commands,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune language models with LoRA and get a posterior instead of a point.\n\n"
        "Start with `bayeslora demo`; then `bayeslora finetune` and `bayeslora evaluate` do the same with "
        "your own model and data, and `bayeslora predict` answers new rows."
    ),
)
app.command()(demo)
app.command()(finetune)
app.command()(evaluate)
app.command()(predict)
app.command()(bench)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"bayeslora {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def info() -> None:
    """Show versions, the GPU, and which kernels will run here."""
    import torch

    facts = versions()
    facts["gpu"] = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["gpu"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB"
    triton = uses_triton(resolve_device())
    facts["kernels"] = (
        "Triton, compiled for this GPU" if triton else "plain-torch twins of the Triton kernels"
    )
    if triton:
        from .kernels.launch import launches_directly

        facts["launches"] = (
            "direct" if launches_directly() else "through Triton's Python, slower: needs Triton 3.6 to 3.9"
        )
    Console().print(pairs_table(facts))
