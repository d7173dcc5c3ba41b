"""The study: does a posterior over LoRA make a real model better calibrated than what one would try instead?

    python bench/study.py --model MODEL --out DIR --data arc_easy=TRAIN.jsonl,TEST.jsonl \
        [--data NAME=TRAIN,TEST ...] [--ood NAME=FILE.jsonl ...] [--workers 4] [--seconds 540] \
        [--stages main] [--methods adamw ivon] [--seeds 3] [--plan] [--report]

What is run stands in ``study_config.json``: methods with grids, views (predictions) of a trained run, seeds
and stages, the rows that decide the claims first. A method's grid is searched with seed 0 on a validation
split of the training file; the test file is predicted only by the runs of the chosen options. Data are lines
of {"question": ..., "choices": [...], "answer": ...}; OpenBookQA's adapters predict --ood sets too.

Every finished run appends its rows to DIR/rows-*.jsonl; called again, the script goes on with the rest.
Workers are processes on one device that take runs in order from one list. ``--plan`` prints the runs and the
minutes expected; ``--report`` writes tables and plots of the rows found (see study_report.py).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Job = dict[str, Any]
Rows = list[dict[str, Any]]
_POLL = 0.5


def key_of(job: Job) -> str:
    named = {name: job[name] for name in ("task", "method", "options", "seed", "steps", "split", "limit")}
    return hashlib.sha1(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return all rows; a line cut off by the end of a process is left out."""
    rows = []
    for file in sorted(out.glob("rows-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


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

    def stages(self) -> list[dict[str, Any]]:
        wanted = self.arguments.stages
        return [stage for stage in self.config["stages"] if not wanted or stage["name"] in wanted]

    def methods(self, stage: dict[str, Any]) -> list[str]:
        wanted = self.arguments.methods
        return [name for name in stage["methods"] if not wanted or name in wanted]

    def job(self, task: str, method: str, options: dict[str, Any], seed: int, split: str) -> Job:
        entry = self.config["methods"][method]
        steps = self.config["steps"].get(task, self.config["steps"]["default"])
        return {
            "task": task,
            "method": method,
            "trainer": entry["trainer"],
            "options": options,
            "seed": seed,
            "steps": self.arguments.steps or steps,
            "views": entry["views"] if split == "test" else ["mean"],
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

    def base_options(self, task: str, method: str, rows: Rows | None) -> dict[str, Any] | None:
        """Options taken over from other methods' choices; None while those are not known."""
        options = {}
        for name, other in self.config["methods"][method].get("from", {}).items():
            chosen = self.chosen(task, other, rows)
            if chosen is None:
                return None
            options[name] = chosen[name]
        return options

    def search(self, task: str, method: str, rows: Rows | None) -> list[Job] | None:
        """The method's search; empty if it has nothing to choose, None while it is not known."""
        grid = cells(self.config["methods"][method].get("grid", {}))
        base = self.base_options(task, method, rows)
        if base is None:
            return None
        return [self.job(task, method, {**base, **cell}, 0, "validation") for cell in grid if len(grid) > 1]

    def chosen(self, task: str, method: str, rows: Rows | None) -> dict[str, Any] | None:
        """The options with the lowest validation NLL; of a plan (rows None), the first."""
        jobs = self.search(task, method, rows)
        if jobs is None:
            return None
        if not jobs:
            base = self.base_options(task, method, rows)
            return (
                None if base is None else {**base, **cells(self.config["methods"][method].get("grid", {}))[0]}
            )
        if rows is None:
            return jobs[0]["options"]
        nll = {row["key"]: row["nll"] for row in rows if row["split"] == "validation"}
        if any(key_of(job) not in nll for job in jobs):
            return None
        return min(jobs, key=lambda job: nll[key_of(job)])["options"]

    def jobs(self, rows: Rows | None) -> Iterator[Job | None]:
        """All runs in order; None where one waits for a search."""
        for stage in self.stages():
            tasks = [task for task in self.tasks if task in stage.get("tasks", self.tasks)]
            methods = self.methods(stage)
            for method, task in product(self.needed(methods), tasks):
                found = self.search(task, method, rows)
                yield from [None] if found is None else found
            seeds = range(min(stage["seeds"], self.arguments.seeds or stage["seeds"]))
            for seed, task, cell, method in product(seeds, tasks, cells(stage.get("cells", {})), methods):
                options = self.chosen(task, method, rows)
                if options is None:
                    yield None
                    continue
                job = self.job(task, method, {**options, **cell}, seed, "test")
                if cell:
                    job["views"] = job["views"][:2] if "samples" in job["views"][:2] else ["mean"]
                yield job


def minutes(job: Job, config: dict[str, Any], ood: int) -> float:
    """Expected minutes of one worker that has the device for itself."""
    figures = config["minutes"]
    slow = job["trainer"] == "peft_monteclora"
    step = figures["eager_seconds_per_step" if slow else "seconds_per_step"]
    tests = 0 if job["split"] == "validation" else 1
    views = tests * sum(
        config["num_samples"] if "samples" in v or "scale" in v or v in ("swag", "mc_dropout") else 1
        for v in job["views"]
    )
    passes = views * (1 + 0.5 * ood * (job["task"] == "openbookqa"))
    return (job["steps"] * step + passes * figures["seconds_per_pass"] + figures["seconds_per_job"]) / 60


def print_plan(study: Study) -> None:
    done = {row["key"] for row in read_rows(study.out)}
    total = 0.0
    for number, job in enumerate(study.jobs(None), start=1):
        assert job is not None
        cost = minutes(job, study.config, len(study.ood))
        total += 0.0 if key_of(job) in done else cost
        text = " ".join(f"{k}={v:g}" for k, v in job["options"].items())
        print(
            f"{number:4} {job['split']:10} {job['task']:12} {job['method']:16} seed {job['seed']} "
            f"{job['steps']} steps  {text:32} {cost:5.2f} min  {' '.join(job['views'])}"
        )
    print(f"{total:.0f} minutes with one worker; options that a search chooses are shown as its first")


class Worker:
    """One process: loads the model once and takes runs until the list is empty or the time is up."""

    def __init__(self, study: Study, index: int, until: float) -> None:
        import study_model

        from bayeslora.data import load_questions, split_questions
        from bayeslora.scoring import encode

        self.study, self.until = study, until
        self.file = study.out / f"rows-{index}.jsonl"
        place = {"device": study_model.DEVICE, "dtype": study_model.DTYPE}
        self.base, tokenizer = study_model.load_model(study_model.converted(study.arguments.model), **place)
        self.base.requires_grad_(False)
        self.base.config.use_cache = False
        self.fit: dict[str, list[Any]] = {}
        self.data: dict[str, Any] = {}
        limit = study.arguments.limit
        for task, files in study.tasks.items():
            train, test = files.split(",")
            rows = load_questions(train, limit=limit)
            held_out = min(study.config["validation"], len(rows) // 4)
            val, fit = split_questions(rows, held_out)
            self.fit[task] = encode(fit, tokenizer)
            self.data[f"{task} validation"] = study_model.Data(encode(val, tokenizer))
            self.data[task] = study_model.Data(encode(load_questions(test, limit=limit), tokenizer))
        for name, file in study.ood.items():
            self.data[name] = study_model.Data(encode(load_questions(file, limit=limit), tokenizer))

    def work(self) -> None:
        longest = 0.0
        while time.time() + longest < self.until:
            job = self._take()
            if job is None:
                return
            if job.get("wait"):
                time.sleep(_POLL)
                continue
            start = time.time()
            try:
                rows = self.run(job)
            except Exception:  # the claim stays: the others go on, and another call tries again
                traceback.print_exc()
                (self.study.out / "claims" / f"{key_of(job)}-failed").touch()
                continue
            with self.file.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            longest = max(longest, time.time() - start)
            first, took = rows[0], time.time() - start
            print(
                f"{job['split']:10} {job['task']:12} {job['method']:16} seed {job['seed']} {job['options']} "
                f"{first['view']}: accuracy {first['accuracy']:.4f} ECE {first['ece']:.4f} "
                f"NLL {first['nll']:.4f} ({took:.0f} s, {first['train_seconds']:.0f} s training)",
                flush=True,
            )

    def _take(self) -> Job | None:
        """Claim the first run that nobody has; None when there is none left."""
        rows = read_rows(self.study.out)
        done, waiting, running = {row["key"] for row in rows}, False, False
        for job in self.study.jobs(rows):
            if job is None:
                waiting = True
                continue
            if key_of(job) in done:
                continue
            try:
                os.close(os.open(self.study.out / "claims" / key_of(job), os.O_CREAT | os.O_EXCL))
                return job
            except FileExistsError:
                running |= not (self.study.out / "claims" / f"{key_of(job)}-failed").exists()
        return {"wait": True} if waiting and running else None

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Train, predict every view on every set, and return one row each."""
        import measure
        import study_methods as methods
        from study_model import measured

        study, task = self.study, job["task"]
        val = self.data[f"{task} validation"]
        trained = methods.train(self.base, job, study.config, self.fit[task], val)
        sets = {f"{task} validation": val}
        if job["split"] == "test":
            sets = {task: self.data[task]}
            if task == "openbookqa":
                sets |= {name: self.data[name] for name in study.ood}
        rows = []
        try:
            for view, (name, data) in product(job["views"], sets.items()):
                weights, context = methods.view(trained, view, study.config)
                start = methods.clock()
                with context:
                    probs = data.predict(trained.model, weights)
                seconds = methods.clock() - start
                if view == "temperature":
                    probs = methods.cooled(probs, methods.temperature(val.predict(trained.model), val.labels))
                self._keep(job, view, name, probs)
                rows.append(
                    {
                        "key": key_of(job),
                        **{k: v for k, v in job.items() if k != "views"},
                        "view": view,
                        "data": name,
                        "questions": len(data.labels),
                        **measured(probs, data.labels),
                        "passes": len(weights),
                        "train_seconds": trained.seconds,
                        "predict_seconds": seconds,
                        "early_step": trained.early_step,
                        "device": measure.device_name(),
                    }
                )
        finally:
            methods.end(trained)
        return rows

    def _keep(self, job: Job, view: str, name: str, probs: Any) -> None:
        """Keep AdamW's probabilities on disk: the report makes the ensemble of them."""
        import torch

        if (
            job["method"] == "adamw"
            and view == "mean"
            and job["split"] == "test"
            and "batch_size" not in job["options"]
        ):
            folder = self.study.out / "probabilities"
            folder.mkdir(exist_ok=True)
            labels = self.data[name].labels
            torch.save({"probs": probs.float(), "labels": labels}, folder / f"{key_of(job)}-{name}.pt")


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
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    arguments = parse(words)
    study = Study(arguments)
    if arguments.plan:
        print_plan(study)
        return
    if arguments.report:
        import study_report

        study_report.write(study.out, read_rows(study.out))
        return
    if arguments.worker is not None:
        Worker(study, arguments.worker, arguments.until).work()
        return
    until = time.time() + arguments.seconds
    claims = study.out / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    for claim in claims.iterdir():  # of processes that were stopped
        claim.unlink()
    arguments.model = arguments.model or demo_model()
    if arguments.workers == 1:
        Worker(study, 0, until).work()
    else:
        run_workers(words, arguments.model, arguments.workers, until)
    import study_report

    study_report.write(study.out, read_rows(study.out))


def demo_model() -> str:
    from bayeslora.demo import MODEL, cache_folder, fetch

    return str(fetch(MODEL, cache_folder()))


def run_workers(words: list[str], model: str, count: int, until: float) -> None:
    import study_model

    command = [
        sys.executable,
        __file__,
        *words,
        "--model",
        study_model.converted(model),
        "--until",
        str(until),
    ]
    workers = [subprocess.Popen([*command, "--worker", str(i)]) for i in range(count)]
    failed = [worker.wait() for worker in workers]
    if any(failed):
        sys.exit(f"workers ended with {failed}")


if __name__ == "__main__":
    main(sys.argv[1:])
