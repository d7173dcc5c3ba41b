"""``bayeslora evaluate`` and ``bayeslora predict``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_support import (
    Reporter,
    check_file,
    check_installed,
    environment,
    metrics_table,
    say,
    split_labels,
    write_metrics,
)
from .folders import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Question
    from .posterior import Posterior
    from .runs import Run
    from .scoring import EncodedQuestion

__all__ = ["evaluate", "predict"]

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder written by bayeslora finetune or demo.")
]
Data = Annotated[
    str, typer.Option(help="Rows: .jsonl, .csv or .parquet file, or hub set NAME[:CONFIG][@SPLIT].")
]
NumSamples = Annotated[
    int, typer.Option(help="Posterior samples to average; 0 measures the mean weights only.")
]
VarianceScale = Annotated[
    float, typer.Option(help="Factor on the posterior variance: below 1 is narrower, above 1 wider.")
]
Prune = Annotated[
    float, typer.Option(help="Share of each adapter matrix, the most uncertain, to zero, in [0, 1).")
]
Labels = Annotated[
    str | None,
    typer.Option(help="Choices of rows that have none, with commas. Default: those of the training."),
]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Base model to use instead of the recorded one, if it moved.")
]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Name of the first posterior sample.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first rows of the data.")]


def evaluate(
    directory: Directory,
    data: Data,
    num_samples: NumSamples = 10,
    variance_scale: VarianceScale = 1.0,
    prune: Prune = 0.0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the measurements to.")] = None,
    diagram: Annotated[
        Path | None, typer.Option(help="Image file (.png, .pdf, .svg) for the reliability diagram.")
    ] = None,
    labels: Labels = None,
    model: BaseModel = None,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
) -> None:
    """Measure a fine-tuned model: accuracy, ECE, NLL (nats) and Brier score.

    Questions are asked as in training (scoring and template are kept in the folder). With a posterior, the
    mean weights and the average over samples are both measured; a plain adapter has the mean only. A hub
    set's split is test unless named.

    Example: `bayeslora evaluate arc --data allenai/ai2_arc:ARC-Easy@test --variance-scale 0.5`
    """
    from .finetune import pad_token, resolve_device
    from .settings import check_prediction

    check_prediction(num_samples=num_samples, variance_scale=variance_scale, prune=prune, seed=seed)
    check_installed("torchmetrics", *(("matplotlib",) if diagram else ()))
    if output is not None:
        check_file("--output", output)
    if diagram is not None:
        check_file("--diagram", diagram, (".png", ".pdf", ".svg"))
    place = resolve_device(device)
    base_model, questions = _questions(directory, data, labels, model, limit, answered=True)
    with Reporter(hush=Path(base_model).exists()) as report:
        run, encoded = _load(directory, place, base_model, prune, questions, report)
        options: dict[str, Any] = {"num_samples": num_samples, "variance_scale": variance_scale, "seed": seed}
        measured = measure(run.model, encoded, run.posterior, pad_token(run.tokenizer), report, **options)
    facts = {"directory": str(directory), "data": data, "prune": prune, **options, **environment(place)}
    present(f"{directory} on {data}, {len(encoded)} questions", measured, facts, output, diagram)
    if run.posterior is None:
        say(Console(), f"{directory} holds no posterior (a plain adapter): only its mean was measured.")


def predict(
    directory: Directory,
    data: Data,
    output: Annotated[
        Path | None, typer.Option(help="File to write, .jsonl or .csv. Default: JSON lines on stdout.")
    ] = None,
    num_samples: NumSamples = 10,
    variance_scale: VarianceScale = 1.0,
    prune: Prune = 0.0,
    labels: Labels = None,
    model: BaseModel = None,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
) -> None:
    """Answer questions, which need no answer in the data, and say how sure each answer is.

    A row out for a row in: the choice predicted and its index, every choice's probability, and in nats the
    total uncertainty (entropy), which is the aleatoric (what every sample finds uncertain) plus the epistemic
    (what the posterior samples disagree on). A plain adapter, and --num-samples 0, give the total only.

    Example: `bayeslora predict tickets --data new.csv --output answers.csv`
    """
    from . import finetune as library
    from .settings import check_prediction

    check_prediction(num_samples=num_samples, variance_scale=variance_scale, prune=prune, seed=seed)
    if output is not None:
        check_file("--output", output, (".jsonl", ".csv"))
    place = library.resolve_device(device)
    base_model, questions = _questions(directory, data, labels, model, limit, answered=False)
    with Reporter(hush=Path(base_model).exists()) as report:
        run, encoded = _load(directory, place, base_model, prune, questions, report)
        samples = num_samples if run.posterior is not None else 0
        report.notice(f"predicting, {samples} samples" if samples else "predicting, mean")
        probs = library.predict(
            run.model,
            encoded,
            posterior=run.posterior,
            num_samples=samples,
            seed=seed,
            variance_scale=variance_scale,
            pad_token_id=library.pad_token(run.tokenizer),
            average=False,
            on_progress=report.on_progress,
        )
    rows = _answers(questions, probs, sampled=samples > 0)
    if output is None:
        typer.echo(_jsonl(rows), nl=False)
    else:
        write_file(output, _csv(rows) if output.suffix.lower() == ".csv" else _jsonl(rows))
        say(Console(), f"Written to {output}: {len(rows)} rows")


def measure(
    network: Any,
    encoded: Sequence[EncodedQuestion],
    posterior: Posterior | None,
    pad: int,
    report: Reporter,
    *,
    num_samples: int,
    **how: Any,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Predict with the mean, and with samples where there is a posterior: ``{name: (probs, labels)}``."""
    import torch

    from .finetune import predict

    if not encoded:
        return {}
    labels = torch.tensor([question.answer for question in encoded])
    ways: dict[str, dict[str, Any]] = {"mean": {}}
    if posterior is not None and num_samples:
        ways[f"{num_samples} samples"] = {"posterior": posterior, "num_samples": num_samples, **how}
    measured = {}
    for name, options in ways.items():
        report.notice(f"measuring, {name}")
        probs = predict(network, encoded, pad_token_id=pad, on_progress=report.on_progress, **options)
        measured[name] = (probs, labels)
    return measured


