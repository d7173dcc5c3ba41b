"""Laplace-LoRA (Yang et al., 2024): a Gaussian around AdamW's weights, sampled or linearized.

The precision is N F + p, with F the Fisher information of answers drawn from the model over N training
questions, as its diagonal or as a Kronecker product a matrix (KFAC, expanded over tokens), and the prior
precision p with the lowest validation NLL. Linearized, a question's logits are Gaussian: the trained model's,
with the covariance J (N F + p)⁻¹ Jᵀ of the logits' Jacobian J over all adapters.

All of it is made of inputs x and output gradients g of LoRA's linear layers: a question's gradient is
Σ g xᵀ over its tokens, so a batch needs one backward pass a choice and none a question.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from study_model import DEVICE, Batch, Data, Packed, collate, scores
from torch import Tensor, nn

import bayeslora
from bayeslora import Posterior, metrics
from bayeslora.posterior import GaussianParameter

ROWS = 1000  # training questions that the Fisher information is taken over
PRIORS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
_TOKENS = 2048  # a batch, whose activations are kept
_DRAWS = 512  # of a question's logits

Check = Callable[[], None]


@dataclass
class Layer:
    """A LoRA matrix's Fisher information.

    Attributes:
        diagonal: (out, in), mean over questions of the squared gradient.
        inputs: (in, in), mean of x xᵀ over tokens; then its eigenvectors, with ``input_values``.
        outputs: (out, out), sum of g gᵀ over tokens, mean over questions; likewise.
    """

    weight: nn.Parameter
    diagonal: Tensor
    inputs: Tensor
    outputs: Tensor
    input_values: Tensor | None = None
    output_values: Tensor | None = None

    def white(self, jacobian: Tensor, kind: str, rows: int, prior: float) -> Tensor:
        """Return (..., out, in) times the precision's inverse root, flattened."""
        if kind == "diagonal":
            return (jacobian * (rows * self.diagonal + prior).rsqrt()).flatten(-2)
        assert self.output_values is not None and self.input_values is not None
        precision = rows * torch.outer(self.output_values, self.input_values) + prior
        return ((self.outputs.T @ jacobian @ self.inputs) * precision.rsqrt()).flatten(-2)


