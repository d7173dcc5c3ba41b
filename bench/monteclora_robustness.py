"""How much accuracy and NLL depend on learning rate and batch size: LoRA, PEFT's MonteCLoRA, and ours.

    python bench/monteclora_robustness.py --train arc_easy.train.jsonl --test arc_easy.test.jsonl \
        [--model MODEL] [--out DIR] [--workers 4] [--seconds 480] [--seeds 0 1] [--steps 240]
    python bench/monteclora_robustness.py --report [--out DIR]

As the paper's robustness tables: SmolLM2-135M-Instruct, one fine-tune for each of 3 learning rates x 2 batch
sizes, method and seed; q and v at rank 8, AdamW, a linear schedule, the same data in the same order for
every method. All of them predict at the mean; ours also by the average of 8 posterior samples.
Questions are lines of {"question": ..., "choices": [...], "answer": ...}. Training and prediction are those
of study.py: steps are CUDA graphs, but for PEFT's MonteCLoRA, whose noise comes from the host.

Every finished run is a line of DIR/monteclora_robustness.jsonl. Workers are processes on one device that take
runs in order from one queue, cell by cell. A run is not begun when the time that is left is less than the
longest of its method took; called again, the script goes on with what is missing. ``--report`` (also at the
end of a call) writes the lines as monteclora_robustness_<device>.json, prints the table and, where
matplotlib is, draws it.
"""

import argparse
import json
import multiprocessing
import queue
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import measure
import readme_monteclora
import study_methods
import study_model
import torch
from study_model import DEVICE, DTYPE

from bayeslora.data import load_questions
from bayeslora.finetune import load_model

NAME = "monteclora_robustness"
TRAINERS = {"LoRA": "adamw", "PEFT MonteCLoRA": "peft_monteclora", "MonteCLoRA": "monteclora"}
SLOWEST_FIRST = ("PEFT MonteCLoRA", "MonteCLoRA", "LoRA")
LEARNING_RATES = (1e-3, 2e-4, 5e-3)
BATCH_SIZES = (8, 32)
NUM_SAMPLES = 8
CACHE = Path(tempfile.gettempdir()) / f"{NAME}-cache"
GRACE = 10.0  # seconds after the budget in which a worker ends by itself
CONFIG = {
    "loras": {"qv": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}},
    "batch_size": 8,
    "warmup": 0.06,
    "num_samples": NUM_SAMPLES,
}

Run = dict[str, Any]


def grid(seeds: list[int]) -> Iterator[Run]:
    """All runs, seed by seed and each cell's methods beside each other, so that any prefix compares them."""
    for seed, lr, batch, method in product(seeds, LEARNING_RATES, BATCH_SIZES, SLOWEST_FIRST):
        yield {"method": method, "lr": lr, "batch_size": batch, "seed": seed}


def read_rows(folder: Path) -> list[Run]:
    """Return the finished runs; a line cut off by the end of a process is left out."""
    file, rows = folder / f"{NAME}.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def is_run(row: Run, run: Run, steps: int, limit: int | None) -> bool:
    same = row["steps"] == steps and row["limit"] == limit
    return same and all(row[key] == value for key, value in run.items())


class Trials:
    """The base model and the questions, for all runs of one process."""

    def __init__(self, arguments: argparse.Namespace, until: float) -> None:
        torch.set_num_threads(1)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a plan for every shape
        self.steps, self.limit, self.cache, self.until = (
            arguments.steps,
            arguments.limit,
            arguments.cache,
            until,
        )
        base, tokenizer = load_model(arguments.model, device=DEVICE, dtype=DTYPE)
        self.base = study_model.prepare(base)
        rows = (load_questions(file, limit=self.limit) for file in (arguments.train, arguments.test))
        self.train, test = (study_model.questions(r, tokenizer, self.cache) for r in rows)
        self.test = study_model.Data(test)

    def check(self) -> None:
        if time.time() > self.until:
            raise TimeoutError

    def execute(self, run: Run) -> Run:
        start = time.perf_counter()
        options = {"lr": run["lr"], "batch_size": run["batch_size"]}
        job = {"trainer": TRAINERS[run["method"]], "options": options, "seed": run["seed"]}
        job |= {"steps": self.steps, "lora": "qv", "early": False}
        views = ["mean", "samples"] if run["method"] == "MonteCLoRA" else ["mean"]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.pt"
            trained = study_methods.train(self.base, job, CONFIG, self.train, self.test, file, self.check)
        try:
            found = {name: self._measured(trained, name) for name in views}
        finally:
            study_methods.end(trained)
        return {
            **run,
            "steps": self.steps,
            "limit": self.limit,
            "train_rows": len(self.train),
            "test_rows": len(self.test.labels),
            "mean": found["mean"],
            "sampled": found.get("samples"),
            "seconds_per_step": trained.seconds / self.steps,
            "seconds": time.perf_counter() - start,
            "environment": measure.environment(),
        }

    def _measured(self, trained: Any, view: str) -> dict[str, Any]:
        """Accuracy and calibration; of a model that diverged to NaN those of a guess."""
        weights, context = study_methods.view(trained, view, CONFIG)
        with context:
            probs = self.test.predict(trained.model, weights, self.check)
        diverged = not bool(probs.isfinite().all())
        if diverged:
            probs = torch.full_like(probs, 1 / probs.shape[1])
        return {**study_model.measured(probs, self.test.labels), "diverged": diverged}


