"""What is changed in a model for a while, and put back whatever happens meanwhile.

A Ctrl-C can come between any two bytecodes, also while something is put back, and other threads may use the
model. So a change is marked before it is made, putting back can be done any number of times, and it is done
twice: the second time ends what an interrupt cut short in the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_Result = TypeVar("_Result")


class Reversible:
    """A context whose end two interrupts cannot cut short; subclasses say what it does.

    `run` promises that for interrupts at any bytecode. Of a ``with`` statement the first bytecode of
    ``__exit__`` is left, where nothing of ours has begun.
    """

    def enter(self) -> None:
        """Mark what is there, then change it."""
        raise NotImplementedError

    def leave(self) -> None:
        """Put back what is marked, as often as it is called; nothing where nothing is."""
        raise NotImplementedError

    def run(self, body: Callable[[], _Result]) -> _Result:
        """Return what ``body`` does, called within the context."""
        grad = torch.is_grad_enabled()
        try:
            try:
                self.enter()
                return body()
            finally:
                self.leave()
                torch._C._set_grad_enabled(grad)  # torch.no_grad's own end can be cut short
        finally:
            self.leave()
            torch._C._set_grad_enabled(grad)

    def __enter__(self) -> None:
        grad = torch.is_grad_enabled()
        try:
            return self.enter()
        except BaseException:
            self.__exit__()
            torch._C._set_grad_enabled(grad)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.leave()
        finally:
            self.leave()


class Held(Reversible):
    """A re-entrant lock, held."""

    _outermost = False

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def enter(self) -> None:
        """Wait for the lock, unless this thread has it."""
        self._outermost = not self._lock._is_owned()
        if self._outermost:
            self._lock.acquire()

    def leave(self) -> None:
        """Let the lock go, unless an outer context has it."""
        while self._outermost and self._lock._is_owned():
            self._lock.release()
        self._outermost = False


class _Use:
    """Who uses a model: whoever has it in eval mode, and the lock of whoever writes its parameters."""

    def __init__(self) -> None:
        self.writing = threading.RLock()
        self.users: set[Inference] = set()
        self.training: list[nn.Module] = []
        """Modules that were in train mode when the first user came."""


LOCK = threading.RLock()
"""Held for moments: by whoever changes what says who uses what."""
_USES: Any = WeakTensorKeyDictionary()


def use_of(model: nn.Module) -> _Use:
    """Return the one record of a model's use, also for a wrapper of the model."""
    first: Tensor | None = next(model.parameters(), None)
    return _Use() if first is None else Held(LOCK).run(lambda: _USES.setdefault(first, _Use()))


class Inference(Reversible):
    """A model in eval mode; the last to leave puts back what was in train mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._use = model, use_of(model)

    def enter(self) -> None:
        """Put the model in eval mode."""

        def join() -> None:
            self._use.users.add(self)
            self._use.training += [module for module in self._model.modules() if module.training]

        Held(LOCK).run(join)
        if self._use.training:
            self._model.eval()

    def leave(self) -> None:
        """Put the model back in the mode it was in, if nobody else predicts."""
        Held(LOCK).run(self._part)

    def _part(self) -> None:
        self._use.users.discard(self)
        if not self._use.users and self._use.training:
            for module in self._use.training:
                module.training = True
            self._use.training.clear()
