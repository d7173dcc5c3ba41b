"""Time every candidate route of the LoRA kernels on this GPU and rewrite the table of routes.

    python bench/lora_routes_sweep.py measure OUT.json     on the GPU: check each candidate, then time it
    python bench/lora_routes_sweep.py table                here: kernels/lora_routes_table.py from results

A candidate that is wrong, or does not compile for a shape, gets no time and a note that says why.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from lora_timing import interleaved, relative_error, rotations, summary

from bayeslora.kernels.lora_gemm import Tiles, gemm_cublas, gemm_tma
from bayeslora.kernels.lora_skinny import (
    RowTiles,
    TallTiles,
    da_triton,
    dy_triton,
    mm_as,
    scaled_mm,
    xa_triton,
)

ROOT = Path(__file__).resolve().parent.parent
SCALE = 2.0
LAYERS = [  # (N, K) of Llama-3.2-3B, then Llama-3-8B
    (3072, 3072),
    (1024, 3072),
    (8192, 3072),
    (3072, 8192),
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
]
TOKENS = [2048, 4096, 8192]
GEMM_TILES = [
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 256, 64, 8, 4),
    Tiles(128, 256, 64, 8, 4, group_m=16),
    Tiles(256, 128, 64, 8, 4),
    Tiles(128, 128, 64, 4, 3, per_sm=2),
    Tiles(128, 128, 64, 8, 4),
    Tiles(64, 128, 64, 4, 4, per_sm=2),
]
ROW_TILES = [
    RowTiles(64, 128, 1, 4, 4),
    RowTiles(64, 128, 1, 4, 6),
    RowTiles(64, 256, 1, 8, 4),
    RowTiles(128, 128, 1, 8, 4),
    RowTiles(16, 256, 1, 4, 4),
    RowTiles(16, 256, 4, 4, 4),
    RowTiles(32, 256, 4, 4, 4),
    RowTiles(16, 512, 4, 4, 3),
]
TALL_TILES = [
    TallTiles(64, 128, 4, 4, 264),
    TallTiles(64, 256, 8, 4, 132),
    TallTiles(128, 128, 8, 3, 132),
    TallTiles(128, 128, 8, 4, 132),
    TallTiles(64, 512, 8, 3, 132),
    TallTiles(64, 512, 8, 2, 132),
    TallTiles(128, 256, 8, 3, 132),
]


def cases(ranks: list[int]) -> list[tuple[str, int, int, int, int]]:
    """Return (op, M, N, K, r): outputs N and terms K of the product, as `lora_routes` looks them up."""
    found: dict[tuple[str, int, int, int, int], None] = {}
    for r, m, (n, k) in itertools.product(ranks, TOKENS, LAYERS):
        found[("gemm_nk", m, n, k, r)] = None
        found[("gemm_kn", m, k, n, r)] = None
        found[("xa", m, 0, k, r)] = None
        found[("dy", m, n, 0, r)] = None
        found[("da", m, 0, k, r)] = None
    return list(found)


def _draw(sets: int, *shape: int, fan_in: int = 1) -> list[torch.Tensor]:
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(fan_in**-0.5) for _ in range(sets)]


def _gemm_case(op: str, m: int, n: int, k: int, r: int) -> tuple[dict[str, Any], Any, int]:
    sets = rotations(2 * (m * k + n * k + m * n))
    x, h, b = _draw(sets, m, k), _draw(sets, m, r), _draw(sets, n, r)
    w = _draw(sets, n, k, fan_in=k) if op == "gemm_nk" else [t.t() for t in _draw(sets, k, n, fan_in=k)]
    y = [torch.full((m, n), math.nan, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    calls = {
        "base": lambda i: torch.mm(x[i], w[i].t(), out=y[i]),
        "cublas": lambda i: gemm_cublas(((x[i], w[i]),), None, h[i], b[i], y[i]),
    }
    for tiles in GEMM_TILES:
        calls[json.dumps(tiles)] = lambda i, tiles=tiles: gemm_tma(
            ((x[i], w[i]),), None, h[i], b[i], y[i], tiles
        )
    return calls, lambda: (x[1].double() @ w[1].double().t() + h[1].double() @ b[1].double().t(),), sets


def _skinny_case(op: str, m: int, n: int, k: int, r: int) -> tuple[dict[str, Any], Any, int]:
    wide = n or k
    sets = rotations(2 * m * wide)
    x, h, b = _draw(sets, m, wide), _draw(sets, m, r), _draw(sets, wide, r, fan_in=wide)
    f32 = torch.float32
    if op == "xa":
        a = [t.t().contiguous() for t in b]
        calls = {"cublas": lambda i: scaled_mm(x[i], a[i].t(), SCALE)}
        for row in ROW_TILES:
            calls[json.dumps(row)] = lambda i, row=row: xa_triton(x[i], a[i], SCALE, row)
        return calls, lambda: (SCALE * x[1].double() @ b[1].double(),), sets
    if op == "da":
        calls = {"cublas": lambda i: mm_as(h[i].t(), x[i], f32)}
        for tall in TALL_TILES:
            calls[json.dumps(tall)] = lambda i, tall=tall: da_triton(h[i], x[i], f32, tall)
        return calls, lambda: (h[1].double().t() @ x[1].double(),), sets
    calls = {"cublas": lambda i: (scaled_mm(x[i], b[i], SCALE), mm_as(x[i].t(), h[i], f32))}
    for tall in TALL_TILES:
        calls[json.dumps(tall)] = lambda i, tall=tall: dy_triton(x[i], h[i], b[i], SCALE, f32, tall)
    return (
        calls,
        lambda: (SCALE * x[1].double() @ b[1].double(), x[1].double().t() @ h[1].double()),
        sets,
    )


def _checked(calls: dict[str, Any], truth: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the calls whose error is at most 1.5 times cuBLAS's, and why the others are not."""
    right, good, bad = truth(), {}, {}
    bounds: list[float] = []
    for name, call in calls.items():
        try:
            got = call(1)
        except Exception as error:  # a candidate may not fit the device: that is a result
            bad[name] = f"{type(error).__name__}: {error}"[:160]
            continue
        got = got if isinstance(got, tuple) else (got,)
        if name == "base":
            good[name] = call
            continue
        errors = [relative_error(value, want) for value, want in zip(got, right, strict=True)]
        if name == "cublas":
            bounds = [1.5 * e + 1e-7 for e in errors]
        if all(e <= bound for e, bound in zip(errors, bounds, strict=True)):
            good[name] = call
        else:
            bad[name] = f"error {errors} above {bounds}"
    return good, bad


