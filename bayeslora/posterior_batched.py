"""S posterior samples as one batch: every patched LoRA layer perturbs its rows by the sample they belong to.

The batch is repeated S times along its first dimension, sample by sample, and each layer cuts the rows it
gets into S groups::

    y_s = x_s Wᵀ + bias + scaling · x_s A_sᵀ B_sᵀ        A_s = A + σ_A ⊙ z(seed_s), B_s likewise

so the base model is read once for all samples. A and B are the posterior's own fp32 mean; nothing is
written into the model. Two routes with the same numbers, up to the rounding of the products:

- on a GPU, A and B are perturbed inside the kernels (``lora_perturbed.py``): no sample in memory;
- elsewhere, and where every sample takes few rows (a step of decoding), the samples are written once and
  kept while the context is open: three products of torch's own, which cost the host less. That is done up
  to a quarter of the layer's own memory; from 64 samples of one row on always, since the GPU is faster too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._backend import uses_triton
from .ivon_distributed import is_sharded
from .kernels import lora_perturbed_twin as twin
from .kernels.lora_perturbed_twin import Perturbation
from .lora_linear import LoraWeights, compute_dtype
from .lora_products import cast
from .posterior_adapters import Place, places_of
from .posterior_gaussian import first_moved

if TYPE_CHECKING:
    from .posterior import Posterior
    from .posterior_gaussian import GaussianParameter

SLOT = "_posterior_samples"
"""Name in a layer's ``__dict__`` of its `LayerSamples`, there while a context is open."""

_KEPT_ROWS, _KEPT_FROM = 16, 64
_KEPT_SHARE = 4  # below that number, samples are kept where they take at most this part of the weight


_ALIKE = 0.05
"""Relative distance up to which two samples' inputs of the first layer are one input, differently rounded."""


class NotBatched(Exception):
    """A call that samples cannot share; the message says why."""


class RowOrder:
    """The rows of one batch of all samples, sample by sample, and whether a model keeps them first.

    A model that puts the sequence before the batch (XLNet) would have every sample read a part of all
    sequences. Shapes alone do not always tell; but until the first layer has added its sample, all samples
    read the same.

    Args:
        rows: of all samples together; the first dimension of every layer's input is a multiple.
        groups: the number of samples.
    """

    def __init__(self, rows: int, groups: int) -> None:
        self._rows, self._groups = rows, groups
        self._seen = groups == 1

    def check(self, x: Tensor) -> None:
        """Raise NotBatched unless x, which a layer reads, holds whole sequences of all samples in order."""
        if x.dim() < 2 or x.shape[0] % self._rows:
            raise NotBatched(f"a layer reads a tensor of shape {tuple(x.shape)} for {self._rows} sequences")
        if torch.compiler.is_compiling() or self._seen:
            return
        self._seen = True
        if x.dim() < 3 or x.shape[1] % self._rows or x.numel() == 0:
            return  # its second dimension cannot be the batch
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        parts = x.reshape(self._groups, -1)
        apart = torch.linalg.vector_norm((parts - parts[0]).float(), dim=1)
        if bool((apart > _ALIKE * torch.linalg.vector_norm(parts[0].float())).any()):
            raise NotBatched(f"a layer reads a tensor of shape {tuple(x.shape)}, the batch not first")


