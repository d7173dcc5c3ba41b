"""HF Trainer: the posterior beside every checkpoint. Imports transformers, so it is loaded on first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from bayeslora.diagnostics import diagnose, loss_gap
from bayeslora.ivon_distributed import is_sharded, keep_gradients_local
from bayeslora.posterior import Posterior, find_ivon
from bayeslora.posterior_files import keys_of

if TYPE_CHECKING:
    from transformers import Trainer


class LocalGradients(TrainerCallback):
    """Calls :func:`bayeslora.keep_gradients_local` on a Trainer's model once DDP wraps it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the hook, unless there is one process only."""
        if args.world_size > 1:
            keep_gradients_local(self._trainer.model_wrapped)


class _RotatedLater(int):
    """A ``save_total_limit`` that Trainer's own rotation takes for none (<= 0); else the number it is."""

    def __le__(self, other: int) -> bool:
        return other == 0 or int(self) <= other

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


class PosteriorCallback(TrainerCallback):
    """Writes the posterior into every checkpoint folder that HF Trainer (or TRL's trainers) makes.

    As in::

        trainer = Trainer(..., optimizers=(opt, None), callbacks=[bayeslora.PosteriorCallback()])
        trainer.train()
        best = trainer.state.best_model_checkpoint  # with args.load_best_model_at_end
        posterior = bayeslora.Posterior.from_pretrained(model, best)

    A checkpoint folder is then also a posterior's folder: plain PEFT loads the mean from it,
    :meth:`Posterior.from_pretrained` the Gaussian. With ``save_only_model=True`` as well, where Trainer
    itself leaves the optimizer out. After ``load_best_model_at_end`` the model holds the best checkpoint's
    mean while the optimizer's Hessian is the last step's: load the posterior from that checkpoint.

    With ``save_total_limit`` an old checkpoint is deleted once the new one has its posterior, not before:
    from the first save on there is a whole one at every moment, also if the process is killed.

    Raises:
        TypeError: at the start of training, the trainer's optimizer is not a :class:`bayeslora.IVON`, or
            its model is not a PEFT model.
        ValueError: at the start of training, the optimizer trains what PEFT's file of the adapter would not
            hold.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a run whose checkpoints could not get a posterior."""
        from peft import PeftModel

        model, optimizer = kwargs["model"], find_ivon(kwargs["optimizer"])
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"PosteriorCallback saves beside a PEFT adapter, but the trainer's model is a "
                f"{type(model).__name__}; pass the model through peft.get_peft_model"
            )
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        keys_of(model, {name: p for name, p in model.named_parameters() if id(p) in trained})
        if args.save_total_limit is not None and not state.is_hyper_param_search:
            args.save_total_limit = _RotatedLater(args.save_total_limit)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the posterior into the checkpoint that Trainer has just written; then delete old ones."""
        model: nn.Module = kwargs["model"]
        posterior = Posterior.from_optimizer(model, kwargs["optimizer"])
        if args.should_save or any(map(is_sharded, model.parameters())):  # gathering takes every rank
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            posterior.save_pretrained(folder)
        if args.should_save and isinstance(args.save_total_limit, _RotatedLater):
            limit, best = int(args.save_total_limit), state.best_model_checkpoint
            rotate_checkpoints(str(args.output_dir), limit, best, use_mtime=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model at the mean, however training ended, and say if steps were skipped."""
        opt = find_ivon(kwargs["optimizer"])
        opt.eval()
        opt._report_skipped(final=True)
        if isinstance(args.save_total_limit, _RotatedLater):
            args.save_total_limit = int(args.save_total_limit)


class DiagnosticsCallback(TrainerCallback):
    """Logs what :mod:`bayeslora.diagnostics` measures, and the share of skipped steps, whenever Trainer logs.

    As in::

        trainer = Trainer(..., optimizers=(opt, None))
        trainer.add_callback(bayeslora.DiagnosticsCallback(trainer, batch=batch))
        trainer.train()
        bayeslora.diagnostics.plot(trainer.state.log_history, "ivon.png")

    The numbers go through ``trainer.log``: to TensorBoard, W&B and ``log_history``, under ``ivon/``. They are
    computed from the optimizer's state at those steps; nothing runs at the others.

    Args:
        trainer: whose log to write to.
        batch: a batch of model inputs with labels, on which the loss at samples is compared with the loss
            at the mean (one forward pass each, in eval mode); None leaves that out.
        seeds: the posterior samples of that comparison.

    Raises:
        TypeError: at the start of training, the trainer's optimizer is not a :class:`bayeslora.IVON`.
    """

    def __init__(
        self, trainer: Any, batch: Mapping[str, Any] | None = None, seeds: Sequence[int] = (0, 1)
    ) -> None:
        self.trainer = trainer
        self.batch = batch
        self.seeds = seeds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a run that has nothing to measure."""
        find_ivon(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure and log if this step is one that Trainer logs."""
        if not control.should_log:
            return
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        found = {**diagnose(optimizer, model), "ivon/skipped": find_ivon(optimizer)._skipped_share()}
        if self.batch is not None:
            batch = self.trainer._prepare_inputs(dict(self.batch))
            training = model.training
            model.eval()
            try:
                found |= loss_gap(optimizer, lambda: model(**batch).loss, seeds=self.seeds)
            finally:
                model.train(training)
        self.trainer.log(found)
        control.should_log = True  # log() has taken it for Trainer's own line, of loss and learning rate

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the same where Trainer logs once an epoch."""
        self.on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many steps were skipped, if any."""
        find_ivon(kwargs["optimizer"])._report_skipped(final=True)
