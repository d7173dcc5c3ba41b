"""IVON on several processes: what is sharded, what is averaged, and what is refused.

Three ways to train on R ranks, all leaving the same state on every rank:

- **shared noise** (the default, under DDP): the noise is a function of (seed, draw, tensor, element), so
  every rank draws the same sample without a message; DDP averages the gradients, and every rank takes the
  same step.
- **independent noise** (``IVON(sync="independent")``): rank r draws its own sample z_r. One all-reduce a step
  and state dtype averages (g_r, f_r), f_r = g_r z_r sqrt(λ (h + δ)): R Monte Carlo samples for the time of
  one, and a curvature estimate whose variance falls as 1/R. Gradients must reach ``step()`` as each rank took
  them, so DDP's own average is switched off by :func:`keep_gradients_local`.
- **shards** (FSDP2's ``fully_shard``): parameters and state are DTensors, each rank updates its rows, and
  noise goes by the element's index in the whole tensor: any number of shards follows the trajectory of one.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslora.kernels.param_bucket import NONFINITE, ParamBucket

_SYNC = {False: False, True: True, "shared": False, "independent": True}


def draws_own_noise(sync: bool | str) -> bool:
    """Return whether each rank draws its own sample.

    Raises:
        ValueError: ``sync`` is none of the modes.
    """
    if sync not in _SYNC:
        raise ValueError(f"sync must be 'shared' (or False) or 'independent' (or True), got {sync!r}")
    return _SYNC[sync]


# ---- shards --------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing DTensor where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Shard(NamedTuple):
    """This rank's rows of a tensor, and the index in the whole tensor of their first element."""

    local: Tensor
    offset: int


def shard_of(tensor: Tensor) -> Shard:
    """Return this rank's part of a tensor; of a plain tensor, all of it.

    Raises:
        ValueError: it is sharded along another dimension than the first, where a shard's elements are not
            contiguous in the whole tensor, or is a pending sum.
    """
    if not is_sharded(tensor):
        return Shard(tensor, 0)
    dtensor: Any = tensor
    for placement in dtensor.placements:
        rows = placement.is_shard(0) and type(placement).__name__ == "Shard"
        if not (rows or placement.is_replicate()):
            raise ValueError(
                "IVON trains DTensors that are replicated or sharded by rows, Shard(0), as fully_shard "
                f"makes them; got {dtensor.placements} for shape {tuple(tensor.shape)}"
            )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = dtensor.device_mesh, dtensor.placements
    _, first = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    row = tensor.numel() // max(tensor.shape[0], 1) if tensor.dim() else 1
    local = dtensor._local_tensor  # to_local() would record a view for autograd
    return Shard(local, first[0] * row if local.numel() and first else 0)


