"""Multiple-choice and classification questions from a .jsonl file or a dataset on the Hugging Face hub.

One row is one question::

    {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}

``answer`` is the right choice's index from 0, its letter (``"B"``), or its text. The field names of ARC,
OpenBookQA and CommonsenseQA (``question_stem``, ``answerKey``, ``choices`` as ``{"text", "label"}``) are
understood too, so those sets load from the hub as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["Question", "letter", "load_questions", "parse_question", "split_questions"]

_ALIASES = {
    "question": ("question", "question_stem"),
    "choices": ("choices",),
    "answer": ("answer", "answerKey"),
}
_EXAMPLE = '{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+-]+))?(?:@(?P<split>[\w.+\[\]:%-]+))?"
)
_MAX_CHOICES = 26


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def letter(index: int) -> str:
    """Return the letter a choice goes by: 0 is ``"A"``."""
    return chr(ord("A") + index)


def load_questions(source: str, *, split: str = "train", limit: int | None = None) -> list[Question]:
    """Read and check every row of a data set.

    Args:
        source: path of a ``.jsonl`` file, or a hub data set as ``NAME[:CONFIG][@SPLIT]``, for example
            ``allenai/ai2_arc:ARC-Easy@test``.
        split: hub split when ``source`` names none.
        limit: keep only the first ``limit`` rows.

    Raises:
        ValueError: for a file that is not there, an empty set, or a bad row (naming file and line).
        ModuleNotFoundError: for a hub data set without the ``datasets`` package.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    path = Path(source).expanduser()
    if path.is_file():
        rows = _jsonl_rows(path)
    elif path.is_dir() or path.suffix in (".jsonl", ".json"):
        kind = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"data file {source!r} is {kind}; pass a .jsonl file or a hub data set's name")
    else:
        rows = _hub_rows(source, split)
    questions = []
    for where, row in rows:
        questions.append(parse_question(row, where))
        if len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"data {source!r} has no rows; expected lines like {_EXAMPLE}")
    return questions


def parse_question(row: Any, where: str) -> Question:
    """Check one row and return it as a :class:`Question`.

    Args:
        row: a mapping with ``question``, ``choices`` and ``answer``.
        where: what to call the row in an error, for example ``"train.jsonl, line 3"``.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object like {_EXAMPLE}; got {type(row).__name__}")
    question, choices, answer = (_field(row, key, where) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: question must be a non-empty string; got {question!r}")
    labels = None
    if isinstance(choices, Mapping) and "text" in choices:
        labels, choices = choices.get("label"), choices["text"]
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise ValueError(f"{where}: choices must be a list of strings; got {choices!r}")
    if not 2 <= len(choices) <= _MAX_CHOICES:
        raise ValueError(f"{where}: choices must hold 2 to {_MAX_CHOICES} strings; got {len(choices)}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{where}: every choice must be a non-empty string; got {choice!r}")
    return Question(question, tuple(choices), _answer_index(answer, choices, labels, where))


def split_questions(
    questions: Sequence[Question], first: int, *, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Shuffle by ``seed`` and return the first ``first`` questions and the rest."""
    if not 0 < first < len(questions):
        raise ValueError(f"first must be in [1, {len(questions) - 1}]; got {first}")
    order = list(range(len(questions)))
    Random(seed).shuffle(order)
    return [questions[i] for i in order[:first]], [questions[i] for i in order[first:]]


def _field(row: Mapping[str, Any], key: str, where: str) -> Any:
    for name in _ALIASES[key]:
        if name in row:
            return row[name]
    found = ", ".join(map(str, row)) or "none"
    raise ValueError(f'{where}: missing key "{key}" (found: {found}); a row looks like {_EXAMPLE}')


def _answer_index(answer: Any, choices: Sequence[str], labels: Sequence[str] | None, where: str) -> int:
    """The index an answer means: an index as it is; else the row's label, a choice's text, or a letter."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise ValueError(f"{where}: answer must be an index in [0, {len(choices) - 1}]; got {answer}")
    if isinstance(answer, str):
        text, letters = answer.strip(), [letter(i) for i in range(len(choices))]
        for names in (list(labels or []), [choice.strip() for choice in choices], letters):
            if names.count(text) > 1:
                raise ValueError(f"{where}: answer {answer!r} is the text of several choices; give its index")
            if text in names:
                return names.index(text)
    raise ValueError(
        f"{where}: answer must be an index from 0, a letter from A to {letter(len(choices) - 1)}, or one of "
        f"the choices; got {answer!r}"
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in _numbered(lines, path):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{where}: not valid JSON ({error.msg}, column {error.colno})"
                    ) from error
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
                    raise ValueError(f"{where}: JSON that Python cannot hold ({error})") from error
                yield where, row


def _numbered(lines: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(lines, start=1)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data file {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise ValueError(
            f"data {source!r} is neither a file that exists nor a hub data set NAME[:CONFIG][@SPLIT]"
        )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data {source!r} is no file here, and reading it from the hub needs the datasets package; "
            'pip install "bayeslora[demo]" brings it',
            name=error.name,
        ) from error
    name, config, split = match["name"], match["config"], match["split"] or split
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many kinds; each means "cannot be had"
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data {source!r} is neither a file that exists nor a hub data set that could be loaded: {cause}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source} ({split}), row {number}", row
