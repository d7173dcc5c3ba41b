"""The Gaussian of each parameter: read from an IVON optimizer, and pruned by its variance; and what is fixed.

θ ~ N(m, diag(σ²)), σ² = 1 / (λ (h + δ)), with mean m, Hessian h, effective sample size λ and prior
precision δ from IVON.

Paper: Cong et al., "Improving LoRA with variational learning" (2025), for pruning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayeslora.ivon_distributed import part_like, shard_of, whole
from bayeslora.posterior_adapters import places
from bayeslora.ties import memory
from bayeslora.transactions import unchanged_on_failure

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior


@dataclass
class GaussianParameter:
    """One tensor of the posterior.

    Args:
        parameter: the model's tensor, of any floating dtype and device; a DTensor where it is sharded.
        mean: m, in the parameter's shape (gathered from all shards), fp32 (fp64 for fp64 parameters).
        hess: h, as ``mean``; infinite where the element is pruned (its variance is then zero).
        stream: index of the tensor's noise stream.
        ess: λ of its parameter group.
        weight_decay: δ of its parameter group.
    """

    parameter: Tensor
    mean: Tensor
    hess: Tensor
    stream: int
    ess: float
    weight_decay: float

    @property
    def variance(self) -> Tensor:
        """The variance σ² = 1 / (λ (h + δ)), as ``mean``; 0 where it is pruned."""
        return 1.0 / (self.ess * (self.hess + self.weight_decay))


@dataclass
class FixedTensor:
    """One tensor of the posterior's adapter that no sample changes, as a head that is trained at its mean.

    Args:
        tensor: the model's parameter or buffer; a DTensor where it is sharded.
        value: the posterior's own copy, in the tensor's shape (gathered from all shards) and its dtype, or in
            fp32 (fp64 for fp64 parameters) where IVON keeps the mean so.
    """

    tensor: Tensor
    value: Tensor


@torch.no_grad()
def learned_gaussians(
    param_groups: Iterable[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
) -> Iterator[tuple[Tensor, GaussianParameter]]:
    """Yield each trained parameter of an IVON optimizer with a copy of its Gaussian.

    Where a parameter no longer equals its stored mean (somebody loaded weights), the parameter is the mean.

    Args:
        param_groups: the optimizer's; those with ``"perturb": False`` are left out.
        state: the optimizer's, of parameters that hold the mean.
    """
    for stream, group, p, held in _trained(param_groups, state):
        if group.get("perturb", True):
            yield (
                p,
                GaussianParameter(
                    parameter=p,
                    mean=_mean(p, held).contiguous(),
                    hess=whole(held["hess"].clone(memory_format=torch.contiguous_format)),
                    stream=stream,
                    ess=float(group["ess"]),
                    weight_decay=float(group["weight_decay"]),
                ),
            )


@torch.no_grad()
def unperturbed_means(
    param_groups: Iterable[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
) -> dict[Any, Tensor]:
    """Return a copy of what an IVON optimizer trains at its mean (``"perturb": False``), by its memory."""
    trained = _trained(param_groups, state)
    return {memory(p): _mean(p, held) for _, group, p, held in trained if not group.get("perturb", True)}


@torch.no_grad()
def fixed_tensors(
    model: nn.Module, sampled: Iterable[Tensor], values: Mapping[Any, Tensor] | None = None
) -> dict[str, FixedTensor]:
    """Return a copy of what the posterior needs beside its samples, by name.

    That is every other tensor of the adapters that the sampled ones are of, whoever trains it.

    Args:
        model: a model, at the mean.
        sampled: the tensors that a sample is written into.
        values: of further tensors, or finer than they are in the model, by their memory.
    """
    values = values or {}
    seen = {memory(tensor) for tensor in sampled}
    own, every = {*seen, *values}, places(model)
    adapters = {place.adapter for place in every if memory(place.tensor) in own}
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    named = [(name, tensor) for name, tensor in named if memory(tensor) in values]
    named += [(place.name, place.tensor) for place in every if place.adapter in adapters]
    found = {}
    for name, tensor in named:
        if memory(tensor) not in seen:
            seen.add(memory(tensor))
            value = values.get(memory(tensor))
            found[name] = FixedTensor(tensor, whole(tensor.detach().clone()) if value is None else value)
    return found


def _trained(
    param_groups: Iterable[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
) -> Iterator[tuple[int, dict[str, Any], Tensor, dict[str, Tensor]]]:
    """Yield stream, group, parameter and state of each parameter that has a state."""
    stream = -1
    for group in param_groups:
        for p in group["params"]:
            stream += 1
            if held := state.get(p):
                yield stream, group, p, held


def _mean(p: Tensor, held: dict[str, Tensor]) -> Tensor:
    # Gathered first: not every version of torch compares DTensors.
    mean, now = whole(held["mean"]), whole(p.detach())
    return torch.where(mean.to(p.dtype) != now, now.to(mean.dtype), mean)


@torch.no_grad()
def first_moved(fixed: Mapping[str, FixedTensor]) -> str | None:
    """Return the name of a tensor that no longer holds the posterior's own value; None if all do."""
    flags = []
    for f in fixed.values():
        now = shard_of(f.tensor).local
        flags.append((now != part_like(f.tensor, f.value).to(now.device, now.dtype)).any())
    moved = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return next((name for name, flag in zip(fixed, moved, strict=True) if flag), None)


@torch.no_grad()
def prune_gaussians(posterior: Posterior, ratio: float, order: torch.Generator | None = None) -> int:
    """Prune ``floor(ratio · numel)`` elements of each tensor of two or more dimensions, or nothing.

    A pruned element has h = ∞, and is zero in the mean and in the parameter.

    Args:
        posterior: its Gaussians and its ``pruned`` are changed in place.
        ratio: fraction to prune, in [0, 1); what is pruned already counts.
        order: None takes the elements of the largest variance, a generator random ones.

    Returns:
        The number of pruned elements over all tensors.

    Raises:
        ValueError: ``ratio`` is out of range.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must be in [0, 1), got {ratio!r}")
    gaussians = list(posterior.parameters.values())
    masks = [_pruned(g.hess, ratio, order) for g in gaussians]
    total = sum(int(mask.sum()) for mask in masks)
    locals_ = [shard_of(g.parameter).local for g in gaussians]
    written = [*locals_, *(g.mean for g in gaussians), *(g.hess for g in gaussians)]
    with unchanged_on_failure(tensors=written, objects=[posterior]):
        posterior._writer.forget()
        for g, mask, local in zip(gaussians, masks, locals_, strict=True):
            g.hess.masked_fill_(mask, math.inf)
            g.mean.masked_fill_(mask, 0.0)
            local.masked_fill_(part_like(g.parameter, mask).to(local.device), 0.0)
        posterior.pruned.append(ratio)
    return total


def _pruned(hess: Tensor, ratio: float, order: torch.Generator | None) -> Tensor:
    """Return the mask of what is pruned of a tensor, or will be."""
    pruned = torch.isinf(hess)
    if hess.dim() >= 2:
        # Within a tensor the variance falls with h; what is pruned already (h = inf) ranks first.
        rank = hess.flatten()
        if order is not None:
            rank = torch.rand(hess.numel(), generator=order, device=order.device).to(hess.device)
        rank = torch.where(pruned.flatten(), -math.inf, rank)
        pruned.view(-1)[torch.argsort(rank, stable=True)[: math.floor(ratio * hess.numel())]] = True
    return pruned