def present(
    title: str,
    measured: dict[str, tuple[Tensor, Tensor]],
    facts: dict[str, Any],
    output: Path | None,
    diagram: Path | None = None,
) -> None:
    """Write what was asked for and print the table."""
    from .metrics import reliability_diagram, summary

    rows: list[dict[str, Any]] = [{"name": n, **summary(*predicted)} for n, predicted in measured.items()]
    if output is not None:
        write_metrics(output, rows, facts)
    if diagram is not None:
        reliability_diagram(measured, title=title, path=diagram)
    if rows:
        Console().print(metrics_table(title, rows))


def _questions(
    directory: Path, data: str, labels: str | None, model: str | None, limit: int | None, *, answered: bool
) -> tuple[str, list[Question]]:
    """Check run, base model and rows before anything is loaded; return the last two."""
    from .data import load_questions
    from .finetune import check_model
    from .runs import read_task

    task = read_task(directory)
    base_model = check_model(model or task.base_model)
    choices = split_labels(labels) or task.labels
    return base_model, load_questions(data, split="test", limit=limit, labels=choices, answered=answered)


def _load(
    directory: Path,
    place: Any,
    base_model: str,
    prune: float,
    questions: Sequence[Question],
    report: Reporter,
) -> tuple[Run, list[EncodedQuestion]]:
    from .advice import about_rows
    from .finetune import positions
    from .runs import load_run
    from .scoring import encode

    report.notice("loading the model")
    run = load_run(directory, device=place, base_model=base_model)
    if prune and run.posterior is None:
        raise ValueError(f"prune={prune} needs a posterior, and {str(directory)!r} holds a plain adapter")
    if prune and run.posterior is not None:
        run.posterior.prune(prune)
    task = run.task
    encoded = encode(questions, run.tokenizer, task.scoring, task.template, task.max_length)
    for text in about_rows(questions, encoded, positions(run.model)):
        report.warn(text)
    return run, encoded


def _answers(questions: Sequence[Question], probs: Tensor, *, sampled: bool) -> list[dict[str, Any]]:
    """A row for each question, from probabilities ``(S, N, C)``."""
    from .uncertainty import decompose

    scores, mean = decompose(probs), probs.mean(0)
    rows = []
    for i, question in enumerate(questions):
        shares = mean[i, : len(question.choices)]
        best = int(shares.argmax())
        row = {"question": question.question, "prediction": question.choices[best], "index": best}
        row |= {"choices": list(question.choices), "probabilities": [round(p, 6) for p in shares.tolist()]}
        row |= {"total": round(float(scores.total[i]), 6)}
        parts = (float(scores.aleatoric[i]), float(scores.epistemic[i])) if sampled else (None, None)
        for name, value in zip(("aleatoric", "epistemic"), parts, strict=True):
            row[name] = None if value is None else round(value, 6)
        rows.append({**row, "answer": question.answer})
    return rows


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    for row in rows:
        lists = {name: json.dumps(value) for name, value in row.items() if isinstance(value, list)}
        table.writerow({**row, **lists})
    return text.getvalue()
