"""IVON.like_adamw: its equations, what it decides from gradients, resume, logs, refusals."""

import copy
import importlib
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from bayeslora import IVON, capture_step
from bayeslora.ivon_setup import choose

CHOSEN = ("ess", "hess_init", "clip_radius")


class Quadratic(nn.Module):
    """Loss ½ Σ c (θ - target)² + noise · θ: curvature and gradient noise are known."""

    def __init__(self, size=4096, curvature=0.02, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.1 * torch.randn(size, generator=generator))
        self.curvature, self.scale, self.generator = curvature, scale, torch.Generator().manual_seed(1)

    def forward(self):
        noise = 0.01 * torch.randn(self.weight.shape, generator=self.generator)
        loss = (0.5 * self.curvature * self.weight.square() + noise * self.weight).sum()
        return self.scale * loss


def run(model, opt, steps):
    for _ in range(steps):
        with opt.sampled_params(train=True):
            model().backward()
        opt.step()
        opt.zero_grad()


def like_adamw(model, **settings):
    settings = {"lr": 1e-4, "num_data": 10, "max_gap": 1e3, **settings}
    return IVON.like_adamw(model.parameters(), **settings)


@pytest.mark.parametrize(
    ("ess", "hess", "beta2", "grad"),
    [
        (5e5, 5e-3, 0.9998, 1e-2),
        (1e7, 5e-3, 0.99999, 1e-2),
        (5e6, 5e-3, 0.9998, 3e-3),
        (1e7, 3e-4, 0.99999, 2.5e-3),
    ],
)
def test_the_papers_recipes_solve_the_equations(ess, hess, beta2, grad):
    """At the posterior width of each recipe, one gradient scale gives both its ess and its Hessian."""
    settings = {"num_data": 1e3, "beta2": beta2, "weight_decay": 1e-6, "clip_ratio": 0.03}
    found = choose(ess * (hess + 1e-6), grad**2, 0.0, **settings)
    assert found.ess == pytest.approx(ess, rel=0.2)
    assert found.hess_init == pytest.approx(hess, rel=0.2)


@pytest.mark.parametrize("curvature", [0.0, 1e-3, 0.5])
def test_choice_gives_the_precision_and_a_hessian_that_stays(curvature):
    precision, grad_sq, beta2, decay = 2500.0, 1e-4, 0.999, 1e-3
    found = choose(
        precision, grad_sq, curvature, num_data=1.0, beta2=beta2, weight_decay=decay, clip_ratio=0.1
    )
    assert found.ess * (found.hess_init + decay) == pytest.approx(precision)
    drift = (1 - beta2) * (curvature - found.hess_init) + 0.5 * (1 - beta2) ** 2 * grad_sq * found.ess
    assert abs(drift) < 1e-9 * found.hess_init
    assert found.clip_radius * found.hess_init == pytest.approx(0.1 * math.sqrt(grad_sq))


def test_ess_is_at_least_the_number_of_examples():
    found = choose(10.0, 1e-4, 1.0, num_data=5e4, beta2=0.999, weight_decay=0.0, clip_ratio=0.1)
    assert found.ess == 5e4


def test_curvature_is_found_and_the_mean_hessian_stays():
    model = Quadratic()
    opt = like_adamw(model, beta2=0.99, lr=1e-6, snr=2.0)
    run(model, opt, 10)
    group = opt.param_groups[0]
    assert group["setup_curvature"] / 10 == pytest.approx(0.02, rel=0.1)
    std = 1 / math.sqrt(group["ess"] * (group["hess_init"] + 1e-6))
    signal = float(model.weight.detach().square().mean().sqrt())
    assert signal / std == pytest.approx(2.0, rel=1e-2)
    run(model, opt, 60)
    assert float(opt.state[model.weight]["hess"].mean()) == pytest.approx(group["hess_init"], rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"step_ratio": 0.25}])
def test_largest_step_is_a_fraction_of_the_learning_rate(settings):
    model = Quadratic()
    opt = like_adamw(model, lr=3e-3, clip_ratio=1e-3, **settings)
    largest = 3e-3 * settings.get("step_ratio", 0.7)
    for _ in range(12):
        before = model.weight.detach().clone()
        run(model, opt, 1)
        assert float((model.weight.detach() - before).abs().max()) == pytest.approx(largest, rel=1e-3)


