"""Rewrite README's tables from the files in ``bench/results``, so that no figure is typed by hand.

``python bench/readme_tables.py`` rewrites; ``--check`` only says (exit 1) whether README is out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compatibility

sys.path.insert(0, str(Path(__file__).parent))
import readme_glance
import readme_lora
import readme_monteclora
import readme_study
import readme_system

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


DEVICES = {"nvidia_h100_80gb_hbm3": "H100", "nvidia_h200": "H200"}  # in file names, in tables


def _exists(name: str) -> bool:
    return (RESULTS / name).exists()


def _files(pattern: str) -> list[str]:
    return sorted(file.name for file in RESULTS.glob(pattern))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def demo_table() -> str:
    """Accuracy and calibration of the demo's four predictors, as ``bayeslora demo`` measured them."""
    result = load("demo_cpu.json")
    head = ["", "accuracy %", "ECE %", "NLL", "Brier", "s / step"]
    rows = []
    for row in result["rows"]:
        cells = [f"{100 * row['accuracy']:.1f}", f"{100 * row['ece']:.1f}", f"{row['nll']:.3f}"]
        rows.append([row["name"], *cells, f"{row['brier']:.3f}", f"{row['seconds_per_step']:.2f}"])
    note = (
        f"{result['test_rows']} test questions, {result['steps']} steps of 8, one seed; a CPU with 2 cores, "
        f"torch {result['versions']['torch']}, {result['seconds']:.0f} s in all."
    )
    return f"{table(head, rows)}\n\n{note}"


def ivon_table() -> str:
    """Milliseconds of an optimizer step, per case of ``bench/bench_ivon.py`` and device."""
    names = ["bayeslora IVON", "AdamW fused", "AdamW foreach", "ivon-opt"]
    rows, devices = [], []
    for slug, short in DEVICES.items():
        if not _exists(f"ivon_{slug}.json"):
            continue
        result = load(f"ivon_{slug}.json")
        env = result["environment"]
        devices.append(f"{env['device']} (torch {env['torch']}, triton {env['triton']})")
        for row in result["rows"]:
            if row.get("sweep"):
                continue
            cells = [short, row["case"], f"{row['tensors']:,}", f"{row['parameters'] / 1e6:,.1f} M"]
            for name in names:
                wall = row["seconds"].get(name, {}).get("wall")
                cells.append(f"{1e3 * wall['median']:.2f}" if wall else "-")
            rows.append(cells)
    note = (
        "Milliseconds a step (wall clock, median of interleaved rounds), bf16 weights; "
        f"{', '.join(devices)}. The H200 machine's host is the faster one. AdamW keeps bf16 state for bf16 "
        "weights, IVON fp32: the largest case is bound by those bytes."
    )
    return f"{table(['', 'trained', 'tensors', 'parameters', *names], rows)}\n\n{note}"


def memory_table() -> str:
    """Bytes a trained parameter, per optimizer, as ``bench/bench_memory.py`` measured them."""
    result = load("memory.json")
    rows = []
    for row in result["rows"]:
        cells = [f"{row[key]:.0f}" for key in ("weights", "gradients", "optimizer", "total")]
        rows.append([f"{row['optimizer_name']}, {row['dtype']} weights", *cells])
    note = f"Bytes a trained parameter; torch {result['environment']['torch']}."
    return f"{table(['', 'weights', 'gradients', 'optimizer', 'together'], rows)}\n\n{note}"


