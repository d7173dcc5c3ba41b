"""A whole training step, forward and backward, of a random-weight Llama under PEFT and under bayeslora.

    python bench/bench_model_step.py [--out FILE] [--shape NAME] ...   interleaved rounds, JSON, a table
    pytest bench/bench_model_step.py                                   the same rows under pytest-benchmark

Rows: the frozen base alone (the embeddings' output requires a gradient, as in every other row, so that
all of them differentiate the same chain), PEFT with adapters in bf16 and in its default fp32, and both
patched; the shape is Llama-3.2-3B's on a GPU and a toy's elsewhere, which checks the script and measures
nothing. Every variant shares the base's weights, and each patched one the adapters of its PEFT twin.

Before a row is timed its loss and adapter gradients are checked: their distance from those of PEFT with
fp32 adapters, the most accurate of the variants, may be CHECK_FACTOR times PEFT's own in bf16.
"""

import argparse
import copy
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import torch
from host_costs import ACTIVITIES, host_costs, kernels_of, print_host_costs
from measure import replace_rows
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import lora_products, patch
from bayeslora.lora_group import remove_groups
from bayeslora.step_benchmark import SHAPES as MODELS
from bayeslora.step_benchmark import collector_paused

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LLAMA_3B, LLAMA_8B, TOY = (MODELS[name] for name in ("Llama-3.2-3B", "Llama-3-8B", "toy"))
SHAPES = {"Llama-3.2-3B": LLAMA_3B, "Llama-3-8B": LLAMA_8B} if CUDA else {"toy": TOY}
SHAPE = LLAMA_3B if CUDA else TOY
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all-linear r16": (16, ALL_LINEAR),
    "q,v r8": (8, ["q_proj", "v_proj"]),
    "all-linear r64": (64, ALL_LINEAR),
}
TOKENS = [(8, 256), (8, 512)] if CUDA else [(2, 16)]
GRAPH_TOKENS = [(8, 256), (8, 512)]
VARIANTS = ("base", "PEFT bf16", "PEFT fp32", "patched bf16", "patched fp32")
if not CUDA:
    torch.set_num_threads(1)
ROUNDS = 5 if CUDA else 2
# Two roundings of one sum in other places: errors of the size of PEFT's own, give or take half.
CHECK_FACTOR = 1.5


def build_base(shape: dict[str, int] = SHAPE) -> nn.Module:
    """A frozen bf16 model with random weights, made on the device it runs on."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            config = LlamaConfig(**{**shape, "tie_word_embeddings": True}, attn_implementation="sdpa")
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.get_input_embeddings().register_forward_hook(_require_gradient)
    return model.requires_grad_(False).train()


def _require_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def build_variants(base: nn.Module, adapters: str) -> dict[str, nn.Module]:
    r, targets = ADAPTERS[adapters]
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
    torch.manual_seed(1)
    half = get_peft_model(_sharing_copy(base), config, autocast_adapter_dtype=False).train()
    full = get_peft_model(_sharing_copy(base), config).train()
    for (name, p), (_, q) in zip(half.named_parameters(), full.named_parameters(), strict=True):
        if "lora_" in name:
            if "lora_B" in name:  # PEFT's zeros would hide half of the gradients
                nn.init.normal_(p, std=0.02)
            q.data.copy_(p)
    variants = {"base": base, "PEFT bf16": half, "PEFT fp32": full}
    variants["patched bf16"] = patch(_sharing_copy(half))
    variants["patched fp32"] = patch(_sharing_copy(full))
    return variants


def build_host_variants(base: nn.Module) -> dict[str, nn.Module]:
    variants = build_variants(base, "all-linear r16")
    variants["patched bf16 ungrouped"] = patch(_sharing_copy(variants["PEFT bf16"]))
    remove_groups(variants["patched bf16 ungrouped"])
    return variants


def make_step(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def _clear_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def _gradients(model: nn.Module) -> Tensor:
    return torch.cat(
        [p.grad.flatten().float() for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
    )


def _distance(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


class Row:
    """One line of the table: a variant at a number of tokens."""

    def __init__(self, variant: str, model: nn.Module, tokens: Tensor) -> None:
        self.variant, self.model = variant, model
        self.step = make_step(model, tokens)
        self.seconds: list[float] = []
        self.peak_gb = 0.0
        self.error: float | None = None

    def run(self) -> float:
        """Seconds of one step, by the host's clock: what a training loop waits."""
        _clear_gradients(self.model)
        _synchronize()
        start = time.perf_counter()
        self.step()
        _synchronize()
        return time.perf_counter() - start

    def measure_peak(self) -> None:
        if CUDA:
            _clear_gradients(self.model)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            self.peak_gb = torch.cuda.max_memory_allocated() / 1e9


