"""HF Trainer with its training step as CUDA graphs. Imports transformers, so it is loaded on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from bayeslora.capture import _end_generator_capture, _pad

_logger = logging.getLogger("bayeslora")


class CapturedTrainerMixin:
    """Records Trainer's ``training_step`` (forward and backward of a micro-batch) in a CUDA graph per shape.

    At small batches eager training waits for the host, and a graph replays the same kernels without it. For
    a subclass of Trainer of your own::

        class MyCapturedTrainer(bayeslora.CapturedTrainerMixin, MyTrainer):
            pass

    ``compute_loss`` then runs only while a graph is recorded: what it does on the host it does no more.
    (TRL's SFTTrainer reads metrics there from the GPU, which cannot be recorded, and so trains eagerly.)

    All else is Trainer's: accumulation, clipping, the optimizer (any, and :class:`bayeslora.IVON` draws its
    sample before the graph and steps after it), the scheduler, logging, checkpoints, resume. Those are a
    few launches, which the host makes while the graph still runs, so nothing is gained by recording them.
    Set ``logging_nan_inf_filter=False``: Trainer otherwise waits for the loss of every micro-batch.

    The first ``capture_warmup`` micro-batches of a shape run eagerly, then one is recorded and every later
    one replayed. Where that is impossible (no GPU, several processes, a host sync in the model) training
    goes on eagerly and one log line says why.

    Args:
        args: positional arguments of Trainer.
        pad_lengths: lengths to which ``(batch, length)`` tensors are padded on the right (with 0; ``labels``
            with -100), so that few shapes need a graph. Needs ``attention_mask`` in the batch.
        capture_warmup: eager micro-batches of each shape, >= 1.
        max_graphs: shapes that get a graph; any further ones run eagerly.
        kwargs: keyword arguments of Trainer.

    Raises:
        ValueError: ``capture_warmup`` is less than 1.
    """

    def __init__(
        self,
        *args: Any,
        pad_lengths: Sequence[int] = (),
        capture_warmup: int = 3,
        max_graphs: int = 8,
        **kwargs: Any,
    ) -> None:
        if capture_warmup < 1:
            raise ValueError(f"capture_warmup must be >= 1, got {capture_warmup!r}")
        super().__init__(*args, **kwargs)
        self.step_graphs = _StepGraphs(sorted(pad_lengths), capture_warmup, max_graphs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run forward and backward of one micro-batch, by its graph if there is one; return its loss."""
        graphs = self.step_graphs
        if not graphs.eager and (reason := _reason_for_eager(self)) is not None:
            graphs.go_eager(reason)
        eager_step = super().training_step  # type: ignore[misc]
        if graphs.eager:
            return eager_step(model, inputs, num_items_in_batch)
        trainer: Any = self
        inputs = trainer._prepare_inputs(inputs)
        optimizer = trainer.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # IVON's sample; within the step it is then drawn already
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        accumulates = trainer.args.gradient_accumulation_steps > 1
        step = _Step(eager_step, model, micro_batches, accumulates)
        return graphs(step, inputs, num_items_in_batch)


class CapturedTrainer(CapturedTrainerMixin, Trainer):
    """HF Trainer with :class:`CapturedTrainerMixin`."""


@dataclass(frozen=True)
class _Step:
    """Trainer's eager step, and what of the trainer's state goes into its kernels."""

    run: Callable[[nn.Module, dict[str, Any], Any], Tensor]
    model: nn.Module
    micro_batches: int  # by which the loss is divided
    accumulates: bool


@dataclass
class _Recorded:
    """A recorded micro-batch: its graph, the memory its inputs are copied to, and what it writes."""

    graph: Any
    inputs: dict[str, Any]
    num_items: Any
    loss: Tensor
    grads: list[Tensor | None]


