"""The study's worker processes: each loads the model once and takes runs until the time is up."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import measure
import study_methods as methods
import torch
from safetensors.torch import load_file, save_file
from study_model import DEVICE, DTYPE, Data, converted, measured, prepare, questions

from bayeslora.data import load_questions, split_questions
from bayeslora.finetune import load_model

_POLL = 0.5
_RETRY = 30.0  # seconds until a worker tries again what did not fit; it goes on with other runs
_MPS_PROBE = "import torch; torch.zeros(1, device='cuda').item()"
_WITHOUT_MPS = 8  # workers that one GPU's time slices serve; more would only make each run longer
Job = dict[str, Any]


class OutOfTimeError(Exception):
    """The time is up in the middle of a run."""


class Worker:
    """One process. Data sets are read when a run first needs them."""

    def __init__(self, study: Any, index: int, until: float) -> None:
        torch.set_num_threads(1)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a plan for every shape
        self.study, self.until, self.index = study, until, index
        self.file = study.out / f"rows-{index}.jsonl"
        self.cache = study.arguments.cache
        model = converted(study.arguments.model, self.cache)
        base, self.tokenizer = load_model(model, device=DEVICE, dtype=DTYPE)
        self.base = prepare(base)
        self.seconds: dict[Any, float] = {}  # of the last run of a kind
        self._sets: dict[str, Any] = {}
        self._later: dict[str, float] = {}  # runs that ran out of memory here, and when to try again

    def questions(self, file: str, scoring: str, part: str = "all") -> Any:
        """Return a file's questions, or of a training file those to fit or to validate."""
        name = f"{file} {scoring} {part}"
        if name not in self._sets:
            rows = load_questions(file, limit=self.study.arguments.limit)
            if part != "all":
                held_out = min(self.study.config["validation"], len(rows) // 4)
                rows = split_questions(rows, held_out)[part == "fit"]
            packed = questions(rows, self.tokenizer, self.cache, scoring)
            self._sets[name] = packed if part == "fit" else Data(packed)
        return self._sets[name]

    def check(self) -> None:
        if time.time() > self.until:
            raise OutOfTimeError

    def work(self) -> None:
        while True:
            job = self._take()
            if job is None:
                return
            if job.get("wait"):
                time.sleep(_POLL)
                continue
            claim = self.study.claim(job)
            start = time.time()
            try:
                rows = self.run(job)
            except OutOfTimeError:
                claim.unlink()
                return
            except torch.OutOfMemoryError as error:  # the device is shared: once others have ended it may fit
                print(f"{job['task']} {job['method']}: {str(error)[:60]}; put back", flush=True)
                self._later[self.study.key(job)] = time.time() + _RETRY
                claim.unlink()
                torch.cuda.empty_cache()
                continue
            except Exception:  # the claim stays: the others go on, and another call tries again
                traceback.print_exc()
                claim.with_name(f"{claim.name}-failed").touch()
                measure.synchronize()  # raises where the device is lost to this process
                continue
            with self.file.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()  # for the other workers
            took = time.time() - start
            self.seconds[self._kind(job)] = took
            first = rows[0]
            print(
                f"{job['split']:10} {job['task']:12} {job['lora']} {job['scoring']} {job['method']:15} "
                f"seed {job['seed']} {job['options']} {first['view']}: accuracy {first['accuracy']:.4f} "
                f"ECE {first['ece']:.4f} NLL {first['nll']:.4f} "
                f"({took:.0f} s, {first['train_seconds']:.0f} s training)",
                flush=True,
            )

    def _kind(self, job: Job) -> tuple[Any, ...]:
        return job["task"], job["trainer"], job["lora"], job["split"], len(job["views"])

    def _take(self) -> Job | None:
        """Claim the first run that nobody has and that the time is enough for; None if there will be none."""
        if time.time() > self.until:
            return None
        rows = self.study.rows()
        done, waiting, running, later = {row["key"] for row in rows}, False, False, False
        for job in self.study.jobs(rows):
            if job is None:
                waiting = True
                continue
            key = self.study.key(job)
            if key in done:
                continue
            if time.time() < self._later.get(key, 0.0):
                later = True
                continue
            if time.time() + self.seconds.get(self._kind(job), 0.0) > self.until:
                continue
            claim = self.study.claim(job)
            try:
                descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(descriptor, str(self.index).encode())
                os.close(descriptor)
                return job
            except FileExistsError:
                running |= not claim.with_name(f"{claim.name}-failed").exists()
        return {"wait": True} if later or (waiting and running) else None

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Train, predict every view on every set, and return one row each."""
        study, task = self.study, job["task"]
        train, test = study.tasks[task].split(",")
        scoring = job["scoring"]
        val = self.questions(train, scoring, "validation")
        file = study.out / "trained" / f"{study.key(job, of_training=True)}.pt"
        trained = methods.train(
            self.base, job, study.config, self.questions(train, scoring, "fit"), val, file, self.check
        )
        sets = {f"{task} validation": val}
        if job["split"] == "test":
            sets = {task: self.questions(test, scoring)}
            if task == study.config["ood_task"] and "batch_size" not in job["options"]:
                sets |= {name: self.questions(path, scoring) for name, path in study.ood.items()}
        rows = []
        try:
            for view, (name, data) in product(job["views"], sets.items()):
                weights, context = methods.view(trained, view, study.config)
                start = methods.clock()
                with context:
                    if view in trained.linear:
                        probs = trained.linear[view](data)
                    else:
                        probs = data.predict(trained.model, weights, self.check)
                seconds = methods.clock() - start
                if view == "temperature":
                    probs = methods.cooled(probs, methods.temperature(val.predict(trained.model), val.labels))
                self._keep(job, view, name, probs, data.labels)
                rows.append(
                    {
                        "key": study.key(job),
                        **{k: v for k, v in job.items() if k not in ("views", "early")},
                        "view": view,
                        "data": name,
                        "questions": len(data.labels),
                        **measured(probs, data.labels),
                        "passes": len(weights),
                        "train_seconds": trained.seconds,
                        "step_seconds": trained.step_seconds,
                        "predict_seconds": seconds,
                        "early_step": trained.early_step,
                        "train_loss": trained.train_loss,
                        "posterior": methods.width(trained.posterior),
                        "device": measure.device_name(),
                    }
                )
        finally:
            methods.end(trained)
        return rows

    def _keep(self, job: Job, view: str, name: str, probs: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep AdamW's probabilities on disk: the report makes the ensemble of them."""
        if job["method"] == "adamw" and view == "mean" and job["split"] == "test":
            folder = self.study.out / "probabilities"
            folder.mkdir(exist_ok=True)
            key = f"{self.study.key(job)} {name}"
            saved = {f"{key} probs": probs.float(), f"{key} labels": labels}
            save_file(saved, folder / f"{self.study.key(job)}-{name}.safetensors")


def merge(out: Path) -> None:
    """Put the workers' files into rows.jsonl and probabilities.safetensors."""
    parts = sorted(out.glob("rows-*.jsonl"))
    text = "".join(file.read_text() for file in [*out.glob("rows.jsonl"), *parts])
    lines = [line for line in text.splitlines() if line.endswith("}")]
    if lines:
        _replace(out / "rows.jsonl", "".join(f"{line}\n" for line in lines))
    for part in parts:
        part.unlink()
    files = sorted((out / "probabilities").glob("*.safetensors"))
    if files:
        held = out / "probabilities.safetensors"
        saved = load_file(held) if held.exists() else {}
        for file in files:
            saved |= load_file(file)
        save_file(saved, held.with_suffix(".part"))
        held.with_suffix(".part").replace(held)
        for file in files:
            file.unlink()


def _replace(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


@contextmanager
def multi_process_service(wanted: bool) -> Iterator[dict[str, str] | None]:
    """Run NVIDIA's MPS, under which processes' kernels run side by side; yield its environment, or None."""
    if not wanted or DEVICE.type != "cuda":
        yield None
        return
    folder = Path("/tmp") / f"mps-{os.getpid()}"  # a socket's path must be short
    folder.mkdir()
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    full = {**os.environ, **environment}
    try:
        daemon = ["nvidia-cuda-mps-control", "-d"]
        subprocess.run(daemon, env=full, timeout=30, check=True, capture_output=True)
        probe = [sys.executable, "-c", _MPS_PROBE]
        client = {**full, "CUDA_VISIBLE_DEVICES": "0"}
        subprocess.run(probe, env=client, timeout=60, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        print(f"no MPS: {error} {said.decode(errors='replace')[-300:]}", flush=True)
        _quit(full)
        yield None
        return
    print("MPS runs", flush=True)
    try:
        yield environment
    finally:
        _quit(full)


def _quit(environment: dict[str, str]) -> None:
    command = ["nvidia-cuda-mps-control"]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, input=b"quit\n", env=environment, timeout=30, capture_output=True, check=True)


def gpu_names(under_mps: bool) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU in a worker; MPS numbers those that its daemon sees."""
    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] if visible and not under_mps else [str(i) for i in range(count)]


def run_workers(study: Any, words: list[str], until: float) -> None:
    """Start the worker processes, in turn on each GPU, and wait for them."""
    arguments = study.arguments
    model = converted(arguments.model, arguments.cache)
    with multi_process_service(arguments.mps) as mps:
        count = arguments.workers
        gpus = gpu_names(mps is not None)
        if arguments.mps and mps is None and gpus:
            count = min(count, _WITHOUT_MPS * len(gpus))
        script = str(Path(__file__).with_name("study.py"))
        command = [sys.executable, script, *words, "--model", model, "--until", str(until)]
        environment = {**os.environ, **(mps or {}), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        print(f"{count} workers, {len(gpus)} GPUs", flush=True)

        def start(index: int) -> subprocess.Popen[bytes]:
            own = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
            return subprocess.Popen([*command, "--worker", str(index)], env={**environment, **own})

        workers = [start(i) for i in range(count)]
        restarts = 0
        while any(worker.poll() is None for worker in workers):
            time.sleep(_POLL)
            for i, worker in enumerate(workers):
                if worker.poll() and restarts < count and time.time() < until:
                    print(f"worker {i} ended with {worker.returncode}; another takes its place", flush=True)
                    restarts += 1
                    for claim in (study.out / "claims").iterdir():
                        if claim.read_text() == str(i):
                            claim.with_name(f"{claim.name}-failed").touch()
                    workers[i] = start(i)
