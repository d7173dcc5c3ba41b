"""All or nothing: a model and other objects changed together; ``folders.py`` does the same for files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged_on_failure(
    model: nn.Module | None = None,
    tensors: Iterable[Tensor] = (),
    objects: Iterable[Any] = (),
    *,
    always: bool = False,
) -> Iterator[None]:
    """Put everything back as it was if the body raises, whatever it raises.

    Args:
        model: its modules, their classes and attributes (one level into dictionaries, lists and sets), which
            tensors are its parameters, which memory they have and whether they require gradients.
        tensors: their contents, which are copied; those of the model's other tensors are not put back.
        objects: their attributes, as the model's.
        always: put it back in any case.
    """
    before = _Before(model, tensors, objects)
    kept = False
    try:
        try:
            yield
            kept = not always
        finally:
            if not kept:
                before.put_back()
    except BaseException:
        if not kept:
            before.put_back()  # an interrupt may have come into the middle of it
        raise


class _Before:
    """How things were."""

    def __init__(self, model: nn.Module | None, tensors: Iterable[Tensor], objects: Iterable[Any]) -> None:
        modules = [] if model is None else list(model.modules())
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        self._things = [(thing, type(thing), _attributes(thing)) for thing in (*modules, *objects)]
        self._parameters = [(p, p.data, p.requires_grad) for p in parameters]
        self._contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._done = False

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them so again; a second call does what an interrupted first one did not."""
        if self._done:
            return
        for thing, kind, attributes in self._things:
            _put_back(thing, kind, attributes)
        for p, data, requires_grad in self._parameters:
            if type(p) is nn.Parameter and p.data_ptr() != data.data_ptr():
                p.data = data
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for tensor, value in self._contents:
            tensor.copy_(value)
        self._done = True


def _attributes(thing: Any) -> list[tuple[str, Any, Any]]:
    """Return name, value and a copy of the content of each attribute."""
    return [(n, v, v.copy() if type(v) in _CONTAINERS else None) for n, v in vars(thing).items()]


def _put_back(thing: Any, kind: type, attributes: list[tuple[str, Any, Any]]) -> None:
    if type(thing) is not kind:
        thing.__class__ = kind
    own = vars(thing)
    own.update({name: value for name, value, _ in attributes})
    for name in own.keys() - {name for name, _, _ in attributes}:
        del own[name]
    for _, value, content in attributes:
        if content is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
