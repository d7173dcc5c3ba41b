"""What becomes of a posterior: plain weights, further adapters, one posterior out of several, the hub."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .kernels.param_bucket import state_dtype
from .posterior_gaussian import GaussianParameter

if TYPE_CHECKING:
    from .posterior import Posterior


class PosteriorLifecycle:
    """The part of :class:`~bayeslora.Posterior` that turns it into something else."""

    model: nn.Module
    parameters: dict[str, GaussianParameter]

    def merge(
        self: Any, seed: int | None = None, *, variance_scale: float = 1.0, copy_model: bool = True
    ) -> Any:
        """Return a plain model with one posterior sample, or the mean, merged into its weights.

        Args:
            seed: name of the sample; None for the mean.
            variance_scale: factor on the sample's variance, >= 0.
            copy_model: False merges into the model itself, which is then no PEFT model any more: the
                posterior is of no further use.

        Returns:
            The base model's class, with PEFT's layers gone.

        Raises:
            TypeError: the model is not a PEFT model.
            ValueError: the scale is out of range, the posterior's adapter is not active, or merging would
                give weights that are not finite.

        Example:
            >>> at_mean, sampled = posterior.merge(), posterior.merge(seed=3)
            >>> with posterior.sample(3), torch.no_grad():
            ...     torch.allclose(sampled(tokens).logits, posterior.model(tokens).logits, atol=1e-4)
            True
        """
        from bayeslora.patching import unpatch
        from bayeslora.posterior_predict import check_in_use

        _require_peft(self.model)
        check_in_use(self)
        with self.sample(0 if seed is None else seed, 0.0 if seed is None else variance_scale):
            if copy_model:
                model = unpatch(copy.deepcopy(self.model))
                return model.merge_and_unload(safe_merge=True)
            values = {name: p.detach().clone() for name, p in _named(self.model, self.mean).items()}
        odd = [name for name, value in values.items() if not bool(value.isfinite().all())]
        if odd:  # before the first layer is merged
            raise ValueError(f"{odd[0]!r} holds NaN or infinity; merging would break the model")
        unpatch(self.model)
        with torch.no_grad():
            for name, p in _named(self.model, self.mean).items():
                p.copy_(values[name])
        return self.model.merge_and_unload(safe_merge=True)

    def add_adapter(
        self: Any,
        adapter_name: str,
        seeds: int | Sequence[int] | None = None,
        *,
        variance_scale: float = 1.0,
    ) -> None:
        """Add a plain PEFT adapter that holds the mean, one sample, or the average of several samples.

        Samples are averaged matrix by matrix, in fp32. The new adapter is not made active; PEFT's
        ``set_adapter``, ``save_pretrained`` and ``delete_adapter`` apply to it.

        Args:
            adapter_name: a name the model does not have yet.
            seeds: None for the mean, a seed for its sample, several for their average.
            variance_scale: factor on the samples' variance, >= 0.

        Raises:
            TypeError: the model is not a PEFT model.
            ValueError: the name is taken, ``seeds`` is empty, or the posterior is not one adapter's.

        Example:
            >>> posterior.add_adapter("average", seeds=range(4))
            >>> sorted(posterior.model.peft_config)
            ['average', 'default']
            >>> posterior.model.delete_adapter("average")
        """
        model = _require_peft(self.model)
        if adapter_name in model.peft_config:
            raise ValueError(f"the model has an adapter {adapter_name!r}; pass another name")
        own = _own_adapter(self)
        renamed = {name: _renamed(name, own, adapter_name) for name in self.mean}
        values = self._average(seeds, variance_scale)
        model.add_adapter(adapter_name, copy.deepcopy(model.peft_config[own]))
        targets = dict(model.named_parameters())
        source = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in source.items():  # what is trained outside of the posterior, too
                other = targets.get(_renamed(name, own, adapter_name)) if f".{own}." in f"{name}." else None
                if other is not None:
                    other.copy_(p)
            for name, value in values.items():
                targets[renamed[name]].copy_(value)

    def _average(self: Any, seeds: int | Sequence[int] | None, variance_scale: float) -> dict[str, Tensor]:
        """Return the mean over samples of each parameter, in its state's dtype."""
        if seeds is None:
            return dict(self.mean)
        names = [seeds] if isinstance(seeds, int) else list(seeds)
        if not names:
            raise ValueError("seeds is empty; pass at least one, or None for the mean")
        total: dict[str, Tensor] = {}
        for seed in names:
            with self.sample(seed, variance_scale):
                for name, p in _named(self.model, self.mean).items():
                    value = p.detach().to(state_dtype(p.dtype), copy=True)
                    total[name] = total[name].add_(value) if name in total else value
        return {name: value.div_(len(names)) for name, value in total.items()}

    def push_to_hub(self: Any, repo_id: str, **settings: Any) -> Any:
        """Upload the adapter and its posterior to the Hugging Face hub, as one folder.

        ``Posterior.from_pretrained(base, huggingface_hub.snapshot_download(repo_id))`` loads it, and plain
        PEFT loads the mean.

        Args:
            repo_id: ``"user/name"``, made if it does not exist.
            settings: ``private`` and ``token``; the rest goes to ``huggingface_hub.HfApi.upload_folder``.

        Returns:
            What ``upload_folder`` returns: the commit, with its ``commit_url``.

        Raises:
            TypeError: the model is not a PEFT model.

        Example:
            >>> posterior.push_to_hub("user/my-adapter", private=True)  # doctest: +SKIP
        """
        from huggingface_hub import HfApi

        _require_peft(self.model)
        api = HfApi(token=settings.pop("token", None))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            _lift(Path(folder))
            private = settings.pop("private", None)
            api.create_repo(repo_id, exist_ok=True, private=private)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **settings)

    @classmethod
    def product(
        cls: Any, posteriors: Sequence[Posterior], weights: Sequence[float] | None = None
    ) -> Posterior:
        """Merge posteriors of one architecture by precision: the normalized product of their densities.

        With precisions ``π_i = λ_i (h_i + δ_i)`` and weights w (1 by default)::

            π = Σ w_i π_i          m = Σ w_i π_i m_i / π

        so each element follows the posterior that is surest of it. Of the same prior's n posteriors the
        product counts the prior n times; weights of 1/n average the precisions instead.

        The result lives on the first posterior's parameters, which then hold the merged mean; the
        posteriors themselves are unchanged.

        Args:
            posteriors: at least one, with the same parameters up to the adapter's name and the model.
            weights: one number > 0 a posterior.

        Returns:
            The merged posterior, of the first one's model; its ``ess`` is Σ w_i λ_i, its ``weight_decay`` 0.

        Raises:
            TypeError: one of them is MonteCLoRA's.
            ValueError: there is none, names or shapes differ, or a weight is out of range.

        Paper: Cong et al., "Variational Low-Rank Adaptation Using IVON" (2024), which names it as future
        work.

        Example:
            >>> merged = bayeslora.Posterior.product([posterior, posterior])
            >>> [bool(torch.allclose(2 * v, posterior.variance[n])) for n, v in merged.variance.items()][0]
            True
        """
        return _product(cls, list(posteriors), weights)


