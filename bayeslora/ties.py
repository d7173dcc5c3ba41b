"""Tensors over one memory: two parameters that are one, as PEFT ties LoRA on tied embeddings.

What belongs to the weights (noise, state, a posterior's sample) belongs to the memory, not to the object that
names it: PEFT's ``ensure_weight_tying`` makes one parameter a transposed view of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def memory(tensor: Tensor) -> Any:
    """Return what two tensors have in common exactly if they are one: where they lie, and their size."""
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.data_ptr():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.numel()


def as_seen_by(view: Tensor, owner: Tensor, value: Tensor) -> Tensor:
    """Return a value for ``owner`` as it is for another view of the owner's whole memory (its transpose)."""
    if view.shape == owner.shape and view.stride() == owner.stride():
        return value
    held = torch.empty_strided(owner.shape, owner.stride(), dtype=value.dtype, device=value.device)
    return held.copy_(value).as_strided(view.shape, view.stride())


class Tie(NamedTuple):
    """How a tensor shares the memory of an earlier one.

    Args:
        first: index of the earlier tensor, the first over that memory.
        order: the tensor's dimensions in the order that makes it the first.
    """

    first: int
    order: tuple[int, ...]

    def as_first(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor of this one's shape in the shape of the first."""
        return tensor.permute(self.order)

    def as_tied(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor of the first one's shape in the shape of this one."""
        return tensor.permute([self.order.index(dim) for dim in range(len(self.order))])


def find_ties(tensors: Sequence[Tensor]) -> dict[int, Tie]:
    """Find the tensors that hold the same elements of one memory as an earlier one, perhaps transposed.

    Args:
        tensors: of any devices and dtypes, not sharded.

    Returns:
        The tie of each such tensor, by its index.

    Raises:
        ValueError: two of them share a part of their memory, or one holds an element twice.
    """
    ties: dict[int, Tie] = {}
    firsts: dict[tuple[torch.device, int], int] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() > 0:
            first = firsts.setdefault((tensor.device, tensor.data_ptr()), i)
            if first != i:
                ties[i] = Tie(first, _order(tensor, tensors[first]))
    reach: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for (device, start), i in sorted(firsts.items(), key=lambda item: item[0][1]):
        tensor = tensors[i]
        length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if length < tensor.numel():
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} holds elements twice (strides "
                f"{tensor.stride()}); make it contiguous"
            )
        before = [(end, other) for end, other in reach.get(device, ()) if end > start]
        for _, other in before:
            if _overlap(tensor, other):
                raise _refusal(tensor, other)
        reach[device] = [*before, (start + length * tensor.element_size(), tensor)]
    return ties


def _layout(tensor: Tensor) -> list[tuple[int, int, int]]:
    """Return stride, size and index of each dimension, in the order of memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return sorted((0 if n == 1 else stride, n, dim) for dim, (n, stride) in enumerate(sizes))


def _order(tensor: Tensor, first: Tensor) -> tuple[int, ...]:
    own, wanted = _layout(tensor), _layout(first)
    if tensor.dtype != first.dtype or [d[:2] for d in own] != [d[:2] for d in wanted]:
        raise _refusal(tensor, first)
    order = [0] * len(own)
    for (_, _, dim), (_, _, place) in zip(own, wanted, strict=True):
        order[place] = dim
    return tuple(order)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors whose memory is interleaved have an element in common."""
    if one.dtype != other.dtype:
        return True
    return bool(torch.isin(_addresses(one), _addresses(other)).any())


def _addresses(tensor: Tensor) -> Tensor:
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(n, device="cpu") * stride).flatten()
    return tensor.data_ptr() + offsets * tensor.element_size()


def _refusal(one: Tensor, other: Tensor) -> ValueError:
    return ValueError(
        f"parameters of shapes {tuple(other.shape)} and {tuple(one.shape)} share a part of their memory; "
        "they may share all of it, transposed or not, or none: pass the one that holds the whole, or copies"
    )
