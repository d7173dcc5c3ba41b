r"""Minimum Bayes risk decoding: of the answers of several posterior samples, the one the others agree with.

With candidates c_1 … c_n, drawn from n models or several from each, weights w (uniform by default) and a
utility U(hypothesis, reference)::

    E[U](c_i) = Σ_j w_j U(c_i, c_j)            decode: argmax_i E[U](c_i)

The references are the candidates themselves, as in the paper. With the 0-1 utility on an extracted answer
this is a majority vote.

Papers: Kumar and Byrne, "Minimum Bayes-risk decoding for statistical machine translation" (NAACL 2004);
Daheim et al., "Uncertainty-aware decoding with minimum Bayes risk" (ICLR 2025), for posterior samples.

>>> from bayeslora import mbr
>>> texts = ["3 + 4 = 7\n#### 7", "It is 7.", "#### 8", "so 7"]
>>> choice = mbr.decode(texts, answer=mbr.gsm8k_flexible)
>>> texts[choice.index], choice.answer, float(choice.expected_utility[choice.index])
('3 + 4 = 7\n#### 7', '7', 0.75)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["Choice", "chrf", "decode", "expected_utility", "gsm8k_flexible", "gsm8k_strict"]

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_COLUMNS = 8192  # n-grams matched at a time: 16 MB for 512 texts


@dataclass(frozen=True)
class Choice:
    """What `decode` chose.

    Attributes:
        index: of the candidate with the largest expected utility; the first of equals.
        text: that candidate.
        answer: its extracted answer; None without extraction, or where none has one.
        expected_utility: ``(n,)`` fp64, of every candidate.
    """

    index: int
    text: str
    answer: Hashable | None
    expected_utility: Tensor = field(repr=False)


def decode(
    candidates: Sequence[str],
    *,
    answer: Callable[[str], Hashable | None] | None = None,
    utility: Callable[[Sequence[str], Sequence[str]], Any] | Callable[[str, str], float] | None = None,
    pairwise: bool = False,
    weights: Sequence[float] | Tensor | None = None,
) -> Choice:
    """Return the candidate of largest expected utility.

    Args:
        candidates: n texts, none empty.
        answer: extracts what is compared under the 0-1 utility; None from it is an answer that agrees with
            nothing. Without ``answer`` and ``utility`` the texts themselves are compared.
        utility: instead of ``answer``: gives all utilities at once, ``utility(hypotheses, references)``, an
            ``(m, m)`` array or tensor (such as :func:`chrf`); with ``pairwise`` one number,
            ``utility(hypothesis, reference)``. It sees each distinct text once.
        pairwise: how ``utility`` is called.
        weights: n numbers >= 0, a candidate's say as a reference; None for equal ones.

    Raises:
        ValueError: a candidate is empty, a weight is negative or not finite, or a utility is.
        TypeError: both ``answer`` and ``utility`` are given.

    >>> decode(["the cat", "the cats", "dogs"], utility=chrf).text
    'the cats'
    >>> decode(["b", "a", "b"], utility=lambda h, r: float(h == r), pairwise=True).index
    0
    """
    _check_candidates(candidates)
    if answer is not None and utility is not None:
        raise TypeError("pass answer (0-1 utility on it) or utility, not both")
    shares = _shares(weights, len(candidates))
    if utility is None:
        answers = [text if answer is None else answer(text) for text in candidates]
        expected = _agreement(answers, shares)
        index = int(expected.argmax())
        return Choice(index, candidates[index], None if answer is None else answers[index], expected)
    unique = list(dict.fromkeys(candidates))
    place = {text: i for i, text in enumerate(unique)}
    where = torch.tensor([place[text] for text in candidates], device="cpu")
    if pairwise:
        rows: Any = [[utility(h, r) for r in unique] for h in unique]  # type: ignore[arg-type, call-arg]
    else:
        rows = utility(unique, unique)  # type: ignore[arg-type]
    rows = torch.as_tensor(rows, dtype=torch.float64).cpu()
    if rows.shape != (len(unique), len(unique)):
        raise ValueError(
            f"utility returned shape {tuple(rows.shape)}; return {(len(unique), len(unique))}, hypotheses by "
            "references (or pass pairwise=True)"
        )
    by_text = torch.zeros(len(unique), dtype=torch.float64, device="cpu").index_add_(0, where, shares)
    expected = expected_utility(rows, by_text)[where]
    index = int(expected.argmax())
    return Choice(index, candidates[index], None, expected)


def expected_utility(utilities: Any, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Return ``Σ_j w_j U_ij`` of each hypothesis i, fp64 ``(n,)``.

    Args:
        utilities: ``(n, m)``, of n hypotheses against m references.
        weights: ``(m,)``, normalized here; None for equal ones.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.

    >>> expected_utility([[1.0, 0.2], [0.4, 1.0]], [3, 1])
    tensor([0.8000, 0.5500], dtype=torch.float64)
    """
    matrix = torch.as_tensor(utilities, dtype=torch.float64).cpu()
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"utilities have shape {tuple(matrix.shape)}; pass (n, m), hypotheses by references")
    bad = (~matrix.isfinite()).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(f"utility of hypothesis {i} against reference {j} is {float(matrix[i, j])}")
    return matrix @ _shares(weights, matrix.shape[1])


def gsm8k_strict(text: str) -> str | None:
    r"""Return the first number after ``####``, as lm-evaluation-harness's strict-match; None without one.

    Normalized as its exact match compares: no thousands separators, dollar signs or final point.

    >>> gsm8k_strict("He has 3.\n#### 1,234."), gsm8k_strict("The answer is 12.")
    ('1234', None)
    """
    match = _STRICT.search(text)
    return _normalized(match[1]) if match else None