def work(arguments: argparse.Namespace, todo: Any, until: float) -> None:
    """Take runs until there are none, or none that still fits."""
    trials = Trials(arguments, until)
    longest: dict[str, float] = {}
    while True:
        try:
            run = todo.get(timeout=1.0)
        except queue.Empty:
            return
        if time.time() + longest.get(run["method"], 0.0) > until:
            continue
        try:
            row = trials.execute(run)
        except TimeoutError:
            continue
        except Exception:  # one run's error does not hold up the others; a later call tries again
            traceback.print_exc()
            continue
        with (arguments.out / f"{NAME}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        longest[run["method"]] = max(longest.get(run["method"], 0.0), row["seconds"])
        values = row["mean"]
        print(
            f"{run['method']:16} lr {run['lr']:g} batch {run['batch_size']:2} seed {run['seed']}: accuracy "
            f"{values['accuracy']:.4f} ECE {values['ece']:.4f} NLL {values['nll']:.4f} "
            f"({row['seconds']:.0f} s, {1e3 * row['seconds_per_step']:.0f} ms a step)",
            flush=True,
        )


def run_workers(arguments: argparse.Namespace, runs: list[Run], until: float) -> None:
    context = multiprocessing.get_context("spawn")
    count = min(arguments.workers, len(runs))
    todo: Any = queue.Queue() if count == 1 else context.Queue()
    for run in runs:
        todo.put(run)
    if count == 1:
        work(arguments, todo, until)
        return
    workers = [context.Process(target=work, args=(arguments, todo, until)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(1.0, until + GRACE - time.time()))
    for worker in workers:
        if worker.is_alive():  # its run is lost, the lines written so far are not
            worker.terminate()
            worker.join()
    todo.cancel_join_thread()


def report(folder: Path) -> None:
    """Write and print what the finished runs show."""
    rows = read_rows(folder)
    if not rows:
        print("no run has finished")
        return
    environment = rows[0]["environment"]
    document = {
        "environment": environment,
        "rows": [{k: v for k, v in r.items() if k != "environment"} for r in rows],
    }
    measure.write_json(measure.result_file(NAME, folder, environment["device"]), document)
    print(readme_monteclora.robustness(document))
    for method in TRAINERS:
        seconds = [1e3 * row["seconds_per_step"] for row in rows if row["method"] == method]
        if seconds:
            print(f"{method:16} {statistics.median(seconds):.0f} ms a step, median of {len(seconds)} runs")
    if not readme_monteclora.shared_cells(rows):
        return
    try:
        draw(rows, folder / f"{NAME}.png")
    except ModuleNotFoundError as error:
        print(f"not drawn: {error}")


def draw(rows: list[Run], file: Path) -> None:
    """Every shared cell's accuracy, ECE and NLL, one column a method."""
    from matplotlib.figure import Figure

    cells = readme_monteclora.shared_cells(rows)
    figure = Figure(figsize=(10.2, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = [label for _, _, label in readme_monteclora.VIEWS]
    for axis, (name, title) in zip(
        panels, (("accuracy", "accuracy"), ("ece", "ECE"), ("nll", "NLL (nats)")), strict=True
    ):
        for column, (method, view, _) in enumerate(readme_monteclora.VIEWS):
            values = [cell[method][view][name] for cell in cells]
            axis.plot([column] * len(values), values, "o", ms=4, alpha=0.6, color="#3b7dd8")
            axis.plot([column - 0.2, column + 0.2], [statistics.mean(values)] * 2, color="#1f2933")
        axis.set_xticks(range(len(labels)), labels, fontsize=7, rotation=20)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument(
        "--model", help="a folder, hub id or .gguf; default: the demo's, from the package index"
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=480.0, help="time budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--limit", type=int, help="questions of each split")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of the converted model and questions")
    parser.add_argument("--report", action="store_true", help="of the runs there are; train nothing")
    arguments = parser.parse_args()
    until = time.time() + arguments.seconds
    if not arguments.report:
        if not (arguments.train and arguments.test):
            parser.error("pass --train and --test")
        arguments.out.mkdir(parents=True, exist_ok=True)
        for left in arguments.cache.glob("*.lock"):  # of processes that were stopped
            left.unlink()
        arguments.model = study_model.converted(arguments.model or demo_model(), arguments.cache)
        rows = read_rows(arguments.out)
        key = (arguments.steps, arguments.limit)
        todo = [run for run in grid(arguments.seeds) if not any(is_run(row, run, *key) for row in rows)]
        if todo:
            run_workers(arguments, todo, until)
        left = len(todo) + len(rows) - len(read_rows(arguments.out))
        if left:
            print(f"{left} runs are left; call again to go on")
    report(arguments.out)


def demo_model() -> str:
    from bayeslora.demo import MODEL, cache_folder, fetch

    return str(fetch(MODEL, cache_folder()))


if __name__ == "__main__":
    main()
