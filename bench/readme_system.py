"""README's tables of training on several GPUs and on quantized or compiled bases."""

from collections.abc import Callable
from typing import Any

Load = Callable[[str], dict[str, Any]]
Table = Callable[[list[str], list[list[str]]], str]


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"


def distributed(load: Load, table: Table, files: list[str]) -> str:
    """Steps under DDP and FSDP2 over AdamW's and over one GPU's, as ``bench_distributed.py`` took them."""
    if not files:
        return "`torchrun --nproc-per-node 2 bench/bench_distributed.py --out DIR` measures it on your GPUs."
    rows, measured = [], []
    for name in files:
        document = load(name)
        environment = document["environment"]
        measured.append(f"{document['ranks']} {environment['device']} (torch {environment['torch']})")
        for result in document["rows"]:
            for kind in ("DDP IVON", "DDP IVON independent", "FSDP2 IVON"):
                adamw = f"{kind.split()[0]} AdamW"
                seconds = result["seconds"]
                rows.append(
                    [
                        result["adapters"],
                        kind.replace("IVON independent", "independent noise").replace("IVON", "shared noise"),
                        f"{1e3 * seconds[adamw]['median']:.0f}",
                        f"{1e3 * seconds[kind]['median']:.0f}",
                        _ratio(result["ratios"][f"{kind} / {adamw}"]),
                        f"{result['scaling_efficiency'][adamw]:.2f}",
                        f"{result['scaling_efficiency'][kind]:.2f}",
                    ]
                )
    head = ["adapters", "", "AdamW ms", "IVON ms", "IVON / AdamW", "efficiency: AdamW", "IVON"]
    note = (
        "Patched Llama-3.2-3B shape, 8x512 tokens a GPU, eager; medians of interleaved rounds, of their "
        f"ratios with quartiles; efficiency: one GPU's time over that of all; {', '.join(measured)}. Before "
        "timing, ranks held the same bits, and FSDP2 followed DDP's trajectory."
    )
    return f"{table(head, rows)}\n\n{note}"


def bases(load: Load, table: Table, files: list[str]) -> str:
    """Steps on quantized and compiled bases, as ``bench_bases.py`` measured them."""
    if not files:
        return "`python bench/bench_bases.py --out DIR` measures quantized and compiled bases on your GPU."
    rows, measured = [], []
    for name in files:
        document = load(name)
        environment = document["environment"]
        measured.append(f"{environment['device']} (torch {environment['torch']})")
        for result in document["rows"]:
            for pair, ratio in result["ratios"].items():
                ours, other = pair.split(" / ")
                times = (f"{1e3 * result['seconds'][each]['median']:.1f}" for each in (other, ours))
                rows.append([result["title"], pair, *times, _ratio(ratio)])
    note = (
        "Forward + backward, milliseconds; fp32 adapters; medians of interleaved rounds, of their ratios "
        f"with quartiles; {', '.join(dict.fromkeys(measured))}."
    )
    return f"{table(['base', 'a / b', 'b ms', 'a ms', 'ratio'], rows)}\n\n{note}"
