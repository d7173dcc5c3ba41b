"""Pruning and variance sweeps: what they measure, their control, and that they leave no trace."""

import math

import pytest
import torch
from torch import nn

from bayeslora import IVON, Posterior, metrics


def _digits(count=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 0] - x[:, 2] > 1).long()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = _digits()
    opt = IVON(model.parameters(), lr=0.3, ess=120.0, hess_init=0.1, beta2=0.99)
    for _ in range(150):
        with opt.sampled_params(train=True):
            nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return Posterior.from_optimizer(model, opt)


def _pairs():
    x, y = _digits(80, seed=1)
    return [(x[:50], y[:50]), (x[50:], y[50:])]


def _state(posterior):
    tensors = [t for g in posterior.parameters.values() for t in (g.parameter, g.mean, g.hess)]
    return [t.detach().clone() for t in tensors]


def _same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_prune_sweep_measures_what_prune_gives(trained):
    before = _state(trained)
    sweep = trained.prune_sweep(_pairs(), [0.0, 0.5, 0.9], random_seeds=(0, 1))
    assert _same(before, _state(trained)) and trained.pruned == []
    rows = {(r["how"], r["ratio"], r["seed"]): r for r in sweep.rows}
    assert len(rows) == len(sweep.rows) == 3 + 6
    x, y = _digits(80, seed=1)
    at_mean = metrics.summary(trained.model(x).softmax(-1), y)
    assert rows["uncertainty", 0.0, None]["accuracy"] == at_mean["accuracy"] > 0.7
    assert rows["random", 0.0, 1]["nll"] == pytest.approx(at_mean["nll"])
    copy = Posterior(trained.model, trained.parameters)
    kept = _state(copy)
    copy.prune(0.5)
    expected = metrics.summary(trained.model(x).softmax(-1), y)
    changed = [t for g in copy.parameters.values() for t in (g.parameter, g.mean, g.hess)]
    for tensor, value in zip(changed, kept, strict=True):
        tensor.data.copy_(value)
    assert rows["uncertainty", 0.5, None]["nll"] == pytest.approx(expected["nll"])
    assert rows["random", 0.5, 0]["nll"] != rows["random", 0.5, 1]["nll"]


def test_random_pruning_is_a_control_of_what_the_variance_knows():
    model = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -2, 0, 0, 0, 0], [-2.0, 2, 0, 0, 0, 0]]))
    posterior = IVON(model.parameters(), lr=0.1, ess=10.0).posterior(model)
    posterior.parameters["weight"].hess[:, :2] = 100.0  # certain of what matters
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    sweep = posterior.prune_sweep([(x, (x[:, 1] > x[:, 0]).long())], [0.0, 2 / 3], random_seeds=range(5))
    accuracy = {how: [r["accuracy"] for r in rows[2 / 3]] for how, rows in sweep.groups().items()}
    assert accuracy["uncertainty"] == [1.0]
    assert sum(accuracy["random"]) / 5 < 0.95


def test_variance_sweep_is_predict_at_each_scale(trained):
    before = _state(trained)
    sweep = trained.variance_sweep(_pairs(), [0.0, 1.0, 4.0], num_samples=6)
    assert _same(before, _state(trained))
    x, y = _digits(80, seed=1)
    for row in sweep.rows[1:]:
        expected = metrics.summary(trained.predict(x, 6, variance_scale=row["variance_scale"]), y)
        assert row["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert [row["how"] for row in sweep.rows] == ["mean", "6 samples", "6 samples"]


def test_a_function_predicts_instead_and_an_error_in_it_leaves_no_trace(trained):
    before = _state(trained)
    calls = []

    def predictions(**how):
        calls.append(how)
        if len(calls) == 3:
            raise KeyError
        return torch.tensor([[0.7, 0.3]]), torch.tensor([0])

    with pytest.raises(KeyError):
        trained.prune_sweep(predictions, [0.0, 0.2, 0.4], num_samples=4)
    assert calls == [{"num_samples": 4, "variance_scale": 1.0}] * 3
    assert _same(before, _state(trained)) and trained.pruned == []


def test_table_and_plot(trained, tmp_path):
    sweep = trained.prune_sweep(_pairs(), [0.0, 0.5], random_seeds=(0, 1))
    lines = sweep.table().splitlines()
    assert lines[0] == "| ratio | how | accuracy | ECE | NLL (nats) | Brier score |"
    assert len(lines) == 2 + 4 and lines[-1].startswith("| 0.5 | random |") and "±" in lines[-1]
    figure = sweep.plot(tmp_path / "sub" / "prune.png", title="pruning")
    assert [axis.get_ylabel() for axis in figure.axes] == ["accuracy", "ECE", "NLL (nats)"]
    drawn = figure.axes[0].lines[0].get_ydata()
    assert list(drawn) == [row["accuracy"] for row in sweep.rows[:2]]
    assert (tmp_path / "sub" / "prune.png").stat().st_size > 1000


def test_settings_may_be_an_array(trained):
    by_array = trained.prune_sweep(_pairs(), torch.linspace(0, 0.5, 2).numpy(), random_seeds=())
    assert by_array.table() == trained.prune_sweep(_pairs(), [0.0, 0.5], random_seeds=()).table()
    by_array = trained.variance_sweep(_pairs(), torch.linspace(0, 1, 2), num_samples=2)
    assert by_array.table() == trained.variance_sweep(_pairs(), [0.0, 1.0], num_samples=2).table()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: p.prune_sweep(_pairs(), [1.0]), r"ratios must be in \[0, 1\)"),
        (lambda p: p.prune_sweep(_pairs(), []), "ratios is empty"),
        (lambda p: p.prune_sweep([], [0.1]), "data is empty"),
        (lambda p: p.prune_sweep(_pairs(), [0.1], num_samples=-1), "num_samples must be >= 0"),
        (lambda p: p.variance_sweep(_pairs(), [-1.0]), "scales must be finite"),
        (lambda p: p.variance_sweep(_pairs(), [math.nan]), "scales must be finite"),
        (lambda p: p.variance_sweep(_pairs(), []), "scales is empty"),
        (lambda p: p.variance_sweep(_pairs(), [1.0], num_samples=0), "num_samples must be >= 1"),
    ],
)
def test_bad_arguments(trained, call, match):
    before = _state(trained)
    with pytest.raises(ValueError, match=match):
        call(trained)
    assert _same(before, _state(trained))
