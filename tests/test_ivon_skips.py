"""Skipped steps are said: the first, when there are many, at the end, with a posterior, in Trainer's logs."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from test_ivon import _loss, _model, _optimizer, _train

from bayeslora import DiagnosticsCallback, LightningCallback, PosteriorCallback, capture_step
from bayeslora.kernels.param_bucket import DRAWS, SKIPPED, STEP

pytestmark = pytest.mark.usefixtures("one_gpu")


@pytest.fixture
def said(caplog):
    """The messages so far."""
    caplog.set_level(logging.INFO, logger="bayeslora")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "bayeslora"]


def _step(model, opt, bad=False):
    opt.zero_grad()
    opt.train()
    (_loss(model) * (math.nan if bad else 1.0)).backward()
    opt.step()


def test_the_first_skipped_step_is_said_with_likely_causes(said):
    model = _model()
    opt = _optimizer(model)
    for step in range(5):
        _step(model, opt, bad=step == 2)
        assert len(said()) == (step >= 2)
    (line,) = said()
    assert "skipped 1 of 3 steps" in line
    assert "torch.backends.cuda.enable_cudnn_sdp(False)" in line and "-100" in line


def test_many_of_the_last_hundred_are_said_again_ten_times_later(said):
    model = _model()
    opt = _optimizer(model)
    for step in range(60):
        _step(model, opt, bad=step % 2 == 0)
    assert len(said()) == 2
    assert "skipped 10 of 19 steps, 10 of them in the last hundred" in said()[1]


def test_few_of_the_last_hundred_are_not_said_again(said):
    opt = _optimizer(_model())
    for _ in range(20):
        _count(opt, 99, 1)
    assert len(said()) == 1


def _count(opt, steps, skipped):
    """What a replayed graph does: count on the device, then on the host."""
    (bucket,) = opt._store.current()
    bucket.control[STEP] += steps
    bucket.control[SKIPPED] += skipped
    opt.count_step()


def test_replayed_steps_are_seen(said):
    opt = _optimizer(_model())
    _count(opt, 1, 0)
    assert said() == []
    _count(opt, 0, 1)
    assert "skipped 1 of 2 steps" in said()[0]


def test_a_grad_scalers_search_is_not_said_but_a_run_that_keeps_skipping_is(said):
    opt = _optimizer(_model())
    opt._skips.scaled = True
    _count(opt, 0, 8)  # the scale falls
    _count(opt, 500, 1)  # and is tried again
    assert said() == []
    _count(opt, 10, 4)
    assert "skipped 13 of 523 steps, 5 of them in the last hundred" in said()[0]


def test_step_knows_that_a_grad_scaler_decides(device, said):
    model = _model(device=device)
    opt = _optimizer(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    with opt.sampled_params(train=True):
        scaler.scale(_loss(model) * math.inf).backward()
    scaler.step(opt)
    scaler.update()
    assert opt.skipped_steps == 1 and said() == []


def test_a_resumed_run_says_its_own(said):
    model = _model()
    opt = _optimizer(model)
    _step(model, opt, bad=True)
    resumed = _optimizer(model)
    resumed.load_state_dict(opt.state_dict())
    _step(model, resumed)
    assert len(said()) == 1
    _step(model, resumed, bad=True)
    assert "skipped 2 of 3 steps" in said()[1]


def test_a_posterior_of_no_step_is_said(said):
    model = _model()
    opt = _optimizer(model)
    for _ in range(2):
        opt.posterior(model)
    (line,) = said()
    assert "no step was taken" in line
    _train(model, opt, 1)
    opt.posterior(model)
    assert len(said()) == 1


def test_a_posterior_of_skipped_steps_only_is_said(said):
    model = _model()
    opt = _optimizer(model)
    for _ in range(3):
        _step(model, opt, bad=True)
    opt.posterior(model)
    assert "all 3 steps were skipped" in said()[-1]


def test_a_posterior_says_skipped_steps_that_are_news(said):
    model = _model()
    opt = _optimizer(model)
    _step(model, opt)
    _step(model, opt, bad=True)
    for _ in range(2):
        opt.posterior(model)
    assert said()[1:] == ["IVON skipped 1 of 2 steps, since a gradient was NaN or infinite"]


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(said):
    model, x = torch.nn.Linear(16, 16, device="cuda"), torch.randn(8, 16, device="cuda")
    opt = _optimizer(model)
    for step in range(40):
        if step > 3:  # when everything is allocated
            torch.cuda.set_sync_debug_mode("error")
        try:
            with opt.sampled_params(train=True):
                loss = model(x).square().mean() * (math.nan if step == 7 else 1.0)
                loss.backward()
            opt.step()
            opt.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step == 20:
            torch.cuda.synchronize()
    assert "skipped 1 of" in said()[0]


@pytest.mark.gpu
def test_skipped_replays_of_a_graph_are_said(said):
    model = torch.nn.Linear(16, 16, device="cuda")
    opt = _optimizer(model)
    step = capture_step(model, opt, loss_fn=lambda module, batch: module(batch["x"]).square().mean())
    x = torch.randn(8, 16, device="cuda")
    for number in range(60):
        step({"x": x * (math.nan if number % 2 else 1.0) if number > 10 else x})
        if number % 10 == 0:
            torch.cuda.synchronize()
    assert step.captured == 1
    assert len(said()) == 2 and "of them in the last hundred" in said()[1]


@pytest.mark.parametrize("callback", ["posterior", "diagnostics"])
def test_trainer_logs_the_share_and_ends_with_the_number(callback, tmp_path, said):
    from test_trainer import _trainer

    trainer, _, opt = _trainer(
        tmp_path,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        max_steps=6,
        logging_steps=3,
        gradient_accumulation_steps=1,
        eval_strategy="no",
        save_strategy="no",
    )
    compute, calls = trainer.compute_loss, []

    def sometimes_nan(*arguments, **settings):
        calls.append(0)
        loss = compute(*arguments, **settings)
        return loss * (math.nan if len(calls) % 3 == 0 else 1.0)

    trainer.compute_loss = sometimes_nan
    trainer.add_callback(DiagnosticsCallback(trainer) if callback == "diagnostics" else PosteriorCallback())
    trainer.train()
    assert opt.skipped_steps == 2
    assert said()[-1].startswith("IVON skipped 2 of 6 steps")
    if callback == "diagnostics":
        shares = [row["ivon/skipped"] for row in trainer.state.log_history if "ivon/skipped" in row]
        assert shares == pytest.approx([1 / 3, 1 / 3])


def test_lightning_ends_with_the_number(said):
    model = _model()
    opt = _optimizer(model)
    _step(model, opt)
    _step(model, opt, bad=True)
    LightningCallback().on_train_end(SimpleNamespace(optimizers=[opt]))
    assert said()[-1].startswith("IVON skipped 1 of 2 steps")


def test_draws_end_before_those_of_evaluation(said):
    model = _model()
    opt = _optimizer(model)
    _step(model, opt)
    opt._store.current()[0].control[DRAWS] = 1 << 31
    with pytest.raises(RuntimeError, match=r"from 2\^31 on .* new IVON of another seed"):
        _step(model, opt)
    assert all(torch.equal(p, opt.state[p]["mean"]) for p in model.parameters())


def test_evaluation_draws_end_too():
    opt = _optimizer(_model())
    opt._eval_draws = (1 << 31) - 1
    with opt.sampled_params():
        pass
    with pytest.raises(RuntimeError, match="name them by seed="), opt.sampled_params():
        pass
    with opt.sampled_params(seed=1):
        pass
