"""PEFT models on two processes: HF Trainer under DDP, accelerate, and FSDP2 with a posterior on disk."""

import socket

import distributed_trainer_job as job
import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel

from bayeslora import Posterior


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(job.job, args=(port, folder), nprocs=job.WORLD)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(job.WORLD)]


def _assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_hf_trainer_under_ddp_keeps_the_ranks_identical_and_saves_the_posterior(folder, ranks):
    assert ranks[0]["trainer"]["parallel"].endswith("DISTRIBUTED")
    weights = ranks[0]["trainer"]["weights"]
    _assert_same(weights, ranks[1]["trainer"]["weights"])
    saved = Posterior.from_pretrained(job.base(), folder / "trainer" / f"checkpoint-{job.STEPS}")
    _assert_same(saved.mean, weights)


def test_hf_trainer_with_independent_noise_keeps_the_ranks_identical(ranks):
    """The optimizer itself raises where the gradients it gets have been averaged already."""
    weights = ranks[0]["trainer independent"]["weights"]
    _assert_same(weights, ranks[1]["trainer independent"]["weights"])
    shared = ranks[0]["trainer"]["weights"]
    assert all(not torch.equal(p, shared[n]) for n, p in weights.items() if "lora_B" in n)


def test_accelerate_with_independent_noise_keeps_the_ranks_identical(ranks):
    _assert_same(ranks[0]["independent"], ranks[1]["independent"])
    start = job.trained(job.model())
    assert all(not torch.equal(p, start[n]) for n, p in ranks[0]["independent"].items() if "lora_B" in n)


@pytest.fixture(scope="module")
def whole_run():
    module = job.model()
    opt = job.optimizer(module)
    job.fsdp_steps(module, opt)
    return module, opt


@pytest.mark.parametrize("how", ["fsdp", "switched"])
def test_a_patched_model_under_fsdp2_is_the_run_of_one_process(how, ranks, whole_run):
    for name, value in job.trained(whole_run[0]).items():
        for rank in ranks:
            torch.testing.assert_close(rank[how][name], value, rtol=1e-4, atol=1e-6)
    assert ranks[0]["fused"] == 8


def test_the_posterior_saved_under_fsdp2_is_that_of_one_process(folder, whole_run):
    module, opt = whole_run
    loaded = Posterior.from_pretrained(job.base(), folder / "fsdp")
    for name, gaussian in opt.posterior(module).parameters.items():
        torch.testing.assert_close(loaded.parameters[name].mean, gaussian.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loaded.parameters[name].hess, gaussian.hess, rtol=1e-4, atol=1e-6)
    assert isinstance(PeftModel.from_pretrained(job.base(), folder / "fsdp"), PeftModel)
