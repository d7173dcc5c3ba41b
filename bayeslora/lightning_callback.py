"""Lightning: IVON's samples around its training loop. Imports Lightning, so it is loaded on first use."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]

from bayeslora.ivon import IVON


class LightningCallback(Callback):
    """Tells IVON when Lightning trains and when it evaluates.

    As in::

        trainer = lightning.pytorch.Trainer(callbacks=[bayeslora.LightningCallback()])

    Lightning hands the optimizer a closure only for the last micro-batch of ``accumulate_grad_batches``.
    This draws the step's sample before the first, so that all gradients are taken at one sample, and puts
    the mean back before validation, testing and prediction, into checkpoints, at the end of training, and
    after an exception.
    """

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Put this step's sample into the parameters."""
        for opt in _optimizers(trainer):
            opt.train()

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        """Put the mean back."""
        for opt in _optimizers(trainer):
            opt.eval()

    def on_test_start(self, trainer: Any, *_: Any) -> None:
        """Put the mean back."""
        self.on_validation_start(trainer)

    def on_predict_start(self, trainer: Any, *_: Any) -> None:
        """Put the mean back."""
        self.on_validation_start(trainer)

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        """Put the mean back, also in the weights that are about to be written: they are the same memory."""
        self.on_validation_start(trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Put the mean back, and say if steps were skipped."""
        self.on_validation_start(trainer)
        for opt in _optimizers(trainer):
            opt._report_skipped(final=True)

    def on_exception(self, trainer: Any, *_: Any) -> None:
        """Put the mean back."""
        self.on_validation_start(trainer)


def _optimizers(trainer: Any) -> list[IVON]:
    return [opt for opt in trainer.optimizers if isinstance(opt, IVON)]
