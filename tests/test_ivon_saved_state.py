"""A saved state of IVON's is loaded as it was saved, or refused with one line before anything is changed."""

import copy
import math

import pytest
import torch
from test_ivon import _equal, _loss, _model, _optimizer, _train, _values
from torch import nn

from bayeslora import IVON


@pytest.fixture(scope="module")
def saved():
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 2)
    return opt.state_dict()


def _group(**changes):
    return lambda state: state["param_groups"][0].update(changes)


def _without(name):
    return lambda state: state["param_groups"][0].pop(name)


def _tensor(key, change):
    def apply(state):
        state["state"][1][key] = change(state["state"][1][key].clone())

    return apply


def _filled(value):
    return lambda tensor: tensor.index_fill_(0, torch.tensor([2]), value)


MUTATIONS = {
    "ess is negative": (_group(ess=-1.0), "group 0: ess must be"),
    "ess is text": (_group(ess="50"), "group 0: ess must be a number"),
    "ess is a list": (_group(ess=[50.0]), "group 0: ess must be a number"),
    "ess is too large": (_group(ess=1e39), "group 0: ess must be"),
    "beta2 is out of range": (_group(beta2=5.0), "group 0: beta2 must be"),
    "beta1 is 1": (_group(beta1=1.0), "group 0: beta1 must be less than 1 with debias"),
    "lr is NaN": (_group(lr=math.nan), "group 0: lr must be"),
    "lr is two numbers": (_group(lr=torch.ones(2)), "group 0: lr must be a number"),
    "weight_decay is infinite": (_group(weight_decay=math.inf), "group 0: weight_decay must be"),
    "step is negative": (_group(step=-1), "group 0: step must be"),
    "step is a fraction": (_group(step=1.5), "group 0: step must be"),
    "skipped is true": (_group(skipped=True), "group 0: skipped must be"),
    "draws are those of evaluation": (_group(draws=1 << 31), "group 0: draws must be"),
    "eval_draws are used up": (_group(eval_draws=1 << 31), "group 0: eval_draws must be"),
    "seed has 65 bits": (_group(seed=1 << 64), "group 0: seed must be"),
    "beta1_power is NaN": (_group(beta1_power=math.nan), "group 0: beta1_power must be"),
    "held is cut": (_group(held=[1]), "group 0: held must be"),
    "held is text": (_group(held=["1", 1, 1.0, True]), "group 0: held must be"),
    "perturb is text": (_group(perturb="False"), "group 0: perturb must be"),
    "a name is twice": (_group(params=[0, 1, 2, 2]), "names a parameter twice"),
    "params is a number": (_group(params=4), "group 0: params must be"),
    "a setup field alone": (_group(setup_step=3, setup_seen=3.0), "'step_lr' of like_adamw is missing"),
    "step_lr is infinite": (_group(step_lr=math.inf), "group 0: step_lr is out of range"),
    "draws are missing": (_without("draws"), "without 'draws': it is not from bayeslora.IVON"),
    "perturb is missing": (_without("perturb"), "group 0: perturb must be"),
    "held is missing": (_without("held"), "without 'held': it is not from bayeslora.IVON"),
    "a state is missing": (lambda s: s["state"].pop(2), "has states of 3 parameters, saved were 4"),
    "a state has another name": (
        lambda s: s["state"].update({"2": s["state"].pop(2)}),
        "has states of 3 parameters, saved were 4",
    ),
    "a state is a list": (lambda s: s["state"].update({1: [1]}), "of parameter 1 has no 'mean'"),
    "mean is a list": (_tensor("mean", lambda t: t.tolist()), "'mean' of parameter 1 must be a dense tensor"),
    "mean is sparse": (_tensor("mean", lambda t: t.to_sparse()), "'mean' of parameter 1 must be a dense"),
    "mean is on meta": (_tensor("mean", lambda t: t.to("meta")), "must be a dense tensor, got .* on meta"),
    "mean is bf16": (
        _tensor("mean", lambda t: t.bfloat16()),
        "must be float32 or float64, got torch.bfloat16",
    ),
    "mean is whole numbers": (_tensor("mean", lambda t: t.long()), "must be float32 or float64"),
    "mean is too large": (_tensor("mean", lambda t: t.double() + 1e39), "'mean' of parameter 1 holds NaN or"),
    "momentum is NaN": (_tensor("momentum", _filled(math.nan)), "'momentum' of parameter 1 holds NaN"),
    "hess is NaN": (_tensor("hess", _filled(math.nan)), "'hess' of parameter 1 holds NaN"),
    "hess is infinite": (_tensor("hess", _filled(math.inf)), "'hess' of parameter 1 holds NaN or infinity"),
    "hess is minus weight_decay": (_tensor("hess", _filled(-1e-4)), "'hess' of parameter 1 gives precisions"),
    "hess is huge": (_tensor("hess", _filled(1e38)), "'hess' of parameter 1 gives precisions"),
    "hess has another shape": (_tensor("hess", lambda t: t[:-1]), "'hess' of parameter 1 has shape"),
    "groups are a dict": (lambda s: s.update(param_groups={}), "must be a list of dicts"),
    "groups are none": (lambda s: s.update(param_groups=[]), "must be a list of dicts"),
    "a group is a list": (lambda s: s.update(param_groups=[[]]), "must be a list of dicts"),
    "state is a list": (lambda s: s.update(state=[]), r"state_dict\['state'\] must be a dict"),
    "state is missing": (lambda s: s.pop("state"), r"state_dict\['state'\] must be a dict"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_state_is_refused_and_changes_nothing(mutation, saved):
    change, message = MUTATIONS[mutation]
    state = copy.deepcopy(saved)
    change(state)
    model, twin = _model(), _model()
    opts = _optimizer(model, seed=9), _optimizer(twin, seed=9)
    for m, o in zip((model, twin), opts, strict=True):
        _train(m, o, 1)
        o.train()  # a sample is in the parameters
    with pytest.raises(ValueError, match=message):
        opts[0].load_state_dict(state)
    assert _equal(_values(model), _values(twin))
    for m, o in zip((model, twin), opts, strict=True):
        _loss(m).backward()
        o.step()
    assert _equal(_values(model), _values(twin))


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="state_dict must be a dict, got list"):
        _optimizer(_model()).load_state_dict([])


def test_equal_in_meaning_is_loaded(saved):
    """fp64 copies of the tensors, names for numbers, the hyperparameters of a new optimizer."""
    runs = []
    for change in ("none", "fp64", "names", "groups"):
        state = copy.deepcopy(saved)
        if change == "fp64":
            state["state"] = {i: {k: v.double() for k, v in s.items()} for i, s in state["state"].items()}
        elif change == "names":
            state["param_groups"][0]["params"] = list("abcd")
            state["state"] = {"abcd"[i]: s for i, s in state["state"].items()}
        model = _model()
        opt = _optimizer(model)
        if change == "groups":
            counters = {
                k: v for k, v in saved["param_groups"][0].items() if k in ("step", "draws", "beta1_power")
            }
            state["param_groups"] = [opt.state_dict()["param_groups"][0] | counters]
        opt.load_state_dict(state)
        _train(model, opt, 1)
        runs.append(_values(model))
        assert {v.dtype for p in model.parameters() for v in opt.state[p].values()} == {torch.float32}
    assert all(_equal(runs[0], run) for run in runs[1:])


def test_a_negative_hessian_within_the_weight_decay_is_loaded(saved):
    """IVON learns such: h + weight_decay is what must be positive."""
    state = copy.deepcopy(saved)
    state["param_groups"][0]["weight_decay"] = 0.5
    state["state"][1]["hess"].fill_(-0.25)
    model = _model()
    opt = _optimizer(model)
    opt.load_state_dict(state)
    assert opt.state[list(model.parameters())[1]]["hess"].eq(-0.25).all()


def test_the_notes_of_like_adamw_are_checked():
    model = _model()
    opt = IVON.like_adamw(model.parameters(), lr=1e-3, num_data=24)
    _train(model, opt, 2)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for name in [name for name in opt.param_groups[0] if name.startswith(("setup_", "step_lr"))]:
        for value in (math.nan, "1", None):
            state = copy.deepcopy(opt.state_dict())
            state["param_groups"][0][name] = value
            with pytest.raises(ValueError, match=f"group 0: {name} is out of range"):
                opt.load_state_dict(state)
        del state["param_groups"][0][name]
        with pytest.raises(ValueError, match=f"group 0: '{name}' of like_adamw is missing"):
            opt.load_state_dict(state)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["perturb"] = False
    with pytest.raises(ValueError, match="like_adamw needs a perturbed group"):
        opt.load_state_dict(state)


# ---- torch's conventions -------------------------------------------------------------------------


def test_entries_of_no_parameter_survive(saved):
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 1)
    opt.state["note"] = 3
    other = _optimizer(_model())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.state["note"] == 3
    other.load_state_dict(saved)
    assert "note" not in other.state