def gsm8k_flexible(text: str) -> str | None:
    """Return the last number in the text, as lm-evaluation-harness's flexible-extract; None without one.

    >>> gsm8k_flexible("First 3, then $1,200."), gsm8k_flexible("none")
    ('1200', None)
    """
    found = _FLEXIBLE.findall(text)
    return _normalized(next(group for group in found[-1] if group)) if found else None


def chrf(
    hypotheses: Sequence[str], references: Sequence[str], *, order: int = 6, beta: float = 2.0
) -> Tensor:
    """Return sacrebleu's sentence chrF of every pair, ``(n, m)`` fp64 in [0, 1].

    The n-grams are sacrebleu's; all pairs are matched by one matrix product an order, since
    ``min(a, b) = Σ_t [a >= t] [b >= t]`` for counts a and b. Popović, "chrF" (WMT 2015). Needs
    ``pip install "bayeslora[mbr]"``.

    Args:
        hypotheses: n texts.
        references: m texts.
        order: longest character n-gram.
        beta: weight of recall over precision.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed.

    >>> chrf(["a cat sat"], ["a cat sat", "dogs"]).shape
    torch.Size([1, 2])
    """
    grams = [_char_ngrams(text, order) for text in (*hypotheses, *references)]
    n, m = len(hypotheses), len(references)
    precision, recall, used = (torch.zeros(n, m, dtype=torch.float64, device="cpu") for _ in range(3))
    for k in range(order):
        counts = [text[k] for text in grams]
        total = torch.tensor([sum(c.values()) for c in counts], dtype=torch.float64, device="cpu")
        hyp, ref = total[:n, None], total[None, n:]
        both = (hyp > 0) & (ref > 0)
        match = _matches(counts[:n], counts[n:])
        precision += torch.where(both, match / hyp.clamp_min(1), 0.0)
        recall += torch.where(both, match / ref.clamp_min(1), 0.0)
        used += both
    precision, recall = precision / used.clamp_min(1), recall / used.clamp_min(1)
    bottom = beta**2 * precision + recall
    return torch.where(
        bottom > 0, (1 + beta**2) * precision * recall / bottom.clamp_min(1e-300), torch.zeros_like(bottom)
    )


def _char_ngrams(text: str, order: int) -> Any:
    try:
        helpers = import_module("sacrebleu.metrics.helpers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'chrf needs sacrebleu; pip install "bayeslora[mbr]" brings it', name=error.name
        ) from error
    return helpers.extract_all_char_ngrams(text, order)


def _matches(left: Sequence[Any], right: Sequence[Any]) -> Tensor:
    """Return ``Σ_g min(count_i(g), count_j(g))`` of every pair of counters."""
    columns: dict[tuple[str, int], int] = {}
    for counter in left:
        for gram, count in counter.items():
            for t in range(count):
                columns.setdefault((gram, t), len(columns))
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device="cpu")
    places = _places(left, columns), _places(right, columns)
    for first in range(0, len(columns), _COLUMNS):
        hyp, ref = (_indicator(len(c), p, first) for c, p in zip((left, right), places, strict=True))
        total += hyp @ ref.T
    return total


def _places(counters: Sequence[Any], columns: dict[tuple[str, int], int]) -> Tensor:
    """Return row and column of the first, second, … occurrence of each n-gram a text has: ``(2, K)``."""
    rows, held = [], []
    for row, counter in enumerate(counters):
        for gram, count in counter.items():
            found = [columns[gram, t] for t in range(count) if (gram, t) in columns]
            held += found
            rows += [row] * len(found)
    return torch.tensor([rows, held], dtype=torch.int64, device="cpu")


def _indicator(count: int, places: Tensor, first: int) -> Tensor:
    """Return which of the columns from ``first`` on each of ``count`` texts has: 0 or 1, fp32 (exact)."""
    rows, held = places[:, (places[1] >= first) & (places[1] < first + _COLUMNS)]
    out = torch.zeros(count, _COLUMNS, device="cpu")
    out[rows, held - first] = 1.0
    return out


def _normalized(number: str) -> str:
    """The number as lm-evaluation-harness compares it: without commas, dollar signs and a final point."""
    return number.strip().replace(",", "").replace("$", "").removesuffix(".").lower()


def _agreement(answers: Sequence[Hashable | None], shares: Tensor) -> Tensor:
    """Return the share of candidates that have each one's answer; 0 for no answer."""
    codes: dict[Hashable, int] = {}
    found = [-1 if a is None else codes.setdefault(a, len(codes)) for a in answers]
    where = torch.tensor(found, device="cpu")
    told = where >= 0
    votes = torch.zeros(max(len(codes), 1), dtype=torch.float64, device="cpu")
    votes.index_add_(0, where[told], shares[told])
    return torch.where(told, votes[where.clamp_min(0)], 0.0)


def _shares(weights: Sequence[float] | Tensor | None, count: int) -> Tensor:
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device="cpu")
    shares = torch.as_tensor(weights, dtype=torch.float64).cpu()
    if shares.shape != (count,):
        raise ValueError(f"weights have shape {tuple(shares.shape)}; pass ({count},), one a candidate")
    if not bool(shares.isfinite().all()) or bool((shares < 0).any()) or not float(shares.sum()) > 0:
        raise ValueError(f"weights must be finite, >= 0 and not all 0; got {shares.tolist()}")
    return shares / shares.sum()


def _check_candidates(candidates: Sequence[str]) -> None:
    if isinstance(candidates, str) or not len(candidates):
        raise ValueError("candidates must be a sequence of at least one text")
    for i, text in enumerate(candidates):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"candidate {i} is {text!r}; leave out what a model did not answer")
