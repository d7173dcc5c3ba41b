"""Whole training steps timed against each other on random weights: what LoRA and its optimizer cost here.

Every contestant trains the same model (weights shared, adapters its own copy) on the same tokens. Before
anything is timed the contestants are checked: patched layers against PEFT's, IVON's step against its
plain-torch twin, a captured step against the eager one. ``step_models.py`` makes the models,
``step_timing.py`` times the contestants in interleaved rounds and compares them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.capture import capture_step
from bayeslora.ivon import IVON
from bayeslora.kernels import ivon_twin
from bayeslora.kernels.param_bucket import ParamBucket
from bayeslora.step_models import SHAPES, Case, clear_gradients, random_model, sharing_copy, trained
from bayeslora.step_timing import Contestant, collector_paused, ratio, sign_interval, time_rounds

__all__ = [
    "CAPTURED",
    "EAGER",
    "SHAPES",
    "Bench",
    "Case",
    "Contestant",
    "check_ivon",
    "collector_paused",
    "measure",
    "ratio",
    "sign_interval",
    "time_rounds",
]

EAGER = ("base", "PEFT + AdamW", "PEFT + ivon-opt", "patched + AdamW", "patched + IVON")
CAPTURED = ("PEFT + AdamW", "patched + AdamW, captured", "patched + IVON, captured", "PEFT + AdamW, captured")
_IVON: dict[str, Any] = {"lr": 1e-3, "ess": 1e6, "hess_init": 5e-3, "clip_radius": 1e-2, "rescale_lr": False}
# Two roundings of one sum in other places: errors of the size of PEFT's own in bf16, give or take half.
_CHECK_FACTOR = 1.5
_STEPS_COMPARED = 6  # of a captured run, of which the last three are replays
_NARROW = 0.004  # an interval of a ratio that more rounds need not narrow


class Bench:
    """The models of one case, and the contestants that train them.

    Args:
        case: what is trained.
        device: where.
        dtype: of the frozen weights; adapters have PEFT's default dtype, fp32.

    Raises:
        ValueError: the case's shape is not known.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        from peft import LoraConfig, get_peft_model

        from bayeslora.patching import patch

        self.case, self.device = case, device
        self.base = random_model(case.model_config(), device, dtype)
        targets = case.targets if isinstance(case.targets, str) else list(case.targets)
        lora = LoraConfig(
            r=case.rank, lora_alpha=2 * case.rank, target_modules=targets, task_type="CAUSAL_LM"
        )
        torch.manual_seed(1)
        self._peft = get_peft_model(sharing_copy(self.base), lora).train()
        for name, p in self._peft.named_parameters():
            if "lora_B" in name:  # PEFT's zeros would hide half of the gradients
                nn.init.normal_(p, std=0.02)
        self._half = get_peft_model(sharing_copy(self.base), lora, autocast_adapter_dtype=False).train()
        for p, q in zip(trained(self._half), trained(self._peft), strict=True):
            p.data.copy_(q)
        self._patch = patch
        vocabulary = self.base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(vocabulary, (case.batch, case.length), generator=generator, device="cpu")
        self.tokens = tokens.to(device)

    def model(self, patched: bool) -> nn.Module:
        """Return a copy with adapters of its own and the shared frozen weights."""
        model = sharing_copy(self._peft, but=trained(self._peft))
        return self._patch(model) if patched else model

    def loss(self, model: nn.Module) -> Tensor:
        """Return the language-modelling loss of the case's tokens."""
        return model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def check_layers(self) -> float:
        """Compare patched layers with PEFT's in fp32; return the error of the gradients.

        Raises:
            RuntimeError: it is larger than rounding allows, or the losses differ.
        """
        losses, gradients = [], []
        for model in (self._peft, self._half, self.model(patched=True)):
            loss = self.loss(model)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(
                torch.cat([p.grad.flatten().float() for p in trained(model) if p.grad is not None])
            )
            clear_gradients(model)
        truth, half, own = gradients
        allowed = _CHECK_FACTOR * float((half - truth).norm() / truth.norm()) + 1e-5
        error = float((own - truth).norm() / truth.norm())
        if error > allowed or abs(losses[2] / losses[0] - 1) > 1e-2:
            raise RuntimeError(
                f"patched layers differ from PEFT's: gradients by {error}, losses {losses[2]}, {losses[0]}"
            )
        return error

    def contestant(self, name: str) -> Contestant:
        """Return the contestant of that name (see ``EAGER`` and ``CAPTURED``), after its first steps.

        Raises:
            RuntimeError: a captured step did not follow the eager one, or could not be captured.
            ModuleNotFoundError: the package ``ivon-opt`` is not installed.
        """
        kind, _, mode = name.partition(", ")
        before = _allocated()
        contestant = Contestant(name, self._make(kind, captured=bool(mode)))
        reserved = _reserved()
        losses = [float(contestant.step()) for _ in range(_STEPS_COMPARED)]
        if mode:
            contestant.peak_bytes = _reserved() - reserved + self._frozen_bytes()
            eager = self._make(kind)
            self._check_captured(contestant, losses, [float(eager()) for _ in losses])
        elif self.device.type == "cuda":
            own = _allocated() - before + self._frozen_bytes()  # weights, adapters, state, gradients
            now = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            contestant.step()
            contestant.peak_bytes = torch.cuda.max_memory_allocated() - now + own
        return contestant

    def _check_captured(self, contestant: Contestant, losses: list[float], eager: list[float]) -> None:
        captured = contestant.step.captured  # type: ignore[attr-defined]
        if not captured and self.device.type == "cuda":
            raise RuntimeError(f"{contestant.name}: the step was not captured (see the log)")
        if any(not math.isclose(a, b, rel_tol=1e-2) for a, b in zip(losses, eager, strict=True)):
            raise RuntimeError(f"{contestant.name} does not follow the eager step: {losses}, {eager}")

    def has_room_beside(self, eager: Contestant) -> bool:
        """Whether a graph as large as an eager contestant's step fits beside that step."""
        if self.device.type != "cuda":
            return True
        _reserved()  # frees what is only cached
        return torch.cuda.mem_get_info()[0] > 2 * (eager.peak_bytes - self._frozen_bytes())

    def _frozen_bytes(self) -> int:
        return sum(t.nbytes for t in {id(p): p for p in self.base.parameters()}.values())

    def _make(self, kind: str, captured: bool = False) -> Any:
        if kind == "base":
            return self._base_step
        layers, _, optimizer = kind.partition(" + ")
        model = self.model(patched=layers == "patched")
        params = trained(model)
        if optimizer == "ivon-opt":
            return self._ivon_opt_step(model, params)
        opt: torch.optim.Optimizer
        if optimizer == "IVON":
            opt = IVON(params, **_IVON)
        else:
            fused = self.device.type == "cuda"
            opt = torch.optim.AdamW(params, lr=1e-4, fused=fused, capturable=captured and fused)
        if captured:
            batch = {"input_ids": self.tokens, "labels": self.tokens}
            return _CapturedStep(capture_step(model, opt, loss_fn=_captured_loss), batch)

        def step() -> Tensor:
            opt.zero_grad()
            if isinstance(opt, IVON):
                opt.train()
            loss = self.loss(model)
            loss.backward()
            opt.step()
            return loss.detach()

        return step

    def _base_step(self) -> Tensor:
        loss = self.loss(self.base)
        loss.backward()
        return loss.detach()

    def _ivon_opt_step(self, model: nn.Module, params: list[nn.Parameter]) -> Callable[[], Tensor]:
        import ivon

        opt = ivon.IVON(params, **_IVON)

        def step() -> Tensor:
            opt.zero_grad()
            with opt.sampled_params(train=True):
                loss = self.loss(model)
                loss.backward()
            opt.step()
            return loss.detach()

        return step


