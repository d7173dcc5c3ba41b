"""IVON: AdamW's cost, a Gaussian posterior over the weights.

Papers: Shen et al., "Variational learning is effective for large deep networks" (ICML 2024); Cong et al.,
"Variational low-rank adaptation using IVON" (2024); "Improving LoRA with variational learning" (2025).

Here are the public class and the two protocols of training with it. Beside it lie the samples of a step
(``ivon_samples.py``), the state (``ivon_state.py``), saving and loading (``ivon_saving.py``), the checks of
arguments and saved states (``ivon_checks.py``), parameter groups (``ivon_groups.py``), warnings of skipped
steps (``ivon_skips.py``), steps as CUDA graphs (``ivon_recording.py``), the choice of hyperparameters
(``ivon_setup.py``), an earlier task's posterior as the prior (``ivon_prior.py``) and several processes
(``ivon_distributed.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslora._backend import untraced
from bayeslora.interrupts import uninterrupted
from bayeslora.ivon_checks import EVAL_DRAWS, check_group, check_settings, say_flat_prior
from bayeslora.ivon_distributed import average_over_ranks, check_engine, check_not_replaced, draws_own_noise
from bayeslora.ivon_groups import ParamGroup
from bayeslora.ivon_prior import GaussianPrior
from bayeslora.ivon_recording import RecordedSteps
from bayeslora.ivon_samples import Noise
from bayeslora.ivon_saving import SavedState
from bayeslora.ivon_setup import is_watched, like_adamw, watch
from bayeslora.ivon_state import ties_of
from bayeslora.kernels.param_bucket import ParamBucket
from bayeslora.posterior_gaussian import GaussianParameter, learned_gaussians

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior

_OF_ALL = ("mc_samples", "hess_approx", "sync", "debias", "rescale_lr", "seed", "skip_nonfinite")
"""Settings that no group has of its own."""


class IVON(SavedState, RecordedSteps):
    r"""Improved Variational Online Newton: trains the mean and variance of a diagonal Gaussian posterior.

    With λ = ``ess``, δ = ``weight_decay``, z ~ N(0, I) and g the gradient at the sample θ::

        σ  = 1 / sqrt(λ (h + δ));   θ = m + σ z
        f  = g z sqrt(λ (h + δ))                         (hess_approx="price"; "gradsq": f = λ g²)
        M' = β1 M + (1-β1) g
        h' = β2 h + (1-β2) f + (1-β2)²/2 · (h - f)² / (h + δ)
        m' = m - lr' · clip((M'/(1-β1^t) + δ m) / (h' + δ), ±clip_radius)

    ``lr' = lr · (hess_init + δ)`` if ``rescale_lr`` else ``lr``. Arguments, defaults and trajectories are
    those of the ``ivon-opt`` package.

    **Two ways to train.** A context manager::

        with opt.sampled_params(train=True):
            loss(model(x), y).backward()
        opt.step()

    or the protocol that HF Trainer speaks: ``opt.train()`` before the forward pass, ``opt.step()`` after
    the backward pass, ``opt.eval()`` before an evaluation. Parameters hold the mean at rest and one
    posterior sample in between. ``step()`` reads ``p.grad`` when it is called, so accumulation, clipping
    and unscaling count. Gradients of micro-batches add up in ``p.grad`` under one context (or one
    ``train()``); a second context before ``step()`` is a second Monte Carlo sample, and the step uses the
    mean over samples (whatever ``zero_grad`` does in between, as with ``ivon-opt``).

    **State.** ``mean``, ``momentum`` and ``hess`` of each parameter, fp32 (fp64 for fp64 parameters)
    whatever the parameter's dtype: 12 bytes a parameter, the mean being the fp32 master copy. With bf16
    weights and gradients 16 in all, where AdamW takes 8 with bf16 state and 20 with an fp32 master copy;
    with fp32 weights 20 against AdamW's 16. Several samples a step, or ranks with samples of their own, take
    8 more. ``param_groups[i]["hess"]``, ``["momentum"]`` and ``current_step`` can be read as ``ivon-opt``'s.
    Noise is a pure function of ``(seed, draw, tensor, element)``: it is never stored, and does not depend on
    torch's global generators. There are 2^31 training draws and as many for evaluation. Parameters over one
    memory (PEFT's ``ensure_weight_tying``), transposed or not, have one state and one noise, and their
    gradients add up.

    Args:
        params: parameters or parameter groups. Each group may set ``lr``, ``ess``, ``hess_init``,
            ``beta1``, ``beta2``, ``weight_decay`` and ``clip_radius``, and ``perturb``: with False (for a
            classification head, say) its parameters are trained at their mean with the Hessian fixed at
            ``hess_init``, and the posterior leaves them out.
        lr: learning rate, >= 0; of a scalar tensor each step reads the value anew.
        ess: effective sample size λ > 0, usually the number of training examples; larger is closer to
            a point estimate.
        hess_init: initial value h0 > 0 of the Hessian.
        beta1: momentum of the gradient, in [0, 1].
        beta2: momentum of the Hessian, in [0, 1].
        weight_decay: δ >= 0; the prior is N(0, 1 / (λ δ)).
        mc_samples: Monte Carlo samples that ``step(closure)`` takes, >= 1.
        hess_approx: ``"price"`` (reparameterised) or ``"gradsq"`` (squared gradients).
        clip_radius: largest preconditioned update of an element, > 0.
        sync: on several ranks of ``torch.distributed``, ``"shared"`` (or False): all draw the same sample and
            DDP or FSDP2 averages the gradients; or ``"independent"`` (or True): each draws its own, and
            ``step()`` averages gradients and curvatures, which under DDP needs
            :func:`bayeslora.keep_gradients_local`.
        debias: divide the momentum by ``1 - β1^t``.
        rescale_lr: multiply ``lr`` by ``hess_init + weight_decay``.
        seed: 64-bit key of all noise. Two optimizers that train parts of one model need different seeds:
            with one seed the noise of their first tensors is the same, that of their second, and so on.
        skip_nonfinite: skip a step whose gradients hold a NaN or an infinity, and count it in
            :attr:`skipped_steps`; decided on the device, without a host sync.
        prior: posterior of an earlier task over the same model, the prior of this one: weight decay towards
            its mean with its precision, instead of ``weight_decay`` (``ivon_prior.py`` has the equations).
            Takes 24 bytes a parameter more. It is not part of ``state_dict()``: pass it again to resume.

    Raises:
        ValueError: an argument is out of range, parameters are on the meta device, share a part of their
            memory or belong to DeepSpeed or FSDP1, or ``prior`` is pruned or lacks a trained parameter.
        TypeError: a parameter is not a floating-point tensor, or ``prior`` is not an IVON posterior.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands grad_scale and found_inf to step()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = math.inf,
        sync: bool | str = False,
        debias: bool = True,
        rescale_lr: bool = True,
        *,
        seed: int = 0,
        skip_nonfinite: bool = True,
        prior: Posterior | None = None,
    ) -> None:
        check_settings(mc_samples, hess_approx, seed)
        self._given = None  # ids of the parameters, once all are there
        self.mc_samples = mc_samples
        self.hess_approx = hess_approx
        self.sync = draws_own_noise(sync)
        self.debias = debias
        self.rescale_lr = rescale_lr
        self.skip_nonfinite = skip_nonfinite
        self._seed = int(seed)
        self._eval_draws = 0
        self._from_context = False  # the pending sample came from sampled_params, not train()
        self._prior = None if prior is None else GaussianPrior(prior)
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "hess_init": hess_init,
            "ess": ess,
            "clip_radius": clip_radius,
            "mc_samples": mc_samples,
            "hess_approx": hess_approx,
            "sync": self.sync,
            "debias": debias,
            "rescale_lr": rescale_lr,
            "seed": self._seed,
            "skip_nonfinite": skip_nonfinite,
        }
        check_group(defaults, debias)
        super().__init__(params, defaults)
        ties_of(self.param_groups)
        self._start()
        if prior is None:
            say_flat_prior(self.param_groups, weight_decay)

    @classmethod
    def like_adamw(
        cls,
        params: Iterable[Any],
        lr: float | Tensor,
        num_data: int,
        *,
        snr: float = 0.5,
        clip_ratio: float = 0.03,
        max_gap: float = 0.1,
        setup_steps: int = 10,
        step_ratio: float = 0.7,
        beta2: float = 0.9998,
        weight_decay: float = 1e-6,
        **settings: Any,
    ) -> IVON:
        """Return an IVON that needs no search: give it a learning rate that works for AdamW.

        ``step_ratio`` times ``lr`` (or a scheduler's) is the largest step of an element. ``ess``,
        ``hess_init`` and ``clip_radius`` are set in the first ``setup_steps`` steps, which are steps of the
        training like any other, and logged with their reasons. ``ess`` is raised later too, if the loss
        under sampling departs from the loss at the mean. :mod:`bayeslora.ivon_setup` has the equations.

        Args:
            params: parameters or groups, as for :class:`IVON`; of LoRA, A and B.
            lr: AdamW's learning rate.
            num_data: number of training examples; ``ess`` is never less.
            snr: root mean square of the weights over the posterior's standard deviation, at the start;
                larger is closer to a point estimate. The papers' recipes lie between 0.5 and 4; searches on
                five tasks (``bench/NOTES.md``) prefer 0.5 or do not mind.
            clip_ratio: the gradient that takes the largest step, as a fraction of the root mean square.
            max_gap: how far the loss at a sample may lie above the loss at the mean, in the loss's unit
                (nats for a cross-entropy).
            setup_steps: steps that decide, >= 1.
            step_ratio: the largest step as a fraction of ``lr``. More elements take it than with AdamW,
                whose typical step is 0.1 to 0.3 of its learning rate. The same searches want 0.7; take
                0.4 where ``lr`` is the largest that AdamW bears.
            beta2: momentum of the Hessian, in [0, 1].
            weight_decay: δ, as for :class:`IVON`. AdamW's decay w is δ = w · clip_radius · hess_init.
            settings: further arguments of :class:`IVON`: ``beta1``, ``mc_samples``, ``sync``, ``debias``,
                ``seed``, ``skip_nonfinite``.

        Raises:
            ValueError: an argument is out of range; all parameters are zero; or ``settings`` holds what is
                chosen here (``ess``, ``hess_init``, ``clip_radius``, ``rescale_lr``), a ``prior``, or
                ``hess_approx="gradsq"``, which gives no curvature to choose from.
            TypeError: a parameter is not a floating-point tensor, or :class:`IVON` has no such setting.

        Papers: it takes the place of the searches in Cong et al. (2024) and its successor (2025).
        """
        return like_adamw(
            cls,
            params,
            lr,
            num_data,
            snr=snr,
            clip_ratio=clip_ratio,
            max_gap=max_gap,
            setup_steps=setup_steps,
            step_ratio=step_ratio,
            beta2=beta2,
            weight_decay=weight_decay,
            **settings,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its tensors' noise streams follow those of the groups before it.

        Args:
            param_group: ``{"params": [...]}`` and any hyperparameter that differs from the default.

        Raises:
            ValueError: a hyperparameter is out of range, a sample is in the parameters, or they are refused
                as by :class:`IVON`; the optimizer is then as it was.
            TypeError: a parameter is not a floating-point tensor.
        """
        if self._given is not None and self._samples.held is not None:
            raise ValueError("add_param_group() while a sample is in the parameters; call opt.eval() first")
        check_group({**self.defaults, **param_group}, self.debias)
        group = ParamGroup(param_group, self)
        super().add_param_group(group)
        for name in _OF_ALL:
            group.pop(name, None)
        try:
            check_engine(group["params"], self.sync)
            if self._prior is not None:
                self._prior.cover(group)
            if self._given is not None:
                ties_of(self.param_groups)
                self._given.update(map(id, group["params"]))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_params(self, params: list[Tensor]) -> None:
        assert self._given is not None
        check_not_replaced(params, self._given)
        check_engine(params, self.sync)

    # ---- samples ---------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(
        self, train: bool = False, *, seed: int | None = None, variance_scale: float = 1.0
    ) -> Iterator[None]:
        """Put a posterior sample into the parameters; put back what they held before at the end.

        Args:
            train: the gradients taken inside are for the next ``step()``. Without it, the sample is for
                evaluation and leaves the training run as it was.
            seed: name of an evaluation sample: the same seed gives the same weights on every device, and
                those of ``Posterior.sample(seed)``. None draws a new one each time.
            variance_scale: factor on the variance of an evaluation sample, >= 0.

        Raises:
            ValueError: ``seed`` or ``variance_scale`` with ``train=True``, or ``variance_scale`` is negative
                or not finite.
            RuntimeError: with ``train=True``, a sample is in the parameters already, or a parameter was
                moved, cast, frozen or added since an earlier sample of this step; without, 2^31 evaluation
                samples were drawn without a ``seed``.
        """
        if not train:
            with self._evaluation_sample(seed, variance_scale):
                yield
            return
        if seed is not None or variance_scale != 1.0:
            raise ValueError(
                "seed and variance_scale are for evaluation samples; with train=True leave them out "
                "(the training seed is IVON(..., seed=...))"
            )
        samples = self._samples
        if self._wrapped is not None and self._wrapped is samples.held:  # step(closure) has drawn it already
            yield
            return
        if samples.held:
            raise RuntimeError(
                "sampled_params(train=True) while a sample is in the parameters; "
                "use either the context manager or opt.train(), one sample at a time"
            )
        if samples.pending is not None:
            self._fold()
        try:
            try:
                self._from_context = True
                self._draw()
                yield
            finally:
                self._show(None)
        except BaseException:
            self._put_back(None)
            samples.forget()
            raise

    @contextmanager
    def _evaluation_sample(self, seed: int | None, variance_scale: float) -> Iterator[None]:
        if not 0.0 <= variance_scale < math.inf:
            raise ValueError(f"variance_scale must be finite and >= 0, got {variance_scale!r}")
        if seed is None:
            if self._eval_draws >= EVAL_DRAWS:
                raise RuntimeError(
                    "2^31 evaluation samples were drawn, all that there are; name them by seed="
                )
            noise = Noise(self._seed, EVAL_DRAWS + self._eval_draws, variance_scale)
            self._eval_draws += 1
        else:
            noise = Noise(seed, 0, variance_scale)
        before = self._samples.held or None
        try:
            try:
                self._show(noise)
                yield
            finally:
                self._show(before)
        except BaseException:
            self._put_back(before)
            raise

    def _put_back(self, noise: Noise | None) -> None:
        """Show what was there before a context, where an exception may have cut that short."""
        with uninterrupted():
            self._show(noise)

    def train(self) -> None:
        """Put this step's training sample into the parameters (the same one until ``step()``).

        Where a sample is in the parameters already, this does nothing.

        Raises:
            RuntimeError: a parameter was moved, cast, frozen or added since an earlier sample of this step.
        """
        if self._samples.held:
            return
        if self._samples.pending is None:
            self._from_context = False
            self._draw()
        else:
            self._show(self._samples.pending)

    def eval(self) -> None:
        """Put the mean into the parameters. A later ``train()`` goes on with the same sample."""
        self._show(None)

    @untraced
    def _draw(self) -> None:
        rank = dist.get_rank() if self.sync and dist.is_initialized() else 0
        self._samples.draw(self._seed + rank, self.rescale_lr)

    @untraced
    def _show(self, noise: Noise | None) -> None:
        self._samples.show(noise, self.rescale_lr)

    @untraced
    def _fold(self) -> None:
        self._samples.fold(self.hess_approx == "price", self.rescale_lr)

    @untraced  # Dynamo of torch 2.11 cannot set an optimizer's attribute
    def _note_cleared(self, cleared: bool) -> None:
        self._cleared = cleared

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; those of a finished ``sampled_params(train=True)`` are kept for ``step()``.

        As with ``ivon-opt``, a gradient taken in a context that has ended belongs to its Monte Carlo
        sample, and clearing ``p.grad`` does not take it away.

        Args:
            set_to_none: as for every torch optimizer: set ``p.grad`` to None instead of zeros.

        Raises:
            RuntimeError: a gradient of a finished context is sparse; it is cleared all the same.
        """
        try:
            if self._samples.pending is not None and self._samples.held is None and self._from_context:
                self._fold()
        finally:
            self._note_cleared(True)
            super().zero_grad(set_to_none)

    # ---- the update ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the posterior from ``p.grad`` and leave the mean in the parameters.

        Args:
            closure: computes the loss and its gradients and returns the loss; called ``mc_samples`` times,
                each time with a new sample in the parameters (whether or not it draws one itself).

        Returns:
            The mean loss of the closure's calls; None without a closure, or where it returns None.

        Raises:
            RuntimeError: no sample was drawn since the last step, so the gradients were not taken at one, or
                there were gradients before the closure's; a gradient is sparse; a parameter was moved, cast,
                frozen or added between two samples of the step; ``GradScaler.unscale_`` has seen only the
                last of several samples; with ``sync="independent"``, the ranks' models differ, or their
                gradients were averaged before; or about 2^31 samples were drawn (the update is then made).
        """
        loss = None if closure is None else self._run_closure(closure)
        self._finish_step()
        return loss

    @untraced
    def _finish_step(self) -> None:
        if self._samples.pending is None and self._samples.folded == 0:
            started = any(isinstance(key, Tensor) for key in self.state)
            if not started and all(float(group["lr"]) == 0.0 for group in self.param_groups):
                self._store.current()  # torch.distributed.checkpoint asks for the state by such a step
                return
            raise RuntimeError(
                "IVON.step() with no sample drawn: take the gradients inside "
                "`with opt.sampled_params(train=True): loss.backward()`, or call `opt.train()` before the "
                "forward pass"
            )
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            self._skips.scaled = True
        buckets = self._store.within_step()
        self._samples.check_folded(buckets)
        watched = is_watched(self.param_groups[0])
        averaged = self._average_samples(buckets, found_inf is not None and grad_scale is None, watched)
        price = self.hess_approx == "price"
        if watched:
            watch(self, buckets, self._samples.active, grad_scale)
        if self._prior is not None:
            self._prior.add(buckets, self.param_groups, grad_scale, price)
        self._samples.update(
            buckets,
            averaged=averaged,
            price=price,
            debias=self.debias,
            rescale_lr=self.rescale_lr,
            skip_nonfinite=self.skip_nonfinite,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if not (buckets and buckets[0].recording):
            self.count_step()

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        losses = []
        earlier = self._gradient_before()
        self._note_cleared(False)
        for _ in range(self.mc_samples):
            drawn = bool(self._samples.held)  # by opt.train()
            with nullcontext() if drawn else self.sampled_params(train=True), torch.enable_grad():
                try:
                    self._wrapped = self._samples.held
                    losses.append(closure())
                finally:
                    self._wrapped = None
                kept = earlier is not None and earlier[0].grad is earlier[1] and not self._cleared
                if kept and earlier and earlier[2]:  # read here, in the case that is in doubt
                    raise RuntimeError(
                        "IVON.step(closure): gradients that were there before were not cleared, and the "
                        "closure's were added to them, but they were not taken at this step's sample. Where "
                        "micro-batches accumulate, call opt.train() before the first (under Lightning: "
                        "callbacks=[bayeslora.LightningCallback()]); else clear them with opt.zero_grad()"
                    )
                earlier = None
            self._show(None)
        return None if any(loss is None for loss in losses) else sum(losses) / self.mc_samples

    @untraced
    def _gradient_before(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return a parameter with a gradient of before this step's sample, it, and whether it is not zero."""
        if self._samples.held or self._samples.pending is not None:
            return None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse:
                    return p, p.grad, p.grad.any()
        return None

    def _average_samples(self, buckets: list[ParamBucket], unscaled: bool, watched: bool) -> bool:
        """Bring several samples, or ranks, or a watched one into the running means; return whether it did."""
        ranks = self.sync and dist.is_initialized()
        if self._samples.folded == 0 and not ranks and not watched and self._prior is None:
            return False
        if unscaled and (self._samples.folded or ranks):
            raise RuntimeError(
                "GradScaler.unscale_() reaches only the last of several Monte Carlo samples; leave it out "
                "(scaler.step(opt) unscales them all), or take one sample a step"
            )
        if self._samples.pending is not None:
            self._fold()
        if ranks:
            average_over_ranks(buckets, first=not self._own_gradients_checked)
            self._own_gradients_checked = True
            # Every rank updates the same tensors, whichever of them had a gradient on it.
            self._samples.active = {stream for bucket in buckets for stream in bucket.streams}
        return True

    # ---- what has been learned ---------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Steps dropped for non-finite gradients so far. Reading it waits for the device."""
        return self._store.counters()[1]

    @property
    def current_step(self) -> int:
        """Steps taken so far, as ``ivon-opt`` calls them. Reading it waits for the device."""
        return self._store.counters()[0]

    def _report_skipped(self, final: bool = False) -> None:
        """Log how many steps were skipped, if any."""
        steps, skipped, _ = self._store.counters()
        self._skips.close(steps, skipped, final)

    def _skipped_share(self) -> float:
        steps, skipped, _ = self._store.counters()
        return skipped / max(steps + skipped, 1)

    def _started_state(self) -> Mapping[Any, Any]:
        """Return ``state``, with that of parameters that have none yet at its start."""
        self._store.within_step() if self._samples.held else self._store.current()
        return self.state

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()  # without the notes of like_adamw
        return "\n".join(line for line in lines if not line.strip().startswith("setup_"))

    @torch.no_grad()
    def gaussians(self) -> Iterator[tuple[Tensor, GaussianParameter]]:
        """Put the mean into the parameters and yield each with a copy of its Gaussian.

        Parameters that were trained and are frozen now count; those of groups that are not perturbed do not.
        """
        self.eval()
        self._started_state()
        self._store.reshard()
        self._report_skipped()
        return learned_gaussians(self.param_groups, self.state)

    def posterior(self, model: nn.Module) -> Posterior:
        """Return the posterior that this optimizer has learned; same as :meth:`Posterior.from_optimizer`.

        The log says so where no step was taken yet, or steps were skipped.

        Args:
            model: the model that the optimizer trains. Its parameters are left at the mean.

        Raises:
            ValueError: a trained parameter of the optimizer is not one of the model's.
        """
        from bayeslora.posterior import Posterior

        return Posterior.from_optimizer(model, self)
