"""``bayeslora finetune`` and ``bayeslora evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from .cli_support import (
    Reporter,
    check_file,
    check_installed,
    check_output,
    environment,
    metrics_table,
    say,
    write_metrics,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .finetune import TrainResult
    from .ivon import IVON
    from .posterior import Posterior
    from .runs import Run, Task
    from .scoring import EncodedQuestion
    from .settings import TrainSettings

__all__ = ["evaluate", "finetune"]

Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")]
NumSamples = Annotated[
    int, typer.Option(help="Posterior samples to average; 0 measures the mean weights only.")
]
Limit = Annotated[int | None, typer.Option(help="Use only the first rows of the data.")]


def finetune(
    model: Annotated[str, typer.Option(help="Hub id, model folder, or .gguf file.")],
    data: Annotated[str, typer.Option(help="Training rows: .jsonl file, or hub set NAME[:CONFIG][@SPLIT].")],
    output: Annotated[Path, typer.Option(help="Folder to write the adapter and posterior to.")],
    eval_data: Annotated[
        str | None,
        typer.Option(help="Rows to measure on afterwards (a hub set's split is test unless named)."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="ivon (leaves a posterior) or adamw.")] = "ivon",
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate. Default: 1e-2 for ivon, 2e-4 for adamw."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. Default: 3.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in one forward pass.")] = 8,
    grad_accumulation: Annotated[int, typer.Option(help="Forward passes in one optimizer step.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising learning rate.")] = 0.06,
    r: Annotated[int, typer.Option("--r", rich_help_panel="LoRA", help="LoRA rank.")] = 8,
    lora_alpha: Annotated[
        int, typer.Option(rich_help_panel="LoRA", help="LoRA scaling is lora_alpha / r.")
    ] = 16,
    dropout: Annotated[float, typer.Option(rich_help_panel="LoRA", help="LoRA dropout probability.")] = 0.1,
    target_modules: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="LoRA",
            help="Layers to adapt: names with commas, or PEFT's all-linear. Default: PEFT's for the model "
            "(often q_proj,v_proj).",
        ),
    ] = None,
    ess: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="IVON",
            help="Effective sample size: larger means a narrower posterior. "
            "Default: 200 x training rows, near the papers' 5e5 to 1e6.",
        ),
    ] = None,
    clip_radius: Annotated[
        float,
        typer.Option(rich_help_panel="IVON", help="lr x clip_radius is the most a weight moves in a step."),
    ] = 0.02,
    hess_init: Annotated[float, typer.Option(rich_help_panel="IVON", help="Initial Hessian.")] = 5e-3,
    beta2: Annotated[float, typer.Option(rich_help_panel="IVON", help="Hessian momentum.")] = 0.9998,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Default: 1e-6 for ivon, 0 for adamw."),
    ] = None,
    scoring: Annotated[
        str,
        typer.Option(
            rich_help_panel="Questions",
            help="letter: choices listed, their letter scored. loglik: each choice's text scored. "
            "mean_loglik: the same a token, for choices of several words. Training minimizes the "
            "cross-entropy of the right choice among the choices, by the same scores.",
        ),
    ] = "letter",
    template: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Questions",
            help=r"Prompt with {question} and, for letter, {choices}. \n is a line break.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Questions", help="Longest input in tokens; longer prompts lose their start."
        ),
    ] = None,
    num_samples: NumSamples = 10,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on a GPU, else float32), or a dtype's name.")
    ] = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of initialization, data order and noise.")] = 0,
    limit: Limit = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run already in the output folder.")] = False,
) -> None:
    r"""Fine-tune your model on your multiple-choice or classification questions.

    A row of data is `{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}`, one a line; the answer is
    the index from 0, the letter, or the choice's text. The output folder loads in plain PEFT as the mean.

    For example:

    `bayeslora finetune --model Qwen/Qwen2.5-0.5B --data allenai/ai2_arc:ARC-Easy --output arc`

    `bayeslora finetune --model model.gguf --data reviews.jsonl --scoring loglik --template
    "Review: {question}\nSentiment:" --output reviews`
    """
    from .settings import TrainSettings, check_prediction

    settings = TrainSettings(
        optimizer=optimizer,
        lr=lr,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        grad_accumulation=grad_accumulation,
        warmup=warmup,
        weight_decay=weight_decay,
        ess=ess,
        hess_init=hess_init,
        beta2=beta2,
        clip_radius=clip_radius,
        r=r,
        lora_alpha=lora_alpha,
        dropout=dropout,
        target_modules=None if target_modules is None else [m.strip() for m in target_modules.split(",")],
        seed=seed,
    )
    check_prediction(num_samples=num_samples)
    check_output(output, overwrite=overwrite)
    check_installed(*(("torchmetrics",) if eval_data else ()))
    task, place = _task(model, scoring, template, max_length, dtype, device)
    _finetune(task, settings, place, data, eval_data, limit, num_samples, output)


def evaluate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder written by bayeslora finetune or demo.")
    ],
    data: Annotated[str, typer.Option(help="Rows: .jsonl file, or hub set NAME[:CONFIG][@SPLIT].")],
    num_samples: NumSamples = 10,
    variance_scale: Annotated[
        float, typer.Option(help="Factor on the posterior variance: below 1 is narrower, above 1 wider.")
    ] = 1.0,
    prune: Annotated[
        float, typer.Option(help="Share of each adapter matrix, the most uncertain, to zero, in [0, 1).")
    ] = 0.0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the measurements to.")] = None,
    diagram: Annotated[
        Path | None, typer.Option(help="Image file (.png, .pdf, .svg) for the reliability diagram.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model to use instead of the recorded one, if it moved.")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Name of the first posterior sample.")] = 0,
    limit: Limit = None,
) -> None:
    """Measure a fine-tuned model: accuracy, ECE, NLL (nats) and Brier score.

    Questions are asked as in training (scoring and template are kept in the folder). With a posterior, the
    mean weights and the average over samples are both measured; a plain adapter has the mean only. A hub
    set's split is test unless named.

    Example: `bayeslora evaluate arc --data allenai/ai2_arc:ARC-Easy@test --variance-scale 0.5`
    """
    from .data import load_questions
    from .finetune import check_model, pad_token, resolve_device
    from .runs import load_run, read_task
    from .scoring import encode
    from .settings import check_prediction

    check_prediction(num_samples=num_samples, variance_scale=variance_scale, prune=prune)
    check_installed("torchmetrics", *(("matplotlib",) if diagram else ()))
    for option, path in (("--output", output), ("--diagram", diagram)):
        if path is not None:
            check_file(option, path)
    task, place = read_task(directory), resolve_device(device)
    base_model = check_model(model or task.base_model)
    questions = load_questions(data, split="test", limit=limit)
    with Reporter(hush=Path(base_model).exists()) as report:
        report.notice("loading the model")
        run = load_run(directory, device=place, base_model=base_model)
        _prune(run, prune, directory)
        encoded = encode(questions, run.tokenizer, task.scoring, task.template, task.max_length)
        options: dict[str, Any] = {"num_samples": num_samples, "variance_scale": variance_scale, "seed": seed}
        measured = _measure(run.model, encoded, run.posterior, pad_token(run.tokenizer), report, **options)
    facts = {"directory": str(directory), "data": data, "prune": prune, **options, **environment(place)}
    _present(f"{directory} on {data}, {len(encoded)} questions", measured, facts, output, diagram)
    if run.posterior is None:
        say(Console(), f"{directory} holds no posterior (a plain adapter): only its mean was measured.")


def _task(
    model: str, scoring: str, template: str | None, max_length: int | None, dtype: str, device: str
) -> tuple[Task, Any]:
    """Check how questions are asked and of what, before anything is loaded."""
    from .finetune import check_model, resolve_device, resolve_dtype
    from .runs import Task
    from .scoring import check_template

    text = check_template(scoring, None if template is None else template.replace("\\n", "\n"))
    place = resolve_device(device)
    return Task(check_model(model), scoring, text, max_length, resolve_dtype(dtype, place)), place


def _finetune(
    task: Task,
    settings: TrainSettings,
    place: Any,
    data: str,
    eval_data: str | None,
    limit: int | None,
    num_samples: int,
    output: Path,
) -> None:
    """Load, train, save, measure."""
    from dataclasses import replace

    from . import finetune as library
    from .data import load_questions
    from .runs import save_run
    from .scoring import encode

    train_questions = load_questions(data, limit=limit)
    eval_questions = load_questions(eval_data, split="test") if eval_data else []
    settings = settings.resolved(len(train_questions))
    task = replace(task, training=settings.as_dict())
    with Reporter(hush=Path(task.base_model).exists()) as report:
        report.notice("loading the model")
        base, tokenizer = library.load_model(task.base_model, device=place, dtype=task.dtype)
        pad, how = library.pad_token(tokenizer), (tokenizer, task.scoring, task.template, task.max_length)
        train_set, eval_set = encode(train_questions, *how), encode(eval_questions, *how)
        network = library.add_lora(base, settings)
        report.notice(f"training with {settings.optimizer}")
        trained = library.train(
            network, train_set, settings, pad_token_id=pad, on_progress=report.on_progress
        )
        posterior = _posterior(network, trained, settings)
        report.notice(f"saving to {output}")
        save_run(output, network, task, posterior)
        measured = _measure(network, eval_set, posterior, pad, report, num_samples=num_samples)
    facts = {"data": data, "eval_data": eval_data, "final_loss": trained.losses[-1], **task.training}
    facts |= {"seconds_per_step": trained.seconds_per_step, "skipped_steps": trained.skipped_steps}
    _present(
        f"{eval_data}, {len(eval_set)} questions",
        measured,
        facts | environment(place),
        output / "metrics.json",
    )
    if trained.skipped_steps:
        say(Console(), f"{trained.skipped_steps} steps were skipped: their gradients were not finite.")
    say(Console(), f"Written to {output}. Next: bayeslora evaluate {output} --data <rows>")


def _posterior(network: Any, trained: TrainResult, settings: TrainSettings) -> Posterior | None:
    if settings.optimizer != "ivon":
        return None
    from .posterior import Posterior

    return Posterior.from_optimizer(network, cast("IVON", trained.optimizer))


def _prune(run: Run, prune: float, directory: Path) -> None:
    if prune == 0:
        return
    if run.posterior is None:
        raise ValueError(f"prune={prune} needs a posterior, and {str(directory)!r} holds a plain adapter")
    run.posterior.prune(prune)


def _measure(
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
    labels = torch.tensor([question.answer for question in encoded], device="cpu")
    ways: dict[str, dict[str, Any]] = {"mean": {}}
    if posterior is not None and num_samples:
        ways[f"{num_samples} samples"] = {"posterior": posterior, "num_samples": num_samples, **how}
    measured = {}
    for name, options in ways.items():
        report.notice(f"measuring, {name}")
        probs = predict(network, encoded, pad_token_id=pad, on_progress=report.on_progress, **options)
        measured[name] = (probs, labels)
    return measured


def _present(
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
