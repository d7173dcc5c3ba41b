"""The study's model and batches: choices scored by log-likelihood, in few shapes that graphs are kept of.

A question's choices share its prompt: they stand side by side in one row behind it, each sees the prompt and
itself only, at the positions it would have alone. That is a third of the tokens of a sequence a choice.

What a choice's score is belongs to the encoded question (``bayeslora.scoring``).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora import metrics
from bayeslora.finetune import load_model
from bayeslora.scoring import EncodedQuestion, encode

LENGTHS = (64, 128, 256, 512, 1024, 2048)
_SCORED = 64  # tokens a question, of the smaller of the two tables that training batches are padded to
_LONGEST = 512  # tokens of a choice with its question; longer questions lose their beginning
_ROWS = 1024  # scored tokens that go through the vocabulary projection together, in prediction
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
_PASS_TOKENS = 32768 if DEVICE.type == "cuda" else 2048
_PADDING = -1
OBJECTIVES = ("choices", "text")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """A question in one row.

    Attributes:
        tokens: the prompt's, then each input's own.
        positions: of each token in its input.
        groups: 0 for the prompt, else which input a token belongs to.
        targets: scored tokens: choice, index of the token that predicts it, the token.
        choices: how many.
        answer: index of the right choice.
        divisors: of each choice's summed log-likelihood.
    """

    tokens: list[int]
    positions: list[int]
    groups: list[int]
    targets: list[tuple[int, int, int]]
    choices: int
    answer: int
    divisors: list[int]


def pack(question: EncodedQuestion) -> Packed:
    alike = (len(set(column)) == 1 for column in zip(*question.sequences, strict=False))
    shared = sum(takewhile(bool, alike))
    tokens, groups = list(question.sequences[0][:shared]), [0] * shared
    positions, starts = list(range(shared)), []
    for i, sequence in enumerate(question.sequences, start=1):
        starts.append(len(tokens) - shared)
        tokens += sequence[shared:]
        positions += range(shared, len(sequence))
        groups += [i] * (len(sequence) - shared)
    targets = [
        (choice, position if position < shared else starts[s] + position, token)
        for choice, scored in enumerate(question.targets)
        for s, position, token in scored
    ]
    count = len(question.targets)
    return Packed(tokens, positions, groups, targets, count, question.answer, question.divisors)


def once(file: Path, make: Callable[[Path], None]) -> Path:
    """Make a file or folder at a temporary name and rename it; processes that come meanwhile wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f"{file.name}.lock")
    while not file.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(0.2)
            continue
        part = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            if not file.exists():
                make(part)
                part.replace(file)
        finally:
            lock.unlink()
    return file


