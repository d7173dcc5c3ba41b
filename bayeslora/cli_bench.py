"""``bayeslora bench``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_support import check_file, environment, say, write_metrics

__all__ = ["bench"]


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or hub name, of which only the configuration is read; the weights are random. "
            "Or a known shape: SmolLM2-135M, Llama-3.2-3B, Llama-3-8B, toy. Default: Llama-3.2-3B on a GPU, "
            "else toy."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    target_modules: Annotated[
        str, typer.Option(help="Layers that get adapters: PEFT's all-linear, or names with commas.")
    ] = "all-linear",
    seconds: Annotated[
        float, typer.Option(help="Time for the rounds of each table, beside a minute to build and check.")
    ] = 20.0,
    captured: Annotated[
        bool, typer.Option("--captured/--eager-only", help="Also measure steps as CUDA graphs (on a GPU).")
    ] = True,
    device: Annotated[
        str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
) -> None:
    """What a LoRA training step costs on this machine: PEFT and patched layers, AdamW and IVON.

    Trains your model's shape with random weights and tokens, in interleaved rounds, after checking that
    patched layers, IVON and captured steps compute what they should. Ratios are medians of ratios within
    rounds, with their 95% interval.

    Example: `bayeslora bench --model Qwen/Qwen2.5-0.5B --batch-size 4 --length 512`
    """
    import torch

    from .finetune import resolve_device
    from .step_benchmark import measure

    place = resolve_device(device)
    on_gpu = place.type == "cuda"
    for name, value in (("--batch-size", batch_size), ("--length", length), ("--rank", rank)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if seconds < 0:
        raise ValueError(f"--seconds must be at least 0; got {seconds}")
    if output is not None:
        check_file("--output", output)
    case = _case(model or ("Llama-3.2-3B" if on_gpu else "toy"), batch_size, length, rank, target_modules)
    console = Console()
    facts = environment(place)
    if not on_gpu:
        say(console, "No GPU: the kernels' plain-torch twins run, and their speed says little.")
    rows: list[dict[str, Any]] = []
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with torch.cuda.device(place) if on_gpu else nullcontext():
        for mode in ("eager", "captured") if on_gpu and captured else ("eager",):
            say(console, f"checking and timing {case.shape}, {batch_size} x {length} tokens, {mode} ...")
            try:
                found = list(measure(case, mode, place, seconds, dtype))
            except RuntimeError as error:
                if mode == "eager":
                    raise
                say(console, f"captured steps were not timed: {str(error).splitlines()[0]}")
                continue
            rows += found
            console.print(_table(f"{case.shape}, {batch_size} x {length}, {facts['device']}", found))
            say(console, _verdict(found))
    if output is not None:
        options = {"rank": rank, "target_modules": target_modules, "seconds": seconds}
        write_metrics(output, rows, {**options, **facts})
        say(console, f"Written to {output}")


def _case(model: str, batch_size: int, length: int, rank: int, target_modules: str) -> Any:
    from .step_benchmark import SHAPES, Case

    names = tuple(name.strip() for name in target_modules.split(","))
    targets = "all-linear" if names == ("all-linear",) else names
    config = None
    if model not in SHAPES:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
    return Case(model, batch_size, length, rank, targets, config)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = ["ms a step", "tokens/s", "peak GB", "over PEFT + AdamW [95%]"]
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        ratio = row["over_peft_adamw"]
        table.add_row(
            row["name"],
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-",
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        )
    return table


def _verdict(rows: list[dict[str, Any]]) -> str:
    ratio = next(row["over_patched_adamw"] for row in rows if "over_patched_adamw" in row)
    low, middle, high = (100 * (ratio[key] - 1) for key in ("low", "median", "high"))
    interval = f"[{low:+.2f}%, {high:+.2f}%], {ratio['rounds']} rounds"
    return f"IVON over AdamW, patched: {middle:+.2f}% of a step {interval}"
