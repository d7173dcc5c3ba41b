"""The study's methods: how each trains, and which predictions (views) a trained run gives.

Every method has the same data in the same order, the same initial adapter for one seed and the same schedule.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import torch
from peft import LoraConfig, MontecloraConfig, TaskType, get_peft_model
from study_baselines import BlobNoise, Swag, blob_kl, blob_sample, dropped, held
from study_laplace import Laplace
from study_model import DEVICE, OBJECTIVES, Data, Packed, collate, loss
from torch import Tensor, nn

import bayeslora
from bayeslora import IVON, Posterior, metrics
from bayeslora.finetune import _training_batches
from bayeslora.posterior import GaussianParameter
from bayeslora.posterior_sweeps import pruned

MONTECLORA = {
    "num_samples": 4,
    "sample_scaler": 5e-3,
    "kl_loss_weight": 1e-5,
    "dirichlet_prior": 1.0,
    "use_entropy": True,
    "buffer_size": 15,
}
CHECKS = 8  # validations in a run, for the early stop
EAGER = ("peft_monteclora",)
KEPT = ("adamw", "ivon", "ivon_auto")  # trainers whose result is weights and perhaps an IVON posterior
_CHECK_EVERY = 50  # steps between two looks at the clock, for which the host waits for the device

Weights = Callable[[], AbstractContextManager[Any]]


@dataclass
class Trained:
    """A trained run: the model at its mean, and what its views need."""

    model: Any
    seconds: float = 0.0
    step_seconds: float = math.nan  # of the second half's median step where steps are timed, else the mean
    early: list[Tensor] = field(default_factory=list)
    early_step: int = 0
    train_loss: float = math.nan
    posterior: Any = None
    swag: Any = None
    blob: list[nn.Module] = field(default_factory=list)
    linear: dict[str, Callable[[Data], Tensor]] = field(default_factory=dict)

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def build(base: nn.Module, job: dict[str, Any], config: dict[str, Any]) -> tuple[Any, list[nn.Module]]:
    """Return the PEFT model, and BLoB's layers."""
    trainer, options = job["trainer"], job["options"]
    noise = MontecloraConfig(**MONTECLORA) if "monteclora" in trainer else None
    torch.manual_seed(job["seed"])
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        monteclora_config=noise,
        lora_dropout=options.get("dropout", 0.0),
        **config["loras"][job["lora"]],
    )
    model: Any = get_peft_model(base, lora)
    blob: list[nn.Module] = []
    if trainer == "blob":
        for name, layer in model.named_modules():
            if name.endswith("lora_A.default"):
                noise_of_a = BlobNoise(layer.weight.shape)
                nn.utils.parametrize.register_parametrization(layer, "weight", noise_of_a)
                blob.append(layer)
    elif trainer != "peft_monteclora" and not options.get("dropout"):  # torch's dropout is a graph's own
        bayeslora.patch(model)
    if trainer == "monteclora":
        bayeslora.configure_monteclora(model, seed=job["seed"])
    return model, blob


def make_optimizer(params: list[nn.Parameter], job: dict[str, Any], rows: int) -> torch.optim.Optimizer:
    options = job["options"]
    if job["trainer"] == "ivon":
        return IVON(
            params,
            lr=options["lr"],
            ess=options["ess_per_row"] * rows,
            hess_init=5e-3,
            beta2=0.9998,
            weight_decay=1e-6,
            clip_radius=0.02,
            rescale_lr=False,
            seed=job["seed"],
        )
    if job["trainer"] == "ivon_auto":
        chosen = {name: options[name] for name in ("step_ratio", "snr") if name in options}
        return IVON.like_adamw(params, lr=options["lr"], num_data=rows, seed=job["seed"], **chosen)
    on_gpu = DEVICE.type == "cuda"
    lr = torch.tensor(options["lr"], device=DEVICE) if on_gpu else options["lr"]
    decay = options.get("weight_decay", 0.0)
    return torch.optim.AdamW(params, lr=lr, weight_decay=decay, capturable=on_gpu, fused=on_gpu)


