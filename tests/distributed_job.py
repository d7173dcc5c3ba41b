"""What each rank of the jobs in test_distributed.py runs, and the same on one process. Imports no peft."""

import contextlib
import logging
import os
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard as Placed
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bayeslora import IVON, Posterior, keep_gradients_local

SETTINGS = {"lr": 0.1, "ess": 50.0, "hess_init": 0.25, "rescale_lr": False, "seed": 5, "beta2": 0.99}
WORLD, DDP_STEPS, SHARD_STEPS, CRASH_STEPS, CHECKPOINT = 2, 200, 8, 12, 5
WIDTH = 20_000  # elements whose curvature estimates make a variance: its standard error is 1%


def model(dtype=torch.float32):
    """Odd sizes: over two ranks 5 rows fall 3 + 2, and one rank holds nothing of the single row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(step, part, rows=4):
    generator = torch.Generator().manual_seed(1000 * step + part)
    return torch.randn(rows, 3, generator=generator)


def loss_of(module, x):
    return (module(x) - x.sum(1, keepdim=True)).square().mean()


def state_of(module, opt):
    values = {}
    for name, p in module.named_parameters():
        tensors = {"": p.detach(), **{f".{k}": v for k, v in opt.state[p].items()}}
        values |= {name + k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}
    return {name: value.clone() for name, value in values.items()}


# ---- DDP -----------------------------------------------------------------------------------------


def rows_of(rank, step):
    """Rows of a rank's two micro-batches; the last batch of every tenth step is uneven."""
    return (4, 1 + 2 * rank) if step % 10 == 9 else (4, 4)


def ddp_run(rank, start=0, stop=DDP_STEPS, resume=None, crash=None, folder=None):
    """Accumulation under no_sync, uneven batches and clipping, with shared noise."""
    module = DistributedDataParallel(model())
    opt = IVON(module.parameters(), **SETTINGS)
    if resume is not None:
        saved = torch.load(resume, weights_only=True)
        module.module.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    for step in range(start, stop):
        opt.train()
        for part, rows in enumerate(rows_of(rank, step)):
            with module.no_sync() if part == 0 else contextlib.nullcontext():
                (loss_of(module, batch(step, 2 * part + rank, rows)) / 2).backward()
        if step == crash and rank == 1:
            os._exit(3)
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
        if folder is not None and step + 1 == CHECKPOINT and rank == 0:
            saved = {"model": module.module.state_dict(), "opt": opt.state_dict()}
            torch.save(saved, folder / "checkpoint.pt")
    return state_of(module.module, opt)


def ddp_run_on_one_process():
    """The same steps with the ranks' gradients averaged by hand."""
    module = model()
    opt = IVON(module.parameters(), **SETTINGS)
    for step in range(DDP_STEPS):
        opt.train()
        for rank in range(WORLD):
            for part, rows in enumerate(rows_of(rank, step)):
                (loss_of(module, batch(step, 2 * part + rank, rows)) / 2 / WORLD).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
    return state_of(module, opt)


# ---- independent noise ---------------------------------------------------------------------------


def independent_run(rank, wrapped):
    module = model()
    outer = DistributedDataParallel(module) if wrapped else module
    if wrapped:
        keep_gradients_local(outer)
    opt = IVON(module.parameters(), **SETTINGS, sync="independent")
    for step in range(10):
        with opt.sampled_params(train=True):
            sample = module[0].weight.detach().clone()
            loss_of(outer, batch(step, rank)).backward()
        opt.step()
        opt.zero_grad()
    return {**state_of(module, opt), "sample": sample}


def forgotten_run(rank):
    """Independent noise under a DDP that averages: the message of the error."""
    module = DistributedDataParallel(model())
    opt = IVON(module.parameters(), **SETTINGS, sync="independent")
    with opt.sampled_params(train=True):
        loss_of(module, batch(0, rank)).backward()
    try:
        opt.step()
    except RuntimeError as error:
        return str(error)


def unequal_runs(rank):
    """Independent noise over models that differ from rank to rank: the messages of the errors."""
    messages = {}
    for what in ("shapes", "weights"):
        torch.manual_seed(rank)
        weight = nn.Parameter(torch.randn(3 + (rank if what == "shapes" else 0)))
        opt = IVON([weight], **SETTINGS, sync="independent")
        with opt.sampled_params(train=True):
            weight.square().sum().backward()
        try:
            opt.step()
        except RuntimeError as error:
            messages[what] = str(error)
    return messages


def drifting_run(rank):
    """A gradient that turns infinite on rank 1 after DDP has averaged: what each rank logs."""
    module = DistributedDataParallel(model())
    opt = IVON(module.parameters(), **SETTINGS)
    with opt.sampled_params(train=True):
        loss_of(module, batch(0, rank)).backward()
    if rank == 1:
        module.module[0].weight.grad[0, 0] = torch.inf
    with mock.patch.object(logging.getLogger("bayeslora"), "warning") as warning:
        opt.step()
    return [call.args[0] % call.args[1:] for call in warning.call_args_list]


