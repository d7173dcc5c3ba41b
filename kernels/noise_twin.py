"""Counter-based Gaussian noise in plain torch: the specification of ``noise.py`` and its CPU path.

Equation, paper and contract: see ``noise.py``. The Philox words agree with the Triton kernels bit for
bit; the normals agree to fp32 rounding.
"""

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a 64-bit product; int64 wraps exactly as uint64 would."""
    product = word * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Run Philox4x32-10.

    Args:
        key: two 32-bit words.
        counter: four int64 tensors of one shape that hold 32-bit words.

    Returns:
        Four int64 tensors that hold 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(_ROUND_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_ROUND_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK32
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def philox4x(seed: int, draw: int | Tensor, stream: int | Tensor, group: Tensor) -> tuple[Tensor, ...]:
    """Return the four words of each element group, as int64 tensors of ``group``'s shape.

    Args:
        seed: 64-bit key (negative values are taken modulo 2^64).
        draw: index of the sample, or an int64 tensor of one element.
        stream: index of the tensor, or an int64 tensor of ``group``'s shape.
        group: int64 tensor, ``element // 4``.
    """
    c0 = group & _MASK32
    c1 = torch.zeros_like(c0).add_(draw & _MASK32)
    c2 = torch.zeros_like(c0).add_(stream & _MASK32)
    return philox4x32((seed & _MASK32, (seed >> 32) & _MASK32), (c0, c1, c2, torch.zeros_like(c0)))


def _unit_open(word: Tensor) -> Tensor:
    return word.to(torch.float32).add_(0.5).mul_(2.0**-32)


def _box_muller(word_radius: Tensor, word_angle: Tensor) -> tuple[Tensor, Tensor]:
    radius = _unit_open(word_radius).log_().mul_(-2.0).sqrt_()
    angle = _unit_open(word_angle).mul_(2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def randn4x(seed: int, draw: int | Tensor, stream: int | Tensor, group: Tensor) -> tuple[Tensor, ...]:
    """Return the standard normals of elements ``4·group + (0, 1, 2, 3)``, four fp32 tensors."""
    w0, w1, w2, w3 = philox4x(seed, draw, stream, group)
    return *_box_muller(w0, w1), *_box_muller(w2, w3)


def _element_range(words: tuple[Tensor, ...], numel: int, offset: int) -> Tensor:
    """Interleave four word tensors into element order and cut out ``offset .. offset + numel``."""
    skip = offset % 4
    return torch.stack(words, dim=-1).view(-1)[skip : skip + numel]


def _groups(numel: int, offset: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(offset // 4, (offset + numel + 3) // 4, dtype=torch.int64, device=device)


def random_words(
    numel: int,
    *,
    seed: int,
    draw: int,
    stream: int,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the Philox word of each element in ``offset .. offset + numel``, int64 ``[numel]``."""
    return _element_range(philox4x(seed, draw, stream, _groups(numel, offset, device)), numel, offset)


def randn(
    numel: int,
    *,
    seed: int,
    draw: int,
    stream: int,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the standard normals of elements ``offset .. offset + numel`` of a tensor, fp32 ``[numel]``."""
    return _element_range(randn4x(seed, draw, stream, _groups(numel, offset, device)), numel, offset)
