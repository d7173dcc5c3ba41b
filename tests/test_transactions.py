"""Files are replaced together or not at all, and a model is changed whole or not at all."""

import pytest
import torch
from crashes import killed_at
from torch import nn

from bayeslora import transactions
from bayeslora.transactions import settle, unchanged_on_failure, whole_save


def _write(folder, **texts):
    for name, text in texts.items():
        (folder / name).write_text(text)


def _read(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def _save(folder, value):
    with whole_save(folder, obsolete=["old_only"]) as staged:
        _write(staged, a=value, b=value)


def test_a_save_replaces_its_files_and_leaves_others(tmp_path):
    folder = tmp_path / "new" / "folder"
    _save(folder, "1")
    _write(folder, mine="kept", old_only="gone")
    _save(folder, "2")
    assert _read(folder) == {"a": "2", "b": "2", "mine": "kept"}


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    folder = tmp_path / "folder"
    for before in ({}, {"a": "1", "old_only": "1"}):
        if before:
            folder.mkdir()
            _write(folder, **before)
        with pytest.raises(KeyboardInterrupt), whole_save(folder, obsolete=["old_only"]) as staged:
            _write(staged, a="2")
            raise KeyboardInterrupt
        assert folder.exists() == bool(before)
    assert _read(folder) == {"a": "1", "old_only": "1"}


def test_a_killed_save_leaves_the_old_files_or_the_new_never_some_of_each(tmp_path):
    found, number = set(), 0
    while True:
        number += 2
        folder = tmp_path / str(number)
        _save(folder, "1")
        _write(folder, old_only="1", mine="kept")
        killed = killed_at(number, lambda folder=folder: _save(folder, "2"))
        settle(folder)
        left = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        assert left.pop("mine") == "kept"
        found.add(tuple(sorted(left.items())))
        _save(folder, "3")  # goes on from whatever was left
        assert _read(folder) == {"a": "3", "b": "3", "mine": "kept"}
        if not killed:
            break
    assert found == {
        (("a", "1"), ("b", "1"), ("old_only", "1")),
        (("a", "2"), ("b", "2")),
    }
    assert number > 10


def _model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    model[2].bias.requires_grad_(False)
    model.configs = {"a": 1}
    return model


def _change(model):
    """Whatever adding an adapter does to a model."""
    model.train()
    model[0] = nn.Identity()
    model[2].__class__ = type("Other", (nn.Linear,), {})
    model[2].weight.requires_grad_(False)
    model[2].weight.data = torch.zeros(1, 3)
    model[2].bias.data.fill_(5.0)
    model.configs["b"] = 2
    model.extra = nn.Linear(1, 1)


def _description(model):
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = [(n, p.tolist(), p.requires_grad) for n, p in model.named_parameters()]
    return kinds, tensors, dict(model.configs)


@pytest.mark.parametrize("error", [ValueError, KeyError, KeyboardInterrupt])
def test_a_model_is_put_back_whatever_fails(error):
    model = _model()
    before, memory = _description(model), model[2].weight.data_ptr()
    with pytest.raises(error), unchanged_on_failure(model, [model[2].bias]):
        _change(model)
        raise error
    assert _description(model) == before and model[2].weight.data_ptr() == memory


def test_a_model_stays_changed_where_nothing_fails():
    model = _model()
    with unchanged_on_failure(model, [model[2].bias]):
        _change(model)
    assert type(model[0]) is nn.Identity and model[2].bias.item() == 5.0


def test_an_interrupt_while_a_model_is_put_back_does_not_stop_it(monkeypatch):
    model = _model()
    before, put_back, calls = _description(model), transactions._put_back, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put_back(*arguments)

    monkeypatch.setattr(transactions, "_put_back", interrupted)
    with pytest.raises(KeyboardInterrupt), unchanged_on_failure(model, [model[2].bias], always=True):
        _change(model)
    assert _description(model) == before
