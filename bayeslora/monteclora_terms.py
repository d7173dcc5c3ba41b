"""One draw's small tensors for all sites, and every gradient of theirs in closed form.

What `monteclora_math.py` defines, in the few operators that the values and the gradients need together:
autograd would run some eighty functions over tensors of a few thousand numbers, and the host would be
what a step waits for. With l the logits of π, π̃ = π but for the components that the sparse mixture drops,
P_m = Σᵢ π̃_mi², f_mj = 1 where Σ_mjj is above its floor, N components and M outer samples::

    collapsed   κ_j = c/M · sqrt(q_j), q_j = Σ_m P_m Σ_mjj,  h_mj = P_m Σ_mjj / q_j,  u_j = dκ_j κ_j
                ds_j = u_j Σ_m h_mj f_mj          dl_mi = Σ_j u_j h_mj · (π̃_mi² / P_m - π_mi)
    mixture     κ_j[m, i] = c/M · π̃_mi sqrt(Σ_mjj),          u_j[m, i] = dκ_j[m, i] κ_j[m, i]
                ds_j = Σ_mi u_j[m, i] f_mj        dl_mi = Σ_j u_j[m, i] - π_mi Σ_ij u_j[m, i]
    KL terms    ds_j = r (v_j - 1) + N/M Σ_m (Σ_mjj - 1) f_mj
                dα_i = (αᵢ - α₀) ψ'(αᵢ) - Σ(α - α₀) ψ'(Σα)
    Σ π²        dl_mi = 2/M (π̃_mi² - P_m π_mi)

since v = exp(2 s) makes κ and sqrt(Σ) their own derivatives. ``de = dα · α`` above α's floor.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from bayeslora import monteclora_math as mm
from bayeslora.samplers import log_gamma_slope


def _over_outer(x: Tensor) -> Tensor:
    """Return the sum over the first dimension, the M outer samples."""
    return x[0] if x.shape[0] == 1 else x.sum(0)


class Priors:
    """v and α of every site, fp64, from the layers' flat priors: every s, then every e.

    Args:
        flat: ``(rows + L · N,)`` of the L layers, any floating dtype; read without gradient.
        tables: of the sites.
        components: N.
    """

    def __init__(self, flat: Tensor, tables: mm.SiteTables, components: int) -> None:
        self.tables, self.components, self.dtype = tables, components, flat.dtype
        values = flat.detach().double()
        rows = sum(tables.site_ranks) // tables.copies
        s, e = values.split_with_sizes([rows, values.numel() - rows])
        self.log_v = 2.0 * tables.per_copy(s)
        self.v = torch.exp(self.log_v)
        self.alpha = tables.per_copy(mm.concentrations(e).view(-1, components))

    @cached_property
    def alpha_slope(self) -> Tensor:
        """dα/de, ``(S, N)``: α, and 0 at its floor."""
        return self.alpha * (self.alpha > mm.ALPHA_FLOOR)

    def flat_gradient(self, d_s: Tensor, d_e: Tensor) -> Tensor:
        """Return the gradient of ``flat``, fp64, from those of all sites' s ``(R,)`` and e ``(S, N)``."""
        copies = self.tables.copies
        if copies > 1:
            d_s, d_e = d_s.view(copies, -1).sum(0), d_e.reshape(copies, -1).sum(0)
        return torch.cat([d_s, d_e.reshape(-1)])

    def loss(
        self, draw: DrawTerms | None, prior: float, weight: float, use_entropy: bool, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the variational loss over the sites, fp64, and its gradient in ``flat``.

        Args:
            draw: where the loss is taken; None leaves out what depends on it.
            prior: α₀.
            weight: η.
            use_entropy: whether Σ π² is part of it.
            share: factor on all of it.
        """
        tables, weight = self.tables, weight * share
        above = self.v - 1.0
        d_s = tables.row_rank * above
        total, pull, constant = self._dirichlet_kl(prior)
        total = torch.add(total, (tables.row_rank * (above - self.log_v)).sum(), alpha=0.5)
        if draw is not None:
            each = self.components / draw.variances.shape[0]
            gaussian = (draw.variances - torch.log(draw.variances)).sum()
            total = torch.add(total, gaussian, alpha=0.5 * each)
            constant -= 0.5 * each * draw.variances.numel()
            d_s = torch.add(d_s, _over_outer((draw.variances - 1.0) * draw.free), alpha=each)
        total = total * weight + constant * weight
        if draw is None or not use_entropy:
            return total, self.flat_gradient(d_s * weight, pull * self.alpha_slope * weight)
        each = share / draw.squared.shape[0]
        total = torch.add(total, draw.squared.sum(), alpha=each)
        tilt = torch.addcmul(draw.kept_square, draw.squared[..., None], draw.weights, value=-1.0)
        d_e = draw.logits_to_e(tilt * (2.0 * each))
        return total, self.flat_gradient(
            d_s * weight, torch.addcmul(d_e, pull, self.alpha_slope, value=weight)
        )

    def _dirichlet_kl(self, prior: float) -> tuple[Tensor, Tensor, float]:
        """Return KL_dir, summed over the sites, less a number; its gradient in α ``(S, N)``; the number."""
        n = self.components
        a = torch.cat([self.alpha, self.alpha.sum(-1, keepdim=True)], dim=-1)
        excess, sign = self.tables.dirichlet_constants(n, prior)
        excess = a - excess
        each = torch.digamma(a).mul_(excess).sub_(torch.lgamma(a)).sum(0)
        pull = torch.polygamma(1, a).mul_(excess)
        constant = a.shape[0] * (n * math.lgamma(prior) - math.lgamma(n * prior))
        return (each * sign).sum(), pull[:, :n] - pull[:, n:], constant


class DrawTerms:
    """What one draw makes of the priors; see the module's docstring.

    Args:
        priors: v and α.
        noise: of the draw.
        sparse: only the component with the largest weight is active.
    """

    def __init__(self, priors: Priors, noise: mm.Noise, sparse: bool) -> None:
        self.priors, self.noise, self.tables = priors, noise, priors.tables
        self.variances = (priors.v * noise.chi_square).clamp_(min=mm.VARIANCE_FLOOR)
        logits = noise.weights if noise.exact else mm.logistic_normal(priors.alpha, noise.weights)[0]
        self.weights = torch.softmax(logits, dim=-1)
        self.kept = mm.largest_only(self.weights) if sparse else self.weights
        self.kept_square = self.kept * self.kept
        self.squared = self.kept_square.sum(-1)

    def coefficients(self, scale: Tensor, collapsed: bool) -> Tensor:
        """Return κ, fp64 ``(R, 1)`` or ``(R, M · N)``, kept for `gradient`; ``scale`` is c."""
        outer, rows = self.variances.shape
        scale = scale if outer == 1 else scale / outer
        self._collapsed = collapsed
        if collapsed:
            self._q = self.tables.times_sites(self.variances, self.squared)
            self._kappa = (torch.sqrt(_over_outer(self._q)) * scale)[:, None]
        else:
            by_row = self.tables.to_rows(self.kept.transpose(1, 2))  # (M, N, R)
            each = by_row * torch.sqrt(self.variances)[:, None]
            self._kappa = scale * each.reshape(-1, rows).T
        return self._kappa

    def gradient(self, d_kappa: Tensor) -> Tensor:
        """Return the gradient of the flat priors, in their dtype, from that of κ."""
        u = d_kappa * self._kappa
        outer, rows = self.variances.shape
        if self._collapsed:
            by_row = u.view(1, rows)
            if outer > 1:
                by_row = by_row * (self._q / self._q.sum(0))
            d_s = by_row * self.free
            d_logits = self.tables.to_sites(by_row)[..., None] * self.lean
        else:
            by_component = u.T.reshape(outer, -1, rows)
            d_s = by_component.sum(1) * self.free
            d_logits = self.tables.to_sites(by_component).transpose(1, 2)
            d_logits = d_logits - self.weights * d_logits.sum(-1, keepdim=True)
        d_e = self.logits_to_e(d_logits)
        return self.priors.flat_gradient(_over_outer(d_s), d_e).to(self.priors.dtype)

    @property
    def num_coefficients(self) -> int:
        """How many κ a row has."""
        return self._kappa.shape[1]

    @cached_property
    def free(self) -> Tensor:
        """Where a variance is above its floor, ``(M, R)``: f."""
        return self.variances > mm.VARIANCE_FLOOR

    @cached_property
    def lean(self) -> Tensor:
        """π̃² / P - π, ``(M, S, N)``: half of d ln P / dl."""
        return self.kept_square / self.squared[..., None] - self.weights

    @cached_property
    def _slope(self) -> Tensor:
        """Slope of the Dirichlet's Gamma variates, d ln g / de, ``(M, S, N)``."""
        alpha = self.priors.alpha.expand_as(self.noise.weights)
        return log_gamma_slope(alpha, self.noise.weights) * self.priors.alpha_slope

    def logits_to_e(self, d_logits: Tensor) -> Tensor:
        """Return the gradient of every site's e, ``(S, N)``, from that of the logits of π."""
        if self.noise.exact:
            return _over_outer(d_logits * self._slope)
        alpha, noise = self.priors.alpha, self.noise.weights
        _, std, moves = mm.logistic_normal(alpha, noise)
        count, inverse = alpha.shape[-1], 1.0 / alpha
        d_variance = _over_outer(d_logits * noise) * moves / (2.0 * std)
        spread = d_variance.sum(-1, keepdim=True) / count**2
        d_inverse = d_variance * (1.0 - 2.0 / count) + spread
        d_log = _over_outer(d_logits) - d_inverse * inverse  # in ln α; over a site d_logits sums to zero
        return d_log * inverse * self.priors.alpha_slope
