"""Errors of a patched LoRA layer and of PEFT's own against fp64, over a grid of ragged shapes.

    pytest bench/bench_lora_accuracy.py                     fails where a layer is less exact than PEFT's
    python bench/bench_lora_accuracy.py [--output DIR]      every row into lora_accuracy_<device>.json

A row is a shape (M, N, K, r), a dtype of the activations and one of the adapters. For y, dx, dA and dB it
holds relative errors ‖value - truth‖ / ‖truth‖, truth being the same layer in fp64 with the same inputs, of
"patched", of "peft", and where the adapters are wider than the activations of "peft_narrow": PEFT with its
adapters cast to the activations' dtype, in which a patched layer computes. (PEFT computes fp32 adapters in
fp32, which is more exact and takes up to twice the time; a patched layer does not.)
"""

import argparse
import copy
import itertools
import statistics
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from lora_timing import relative_error
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bayeslora import lora_products, patch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [(1, 63, 100, 3), (63, 100, 1023, 8), (100, 1023, 63, 16), (257, 129, 513, 64), (1023, 100, 100, 1)]
if CUDA:  # where the measured routes are taken, and where they are refused
    SHAPES += [(4096, 3072, 3072, 16), (8192, 1024, 3072, 16), (4100, 8192, 3072, 8), (4097, 3071, 3073, 16)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADAPTERS = {"same": None, "fp32": torch.float32}
RESULTS = ("y", "dx", "dA", "dB")


class _Model(nn.Module):
    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(k, n, dtype=dtype, device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _results(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dA and dB."""
    x = x.detach().requires_grad_()
    y = model(x)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    return [y.detach(), *torch.autograd.grad(y, [x, *adapters], dy.to(y.dtype))]


def run_case(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return every candidate's error of each result."""
    torch.manual_seed(m + n + k + r)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["layer"])
    model = get_peft_model(_Model(n, k, dtype), config, autocast_adapter_dtype=adapter_dtype is not None)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=r**-0.5)
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    dy = torch.randn(m, n, device=DEVICE).to(dtype)
    truth = _results(copy.deepcopy(model).double(), x.double(), dy.double())
    candidates = {"peft": model, "patched": patch(copy.deepcopy(model))}
    if adapter_dtype is not None:
        candidates["peft_narrow"] = copy.deepcopy(model).to(dtype)
    errors = {}
    for name, candidate in candidates.items():
        found = _results(candidate, x, dy)
        pairs = zip(RESULTS, found, truth, strict=True)
        errors[name] = {key: relative_error(value, want) for key, value, want in pairs}
    return errors


def run() -> list[dict[str, Any]]:
    rows = []
    grid = itertools.product(SHAPES, DTYPES.items(), ADAPTERS.items())
    for (m, n, k, r), (name, dtype), (adapters, adapter_dtype) in grid:
        if dtype == torch.float32 and adapters == "fp32":
            continue
        row = {"m": m, "n": n, "k": k, "r": r, "dtype": name, "adapters": adapters}
        rows.append({**row, **run_case(m, n, k, r, dtype, adapter_dtype)})
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Patched over PEFT in the dtype of the activations: the median and the largest ratio over the shapes."""
    lines = []
    for (dtype, adapters), result in itertools.product(
        dict.fromkeys((row["dtype"], row["adapters"]) for row in rows), RESULTS
    ):
        same = [row for row in rows if (row["dtype"], row["adapters"]) == (dtype, adapters)]
        peft = [row.get("peft_narrow", row["peft"])[result] for row in same]
        ratios = [row["patched"][result] / max(error, 1e-12) for row, error in zip(same, peft, strict=True)]
        line = {"dtype": dtype, "adapters": adapters, "result": result}
        lines.append({**line, "median": statistics.median(ratios), "largest": max(ratios)})
    return lines


@pytest.mark.parametrize(
    "dtypes", [("bf16", "same"), ("bf16", "fp32"), ("fp16", "same"), ("fp32", "same")], ids=str
)
def test_no_less_exact_than_peft(dtypes: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_products, "_KERNEL_ROWS", lora_products._CAPTURED_ROWS)
    dtype, adapters = dtypes
    for m, n, k, r in SHAPES:
        errors = run_case(m, n, k, r, DTYPES[dtype], ADAPTERS[adapters])
        peft = errors.get("peft_narrow", errors["peft"])
        for result in RESULTS:  # sums run in another order: a tenth either way, more where errors are few
            assert errors["patched"][result] <= 1.1 * peft[result] + 1e-7, (m, n, k, r, result, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    lora_products._KERNEL_ROWS = lora_products._CAPTURED_ROWS
    rows = run()
    for line in summary(rows):
        print(line)
    measure.write_results("lora_accuracy", rows, arguments.output)


if __name__ == "__main__":
    main()
