"""README's section "What you can expect": the study's tables, and in words where IVON helps and where not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COMMAND = "python bench/study.py --data NAME=TRAIN.jsonl,TEST.jsonl --workers 4"
_POINT = ("adamw", "mean")
_OURS = (
    ("ivon", "mean"),
    ("ivon", "samples"),
    ("ivon", "pruned_samples"),
    ("ivon_auto", "mean"),
    ("ivon_auto", "samples"),
    ("ivon_auto_first", "mean"),
    ("ivon_auto_first", "samples"),
)
_SHORT = {
    _POINT,
    ("adamw", "temperature"),
    ("ensemble", "mean"),
    ("laplace", "linear_kfac"),
    ("ivon", "mean"),
    ("ivon", "samples"),
    ("ivon_auto", "samples"),
    ("ivon_auto_first", "samples"),
}
WHERE = ("task", "data", "lora", "objective", "scoring")
_WAYS = {
    ("choices", "mean_loglik"): "scores: log-likelihood a token",
    ("choices", "letter"): "scores: the letter's log-probability",
    ("choices", "loglik"): "scores: log-likelihood, summed",
    ("text", "mean_loglik"): "scores: log-likelihood a token, trained on the right choice's text",
    ("text", "letter"): "scores: the letter's log-probability, trained among all words",
    ("text", "loglik"): "scores: log-likelihood, summed, trained on the right choice's text",
}
_METRICS = (("accuracy", "accuracy", 100, 1, 1), ("ece", "ECE", 100, 1, -1), ("nll", "NLL", 1, 3, -1))


def expectations(summary: Path, table: Callable[[list[str], list[list[str]]], str]) -> str:
    """Return the section's generated part; without results, how to get them."""
    if not summary.exists():
        return f"`{_COMMAND}` measures IVON against AdamW and its alternatives on your own questions."
    result = json.loads(summary.read_text())
    parts = []
    rows = result["rows"]
    for where in dict.fromkeys(tuple(row[name] for name in WHERE) for row in rows):
        entries = [row for row in rows if tuple(row[name] for name in WHERE) == where]
        head = [_heading(entries[0]), "accuracy %", "ECE %", "NLL", "Brier"]
        body = [[e["label"], *[cell(e, n) for n in ("accuracy", "ece", "nll", "brier")]] for e in entries]
        extra = ["runs", "ms a step", "passes"]
        for cells, entry in zip(body, entries, strict=True):
            step = "-" if entry["step_ms"] is None else f"{entry['step_ms']:.1f}"
            cells += [str(entry["runs"]), step, str(entry["passes"])]
        parts += [table(head + extra, body), _verdict(entries)]
    if result.get("robustness"):
        parts.append(_robustness(result["robustness"], table))
    if "device" in result:
        parts.append(f"Means over seeds with standard errors; {result['device']}.")
    return "\n\n".join(part for part in parts if part)


def in_short(summary: Path, table: Callable[[list[str], list[list[str]]], str]) -> str:
    """Return the rows that decide, on the tasks that the adapters were trained on."""
    if not summary.exists():
        return f"`{_COMMAND}` measures it on your own questions."
    rows = [row for row in json.loads(summary.read_text())["rows"] if row["task"] == row["data"]]
    ways = [(row["objective"], row["scoring"]) for row in rows if row["lora"] == "qv"]
    way = next(way for way in _WAYS if way in ways)  # the first that was measured
    body = [
        [row["task"], row["label"], *[cell(row, name) for name in ("accuracy", "ece", "nll")]]
        for row in rows
        if (row["objective"], row["scoring"]) == way
        and row["lora"] == "qv"
        and (row["method"], row["view"]) in _SHORT
    ]
    return f"{table(['', '', 'accuracy %', 'ECE %', 'NLL'], body)}\n\n{_WAYS[way].capitalize()}."


def _heading(entry: dict[str, Any]) -> str:
    title = f"**{entry['task']}**"
    if entry["data"] != entry["task"]:
        title = f"**{entry['data']}**, adapters trained on {entry['task']}"
    title += "" if entry["lora"] == "qv" else ", LoRA on all linear layers"
    return f"{title}, {entry['questions']:,} questions; {_WAYS[entry['objective'], entry['scoring']]}"


def cell(entry: dict[str, Any], name: str) -> str:
    scale, digits = (100, 1) if name in ("accuracy", "ece") else (1, 3)
    value, error = entry[name]["mean"], entry[name]["error"]
    text = f"{scale * value:.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def _verdict(entries: list[dict[str, Any]]) -> str:
    """Say of each of our rows what is better than AdamW's, worse, or within two standard errors."""
    found = {(entry["method"], entry["view"]): entry for entry in entries}
    if _POINT not in found:
        return ""
    lines = []
    for kind in _OURS:
        if kind not in found:
            continue
        words: dict[str, list[str]] = {"better": [], "no different": [], "worse": []}
        for name, label, scale, digits, sign in _METRICS:
            ours, point = found[kind][name], found[_POINT][name]
            gain = sign * (ours["mean"] - point["mean"])
            error = ((ours["error"] or 0.0) ** 2 + (point["error"] or 0.0) ** 2) ** 0.5
            verdict = "no different" if abs(gain) <= 2 * error else "better" if gain > 0 else "worse"
            change = scale * (ours["mean"] - point["mean"])
            words[verdict].append(f"{label} {change:+.{digits}f}")
        text = "; ".join(f"{name}: {', '.join(items)}" for name, items in words.items() if items)
        lines.append(f"- {found[kind]['label']} against AdamW, {text}.")
    return "\n".join(lines)


def _robustness(entries: list[dict[str, Any]], table: Callable[[list[str], list[list[str]]], str]) -> str:
    head = [f"{entries[0]['cells']} runs over learning rates and batch sizes"]
    head += [f"{label}: median / spread / worst" for label in ("accuracy %", "ECE %", "NLL")]
    body = []
    for entry in entries:
        cells = [entry["label"]]
        for name, _, scale, digits, _ in _METRICS:
            values = (entry[name][k] for k in ("median", "spread", "worst"))
            cells.append(" / ".join(f"{scale * v:.{digits}f}" for v in values))
        body.append(cells)
    return table(head, body)
