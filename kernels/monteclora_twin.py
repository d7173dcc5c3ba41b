"""MonteCLoRA's samplers in plain torch: the specification of ``monteclora.py``, and the path of CPUs.

Equations, papers and layout: see ``monteclora.py``. Every function has the signature of the Triton
function of the same name.
"""

import math

import torch
from torch import Tensor

from bayeslora.kernels import noise_twin
from bayeslora.kernels.monteclora_plan import PerturbPlan

MAX_ATTEMPTS = 32
_MASK32 = 0xFFFFFFFF


def _attempt_words(seed: int, draw: int, stream: Tensor, element: Tensor, attempt: int) -> tuple[Tensor, ...]:
    counter = (
        element & _MASK32,
        torch.full_like(element, draw & _MASK32),
        stream & _MASK32,
        torch.full_like(element, attempt + 1),
    )
    return noise_twin.philox4x32((seed & _MASK32, (seed >> 32) & _MASK32), counter)


def _unit_open(word: Tensor) -> Tensor:
    return (word.double() + 0.5) * 2.0**-32


@torch.no_grad()
def log_gamma(
    concentration: Tensor, stream: Tensor, element: Tensor, *, seed: int, draw: Tensor | int
) -> Tensor:
    """Return the logarithm of one Gamma(concentration, 1) variate an element.

    See :func:`bayeslora.kernels.monteclora.log_gamma`.
    """
    draw = int(draw)
    a = concentration.double()
    d = torch.where(a < 1.0, a + 1.0, a) - 1.0 / 3.0
    c = 1.0 / torch.sqrt(9.0 * d)
    log_v, boost = torch.zeros_like(a), torch.zeros_like(a)
    pending = torch.ones_like(a, dtype=torch.bool)
    for attempt in range(MAX_ATTEMPTS):
        w0, w1, w2, w3 = _attempt_words(seed, draw, stream, element, attempt)
        z = torch.sqrt(-2.0 * torch.log(_unit_open(w0))) * torch.cos(2.0 * math.pi * _unit_open(w1))
        if attempt == 0:
            boost = torch.log(_unit_open(w3)) / a
        root = 1.0 + c * z
        safe = torch.where(root > 0.0, root, torch.ones_like(root))
        log_cube, cube = 3.0 * torch.log(safe), safe * safe * safe
        fits = torch.log(_unit_open(w2)) < 0.5 * z * z + d * (1.0 - cube + log_cube)
        accepted = pending & (root > 0.0) & fits
        log_v = torch.where(accepted, log_cube, log_v)
        pending &= ~accepted
        if not bool(pending.any()):
            break
    return torch.log(d) + log_v + torch.where(a < 1.0, boost, torch.zeros_like(a))


def _normals(plan: PerturbPlan, index: int, component: int, seed: int, draw: int) -> Tensor:
    """Return the noise of one component of a site, fp32 ``(rows, cols)``."""
    site = plan.sites[index]
    padded = (site.cols + 3) // 4 * 4
    numel = site.rows * padded
    flat = noise_twin.randn(
        numel, seed=seed, draw=draw, stream=site.stream, offset=component * numel, device=plan.device
    )
    return flat.view(site.rows, padded)[:, : site.cols]


@torch.no_grad()
def perturb_(plan: PerturbPlan, flat: Tensor, coefficients: Tensor, *, seed: int, draw: Tensor | int) -> None:
    """Add noise to every site in place. See :func:`bayeslora.kernels.monteclora.perturb_`."""
    draw = int(draw)
    accumulate = torch.promote_types(flat.dtype, torch.float32)
    for i, site in enumerate(plan.sites):
        rows = slice(plan.first_rows[i], plan.first_rows[i] + site.rows)
        matrix = plan.by_rows(flat, i)
        total = matrix.to(accumulate)
        for n in range(coefficients.shape[1]):
            scale = coefficients[rows, n].to(accumulate)
            total = total + scale[:, None] * _normals(plan, i, n, seed, draw).to(accumulate)
        matrix.copy_(total)


@torch.no_grad()
def coefficient_gradient(
    plan: PerturbPlan, grad: Tensor, components: int, *, seed: int, draw: Tensor | int
) -> Tensor:
    """Return the coefficients' gradient. See :func:`bayeslora.kernels.monteclora.coefficient_gradient`."""
    draw = int(draw)
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    out = torch.empty(plan.num_rows, components, dtype=accumulate, device=grad.device)
    for i, site in enumerate(plan.sites):
        rows = slice(plan.first_rows[i], plan.first_rows[i] + site.rows)
        matrix = plan.by_rows(grad, i).to(accumulate)
        for n in range(components):
            out[rows, n] = (matrix * _normals(plan, i, n, seed, draw).to(accumulate)).sum(dim=1)
    return out
