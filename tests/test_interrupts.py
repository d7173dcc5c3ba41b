"""Ctrl-C at any bytecode of a prediction leaves the mean in the model, its mode, and no lock held."""

import sys
from pathlib import Path

import pytest
import torch
from monteclora_models import patched_model
from peft import LoraConfig, get_peft_model
from tiny_lm import make_model

import bayeslora
from bayeslora import IVON, Posterior, patch
from bayeslora.lora_samples import OPEN
from bayeslora.reversible import LOCK, use_of

PACKAGE = str(Path(bayeslora.__file__).parent)
PROMPT = torch.randint(3, 20, (1, 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def posterior():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.1)
    model = patch(get_peft_model(make_model(20), config))
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=50.0)
    return Posterior.from_optimizer(model.train(), opt)


def _bytecodes(call, stop_at=None):
    """Call, with an interrupt before a bytecode of the package's; return the bytecodes there were."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        code = frame.f_code
        if not code.co_filename.startswith((PACKAGE, __file__)) or code.co_name == "__del__":
            return None  # what is raised in __del__ goes nowhere
        frame.f_trace_opcodes = True
        count += event == "opcode"
        if event == "opcode" and count == stop_at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def _state(model):
    use = use_of(model)
    return {
        "parameters": [p.detach().clone() for p in model.parameters() if p.requires_grad],
        "training": [module.training for module in model.modules()],
        "grad": torch.is_grad_enabled(),
        "passes": OPEN.any or bool(OPEN.by_thread),
        "users": len(use.users) + len(use.training),
        "locks": use.writing._is_owned() or LOCK._is_owned(),
    }


def _use(posterior, seed=3):
    with posterior.sample(seed):
        posterior.model(PROMPT)


CALLS = {
    "sample": (100, _use),
    "in turn": (100, lambda p: p.predict(PROMPT, 2)),
    "one pass": (40, lambda p: p.predict(PROMPT, 2, batched=True)),
    "generate": (15, lambda p: p.generate(PROMPT, 2, max_new_tokens=1)),
    "generate in turn": (30, lambda p: p.generate(PROMPT, 2, max_new_tokens=1, batched=False)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_bytecode_leaves_the_model_as_it_was(name, posterior):
    places, use = CALLS[name]

    def call():
        posterior._orders.__init__()  # with the probe
        use(posterior)

    expected = _state(posterior.model)
    call()
    total = _bytecodes(call)
    for stop_at in range(total % 7 + 1, total, max(1, total // places)):
        assert _bytecodes(call, stop_at) <= total
        found = _state(posterior.model)
        assert all(map(torch.equal, found.pop("parameters"), expected["parameters"])), stop_at
        assert found == {name: value for name, value in expected.items() if name != "parameters"}, stop_at


@pytest.mark.parametrize("name", ["sample", "in turn", "generate in turn"])
def test_a_second_interrupt_does_not_cut_the_restoring_short(name, posterior, monkeypatch):
    restore, calls = torch._foreach_copy_, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(*args)

    def stop(*_):
        raise KeyboardInterrupt

    expected = _state(posterior.model)
    handle = posterior.model.register_forward_pre_hook(stop)
    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CALLS[name][1](posterior)
    handle.remove()
    found = _state(posterior.model)
    assert all(map(torch.equal, found.pop("parameters"), expected.pop("parameters")))
    assert found == expected and len(calls) == 2


def test_an_interrupted_monteclora_sample_is_taken_out():
    model = patched_model().eval()
    posterior = Posterior.from_monteclora(model)

    def call():
        with posterior.sample(3):
            pass

    expected = _state(model), posterior._bank.paused
    total = _bytecodes(call)
    for stop_at in range(1, total, total // 60):
        _bytecodes(call, stop_at)
        found = _state(model)
        assert all(map(torch.equal, found["parameters"], expected[0]["parameters"])), stop_at
        assert (found["locks"], posterior._bank.paused) == (expected[0]["locks"], expected[1]), stop_at
