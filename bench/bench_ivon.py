"""IVON's sample + step against AdamW's step and ivon-opt's sample + step.

``pytest bench/bench_ivon.py`` for pytest-benchmark's table; ``python bench/bench_ivon.py [--output DIR]`` for
the paired figures that README quotes. Without a GPU it runs small sizes on the plain-torch twin.
"""

import argparse
import copy
from pathlib import Path

import measure
import pytest
import torch
from torch import Tensor, nn

from bayeslora import IVON
from bayeslora.kernels import ivon_twin
from bayeslora.kernels.param_bucket import ParamBucket

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def lora_shapes(layers: int, hidden: int, outputs: list[int], r: int) -> list[tuple[int, int]]:
    return [shape for _ in range(layers) for n in outputs for shape in ((r, hidden), (n, r))]


# name -> shapes of the trained tensors; the first two are Llama-3.2-3B's adapters.
CASES: dict[str, list[tuple[int, ...]]] = {
    "q,v r8 (3B)": lora_shapes(28, 3072, [3072, 1024], 8),
    "all-linear r16 (3B)": [
        shape
        for _ in range(28)
        for n, k in (
            (3072, 3072),
            (1024, 3072),
            (1024, 3072),
            (3072, 3072),
            (8192, 3072),
            (8192, 3072),
            (3072, 8192),
        )
        for shape in ((16, k), (n, 16))
    ],
    "10,000 tensors of 1,024": [(1024,)] * 10_000,
    "1,000 tensors of 10^6": [(1000, 1000)] * 1000,
}
# The same number of elements a tensor and more and more tensors: what grows is the host's part.
SWEEP = {f"{n} tensors of 24,576": [(8, 3072)] * n for n in (10, 30, 100, 300, 1000, 3000)}
if not CUDA:
    SWEEP = {f"{n} tensors of 24": [(8, 3)] * n for n in (3, 10, 30)}
    CASES = {"q,v r4 (tiny)": lora_shapes(4, 64, [64, 32], 4), "100 tensors of 1,000": [(1000,)] * 100}


def make_params(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(s, device=DEVICE).mul_(0.01).to(DTYPE)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-3)
    return params


def clone(params: list[nn.Parameter]) -> list[nn.Parameter]:
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad
    return twins


def ivon_call(params: list[nn.Parameter]):
    opt = IVON(params, lr=1e-3, ess=1e6, hess_init=5e-3, clip_radius=1e-2, rescale_lr=False)

    def sample_and_step() -> None:
        opt.train()
        opt.step()

    return sample_and_step, opt


def adamw_call(params: list[nn.Parameter], **settings: bool):
    return torch.optim.AdamW(params, lr=1e-3, **settings).step


def ivon_opt_call(params: list[nn.Parameter]):
    import ivon as ivon_opt

    opt = ivon_opt.IVON(params, lr=1e-3, ess=1e6, hess_init=5e-3, clip_radius=1e-2, rescale_lr=False)

    def sample_and_step() -> None:
        with opt.sampled_params(train=True):
            pass
        opt.step()

    return sample_and_step


def check_against_twin(params: list[nn.Parameter]) -> None:
    """Take one step on the device and one with the twin, and compare; raise if they differ."""
    params = [nn.Parameter(p.detach().clone()) for p in params[:32]]
    grads = [torch.randn_like(p).mul_(1e-3) for p in params]
    start = [p.detach().clone() for p in params]
    call, opt = ivon_call(params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    call()
    bucket = ParamBucket([p.cpu() for p in start], list(range(len(start))), [0] * len(start))
    bucket.hess.fill_(5e-3)
    for i, p in enumerate(start):
        bucket.view(bucket.mean, i).copy_(p)
    bucket.set_hyper([[1e-3, 0.9, 0.99999, 1e-4, 1e6, 1e-2, 1.0, 0.0]])
    arguments = {"seed": 0, "draw": 1, "draws": 1, "price": True, "debias": True, "check": True}
    ivon_twin.ivon_step(bucket, [g.cpu() for g in grads], [True] * len(grads), **arguments)
    for i, p in enumerate(params):
        for key in ("mean", "hess"):
            expected = bucket.view(getattr(bucket, key), i)
            torch.testing.assert_close(opt.state[p][key].cpu(), expected, rtol=1e-4, atol=1e-6)


def bytes_per_step(params: list[Tensor]) -> int:
    """Return the bytes IVON must move: the sample's m, h, w -> w and the step's g, M, h, m -> M, h, m, w."""
    return sum(p.numel() * ((8 + 2 * p.element_size()) + (24 + 2 * p.element_size())) for p in params)


def compare(name: str, rounds: int) -> dict[str, object]:
    params = make_params({**CASES, **SWEEP}[name])
    check_against_twin(params)
    numel = sum(p.numel() for p in params)
    big = numel > 10**8
    contestants = {
        "bayeslora IVON": ivon_call(clone(params))[0],
        "AdamW fused": adamw_call(clone(params), fused=True),
    }
    if not big:
        contestants["AdamW foreach"] = adamw_call(clone(params), foreach=True)
    if numel < 10**8 and len(params) < 1000:
        contestants["ivon-opt"] = ivon_opt_call(clone(params))
    times = measure.interleaved(contestants, rounds=rounds, inner=2 if big else 4)
    row: dict[str, object] = {
        "case": name,
        "tensors": len(params),
        "parameters": numel,
        "dtype": str(DTYPE).removeprefix("torch."),
        "seconds": times,
        "sweep": name in SWEEP,
    }
    if CUDA:
        gpu = times["bayeslora IVON"]["gpu"]["median"]
        row["copy_bandwidth"] = measure.copy_bandwidth()
        row["fraction_of_copy"] = bytes_per_step(params) / gpu / row["copy_bandwidth"]
    return row


def show(rows: list[dict[str, object]]) -> None:
    print(f"{measure.device_name()}; milliseconds a step, median [quartiles of wall]")
    for row in rows:
        print(
            f"{row['case']}: {row['tensors']} tensors, {row['parameters'] / 1e6:.1f} M, {row['dtype']}",
            end="",
        )
        print(f", {row['fraction_of_copy']:.2f} of copy" if "fraction_of_copy" in row else "")
        for name, kinds in row["seconds"].items():
            text = "  ".join(f"{k} {v['median'] * 1e3:8.3f}" for k, v in kinds.items())
            wall = kinds["wall"]
            print(f"  {name:16} {text}  [{wall['q1'] * 1e3:.3f}, {wall['q3'] * 1e3:.3f}]")


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("who", ["bayeslora IVON", "AdamW fused"])
def test_sample_and_step(benchmark, name, who):
    params = make_params(CASES[name])
    check_against_twin(params)
    call = ivon_call(params)[0] if who == "bayeslora IVON" else adamw_call(params, fused=True)

    def timed() -> None:
        call()
        measure.synchronize()

    benchmark.extra_info.update(measure.environment())
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="also the cases that plot_ivon.py draws")
    arguments = parser.parse_args()
    if not CUDA:
        print("no GPU: small sizes on the plain-torch twin")
    rows = []
    for name in [*CASES, *(SWEEP if arguments.sweep else [])]:
        rows.append(compare(name, arguments.rounds))
        show(rows[-1:])
        if CUDA:
            torch.cuda.empty_cache()
    print("written:", measure.write_results("ivon", copy.deepcopy(rows), arguments.output))


if __name__ == "__main__":
    main()
