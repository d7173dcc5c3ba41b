"""MonteCLoRA's posterior: the distribution its training draws the perturbed matrices from.

``A_eff = A + c Σᵢ πᵢ Zᵢ L`` with L_jj² = v_j w_j, w_j ~ χ²(r), π ~ Dirichlet(α): a scale mixture of
Gaussians around the trained A (or B), of element variance::

    Var A_eff[j, k] = c² E‖π‖² r v_j / M,       E‖π‖² = Σ α (α + 1) / (α₀ (α₀ + 1))      α₀ = Σα

M is the number of outer samples. A sample is named by its seed: the same matrices on every device. The paper
predicts at the mean; sampling is what it leaves as future work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bayeslora import monteclora_math as mm
from bayeslora._backend import monteclora_kernels
from bayeslora.monteclora_bank import MontecloraBank
from bayeslora.monteclora_options import MontecloraOptions, check_scaler
from bayeslora.monteclora_part import Part
from bayeslora.posterior import Posterior
from bayeslora.posterior_checks import POSTERIOR_CONFIG, POSTERIOR_WEIGHTS
from bayeslora.posterior_gaussian import fixed_tensors
from bayeslora.posterior_predict import check_scale, check_seed
from bayeslora.posterior_sampling import Overwritten
from bayeslora.transactions import unchanged_on_failure

if TYPE_CHECKING:
    from peft import PeftModel

    from bayeslora.posterior_checks import SavedFolder

_SHAPING = ("estimator", "dirichlet", "perturb", "outer_samples", "sparse")
_MOMENT_DRAWS = 1024


@dataclass
class _Matrices:
    """The perturbed matrices of one part, as they were when the posterior was made."""

    part: Part
    names: list[str]
    parameters: list[Tensor]
    means: list[Tensor]
    std_prior: Tensor
    prior: Tensor
    scale: Tensor
    kept: list[Tensor | None]


class MontecloraPosterior(Posterior):
    """The posterior of a MonteCLoRA adapter; made by `Posterior.from_monteclora`.

    It keeps its own copies of means and priors (fp32) and of the adapter's other tensors, so further training
    of the adapter does not change it. ``parameters``, IVON's Gaussians, is empty.
    """

    def __init__(self, model: nn.Module, bank: MontecloraBank) -> None:
        super().__init__(model, {})
        self._bank = bank
        self._options = bank.options
        names = {id(p): name for name, p in model.named_parameters()}
        self._parts = [_copy_part(part, names) for part in bank.parts]
        self.fixed = fixed_tensors(model, [p for held in self._parts for p in held.parameters])

    # ---- samples -------------------------------------------------------------------------------------

    def sample(
        self, seed: int, variance_scale: float = 1.0, *, ess_scale: float | None = None
    ) -> Overwritten:
        """Return a context in which sample ``seed`` is in the perturbed matrices; as `Posterior.sample`.

        The layers draw no noise of their own meanwhile, also in train mode.

        Args:
            seed: 64-bit name of the sample.
            variance_scale: factor on the variance, >= 0 (0: the mean).
            ess_scale: the same as its inverse, > 0.

        Raises:
            ValueError: a scale is out of range, or both are given; on entering, the matrices are in memory
                shared with other processes.
            TypeError: the seed is not an integer.
        """
        variance_scale, seed = check_scale(variance_scale, ess_scale), check_seed(seed)
        bank, paused = self._bank, self._bank.paused

        def tensors() -> Sequence[Tensor]:
            nonlocal paused
            paused = bank.paused
            return list(self._tensors().values())

        def write() -> None:
            bank.paused = True
            for matrices in self._parts:
                _write(matrices, seed, variance_scale)
            torch.clear_autocast_cache()  # an outer autocast keeps casts of what the parameters held

        def undo() -> None:
            bank.paused = paused
            torch.clear_autocast_cache()

        return Overwritten(self.model, tensors, write, undo, list(self.fixed.values()))

    def _tensors(self) -> dict[str, Tensor]:
        """Return the model's matrices that are sampled, by name."""
        return {n: p for part in self._parts for n, p in zip(part.names, part.parameters, strict=True)}

    # ---- moments -------------------------------------------------------------------------------------

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean of each perturbed matrix, by name."""
        return {n: m for part in self._parts for n, m in zip(part.names, part.means, strict=True)}

    @property
    def variance(self) -> dict[str, Tensor]:
        """The variance of each element of each perturbed matrix, by name; 0 where it is pruned."""
        found = {}
        for held in self._parts:
            rows = _row_variance(held)
            for i, (name, mean) in enumerate(zip(held.names, held.means, strict=True)):
                site, first = held.part.plan.sites[i], held.part.plan.first_rows[i]
                by_rank = rows[first : first + site.rows].to(mean.dtype)
                full = by_rank[None, :] if site.transposed else by_rank[:, None]
                kept = held.kept[i]
                full = full.expand_as(mean).clone()
                found[name] = full if kept is None else full * kept
        return found

    @torch.no_grad()
    def prune(self, ratio: float) -> int:
        """Zero the elements with the largest variance, per matrix, in the mean and every sample.

        In each perturbed matrix, ``floor(ratio · numel)`` elements are zero afterwards. The variance is one
        number a rank, so whole ranks go first.

        Args:
            ratio: fraction to prune, in [0, 1).

        Returns:
            The number of pruned elements over all matrices.

        Raises:
            ValueError: ``ratio`` is out of range.
        """
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"ratio must be in [0, 1), got {ratio!r}")
        variance, pruned = self.variance, []
        for held in self._parts:
            for i, name in enumerate(held.names):
                mask = held.kept[i]
                mask = torch.ones_like(variance[name], dtype=torch.bool) if mask is None else mask.clone()
                score = torch.where(mask, variance[name], math.inf).flatten()
                order = torch.argsort(score, descending=True, stable=True)
                mask.view(-1)[order[: math.floor(ratio * score.numel())]] = False
                pruned.append((held, i, mask))
        written = [tensor for held in self._parts for tensor in (*held.means, *held.parameters)]
        with unchanged_on_failure(tensors=written, objects=[self, *self._parts]):
            for held, i, mask in pruned:
                self._keep(held, i, mask)
            self.pruned.append(ratio)
        return sum(int((~mask).sum()) for _, _, mask in pruned)

    def _keep(self, held: _Matrices, i: int, kept: Tensor) -> None:
        held.kept[i] = kept
        held.means[i].mul_(kept)
        held.parameters[i].detach().mul_(kept.to(held.parameters[i].device))

    # ---- files ---------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the PEFT adapter (mean and priors, fp32), and beside it the options and what is pruned.

        The folder loads in plain PEFT as its MonteCLoRA. ``posterior.safetensors`` holds a mask of the kept
        elements of each pruned matrix. An earlier save is replaced as a whole, as by an IVON posterior.

        Args:
            path: the folder, made if it does not exist.

        Raises:
            TypeError: the model is not a PEFT model.
            ValueError: PEFT's file would not hold a trained tensor as it is, or one is not finite.
        """
        from bayeslora.posterior_files import keys_of, require_peft, trained_fixed, write_folder

        matrices = self._matrices()
        every = {**trained_fixed(self), **matrices}
        adapter, keys = keys_of(require_peft(self.model), every, self._bank.adapter)
        masks = {
            key: kept.to(torch.uint8)
            for held in self._parts
            for name, kept in zip(held.names, held.kept, strict=True)
            for key in keys[name]
            if kept is not None
        }
        config = {
            "method": "monteclora",
            "options": {name: getattr(self._options, name) for name in _SHAPING},
            "sample_scaler": float(self._parts[0].scale),
            "parameters": [key for name in matrices for key in keys[name]],
        }
        write_folder(self, path, adapter, self.mean, masks, config)

    def _matrices(self) -> dict[str, Tensor]:
        """Return the model's perturbed matrices, by name."""
        return {n: p for held in self._parts for n, p in zip(held.names, held.parameters, strict=True)}

    def restore(self, pruned: list[float], masks: dict[str, Tensor]) -> None:
        """Prune what a saved posterior had pruned: masks of kept elements by parameter name."""
        with torch.no_grad():
            for held in self._parts:
                for i, name in enumerate(held.names):
                    if name in masks:
                        self._keep(held, i, masks[name].to(held.means[i].device).bool())
        self.pruned = list(pruned)


