"""Multiple-choice and classification questions from a file or a dataset on the Hugging Face hub.

One row is one question, a line of a ``.jsonl`` file, or a row of a ``.csv`` or ``.parquet`` file::

    {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}

``answer`` is the right choice's index from 0, its letter (``"B"``), or its text, letters and text in upper or
lower case. Where all rows have the same choices they can be given once (``labels``) and left out of the rows.
The field names of ARC, OpenBookQA and CommonsenseQA (``question_stem``, ``answerKey``, ``choices`` as
``{"text", "label"}``) and of classification sets (``text``, ``label``) are understood too, so those sets load
from the hub as they are.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

__all__ = ["Question", "letter", "load_questions", "parse_json", "parse_question", "split_questions"]

_ALIASES = {
    "question": ("question", "question_stem", "text"),
    "choices": ("choices",),
    "answer": ("answer", "answerKey", "label"),
}
_EXAMPLE = '{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+-]+))?(?:@(?P<split>[\w.+\[\]:%-]+))?"
)
_MAX_CHOICES = 26
_LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one (None where it is not known)."""

    question: str
    choices: tuple[str, ...]
    answer: int | None


def letter(index: int) -> str:
    """Return the letter a choice goes by: 0 is ``"A"``."""
    return chr(ord("A") + index)


