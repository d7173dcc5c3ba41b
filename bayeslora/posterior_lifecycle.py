"""What becomes of a posterior: plain weights, further adapters, one posterior out of several, the hub."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.param_bucket import state_dtype
from .posterior_adapters import (
    adapter_of,
    add_beside,
    check_adapter_name,
    places,
    places_by_memory,
    rewriting,
)
from .posterior_gaussian import GaussianParameter
from .ties import as_seen_by, memory
from .transactions import unchanged_on_failure

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
                posterior is of no further use. What interrupts it leaves a model of no use either.

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
            every = {**self.mean, **self.fixed}
            values = {name: p.detach().clone() for name, p in _named(self.model, every).items()}
        odd = [name for name, value in values.items() if not bool(value.isfinite().all())]
        if odd:  # before the first layer is merged
            raise ValueError(f"{odd[0]!r} holds NaN or infinity; merging would break the model")
        unpatch(self.model)
        with torch.no_grad():
            for name, p in _named(self.model, every).items():
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
        ``set_adapter``, ``save_pretrained`` and ``delete_adapter`` apply to it. A failure or an
        interrupt leaves the model without it.

        Args:
            adapter_name: a name the model does not have yet.
            seeds: None for the mean, a seed for its sample, several for their average.
            variance_scale: factor on the samples' variance, >= 0.

        Raises:
            TypeError: the model is not a PEFT model.
            ValueError: the name is taken or no name for a folder, ``seeds`` is empty, or the posterior is not
                one adapter's.

        Example:
            >>> posterior.add_adapter("average", seeds=range(4))
            >>> sorted(posterior.model.peft_config)
            ['average', 'default']
            >>> posterior.model.delete_adapter("average")
        """
        model = _require_peft(self.model)
        check_adapter_name(adapter_name)
        if adapter_name in model.peft_config:
            raise ValueError(f"the model has an adapter {adapter_name!r}; pass another name")
        values = _adapter_values(self, seeds, variance_scale)
        own = adapter_of(model, _named(model, self.mean).values())
        with unchanged_on_failure(model), torch.no_grad():
            add_beside(model, adapter_name, model.peft_config[own])
            added = {place.key: place.tensor for place in places(model) if place.adapter == adapter_name}
            if odd := added.keys() ^ values.keys():
                raise ValueError(
                    f"PEFT does not add an adapter like {own!r} to this model: {min(odd)!r} is in one only"
                )
            for key, tensor in added.items():
                tensor.copy_(values[key])

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
            ValueError: there is none; names, shapes, the scaling of A and B or what is not sampled differ; or
                a weight is out of range.

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


def _adapter_values(
    posterior: Any, seeds: int | Sequence[int] | None, variance_scale: float
) -> dict[str, Tensor]:
    """Return what the adapter holds at the mean, or on average over samples, by the places' keys."""
    names = [seeds] if isinstance(seeds, int) else list(seeds or ())
    if seeds is not None and not names:
        raise ValueError("seeds is empty; pass at least one, or None for the mean")
    named = _named(posterior.model, posterior.mean)
    adapter = adapter_of(posterior.model, named.values())
    kept = {memory(f.tensor): (f.tensor, f.value) for f in posterior.fixed.values()}
    means = {memory(p): (p, posterior.mean[name]) for name, p in named.items()}
    values, sampled = {}, []
    for place in places(posterior.model):
        if place.adapter == adapter:
            owner = {**kept, **means}.get(memory(place.tensor))
            values[place.key] = place.tensor if owner is None else as_seen_by(place.tensor, *owner)
            if memory(place.tensor) in means:
                sampled.append(place)
    if names:
        total = {p.key: torch.zeros_like(p.tensor, dtype=state_dtype(p.tensor.dtype)) for p in sampled}
        for seed in names:
            with posterior.sample(seed, variance_scale), torch.no_grad():
                for place in sampled:
                    total[place.key] += place.tensor
        values |= {key: value.div_(len(names)) for key, value in total.items()}
    return values


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
    parts = [_parts(posterior) for posterior in posteriors]
    for i, found in enumerate(parts[1:], 1):
        _check_alike(parts[0], found, i)
    merged: dict[str, GaussianParameter] = {}
    for key, (name, first) in parts[0].gaussians.items():
        together = [found.gaussians[key][1] for found in parts]
        merged[name] = _product_of(first, together, shares)
    written = [g.parameter for g in merged.values()]
    fixed = posteriors[0].fixed
    result = cls(posteriors[0].model, merged, fixed=dict(fixed))
    with unchanged_on_failure(tensors=[*written, *(f.tensor for f in fixed.values())]), torch.no_grad():
        for g in merged.values():
            g.parameter.copy_(g.mean)
        for f in fixed.values():
            f.tensor.copy_(f.value)
    return result