def converted(model: str, cache: Path) -> str:
    """Return a folder with the weights of a .gguf dequantized once; other models as they are."""
    if not model.endswith(".gguf"):
        return model
    from transformers import AutoModelForCausalLM

    def make(folder: Path) -> None:
        network, tokenizer = load_model(model, device=torch.device("cpu"))
        config = network.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are not quantized any more
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(network.state_dict())
        plain.to(getattr(torch, DTYPE)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return str(once(cache / f"{Path(model).stem}-{DTYPE}", make))


def questions(rows: Sequence[Any], tokenizer: Any, cache: Path, scoring: str = "loglik") -> list[Packed]:
    """Return questions encoded and packed for a way to score, which is done once for all processes."""
    text = json.dumps([asdict(row) for row in rows]) + f"{tokenizer.name_or_path} {scoring}"

    def make(file: Path) -> None:
        encoded = encode(rows, tokenizer, scoring, max_length=_LONGEST)
        file.write_text(json.dumps([asdict(pack(question)) for question in encoded]))

    file = cache / f"questions-{hashlib.sha1(text.encode()).hexdigest()[:16]}.json"
    return [Packed(**entry) for entry in json.loads(once(file, make).read_text())]


def prepare(network: Any) -> Any:
    """Freeze a model, and make each norm one kernel instead of seven: small steps wait for launches."""
    network.requires_grad_(False)
    network.config.use_cache = False
    for name, module in list(network.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            network.set_submodule(name, norm)
    return network


def collate(questions: Sequence[Packed], choices: int, *, fixed: bool) -> Batch:
    """Pad questions into one batch on the device.

    Args:
        questions: Q of them.
        choices: C, the most that a question of the data has.
        fixed: pad to few shapes: a length of ``LENGTHS``, 64 Q scored tokens or a power of two times that.

    Returns:
        ``input_ids``, ``position_ids``, ``groups`` (Q, T); ``row``, ``index``, ``token``, ``slot`` (R): where
        each scored token is predicted, what it is, and its choice (Q · C for padding); ``exists`` (Q, C);
        ``divisors`` (Q, C); ``labels`` (Q).
    """
    longest = max(len(q.tokens) for q in questions)
    length = next(n for n in LENGTHS if n >= longest) if fixed else -(-longest // 8) * 8
    padded = []
    table = []
    for i, q in enumerate(questions):
        pad = length - len(q.tokens)
        padded.append((q.tokens + [0] * pad, q.positions + [0] * pad, q.groups + [_PADDING] * pad))
        table += [(i, index, token, i * choices + choice) for choice, index, token in q.targets]
    if fixed:
        wanted = _SCORED * len(questions)
        while wanted < len(table):
            wanted *= 2
        table += [(0, 0, 0, len(questions) * choices)] * (wanted - len(table))
    ids, positions, groups = torch.tensor(padded).unbind(1)
    row, index, token, slot = torch.tensor(table).unbind(1)
    exists = torch.arange(choices) < torch.tensor([[q.choices] for q in questions])
    batch = {"input_ids": ids, "position_ids": positions, "groups": groups, "row": row, "index": index}
    batch |= {"token": token, "slot": slot, "exists": exists}
    batch["divisors"] = torch.tensor([q.divisors + [1] * (choices - q.choices) for q in questions])
    batch["labels"] = torch.tensor([q.answer for q in questions])
    return {name: t.contiguous().to(DEVICE, non_blocking=True) for name, t in batch.items()}


def scores(model: Any, batch: Batch) -> Tensor:
    """Return each choice's score in nats, fp32 (Q, C); -inf where there is none.

    Only the hidden states that predict a scored token go through the vocabulary projection.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    groups, ids = batch["groups"], batch["input_ids"]
    earlier = torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).tril()
    mask = earlier & ((groups[:, None, :] == 0) | (groups[:, None, :] == groups[:, :, None]))
    hidden = network.model(
        input_ids=ids, position_ids=batch["position_ids"], attention_mask=mask[:, None], use_cache=False
    ).last_hidden_state[batch["row"], batch["index"]]
    parts = zip(hidden.split(_ROWS), batch["token"].split(_ROWS), strict=True)
    chosen = torch.cat([_log_likelihood(network.lm_head(h), token) for h, token in parts])
    sums = torch.zeros(batch["exists"].numel() + 1, device=chosen.device)
    sums = sums.index_add(0, batch["slot"], chosen)[:-1].view(batch["exists"].shape)
    return (sums / batch["divisors"]).masked_fill(~batch["exists"], float("-inf"))


def _log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def loss(model: nn.Module, batch: Batch, objective: str = "choices") -> Tensor:
    """Return the mean over questions of -log p(right choice among the choices), or of -its score ("text")."""
    found, labels = scores(model, batch), batch["labels"]
    if objective == "text":
        return -found.gather(1, labels[:, None]).mean()
    return nn.functional.cross_entropy(found, labels)


def measured(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return what ``metrics.summary`` does, without torchmetrics, which a GPU machine may lack."""
    return {
        "accuracy": float((probs.argmax(1) == labels).double().mean()),
        "ece": metrics.reliability_bins(probs, labels, 15).ece,
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
    }


class Data:
    """Questions to predict, sorted by length and batched once for all runs."""

    def __init__(self, questions: Sequence[Packed]) -> None:
        self.questions = list(questions)
        self.labels = torch.tensor([q.answer for q in questions])
        self.choices = max(q.choices for q in questions)
        self._order: list[int] = []
        self._batches: list[Batch] = []

    def _prepare(self) -> None:
        lengths = [len(q.tokens) for q in self.questions]
        self._order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        start = 0
        while start < len(self._order):
            count = max(1, _PASS_TOKENS // lengths[self._order[start]])
            part = [self.questions[i] for i in self._order[start : start + count]]
            self._batches.append(collate(part, self.choices, fixed=False))
            start += count

    @torch.no_grad()
    def predict(
        self,
        model: Any,
        weights: Sequence[Callable[[], AbstractContextManager[Any]]] = (nullcontext,),
        check: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return probabilities (N, C) averaged over contexts that put weights into the model."""
        if not self._batches:
            self._prepare()
        total = torch.zeros(len(self.questions), self.choices, dtype=torch.float64, device=DEVICE)
        for context in weights:
            check()
            with context():
                total += torch.cat([scores(model, batch).softmax(-1) for batch in self._batches])
        probs = torch.empty_like(total, device="cpu")
        probs[self._order] = total.cpu() / len(weights)
        return probs
