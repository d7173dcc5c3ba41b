"""Prediction and generation under S posterior samples: one pass for all of them, or one pass each.

``Posterior.predict`` and ``Posterior.generate`` are these functions; ``posterior_batched.py`` is how one
pass holds several samples.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .posterior_adapters import homes
from .posterior_batched import NotBatched, SampledLayers, in_chunks

if TYPE_CHECKING:
    from .posterior import Posterior

_logger = logging.getLogger("bayeslora")

_NOT_BY_ROW = frozenset({"cache_position", "logits_to_keep", "head_mask"})
"""Arguments of forward whose first dimension is not the batch's, and which serve any batch."""

_NOT_REPEATED = ("prefix_allowed_tokens_fn", "assistant_model", "prompt_lookup_num_tokens")
"""Settings of ``generate`` that count the prompts, or take a single one."""


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
    """Check that a sample changes what the model computes; a disabled adapter is left to the caller.

    Raises:
        ValueError: the posterior's adapter is merged or not active.
    """
    for layer, adapter in homes(posterior):
        if layer.disable_adapters:
            continue
        if adapter in layer.merged_adapters:
            raise ValueError(f"adapter {adapter!r} is merged; call model.unmerge_adapter() first")
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


def _check_max_batch(max_batch: int | None) -> None:
    if max_batch is not None and check_seed(max_batch, "max_batch must be an integer") < 1:
        raise ValueError(f"max_batch must be >= 1 or None, got {max_batch!r}")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; put back what was in train mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


# ---- batches ---------------------------------------------------------------------------------------


