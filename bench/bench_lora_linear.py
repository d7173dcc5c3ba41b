"""One LoRA layer, or a group that shares its input, against the frozen base alone: GPU time by route.

    pytest bench/bench_lora_linear.py                       pytest-benchmark's table
    python bench/bench_lora_linear.py [--output DIR]        every row into lora_linear_<device>.json

Each row is first checked against fp64 truth: no ratio is taken of a route whose error is above 1.5 times that
of cuBLAS + ``addmm_``. Times are of CUDA graphs over rotating inputs, contestants in turn (A B C, A B C), as
medians with half the range between quartiles. "base" is the frozen layers alone (dx of layers that share x
summed by ``add``, as autograd does); "peft" the operations of PEFT's layers under autograd, dropout 0.
Without a GPU it runs tiny sizes on the plain-torch twin, through the host's clock, and says so.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from lora_timing import interleaved, relative_error, rotations, summary
from torch import Tensor

from bayeslora.kernels import lora_layer_twin as twin

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
SCALE = 2.0
SINGLE = {  # name -> N of each layer, K
    "3B o": ((3072,), 3072),
    "3B k": ((1024,), 3072),
    "3B up": ((8192,), 3072),
    "3B down": ((3072,), 8192),
    "8B o": ((4096,), 4096),
    "8B k": ((1024,), 4096),
    "8B up": ((14336,), 4096),
    "8B down": ((4096,), 14336),
}
GROUPS = {
    "3B qkv": ((3072, 1024, 1024), 3072),
    "3B gate+up": ((8192, 8192), 3072),
    "8B qkv": ((4096, 1024, 1024), 4096),
    "8B gate+up": ((14336, 14336), 4096),
}
LAYERS = {**SINGLE, **GROUPS}
CASES = [
    *itertools.product(SINGLE, (8192,), (16,)),
    *itertools.product(GROUPS, (8192, 4096), (16,)),
    *itertools.product(SINGLE, (8192,), (64,)),
    *itertools.product(SINGLE, (4096,), (16,)),
    *itertools.product(("3B o", "3B up", "8B o", "8B down"), (8192,), (8,)),
    *itertools.product(SINGLE, (4096,), (64,)),
    *itertools.product(SINGLE, (2048,), (16, 64)),
    *itertools.product(GROUPS, (2048,), (16,)),
]
if not CUDA:
    LAYERS = {"tiny o": ((64,), 64), "tiny qkv": ((64, 32, 32), 64)}
    CASES = list(itertools.product(LAYERS, (128,), (8,)))
DIRECTIONS = (("forward", True, False), ("backward", False, True), ("both", True, True))
ROUTES = ("cublas", "products", "overlap")
Times = dict[str, list[float]]


class Inputs:
    """One set of operands of a case."""

    def __init__(self, name: str, m: int, r: int):
        device = "cuda" if CUDA else "cpu"
        widths, k = LAYERS[name]

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            return torch.randn(*shape, device=device).mul_(fan_in**-0.5).to(DTYPE)

        self.x, self.lora_a = draw(m, k), draw(len(widths) * r, k, fan_in=k)
        self.layers = [(draw(n, k, fan_in=k), None, draw(n, r)) for n in widths]
        self.dys = [draw(m, n) for n in widths]
        self.outs, self.dx = [torch.empty_like(dy) for dy in self.dys], torch.empty_like(self.x)
        self.weights, self.lora_bs = [w for w, _, _ in self.layers], [b for _, _, b in self.layers]
        self.hidden = self.x @ self.lora_a.t() * SCALE

    def forward(self, run: Callable[..., Any], route: str | None) -> Any:
        return run(self.x, self.layers, self.lora_a, SCALE, self.outs, route=route)

    def backward(self, run: Callable[..., Any], route: str | None) -> Any:
        return run(
            self.dys, self.x, self.weights, self.hidden, self.lora_a, self.lora_bs, SCALE, torch.float32,
            self.dx, route=route,
        )  # fmt: skip

    def base(self, forward: bool, backward: bool) -> None:
        if forward:
            for weight, out in zip(self.weights, self.outs, strict=True):
                torch.mm(self.x, weight.t(), out=out)
        if backward:
            total = None
            for dy, weight in zip(self.dys, self.weights, strict=True):
                part = torch.mm(dy, weight)
                total = part if total is None else total + part

    def peft(self, backward: bool) -> None:
        x = self.x.detach().requires_grad_(backward)
        a = [t.detach().requires_grad_(backward) for t in self.lora_a.chunk(len(self.layers))]
        b = [t.detach().requires_grad_(backward) for t in self.lora_bs]
        linear = torch.nn.functional.linear
        ys = [
            linear(x, w) + linear(linear(x, ai), bi) * SCALE
            for w, ai, bi in zip(self.weights, a, b, strict=True)
        ]
        if backward:
            torch.autograd.grad(ys, [x, *a, *b], self.dys)

    def bytes(self) -> int:
        return 2 * sum(t.numel() for t in (self.x, *self.weights, *self.dys))


def _ops() -> Any:
    if not CUDA:
        return twin
    from bayeslora.kernels import lora_layer

    return lora_layer


def _flat(forward: Any, backward: Any) -> list[Tensor]:
    (ys, hidden), (dx, da, dbs) = forward, backward
    return [*ys, hidden, dx, da, *dbs]


def _truth(inputs: Inputs) -> list[Tensor]:
    double = Inputs.__new__(Inputs)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            setattr(double, name, value.double())
    double.layers = [(w.double(), None, b.double()) for w, _, b in inputs.layers]
    double.dys, double.outs = [dy.double() for dy in inputs.dys], None
    double.weights, double.lora_bs = [w for w, _, _ in double.layers], [b for _, _, b in double.layers]
    double.dx = None
    return _flat(double.forward(twin.lora_forward, None), double.backward(twin.lora_backward, None))


def check(inputs: Inputs) -> tuple[list[str], dict[str, float]]:
    """Return the routes that are right, and each route's largest error over cuBLAS's."""
    ops, truth = _ops(), _truth(inputs)
    right, ratios, bounds = [], {}, []
    for route in ROUTES:
        for tensor in (*inputs.outs, inputs.dx):
            tensor.fill_(math.nan)
        found = _flat(inputs.forward(ops.lora_forward, route), inputs.backward(ops.lora_backward, route))
        errors = [relative_error(value, want) for value, want in zip(found, truth, strict=True)]
        bounds = bounds or [max(error, 1e-7) for error in errors]
        ratios[route] = max(error / bound for error, bound in zip(errors, bounds, strict=True))
        if ratios[route] <= 1.5 and all(math.isfinite(error) for error in errors):
            right.append(route)
    return right, ratios


def _host_times(calls: dict[str, Callable[[int], object]], rounds: int = 5) -> Times:
    times: Times = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        start = time.perf_counter()
        call(0)
        times[name].append((time.perf_counter() - start) * 1e6)
    return times


def run_case(name: str, m: int, r: int, rounds: int = 5) -> dict[str, Any]:
    """Check one case, then time it forward, backward and both."""
    torch.manual_seed(0)
    ops, first = _ops(), Inputs(name, m, r)
    right, ratios = check(first)
    count = rotations(first.bytes()) if CUDA else 1
    sets = [first, *(Inputs(name, m, r) for _ in range(count - 1))]
    row: dict[str, Any] = {
        "layer": name, "m": m, "n": list(LAYERS[name][0]), "k": LAYERS[name][1], "r": r,
        "error_over_cublas": {route: round(ratio, 3) for route, ratio in ratios.items()},
    }  # fmt: skip
    for direction, forward, backward in DIRECTIONS:
        calls: dict[str, Callable[[int], object]] = {"base": lambda i: sets[i].base(forward, backward)}  # noqa: B023
        if forward:
            calls["peft"] = lambda i: sets[i].peft(backward)  # noqa: B023
        for route in right:

            def ours(i: int, route: str = route, forward: bool = forward, backward: bool = backward) -> None:
                if forward:
                    sets[i].forward(ops.lora_forward, route)
                if backward:
                    sets[i].backward(ops.lora_backward, route)

            calls[route] = ours
        per_call = 6e-9 * m * sum(LAYERS[name][0]) * LAYERS[name][1]  # microseconds at 670 TFLOP/s
        repeats = count * max(1, min(6, int(1200 / (per_call * count))))
        times = interleaved(calls, count, repeats, rounds) if CUDA else _host_times(calls)
        row[direction] = {contestant: summary(values) for contestant, values in times.items()}
    return row


def profile_layer(name: str, m: int, r: int) -> dict[str, Any]:
    """Return the kernels of one layer's forward and backward by the route of the table, with their rates.

    Kernels that overlap each hold their own time, so the sum exceeds the layer's.
    """
    inputs, ops = Inputs(name, m, r), _ops()
    (n,), k = LAYERS[name]
    expected = [  # in the order of their launches: bytes that each must move, operations of the wide ones
        ("h = s x Aᵀ", {"bytes": 2 * (m * k + r * k + m * r)}),
        ("y = x Wᵀ + h Bᵀ", {"flop": 2 * m * n * k + 2 * m * r * n}),
        ("dh = s dy B", {"bytes": 2 * (m * n + r * n + m * r)}),
        ("dx = dy W + dh A", {"flop": 2 * m * n * k + 2 * m * r * k}),
        ("dA, dB in parts", {"bytes": 2 * (m * n + m * k + 2 * m * r)}),
        ("sums of the parts", {"bytes": 0}),
    ]

    def step() -> None:
        inputs.forward(ops.lora_forward, "overlap")
        inputs.backward(ops.lora_backward, "overlap")
        measure.synchronize()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(20):
            step()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e for e in events if e.name.startswith("_")), key=lambda e: e.time_range.start)
    rows = []
    for i, (product, must) in enumerate(expected):
        times = sorted(e.time_range.elapsed_us() for e in events[i :: len(expected)])
        us = times[len(times) // 2]
        row: dict[str, Any] = {"product": product, "kernel": events[i].name, "us": round(us, 1)}
        if must.get("bytes"):
            row["GB_per_s"] = round(must["bytes"] / us / 1e3)
        if "flop" in must:
            row["TFLOP_per_s"] = round(must["flop"] / us / 1e6)
        rows.append(row)
    return {"profile": name, "m": m, "n": n, "k": k, "r": r, "kernels": rows}


def host_cost(calls: int) -> dict[str, Any]:
    """Return microseconds of host time a call, by route, with little for the GPU to do."""
    inputs, ops, result = Inputs(next(iter(LAYERS)), 256 if CUDA else 8, 16), _ops(), {}
    for route in ROUTES:
        runs = {
            "forward": (inputs.forward, ops.lora_forward),
            "backward": (inputs.backward, ops.lora_backward),
        }
        for direction, (run, op) in runs.items():
            run(op, route)
            measure.synchronize()
            if CUDA:
                torch.cuda._sleep(10**9)  # half a second in which nothing waits for the GPU's queue to drain
            start = time.perf_counter()
            for _ in range(calls):
                run(op, route)
            result[f"{route} {direction}"] = round((time.perf_counter() - start) / calls * 1e6, 1)
            measure.synchronize()
    return {"host_us_a_call": result}


def ratios(row: dict[str, Any], direction: str) -> dict[str, float]:
    """Return each contestant's median over the base's."""
    base = row[direction]["base"]["median_us"]
    return {name: round(t["median_us"] / base, 3) for name, t in row[direction].items() if name != "base"}


@pytest.mark.parametrize(("name", "m", "r"), CASES)
def test_lora_linear(benchmark: Any, name: str, m: int, r: int) -> None:
    row = run_case(name, m, r)
    benchmark.extra_info.update({direction: ratios(row, direction) for direction, _, _ in DIRECTIONS})
    ops, inputs = _ops(), Inputs(name, m, r)

    def both() -> None:
        inputs.forward(ops.lora_forward, None)
        inputs.backward(ops.lora_backward, None)
        measure.synchronize()

    benchmark.pedantic(both, rounds=5, warmup_rounds=1)


def main() -> None:
    """Run every case; write after each, so that a run that is cut short leaves its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[], help="only these M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="only these r")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp16", action="store_true", help="fp16 in place of bf16, into a file of its own")
    arguments = parser.parse_args()
    if arguments.fp16:
        globals()["DTYPE"] = torch.float16
    if not CUDA:
        print("no GPU: tiny sizes on the plain-torch twin, by the host's clock; the ratios mean nothing")
    rows: list[dict[str, object]] = [host_cost(100 if CUDA else 2)]
    if CUDA:
        rows += [profile_layer("3B o", 8192, 16), profile_layer("3B up", 8192, 16)]
    print(*rows, sep="\n")
    for name, m, r in CASES:
        if (arguments.tokens and m not in arguments.tokens) or (arguments.ranks and r not in arguments.ranks):
            continue
        if name not in arguments.layers:
            continue
        row = run_case(name, m, r, arguments.rounds)
        rows.append(row)
        base = row["both"]["base"]["median_us"]
        print(
            f"{name:11} M {m} r {r:2} base {base:8.1f} us ",
            json.dumps([ratios(row, d) for d, _, _ in DIRECTIONS]),
        )
        measure.write_results(f"lora_linear{'_fp16' * arguments.fp16}", rows, arguments.output)


if __name__ == "__main__":
    main()