def _lift(folder: Path) -> None:
    """Move up what PEFT writes into a folder of an adapter's own name."""
    inner = next(folder.rglob("posterior_config.json")).parent
    if inner != folder:
        for file in inner.iterdir():
            file.replace(folder / file.name)
        inner.rmdir()


def _product(cls: Any, posteriors: list[Any], weights: Sequence[float] | None) -> Posterior:
    if not posteriors:
        raise ValueError("posteriors is empty: pass at least one")
    if not all(p.parameters for p in posteriors):
        raise TypeError(
            "product needs IVON posteriors: a MonteCLoRA posterior is not a Gaussian of named parts"
        )
    shares = [1.0] * len(posteriors) if weights is None else [float(w) for w in weights]
    if len(shares) != len(posteriors) or not all(0.0 < w < float("inf") for w in shares):
        raise ValueError(f"weights must be {len(posteriors)} finite numbers > 0, got {weights!r}")
    by_key = [_by_key(p) for p in posteriors]
    for i, found in enumerate(by_key[1:], 1):
        _check_alike(by_key[0], found, i)
    merged: dict[str, GaussianParameter] = {}
    for key, (name, first) in by_key[0].items():
        ess = sum(w * found[key][1].ess for w, found in zip(shares, by_key, strict=True))
        precision = torch.zeros_like(first.mean)
        total = torch.zeros_like(first.mean)
        pruned = torch.ones_like(first.mean, dtype=torch.bool)
        for w, found in zip(shares, by_key, strict=True):
            g = found[key][1]
            hess = g.hess.to(precision)
            certain = torch.isinf(hess)  # pruned: its zero says nothing where another posterior knows
            part = w * g.ess * (hess + g.weight_decay).masked_fill(certain, 0.0)
            precision += part
            total += part * g.mean.to(precision)
            pruned &= certain
        hess = (precision / ess).masked_fill(pruned, float("inf"))
        mean = (total / precision).masked_fill(pruned, 0.0)
        merged[name] = GaussianParameter(first.parameter, mean, hess, first.stream, ess, 0.0)
    with torch.no_grad():
        for g in merged.values():
            g.parameter.copy_(g.mean)
    return cls(posteriors[0].model, merged)


