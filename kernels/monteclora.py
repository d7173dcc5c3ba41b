"""MonteCLoRA's samplers: all layers' Gamma variates in one launch, all perturbed matrices in another.

With c = sample_scaler, π ~ Dirichlet(α), w_j ~ χ²(r), v_j learned, Zᵢ standard normal, each matrix with
rows j = 1..r (A, or B transposed) becomes::

    mixture      A_eff[j, k] = A[j, k] + Σᵢ κ[j, i] Zᵢ[j, k],   κ[j, i] = c πᵢ sqrt(v_j w_j)
    collapsed    A_eff[j, k] = A[j, k] + κ[j] Z[j, k],          κ[j]    = c ‖π‖₂ sqrt(v_j w_j)

Both have one law: given π, Σ πᵢ Zᵢ is N(0, ‖π‖²). Only the diagonal of W ~ Wishart(r, I) enters, and its
elements are independent χ²(r) = 2 Gamma(r/2). A Dirichlet vector is a softmax of log Gamma variates.

Gamma(a) by Marsaglia and Tsang's rejection, counted by Philox: attempt t of element e of a stream reads the
words of counter ``(e, draw, stream, t + 1)`` (normals of ``noise.py`` have 0 there, so they never meet)::

    d = a' - 1/3,  c = 1 / sqrt(9 d),  v = (1 + c z)³       a' = a, or a + 1 where a < 1
    accept if v > 0 and ln u < z²/2 + d (1 - v + ln v);     ln g = ln d + ln v (+ ln u' / a where a < 1)

in fp64 and in logarithms, since Gamma(0.05) underflows fp32. At most 32 attempts are made, of which each
fails with probability below 0.05; what remains, less than 1e-41 of the draws and so less than the 2^-32
grain of u itself, takes v = 1.

Papers: Seth et al., "Robust and efficient fine-tuning of LLMs with Bayesian reparameterization of
low-rank adaptation" (TMLR 2025); Marsaglia and Tsang, "A simple method for generating gamma variables"
(2000). Layout: ``monteclora_plan.py``. Bytes: perturbing reads and writes each element once; its
gradient reads it once; noise is never stored. ``monteclora_twin.py`` states the same in plain torch.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayeslora.kernels import monteclora_plan as mp
from bayeslora.kernels.launch import Launcher
from bayeslora.kernels.monteclora_plan import BLOCK, PerturbPlan
from bayeslora.kernels.monteclora_twin import MAX_ATTEMPTS
from bayeslora.kernels.noise import randn_block

OFFSET, ROW_STRIDE = tl.constexpr(mp.OFFSET), tl.constexpr(mp.ROW_STRIDE)
COL_STRIDE, ROWS, COLS = tl.constexpr(mp.COL_STRIDE), tl.constexpr(mp.ROWS), tl.constexpr(mp.COLS)
FIRST_ROW, STREAM = tl.constexpr(mp.FIRST_ROW), tl.constexpr(mp.STREAM)
FIRST_TILE, TABLE_WIDTH = tl.constexpr(mp.FIRST_TILE), tl.constexpr(mp.TABLE_WIDTH)
_GAMMA_BLOCK = 128


@triton.jit
def _unit_open64(word):
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit(do_not_specialize=["seed", "numel"])
def _log_gamma_kernel(
    concentration_ptr,  # fp64 [numel]
    stream_ptr,  # int64 [numel]
    element_ptr,  # int64 [numel]
    draw_ptr,  # int64 [1]
    out_ptr,  # fp64 [numel]
    seed,
    numel,
    MAX_ATTEMPTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    a = tl.load(concentration_ptr + index, mask=mask, other=1.0)
    c0 = tl.load(element_ptr + index, mask=mask, other=0).to(tl.uint32)
    c2 = tl.load(stream_ptr + index, mask=mask, other=0).to(tl.uint32)
    c1 = tl.zeros_like(c0) + tl.load(draw_ptr).to(tl.uint32)
    key = seed.to(tl.uint64)
    d = tl.where(a < 1.0, a + 1.0, a) - 0.3333333333333333
    c = 1.0 / tl.sqrt(9.0 * d)
    log_v = tl.zeros_like(a)
    boost = tl.zeros_like(a)
    pending = mask.to(tl.int32)
    attempt = tl.zeros([], dtype=tl.int32)
    while (attempt < MAX_ATTEMPTS) & (tl.max(pending, axis=0) != 0):
        w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, tl.zeros_like(c0) + (attempt + 1).to(tl.uint32))
        angle = 6.283185307179586 * _unit_open64(w1)
        z = tl.sqrt(-2.0 * tl.log(_unit_open64(w0))) * tl.cos(angle)
        if attempt == 0:
            boost = tl.log(_unit_open64(w3)) / a
        root = 1.0 + c * z
        safe = tl.where(root > 0.0, root, 1.0)
        log_cube = 3.0 * tl.log(safe)
        fits = tl.log(_unit_open64(w2)) < 0.5 * z * z + d * (1.0 - safe * safe * safe + log_cube)
        accepted = (pending != 0) & (root > 0.0) & fits
        log_v = tl.where(accepted, log_cube, log_v)
        pending = tl.where(accepted, 0, pending)
        attempt += 1
    value = tl.log(d) + log_v + tl.where(a < 1.0, boost, 0.0)
    tl.store(out_ptr + index, value, mask=mask)


@triton.jit(do_not_specialize=["seed"])
def _perturb_kernel(
    flat_ptr,  # any floating dtype [size]
    coefficient_ptr,  # ACC [rows of all sites, COMPONENTS]
    table_ptr,  # int64 [sites, TABLE_WIDTH]
    tile_site_ptr,  # int32 [tiles]
    draw_ptr,  # int64 [1]
    seed,
    COMPONENTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    row_ptr = table_ptr + tl.load(tile_site_ptr + tile).to(tl.int64) * TABLE_WIDTH
    rows, cols = tl.load(row_ptr + ROWS), tl.load(row_ptr + COLS)
    within = tile - tl.load(row_ptr + FIRST_TILE)
    blocks = tl.cdiv(cols, BLOCK)
    row, start = within // blocks, (within % blocks) * BLOCK
    col = start + tl.arange(0, BLOCK)
    mask = col < cols
    place = (
        tl.load(row_ptr + OFFSET) + row * tl.load(row_ptr + ROW_STRIDE) + col * tl.load(row_ptr + COL_STRIDE)
    )
    value = tl.load(flat_ptr + place, mask=mask, other=0.0).to(ACC)
    coefficients = coefficient_ptr + (tl.load(row_ptr + FIRST_ROW) + row) * COMPONENTS
    draw, stream = tl.load(draw_ptr), tl.load(row_ptr + STREAM)
    row_groups = tl.cdiv(cols, 4)
    for n in tl.static_range(COMPONENTS):
        z = randn_block(seed, draw, stream, (n * rows + row) * row_groups + start // 4, BLOCK)
        value += tl.load(coefficients + n) * z.to(ACC)
    tl.store(flat_ptr + place, value.to(flat_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed"])
def _coefficient_gradient_kernel(
    grad_ptr,  # any floating dtype [size]
    out_ptr,  # ACC [rows of all sites, COMPONENTS]
    table_ptr,  # int64 [sites, TABLE_WIDTH]
    row_site_ptr,  # int32 [rows of all sites]
    draw_ptr,  # int64 [1]
    seed,
    COMPONENTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    global_row = tl.program_id(0)
    n = tl.program_id(1)
    row_ptr = table_ptr + tl.load(row_site_ptr + global_row).to(tl.int64) * TABLE_WIDTH
    rows, cols = tl.load(row_ptr + ROWS), tl.load(row_ptr + COLS)
    row = global_row - tl.load(row_ptr + FIRST_ROW)
    place = tl.load(row_ptr + OFFSET) + row * tl.load(row_ptr + ROW_STRIDE)
    col_stride = tl.load(row_ptr + COL_STRIDE)
    draw, stream = tl.load(draw_ptr), tl.load(row_ptr + STREAM)
    first_group = (n * rows + row) * tl.cdiv(cols, 4)
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + place + col * col_stride, mask=col < cols, other=0.0).to(ACC)
        total += grad * randn_block(seed, draw, stream, first_group + start // 4, BLOCK).to(ACC)
    tl.store(out_ptr + global_row * COMPONENTS + n, tl.sum(total, axis=0))


def _signed64(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _draw_tensor(draw: Tensor | int, like: Tensor) -> Tensor:
    return draw if isinstance(draw, Tensor) else torch.tensor([draw], dtype=torch.int64, device=like.device)


@cache
def _gamma_launcher() -> Launcher:
    return Launcher(_log_gamma_kernel, {"MAX_ATTEMPTS": MAX_ATTEMPTS, "BLOCK": _GAMMA_BLOCK})


@cache
def _noise_launcher(kernel: Any, components: int, accumulate: tl.dtype) -> Launcher:
    return Launcher(kernel, {"COMPONENTS": components, "ACC": accumulate, "BLOCK": BLOCK})


def _accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    if dtype == torch.float64:
        return torch.float64, tl.float64
    return torch.float32, tl.float32


def log_gamma(
    concentration: Tensor, stream: Tensor, element: Tensor, *, seed: int, draw: Tensor | int
) -> Tensor:
    """Return the logarithm of one Gamma(concentration, 1) variate an element, in one launch.

    Args:
        concentration: a > 0, ``[n]``, any floating dtype (computed in fp64).
        stream: int64 ``[n]``, the noise stream of each element.
        element: int64 ``[n]``, the index within its stream.
        seed: 64-bit key.
        draw: index of the sample, an integer or an int64 tensor of one element on the device.

    Returns:
        fp64 ``[n]``, without gradient.
    """
    a = concentration.detach().double().contiguous()
    out = torch.empty_like(a)
    if a.numel():
        _gamma_launcher()(
            ((a.numel() + _GAMMA_BLOCK - 1) // _GAMMA_BLOCK,),
            a, stream.contiguous(), element.contiguous(), _draw_tensor(draw, a), out,
            _signed64(seed), a.numel(),
        )  # fmt: skip
    return out


def perturb_(plan: PerturbPlan, flat: Tensor, coefficients: Tensor, *, seed: int, draw: Tensor | int) -> None:
    """Add ``Σₙ κ[j, n] Zₙ[j, k]`` to every site, in place, in one launch.

    Args:
        plan: the sites.
        flat: ``[plan.size]``, any floating dtype; sums are fp32 (fp64 for fp64), rounded once.
        coefficients: κ, ``[plan.num_rows, components]``.
        seed: 64-bit key.
        draw: index of the sample, an integer or an int64 tensor of one element on the device.
    """
    table, tile_site, _ = plan.tables
    dtype, accumulate = _accumulator(flat.dtype)
    if tile_site.numel() == 0:
        return
    _noise_launcher(_perturb_kernel, coefficients.shape[1], accumulate)(
        (tile_site.numel(),),
        flat, coefficients.detach().to(dtype).contiguous(), table, tile_site, _draw_tensor(draw, flat),
        _signed64(seed),
    )  # fmt: skip


def coefficient_gradient(
    plan: PerturbPlan, grad: Tensor, components: int, *, seed: int, draw: Tensor | int
) -> Tensor:
    """Return dκ ``[plan.num_rows, components]``, ``dκ[j, n] = Σ_k grad[j, k] Zₙ[j, k]``, in one launch.

    Args:
        plan: the sites.
        grad: gradient of the perturbed matrices, ``[plan.size]``.
        components: n.
        seed: that of :func:`perturb_`.
        draw: that of :func:`perturb_`.
    """
    table, _, row_site = plan.tables
    dtype, accumulate = _accumulator(grad.dtype)
    out = torch.empty(plan.num_rows, components, dtype=dtype, device=grad.device)
    if out.numel():
        _noise_launcher(_coefficient_gradient_kernel, components, accumulate)(
            (plan.num_rows, components),
            grad, out, table, row_site, _draw_tensor(draw, grad), _signed64(seed),
        )  # fmt: skip
    return out
