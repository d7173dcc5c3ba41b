"""S posterior samples as one batch: the patched layers that a posterior perturbs, with their samples.

The batch is repeated S times along its first dimension, sample by sample, so that the base model is read
once for all samples; ``lora_samples.py`` is what a layer then does with its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ivon_distributed import is_sharded
from .kernels.lora_perturbed_twin import Perturbation
from .lora_samples import LayerSamples, NotBatched, Pass
from .posterior_adapters import Place, places_of
from .posterior_gaussian import first_moved

if TYPE_CHECKING:
    from .posterior import Posterior
    from .posterior_gaussian import GaussianParameter


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

    def active(
        self,
        seeds: Sequence[int],
        variance_scale: float,
        rows: Mapping[nn.Module, frozenset[int]] | None = None,
        tagged: Sequence[int] = (),
    ) -> Pass:
        """Return a pass in which the layers apply sample s to the s-th of ``len(seeds)`` parts of their rows.

        Args:
            seeds: names of the samples.
            variance_scale: factor on the variance.
            rows: as for `Pass`.
            tagged: as for `Pass`.

        Raises:
            NotBatched: a layer's adapter is merged, disabled or not the only active one.
        """
        layers: dict[nn.Module, LayerSamples] = {}
        index: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for (layer, adapter), sides in self._layers.items():
            _check_active(layer, adapter)
            device = next(iter(sides.values())).parameter.device
            if device not in index:
                index[device] = _index(seeds, device)
            root, cache = math.sqrt(variance_scale), self._posterior._stds
            layers[layer] = _layer_samples(layer, adapter, sides, index[device], root, cache)
        return Pass(layers, len(seeds), rows, tagged)


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
    return LayerSamples(adapter, means[0], means[1], perturbation, dtype)


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
