"""A posterior as the prior of the next task, for IVON.

With the prior's mean m₀ and precision π₀ = λ₀ (h₀ + δ₀) of each element, and the new task's λ::

    d  = π₀ / λ
    σ  = 1 / sqrt(λ H)                                H = h + d, IVON's state ``hess``, from hess_init + d on
    M' = β1 M + (1-β1) (g + d (m - m₀))
    H' = β2 H + (1-β2) (f + d) + (1-β2)²/2 · (H - f - d)² / H          f = g z sqrt(λ H)
    m' = m - lr' · clip(M'/(1-β1^t) / H', ±clip_radius)

which is IVON's step for ``λ ℓ(θ) + ½ Σ π₀ (θ - m₀)²``: weight decay towards m₀ with an element's own
strength, in place of ``weight_decay`` towards 0. Data and prior weigh as their precisions do, and the new
posterior's precision ``λ H`` holds the prior's, so that tasks can follow one another.

The prior's terms are added to the running means of gradient and curvature that Monte Carlo samples use, so
the kernels are the same, and a step without a prior does what it did. Papers: Nguyen et al., "Variational
continual learning" (ICLR 2018); Shen et al., "Variational learning is effective for large deep networks"
(ICML 2024).

>>> import bayeslora
>>> model = torch.nn.Linear(2, 1)
>>> posterior = bayeslora.IVON(model.parameters(), lr=0.1, ess=100.0).posterior(model)
>>> opt = bayeslora.IVON(model.parameters(), lr=0.1, ess=50.0, prior=posterior)
>>> [group["weight_decay"] for group in opt.param_groups]  # the prior stands in its place
[0.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .ivon_distributed import part_like
from .kernels.param_bucket import ParamBucket
from .ties import as_seen_by, memory

if TYPE_CHECKING:
    from .posterior import Posterior


class GaussianPrior:
    """The Gaussian around each trained parameter that IVON starts a task from.

    Args:
        posterior: an IVON posterior over the model that is trained.

    Raises:
        TypeError: it is MonteCLoRA's, or no posterior.
        ValueError: some of it is pruned: infinite precision is no prior.
    """

    def __init__(self, posterior: Posterior) -> None:
        gaussians = getattr(posterior, "parameters", None)
        if not isinstance(gaussians, dict) or not gaussians:
            raise TypeError(f"prior must be an IVON posterior, got {type(posterior).__name__}")
        self._held: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for name, g in gaussians.items():
            precision = g.ess * (g.hess + g.weight_decay)
            if not bool(precision.isfinite().all()):
                raise ValueError(f"prior: {name!r} has pruned elements; prune after the last task")
            self._held[g.parameter] = g.mean.clone(), precision
        self._flat: WeakKeyDictionary[ParamBucket, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def cover(self, group: dict[str, Any]) -> None:
        """Take the place of a group's weight decay.

        Raises:
            ValueError: a perturbed parameter of the group is not in the prior.
        """
        if not group.get("perturb", True):
            return
        held = {memory(p): p for p in self._held}
        for p in group["params"]:
            one = held.get(memory(p), p)  # of those over one memory, a posterior names the first
            if one is not p:
                mean, precision = self._held[one]
                self._held[p] = as_seen_by(p, one, mean), as_seen_by(p, one, precision)
            elif p.requires_grad and p not in self._held:
                raise ValueError(
                    f"prior has no Gaussian of a trained parameter of shape {tuple(p.shape)}; load it into "
                    "this model (Posterior.from_pretrained), or give the parameter a group with perturb=False"
                )
        group["weight_decay"] = 0.0

    def hess_start(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the first H of a parameter, in its whole shape: ``hess_init + d``."""
        start = float(group["hess_init"])
        if p not in self._held:
            return torch.full(p.shape, start, device=p.device)
        return self._held[p][1] / float(group["ess"]) + start

    @torch.no_grad()
    def add(
        self, buckets: list[ParamBucket], groups: list[dict[str, Any]], grad_scale: Tensor | None, price: bool
    ) -> None:
        """Add the prior's terms to the running means of gradient and curvature.

        Args:
            buckets: whose running means hold this step's samples.
            groups: the optimizer's parameter groups.
            grad_scale: factor that the gradients still have (AMP), or None.
            price: whether the curvature has the factor once, or squared.
        """
        for bucket in buckets:
            mean, decay = self._buffers(bucket, groups)
            pull = (bucket.mean - mean).mul_(decay)
            if grad_scale is not None:
                scale = grad_scale.to(bucket.device, bucket.dtype)
                pull, decay = pull * scale, decay * (scale if price else scale * scale)
            avg_grad, avg_curvature = bucket.averages()
            avg_grad.add_(pull)
            avg_curvature.add_(decay)

    def _buffers(self, bucket: ParamBucket, groups: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        found = self._flat.get(bucket)
        if found is None:
            mean, decay = torch.zeros_like(bucket.mean), torch.zeros_like(bucket.mean)
            for i, p in enumerate(bucket.owners):
                if p in self._held:
                    ess = float(groups[bucket.param_groups[i]]["ess"])
                    bucket.view(mean, i).copy_(part_like(p, self._held[p][0]))
                    bucket.view(decay, i).copy_(part_like(p, self._held[p][1] / ess))
            found = self._flat[bucket] = mean, decay
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": self._held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._held = state["_held"]
        self._flat = WeakKeyDictionary()