def measure_case(case: tuple[str, int, int, int, int], rounds: int = 5) -> dict[str, Any]:
    """Check and time the candidates of one case."""
    op, m, n, k, r = case
    torch.manual_seed(m + n + k + r)
    calls, truth, sets = (_gemm_case if op.startswith("gemm") else _skinny_case)(op, m, n, k, r)
    good, bad = _checked(calls, truth)
    floor_us = max(2 * m * max(n, 1) * max(k, 1) / 7e8, m * (n + k) * 2 / 3e6)
    repeats = sets * max(1, min(8, int(600 / (floor_us * sets))))
    times = interleaved(good, sets, repeats, rounds)
    return {
        **dict(zip(("op", "m", "n", "k", "r"), case, strict=True)),
        "times": {name: summary(values) for name, values in times.items()},
        "failed": bad,
    }


def measure(out: Path, ranks: list[int], part: str, ops: list[str]) -> None:
    """Measure all cases into a JSON file; with ``part`` i/n only compile every n-th candidate."""
    every = [case for case in cases(ranks) if not ops or case[0] in ops]
    if part:
        index, count = map(int, part.split("/"))
        seen = {(c[0], c[4]): c for c in reversed(every)}
        for case in seen.values():
            make = _gemm_case if case[0].startswith("gemm") else _skinny_case
            calls, _, _ = make(*case)
            for name in list(calls)[index::count]:
                try:
                    calls[name](0)
                except Exception as error:
                    print(case, name, str(error)[:100])
        return
    host = host_cost()
    print("host us a call", host)
    results: list[dict[str, Any]] = []
    for case in every:
        results.append(measure_case(case))
        times = {name: v["median_us"] for name, v in results[-1]["times"].items()}
        best = min((n for n in times if n != "base"), key=lambda n: times[n])
        base = times.get("base", times["cublas"])
        print(
            *case, f"base {base:.1f} cublas {times['cublas'] / base:.3f} best {times[best] / base:.3f}", best
        )
        out.write_text(json.dumps({**_report(results), "host_us": host}, indent=1))
    for row in results:
        if row["failed"]:
            print(row["op"], row["m"], row["n"], row["k"], row["r"], row["failed"])


