"""The study's methods: how each trains, and which predictions (views) a trained run gives.

Every method has the same data in the same order, the same initial adapter for one seed and the same schedule.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import measure
import torch
from peft import LoraConfig, MontecloraConfig, TaskType, get_peft_model
from study_model import DEVICE, Data, collate, loss, scores
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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
SWAG_RANK = 10
LAPLACE_ROWS = 1000
BLOB_PRIOR, BLOB_STD = 0.2, 0.05  # BLoB's prior and its initial scale of the noise (Wang et al., 2024)
EAGER = ("peft_monteclora",)

Weights = Callable[[], AbstractContextManager[Any]]


@dataclass
class Trained:
    """A trained run: the model at its mean, and what its views need."""

    model: Any
    opt: Any
    seconds: float
    steps: int
    early: list[Tensor] = field(default_factory=list)
    early_step: int = 0
    posterior: Any = None
    swag: Any = None
    blob: list[nn.Module] = field(default_factory=list)

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


class BlobNoise(nn.Module):
    """A = M + G² ε, ε ~ N(0, I) anew at each forward in training, or by seed for a sample (BLoB)."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.root = nn.Parameter(
            torch.empty(shape, device=DEVICE).uniform_(BLOB_STD / math.sqrt(2), BLOB_STD)
        )
        self.fixed: Tensor | None = None

    def forward(self, mean: Tensor) -> Tensor:
        if self.training:
            return mean + self.root.square() * torch.randn_like(mean)
        return mean if self.fixed is None else mean + self.root.square() * self.fixed


def blob_kl(layers: list[nn.Module]) -> Tensor:
    """KL of the layers' N(M, G⁴) to N(0, BLOB_PRIOR²), summed."""
    total = torch.zeros((), device=DEVICE)
    for layer in layers:
        mean, std = layer.parametrizations.weight.original, layer.parametrizations.weight[0].root.square()
        ratio = (std / BLOB_PRIOR).square()
        total = total + 0.5 * (ratio + (mean / BLOB_PRIOR).square() - 1.0 - ratio.log()).sum()
    return total


def build(base: nn.Module, job: dict[str, Any], config: dict[str, Any]) -> tuple[Any, list[nn.Module]]:
    """Return the PEFT model, and BLoB's layers."""
    trainer, options = job["trainer"], job["options"]
    noise = MontecloraConfig(**MONTECLORA) if "monteclora" in trainer else None
    torch.manual_seed(job["seed"])
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        monteclora_config=noise,
        lora_dropout=options.get("dropout", 0.0),
        **config["lora"],
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
        return IVON.like_adamw(params, lr=options["lr"], num_data=rows, seed=job["seed"])
    on_gpu = DEVICE.type == "cuda"
    lr = torch.tensor(options["lr"], device=DEVICE) if on_gpu else options["lr"]
    return torch.optim.AdamW(params, lr=lr, weight_decay=options.get("weight_decay", 0.0), capturable=on_gpu)


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


class Swag:
    """SWA by torch's AveragedModel, and SWAG's diagonal and last deviations (Maddox et al., 2019)."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.mean = AveragedModel(nn.ParameterList([p.detach().clone() for p in params]))
        self.squares = AveragedModel(nn.ParameterList([p.detach().square() for p in params]))
        self.deviations: list[list[Tensor]] = []

    @torch.no_grad()
    def collect(self) -> None:
        self.mean.update_parameters(nn.ParameterList([p.detach().clone() for p in self.params]))
        self.squares.update_parameters(nn.ParameterList([p.detach().square() for p in self.params]))
        means = list(self.mean.module)
        self.deviations.append([p.detach() - m for p, m in zip(self.params, means, strict=True)])
        self.deviations = self.deviations[-SWAG_RANK:]

    @contextmanager
    def weights(self, seed: int | None) -> Iterator[None]:
        """Put the average into the model, or a sample."""
        generator = torch.Generator().manual_seed(seed or 0)
        rank = len(self.deviations)
        mix = torch.randn(rank, generator=generator).tolist()
        values = []
        for i, (m, s) in enumerate(zip(self.mean.module, self.squares.module, strict=True)):
            value = m.detach().clone()
            if seed is not None:
                std = (s - m.square()).clamp_min(0.0).sqrt()
                value += std * torch.randn(m.shape, generator=generator).to(m.device) / math.sqrt(2)
                for z, deviation in zip(mix, self.deviations, strict=True):
                    value += z * deviation[i] / math.sqrt(2 * max(rank - 1, 1))
            values.append(value)
        with held(self.params, values):
            yield


@contextmanager
@torch.no_grad()
def held(params: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Put values into the parameters for as long as the context is open."""
    before = [p.detach().clone() for p in params]
    try:
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
        yield
    finally:
        for p, value in zip(params, before, strict=True):
            p.copy_(value)


@contextmanager
def blob_sample(layers: list[nn.Module], seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)
    noises = [layer.parametrizations.weight[0] for layer in layers]
    try:
        for noise in noises:
            noise.fixed = torch.randn(noise.root.shape, generator=generator).to(noise.root.device)
        yield
    finally:
        for noise in noises:
            noise.fixed = None


