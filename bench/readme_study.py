"""README's section "What you can expect": the study's tables, and in words where IVON helps and where not."""

import json
from collections.abc import Callable, Sequence
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
    ("ivon_auto", "pruned_samples"),
)
_SHORT = (
    _POINT,
    ("adamw", "early"),
    ("adamw", "temperature"),
    ("swag", "swag"),
    ("ensemble", "mean"),
    ("laplace", "linear_kfac"),
    ("ivon", "mean"),
    ("ivon", "samples"),
    ("ivon_auto", "mean"),
    ("ivon_auto", "samples"),
)
_FOREIGN = (
    _POINT,
    ("adamw", "temperature"),
    ("ensemble", "mean"),
    ("ivon", "mean"),
    ("ivon", "pruned"),
    ("ivon_auto", "samples"),
    ("ivon_auto", "pruned_samples"),
)
WHERE = ("task", "data", "lora", "objective", "scoring")
SCORES = {
    "mean_loglik": "log-likelihood a token",
    "letter": "the letter's log-probability",
    "loglik": "log-likelihood, summed",
}
_WAYS = {("choices", scoring): f"scores: {text}" for scoring, text in SCORES.items()} | {
    ("text", "mean_loglik"): f"scores: {SCORES['mean_loglik']}, trained on the right choice's text",
    ("text", "letter"): f"scores: {SCORES['letter']}, trained among all words",
    ("text", "loglik"): f"scores: {SCORES['loglik']}, trained on the right choice's text",
}
_METRICS = (("accuracy", "accuracy", 100, 1, 1), ("ece", "ECE", 100, 1, -1), ("nll", "NLL", 1, 3, -1))


_Table = Callable[[list[str], list[list[str]]], str]
_Entries = list[dict[str, Any]]


def _measured(result: dict[str, Any]) -> _Entries:
    """Return the rows of the way to score and to train that comes first of those that were measured."""
    rows = result["rows"]
    way = next(way for way in _WAYS if way in {(r["objective"], r["scoring"]) for r in rows})
    return [row for row in rows if (row["objective"], row["scoring"]) == way]


def expectations(summary: Path, table: _Table) -> str:
    """Say of every task where IVON is better than AdamW and where not."""
    if not summary.exists():
        return f"`{_COMMAND}` measures IVON against AdamW and its alternatives on your own questions."
    result = json.loads(summary.read_text())
    rows = _measured(result)
    parts = []
    for where in dict.fromkeys(tuple(row[name] for name in WHERE) for row in rows):
        entries = [row for row in rows if tuple(row[name] for name in WHERE) == where]
        verdict = _verdict(entries) if entries[0]["task"] == entries[0]["data"] else ""
        if verdict:
            parts.append(f"{_heading(entries[0])}:\n\n{verdict}")
    if result.get("robustness"):
        parts.append(_robustness(result["robustness"], table))
    parts.append(f"Differences of means over seeds, each run on one {result['device']}.")
    return "\n\n".join(parts)


def in_short(summary: Path, table: _Table) -> str:
    """Return the rows that decide, on the tasks that the adapters were trained on."""
    if not summary.exists():
        return f"`{_COMMAND}` measures it on your own questions."
    rows = _measured(json.loads(summary.read_text()))
    trained = [row for row in rows if row["task"] == row["data"]]
    way = _WAYS[rows[0]["objective"], rows[0]["scoring"]].capitalize()
    note = f"{way}; means over seeds with standard errors."
    return f"{_chosen(trained, _SHORT, table)}\n\n{note}"


def elsewhere(summary: Path, table: _Table) -> str:
    """Return the rows of questions unlike those trained on."""
    if not summary.exists():
        return f"`{_COMMAND} --ood NAME=FILE.jsonl` measures it on your own questions."
    rows = _measured(json.loads(summary.read_text()))
    foreign = [row for row in rows if row["task"] != row["data"] and row["lora"] == "qv"]
    if not foreign:
        return "Not measured yet."
    trained = " and ".join(dict.fromkeys(row["task"] for row in foreign))
    return f"{_chosen(foreign, _FOREIGN, table)}\n\nAdapters trained on {trained}; LoRA on q and v."


def _chosen(rows: _Entries, kinds: Sequence[tuple[str, str]], table: _Table) -> str:
    body = []
    for row in rows:
        if (row["method"], row["view"]) in kinds:
            what = row["data"] + ("" if row["lora"] == "qv" else ", all linear layers")
            cells = [cell(row, name) for name in ("accuracy", "ece", "nll")]
            body.append([what, row["label"], *cells, str(row["runs"]), str(row["passes"])])
    return table(["", "", "accuracy %", "ECE %", "NLL", "runs", "passes"], body)


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


def _verdict(entries: _Entries) -> str:
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


def _robustness(entries: _Entries, table: _Table) -> str:
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
