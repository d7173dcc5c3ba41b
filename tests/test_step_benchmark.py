"""The benchmark of training steps: its statistics, and that it times nothing it has not checked."""

import gc

import pytest
import torch
from scipy.stats import binom
from torch import nn

import bayeslora.patching
from bayeslora import step_benchmark
from bayeslora.step_benchmark import CAPTURED, EAGER, Bench, Case, Contestant, measure, ratio, sign_interval

TOY = Case("toy", 2, 8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [1, 5, 6, 7, 20, 51, 2000])
def test_sign_interval_has_its_confidence(n):
    low, high = sign_interval(n)
    assert high == n - 1 - low
    if n >= 6:
        assert 2 * binom.cdf(low, n, 0.5) <= 0.05 < 2 * binom.cdf(low + 1, n, 0.5)
    else:
        assert low == 0


def test_ratio_pairs_rounds():
    drifting = [1.0 + i for i in range(9)]
    a = Contestant("a", lambda: None, [1.1 * t for t in drifting])
    b = Contestant("b", lambda: None, [5.0, *drifting])  # one round more, before
    assert ratio(a, b) == pytest.approx({"median": 1.1, "low": 1.1, "high": 1.1, "rounds": 9})


def test_rounds_end_when_there_are_enough():
    contestant = Contestant("a", lambda: None)
    step_benchmark.time_rounds([contestant], 60.0, fewest=3, enough=lambda: len(contestant.seconds) >= 5)
    assert len(contestant.seconds) == 5
    step_benchmark.time_rounds([contestant], 0.0, fewest=2)
    assert len(contestant.seconds) == 7


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_rounds_are_timed(enabled):
    seen = []
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        step_benchmark.time_rounds([Contestant("a", lambda: seen.append(gc.isenabled()))], 0.0, fewest=2)
        assert seen and not any(seen)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize(("mode", "names"), [("eager", EAGER), ("captured", CAPTURED)])
def test_measures_every_contestant(mode, names):
    rows = list(measure(TOY, mode, CPU, seconds=0.0, dtype=torch.float32))
    assert [row["name"] for row in rows] == list(names)
    assert all(row["milliseconds"] > 0 and row["over_peft_adamw"]["rounds"] == 7 for row in rows)
    pairs = {row["name"]: row["over_patched_adamw"]["rounds"] for row in rows if "over_patched_adamw" in row}
    assert pairs == {"patched + IVON" + (", captured" if mode == "captured" else ""): 14}


def _wrongly(model):
    patched = bayeslora.patching.patch(model)
    for name, p in patched.named_parameters():
        if "lora_A" in name:
            p.data.mul_(1.001)
    return patched


def test_wrong_layers_are_not_timed():
    bench = Bench(TOY, CPU, torch.float32)
    bench._patch = _wrongly
    with pytest.raises(RuntimeError, match="differ from PEFT"):
        bench.check_layers()


def test_wrong_optimizer_is_not_timed(monkeypatch):
    monkeypatch.setitem(step_benchmark._IVON, "beta1", 0.91)
    with pytest.raises(AssertionError):
        list(measure(TOY, "eager", CPU, seconds=0.0, dtype=torch.float32))


def test_capture_that_goes_astray_is_not_timed():
    bench = Bench(TOY, CPU, torch.float32)
    contestant = bench.contestant("patched + IVON, captured")
    with pytest.raises(RuntimeError, match="does not follow"):
        bench._check_captured(contestant, [1.0, 1.1], [1.0, 1.2])


def test_row_without_room_for_pefts_graph(monkeypatch):
    monkeypatch.setattr(Bench, "has_room_beside", lambda self, eager: eager.name != "PEFT + AdamW")
    rows = list(measure(TOY, "captured", CPU, seconds=0.0, dtype=torch.float32))
    assert [row["name"] for row in rows] == list(CAPTURED[:3])


def test_contestants_share_the_frozen_weights_only():
    bench = Bench(TOY, CPU, torch.float32)
    first, second = bench.model(patched=True), bench.model(patched=False)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert isinstance(p, nn.Parameter)
        assert (p is q) != p.requires_grad


def test_unknown_shape():
    with pytest.raises(ValueError, match="SmolLM2-135M"):
        Bench(Case("llama", 1, 1), CPU)
