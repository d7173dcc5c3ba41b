"""Tables and plots of the study's rows: ``write`` makes DIR/summary.json, DIR/tables.md and DIR/*.png."""

import json
import math
import statistics
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from readme_study import WHERE, cell
from safetensors.torch import load_file
from study_model import measured

ALIKE = {  # the same steps
    "weight_decay": "adamw",
    "laplace": "adamw",
    **dict.fromkeys(("ivon_auto_wide", "ivon_auto_0.5_0.5", "ivon_auto_0.4_1", "ivon_auto_1_1"), "ivon_auto"),
}
NAMES = ("accuracy", "ece", "nll", "brier")
WAYS = {  # and what its heading says; the first in the tables' order
    ("choices", "mean_loglik"): "a choice's score is its log-likelihood a token",
    ("choices", "letter"): "a choice's score is its letter's log-probability",
    ("choices", "loglik"): "a choice's score is its log-likelihood",
    ("text", "mean_loglik"): "trained on the right choice's log-likelihood a token alone",
    ("text", "letter"): "trained on the right letter's log-probability among all words",
    ("text", "loglik"): "trained on the right choice's log-likelihood alone",
}
LABELS = {
    ("adamw", "mean"): "AdamW",
    ("adamw", "early"): "AdamW, best early stop",
    ("adamw", "temperature"): "AdamW + temperature scaling",
    ("weight_decay", "mean"): "AdamW, weight decay",
    ("dropout", "mean"): "AdamW, dropout",
    ("dropout", "mc_dropout"): "MC dropout, 10 passes",
    ("swag", "swa"): "SWA",
    ("swag", "swag"): "SWAG, 10 samples",
    ("ensemble", "mean"): "LoRA ensemble",
    ("laplace", "samples"): "Laplace-LoRA, diagonal, 10 samples",
    ("laplace", "linear_diagonal"): "Laplace-LoRA, diagonal, linearized",
    ("laplace", "linear_kfac"): "Laplace-LoRA, KFAC, linearized",
    ("blob", "mean"): "BLoB at the mean",
    ("blob", "samples"): "BLoB, 10 samples",
    ("peft_monteclora", "mean"): "MonteCLoRA of PEFT",
    ("monteclora", "mean"): "MonteCLoRA at the mean",
    ("monteclora", "samples"): "MonteCLoRA, 10 samples",
    ("ivon", "mean"): "IVON at the mean",
    ("ivon", "samples"): "IVON, 10 samples",
    ("ivon", "pruned"): "IVON at the mean, pruned 10%",
    ("ivon", "pruned_samples"): "IVON, 10 samples, pruned 10%",
    ("ivon_auto", "mean"): "IVON.like_adamw at the mean",
    ("ivon_auto", "samples"): "IVON.like_adamw, 10 samples",
    ("ivon_auto", "pruned"): "IVON.like_adamw at the mean, pruned 10%",
    ("ivon_auto", "pruned_samples"): "IVON.like_adamw, 10 samples, pruned 10%",
}
SCALES = ("0.25", "0.5", "2", "4")
for _kind, _name in (("ivon", "IVON"), ("ivon_auto", "IVON.like_adamw")):
    LABELS |= {(_kind, f"scale_{s}"): f"{_name}, 10 samples, variance x {s}" for s in SCALES}
    LABELS |= {
        (_kind, f"pruned_scale_{s}"): f"{_name}, 10 samples, pruned 10%, variance x {s}" for s in SCALES
    }
DEFAULTS = {"step_ratio": 0.7, "snr": 0.5}  # like_adamw's, and those before, by what a run did not name
FORMER = {"step_ratio": 1.0, "snr": 1.0}
OTHERS = {  # like_adamw's runs with other values, and what the label says of them
    "ivon_auto_wide": "like_adamw, steps and width searched",
    "ivon_auto_0.5_0.5": "like_adamw(step_ratio=0.5, snr=0.5)",
    "ivon_auto_0.4_1": "like_adamw(step_ratio=0.4, snr=1)",
    "ivon_auto_1_1": "like_adamw(step_ratio=1, snr=1)",
}
LABELS |= {
    (other, view): label.replace("like_adamw", name)
    for other, name in OTHERS.items()
    for (method, view), label in LABELS.items()
    if method == "ivon_auto"
}


