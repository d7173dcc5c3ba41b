"""Posterior samples written into the model's parameters, by IVON's own kernels.

θ = m + sqrt(variance_scale) · σ z(seed), σ = 1 / sqrt(λ (h + δ)); draw 0 of each tensor's noise stream, so a
sample of the optimizer's and one of the posterior's with the same seed are the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora._backend import ivon_kernels
from bayeslora.ivon_distributed import fsdp_modules, is_sharded, part_like, reshard, shard_of
from bayeslora.kernels.param_bucket import HYPER_WIDTH, ParamBucket, state_dtype
from bayeslora.posterior_gaussian import FixedTensor, GaussianParameter
from bayeslora.reversible import Held, Reversible, use_of


class Overwritten(Reversible):
    """A context in which parameters of a model hold something else.

    One thread at a time; ordinary calls of the model see what is there. What the parameters held is kept
    before the first is written, so that it can be put back whenever the writing is cut short.

    Args:
        model: which they are of.
        parameters: gives them, once no other thread writes any.
        write: writes them.
        undo: what is to be done once they are put back.
        fixed: further tensors of the model, which take the posterior's own values.
    """

    _turn: Held | None = None
    _before: tuple[list[Tensor], list[Tensor]] | None = None

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], Sequence[Tensor]],
        write: Callable[[], object],
        undo: Callable[[], object],
        fixed: Sequence[FixedTensor] = (),
    ) -> None:
        self._parameters, self._write, self._undo, self._fixed = parameters, write, undo, fixed
        self._turn = Held(use_of(model).writing)

    def enter(self) -> None:
        """Note what the parameters hold, and write."""
        if self._turn is None or self._before is not None:
            raise RuntimeError("the sample is in the model already")
        self._turn.enter()
        places = [shard_of(f.tensor).local for f in self._fixed]
        targets = _unshared([p.detach() for p in (*places, *self._parameters())])
        self._before = targets, [p.clone() for p in targets]
        for target, f in zip(targets, self._fixed, strict=False):
            target.copy_(part_like(f.tensor, f.value))
        self._write()

    def leave(self) -> None:
        """Put back what the parameters held."""
        if self._before is not None:
            torch._foreach_copy_(*self._before)  # in one call: no interrupt comes between two parameters
            self._undo()
            self._before = None
        if self._turn is not None:
            self._turn.leave()

    def __del__(self) -> None:
        if self._before is not None:  # an interrupt came before `__exit__` could do anything
            self.leave()


def _unshared(parameters: list[Tensor]) -> list[Tensor]:
    """Return the parameters.

    Raises:
        ValueError: they are in memory that other processes share.
    """
    if any(p.device.type == "cpu" and p.is_shared() for p in parameters):
        raise ValueError(
            "the model's parameters are in memory that other processes share, and a sample would reach them; "
            "use copy.deepcopy(posterior) in each process, or predict with batched=True"
        )
    return parameters


class SampleWriter:
    """Writes samples of Gaussians into their parameters, and keeps the kernels' buckets for the next one."""

    def __init__(self) -> None:
        self._buckets: list[ParamBucket] | None = None
        self._bucket_key: list[Any] = []
        self._fsdp_modules: list[nn.Module] = []

    def forget(self) -> None:
        """Make the buckets anew at the next sample: a mean or a Hessian has changed."""
        self._buckets = None

    def sample(
        self,
        model: nn.Module,
        gaussians: Sequence[GaussianParameter],
        fixed: Sequence[FixedTensor],
        seed: int,
        variance_scale: float,
    ) -> Overwritten:
        """Return a context in which a sample is in the parameters.

        Args:
            model: which they are of.
            gaussians: of all parameters, the same at every call.
            fixed: what no sample changes.
            seed: 64-bit name of the sample.
            variance_scale: factor on the variance, >= 0.
        """
        sharded = [f.tensor for f in fixed if is_sharded(f.tensor)]
        modules = fsdp_modules(sharded) if sharded else []

        def tensors() -> Sequence[Tensor]:
            return [p for bucket in self._current_buckets(gaussians) for p in bucket.params]

        def write() -> None:
            self._write(self._current_buckets(gaussians), gaussians, seed, variance_scale)
            changed()

        def changed() -> None:
            reshard([*self._fsdp_modules, *modules])
            torch.clear_autocast_cache()  # an outer autocast keeps casts of what the parameters held

        return Overwritten(model, tensors, write, changed, fixed)

    def _write(
        self,
        buckets: Sequence[ParamBucket],
        gaussians: Sequence[GaussianParameter],
        seed: int,
        variance_scale: float,
    ) -> None:
        groups = _hyper_groups(gaussians)
        table = [[0.0, 0.0, 0.0, decay, ess, math.inf, variance_scale] for ess, decay in groups]
        for bucket in buckets:
            bucket.set_hyper([row + [0.0] * (HYPER_WIDTH - len(row)) for row in table])
            ivon_kernels(bucket.device).ivon_sample(bucket, seed=seed, draw=0, adopt=False)

    @torch.inference_mode(False)  # the buckets outlive the caller's context
    @torch.no_grad()
    def _current_buckets(self, gaussians: Sequence[GaussianParameter]) -> list[ParamBucket]:
        """Return the buckets of the kernels, made anew if a parameter was moved or cast."""
        key = [(g.parameter.data_ptr(), g.parameter.dtype, g.parameter.device) for g in gaussians]
        if self._buckets is None or key != self._bucket_key:
            self._buckets, self._bucket_key = _make_buckets(gaussians), key
            sharded = [g.parameter for g in gaussians if is_sharded(g.parameter)]
            self._fsdp_modules = fsdp_modules(sharded) if sharded else []
        return self._buckets


def _hyper_groups(gaussians: Sequence[GaussianParameter]) -> list[tuple[float, float]]:
    """Return the distinct (ess, weight_decay) pairs, in a fixed order."""
    return list(dict.fromkeys((g.ess, g.weight_decay) for g in gaussians))


def _make_buckets(gaussians: Sequence[GaussianParameter]) -> list[ParamBucket]:
    groups = _hyper_groups(gaussians)
    members: dict[tuple[torch.device, torch.dtype], list[GaussianParameter]] = {}
    for g in gaussians:
        p = g.parameter
        members.setdefault((p.device, state_dtype(p.dtype)), []).append(g)
    buckets = []
    for together in members.values():
        shards = [shard_of(g.parameter) for g in together]
        bucket = ParamBucket(
            [shard.local for shard in shards],
            [g.stream for g in together],
            [groups.index((g.ess, g.weight_decay)) for g in together],
            [shard.offset for shard in shards],
            with_momentum=False,
            num_groups=len(groups),
        )
        bucket.hess.fill_(1.0)
        for i, g in enumerate(together):
            bucket.view(bucket.mean, i).copy_(part_like(g.parameter, g.mean))
            bucket.view(bucket.hess, i).copy_(part_like(g.parameter, g.hess))
        buckets.append(bucket)
    return buckets