class _StepGraphs:
    """The graphs of one trainer; they share one pool of memory, since one runs at a time."""

    def __init__(self, pad_lengths: Sequence[int], warmup: int, max_graphs: int) -> None:
        self.eager = False
        self._pad_lengths, self._warmup, self._max_graphs = pad_lengths, warmup, max_graphs
        self._aside: Any = None  # the stream of eager steps: the allocator keeps memory by stream
        self._forget([])

    @property
    def captured(self) -> int:
        """The number of graphs recorded so far."""
        return len(self._recorded)

    def go_eager(self, reason: str) -> None:
        """Run everything eagerly from now on, and say why."""
        self.eager = True
        self._forget([])
        _logger.warning("CapturedTrainer runs eagerly: %s", reason)

    def _forget(self, params: list[nn.Parameter]) -> None:
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None
        self._seen: dict[Any, int] = {}
        self._params = params
        self._addresses = [p.data_ptr() for p in params]
        self._used = [False] * len(params)  # which have had a gradient
        self._sums: list[Tensor | None] = []  # of gradients, where micro-batches accumulate

    def __call__(self, step: _Step, inputs: Mapping[str, Any], num_items: Any) -> Tensor:
        params = [p for p in step.model.parameters() if p.requires_grad]
        if list(map(id, params)) != list(map(id, self._params)) or self._addresses != [
            p.data_ptr() for p in params
        ]:
            self._forget(params)
        padded = dict(_pad(inputs, self._pad_lengths)) if self._pad_lengths else dict(inputs)
        key = (step.micro_batches, step.model.training, _signature({**padded, "num_items": num_items}))
        grads = [p.grad for p in params]
        fresh = all(grad is None for grad in grads)
        adding = step.accumulates and bool(self._sums) and all(map(is_, grads, self._sums))
        if key in self._recorded and (fresh or adding):
            return self._replay(self._recorded[key], padded, num_items, fresh and step.accumulates)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= self._warmup or not fresh or len(self._recorded) >= self._max_graphs:
            return self._run_aside(step, padded, num_items)
        recorded = self._record(step, padded, num_items)
        if recorded is None:
            return step.run(step.model, padded, num_items)
        self._recorded[key] = recorded
        return self._replay(recorded, padded, num_items, step.accumulates)

    def _run_aside(self, step: _Step, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """An eager step on a side stream, as warm-up before a recording wants it."""
        stream = self._aside = self._aside or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._run(step, inputs, num_items)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _run(self, step: _Step, inputs: dict[str, Any], num_items: Any) -> Tensor:
        loss = step.run(step.model, inputs, num_items)
        self._used = [used or p.grad is not None for used, p in zip(self._used, self._params, strict=True)]
        return loss

    def _record(self, step: _Step, inputs: dict[str, Any], num_items: Any) -> _Recorded | None:
        """Record a micro-batch (nothing is executed); None if it cannot be recorded.

        Where micro-batches accumulate, all graphs add to one set of gradients; else each has its own.
        """
        static = {name: t.clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
        items = num_items.clone() if isinstance(num_items, Tensor) else num_items
        if step.accumulates:
            pairs = zip(self._params, self._used, strict=True)
            self._sums = self._sums or [torch.zeros_like(p) if used else None for p, used in pairs]
            self._hold(self._sums)
        try:
            # The step may take things out of the mapping.
            graph, loss = self._capture(lambda: step.run(step.model, dict(static), items))
        except RuntimeError as error:
            self._hold([None] * len(self._params))
            self.go_eager(f"the step cannot be captured: {str(error).splitlines()[0]}")
            return None
        return _Recorded(graph, static, items, loss, [p.grad for p in self._params])

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the data loader's thread may go on pinning memory.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = run()
        except RuntimeError:
            _end_generator_capture()
            raise
        return graph, loss

    def _replay(self, recorded: _Recorded, inputs: dict[str, Any], num_items: Any, clear: bool) -> Tensor:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                recorded.inputs[name].copy_(value, non_blocking=True)
        if isinstance(num_items, Tensor):
            recorded.num_items.copy_(num_items, non_blocking=True)
        if clear:
            torch._foreach_zero_([grad for grad in self._sums if grad is not None])
        recorded.graph.replay()
        self._hold(recorded.grads)
        return recorded.loss.clone()

    def _hold(self, grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(self._params, grads, strict=True):
            p.grad = grad


def _signature(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (name, v.shape, v.dtype, v.device) if isinstance(v, Tensor) else (name, repr(v))
        for name, v in values.items()
    )


def _reason_for_eager(trainer: Any) -> str | None:
    if trainer.args.device.type != "cuda":
        return "the model is not on a CUDA device"
    if trainer.accelerator.num_processes > 1 or trainer.args.n_gpu > 1:
        return "several GPUs take part"
    if trainer.args.torch_empty_cache_steps is not None:
        return "torch_empty_cache_steps is set"
    return None