@contextmanager
def taps(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Record each module's input and output in a forward pass."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[module] = (args[0].detach(), out)

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Laplace:
    """The approximation at a trained model, whose layers are PEFT's own from here on."""

    def __init__(self, model: Any, fit: Sequence[Packed], check: Check = lambda: None) -> None:
        bayeslora.unpatch(model)
        self.model, self.rows, self.check = model, len(fit), check
        names = [n for n, _ in model.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))]
        self.modules = [model.get_submodule(name) for name in names]
        self.names = [f"{name}.weight" for name in names]
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(fit), generator=generator)[:ROWS].tolist()
        self.layers = [self._empty(module.weight) for module in self.modules]
        tokens = 0
        for batch in batches([fit[i] for i in order]):
            check()
            tokens += self._gather(batch, len(order), generator)
        for layer in self.layers:
            layer.inputs /= tokens
            layer.input_values, layer.inputs = _eigen(layer.inputs)
            layer.output_values, layer.outputs = _eigen(layer.outputs)

    @staticmethod
    def _empty(weight: nn.Parameter) -> Layer:
        out, width = weight.shape
        shapes = ((out, width), (width, width), (out, out))
        return Layer(weight, *(torch.zeros(shape, device=weight.device) for shape in shapes))

    def _gather(self, batch: Batch, count: int, generator: torch.Generator) -> int:
        """Add a batch's Fisher information; return its number of tokens."""
        with taps(self.modules) as seen:
            logs = scores(self.model, batch).log_softmax(-1)
        answers = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(DEVICE)
        chosen = logs.gather(1, answers).sum()
        gradients = torch.autograd.grad(chosen, [seen[module][1] for module in self.modules])
        real = (batch["groups"] >= 0).unsqueeze(-1)
        for layer, module, gradient in zip(self.layers, self.modules, gradients, strict=True):
            x, g = (seen[module][0] * real).float(), gradient.float()
            layer.diagonal += torch.einsum("qto,qti->qoi", g, x).square().sum(0) / count
            layer.inputs += torch.einsum("qti,qtj->ij", x, x)
            layer.outputs += torch.einsum("qto,qtp->op", g, g) / count
        return int(real.sum())

    def posterior(self, prior: float) -> Posterior:
        """Return the diagonal posterior, to be sampled."""
        named = zip(self.names, self.layers, strict=True)
        rows = self.rows
        return Posterior(
            self.model,
            {
                name: GaussianParameter(
                    layer.weight,
                    layer.weight.detach().clone(),
                    layer.diagonal.clone(),
                    i,
                    float(rows),
                    prior / rows,
                )
                for i, (name, layer) in enumerate(named)
            },
        )

    def best_posterior(self, val: Data) -> Posterior:
        found = []
        for prior in PRIORS:
            posterior = self.posterior(prior)
            weights = [partial(posterior.sample, seed=seed) for seed in range(4)]
            found.append((metrics.nll(val.predict(self.model, weights, self.check), val.labels), prior))
        return self.posterior(min(found)[1])

    def linearized(self, val: Data, kind: str) -> Callable[[Data], Tensor]:
        """Return a function that predicts (N, C); ``kind`` is "diagonal" or "kfac"."""
        probs = self._predict(val, kind, PRIORS)
        best = min((metrics.nll(p, val.labels), prior) for p, prior in zip(probs, PRIORS, strict=True))[1]
        return lambda data: self._predict(data, kind, (best,))[0]

    def _predict(self, data: Data, kind: str, priors: Sequence[float]) -> list[Tensor]:
        order = sorted(range(len(data.questions)), key=lambda i: -len(data.questions[i].tokens))
        parts: list[list[Tensor]] = [[] for _ in priors]
        for batch in batches([data.questions[i] for i in order], data.choices):
            self.check()
            logits, covariances = self._logits(batch, kind, priors)
            for part, covariance in zip(parts, covariances, strict=True):
                part.append(_expected(logits, covariance))
        found = []
        for part in parts:
            probs = torch.empty(len(order), data.choices, dtype=torch.float64)
            probs[order] = torch.cat(part).cpu()
            found.append(probs)
        return found

    def _logits(self, batch: Batch, kind: str, priors: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Return (Q, C) logits and their (Q, C, C) covariance for each prior."""
        with taps(self.modules) as seen:
            logits = scores(self.model, batch)
        outputs = [seen[module][1] for module in self.modules]
        finite = logits.masked_fill(~batch["exists"], 0.0)
        columns = range(logits.shape[1])
        gradients = [
            torch.autograd.grad(finite[:, c].sum(), outputs, retain_graph=c < columns[-1]) for c in columns
        ]
        covariances = [torch.zeros(*logits.shape, logits.shape[1], device=DEVICE) for _ in priors]
        for i, (layer, module) in enumerate(zip(self.layers, self.modules, strict=True)):
            x = seen[module][0].float()
            g = torch.stack([gradients[c][i].float() for c in columns], dim=1)
            jacobian = torch.einsum("qcto,qti->qcoi", g, x)
            for j, prior in enumerate(priors):
                white = layer.white(jacobian, kind, self.rows, prior)
                covariances[j] += white @ white.mT
        return logits.detach(), covariances


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0.0), vectors


def _expected(logits: Tensor, covariance: Tensor) -> Tensor:
    """Return the softmax's mean over Gaussian logits, fp64 (Q, C)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
    noise = torch.randn(_DRAWS, logits.shape[1], generator=torch.Generator().manual_seed(0)).double()
    drawn = logits.double().unsqueeze(1) + noise.to(DEVICE) @ root.mT
    return drawn.softmax(-1).mean(1)


def batches(questions: Sequence[Packed], choices: int | None = None) -> Iterator[Batch]:
    """Batches of about ``_TOKENS`` tokens in the questions' order; sorted if ``choices`` is not given."""
    if choices is None:
        questions = sorted(questions, key=lambda q: -len(q.tokens))
    start = 0
    while start < len(questions):
        count = max(1, _TOKENS // len(questions[start].tokens))
        part = questions[start : start + count]
        yield collate(part, choices or max(q.choices for q in part), fixed=False)
        start += count
