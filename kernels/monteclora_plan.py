"""Which matrices one perturbation launch covers, and where their elements lie.

A *site* is one matrix that MonteCLoRA perturbs, seen as ``(rows, cols)`` with one row for each of the
adapter's ranks: A ``(r, K)`` as it lies, B ``(N, r)`` by its transposed strides. All sites of a plan lie
one after the other in one flat buffer. The noise of component n of site s is a function of
``(seed, draw, stream of s, element)`` with::

    element = (n · rows + row) · round_up(cols, 4) + col

so that every row begins at a whole group of four normals.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

BLOCK = 1024
"""Columns a tile covers. A multiple of 4; results do not depend on it."""

# Columns of ``table``, one int64 row a site.
OFFSET, ROW_STRIDE, COL_STRIDE, ROWS, COLS, FIRST_ROW, STREAM, FIRST_TILE = range(8)
TABLE_WIDTH = 8


class Site(NamedTuple):
    """One perturbed matrix: ``rows`` ranks by ``cols``, stored transposed or not, and its noise stream."""

    rows: int
    cols: int
    transposed: bool
    stream: int


class PerturbPlan:
    """The layout of all sites of one device and dtype.

    Args:
        sites: the matrices, in the order in which they lie in the flat buffer.
        device: where the tables go.
    """

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self.sites = list(sites)
        self.device = device
        self.offsets, self.first_rows = [], []
        self._sizes = [site.rows * site.cols for site in self.sites]
        self._shapes = [(s.cols, s.rows) if s.transposed else (s.rows, s.cols) for s in self.sites]
        self.size = self.num_rows = 0
        for site in self.sites:
            self.offsets.append(self.size)
            self.first_rows.append(self.num_rows)
            self.size += site.rows * site.cols
            self.num_rows += site.rows

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Return site ``index``'s part of a flat buffer, in the matrix's own shape."""
        site, start = self.sites[index], self.offsets[index]
        part = flat[start : start + site.rows * site.cols]
        return part.view(site.cols, site.rows) if site.transposed else part.view(site.rows, site.cols)

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return every site's part of a flat buffer, each in the matrix's own shape."""
        if len(set(self._shapes)) == 1:
            return flat.view(len(self.sites), *self._shapes[0]).unbind(0)
        parts = flat.split_with_sizes(self._sizes)
        return tuple(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return every site's matrix in one new flat buffer."""
        if len({shape[1] for shape in self._shapes}) == 1:
            return torch.cat(list(matrices)).view(-1)
        return _flatten_dense_tensors(matrices)

    def by_rows(self, flat: Tensor, index: int) -> Tensor:
        """Return site ``index``'s part of a flat buffer as ``(rows, cols)``."""
        matrix = self.view(flat, index)
        return matrix.t() if self.sites[index].transposed else matrix

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Device tables: ``table`` int64 ``[sites, TABLE_WIDTH]``; int32 site of each tile; of each row."""
        table: list[list[int]] = []
        tile_site: list[int] = []
        row_site: list[int] = []
        for i, site in enumerate(self.sites):
            row = [0] * TABLE_WIDTH
            row[OFFSET], row[STREAM] = self.offsets[i], site.stream
            row[ROW_STRIDE], row[COL_STRIDE] = (1, site.rows) if site.transposed else (site.cols, 1)
            row[ROWS], row[COLS], row[FIRST_ROW] = site.rows, site.cols, self.first_rows[i]
            row[FIRST_TILE] = len(tile_site)
            table.append(row)
            tile_site += [i] * (site.rows * ((site.cols + BLOCK - 1) // BLOCK))
            row_site += [i] * site.rows
        return (
            torch.tensor(table, dtype=torch.int64, device="cpu").to(self.device),
            torch.tensor(tile_site, dtype=torch.int32, device="cpu").to(self.device),
            torch.tensor(row_site, dtype=torch.int32, device="cpu").to(self.device),
        )