def _rows(batch: Any) -> int:
    """Return the first dimension of the batch's first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise NotBatched("the batch holds no tensor")


def _repeated_value(name: str | None, value: Any, rows: int, times: int, least_dim: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() < least_dim or name in _NOT_BY_ROW:
            return value
        if value.shape[0] == rows and not (name == "position_ids" and value.dim() == 3):
            return value.repeat(times, *[1] * (value.dim() - 1))
        if value.shape[0] != 1:  # an image's patches, packed sequences' ends, one position an axis
            raise NotBatched(f"{name or 'a tensor'} has shape {tuple(value.shape)} for {rows} sequences")
        return value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise NotBatched(f"{name or 'the batch'} is a {type(value).__name__}, which cannot be repeated")


def _repeated(batch: Any, rows: int, times: int) -> Any:
    """Return the batch ``times`` times along the first dimension: all rows of sample 0, then of sample 1."""
    if isinstance(batch, Mapping):
        return {name: _repeated_value(name, value, rows, times, 1) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_repeated_value(None, value, rows, times, 1) for value in batch)
    return _repeated_value(None, batch, rows, times, 1)


def _one_pass_or_in_turn(
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


# ---- predict ---------------------------------------------------------------------------------------


@torch.no_grad()
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
    _check_max_batch(max_batch)
    check_in_use(posterior)
    model = posterior.model

    def folded(probabilities: Tensor) -> Tensor:
        return probabilities.sum(0, keepdim=True) if average else probabilities

    def one_pass(layers: SampledLayers) -> list[Tensor]:
        rows = _rows(batch)
        if not rows:
            raise NotBatched("the batch is empty")

        def run(chunk: Sequence[int]) -> Tensor:
            together = len(chunk) * rows
            inputs = _repeated(batch, rows, len(chunk))
            with layers.active(chunk, variance_scale, together):
                logits = _logits(_call(model, inputs))
            if logits.dim() == 0 or logits.shape[0] != together:
                raise NotBatched(f"the logits have shape {tuple(logits.shape)} for {together} sequences")
            split = logits.view(len(chunk), rows, *logits.shape[1:])
            return folded(split.float().softmax(dim=-1))

        return in_chunks(seeds, None if max_batch is None else max_batch // rows, run, _logger.info)

    def in_turn() -> list[Tensor]:
        parts: list[Tensor] = []
        for seed in seeds:
            with posterior.sample(seed, variance_scale):
                probabilities = _logits(_call(model, batch)).float().softmax(dim=-1).unsqueeze(0)
            if average and parts:
                parts[0].add_(probabilities)
            else:
                parts.append(probabilities)
        return parts

    with eval_mode(model):
        parts = _one_pass_or_in_turn(posterior, batched, one_pass, in_turn)
    if not average:
        return torch.cat(parts)
    return torch.cat(parts).sum(0).div_(len(seeds))


# ---- generate --------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    posterior: Posterior,
    inputs: Any,
    seeds: Sequence[int],
    variance_scale: float,
    *,
    num_return_sequences: int,
    batched: bool,
    max_batch: int | None,
    settings: dict[str, Any],
) -> Tensor:
    """Return token ids ``(S, batch, k, length)``; see :meth:`Posterior.generate`."""
    _check_max_batch(max_batch)
    check_in_use(posterior)
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences must be >= 1, got {num_return_sequences!r}")
    model: Any = posterior.model
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} has no generate; pass a posterior of a generative model")
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    for name in ("return_dict_in_generate", "past_key_values", "streamer"):
        if settings.get(name) is not None and settings[name] is not False:
            raise ValueError(
                f"{name} belongs to one sample; leave it out (per-sample probabilities of a text: "
                "posterior.predict(..., average=False))"
            )
    given.update(settings)
    rows = _prompts(given)

    def of_samples(arguments: dict[str, Any], count: int) -> Tensor:
        output = model.generate(**arguments, num_return_sequences=num_return_sequences)
        tokens: Tensor = getattr(output, "sequences", output)  # the configuration may ask for a dict
        return tokens.view(count, rows, num_return_sequences, -1)

    def one_pass(layers: SampledLayers) -> list[Tensor]:
        for name in _NOT_REPEATED:
            if settings.get(name) is not None:
                raise NotBatched(f"{name} is for the prompts of one sample")

        def run(chunk: Sequence[int]) -> Tensor:
            arguments = {
                name: _repeated_value(name, value, rows, len(chunk), 2)
                if isinstance(value, Tensor)
                else value
                for name, value in given.items()
            }
            with layers.active(chunk, variance_scale, len(chunk) * rows):
                return of_samples(arguments, len(chunk))

        config = settings.get("generation_config") or getattr(model, "generation_config", None)
        beams = settings.get("num_beams") or getattr(config, "num_beams", None) or 1
        a_sample = rows * max(num_return_sequences, beams)
        return in_chunks(seeds, None if max_batch is None else max_batch // a_sample, run, _logger.info)

    def in_turn() -> list[Tensor]:
        parts = []
        for seed in seeds:
            with posterior.sample(seed, variance_scale):
                parts.append(of_samples(given, 1))
        return parts

    with eval_mode(model):
        parts = _one_pass_or_in_turn(posterior, batched, one_pass, in_turn)
    return _padded(parts, _pad_token(model, settings))


def _prompts(given: Mapping[str, Any]) -> int:
    """Return the number of prompts."""
    try:
        rows = _rows(given)
    except NotBatched:
        raise TypeError(
            "inputs hold no tensor; pass token ids (batch, length), or a tokenizer's return_tensors='pt'"
        ) from None
    ids = given.get("input_ids")
    if rows < 1 or (isinstance(ids, Tensor) and ids.dim() != 2):
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else (rows,)
        raise ValueError(f"inputs have shape {shape}; pass (batch, length) with batch >= 1")
    return rows


def _pad_token(model: Any, settings: Mapping[str, Any]) -> int:
    """Return the token that ``generate`` fills finished sequences with."""
    configs = settings.get("generation_config"), getattr(model, "generation_config", None)
    values = [
        value
        for name in ("pad_token_id", "eos_token_id")
        for value in (settings.get(name), *(getattr(config, name, None) for config in configs))
    ]
    value: Any
    for value in values:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if first is not None:
            return int(first)
    return 0


def _padded(parts: Sequence[Tensor], pad: int) -> Tensor:
    """Concatenate ``(s, batch, k, length)`` of different lengths along s."""
    length = max(part.shape[-1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, length - part.shape[-1]), value=pad) for part in parts])
