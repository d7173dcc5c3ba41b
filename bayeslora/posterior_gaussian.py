"""The Gaussian of each parameter: read from an IVON optimizer, and pruned by its variance.

θ ~ N(m, diag(σ²)), σ² = 1 / (λ (h + δ)), with mean m, Hessian h, effective sample size λ and prior
precision δ from IVON.

Paper: Cong et al., "Improving LoRA with variational learning" (2025), for pruning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslora.ivon_distributed import part_like, shard_of, whole
from bayeslora.ties import find_ties


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
    stream = -1
    for group in param_groups:
        for p in group["params"]:
            stream += 1
            held = state.get(p)
            if not held or not group.get("perturb", True):
                continue
            # Gathered first: not every version of torch compares DTensors.
            mean, now = whole(held["mean"]), whole(p.detach())
            changed = mean.to(p.dtype) != now
            yield (
                p,
                GaussianParameter(
                    parameter=p,
                    mean=torch.where(changed, now.to(mean.dtype), mean).contiguous(),
                    hess=whole(held["hess"].clone(memory_format=torch.contiguous_format)),
                    stream=stream,
                    ess=float(group["ess"]),
                    weight_decay=float(group["weight_decay"]),
                ),
            )


@torch.no_grad()
def prune_gaussians(
    gaussians: Iterable[GaussianParameter], ratio: float, order: torch.Generator | None = None
) -> int:
    """Prune ``floor(ratio · numel)`` elements of each tensor of two or more dimensions.

    A pruned element has h = ∞, and is zero in the mean and in the parameter.

    Args:
        gaussians: changed in place.
        ratio: fraction to prune, in [0, 1); what is pruned already counts.
        order: None takes the elements of the largest variance, a generator random ones.

    Returns:
        The number of pruned elements over all tensors.

    Raises:
        ValueError: ``ratio`` is out of range.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must be in [0, 1), got {ratio!r}")
    total = 0
    gaussians = list(gaussians)
    ties = find_ties([shard_of(g.parameter).local for g in gaussians])
    for i, g in enumerate(gaussians):
        hess = g.hess.view(-1)
        if i in ties:  # elements of equal variance would be chosen in another order
            first = gaussians[ties[i].first]
            g.hess.copy_(ties[i].as_tied(first.hess))
            g.mean.copy_(ties[i].as_tied(first.mean))
        elif g.hess.dim() >= 2:
            # Within a tensor the variance falls with h; what is pruned already (h = inf) ranks first.
            rank = (
                hess
                if order is None
                else torch.rand(hess.shape, generator=order, device=order.device).to(hess.device)
            )
            rank = torch.where(torch.isinf(hess), -math.inf, rank)
            chosen = torch.argsort(rank, stable=True)[: math.floor(ratio * hess.numel())]
            hess[chosen] = math.inf
            pruned = torch.isinf(g.hess)
            g.mean.masked_fill_(pruned, 0.0)
            local = shard_of(g.parameter).local
            local.masked_fill_(part_like(g.parameter, pruned).to(local.device), 0.0)
        total += int(torch.isinf(hess).sum())
    return total
