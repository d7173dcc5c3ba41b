"""README's tables about LoRA layers, from the files in ``bench/results``; used by ``readme_tables.py``."""

import itertools
from collections.abc import Callable
from typing import Any

Load = Callable[[str], dict[str, Any]]
Table = Callable[[list[str], list[list[str]]], str]

DEVICE = "nvidia_h100_80gb_hbm3"
MODELS = {"Llama-3.2-3B": "model_step_{}.json", "Llama-3-8B": "model_step_llama_3_8b_{}.json"}
VARIANTS = ("PEFT bf16", "PEFT fp32", "patched bf16", "patched fp32")


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "peft"))


def model_step(load: Load, table: Table, exists: Callable[[str], bool], devices: dict[str, str]) -> str:
    """Forward and backward of whole models over the frozen base, as ``bench_model_step.py`` measured them."""
    rows, measured, notes = [], [], []
    for (slug, short), (model, name) in itertools.product(devices.items(), MODELS.items()):
        if not exists(name.format(slug)):
            continue
        document = load(name.format(slug))
        results = document["results"]
        notes += [document["note"]] if document["note"] else []
        measured.append(f"{document['device']} ({_versions(document['versions'])})")
        for key in dict.fromkeys((r["adapters"], r["tokens"], r["mode"]) for r in results):
            same = {r["variant"]: r for r in results if (r["adapters"], r["tokens"], r["mode"]) == key}
            base = same["base"]
            mode = "CUDA graph" if key[2] == "graph" else key[2]
            cells = [short, model, key[0], key[1], mode, f"{base['median_ms']:.0f}"]
            rows.append([*cells, *(_over_base(same[variant], base) for variant in VARIANTS)])
    note = (
        "Over the frozen base (milliseconds), medians of interleaved rounds; "
        f"{', '.join(dict.fromkeys(measured))}. bf16, fp32: the adapters' dtype; PEFT's default is fp32. "
        "Eager rows wait for the host, slow and shared at the H100, and scatter by 20% and more: in brackets "
        "the fastest round over the base's fastest, where the host was out of the way the most."
        + "".join(f" {text}." for text in notes)
    )
    head = ["", "model", "adapters", "tokens", "mode", "base ms", *VARIANTS]
    return f"{table(head, rows)}\n\n{note}"


def _over_base(row: dict[str, Any], base: dict[str, Any]) -> str:
    median = f"{row['median_ms'] / base['median_ms']:.2f}"
    return median if row["mode"] == "graph" else f"{median} ({row['min_ms'] / base['min_ms']:.2f})"


def lora_layers(load: Load, table: Table) -> str:
    """Single layers and groups by shape: the faster of the checked routes, and PEFT, over the base."""
    document = load(f"lora_linear_{DEVICE}.json")
    cases = {(r["layer"], r["m"], r["r"]): r for r in document["rows"] if "layer" in r}
    columns = [(8192, 8), (8192, 16), (8192, 64), (2048, 16)]
    rows = []
    for layer in dict.fromkeys(layer for layer, _, _ in cases):
        row = next(r for (name, _, _), r in cases.items() if name == layer)
        cells = [f"{layer}: {' + '.join(map(str, row['n']))} × {row['k']}"]
        for m, r in columns:
            both = cases.get((layer, m, r), {}).get("both")
            if both is None:
                cells.append("-")
                continue
            base = both["base"]["median_us"]
            best = min(
                both[route]["median_us"] for route in ("cublas", "products", "overlap") if route in both
            )
            cells.append(f"{best / base:.2f} ({both['peft']['median_us'] / base:.2f})")
        rows.append(cells)
    environment = document["environment"]
    note = (
        "Forward + backward over the frozen layer's own, in a CUDA graph, by the fastest of the checked "
        f"routes (in brackets PEFT's operations); {environment['device']}, torch {environment['torch']}, "
        f"triton {environment['triton']}."
    )
    return f"{table(['layer: N × K', *(f'M {m}, r {r}' for m, r in columns)], rows)}\n\n{note}"


def lora_perturbed(load: Load, table: Table) -> str:
    """A sample for each sequence: in the kernel, written to memory, or one pass a sample."""
    document = load(f"lora_perturbed_{DEVICE}.json")
    names = ("shared", "in kernel", "written", "kept", "in turn")
    rows = []
    for row in document["rows"]:
        if row["layer"] == "3B down":
            continue
        base = row["forward"]["base"]["median_us"]
        cells = [row["layer"], str(row["samples"]), str(row["tokens"]), f"{base:.0f}"]
        rows.append([*cells, *(f"{row['forward'][name]['median_us'] / base:.2f}" for name in names)])
    environment = document["environment"]
    note = (
        "Forward over the frozen layer's own (microseconds), r 16: one sample for all sequences; a sample "
        "each, drawn in the kernel; written out each time; written out before; one pass a sample. "
        f"{environment['device']}, torch {environment['torch']}, triton {environment['triton']}."
    )
    return f"{table(['layer', 'samples', 'tokens each', 'base µs', *names], rows)}\n\n{note}"
