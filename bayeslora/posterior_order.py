"""Whose row is whose: whether a model keeps the samples of one pass apart, found out by a probe.

A model may put the sequence before the batch, flatten or gather rows, read a table of classes through a
patched layer, or mix the rows of a batch; no shape tells for certain. So before the first batch of a kind,
its first row is run

- alone, which nothing can go wrong with;
- four times at once, where every patched layer puts something else, eight times as large, in the place of
  what it takes for the outputs of three of the four. The fourth must come out as it did alone, and the
  others not.

(NaN would be no better sign: some attention kernels make zeros of it, others read a neighbour's rows times
zero.) What the layers have read is kept: how many rows each for one of the batch. In every later pass they
must read the same, which an expert that gathers its tokens does not.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .lora_samples import NotBatched
from .reversible import Held, Reversible

if TYPE_CHECKING:
    from .posterior_batched import SampledLayers

_COPIES, _CLEAN, _TAGGED = 4, 1, (0, 2, 3)
"""Copies of the row, the one left as it is, and the others: before it and after it, and not the same turned
round, so that neither a sorted nor a reversed batch looks right."""

SCALARS = (bool, int, float, str, type(None))
"""What no call changes."""

_NOT_BY_ROW = frozenset({"cache_position", "logits_to_keep", "head_mask"})
"""Arguments of forward whose first dimension is not the batch's, and which serve any batch."""


# ---- batches ---------------------------------------------------------------------------------------


def items(batch: Any) -> list[tuple[str | None, Any]]:
    """Return names and values of what a model is called with: a mapping, a tuple or a single value."""
    if isinstance(batch, Mapping):
        return list(batch.items())
    return [(None, value) for value in (batch if isinstance(batch, tuple) else (batch,))]