def test_the_loss_may_be_in_any_unit():
    """A loss times a thousand gives the same trajectory, as with AdamW."""
    weights = []
    for scale in (1.0, 1000.0):
        model = Quadratic(scale=scale)
        opt = like_adamw(model, weight_decay=0.0, max_gap=1e9, num_data=1)
        run(model, opt, 15)
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_after_setup_it_is_the_ivon_of_the_chosen_values():
    model = Quadratic()
    opt = like_adamw(model, seed=5)
    run(model, opt, 10)
    group = opt.param_groups[0]
    twin = copy.deepcopy(model)
    plain = IVON(
        twin.parameters(),
        lr=0.7 * 1e-4 / group["clip_radius"],
        beta2=group["beta2"],
        weight_decay=group["weight_decay"],
        rescale_lr=False,
        seed=5,
        **{name: group[name] for name in CHOSEN},
    )
    saved = opt.state_dict()
    counters = {name: saved["param_groups"][0][name] for name in ("step", "skipped", "draws", "beta1_power")}
    fresh = plain.state_dict()
    fresh["param_groups"][0] |= counters
    plain.load_state_dict({"state": saved["state"], "param_groups": fresh["param_groups"]})
    twin.generator.set_state(model.generator.get_state())
    for m, o in ((model, opt), (twin, plain)):
        run(m, o, 8)
    torch.testing.assert_close(twin.weight, model.weight, rtol=1e-6, atol=1e-9)


def test_both_protocols_and_closures_decide_alike():
    chosen = []
    for protocol in ("context", "train", "closure"):
        model = Quadratic()
        opt = like_adamw(model)
        for _ in range(12):
            if protocol == "context":
                run(model, opt, 1)
            elif protocol == "train":
                opt.train()
                model().backward()
                opt.step()
                opt.zero_grad()
            else:
                opt.zero_grad()
                opt.step(lambda model=model: model().backward())
        chosen.append([opt.param_groups[0][name] for name in CHOSEN])
    assert chosen[0] == pytest.approx(chosen[1])
    assert chosen[0] == pytest.approx(chosen[2])


def test_a_group_added_after_a_resume_begins_with_what_was_chosen(caplog):
    """Also with the ess that a later look has raised."""
    model = Quadratic(curvature=0.02)
    run(model, first := like_adamw(model, max_gap=0.5), 12)
    model.curvature = 2.0
    run(model, first, 12)
    assert "ess raised" in caplog.text
    resumed = like_adamw(Quadratic())
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for opt in (first, resumed):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
        for name in (*CHOSEN, "step_lr"):
            assert opt.param_groups[1][name] == first.param_groups[0][name], name


@pytest.mark.parametrize("stop", [4, 10, 22])
def test_resume_is_exact(stop):
    """In the setup, at its end, and inside a later window of watched steps (20 to 23)."""
    straight = Quadratic()
    run(straight, opt := like_adamw(straight, snr=2.0), 30)
    model = Quadratic()
    run(model, first := like_adamw(model, snr=2.0), stop)
    resumed = Quadratic()
    resumed.load_state_dict(model.state_dict())
    resumed.generator.set_state(model.generator.get_state())
    second = like_adamw(resumed, snr=2.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(resumed, second, 30 - stop)
    assert torch.equal(resumed.weight, straight.weight)
    for name in CHOSEN:
        assert second.param_groups[0][name] == opt.param_groups[0][name]


def test_it_logs_what_it_chose_and_why(caplog):
    model = Quadratic()
    opt = like_adamw(model)
    with caplog.at_level(logging.INFO, logger="bayeslora"):
        run(model, opt, 11)
    (text,) = [r.getMessage() for r in caplog.records]
    for name in CHOSEN:
        assert f"{name} {opt.param_groups[0][name]:.4g}" in text
    assert "|weight|/std 0.5" in text and "mean curvature" in text


def test_a_loss_under_sampling_that_departs_raises_ess_at_once(caplog):
    """½ Σ c σ² at snr 0.5 is 0.5 · 4096 · 5 · 0.04 = 410 nats; max_gap brings it to 1."""
    model = Quadratic(curvature=5.0)
    opt = like_adamw(model, max_gap=1.0)
    with caplog.at_level(logging.INFO, logger="bayeslora"):
        run(model, opt, 10)
    group = opt.param_groups[0]
    gap = 0.5 * 4096 * 5.0 / (group["ess"] * (group["hess_init"] + 1e-6))
    assert gap == pytest.approx(1.0, rel=0.1)
    assert "a sample's loss was" in caplog.text


def test_ess_is_raised_later_when_the_loss_becomes_sharper(caplog):
    model = Quadratic(curvature=1e-3)
    opt = like_adamw(model, max_gap=1.0)
    run(model, opt, 19)
    before = opt.param_groups[0]["ess"]
    model.curvature = 1.0
    with caplog.at_level(logging.WARNING, logger="bayeslora"):
        run(model, opt, 6)
    group = opt.param_groups[0]
    assert group["ess"] > 5 * before
    hess = opt.state[model.weight]["hess"]
    assert float(0.5 * (1.0 / (group["ess"] * (hess + 1e-6))).sum()) == pytest.approx(1.0, rel=0.3)
    assert "ess raised to" in caplog.text


def test_watched_steps_are_few():
    opt = like_adamw(Quadratic())
    head = opt.param_groups[0]
    head["setup_seen"] = 10
    watched = []
    for step in range(1000):
        head["setup_step"] = step
        if opt.watches_next_step:
            watched.append(step)
    windows = [w for start in (20, 40, 80, 160, 320, 640) for w in range(start, start + 4)]
    assert watched == [*range(10), *windows]


def test_a_step_with_nan_decides_nothing():
    model = Quadratic()
    opt = like_adamw(model)
    with opt.sampled_params(train=True):
        (model() * math.nan).backward()
    opt.step()
    opt.zero_grad()
    assert opt.param_groups[0]["setup_seen"] == 0 and opt.skipped_steps == 1
    run(model, opt, 10)
    assert opt.param_groups[0]["setup_seen"] == 10
    assert torch.isfinite(model.weight).all()


def test_a_head_outside_the_posterior_is_trained_by_its_own_gradients():
    body, head = Quadratic(), nn.Parameter(torch.zeros(8))
    groups = [{"params": body.parameters()}, {"params": [head], "perturb": False}]
    opt = IVON.like_adamw(groups, lr=1e-3, num_data=10, max_gap=1e3)
    for _ in range(12):
        with opt.sampled_params(train=True):
            (body() + (head - 1).square().sum()).backward()
        opt.step()
        opt.zero_grad()
    assert float(head.detach()[0]) == pytest.approx(0.7 * 12e-3, rel=1e-3)
    alone = like_adamw(twin := Quadratic(), lr=1e-3)
    run(twin, alone, 12)
    assert opt.param_groups[0]["ess"] == pytest.approx(alone.param_groups[0]["ess"], rel=1e-6)


def test_lora_under_hf_trainer_with_a_scheduler(tmp_path):
    from test_trainer import _model, _Tokens

    model = _model(patched=True, dropout=0.0)
    opt = IVON.like_adamw([p for p in model.parameters() if p.requires_grad], lr=1e-3, num_data=160)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=14,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=_Tokens(), optimizers=(opt, None)).train()
    group = opt.param_groups[0]
    assert group["setup_step"] == 14 and group["setup_seen"] == 10
    assert group["initial_lr"] == 1e-3 and group["lr"] < 1e-3
    assert group["ess"] >= 160 and group["clip_radius"] != 1.0


