"""A bucket: the tensors that one IVON launch covers, and the flat fp32 state behind them.

Every parameter of one device and one state dtype goes into one bucket. Its state (mean, momentum,
Hessian) lies in flat buffers; each tensor starts at a multiple of eight elements (plus its offset in a
group of four, if it is a shard), so that one Philox group of four normals never straddles two tensors
and loads can be 16 bytes wide::

    flat position  =  start[i] + k      holds element k of tensor i's local shard
    noise group    =  flat position // 4

Kernels find their work through ``rows``, one int64 row a tensor (columns ``PARAM_PTR`` ...), and
``tile_tensor``, the row index of each tile of ``BLOCK`` flat positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1024
"""Flat positions a tile covers. A multiple of 4; results do not depend on it."""

# Columns of ``rows``.
PARAM_PTR, START, NUMEL, GROUP_START, STREAM, PARAM_GROUP, DTYPE, FIRST_TILE = range(8)
ROW_WIDTH = 8

# Slots of ``control``, the device-side counters: steps taken, steps skipped, training samples drawn in
# finished steps; then the flag and the two barriers of the step kernel, zero between launches.
STEP, SKIPPED, DRAWS, NONFINITE, ARRIVED, DONE = range(6)
CONTROL_WIDTH = 8

# Columns of ``hyper``, one fp64 row a parameter group.
LR, BETA1, BETA2, WEIGHT_DECAY, ESS, CLIP_RADIUS, VARIANCE_SCALE = range(7)
HYPER_WIDTH = 8

# Columns of the gradient table: address (0: none), dtype code, whether the tensor is to be updated.
GRAD_WIDTH = 3

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


_FEW_CHANGES = 4  # hyperparameters that are set one by one
_KEPT_TABLES = 4  # gradient tables: eager training's gradients alternate between few sets of addresses

_address, _dtype = Tensor.data_ptr, attrgetter("dtype")


class DenseGrads(list[Tensor | None]):
    """Gradients that are contiguous, or None."""

    def __init__(self, grads: Iterable[Tensor | None]) -> None:
        """Take ``grads``, copied where they are not contiguous.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        super().__init__(grads)
        try:
            if all(map(Tensor.is_contiguous, self)):  # type: ignore[arg-type]
                return
        except (TypeError, RuntimeError):  # there is a None, or a sparse one
            pass
        for i, g in enumerate(self):
            if g is not None and g.layout != torch.strided:
                raise RuntimeError(f"IVON needs dense gradients, got {g.layout} for shape {tuple(g.shape)}")
            self[i] = g if g is None else g.contiguous()


class _GradTable(NamedTuple):
    """A gradient table on the device, and what it was made from."""

    pointers: list[int]
    dtypes: list[torch.dtype | None]
    active: list[bool] | None
    table: Tensor  # int64 [tensors, GRAD_WIDTH]
    aligned: bool  # whether all addresses are multiples of 16 bytes


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state of a parameter: fp32, or fp64 for fp64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _round_up_8(n: int) -> int:
    return (n + 7) // 8 * 8


