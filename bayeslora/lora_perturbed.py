"""The LoRA linear layer with a posterior sample of its own for each group of rows.

Equation: see ``kernels/lora_perturbed_twin.py``. Gradients, with z drawn again from the noise contract::

    dh_g = s dy_g B_g             dx_g = dy_g W + drop'(dh_g A_g)
    dA   = Σ_g dh_gᵀ d_g          dσ_A = Σ_g (dh_gᵀ d_g) ⊙ z_A,g          d = drop(x)
    dB   = Σ_g dy_gᵀ h_g          dσ_B = Σ_g (dy_gᵀ h_g) ⊙ z_B,g

On a GPU A and B are perturbed inside the kernels (``kernels/lora_perturbed.py``): two launches and the
base product forward, no sample in memory. Elsewhere, and in fp64, the twin runs.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._backend import uses_triton
from .kernels import lora_perturbed_twin as twin
from .kernels.lora_perturbed_twin import Perturbation
from .lora_passes import LoraWeights
from .lora_products import base_product, cast, dropout_ops
from .lora_twice import lora_gradients
from .lora_watched import backward_is_watched


def check_perturbation(x: Tensor, layer: LoraWeights, p: Perturbation) -> None:
    """Raise ValueError where ``p`` does not fit the layer or the input."""
    for name, std, mean in (("a_std", p.a_std, layer.lora_a), ("b_std", p.b_std, layer.lora_b)):
        if std.shape != mean.shape or std.device != x.device:
            raise ValueError(
                f"{name} has shape {tuple(std.shape)} on {std.device}; "
                f"pass {tuple(mean.shape)} on {x.device}, the shape of the mean"
            )
    for name, index in (("seeds", p.seeds), ("draws", p.draws)):
        if index.dtype != torch.int64 or index.dim() != 1 or index.device != x.device:
            raise ValueError(
                f"{name} is a {index.dtype} tensor of shape {tuple(index.shape)} on {index.device}; "
                f"pass int64 (G,) on {x.device}"
            )
    groups = p.seeds.numel()
    if groups < 1 or p.draws.numel() != groups:
        raise ValueError(f"seeds has {groups} elements and draws {p.draws.numel()}; pass one of each a group")
    if x.dim() < 2 or x.shape[0] % groups:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its first dimension must be a multiple of the {groups} groups"
        )


def perturbed_layer(
    x: Tensor,
    layer: LoraWeights,
    scaling: float,
    perturbation: Perturbation,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Apply one layer in ``dtype``; the arguments are those of `lora_linear.lora_linear`, checked."""
    p = perturbation
    if not uses_triton(x.device) or dtype == torch.float64 or x.numel() == 0:
        bias = None if layer.bias is None else cast(layer.bias, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return twin.perturbed_lora_linear(
                cast(x, dtype), cast(layer.weight, dtype), bias, layer.lora_a, layer.lora_b, scaling, p,
                dropout_p, seed,
            )  # fmt: skip
    stds = cast(p.a_std, torch.float32), cast(p.b_std, torch.float32)
    index = p.seeds.contiguous(), p.draws.contiguous()
    streams = p.a_stream, p.b_stream
    x = cast(x, dtype).contiguous()
    arguments = (x, *layer, *stds, *index, streams, scaling, dropout_p, seed)
    if torch.is_grad_enabled():
        return PerturbedLoRALinearFunction.apply(*arguments)
    return _forward(*arguments)[0]


def _kernels() -> ModuleType:
    from .kernels import lora_perturbed

    return lora_perturbed


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor as ``(M, width)`` with contiguous rows."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    a_std: Tensor,
    b_std: Tensor,
    seeds: Tensor,
    draws: Tensor,
    streams: tuple[int, int],
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y ``(..., N)`` and h ``(M, r)``, in x's dtype; x is contiguous."""
    ops, dtype = _kernels(), x.dtype
    flat = _rows(x)
    dropped = flat if seed is None else dropout_ops(flat).dropout(flat, dropout_p, seed)
    a, b = lora_a.detach().contiguous(), lora_b.detach().contiguous()
    a_noise, b_noise = (ops.Noise(seeds, draws, stream) for stream in streams)
    hidden = ops.perturbed_down(dropped, a, a_std.contiguous(), a_noise, scaling, wide_first=False)
    with torch.autocast(x.device.type, enabled=False):
        y = base_product(x, cast(weight, dtype), None if bias is None else cast(bias, dtype))
    ops.perturbed_up_(_rows(y), hidden, b, b_std.contiguous(), b_noise, wide_first=True)
    return y, hidden


class PerturbedLoRALinearFunction(torch.autograd.Function):
    """`perturbed_layer` with gradients, on a GPU."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        """Compute the output and keep x, h and the factors; arguments as for `_forward`."""
        y, hidden = _forward(*arguments)
        x, weight, _, *rest = arguments[:9]
        ctx.save_for_backward(x, hidden, weight, *rest, arguments[12])
        ctx.streams, ctx.scaling, ctx.dropout_p = arguments[9:12]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, A, B and their standard deviations."""
        gradients = _watched_gradients if backward_is_watched() else _gradients
        with torch.autocast(dy.device.type, enabled=False):
            dx, da, db, da_std, db_std = gradients(ctx, dy)
        return dx, None, None, da, db, da_std, db_std, *[None] * 6


def _gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
    x, hidden, weight, lora_a, lora_b, a_std, b_std, seeds, draws, seed = ctx.saved_tensors
    flat = _rows(x)
    needs_x, _, _, needs_a, needs_b, needs_a_std, needs_b_std, *_ = ctx.needs_input_grad
    ops, dy = _kernels(), _rows(dy)
    a_noise, b_noise = (ops.Noise(seeds, draws, stream) for stream in ctx.streams)
    dx = da = db = da_std = db_std = None
    if needs_b or needs_b_std:
        db, db_std = ops.perturbed_grads(dy, hidden, b_noise, wide_first=True)
    if needs_x or needs_a or needs_a_std:
        b = lora_b.contiguous()
        dh = ops.perturbed_down(dy, b, b_std.contiguous(), b_noise, ctx.scaling, wide_first=True)
        if needs_a or needs_a_std:
            dropped = flat if seed is None else dropout_ops(flat).dropout(flat, ctx.dropout_p, seed)
            da, da_std = ops.perturbed_grads(dropped, dh, a_noise, wide_first=False)
        if needs_x:
            dx = torch.mm(dy, cast(weight, dy.dtype))
            lora_dx = dx if seed is None else torch.zeros_like(dx)
            a = lora_a.contiguous()
            ops.perturbed_up_(lora_dx, dh, a, a_std.contiguous(), a_noise, wide_first=False)
            if seed is not None:
                dropout_ops(dx).dropout_add_(dx, lora_dx, ctx.dropout_p, seed)
            dx = dx.view(x.shape)
    return (
        dx,
        cast(da, lora_a.dtype) if needs_a and da is not None else None,
        cast(db, lora_b.dtype) if needs_b and db is not None else None,
        da_std if needs_a_std else None,
        db_std if needs_b_std else None,
    )


def _watched_gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
    """Return `_gradients`' result in torch's own operators, from the samples written out."""
    x, hidden, weight, lora_a, lora_b, a_std, b_std, seeds, draws, seed = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, needs_a_std, needs_b_std, *_ = ctx.needs_input_grad
    groups = seeds.numel()

    def noise(mean: Tensor, stream: int) -> Tensor:
        zeros, ones = (torch.full(mean.shape, value, device=mean.device) for value in (0.0, 1.0))
        return twin.sample_factors(zeros, ones, seeds, draws, stream, torch.float32)

    def by_group(rows: Tensor) -> Tensor:
        return rows.reshape(groups, -1, rows.shape[-1])

    z_a, z_b = noise(lora_a, ctx.streams[0]), noise(lora_b, ctx.streams[1])
    samples = lora_a.float() + a_std * z_a, lora_b.float() + b_std * z_b
    needs = needs_x, needs_a or needs_a_std, needs_b or needs_b_std
    dx, das, dbs = lora_gradients(
        by_group(dy), by_group(x), by_group(hidden), samples, (torch.float32, torch.float32),
        ctx.scaling, ctx.dropout_p, seed, needs,
    )  # fmt: skip
    return (
        None if dx is None else dx.view(x.shape) + (dy @ cast(weight, dy.dtype)).view(x.shape),
        None if das is None else cast(das.sum(0), lora_a.dtype),
        None if dbs is None else cast(dbs.sum(0), lora_b.dtype),
        None if das is None else (das * z_a).sum(0),
        None if dbs is None else (dbs * z_b).sum(0),
    )
