"""Host time and launches of a Llama block's linear layers; part of bench_model_step.py."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bayeslora.step_benchmark import collector_paused

ACTIVITIES = [torch.profiler.ProfilerActivity.CPU]
if torch.cuda.is_available():
    ACTIVITIES.append(torch.profiler.ProfilerActivity.CUDA)


def kernels_of(profiler: torch.profiler.profile) -> list:
    """What ran on the device, by name."""
    return [e for e in profiler.key_averages() if e.device_type != torch.autograd.DeviceType.CPU]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Block(nn.Module):
    """The seven linear layers of a Llama block, with children named as there, and nothing else."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.self_attn = _Children("qkvo", hidden, hidden)
        self.mlp = _Children(("gate", "up"), hidden, intermediate)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.self_attn(x)
        gate, up = self.mlp(x)
        return self.self_attn.o_proj(q), k, v, up, self.down_proj(gate)


class _Children(nn.Module):
    def __init__(self, names: Sequence[str], k: int, n: int) -> None:
        super().__init__()
        for name in names:
            self.add_module(f"{name}_proj", nn.Linear(k, n, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for name, layer in self.named_children() if name != "o_proj"]


def host_costs(
    build_variants: Callable[[nn.Module], dict[str, nn.Module]], device: torch.device, rounds: int = 150
) -> list[dict]:
    """Host time and launches a layer, on layers so small that the device never keeps the host waiting."""
    base = _Block(256, 512).to(device=device, dtype=torch.bfloat16).requires_grad_(False)
    variants = build_variants(base)
    rounds = rounds if device.type == "cuda" else 10
    x = torch.randn(2, 8, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with collector_paused():
        for _ in range(rounds):
            for name, model in variants.items():
                timings[name].append(_time(model, x))
    results = []
    for name, model in variants.items():
        forward, backward = (statistics.median(t[i] for t in timings[name][5:]) * 1e6 / 7 for i in (0, 1))
        result = {"variant": name, "forward_us": forward, "backward_us": backward}
        results.append({**result, **_count_launches(model, x)})
    return results


def _time(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of the host, forward and backward."""
    for p in model.parameters():
        p.grad = None
    _synchronize()
    times = [time.perf_counter()]
    outputs = model(x * 1)
    times.append(time.perf_counter())
    torch.autograd.backward(outputs, [y.detach() for y in outputs])
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]


def _count_launches(model: nn.Module, x: Tensor) -> dict:
    counts = {}
    for part in ("forward", "backward"):
        outputs = model(x * 1) if part == "backward" else ()
        dys = [y.detach() for y in outputs]
        _synchronize()
        with torch.profiler.profile(activities=ACTIVITIES) as profiler:
            if part == "forward":
                model(x)
            else:
                torch.autograd.backward(outputs, dys)
            _synchronize()
        counts[f"{part}_launches"] = sum(e.count for e in kernels_of(profiler)) / 7
    return counts


def print_host_costs(host: list[dict]) -> None:
    print(f"{'a layer of a Llama block':26} host us: forward backward; launches: forward backward")
    for r in host:
        times = f"{r['forward_us']:16.1f} {r['backward_us']:8.1f}"
        print(f"{r['variant']:26} {times} {r['forward_launches']:18.2f} {r['backward_launches']:8.2f}")
