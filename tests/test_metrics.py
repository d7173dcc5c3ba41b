import builtins
import math
import sys

import pytest
import torch

from bayeslora import metrics

PROBS = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6], [0.55, 0.15, 0.3]])
LABELS = torch.tensor([0, 2, 2, 0])


def random_predictions(rows=500, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(rows, classes, generator=generator).mul(2).softmax(-1)
    return probs, torch.randint(classes, (rows,), generator=generator)


def test_values_by_hand():
    assert metrics.accuracy(PROBS, LABELS) == pytest.approx(0.75)
    expected_nll = -(math.log(0.9) + math.log(0.1) + math.log(0.6) + math.log(0.55)) / 4
    assert metrics.nll(PROBS, LABELS) == pytest.approx(expected_nll, rel=1e-6)
    rows = [0.01 + 0.01, 0.09 + 0.36 + 0.81, 0.04 + 0.04 + 0.16, 0.2025 + 0.0225 + 0.09]
    assert metrics.brier(PROBS, LABELS) == pytest.approx(sum(rows) / 4, rel=1e-6)
    # quarters: [0.5, 0.75) holds 0.6 wrong, 0.6 right, 0.55 right; [0.75, 1] holds 0.9 right
    expected_ece = 3 / 4 * abs(2 / 3 - (0.6 + 0.6 + 0.55) / 3) + 1 / 4 * 0.1
    assert metrics.ece(PROBS, LABELS, num_bins=4) == pytest.approx(expected_ece, rel=1e-5)


def test_summary_holds_the_single_metrics():
    probs, labels = random_predictions()
    assert metrics.summary(probs, labels) == {
        "accuracy": metrics.accuracy(probs, labels),
        "ece": metrics.ece(probs, labels),
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
    }


def test_calibrated_predictions_have_a_small_ece_and_overconfident_ones_a_large_one():
    generator = torch.Generator().manual_seed(1)
    probs = torch.randn(20000, 3, generator=generator).mul(1.5).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    assert metrics.ece(probs, labels) < 0.015
    sharpened = probs.pow(3) / probs.pow(3).sum(-1, keepdim=True)
    assert metrics.ece(sharpened, labels) > 0.15


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_bins_agree_with_ece_and_count_every_row(num_bins):
    probs, labels = random_predictions()
    probs[:20] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # certain, as saturated softmaxes are
    probs[20:40] = torch.tensor([0.5, 0.5, 0.0, 0.0])  # on an edge
    bins = metrics.reliability_bins(probs, labels, num_bins)
    assert bins.ece == pytest.approx(metrics.ece(probs, labels, num_bins), abs=2e-6)
    assert int(bins.count.sum()) == len(labels)
    assert len(bins.edges) == num_bins + 1
    filled = bins.count > 0
    assert bool((bins.confidence[filled] >= bins.edges[:-1][filled]).all())
    assert bool((bins.confidence[filled] <= bins.edges[1:][filled]).all())


def test_a_certain_mistake_shares_the_last_bin_with_what_is_nearly_certain():
    probs = torch.tensor([[1.0, 0.0], [0.97, 0.03]], dtype=torch.float64)
    labels = torch.tensor([1, 0])  # one bin: confidence 0.985, accuracy 0.5
    assert metrics.ece(probs, labels) == pytest.approx(0.485, abs=1e-12)
    assert metrics.reliability_bins(probs, labels).ece == pytest.approx(0.485, abs=1e-12)


def test_on_an_edge_ece_is_that_of_the_bins():
    probs = torch.tensor([[0.7, 0.3], [0.72, 0.28], [0.69, 0.31]])  # fp32's 0.7 is below the edge
    labels = torch.tensor([0, 1, 0])
    assert metrics.ece(probs, labels, 10) == metrics.reliability_bins(probs, labels, 10).ece


def test_empty_bins_are_nan_and_certain_predictions_land_in_the_last_bin():
    bins = metrics.reliability_bins(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), 4)
    assert bins.count.tolist() == [0, 0, 0, 2]
    assert bins.accuracy[:3].isnan().all() and bins.accuracy[3] == 0.5


def test_an_impossible_label_keeps_nll_finite():
    assert math.isfinite(metrics.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_measure_the_same(dtype):
    probs, labels = random_predictions(rows=64)
    assert metrics.brier(probs.to(dtype), labels) == pytest.approx(metrics.brier(probs, labels), abs=5e-3)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.long), r"probs must be floating with shape \(N, C\)"),
        (
            torch.full((2, 2), 0.5),
            torch.zeros(3, dtype=torch.long),
            r"labels must be integers of shape \(2,\)",
        ),
        (torch.full((2, 2), 0.5), torch.tensor([0.0, 1.0]), "labels must be integers"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), r"labels must lie in \[0, 1\]; got 0 to 2"),
        (torch.full((2, 2), 0.7), torch.tensor([0, 1]), "sum to 1; got sums from 1.4"),
        (torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]), "NaN or infinity"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "empty"),
    ],
)
def test_bad_input_is_named(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.nll(probs, labels)


def test_bad_bins_are_named():
    with pytest.raises(ValueError, match="num_bins must be at least 1; got 0"):
        metrics.reliability_bins(PROBS, LABELS, 0)


def test_missing_torchmetrics_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in [m for m in sys.modules if m.startswith("torchmetrics")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ModuleNotFoundError, match=r'torchmetrics is not installed; pip install "bayeslora\[demo\]"'
    ):
        metrics.accuracy(PROBS, LABELS)


def test_diagram_draws_bars_at_the_bins_and_saves_a_picture(tmp_path):
    probs, labels = random_predictions()
    path = tmp_path / "new" / "reliability.png"
    figure = metrics.reliability_diagram(
        {"one": (probs, labels), "two": (probs, labels)}, title="T", path=path
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    top = figure.axes[0]
    bins = metrics.reliability_bins(probs, labels, 10)
    filled = bins.count > 0
    heights = [bar.get_height() for bar in top.containers[0]]
    assert heights == pytest.approx(bins.accuracy[filled].tolist())
    assert [bar.get_x() for bar in top.containers[0]] == pytest.approx(bins.edges[:-1][filled].tolist())
    assert f"{100 * metrics.ece(probs, labels):.1f}%" in top.get_title()
    assert len(figure.axes) == 4


def test_diagram_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="predictions is empty"):
        metrics.reliability_diagram({})
