"""Plot the time of an optimizer step against the number of tensors, from the sweep of bench_ivon.py.

    python bench/plot_ivon.py [RESULTS.json] [--output FILE]

Wall-clock time with quartiles, and of IVON the host's and the GPU's share: while the host's is the longer,
the step costs launches and checks; where the GPU's takes over, bytes. The figure goes beside the results.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
OWN = "bayeslora IVON"


def draw(document: dict, file: Path) -> None:
    rows = sorted((row for row in document["rows"] if row.get("sweep")), key=lambda row: row["tensors"])
    if not rows:
        raise SystemExit("no sweep in the results: run bench_ivon.py with --sweep")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
        points = [(row["tensors"], row["seconds"][name]) for row in rows if name in row["seconds"]]
        x = [tensors for tensors, _ in points]
        middle, low, high = ([1e3 * p["wall"][k] for _, p in points] for k in ("median", "q1", "q3"))
        (line,) = axes.plot(x, middle, marker="o", label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        if name == OWN:
            for kind, style in (("host", "--"), ("gpu", ":")):
                share = [1e3 * p[kind]["median"] for _, p in points if kind in p]
                if len(share) == len(x):
                    axes.plot(x, share, style, color=line.get_color(), label=f"{name}: {kind}")
    axes.set(xscale="log", yscale="log", xlabel="tensors", ylabel="milliseconds a step")
    axes.set_title(f"sample + step, {document['environment']['device']}", fontsize="medium")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = RESULTS / "ivon_nvidia_h100_80gb_hbm3.json"
    parser.add_argument("results", type=Path, nargs="?", default=default)
    parser.add_argument("--output", type=Path, default=None, help="default: the results' name, .png")
    arguments = parser.parse_args()
    file = arguments.output or arguments.results.with_suffix(".png")
    draw(json.loads(arguments.results.read_text()), file)
    print("written:", file)


if __name__ == "__main__":
    main()
