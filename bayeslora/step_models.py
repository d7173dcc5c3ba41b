"""What ``step_benchmark.py`` trains: known shapes with random weights; copies share the frozen ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Llama-3.2-3B": _LLAMA | {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192,
    },
    "Llama-3-8B": _LLAMA | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "toy": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        shape: a key of ``SHAPES``, or any name if ``config`` is given.
        batch: sequences a step, each of ``length`` tokens.
        length: see ``batch``.
        rank: of the adapters.
        targets: PEFT's ``target_modules``.
        config: a transformers configuration of a causal language model, instead of a shape.
    """

    shape: str
    batch: int
    length: int
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    config: Any = None

    def model_config(self) -> Any:
        """Return the transformers configuration.

        Raises:
            ValueError: the shape is not known.
        """
        if self.config is not None:
            return self.config
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {self.shape!r}")
        from transformers import LlamaConfig

        return LlamaConfig(**SHAPES[self.shape])


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a frozen model with random weights, made on its device, whose embeddings want a gradient.

    So the frozen base alone differentiates the same chain as every model with adapters.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.get_input_embeddings().register_forward_hook(_require_gradient)
    return model.requires_grad_(False).train()


def _require_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def sharing_copy(model: nn.Module, but: Iterable[Tensor] = ()) -> Any:
    """Return a copy of the modules that shares every parameter and buffer, ``but`` some."""
    own = {id(p) for p in but}
    memo = {id(t): t for t in chain(model.parameters(), model.buffers()) if id(t) not in own}
    return copy.deepcopy(model, memo)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that want a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def clear_gradients(model: nn.Module) -> None:
    """Drop every parameter's gradient, so that the next backward pass makes new ones."""
    for p in model.parameters():
        p.grad = None
