"""``bayeslora finetune``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from .cli_evaluate import Device, Limit, NumSamples, measure, present
from .cli_support import (
    Reporter,
    check_installed,
    check_output,
    environment,
    pairs_table,
    say,
    split_labels,
    stopped_with,
)
from .folders import locked_folder

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Question
    from .finetune import TrainResult
    from .ivon import IVON
    from .posterior import Posterior
    from .runs import Task
    from .scoring import EncodedQuestion
    from .settings import TrainSettings

__all__ = ["finetune"]

_SAMPLES_LOOKED_AT = 4


def finetune(
    model: Annotated[str, typer.Option(help="Hub id, model folder, or .gguf file.")],
    data: Annotated[
        str,
        typer.Option(help="Training rows: .jsonl, .csv or .parquet file, or hub set NAME[:CONFIG][@SPLIT]."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the adapter and posterior to.")],
    eval_data: Annotated[
        str | None,
        typer.Option(help="Rows to measure on afterwards (a hub set's split is test unless named)."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Choices of rows that have none, with commas: 'bug,question,praise'.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="ivon (leaves a posterior) or adamw.")] = "ivon",
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate. Default: 2e-4, with a preset of fixed values that one's."),
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
    preset: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="IVON",
            help="like-adamw: all from --lr and the first gradients. rows: lr 1e-2, ess 200 x training rows. "
            "Or a recipe of the papers: commonsense, glue, gsm8k. Default: like-adamw; rows with --ess, "
            "--clip-radius or --hess-init.",
        ),
    ] = None,
    ess: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="IVON",
            help="Effective sample size: larger means a narrower posterior. The papers' lie near 200 x "
            "training rows.",
        ),
    ] = None,
    clip_radius: Annotated[
        float | None,
        typer.Option(rich_help_panel="IVON", help="lr x clip_radius is the most a weight moves in a step."),
    ] = None,
    hess_init: Annotated[float | None, typer.Option(rich_help_panel="IVON", help="Initial Hessian.")] = None,
    beta2: Annotated[float | None, typer.Option(rich_help_panel="IVON", help="Hessian momentum.")] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Default: 1e-6 for ivon, 0 for adamw."),
    ] = None,
    scoring: Annotated[
        str,
        typer.Option(
            rich_help_panel="Questions",
            help="letter: choices listed, their letter scored. loglik: each choice's text scored. "
            "mean_loglik: the same a token, for choices of several words. auto: the one by which the base "
            "model does best on a few rows. Training minimizes the cross-entropy of the right choice among "
            "the choices, by the same scores.",
        ),
    ] = "auto",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the prompt, its tokens and the settings; train nothing.")
    ] = False,
) -> None:
    r"""Fine-tune your model on your multiple-choice or classification questions.

    A row of data is `{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}`, one a line; the answer is
    the index from 0, the letter, or the choice's text. With --labels rows need no choices. The output folder
    loads in plain PEFT as the mean.

    For example:

    `bayeslora finetune --model Qwen/Qwen2.5-0.5B --data allenai/ai2_arc:ARC-Easy --output arc`

    `bayeslora finetune --model model.gguf --data reviews.jsonl --scoring loglik --template
    "Review: {question}\nSentiment:" --output reviews`
    """
    from .data import load_questions
    from .finetune import add_lora
    from .settings import TrainSettings, check_prediction

    settings = TrainSettings(
        optimizer=optimizer,
        preset=preset,
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
    check_output(output, overwrite=overwrite or dry_run)
    check_installed(*(("torchmetrics",) if eval_data else ()))
    choices = split_labels(labels)
    tasks, place = _tasks(model, scoring, template, max_length, dtype, device, choices)
    rows = load_questions(data, limit=limit, labels=choices)
    eval_rows = load_questions(eval_data, split="test", labels=choices) if eval_data else []
    settings = settings.resolved(len(rows))
    hush = Path(tasks[0].base_model).exists()
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(locked_folder(output))
        stack.enter_context(stopped_with(f"nothing was written to {output}"))
        with Reporter(hush=hush) as report:
            job = _prepare(tasks, place, rows, eval_rows, report)
        if dry_run:
            return _show(job, settings)
        with Reporter(hush=hush) as report:
            job = replace(job, network=add_lora(job.network, settings))
            trained, posterior = _train(job, settings, output, report)
            stack.enter_context(stopped_with(f"the run is in {output}, but was not measured"))
            measured = measure(job.network, job.eval_set, posterior, job.pad, report, num_samples=num_samples)
            warnings = _warnings(job, trained, posterior, measured, num_samples, report)
        facts: dict[str, Any] = {"data": data, "eval_data": eval_data, "scoring": job.task.scoring}
        facts |= {**settings.as_dict(), **trained.ivon, "final_loss": trained.losses[-1]}
        facts |= {"seconds_per_step": trained.seconds_per_step, "skipped_steps": trained.skipped_steps}
        title = f"{eval_data}, {len(job.eval_set)} questions"
        present(title, measured, facts | environment(place), output / "metrics.json")
    for text in warnings:
        report.warn(text)
    say(Console(), f"Written to {output}. Next: bayeslora evaluate {output} --data <rows>")


@dataclass(frozen=True)
class _Job:
    """What is trained, on what, and how it is asked."""

    network: Any
    tokenizer: Any
    task: Task
    rows: Sequence[Question]
    train_set: Sequence[EncodedQuestion]
    eval_set: Sequence[EncodedQuestion]

    @property
    def pad(self) -> int:
        from .finetune import pad_token

        return pad_token(self.tokenizer)


def _tasks(
    model: str,
    scoring: str,
    template: str | None,
    max_length: int | None,
    dtype: str,
    device: str,
    labels: tuple[str, ...] | None,
) -> tuple[list[Task], Any]:
    """Check how questions are asked and of what, before anything is loaded; with auto, every way."""
    from .advice import ways_to_score
    from .finetune import check_model, resolve_device, resolve_dtype
    from .runs import Task
    from .scoring import METHODS, check_template

    text = None if template is None else template.replace("\\n", "\n")
    if scoring not in ("auto", *METHODS):
        raise ValueError(f"scoring must be one of auto, {', '.join(METHODS)}; got {scoring!r}")
    ways = ways_to_score(text) if scoring == "auto" else {scoring: check_template(scoring, text)}
    place = resolve_device(device)
    base_model, name = check_model(model), resolve_dtype(dtype, place)
    return [
        Task(base_model, method, prompt, max_length, name, labels=labels) for method, prompt in ways.items()
    ], place


def _prepare(
    tasks: Sequence[Task],
    place: Any,
    rows: Sequence[Question],
    eval_rows: Sequence[Question],
    report: Reporter,
) -> _Job:
    """Load the model, choose the scoring where there is a choice, and encode the rows."""
    from . import advice
    from . import finetune as library
    from .scoring import encode

    task = tasks[0]
    report.notice("loading the model")
    base, tokenizer = library.load_model(task.base_model, device=place, dtype=task.dtype)
    if len(tasks) > 1:
        looks = []
        for one in tasks:
            report.notice(f"trying scoring {one.scoring}")
            way = (rows, one.scoring, one.template, one.max_length)
            looks.append(advice.look(base, tokenizer, *way, on_progress=report.on_progress))
        scoring, why = advice.choose(looks, rows)
        task = next(task for task in tasks if task.scoring == scoring)
        report.tell(f"scoring {scoring}: {why}")
    sets = []
    for questions in (rows, eval_rows):
        sets.append(encode(questions, tokenizer, task.scoring, task.template, task.max_length))
        for text in advice.about_rows(questions, sets[-1], library.positions(base)):
            report.warn(text)
    return _Job(base, tokenizer, task, rows, *sets)


def _show(job: _Job, settings: TrainSettings) -> None:
    """Print what would be trained."""
    from .scoring import render

    console = Console()
    prompt, *wholes = render(job.rows[0], job.task.scoring, job.task.template)
    say(console, f"The first row's prompt:\n\n{prompt}\n\nand after it one of:")
    for index, whole in enumerate(wholes):
        say(console, f"  {whole[len(prompt) :]!r}{' (right)' if index == job.rows[0].answer else ''}")
    lengths = sorted(question.length for question in job.train_set)
    tokens = f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}"
    facts = {"scoring": job.task.scoring, "rows": len(job.rows), "tokens a row": tokens}
    facts |= {name: value for name, value in settings.as_dict().items() if value is not None}
    console.print(pairs_table({name: str(value) for name, value in facts.items()}))


def _train(
    job: _Job, settings: TrainSettings, output: Path, report: Reporter
) -> tuple[TrainResult, Posterior | None]:
    """Train and save."""
    from . import finetune as library
    from .posterior import Posterior
    from .runs import save_run

    report.notice(f"training with {settings.optimizer}")
    trained = library.train(
        job.network, job.train_set, settings, pad_token_id=job.pad, on_progress=report.on_progress
    )
    posterior = None
    if settings.optimizer == "ivon":
        values = ", ".join(f"{name} {value:.3g}" for name, value in trained.ivon.items())
        report.tell(f"ivon, preset {settings.preset}: {values}")
        posterior = Posterior.from_optimizer(job.network, cast("IVON", trained.optimizer))
    report.notice(f"saving to {output}")
    task = replace(job.task, training=settings.as_dict() | trained.ivon)
    save_run(output, job.network, task, posterior)
    return trained, posterior


def _warnings(
    job: _Job,
    trained: TrainResult,
    posterior: Posterior | None,
    measured: dict[str, tuple[Tensor, Tensor]],
    num_samples: int,
    report: Reporter,
) -> list[str]:
    """What to say about how the run ended; without evaluation data its samples are looked at here."""
    from .advice import about_samples, about_training, few

    found = about_training(trained.losses, job.rows, job.task.scoring)
    if trained.skipped_steps:
        found.append(f"{trained.skipped_steps} steps were skipped: their gradients were not finite")
    if posterior is not None and num_samples:
        some = few(job.train_set)
        looked = measured or measure(
            job.network, some, posterior, job.pad, report, num_samples=min(num_samples, _SAMPLES_LOOKED_AT)
        )
        (mean, labels), (samples, _) = looked.values()
        found += about_samples(mean, samples, labels, trained.ivon["ess"])
    return found
