"""What the study's baselines need beside an optimizer: SWAG, BLoB, MC dropout."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from study_model import DEVICE
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

SWAG_RANK = 10
BLOB_PRIOR, BLOB_STD = 0.2, 0.05  # BLoB's prior and its initial scale of the noise (Wang et al., 2024)


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
