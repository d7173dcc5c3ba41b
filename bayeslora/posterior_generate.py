"""Generation under S posterior samples: one batch and one KV cache for all of them, or one after another.

``Posterior.generate`` is this function.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .lora_samples import NotBatched
from .posterior_batched import SampledLayers
from .posterior_order import SCALARS, ByRow, count_rows
from .posterior_predict import check_in_use, check_max_batch, in_passes, one_pass_or_in_turn, own_copies
from .reversible import Inference

if TYPE_CHECKING:
    from .posterior import Posterior

_NOT_REPEATED = ("prefix_allowed_tokens_fn", "assistant_model", "prompt_lookup_num_tokens", "custom_generate")
"""Settings of ``generate`` that count the prompts, take a single one, or are code of their own."""

_PROBE = {
    "max_length": None,
    "min_length": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
"""How a probe generates the prompt's next token and one more, with the logits as the model gives them."""

_LAYOUT = ("use_cache", "cache_implementation", "guidance_scale")
"""Settings of ``generate`` that change how the model is called."""


def generate(
    posterior: Posterior,
    inputs: Any,
    seeds: Sequence[int],
    variance_scale: float,
    *,
    num_return_sequences: int | None,
    batched: bool,
    max_batch: int | None,
    settings: dict[str, Any],
) -> Tensor:
    """Return token ids ``(S, batch, k, length)``; see :meth:`Posterior.generate`."""
    check_max_batch(max_batch)
    check_in_use(posterior)
    if num_return_sequences is not None and num_return_sequences < 1:
        raise ValueError(f"num_return_sequences must be >= 1, got {num_return_sequences!r}")
    model: Any = posterior.model
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} has no generate; pass a posterior of a generative model")
    for name in ("return_dict_in_generate", "streamer"):
        if settings.get(name) is not None and settings[name] is not False:
            raise ValueError(
                f"{name} belongs to one sample; leave it out (per-sample probabilities of a text: "
                "posterior.predict(..., average=False))"
            )
    if num_return_sequences is not None:
        settings = {**settings, "num_return_sequences": num_return_sequences}
    given = {**(inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}), **settings}
    rows = _prompts(given)
    k = _setting(model, settings, "num_return_sequences") or 1
    expansion = max(k, _setting(model, settings, "num_beams") or 1)

    def of_samples(arguments: dict[str, Any], count: int) -> Tensor:
        output = model.generate(**arguments)
        tokens: Tensor = getattr(output, "sequences", output)  # the configuration may ask for a dict
        return tokens.view(count, rows, k, -1)

    def one_pass(layers: SampledLayers) -> list[Tensor]:
        for name in _NOT_REPEATED:
            if settings.get(name) is not None:
                raise NotBatched(f"{name} is for the prompts of one sample")
        by_row = ByRow(given, 2, lambda name, value: name in settings and _serves_all(value))
        config = settings.get("generation_config") or getattr(model, "generation_config", None)
        if config is None:
            raise NotBatched("the model has no generation_config")
        config = copy.deepcopy(config)
        config.update(**{name: value for name, value in settings.items() if hasattr(config, name)})
        steps = 1 if _is_one_token(model, settings, given) else 2
        config.update(**_PROBE, max_new_tokens=steps, min_new_tokens=steps)
        kind = [value for value in by_row.kind if not hasattr(config, value[0])]
        kind += [steps, *(getattr(config, name, None) for name in _LAYOUT)]

        def probe(arguments: dict[str, Any]) -> Sequence[Tensor]:
            for name in settings:
                if hasattr(config, name) or not isinstance(arguments[name], Tensor):
                    del arguments[name]
            output = model.generate(**arguments, generation_config=config, logits_processor=[_last_again])
            logits: Sequence[Tensor] = output.logits
            return logits

        return in_passes(
            posterior, layers, by_row, tuple(kind), seeds, variance_scale,
            most=None if max_batch is None else max_batch // (rows * expansion),
            expansion=expansion, run=of_samples, probe=probe,
        )  # fmt: skip

    def in_turn() -> list[Tensor]:
        samples = (posterior.sample(seed, variance_scale) for seed in seeds)
        return [sample.run(lambda: of_samples(own_copies(given), 1)) for sample in samples]

    @torch.no_grad()
    def results() -> list[Tensor]:
        return one_pass_or_in_turn(posterior, batched, one_pass, in_turn)

    parts = Inference(model).run(results)
    return _padded(parts, _pad_token(model, settings))


def _last_again(ids: Tensor, scores: Tensor) -> Tensor:
    """Return scores by which every row goes on with its last token, whatever the model makes of it."""
    return torch.full_like(scores, -torch.inf).scatter(1, ids[:, -1:], 0.0)


def _prompts(given: Mapping[str, Any]) -> int:
    """Return the number of prompts."""
    try:
        rows = count_rows(given)
    except NotBatched:
        raise TypeError(
            "inputs hold no tensor; pass token ids (batch, length), or a tokenizer's return_tensors='pt'"
        ) from None
    ids = given.get("input_ids")
    if rows < 1 or (isinstance(ids, Tensor) and ids.dim() != 2):
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else (rows,)
        raise ValueError(f"inputs have shape {shape}; pass (batch, length) with batch >= 1")
    return rows


def _setting(model: Any, settings: Mapping[str, Any], name: str) -> Any:
    """Return what ``generate`` takes for a setting: an argument, the configuration's value or the model's."""
    configs = settings.get("generation_config"), getattr(model, "generation_config", None)
    values = (settings.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _is_one_token(model: Any, settings: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Tell whether one token is asked for: the model may have no position for another."""
    new, longest = (_setting(model, settings, name) for name in ("max_new_tokens", "max_length"))
    ids = given.get("input_ids")
    read = ids.shape[1] if isinstance(ids, Tensor) else 0
    return bool(new == 1 or (new is None and longest is not None and longest <= read + 1))


def _serves_all(value: Any) -> bool:
    """Tell whether a setting of ``generate`` serves any number of prompts: one that holds no tensors."""
    if isinstance(value, (list, tuple, Mapping)):
        return all(map(_serves_all, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, SCALARS) or callable(value) or hasattr(value, "to_dict")


def _pad_token(model: Any, settings: Mapping[str, Any]) -> int:
    """Return the token that ``generate`` fills finished sequences with."""
    value = _setting(model, settings, "pad_token_id")
    value = _setting(model, settings, "eos_token_id") if value is None else value
    first = value[0] if isinstance(value, (list, tuple)) else value
    return 0 if first is None else int(first)


def _padded(parts: Sequence[Tensor], pad: int) -> Tensor:
    """Concatenate ``(s, batch, k, length)`` of different lengths along s."""
    length = max(part.shape[-1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, length - part.shape[-1]), value=pad) for part in parts])