def _copy_part(part: Part, names: dict[int, str]) -> _Matrices:
    parameters = [part.matrix(site) for site in range(len(part.plan.sites))]
    missing = [p for p in parameters if id(p) not in names]
    if missing:
        raise ValueError(
            f"a perturbed matrix of shape {tuple(missing[0].shape)} is not in the model; "
            "pass the patched model"
        )
    std_prior, prior = (p.detach().double().clone() for p in part.priors())
    means = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters]
    return _Matrices(
        part=part,
        names=[names[id(p)] for p in parameters],
        parameters=parameters,
        means=means,
        std_prior=std_prior,
        prior=prior,
        scale=part.scale.clone(),
        kept=[None] * len(parameters),
    )


@torch.no_grad()
def _write(held: _Matrices, seed: int, variance_scale: float) -> None:
    part = held.part
    index = torch.zeros(1, dtype=torch.int64, device=part.device)
    alpha = part.tables.per_copy(mm.concentrations(held.prior))
    noise = part.source.draw(alpha, seed=seed, draw=index)
    weights = mm.mixture_weights(alpha, noise, part.options.sparse)
    variances = mm.row_variances(held.std_prior, part.tables, noise.chi_square)
    scale = held.scale * math.sqrt(variance_scale)
    collapsed = part.options.estimator == "collapsed"
    kappa = mm.coefficients(variances, weights, scale, part.tables, collapsed)
    flat = torch.cat([mean.reshape(-1) for mean in held.means])
    monteclora_kernels(flat.device).perturb_(part.plan, flat, kappa, seed=seed, draw=index)
    for i, parameter in enumerate(held.parameters):
        value, kept = part.plan.view(flat, i), held.kept[i]
        parameter.copy_(value if kept is None else value * kept)


