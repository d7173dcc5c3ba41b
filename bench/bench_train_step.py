"""Whole training steps: base model, PEFT and patched layers, AdamW, ivon-opt and IVON, eager and captured.

    python bench/bench_train_step.py [--output DIR] [--shapes ROW ...] [--seconds-budget N]
    pytest bench/bench_train_step.py        the same contestants under pytest-benchmark

A row is ``MODEL:BATCHxLENGTH:MODE``, by default every one of ``ROWS``; ``--seconds-budget`` is the time that
each may spend in timed rounds, most of it on AdamW against IVON, and less where their ratio's interval is
narrow before. What is timed and how it is checked: ``bayeslora/step_benchmark.py``. Without a GPU a toy runs,
which checks the script and measures nothing.
"""

import argparse
import gc
import time
from pathlib import Path

import measure
import pytest
import torch

from bayeslora.step_benchmark import CAPTURED, EAGER, Bench, Case, check_ivon, time_rounds
from bayeslora.step_benchmark import measure as measure_case

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
ROWS = (
    [
        "SmolLM2-135M:8x64:eager",
        "SmolLM2-135M:8x64:captured",
        "Llama-3.2-3B:8x256:eager",
        "Llama-3.2-3B:8x256:captured",
        "Llama-3.2-3B:8x512:eager",
        "Llama-3-8B:8x256:eager",
        "Llama-3-8B:4x256:captured",
    ]
    if CUDA
    else ["toy:2x16:eager", "toy:2x16:captured"]
)
if not CUDA:
    torch.set_num_threads(1)


def parse(row: str) -> tuple[Case, str]:
    shape, tokens, mode = row.split(":")
    batch, length = map(int, tokens.split("x"))
    return Case(shape, batch, length), mode


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(f"{first['model']} {first['tokens']} {first['mode']}, LoRA all-linear r16, gradients checked")
    print(f"  {'':26} {'ms':>8} {'tokens/s':>9} {'GB':>5}  / PEFT + AdamW, 95%       / base, 95%")
    for row in rows:
        cells = [f"{row['milliseconds']:8.2f} {row['tokens_per_second']:9.0f} {row['peak_gb']:5.1f}"]
        for key in ("over_peft_adamw", "over_base"):
            r = row.get(key)
            cells.append(f"{r['median']:6.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r else "")
        print(f"  {row['name']:26} {'  '.join(cells)}")
        if pair := row.get("over_patched_adamw"):
            interval = f"[{pair['low']:.4f}, {pair['high']:.4f}], {pair['rounds']} rounds"
            print(f"  IVON / AdamW, patched: {pair['median']:.4f} {interval}")


@pytest.mark.parametrize("row", [r for r in ROWS if "8B" not in r])
@pytest.mark.parametrize("name", sorted({*EAGER, *CAPTURED}))
def test_train_step(benchmark, row, name):
    case, mode = parse(row)
    if (mode == "captured") != name.endswith("captured"):
        pytest.skip("belongs to the other mode")
    check_ivon(DEVICE)
    bench = Bench(case, DEVICE, DTYPE)
    bench.check_layers()
    contestant = bench.contestant(name)
    benchmark.extra_info.update(measure.environment(), peak_gb=contestant.peak_bytes / 1e9)
    benchmark.pedantic(lambda: time_rounds([contestant], 0.0, fewest=1), rounds=10, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="folder of the JSON")
    parser.add_argument("--shapes", nargs="+", default=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seconds-budget", type=float, default=24.0 if CUDA else 1.0)
    arguments = parser.parse_args()
    print(f"{measure.device_name()}{'' if CUDA else ': no GPU, a toy, which measures nothing'}")
    results: list[dict] = []
    failed: list[str] = []
    for row in arguments.shapes:
        case, mode = parse(row)
        began = time.perf_counter()
        try:
            rows = list(measure_case(case, mode, DEVICE, arguments.seconds_budget, DTYPE))
        except (RuntimeError, AssertionError) as error:
            failed.append(row)
            print(f"{row}: not timed: {type(error).__name__}: {error}", flush=True)
            rows = []
        if rows:
            show(rows)
            results += rows
            case_fields = ("model", "tokens", "mode")
            print("written:", measure.write_results("train_step", results, arguments.output, case_fields))
        print(f"{row}: {time.perf_counter() - began:.0f} s in all", flush=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"not timed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
