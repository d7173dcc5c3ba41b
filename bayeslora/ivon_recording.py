"""What IVON does for ``capture.py``: a step that is recorded in a CUDA graph, and its replays."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayeslora.ivon_samples import StepSamples
from bayeslora.ivon_setup import is_watched
from bayeslora.ivon_skips import SkipWatch
from bayeslora.ivon_state import BucketStore
from bayeslora.kernels.param_bucket import ParamBucket


class RecordedSteps:
    """The part of :class:`~bayeslora.IVON` that serves recorded steps."""

    param_groups: list[dict[str, Any]]
    rescale_lr: bool
    _store: BucketStore
    _samples: StepSamples
    _skips: SkipWatch

    def refresh_hyperparameters(self) -> list[ParamBucket]:
        """Bring the groups' current hyperparameters to the device, for a recorded step to read.

        Returns:
            The buckets: another list than before if a recorded step's memory is no longer in use.
        """
        buckets = self._store.current() if self._samples.held is None else self._store.within_step()
        for bucket in buckets:
            self._store.set_hyper(bucket, 1.0, self.rescale_lr)
        return buckets

    @property
    def watches_next_step(self) -> bool:
        """Whether the next step decides hyperparameters (:meth:`like_adamw`), and so cannot be recorded."""
        return is_watched(self.param_groups[0])

    def count_step(self) -> None:
        """Count a step on the host too; a replayed graph does not run :meth:`step`."""
        if "setup_step" in self.param_groups[0]:
            self.param_groups[0]["setup_step"] += 1
        skips = self._skips
        skips.until -= 1
        if skips.until <= 0:
            self._store.show_counters(skips.look)

    def prepare_capture(self) -> None:
        """Make ready for one step to be recorded in a CUDA graph; :meth:`finish_capture` follows it."""
        for bucket in self.refresh_hyperparameters():
            bucket.prepare_capture()

    def finish_capture(self: Any, recorded: bool) -> list[Tensor | None]:
        """Return the tables that the recorded step reads, to be kept with the graph.

        Args:
            recorded: whether recording succeeded. If not, the mean is put back and the step forgotten.
        """
        tables = [bucket.finish_capture() for bucket in self._store.within_step()]
        if not recorded:
            self._show(None)
            self._samples.forget()
        return tables