@torch.no_grad()
def _row_variance(held: _Matrices) -> Tensor:
    """Return the variance of each row's elements, fp64 ``(R,)``."""
    part = held.part
    alpha = part.tables.per_copy(mm.concentrations(held.prior))
    options = part.options
    if options.dirichlet == "exact" and not options.sparse:
        total = alpha.sum(-1)
        squared = (alpha * (alpha + 1.0)).sum(-1) / (total * (total + 1.0))
    else:  # no closed form: the mean of 1024 draws, by the noise contract
        source = mm.NoiseSource(part.tables, part.components, _MOMENT_DRAWS, options.dirichlet == "exact")
        noise = source.draw(alpha, seed=0, draw=torch.zeros(1, dtype=torch.int64, device=part.device))
        squared = mm.mixture_weights(alpha, noise, options.sparse).square().sum(-1).mean(0)
    v = part.tables.per_copy(torch.exp(2.0 * held.std_prior))
    expected = part.tables.to_rows(squared) * part.tables.row_rank * v
    return held.scale.square() * expected / options.outer_samples


def check_saved(saved: SavedFolder) -> None:
    """Check what `MontecloraPosterior.save_pretrained` wrote: options, matrices and masks.

    Raises:
        ValueError: naming the file and the key.
    """
    config, file = saved.config, saved.file(POSTERIOR_CONFIG)
    for key in ("options", "sample_scaler", "parameters"):
        if key not in config:
            raise ValueError(f"{file} has no key {key!r}")
    options, scaler, names = config["options"], config["sample_scaler"], config["parameters"]
    try:
        if not isinstance(options, dict) or options.keys() != set(_SHAPING):
            raise ValueError(f"'options' must name {_SHAPING}, got {options!r}")
        if type(options["sparse"]) is not bool or type(options["outer_samples"]) is not int:
            raise ValueError(
                f"'sparse' must be true or false and 'outer_samples' an integer, got {options!r}"
            )
        if type(scaler) not in (int, float):
            raise ValueError(f"'sample_scaler' must be a number, got {scaler!r}")
        check_scaler(scaler)
        MontecloraOptions(**options)
        if not isinstance(names, list) or not names or not all(name in saved.values for name in names):
            raise ValueError("'parameters' must list tensors of PEFT's file")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    for key, mask in saved.beside.items():
        where = f"{saved.file(POSTERIOR_WEIGHTS)}: {key!r}"
        matrix = saved.values[key] if key in names else None
        if matrix is None or mask.shape != matrix.shape:
            found = None if matrix is None else tuple(matrix.shape)
            raise ValueError(f"{where} has shape {tuple(mask.shape)}, the perturbed matrix {found}")
        if mask.dtype is not torch.uint8 or bool((mask > 1).any()) or bool(matrix[mask == 0].any()):
            raise ValueError(
                f"{where} must be 0, as uint8, where the matrix is pruned and zero, and 1 elsewhere"
            )


def load_monteclora(model: nn.Module, saved: SavedFolder, is_trainable: bool) -> Posterior:
    """Load a posterior that `MontecloraPosterior.save_pretrained` wrote; see `Posterior.from_pretrained`."""
    from bayeslora.posterior_loading import put_into

    return put_into(model, saved, None, is_trainable, _build)


def _build(model: PeftModel, saved: SavedFolder, adapter: str) -> Posterior:
    from bayeslora.monteclora import _banks, configure_monteclora
    from bayeslora.patching import patch
    from bayeslora.posterior_files import keys_of
    from bayeslora.posterior_loading import write_weights

    config = saved.config
    with unchanged_on_failure(objects=_banks(model)):
        patch(model)  # on a quantized base the priors are there only now
        write_weights(model, saved, adapter)
        configure_monteclora(model, adapter, sample_scaler=config["sample_scaler"], **config["options"])
        posterior = Posterior.from_monteclora(model, adapter)
        assert isinstance(posterior, MontecloraPosterior)
        matrices = {
            n: p for held in posterior._parts for n, p in zip(held.names, held.parameters, strict=True)
        }
        _, keys = keys_of(model, matrices, adapter)
        names = {key: name for name in matrices for key in keys[name]}
        if names.keys() != set(config["parameters"]):
            odd = min(names.keys() ^ set(config["parameters"]))
            raise ValueError(f"{saved.file(POSTERIOR_CONFIG)} and the model do not both perturb {odd!r}")
        posterior.restore(config["pruned"], {names[key]: mask for key, mask in saved.beside.items()})
    return posterior
