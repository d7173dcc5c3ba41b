"""A training step compiled as a whole by torch.compile is the eager step, and compiles once."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from bayeslora import IVON

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))


def _run(protocol, device, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device)
    opt = IVON(model.parameters(), lr=0.1, ess=50.0, hess_init=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
    x, y = X.to(device), Y.to(device)

    def loss_and_gradients():
        opt.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    def step():
        if protocol == "closure":
            return opt.step(loss_and_gradients)
        if protocol == "train":
            opt.train()
            loss = loss_and_gradients()
        else:
            with opt.sampled_params(train=True):
                loss = loss_and_gradients()
        opt.step()
        return loss

    if backend is not None:
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(step, backend=backend)
    losses, graphs = [], []
    for _ in range(6):
        losses.append(step().cpu())
        scheduler.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return torch.stack([*losses, *[p.detach().cpu().sum() for p in model.parameters()]]), graphs


@pytest.mark.parametrize("protocol", ["train", "context", "closure"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_step_is_the_eager_step(protocol, backend, device):
    expected, _ = _run(protocol, device, None)
    got, graphs = _run(protocol, device, backend)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert 1 <= graphs[-1] == graphs[2] <= 3  # the model's: nothing of the optimizer is traced