class LayerSamples:
    """The samples of one layer's A and B, one a group of rows.

    Args:
        adapter: name of the adapter that A and B are of.
        lora_a: ``(r, K)``, the mean of A, contiguous, fp32 or fp64.
        lora_b: ``(N, r)``, the mean of B, likewise.
        perturbation: standard deviations in the means' dtype, seeds, draws and streams.
        parameter_dtype: of the parameter that a sample would be written into, and rounded to.
        order: of the rows of all samples, one for all layers.
    """

    def __init__(
        self,
        adapter: str,
        lora_a: Tensor,
        lora_b: Tensor,
        perturbation: Perturbation,
        parameter_dtype: torch.dtype,
        order: RowOrder,
    ) -> None:
        self.adapter = adapter
        self.lora_a, self.lora_b = lora_a, lora_b
        self.perturbation = perturbation
        self.parameter_dtype = parameter_dtype
        self.order = order
        self._kept: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        """Return the layer's output ``(..., N)`` for x ``(S·b, ..., K)``, in x's dtype or autocast's.

        Raises:
            NotBatched: x's first dimension does not hold whole sequences of all samples, or a sample in
                the parameter's dtype would be rounded twice.
        """
        self.order.check(x)
        dtype = compute_dtype(x, weight)
        if self.parameter_dtype not in (dtype, torch.float32, torch.float64):
            raise NotBatched(f"{self.parameter_dtype} adapters in a computation in {dtype}")
        if torch.compiler.is_compiling():
            from .lora_perturbed_ops import perturbed_lora_linear

            matrices = self.lora_a, self.lora_b
            return perturbed_lora_linear(x, weight, bias, *matrices, *self.perturbation, scaling, dtype)
        if dtype == torch.float64 or not uses_triton(x.device) or self._keeps(x, weight):
            if torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    return self._products(x, weight, bias, scaling, dtype)
            return self._products(x, weight, bias, scaling, dtype)
        from .lora_perturbed import perturbed_layer

        layer = LoraWeights(weight, bias, self.lora_a, self.lora_b)
        return perturbed_layer(x, layer, scaling, self.perturbation, 0.0, None, dtype)

    def _keeps(self, x: Tensor, weight: Tensor) -> bool:
        """Tell whether written samples are to serve a GPU's call: few rows a sample, and memory for them."""
        groups = self.perturbation.seeds.numel()
        rows = x.numel() // (groups * x.shape[-1])
        if rows > _KEPT_ROWS:
            return False
        if rows == 1 and groups >= _KEPT_FROM:
            return True
        share = groups * (self.lora_a.numel() + self.lora_b.numel()) * _KEPT_SHARE
        return share <= weight.numel() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def _products(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        a, b = self._written(dtype)
        x = cast(x, dtype)
        y = F.linear(x, cast(weight, dtype), None if bias is None else cast(bias, dtype))
        hidden = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]), a.mT)
        y.view(a.shape[0], -1, y.shape[-1]).baddbmm_(hidden, b.mT, alpha=scaling)
        return y

    def _written(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the samples of A ``(S, r, K)`` and B ``(S, N, r)``, written at the first call."""
        if dtype not in self._kept:
            ops: Any = twin
            if uses_triton(self.lora_a.device) and dtype != torch.float64:
                from .kernels import lora_perturbed as ops
            p = self.perturbation
            index = p.seeds, p.draws
            self._kept[dtype] = (
                ops.sample_factors(self.lora_a, p.a_std, *index, p.a_stream, dtype),
                ops.sample_factors(self.lora_b, p.b_std, *index, p.b_stream, dtype),
            )
        return self._kept[dtype]


class SampledLayers:
    """The layers that a posterior perturbs, with their Gaussians; kept between contexts.

    Args:
        posterior: an IVON posterior.

    Raises:
        NotBatched: some of the posterior is not a patched layer's A or B.
    """

    def __init__(self, posterior: Posterior) -> None:
        if not posterior.parameters:
            raise NotBatched("its samples are not named Gaussians")
        self._posterior = posterior
        moved = first_moved(posterior.fixed)
        if moved is not None:
            raise NotBatched(f"{moved} has changed since the posterior was made")
        held = places_of(posterior)
        found: dict[tuple[nn.Module, str], dict[str, GaussianParameter]] = {}
        for name, gaussian in posterior.parameters.items():
            if is_sharded(gaussian.parameter):
                raise NotBatched(f"{name} is sharded")
            places = held.get(name, [])
            if not places or not all(_is_patched_matrix(place, gaussian.parameter) for place in places):
                raise NotBatched(f"{name} is not lora_A or lora_B of a patched layer")
            for place in places:  # several where layers share the matrix
                found.setdefault((place.layer, place.adapter), {})[place.side] = gaussian
        self._layers = found

    @contextmanager
    def active(self, seeds: Sequence[int], variance_scale: float, rows: int) -> Iterator[None]:
        """Let the layers apply sample s to the s-th of ``len(seeds)`` equal parts of their rows.

        Args:
            seeds: names of the samples.
            variance_scale: factor on the variance.
            rows: the batch's first dimension, all samples together.

        Raises:
            NotBatched: a layer's adapter is merged, disabled or not the only active one.
        """
        layers: list[tuple[Any, Any]] = []
        index: dict[torch.device, tuple[Tensor, Tensor]] = {}
        cache, order = self._posterior._stds, RowOrder(rows, len(seeds))
        for (layer, adapter), sides in self._layers.items():
            _check_active(layer, adapter)
            device = next(iter(sides.values())).parameter.device
            if device not in index:
                index[device] = _index(seeds, device)
            samples = _layer_samples(
                layer, adapter, sides, index[device], math.sqrt(variance_scale), order, cache
            )
            layers.append((layer, samples))
        before = [layer.__dict__.get(SLOT) for layer, _ in layers]
        try:
            for layer, samples in layers:
                layer.__dict__[SLOT] = samples
            yield
        finally:
            for (layer, _), previous in zip(layers, before, strict=True):
                if previous is None:
                    layer.__dict__.pop(SLOT, None)
                else:
                    layer.__dict__[SLOT] = previous


def _is_patched_matrix(place: Place, parameter: Tensor) -> bool:
    """Tell whether a place is A or B of a patched layer, which reads the parameter as it is."""
    from .patching import FusedLoraLinear

    if type(place.layer) is not FusedLoraLinear or place.side not in ("lora_A", "lora_B"):
        return False
    held = getattr(place.layer, place.side)
    if place.adapter not in held or held[place.adapter].weight is not place.tensor:
        return False  # another one was put there
    return place.tensor.shape == parameter.shape and place.tensor.stride() == parameter.stride()


def _check_active(layer: Any, adapter: str) -> None:
    from .patching import _active_adapters, _unsupported

    active = _active_adapters(layer)
    if layer._disable_adapters or layer.merged_adapters or active != [adapter]:
        raise NotBatched(f"adapter {adapter!r} is merged, disabled or not the only active one")
    if adapter in layer.__dict__.get("_monteclora", ()):
        raise NotBatched("MonteCLoRA draws noise of its own")
    reason = _unsupported(layer, adapter)
    if reason is not None:
        raise NotBatched(reason)


def _index(seeds: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    signed = [(seed + (1 << 63)) % (1 << 64) - (1 << 63) for seed in seeds]
    return torch.tensor(signed, device=device), torch.zeros(len(signed), dtype=torch.int64, device=device)


def _std(gaussian: GaussianParameter, cache: dict[int, tuple[Any, Tensor]]) -> Tensor:
    """Return σ = 1 / sqrt(λ (h + δ)) on the parameter's device; made anew where h has changed."""
    hess, device = gaussian.hess, gaussian.parameter.device
    key = hess.data_ptr(), hess._version, device, gaussian.ess, gaussian.weight_decay
    found = cache.get(gaussian.stream)
    if found is None or found[0] != key:
        std = (gaussian.ess * (hess.to(device) + gaussian.weight_decay)).rsqrt_().contiguous()
        found = cache[gaussian.stream] = key, std
    return found[1]


def _layer_samples(
    layer: Any,
    adapter: str,
    sides: dict[str, GaussianParameter],
    index: tuple[Tensor, Tensor],
    root: float,
    order: RowOrder,
    cache: dict[int, tuple[Any, Tensor]],
) -> LayerSamples:
    """Return a layer's samples; ``root`` is the factor on the standard deviation."""
    means, stds, streams = [], [], []
    for side in ("lora_A", "lora_B"):
        parameter = getattr(layer, side)[adapter].weight.detach()
        gaussian = sides.get(side)
        if gaussian is None:  # trained at its mean, or frozen
            means.append(parameter.contiguous())
            stds.append(torch.zeros_like(parameter, dtype=torch.float32))
            streams.append(0)
        else:
            std = _std(gaussian, cache)
            means.append(gaussian.mean.to(parameter.device).contiguous())
            stds.append(std if root == 1.0 else std * root)
            streams.append(gaussian.stream)
    dtype = next(iter(sides.values())).parameter.dtype
    perturbation = Perturbation(stds[0], stds[1], *index, streams[0], streams[1])
    return LayerSamples(adapter, means[0], means[1], perturbation, dtype, order)


def in_chunks(
    seeds: Sequence[int], most: int | None, run: Callable[[Sequence[int]], Tensor], log: Callable[[str], None]
) -> list[Tensor]:
    """Run the samples in chunks of at most ``most``; halve the chunk where memory runs out.

    Args:
        seeds: names of the samples.
        most: samples of one chunk; None for all.
        run: gives the result of one chunk.
        log: is told what was too large.
    """
    size = len(seeds) if most is None else max(1, min(most, len(seeds)))
    results: list[Tensor] = []
    done = 0
    while done < len(seeds):
        chunk = seeds[done : done + size]
        try:
            results.append(run(chunk))
            done += len(chunk)
            continue
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
        size = (len(chunk) + 1) // 2  # after the handler, so that its frames hold no memory
        log(f"out of memory with {len(chunk)} samples at once; going on with {size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results
