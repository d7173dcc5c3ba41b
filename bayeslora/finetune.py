"""Fine-tune a causal language model with LoRA on questions, and predict with the result.

The steps of a run, each usable alone: :func:`load_model`, :func:`add_lora`, :func:`train`,
:func:`predict`; :mod:`bayeslora.runs` saves and loads. Nothing here prints: long work reports through
an ``on_progress`` callback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .scoring import EncodedQuestion, batches_by_length, choice_scores, collate
from .settings import LIKE_ADAMW, TrainSettings

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = [
    "Progress",
    "TrainResult",
    "add_lora",
    "load_model",
    "predict",
    "train",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MEGA_BATCH = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is; ``loss`` only while training."""

    stage: str
    step: int
    total: int
    loss: float | None = None


ProgressFn = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its optimizer, the loss (nats) and the wall time (seconds) of every step."""

    optimizer: torch.optim.Optimizer
    losses: list[float]
    step_seconds: list[float]

    @property
    def seconds_per_step(self) -> float:
        """Median wall time of a step."""
        return median(self.step_seconds)

    @property
    def ivon(self) -> dict[str, float]:
        """IVON's ``ess``, ``hess_init`` and ``clip_radius`` as they ended; empty for other optimizers."""
        group = self.optimizer.param_groups[0]
        return {name: float(group[name]) for name in ("ess", "hess_init", "clip_radius") if name in group}

    @property
    def skipped_steps(self) -> int:
        """Steps IVON dropped for a gradient that was not finite; 0 for other optimizers."""
        return int(getattr(self.optimizer, "skipped_steps", 0))


def resolve_device(name: str = "auto") -> torch.device:
    """Return the named device; ``"auto"`` is the GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here; pass auto, cpu or cuda") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """Return the dtype's name; ``"auto"`` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bfloat16" if fast else "float32"
    return check_dtype(name, "auto, ")


