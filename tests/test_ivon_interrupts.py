"""Ctrl-C at any point of IVON's protocols: the mean comes back bit for bit; no sample becomes the mean."""

import copy
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bayeslora
from bayeslora import IVON
from bayeslora.kernels import ivon_twin

OWN = str(Path(bayeslora.__file__).parent), str(Path(ivon_twin.__file__).parent)
STRIDE = 61  # every how many bytecodes an interrupt is placed; 1 is the whole campaign, of some minutes


def _made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3).bfloat16(), nn.Linear(3, 2).double())  # two buckets
    opt = IVON(model.parameters(), lr=0.1, ess=50.0, hess_init=0.25, seed=5)
    for _ in range(2):
        with opt.sampled_params(train=True):
            _loss(model).backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():  # weights that no sample has adopted yet
        model[0].weight.fill_(0.5)
    return model, opt


def _loss(model):
    x = torch.ones(2, 4, dtype=model[0].weight.dtype)
    return model[1](model[0](x).double()).square().sum()


def _context(model, opt):
    with opt.sampled_params(train=True):
        pass


def _evaluation(model, opt):
    with opt.sampled_params(seed=3):
        pass


def _inside_a_step(model, opt):
    opt.train()
    with opt.sampled_params(seed=3):
        pass
    opt.eval()


def _step(model, opt):
    opt.train()
    _loss(model).backward()
    opt.step()


def _two_samples(model, opt):
    for _ in range(2):
        with opt.sampled_params(train=True):
            _loss(model).backward()
    opt.step()


def _closure(model, opt):
    opt.step(lambda: _loss(model).backward())


PROTOCOLS = [_context, _evaluation, _inside_a_step, _step, _two_samples, _closure]


class _Interrupt:
    """Raises KeyboardInterrupt at the n-th bytecode of bayeslora's own frames; ``None`` only counts them."""

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, _event, _arg):
        file = frame.f_code.co_filename
        if not file.startswith(OWN) or file.endswith("noise_twin.py"):  # of which there are most, all alike
            return None
        frame.f_trace_opcodes = True
        return self._opcode

    def _opcode(self, _frame, event, _arg):
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._opcode


def _weights(model):
    return [p.detach().clone() for p in model.parameters()]


def _means(opt):
    """Return the means of the next sample: where a weight is not the state's, the weight."""
    return [gaussian.mean for _, gaussian in opt.gaussians()]


def _same(values, *expected):
    return all(
        any(map(torch.equal, [value] * len(e), e)) for value, *e in zip(values, *expected, strict=True)
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_mean_comes_back_after_an_interrupt_at_any_bytecode(protocol):
    start = _made()
    before = _weights(start[0]), _means(copy.deepcopy(start)[1])
    model, opt = copy.deepcopy(start)
    with _Interrupt() as trace:
        protocol(model, opt)
    after = _weights(model), _means(opt)
    for at in range(1 + PROTOCOLS.index(protocol), trace.count, STRIDE):
        model, opt = copy.deepcopy(start)
        with pytest.raises(KeyboardInterrupt), _Interrupt(at):
            protocol(model, opt)
        if protocol not in (_context, _evaluation):  # whose exit does it
            opt.eval()
        assert _same(_weights(model), before[0], after[0]), at
        assert _same(_means(opt), before[1], after[1]), at


@pytest.fixture
def sigint():
    """Python's own handler, also where the tests run in the background of a shell, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_a_second_interrupt_waits_until_the_mean_is_back(monkeypatch):
    model, opt = _made()
    before = _weights(model)
    restore, calls = ivon_twin.ivon_restore, []

    def interrupted(bucket):
        calls.append(bucket)
        signal.raise_signal(signal.SIGINT)
        restore(bucket)

    monkeypatch.setattr(ivon_twin, "ivon_restore", interrupted)
    with pytest.raises(KeyboardInterrupt), opt.sampled_params(train=True):
        assert not _same(_weights(model), before)
    assert len(calls) == 3  # the first was cut short; then both buckets were restored
    assert _same(_weights(model), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_goes_on_after_an_interrupted_sample(monkeypatch):
    """Without eval(): the sample is drawn anew."""
    runs = []
    for interrupt in (False, True):
        model, opt = _made()
        if interrupt:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(ivon_twin, "_scatter", _cut_short(ivon_twin._scatter))
                opt.train()
        _step(model, opt)
        runs.append(_weights(model))
    assert _same(*runs)


def _cut_short(function):
    def interrupted(*arguments):
        function(*arguments)
        raise KeyboardInterrupt

    return interrupted
