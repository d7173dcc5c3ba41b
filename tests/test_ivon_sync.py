"""``IVON(sync=True)``: every rank draws its own sample, and the step averages over ranks."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bayeslora import IVON
from bayeslora.kernels import ivon_twin
from bayeslora.kernels.param_bucket import ParamBucket

SETTINGS = {"lr": 0.1, "ess": 50.0, "hess_init": 0.25, "rescale_lr": False}
SEED = 5


def _weight():
    return nn.Parameter(torch.linspace(-1.0, 1.0, 12).view(3, 4))


def _loss(weight):
    return (weight * torch.arange(12.0).view(3, 4)).sin().sum()


def _run_rank(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    weight = _weight()
    opt = IVON([weight], sync=True, seed=SEED, **SETTINGS)
    for _ in range(2):
        opt.zero_grad()
        with opt.sampled_params(train=True):
            sample = weight.detach().clone()
            _loss(weight).backward()
        opt.step()
    torch.save((weight.detach(), sample), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _expected():
    """The same two steps by hand: one sample of each rank's seed, folded into one mean."""
    weight = _weight()
    bucket = ParamBucket([weight], [0], [0])
    bucket.hess.fill_(0.25)
    bucket.view(bucket.mean, 0).copy_(weight.detach())
    bucket.set_hyper([[0.1, 0.9, 0.99999, 1e-4, 50.0, float("inf"), 1.0, 0.0]])
    for _ in range(2):
        for count, seed in enumerate((SEED, SEED + 1), start=1):
            ivon_twin.ivon_sample(bucket, seed=seed, draw=1, train=True, adopt=False)
            weight.grad = None
            _loss(weight).backward()
            ivon_twin.ivon_fold(bucket, [weight.grad], seed=seed, draw=1, count=count, price=True)
        ivon_twin.ivon_step(
            bucket, None, [True], seed=0, draw=0, draws=1, price=True, debias=True, check=True
        )
    return weight.detach()


def test_ranks_draw_their_own_samples_and_agree_on_the_mean(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run_rank, args=(port, str(tmp_path)), nprocs=2)
    (mean0, sample0), (mean1, sample1) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert torch.equal(mean0, mean1)
    assert not torch.equal(sample0, sample1)
    torch.testing.assert_close(mean0, _expected(), rtol=1e-6, atol=1e-7)
