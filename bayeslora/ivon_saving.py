"""IVON's state as a dict, loaded with every check before the first change, and copies of the optimizer."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch

from bayeslora._backend import untraced
from bayeslora.ivon_checks import check_saved_state
from bayeslora.ivon_groups import ParamGroup
from bayeslora.ivon_samples import MIXED, StepSamples
from bayeslora.ivon_setup import take_defaults
from bayeslora.ivon_skips import SkipWatch
from bayeslora.ivon_state import BucketStore

_PICKLED = (
    "mc_samples",
    "hess_approx",
    "sync",
    "debias",
    "rescale_lr",
    "skip_nonfinite",
    "_seed",
    "_eval_draws",
    "_from_context",
    "_prior",
)


class SavedState(torch.optim.Optimizer):
    """The part of :class:`~bayeslora.IVON` that saves, loads and copies it."""

    _given: set[int] | None
    _store: BucketStore
    _samples: StepSamples

    def _start(self, samples: tuple[Any, ...] = ()) -> None:
        """Begin with what lies in ``param_groups`` and ``state``."""
        self.param_groups = [ParamGroup(group, self) for group in self.param_groups]
        self._given = {id(p) for group in self.param_groups for p in group["params"]}
        self._wrapped: Any = None  # the sample that step(closure) has drawn for its closure
        self._cleared = False
        self._own_gradients_checked = False
        self._store = BucketStore(self)
        self._samples = StepSamples(self._store, *samples)
        self._skips = SkipWatch(self.param_groups[0])

    def _write_counters(self: Any) -> None:
        if self._samples.held is MIXED:
            self._show(None)
        self._store.write_counters()
        for group in self.param_groups:
            group.update(
                seed=self._seed,
                eval_draws=self._eval_draws,
                held=self._samples.held_for_saving(),
                perturb=group.get("perturb", True),
                states=sum(bool(self.state.get(p)) for p in group["params"]),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state: fp32 mean, momentum and hess of each parameter, and the counters of the noise.

        Loading it and the model's weights continues the run bit for bit; a sample whose step is still to
        come is then drawn again, and if the weights were saved while they held one, the mean is put back.
        """
        self._write_counters()
        return super().state_dict()

    @untraced
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the state keeps its own dtype.

        Args:
            state_dict: from an IVON optimizer over the same parameters in the same order.

        Raises:
            ValueError: groups, keys, shapes, dtypes or values do not fit; the optimizer is then as it was.
        """
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state = check_saved_state(self.param_groups, state_dict, self.debias)
        groups = copy.deepcopy(list(state_dict["param_groups"]))
        for group, now in zip(groups, self.param_groups, strict=True):
            group["params"] = now["params"]
            if "param_names" in now:
                group.setdefault("param_names", now["param_names"])
        self._show(None)
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        self._seed, self._eval_draws = groups[0]["seed"], groups[0]["eval_draws"]
        self._from_context = False
        if groups[0]["held"] is not None:
            self._samples.take_out_saved(groups[0]["held"], self.rescale_lr)
        take_defaults(self)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._write_counters()
        kept = {name: getattr(self, name) for name in _PICKLED}
        return {**super().__getstate__(), **kept, "_samples": self._samples.unfolded()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_samples"})
        self.defaults.pop("differentiable", None)  # torch's; __init__ does not take it
        self._start(state.get("_samples", ()))
