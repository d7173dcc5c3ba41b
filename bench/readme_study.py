"""README's section "What you can expect": the study's tables, and in words where IVON helps and where not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_COMMAND = "python bench/study.py --data NAME=TRAIN.jsonl,TEST.jsonl --workers 4"
_POINT = ("adamw", "mean")
_DEFAULT = "ivon_auto"
_FORMER = "ivon_auto_0.4_1"  # like_adamw's former default, where the present one was not run
_STAR = "*: like_adamw(step_ratio=0.4, snr=1), its former default."
_OURS = (
    ("ivon", "mean"),
    ("ivon", "samples"),
    ("ivon", "pruned_samples"),
    (_DEFAULT, "mean"),
    (_DEFAULT, "samples"),
    (_DEFAULT, "pruned_samples"),
)
_SHORT = (
    _POINT,
    ("adamw", "early"),
    ("adamw", "temperature"),
    ("weight_decay", "mean"),
    ("dropout", "mc_dropout"),
    ("swag", "swag"),
    ("ensemble", "mean"),
    ("laplace", "linear_kfac"),
    ("blob", "samples"),
    ("peft_monteclora", "mean"),
    ("monteclora", "mean"),
    ("ivon", "mean"),
    ("ivon", "samples"),
    ("ivon", "pruned_samples"),
    (_DEFAULT, "mean"),
    (_DEFAULT, "samples"),
)
_FOREIGN = (
    _POINT,
    ("adamw", "temperature"),
    ("ensemble", "mean"),
    ("laplace", "linear_kfac"),
    ("ivon", "mean"),
    ("ivon", "pruned"),
    ("ivon", "samples"),
    (_DEFAULT, "mean"),
    (_DEFAULT, "pruned"),
)
_TITLES = {
    "arc_easy": "ARC-Easy",
    "openbookqa": "OpenBookQA",
    "sst2": "SST-2",
    "boolq": "BoolQ",
    "mmlu": "MMLU",
    "arc_challenge": "ARC-Challenge",
    "mmlu_college": "MMLU, college subjects",
}
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
    parts.append(f"Differences of means over seeds, each run on one {result['device']}.")
    return "\n\n".join(parts)


def in_short(summary: Path, table: _Table) -> str:
    """Return the rows that decide, on the tasks that the adapters were trained on."""
    if not summary.exists():
        return f"`{_COMMAND}` measures it on your own questions."
    rows = _measured(json.loads(summary.read_text()))
    trained = [row for row in rows if row["task"] == row["data"]]
    way = _WAYS[rows[0]["objective"], rows[0]["scoring"]].capitalize()
    note = f"Accuracy % / ECE % / NLL, means over 5 seeds, or as many as brackets say. {way}."
    text = _by_task(trained, _SHORT, table)
    return f"{text}\n\n{note} {_STAR if ' * |' in text else ''}".rstrip()


def elsewhere(summary: Path, table: _Table) -> str:
    """Return the rows of questions unlike those trained on."""
    if not summary.exists():
        return f"`{_COMMAND} --ood NAME=FILE.jsonl` measures it on your own questions."
    rows = _measured(json.loads(summary.read_text()))
    foreign = [row for row in rows if row["task"] != row["data"] and row["lora"] == "qv"]
    if not foreign:
        return "Not measured yet."
    trained = " and ".join(dict.fromkeys(_title(row["task"]) for row in foreign))
    note = f"Accuracy % / ECE % / NLL of adapters trained on {trained}; LoRA on q and v."
    return f"{_by_task(foreign, _FOREIGN, table)}\n\n{note}"


def _by_task(rows: _Entries, kinds: Sequence[tuple[str, str]], table: _Table) -> str:
    """A line a method, a column a data set."""
    columns: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        name = _title(row["data"]) + ("" if row["lora"] == "qv" else ", all linear layers")
        columns.setdefault(name, {})[row["method"], row["view"]] = row
    body = []
    for method, view in kinds:
        found = {name: _default(column, method, view) for name, column in columns.items()}
        entries = [entry for entry in found.values() if entry is not None]
        if entries:  # named as the method is where it was run itself
            named = min(entries, key=lambda entry: entry["method"] != method)
            body.append([named["label"], *(_cell_of_three(entry, named) for entry in found.values())])
    return table(["", *columns], body)


def _title(task: str) -> str:
    """Return a task's name as its authors write it."""
    return _TITLES.get(task, task)


def _default(column: dict[tuple[str, str], dict[str, Any]], method: str, view: str) -> dict[str, Any] | None:
    """The row of a method; of like_adamw that of its former default where the present one was not run."""
    former = column.get((_FORMER, view)) if method == _DEFAULT else None
    return column.get((method, view), former)


def _cell_of_three(entry: dict[str, Any] | None, named: dict[str, Any]) -> str:
    if entry is None:
        return ""
    text = " / ".join(f"{scale * entry[name]['mean']:.{digits}f}" for name, _, scale, digits, _ in _METRICS)
    text += "" if entry["runs"] == 5 or entry["method"] == "ensemble" else f" ({entry['runs']})"
    return text + (" *" if entry["method"] != named["method"] else "")


def _heading(entry: dict[str, Any]) -> str:
    title = f"**{_title(entry['task'])}**"
    if entry["data"] != entry["task"]:
        title = f"**{_title(entry['data'])}**, adapters trained on {_title(entry['task'])}"
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
    for method, view in _OURS:
        ours_row = _default(found, method, view)
        if ours_row is None:
            continue
        words: dict[str, list[str]] = {"better": [], "no different": [], "worse": []}
        for name, label, scale, digits, sign in _METRICS:
            ours, point = ours_row[name], found[_POINT][name]
            gain = sign * (ours["mean"] - point["mean"])
            error = ((ours["error"] or 0.0) ** 2 + (point["error"] or 0.0) ** 2) ** 0.5
            verdict = "no different" if abs(gain) <= 2 * error else "better" if gain > 0 else "worse"
            change = scale * (ours["mean"] - point["mean"])
            words[verdict].append(f"{label} {change:+.{digits}f}")
        text = "; ".join(f"{name}: {', '.join(items)}" for name, items in words.items() if items)
        lines.append(f"- {ours_row['label']} against AdamW, {text}.")
    return "\n".join(lines)


def over_settings(summary: Path, table: _Table) -> str:
    """Return how much accuracy, ECE and NLL depend on learning rate and batch size."""
    entries: _Entries = json.loads(summary.read_text())["robustness"] if summary.exists() else []
    if not entries:
        return f"`{_COMMAND}` measures it on your own questions."
    body = []
    for entry in entries:
        cells = [entry["label"]]
        for name, _, scale, digits, _ in _METRICS:
            cells.append(" / ".join(f"{scale * value:.{digits}f}" for value in entry[name].values()))
        body.append(cells)
    note = f"Median / standard deviation / largest less smallest / worst of {entries[0]['cells']} runs"
    return f"{table(['', 'accuracy %', 'ECE %', 'NLL'], body)}\n\n{note}."
