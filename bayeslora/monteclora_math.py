"""MonteCLoRA's small tensors: mixture weights, variances, noise coefficients and KL terms, batched.

For each perturbed matrix (a *site*) of an adapter with rank r and N components, with learned
``s = std_prior`` ``(r,)`` and ``e = expert_weights_prior`` ``(N,)``, and draws W ~ Wishart(r, I), π::

    v = exp(2 s),  α = exp(e),  Σ_jj = max(v_j W_jj, 1e-3),  π ~ Dirichlet(α)
    KL_gauss   = N/2 Σ_j (Σ_jj - ln Σ_jj - 1)              N components N(0, Σ) against N(0, I)
    KL_wishart = r/2 Σ_j (v_j - ln v_j - 1)                Wishart(r, diag v) against Wishart(r, I)
    KL_dir     = lnΓ(Σα) - Σ lnΓ(α) - lnΓ(Σα₀) + Σ lnΓ(α₀) + Σ (α - α₀)(ψ(α) - ψ(Σα))
    loss       = mean over sites of  η (KL_gauss + KL_wishart + KL_dir) + Σ π²

Everything is fp64: there are rows + N numbers a site, and α spans hundreds of orders of magnitude.

Paper: Seth et al., "Robust and efficient fine-tuning of LLMs with Bayesian reparameterization of
low-rank adaptation" (TMLR 2025). The names and floors are those of PEFT's implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslora._backend import monteclora_kernels
from bayeslora.kernels import noise_twin
from bayeslora.samplers import LogGammaGradient

VARIANCE_FLOOR = 1e-3
ALPHA_FLOOR = 1e-6
_LOGISTIC_STREAM = 1 << 30  # the logistic normal's noise lies beside the perturbation's, in its own streams


class SiteTables:
    """Which layer, site and stream each number belongs to. L layers, S = copies · L sites, R rows in all.

    The sites are every layer's A (or B), then, with two copies, every layer's B. Sums over a site's rows
    have a fixed order: no atomics.

    Args:
        layer_ranks: r of each layer.
        copies: sites a layer.
        streams: the noise stream of each site.
        device: where the tables are.
    """

    def __init__(
        self, layer_ranks: Sequence[int], copies: int, streams: Sequence[int], device: torch.device
    ) -> None:
        self.copies = copies
        self.site_ranks = list(layer_ranks) * copies
        self.streams = torch.tensor(list(streams), dtype=torch.int64, device=device)
        self.ranks = torch.tensor(self.site_ranks, dtype=torch.int64, device=device)
        site = torch.arange(len(self.site_ranks), device=device)
        self.row_site = torch.repeat_interleave(site, self.ranks, output_size=sum(self.site_ranks))
        self.row_rank = self.ranks[self.row_site].double()
        self._uniform = self.site_ranks[0] if len(set(self.site_ranks)) == 1 else None
        self._constants: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}
        self._member = None
        if self._uniform is None:
            self._member = (site[:, None] == self.row_site[None, :]).double()

    def to_rows(self, x: Tensor) -> Tensor:
        """Return ``(..., R)`` from ``(..., S)``: each site's number for every row of it."""
        if self._member is not None:
            return x @ self._member
        assert self._uniform is not None
        return x[..., None].expand(*x.shape, self._uniform).reshape(*x.shape[:-1], -1)

    def times_sites(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return ``(M, R)``: x ``(M, R)`` times each row's site's number of ``(M, S)``."""
        if self._uniform is None:
            return x * self.to_rows(factor)
        return (x.view(*factor.shape, self._uniform) * factor[..., None]).view(x.shape)

    def to_sites(self, x: Tensor) -> Tensor:
        """Return ``(..., S)`` from ``(..., R)``: the sum over each site's rows."""
        if self._member is not None:
            return x @ self._member.T
        return x.reshape(*x.shape[:-1], len(self.site_ranks), -1).sum(-1)

    def dirichlet_constants(self, components: int, prior: float) -> tuple[Tensor, Tensor]:
        """Return ``(α₀, ..., α₀, N α₀)`` and ``(1, ..., 1, -1)``, fp64 ``(N + 1,)``, made once."""
        key = components, prior
        if key not in self._constants:
            values = [prior] * components + [components * prior], [1.0] * components + [-1.0]
            start, sign = torch.tensor(values, dtype=torch.float64, device="cpu").to(self.ranks.device)
            self._constants[key] = start, sign
        return self._constants[key]

    def per_copy(self, x: Tensor) -> Tensor:
        """Return what the layers have, along the first dimension, for every copy."""
        return x if self.copies == 1 else torch.cat([x] * self.copies)


@dataclass
class Noise:
    """What one draw fixes, without gradient: ``chi_square`` ``(M, R)``, ``weights`` ``(M, S, N)``.

    ``weights`` are ln g of the Dirichlet's Gamma variates (``exact``) or the logistic normal's normals.
    """

    chi_square: Tensor
    weights: Tensor
    exact: bool


class NoiseSource:
    """Draws the `Noise` of a batch of sites: one launch, for M outer samples of N components each."""

    def __init__(self, tables: SiteTables, components: int, outer: int, exact: bool) -> None:
        self.components, self.outer, self.exact = components, outer, exact
        device, ranks = tables.ranks.device, tables.ranks
        first = torch.cumsum(ranks, 0) - ranks
        within = torch.arange(tables.row_site.numel(), device=device) - first[tables.row_site]
        base = torch.arange(outer, device=device)[:, None] * (ranks + components)[None, :]
        self.num_sites = ranks.numel()
        self._half_df = (tables.row_rank / 2.0).repeat(outer)
        self._element = (base[:, tables.row_site] + within).reshape(-1)
        self._stream = tables.streams[tables.row_site].repeat(outer)
        self._num_rows = self._element.numel()
        component = torch.arange(components, device=device)
        self._weight_element = ((base + ranks)[:, :, None] + component).reshape(-1)
        self._weight_stream = tables.streams.repeat_interleave(components).repeat(outer)
        if exact:
            self._element = torch.cat([self._element, self._weight_element])
            self._stream = torch.cat([self._stream, self._weight_stream])

    @torch.no_grad()
    def draw(self, alpha: Tensor, *, seed: int, draw: Tensor) -> Noise:
        """Return the noise of one draw; ``alpha`` is ``(S, N)``, ``draw`` an int64 tensor of one element."""
        concentration = self._half_df
        if self.exact:
            concentration = torch.cat([concentration, alpha.expand(self.outer, -1, -1).reshape(-1)])
        log_g = monteclora_kernels(alpha.device).log_gamma(
            concentration, self._stream, self._element, seed=seed, draw=draw
        )
        chi_square = 2.0 * torch.exp(log_g[: self._num_rows]).view(self.outer, -1)
        weights = log_g[self._num_rows :] if self.exact else self._normals(seed, draw)
        return Noise(chi_square, weights.view(self.outer, self.num_sites, self.components), exact=self.exact)

    def _normals(self, seed: int, draw: Tensor) -> Tensor:
        stream = self._weight_stream + _LOGISTIC_STREAM
        return noise_twin.randn4x(seed, draw, stream, self._weight_element)[0].double()


def concentrations(expert_weights_prior: Tensor) -> Tensor:
    """Return α = exp(e) in fp64, not below `ALPHA_FLOOR` (PEFT's)."""
    return torch.exp(expert_weights_prior.double()).clamp(min=ALPHA_FLOOR)


def mixture_weights(alpha: Tensor, noise: Noise, sparse: bool) -> Tensor:
    """Return π ``(M, S, N)``, differentiable in α ``(S, N)``; sparse: all but each largest set to zero."""
    if noise.exact:
        logits = LogGammaGradient.apply(alpha.expand_as(noise.weights), noise.weights)
    else:
        logits = logistic_normal(alpha, noise.weights)[0]
    weights = torch.softmax(logits, dim=-1)
    return largest_only(weights) if sparse else weights


def logistic_normal(alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of PEFT's approximation to the Dirichlet, their std, and where that depends on α.

    Args:
        alpha: α, ``(S, N)``.
        noise: standard normals, ``(M, S, N)``.
    """
    count, inverse, log_alpha = alpha.shape[-1], 1.0 / alpha, torch.log(alpha)
    variance = inverse * (1.0 - 2.0 / count) + inverse.sum(-1, keepdim=True) / count**2
    std = torch.sqrt(variance.clamp(min=ALPHA_FLOOR) + ALPHA_FLOOR)
    return log_alpha - log_alpha.mean(-1, keepdim=True) + std * noise, std, variance >= ALPHA_FLOOR


def largest_only(weights: Tensor) -> Tensor:
    """Return the weights with all but the largest of each vector set to zero."""
    largest = weights.detach().argmax(-1, keepdim=True)
    return weights * torch.zeros_like(weights).scatter_(-1, largest, 1.0)


def row_variances(std_prior: Tensor, tables: SiteTables, chi_square: Tensor) -> Tensor:
    """Return Σ_jj ``(M, R)``, differentiable in the layers' concatenated s."""
    v = tables.per_copy(torch.exp(2.0 * std_prior.double()))
    return (v * chi_square).clamp(min=VARIANCE_FLOOR)


def coefficients(
    variances: Tensor, weights: Tensor, scale: Tensor, tables: SiteTables, collapsed: bool
) -> Tensor:
    """Return the factor κ of each row's noise, fp64 ``(R, components)``.

    collapsed ``(R, 1)``: ``κ_j = c/M · sqrt(Σ_m ‖π_m‖² Σ_mjj)``; mixture ``(R, M · N)``:
    ``κ_j[m, i] = c/M · π_mi sqrt(Σ_mjj)``. Both give noise of one law: a sum of independent Gaussians.

    Args:
        variances: ``(M, R)``.
        weights: π, ``(M, S, N)``.
        scale: c, a scalar tensor.
        tables: of the sites.
        collapsed: which of the two.
    """
    outer = variances.shape[0]
    if collapsed:
        squared = tables.to_rows(weights.square().sum(-1))
        return (scale / outer * torch.sqrt((squared * variances).sum(0)))[:, None]
    by_row = tables.to_rows(weights.transpose(1, 2))  # (M, N, R)
    each = by_row * torch.sqrt(variances)[:, None]
    return (scale / outer) * each.reshape(-1, variances.shape[1]).T


def gaussian_kl(variances: Tensor, tables: SiteTables, components: int) -> Tensor:
    """Return KL_gauss of each site, ``(S,)``, the mean over the M outer samples."""
    return tables.to_sites(0.5 * components * (variances - torch.log(variances) - 1.0).mean(0))


def wishart_kl(std_prior: Tensor, tables: SiteTables) -> Tensor:
    """Return KL_wishart of each site, ``(S,)``."""
    log_v = tables.per_copy(2.0 * std_prior.double())
    return tables.to_sites(0.5 * tables.row_rank * (torch.exp(log_v) - log_v - 1.0))


def dirichlet_kl(alpha: Tensor, prior: float) -> Tensor:
    """Return KL(Dirichlet(α) ‖ Dirichlet(prior, ..., prior)) along the last dimension."""
    total = alpha.sum(-1)
    start = torch.full_like(alpha, prior)
    constant = torch.lgamma(start).sum(-1) - torch.lgamma(start.sum(-1))
    spread = ((alpha - start) * (torch.digamma(alpha) - torch.digamma(total)[..., None])).sum(-1)
    return torch.lgamma(total) - torch.lgamma(alpha).sum(-1) + constant + spread
