"""The study's model and batches: choices scored by log-likelihood, in few shapes that graphs are kept of."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora import metrics
from bayeslora.finetune import load_model
from bayeslora.scoring import EncodedQuestion, batches_by_length

LENGTHS = (32, 64, 128, 256, 512, 1024)
_SCORED = 32  # tokens a question, of the smaller of the two tables that training batches are padded to
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
_PASS_TOKENS = 65536 if DEVICE.type == "cuda" else 2048

Batch = dict[str, Tensor]


def converted(model: str) -> str:
    """Return a folder with the weights of a .gguf dequantized once; other models as they are."""
    if not model.endswith(".gguf"):
        return model
    from transformers import AutoModelForCausalLM

    folder = Path(tempfile.gettempdir()) / f"study-{Path(model).stem}"
    if not (folder / "done").exists():
        network, tokenizer = load_model(model, device=torch.device("cpu"))
        config = network.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are not quantized any more
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(network.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "done").touch()
    return str(folder)


def collate(questions: Sequence[EncodedQuestion], choices: int, *, fixed: bool) -> Batch:
    """Pad questions into one batch on the device.

    Args:
        questions: Q of them.
        choices: C, the most that a question of the data has.
        fixed: pad to few shapes: Q · C sequences, a length of ``LENGTHS``, 32 Q scored tokens or a power of
            two times that.

    Returns:
        ``input_ids`` (S, T); ``sequence``, ``position``, ``token``, ``slot`` (R): where each scored token is
        predicted, what it is, and its choice (Q · C for padding); ``exists`` (Q, C); ``labels`` (Q).
    """
    sequences = [s for q in questions for s in q.sequences]
    length = max(map(len, sequences))
    count = len(sequences)
    if fixed:
        length = next(n for n in LENGTHS if n >= length)
        count = len(questions) * choices
    ids = torch.zeros(count, length, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    table, offset = [], 0
    exists = torch.zeros(len(questions), choices, dtype=torch.bool)
    for i, question in enumerate(questions):
        exists[i, : len(question.targets)] = True
        for c, targets in enumerate(question.targets):
            table += [(offset + s, position, token, i * choices + c) for s, position, token in targets]
        offset += len(question.sequences)
    if fixed:
        wanted = _SCORED * len(questions)
        while wanted < len(table):
            wanted *= 2
        table += [(0, 0, 0, exists.numel())] * (wanted - len(table))
    sequence, position, token, slot = torch.tensor(table).unbind(1)
    batch = {"input_ids": ids, "sequence": sequence, "position": position, "token": token, "slot": slot}
    batch |= {"exists": exists, "labels": torch.tensor([q.answer for q in questions])}
    return {name: t.contiguous().to(DEVICE, non_blocking=True) for name, t in batch.items()}


def scores(model: Any, batch: Batch) -> Tensor:
    """Return each choice's log-likelihood, fp32 (Q, C); -inf where there is none.

    Padding is on the right, where a causal model does not look, so no mask is needed; only the hidden states
    that predict a scored token go through the vocabulary projection.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = network.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    logits = network.lm_head(hidden[batch["sequence"], batch["position"]]).float()
    chosen = logits.gather(1, batch["token"][:, None]).squeeze(1) - logits.logsumexp(-1)
    sums = torch.zeros(batch["exists"].numel() + 1, device=logits.device)
    sums = sums.index_add(0, batch["slot"], chosen)[:-1].view(batch["exists"].shape)
    return sums.masked_fill(~batch["exists"], float("-inf"))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(scores(model, batch), batch["labels"])


def measured(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return what ``metrics.summary`` does, without torchmetrics, which a GPU machine may lack."""
    return {
        "accuracy": float((probs.argmax(1) == labels).double().mean()),
        "ece": metrics.reliability_bins(probs, labels, 15).ece,
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
    }


class Data:
    """Questions to predict, batched once for all runs."""

    def __init__(self, encoded: Sequence[EncodedQuestion]) -> None:
        self.encoded = list(encoded)
        self.labels = torch.tensor([q.answer for q in encoded])
        self.choices = max(len(q.targets) for q in encoded)
        self._groups: list[list[int]] = []
        self._batches: list[Batch] = []

    @torch.no_grad()
    def predict(
        self, model: Any, weights: Sequence[Callable[[], AbstractContextManager[Any]]] = (nullcontext,)
    ) -> Tensor:
        """Return probabilities (N, C) averaged over contexts that put weights into the model."""
        if not self._batches:
            self._groups = batches_by_length(self.encoded, _PASS_TOKENS, max_questions=256)
            parts = ([self.encoded[i] for i in group] for group in self._groups)
            self._batches = [collate(part, self.choices, fixed=False) for part in parts]
        order = torch.tensor([i for group in self._groups for i in group])
        total = torch.zeros(len(self.encoded), self.choices, dtype=torch.float64, device=DEVICE)
        for context in weights:
            with context():
                total += torch.cat([scores(model, batch).softmax(-1) for batch in self._batches])
        probs = torch.empty_like(total, device="cpu")
        probs[order] = total.cpu() / len(weights)
        return probs