def _captured_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).loss


class _CapturedStep:
    def __init__(self, step: Any, batch: dict[str, Tensor]) -> None:
        self._step, self._batch = step, batch

    @property
    def captured(self) -> int:
        return self._step.captured

    def __call__(self) -> Tensor:
        return self._step(self._batch)


def check_ivon(device: torch.device) -> None:
    """Compare one of IVON's steps with the plain-torch twin.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(3)
    start = [
        torch.randn(shape, generator=generator, device="cpu") * 0.01 for shape in ((16, 96), (96, 16), (33,))
    ]
    grads = [torch.randn(p.shape, generator=generator, device="cpu") * 1e-3 for p in start]
    params = [nn.Parameter(p.to(device, copy=True)) for p in start]
    for weight, grad in zip(params, grads, strict=True):
        weight.grad = grad.to(device)
    opt = IVON(params, **_IVON)
    opt.train()
    opt.step()
    bucket = ParamBucket([p.clone() for p in start], range(len(start)), [0] * len(start))
    bucket.hess.fill_(_IVON["hess_init"])
    for i, p in enumerate(start):
        bucket.view(bucket.mean, i).copy_(p)
    bucket.set_hyper([[_IVON["lr"], 0.9, 0.99999, 1e-4, _IVON["ess"], _IVON["clip_radius"], 1.0, 0.0]])
    ivon_twin.ivon_step(
        bucket, grads, None, seed=0, draw=1, draws=1, price=True, debias=True, check=True
    )  # fmt: skip
    for i, weight in enumerate(params):
        for key in ("mean", "hess", "momentum"):
            expected = bucket.view(getattr(bucket, key), i)
            torch.testing.assert_close(opt.state[weight][key].cpu(), expected, rtol=1e-4, atol=1e-6)


def measure(
    case: Case, mode: str, device: torch.device, seconds: float, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any]]:
    """Check and time the contestants of one case; yield a row for each.

    Args:
        case: what is trained.
        mode: ``"eager"`` or ``"captured"``.
        device: where.
        seconds: for timing, a quarter for all contestants and the rest for AdamW against IVON alone, less if
            the interval of their ratio is narrow before.
        dtype: of the frozen weights.

    Raises:
        RuntimeError: a check failed; nothing was timed.
    """
    check_ivon(device)
    bench = Bench(case, device, dtype)
    error = bench.check_layers()
    contestants = _contestants(bench, EAGER if mode == "eager" else CAPTURED)
    by_name = {contestant.name: contestant for contestant in contestants}
    time_rounds(contestants, seconds / 4)
    everyone = {name: list(contestant.seconds) for name, contestant in by_name.items()}
    suffix = ", captured" if mode == "captured" else ""
    adamw, ivon = (by_name[f"patched + {name}{suffix}"] for name in ("AdamW", "IVON"))
    reference = by_name["PEFT + AdamW"]
    over_peft = {name: ratio(contestant, reference) for name, contestant in by_name.items()}
    over_base = {n: ratio(c, by_name["base"]) for n, c in by_name.items() if "base" in by_name}
    time_rounds([adamw, ivon], 0.75 * seconds, enough=lambda: _width(ratio(ivon, adamw)) < _NARROW)
    for contestant in contestants:
        middle = statistics.median(everyone[contestant.name])
        row: dict[str, Any] = {
            "model": case.shape,
            "tokens": f"{case.batch}x{case.length}",
            "mode": mode,
            "name": contestant.name,
            "milliseconds": 1e3 * middle,
            "tokens_per_second": case.batch * case.length / middle,
            "peak_gb": contestant.peak_bytes / 1e9,
            "over_peft_adamw": over_peft[contestant.name],
            "gradient_error": error,
        }
        if contestant.name in over_base:
            row["over_base"] = over_base[contestant.name]
        if contestant is ivon:
            row["over_patched_adamw"] = ratio(ivon, adamw)
        yield row


def _contestants(bench: Bench, names: Iterable[str]) -> list[Contestant]:
    """Make the contestants, but ivon-opt if it is not installed, and PEFT's graph if memory is short."""
    made: list[Contestant] = []
    for name in names:
        if name == "PEFT + AdamW, captured" and not bench.has_room_beside(made[0]):
            continue
        try:
            made.append(bench.contestant(name))
        except ModuleNotFoundError:
            if not name.endswith("ivon-opt"):
                raise
    return made


def _width(of: dict[str, float]) -> float:
    return of["high"] - of["low"]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _reserved() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
