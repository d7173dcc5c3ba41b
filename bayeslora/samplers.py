"""Random variates that are functions of ``(seed, draw, stream)``: the same on every device.

Gamma, χ², Dirichlet and Wishart by the noise contract of ``kernels/noise.py``. The Dirichlet is
differentiable in its concentration (implicit reparameterisation): for g with distribution function
F(g; a), ``dg/da = -(∂F/∂a) / (∂F/∂g)``, and the gradient flows through the normalisation.

Papers: Figurnov, Mohamed, Mnih, "Implicit reparameterization gradients" (NeurIPS 2018); Smith and Hocking,
"Wishart variate generator" (1972, Bartlett's decomposition).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayeslora._backend import monteclora_kernels
from bayeslora.kernels import noise_twin

__all__ = ["chi_square", "dirichlet", "gamma", "wishart"]

_SMALL = -20.0  # below it ln g has its limit law P(g; a) = g^a / Γ(a + 1), to a relative 2e-9


class LogGammaGradient(torch.autograd.Function):
    """Give ln g, drawn without gradient, its implicit gradient to the concentration."""

    @staticmethod
    def forward(ctx: Any, concentration: Tensor, log_g: Tensor) -> Tensor:  # type: ignore[override]
        """Return ``log_g``, fp64."""
        ctx.save_for_backward(concentration, log_g)
        return log_g.view_as(log_g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return d ln g / da · grad, in the concentration's dtype."""
        concentration, log_g = ctx.saved_tensors
        return (grad * log_gamma_slope(concentration.double(), log_g)).to(concentration.dtype), None


def log_gamma_slope(concentration: Tensor, log_g: Tensor) -> Tensor:
    """Return d ln g / da of Gamma variates whose uniform numbers are held fixed, all fp64."""
    g = torch.exp(log_g.clamp(min=_SMALL))
    slope = torch._standard_gamma_grad(concentration, g) / g
    limit = (torch.digamma(concentration + 1.0) - log_g) / concentration
    return torch.where(log_g < _SMALL, limit, slope)


def _check_positive(name: str, value: Tensor) -> None:
    if not bool(((value > 0) & torch.isfinite(value)).all()):
        raise ValueError(f"{name} must be positive and finite, got {value.detach().flatten()[:8].tolist()}")


def _log_gamma(concentration: Tensor, seed: int, draw: int, stream: int, offset: int = 0) -> Tensor:
    flat = concentration.reshape(-1)
    element = torch.arange(offset, offset + flat.numel(), dtype=torch.int64, device=flat.device)
    log_g = monteclora_kernels(flat.device).log_gamma(
        flat.detach(), torch.full_like(element, stream), element, seed=seed, draw=draw
    )
    return LogGammaGradient.apply(flat, log_g).view(concentration.shape)


def gamma(concentration: Tensor, *, seed: int, draw: int = 0, stream: int = 0) -> Tensor:
    """Return one Gamma(concentration, 1) variate an element, differentiable in the concentration.

    Args:
        concentration: a > 0, any shape and floating dtype.
        seed: 64-bit key of the noise.
        draw: index of the sample.
        stream: index of the tensor.

    Returns:
        The variates in ``concentration``'s shape, fp64 (those of small concentrations underflow fp32).

    Raises:
        ValueError: a concentration is not positive and finite.
    """
    _check_positive("concentration", concentration)
    return torch.exp(_log_gamma(concentration, seed, draw, stream))


def chi_square(df: Tensor, *, seed: int, draw: int = 0, stream: int = 0) -> Tensor:
    """Return one χ²(df) variate an element, ``2 Gamma(df / 2)``, differentiable in ``df``.

    Args:
        df: degrees of freedom > 0, any shape and floating dtype.
        seed: 64-bit key of the noise.
        draw: index of the sample.
        stream: index of the tensor.

    Returns:
        The variates in ``df``'s shape, fp64.

    Raises:
        ValueError: a ``df`` is not positive and finite.
    """
    _check_positive("df", df)
    return 2.0 * torch.exp(_log_gamma(df / 2.0, seed, draw, stream))


def dirichlet(concentration: Tensor, *, seed: int, draw: int = 0, stream: int = 0) -> Tensor:
    """Return Dirichlet(concentration) vectors along the last dimension, with pathwise gradients.

    Args:
        concentration: α > 0, ``(..., N)``, any floating dtype.
        seed: 64-bit key of the noise.
        draw: index of the sample.
        stream: index of the tensor.

    Returns:
        fp64 ``(..., N)``; each vector sums to one.

    Raises:
        ValueError: a concentration is not positive and finite.
    """
    _check_positive("concentration", concentration)
    return torch.softmax(_log_gamma(concentration, seed, draw, stream), dim=-1)


def wishart(
    df: float, scale_tril: Tensor, num_samples: int, *, seed: int, draw: int = 0, stream: int = 0
) -> Tensor:
    """Return Wishart(df, L Lᵀ) matrices by Bartlett's decomposition, ``W = L A Aᵀ Lᵀ``.

    A is lower triangular with ``A_ii² ~ χ²(df - i)``, i = 0..p-1, and standard normals below the diagonal.
    Differentiable in ``scale_tril``.

    Args:
        df: degrees of freedom, > p - 1.
        scale_tril: L, ``(p, p)`` lower triangular with a positive diagonal, any floating dtype.
        num_samples: how many matrices, >= 1.
        seed: 64-bit key of the noise.
        draw: index of the sample.
        stream: index of the tensor.

    Returns:
        ``(num_samples, p, p)``, fp64, E[W] = df · L Lᵀ.

    Raises:
        ValueError: a shape or a range does not fit.
    """
    if scale_tril.dim() != 2 or scale_tril.shape[0] != scale_tril.shape[1]:
        raise ValueError(f"scale_tril must be a square matrix, got shape {tuple(scale_tril.shape)}")
    _check_positive("the diagonal of scale_tril", scale_tril.diagonal())
    p = scale_tril.shape[0]
    if not df > p - 1:
        raise ValueError(f"df must be > {p - 1} for matrices of size {p}, got {df!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples!r}")
    device = scale_tril.device
    freedom = df - torch.arange(p, dtype=torch.float64, device=device).expand(num_samples, p)
    factor = noise_twin.randn(num_samples * p * p, seed=seed, draw=draw, stream=stream, device=device)
    factor = factor.double().view(num_samples, p, p).tril(-1)
    root = torch.sqrt(chi_square(freedom, seed=seed, draw=draw, stream=stream))
    product = scale_tril.double().tril() @ (factor + torch.diag_embed(root))
    return product @ product.mT
