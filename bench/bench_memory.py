"""Bytes a trained parameter that each optimizer keeps, measured; the same on every device.

    python bench/bench_memory.py [--output DIR]
    pytest bench/bench_memory.py

Counts the storages of weights, of gradients and of all that the optimizer holds after a step, shared ones
once, for 64 tensors of 2^14 elements. IVON's tables of addresses and tiles (about 100 bytes a tensor) are
part of it.
"""

import argparse
import gc
from pathlib import Path

import measure
import pytest
import torch
from torch import Tensor, nn

from bayeslora import IVON

SHAPE, TENSORS = (128, 128), 64
CASES = [
    ("IVON", torch.bfloat16),
    ("AdamW", torch.bfloat16),
    ("AdamW, fp32 master copy", torch.bfloat16),
    ("IVON", torch.float32),
    ("AdamW", torch.float32),
]


def held_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_case(name: str, dtype: torch.dtype) -> dict[str, object]:
    gc.collect()
    before = {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}
    params = [nn.Parameter(torch.randn(SHAPE).to(dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    trained = params
    if name == "IVON":
        opt: torch.optim.Optimizer = IVON(params, lr=1e-3, ess=1e6)
        opt.train()
    else:
        if "master" in name:  # as mixed-precision trainers do: fp32 weights and gradients beside the model's
            trained = [nn.Parameter(p.detach().float()) for p in params]
            for p, q in zip(trained, params, strict=True):
                p.grad = q.grad.float()
        opt = torch.optim.AdamW(trained, lr=1e-3)
    opt.step()
    if name == "IVON":  # the twin keeps its noise to save time on a CPU; the kernels keep none
        for bucket in opt._store.current():
            bucket.twin_noise = None
            bucket.__dict__.pop("noise_counters", None)
            bucket.tiles  # noqa: B018 - the kernels' tables, which the twin does without
    gc.collect()
    every = [t for t in gc.get_objects() if isinstance(t, Tensor) and id(t) not in before]
    numel = sum(p.numel() for p in params)
    weights, grads = held_bytes(params), held_bytes([p.grad for p in params])
    total = held_bytes([*every, *params, *[p.grad for p in trained], *[p.grad for p in params]])
    per = {"weights": weights, "gradients": grads, "optimizer": total - weights - grads, "total": total}
    return {
        "optimizer_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        **{k: v / numel for k, v in per.items()},
    }


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_memory(benchmark, name, dtype):
    row = benchmark.pedantic(lambda: measure_case(name, dtype), rounds=1)
    benchmark.extra_info.update(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    arguments = parser.parse_args()
    rows = [measure_case(*case) for case in CASES]
    for row in rows:
        print(row)
    file = arguments.output / "memory.json"
    environment = {"torch": torch.__version__.partition("+")[0]}
    measure.write_json(file, {"environment": environment, "rows": rows})
    print("written:", file)


if __name__ == "__main__":
    main()
