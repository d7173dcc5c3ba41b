"""The noise of all MonteCLoRA layers of one adapter, drawn together once a forward.

A `MontecloraBank` belongs to one adapter of one model. Two hooks on the model open it when a forward
starts, which draws the chi-square and Dirichlet variates of all layers in one launch and their perturbed
matrices in another, and close it when the forward ends. Layers ask it for their matrices (`matrices`).

Gradient checkpointing runs a layer again within backward: the bank then hands out the values of the
forward that is being differentiated, with a graph of its own that saves no tensors, so that both the
reentrant and the other kind find what they expect. Two forwards through checkpointed layers that wait for
one backward cannot be told apart, and raise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora import monteclora_math as mm
from bayeslora._backend import monteclora_kernels
from bayeslora.kernels.monteclora_plan import PerturbPlan, Site
from bayeslora.monteclora_options import MontecloraOptions, check_scaler

_TOKEN = "bayeslora.monteclora"


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


class MontecloraBank:
    """All MonteCLoRA layers of one adapter; see the module's docstring.

    Args:
        layers: PEFT's LoRA Linear layers with a sampler for ``adapter``, in the model's order.
        adapter: its name.
        options: see `bayeslora.configure_monteclora`.
    """

    def __init__(self, layers: Sequence[Any], adapter: str, options: MontecloraOptions) -> None:
        self.layers, self.adapter = list(layers), adapter
        self.seed = int(torch.randint(2**62, ())) if options.seed is None else options.seed
        self.options = MontecloraOptions()
        self.paused = False
        self._draws = 0
        self._depth = 0
        self.loss_weight: Tensor | float = 1.0
        self.set_options(options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_depth": 0, "loss_weight": 1.0}

    def set_options(self, options: MontecloraOptions) -> None:
        """Take other options; the count of draws goes on."""
        if options.seed is not None:
            self.seed = options.seed
        before, self.options = self.options.mode, options
        self._build()
        if options.mode != before:
            for layer in self.layers:
                a, b, priors = self._trainable(layer)
                for parameter in (a, b):
                    parameter.requires_grad_(options.mode != "priors")
                for parameter in priors:
                    parameter.requires_grad_(options.mode != "mean")

    def _trainable(self, layer: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        modules = layer._modules
        a, b = (modules[name]._modules[self.adapter].weight for name in ("lora_A", "lora_B"))
        return a, b, list(modules["lora_monteclora_sampler"]._modules[self.adapter].parameters())

    def _traits(self) -> list[Any]:
        traits: list[Any] = []
        for layer in self.layers:
            weight = layer._modules["lora_A"]._modules[self.adapter]._parameters["weight"]
            traits.append((weight.device, weight.dtype, weight.shape))
        return traits

    def _build(self) -> None:
        counts = {part.device: part.counter for part in getattr(self, "parts", [])}
        members: dict[Any, list[int]] = {}
        self._built_for = self._traits()
        for i, (device, dtype, _) in enumerate(self._built_for):
            members.setdefault((device, dtype), []).append(i)
        self.parts, self._place = [], {}
        for indices in members.values():
            layers = [self.layers[i] for i in indices]
            part = Part(layers, self.adapter, indices, self.options, self.seed)
            part.counter.fill_(self._draws) if part.device not in counts else part.counter.copy_(
                counts[part.device]
            )
            for position, i in enumerate(indices):
                self._place[i] = (part, position)
            self.parts.append(part)
        self._versions: list[int] | None = None
        self.set_scale()

    def set_scale(self) -> None:
        """Write c to the device, where also a recorded CUDA graph reads it."""
        scaler = self.options.sample_scaler
        if callable(scaler):
            value = check_scaler(scaler(self._draws))
        else:
            value = self.parts[0].sampler(0).sample_scaler if scaler is None else scaler
        for part in self.parts:
            part.scale.fill_(value)

    # ---- the forward ---------------------------------------------------------------------------------

    def samples(self) -> bool:
        """Tell whether a forward here and now is perturbed."""
        return (
            not self.paused and self.options.mode != "mean" and any(layer.training for layer in self.layers)
        )

    def perturbs(self, layer: Any) -> bool:
        """Tell whether a call of ``layer`` here and now is perturbed."""
        return layer.training and not self.paused and self.options.mode != "mean"

    def open(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Start a forward of the model: its forward-pre hook."""
        if torch.compiler.is_compiling():
            return _eager(self.open, module, args, kwargs)
        self._depth += 1
        if self._depth == 1 and torch._C._current_graph_task_id() == -1:
            self.loss_weight = _share_of_batch(module, kwargs)
            if self.samples():
                self.refresh()

    def close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """End a forward of the model: its forward hook, also called (without output) on an exception."""
        if torch.compiler.is_compiling():
            return _eager(self.close, module, args, kwargs, output)
        self._depth = max(self._depth - 1, 0)
        if self._depth or torch._C._current_graph_task_id() != -1 or not self.samples():
            return
        node = _graph_node(output)
        for part in self.parts:
            if node is not None and part.current is not None:
                node.metadata.setdefault(_TOKEN, []).append(part.current)
            part.release()
        if self.options.add_loss and getattr(output, "loss", None) is not None:
            output.loss = output.loss + self.weighted_loss().to(output.loss.dtype)

    def refresh(self) -> None:
        """Perturb every layer's matrices, by a new draw unless this optimizer step has one."""
        if self._traits() != self._built_for:
            self._build()
        advance = True
        if self.options.resample == "step":
            versions = [p._version for layer in self.layers for p in self._all_parameters(layer)]
            advance, self._versions = versions != self._versions, versions
        if advance:
            self._draws += 1
            if callable(self.options.sample_scaler):
                self.set_scale()
        for part in self.parts:
            part.refresh(advance)

    def _all_parameters(self, layer: Any) -> list[Tensor]:
        a, b, priors = self._trainable(layer)
        return [a, b, *priors]

    def matrices(self, index: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands in A's and B's places in a call of layer ``index``."""
        if torch.compiler.is_compiling():
            return _eager(self.matrices, index, a, b)
        if not self.perturbs(self.layers[index]):
            return a, b
        part, i = self._place[index]
        if self._depth == 0 and torch._C._current_graph_task_id() == -1:
            self.refresh()  # called by itself, outside a forward of the model
        count = len(part.layers)
        if part.which == ("A",):
            return part.perturbed(i), b
        if part.which == ("B",):
            return a, part.perturbed(i)
        return part.perturbed(i), part.perturbed(count + i)

    # ---- the loss ------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """Return the variational loss, the mean over sites, an fp32 scalar (fp64 for fp64 adapters)."""
        totals, counts = zip(*(part.loss() for part in self.parts), strict=True)
        device = totals[0].device
        total = sum((t.to(device) for t in totals[1:]), start=totals[0])
        loss = total / sum(counts)
        return loss if self._built_for[0][1] == torch.float64 else loss.float()

    def weighted_loss(self) -> Tensor:
        """Return the loss times the last forward's share of its optimizer step's tokens."""
        weight = self.loss_weight
        return self.loss() * (weight.to(self.parts[0].device) if isinstance(weight, Tensor) else weight)


@torch.compiler.disable
def _eager(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method outside the graph that is being compiled."""
    return method(*arguments)


def _share_of_batch(module: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """Return the part of an accumulated batch that a forward holds.

    A trainer that gives the model ``num_items_in_batch`` has it divide the loss by that, not by the number
    of micro-batches; so must the variational loss, which is added to each.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    get_base = getattr(module, "get_base_model", None)
    name = type(get_base() if get_base is not None else module).__name__
    if "CausalLM" in name:
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / items


def _graph_node(output: Any) -> Any:
    """Return a node of the graph of a model's output, or None."""
    values = output.values() if isinstance(output, dict) else output
    for value in (values,) if isinstance(values, Tensor) else (values or ()):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            return value.grad_fn
    return None


def add_hooks(model: nn.Module, bank: MontecloraBank) -> None:
    """Open and close ``bank`` with every forward of ``model``."""
    model.register_forward_pre_hook(bank.open, with_kwargs=True)
    model.register_forward_hook(bank.close, with_kwargs=True, always_call=True)


def remove_hooks(module: nn.Module) -> None:
    """Take out what `add_hooks` put in."""
    hook_dicts: list[dict[int, Callable[..., Any]]] = [module._forward_pre_hooks, module._forward_hooks]
    for hooks in hook_dicts:
        for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), MontecloraBank)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
