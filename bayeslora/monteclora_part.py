"""The MonteCLoRA layers of one device and dtype: their noise, their perturbed matrices, and the gradients.

One forward is one `Draw`: chi-square and Dirichlet variates of all sites in one launch, their perturbed
matrices in another, in one autograd function for all of them. Gradient checkpointing runs a layer again
within backward: the part then hands out the values of the forward that is being differentiated, with a
graph of its own that saves no tensors, so that both the reentrant and the other kind find what they expect.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bayeslora import monteclora_math as mm
from bayeslora._backend import monteclora_kernels
from bayeslora.kernels.monteclora_plan import PerturbPlan, Site
from bayeslora.lora_twice import once
from bayeslora.lora_watched import dispatch_modes
from bayeslora.monteclora_options import MontecloraOptions
from bayeslora.monteclora_terms import DrawTerms, Priors

_PRIORS = "the loss in MonteCLoRA's priors"


class Draw:
    """One draw of a part: its small tensors, and the perturbed matrices in one flat buffer."""

    def __init__(self, index: Tensor, terms: DrawTerms, num_sites: int) -> None:
        self.index = index
        self.terms = terms
        self.noise = terms.noise
        self.priors: Tensor | None = None
        self.flat: Tensor | None = None
        self.outputs: Sequence[Tensor] = ()
        self.recomputed: list[Tensor | None] = [None] * num_sites
        self.used: set[int] = set()
        """Sites that the forward took: two parts of a model that are called by themselves share none."""
        self.has_graph = torch.is_grad_enabled()
        """Whether its forward recorded a graph: within reentrant checkpointing of the model it does not."""
        self.done = False


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function, without a look in Python at each of its hundreds of arguments.

    `torch.autograd.Function.apply` unwraps what left a functorch transform, and nothing here has entered one.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class _Gather(torch.autograd.Function):
    """Vectors in one; cat's own gradient would take an operator a vector."""

    @staticmethod
    def forward(ctx: Any, *vectors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.sizes = [vector.numel() for vector in vectors]
        return torch.cat(vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.split_with_sizes(ctx.sizes)


class _Perturb(torch.autograd.Function):
    """All sites' perturbed matrices, from the coefficients, which depend on the priors, and the matrices."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, part: Part, draw: Draw, kappa: Tensor, priors: Tensor, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        flat = part.plan.join(matrices)
        kernels = monteclora_kernels(flat.device)
        kernels.perturb_(part.plan, flat, kappa, seed=part.seed, draw=draw.index)
        ctx.part, ctx.draw, ctx.components = part, draw, kappa.shape[1]
        ctx.set_materialize_grads(False)
        draw.flat = flat
        return part.plan.views(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        part: Part = ctx.part
        part.differentiated = True
        wanted = ctx.needs_input_grad
        d_priors = None
        like = next((grad for grad in grads if grad is not None), None)
        if wanted[3] and like is not None:
            pieces = [
                torch.zeros_like(part.matrix(site)) if grad is None else grad
                for site, grad in enumerate(grads)
            ]
            d_kappa = monteclora_kernels(like.device).coefficient_gradient(
                part.plan, part.plan.join(pieces), ctx.components, seed=part.seed, draw=ctx.draw.index
            )
            d_priors = once(_PRIORS, ctx.draw.terms.gradient(d_kappa), [*part.prior_parameters(), *grads])
        if not all(wanted[4:]):
            grads = tuple(grad if want else None for grad, want in zip(grads, wanted[4:], strict=True))
        return None, None, None, d_priors, *grads


class _PerturbAgain(torch.autograd.Function):
    """One site's perturbed matrix within a recomputation; saves no tensors."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, part: Part, draw: Draw, site: int, matrix: Tensor, std_prior: Tensor, prior: Tensor
    ) -> Tensor:
        ctx.part, ctx.draw, ctx.site = part, draw, site
        ctx.dtypes = std_prior.dtype, prior.dtype
        assert draw.flat is not None
        # The forward had no operator here, and selective checkpointing counts them.
        with _disable_current_modes() if dispatch_modes() else nullcontext():
            return part.plan.view(draw.flat, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        ctx.part.differentiated = True
        d_std = d_prior = None
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            d_std, d_prior = ctx.part.site_gradients(ctx.draw, ctx.site, grad)
            sources = [*ctx.part.prior_parameters(), grad]
            d_std = once(_PRIORS, d_std.to(ctx.dtypes[0]), sources)
            d_prior = once(_PRIORS, d_prior.to(ctx.dtypes[1]), sources)
        return None, None, None, grad if ctx.needs_input_grad[3] else None, d_std, d_prior


class _Loss(torch.autograd.Function):
    """A value that comes with its gradient in the priors."""

    @staticmethod
    def forward(ctx: Any, priors: Tensor, value: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(priors, gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        priors, gradient = ctx.saved_tensors
        return once(_PRIORS, (grad * gradient).to(priors.dtype), (priors, grad)), None, None


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
        self.device, self.dtype = a.device, a.dtype
        which = ("A", "B") if options.perturb == "both" else (options.perturb,)
        sites, site_streams = [], []
        for matrix in which:
            for i, stream in enumerate(streams):
                a, b = self.adapter_weights(i)
                cols = a.shape[1] if matrix == "A" else b.shape[0]
                site_streams.append(stream + ((1 << 20) if matrix == "B" else 0))
                sites.append(Site(a.shape[0], cols, matrix == "B", site_streams[-1]))
        self.which, self.perturbs_a, self.perturbs_b = which, "A" in which, "B" in which
        self.plan = PerturbPlan(sites, self.device)
        ranks = [site.rows for site in sites[: len(self.layers)]]
        self.tables = mm.SiteTables(ranks, len(which), site_streams, self.device)
        self.components = self.sampler(0).num_samples
        self.source = mm.NoiseSource(
            self.tables, self.components, options.outer_samples, options.dirichlet == "exact"
        )
        self.counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.scale = torch.zeros((), dtype=torch.float64, device=self.device)
        # The dictionaries that hold the modules of an adapter's name: read every step, by every layer.
        held = [layer._modules["lora_" + matrix] for matrix in which for layer in self.layers]
        self._adapters = [modules._modules for modules in held]
        self._samplers = [layer._modules["lora_monteclora_sampler"]._modules for layer in self.layers]
        self.tables.dirichlet_constants(self.components, self.sampler(0).dirichlet_prior)
        self.current: Draw | None = None
        self._prior_versions: list[int] = []
        self.differentiated = False
        """Whether a gradient has come through here since the last draw."""
        self.live: list[weakref.ref[Draw]] = []
        self._without_graph = 0
        """Draws of forwards without a graph, since the last recomputation or refusal."""

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
        return [modules[self.adapter]._parameters["weight"] for modules in self._adapters]

    def prior_parameters(self) -> list[Tensor]:
        """Return every layer's s, then every layer's e."""
        held = [modules[self.adapter]._parameters for modules in self._samplers]
        return [p["std_prior"] for p in held] + [p["expert_weights_prior"] for p in held]

    def priors(self) -> tuple[Tensor, Tensor]:
        """Return the layers' s, concatenated, and e ``(L, N)``."""
        held, count = self.prior_parameters(), len(self.layers)
        return torch.cat(held[:count]), torch.stack(held[count:])

    def _gathered(self, parameters: list[Tensor]) -> Tensor:
        """Return the flat priors, as the last forward gathered them where each can get one gradient."""
        priors = None if self.current is None else self.current.priors
        needed = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if priors is None or priors.requires_grad != needed or self._changed(parameters):
            return _apply(_Gather, *parameters)
        return priors

    def _changed(self, parameters: list[Tensor]) -> bool:
        return [p._version for p in parameters] != self._prior_versions

    def refresh(self, advance: bool) -> None:
        """Perturb all sites for a forward, by the next draw or again by the last."""
        if advance:
            self.counter.add_(1)
            self.differentiated = False
        if self.current is not None:
            # Its graph holds the priors' gradient accumulators, which keep the stream they were made on: a
            # step that is recorded in a CUDA graph after eager ones must make its own.
            self.current.priors = None
        parameters = self.prior_parameters()
        priors = _apply(_Gather, *parameters)
        self._prior_versions = [p._version for p in parameters]
        with torch.no_grad():
            index = self.counter.clone()
            small = Priors(priors, self.tables, self.components)
            noise = self.source.draw(small.alpha, seed=self.seed, draw=index)
            terms = DrawTerms(small, noise, self.options.sparse)
            kappa = terms.coefficients(self.scale, self.options.estimator == "collapsed")
        draw = Draw(index, terms, len(self.plan.sites))
        draw.priors = priors
        draw.outputs = _apply(_Perturb, self, draw, kappa, priors, *self.matrices())
        self.release()
        self.live = [ref for ref in self.live if ref() is not None]
        self.live.append(weakref.ref(draw))
        self._without_graph += not draw.has_graph
        self.current = draw

    def gradients_cleared(self) -> bool:
        """Tell whether gradients were taken since the last draw, and cleared.

        What an optimizer leaves of its step where it writes to ``p.data``, which changes no version.
        """
        return self.differentiated and not any(
            p.grad is not None for p in (*self.matrices(), *self.prior_parameters())
        )

    def release(self) -> None:
        """Let go of the graph of the last forward; its values stay for a recomputation."""
        if self.current is not None:
            self.current.outputs = ()

    def perturbed(self, site: int) -> Tensor:
        """Return a site's matrix for the forward that is running, or running again within backward."""
        if torch._C._current_graph_task_id() != -1:
            return self._again(site)
        draw = self.current
        assert draw is not None
        draw.used.add(site)
        return draw.outputs[site]

    def _again(self, site: int) -> Tensor:
        draw = self._draw_of_this_backward(site)
        found = draw.recomputed[site]
        if found is None:
            held = self.sampler(site % len(self.layers))._parameters
            found = _PerturbAgain.apply(
                self, draw, site, self.matrix(site), held["std_prior"], held["expert_weights_prior"]
            )
            draw.recomputed[site] = found
        return found

    def _draw_of_this_backward(self, site: int) -> Draw:
        live = [draw for ref in self.live if (draw := ref()) is not None]
        draws = [draw for draw in live if site in draw.used] or live
        waiting = [draw for draw in draws if draw.has_graph and not draw.done]
        count = len(waiting) or self._without_graph  # of the latter only the last is at hand
        if count > 1:
            self._without_graph = 0
            raise RuntimeError(
                f"{count} forwards of MonteCLoRA layers under gradient checkpointing wait for "
                "backward (or, after retain_graph=True, for another one), and their noise cannot be told "
                "apart; call backward() after each forward, or drop what holds the graph of the forwards "
                "that need none"
            )
        draw = waiting[0] if waiting else draws[-1]
        if not draw.done:
            again = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]

            def finish() -> None:
                draw.done, draw.recomputed = not again, [None] * len(draw.recomputed)
                self._without_graph = 0

            torch.autograd.Variable._execution_engine.queue_callback(finish)  # type: ignore[attr-defined]
        return draw

    def site_gradients(self, draw: Draw, site: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of one layer's s and e through one site, from that of its matrix."""
        layer = site % len(self.layers)
        alone = PerturbPlan([self.plan.sites[site]], self.device)
        components = draw.terms.num_coefficients
        first, rank = self.plan.first_rows[site], self.plan.sites[site].rows
        d_kappa = torch.zeros(self.plan.num_rows, components, dtype=torch.float64, device=self.device)
        d_kappa[first : first + rank] = monteclora_kernels(grad.device).coefficient_gradient(
            alone, grad.reshape(-1), components, seed=self.seed, draw=draw.index
        )
        flat = draw.terms.gradient(d_kappa)
        start, end = sum(self.tables.site_ranks[:layer]), sum(self.tables.site_ranks[: len(self.layers)])
        return flat[start : start + rank], flat[end:].view(-1, self.components)[layer]

    def loss(self, of: int) -> Tensor:
        """Return this part's share of the variational loss's mean over ``of`` sites, fp32 (fp64 for fp64)."""
        parameters = self.prior_parameters()
        priors = self._gathered(parameters)
        first, draw = self.sampler(0), self.current
        with torch.no_grad():
            terms = None if draw is None else draw.terms
            if terms is None or self._changed(parameters):
                small = Priors(priors, self.tables, self.components)
                terms = None if draw is None else DrawTerms(small, draw.noise, self.options.sparse)
            else:
                small = terms.priors
            value, gradient = small.loss(
                terms, first.dirichlet_prior, first.kl_loss_weight, first.use_entropy, share=1.0 / of
            )
            if self.dtype != torch.float64:
                value = value.float()
        return _apply(_Loss, priors, value, gradient)