def test_the_first_step_of_a_distributed_checkpoint_may_find_such_an_entry():
    """torch.distributed.checkpoint asks for the state by a step at learning rate 0."""
    opt = _optimizer(_model(), lr=0.0)
    opt.state["note"] = 3
    opt.step()
    assert len(opt.state_dict()["state"]) == 5


def test_a_pre_hook_adapts_what_is_loaded_before_it_is_checked():
    def widen(_opt, state):
        state["param_groups"] = copy.deepcopy(state["param_groups"])
        state["param_groups"][0]["params"] = [0, 1]
        return {**state, "state": {0: state["state"][0], 1: state["state"][0]}}

    one = nn.Parameter(torch.ones(3))
    opt = IVON([one], lr=0.1, ess=10.0)
    opt.train()
    one.grad = torch.ones(3)
    opt.step()
    two = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    new = IVON(two, lr=0.1, ess=10.0)
    new.register_load_state_dict_pre_hook(widen)
    given = opt.state_dict()
    new.load_state_dict(given)
    assert all(torch.equal(new.state[p]["momentum"], opt.state[one]["momentum"]) for p in two)
    assert given["param_groups"][0]["params"] == [0]  # hooks get a copy


def test_a_post_hook_sees_and_keeps_the_loaded_state(saved):
    opt = _optimizer(_model())
    seen = []

    def note(opt):
        seen.append((len(opt.state), opt.skipped_steps, opt.current_step))
        opt.state["mark"] = 1

    opt.register_load_state_dict_post_hook(note)
    opt.load_state_dict(saved)
    assert seen == [(4, 0, 2)] and opt.state["mark"] == 1


