"""A posterior sample for each group of a layer's rows: several samples in one pass through the model.

The rows of a batch come sample by sample, and each layer cuts the rows it gets into S groups::

    y_s = x_s Wᵀ + bias + scaling · x_s A_sᵀ B_sᵀ        A_s = A + σ_A ⊙ z(seed_s), B_s likewise

A and B are the posterior's own fp32 mean; nothing is written into the model. Two routes with the same
numbers, up to the rounding of the products:

- on a GPU, A and B are perturbed inside the kernels (``lora_perturbed.py``): no sample in memory;
- elsewhere, and where every sample takes few rows (a step of decoding), the samples are written once and
  kept while the pass is open: three products of torch's own, which cost the host less. That is done up
  to a quarter of the layer's own memory; from 64 samples of one row on always, since the GPU is faster too.

A pass is its thread's own: layers called from another thread know nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._backend import uses_triton
from .kernels import lora_perturbed_twin as twin
from .kernels.lora_perturbed_twin import Perturbation
from .lora_linear import LoraWeights
from .lora_products import cast
from .reversible import LOCK, Held, Reversible

_Result = TypeVar("_Result")

_KEPT_ROWS, _KEPT_FROM = 16, 64
_KEPT_SHARE = 4  # below that number, samples are kept where they take at most this part of the weight


class NotBatched(Exception):
    """A call that samples cannot share; the message says why."""


class LayerSamples:
    """The samples of one layer's A and B, one a group of rows.

    Args:
        adapter: name of the adapter that A and B are of.
        lora_a: ``(r, K)``, the mean of A, contiguous, fp32 or fp64.
        lora_b: ``(N, r)``, the mean of B, likewise.
        perturbation: standard deviations in the means' dtype, seeds, draws and streams.
        parameter_dtype: of the parameter that a sample would be written into, and rounded to.
    """

    def __init__(
        self,
        adapter: str,
        lora_a: Tensor,
        lora_b: Tensor,
        perturbation: Perturbation,
        parameter_dtype: torch.dtype,
    ) -> None:
        self.adapter = adapter
        self.lora_a, self.lora_b = lora_a, lora_b
        self.perturbation = perturbation
        self.parameter_dtype = parameter_dtype
        self._kept: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def apply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        """Return the layer's output ``(..., N)`` for x ``(S·b, ..., K)``, computed in ``dtype``.

        Raises:
            NotBatched: a sample in the parameter's dtype would be rounded twice.
        """
        if self.parameter_dtype not in (dtype, torch.float32, torch.float64):
            raise NotBatched(f"{self.parameter_dtype} adapters in a computation in {dtype}")
        if dtype == torch.float64 or not uses_triton(x.device) or self._keeps(x, weight):
            if torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    return self._products(x, weight, bias, scaling, dtype)
            return self._products(x, weight, bias, scaling, dtype)
        from .lora_perturbed import perturbed_layer

        layer = LoraWeights(weight, bias, self.lora_a, self.lora_b)
        return perturbed_layer(x, layer, scaling, self.perturbation, 0.0, None, dtype)

    def _keeps(self, x: Tensor, weight: Tensor) -> bool:
        """Tell whether written samples are to serve a GPU's call: few rows a sample, and memory for them."""
        groups = self.perturbation.seeds.numel()
        rows = x.numel() // (groups * x.shape[-1])
        if rows > _KEPT_ROWS:
            return False
        if rows == 1 and groups >= _KEPT_FROM:
            return True
        share = groups * (self.lora_a.numel() + self.lora_b.numel()) * _KEPT_SHARE
        return share <= weight.numel() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def _products(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        a, b = self._written(dtype)
        x = cast(x, dtype)
        y = F.linear(x, cast(weight, dtype), None if bias is None else cast(bias, dtype))
        hidden = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]), a.mT)
        y.view(a.shape[0], -1, y.shape[-1]).baddbmm_(hidden, b.mT, alpha=scaling)
        return y

    def _written(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the samples of A ``(S, r, K)`` and B ``(S, N, r)``, written at the first call."""
        if dtype not in self._kept:
            ops: Any = twin
            if uses_triton(self.lora_a.device) and dtype != torch.float64:
                from .kernels import lora_perturbed as ops
            p = self.perturbation
            index = p.seeds, p.draws
            self._kept[dtype] = (
                ops.sample_factors(self.lora_a, p.a_std, *index, p.a_stream, dtype),
                ops.sample_factors(self.lora_b, p.b_std, *index, p.b_stream, dtype),
            )
        return self._kept[dtype]


class _Open:
    """The open passes: of each thread one, the innermost."""

    def __init__(self) -> None:
        self.by_thread: dict[int, Pass] = {}
        self.any = False
        """Whether there is one: all that a layer outside of any asks, also in a compiled graph."""


OPEN = _Open()


class Pass(Reversible):
    """A call of the model, or several, in which each layer applies a sample to each group of its rows.

    Args:
        layers: the samples of each layer.
        groups: S, the number of samples.
        rows: the first dimensions that each layer's input may have; None for all multiples of S.
        tagged: groups whose outputs become something else, for all to see where they end up.
    """

    _thread: int | None = None

    def __init__(
        self,
        layers: Mapping[nn.Module, LayerSamples],
        groups: int,
        rows: Mapping[nn.Module, frozenset[int]] | None = None,
        tagged: Sequence[int] = (),
    ) -> None:
        self.layers, self._groups, self._rows, self._tagged = layers, groups, rows, list(tagged)
        self.read: dict[nn.Module, set[int]] = {}
        """The first dimensions of what each layer has read."""
        self.dtypes: set[torch.dtype] = set()
        """What tagged outputs were computed in."""

    def run(self, body: Callable[[], _Result]) -> _Result:
        """Return what ``body`` does within the pass.

        Raises:
            NotBatched: it has not called the same layers as the probe, or they have read something else.
        """
        result = super().run(body)
        if self._rows is not None and self._rows.keys() != self.read.keys():
            raise NotBatched("the model calls other layers than for the first row of the first batch")
        return result

    def enter(self) -> None:
        """Let this thread's calls of the layers apply the samples."""

        def enter() -> None:
            OPEN.by_thread[thread] = self
            OPEN.any = True

        thread = threading.get_ident()
        self._outer, self._thread = OPEN.by_thread.get(thread), thread
        Held(LOCK).run(enter)

    def leave(self) -> None:
        """Let them be called as before."""

        def leave() -> None:
            if self._thread is not None and OPEN.by_thread.get(self._thread) is self:
                if self._outer is None:
                    del OPEN.by_thread[self._thread]
                else:
                    OPEN.by_thread[self._thread] = self._outer
            OPEN.any = bool(OPEN.by_thread)

        if self._thread is not None:
            Held(LOCK).run(leave)

    def output(
        self, layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Return what ``layer`` makes of x ``(S·b, ..., K)``: ``(S·b, ..., N)``, computed in ``dtype``.

        Raises:
            NotBatched: x's first dimension is not one that holds whole groups, in order.
        """
        first = x.shape[0]
        whole = not first % self._groups if self._rows is None else first in self._rows.get(layer, ())
        if x.dim() < 2 or not whole:
            raise NotBatched(f"a layer reads a tensor of shape {tuple(x.shape)}, which samples cannot share")
        self.read.setdefault(layer, set()).add(first)
        y = self.layers[layer].apply(x, weight, bias, scaling, dtype)
        if self._tagged:
            self.dtypes.add(dtype)
            by_group = y.view(self._groups, -1, y.shape[-1])
            by_group[self._tagged] = -8.0 * by_group[self._tagged].flip(-1)
        return y

    @cached_property
    def by_address(self) -> dict[tuple[int, int], nn.Module]:
        """The layers by the addresses of the parameters A and B: what a compiled graph knows of them."""
        found = {}
        for layer, samples in self.layers.items():
            a, b = (getattr(layer, side)[samples.adapter].weight for side in ("lora_A", "lora_B"))
            found[a.data_ptr(), b.data_ptr()] = layer
        return found


def current_pass() -> Pass | None:
    """Return the pass that this thread is in."""
    return OPEN.by_thread.get(threading.get_ident())
