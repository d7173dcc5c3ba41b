"""Training steps on several GPUs: IVON against AdamW under DDP and FSDP2, and both against one GPU.

    torchrun --nproc-per-node 2 bench/bench_distributed.py --out FOLDER          about 150 s on two H200
    torchrun --nproc-per-node 2 bench/bench_distributed.py --out FOLDER --toy    CPUs: checks the script

Every GPU takes the same number of tokens in each row, so the scaling efficiency is the time of the row
without communication over that of the row with it (weak scaling). "alone" rows run on all GPUs at once, each
by itself. Rows are timed in turn, round by round; a step's time is that of the slowest rank; ratios are
medians of the rounds' ratios, with quartiles.

Before anything is timed: under DDP every rank must hold the same bits after CHECK_STEPS steps, with shared
and with independent noise, and FSDP2 must follow DDP's trajectory, its distance from DDP's mean no more than
TOLERANCE of the way the mean has moved (the same sums in other orders, in bf16).
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from bench_model_step import ALL_LINEAR
from measure import environment, spread
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON, keep_gradients_local, patch
from bayeslora.ivon_distributed import whole
from bayeslora.step_benchmark import SHAPES

ADAPTERS = {"q,v r8": (8, ["q_proj", "v_proj"]), "all-linear r16": (16, ALL_LINEAR)}
CHECK_STEPS, TOLERANCE = 3, 0.1
IVON_SETTINGS = {"lr": 1e-3, "ess": 1e7, "hess_init": 5e-3, "clip_radius": 1e-2, "rescale_lr": False}


@dataclass
class Job:
    """What this rank runs on."""

    device: torch.device
    shape: dict[str, int]
    tokens: tuple[int, int]
    rounds: int
    inner: int


def build(job: Job, adapters: str) -> nn.Module:
    """A patched model with random weights, the same on every rank: bf16 base, fp32 adapters."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with job.device:
            config = LlamaConfig(**job.shape, attn_implementation="sdpa")
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    r, targets = ADAPTERS[adapters]
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # PEFT's zeros would hide half of the gradients
            nn.init.normal_(p, std=0.02)
    return patch(model.train())


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def sharded(model: nn.Module, device: torch.device) -> nn.Module:
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_step(model: nn.Module, opt: torch.optim.Optimizer, tokens: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        if isinstance(opt, IVON):
            opt.train()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def adamw(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-5, fused=device.type == "cuda")


def build_rows(job: Job, adapters: str) -> tuple[dict[str, Callable[[], Tensor]], dict[str, nn.Module]]:
    """Return each row's step, and the models that the checks look at."""
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    tokens = torch.randint(job.shape["vocab_size"], job.tokens, generator=generator).to(job.device)
    ids = [job.device.index] if job.device.type == "cuda" else None
    rows: dict[str, Callable[[], Tensor]] = {}
    models: dict[str, nn.Module] = {}
    plain = build(job, adapters)
    models["DDP"] = DistributedDataParallel(plain, device_ids=ids)
    models["DDP independent"] = DistributedDataParallel(build(job, adapters), device_ids=ids)
    keep_gradients_local(models["DDP independent"])
    models["FSDP2"] = sharded(build(job, adapters), job.device)
    alone = build(job, adapters)
    rows["alone AdamW"] = make_step(alone, adamw(alone, job.device), tokens)
    rows["alone IVON"] = make_step(alone, IVON(trained(alone), **IVON_SETTINGS), tokens)
    for name in ("DDP", "FSDP2"):
        model = models[name]
        rows[f"{name} AdamW"] = make_step(model, adamw(model, job.device), tokens)
        rows[f"{name} IVON"] = make_step(model, IVON(trained(model), **IVON_SETTINGS), tokens)
    model = models["DDP independent"]
    independent = IVON(trained(model), **IVON_SETTINGS, sync="independent")
    rows["DDP IVON independent"] = make_step(model, independent, tokens)
    return rows, models


def flat(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([whole(p.detach()).double().reshape(-1) for p in trained(model)])


def check(rows: dict[str, Callable[[], Tensor]], models: dict[str, nn.Module]) -> dict[str, float]:
    """Run CHECK_STEPS steps of the IVON rows and compare; raise where a promise is broken."""
    before = flat(models["DDP"])
    for name in ("DDP IVON", "DDP IVON independent", "FSDP2 IVON"):
        for _ in range(CHECK_STEPS):
            loss = rows[name]()
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: the loss is {loss}")
    after = {name: flat(model) for name, model in models.items()}
    for name in ("DDP", "DDP independent"):
        low, high = after[name].clone(), after[name].clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise SystemExit(f"{name}: the ranks differ by up to {(high - low).max().item():.3g}")
    moved = (after["DDP"] - before).norm()
    distance = ((after["FSDP2"] - after["DDP"]).norm() / moved).item()
    if not 0.0 <= distance <= TOLERANCE:
        raise SystemExit(f"FSDP2 is {distance:.3g} of the way moved from DDP, more than {TOLERANCE}")
    return {"fsdp2_distance": distance, "moved": moved.item()}


def timed(step: Callable[[], Tensor], job: Job) -> float:
    """Seconds a step on the slowest rank."""
    _synchronize(job.device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(job.inner):
        step()
    _synchronize(job.device)
    seconds = torch.tensor((time.perf_counter() - start) / job.inner, device=job.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(job: Job, adapters: str) -> dict[str, object]:
    rows, models = build_rows(job, adapters)
    checked = check(rows, models)
    for step in rows.values():
        for _ in range(2):
            step()
    samples: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(job.rounds):
        for name, step in rows.items():
            samples[name].append(timed(step, job))
    pairs = {
        "DDP IVON / DDP AdamW": ("DDP IVON", "DDP AdamW"),
        "DDP IVON independent / DDP AdamW": ("DDP IVON independent", "DDP AdamW"),
        "FSDP2 IVON / FSDP2 AdamW": ("FSDP2 IVON", "FSDP2 AdamW"),
        "alone IVON / alone AdamW": ("alone IVON", "alone AdamW"),
    }
    ratios = {
        name: spread([x / y for x, y in zip(samples[a], samples[b], strict=True)])
        for name, (a, b) in pairs.items()
    }
    efficiency = {
        name: statistics.median(samples[f"alone {name.split()[1]}"]) / statistics.median(samples[name])
        for name in rows
        if not name.startswith("alone")
    }
    return {
        "adapters": adapters,
        "tokens_per_gpu": list(job.tokens),
        "parameters": sum(p.numel() for p in trained(models["DDP"])),
        "checked": checked,
        "seconds": {name: spread(values) for name, values in samples.items()},
        "ratios": ratios,
        "scaling_efficiency": efficiency,
    }


def report(result: dict[str, object]) -> None:
    print(f"\n{result['adapters']}, {result['parameters']:,} trained, {result['tokens_per_gpu']} a GPU")
    print(f"  checked: {result['checked']}")
    for name, seconds in result["seconds"].items():
        scale = result["scaling_efficiency"].get(name)
        tail = "" if scale is None else f"   efficiency {scale:.3f}"
        print(f"  {name:24} {1e3 * seconds['median']:8.2f} ms{tail}")
    for name, ratio in result["ratios"].items():
        print(f"  {name:34} {ratio['median']:.4f}  [{ratio['q1']:.4f}, {ratio['q3']:.4f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--toy", action="store_true", help="a tiny model on CPUs")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.toy
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    job = (
        Job(device, SHAPES["Llama-3.2-3B"], (8, 512), 12, 2)
        if cuda
        else Job(device, SHAPES["toy"], (2, 16), 3, 2)
    )
    start = time.perf_counter()
    results = []
    for adapters in ADAPTERS:
        results.append(measure(job, adapters))
        if dist.get_rank() == 0:
            report(results[-1])
        gc.collect()  # the models, which DDP and FSDP2 hold in cycles
        if cuda:
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        seconds = time.perf_counter() - start
        kind = "".join(c if c.isalnum() else "_" for c in environment()["device"]).strip("_").lower()
        file = arguments.out / f"distributed_{dist.get_world_size()}x_{kind}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "ranks": dist.get_world_size(), "rows": results}
        file.write_text(json.dumps({**content, "run_seconds": seconds}, indent=1) + "\n")
        print(f"\n{file}, {seconds:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