def train_step_table() -> str:
    """Whole training steps, as ``bench/bench_train_step.py`` measured them."""
    rows, devices = [], []
    for slug, short in DEVICES.items():
        if not _exists(f"train_step_{slug}.json"):
            continue
        result = load(f"train_step_{slug}.json")
        env = result["environment"]
        devices.append(f"{env['device']} (torch {env['torch']}, transformers {env['transformers']})")
        for row in result["rows"]:
            cells = [short, f"{row['model']} {row['tokens']}", row["name"], f"{row['milliseconds']:.1f}"]
            for key in ("over_peft_adamw", "over_patched_adamw"):
                ratio = row.get(key)
                shown = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""
                cells.append(shown)
            rows.append([*cells, f"{row['peak_gb']:.1f}"])
    if not rows:
        return "`bayeslora bench` measures whole training steps on your own GPU."
    head = [
        "",
        "model, batch x length",
        "",
        "ms",
        "/ PEFT + AdamW [95%]",
        "/ patched + AdamW [95%]",
        "peak GB",
    ]
    note = (
        "LoRA on all linear layers, r 16, PEFT's default fp32 adapters; medians of interleaved rounds and "
        f"of the ratios within them, with the sign test's interval; {', '.join(devices)}."
    )
    return f"{table(head, rows)}\n\n{note}"


def _newest(name: str) -> str | None:
    """The result file of a script on the last of the devices that has one."""
    found = [f"{name}_{slug}.json" for slug in DEVICES if _exists(f"{name}_{slug}.json")]
    return found[-1] if found else None


def monteclora_table() -> str:
    """MonteCLoRA's whole step over plain LoRA's."""
    name = _newest("monteclora")
    if name is None:
        return "`python bench/bench_monteclora.py` measures a step over plain LoRA's on your own GPU."
    return readme_monteclora.step(load(name))


def robustness_table() -> str:
    """The spread over learning rates and batch sizes."""
    name = _newest("monteclora_robustness")
    if name is None:
        return (
            "`python bench/monteclora_robustness.py` measures the spread over learning rates and batch sizes."
        )
    return readme_monteclora.robustness(load(name))


_FEWEST_ROUNDS = 3  # of fewer a median says nothing


def posterior_table() -> str:
    """S samples in one pass over one sample, as ``bench/bench_posterior.py`` measured them."""
    name = _newest("posterior")
    if name is None:
        return "`python bench/bench_posterior.py` measures S samples in one pass over one on your own GPU."
    result = load(name)
    settings = result["settings"]
    rows = []
    for part, unit, what in (
        ("generate", "one sample", f"generate {settings['new']} tokens, S = {settings['S']}"),
        ("captured", "one sample, captured", f"the same as CUDA graphs, S = {settings['S']}"),
        ("predict", "one pass", f"predict 1 x {settings['length']} tokens, S = {settings['S_predict']}"),
    ):
        for name, seconds in result.get(part, {}).items():
            if name != "reason" and seconds["rounds"] >= _FEWEST_ROUNDS:
                ratio = seconds["median"] / result[part][unit]["median"]
                rows.append([what, name, f"{1e3 * seconds['median']:.1f}", f"{ratio:.2f}"])
    held = result["memory"]
    more = held["s_samples"] / held["one_sample"] - 1
    env = result["environment"]
    note = (
        "Llama-3.2-3B's shape, random bf16 weights, r 16 on all linear layers, batch 1, greedy, prompt of "
        f"{settings['prompt']} tokens; medians of interleaved rounds; {env['device']}, torch "
        f"{env['torch']}, triton {env['triton']}, transformers {env['transformers']}."
    )
    if "measured_before" in result:
        note += f" Measured before {result['measured_before']}."
    else:
        note += f" Memory with S = {settings['S']} over one sample's: {more:+.1%}."
    return f"{table(['', '', 'ms', 'ratio'], rows)}\n\n{note}"