def hess_change(rank, sync):
    """One step at a constant gradient: the new Hessian minus the old, WIDTH draws of the estimator."""
    weight = nn.Parameter(torch.zeros(WIDTH))
    opt = IVON([weight], **{**SETTINGS, "lr": 0.0}, sync=sync)
    with opt.sampled_params(train=True):
        (weight * (1.0 + 1e-6 * rank)).sum().backward()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        opt.step()
    sent = [call.args[0].numel() for call in all_reduce.call_args_list]
    return {"change": opt.state[weight]["hess"] - SETTINGS["hess_init"], "sent": sent}


# ---- shards --------------------------------------------------------------------------------------


def sharded_model(shard, shape=(WORLD,)):
    """The first layer alone, the rest with the root, which keeps what it gathered after a forward."""
    module = model()
    if shard:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in (module[0], module):
            fully_shard(layer, mesh=mesh)
    return module


def sharded_steps(module, opt, start, stop, rank=None):
    """Every rank takes the whole batch, so the mean of the ranks' gradients has the bits of one's."""
    for step in range(start, stop):
        with torch.no_grad():
            loss_of(module, batch(step, 1))  # an evaluation: its gathered weights must not be trained on
        opt.train()
        loss_of(module, batch(step, 0)).backward()
        if step == 2 and rank in (0, None):  # only on rank 0, in a row that rank 1 does not hold
            grad = module[0].weight.grad
            (grad if rank is None else grad.to_local())[0, 0] = torch.nan
        opt.step()
        opt.zero_grad()


def sharded_run(rank, folder):
    module = sharded_model(True)
    opt = IVON(module.parameters(), **SETTINGS)
    sharded_steps(module, opt, 0, CHECKPOINT, rank)
    weights, state = get_state_dict(module, opt)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=folder / "dcp")
    result = {}
    for step in range(CHECKPOINT, SHARD_STEPS):
        sharded_steps(module, opt, step, step + 1)
    result["state"] = state_of(module, opt)
    result["skipped"] = opt.skipped_steps
    result["kinds"] = sorted({type(v).__name__ for p in module.parameters() for v in opt.state[p].values()})
    result["rows"] = [len(p.to_local()) for p in module.parameters()]
    posterior = Posterior.from_optimizer(module, opt)
    with posterior.sample(seed=9):
        result["sample"] = [p.full_tensor().clone() for p in module.parameters()]
    with torch.no_grad():
        result["predicted"] = posterior.predict(batch(0, 0), 2)
    result["pruned"] = posterior.prune(0.5)
    result["pruned_weight"] = module[0].weight.full_tensor()
    resumed = sharded_model(True)
    resumed_opt = IVON(resumed.parameters(), **SETTINGS)
    load_distributed(resumed, resumed_opt, folder / "dcp")
    sharded_steps(resumed, resumed_opt, CHECKPOINT, SHARD_STEPS)
    result["resumed"] = state_of(resumed, resumed_opt)
    replicated = sharded_model(True, (WORLD, 1))
    replicated_opt = IVON(replicated.parameters(), **SETTINGS)
    sharded_steps(replicated, replicated_opt, 0, SHARD_STEPS, rank=0)  # the replicas' gradients are equal
    result["replicated"] = state_of(replicated, replicated_opt)
    columns = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (WORLD,)), [Placed(1)])
    result["refused"] = [
        _refusal(resumed.parameters(), sync="independent"),
        _refusal([nn.Parameter(columns)]),
    ]
    return result


def _refusal(params, **settings):
    try:
        IVON(params, **SETTINGS, **settings)
    except ValueError as error:
        return str(error)


def load_distributed(module, opt, folder):
    weights, state = get_state_dict(module, opt)
    saved = {"model": weights, "opt": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(module, opt, model_state_dict=saved["model"], optim_state_dict=saved["opt"])


# ---- the jobs ------------------------------------------------------------------------------------


def _join(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)


def first_job(rank, port, folder):
    """Everything, and at its end a run in which rank 1 dies."""
    _join(rank, port)
    results = {
        "ddp": ddp_run(rank),
        "independent": independent_run(rank, wrapped=False),
        "independent_ddp": independent_run(rank, wrapped=True),
        "forgotten": forgotten_run(rank),
        "unequal": unequal_runs(rank),
        "drifting": drifting_run(rank),
        "hess": {sync: hess_change(rank, sync) for sync in ("shared", "independent")},
        "sharded": sharded_run(rank, folder),
        "straight": ddp_run(rank, stop=CRASH_STEPS),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    ddp_run(rank, stop=CRASH_STEPS, crash=CHECKPOINT + 3, folder=folder)


def second_job(rank, port, folder):
    """Go on from the checkpoint that the first job left."""
    _join(rank, port)
    state = ddp_run(rank, CHECKPOINT, CRASH_STEPS, resume=folder / "checkpoint.pt")
    torch.save(state, folder / f"resumed{rank}.pt")
    dist.destroy_process_group()
