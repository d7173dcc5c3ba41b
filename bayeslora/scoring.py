"""Scores of a question's choices under a causal language model.

Three ways to score, each a softmax over the choices of one question away from probabilities:

- ``"letter"``: the choices are listed in the prompt and each is scored by its letter's log-probability
  after it (how the IVON-LoRA papers score commonsense questions);
- ``"loglik"``: each choice is scored by its summed log-likelihood after the prompt,
  ``s_c = Σ_t log p(c_t | prompt, c_<t)``;
- ``"mean_loglik"``: the same divided by the choice's number of tokens. Summed scores of long texts differ by
  many nats whatever the model knows, so their softmax is far too sure of itself.

Two savings make this cheap. A choice's last token is only ever predicted, so it is left out of the input,
and an input that is a prefix of another is read off that one: letters and single-token choices cost one
sequence a question, not one a choice. And only the positions that predict a scored token go through the
vocabulary projection (``logits_to_keep``), where the model's forward offers that.

Padding is on the right, where no real token of a causal model looks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .data import Question, letter

__all__ = [
    "METHODS",
    "TEMPLATES",
    "ChoiceBatch",
    "EncodedQuestion",
    "batches_by_length",
    "choice_scores",
    "collate",
    "encode",
    "render",
]

METHODS = ("letter", "loglik", "mean_loglik")
TEMPLATES = {
    "letter": "{question}\n{choices}\nAnswer:",
    "loglik": "{question}\nAnswer:",
    "mean_loglik": "{question}\nAnswer:",
}

_PLACEHOLDER = re.compile(r"\{(question|choices)\}")


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as token sequences and the tokens to score in them.

    Attributes:
        sequences: the distinct model inputs, none a prefix of another.
        targets: per choice, its scored tokens as ``(sequence, position, token)``: the model's output at
            ``position`` of ``sequences[sequence]`` predicts ``token``.
        answer: index of the right choice; None where it is not known.
        per_token: whether a choice's score is divided by its number of tokens.
        dropped: tokens that the prompt lost to ``max_length``.
    """

    sequences: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[tuple[int, int, int], ...], ...]
    answer: int | None
    per_token: bool = False
    dropped: int = 0

    @property
    def divisors(self) -> list[int]:
        """What each choice's summed log-likelihood is divided by."""
        return [len(scored) if self.per_token else 1 for scored in self.targets]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class ChoiceBatch:
    """Tensors that score ``Q`` questions of up to ``C`` choices of up to ``L`` tokens.

    Attributes:
        input_ids: ``(S, T)`` int64, right-padded inputs of all questions.
        attention_mask: ``(S, T)`` int64, 1 on real tokens.
        kept: ``(P,)`` int64, the distinct positions some scored token is predicted from.
        row_sequence: ``(R,)`` int64, input of each distinct (input, position) pair in use.
        row_kept: ``(R,)`` int64, that pair's position as an index into ``kept``.
        target_row: ``(Q, C, L)`` int64, the pair that predicts each scored token.
        target_token: ``(Q, C, L)`` int64, the scored tokens.
        target_mask: ``(Q, C, L)`` bool, False on padding.
        divisor: ``(Q, C)`` int64, what each choice's summed log-likelihood is divided by.
        labels: ``(Q,)`` int64, the right choices; -100, which a cross-entropy ignores, where not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    kept: Tensor
    row_sequence: Tensor
    row_kept: Tensor
    target_row: Tensor
    target_token: Tensor
    target_mask: Tensor
    divisor: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> ChoiceBatch:
        """Return the batch with every tensor on ``device``."""
        return ChoiceBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def encode(
    questions: Sequence[Question],
    tokenizer: Any,
    method: str = "loglik",
    template: str | None = None,
    max_length: int | None = None,
) -> list[EncodedQuestion]:
    """Tokenize questions for :func:`choice_scores`.

    Prompt and choice are tokenized together, and scoring starts at the first token in which the prompt
    alone and the choices differ, so tokens that straddle the boundary are handled exactly.

    Args:
        questions: what to encode.
        tokenizer: a Hugging Face tokenizer.
        method: ``"letter"``, ``"loglik"`` or ``"mean_loglik"``.
        template: the prompt, with ``{question}`` and, for letters, ``{choices}`` (one ``A. text`` a line);
            the method's entry of ``TEMPLATES`` when None.
        max_length: longest input in tokens; a longer prompt loses tokens from its start (but not the
            beginning-of-sequence token). None keeps everything.

    Raises:
        ValueError: for an unknown method, a template without its placeholders, a ``max_length`` that a
            choice alone exceeds, or a prompt of no tokens.
    """
    template = check_template(method, template)
    check_max_length(max_length)
    texts = [text for question in questions for text in render(question, method, template)]
    token_ids = tokenizer(texts, padding=False, truncation=False)["input_ids"] if texts else []
    bos = getattr(tokenizer, "bos_token_id", None)
    encoded, start = [], 0
    for question in questions:
        stop = start + 1 + len(question.choices)
        one = _encode_one(question, token_ids[start:stop], bos, max_length)
        encoded.append(replace(one, per_token=method == "mean_loglik"))
        start = stop
    return encoded


def render(question: Question, method: str, template: str) -> list[str]:
    """Return the prompt, and the prompt with each choice after it, as they are tokenized."""
    names = question.choices
    values = {"question": question.question.strip()}
    if method == "letter":
        values["choices"] = "\n".join(f"{letter(i)}. {name.strip()}" for i, name in enumerate(names))
        names = tuple(letter(i) for i in range(len(names)))
    prompt = _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
    spaces = ("" if prompt[-1:].isspace() or name[:1].isspace() else " " for name in names)
    return [prompt, *(f"{prompt}{space}{name}" for space, name in zip(spaces, names, strict=True))]


def check_template(method: str, template: str | None) -> str:
    """Return the template to use, or raise ``ValueError`` for a bad method or template."""
    if method not in METHODS:
        raise ValueError(f"scoring must be one of {', '.join(METHODS)}; got {method!r}")
    template = TEMPLATES[method] if template is None else template
    needed = ("{question}", "{choices}") if method == "letter" else ("{question}",)
    missing = [name for name in needed if name not in template]
    if missing:
        raise ValueError(
            f"template for scoring {method!r} must contain {' and '.join(missing)}; got {template!r}"
        )
    return template


def check_max_length(max_length: int | None) -> None:
    """Raise ``ValueError`` for a longest input that is no number of tokens."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
        raise ValueError(f"max_length must be a number of tokens or none; got {max_length!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {max_length}")