class ParamBucket:
    """Parameters of one device and one state dtype, with their flat state.

    Args:
        params: dense floating-point tensors.
        streams: the noise stream of each tensor.
        param_groups: index into the hyperparameter table of each tensor.
        element_offsets: index in the global tensor of each local tensor's first element (0 unless
            the tensor is a shard).
        with_momentum: whether the bucket carries a momentum buffer (a posterior needs none).
        num_groups: rows of the hyperparameter table.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        streams: Sequence[int],
        param_groups: Sequence[int],
        element_offsets: Sequence[int] | None = None,
        *,
        with_momentum: bool = True,
        num_groups: int = 1,
    ) -> None:
        self.params = list(params)
        self.owners = self.params  # whose gradients belong to them: DTensors, where these are local shards
        self.tied: list[tuple[int, Tensor, Any]] = []  # index, another parameter over its memory, and how
        self.streams = list(streams)
        self.param_groups = list(param_groups)
        self.element_offsets = list(element_offsets or [0] * len(self.params))
        self.num_groups = num_groups
        self.device = self.params[0].device
        self.dtype = state_dtype(self.params[0].dtype)
        self.starts, self.size = self._lay_out()
        self.mean = self._zeros(self.size)
        self.hess = self._zeros(self.size)
        self.momentum = self._zeros(self.size) if with_momentum else None
        self._averages: tuple[Tensor, Tensor, Tensor] | None = None
        self.control = torch.zeros(CONTROL_WIDTH, dtype=torch.int64, device=self.device)
        self.beta1_power = torch.ones(num_groups, dtype=torch.float64, device=self.device)
        self.hyper = torch.zeros(num_groups, HYPER_WIDTH, dtype=torch.float64, device=self.device)
        self.twin_noise: tuple[int, int, Tensor] | None = None  # (seed, draw, normals), kept by the twin
        self._recorded_table: Tensor | None = None
        self._recorded_rows: Tensor | None = None
        self._hyper_values: list[list[float]] | None = None
        self._tables: list[_GradTable] = []
        self.hyper_key: Any = None  # what the optimizer made the table from
        self.launches: dict[Any, tuple[Tensor | None, Any]] = {}  # by the kernels: table, bound launch

    def apart(self) -> ParamBucket:
        """Return a bucket of the same state over other tensors, to draw a sample beside the parameters."""
        other = ParamBucket(
            [torch.empty_like(p) for p in self.params],
            self.streams,
            self.param_groups,
            self.element_offsets,
            with_momentum=False,
            num_groups=self.num_groups,
        )
        other.mean, other.hess, other.control, other.hyper = self.mean, self.hess, self.control, self.hyper
        other._hyper_values = self._hyper_values
        return other

    def _lay_out(self) -> tuple[list[int], int]:
        starts, end = [], 0
        for param, offset in zip(self.params, self.element_offsets, strict=True):
            starts.append(end + offset % 4)
            end = _round_up_8(starts[-1] + param.numel())
        return starts, end

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Return tensor ``index``'s part of a flat buffer, in the tensor's own shape."""
        param, start = self.params[index], self.starts[index]
        return flat[start : start + param.numel()].view(param.shape)

    @cached_property
    def regular(self) -> bool:
        """Whether every tensor begins at a 16-byte boundary and a whole group, and ends at one."""
        return all(
            offset % 4 == 0 and p.numel() % 8 == 0 and self._staged.get(i, p).data_ptr() % 16 == 0
            for i, (p, offset) in enumerate(zip(self.params, self.element_offsets, strict=True))
        )

    @cached_property
    def multiprocessors(self) -> int:
        """Multiprocessors of the bucket's GPU; 1 elsewhere."""
        if self.device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def set_hyper(self, values: list[list[float]]) -> None:
        """Copy the hyperparameter table to the device if it changed: ``[groups][HYPER_WIDTH]``."""
        before = self._hyper_values
        if values == before:
            return
        if before is not None:
            changed = [
                (i, j) for i, row in enumerate(values) for j, value in enumerate(row) if value != before[i][j]
            ]
            if len(changed) <= _FEW_CHANGES:  # a scheduled learning rate: no pinned memory
                for i, j in changed:
                    self.hyper[i, j].fill_(values[i][j])
                self._hyper_values = values
                return
        host = torch.tensor(values, dtype=torch.float64, device="cpu")
        if self.device.type == "cuda":
            host = host.pin_memory()
        self.hyper.copy_(host, non_blocking=True)
        self._hyper_values = values  # after the copy: an interrupt may come between

    def hyper_values(self) -> list[list[float]]:
        """Return the hyperparameter table as it was last set (the twin reads it on the host)."""
        if self._hyper_values is None:
            raise RuntimeError("set_hyper() was not called before the first launch")
        return self._hyper_values

    def averages(self) -> tuple[Tensor, Tensor]:
        """Return the running means of gradient and curvature over Monte Carlo samples, made on first use."""
        if self._averages is None:
            flat = self._zeros(2 * self.size)
            self._averages = flat[: self.size], flat[self.size :], flat
        return self._averages[:2]

    def averages_flat(self) -> Tensor:
        """Return both running means as one tensor, ``[2 * size]``: gradient, then curvature."""
        self.averages()
        assert self._averages is not None
        return self._averages[2]

    @cached_property
    def noise_counters(self) -> tuple[Tensor, Tensor]:
        """Philox counters ``(group, stream)`` of every four flat positions, int64 ``[size / 4]``."""
        group = torch.empty(self.size // 4, dtype=torch.int64, device=self.device)
        stream = torch.empty_like(group)
        ends = [*self.starts[1:], self.size]
        for i, start in enumerate(self.starts):
            first, last = start // 4, ends[i] // 4
            base = self.element_offsets[i] // 4
            group[first:last] = torch.arange(base, base + last - first, device=self.device)
            stream[first:last] = self.streams[i]
        return group, stream

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """Device tables of the kernels: ``rows`` int64 ``[tensors, ROW_WIDTH]``, ``tile_tensor`` int32."""
        rows: list[list[int]] = []
        tile_tensor: list[int] = []
        for i, param in enumerate(self.params):
            offset = self.element_offsets[i]
            row = [0] * ROW_WIDTH
            row[PARAM_PTR] = self._staged.get(i, param).data_ptr()
            row[START], row[NUMEL] = self.starts[i], param.numel()
            row[GROUP_START], row[STREAM] = offset // 4, self.streams[i]
            row[PARAM_GROUP], row[DTYPE] = self.param_groups[i], DTYPE_CODES[param.dtype]
            row[FIRST_TILE] = len(tile_tensor)
            rows.append(row)
            tile_tensor += [i] * ((offset % 4 + param.numel() + BLOCK - 1) // BLOCK)
        return (
            torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device),
            torch.tensor(tile_tensor, dtype=torch.int32, device="cpu").to(self.device),
        )

    def grad_rows(self, grads: DenseGrads, active: Sequence[bool] | None) -> tuple[Tensor, bool]:
        """Return the device table of gradients, copied if it is not there, and whether all are aligned.

        Args:
            grads: a gradient of each tensor, or None.
            active: whether each tensor is to be updated; None for those that have a gradient.

        Returns:
            int64 ``[tensors, GRAD_WIDTH]``, and whether all addresses are multiples of 16 bytes.
        """
        dtypes: list[torch.dtype | None]
        try:
            pointers, dtypes = list(map(_address, grads)), list(map(_dtype, grads))  # type: ignore[arg-type]
        except (TypeError, AttributeError):  # there is a None
            pointers = [0 if g is None else g.data_ptr() for g in grads]
            dtypes = [None if g is None else g.dtype for g in grads]
        if self.recording:
            return self._make_table(pointers, dtypes, active)[3:]
        for known in self._tables:
            if known.pointers == pointers and known.dtypes == dtypes and known.active == active:
                return known.table, known.aligned
        made = self._make_table(pointers, dtypes, active)
        self._tables = [made, *self._tables[: _KEPT_TABLES - 1]]
        return made.table, made.aligned

    def _make_table(
        self, pointers: list[int], dtypes: list[torch.dtype | None], active: Sequence[bool] | None
    ) -> _GradTable:
        updated = [dtype is not None for dtype in dtypes] if active is None else list(active)
        codes = [0 if dtype is None else DTYPE_CODES[dtype] for dtype in dtypes]
        table = torch.tensor([pointers, codes, updated], dtype=torch.int64, device="cpu").t().contiguous()
        aligned = all(pointer % 16 == 0 for pointer in pointers)
        kept = None if active is None else updated
        return _GradTable(pointers, dtypes, kept, self._upload(table), aligned)

    def _upload(self, host: Tensor) -> Tensor:
        """Copy a table to the device; while a CUDA graph is recorded, leave that to finish_capture()."""
        if self.device.type != "cuda":
            return host
        if torch.cuda.is_current_stream_capturing():
            if self._recorded_table is None or self._recorded_rows is not None:
                raise RuntimeError(
                    "a recorded step may read one gradient table; call prepare_capture() first"
                )
            self._recorded_rows = host
            return self._recorded_table
        return host.pin_memory().to(self.device, non_blocking=True)

    @property
    def recording(self) -> bool:
        """Whether a step is being recorded in a CUDA graph (or about to be)."""
        return self._recorded_table is not None

    def prepare_capture(self) -> None:
        """Make the gradient table of a step about to be recorded, outside the memory the graph reuses."""
        self._recorded_table = torch.zeros(
            len(self.params), GRAD_WIDTH, dtype=torch.int64, device=self.device
        )
        self._recorded_rows = None

    def finish_capture(self) -> Tensor | None:
        """Fill and return the table that the recorded step reads; None if it was given up."""
        table, rows = self._recorded_table, self._recorded_rows
        self._recorded_table = self._recorded_rows = None
        return None if table is None or rows is None else table.copy_(rows)

    @cached_property
    def _staged(self) -> dict[int, Tensor]:
        """Contiguous stand-ins of the (rare) parameters whose memory is not in element order."""
        return {i: p.detach().contiguous() for i, p in enumerate(self.params) if not p.is_contiguous()}

    def stage_in(self) -> None:
        """Copy parameters that are not contiguous into their stand-ins, before a kernel reads them."""
        for i, stand_in in self._staged.items():
            stand_in.copy_(self.params[i].detach())

    def stage_out(self) -> None:
        """Copy the stand-ins back, and tell autograd that the parameters changed."""
        for i, stand_in in self._staged.items():
            self.params[i].detach().copy_(stand_in)
        torch._C._increment_version(self.params)  # torch.autograd.graph's, without its Python
