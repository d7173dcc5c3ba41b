"""A training step with MonteCLoRA: PEFT's, ours, and our plain LoRA step that it should cost no more than.

    python bench/bench_monteclora.py [--out DIR]     interleaved rounds, a table, monteclora_<device>.json
    pytest bench/bench_monteclora.py                 the same rows under pytest-benchmark

Llama-3.2-3B's shape with random weights on a GPU (a toy's elsewhere, which checks the script and measures
nothing), q, k and v at rank 32, N = 4; forward, task loss plus variational loss, backward. PEFT's runs with
its default fp32 adapters (with bf16 ones its sampler raises: it multiplies bf16 with fp32), ours with both.
PEFT's buffer holds 15 draws, as the paper's; as many rounds are timed, so that one of them refills it: the
mean has its share, the median has not.

Checked before anything is timed: the device's kernels against the twins; all variants at the mean in eval
mode; and our perturbed step against our plain LoRA with the perturbed matrices as its weights, loss and
gradients, both in bf16 on the same device.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from bench_model_step import (
    CUDA,
    DEVICE,
    SHAPE,
    TOKENS,
    GraphStep,
    Row,
    _clear_gradients,
    _distance,
    _input_tokens,
    _sharing_copy,
    build_base,
)
from peft import LoraConfig, MontecloraConfig, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora._backend import monteclora_kernels
from bayeslora.kernels import monteclora_twin
from bayeslora.kernels.monteclora_plan import PerturbPlan, Site

ROUNDS = 15 if CUDA else 2
RANK, COMPONENTS, BUFFER = 32, 4, 15
VARIANTS = (
    "base",
    "LoRA",
    "MonteCLoRA",
    "MonteCLoRA mixture",
    "LoRA fp32",
    "MonteCLoRA fp32",
    "PEFT LoRA fp32",
    "PEFT MonteCLoRA fp32",
)
CAPTURED = VARIANTS[:6]  # PEFT's samplers wait for the device in every layer: no graph can record that
# fp32 sums of one kind in another order, and the twin's cosine against the kernel's.
KERNEL_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
# Two bf16 steps of the same arithmetic, but attention's backward adds in no fixed order, and PEFT rounds in
# other places: 0.075 of the gradient through 28 layers (bench_model_step). Other noise: an error near one.
STEP_TOLERANCE = 0.15


def _config(buffer_size: int | None) -> LoraConfig:
    noise = None
    if buffer_size is not None:
        noise = MontecloraConfig(
            num_samples=COMPONENTS, sample_scaler=5e-3, use_entropy=True, buffer_size=buffer_size
        )
    targets = ["q_proj", "k_proj", "v_proj"]
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, monteclora_config=noise)


def _adapted(base: nn.Module, buffer_size: int | None, full: bool) -> nn.Module:
    torch.manual_seed(1)
    model = get_peft_model(_sharing_copy(base), _config(buffer_size), autocast_adapter_dtype=full).train()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data.copy_((0.02 * torch.randn(p.shape, generator=generator)).bfloat16())
    return model


def build_variant(base: nn.Module, variant: str) -> nn.Module:
    if variant == "base":
        return base
    buffer_size = None if "MonteCLoRA" not in variant else BUFFER if variant.startswith("PEFT") else 1
    model = _adapted(base, buffer_size, variant.endswith("fp32"))
    if variant.startswith("PEFT"):
        return model
    bayeslora.patch(model)
    if variant == "MonteCLoRA mixture":
        bayeslora.configure_monteclora(model, estimator="mixture")
    return model


class NoisyRow(Row):
    """A row whose step has the variational loss where its model has one."""

    def __init__(self, variant: str, model: nn.Module, tokens: Tensor) -> None:
        super().__init__(variant, model, tokens)
        if "MonteCLoRA" in variant:
            self.step = lambda: _noisy_step(model, tokens)


def _noisy_step(model: Any, tokens: Tensor) -> Tensor:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss = loss + model.base_model._get_monteclora_loss().to(loss.dtype)
    loss.backward()
    return loss.detach()


def check_kernels() -> None:
    """The device's kernels against the twins on the CPU."""
    kernels = monteclora_kernels(DEVICE)
    concentration = torch.logspace(-2, 4, 5000, dtype=torch.float64)
    stream, element = torch.full((5000,), 3), torch.arange(5000)
    twin = monteclora_twin.log_gamma(concentration, stream, element, seed=-5, draw=7)
    found = kernels.log_gamma(
        concentration.to(DEVICE), stream.to(DEVICE), element.to(DEVICE), seed=-5, draw=7
    )
    torch.testing.assert_close(found.cpu(), twin, rtol=1e-9, atol=1e-9)
    sites = [Site(32, 3072, False, 0), Site(32, 1000, True, 4), Site(3, 1023, False, 9)]
    plan, cpu_plan = PerturbPlan(sites, DEVICE), PerturbPlan(sites, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(plan.size, generator=generator)
    kappa = torch.rand(plan.num_rows, 3, generator=generator)
    on_device = flat.to(DEVICE)
    kernels.perturb_(plan, on_device, kappa.to(DEVICE), seed=11, draw=2)
    gradient = kernels.coefficient_gradient(plan, flat.to(DEVICE), 3, seed=11, draw=2).cpu()
    truth = monteclora_twin.coefficient_gradient(cpu_plan, flat.double(), 3, seed=11, draw=2)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=5e-3)
    monteclora_twin.perturb_(cpu_plan, flat, kappa, seed=11, draw=2)
    torch.testing.assert_close(on_device.cpu(), flat, **KERNEL_TOLERANCE)