def factor(step: int, steps: int, warmup: float, swag: bool) -> float:
    """The schedule: linear warm-up, linear decay; SWA's stays at half for the last quarter."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    fall = (steps - step) / max(1, steps - rise)
    return max(fall, 0.5) if swag else fall


def set_lr(opt: torch.optim.Optimizer, value: float) -> None:
    for group in opt.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def loss_of(job: dict[str, Any], blob: list[nn.Module], rows: int) -> Callable[..., Tensor]:
    objective = job.get("objective", "choices")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    plain = partial(loss, objective=objective)
    if job["trainer"] == "monteclora":
        return lambda model, batch: plain(model, batch) + bayeslora.monteclora_loss(model)
    if job["trainer"] == "peft_monteclora":
        return lambda model, batch: plain(model, batch) + model.base_model._get_monteclora_loss()
    if job["trainer"] == "blob":
        return lambda model, batch: plain(model, batch) + blob_kl(blob) / rows
    if job["trainer"] == "laplace" and objective != "choices":
        raise ValueError("laplace's Fisher information is that of the choices; train it with that objective")
    return plain


def clock() -> float:
    measure.synchronize()
    return time.perf_counter()


def train(
    base: nn.Module,
    job: dict[str, Any],
    config: dict[str, Any],
    fit: list[Packed],
    val: Data,
    file: Path,
    check: Callable[[], None],
) -> Trained:
    """Train, or take the result of the same training from ``file``, and make the posterior.

    Args:
        base: the model without an adapter.
        job: the run.
        config: the study's.
        fit: training questions.
        val: questions for the early stop.
        file: where the result is kept for other views of the same training.
        check: raises when the time is up.
    """
    model, blob = build(base, job, config)
    done = Trained(model, blob=blob)
    try:
        saved = torch.load(file, map_location=DEVICE, weights_only=True) if file.exists() else None
        if saved is None:
            fit_model(done, job, config, fit, val, check)
            if job["trainer"] in KEPT:
                keep(done, file)
        else:
            restore(done, saved)
        model.eval()
        if job["trainer"] == "monteclora":
            done.posterior = Posterior.from_monteclora(model)
        elif job["trainer"] == "laplace":
            found = Laplace(model, fit, check)
            done.posterior = found.best_posterior(val)
            done.linear = {f"linear_{kind}": found.linearized(val, kind) for kind in ("diagonal", "kfac")}
    except BaseException:
        end(done)
        raise
    return done


def fit_model(
    done: Trained,
    job: dict[str, Any],
    config: dict[str, Any],
    fit: list[Packed],
    val: Data,
    check: Callable[[], None],
) -> None:
    """Train; remember the weights with the lowest validation NLL where a view asks for them."""
    model, params = done.model, done.params
    opt = make_optimizer(params, job, len(fit))
    steps, size = job["steps"], job["options"].get("batch_size", config["batch_size"])
    choices = max(q.choices for q in fit)
    batches = _training_batches([len(q.tokens) for q in fit], size, job["seed"])
    loss_fn = loss_of(job, done.blob, len(fit))
    step_fn = bayeslora.capture_step(model, opt, loss_fn=loss_fn, warmup=2, max_graphs=32)
    if job["trainer"] in EAGER and not step_fn._eager:
        step_fn._go_eager("this method's noise comes from the host")
    done.swag = Swag(params) if job["trainer"] == "swag" else None
    best, losses = math.inf, []
    check_at = {round(steps * k / CHECKS) for k in range(1, CHECKS + 1)} if job["early"] else set()
    model.train()
    on_gpu = DEVICE.type == "cuda"  # where a shape costs the capture of a graph
    times: list[float] = []
    half, start = 0.0, clock()
    for step in range(steps):
        if step == steps // 2:
            half = done.seconds + clock() - start
        if job.get("split") == "timing":
            times.append(clock())
        set_lr(opt, job["options"]["lr"] * factor(step, steps, config["warmup"], done.swag is not None))
        losses.append(step_fn(collate([fit[i] for i in next(batches)], choices, fixed=on_gpu)))
        if done.swag is not None and step >= 0.75 * steps and (step % 10 == 0 or step == steps - 1):
            done.swag.collect()
        if step % _CHECK_EVERY == 0:
            measure.synchronize()
            check()
        if step + 1 in check_at:
            done.seconds += clock() - start
            model.eval()
            nll = metrics.nll(val.predict(model), val.labels)
            model.train()
            if nll < best:
                best, done.early_step = nll, step + 1
                done.early = [p.detach().clone() for p in params]
            start = clock()
    done.seconds += clock() - start
    done.step_seconds = (done.seconds - half) / (steps - steps // 2)
    if times:  # a new shape's graph, a watched step or a look at the clock is no usual step
        later = pairwise(times[steps // 2 :])
        done.step_seconds = statistics.median(after - before for before, after in later)
    done.train_loss = float(torch.stack(losses[-max(1, steps // 10) :]).mean())
    for p in params:
        p.grad = None
    if isinstance(opt, IVON):
        done.posterior = Posterior.from_optimizer(model, opt)


def keep(done: Trained, file: Path) -> None:
    """Save a trained run's weights and posterior."""
    gaussians = done.posterior.parameters if done.posterior is not None else {}
    saved = {
        "weights": [p.detach() for p in done.params],
        "early": done.early,
        "numbers": [done.seconds, done.step_seconds, done.early_step, done.train_loss],
        "posterior": {
            name: [g.mean, g.hess, g.stream, g.ess, g.weight_decay] for name, g in gaussians.items()
        },
    }
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(saved, part)
    part.replace(file)