def batches_by_length(
    encoded: Sequence[EncodedQuestion], max_tokens: int = 4096, max_questions: int = 64
) -> list[list[int]]:
    """Group question indices, longest first, into batches of at most ``max_tokens`` padded tokens.

    Sorting by length keeps padding small; longest first makes running out of memory an early failure.
    A single question longer than ``max_tokens`` still gets its own batch.
    """
    order = sorted(range(len(encoded)), key=lambda i: (-encoded[i].length, i))
    batches: list[list[int]] = []
    width = sequences = 0
    for index in order:
        question = encoded[index]
        sequences += len(question.sequences)
        full = not batches or len(batches[-1]) == max_questions or sequences * width > max_tokens
        if full:
            batches.append([])
            width, sequences = question.length, len(question.sequences)
        batches[-1].append(index)
    return batches


def collate(encoded: Sequence[EncodedQuestion], pad_token_id: int) -> ChoiceBatch:
    """Pad encoded questions into one batch of CPU tensors."""
    sequences = [s for question in encoded for s in question.sequences]
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_token_id, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(sequences):
        input_ids[row, : len(tokens)] = torch.tensor(tokens, device="cpu")
        attention_mask[row, : len(tokens)] = 1
    choices = max(len(q.targets) for q in encoded)
    tokens_a_choice = max(len(c) for q in encoded for c in q.targets)
    shape = (len(encoded), choices, tokens_a_choice)
    target_row, target_token = torch.zeros(2, *shape, dtype=torch.long, device="cpu")
    target_mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    rows: dict[tuple[int, int], int] = {}
    offset = 0
    for q, question in enumerate(encoded):
        for c, targets in enumerate(question.targets):
            for t, (sequence, position, token) in enumerate(targets):
                target_row[q, c, t] = rows.setdefault((offset + sequence, position), len(rows))
                target_token[q, c, t] = token
                target_mask[q, c, t] = True
        offset += len(question.sequences)
    divisors = [q.divisors + [1] * (choices - len(q.targets)) for q in encoded]
    divisor = torch.tensor(divisors, device="cpu")
    row_sequence, row_position = torch.tensor(list(rows), device="cpu").unbind(1)
    kept, row_kept = torch.unique(row_position, return_inverse=True)
    labels = torch.tensor([-100 if q.answer is None else q.answer for q in encoded], device="cpu")
    return ChoiceBatch(
        input_ids,
        attention_mask,
        kept,
        row_sequence,
        row_kept,
        target_row,
        target_token,
        target_mask,
        divisor,
        labels,
    )


