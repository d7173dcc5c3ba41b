"""A LoRA layer with a posterior sample for each sequence: perturbed in the kernel, or samples written out.

    pytest bench/bench_lora_perturbed.py                    pytest-benchmark's table
    python bench/bench_lora_perturbed.py [--output DIR]     every row into lora_perturbed_<device>.json

One layer, r 16, S sequences of T tokens with a sample each; T 1 is a step of decoding. Contestants:

- "base": the frozen layer alone;
- "shared": the LoRA layer with one sample for all rows (cuBLAS route), what the S samples cost nothing over;
- "in kernel": A and B perturbed as they are loaded;
- "written": the samples written to memory, then batched products; "kept": the products alone, as where
  samples are written once and used for many tokens;
- "in turn": one pass a sample, with its sample kept: what a loop over samples costs.

Checked against the twin in fp64 before it is timed. Times are of CUDA graphs over rotating inputs,
contestants in turn, medians with half the range between quartiles. Without a GPU: tiny sizes on the twin.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from bench_lora_linear import _host_times
from lora_timing import interleaved, relative_error, rotations, summary
from torch import Tensor
from torch.nn import functional as F

from bayeslora.kernels import lora_perturbed_twin as twin
from bayeslora.kernels.lora_perturbed_twin import Perturbation
from bayeslora.lora_linear import lora_linear

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SCALE = 2.0
LAYERS = (
    {"3B o": (3072, 3072), "3B up": (8192, 3072), "3B down": (3072, 8192)} if CUDA else {"tiny": (64, 48)}
)
SAMPLES = (1, 8, 64) if CUDA else (1, 3)
TOKENS = (1, 256) if CUDA else (1, 5)
CASES = list(itertools.product(LAYERS, SAMPLES, TOKENS))
RANK = 16 if CUDA else 4


class Inputs:
    """One set of operands: a layer, its Gaussian, and S sequences."""

    def __init__(self, layer: str, samples: int, tokens: int) -> None:
        n, k = LAYERS[layer]
        r = RANK

        def draw(*shape: int, fan_in: int = 1, dtype: torch.dtype = DTYPE) -> Tensor:
            return torch.randn(*shape, device=DEVICE).mul_(fan_in**-0.5).to(dtype)

        self.x = draw(samples, tokens, k).requires_grad_()
        self.dy = draw(samples, tokens, n)
        self.weight = draw(n, k, fan_in=k)
        self.lora_a = draw(r, k, fan_in=k, dtype=torch.float32).requires_grad_()
        self.lora_b = draw(n, r, fan_in=r, dtype=torch.float32).requires_grad_()
        stds = [torch.full_like(t, 0.02).requires_grad_() for t in (self.lora_a, self.lora_b)]
        index = torch.arange(samples, device=DEVICE), torch.zeros(samples, dtype=torch.int64, device=DEVICE)
        self.perturbation = Perturbation(*stds, *index, 0, 1)
        self.kept = self.write()

    def leaves(self) -> list[Tensor]:
        return [self.x, self.lora_a, self.lora_b, self.perturbation.a_std, self.perturbation.b_std]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.weight))

    def write(self) -> tuple[Tensor, Tensor]:
        p = self.perturbation
        ops: Any = twin
        if CUDA:
            from bayeslora.kernels import lora_perturbed as ops
        with torch.no_grad():
            a = ops.sample_factors(self.lora_a, p.a_std, p.seeds, p.draws, p.a_stream, DTYPE)
            b = ops.sample_factors(self.lora_b, p.b_std, p.seeds, p.draws, p.b_stream, DTYPE)
        return a, b

    def base(self) -> Tensor:
        return F.linear(self.x, self.weight)

    def shared(self) -> Tensor:
        a, b = self.kept[0][0], self.kept[1][0]
        return lora_linear(self.x, self.weight, None, a, b, SCALE)

    def in_kernel(self) -> Tensor:
        p = self.perturbation
        return lora_linear(self.x, self.weight, None, self.lora_a, self.lora_b, SCALE, perturbation=p)

    def products(self, samples: tuple[Tensor, Tensor]) -> Tensor:
        a, b = samples
        hidden = torch.bmm(self.x, a.mT) * SCALE
        return torch.baddbmm(F.linear(self.x, self.weight), hidden, b.mT)

    def in_turn(self) -> list[Tensor]:
        layer = self.weight, None
        return [lora_linear(x, *layer, a, b, SCALE) for x, a, b in zip(self.x, *self.kept, strict=True)]


def check(inputs: Inputs) -> dict[str, float]:
    """Return the relative errors of y and all gradients against the twin in fp64; raise if they are large.

    Bound: three times the twin's own error at the dtype.
    """

    def results(function: Any, dtype: torch.dtype | None) -> list[Tensor]:
        def to(t: Tensor) -> Tensor:
            return t if dtype is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

        x, a, b, a_std, b_std = leaves = [to(t) for t in inputs.leaves()]
        p = inputs.perturbation._replace(a_std=a_std, b_std=b_std)
        y = function(x, to(inputs.weight), None, a, b, SCALE, perturbation=p)
        return [y, *torch.autograd.grad(y, leaves, to(inputs.dy))]

    truth = results(twin.perturbed_lora_linear, torch.float64)
    plain = [
        relative_error(v, t) for v, t in zip(results(twin.perturbed_lora_linear, None), truth, strict=True)
    ]
    errors = [relative_error(v, t) for v, t in zip(results(lora_linear, None), truth, strict=True)]
    for name, error, bound in zip(("y", "dx", "dA", "dB", "da_std", "db_std"), errors, plain, strict=True):
        assert error <= 3 * bound + 1e-6, f"{name}: error {error:.2e}, the twin's {bound:.2e}"
    return {"error": max(errors), "twin_error": max(plain)}


def run_case(layer: str, samples: int, tokens: int, rounds: int = 5) -> dict[str, Any]:
    """Check one case, then time its forward, and forward + backward of what has one."""
    torch.manual_seed(0)
    first = Inputs(layer, samples, tokens)
    row: dict[str, Any] = {"layer": layer, "samples": samples, "tokens": tokens, "r": RANK, **check(first)}
    count = rotations(first.bytes()) if CUDA else 1
    sets = [first, *(Inputs(layer, samples, tokens) for _ in range(count - 1))]

    def forward(name: str) -> Any:
        def call(i: int) -> None:
            with torch.no_grad():
                if name == "written":
                    sets[i].products(sets[i].write())
                elif name == "kept":
                    sets[i].products(sets[i].kept)
                else:
                    getattr(sets[i], name.replace(" ", "_"))()

        return call

    def both(name: str) -> Any:
        def call(i: int) -> None:
            leaves = [sets[i].x] if name == "base" else sets[i].leaves()
            y = getattr(sets[i], name.replace(" ", "_"))()
            torch.autograd.grad(y, leaves, sets[i].dy)

        return call

    time = (lambda calls: interleaved(calls, count, 4 * count, rounds)) if CUDA else _host_times
    names = ("base", "shared", "in kernel", "written", "kept", "in turn")
    row["forward"] = {n: summary(t) for n, t in time({n: forward(n) for n in names}).items()}
    if tokens > 1:
        row["both"] = {n: summary(t) for n, t in time({n: both(n) for n in ("base", "in kernel")}).items()}
    return row


@pytest.mark.parametrize(("layer", "samples", "tokens"), CASES)
def test_lora_perturbed(benchmark: Any, layer: str, samples: int, tokens: int) -> None:
    inputs = Inputs(layer, samples, tokens)
    benchmark.extra_info.update(check(inputs))

    def forward() -> None:
        with torch.no_grad():
            inputs.in_kernel()
        measure.synchronize()

    benchmark.pedantic(forward, rounds=5, warmup_rounds=1)


def main() -> None:
    """Run every case; write after each, so that a run that is cut short leaves its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if not CUDA:
        print("no GPU: tiny sizes on the plain-torch twin, by the host's clock; the ratios mean nothing")
    rows = []
    for case in CASES:
        row = run_case(*case)
        rows.append(row)
        times = {name: t["median_us"] for name, t in row["forward"].items()}
        both = {name: t["median_us"] for name, t in row.get("both", {}).items()}
        print(f"{case[0]:8} S {case[1]:2} T {case[2]:3} forward", times, "both" if both else "", both or "")
        measure.write_results("lora_perturbed", rows, arguments.output)


if __name__ == "__main__":
    main()
