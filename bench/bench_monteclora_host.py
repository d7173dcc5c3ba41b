"""Host time of MonteCLoRA's own work a step: every operator and Python call, and none of the arithmetic.

    python bench/bench_monteclora_host.py [--rounds N]

A Llama of 28 tiny layers, q, k and v at rank 2, so 84 adapted matrices as in Llama-3.2-3B, on the CPU; the
samplers' kernels are replaced by ones that do nothing but allocate. What is left is what an eager step
waits for on a GPU: tensors of a few hundred numbers. Printed: microseconds of CPU time of one call, the
lowest tenth (what nothing else on the machine disturbed) and the median over interleaved rounds; and how
many operators and autograd functions each part runs.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora
from bayeslora.kernels import monteclora_twin

LAYERS = 28
TOKENS = torch.randint(3, 64, (1, 4), generator=torch.Generator().manual_seed(0))


def build(noisy: bool) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **shape))
    base.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    noise = MontecloraConfig(num_samples=4, sample_scaler=5e-3, use_entropy=True, buffer_size=1)
    targets = ["q_proj", "k_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=targets, monteclora_config=noise if noisy else None)
    return bayeslora.patch(get_peft_model(base, config).train())


class _Consume(torch.autograd.Function):
    """Uses matrices and gives each a gradient of its own, as layers do."""

    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:  # type: ignore[override]
        ctx.matrices = [m.detach() for m in matrices]
        return matrices[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.zeros_like(m) for m in ctx.matrices)


def parts(noisy: nn.Module, plain: nn.Module) -> dict[str, Callable[[], object]]:
    """What is timed. The plain layers' own share of a backward pass is timed apart, to be subtracted."""
    bank = next(m._monteclora["default"][0] for m in noisy.modules() if "_monteclora" in m.__dict__)
    trained = [p for model in (noisy, plain) for p in model.parameters() if p.requires_grad]
    matrices = [p for n, p in plain.named_parameters() if "lora_A" in n]

    def clear() -> None:
        for p in trained:
            p.grad = None

    def leaves_backward() -> None:
        _Consume.apply(*matrices).backward()
        clear()

    def refresh_backward() -> None:
        bank.refresh()
        part = bank.parts[0]
        loss = _Consume.apply(*part.current.outputs)
        part.release()
        loss.backward()
        clear()

    def loss_backward() -> None:
        noisy.base_model._get_monteclora_loss().backward()
        clear()

    def step(model: nn.Module) -> None:
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        if model is noisy:
            loss = loss + model.base_model._get_monteclora_loss()
        loss.backward()
        clear()

    return {
        "84 leaves, backward": leaves_backward,
        "refresh": bank.refresh,
        "refresh, backward": refresh_backward,
        "loss, backward": loss_backward,
        "step, LoRA": lambda: step(plain),
        "step, MonteCLoRA": lambda: step(noisy),
    }


def calls(fn: Callable[[], object]) -> dict[str, int]:
    """Return how many operators were called, within operators and not, and how many autograd functions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn()
    events = profile.events()
    operators = [e for e in events if e.name.startswith("aten::")]
    inner = sum(1 for e in operators if e.cpu_parent is not None and e.cpu_parent.name.startswith("aten::"))
    nodes = sum(1 for e in events if e.name.startswith("autograd::engine::evaluate_function"))
    return {"operators": len(operators) - inner, "inner": inner, "nodes": nodes}


def _nothing(*arguments: Any, **keywords: Any) -> None:
    """Stands for a launch that changes its arguments in place."""


def _constant_log_gamma(concentration: Tensor, stream: Tensor, element: Tensor, **_: Any) -> Tensor:
    return torch.full_like(concentration, -0.5)


def _empty_gradient(plan: Any, grad: Tensor, components: int, **_: Any) -> Tensor:
    return torch.zeros(plan.num_rows, components, dtype=grad.dtype)


def interleaved(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time one call of each in turn, round by round; seconds of this process's CPU time, sorted."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for warm in [True] * 3 + [False] * rounds:
        for name, fn in timed.items():
            start = time.process_time()
            fn()
            if not warm:
                found[name].append(time.process_time() - start)
    return {name: sorted(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    stubs = {
        "log_gamma": _constant_log_gamma,
        "perturb_": _nothing,
        "coefficient_gradient": _empty_gradient,
    }
    with mock.patch.multiple(monteclora_twin, **stubs):
        timed = parts(build(True), build(False))
        results = interleaved(timed, rounds)
        counts = {name: calls(fn) for name, fn in timed.items()}
    for name, seconds in results.items():
        low, middle = (seconds[int(share * rounds)] * 1e6 for share in (0.1, 0.5))
        print(f"{name:20} {low:7.0f} us, median {middle:7.0f}; {counts[name]}")


if __name__ == "__main__":
    main()