def _by_key(posterior: Any) -> dict[str, tuple[str, Any]]:
    """Return name and Gaussian of each parameter, by its name without the adapter's."""
    try:
        adapter = _own_adapter(posterior)
    except (TypeError, ValueError):  # not PEFT's, or spread over adapters: names as they are
        return {name: (name, g) for name, g in posterior.parameters.items()}
    return {_renamed(name, adapter, ""): (name, g) for name, g in posterior.parameters.items()}


def _check_alike(first: dict[str, Any], other: dict[str, Any], index: int) -> None:
    odd = first.keys() ^ other.keys()
    if odd:
        raise ValueError(f"posterior {index} and the first do not both have {sorted(odd)[0]!r}")
    for key, (_, gaussian) in first.items():
        shape, found = tuple(gaussian.mean.shape), tuple(other[key][1].mean.shape)
        if shape != found:
            raise ValueError(f"{key!r} has shape {found} in posterior {index}, {shape} in the first")


def _named(model: nn.Module, names: Any) -> dict[str, Tensor]:
    found = dict(model.named_parameters())
    return {name: found[name] for name in names}


def _renamed(name: str, adapter: str, other: str) -> str:
    """Return a parameter's name with one adapter's name replaced by another's (the last occurrence)."""
    head, _, tail = f"{name}.".rpartition(f".{adapter}.")
    return f"{head}.{other}.{tail}"[:-1]


def _own_adapter(posterior: Any) -> str:
    """Return the adapter that all of the posterior's parameters belong to."""
    model = _require_peft(posterior.model)
    for adapter in model.peft_config:
        if all(f".{adapter}." in f"{name}." for name in posterior.mean):
            return adapter
    raise ValueError(f"the posterior's parameters are not those of one adapter of {list(model.peft_config)}")


def _require_peft(model: Any) -> Any:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        kind = type(model).__name__
        raise TypeError(f"this needs a PEFT model (peft.get_peft_model), got {kind}{wrapped_hint(model)}")
    return model


def wrapped_hint(model: nn.Module) -> str:
    """Return what to write where ``model`` is torch.compile's or DDP's wrapper of PEFT's; "" elsewhere."""
    from peft import PeftModel

    for name in ("_orig_mod", "module"):
        if isinstance(getattr(model, name, None), PeftModel):
            return (
                f" around one; make the posterior of that: Posterior.from_optimizer(model.{name}, optimizer)"
            )
    return ""