@contextmanager
def dropped(model: Any, seed: int) -> Iterator[None]:
    """Dropout as in training, for MC dropout."""
    with torch.random.fork_rng(devices=[DEVICE] if DEVICE.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if "lora_dropout" in name:
                module.train()
        try:
            yield
        finally:
            model.eval()


def loss_of(job: dict[str, Any], blob: list[nn.Module], rows: int) -> Callable[..., Tensor]:
    if job["trainer"] == "monteclora":
        return lambda model, batch: loss(model, batch) + bayeslora.monteclora_loss(model)
    if job["trainer"] == "peft_monteclora":
        return lambda model, batch: loss(model, batch) + model.base_model._get_monteclora_loss()
    if job["trainer"] == "blob":
        return lambda model, batch: loss(model, batch) + blob_kl(blob) / rows
    return loss


def clock() -> float:
    measure.synchronize()
    return time.perf_counter()


def train(base: nn.Module, job: dict[str, Any], config: dict[str, Any], fit: list[Any], val: Data) -> Trained:
    """Train; remember the weights with the lowest validation NLL where a view asks for them."""
    model, blob = build(base, job, config)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = make_optimizer(params, job, len(fit))
    steps, size = job["steps"], job["options"].get("batch_size", config["batch_size"])
    choices = max(len(q.targets) for q in fit)
    batches = _training_batches([q.length for q in fit], size, job["seed"])
    loss_fn = loss_of(job, blob, len(fit))
    step_fn = bayeslora.capture_step(model, opt, loss_fn=loss_fn, warmup=2, max_graphs=32)
    if job["trainer"] in EAGER and not step_fn._eager:
        step_fn._go_eager("this method's noise comes from the host")
    swag = Swag(params) if job["trainer"] == "swag" else None
    done = Trained(model, opt, 0.0, steps, swag=swag, blob=blob)
    wants_early, best = "early" in job["views"], math.inf
    check_at = {round(steps * k / CHECKS) for k in range(1, CHECKS + 1)}
    model.train()
    start = clock()
    for step in range(steps):
        set_lr(opt, job["options"]["lr"] * factor(step, steps, config["warmup"], swag is not None))
        step_fn(collate([fit[i] for i in next(batches)], choices, fixed=True))
        if swag is not None and step >= 0.75 * steps and (step % 10 == 0 or step == steps - 1):
            swag.collect()
        if wants_early and step + 1 in check_at:
            done.seconds += clock() - start
            model.eval()
            nll = metrics.nll(val.predict(model), val.labels)
            model.train()
            if nll < best:
                best, done.early_step = nll, step + 1
                done.early = [p.detach().clone() for p in params]
            start = clock()
    done.seconds += clock() - start
    model.eval()
    for p in params:
        p.grad = None
    if isinstance(opt, IVON):
        done.posterior = Posterior.from_optimizer(model, opt)
    elif job["trainer"] == "monteclora":
        done.posterior = Posterior.from_monteclora(model)
    elif job["trainer"] == "laplace":
        done.posterior = laplace(model, fit, val)
    return done


def laplace(model: Any, fit: list[Any], val: Data) -> Posterior:
    """Diagonal Laplace-LoRA (Yang et al., 2024): the Fisher information's diagonal at the trained weights.

    F = mean over questions of g², g the gradient at an answer drawn from the model; the precision is
    N F + p, with the prior precision p that gives the lowest validation NLL. Sampled, not linearized.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = [torch.zeros_like(p) for p in named.values()]
    generator = torch.Generator().manual_seed(0)
    for i in torch.randperm(len(fit), generator=generator)[:LAPLACE_ROWS].tolist():
        logits = scores(model, collate([fit[i]], len(fit[i].targets), fixed=False))[0]
        answer = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        grads = torch.autograd.grad(-logits.log_softmax(-1)[answer.to(DEVICE)].sum(), list(named.values()))
        for total, grad in zip(fisher, grads, strict=True):
            total.addcmul_(grad, grad, value=1.0 / min(len(fit), LAPLACE_ROWS))
    found = []
    for prior in (1e2, 1e3, 1e4, 1e5, 1e6):
        gaussians = {
            name: GaussianParameter(p, p.detach().clone(), f.clone(), i, float(len(fit)), prior / len(fit))
            for i, ((name, p), f) in enumerate(zip(named.items(), fisher, strict=True))
        }
        posterior = Posterior(model, gaussians)
        weights = [partial(posterior.sample, seed=seed) for seed in range(4)]
        found.append((metrics.nll(val.predict(model, weights), val.labels), prior, posterior))
    return min(found, key=lambda row: row[:2])[2]


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
    if name.startswith("scale_"):
        return samples(trained, count, float(name.removeprefix("scale_"))), inside
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
    """Return the temperature in [0.25, 8] with the lowest NLL."""
    logs = probs.clamp_min(1e-30).log()
    candidates = torch.logspace(math.log10(0.25), math.log10(8.0), 300).tolist()
    return min(candidates, key=lambda t: float(nn.functional.cross_entropy(logs / t, labels)))


def cooled(probs: Tensor, value: float) -> Tensor:
    return (probs.clamp_min(1e-30).log() / value).softmax(-1)


def end(trained: Trained) -> None:
    """Take the adapter off the base model."""
    bayeslora.unpatch(trained.model)
    trained.model.unload()
    trained.opt = trained.posterior = trained.swag = None
    if DEVICE.type == "cuda":
        gc.collect()  # graphs and their memory
        torch.cuda.empty_cache()
