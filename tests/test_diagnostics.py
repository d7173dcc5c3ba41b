"""diagnostics: the numbers against their definitions, through HF Trainer's log, and their plot."""

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from bayeslora import IVON, DiagnosticsCallback, diagnostics


def _trained(clip_radius=0.05, steps=5, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "perturb": False}]
    opt = IVON(groups, lr=0.1, ess=50.0, hess_init=0.3, clip_radius=clip_radius, **settings)
    x = torch.randn(32, 8)
    moves = []
    for _ in range(steps):
        before = model[0].weight.detach().clone()
        with opt.sampled_params(train=True):
            (model(x) - 1).square().mean().backward()
        opt.step()
        opt.zero_grad()
        moves.append(model[0].weight.detach() - before)
    return model, opt, x, moves[-1]


def test_numbers_are_those_of_the_state():
    model, opt, _, _ = _trained()
    found = diagnostics.diagnose(opt, model)
    weight, bias = model[0].weight, model[0].bias
    means = torch.cat([opt.state[p]["mean"].flatten() for p in (weight, bias)]).double()
    hess = torch.cat([opt.state[p]["hess"].flatten() for p in (weight, bias)]).double()
    variance = 1 / (50.0 * (hess + 1e-4))
    assert found["ivon/variance_mean"] == pytest.approx(float(variance.mean()), rel=1e-5)
    for name, q in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        assert found[f"ivon/variance_{name}"] == pytest.approx(float(variance.quantile(q)), rel=1e-5)
    assert found["ivon/snr"] == pytest.approx(float((means.abs() / variance.sqrt()).mean()), rel=1e-5)
    own = means[: weight.numel()].abs() / variance[: weight.numel()].sqrt()
    assert found["ivon/snr/0"] == pytest.approx(float(own.mean()), rel=1e-5)
    assert {name for name in found if name.startswith("ivon/snr/")} == {"ivon/snr/0", "ivon/snr/0.bias"}
    assert found["ivon/ess"] == 50.0


@pytest.mark.parametrize("debias", [True, False])
def test_clipped_is_what_the_last_step_did(debias):
    """A clipped element moved by exactly lr' · clip_radius."""
    model, opt, _, move = _trained(debias=debias, weight_decay=1e-6)
    largest = 0.1 * (0.3 + 1e-6) * 0.05
    moved = float((move.abs() >= largest * (1 - 1e-4)).sum())
    assert 0 < moved < move.numel()
    state = opt.state[model[0].bias]
    power = 1.0 - 0.9**5 if debias else 1.0
    bias = (state["momentum"] / power).abs() >= 0.05 * state["hess"]
    count = move.numel() + bias.numel()
    found = diagnostics.diagnose(opt)["ivon/clipped"]
    assert found == pytest.approx((moved + float(bias.sum())) / count)


def test_nothing_is_clipped_without_a_radius():
    _, opt, _, _ = _trained(clip_radius=math.inf)
    assert diagnostics.diagnose(opt)["ivon/clipped"] == 0.0


def test_loss_gap_is_the_difference_and_leaves_the_run_alone():
    model, opt, x, _ = _trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loss():
        return (model(x) - 1).square().mean()

    found = diagnostics.loss_gap(opt, loss, seeds=(3, 4))
    with torch.no_grad():
        assert found["ivon/loss_at_mean"] == pytest.approx(float(loss()))
        sampled = 0.0
        for seed in (3, 4):
            with opt.sampled_params(seed=seed):
                sampled += float(loss()) / 2
    assert found["ivon/loss_at_sample"] == pytest.approx(sampled)
    assert found["ivon/loss_gap"] == pytest.approx(sampled - found["ivon/loss_at_mean"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_trainer_logs_and_trains_the_same_with_it(tmp_path):
    from test_trainer import _model, _Tokens

    weights, data = [], _Tokens()
    batch = {k: torch.stack([data[i][k] for i in range(4)]) for k in ("input_ids", "labels")}
    for watched in (False, True):
        model = _model(patched=True, dropout=0.1)
        opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=1e3, hess_init=0.1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            logging_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(opt, None))
        if watched:
            trainer.add_callback(DiagnosticsCallback(trainer, batch=batch))
        trainer.train()
        weights.append([p.detach().clone() for p in opt.param_groups[0]["params"]])
    assert all(map(torch.equal, *weights))
    rows = [row for row in trainer.state.log_history if "ivon/snr" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [2, 4, 6]
    assert "ivon/loss_gap" in rows[0]
    assert any(name.endswith("q_proj.lora_A") for name in rows[0])
    figure = diagnostics.plot(trainer.state.log_history, tmp_path / "ivon.png", title="a run")
    assert (tmp_path / "ivon.png").stat().st_size > 0
    assert len(figure.axes) == 4


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_it_logs_when_trainer_does(strategy, tmp_path):
    from test_trainer import _model, _Tokens

    model, data = _model(patched=True, dropout=0.0), _Tokens()
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=1e3, hess_init=0.1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        logging_strategy=strategy,
        logging_first_step=True,
        logging_steps=2,
        per_device_train_batch_size=len(data.rows) // 2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(opt, None))
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    logged = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in trainer.state.log_history if "ivon/snr" in row] == logged
    assert logged == [1, 2, 4]


def test_what_cannot_be_measured_is_refused(tmp_path):
    opt = IVON([nn.Parameter(torch.ones(2))], lr=0.1, ess=1.0)
    opt.param_groups[0]["perturb"] = False
    with pytest.raises(ValueError, match="no state yet"):
        diagnostics.diagnose(opt)
    with pytest.raises(TypeError, match="IVON"):
        diagnostics.diagnose(torch.optim.AdamW([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="seeds is empty"):
        diagnostics.loss_gap(opt, lambda: torch.zeros(()), seeds=())
    with pytest.raises(ValueError, match="no entries"):
        diagnostics.plot([{"step": 1, "loss": 2.0}])