def _synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def check(rows: list[Row]) -> None:
    """Set each row's error against PEFT with fp32 adapters; raise where it is more than rounding."""
    gradients, losses = {}, {}
    reference = None
    for row in sorted(rows, key=lambda row: row.variant != "PEFT fp32"):
        if row.variant == "base":
            continue
        _clear_gradients(row.model)
        losses[row.variant] = row.step().item()
        gradients = _gradients(row.model)
        _clear_gradients(row.model)
        reference = gradients if reference is None else reference
        row.error = _distance(gradients, reference)
    allowed = CHECK_FACTOR * next(row.error for row in rows if row.variant == "PEFT bf16")
    for row in rows:
        if row.variant.startswith("patched"):
            assert row.error is not None and row.error <= allowed, (row.variant, row.error, allowed)
            assert abs(losses[row.variant] / losses["PEFT fp32"] - 1) < 1e-2, losses


class GraphStep:
    """A row's whole forward and backward as one CUDA graph.

    The graphs share ``pool``, and with it their memory where they share ``stream`` too: replay in turn.
    """

    def __init__(self, row: Row, pool: object, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                _clear_gradients(row.model)
                row.step()
        torch.cuda.current_stream().wait_stream(stream)
        _clear_gradients(row.model)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            row.step()
        self.gradients = [p.grad for p in row.model.parameters() if p.grad is not None]
        _clear_gradients(row.model)

    def run(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def check_graphs(rows: list[Row], graphs: list[GraphStep]) -> None:
    """A replay's gradients are those of the eager step, which `check` has checked, as far as bf16 tells.

    Captured, cuBLAS may choose other kernels, and attention's backward adds in no fixed order.
    """
    allowed = CHECK_FACTOR * next(row.error for row in rows if row.variant == "PEFT bf16")
    for row, graph in zip(rows, graphs, strict=True):
        if row.variant == "base":
            continue
        graph.graph.replay()
        replayed = torch.cat([g.flatten().float() for g in graph.gradients])
        _clear_gradients(row.model)
        row.step()
        error = _distance(replayed, _gradients(row.model))
        _clear_gradients(row.model)
        assert error <= allowed, (row.variant, error, allowed)


def _input_tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=generator).to(DEVICE)


def _describe(row: Row, seconds: list[float], adapters: str, tokens: tuple[int, int], mode: str) -> dict:
    return {
        "adapters": adapters,
        "tokens": f"{tokens[0]}x{tokens[1]}",
        "mode": mode,
        "variant": row.variant,
        "median_ms": statistics.median(seconds) * 1e3,
        "min_ms": min(seconds) * 1e3,
        "max_ms": max(seconds) * 1e3,
        "rounds": len(seconds),
        "peak_gb": row.peak_gb if mode == "eager" else None,
        "gradient_error": row.error,
    }


def measure(
    adapters: str, tokens: tuple[int, int], variants: dict[str, nn.Module], rounds: int = ROUNDS
) -> Iterator[dict]:
    """Yield the results of every variant, eager and where it is asked for as CUDA graphs."""
    rows = [Row(name, model, _input_tokens(*tokens)) for name, model in variants.items()]
    check(rows)
    for row in rows:
        row.measure_peak()
        row.run()
    with collector_paused():
        for _ in range(rounds):
            for row in rows:
                row.seconds.append(row.run())
    yield from (_describe(row, row.seconds, adapters, tokens, "eager") for row in rows)
    if CUDA and tokens in GRAPH_TOKENS:
        for row in rows:
            _clear_gradients(row.model)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graphs = [GraphStep(row, pool, stream) for row in rows]
        check_graphs(rows, graphs)
        seconds: list[list[float]] = [[] for _ in rows]
        with collector_paused():
            for _ in range(rounds):
                for graph, times in zip(graphs, seconds, strict=True):
                    times.append(graph.run())
        yield from (
            _describe(row, times, adapters, tokens, "graph") for row, times in zip(rows, seconds, strict=True)
        )


def profile(model: nn.Module, tokens: Tensor, top: int = 18) -> str:
    """The kernels of one step that take the most time on the device."""
    step = make_step(model, tokens)
    step()
    _clear_gradients(model)
    with torch.profiler.profile(activities=ACTIVITIES) as profiler:
        step()
        _synchronize()
    kernels = sorted(kernels_of(profiler), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    lines = [f"{sum(e.count for e in kernels)} launches, {total / 1e3:.1f} ms"]
    lines += [f"{e.self_device_time_total / 1e3:8.2f} ms {e.count:6d} x {e.key[:110]}" for e in kernels[:top]]
    return "\n".join(lines)


def print_table(results: list[dict]) -> None:
    def key(r: dict) -> tuple:
        return r["adapters"], r["tokens"], r["mode"]

    print(f"{'':42} {'median ms':>9} {'min..max':>15} {'/base':>6} {'/PEFT bf16':>10} {'GB':>6}")
    for r in results:
        same = {s["variant"]: s for s in results if key(s) == key(r)}
        base, peft = (r["median_ms"] / same[v]["median_ms"] for v in ("base", "PEFT bf16"))
        spread = f"{r['min_ms']:.1f}..{r['max_ms']:.1f}"
        peak = "" if r["peak_gb"] is None else f"{r['peak_gb']:6.1f}"
        name = f"{r['adapters']:14} {r['tokens']:6} {r['mode']:5} {r['variant'].replace('patched', 'patch')}"
        print(f"{name:52} {r['median_ms']:9.2f} {spread:>15} {base:6.3f} {peft:10.3f} {peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--profile", type=Path, help="also profile a step of each variant into this file")
    parser.add_argument("--kernel-rows", type=int, help="take the measured routes from this many rows on")
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--shape", default=next(iter(SHAPES)), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", default=[f"{b}x{n}" for b, n in TOKENS], help="such as 8x512")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-host", action="store_true", help="leave out the host's cost of a layer")
    arguments = parser.parse_args()
    if arguments.kernel_rows is not None:
        lora_products._KERNEL_ROWS = arguments.kernel_rows
    model = "" if SHAPES[arguments.shape] is SHAPE else f"{arguments.shape}_"
    name = re.sub(r"\W+", "_", f"model_step_{model}{device}").lower()
    out = arguments.out or Path(__file__).parent / "results" / f"{name}.json"
    tokens_asked = [tuple(int(part) for part in text.split("x")) for text in arguments.tokens]
    document = {
        "device": device,
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "peft")},
        "model": arguments.shape,
        "kernel_rows": lora_products._KERNEL_ROWS,
        "note": "" if CUDA else "no GPU: toy sizes, which measure nothing",
        "host": [] if arguments.no_host else host_costs(build_host_variants, DEVICE),
    }
    before = json.loads(out.read_text()) if out.exists() else {}
    same = all(before.get(name) == document[name] for name in ("device", "versions", "kernel_rows"))
    document["host"] = document["host"] or (before["host"] if same else [])
    document["results"] = before["results"] if same else []  # those of other cases stay
    print(f"{device}{'' if CUDA else ': no GPU, toy sizes, which measure nothing'}")
    print_host_costs(document["host"])
    base = build_base(SHAPES[arguments.shape])
    for adapters in arguments.adapters:
        variants = build_variants(base, adapters)
        for tokens in tokens_asked:
            results = list(measure(adapters, tokens, variants, arguments.rounds))
            print_table(results)
            case = ("adapters", "tokens", "mode")
            document["results"] = replace_rows(document["results"], results, case)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(document, indent=1) + "\n")
        if arguments.profile and adapters == "all-linear r16":
            with arguments.profile.open("a") as file:
                for name in ("base", "patched bf16"):
                    text = profile(variants[name], _input_tokens(*TOKENS[0]))
                    file.write(f"{adapters}, {TOKENS[0]}, {name}: {text}\n\n")
        del variants


@pytest.fixture(scope="module")
def base_model() -> nn.Module:
    return build_base()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_model_step(benchmark, base_model, adapters, tokens, variant):
    variants = build_variants(base_model, adapters)
    needed = {name: variants[name] for name in ("PEFT fp32", "PEFT bf16", variant)}
    rows = {name: Row(name, model, _input_tokens(*tokens)) for name, model in needed.items()}
    check(list(rows.values()))
    rows[variant].measure_peak()
    benchmark.extra_info.update(device=str(DEVICE), peak_gb=rows[variant].peak_gb)
    benchmark.pedantic(rows[variant].run, rounds=ROUNDS, warmup_rounds=1)


if __name__ == "__main__":
    main()
