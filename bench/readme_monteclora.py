"""README's MonteCLoRA tables: the step over plain LoRA's, and the spread over hyperparameters."""

import statistics
from typing import Any

Row = dict[str, Any]
VIEWS = (
    ("LoRA", "mean", "LoRA"),
    ("PEFT MonteCLoRA", "mean", "PEFT MonteCLoRA"),
    ("MonteCLoRA", "mean", "MonteCLoRA"),
    ("MonteCLoRA", "sampled", "MonteCLoRA, 8 samples"),
)
_METRICS = (("accuracy", "accuracy %", 100, 1, min), ("ece", "ECE %", 100, 1, max), ("nll", "NLL", 1, 3, max))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def step(result: dict[str, Any]) -> str:
    """MonteCLoRA's whole step over plain LoRA's, as ``bench/bench_monteclora.py`` measured it."""
    steps = [row for row in result["rows"] if row["what"] == "step"]
    rows = []
    for row in steps:
        if row["variant"] == "base":
            continue
        plain = "LoRA fp32" if row["variant"].endswith("fp32") else "LoRA"
        place = (row["tokens"], row["mode"])
        lora = next(s for s in steps if (s["tokens"], s["mode"], s["variant"]) == (*place, plain))
        ratio = f"{row['median_ms'] / lora['median_ms']:.3f}"
        peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else ""
        rows.append([", ".join(place), row["variant"], f"{row['median_ms']:.1f}", ratio, peak])
    env = result["environment"]
    note = (
        "Llama-3.2-3B's shape, q, k and v at rank 32, N = 4; forward, both losses, backward; bf16 adapters "
        "where fp32 is not said; medians of interleaved rounds, over plain LoRA steps of the same adapters; "
        f"{env['device']}, torch {env['torch']}, triton {env['triton']}, peft {env['peft']}."
    )
    if "measured_before" in result:
        note += f" Measured before {result['measured_before']}."
    return f"{table(['batch x length', '', 'ms', '/ LoRA', 'peak GB'], rows)}\n\n{note}"


def shared_cells(rows: list[Row]) -> list[dict[str, Row]]:
    """Return the runs, by method, of each learning rate, batch size and seed that all have finished."""
    cells: dict[Any, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["lr"], row["batch_size"], row["seed"]), {})[row["method"]] = row
    methods = {method for method, _, _ in VIEWS}
    return [cell for cell in cells.values() if set(cell) == methods]


def robustness(result: dict[str, Any]) -> str:
    """The spread over learning rates and batch sizes, as ``bench/monteclora_robustness.py`` measured it."""
    runs = result["rows"]
    cells = shared_cells(runs)
    if not cells:
        return f"{len(runs)} runs, but no learning rate and batch size that every method has finished."
    body = []
    for method, view, label in VIEWS:
        row = [label]
        for name, _, scale, digits, worst in _METRICS:
            values = [scale * cell[method][view][name] for cell in cells]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            figures = (statistics.mean(values), deviation, max(values) - min(values), worst(values))
            row.append(" / ".join(f"{v:.{digits}f}" for v in figures))
        body.append(row)
    used = [cell["LoRA"] for cell in cells]
    seeds = len({r["seed"] for r in used})
    diverged = sum(cell[m][v].get("diverged", False) for cell in cells for m, v, _ in VIEWS)
    env = result["environment"]
    note = (
        f"Mean / standard deviation / largest less smallest / worst of {len(cells)} fine-tunes a method: "
        f"learning rates {', '.join(f'{lr:g}' for lr in sorted({r['lr'] for r in used}))}, batches of "
        f"{' and '.join(str(b) for b in sorted({r['batch_size'] for r in used}))}, "
        f"{seeds} seed{'s' * (seeds > 1)}; SmolLM2-135M-Instruct, {used[0]['train_rows']:,} training and "
        f"{used[0]['test_rows']:,} test questions, {used[0]['steps']} steps; {env['device']}, "
        f"peft {env['peft']}."
    )
    if diverged:
        note += f" {diverged} of them ended in NaN and count as guesses."
    return f"{table(['', *(title for _, title, *_ in _METRICS)], body)}\n\n{note}"
