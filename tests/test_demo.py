import hashlib
import json
import sys
import zipfile
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from tiny_lm import review_rows, save_tiny

from bayeslora import demo
from bayeslora.runs import load_run

CONTENT = b"the pinned bytes " * 1000


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path):
    """A folder pip can install from, with one wheel in it, and the pin that names it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_pin-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_pin/data.bin", CONTENT)
        archive.writestr(
            "tiny_pin-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-pin\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_pin-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_pin-1.0.dist-info/RECORD", "")
    pin = demo.Pin(
        what="the tiny pin",
        requirement="tiny-pin==1.0",
        wheel=wheel.name,
        wheel_sha256=sha(wheel.read_bytes()),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_pin/data.bin",
        member_sha256=sha(CONTENT),
    )
    return folder, pin


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


def test_fetch_goes_through_the_users_pip_and_keeps_only_the_file(index, tmp_path):
    _, pin = index
    cache = tmp_path / "cache"
    path = demo.fetch(pin, cache)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["tiny_pin-data.bin"]


@pytest.mark.parametrize("python_path", ["unset", ":"])
def test_nothing_of_the_working_directory_is_run(index, tmp_path, monkeypatch, python_path):
    _, pin = index
    work = tmp_path / "downloads"
    work.mkdir()
    (work / "pip.py").write_text("import pathlib\npathlib.Path(__file__).with_name('RAN').touch()")
    monkeypatch.chdir(work)
    if python_path != "unset":  # an empty entry is the working directory too
        monkeypatch.setenv("PYTHONPATH", python_path)
    demo.fetch(pin, "../cache")
    assert [p.name for p in work.iterdir()] == ["pip.py"]
    assert (tmp_path / "cache" / "tiny_pin-data.bin").read_bytes() == CONTENT


def test_a_populated_cache_needs_no_pip(index, tmp_path, monkeypatch):
    _, pin = index
    path = demo.fetch(pin, tmp_path / "cache")
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    assert demo.fetch(pin, tmp_path / "cache") == path


def test_a_damaged_file_in_the_cache_is_replaced(index, tmp_path):
    _, pin = index
    path = demo.fetch(pin, tmp_path / "cache")
    path.write_bytes(CONTENT[:-1])
    assert demo.fetch(pin, tmp_path / "cache").read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", ["wheel_sha256", "member_sha256"])
def test_a_wrong_hash_is_refused_and_nothing_is_kept(index, tmp_path, wrong):
    pin = replace(index[1], **{wrong: "0" * 64})
    with pytest.raises(
        ValueError, match=r"tiny-pin==1\.0 has SHA-256 [0-9a-f]{64}, expected 0{64}; it was not kept"
    ):
        demo.fetch(pin, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_is_one_line(index, tmp_path):
    folder, pin = index
    (folder / pin.wheel).unlink()
    with pytest.raises(
        ValueError, match=r"pip could not download tiny-pin==1\.0 \(the tiny pin\): .+"
    ) as error:
        demo.fetch(pin, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_an_environment_without_pip_is_one_line(index, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.sys, "executable", str(_fake_python(tmp_path)))
    with pytest.raises(ValueError, match="No module named pip"):
        demo.fetch(index[1], tmp_path / "cache")


def _fake_python(folder):
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('python: No module named pip')\n")
    script.chmod(0o755)
    return script


def test_the_cache_folder_is_the_option_the_variable_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("BAYESLORA_CACHE", str(tmp_path / "variable"))
    assert demo.cache_folder(tmp_path) == tmp_path
    assert demo.cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("BAYESLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "bayeslora"


def write_sst2(path, count):
    rows = review_rows(count)
    table = pa.table(
        {
            "sentence": [f"{row['question']} " for row in rows],
            "label": pa.array([row["answer"] for row in rows], pa.int64()),
            "idx": pa.array(range(count), pa.int32()),
        }
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def test_sst2_rows_become_questions(tmp_path):
    questions = demo.load_sst2(write_sst2(tmp_path / "rows.arrow", 3))
    assert [q.answer for q in questions] == [1, 0, 1]
    assert questions[0].question == "the film was good ."
    assert questions[0].choices == ("negative", "positive")


def test_the_demo_measures_four_predictors_and_saves_both_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_ROWS", 40)
    notices, seen = [], []
    result = demo.run_demo(
        save_tiny(tmp_path / "model"),
        write_sst2(tmp_path / "rows.arrow", 60),
        tmp_path / "out",
        device=torch.device("cpu"),
        steps=6,
        num_samples=2,
        prune=0.25,
        notice=notices.append,
        on_progress=seen.append,
    )
    names = ["AdamW", "IVON at the mean", "IVON 2 samples", "IVON pruned 25%"]
    assert [row.name for row in result.rows] == names
    assert (result.train_rows, result.test_rows) == (40, 20)
    assert len({row.nll for row in result.rows}) == 4
    assert result.rows[1].seconds_per_step == result.rows[3].seconds_per_step > 0
    assert list(result.diagram) == ["AdamW", "IVON 2 samples"]
    assert notices[:3] == ["loading the model", "training with AdamW", "measuring AdamW"]
    assert sum(p.stage == "train" for p in seen) == 12

    cpu = torch.device("cpu")
    adamw, ivon = (load_run(tmp_path / "out" / name, device=cpu) for name in ("adamw", "ivon"))
    assert adamw.posterior is None and ivon.posterior is not None
    assert ivon.task.template == demo.TEMPLATE and ivon.task.training["optimizer"] == "ivon"
    config = json.loads((tmp_path / "out" / "ivon" / "posterior_config.json").read_text())
    assert {entry["ess"] for entry in config["parameters"].values()} == {demo.IVON.ess}
    assert not ivon.posterior.pruned  # saved as trained, before the fourth row was pruned


def test_both_optimizers_start_from_the_same_weights_and_see_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_ROWS", 40)
    starts, batches = [], []
    real = demo.train

    def spy(model, encoded, settings, **options):
        starts.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        try:
            return real(model, encoded, settings, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(demo, "train", spy)
    data = write_sst2(tmp_path / "rows.arrow", 60)
    demo.run_demo(
        save_tiny(tmp_path / "m"), data, tmp_path / "out", device=torch.device("cpu"), steps=3, num_samples=1
    )
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert len(batches) == 6
    assert all(torch.equal(a, b) for a, b in zip(batches[:3], batches[3:], strict=True))


def test_options_out_of_range_stop_the_demo_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match=r"prune must be in \[0, 1\); got 1"):
        demo.run_demo("none", "none", tmp_path / "out", device=torch.device("cpu"), prune=1.0)
    assert not (tmp_path / "out").exists()
