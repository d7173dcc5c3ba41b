import csv
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tiny_lm import review_rows, save_tiny
from typer.testing import CliRunner

import bayeslora
from bayeslora import cli, cli_app, cli_support, uncertainty
from bayeslora import finetune as library
from bayeslora.cli_app import app
from bayeslora.data import load_questions
from bayeslora.runs import load_run, read_task
from bayeslora.scoring import encode

TEMPLATE = r"Review: {question}\nSentiment:"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, review_rows(24))) + "\n")
    return str(path)


def finetune(model, data, output, *extra, steps=("--steps", "6")):
    words = ["finetune", "--model", model, "--data", data, "--output", str(output)]
    words += ["--scoring", "mean_loglik", "--template", TEMPLATE, *steps, "--device", "cpu"]
    return cli.main([*words, *extra])


@pytest.fixture(scope="module", params=["ivon", "adamw"])
def run(request, tmp_path_factory, model, data):
    folder = tmp_path_factory.mktemp("run") / request.param
    options = ["--optimizer", request.param, "--eval-data", data, "--num-samples", "2"]
    assert finetune(model, data, folder, *options) == 0
    return request.param, folder


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


COMMANDS = ["demo", "finetune", "evaluate", "predict", "bench", "info"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    text = plain(result.output)
    for word in {
        (): COMMANDS,
        ("bench",): ["--batch-size", "--eager-only", "SmolLM2-135M"],
        ("finetune",): ["mean_loglik", "like-adamw", "200 x training rows", "--template", "line break"],
        ("predict",): ["--output", "epistemic", ".csv"],
        ("evaluate",): ["--variance-scale", "--prune", "DIR"],
        ("demo",): ["--cache-dir", "BAYESLORA_CACHE", "--steps"],
    }.get(tuple(command), []):
        assert word in re.sub(r"[\s│]+", " ", text)


def test_the_bare_command_shows_help_and_the_version_option_the_version(capsys):
    assert cli.main([]) == 0
    assert "Usage" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bayeslora {bayeslora.__version__}\n"


def test_info_names_versions_and_kernels(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in out
    for word in ("peft", "transformers", "triton", "gpu", "kernels"):
        assert word in out
    assert ("Triton, compiled" in out) == torch.cuda.is_available()


@pytest.mark.parametrize(("direct", "words"), [(True, "direct"), (False, "needs Triton 3.6 to 3.9")])
def test_info_says_how_kernels_are_launched(direct, words, monkeypatch, capsys):
    launch = pytest.importorskip("bayeslora.kernels.launch", reason="Triton is not installed")
    monkeypatch.setattr(cli_app, "uses_triton", lambda _: True)
    monkeypatch.setattr(launch, "launches_directly", lambda: direct)
    assert cli.main(["info"]) == 0
    assert re.search(rf"launches +.*{words}", capsys.readouterr().out)


def test_finetune_writes_a_run_with_its_measurements(run):
    optimizer, folder = run
    measured = json.loads((folder / "metrics.json").read_text())
    names = ["mean", "2 samples"] if optimizer == "ivon" else ["mean"]
    assert [row["name"] for row in measured["rows"]] == names
    assert all(0 <= row["accuracy"] <= 1 and row["nll"] > 0 for row in measured["rows"])
    assert measured["steps"] == 6 and measured["optimizer"] == optimizer
    assert measured["versions"]["torch"]
    assert (folder / "posterior.safetensors").exists() == (optimizer == "ivon")
    task = json.loads((folder / "bayeslora_task.json").read_text())
    assert task["template"] == "Review: {question}\nSentiment:"
    if optimizer == "ivon":
        assert task["training"]["preset"] == "like-adamw"
        assert task["training"]["ess"] == measured["ess"] > 24


def test_evaluate_measures_what_finetune_measured(run, data, tmp_path, capsys):
    optimizer, folder = run
    words = ["evaluate", str(folder), "--data", data, "--num-samples", "2", "--device", "cpu"]
    words += ["--output", str(tmp_path / "metrics.json"), "--diagram", str(tmp_path / "diagram.png")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    expected = json.loads((folder / "metrics.json").read_text())["rows"]
    for row, other in zip(rows, expected, strict=True):
        assert row["name"] == other["name"]
        for key in ("accuracy", "ece", "nll", "brier"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)
        assert f"{row['nll']:.3f}" in out and row["name"] in out
    assert (tmp_path / "diagram.png").stat().st_size > 10_000
    assert ("holds no posterior" in out) == (optimizer == "adamw")


def test_evaluate_prunes_and_scales(model, data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert finetune(model, data, folder, "--ess", "500") == 0
    nll = {}
    for name, words in {
        "plain": [],
        "pruned": ["--prune", "0.5"],
        "wide": ["--variance-scale", "4"],
    }.items():
        output = tmp_path / f"{name}.json"
        command = ["evaluate", str(folder), "--data", data, "--num-samples", "2", "--device", "cpu"]
        assert cli.main([*command, "--output", str(output), *words]) == 0
        nll[name] = [row["nll"] for row in json.loads(output.read_text())["rows"]]
    assert nll["pruned"][0] != nll["plain"][0]
    assert nll["wide"][0] == nll["plain"][0] and nll["wide"][1] != nll["plain"][1]


def test_bench_measures_the_models_shape(model, tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = [
        "bench",
        "--model",
        model,
        "--batch-size",
        "2",
        "--length",
        "8",
        "--target-modules",
        "q_proj, v_proj",
    ]
    assert cli.main([*words, "--seconds", "0", "--device", "cpu", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    measured = json.loads(file.read_text())
    names = [row["name"] for row in measured["rows"]]
    assert names == ["base", "PEFT + AdamW", "PEFT + ivon-opt", "patched + AdamW", "patched + IVON"]
    assert all(name in out for name in names) and "IVON over AdamW, patched" in out and "No GPU" in out
    assert measured["versions"]["torch"] and measured["target_modules"] == "q_proj, v_proj"


def test_bench_refuses_bad_options(capsys, tmp_path):
    assert "--batch-size" in error_of(capsys, ["bench", "--batch-size", "0", "--device", "cpu"])
    assert "--seconds" in error_of(capsys, ["bench", "--seconds", "-1", "--device", "cpu"])
    assert "nowhere" in error_of(capsys, ["bench", "--model", "/nowhere", "--device", "cpu"])
    assert "is a folder" in error_of(capsys, ["bench", "--output", str(tmp_path), "--device", "cpu"])


def error_of(capsys, words, status=1):
    assert cli.main(words) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_bad_input_is_one_line_and_changes_nothing(model, data, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n{"question": "q"}\n')
    out = tmp_path / "out"
    good = {"--model": model, "--data": data, "--output": str(out), "--device": "cpu"}
    for change, message in [
        ({"--model": str(tmp_path / "none")}, "model path '.*none' does not exist"),
        ({"--model": str(tmp_path / "m.gguf")}, r"model file '.*m\.gguf' does not exist"),
        ({"--data": str(tmp_path / "none.jsonl")}, r"data file '.*none\.jsonl' is not there"),
        ({"--data": str(bad)}, r'bad\.jsonl, line 2: missing key "choices"'),
        ({"--eval-data": str(bad)}, r"bad\.jsonl, line 2"),
        ({"--lr": "-1"}, r"lr must be greater than 0; got -1\.0"),
        ({"--optimizer": "sgd"}, "optimizer must be one of ivon, adamw; got 'sgd'"),
        ({"--scoring": "words"}, "scoring must be one of auto, letter, loglik, mean_loglik; got 'words'"),
        ({"--template": "{question}", "--scoring": "letter"}, r"must contain \{choices\}"),
        ({"--template": "{question.__class__}"}, r"must contain \{question\}"),
        ({"--labels": "one"}, "labels must hold 2 to 26 strings; got 1"),
        ({"--preset": "like-adamw", "--ess": "5"}, "preset like-adamw chooses ess itself"),
        ({"--dtype": "int8"}, "dtype must be auto"),
        ({"--device": "tpu9"}, "device 'tpu9' cannot be used here"),
        ({"--device": "meta"}, "device 'meta' cannot be used here"),
        ({"--seed": str(1 << 64)}, r"seed must be in \[0, 2\^64\)"),
        ({"--output": data}, "is a file; pass a folder"),
        ({"--output": model}, r"holds a model \(config.json\)"),
        ({"--output": "/proc/out"}, "nothing can be written to '/proc'"),  # before the training
    ]:
        words = [word for pair in {**good, **change}.items() for word in pair]
        assert re.search(message, error_of(capsys, ["finetune", *words])), message
        assert not out.exists()


def test_evaluate_names_what_is_wrong(run, data, tmp_path, capsys):
    _, folder = run
    missing = str(tmp_path / "none")
    for words, message in [
        ([missing, "--data", data], "folder '.*none' does not exist"),
        ([str(tmp_path), "--data", data], r"bayeslora_task\.json is missing"),
        ([str(folder), "--data", data, "--prune", "1"], r"prune must be in \[0, 1\); got 1\.0"),
        ([str(folder), "--data", data, "--variance-scale", "0"], "variance_scale must be greater than 0"),
        ([str(folder), "--data", data, "--num-samples", "-1"], "num_samples must be at least 0"),
        ([str(folder), "--data", data, "--seed", "-1"], r"seed must be in \[0, 2\^64\)"),
        ([str(folder), "--data", data, "--model", missing], "model path '.*none' does not exist"),
        ([str(folder), "--data", data, "--output", str(tmp_path)], "--output '.*' is a folder; pass a file"),
        ([str(folder), "--data", data, "--diagram", "x.foo"], r"--diagram 'x\.foo' must end in \.png or"),
        (
            [str(folder), "--data", data, "--diagram", data + "/x.png"],
            "--diagram '.*' cannot be made: .*file",
        ),
    ]:
        assert re.search(message, error_of(capsys, ["evaluate", *words])), message


def test_what_only_the_loaded_model_shows_is_one_line_too(model, data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert finetune(model, data, folder, "--optimizer", "adamw", "--target-modules", "nothing") == 1
    assert re.match("error: .*nothing", capsys.readouterr().err.splitlines()[-1])
    assert not folder.exists()
    assert finetune(model, data, folder, "--optimizer", "adamw") == 0
    assert cli.main(["evaluate", str(folder), "--data", data, "--prune", "0.1", "--device", "cpu"]) == 1
    assert re.match("error: prune=0.1 needs a posterior", capsys.readouterr().err.splitlines()[-1])


def test_an_output_that_holds_a_run_is_kept_unless_overwritten(model, data, tmp_path, capsys):
    assert finetune(model, data, tmp_path) == 0
    capsys.readouterr()
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert finetune(model, data, tmp_path, "--seed", "5") == 1
    assert "already holds an adapter; pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert finetune(model, data, tmp_path, "--optimizer", "adamw", "--overwrite") == 0
    assert not (tmp_path / "posterior.safetensors").exists()


def test_the_demo_checks_its_options_before_it_downloads(tmp_path, capsys, monkeypatch):
    from bayeslora import demo

    monkeypatch.setattr(demo, "fetch", lambda *a: pytest.fail("a download began"))
    for words, message in [
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--prune", "-0.1"], "prune must be in"),
        (["--num-samples", "0"], "num_samples must be at least 1 in the demo"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
    ]:
        err = error_of(capsys, ["demo", "--output", str(tmp_path / "out"), *words])
        assert message in err


def test_the_demo_writes_what_it_measured(tmp_path, capsys, monkeypatch, model):
    from test_demo import write_sst2

    from bayeslora import demo

    files = {demo.MODEL: model, demo.DATA: write_sst2(tmp_path / "rows.arrow", 60)}
    monkeypatch.setattr(demo, "fetch", lambda pin, cache: files[pin])
    monkeypatch.setattr(demo, "TRAIN_ROWS", 40)
    out = tmp_path / "out"
    words = ["demo", "--steps", "4", "--num-samples", "2", "--device", "cpu", "--output", str(out)]
    assert cli.main(words) == 0
    measured = json.loads((out / "metrics.json").read_text())
    table = capsys.readouterr().out
    assert len(measured["rows"]) == 4
    for row in measured["rows"]:
        (line,) = (line for line in table.splitlines() if row["name"] in line)
        assert f"{100 * row['accuracy']:.1f}%" in line and f"{row['nll']:.3f}" in line
    assert measured["test_rows"] == 20 and measured["steps"] == 4
    assert (out / "reliability.png").stat().st_size > 10_000
    assert (out / "adamw" / "adapter_config.json").exists()
    assert (out / "ivon" / "posterior.safetensors").exists()


def test_wrong_usage_is_one_line_with_status_two(capsys):
    assert "--no-such" in error_of(capsys, ["demo", "--no-such"], status=2)
    assert "--data" in error_of(capsys, ["evaluate", "somewhere"], status=2)
    assert "train" in error_of(capsys, ["train"], status=2)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("BAYESLORA_DEBUG", "1")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        cli.main(["demo", "--steps", "0"])


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys, missing):
    for name in [m for m in sys.modules if m.startswith("bayeslora.cli_")]:
        monkeypatch.delitem(sys.modules, name)
    for attribute in ("cli_app", "cli_demo", "cli_evaluate", "cli_finetune", "cli_support"):
        monkeypatch.delattr(bayeslora, attribute, raising=False)
    for name in [m for m in sys.modules if m == missing or m.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == (
        f'error: the bayeslora command needs {missing}; pip install "bayeslora[demo]" brings it\n'
    )


def test_the_process_exits_with_the_status_and_one_line(tmp_path):
    words = ["evaluate", str(tmp_path / "none"), "--data", "x.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "bayeslora.cli", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "none' does not exist" in done.stderr
    assert done.stdout == ""


def test_the_scoring_is_chosen_by_looking_and_said(model, data, tmp_path, capsys):
    words = [
        "finetune",
        "--model",
        model,
        "--data",
        data,
        "--steps",
        "2",
        "--device",
        "cpu",
        "--num-samples",
        "0",
    ]
    assert cli.main([*words, "--output", str(tmp_path / "any")]) == 0
    err = capsys.readouterr().err
    seen = r"\d+% by letter, \d+% by loglik, \d+% by mean_loglik"
    said = re.search(rf"scoring (\w+): of 24 rows the base model gets {seen} right, and guessing 50%", err)
    assert said and json.loads((tmp_path / "any/bayeslora_task.json").read_text())["scoring"] == said[1]
    template = ["--template", r"{question}\n{choices}\nAnswer:"]  # serves letters alone
    assert cli.main([*words, "--output", str(tmp_path / "letters"), *template]) == 0
    assert "trying scoring" not in capsys.readouterr().err
    assert json.loads((tmp_path / "letters/bayeslora_task.json").read_text())["scoring"] == "letter"


def test_a_dry_run_shows_the_prompt_and_writes_nothing(model, data, tmp_path, capsys):
    assert finetune(model, data, tmp_path / "out", "--dry-run", "--lr", "0.003") == 0
    out = capsys.readouterr().out
    assert "Review: the film was good .\nSentiment:\n" in out
    assert "' negative'\n" in out and "' positive' (right)" in out
    for fact in (r"tokens a row\s+10 to 12, median 11", r"lr\s+0.003", r"steps\s+6", r"preset\s+like-adamw"):
        assert re.search(fact, out), fact
    assert not (tmp_path / "out").exists()


def test_rows_that_lose_something_are_warned_of(model, tmp_path, capsys):
    rows = [row | {"question": "very " * 300 + "good ."} for row in review_rows(6)]
    rows[4]["choices"] = ["negative", "positive", "negative"]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    assert finetune(model, str(data), tmp_path / "out", "--dry-run") == 0
    err = capsys.readouterr().err
    assert "warning: 1 of 6 rows have a choice twice, first row 5" in err
    assert re.search(
        r"longest input has \d+ tokens and the model was made for 256; pass --max-length 256", err
    )
    assert finetune(model, str(data), tmp_path / "out", "--dry-run", "--max-length", "64") == 0
    assert re.search(r"warning: 6 of 6 prompts lost their start, up to 2\d\d tokens", capsys.readouterr().err)


def test_a_run_that_learned_nothing_ends_with_a_warning(model, data, tmp_path, capsys):
    assert finetune(model, data, tmp_path, "--lr", "1e-9", "--num-samples", "0") == 0
    err = capsys.readouterr().err
    assert re.search(
        r"warning: the training loss ended at \d\.\d+ nats, no better than guessing \(0\.69\)", err
    )


def test_samples_far_behind_the_mean_are_warned_of_also_without_evaluation_data(
    model, data, tmp_path, capsys, monkeypatch
):
    train = library.train

    def too_wide(*args, **kwargs):
        trained = train(*args, **kwargs)
        trained.optimizer.param_groups[0]["ess"] = 2.0
        return trained

    monkeypatch.setattr(library, "train", too_wide)
    words = ["--lr", "0.1", "--clip-radius", "0.1", "--hess-init", "0.05", "--epochs", "10"]
    words += ["--target-modules", "q_proj,v_proj,up_proj", "--batch-size", "6"]
    assert finetune(model, data, tmp_path, *words, steps=()) == 0
    assert re.search(r"warning: posterior samples .* larger --ess \(it was 2\)", capsys.readouterr().err)


def test_labels_of_all_rows_serve_training_evaluation_and_prediction(model, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    lines = [f"{row['question']},{row['choices'][row['answer']].upper()}" for row in review_rows(12)]
    file.write_text("text,label\n" + "\n".join(lines))
    out = tmp_path / "run"
    assert finetune(model, str(file), out, "--labels", "negative, positive", "--num-samples", "0") == 0
    for command in ("evaluate", "predict"):
        assert (
            cli.main([command, str(out), "--data", str(file), "--num-samples", "0", "--device", "cpu"]) == 0
        )
    assert '"choices": ["negative", "positive"]' in capsys.readouterr().out


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory):
    path = tmp_path_factory.mktemp("unanswered") / "rows.jsonl"
    rows = [{key: row[key] for key in ("question", "choices")} for row in review_rows(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_predict_answers_rows_without_answers(run, unanswered, tmp_path):
    optimizer, folder = run
    words = ["predict", str(folder), "--data", unanswered, "--num-samples", "3", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "answers.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    loaded = load_run(folder, device=torch.device("cpu"))
    encoded = encode(
        load_questions(unanswered, answered=False), loaded.tokenizer, "mean_loglik", loaded.task.template
    )
    samples = {"posterior": loaded.posterior, "num_samples": 3} if optimizer == "ivon" else {}
    expected = library.predict(loaded.model, encoded, average=False, **samples)
    scores = uncertainty.decompose(expected)
    for i, row in enumerate(rows):
        assert row["probabilities"] == pytest.approx(expected.mean(0)[i].tolist(), abs=1e-5)
        assert row["index"] == row["probabilities"].index(max(row["probabilities"])) and row["answer"] is None
        assert row["prediction"] == row["choices"][row["index"]]
        assert row["total"] == pytest.approx(float(scores.total[i]), abs=1e-5)
        if optimizer == "ivon":
            assert row["epistemic"] == pytest.approx(float(scores.epistemic[i]), abs=1e-5)
        else:  # nothing was sampled, so nothing is said of it
            assert row["epistemic"] is None
    assert cli.main([*words, "--output", str(tmp_path / "answers.csv")]) == 0
    with (tmp_path / "answers.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [json.loads(row["probabilities"]) for row in table] == [row["probabilities"] for row in rows]


def test_predict_prints_json_lines_and_refuses_other_files(run, unanswered, tmp_path, capsys):
    words = ["predict", str(run[1]), "--data", unanswered, "--num-samples", "0", "--device", "cpu"]
    assert cli.main(words) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 5
    assert "must end in .jsonl or .csv" in error_of(
        capsys, [*words, "--output", str(tmp_path / "answers.txt")]
    )
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is a pipe or a device" in error_of(capsys, [*words, "--output", str(tmp_path / "pipe.csv")])


def interrupt(*args, **kwargs):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "said"),
    [("train", "nothing was written to {}"), ("predict", "the run is in {}, but was not measured")],
)
def test_ctrl_c_is_one_line_and_leaves_nothing_half_written(
    model, data, tmp_path, capsys, monkeypatch, place, said
):
    out = tmp_path / "out"
    monkeypatch.setattr(library, place, interrupt)
    assert finetune(model, data, out, "--eval-data", data) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"error: stopped; {said.format(out)}"
    assert out.exists() == (place == "predict")
    if out.exists():
        assert read_task(out).scoring == "mean_loglik" and not [p for p in out.iterdir() if p.name[0] == "."]


def test_a_full_disk_leaves_the_last_good_run_and_one_line(run, model, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(run[1], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert finetune(model, data, out, "--overwrite") == 1
    assert "error: the disk is full; what was being written is as it was before" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_second_run_into_the_folder_is_refused(model, data, tmp_path, capsys):
    with (tmp_path / ".bayeslora-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert finetune(model, data, tmp_path) == 1
    assert "another process is writing to" in capsys.readouterr().err
    assert finetune(model, data, tmp_path, "--num-samples", "0") == 0


def test_a_library_s_error_is_one_line_that_names_its_kind(model, data, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not fit\nat line 3" + "x" * 10_000)

    monkeypatch.setattr(library, "train", fail)
    assert finetune(model, data, tmp_path / "out") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: RuntimeError: shapes do not fit at line 3x") and len(line) < 1100
    monkeypatch.setenv("BAYESLORA_DEBUG", "1")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        finetune(model, data, tmp_path / "out")


def test_without_a_terminal_long_stages_print_a_line_a_tenth(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(cli_support.time, "perf_counter", lambda: next(clock))
    with cli_support.Reporter() as report:
        report.notice("training")
        for step in range(1, 41):
            report.on_progress(library.Progress("train", step, 40, loss=1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["training ...", "training: 4/40 loss 1.000, about 144 s left"]
    assert len(lines) == 11 and lines[-1].startswith("training: 40/40 loss 1.000, ")


def test_figures_that_are_not_finite_are_null(tmp_path):
    cli_support.write_metrics(tmp_path / "m.json", [{"nll": float("inf")}], {"final_loss": float("nan")})
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail) == {
        "rows": [{"nll": None}],
        "final_loss": None,
    }


def test_a_closed_pipe_ends_the_process_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bayeslora.cli", "--version"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