def _report(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": "bfloat16",
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "results": results,
    }


def host_cost(calls: int = 300) -> dict[str, float]:
    """Return microseconds of host time a call, on operands too small to keep the GPU busy."""
    x, w, h, b = (_draw(1, *shape)[0] for shape in ((128, 256), (256, 256), (128, 16), (256, 16)))
    y, a, f32 = torch.empty_like(x), b.t().contiguous(), torch.float32
    functions = {
        "gemm_cublas": lambda: gemm_cublas(((x, w),), None, h, b, y),
        "gemm_tma": lambda: gemm_tma(((x, w),), None, h, b, y, GEMM_TILES[0]),
        "xa_cublas": lambda: scaled_mm(x, b, SCALE),
        "xa_triton": lambda: xa_triton(x, a, SCALE, ROW_TILES[0]),
        "dy_cublas": lambda: (scaled_mm(x, b, SCALE), mm_as(x.t(), h, f32)),
        "dy_triton": lambda: dy_triton(x, h, b, SCALE, f32, TALL_TILES[0]),
        "da_cublas": lambda: mm_as(h.t(), x, f32),
        "da_triton": lambda: da_triton(h, x, f32, TALL_TILES[0]),
    }
    result = {}
    for name, function in functions.items():
        function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        result[name] = round((time.perf_counter() - start) / calls * 1e6, 1)
        torch.cuda.synchronize()
    return result


def _best(times: dict[str, dict[str, float]], others: list[str], least_us: float = 2.0) -> str:
    """Return the fastest contestant, or "cublas" where it gains less than 2% of the base and ``least_us``."""
    best = min(others, key=lambda name: times[name]["median_us"], default="cublas")
    gain = times["cublas"]["median_us"] - times[best]["median_us"]
    whole = times.get("base", times["cublas"])["median_us"]
    return best if gain >= max(least_us, 0.02 * whole) else "cublas"


def _layer_routes(file: Path) -> dict[str, dict[tuple[int, ...], str]]:
    routes: dict[str, dict[tuple[int, ...], str]] = {"forward": {}, "backward": {}}
    for row in json.loads(file.read_text())["rows"]:
        if "layer" not in row:  # the row of host times
            continue
        key = (row["m"], sum(row["n"]), row["k"], row["r"] * len(row["n"]))
        for direction, found in routes.items():
            times = row[direction]
            found[key] = _best(times, [name for name in times if name in ("products", "overlap")])
    return routes


def table() -> str:
    """Return the text of ``kernels/lora_routes_table.py``, from every device's files in bench/results."""
    entries: dict[str, Any] = {}
    for file in sorted((ROOT / "bench/results").glob("lora_routes_*.json")):
        report = json.loads(file.read_text())
        routes: dict[str, dict[tuple[int, ...], Any]] = {}
        for row in report["results"]:
            best = _best(row["times"], [name for name in row["times"] if name not in ("base", "cublas")])
            key = (row["m"], row["n"], row["k"], row["r"])
            value = best if best == "cublas" else tuple(json.loads(best))
            routes.setdefault(row["op"], {})[key] = value
        layers = file.with_name(file.name.replace("lora_routes", "lora_linear"))
        if layers.exists():
            routes = _layer_routes(layers) | routes
        entries[report["device"]] = {
            "date": report["date"],
            "dtype": f"torch.{report['dtype']}",
            "multiprocessors": report["multiprocessors"],
            "routes": routes,
        }
    return _TABLE_HEAD + f"TABLE: dict[str, dict[str, Any]] = {entries!r}\n"


_TABLE_HEAD = '''"""Measured routes: device, operation, then (M, N, K, r). Generated; see ``lora_routes.py``.

Written by ``python bench/lora_routes_sweep.py table`` from ``bench/results``; a change by hand is lost.
"""

from typing import Any

'''


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["measure", "table"])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--ops", nargs="+", default=[])
    parser.add_argument("--compile", default="", help="i/n: only compile every n-th candidate, from i")
    arguments = parser.parse_args()
    if arguments.action == "measure":
        measure(arguments.out, arguments.ranks, arguments.compile, arguments.ops)
    else:
        target = ROOT / "kernels" / "lora_routes_table.py"
        target.write_text(table())
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", target], check=True)


if __name__ == "__main__":
    main()
