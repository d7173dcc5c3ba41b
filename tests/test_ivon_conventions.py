"""What scripts for ivon-opt read, what torch expects of an optimizer, and what is refused at construction."""

import copy
import gc
import io
import logging
import weakref

import ivon as ivon_opt
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_ivon import _model, _optimizer, _train
from tiny_lm import make_model
from torch import nn
from transformers import Trainer, TrainingArguments

from bayeslora import IVON

# ---- ivon-opt's names ----------------------------------------------------------------------------


def _groups(model):
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "hess_init": 0.5}]


@pytest.mark.parametrize("name", ["hess", "momentum"])
def test_the_state_is_read_from_the_groups_where_ivon_opt_keeps_it(name):
    model, theirs = _model(), _model()
    opt = IVON(_groups(model), lr=0.1, ess=50.0, hess_init=0.25)
    other = ivon_opt.IVON(_groups(theirs), lr=0.1, ess=50.0, hess_init=0.25)
    for group, expected in zip(opt.param_groups, other.param_groups, strict=True):
        assert torch.equal(group[name], expected[name])  # before the first sample
    _train(model, opt, 2)
    for group in opt.param_groups:
        assert torch.equal(group[name], torch.cat([opt.state[p][name].flatten() for p in group["params"]]))
    variance = 1 / (opt.param_groups[0]["ess"] * (opt.param_groups[0]["hess"] + 1e-4))
    assert (nn.Parameter(torch.ones(42)) * variance.sqrt()).sum().requires_grad


def test_what_is_read_there_cannot_be_written():
    opt = _optimizer(_model())
    group = opt.param_groups[0]
    with pytest.raises(TypeError, match=r"can only be read; write to opt.state\[p\]\['hess'\]"):
        group["hess"] = torch.ones(66)
    with pytest.raises(RuntimeError, match="inference tensor"):
        group["hess"].fill_(1.0)
    with pytest.raises(KeyError, match="variance"):
        group["variance"]


def test_it_is_no_part_of_what_is_saved_or_copied():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 1)
    saved = io.BytesIO()
    torch.save(opt, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for group in (
        opt.state_dict()["param_groups"][0],
        dict(opt.param_groups[0]),
        *copy.deepcopy(opt.param_groups),
    ):
        assert "hess" not in group and type(group) is dict
    for again in (loaded, copy.deepcopy(opt)):
        assert torch.equal(again.param_groups[0]["hess"], opt.param_groups[0]["hess"])


def test_current_step_counts_steps():
    model = _model()
    opt = _optimizer(model)
    assert opt.current_step == 0
    _train(model, opt, 3)
    assert opt.current_step == 3
    with pytest.raises(AttributeError):
        opt.current_step = 1


def test_defaults_make_the_same_optimizer():
    given = {
        "lr": 0.2,
        "ess": 30.0,
        "mc_samples": 4,
        "hess_approx": "gradsq",
        "sync": True,
        "debias": False,
        "rescale_lr": False,
        "seed": 7,
        "skip_nonfinite": False,
    }
    opt = IVON(_model().parameters(), **given)
    opt.load_state_dict(opt.state_dict())
    again = IVON(_model().parameters(), **opt.defaults)
    assert again.defaults == opt.defaults and opt.defaults.items() >= given.items()
    assert {name: getattr(again, name) for name in given if hasattr(again, name)} == {
        name: given[name] for name in given if hasattr(opt, name)
    }
    assert "mc_samples" not in opt.param_groups[0]  # it holds for all groups


def test_like_adamws_notes_are_not_printed():
    opt = IVON.like_adamw(_model().parameters(), lr=1e-3, num_data=24)
    assert "setup_" not in repr(opt) and "clip_radius" in repr(opt) and repr(opt).endswith(")")


# ---- torch's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepped", [True, False])
def test_a_refused_sparse_gradient_can_be_cleared(stepped):
    embedding = nn.Embedding(4, 3, sparse=True)
    opt = IVON(embedding.parameters(), lr=0.1, ess=1e3)
    with opt.sampled_params(train=True):
        embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        opt.step() if stepped else opt.zero_grad()
    opt.zero_grad()
    assert embedding.weight.grad is None
    embedding.sparse = False
    before = embedding.weight.detach().clone()
    with opt.sampled_params(train=True):
        embedding(torch.tensor([1])).sum().backward()
    opt.step()
    assert opt.current_step == 1 and not torch.equal(before, embedding.weight)


def test_a_refused_sparse_gradient_keeps_the_sample_of_train():
    embedding = nn.Embedding(4, 3, sparse=True)
    opt = IVON(embedding.parameters(), lr=0.1, ess=1e3)
    opt.train()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        opt.step()
    opt.zero_grad()
    embedding.sparse = False
    embedding(torch.tensor([1])).sum().backward()
    opt.step()
    assert opt.current_step == 1


def test_a_deleted_optimizer_is_freed_at_once():
    weight = nn.Parameter(torch.ones(4))
    gc.collect()
    gc.disable()
    try:
        opt = IVON([weight], lr=0.1, ess=10.0)
        opt.train()
        weight.grad = torch.ones(4)
        opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.train()
        hess = weakref.ref(opt.state[weight]["hess"])
        del opt
        assert hess() is None
    finally:
        gc.enable()


# ---- refused or said at construction -------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"hess_init": 1e39},
        {"hess_init": 1e-46},
        {"weight_decay": 1e39},
        {"ess": 1e39},
        {"lr": 1e39},
        {"clip_radius": 1e-46},
        {"ess": 10**400},
        {"ess": 1e30, "hess_init": 1e30},
        {"ess": 1e-30, "hess_init": 1e-30, "weight_decay": 0.0},
        {"beta1": 1.0},
    ],
)
def test_what_fp32_cannot_hold_is_refused(given):
    with pytest.raises(ValueError, match="must be"):
        _optimizer(_model(), **given)


def test_momentum_that_never_moves_is_taken_without_debias():
    model = _model()
    opt = _optimizer(model, beta1=1.0, debias=False)
    _train(model, opt, 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parameters_without_values_are_refused():
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(40), lora, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="on the meta device and has no values; load the weights first"):
        IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=50.0)


@pytest.mark.parametrize(
    ("asked", "trainers", "said"), [(1e-2, 0.0, True), (1e-2, 1e-2, False), (0.0, 0.0, False)]
)
def test_trainers_groups_that_leave_the_prior_flat_are_said(asked, trainers, said, tmp_path, caplog):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, weight_decay=trainers)
    model = make_model(40)
    settings = {"lr": 0.1, "ess": 50.0, "weight_decay": asked}
    with caplog.at_level(logging.WARNING, logger="bayeslora"):
        Trainer(model, arguments, optimizer_cls_and_kwargs=(IVON, settings)).create_optimizer()
    assert ("weight_decay=0 in place of 0.01" in caplog.text) == said


def test_a_group_of_ones_own_without_decay_is_not_said(caplog):
    model = _model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}]
    IVON(groups, lr=0.1, ess=50.0)
    assert not caplog.records