def load_questions(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    labels: Sequence[str] | None = None,
    answered: bool = True,
) -> list[Question]:
    """Read and check every row of a data set.

    Args:
        source: path of a ``.jsonl``, ``.csv`` or ``.parquet`` file, or a hub data set as
            ``NAME[:CONFIG][@SPLIT]``, for example ``allenai/ai2_arc:ARC-Easy@test``. A cell of a ``.csv``
            file holds choices as ``["3", "4"]``.
        split: hub split when ``source`` names none.
        limit: keep only the first ``limit`` rows.
        labels: the choices of rows that have none.
        answered: whether every row must have an answer.

    Raises:
        ValueError: for a file that is not there, an empty set, or a bad row (naming file and line).
        ModuleNotFoundError: for a hub data set without the ``datasets`` package.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    labels = None if labels is None else check_labels(labels)
    path = Path(source).expanduser()
    if path.is_file():
        rows = _READERS.get(path.suffix.lower(), _jsonl_rows)(path)
    elif path.exists() or path.suffix.lower() in (*_READERS, ".json"):
        kind = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "not there"
        raise ValueError(
            f"data file {source!r} is {kind}; pass a .jsonl, .csv or .parquet file or a hub data set's name"
        )
    else:
        rows = _hub_rows(source, split)
    questions = []
    for where, row in rows:
        questions.append(parse_question(row, where, labels=labels, answered=answered))
        if len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"data {source!r} has no rows; expected lines like {_EXAMPLE}")
    return questions


def parse_question(
    row: Any, where: str, *, labels: tuple[str, ...] | None = None, answered: bool = True
) -> Question:
    """Check one row and return it as a :class:`Question`.

    Args:
        row: a mapping with ``question``, ``choices`` and ``answer``.
        where: what to call the row in an error, for example ``"train.jsonl, line 3"``.
        labels: the choices, if the row has none.
        answered: whether the row must have an answer.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object like {_EXAMPLE}; got {type(row).__name__}")
    cells = {key: _field(row, key) for key in _ALIASES}
    if cells["choices"] is None:
        cells["choices"] = labels
    for key, value in cells.items():
        if value is None and (answered or key != "answer"):
            kind = "empty" if any(name in row for name in _ALIASES[key]) else "missing"
            found = ", ".join(map(str, row)) or "none"
            hint = "; where all rows have the same choices, pass labels" if key == "choices" else ""
            raise ValueError(
                f'{where}: {kind} key "{key}" (found: {found}); a row looks like {_EXAMPLE}{hint}'
            )
    question, choices, answer = cells.values()
    names = None
    if isinstance(choices, Mapping) and "text" in choices:
        names, choices = choices.get("label"), choices["text"]
    try:
        check_text("question", question)
        texts = tuple(_checked(choices, "choices", "every choice"))
        if names is not None and len(_distinct(names, "choices' label")) != len(texts):
            raise ValueError(f"choices have {len(texts)} texts and {len(names)} labels")
        index = None if answer is None else _answer_index(answer, texts, names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Question(question, texts, index)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the choices of all rows as a tuple; ``ValueError`` unless they are 2 to 26 distinct texts."""
    return _distinct(labels, "labels")


def check_text(name: str, value: Any) -> str:
    """Return a text that has some, and that can be written as UTF-8; ``ValueError`` for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a non-empty string; got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate, which is no character; got {value!r}") from error
    return value


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is not JSON, an object has a key twice, or Python cannot hold it (a number of 5,000
            digits, 100,000 brackets).
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except _KeyTwiceError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that Python cannot hold ({error})") from error


def split_questions(
    questions: Sequence[Question], first: int, *, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Shuffle by ``seed`` and return the first ``first`` questions and the rest."""
    if not 0 < first < len(questions):
        raise ValueError(f"first must be in [1, {len(questions) - 1}]; got {first}")
    order = list(range(len(questions)))
    Random(seed).shuffle(order)
    return [questions[i] for i in order[:first]], [questions[i] for i in order[first:]]


class _KeyTwiceError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} comes twice")
    return found


def _field(row: Mapping[str, Any], key: str) -> Any:
    """The row's value of a key or of one of its other names; None where it is missing or empty."""
    value = next((row[name] for name in _ALIASES[key] if name in row), None)
    missing = isinstance(value, float) and math.isnan(value)  # pandas' missing value
    return None if missing else value


def _checked(values: Any, name: str, each: str) -> Sequence[str]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list of strings; got {values!r}")
    if not 2 <= len(values) <= _MAX_CHOICES:
        raise ValueError(f"{name} must hold 2 to {_MAX_CHOICES} strings; got {len(values)}")
    for value in values:
        check_text(each, value)
    return values


def _distinct(values: Any, name: str) -> tuple[str, ...]:
    texts = tuple(value.strip() for value in _checked(values, name, f"every one of {name}"))
    if len(set(texts)) < len(texts):
        raise ValueError(f"{name} must differ from each other; got {list(values)!r}")
    return texts


def _answer_index(answer: Any, choices: Sequence[str], names: Sequence[str] | None) -> int:
    """The index an answer means.

    A number is the index itself. A text is the row's name for a choice, a choice's text, or its letter, as
    they are written or else in any case; or the index in digits, where the row has no names.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # pandas' integers, where some row has none
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise ValueError(f"answer must be an index in [0, {len(choices) - 1}]; got {answer}")
    if isinstance(answer, str):
        letters = [letter(i) for i in range(len(choices))]
        for fold in (str.strip, lambda text: text.strip().casefold()):
            text = fold(answer)
            for known in (names or [], choices, letters):
                found = [i for i, name in enumerate(known) if fold(name) == text]
                if len(found) > 1:
                    raise ValueError(f"answer {answer!r} is the text of several choices; give its index")
                if found:
                    return found[0]
        digits = [str(i) for i in range(len(choices))]
        if names is None and answer.strip() in digits:
            return digits.index(answer.strip())
    raise ValueError(
        f"answer must be an index from 0, a letter from A to {letter(len(choices) - 1)}, or one of "
        f"the choices; got {answer!r}"
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _json_at(where, line)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(_lines(file, path), strict=True)
        try:
            names = [name.strip() for name in next(rows, [])]
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: two columns have the same name; got {names}")
            for cells in rows:
                where = f"{path}, line {rows.line_num}"
                if cells and len(cells) != len(names):
                    raise ValueError(f"{where}: {len(cells)} cells under {len(names)} column names")
                row: dict[str, Any] = {n: c for n, c in zip(names, cells, strict=False) if c.strip()}
                if row.get("choices", "").lstrip().startswith("["):
                    row["choices"] = _json_at(where, row["choices"])
                if row:
                    yield where, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'reading {path} needs pyarrow; pip install "bayeslora[demo]" brings it', name=error.name
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {path} is not valid Parquet: {error}") from error


_READERS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _json_at(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    try:
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"data file {path} has a line of {_LONGEST_LINE} characters or more")
            yield line
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
