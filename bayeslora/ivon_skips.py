"""Steps that IVON has skipped are said, without a step that waits for the device.

The counters live on the device. Every few steps they are copied to pinned memory of the host behind the work
that is queued, and a later step reads the copy once it is there. On a CPU they are read at every step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bayeslora.ivon_checks import LAST_DRAW
from bayeslora.kernels.param_bucket import CONTROL_WIDTH, DRAWS, SKIPPED, STEP

_logger = logging.getLogger("bayeslora")

_EVERY = 10  # steps from one reading of a GPU's counters to the next copy
_WINDOW = 100  # the last steps, of which 1% may be skipped
_APART = 10  # times as many skipped steps from one warning to the next

_CAUSES = (
    "Likely causes: a loss that is NaN (a batch whose labels are all -100) or overflows, a learning rate "
    "that is too large, or cuDNN's attention with a padding mask in bf16, as in torch 2.11 (switch it off: "
    "torch.backends.cuda.enable_cudnn_sdp(False))"
)


class SkipWatch:
    """Looks at an optimizer's counters from time to time, and warns.

    The first warning comes at the first skipped step, the next when more than 1% of the last hundred were
    skipped and ten times as many in all. A GradScaler skips steps until it has found its scale, and one now
    and then: with it there is only the second kind, from the first hundred steps on.

    Args:
        group: the optimizer's first parameter group, which has the counters if a state was loaded.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.until = 1
        """Steps until :meth:`look` is due; counted down by the optimizer."""
        self.scaled = False
        """Whether a GradScaler decides which steps are skipped."""
        self._skipped = self._before = group.get("skipped", 0)
        self._first = group.get("step", 0) + self._skipped
        self._seen: deque[tuple[int, int]] = deque()  # after which step, how many more were skipped
        self._said = 0
        self._closed = {"start": -1, "posterior": self._skipped, "end": -1}  # what each line said last
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._copying = False

    def look(self, control: Tensor) -> None:
        """Read the counters, or on a GPU begin to, or see whether they have come.

        Args:
            control: counters of a bucket.

        Raises:
            RuntimeError: so many samples were drawn that noise would come again.
        """
        self.until = 1
        if control.device.type != "cuda":
            self._judge(control.tolist())
        elif torch.cuda.is_current_stream_capturing():
            return
        elif not self._copying:
            if self._copy is None:
                memory = torch.zeros(CONTROL_WIDTH, dtype=torch.int64, device="cpu").pin_memory()
                self._copy = memory, torch.cuda.Event()
            memory, event = self._copy
            memory.copy_(control, non_blocking=True)
            event.record(torch.cuda.current_stream(control.device))
            self._copying = True
        elif self._copy is not None and self._copy[1].query():
            self._copying, self.until = False, _EVERY
            self._judge(self._copy[0].tolist())

    def _judge(self, values: list[int]) -> None:
        skipped = values[SKIPPED]
        if values[DRAWS] > LAST_DRAW:
            raise RuntimeError(
                f"IVON has drawn {values[DRAWS]} training samples; from 2^31 on their noise would be that of "
                "evaluation samples. Go on with a new IVON of another seed"
            )
        if skipped == self._skipped:
            return
        steps = values[STEP] + skipped
        if not self.scaled or steps - self._first > _WINDOW:
            self._seen.append((steps, skipped - self._skipped))
        self._skipped = skipped
        while self._seen and self._seen[0][0] <= steps - _WINDOW:
            self._seen.popleft()
        recent, new = sum(count for _, count in self._seen), skipped - self._before
        first = self._said == 0 and not self.scaled
        if first or (100 * recent > _WINDOW and new >= _APART * self._said):
            self._warn(
                "IVON has skipped %d of %d steps, %d of them in the last hundred%s", skipped, steps, recent
            )
            self._said = new

    def close(self, steps: int, skipped: int, final: bool) -> None:
        """Say how many steps were skipped: with a posterior if it is news, at the end of a training anyway.

        Args:
            steps: taken so far; a posterior of an optimizer that has taken none is warned of.
            skipped: so far.
            final: at the end of a training.
        """
        kind, now = ("end", steps + skipped) if final else ("posterior", skipped) if steps else ("start", 0)
        if self._closed[kind] == now or (skipped == 0 and kind != "start"):
            return
        self._closed[kind] = now
        if kind == "start" and skipped == 0:
            _logger.warning("this posterior is the one that IVON began with: no step was taken")
        elif kind == "start":
            self._warn("this posterior is the one that IVON began with: all %d steps were skipped%s", skipped)
        elif not self.scaled or 100 * skipped > steps + skipped:
            self._warn("IVON skipped %d of %d steps%s", skipped, steps + skipped)

    def _warn(self, text: str, *numbers: int) -> None:
        """Log a warning: where it is and, the first time, why it may be."""
        text += ", since a gradient was NaN or infinite"
        _logger.warning(text if self._said else f"{text}. {_CAUSES}", *numbers, _where())


def _where() -> str:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ""
    return (
        f" on rank {dist.get_rank()} of {dist.get_world_size()} (a rank that does not say so took them, and "
        "its weights are others now)"
    )
