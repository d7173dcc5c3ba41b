"""Posterior samples written into the model's parameters, by IVON's own kernels.

θ = m + sqrt(variance_scale) · σ z(seed), σ = 1 / sqrt(λ (h + δ)); draw 0 of each tensor's noise stream, so a
sample of the optimizer's and one of the posterior's with the same seed are the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bayeslora._backend import ivon_kernels
from bayeslora.ivon_distributed import fsdp_modules, is_sharded, part_like, reshard, shard_of
from bayeslora.kernels.param_bucket import HYPER_WIDTH, ParamBucket, state_dtype
from bayeslora.posterior_gaussian import GaussianParameter
from bayeslora.ties import find_ties


class SampleWriter:
    """Writes samples of Gaussians into their parameters, and keeps the kernels' buckets for the next one."""

    def __init__(self) -> None:
        self._buckets: list[ParamBucket] | None = None
        self._bucket_key: list[Any] = []
        self._fsdp_modules: list[nn.Module] = []

    def forget(self) -> None:
        """Make the buckets anew at the next sample: a mean or a Hessian has changed."""
        self._buckets = None

    @contextmanager
    def sample(
        self, gaussians: Sequence[GaussianParameter], seed: int, variance_scale: float
    ) -> Iterator[None]:
        """Put a sample into the parameters; put back what they held at the end.

        Args:
            gaussians: of all parameters, the same at every call.
            seed: 64-bit name of the sample.
            variance_scale: factor on the variance, >= 0.
        """
        buckets = self._current_buckets(gaussians)
        tensors = [p for bucket in buckets for p in bucket.params]
        before = [p.detach().clone() for p in tensors]
        try:
            self._write(buckets, gaussians, seed, variance_scale)
            reshard(self._fsdp_modules)
            torch.clear_autocast_cache()  # an outer autocast keeps casts of what the parameters held
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(tensors, before, strict=True):
                    p.copy_(value)
            reshard(self._fsdp_modules)
            torch.clear_autocast_cache()

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
    ties = find_ties([shard_of(g.parameter).local for g in gaussians])
    members: dict[tuple[torch.device, torch.dtype], list[GaussianParameter]] = {}
    for g in (g for i, g in enumerate(gaussians) if i not in ties):
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
