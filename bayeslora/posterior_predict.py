"""Prediction under S posterior samples: one pass for all of them, or one pass each.

``Posterior.predict`` is this function; ``posterior_batched.py`` is how one pass holds several samples,
``posterior_order.py`` whether a model lets it.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ivon_distributed import is_sharded
from .lora_samples import NotBatched
from .posterior_adapters import homes
from .posterior_batched import SampledLayers, in_chunks
from .posterior_order import SCALARS, ByRow, RowOrder, changed, find_order
from .reversible import Inference

if TYPE_CHECKING:
    from .posterior import Posterior

_logger = logging.getLogger("bayeslora")


def check_seeds(num_samples: int | None, seed: int, seeds: Sequence[int] | None, default: int) -> list[int]:
    """Return the names of the samples.

    Raises:
        ValueError: there are none, or ``seeds`` has another length than ``num_samples``.
        TypeError: ``num_samples`` or a seed is not an integer, or ``seeds`` not a sequence of them.
    """
    if num_samples is not None and check_seed(num_samples, "num_samples must be an integer") < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples!r}")
    if seeds is None:
        first = check_seed(seed)
        return list(range(first, first + (num_samples or default)))
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds must be a sequence of integers, got {seeds!r}; one alone: seeds=[{seeds!r}]")
    names = [check_seed(name, "seeds must be integers") for name in seeds]
    if not names or (num_samples is not None and len(names) != num_samples):
        raise ValueError(
            f"seeds has {len(names)} elements for num_samples={num_samples!r}; pass one seed a sample"
        )
    return names


def check_seed(seed: Any, rule: str = "seed must be an integer") -> int:
    """Return an integer of Python's, numpy's or torch's as Python's.

    Raises:
        TypeError: it is none.
    """
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)
    except TypeError:
        pass
    raise TypeError(f"{rule}, got {seed!r}")


def check_in_use(posterior: Posterior) -> None:
    """Check that a sample changes what the model computes.

    Raises:
        ValueError: a parameter is no longer in the model, the adapters are disabled, one of them is merged,
            or the posterior's is not active.
    """
    there = {id(p) for module in posterior.model.modules() for p in module._parameters.values()}
    for name, p in posterior._tensors().items():
        if id(p) not in there and not is_sharded(p):  # FSDP puts others in its place
            raise ValueError(
                f"{name} is no longer in the model (merged, unloaded or deleted), so samples would change "
                "nothing; load the posterior onto a base model with Posterior.from_pretrained"
            )
    for layer, adapter in homes(posterior):
        if layer.disable_adapters:
            raise ValueError(
                "the model's adapters are disabled, so samples would change nothing; leave the "
                "disable_adapter() context, or call model.enable_adapter_layers()"
            )
        merged = list(getattr(layer, "merged_adapters", ()))
        if merged:
            raise ValueError(
                f"adapter {merged[0]!r} is merged, so samples of {adapter!r} would change nothing; call "
                "model.unmerge_adapter() first"
            )
        if adapter not in layer.active_adapters:
            raise ValueError(
                f"the posterior is adapter {adapter!r}'s, active is {layer.active_adapters}; call "
                f"model.set_adapter({adapter!r}) first"
            )


def check_scale(variance_scale: float, ess_scale: float | None) -> float:
    """Return the factor on the variance that the two say: ``ess_scale = 1 / variance_scale``.

    Raises:
        ValueError: one is out of range, or both are given.
    """
    if not 0.0 <= variance_scale < math.inf:
        raise ValueError(f"variance_scale must be finite and >= 0, got {variance_scale!r}")
    if ess_scale is None:
        return variance_scale
    if not ess_scale > 0.0:
        raise ValueError(f"ess_scale must be > 0 (inf: the mean), got {ess_scale!r}")
    if variance_scale != 1.0:
        raise ValueError(
            f"variance_scale={variance_scale!r} and ess_scale={ess_scale!r} are two names of one scale; "
            "pass one of them"
        )
    return 1.0 / ess_scale


def check_max_batch(max_batch: int | None) -> None:
    """Raise ValueError or TypeError where ``max_batch`` is no number of rows."""
    if max_batch is not None and check_seed(max_batch, "max_batch must be an integer") < 1:
        raise ValueError(f"max_batch must be >= 1 or None, got {max_batch!r}")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits or have .logits in its output, got {type(output).__name__}"
        )
    return logits


def own_copies(batch: Any) -> Any:
    """Return the batch with copies of what a call may change: every sample is to find the same cache.

    Raises:
        TypeError: something cannot be copied.
    """

    def own(name: str | None, value: Any) -> Any:
        if isinstance(value, (Tensor, nn.Module, *SCALARS)):
            return value
        try:
            return copy.deepcopy(value)
        except Exception as error:
            raise TypeError(
                f"each sample needs a copy of {name or 'the batch'}, a {type(value).__name__}: {error}"
            ) from error

    return changed(batch, own)


def one_pass_or_in_turn(
    posterior: Posterior,
    batched: bool,
    one_pass: Callable[[SampledLayers], list[Tensor]],
    in_turn: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """Run ``one_pass``; where the samples cannot share a pass, log why and run ``in_turn``."""
    if batched:
        try:
            return one_pass(SampledLayers(posterior))
        except NotBatched as reason:
            message = str(reason)
        _logger.info("samples run one after another: %s", message)
    return in_turn()


def in_passes(
    posterior: Posterior,
    layers: SampledLayers,
    batch: ByRow,
    kind: Any,
    seeds: Sequence[int],
    variance_scale: float,
    *,
    most: int | None,
    expansion: int,
    run: Callable[[Any, int], Tensor],
    probe: Callable[[Any], Sequence[Tensor]],
) -> list[Tensor]:
    """Return the results of all samples, as many in a pass as fit.

    Args:
        posterior: whose samples.
        layers: those that it perturbs.
        batch: of one sample.
        kind: names all that the order of the model's rows can depend on.
        seeds: names of the samples.
        variance_scale: factor on the variance.
        most: samples of one pass; None for all.
        expansion: rows that the model makes of one.
        run: calls the model with the batch of so many samples.
        probe: as ``run`` of `find_order`.

    Raises:
        NotBatched: the model does not keep samples apart.
    """
    model = posterior.model

    def find() -> RowOrder:
        return find_order(layers, model, batch, probe, seeds[0], variance_scale)

    try:
        order = posterior._orders.get(model, kind, find)
    except (NotBatched, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it may come of the batch: then a pass a sample raises it too
        raise NotBatched(f"a pass of several sequences fails: {type(error).__name__}: {error}") from error

    def one_pass(chunk: Sequence[int]) -> Tensor:
        together = len(chunk) * batch.rows
        rows = order.rows({together, together * expansion}, batch.sizes)
        inputs = batch.repeated(len(chunk))
        return layers.active(chunk, variance_scale, rows).run(lambda: run(inputs, len(chunk)))

    try:
        return in_chunks(seeds, most, one_pass, _logger.info)
    except NotBatched as reason:
        posterior._orders.refuse(kind, str(reason))
        raise


# ---- predict ---------------------------------------------------------------------------------------


def predict(
    posterior: Posterior,
    batch: Any,
    seeds: Sequence[int],
    variance_scale: float,
    *,
    batched: bool,
    max_batch: int | None,
    average: bool,
) -> Tensor:
    """Return probabilities, averaged or of each sample; see :meth:`Posterior.predict`."""
    check_max_batch(max_batch)
    check_in_use(posterior)
    model = posterior.model

    def folded(probabilities: Tensor) -> Tensor:
        return probabilities.sum(0, keepdim=True) if average else probabilities

    def one_pass(layers: SampledLayers) -> list[Tensor]:
        by_row = ByRow(batch)

        def run(inputs: Any, count: int) -> Tensor:
            logits, together = _logits(_call(model, inputs)), count * by_row.rows
            if logits.dim() == 0 or logits.shape[0] != together:
                raise NotBatched(f"the logits have shape {tuple(logits.shape)} for {together} sequences")
            split = logits.view(count, by_row.rows, *logits.shape[1:])
            return folded(split.float().softmax(dim=-1))

        return in_passes(
            posterior, layers, by_row, by_row.kind, seeds, variance_scale,
            most=None if max_batch is None else max_batch // by_row.rows,
            expansion=1, run=run, probe=lambda inputs: [_logits(_call(model, inputs))],
        )  # fmt: skip

    def in_turn() -> list[Tensor]:
        parts: list[Tensor] = []
        for seed in seeds:
            sample = posterior.sample(seed, variance_scale)
            logits = sample.run(lambda: _logits(_call(model, own_copies(batch))))
            probabilities = logits.float().softmax(dim=-1).unsqueeze(0)
            if average and parts:
                parts[0].add_(probabilities)
            else:
                parts.append(probabilities)
        return parts

    @torch.no_grad()
    def results() -> list[Tensor]:
        return one_pass_or_in_turn(posterior, batched, one_pass, in_turn)

    parts = Inference(model).run(results)
    if not average:
        return torch.cat(parts)
    return torch.cat(parts).sum(0).div_(len(seeds))