def error_of(name: str, values: list[float], questions: int) -> float:
    """Standard error over seeds; of one run's accuracy, that of the questions; else NaN."""
    if len(values) > 1:
        return statistics.stdev(values) / math.sqrt(len(values))
    return math.sqrt(values[0] * (1 - values[0]) / questions) if name == "accuracy" else math.nan


def ensembles(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a data set for the average of AdamW's runs, where there are several and their files exist."""
    members = defaultdict(list)
    for row in main_rows(rows):
        if (row["method"], row["view"]) == ("adamw", "mean"):
            members[tuple(row[name] for name in (*WHERE, "steps"))].append(row)
    file = out / "probabilities.safetensors"
    saved = load_file(file) if file.exists() else {}
    found = []
    for (_, data, *_), runs in members.items():
        names = [f"{run['key']} {data}" for run in runs]
        if len(runs) > 1 and all(f"{name} probs" in saved for name in names):
            probs = torch.stack([saved[f"{name} probs"] for name in names]).double().mean(0)
            total = sum(run["train_seconds"] for run in runs)
            row = {**runs[0], "method": "ensemble", "passes": len(runs), "train_seconds": total, "seed": 0}
            found.append({**row, **measured(probs, saved[f"{names[0]} labels"])})
    return found


def main_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test rows that are not the robustness grid's, each once."""
    unique = {(r["key"], r["view"], r["data"]): r for r in rows if r["split"] == "test"}
    return [r for r in unique.values() if "batch_size" not in r["options"]]


def summarize(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every method's, view's and data set's mean and standard error, and a step's time alone."""
    step_ms = {row["method"]: 1e3 * row["step_seconds"] for row in rows if row["split"] == "timing"}
    for method, like in ALIKE.items():
        step_ms.setdefault(method, step_ms.get(like))
    groups: dict[Any, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in [*main_rows(rows), *ensembles(out, rows)]:
        where = tuple(row[name] for name in WHERE)
        groups[where, _method(row), row["view"], row["steps"]][row["seed"]] = row
        if row["method"] == "ivon_auto_wide" and _setup(row) == DEFAULTS:  # the search chose the defaults
            groups[where, "ivon_auto", row["view"], row["steps"]].setdefault(row["seed"], row)
    found = []
    for (where, method, view, steps), of_seeds in groups.items():
        runs = list(of_seeds.values())
        entry: dict[str, Any] = {**dict(zip(WHERE, where, strict=True)), "method": method, "view": view}
        label = LABELS.get((method, view), f"{method} {view}")
        entry |= {"steps": steps, "label": label, "options": runs[0]["options"]}
        entry |= {"runs": len(runs), "questions": runs[0]["questions"], "passes": runs[0]["passes"]}
        entry["step_ms"] = step_ms.get(method)
        for name in NAMES:
            values = [run[name] for run in runs]
            error = error_of(name, values, runs[0]["questions"])
            entry[name] = {"mean": statistics.mean(values), "error": None if math.isnan(error) else error}
        found.append(entry)
    rank = {pair: i for i, pair in enumerate(LABELS)}

    def place(e: dict[str, Any]) -> tuple[Any, ...]:
        foreign, row = e["data"] != e["task"], rank.get((e["method"], e["view"]), 99)
        way = list(WAYS).index((e["objective"], e["scoring"]))
        return way, e["task"], e["lora"] != "qv", foreign, e["data"], row

    return sorted(found, key=place)


def _setup(row: dict[str, Any]) -> dict[str, float]:
    """The values of a run of like_adamw."""
    return {name: row["options"].get(name, former) for name, former in FORMER.items()}


def _method(row: dict[str, Any]) -> str:
    """A run's method; like_adamw's runs with other values than the defaults are each another."""
    name = str(row["method"])
    if name != "ivon_auto" or _setup(row) == DEFAULTS:
        return name
    return "_".join([name, *(f"{value:g}" for value in _setup(row).values())])


def heading(entries: list[dict[str, Any]]) -> str:
    """Say what a table is of."""
    first = entries[0]
    title = first["task"]
    title += "" if first["task"] == first["data"] else f" adapters on {first['data']}"
    title += f", {first['questions']:,} questions"
    title += "" if first["lora"] == "qv" else ", LoRA on all linear layers"
    return f"{title}; {WAYS[first['objective'], first['scoring']]}"


def robustness(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, spreads and worst over the cells (learning rate, batch size, seed) that every method has.

    Of accuracy, the task's own measure (extrinsic robustness), and of ECE and NLL, the model's (intrinsic).
    """
    grid = [r for r in rows if r["split"] == "test" and "batch_size" in r["options"]]
    cells: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for row in grid:
        cell = row["task"], row["options"]["lr"], row["options"]["batch_size"], row["seed"]
        cells[cell][row["method"], row["view"]] = row
    kinds = {kind for cell in cells.values() for kind in cell}
    shared = [cell for cell in cells.values() if set(cell) == kinds]
    found = []
    for kind in sorted(kinds if shared and len(kinds) > 1 else ()):  # one method alone says nothing
        entry: dict[str, Any] = {"label": LABELS.get(kind, " ".join(kind)), "cells": len(shared)}
        for name in NAMES:
            values = [cell[kind][name] for cell in shared]
            worst = min(values) if name == "accuracy" else max(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            entry[name] = {"median": statistics.median(values), "standard deviation": spread}
            entry[name] |= {"largest less smallest": max(values) - min(values), "worst": worst}
        found.append(entry)
    return found


def table(entries: list[dict[str, Any]]) -> str:
    head = ["", "accuracy %", "ECE %", "NLL", "Brier", "runs", "ms a step", "passes"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in entries:
        values = [entry["label"], *[cell(entry, name) for name in NAMES], str(entry["runs"])]
        values += ["-" if entry["step_ms"] is None else f"{entry['step_ms']:.1f}", str(entry["passes"])]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def robustness_table(entries: list[dict[str, Any]]) -> str:
    head = ["", "cells", "accuracy %", "ECE %", "NLL"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in entries:
        values = [entry["label"], str(entry["cells"])]
        for name, scale, digits in (("accuracy", 100, 1), ("ece", 100, 1), ("nll", 1, 3)):
            values.append(" / ".join(f"{scale * v:.{digits}f}" for v in entry[name].values()))
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join([*lines, "", "Median / standard deviation / largest less smallest / worst."])


def plot(entries: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw accuracy, ECE and NLL of each row with standard errors, where matplotlib is there."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * len(entries)), layout="constrained", facecolor="white")
    for axis, name in zip(figure.subplots(1, 3, sharey=True), ("accuracy", "ece", "nll"), strict=True):
        means = [entry[name]["mean"] for entry in entries]
        errors = [entry[name]["error"] or 0.0 for entry in entries]
        axis.errorbar(means, range(len(entries)), xerr=errors, fmt="o", color="#3b7dd8", ms=4)
        axis.set(title=name, yticks=range(len(entries)), yticklabels=[entry["label"] for entry in entries])
        axis.grid(axis="x", color="#e4e7eb")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()  # shared: the first row on top
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write summary.json, tables.md and the plots, and print the tables."""
    entries = summarize(out, rows)
    if not entries:
        print(f"{len(rows)} rows in {out}, none of a test set yet")
        return
    grid = robustness(rows)
    parts = []
    for where in dict.fromkeys(tuple(entry[name] for name in WHERE) for entry in entries):
        chosen = [e for e in entries if tuple(e[name] for name in WHERE) == where]
        parts.append(f"## {heading(chosen)}\n\n{table(chosen)}\n")
        plot(chosen, out / f"{'-'.join(where)}.png", heading(chosen))
    if grid:
        parts.append(f"## Over learning rates and batch sizes\n\n{robustness_table(grid)}\n")
    text = "\n".join(parts)
    (out / "tables.md").write_text(text)
    devices = ", ".join(sorted({row["device"] for row in rows}))
    summary = {"rows": entries, "robustness": grid, "device": devices}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(text)
