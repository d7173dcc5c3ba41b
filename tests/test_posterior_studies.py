"""bench's studies of posteriors, end to end on a tiny model: they resume, and the reports are complete."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_lm import review_rows, save_tiny

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    save_tiny(folder / "model")
    for name, count in (("train", 24), ("test", 10), ("foreign", 6)):
        lines = [json.dumps(row) for row in review_rows(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def script(folder, monkeypatch, capfd):
    """Runs one of bench's scripts in this process; returns what it printed."""
    monkeypatch.syspath_prepend(str(BENCH))

    def run(name, *arguments):
        module = importlib.import_module(name)
        words = ["--model", str(folder / "model"), "--train", str(folder / "train.jsonl")]
        words += ["--test", str(folder / "test.jsonl"), "--steps", "2", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", [name, *words])
        module.main()
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err, printed.err
        return module, printed.out

    return run


def test_posterior_study_stops_resumes_and_reports(folder, script):
    words = ["--work", folder / "work", "--foreign", folder / "foreign.jsonl", "--samples", 9]
    script("posterior_study", *words, "--part", "predict")
    file = folder / "work" / "predictions.safetensors"
    study = importlib.import_module("posterior_study")
    whole = study.Predictions(file)
    assert set(whole.held) == {"labels", *(unit.name for unit in study.units(9))}
    part = study.Predictions(file)  # as after a call that ran out of time
    part.held = {n: t for n, t in part.held.items() if not n.startswith(("test/scale/", "test/sample/8"))}
    part.keep("labels", part.held["labels"])
    result = study.report(study.Predictions(file), folder)
    assert not result["complete"]
    assert {row["variance_scale"] for row in result["variance"]} == {0.0, 1.0}
    _, text = script("posterior_study", *words, "--output", folder / "report")
    again = study.Predictions(file)
    for name, probs in whole.held.items():
        assert again.held[name].equal(probs), name
    result = json.loads(next((folder / "report").glob("*.json")).read_text())
    assert result["complete"] and result["trained"]["ess"] > 0
    assert [row["num_samples"] for row in result["samples"]] == [0, 1, 2, 4, 8]
    assert {row["variance_scale"] for row in result["variance"]} == {0.0, 0.1, 0.3, 1.0, 3.0, 10.0}
    assert {(row["how"], row["seed"]) for row in result["prune"]} >= {("uncertainty", 0), ("random", 2)}
    assert len(result["scores"]) == 3 and result["score_samples"] == 9
    page = (folder / "report" / "posterior_study.md").read_text()
    pictures = sorted(p.name for p in (folder / "report").glob("*.png"))
    assert len(pictures) == 5 and all(f"]({name})" in page for name in pictures)
    assert page.splitlines()[4] in text
    with pytest.raises(SystemExit, match="other settings"):
        script("posterior_study", *words, "--lr", "0.1")


def test_robustness_resumes_and_reports_the_cells_all_methods_share(folder, script, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    study = importlib.import_module("monteclora_robustness")
    monkeypatch.setattr(study, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(study, "BATCH_SIZES", (2, 4))
    out = folder / "out"
    words = ["--out", out, "--cache", folder / "cache"]
    study_lines = out / "monteclora_robustness.jsonl"
    script("monteclora_robustness", *words, "--workers", 2)
    first = study_lines.read_text().splitlines()
    rows = [json.loads(line) for line in first]
    assert len(rows) == 6 and {row["method"] for row in rows} == set(study.TRAINERS)
    kept = [line for line, row in zip(first, rows, strict=True) if row["method"] != "LoRA"]
    study_lines.write_text("\n".join([*kept, first[0][:40]]) + "\n")  # one line cut off
    _, text = script("monteclora_robustness", *words)
    later = study_lines.read_text().splitlines()
    assert later[: len(kept)] == kept and len(study.read_rows(out)) == 6
    again = {(r["method"], r["batch_size"]): r["mean"] for r in study.read_rows(out)}
    assert again == {(r["method"], r["batch_size"]): r["mean"] for r in rows}
    assert "of 2 fine-tunes a method" in text and "| MonteCLoRA, 8 samples |" in text
    result = json.loads(next(out.glob("monteclora_robustness_*.json")).read_text())
    tables = importlib.import_module("readme_monteclora")
    assert tables.robustness(result) in text
    assert (out / "monteclora_robustness.png").stat().st_size > 0
    _, text = script("monteclora_robustness", *words, "--seeds", 1, "--seconds", 0)
    assert "6 runs are left" in text


def test_spread_is_over_shared_cells_only(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    tables = importlib.import_module("readme_monteclora")

    def row(method, lr, accuracy):
        values = {"accuracy": accuracy, "ece": 0.1, "nll": 1.0}
        return {
            "method": method,
            "lr": lr,
            "batch_size": 8,
            "seed": 0,
            "steps": 1,
            "train_rows": 5,
            "test_rows": 5,
            "mean": values,
            "sampled": values if method == "MonteCLoRA" else None,
        }

    rows = [row(m, lr, lr) for lr in (0.25, 0.75) for m in ("LoRA", "PEFT MonteCLoRA", "MonteCLoRA")]
    rows.append(row("LoRA", 0.9, 0.0))
    text = tables.robustness({"rows": rows, "environment": {"device": "X", "peft": "1"}})
    assert "| LoRA | 50.0 / 35.4 / 50.0 / 25.0 | 10.0 / 0.0 / 0.0 / 10.0 | 1.000 /" in text
    assert "learning rates 0.25, 0.75, batches of 8" in text
