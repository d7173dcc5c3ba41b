"""What a fine-tuning run is told: which scoring suits its model, what its rows lose, how it ended.

Nothing here prints: each finding is a sentence that says what was seen and what to try.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Question
from .finetune import ProgressFn, pad_token, predict
from .metrics import nll
from .scoring import METHODS, TEMPLATES, EncodedQuestion, check_template, encode

__all__ = ["Look", "about_rows", "about_samples", "about_training", "choose", "few", "look", "ways_to_score"]

_FEW = 32
_FALLBACK = ("mean_loglik", "letter")  # where the base model shows nothing: texts are learned sooner
_FAR = 0.1  # nats


@dataclass(frozen=True)
class Look:
    """How the base model does on a few rows with one way to score them."""

    scoring: str
    accuracy: float
    nll: float


def ways_to_score(template: str | None) -> dict[str, str]:
    """Return the scorings a prompt serves, each with its template: with ``{choices}`` letters, else texts."""
    if template is None:
        return dict(TEMPLATES)
    listed = "{choices}" in template
    return {m: check_template(m, template) for m in METHODS if (m == "letter") == listed}


def few(items: Sequence[Any]) -> list[Any]:
    """Return up to 32 items, evenly spaced, since files are often sorted by class."""
    count = min(_FEW, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def look(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    scoring: str,
    template: str,
    max_length: int | None = None,
    *,
    on_progress: ProgressFn | None = None,
) -> Look:
    """Ask the base model a few of the questions."""
    asked = few(questions)
    encoded = encode(asked, tokenizer, scoring, template, max_length)
    probs = predict(model, encoded, pad_token_id=pad_token(tokenizer), on_progress=on_progress)
    labels = torch.tensor([question.answer for question in asked])
    return Look(scoring, float((probs.argmax(-1) == labels).double().mean()), nll(probs, labels))


def choose(looks: Sequence[Look], questions: Sequence[Question]) -> tuple[str, str]:
    """Return the scoring to take, and a sentence that says why.

    The most accurate one; of those within a standard error of it, the one of least NLL. Where even that is
    not a standard error above chance, texts a token, if the prompt allows.
    """
    asked = few(questions)
    chance = sum(1 / len(question.choices) for question in asked) / len(asked)
    best = max(one.accuracy for one in looks)
    error = math.sqrt(max(best * (1 - best), chance * (1 - chance)) / len(asked))
    seen = ", ".join(f"{one.accuracy:.0%} by {one.scoring}" for one in looks)
    seen = f"of {len(asked)} rows the base model gets {seen} right, and guessing {chance:.0%}"
    if best < chance + error:
        known = {one.scoring for one in looks}
        return next(name for name in _FALLBACK if name in known), f"{seen}: none is clearly better"
    close = [one for one in looks if one.accuracy >= best - error]
    return min(close, key=lambda one: one.nll).scoring, seen


def about_rows(
    questions: Sequence[Question], encoded: Sequence[EncodedQuestion], positions: int | None
) -> list[str]:
    """Say what is wrong with rows that can be trained on all the same.

    Args:
        questions: the rows.
        encoded: the same, encoded.
        positions: the longest input the model was made for; None where it does not say.
    """
    found = []
    cut = [question.dropped for question in encoded if question.dropped]
    if cut:
        found.append(
            f"{len(cut)} of {len(encoded)} prompts lost their start, up to {max(cut)} tokens, to --max-length"
        )
    twice = [i for i, q in enumerate(questions) if len({c.strip() for c in q.choices}) < len(q.choices)]
    if twice:
        found.append(
            f"{len(twice)} of {len(questions)} rows have a choice twice, first row {twice[0] + 1}: "
            "only one of the two counts as right"
        )
    longest = max((question.length for question in encoded), default=0)
    if positions is not None and longest > positions:
        found.append(
            f"the longest input has {longest} tokens and the model was made for {positions}; "
            f"pass --max-length {positions}"
        )
    return found


def about_training(losses: Sequence[float], questions: Sequence[Question], scoring: str) -> list[str]:
    """Say if the last tenth of the steps (five at least) had a loss that is no better than guessing's."""
    chance = sum(math.log(len(question.choices)) for question in questions) / len(questions)
    count = min(max(5, len(losses) // 10), max(1, len(losses) // 2))
    began, ended = _mean(losses[:count]), _mean(losses[-count:])
    if ended < 0.98 * chance:
        return []
    rate = "a lower --lr" if not ended < began else "more --epochs or a higher --lr"
    others = "--scoring mean_loglik" if scoring == "letter" else f"another --scoring than {scoring}"
    return [
        f"the training loss ended at {ended:.2f} nats, no better than guessing ({chance:.2f}); try {rate}, "
        f"or {others}"
    ]


def about_samples(mean: Tensor, samples: Tensor, labels: Tensor, ess: float) -> list[str]:
    """Say if the average over posterior samples is far behind the mean weights.

    Far is by more than two standard errors of the difference over the rows, and by 0.1 nats or 5% of the
    answers.

    Args:
        mean: probabilities ``(N, C)`` of the mean weights.
        samples: those averaged over samples.
        labels: ``(N,)``, the right choices.
        ess: the effective sample size that was trained with.
    """
    right = [probs.argmax(-1).eq(labels).double() for probs in (mean, samples)]
    costs = [
        -probs.double().gather(1, labels[:, None])[:, 0].clamp_min(1e-30).log() for probs in (mean, samples)
    ]
    if not (_above(costs[1] - costs[0], _FAR) or _above(right[0] - right[1], _FAR / 2)):
        return []
    (nll, nll_samples), (share, share_samples) = ([float(x.mean()) for x in both] for both in (costs, right))
    return [
        f"posterior samples are far behind the mean weights (NLL {nll_samples:.2f} after {nll:.2f}, accuracy "
        f"{share_samples:.0%} after {share:.0%}): the posterior is too wide; pass --variance-scale 0.1 to "
        f"evaluate, or train with a larger --ess (it was {ess:.3g})"
    ]


def _above(differences: Tensor, least: float) -> bool:
    """Whether their mean is above ``least`` and two of its standard errors."""
    error = float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
    return float(differences.mean()) > max(least, 2 * error)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
