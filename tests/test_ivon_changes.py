"""What changes between steps is noticed by IVON's kernels: their run is the twin's, whatever happened.

The kernels keep launches, gradient tables and hyperparameters from step to step; the twin keeps nothing.
"""

import copy
import sys

import pytest
import torch
from torch import nn

import bayeslora.ivon_samples
from bayeslora import IVON
from bayeslora.kernels import ivon as kernels
from bayeslora.kernels import ivon_twin
from bayeslora.kernels.launch import Launcher

SHAPES = [(8, 8), (24,), (8, 8), (1, 8)]


class Run:
    """Parameters and their optimizer, on the kernels or on the twin."""

    def __init__(self, module, device):
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(s, generator=generator) for s in SHAPES]
        self.params = [nn.Parameter(v.to(device)) for v in values]
        self.module, self.device, self.grads = module, device, []
        self.extra = nn.Parameter(torch.ones(5, 3, device=device))
        self.opt = IVON(self.params, lr=0.05, ess=40.0, hess_init=0.5, beta2=0.9)

    def set_grads(self, step):
        generator = torch.Generator().manual_seed(step)
        for group in self.opt.param_groups:
            for p in group["params"]:
                grad = torch.randn(p.shape, generator=generator).to(self.device, p.dtype)
                if p.requires_grad and p.grad is not None:
                    p.grad.copy_(grad)  # where it was
                elif p.requires_grad:
                    p.grad = grad

    def step(self, number, monkeypatch, after_grads=lambda run: None):
        monkeypatch.setattr(bayeslora.ivon_samples, "ivon_kernels", lambda _: self.module)
        self.opt.train()
        samples = [p.detach().cpu().clone() for p in self.params]
        self.set_grads(number)
        after_grads(self)
        self.opt.step()
        return samples + [p.detach().cpu().clone() for p in [*self.params, self.extra]]


def _load_state(run):
    run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))


def _cast(run):
    for p in run.params:
        p.data = p.data.to(torch.bfloat16)
        p.grad = None


def _reshape(run):
    run.params[0].grad = None
    run.params[0].data = run.params[0].data.view(-1)[:32].view(4, 8)
    run.opt.state.pop(run.params[0])


def _scale_lr(run):
    run.opt.param_groups[0]["lr"] *= 0.3


BETWEEN = {
    "nothing": lambda run: None,
    "zero_grad to none": lambda run: run.opt.zero_grad(set_to_none=True),
    "zero_grad in place": lambda run: run.opt.zero_grad(set_to_none=False),
    "load_state_dict": _load_state,
    "cast": _cast,
    "moved": lambda run: [setattr(p, "data", p.data.clone()) for p in run.params],
    "overwritten": lambda run: run.params[1].data.fill_(2.0),
    "shorter at the same address": _reshape,
    "frozen": lambda run: (run.params[2].requires_grad_(False), setattr(run.params[2], "grad", None)),
    "group added": lambda run: run.opt.add_param_group({"params": [run.extra], "lr": 0.2}),
    "appended to a group": lambda run: run.opt.param_groups[0]["params"].append(run.extra),
    "lr": _scale_lr,
    "lr as a tensor": lambda run: run.opt.param_groups[0].update(lr=torch.tensor(0.01, device=run.device)),
    "beta2": lambda run: run.opt.param_groups[0].update(beta2=0.5),
    "unperturbed": lambda run: run.opt.param_groups[0].update(perturb=False),
}
GRADS = {
    "elsewhere": lambda run: setattr(run.params[0], "grad", run.params[0].grad.clone()),
    "absent": lambda run: setattr(run.params[0], "grad", None),
    "transposed in place": lambda run: setattr(run.params[2], "grad", run.params[2].grad.t()),
    "not finite": lambda run: run.params[3].grad.fill_(float("nan")),
}


def _compare(monkeypatch, device, between=lambda run: None, after_grads=lambda run: None):
    runs = Run(kernels, device), Run(ivon_twin, torch.device("cpu"))
    for number in range(4):
        if number == 2:
            for run in runs:
                between(run)
        changed = after_grads if number == 2 else lambda run: None
        got, expected = (run.step(number, monkeypatch, changed) for run in runs)
        for p, q in zip(got, expected, strict=True):
            assert p.dtype == q.dtype
            slack = 2**-6 if p.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(p, q, rtol=slack, atol=slack)


@pytest.mark.parametrize("change", BETWEEN)
def test_change_between_steps(change, device, monkeypatch):
    _compare(monkeypatch, device, between=BETWEEN[change])


@pytest.mark.parametrize("change", GRADS)
def test_change_of_gradients(change, device, monkeypatch):
    _compare(monkeypatch, device, after_grads=GRADS[change])


def test_address_taken_by_another_dtype(device, monkeypatch):
    """The memory of a gradient comes back as a gradient of another dtype, as an allocator would give it."""
    runs = Run(kernels, device), Run(ivon_twin, torch.device("cpu"))
    memories = [torch.zeros(128, dtype=torch.uint8, device=run.device) for run in runs]
    for number, dtype in enumerate([torch.float32, torch.float32, torch.bfloat16, torch.float32]):
        results = []
        for run, memory in zip(runs, memories, strict=True):
            p = run.params[1]
            p.grad_dtype = None
            generator = torch.Generator().manual_seed(number)

            def assign(run, p=p, dtype=dtype, generator=generator, memory=memory):
                p.grad = None
                grad = memory.view(dtype)[: p.numel()]
                grad.copy_(torch.randn(p.shape, generator=generator))
                p.grad = grad

            results.append(run.step(number, monkeypatch, assign))
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_sparse_gradient_is_an_error(device, monkeypatch):
    run = Run(kernels, device)
    run.step(0, monkeypatch)
    before = run.opt.state[run.params[0]]["momentum"].clone()

    def make_sparse(run):
        run.params[2].grad = run.params[2].grad.to_sparse()

    with pytest.raises(RuntimeError, match="dense gradients"):
        run.step(1, monkeypatch, make_sparse)
    assert torch.equal(run.opt.state[run.params[0]]["momentum"], before)


def _python_calls(count, monkeypatch):
    params = [nn.Parameter(torch.zeros(8)) for _ in range(count)]
    opt = IVON(params, lr=0.1, ess=10.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    monkeypatch.setattr(bayeslora.ivon_samples, "ivon_kernels", lambda _: kernels)
    monkeypatch.setattr(Launcher, "__call__", lambda *_: None)
    monkeypatch.setattr(Launcher, "bind", lambda *_: lambda: None)
    calls = []
    for steady in (False, False, True):
        sys.setprofile((lambda _frame, event, _arg: calls.append(event)) if steady else None)
        try:
            opt.train()
            opt.step()
        finally:
            sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in calls)


def test_steady_state_calls_nothing_per_tensor_from_python(monkeypatch):
    assert _python_calls(3, monkeypatch) == _python_calls(60, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_is_twelve_bytes_a_parameter(dtype, device):
    params = [nn.Parameter(torch.zeros(64, 32, device=device, dtype=dtype)) for _ in range(4)]
    opt = IVON(params, lr=0.1, ess=10.0)
    opt.train()
    storages = [value.untyped_storage() for p in params for value in opt.state[p].values()]
    assert sum({s.data_ptr(): s.nbytes() for s in storages}.values()) == 12 * 4 * 64 * 32