def check_mean(models: dict[str, nn.Module], tokens: Tensor) -> None:
    logits = {}
    with torch.no_grad():
        for name, model in models.items():
            if name != "base":
                model.eval()
                logits[name] = model(input_ids=tokens[:1], use_cache=False).logits.float()
                model.train()
    for name, value in logits.items():
        error = _distance(value, logits["PEFT LoRA fp32"])
        assert error < STEP_TOLERANCE, (name, error)


def check_step(noisy: nn.Module, plain: nn.Module, tokens: Tensor) -> dict[str, float]:
    """Our step's loss and gradients are those of plain LoRA at the perturbed matrices."""
    bank = next(m._monteclora["default"][0] for m in noisy.modules() if "_monteclora" in m.__dict__)
    _clear_gradients(noisy)
    loss = noisy(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    part = bank.parts[0]
    moved = []
    named = dict(plain.named_modules())
    for name, layer in noisy.named_modules():
        if "_monteclora" in layer.__dict__:
            weight = named[name].lora_A["default"].weight
            moved.append((weight, weight.detach().clone()))
            weight.data.copy_(part.plan.view(part.current.flat, layer._monteclora["default"][1]))
    _clear_gradients(plain)
    expected = plain(input_ids=tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    found = {n: p.grad for n, p in noisy.named_parameters() if p.grad is not None}
    pairs = [(found[n], p.grad) for n, p in plain.named_parameters() if n in found]
    ours, theirs = (torch.cat([g.float().flatten() for g in side]) for side in zip(*pairs, strict=True))
    error = _distance(ours, theirs)
    noise = max(_distance(w.detach().float(), old.float()) for w, old in moved)
    for weight, old in moved:
        weight.data.copy_(old)
    priors = [g for n, g in found.items() if "sampler" in n]
    assert len(priors) == 2 * len(moved) and all(bool(g.abs().sum() > 0) for g in priors)
    assert noise > 1e-4, noise
    assert abs(loss.item() / expected.item() - 1) < STEP_TOLERANCE, (loss, expected)
    assert error < STEP_TOLERANCE, error
    _clear_gradients(noisy)
    _clear_gradients(plain)
    return {"gradient_error": error, "relative_noise": noise}


def _describe(variant: str, tokens: tuple[int, int], mode: str, seconds: list[float], peak: float) -> dict:
    quartiles = measure.spread(seconds)
    return {
        "tokens": f"{tokens[0]}x{tokens[1]}",
        "mode": mode,
        "variant": variant,
        "median_ms": quartiles["median"] * 1e3,
        "q1_ms": quartiles["q1"] * 1e3,
        "q3_ms": quartiles["q3"] * 1e3,
        "mean_ms": statistics.mean(seconds) * 1e3,
        "rounds": len(seconds),
        "peak_gb": peak,
    }


def measure_tokens(models: dict[str, nn.Module], tokens: tuple[int, int]) -> list[dict]:
    rows = [NoisyRow(name, model, _input_tokens(*tokens)) for name, model in models.items()]
    for row in rows:
        row.run()
        row.measure_peak()
    for _ in range(ROUNDS):
        for row in rows:
            row.seconds.append(row.run())
    results = [_describe(row.variant, tokens, "eager", row.seconds, row.peak_gb) for row in rows]
    if not CUDA:
        return results
    captured = [row for row in rows if row.variant in CAPTURED]
    for row in rows:
        _clear_gradients(row.model)
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    graphs = [GraphStep(row, pool, stream) for row in captured]
    seconds: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, times in zip(graphs, seconds, strict=True):
            times.append(graph.run())
    for row, graph, times in zip(captured, graphs, seconds, strict=True):
        if "MonteCLoRA" in row.variant:
            check_replays(row.model, graph)
        results.append(_describe(row.variant, tokens, "graph", times, 0.0))
    return results


def check_replays(model: nn.Module, graph: GraphStep) -> None:
    """Every replay draws fresh noise: the counter moves on the device, and so do the gradients."""
    bank = next(m._monteclora["default"][0] for m in model.modules() if "_monteclora" in m.__dict__)
    counter = bank.parts[0].counter
    before = counter.item()
    graph.graph.replay()
    first = [g.clone() for g in graph.gradients[:2]]
    graph.graph.replay()
    assert counter.item() == before + 2
    assert any(not torch.equal(a, b) for a, b in zip(first, graph.gradients[:2], strict=True))


def own_cost(model: nn.Module) -> dict[str, Any]:
    """What drawing and perturbing, and the loss, cost by themselves: host and device time a call."""
    bank = next(m._monteclora["default"][0] for m in model.modules() if "_monteclora" in m.__dict__)

    def perturb_and_back() -> None:
        bank.refresh()
        outputs = bank.parts[0].current.outputs
        torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
        _clear_gradients(model)

    def loss_and_back() -> None:
        bank.loss().backward()
        _clear_gradients(model)

    return measure.interleaved(
        {
            "refresh": bank.refresh,
            "refresh, backward": perturb_and_back,
            "loss, backward": loss_and_back,
        },
        rounds=5,
    )


def print_table(results: list[dict]) -> None:
    print(f"{'':34} {'median ms':>9} {'q1..q3':>15} {'mean':>8} {'/LoRA':>6} {'/base':>6} {'GB':>6}")
    for r in results:
        same = {s["variant"]: s for s in results if (s["tokens"], s["mode"]) == (r["tokens"], r["mode"])}
        plain = "LoRA fp32" if r["variant"].endswith("fp32") else "LoRA"
        lora, base = (r["median_ms"] / same[v]["median_ms"] for v in (plain, "base"))
        spread = f"{r['q1_ms']:.1f}..{r['q3_ms']:.1f}"
        name = f"{r['tokens']:6} {r['mode']:5} {r['variant']}"
        print(
            f"{name:34} {r['median_ms']:9.2f} {spread:>15} {r['mean_ms']:8.2f} {lora:6.3f} {base:6.3f} "
            f"{r['peak_gb']:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    print(f"{measure.device_name()}{'' if CUDA else ': no GPU, toy sizes, which measure nothing'}")
    check_kernels()
    base = build_base()
    models = {variant: build_variant(base, variant) for variant in VARIANTS}
    tokens = _input_tokens(*TOKENS[0])
    check_mean(models, tokens)
    pairs = (("MonteCLoRA", "LoRA"), ("MonteCLoRA mixture", "LoRA"), ("MonteCLoRA fp32", "LoRA fp32"))
    checks = {noisy: check_step(models[noisy], models[plain], tokens) for noisy, plain in pairs}
    print(f"checks passed: {checks}")
    costs = {name: own_cost(models[name]) for name in checks}
    for name, cost in costs.items():
        for part, kinds in cost.items():
            times = ", ".join(f"{kind} {value['median'] * 1e6:.0f}" for kind, value in kinds.items())
            print(f"{name}, {part}: {times} us")
    results: list[dict] = []
    for shape in TOKENS:
        results += measure_tokens(models, shape)
        print_table(results[-len(VARIANTS) - (len(CAPTURED) if CUDA else 0) :])
        rows: list[dict[str, object]] = [
            {"what": "model", **SHAPE, "rank": RANK, "components": COMPONENTS, "buffer": BUFFER},
            {"what": "checks", **checks},
            {"what": "own cost, seconds", **costs},
            *({"what": "step", **row} for row in results),
        ]
        file = measure.write_results("monteclora", rows, arguments.out)
    print(f"wrote {file}")


@pytest.fixture(scope="module")
def base_model() -> nn.Module:
    return build_base()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_monteclora_step(benchmark, base_model, tokens, variant):
    names = {"PEFT LoRA fp32", variant}
    models = {name: build_variant(base_model, name) for name in names}
    check_kernels()
    check_mean(models, _input_tokens(*tokens))
    if variant.startswith("MonteCLoRA"):
        plain = build_variant(base_model, "LoRA fp32" if variant.endswith("fp32") else "LoRA")
        check_step(models[variant], plain, _input_tokens(*tokens))
    row = NoisyRow(variant, models[variant], _input_tokens(*tokens))
    row.measure_peak()
    benchmark.extra_info.update(device=str(DEVICE), peak_gb=row.peak_gb)
    benchmark.pedantic(row.run, rounds=ROUNDS, warmup_rounds=1)


if __name__ == "__main__":
    main()
