"""A model is changed as a whole or not at all."""

import pytest
import torch
from torch import nn

from bayeslora import transactions
from bayeslora.transactions import unchanged_on_failure


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
