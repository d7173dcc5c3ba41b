"""The posterior samples that one step of IVON is made of: drawn, shown, folded together, and stepped from.

A training sample is drawn and shown: the parameters hold it while gradients are taken. If another is drawn
before the step, the finished one's gradient g_s and curvature estimate f_s are folded into running means
over samples, ``1/S Σ g_s`` and ``1/S Σ f_s``, which the update then reads in place of ``p.grad``.
``ivon.py`` has the equations, and the two protocols that decide when each of this happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslora._backend import ivon_kernels
from bayeslora.ivon_distributed import agree_on_nonfinite
from bayeslora.ivon_state import BucketStore, dense_grads
from bayeslora.kernels.param_bucket import DenseGrads, ParamBucket


@dataclass(frozen=True)
class Noise:
    """Names one posterior sample.

    Args:
        seed: key of the noise.
        draw: index of the sample; of a training sample, its number within the step, counted from 1.
        variance_scale: factor on the variance.
        train: whether it is a training sample.
    """

    seed: int
    draw: int
    variance_scale: float = 1.0
    train: bool = False


class _Mixed(Noise):
    """Stands for parameters that hold no sample in particular; false, so that nothing takes it for one."""

    def __bool__(self) -> bool:
        return False


MIXED = _Mixed(0, -1)
"""What the parameters hold while they are written, the stored mean being right."""


class StepSamples:
    """The sample in the parameters, and those of the step to come.

    Args:
        store: the optimizer's buckets.
        held: the sample that the parameters hold; None: the mean.
        pending: the training sample that ``p.grad`` belongs to.
        drawn: training samples drawn in this step.
    """

    def __init__(
        self, store: BucketStore, held: Noise | None = None, pending: Noise | None = None, drawn: int = 0
    ) -> None:
        self._store = store
        self.held = held
        self.saved: Noise | None = None
        """A sample that some of the parameters may hold for the mean, and must not be taken for it: their
        weights were loaded and held it when they were saved, or it is being written."""
        self.forget()
        self.pending, self.drawn = pending, drawn

    def forget(self) -> None:
        """Begin a step anew; the parameters keep what they hold."""
        self.pending = None
        self.drawn = 0
        self.folded = 0  # how many of those drawn are finished and in the running means
        self.active: set[int] = set()  # streams that had a gradient in one of the folded
        self._folded_in: list[ParamBucket] | None = None  # the buckets that hold the running means

    def unfolded(self) -> tuple[Noise | None, Noise | None, int]:
        """Return ``held``, ``pending`` and ``drawn`` for a copy of the optimizer.

        Running means stay behind with the buckets: a copy made between two samples begins its step anew.
        """
        return (self.held, None, 0) if self.folded else (self.held, self.pending, self.drawn)

    def held_for_saving(self) -> list[Any] | None:
        """Return what names the sample in the parameters, as plain numbers; None for the mean."""
        held = self.held or self.saved
        return None if held is None else list(astuple(held))

    @torch.no_grad()
    def take_out_saved(self, named: Sequence[Any] | None, rescale_lr: bool) -> None:
        """Put the mean into parameters whose loaded weights are the sample that was in them when saved.

        Weights and state saved in the middle of a step would else make the sample the new mean, as any
        weights do that are not the stored mean. Tensors that hold something else are left alone.

        Args:
            named: what :meth:`held_for_saving` returned; None for a last look, at weights loaded since.
            rescale_lr: see :class:`~bayeslora.IVON`.
        """
        noise = self.saved if named is None else Noise(*named)
        if noise is None:
            return
        self.saved = noise
        for bucket in self._store.current():
            self._store.set_hyper(bucket, noise.variance_scale, rescale_lr)
            apart = bucket.apart()
            ivon_kernels(bucket.device).ivon_sample(
                apart, seed=noise.seed, draw=noise.draw, train=noise.train, adopt=False
            )
            for i, (p, sample) in enumerate(zip(bucket.params, apart.params, strict=True)):
                mean = bucket.view(bucket.mean, i).to(p.dtype)
                if _is_sample(p.detach(), sample, mean):
                    p.copy_(mean)
        self._store.reshard()
        if named is None:
            self.held = self.saved = None

    def draw(self, seed: int, rescale_lr: bool) -> None:
        """Draw the step's next sample and put it into the parameters."""
        if self.folded:
            self.check_folded(self._store.current())
        noise = Noise(seed, self.drawn + 1, train=True)
        self.show(noise, rescale_lr)
        self.pending = noise
        self.drawn += 1

    def show(self, noise: Noise | None, rescale_lr: bool) -> None:
        """Make the parameters hold the named sample, or the mean."""
        if self.saved is not None:
            self.take_out_saved(None, rescale_lr)
        if noise == self.held:
            return
        # What is about to be written is marked before: an exception may come at any point of it.
        adopt = self.held is None
        if adopt:
            buckets = self._store.current()
            self.saved = noise
        else:  # once a sample is in the parameters, only a short check is needed before it is replaced
            buckets = self._store.within_step()
            self.held = MIXED
        for bucket in buckets:
            kernels = ivon_kernels(bucket.device)
            if noise is None:
                kernels.ivon_restore(bucket)
            else:
                self._store.set_hyper(bucket, noise.variance_scale, rescale_lr)
                kernels.ivon_sample(bucket, seed=noise.seed, draw=noise.draw, train=noise.train, adopt=adopt)
        self._store.reshard()
        torch.clear_autocast_cache()  # an outer autocast keeps casts of what the parameters held
        self.held = noise
        self.saved = None

    def fold(self, price: bool, rescale_lr: bool) -> None:
        """Move the pending sample's gradient from ``p.grad`` into the running means over samples.

        Args:
            price: the curvature estimate, Price's theorem (True) or squared gradients (False).
            rescale_lr: see :class:`~bayeslora.IVON`.
        """
        noise = self.pending
        assert noise is not None
        buckets = self._store.within_step()
        self.check_folded(buckets)
        grads = self._dense_grads(buckets)
        try:
            self.folded += 1
            self._folded_in = buckets
            for bucket, of_bucket in zip(buckets, grads, strict=True):
                self._store.set_hyper(bucket, 1.0, rescale_lr)
                ivon_kernels(bucket.device).ivon_fold(
                    bucket, of_bucket, seed=noise.seed, draw=noise.draw, count=self.folded, price=price
                )
                self.active.update(s for s, g in zip(bucket.streams, of_bucket, strict=True) if g is not None)
                for p in bucket.owners:
                    p.grad = None
                for _, p, _ in bucket.tied:
                    p.grad = None
            self.pending = None
        except BaseException:  # an interrupt: the means may hold a part of the sample
            self.forget()
            raise

    def _dense_grads(self, buckets: list[ParamBucket]) -> list[DenseGrads]:
        """Return the gradients of all buckets.

        Raises:
            RuntimeError: one is sparse. Where the parameters hold the mean again, so that no other gradient
                can be taken at the sample, the step is forgotten.
        """
        try:
            return [dense_grads(bucket) for bucket in buckets]
        except RuntimeError:
            if self.held is None:
                self.forget()
            raise

    def check_folded(self, buckets: list[ParamBucket]) -> None:
        """Check that the running means are those of ``buckets``.

        Raises:
            RuntimeError: they were made anew since; the step's samples are then forgotten.
        """
        if self.folded and buckets is not self._folded_in:
            self.forget()  # their running means went with the old buckets
            raise RuntimeError(
                "a parameter was moved, cast, frozen or added between the Monte Carlo samples of one step; "
                "do that after opt.step()"
            )

    def update(
        self,
        buckets: list[ParamBucket],
        *,
        averaged: bool,
        price: bool,
        debias: bool,
        rescale_lr: bool,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update all buckets and leave the mean in the parameters, or skip the step.

        Args:
            buckets: the store's.
            averaged: read the running means instead of ``p.grad``.
            price: the curvature estimate, as for :meth:`fold`.
            debias: see :class:`~bayeslora.IVON`, as for ``rescale_lr`` and ``skip_nonfinite``.
            rescale_lr: see ``debias``.
            skip_nonfinite: see ``debias``.
            grad_scale: what a ``GradScaler`` has multiplied the gradients with, or None.
            found_inf: a ``GradScaler``'s own finding, which decides instead of ``skip_nonfinite``, or None.
        """
        grads = [None] * len(buckets) if averaged else self._dense_grads(buckets)
        check = skip_nonfinite and found_inf is None
        together = check and (len(buckets) > 1 or bool(self._store.shard_groups))
        if together:
            for bucket, bucket_grads in zip(buckets, grads, strict=True):
                ivon_kernels(bucket.device).ivon_check(bucket, bucket_grads)
            agree_on_nonfinite(buckets, self._store.shard_groups)
        noise = self.pending or Noise(0, 0)
        self.held = MIXED  # the parameters will hold the mean, but not at any point of what follows
        for bucket, bucket_grads in zip(buckets, grads, strict=True):
            self._store.set_hyper(bucket, 1.0, rescale_lr)
            active = None
            if bucket_grads is None:
                active = [stream in self.active for stream in bucket.streams]
            ivon_kernels(bucket.device).ivon_step(
                bucket,
                bucket_grads,
                active,
                seed=noise.seed,
                draw=noise.draw,
                draws=self.drawn,
                price=price,
                debias=debias,
                check=check and not together,
                grad_scale=None if grad_scale is None else grad_scale.to(bucket.device),
                found_inf=None if found_inf is None else found_inf.to(bucket.device),
            )
        self._store.reshard()
        torch.clear_autocast_cache()
        self.forget()
        self.held = None


def _is_sample(found: Tensor, sample: Tensor, mean: Tensor) -> bool:
    """Tell whether a tensor is a sample drawn before, perhaps on another device, and not the mean.

    Devices differ in the last bits of the noise. In half precision these decide, in a few elements of a
    hundred thousand, to which side the sample was rounded.
    """
    limits = torch.finfo(found.dtype)
    found, sample, mean = found.double(), sample.double(), mean.double()
    apart = (found - sample).abs()
    odd = apart > 1e-3 * (sample - mean).abs() + 1e-6 * sample.abs()
    spacing = limits.eps * torch.maximum(sample.abs(), found.abs()).clamp(min=limits.tiny)
    changed = int((found != mean).sum())
    return changed > 0 and not bool((odd & (apart > spacing)).any()) and int(odd.sum()) <= 1 + changed // 1000