def test_hooks_of_state_dict_run(saved):
    opt = _optimizer(_model())
    opt.load_state_dict(saved)
    opt.register_state_dict_pre_hook(lambda opt: opt.state.update(before=1))
    opt.register_state_dict_post_hook(lambda _opt, state: {**state, "after": 2})
    state = opt.state_dict()
    assert state["state"]["before"] == 1 and state["after"] == 2


def test_names_of_parameters_are_kept_as_torch_keeps_them(saved):
    model = _model()
    opt = IVON(model.named_parameters(), lr=0.1, ess=50.0)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


# ---- weights saved at a sample -------------------------------------------------------------------


def _saved_at_a_sample(dtype, nudged):
    """Weights and state saved inside a step, with ``nudged`` elements rounded to the other side."""
    weight = nn.Parameter(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(dtype))
    opt = IVON([weight], lr=0.1, ess=1e4, hess_init=0.1)
    mean = weight.detach().clone()
    opt.train()
    sample = weight.detach().clone()
    bits = sample.view(torch.int16)
    bits[:nudged] += 1  # the next number away from zero
    return mean, sample, copy.deepcopy(opt.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("nudged", "known"), [(3, True), (2_000, False)])
def test_a_half_precision_sample_of_another_device_is_known(dtype, nudged, known):
    """Devices differ in the last bits of the noise, and now and then a sample is rounded the other way."""
    mean, sample, state = _saved_at_a_sample(dtype, nudged)
    weight = nn.Parameter(sample.clone())
    opt = IVON([weight], lr=0.1, ess=1e4, hess_init=0.1)
    opt.load_state_dict(state)
    opt.eval()
    assert torch.equal(weight, mean if known else sample)