def study_table() -> str:
    """Accuracy and calibration by number of samples, as ``bench/posterior_study.py`` measured them."""
    name = _newest("posterior_study")
    if name is None:
        return "`python bench/posterior_study.py` measures samples, scales and pruning on a real model."
    result = load(name)
    rows = []
    for row in result["samples"]:
        count = row["num_samples"]
        rows.append([f"{count} sample{'s' * (count > 1)}" if count else "mean", *_calibration(row)])
    for row in result["prune"]:
        if row["how"] == "uncertainty" and row["ratio"] in (0.1, 0.5, 0.9):
            rows.append([f"mean, {row['ratio']:.0%} pruned", *_calibration(row)])
    for row in result["variance"]:
        if row["variance_scale"] > 1:
            rows.append([f"{row['how']} of {row['variance_scale']:g} times the variance", *_calibration(row)])
    scores = "; ".join(
        f"{row['score']}: AURC {row['aurc']:.3f}, foreign questions told with AUROC {row['ood_auroc']:.3f}"
        for row in result.get("scores", [])
    )
    settings = result["settings"]
    note = (
        f"{result['test_questions']:,} test questions, {settings['steps']} steps of IVON, one seed; "
        f"{result['environment']['device']}"
        + f"; scores: {readme_study.SCORES[settings.get('scoring', 'loglik')]}"
        + (f", before {result['measured_before']}" if "measured_before" in result else "")
        + f". Scores by entropy and by mutual information: {scores}. "
        "All of the sweeps, random pruning and the pictures: "
        "[bench/results/posterior_study.md](bench/results/posterior_study.md)."
    )
    unfinished = "" if result["complete"] else " The run was cut short."
    return f"{table(['', 'accuracy %', 'ECE %', 'NLL'], rows)}\n\n{note.strip()}{unfinished}"


def _calibration(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row['accuracy']:.1f}", f"{100 * row['ece']:.1f}", f"{row['nll']:.3f}"]


def compatibility_table() -> str:
    """What is supported and the tests that show it, with the versions of their last recorded run."""
    result = load("compatibility.json")
    rows = []
    for row in compatibility.ROWS:
        missing = [test for test in row.tests if test not in result["tests"]]
        if missing:
            raise SystemExit(f"{missing[0]} has not been recorded: run python bench/compatibility.py")
        tests = (test.split("::") for test in row.tests)
        links = [f"[`{name}`](tests/{file})" for file, name in tests]
        versions = [f"{name} {result['versions'][name]}" for name in row.packages]
        rows.append([row.what, row.how, "<br>".join(links), ", ".join(versions)])
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in compatibility.ALWAYS)
    note = f"{result['summary']} with {versions} and the versions named; Python {result['python']}."
    return f"{table(['', 'how', 'test', 'also'], rows)}\n\n{note}"


TABLES: dict[str, Callable[[], str]] = {
    "glance": lambda: readme_glance.glance(load, table, _exists, DEVICES),
    "expectations in short": lambda: readme_study.in_short(RESULTS / "study" / "summary.json", table),
    "expectations elsewhere": lambda: readme_study.elsewhere(RESULTS / "study" / "summary.json", table),
    "expectations over settings": lambda: readme_study.over_settings(
        RESULTS / "study" / "summary.json", table
    ),
    "expectations": lambda: readme_study.expectations(RESULTS / "study" / "summary.json", table),
    "model step": lambda: readme_lora.model_step(load, table, _exists, DEVICES),
    "lora layers": lambda: readme_lora.lora_layers(load, table),
    "lora perturbed": lambda: readme_lora.lora_perturbed(load, table),
    "compatibility": compatibility_table,
    "demo": demo_table,
    "several gpus": lambda: readme_system.distributed(load, table, _files("distributed_*.json")),
    "bases": lambda: readme_system.bases(load, table, _files("bases_*.json")),
    "ivon": ivon_table,
    "memory": memory_table,
    "monteclora": monteclora_table,
    "monteclora robustness": robustness_table,
    "posterior": posterior_table,
    "posterior study": study_table,
    "train step": train_step_table,
}


def rewrite(text: str) -> str:
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no markers for the table {name!r}")
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README is out of date"
    )
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rewrite(before)
    if arguments.check and after != before:
        sys.exit("README.md is out of date: run python bench/readme_tables.py")
    if not arguments.check:
        readme.write_text(after)


if __name__ == "__main__":
    main()