def part_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return the part of ``value`` that belongs to this rank's shard of ``tensor``.

    Args:
        tensor: a parameter.
        value: of its whole shape: a DTensor of any placement, or the whole tensor on every rank.
    """
    if not is_sharded(tensor):
        return value
    dtensor: Any = tensor
    if is_sharded(value):
        other: Any = value
        return other.redistribute(dtensor.device_mesh, dtensor.placements).to_local()
    local, offset = shard_of(tensor)
    return value.reshape(-1)[offset : offset + local.numel()].view(local.shape)


def shard_like(tensor: Tensor, local: Tensor) -> Tensor:
    """Return ``local`` as this rank's part of a DTensor placed as ``tensor``; as it is for a plain tensor."""
    if not is_sharded(tensor):
        return local
    from torch.distributed.tensor import DTensor

    like: Any = tensor
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards: a collective call for a DTensor."""
    if not is_sharded(tensor):
        return tensor
    dtensor: Any = tensor
    return dtensor.full_tensor()


def shard_groups(params: Iterable[Tensor]) -> list[dist.ProcessGroup]:
    """Return the process groups over which the parameters are sharded, each once."""
    groups: dict[int, dist.ProcessGroup] = {}
    for p in params:
        if is_sharded(p):
            dtensor: Any = p
            for dim, placement in enumerate(dtensor.placements):
                if placement.is_shard():
                    group = dtensor.device_mesh.get_group(dim)
                    groups[id(group)] = group
    return list(groups.values())


def fsdp_modules(params: Iterable[Tensor]) -> list[nn.Module]:
    """Return the ``fully_shard`` modules that hold the parameters, sharded or gathered."""
    from torch.distributed import _composable_state
    from torch.distributed.fsdp import FSDPModule

    wanted = {id(p) for p in params}
    found: list[nn.Module] = []
    for module in list(_composable_state._module_state_mapping):
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            held = (param for group in groups if group is not None for param in group.fsdp_params)
            if any(id(param.sharded_param) in wanted for param in held):
                found.append(module)
    return found


def reshard(modules: Iterable[nn.Module]) -> None:
    """Drop the gathered copies of ``fully_shard`` modules, which do not see a change of the shards.

    The root keeps its copy after a forward pass until a backward pass frees it: without this, an evaluation
    would hand its weights on to the next sample's forward.
    """
    for module in modules:
        fsdp: Any = module
        fsdp.reshard()


def agree_on_nonfinite(buckets: Sequence[ParamBucket], groups: Sequence[dist.ProcessGroup]) -> None:
    """Raise the non-finite flag of every bucket on every rank if one bucket on one rank has raised it."""
    home = max((bucket.device for bucket in buckets), key=lambda device: device.type == "cuda")
    flag = torch.stack([b.control[NONFINITE].to(home, non_blocking=True) for b in buckets]).amax()
    for group in groups:
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    for bucket in buckets:
        # To a CPU's memory the copy must be over before the twin reads it there.
        bucket.control[NONFINITE].copy_(flag, non_blocking=bucket.device.type != "cpu")


# ---- independent noise ---------------------------------------------------------------------------


def keep_gradients_local(model: Any) -> None:
    """Make DDP leave every rank its own gradients, as ``IVON(sync="independent")`` needs them.

    The optimizer's one all-reduce a step then takes the place of DDP's. ::

        model = DistributedDataParallel(model)
        bayeslora.keep_gradients_local(model)
        opt = bayeslora.IVON(params, ..., sync="independent")

    Args:
        model: a ``DistributedDataParallel`` module, or one that contains some, before the first backward; or
            an HF Trainer, which wraps its model itself when training starts.

    Raises:
        ValueError: there is none in it. (Of a Trainer that runs as one process nothing is asked.)
    """
    if hasattr(model, "add_callback") and not isinstance(model, nn.Module):
        from .trainer_callback import LocalGradients

        model.add_callback(LocalGradients(model))
        return
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not wrapped:
        raise ValueError(
            f"model ({type(model).__name__}) holds no DistributedDataParallel; outside of it gradients are "
            "local already"
        )
    for module in wrapped:
        module.register_comm_hook(None, noop_hook)


def average_over_ranks(buckets: Sequence[ParamBucket], first: bool) -> None:
    """Average the buckets' running means of gradient and curvature over all ranks, one all-reduce a bucket.

    Args:
        buckets: on every rank the same.
        first: check that the ranks train the same parameters on gradients of their own; waits for the device.

    Raises:
        RuntimeError: ``first``, and the ranks' parameters are not the same, or every rank has the same
            gradients: something has averaged them already.
    """
    world = dist.get_world_size()
    if first and world > 1:
        _check_ranks(buckets, world)
    for bucket in buckets:
        both = bucket.averages_flat()
        dist.all_reduce(both)
        both.div_(world)


def _check_ranks(buckets: Sequence[ParamBucket], world: int) -> None:
    home = buckets[0].device
    layout = repr([(b.dtype, b.streams, b.param_groups, [p.shape for p in b.params]) for b in buckets])
    total = sum(bucket.averages()[0].abs().sum().double().to(home) for bucket in buckets)
    bits = sum(bucket.mean.view(torch.int32).sum().to(home) for bucket in buckets)  # exact in any order
    assert isinstance(total, Tensor) and isinstance(bits, Tensor)
    found = torch.stack([total, bits % (1 << 53), torch.full_like(total, zlib.crc32(layout.encode()))])
    of_rank = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(of_rank, found)
    sums, means, layouts = torch.stack(of_rank).T.tolist()
    for what, values in (("shapes, dtypes or groups of parameters", layouts), ("weights", means)):
        if len(set(values)) > 1:
            raise RuntimeError(
                f'IVON(sync="independent"): the ranks have different {what}; give every rank the same model '
                "(DistributedDataParallel sends rank 0's weights to all)"
            )
    if sums[0] != 0.0 and len(set(sums)) == 1:
        raise RuntimeError(
            'IVON(sync="independent"): every rank has the same gradients, so they were averaged before '
            "step(). Call bayeslora.keep_gradients_local(ddp_model) before training, or use shared noise "
            '(sync="shared")'
        )


# ---- what is refused -----------------------------------------------------------------------------


def check_engine(params: Sequence[Tensor], independent: bool) -> None:
    """Refuse parameters of engines that IVON cannot train correctly.

    Raises:
        ValueError: they are on the meta device, belong to DeepSpeed ZeRO or FSDP1, or are shards of a kind,
            or with ``sync="independent"``.
        TypeError: one is not a floating-point tensor.
    """
    for p in params:
        if not p.is_floating_point():
            raise TypeError(f"params must be floating-point tensors, got one of dtype {p.dtype}")
        if p.is_meta:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is on the meta device and has no values; load the "
                "weights first (PEFT's low_cpu_mem_usage=True leaves an adapter so until they come)"
            )
    deepspeed = any(hasattr(p, "ds_id") for p in params)
    if deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ValueError(
            "DeepSpeed gives its optimizers flat fp32 copies of the weights, so IVON's samples would never "
            "reach the forward pass; use DDP, or FSDP2 (fully_shard, accelerate's fsdp_version: 2)"
        )
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "FSDP1 cuts its flat parameters without saying where; use FSDP2 (fully_shard, accelerate's "
            "fsdp_version: 2)"
        )
    sharded = [p for p in params if is_sharded(p)]
    for p in sharded:
        shard_of(p)
    if sharded and independent:
        raise ValueError(
            'sync="independent" needs each rank\'s own gradients, which fully_shard has averaged; '
            'use sync="shared" with FSDP2'
        )


def check_not_replaced(params: Sequence[Tensor], given: set[int]) -> None:
    """Refuse parameters that DeepSpeed has put in the place of those IVON was given.

    Args:
        params: of the optimizer's groups now.
        given: ``id`` of those at its construction.

    Raises:
        ValueError: DeepSpeed is loaded and they are others.
    """
    if "deepspeed" not in sys.modules:
        return
    if any(id(p) not in given and not is_sharded(p) for p in params):
        raise ValueError(
            "DeepSpeed ZeRO has replaced IVON's parameters by flat copies, whose samples would never reach "
            "the forward pass; use DDP, or FSDP2 (fully_shard)"
        )