def check_dtype(name: str, others: str = "") -> str:
    """Return the dtype's name, or raise ``ValueError``."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype must be {others}{', '.join(_DTYPES)}; got {name!r}")
    return name


def check_model(model: str) -> str:
    """Return the model's name with a local path made absolute; ``ValueError`` if the path is not there."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model file {model!r} does not exist")
        if find_spec("gguf") is None:
            raise ModuleNotFoundError(
                'reading a .gguf model needs gguf; pip install "bayeslora[demo]" brings it'
            )
        return str(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"model folder {model!r} has no config.json; pass a folder transformers can load"
            )
        return str(path.resolve())
    if path.exists():
        raise ValueError(f"model {model!r} is a file; pass a hub id, a model folder or a .gguf file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or not model.strip():
        raise ValueError(
            f"model path {model!r} does not exist; pass a hub id, a model folder or a .gguf file"
        )
    return model


def load_model(model: str, *, device: torch.device, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: hub id, folder, or a ``.gguf`` file, whose weights are dequantized to ``dtype``.
        device: where to put it.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: for a model that is not there or that transformers cannot load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = check_model(model)
    auto: Any = AutoModelForCausalLM
    place: dict[str, Any] = {}
    source = model
    if model.endswith(".gguf"):
        source, place = str(Path(model).parent), {"gguf_file": Path(model).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **place)
        network = auto.from_pretrained(source, dtype=_DTYPES[dtype], **place)
    except Exception as error:  # damaged files raise whatever their readers stumble over
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"model {model!r} could not be loaded: {cause}") from error
    network.name_or_path = model  # what PEFT writes as the adapter's base model
    return network.to(device), tokenizer


def add_lora(model: Any, settings: TrainSettings) -> Any:
    """Wrap a model with PEFT LoRA as ``settings`` says and patch its layers with the fused ones."""
    from peft import LoraConfig, TaskType, get_peft_model

    from .patching import patch

    targets: Any = settings.target_modules
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    with _seeded(settings.seed, model.device):
        return patch(get_peft_model(model, config))


def train(
    model: Any,
    encoded: Sequence[EncodedQuestion],
    settings: TrainSettings,
    *,
    pad_token_id: int = 0,
    on_progress: ProgressFn | None = None,
) -> TrainResult:
    """Minimize the cross-entropy of the right choice, and leave the model in eval mode.

    One IVON sample serves all micro-batches of a step; the model holds IVON's mean afterwards.

    Args:
        model: a PEFT model; what requires grad is trained.
        encoded: training questions from :func:`bayeslora.scoring.encode`.
        settings: how to train; see :class:`TrainSettings`.
        pad_token_id: token to pad inputs with.
        on_progress: called after every step with the step's mean loss.
    """
    from transformers import get_scheduler

    settings = settings.resolved(len(encoded))
    steps = settings.steps or 0
    optimizer = build_optimizer(model, settings, len(encoded))
    scheduler = get_scheduler(
        "linear", optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    lengths = [question.length for question in encoded]
    batches = _training_batches(lengths, settings.batch_size, settings.seed)
    losses, seconds = [], []
    model.train()
    with _seeded(settings.seed, model.device):
        for step in range(1, steps + 1):
            start = time.perf_counter()
            micro = [[encoded[i] for i in next(batches)] for _ in range(settings.grad_accumulation)]
            losses.append(_train_step(model, micro, optimizer, pad_token_id))
            scheduler.step()
            seconds.append(time.perf_counter() - start)
            if on_progress:
                on_progress(Progress("train", step, steps, losses[-1]))
    model.eval()
    return TrainResult(optimizer, losses, seconds)


def build_optimizer(model: nn.Module, settings: TrainSettings, num_rows: int) -> torch.optim.Optimizer:
    """Return AdamW or IVON over the parameters that require grad; ``settings`` must be resolved."""
    params = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(params, **common)
    from .ivon import IVON

    common |= {"beta2": settings.beta2, "seed": settings.seed}
    if settings.preset == LIKE_ADAMW:
        return IVON.like_adamw(params, num_data=num_rows, **common)
    common |= {name: getattr(settings, name) for name in ("ess", "hess_init", "clip_radius")}
    return IVON(params, rescale_lr=False, **common)


def predict(
    model: Any,
    encoded: Sequence[EncodedQuestion],
    *,
    posterior: Posterior | None = None,
    num_samples: int = 0,
    seed: int = 0,
    variance_scale: float = 1.0,
    pad_token_id: int = 0,
    max_tokens: int | None = None,
    average: bool = True,
    on_progress: ProgressFn | None = None,
) -> Tensor:
    """Return choice probabilities ``(N, C)`` fp32 on the CPU, zero where a question has no such choice.

    With samples, the mean over posterior samples ``seed, seed + 1, ...`` of each one's softmax; or each
    one's, ``(S, N, C)``.

    Args:
        model: the (PEFT) model.
        encoded: questions from :func:`bayeslora.scoring.encode`.
        posterior: where samples come from; needed when ``num_samples`` is not 0.
        num_samples: posterior samples to average; 0 predicts with the mean weights.
        seed: name of the first sample.
        variance_scale: factor on the posterior variance (the temperature).
        pad_token_id: token to pad inputs with.
        max_tokens: padded tokens of one forward pass; None picks by device.
        average: over the samples.
        on_progress: called after every batch.
    """
    if num_samples < 0 or (num_samples and posterior is None):
        raise ValueError(f"num_samples must be 0, or positive with a posterior; got {num_samples}")
    model.eval()
    max_tokens = max_tokens or (16384 if model.device.type == "cuda" else 512)
    groups = batches_by_length(encoded, max_tokens)
    batches = [collate([encoded[i] for i in g], pad_token_id).to(model.device) for g in groups]
    passes = max(num_samples, 1)
    total = len(batches) * passes
    probs = torch.zeros(passes, len(encoded), max(len(q.targets) for q in encoded), device="cpu")
    done = 0
    for sample in range(passes):
        with _weights(posterior, num_samples, seed + sample, variance_scale), torch.no_grad():
            for group, batch in zip(groups, batches, strict=True):
                part = choice_scores(model, batch).softmax(-1).cpu()
                probs[sample, torch.tensor(group, device="cpu"), : part.shape[1]] = part
                done += 1
                if on_progress:
                    on_progress(Progress("predict", done, total))
    return probs.mean(0) if average else probs


def positions(model: Any) -> int | None:
    """Return the longest input the model was made for, in tokens; None where its config does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def pad_token(tokenizer: Any) -> int:
    """Return a token id to pad with; any will do, since padding is masked."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _train_step(
    model: Any, micro: Sequence[Sequence[EncodedQuestion]], optimizer: Any, pad_token_id: int
) -> float:
    """One optimizer step over micro-batches, all under one IVON sample; returns their mean loss."""
    sampled = getattr(optimizer, "sampled_params", None)
    total = torch.zeros((), device=model.device)
    with sampled(train=True) if sampled else nullcontext():
        for questions in micro:
            batch = collate(questions, pad_token_id).to(model.device)
            loss = nn.functional.cross_entropy(choice_scores(model, batch), batch.labels) / len(micro)
            loss.backward()
            total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def _training_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless random batches whose members are of similar length, so that little is padded.

    Every epoch is a new permutation, cut into runs of 16 batches; a run is sorted by length, cut into
    batches, and the epoch's batches are shuffled. Questions that do not fill a batch wait for another epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(lengths))
    while True:
        order = torch.randperm(len(lengths), generator=generator, device="cpu").tolist()
        order = order[: len(order) // batch_size * batch_size]
        span = _MEGA_BATCH * batch_size
        runs = [sorted(order[i : i + span], key=lengths.__getitem__) for i in range(0, len(order), span)]
        batches = [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]
        for index in torch.randperm(len(batches), generator=generator, device="cpu").tolist():
            yield batches[index]


def _weights(
    posterior: Posterior | None, num_samples: int, seed: int, variance_scale: float
) -> AbstractContextManager[Any]:
    """The posterior sample ``seed``, or the mean when no samples are asked for."""
    if posterior is None or num_samples == 0:
        return nullcontext()
    return posterior.sample(seed=seed, variance_scale=variance_scale)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for initialization and dropout, and put them back after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
