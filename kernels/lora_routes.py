"""Which implementation runs each product of a LoRA layer: the measured one, else cuBLAS.

``lora_routes_table.py`` holds one entry a measured (operation, M, N, K, r), per device and dtype; it is
generated from ``bench/results`` (``bench/lora_routes_sweep.py table``). A shape that was not measured
takes the route of the nearest one that was, and only where that is safe to say:

- same device name, bf16 or fp16 (which the tensor cores multiply at one rate: a layer measured in both
  differs by 2%); a measured rank of at least r, and of at most 4 r (or 16);
- N and K within a factor of √2; M too, except that more rows than measured count as the most measured;
- and, for a route of our own, its tiles would fill the GPU's multiprocessors: a last wave that is cut
  short is what our GEMM loses by, and a neighbour's measurement does not show it.

A GPU with the same chip as a measured one takes that one's table (`_SAME_CHIP`). Everything else is
"cublas", which is never wrong.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .lora_routes_table import TABLE

CUBLAS = "cublas"
PRODUCTS = "products"
OVERLAP = "overlap"

_RANKS = 4  # a measured rank speaks for ranks down to a quarter of it: the kernels pad to 16 and 64

_SAME_CHIP = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}  # faster memory; whole models were measured on it
_HALF = (torch.bfloat16, torch.float16)
_NEAR = 0.5  # in log2
_FULL = 0.85  # share of the multiprocessors at work, over the waves of a GEMM
_GEMM_TILE = 128 * 256


def _distance(wanted: int, measured: int) -> float:
    return abs(math.log2(max(wanted, 1) / max(measured, 1)))


def _fills(outputs: int, multiprocessors: int) -> bool:
    waves = outputs / _GEMM_TILE / multiprocessors
    return waves / math.ceil(waves) >= _FULL


@cache
def lookup(device: str, dtype: torch.dtype, op: str, m: int, n: int, k: int, r: int) -> Any:
    """Return the route of ``op`` on M × N outputs of K terms, as the module says.

    Args:
        device: the GPU's name.
        dtype: of the operands.
        op: "forward" and "backward" (of a layer), "gemm_nk" and "gemm_kn" (by the weight's orientation),
            "xa", "dy" or "da".
        m: rows.
        n: columns of the outputs; 0 where the operation has none (the width of dy for "dy").
        k: terms of the product, likewise.
        r: the rank.

    Returns:
        "cublas"; for a layer also "products" or "overlap"; for a product the numbers of its kernel's tiles.
    """
    entry = TABLE.get(_SAME_CHIP.get(device, device))
    if entry is None or dtype not in _HALF or m < 1:
        return CUBLAS
    rows = entry["routes"].get(op, {})
    most = max((key[0] for key in rows), default=0)
    wanted = (min(m, most), n, k)
    near = {
        key: (max(map(_distance, wanted, key[:3])), key[3])
        for key in rows
        if r <= key[3] <= max(16, _RANKS * r) and (key[1] > 0) == (n > 0)
    }
    if not near:
        return CUBLAS
    best = min(near, key=lambda key: near[key])
    if near[best][0] > _NEAR:
        return CUBLAS
    gemm = op in ("forward", "backward", "gemm_nk", "gemm_kn")
    if (
        gemm
        and (m, n, k) != best[:3]
        and not _fills(m * (k if op == "backward" else n), entry["multiprocessors"])
    ):
        return CUBLAS
    return rows[best]


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _find(op: str, x: Tensor, n: int, k: int, r: int) -> Any:
    if not x.is_cuda:
        return CUBLAS
    return lookup(_device_name(x.device.index), x.dtype, op, x.shape[0], n, k, r)


def layer_route(direction: str, x: Tensor, n: int, k: int, r: int) -> Any:
    """Return the route of a layer with a weight ``(n, k)``; ``direction`` is "forward" or "backward"."""
    return _find(direction, x, n, k, r)


def gemm_route(x: Tensor, n: int, k: int, r: int, *, mirrored: bool) -> Any:
    """Return the route of ``x Wᵀ + hidden Bᵀ`` with n outputs; ``mirrored``: W lies as ``(k, n)``."""
    return _find("gemm_kn" if mirrored else "gemm_nk", x, n, k, r)


def skinny_route(op: str, x: Tensor, r: int) -> Any:
    """Return the route of "xa", "dy" or "da" over the wide operand ``x``."""
    width = x.shape[1]
    return _find(op, x, width if op == "dy" else 0, 0 if op == "dy" else width, r)
