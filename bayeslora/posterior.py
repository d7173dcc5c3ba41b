"""The posterior over adapter weights: sample, predict, prune, save and load.

θ ~ N(m, diag(σ²)), σ² = 1 / (λ (h + δ)), with mean m, Hessian h, effective sample size λ and prior
precision δ from IVON. A sample is named by its seed: the same seed gives the same weights on every device.

Here is the public class; how it is done lies beside it: the Gaussians in ``posterior_gaussian.py``, the
adapters that they are of in ``posterior_adapters.py``, samples in ``posterior_sampling.py``, prediction and
generation in ``posterior_predict.py`` and ``posterior_generate.py`` (all samples in one pass:
``posterior_batched.py``), sweeps and merging in ``posterior_sweeps.py`` and ``posterior_lifecycle.py``, files
in ``posterior_files.py`` and ``posterior_loading.py``.

Paper: Cong et al., "Improving LoRA with variational learning" (2025), for pruning and test-time scaling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayeslora.posterior_gaussian import (
    FixedTensor,
    GaussianParameter,
    fixed_tensors,
    prune_gaussians,
    unperturbed_means,
)
from bayeslora.posterior_generate import generate
from bayeslora.posterior_lifecycle import PosteriorLifecycle
from bayeslora.posterior_order import RowOrders
from bayeslora.posterior_predict import check_scale, check_seed, check_seeds, predict
from bayeslora.posterior_sampling import Overwritten, SampleWriter
from bayeslora.posterior_sweeps import Predictions, Sweep, prune_sweep, variance_sweep
from bayeslora.ties import memory

if TYPE_CHECKING:
    from bayeslora.ivon import IVON
    from bayeslora.posterior_adapters import Place


@dataclass
class Posterior(PosteriorLifecycle):
    """A diagonal Gaussian posterior over the trained parameters of a model.

    Made by :meth:`from_optimizer` or :meth:`from_pretrained`. It keeps its own fp32 mean and Hessian, and its
    own copy of the adapter's other tensors (a head trained at its mean), so further training of the adapter
    does not change it: a sample puts all of them in place, and back what was there. The base model is the
    live one.

    Args:
        model: the model whose parameters are sampled.
        parameters: name in ``model.named_parameters()`` of each tensor, and its Gaussian.
        pruned: the ratios :meth:`prune` was called with, in order.
        fixed: name and value of each tensor of the adapter that no sample changes.
    """

    model: nn.Module
    parameters: dict[str, GaussianParameter]
    pruned: list[float] = field(default_factory=list)
    fixed: dict[str, FixedTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._writer = SampleWriter()
        self._stds: dict[int, tuple[Any, Tensor]] = {}  # of posterior_batched.py
        self._places: dict[str, list[Place]] | None = None  # of posterior_adapters.py
        self._orders = RowOrders()

    def _tensors(self) -> dict[str, Tensor]:
        """Return the model's parameters that are sampled, by name."""
        return {name: g.parameter for name, g in self.parameters.items()}

    # ---- where it comes from ---------------------------------------------------------------------

    @classmethod
    @torch.inference_mode(False)  # the posterior outlives the caller's context
    def from_optimizer(cls, model: nn.Module, optimizer: IVON) -> Posterior:
        """Return the posterior an IVON optimizer has learned. The parameters are left at the mean.

        Args:
            model: the model that the optimizer trains.
            optimizer: a :class:`bayeslora.IVON`, also one wrapped by accelerate.

        Raises:
            TypeError: the optimizer is not IVON.
            ValueError: a trained parameter of the optimizer is not one of the model's.
        """
        inner = find_ivon(optimizer)
        gaussians = list(inner.gaussians())
        names = {id(p): name for name, p in model.named_parameters()}
        parameters: dict[str, GaussianParameter] = {}
        seen: set[Any] = set()
        for p, gaussian in gaussians:
            if id(p) not in names:
                raise ValueError(
                    f"the optimizer trains a parameter of shape {tuple(p.shape)} that is not in the model; "
                    "pass the model whose parameters were given to IVON"
                )
            if memory(p) not in seen:  # of those that share one, the first
                seen.add(memory(p))
                parameters[names[id(p)]] = gaussian
        sampled = [g.parameter for g in parameters.values()]
        fixed = fixed_tensors(model, sampled, unperturbed_means(inner.param_groups, inner.state))
        return cls(model, parameters, fixed=fixed)

    @classmethod
    def from_monteclora(cls, model: nn.Module, adapter_name: str | None = None) -> Posterior:
        """Return the posterior of a MonteCLoRA adapter: what its training draws the matrices from.

        It samples, predicts, prunes, saves and loads as IVON's does, and is kept as IVON's is.

        Args:
            model: a patched model with MonteCLoRA layers.
            adapter_name: the adapter; None for the active one.

        Raises:
            ValueError: the model has no such layers, or several adapters are active.
        """
        from bayeslora.monteclora import _chosen_banks
        from bayeslora.monteclora_posterior import MontecloraPosterior

        banks = _chosen_banks(model, adapter_name)
        if len(banks) != 1:
            raise ValueError(f"one adapter must be active, got {[b.adapter for b in banks]}; name it")
        return MontecloraPosterior(model, banks[0])

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | PathLike[str],
        adapter_name: str | None = None,
        *,
        is_trainable: bool = False,
    ) -> Posterior:
        """Load an adapter and its posterior from a folder made by :meth:`save_pretrained`.

        The base may be on another device, in another dtype or quantized: mean and Hessian are kept in fp32
        where the adapter's parameters are. The files are read once and checked before anything is written;
        afterwards they may change or go. A folder can ask PEFT for any regular expression over the model's
        modules (``target_modules``), which may take forever: load only what you would run as code.

        Args:
            model: a PEFT model whose active adapter takes the mean, or a base model, which gets the
                folder's adapter (then use ``posterior.model``).
            path: the folder.
            adapter_name: the adapter that takes the mean, added to a PEFT model that does not have it, and
                active afterwards; None for the active one ("default" on a base model). So several adapters
                with a posterior each live in one model; each predicts while its adapter is active.
            is_trainable: leave the adapter trainable, for the next task. A base model's comes frozen
                otherwise, as with PEFT.

        Returns:
            The posterior; ``posterior.model`` is the PEFT model.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, belongs to another save or holds what no posterior can be, or does
                not fit the model (another rank, another base model); names the file, the key and both shapes.
            Exception: whatever it is, an interrupt too: the model, its adapters, what is trainable and its
                weights are then as they were.
        """
        from bayeslora.posterior_loading import load_posterior

        return load_posterior(model, path, adapter_name, is_trainable)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the PEFT adapter at the mean, and the posterior beside it.

        The folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's own format, mean
        in fp32), ``posterior.safetensors`` (fp32 Hessian, PEFT's key names) and ``posterior_config.json``,
        which ties them together. A save over an earlier one replaces it as a whole: if it fails or the
        process is killed, the earlier one can still be loaded. Other files in the folder stay.

        Args:
            path: the folder, made if it does not exist.

        Raises:
            TypeError: the model is not a PEFT model.
            ValueError: a parameter of the posterior is not part of the adapter, PEFT's file does not hold it
                as it is, or the posterior's values are not finite.
        """
        from bayeslora.posterior_files import save_posterior

        save_posterior(self, path)

    # ---- samples ---------------------------------------------------------------------------------

    def sample(
        self, seed: int, variance_scale: float = 1.0, *, ess_scale: float | None = None
    ) -> Overwritten:
        """Return a context in which sample ``seed`` is in the model's parameters, in place of what they hold.

        θ = m + sqrt(variance_scale) · σ z(seed), cast to each parameter's dtype; what no sample changes
        (:attr:`fixed`) takes the posterior's own value.

        Another thread that wants a sample in the same model waits; whoever else calls the model meanwhile
        gets the sample's outputs. What the parameters held is put back bit for bit, also after an interrupt
        (Ctrl-C) at any moment and a second one that falls into the putting back: by :meth:`predict` and
        :meth:`generate` before the exception leaves them, by a ``with`` statement too, unless the interrupt
        falls on its very last step; then when the exception is dropped.

        Args:
            seed: 64-bit name of the sample.
            variance_scale: factor on the variance, >= 0 (0: the mean).
            ess_scale: the same as a factor on λ: ``1 / variance_scale``, > 0.

        Raises:
            ValueError: a scale is out of range, or both are given; on entering, the parameters are in memory
                shared with other processes, which would see the sample.
            TypeError: the seed is not an integer.

        Example:
            >>> with posterior.sample(seed=7), torch.no_grad():
            ...     logits = posterior.model(tokens).logits
        """
        variance_scale = check_scale(variance_scale, ess_scale)
        gaussians, fixed = list(self.parameters.values()), list(self.fixed.values())
        return self._writer.sample(self.model, gaussians, fixed, check_seed(seed), variance_scale)

    def predict(
        self,
        batch: Any,
        num_samples: int | None = None,
        seed: int = 0,
        variance_scale: float = 1.0,
        *,
        ess_scale: float | None = None,
        seeds: Sequence[int] | None = None,
        batched: bool = False,
        max_batch: int | None = None,
        average: bool = True,
    ) -> Tensor:
        """Return the posterior predictive probabilities, (1/S) Σ_s softmax(model(batch; θ_s)).

        Sample s is ``sample(seeds[s])``. The model is in eval mode meanwhile, for every thread.

        With ``batched`` the samples are one pass: the batch is repeated S times, and each patched layer
        perturbs its rows by their sample (``lora_samples.py``). The result is that of one pass a sample, up
        to the rounding of the products. Two small passes before the first batch of a kind find out whether
        the model keeps the rows of a batch apart and in order (``posterior_order.py``). Where it does not, or
        the samples cannot share a pass (a perturbed head or bias, a head that was trained on since the
        posterior was made, a quantized base, MonteCLoRA, an unpatched model, an input with another first
        dimension than the batch's), they run one after another, and one log line says why. Each of them then
        finds its own copy of an input that a call may change (a cache).

        Several threads may predict with one model. Samples in one pass share nothing; those that run one
        after another are written into the weights, so that threads take turns, and only other calls of the
        model must wait until they are done. See :meth:`sample` for interrupts.

        Args:
            batch: a mapping (passed as keyword arguments), a tensor, or a tuple of positional arguments.
            num_samples: S >= 1; 10 where neither it nor ``seeds`` is given.
            seed: name of the first sample; the others count on from it.
            variance_scale: factor on the variance, >= 0.
            ess_scale: the same as a factor on λ: ``1 / variance_scale``, > 0.
            seeds: names of the samples, instead of ``seed``.
            batched: all samples in one pass.
            max_batch: rows of one pass, of all samples together; None for no limit. More samples than fit
                go in several passes, and a pass that runs out of memory is halved.
            average: False returns each sample's probabilities.

        Returns:
            fp32 probabilities ``(batch, ..., classes)``, in the shape of the model's logits; with
            ``average=False`` ``(S, batch, ..., classes)``.

        Raises:
            ValueError: ``num_samples``, ``seeds``, a scale or ``max_batch`` is out of range, the posterior's
                adapter is not in use (disabled, not active, another one merged, no longer in the model), or
                samples would be written into memory that other processes share.
            TypeError: a seed is not an integer, the model returns no logits, or an input cannot be copied.

        Example:
            >>> posterior.predict({"input_ids": tokens}, num_samples=4, batched=True).shape
            torch.Size([2, 5, 50])
            >>> posterior.predict(tokens, seeds=[3, 8], ess_scale=2.0, average=False).shape
            torch.Size([2, 2, 5, 50])
        """
        scale = check_scale(variance_scale, ess_scale)
        names = check_seeds(num_samples, seed, seeds, default=10)
        return predict(self, batch, names, scale, batched=batched, max_batch=max_batch, average=average)

    def generate(
        self,
        inputs: Any,
        num_samples: int | None = None,
        seed: int = 0,
        variance_scale: float = 1.0,
        *,
        ess_scale: float | None = None,
        seeds: Sequence[int] | None = None,
        num_return_sequences: int | None = None,
        batched: bool = True,
        max_batch: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Generate from every posterior sample: S models' answers, as one batch with one KV cache.

        ``generate(x, S)[s]`` is what ``model.generate(x)`` gives under ``sample(seeds[s])``, for greedy and
        beam search; with ``do_sample=True`` it follows the same distribution, but the draws of tokens are
        torch's and depend on the batch. Falls back to one sample after another as :meth:`predict` does.

        Args:
            inputs: prompt ids ``(batch, length)`` int64, or a mapping as a tokenizer returns it.
            num_samples: S >= 1; 8 where neither it nor ``seeds`` is given.
            seed: name of the first sample; the others count on from it.
            variance_scale: factor on the variance, >= 0.
            ess_scale: the same as a factor on λ, > 0.
            seeds: names of the samples, instead of ``seed``.
            num_return_sequences: k sequences a prompt and sample (with sampling or beams); None for the
                generation configuration's, which is 1 as a rule.
            batched: False runs one sample after another.
            max_batch: sequences of one pass, of all samples and beams together; None for no limit.
            settings: passed to transformers' ``generate``; tensors with one row a prompt are repeated. What
                holds tensors in another form, such as the cache of a prefix, is copied for each sample, and
                the samples run one after another.

        Returns:
            int64 token ids ``(S, batch, k, length)``, the prompt first as ``generate`` returns it, and the
            model's padding token after the end of shorter ones.

        Raises:
            ValueError: an argument is out of range, one that belongs to a single sample is given, or as for
                :meth:`predict`.
            TypeError: the model has no ``generate``, the inputs no tensor, a seed is not an integer, or a
                setting cannot be copied.

        Example:
            >>> ids = posterior.generate(tokens, num_samples=3, num_return_sequences=2, do_sample=True,
            ...                          max_new_tokens=4, min_new_tokens=4)
            >>> ids.shape
            torch.Size([3, 2, 2, 9])
        """
        scale = check_scale(variance_scale, ess_scale)
        names = check_seeds(num_samples, seed, seeds, default=8)
        return generate(
            self,
            inputs,
            names,
            scale,
            num_return_sequences=num_return_sequences,
            batched=batched,
            max_batch=max_batch,
            settings=settings,
        )

    # ---- the Gaussian itself ---------------------------------------------------------------------

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean m of each parameter, by name, in its shape and fp32 (fp64 for fp64 parameters)."""
        return {name: g.mean for name, g in self.parameters.items()}

    @property
    def variance(self) -> dict[str, Tensor]:
        """The variance σ² = 1 / (λ (h + δ)) of each parameter, as :attr:`mean`; 0 where it is pruned."""
        return {name: g.variance for name, g in self.parameters.items()}

    def prune(self, ratio: float) -> int:
        """Zero the elements with the largest variance, per weight matrix, in the mean and every sample.

        In each tensor of two or more dimensions, ``floor(ratio · numel)`` elements are zero afterwards;
        those pruned before count, so calling it twice with one ratio changes nothing. An interrupt leaves
        all as it was.

        Args:
            ratio: fraction to prune, in [0, 1).

        Returns:
            The number of pruned elements over all tensors.

        Raises:
            ValueError: ``ratio`` is out of range.

        Example:
            >>> posterior.prune(0.1) == sum(int(0.1 * m.numel()) for m in posterior.mean.values())
            True
        """
        return self._prune(ratio)

    def _prune(self, ratio: float, order: torch.Generator | None = None) -> int:
        """Prune by variance, or in the random order of a generator; see :meth:`prune`."""
        return prune_gaussians(self, ratio, order)

    def prune_sweep(
        self,
        data: Predictions | Iterable[tuple[Any, Tensor]],
        ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
        *,
        num_samples: int = 0,
        random_seeds: Sequence[int] = (0, 1, 2),
    ) -> Sweep:
        """Measure the predictions at each pruning ratio, and with as much pruned at random as a control.

        The posterior and the model are afterwards as they were.

        Args:
            data: ``(batch, labels)`` pairs of a classifier (``batch`` as for :meth:`predict`), or a function
                that is called with ``num_samples`` and ``variance_scale`` and returns class probabilities
                ``(N, C)`` and labels ``(N,)``.
            ratios: fractions of each matrix, in [0, 1).
            num_samples: posterior samples averaged; 0 predicts at the mean.
            random_seeds: random prunings of each ratio; none for no control.

        Returns:
            A :class:`~bayeslora.posterior_sweeps.Sweep` with ``rows``, ``table()`` and ``plot(path)``.

        Raises:
            ValueError: a ratio is out of range, or ``ratios`` or ``data`` is empty.
            TypeError: the posterior is MonteCLoRA's or sharded.

        Example:
            >>> sweep = posterior.prune_sweep(questions, [0.0, 0.5], random_seeds=[0])
            >>> [(row["how"], row["ratio"]) for row in sweep.rows]
            [('uncertainty', 0.0), ('uncertainty', 0.5), ('random', 0.0), ('random', 0.5)]
            >>> figure = sweep.plot()  # a path writes it
        """
        return prune_sweep(self, data, ratios, num_samples, random_seeds)

    def variance_sweep(
        self,
        data: Predictions | Iterable[tuple[Any, Tensor]],
        scales: Sequence[float] = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0),
        *,
        num_samples: int = 10,
    ) -> Sweep:
        """Measure the predictions at each scale of the variance; 0 is the mean.

        Args:
            data: as for :meth:`prune_sweep`.
            scales: factors on the variance, >= 0 (1 / ``ess_scale``).
            num_samples: posterior samples averaged, >= 1.

        Returns:
            A :class:`~bayeslora.posterior_sweeps.Sweep` with ``rows``, ``table()`` and ``plot(path)``.

        Raises:
            ValueError: a scale or ``num_samples`` is out of range, or ``scales`` or ``data`` is empty.

        Example:
            >>> print(posterior.variance_sweep(questions, [0.0, 1.0], num_samples=2).table())
            | variance scale | how | accuracy | ECE | NLL (nats) | Brier score |
            ...
            | 1 | 2 samples | ...
        """
        return variance_sweep(self, data, scales, num_samples)


def find_ivon(optimizer: Any) -> IVON:
    """Return the IVON optimizer inside ``optimizer`` (accelerate and others wrap it).

    Raises:
        TypeError: there is none.
    """
    from bayeslora.ivon import IVON

    inner = optimizer
    while not isinstance(inner, IVON) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, IVON):
        raise TypeError(f"optimizer must be a bayeslora.IVON, got {type(inner).__name__}")
    return inner
