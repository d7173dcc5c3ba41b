import os
import signal

import pytest
from crashes import killed_at

from bayeslora.folders import locked_folder, recover, replaced_folder, write_file

OLD = {"adapter_config.json": "old", "adapter_model.safetensors": "old", "posterior.safetensors": "old"}
NEW = {"adapter_config.json": "new", "adapter_model.safetensors": "new", "bayeslora_task.json": "new"}
DROP = ("posterior.safetensors", "metrics.json")


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


def contents(folder):
    """The files a reader sees; what begins with .bayeslora is not theirs."""
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


def replace(folder):
    with replaced_folder(folder, drop=DROP) as staging:
        write(staging, NEW)


def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new(tmp_path):
    folder, found = tmp_path / "run", []
    for count in range(1000):
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        write(folder, OLD)
        killed = killed_at(count + 1, lambda: replace(folder))
        if "adapter_config.json" in contents(folder):  # what PEFT would take for an adapter
            assert contents(folder) in (OLD, NEW)
        recover(folder)
        found.append(contents(folder))
        assert found[-1] in (OLD, NEW)
        replace(folder)  # the next start finds nothing in its way
        assert contents(folder) == NEW and not (folder / ".bayeslora-new").exists()
        if not killed:
            break
    assert found[0] == OLD and found[-1] == NEW and len(found) > 15
    assert found == sorted(found, key=NEW.__eq__)  # one moment decides


def test_other_files_and_the_folder_itself_stay(tmp_path):
    write(tmp_path, {**OLD, "notes.txt": "mine", "metrics.json": "old"})
    (tmp_path / "logs").mkdir()
    before = tmp_path.stat().st_ino
    replace(tmp_path)
    assert contents(tmp_path) == {**NEW, "notes.txt": "mine"}
    assert (tmp_path / "logs").is_dir() and tmp_path.stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []


def test_an_error_leaves_the_old_files_and_no_folder_that_was_not_there(tmp_path):
    write(tmp_path, OLD)
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(OSError, match="disk"), replaced_folder(folder, drop=DROP) as staging:
            write(staging, {"adapter_config.json": "new"})
            raise OSError("the disk")
    assert contents(tmp_path) == OLD
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(OLD)


@pytest.mark.parametrize("place", ["old", "new"])
def test_a_folder_among_the_files_is_refused_before_anything_changes(tmp_path, place):
    write(tmp_path, OLD)
    if place == "old":
        (tmp_path / "bayeslora_task.json").mkdir()
    with pytest.raises(ValueError, match="is a folder; files alone"), replaced_folder(tmp_path) as staging:
        write(staging, NEW)
        if place == "new":
            (staging / "second" / "third").mkdir(parents=True)
    assert contents(tmp_path) == OLD


def test_a_folder_is_locked_until_its_process_ends_however_it_ends(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked_folder(tmp_path):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(ValueError, match=r"another process is writing to .*pass another folder"):
        replace(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    replace(tmp_path)
    assert contents(tmp_path) == NEW


def test_a_decided_folder_that_is_a_link_is_left_alone(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    for place in (elsewhere, folder):
        place.mkdir()
    write(elsewhere, NEW)
    (folder / ".bayeslora-whole").symlink_to(elsewhere)
    recover(folder)
    assert contents(elsewhere) == NEW and contents(folder) == {}


def test_a_file_is_written_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "metrics.json"
    write_file(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("the disk")))
    with pytest.raises(OSError, match="the disk"):
        write_file(path, "new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