@torch.no_grad()
def restore(done: Trained, saved: dict[str, Any]) -> None:
    for p, value in zip(done.params, saved["weights"], strict=True):
        p.copy_(value)
    done.early = saved["early"]
    done.seconds, done.step_seconds, done.early_step, done.train_loss = saved["numbers"]
    if saved["posterior"]:
        named = dict(done.model.named_parameters())
        gaussians = {name: GaussianParameter(named[name], *g) for name, g in saved["posterior"].items()}
        done.posterior = Posterior(done.model, gaussians)


def width(posterior: Any) -> dict[str, float]:
    """Return the median tensor's posterior standard deviation and root mean square weight."""
    if type(posterior) is not Posterior:
        return {}
    gaussians = list(posterior.parameters.values())
    std = [float((g.ess * (g.hess + g.weight_decay)).rsqrt().median()) for g in gaussians]
    size = [float(g.mean.square().mean().sqrt()) for g in gaussians]
    return {"std": sorted(std)[len(std) // 2], "rms": sorted(size)[len(size) // 2], "ess": gaussians[0].ess}


def samples(trained: Trained, count: int, scale: float = 1.0) -> list[Weights]:
    if trained.blob:
        return [partial(blob_sample, trained.blob, seed) for seed in range(count)]
    posterior = trained.posterior
    return [partial(posterior.sample, seed=seed, variance_scale=scale) for seed in range(count)]


def view(
    trained: Trained, name: str, config: dict[str, Any]
) -> tuple[list[Weights], AbstractContextManager[Any]]:
    """Return the weights that a view averages over, and a context to predict in."""
    count = config["num_samples"]
    plain: list[Weights] = [nullcontext]
    inside = pruned(trained.posterior, config["prune"]) if name.startswith("pruned") else nullcontext()
    if "scale_" in name:
        return samples(trained, count, float(name.rsplit("_", maxsplit=1)[-1])), inside
    if name in trained.linear:
        return plain, inside
    makers: dict[str, Callable[[], list[Weights]]] = {
        "mean": lambda: plain,
        "temperature": lambda: plain,
        "pruned": lambda: plain,
        "early": lambda: [partial(held, trained.params, trained.early)],
        "samples": lambda: samples(trained, count),
        "pruned_samples": lambda: samples(trained, count),
        "mc_dropout": lambda: [partial(dropped, trained.model, seed) for seed in range(count)],
        "swa": lambda: [partial(trained.swag.weights, None)],
        "swag": lambda: [partial(trained.swag.weights, seed) for seed in range(count)],
    }
    return makers[name](), inside


def temperature(probs: Tensor, labels: Tensor) -> float:
    """Return the temperature in [0.25, 128] with the lowest NLL."""
    logs = probs.clamp_min(1e-30).log()
    candidates = torch.logspace(math.log10(0.25), math.log10(128.0), 500).tolist()
    return min(candidates, key=lambda t: float(nn.functional.cross_entropy(logs / t, labels)))


def cooled(probs: Tensor, value: float) -> Tensor:
    return (probs.clamp_min(1e-30).log() / value).softmax(-1)


def end(trained: Trained) -> None:
    """Take the adapter off the base model."""
    bayeslora.unpatch(trained.model)
    trained.model.unload()
    trained.linear = {}
    trained.model = trained.posterior = trained.swag = None
    if DEVICE.type == "cuda":
        gc.collect()  # graphs and their memory
        torch.cuda.empty_cache()
