"""README's first table: what each part costs, against what it replaces, one line a claim."""

from collections.abc import Callable
from typing import Any

Load = Callable[[str], dict[str, Any]]
Table = Callable[[list[str], list[list[str]]], str]

_CASE = ("all-linear r16", "8x512", "graph")


def glance(load: Load, table: Table, exists: Callable[[str], bool], devices: dict[str, str]) -> str:
    """Return the table; a line whose results are missing, or older than the code, is left out."""
    rows = []
    for name, line in _LINES.items():
        for slug, short in devices.items():
            file = f"{name}_{slug}.json"
            document = load(file) if exists(file) else {"measured_before": "nothing"}
            if "measured_before" not in document and (cells := line(document)) is not None:
                rows.append([*cells, short])
    note = (
        "Shapes of Llama-3.2-3B, LoRA r 16 on all linear layers where nothing else is said; base: the frozen "
        "model alone. Each against the other side in one run; tables and conditions below."
    )
    return f"{table(['', 'bayeslora', 'instead', '', 'GPU'], rows)}\n\n{note}"


def _model_step(document: dict[str, Any]) -> list[str] | None:
    found = {
        r["variant"]: r["median_ms"]
        for r in document["results"]
        if (r["adapters"], r["tokens"], r["mode"]) == _CASE
    }
    if not found:
        return None
    ours, theirs = (found[f"{kind} fp32"] / found["base"] for kind in ("patched", "PEFT"))
    what = "forward + backward, 8x512 tokens, as a CUDA graph, over the base"
    return [what, f"{ours:.2f}", f"{theirs:.2f}", "PEFT"]


def _train_step(document: dict[str, Any]) -> list[str] | None:
    for row in document["rows"]:
        where = row["model"], row["tokens"], row["name"]
        if where == ("Llama-3.2-3B", "8x256", "patched + IVON, captured"):
            other = row["milliseconds"] / row["over_peft_adamw"]["median"]
            what = "a whole training step, 8x256 tokens, ms: IVON captured"
            return [what, f"{row['milliseconds']:.0f}", f"{other:.0f}", "PEFT + AdamW, eager"]
    return None


def _ivon(document: dict[str, Any]) -> list[str] | None:
    for row in document["rows"]:
        if row["tensors"] == 392:
            ours, theirs = (
                1e3 * row["seconds"][name]["wall"]["median"] for name in ("bayeslora IVON", "AdamW fused")
            )
            what = "an optimizer step with its posterior sample, 392 tensors, ms"
            return [what, f"{ours:.2f}", f"{theirs:.2f}", "torch AdamW, fused"]
    return None


def _monteclora(document: dict[str, Any]) -> list[str] | None:
    found = {
        (r["mode"], r["variant"]): r["median_ms"]
        for r in document["rows"]
        if r["what"] == "step" and r["tokens"] == "8x512"
    }
    ours = found["eager", "MonteCLoRA fp32"] / found["eager", "LoRA fp32"]
    theirs = found["eager", "PEFT MonteCLoRA fp32"] / found["eager", "PEFT LoRA fp32"]
    what = "MonteCLoRA (q, k, v, r 32), 8x512 tokens, eager, over plain LoRA"
    return [what, f"{ours:.2f}", f"{theirs:.2f}", "PEFT"]


def _posterior(document: dict[str, Any]) -> list[str] | None:
    seconds = {name: value["median"] for name, value in document["predict"].items()}
    ours, turn = (seconds[name] / seconds["one pass"] for name in ("S samples", "S in turn"))
    what = f"predictions under {document['settings']['S_predict']} posterior samples, over one pass"
    return [what, f"{ours:.1f}", f"{turn:.1f}", "one pass a sample"]


_LINES: dict[str, Callable[[dict[str, Any]], list[str] | None]] = {
    "model_step": _model_step,
    "train_step": _train_step,
    "ivon": _ivon,
    "monteclora": _monteclora,
    "posterior": _posterior,
}
