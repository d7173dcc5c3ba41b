"""The state behind IVON: parameter buckets kept in step with the optimizer's groups and its ``state``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslora.ivon_distributed import (
    fsdp_modules,
    is_sharded,
    part_like,
    reshard,
    shard_groups,
    shard_like,
    shard_of,
)
from bayeslora.kernels.param_bucket import (
    DRAWS,
    HYPER_WIDTH,
    LR,
    SKIPPED,
    STEP,
    DenseGrads,
    ParamBucket,
    state_dtype,
)
from bayeslora.ties import Tie, find_ties

STATE_KEYS = ("mean", "momentum", "hess")


class BucketStore:
    """The buckets of an optimizer's trainable parameters, one a device and state dtype.

    Args:
        optimizer: the IVON that holds ``param_groups`` and ``state``, and is not kept alive from here. Its
            state tensors become views of the buckets' flat buffers (of a DTensor, DTensors around them);
            the counters are read from and written to its parameter groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer: Any = weakref.proxy(optimizer)
        self._sharded = False
        self._fsdp_modules: list[weakref.ref[nn.Module]] = []
        self.shard_groups: list[dist.ProcessGroup] = []
        """Over which the parameters are sharded."""
        self._buckets: list[ParamBucket] | None = None
        self._params: list[Tensor] = []
        self._members: list[list[Tensor]] = []  # of each group
        self._addresses: list[int] = []
        self._traits: tuple[list[Any], ...] = ()

    def current(self) -> list[ParamBucket]:
        """Return the buckets, made anew if a parameter was moved, cast, frozen, thawed or added."""
        groups = self._optimizer.param_groups
        if (
            self._buckets is None
            or len(groups) != len(self._members)
            or not all(_same(g["params"], members) for g, members in zip(groups, self._members, strict=True))
            or self._where(self._params) != self._addresses
            or _traits(self._params) != self._traits
        ):
            self._buckets = self._make()
            self._members = [list(group["params"]) for group in groups]
            self._params = list(chain.from_iterable(self._members))
            self._addresses, self._traits = self._where(self._params), _traits(self._params)
        return self._buckets

    def within_step(self) -> list[ParamBucket]:
        """Return the buckets, after the short check that every parameter is still where it was.

        For the second half of a step: :meth:`current` has looked at everything when the sample was drawn.
        """
        if self._buckets is None or self._where(self._params) != self._addresses:
            return self.current()
        return self._buckets

    def reshard(self) -> None:
        """Make FSDP2 gather the parameters anew at their next use: they were or will be written to."""
        if self._fsdp_modules:
            reshard(module for ref in self._fsdp_modules if (module := ref()) is not None)

    def _where(self, params: list[Tensor]) -> list[int]:
        """Return the parameters' addresses, of DTensors that of the local shard."""
        if self._sharded:
            params = [getattr(p, "_local_tensor", p) for p in params]
        return list(map(_address, params))

    @torch.inference_mode(False)  # what an evaluation there makes first, training must be able to update
    def _make(self) -> list[ParamBucket]:
        groups = self._optimizer.param_groups
        every = [(p, index) for index, group in enumerate(groups) for p in group["params"]]
        self._optimizer._check_params([p for p, _ in every])
        ties = ties_of(groups)
        self.write_counters()
        # Parameters over one memory are one member, under the stream of the first; a trained one trains all.
        firsts = [ties[i].first if i in ties else i for i in range(len(every))]
        trained = {first for first, (p, _) in zip(firsts, every, strict=True) if p.requires_grad}
        members: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int, int]]] = {}
        for stream in sorted(trained):
            p, index = every[stream]
            members.setdefault((p.device, state_dtype(p.dtype)), []).append((p, stream, index))
        buckets = []
        for entries in members.values():
            params, streams, indices = zip(*entries, strict=True)
            shards = [shard_of(p) for p in params]
            bucket = ParamBucket(
                [shard.local for shard in shards],
                streams,
                indices,
                [shard.offset for shard in shards],
                num_groups=len(groups),
            )
            if any(map(is_sharded, params)):
                bucket.owners = list(params)
            bucket.tied = [
                (streams.index(tie.first), every[i][0], tie)
                for i, tie in ties.items()
                if tie.first in streams and every[i][0] is not every[tie.first][0]
            ]
            for slot, name in ((STEP, "step"), (SKIPPED, "skipped"), (DRAWS, "draws")):
                bucket.control[slot] = groups[0].get(name, 0)
            powers = [group.get("beta1_power", 1.0) for group in groups]
            bucket.beta1_power.copy_(torch.tensor(powers, dtype=torch.float64, device="cpu"))
            bucket.hess.fill_(1.0)
            for i, p in enumerate(params):
                self._place(bucket, i, p)
            for i, p, tie in bucket.tied:
                held = self._optimizer.state[params[i]]
                self._optimizer.state[p] = {name: tie.as_tied(held[name]) for name in STATE_KEYS}
            buckets.append(bucket)
        self._sharded = any(bucket.owners is not bucket.params for bucket in buckets)
        owners = [p for bucket in buckets for p in bucket.owners]
        self._fsdp_modules = [weakref.ref(m) for m in fsdp_modules(owners)] if self._sharded else []
        self.shard_groups = shard_groups(p for bucket in buckets for p in bucket.owners)
        return buckets

    @torch.no_grad()
    def _place(self, bucket: ParamBucket, index: int, p: Tensor) -> None:
        """Move a parameter's state into the bucket's flat buffers; start it if it has none."""
        old = self._optimizer.state[p]
        group = self._optimizer.param_groups[bucket.param_groups[index]]
        start: dict[str, Any] = {
            "mean": bucket.params[index].detach(),
            "momentum": 0.0,
            "hess": float(group["hess_init"]),
        }
        prior = getattr(self._optimizer, "_prior", None)
        if prior is not None:
            start["hess"] = part_like(p, prior.hess_start(p, group))
        new = {}
        for name in STATE_KEYS:
            view = bucket.view(getattr(bucket, name), index)
            value = part_like(p, old[name]) if name in old else start[name]
            if isinstance(value, Tensor):
                view.copy_(value)
            else:
                view.fill_(value)
            new[name] = shard_like(p, view)
        self._optimizer.state[p] = new

    def counters(self) -> tuple[int, int, int]:
        """Return (steps taken, steps skipped, samples drawn in finished steps); waits for the device."""
        if self._buckets:
            control = self._buckets[0].control.tolist()
            return control[STEP], control[SKIPPED], control[DRAWS]
        group = self._optimizer.param_groups[0]
        return group.get("step", 0), group.get("skipped", 0), group.get("draws", 0)

    def show_counters(self, look: Callable[[Tensor], None]) -> None:
        """Let ``look`` see the counters where they are, on the device."""
        if self._buckets:
            look(self._buckets[0].control)

    def write_counters(self) -> None:
        """Copy the device's counters into the parameter groups, where ``state_dict`` finds them."""
        steps, skipped, draws = self.counters()
        groups = self._optimizer.param_groups
        powers = self._buckets[0].beta1_power.tolist() if self._buckets else []
        for index, group in enumerate(groups):
            group.update(step=steps, skipped=skipped, draws=draws)
            group["beta1_power"] = powers[index] if index < len(powers) else group.get("beta1_power", 1.0)

    def set_hyper(self, bucket: ParamBucket, variance_scale: float, rescale_lr: bool) -> None:
        """Bring the hyperparameters of all groups to the bucket's device, without a host sync."""
        groups = self._optimizer.param_groups
        if len(groups) > bucket.num_groups:  # one was added since the sample was drawn; it joins the next
            groups = groups[: bucket.num_groups]
        key: Any = (variance_scale, rescale_lr, *[(_hyper(g), g.get("perturb", True)) for g in groups])
        if any(isinstance(g["lr"], Tensor) for g in groups):
            key = None  # its value may change behind our back
        elif key == bucket.hyper_key:
            return
        table = []
        on_host = bucket.device.type == "cpu"  # where the twin reads the table
        for group in groups:
            lr = 0.0 if isinstance(group["lr"], Tensor) and not on_host else float(group["lr"])
            perturbed = group.get("perturb", True)
            beta2 = group["beta2"] if perturbed else 1.0
            row = [lr * _lr_factor(group, rescale_lr), group["beta1"], beta2, group["weight_decay"]]
            row += [group["ess"], group["clip_radius"], variance_scale if perturbed else 0.0]
            table.append([float(value) for value in row] + [0.0] * (HYPER_WIDTH - len(row)))
        bucket.set_hyper(table)
        for index, group in enumerate(groups):
            if isinstance(group["lr"], Tensor) and not on_host:
                scaled = group["lr"].detach() * _lr_factor(group, rescale_lr)
                bucket.hyper[index, LR].copy_(scaled, non_blocking=True)
        bucket.hyper_key = key