def _product_of(
    first: GaussianParameter, gaussians: list[GaussianParameter], shares: list[float]
) -> GaussianParameter:
    ess = sum(w * g.ess for w, g in zip(shares, gaussians, strict=True))
    precision, total = torch.zeros_like(first.mean), torch.zeros_like(first.mean)
    pruned = torch.ones_like(first.mean, dtype=torch.bool)
    for w, g in zip(shares, gaussians, strict=True):
        hess = g.hess.to(precision)
        certain = torch.isinf(hess)  # pruned: its zero says nothing where another posterior knows
        part = w * g.ess * (hess + g.weight_decay).masked_fill(certain, 0.0)
        precision += part
        total += part * g.mean.to(precision)
        pruned &= certain
    hess = (precision / ess).masked_fill(pruned, float("inf"))
    mean = (total / precision).masked_fill(pruned, 0.0)
    return GaussianParameter(first.parameter, mean, hess, first.stream, ess, 0.0)


class _Parts(NamedTuple):
    """A posterior's tensors, by their names without the adapter's, and what decides how they are used."""

    gaussians: dict[str, tuple[str, GaussianParameter]]
    fixed: dict[str, Tensor]
    uses: dict[tuple[str, str], Any]


def _parts(posterior: Any) -> _Parts:
    held = places_by_memory(posterior.model)

    def key(name: str, tensor: Tensor) -> str:
        return held[memory(tensor)][0].key if memory(tensor) in held else name

    uses: dict[tuple[str, str], Any] = {}
    for g in posterior.parameters.values():
        for place in held.get(memory(g.parameter), []):
            config = getattr(posterior.model, "peft_config", {}).get(place.adapter)
            scaling = getattr(place.layer, "scaling", None)
            scale = scaling.get(place.adapter) if isinstance(scaling, dict) else None
            uses[place.key, "scaling"] = scale
            uses[place.key, "a base changed by"] = () if config is None else rewriting(config)[:1]
    return _Parts(
        {key(name, g.parameter): (name, g) for name, g in posterior.parameters.items()},
        {key(name, f.tensor): f.value for name, f in posterior.fixed.items()},
        uses,
    )


def _check_alike(first: _Parts, other: _Parts, index: int) -> None:
    odd = (first.gaussians.keys() ^ other.gaussians.keys()) | (first.fixed.keys() ^ other.fixed.keys())
    if odd:
        raise ValueError(f"posterior {index} and the first do not both have {min(odd)!r}")
    for key, (_, gaussian) in first.gaussians.items():
        shape, found = tuple(gaussian.mean.shape), tuple(other.gaussians[key][1].mean.shape)
        if shape != found:
            raise ValueError(f"{key!r} has shape {found} in posterior {index}, {shape} in the first")
    for (key, what), use in first.uses.items():
        if other.uses.get((key, what)) != use:
            raise ValueError(
                f"{key!r} has {what} {other.uses.get((key, what))!r} in posterior {index}, {use!r} in the "
                "first: the same values are another function there; train both with one lora_alpha, "
                "use_rslora and init_lora_weights"
            )
    for key, value in first.fixed.items():
        if not torch.equal(value, other.fixed[key].to(value)):
            raise ValueError(
                f"{key!r}, which is not sampled, differs in posterior {index} and the first: there is no "
                "product of it; perturb it, or start both trainings from one value and freeze it"
            )


def _named(model: nn.Module, names: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {name: found[name] for name in names}


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
