"""Compile every kernel for a GPU that is not there; run by test_kernels_compile.py, interpreter off.

    python tests/compile_kernels.py CAPABILITY KERNELS      such as 90 optimizer; prints a line a kernel

The package's own launching code runs on CPU tensors with a driver that only records, so what is compiled is
what a GPU would run: the interpreter accepts code that the compiler refuses, and no shared memory is too
small for it.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from test_launch import Recorder
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as runtime_driver

from bayeslora.kernels import (
    ivon,
    lora_casts,
    lora_linear,
    lora_overlap,
    lora_perturbed,
    lora_skinny,
    monteclora,
)
from bayeslora.kernels.monteclora_plan import PerturbPlan, Site
from bayeslora.kernels.param_bucket import ParamBucket

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 120: 101376}  # bytes a block may have
BF16, FP64 = torch.bfloat16, torch.float64


def optimizer() -> None:
    """IVON's: regular tensors in bf16, irregular ones in fp32 and fp64."""
    for shape, dtype, price in (((16, 96), BF16, True), ((33,), torch.float32, False), ((5, 7), FP64, True)):
        params = [torch.zeros(shape, dtype=dtype)]
        bucket = ParamBucket(params, [0], [0])
        bucket.set_hyper([[1e-3, 0.9, 0.999, 1e-4, 1e6, 1e-2, 1.0, 0.0]])
        grads = [torch.zeros_like(p) for p in params]
        ivon.ivon_sample(bucket, seed=0, draw=1, train=price)
        ivon.ivon_fold(bucket, grads, seed=0, draw=1, count=1, price=price)
        ivon.ivon_check(bucket, grads)
        for given in (grads, None):
            ivon.ivon_step(
                bucket, given, None, seed=0, draw=1, draws=1, price=price, debias=True, check=price,
                grad_scale=None if price else torch.ones(1), found_inf=None if price else torch.zeros(1),
            )  # fmt: skip
        ivon.ivon_restore(bucket)


def samplers() -> None:
    """MonteCLoRA's, and dropout's."""
    index = torch.arange(8)
    monteclora.log_gamma(torch.ones(8), index, index, seed=0, draw=1)
    plan = PerturbPlan([Site(8, 64, 0, False), Site(4, 33, 1, True)], torch.device("cpu"))
    for dtype, components in ((BF16, 1), (FP64, 4)):
        flat = torch.zeros(plan.size, dtype=dtype)
        monteclora.perturb_(plan, flat, torch.zeros(plan.num_rows, components), seed=0, draw=1)
        monteclora.coefficient_gradient(plan, flat, components, seed=0, draw=1)
    x = torch.zeros(64, 32, dtype=BF16)
    lora_linear.dropout(x, 0.1, torch.tensor(3))
    lora_linear.dropout_add_(x, x, 0.1, torch.tensor(3))


def casts() -> None:
    """Adapters' casts: one pair, and the most."""
    for pairs in (1, lora_casts.MOST):
        sources = [torch.zeros(16, 96) for _ in range(pairs)]
        lora_casts.copy_cast([torch.empty_like(source, dtype=BF16) for source in sources], sources)


def perturbed() -> None:
    """Layers under posterior samples, at a common rank and at what takes the most shared memory."""
    for rank, dtype, wide_first in ((16, BF16, True), (256, torch.float32, False)):
        noise = lora_perturbed.Noise(torch.tensor([1, 2]), torch.tensor([0, 0]), 5)
        wide, thin = torch.zeros(512, 256, dtype=dtype), torch.zeros(512, rank, dtype=dtype)
        mean = torch.zeros((256, rank) if wide_first else (rank, 256))
        lora_perturbed.perturbed_down(wide, mean, mean, noise, 1.0, wide_first=wide_first)
        lora_perturbed.perturbed_up_(wide, thin, mean, mean, noise, wide_first=wide_first)
        lora_perturbed.perturbed_grads(wide, thin, noise, wide_first=wide_first)
        lora_perturbed.sample_factors(mean, mean, noise.seeds, noise.draws, 5, dtype)


def layers() -> None:
    """The GEMM with the LoRA product in it, and the kernels beside it: Hopper's."""
    for rank, bias in ((16, True), (64, False)):
        x, w, a, b = (_half(512, 512), _half(512, 512), _half(rank, 512), _half(512, rank))
        y, b0 = torch.empty_like(x), torch.zeros(512, dtype=BF16) if bias else None
        hidden = lora_overlap.forward_overlapped(x, [(w, b0, b)], a, 2.0, [y])
        assert hidden is not None
        dx = torch.empty_like(x)
        for n in (1, 3) if 3 * rank <= lora_overlap.MAX_RANK else (1,):
            stacked, columns, rows = torch.cat([a] * n), torch.cat([hidden] * n, dim=1), [y] * n
            found = lora_overlap.backward_overlapped(
                rows, x, [w] * n, columns, stacked, [b] * n, 2.0, torch.float32, dx
            )
            assert found is not None
        tiles = lora_skinny.TallTiles(64, 128, 4, 2, 132)
        lora_skinny.dy_triton(y, hidden, b, 2.0, torch.float32, tiles)
        lora_skinny.da_triton(hidden, x, torch.float32, tiles)


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


def compiled(capability: int, launch_all: Callable[[], None]) -> Iterator[str]:
    """Run launches for a GPU of that compute capability; yield the kernels compiled, a line a variant."""
    recorder = Recorder()
    names: list[str] = []
    launcher: Any = recorder.launcher_cls

    def named(src: Any, metadata: Any) -> Any:
        names.append(src.fn.__name__)
        return launcher(src, metadata)

    recorder.launcher_cls = named
    recorder.get_current_target = lambda: GPUTarget("cuda", capability, 32)
    recorder.utils.get_device_properties = lambda _: {"max_shared_mem": SHARED_MEMORY[capability]}
    runtime_driver.set_active(recorder)
    torch.cuda.current_device = lambda: 0
    stages = lora_perturbed._num_stages(torch.device("cuda", 0))
    lora_perturbed._num_stages = lambda _: stages
    launch_all()
    yield from names


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}\n" for name in compiled(int(sys.argv[1]), globals()[sys.argv[2]]))