def changed(batch: Any, change: Callable[[str | None, Any], Any]) -> Any:
    """Return the batch with each value changed."""
    if isinstance(batch, Mapping):
        return {name: change(name, value) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(change(None, value) for value in batch)
    return change(None, batch)


def count_rows(batch: Any) -> int:
    """Return the first dimension of the batch's first tensor.

    Raises:
        NotBatched: there is none.
    """
    for _, value in items(batch):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise NotBatched("the batch holds no tensor")


class ByRow:
    """A batch whose rows can be repeated.

    Args:
        batch: what the model is called with.
        least_dim: tensors of fewer dimensions have no rows.
        shared: tells of a value that is not a tensor whether it serves any number of rows.

    Raises:
        NotBatched: it is empty, or a value has no row a sequence.
    """

    def __init__(
        self,
        batch: Any,
        least_dim: int = 1,
        shared: Callable[[str | None, Any], bool] = lambda _, value: isinstance(value, SCALARS),
    ) -> None:
        self._batch, self._least_dim = batch, least_dim
        self.rows = count_rows(batch)
        if not self.rows:
            raise NotBatched("the batch is empty")
        kinds: list[Any] = []
        self.sizes: list[int] = []
        """Of all dimensions but the first of the tensors with rows."""
        for name, value in items(batch):
            if not isinstance(value, Tensor):
                if not shared(name, value):
                    raise NotBatched(
                        f"{name or 'the batch'} is a {type(value).__name__}, which cannot be repeated"
                    )
                kinds.append((name, value if isinstance(value, (bool, int, str)) else type(value)))
                continue
            by_row = self._has_rows(name, value)
            if by_row:
                self.sizes += value.shape[1:]
            kinds.append((name, by_row, value.dtype, tuple(size == 1 for size in value.shape[1:])))
        self.kind = tuple(kinds)
        """Equal for batches that a model treats alike, whatever their sizes."""

    def _has_rows(self, name: str | None, value: Tensor) -> bool:
        if value.dim() < self._least_dim or name in _NOT_BY_ROW:
            return False
        if name == "position_ids" and value.dim() == 2 and value.shape[0] == 1 < self.rows:
            return False  # the same for all
        if value.shape[0] != self.rows or (name == "position_ids" and value.dim() == 3):
            # an image's patches, an image for one prompt or for all, packed sequences' ends
            raise NotBatched(f"{name or 'a tensor'} has shape {tuple(value.shape)} for {self.rows} sequences")
        return True

    def repeated(self, times: int, rows: int | None = None) -> Any:
        """Return the batch, or its first ``rows``, repeated: all rows of sample 0, then of sample 1."""

        def change(name: str | None, value: Any) -> Any:
            if not isinstance(value, Tensor) or not self._has_rows(name, value):
                return value
            return value[:rows].repeat(times, *[1] * (value.dim() - 1))

        return changed(self._batch, change)


# ---- the probe -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowOrder:
    """What the layers of a model that keeps samples apart have read for each row of the batch.

    Args:
        multiples: of each layer; n > 0 rows, or as many as the size ``-1 - n`` of the batch says.
    """

    multiples: dict[nn.Module, frozenset[int]]

    def rows(self, together: Iterable[int], sizes: Sequence[int]) -> dict[nn.Module, frozenset[int]]:
        """Return the first dimensions that each layer may read.

        Args:
            together: the rows of all samples; several where beams multiply them.
            sizes: the batch's, `ByRow.sizes`.
        """
        together = list(together)
        allowed = {
            kind: frozenset(rows * (n if n > 0 else sizes[-1 - n]) for rows in together for n in kind)
            for kind in set(self.multiples.values())
        }
        return {layer: allowed[kind] for layer, kind in self.multiples.items()}


class RowOrders:
    """The orders found for a model, by the kind of batch; found anew where its modules have changed."""

    def __init__(self) -> None:
        self._found: tuple[list[Any], dict[Any, RowOrder | str]] = ([], {})

    def get(self, model: nn.Module, kind: Any, find: Callable[[], RowOrder]) -> RowOrder:
        """Return the order for a kind of batch.

        Raises:
            NotBatched: the model does not keep samples apart.
        """
        modules = [(m, type(m), m.__dict__.get("forward")) for m in model.modules()]
        if self._found[0] != modules:
            self._found = modules, {}
        found = self._found[1]
        if kind not in found:
            try:
                found[kind] = find()
            except NotBatched as reason:
                found[kind] = str(reason)
        order = found[kind]
        if isinstance(order, str):
            raise NotBatched(order)
        return order

    def refuse(self, kind: Any, reason: str) -> None:
        """Have no further pass of a kind of batch: one was not as the probe."""
        self._found[1][kind] = reason


class _Eager(Reversible):
    """Compiled code runs as it was written, by one thread at a time; nothing where nothing is compiled."""

    _lock = threading.RLock()
    _stance: Any = None

    def __init__(self) -> None:
        self._turn = Held(self._lock)

    def enter(self) -> None:
        if "torch._dynamo" in sys.modules:
            self._turn.enter()
            self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        self._turn.leave()


def find_order(
    layers: SampledLayers,
    model: nn.Module,
    batch: ByRow,
    run: Callable[[Any], Sequence[Tensor]],
    seed: int,
    variance_scale: float,
) -> RowOrder:
    """Run the probe.

    Args:
        layers: those of the posterior.
        model: its model, in eval mode.
        batch: the kind of batch.
        run: calls the model with a batch and returns tensors of logits, one row a row.
        seed: name of a sample.
        variance_scale: factor on its variance.

    Raises:
        NotBatched: the model does not keep samples apart.
    """

    def probe() -> RowOrder:
        buffers = [(b, b._version) for b in model.buffers()]
        by_itself = layers.active([seed], variance_scale).run(lambda: run(batch.repeated(1, 1)))
        after = [(b, b._version) for b in model.buffers()]
        if len(after) != len(buffers) or any(
            a is not b or i != j for (a, i), (b, j) in zip(buffers, after, strict=True)
        ):
            raise NotBatched("the model changes its buffers when it is called")
        shared = layers.active([seed] * _COPIES, variance_scale, tagged=_TAGGED)
        together = shared.run(lambda: run(batch.repeated(_COPIES, 1)))
        _check(by_itself, together, shared.dtypes)
        return RowOrder({layer: _multiples(rows, batch.sizes) for layer, rows in shared.read.items()})

    return _Eager().run(probe)


def _multiples(rows: set[int], sizes: Sequence[int]) -> frozenset[int]:
    found: set[int] = set()
    for first in rows:
        n = first // _COPIES
        same = {-1 - i for i, size in enumerate(sizes) if size == n}
        found |= {1} if n == 1 else same or {n}
    return frozenset(found)


def _check(by_itself: Sequence[Tensor], together: Sequence[Tensor], dtypes: set[torch.dtype]) -> None:
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, by_itself[0].dtype))
    if torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, 2.0**-10)  # TF32
    for alone, found in zip(by_itself, together, strict=True):
        if not found.is_floating_point() or found.shape != (_COPIES, *alone.shape[1:]):
            raise NotBatched(f"{found.dtype} output has shape {tuple(found.shape)} for {_COPIES} sequences")
        atol = math.sqrt(eps) * alone.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        same = found.double().isclose(alone.double(), rtol=0.0, atol=atol, equal_nan=True).flatten(1).all(1)
        if not same[_CLEAN]:
            raise NotBatched("the model mixes the rows of its batch, or does not keep their order")
        if same[list(_TAGGED)].any():
            raise NotBatched("the samples do not reach every row of the output")