def test_capture_step_goes_the_same_way(device):
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(16, 16).to(device)
        opt = IVON.like_adamw(model.parameters(), lr=1e-3, num_data=100)
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(device)

        def loss_fn(module, batch):
            return (module(batch["x"]) - 1).square().mean()

        step = capture_step(model, opt, loss_fn=loss_fn)
        for _ in range(26):
            if captured:
                step({"x": x})
            else:
                with opt.sampled_params(train=True):
                    loss_fn(model, {"x": x}).backward()
                opt.step()
                opt.zero_grad()
        assert opt.param_groups[0]["setup_step"] == 26
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snr": 0.0}, "snr must be"),
        ({"clip_ratio": math.inf}, "clip_ratio must be"),
        ({"max_gap": -1.0}, "max_gap must be"),
        ({"num_data": 0}, "num_data must be"),
        ({"setup_steps": 0}, "setup_steps must be"),
        ({"step_ratio": 0.0}, "step_ratio must be"),
        ({"ess": 10.0}, "chooses ess itself"),
        ({"hess_approx": "gradsq"}, "hess_approx='price'"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_bad_inputs_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        like_adamw(Quadratic(), **settings)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_groups_own_value_of_what_is_chosen_is_refused(name):
    """It would be overwritten at the first step."""
    with pytest.raises(ValueError, match=f"chooses {name} itself, also for a group"):
        IVON.like_adamw([{"params": [nn.Parameter(torch.ones(4))], name: 0.125}], lr=1e-3, num_data=10)


def test_all_zero_parameters_are_refused():
    with pytest.raises(ValueError, match="all zero"):
        IVON.like_adamw([nn.Parameter(torch.zeros(4))], lr=1e-3, num_data=10)


def test_the_script_that_measures_steps_beside_adamws(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))
    script = importlib.import_module("like_adamw_steps")
    file = tmp_path / "rows.json"
    script.main(["--lr", "0.01", "--seeds", "1", "--steps", "14", "--out", str(file)])
    steps = {row["name"]: row["step"] for row in json.loads(file.read_text())}
    assert steps["AdamW"] < 0.6 < steps["like_adamw, step_ratio 1"]
    assert steps["like_adamw, step_ratio 0.4"] == pytest.approx(0.38, abs=0.03)
    assert capsys.readouterr().out.count("0 of 1 diverged") == 4
