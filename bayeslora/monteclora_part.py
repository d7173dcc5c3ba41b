"""The MonteCLoRA layers of one device and dtype: their noise, their perturbed matrices, and the gradients.

One forward is one `Draw`: chi-square and Dirichlet variates of all sites in one launch, their perturbed
matrices in another, in one autograd function for all of them. Gradient checkpointing runs a layer again
within backward: the part then hands out the values of the forward that is being differentiated, with a
graph of its own that saves no tensors, so that both the reentrant and the other kind find what they expect.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayeslora import monteclora_math as mm
from bayeslora._backend import monteclora_kernels
from bayeslora.kernels.monteclora_plan import PerturbPlan, Site
from bayeslora.monteclora_options import MontecloraOptions


class Draw:
    """One draw of a part: its noise, and the perturbed matrices in one flat buffer."""

    def __init__(self, index: Tensor, noise: mm.Noise, num_sites: int) -> None:
        self.index = index
        self.noise = noise
        self.priors: tuple[Tensor, Tensor] | None = None
        self.flat: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()
        self.recomputed: list[Tensor | None] = [None] * num_sites
        self.done = False


class _Perturb(torch.autograd.Function):
    """All sites' perturbed matrices, from the coefficients and the matrices."""

    @staticmethod
    def forward(ctx: Any, part: Part, draw: Draw, kappa: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        flat = torch.cat([matrix.reshape(-1) for matrix in matrices])
        kernels = monteclora_kernels(flat.device)
        kernels.perturb_(part.plan, flat, kappa, seed=part.seed, draw=draw.index)
        ctx.part, ctx.draw, ctx.kappa_dtype, ctx.components = part, draw, kappa.dtype, kappa.shape[1]
        ctx.set_materialize_grads(False)
        draw.flat = flat
        return part.plan.views(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        part: Part = ctx.part
        d_kappa = None
        if ctx.needs_input_grad[2] and any(grad is not None for grad in grads):
            like = next(grad for grad in grads if grad is not None)
            pieces = [
                like.new_zeros(site.rows * site.cols) if grad is None else grad.reshape(-1)
                for grad, site in zip(grads, part.plan.sites, strict=True)
            ]
            d_kappa = monteclora_kernels(like.device).coefficient_gradient(
                part.plan, torch.cat(pieces), ctx.components, seed=part.seed, draw=ctx.draw.index
            )
            d_kappa = d_kappa.to(ctx.kappa_dtype)
        wanted = ctx.needs_input_grad[3:]
        return None, None, d_kappa, *(g if want else None for g, want in zip(grads, wanted, strict=True))


class _PerturbAgain(torch.autograd.Function):
    """One site's perturbed matrix within a recomputation; saves no tensors."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, part: Part, draw: Draw, site: int, matrix: Tensor, std_prior: Tensor, prior: Tensor
    ) -> Tensor:
        ctx.part, ctx.draw, ctx.site = part, draw, site
        ctx.dtypes = std_prior.dtype, prior.dtype
        assert draw.flat is not None
        return part.plan.view(draw.flat, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        d_std = d_prior = None
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            d_std, d_prior = ctx.part.site_gradients(ctx.draw, ctx.site, grad)
            d_std, d_prior = d_std.to(ctx.dtypes[0]), d_prior.to(ctx.dtypes[1])
        return None, None, None, grad if ctx.needs_input_grad[3] else None, d_std, d_prior


class Part:
    """The layers of a bank whose adapters share device and dtype.

    Args:
        layers: PEFT's LoRA Linear layers, each with a sampler for ``adapter``.
        adapter: its name.
        streams: of each layer; site B of stream s has stream ``s + 2^20``.
        options: see `bayeslora.configure_monteclora`.
        seed: 64-bit key of the noise.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        adapter: str,
        streams: Sequence[int],
        options: MontecloraOptions,
        seed: int,
    ) -> None:
        self.layers, self.adapter, self.options, self.seed = list(layers), adapter, options, seed
        a, b = self.adapter_weights(0)
        self.device = a.device
        which = ("A", "B") if options.perturb == "both" else (options.perturb,)
        sites, site_streams = [], []
        for matrix in which:
            for i, stream in enumerate(streams):
                a, b = self.adapter_weights(i)
                cols = a.shape[1] if matrix == "A" else b.shape[0]
                site_streams.append(stream + ((1 << 20) if matrix == "B" else 0))
                sites.append(Site(a.shape[0], cols, matrix == "B", site_streams[-1]))
        self.which = which
        self.plan = PerturbPlan(sites, self.device)
        ranks = [site.rows for site in sites[: len(self.layers)]]
        self.tables = mm.SiteTables(ranks, len(which), site_streams, self.device)
        self.components = self.sampler(0).num_samples
        self.source = mm.NoiseSource(
            self.tables, self.components, options.outer_samples, options.dirichlet == "exact"
        )
        self.counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.scale = torch.zeros((), dtype=torch.float64, device=self.device)
        self.current: Draw | None = None
        self._prior_version = -1
        self.live: list[weakref.ref[Draw]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None, "live": []}

    def sampler(self, i: int) -> Any:
        """Return PEFT's sampler module of layer ``i``, which holds the learned priors."""
        return self.layers[i]._modules["lora_monteclora_sampler"]._modules[self.adapter]

    def adapter_weights(self, i: int) -> tuple[Tensor, Tensor]:
        """Return A and B of layer ``i``."""
        modules = self.layers[i]._modules
        a, b = (modules[name]._modules[self.adapter]._parameters["weight"] for name in ("lora_A", "lora_B"))
        return a, b

    def matrix(self, site: int) -> Tensor:
        """Return the parameter that a site perturbs."""
        copy, i = divmod(site, len(self.layers))
        return self.adapter_weights(i)[self.which[copy] == "B"]

    def matrices(self) -> list[Tensor]:
        """Return the parameters that the sites perturb, in order."""
        held = [layer._modules["lora_" + which]._modules for which in self.which for layer in self.layers]
        return [modules[self.adapter]._parameters["weight"] for modules in held]

    def priors(self) -> tuple[Tensor, Tensor]:
        """Return the layers' s, concatenated, and e ``(L, N)``."""
        held = [self.sampler(i)._parameters for i in range(len(self.layers))]
        return torch.cat([p["std_prior"] for p in held]), torch.stack(
            [p["expert_weights_prior"] for p in held]
        )

    def _version(self) -> int:
        return self.sampler(0)._parameters["std_prior"]._version

    def _shared_priors(self) -> tuple[Tensor, Tensor]:
        """Return the priors as the last forward gathered them, so that each gets one gradient, or anew."""
        priors = None if self.current is None else self.current.priors
        needed = torch.is_grad_enabled() and self.sampler(0)._parameters["std_prior"].requires_grad
        if priors is None or self._version() != self._prior_version or priors[0].requires_grad != needed:
            return self.priors()
        return priors

    def kappa(self, std_prior: Tensor, prior: Tensor, noise: mm.Noise) -> Tensor:
        """Return the coefficients of all rows, differentiable in the priors."""
        alpha = self.tables.per_copy(mm.concentrations(prior))
        weights = mm.mixture_weights(alpha, noise, self.options.sparse)
        variances = mm.row_variances(std_prior, self.tables, noise.chi_square)
        collapsed = self.options.estimator == "collapsed"
        return mm.coefficients(variances, weights, self.scale, self.tables, collapsed)

    def draw_noise(self, index: Tensor, seed: int) -> mm.Noise:
        """Return the noise of one draw at the present priors."""
        with torch.no_grad():
            alpha = self.tables.per_copy(mm.concentrations(self.priors()[1]))
            return self.source.draw(alpha, seed=seed, draw=index)

    def refresh(self, advance: bool) -> None:
        """Perturb all sites for a forward, by the next draw or again by the last."""
        if advance:
            self.counter.add_(1)
        if self.current is not None:
            # Its graph holds the priors' gradient accumulators, which keep the stream they were made on: a
            # step that is recorded in a CUDA graph after eager ones must make its own.
            self.current.priors = None
        std_prior, prior = self.priors()
        index = self.counter.clone()
        alpha = self.tables.per_copy(mm.concentrations(prior.detach()))
        noise = self.source.draw(alpha, seed=self.seed, draw=index)
        draw = Draw(index, noise, len(self.plan.sites))
        draw.priors, self._prior_version = (std_prior, prior), self._version()
        matrices = self.matrices()
        draw.outputs = _Perturb.apply(self, draw, self.kappa(std_prior, prior, noise), *matrices)
        self.release()
        self.live = [ref for ref in self.live if ref() is not None]
        self.live.append(weakref.ref(draw))
        self.current = draw

    def release(self) -> None:
        """Let go of the graph of the last forward; its values stay for a recomputation."""
        if self.current is not None:
            self.current.outputs = ()

    def perturbed(self, site: int) -> Tensor:
        """Return a site's matrix for the forward that is running, or running again within backward."""
        if torch._C._current_graph_task_id() != -1:
            return self._again(site)
        assert self.current is not None
        return self.current.outputs[site]

    def _again(self, site: int) -> Tensor:
        draw = self._draw_of_this_backward()
        found = draw.recomputed[site]
        if found is None:
            held = self.sampler(site % len(self.layers))._parameters
            found = _PerturbAgain.apply(
                self, draw, site, self.matrix(site), held["std_prior"], held["expert_weights_prior"]
            )
            draw.recomputed[site] = found
        return found

    def _draw_of_this_backward(self) -> Draw:
        draws = [draw for ref in self.live if (draw := ref()) is not None]
        waiting = [draw for draw in draws if not draw.done]
        if len(waiting) > 1:
            raise RuntimeError(
                f"{len(waiting)} forwards of MonteCLoRA layers under gradient checkpointing wait for "
                "backward, and their noise cannot be told apart; call backward() after each forward, "
                "or drop what holds the graph of the forwards that need none"
            )
        draw = waiting[0] if waiting else draws[-1]
        if not draw.done:

            def finish() -> None:
                draw.done, draw.recomputed = True, [None] * len(draw.recomputed)

            torch.autograd.Variable._execution_engine.queue_callback(finish)  # type: ignore[attr-defined]
        return draw

    def site_gradients(self, draw: Draw, site: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of one layer's s and e through one site, from that of its matrix."""
        layer = site % len(self.layers)
        alone = PerturbPlan([self.plan.sites[site]], self.device)
        with torch.enable_grad():
            std_prior, prior = (p.detach().double().requires_grad_() for p in self.priors())
            kappa = self.kappa(std_prior, prior, draw.noise)
        d_kappa = torch.zeros_like(kappa)
        first, rank = self.plan.first_rows[site], self.plan.sites[site].rows
        d_kappa[first : first + rank] = monteclora_kernels(grad.device).coefficient_gradient(
            alone, grad.reshape(-1), kappa.shape[1], seed=self.seed, draw=draw.index
        )
        d_std, d_prior = torch.autograd.grad(kappa, (std_prior, prior), d_kappa)
        start = sum(self.tables.site_ranks[:layer])
        return d_std[start : start + rank], d_prior[layer]

    def loss(self) -> tuple[Tensor, int]:
        """Return the sum of the variational loss over the sites, fp64, and how many there are."""
        std_prior, prior = self._shared_priors()
        alpha = self.tables.per_copy(mm.concentrations(prior))
        first = self.sampler(0)
        terms = mm.wishart_kl(std_prior, self.tables) + mm.dirichlet_kl(alpha, first.dirichlet_prior)
        entropy: Tensor | None = None
        if self.current is not None:
            noise = self.current.noise
            variances = mm.row_variances(std_prior, self.tables, noise.chi_square)
            terms = terms + mm.gaussian_kl(variances, self.tables, self.components)
            if first.use_entropy:
                weights = mm.mixture_weights(alpha, noise, self.options.sparse)
                entropy = weights.square().sum(-1).mean(0)
        loss = first.kl_loss_weight * terms
        return (loss if entropy is None else loss + entropy).sum(), len(self.plan.sites)
