"""Uncertainty scores against their definitions, risk-coverage and OOD AUROC against brute force."""

import math

import pytest
import torch
from scipy.stats import entropy, rankdata

from bayeslora import uncertainty


def _probs(*shape, seed=0, sharp=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(sharp).softmax(-1)


@pytest.mark.parametrize("shape", [(4, 5), (3, 7, 4), (2, 3, 4, 11)])
def test_decomposition_is_scipys_entropies(shape):
    probs = _probs(*shape).double()
    found = uncertainty.decompose(probs)
    total = torch.as_tensor(entropy(probs.mean(0).numpy(), axis=-1))
    aleatoric = torch.as_tensor(entropy(probs.numpy(), axis=-1)).mean(0)
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.aleatoric, aleatoric)
    torch.testing.assert_close(found.epistemic, total - aleatoric)
    assert (found.epistemic > 0).all()


def test_choices_that_are_not_there_and_certain_predictions_count_zero():
    probs = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]] * 3)
    found = uncertainty.decompose(probs)
    torch.testing.assert_close(found.total, torch.tensor([math.log(2), 0.0]))
    assert found.epistemic.eq(0).all()
    assert uncertainty.decompose(probs.bfloat16()).total.dtype == torch.float32


def test_sequence_scores_by_hand():
    probs = _probs(3, 2, 4, 6)
    tokens = torch.tensor([[1, 2, 3, 5], [0, 4, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = uncertainty.sequence_scores(probs, tokens, mask)
    by_token = uncertainty.decompose(probs)
    for name in ("total", "aleatoric", "epistemic"):
        scores = getattr(by_token, name)
        torch.testing.assert_close(getattr(found.tokens, name)[0], scores[0])
        assert getattr(found.tokens, name)[1, 2:].eq(0).all()
        expected = torch.stack([scores[0].mean(), scores[1, :2].mean()])
        torch.testing.assert_close(getattr(found.sequence, name), expected)
    joint = [
        [math.prod(float(p[n, t, tokens[n, t]]) for t in range(c)) for n, c in ((0, 4), (1, 2))]
        for p in probs
    ]
    expected = -torch.tensor(joint).mean(0).log() / torch.tensor([4, 2])
    torch.testing.assert_close(found.nll, expected)
    own = -torch.tensor(joint).log() / torch.tensor([4, 2])
    torch.testing.assert_close(found.spread, own.std(0, correction=0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_tokens_of_any_integer_dtype(dtype):
    probs, tokens = _probs(2, 3, 4, 7), torch.randint(7, (3, 4))
    expected = uncertainty.sequence_scores(probs, tokens)
    assert torch.equal(uncertainty.sequence_scores(probs, tokens.to(dtype)).nll, expected.nll)


def test_roc_curves_of_many_scores_need_little_memory():
    inside, outside = torch.randn(30_000).tolist(), torch.randn(30_000).add(1).tolist()
    figure = uncertainty.ood_plot({"entropy": (inside, outside)})  # every pair would take 14 GB
    x, y = (torch.as_tensor(v) for v in figure.axes[0].lines[0].get_data())
    auroc = uncertainty.ood_auroc(inside, outside)
    assert float(torch.trapezoid(y, x)) == pytest.approx(auroc, abs=1e-6)
    assert x[0] == y[0] == 0.0 and x[-1] == y[-1] == 1.0


def test_risk_coverage_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    scores, errors = torch.rand(40, generator=generator), torch.rand(40, generator=generator).round()
    found = uncertainty.risk_coverage(scores, errors)
    order = scores.argsort()
    expected = torch.stack([errors[order[: k + 1]].mean() for k in range(40)]).double()
    torch.testing.assert_close(found.risk, expected, rtol=1e-6, atol=1e-7)
    assert found.coverage[0] == 1 / 40 and found.coverage[-1] == 1
    assert found.aurc == pytest.approx(float(expected.mean()), abs=1e-6)
    assert uncertainty.risk_coverage(errors, errors).excess == pytest.approx(0.0, abs=1e-12)
    assert found.excess > 0


def test_equal_scores_count_as_in_random_order():
    errors = torch.tensor([1.0, 0.0, 0.0, 1.0])
    found = uncertainty.risk_coverage(torch.zeros(4), errors)
    assert found.risk.tolist() == [0.5] * 4 and found.aurc == 0.5


@pytest.mark.parametrize("scale", [1.0, 1e4])  # outside of [0, 1] torchmetrics squashes: most become 1.0
def test_ood_auroc_is_the_rank_sum(scale):
    inside = torch.randn(60, generator=torch.Generator().manual_seed(0)).mul(scale).round(decimals=1)
    outside = (
        torch.randn(45, generator=torch.Generator().manual_seed(1)).add(0.7).mul(scale).round(decimals=1)
    )
    ranks = rankdata(torch.cat([inside, outside]).numpy())[60:]
    expected = (ranks.sum() - 45 * 46 / 2) / (60 * 45)
    assert uncertainty.ood_auroc(inside, outside) == pytest.approx(expected, abs=1e-6)
    assert uncertainty.ood_auroc(inside, inside + 100 * scale) == 1.0


def test_plots_are_written(tmp_path):
    scores, errors = torch.rand(30), torch.rand(30).round()
    curves = {"entropy": (scores, errors), "random": (torch.rand(30), errors)}
    figure = uncertainty.risk_coverage_plot(curves, title="t", path=tmp_path / "a" / "risk.png")
    assert [line.get_label().split(" (")[0] for line in figure.axes[0].lines] == ["entropy", "random"]
    figure = uncertainty.ood_plot({"entropy": (scores, scores + 0.3)}, path=tmp_path / "ood.svg")
    x, y = figure.axes[0].lines[0].get_data()
    area = float(torch.trapezoid(torch.as_tensor(y), torch.as_tensor(x)))
    assert area == pytest.approx(uncertainty.ood_auroc(scores, scores + 0.3), abs=1e-6)
    assert (tmp_path / "a" / "risk.png").stat().st_size > 1000 and (tmp_path / "ood.svg").exists()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: uncertainty.decompose(torch.ones(3)), r"floating tensor \(S, ..., C\); got \(3,\)"),
        (lambda: uncertainty.decompose(torch.ones(2, 3, dtype=torch.int64)), "floating tensor"),
        (lambda: uncertainty.decompose(torch.randn(2, 3)), "sum to 1"),
        (lambda: uncertainty.decompose(torch.full((2, 3), math.nan)), "sum to 1"),
        (lambda: uncertainty.decompose(torch.ones(0, 2, 3)), "empty"),
        (lambda: uncertainty.sequence_scores(_probs(2, 3, 4), torch.ones(3, 4).long()), r"\(S, N, T, V\)"),
        (lambda: uncertainty.sequence_scores(_probs(2, 1, 3, 4), torch.ones(1, 2).long()), "tokens are"),
        (lambda: uncertainty.sequence_scores(_probs(2, 1, 3, 4), torch.full((1, 3), 4)), r"lie in \[0, 3\]"),
        (
            lambda: uncertainty.sequence_scores(
                _probs(2, 1, 3, 4), torch.ones(1, 3).long(), torch.zeros(1, 3)
            ),
            "one True a row",
        ),
        (lambda: uncertainty.risk_coverage(torch.rand(3), torch.rand(4)), "one each"),
        (lambda: uncertainty.risk_coverage(torch.tensor([math.nan]), torch.ones(1)), "scores holds NaN"),
        (lambda: uncertainty.ood_auroc(torch.rand(3), torch.rand(0)), "out_scores has shape"),
        (lambda: uncertainty.risk_coverage_plot({}), "curves is empty"),
        (lambda: uncertainty.ood_plot({}), "scores is empty"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