def choice_scores(model: nn.Module, batch: ChoiceBatch) -> Tensor:
    """Return each choice's score in nats, ``(Q, C)`` fp32; ``-inf`` where a question has no such choice.

    Differentiable; ``softmax(choice_scores(...), -1)`` are the choice probabilities and
    ``cross_entropy(choice_scores(...), batch.labels)`` the training loss.

    Args:
        model: a causal language model, PEFT-wrapped or not.
        batch: a batch of :func:`collate`, on the model's device.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _takes_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=batch.kept).logits
        rows = logits[batch.row_sequence, batch.row_kept]
    else:
        logits = model(**inputs).logits
        rows = logits[batch.row_sequence, batch.kept[batch.row_kept]]
    rows = rows.float()  # (R, V)
    tokens = rows[batch.target_row, batch.target_token] - rows.logsumexp(-1)[batch.target_row]
    scores = tokens.masked_fill(~batch.target_mask, 0.0).sum(-1) / batch.divisor
    return scores.masked_fill(~batch.target_mask.any(-1), float("-inf"))


def _takes_logits_to_keep(model: nn.Module) -> bool:
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = base.get_base_model()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _encode_one(
    question: Question, token_ids: Sequence[Sequence[int]], bos: int | None, max_length: int | None
) -> EncodedQuestion:
    """Encode from the prompt's ids followed by each prompt + choice's ids."""
    prompt, *wholes = (tuple(ids) for ids in token_ids)
    start = min(min(_common_prefix(prompt, whole), len(whole) - 1) for whole in wholes)
    if start < 1:
        raise ValueError(f"template leaves no token before the choices of question {question.question!r}")
    longest = max(map(len, wholes)) - 1
    drop = 0 if max_length is None else max(0, longest - max_length)
    if drop:
        first = int(prompt[0] == bos)
        if start - drop <= first:
            raise ValueError(
                f"max_length={max_length} tokens is too short for the choices of {question.question!r}"
            )
        wholes = [whole[:first] + whole[first + drop :] for whole in wholes]
        start -= drop
    sequences: list[tuple[int, ...]] = []
    for whole in sorted(wholes, key=len, reverse=True):
        if not any(s[: len(whole) - 1] == whole[:-1] for s in sequences):
            sequences.append(whole[:-1])
    targets = []
    for whole in wholes:
        home = next(i for i, s in enumerate(sequences) if s[: len(whole) - 1] == whole[:-1])
        targets.append(tuple((home, t - 1, whole[t]) for t in range(start, len(whole))))
    return EncodedQuestion(tuple(sequences), tuple(targets), question.answer, dropped=drop)


def _common_prefix(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