def _lr_factor(group: dict[str, Any], rescale_lr: bool) -> float:
    if group.get("step_lr"):  # the largest step as a fraction of lr (True was 1): IVON.like_adamw
        return group["step_lr"] / group["clip_radius"]
    return group["hess_init"] + group["weight_decay"] if rescale_lr else 1.0


# These run over every parameter at every step, so they are loops in C.
_address = Tensor.data_ptr
_dtype, _shape, _trains, _grad = map(attrgetter, ("dtype", "shape", "requires_grad", "grad"))
_hyper = itemgetter("lr", "beta1", "beta2", "weight_decay", "hess_init", "ess", "clip_radius")


def _same(now: list[Tensor], before: list[Tensor]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _traits(params: list[Tensor]) -> tuple[list[Any], ...]:
    return list(map(_dtype, params)), list(map(_shape, params)), list(map(_trains, params))


def dense_grads(bucket: ParamBucket) -> DenseGrads:
    """Return ``p.grad`` of each of the bucket's parameters.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    if bucket.owners is bucket.params and not bucket.tied:
        return DenseGrads(map(_grad, bucket.params))
    parts = [None if p.grad is None else part_like(p, p.grad) for p in bucket.owners]
    for i, p, tie in bucket.tied:
        if p.grad is not None:
            part, more = parts[i], tie.as_first(part_like(p, p.grad))
            parts[i] = more if part is None else part + more
    return DenseGrads(parts)


def ties_of(groups: Sequence[dict[str, Any]]) -> dict[int, Tie]:
    """Return how parameters of the groups share memory, by their index over all groups.

    Raises:
        ValueError: some share a part of their memory only, or are in different groups.
    """
    every = [(p, index) for index, group in enumerate(groups) for p in group["params"]]
    ties = find_ties([shard_of(p).local for p, _ in every])
    for i, tie in ties.items():
        (p, index), (_, first) = every[i], every[tie.first]
        if index != first:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} in group {index} has the memory of one in group "
                f"{first}; put them into one group, whose settings hold for both"
            )
    return ties
