"""A whole training step (sample, forward, backward, clip, update) as one CUDA graph.

At small batches eager training waits for the host: a graph replays the same kernels without it. IVON makes
that possible because its counters, its hyperparameters and its noise live on the device: each replay draws
fresh noise and takes the step that eager training would have taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.ivon import IVON
from bayeslora.ivon_distributed import is_sharded

_logger = logging.getLogger("bayeslora")

Batch = Mapping[str, Tensor]
_PAD_VALUES = {"labels": -100}


@dataclass
class _Graph:
    """One captured step: its graph, the memory its inputs are copied to, its loss, and what it refers to."""

    graph: torch.cuda.CUDAGraph
    inputs: list[dict[str, Tensor]]
    loss: Tensor
    kept: list[Any]
    memory: tuple[Any, Any]


class CapturedStep:
    """A training step that replays a CUDA graph per input shape; made by :func:`capture_step`.

    Calling it takes one optimizer step and returns the loss (mean over micro-batches), a scalar tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        *,
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        max_grad_norm: float | None,
        accumulation_steps: int,
        pad_lengths: Sequence[int],
        warmup: int,
        max_graphs: int,
        reason_for_eager: str | None,
    ) -> None:
        self.model = model
        self.opt = opt
        self.loss_fn = loss_fn
        self.max_grad_norm = max_grad_norm
        self.accumulation_steps = accumulation_steps
        self.pad_lengths = sorted(pad_lengths)
        self.warmup = warmup
        self.max_graphs = max_graphs
        self._params: list[Tensor] = []
        self._graphs: dict[Any, _Graph] = {}
        self._pool: Any = (
            None  # of the graphs' memory: one runs at a time, and nothing in it outlives its step
        )
        self._aside: Any = None  # the stream of eager steps: the allocator keeps memory by stream
        self._seen: dict[Any, int] = {}
        self._eager = False
        if reason_for_eager is not None:
            self._go_eager(reason_for_eager)

    @property
    def captured(self) -> int:
        """The number of graphs captured so far; 0 where every step runs eagerly."""
        return len(self._graphs)

    def __call__(self, batch: Batch | Sequence[Batch]) -> Tensor:
        """Take one optimizer step.

        Args:
            batch: a mapping of tensors; with ``accumulation_steps`` n > 1, a sequence of n of them.

        Returns:
            The mean loss of the micro-batches, a scalar tensor on the model's device.

        Raises:
            ValueError: the number of micro-batches is not ``accumulation_steps``, or a sequence that
                needs padding comes without ``attention_mask`` or is longer than every pad length.
        """
        parts = [batch] if isinstance(batch, Mapping) else list(batch)
        if len(parts) != self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps is {self.accumulation_steps}, got {len(parts)} micro-batches"
            )
        parts = [_pad(part, self.pad_lengths) for part in parts]
        self._params = [p for group in self.opt.param_groups for p in group["params"]]  # one may be new
        if self._eager:
            return self._run(parts)
        memory = self._memory()
        if any(not _same_memory(graph.memory, memory) for graph in self._graphs.values()):
            self._graphs.clear()  # load_state_dict() or a move: what was recorded writes to old memory
            self._seen.clear()
            self._pool = None
        key = tuple((name, t.shape, t.dtype) for part in parts for name, t in part.items())
        watched = isinstance(self.opt, IVON) and self.opt.watches_next_step
        if key in self._graphs and not watched:
            return self._replay(self._graphs[key], parts)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if watched or seen <= self.warmup or len(self._graphs) >= self.max_graphs:
            return self._run_aside(parts)
        captured = self._capture(parts)
        if captured is None:
            return self._run(parts)
        self._graphs[key] = captured
        return self._replay(captured, parts)

    def _run(self, parts: Sequence[Batch]) -> Tensor:
        """The step itself, eager or under capture."""
        for p in self._params:
            p.grad = None
        if isinstance(self.opt, IVON):
            self.opt.train()
        total: Tensor | None = None
        for part in parts:
            loss = self.loss_fn(self.model, part) / len(parts)
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self.max_grad_norm)
        self.opt.step()
        assert total is not None
        return total

    def _run_aside(self, parts: Sequence[Batch]) -> Tensor:
        """An eager step on a side stream, as warm-up before a capture wants it."""
        stream = self._aside = self._aside or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._run(parts)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self, parts: Sequence[Batch]) -> _Graph | None:
        """Record the step for these shapes (nothing is executed); None if it cannot be recorded."""
        inputs = [{name: t.clone() for name, t in part.items()} for part in parts]
        ivon = self.opt if isinstance(self.opt, IVON) else None
        if ivon is not None:
            ivon.prepare_capture()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a data loader's thread may go on pinning memory.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._run(inputs)
        except RuntimeError as error:
            if ivon is not None:
                ivon.finish_capture(recorded=False)
            _end_generator_capture()
            self._go_eager(f"the step cannot be captured: {str(error).splitlines()[0]}")
            return None
        kept: list[Any] = [p.grad for p in self._params]
        if ivon is not None:
            kept += ivon.finish_capture(recorded=True)
        return _Graph(graph, inputs, loss, kept, self._memory())

    def _memory(self) -> tuple[list[int], Any]:
        """Return the parameters' addresses and IVON's buckets, with this step's learning rate on the device.

        A graph cannot read the learning rate from the host.
        """
        buckets = self.opt.refresh_hyperparameters() if isinstance(self.opt, IVON) else None
        return [p.data_ptr() for p in self._params], buckets

    def _replay(self, captured: _Graph, parts: Sequence[Batch]) -> Tensor:
        for static, part in zip(captured.inputs, parts, strict=True):
            for name, tensor in part.items():
                static[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        if isinstance(self.opt, IVON):
            self.opt.count_step()
        return captured.loss.clone()

    def _go_eager(self, reason: str) -> None:
        self._eager = True
        self._graphs.clear()
        _logger.warning("capture_step runs eagerly: %s", reason)


def capture_step(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    max_grad_norm: float | None = None,
    accumulation_steps: int = 1,
    pad_lengths: Sequence[int] = (),
    warmup: int = 3,
    max_graphs: int = 8,
) -> CapturedStep:
    """Return a function that takes a whole training step, as one CUDA graph per input shape.

    The first ``warmup`` steps of each shape run eagerly; the next records a graph, and later ones replay
    it. All of them are steps of the same run: nothing is trained twice. Where capture is impossible (no
    GPU, a host sync in the model, an optimizer that is not capturable), every step runs eagerly and one log
    line says why. ::

        step = bayeslora.capture_step(model, opt, max_grad_norm=1.0, pad_lengths=(128, 256, 512))
        for batch in loader:
            loss = step(batch)
            scheduler.step()

    Args:
        model: the model, on its device, in train mode.
        opt: a :class:`bayeslora.IVON`, also one wrapped by accelerate, or another optimizer built with
            ``capturable=True``.
        loss_fn: ``loss_fn(model, batch)`` -> scalar loss; None for ``model(**batch).loss``.
        max_grad_norm: clip the gradients' total norm to it, as ``torch.nn.utils.clip_grad_norm_``.
        accumulation_steps: micro-batches a step, >= 1; their losses are averaged.
        pad_lengths: sequence lengths to which ``(batch, length)`` tensors are padded on the right (with 0;
            ``labels`` with -100), so that few shapes need a graph. Needs ``attention_mask`` in the batch.
        warmup: eager steps before a shape is captured, >= 1.
        max_graphs: shapes that get a graph; any further ones run eagerly.

    Returns:
        A callable :class:`CapturedStep`.

    Raises:
        ValueError: ``accumulation_steps`` or ``warmup`` is less than 1.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be >= 1, got {accumulation_steps!r}")
    if warmup < 1:
        raise ValueError(f"warmup must be >= 1, got {warmup!r}")
    wrapped = getattr(opt, "optimizer", None)
    if isinstance(wrapped, IVON):  # by accelerate
        opt = wrapped
    return CapturedStep(
        model,
        opt,
        loss_fn=loss_fn or (lambda module, batch: module(**batch).loss),
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
        pad_lengths=pad_lengths,
        warmup=warmup,
        max_graphs=max_graphs,
        reason_for_eager=_reason_for_eager(opt),
    )


def _same_memory(recorded: tuple[Any, Any], now: tuple[Any, Any]) -> bool:
    return recorded[0] == now[0] and recorded[1] is now[1]


def _end_generator_capture() -> None:
    """Free the device's random generator from a recording that failed (torch leaves it in capture mode)."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _reason_for_eager(opt: torch.optim.Optimizer) -> str | None:
    params = [p for group in opt.param_groups for p in group["params"]]
    if not all(p.is_cuda for p in params):
        return "not every parameter is on a CUDA device"
    if isinstance(opt, IVON):
        talks = opt.sync or any(map(is_sharded, params))
        return "IVON's step talks to other processes" if talks else None
    if not all(group.get("capturable", False) for group in opt.param_groups):
        return f"{type(opt).__name__} was not built with capturable=True"
    return None


def _pad(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Pad ``(batch, length)`` tensors on the right to the next of ``lengths``."""
    if not lengths:
        return batch
    longest = max((t.shape[1] for t in batch.values() if t.dim() == 2), default=0)
    target = next((length for length in lengths if length >= longest), None)
    if target is None:
        raise ValueError(f"a sequence of {longest} is longer than every pad length {list(lengths)}")
    if any(t.dim() == 2 and t.shape[1] != target for t in batch.values()) and "attention_mask" not in batch:
        raise ValueError("pad_lengths needs 'attention_mask' in the batch, else padding would be attended to")
    return {
        name: nn.functional.pad(t, (0, target - t.shape[1]), value=_PAD_VALUES.get(name, 0))
        if t.dim() == 2
        else t
        for name, t in batch.items()
    }
