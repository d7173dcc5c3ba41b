import json
import re
import subprocess
import sys

import pytest
import torch
from tiny_lm import review_rows, save_tiny
from typer.testing import CliRunner

import bayeslora
from bayeslora import cli, cli_app
from bayeslora.cli_app import app

TEMPLATE = r"Review: {question}\nSentiment:"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, review_rows(24))) + "\n")
    return str(path)


def finetune(model, data, output, *extra):
    words = ["finetune", "--model", model, "--data", data, "--output", str(output)]
    words += ["--scoring", "mean_loglik", "--template", TEMPLATE, "--steps", "6", "--device", "cpu"]
    return cli.main([*words, *extra])


@pytest.fixture(scope="module", params=["ivon", "adamw"])
def run(request, tmp_path_factory, model, data):
    folder = tmp_path_factory.mktemp("run") / request.param
    options = ["--optimizer", request.param, "--eval-data", data, "--num-samples", "2"]
    assert finetune(model, data, folder, *options) == 0
    return request.param, folder


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("command", [[], ["demo"], ["finetune"], ["evaluate"], ["bench"], ["info"]])
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    text = plain(result.output)
    for word in {
        (): ["demo", "finetune", "evaluate", "bench", "info"],
        ("bench",): ["--batch-size", "--eager-only", "SmolLM2-135M"],
        ("finetune",): ["mean_loglik", "--ess", "200 x training rows", "--template", "line break"],
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
        assert task["training"]["ess"] == 24 * 200


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
        ({"--scoring": "words"}, "scoring must be one of letter, loglik, mean_loglik; got 'words'"),
        ({"--template": "{question}"}, r"must contain \{choices\}"),
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
        ([str(folder), "--data", data, "--model", missing], "model path '.*none' does not exist"),
        ([str(folder), "--data", data, "--output", str(tmp_path)], "--output '.*' is a folder; pass a file"),
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
    for attribute in ("cli_app", "cli_demo", "cli_finetune", "cli_support"):
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
