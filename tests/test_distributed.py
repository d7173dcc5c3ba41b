"""IVON on two processes over gloo: shared noise, independent noise, shards, checkpoints, a rank that dies.

One job of two ranks makes every result (``distributed_job.py``), a second resumes the run the first lost.
"""

import socket
import sys
import types

import distributed_job as job
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from bayeslora import IVON, Posterior, keep_gradients_local
from bayeslora.kernels import ivon_twin
from bayeslora.kernels.param_bucket import ParamBucket


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the first job leaves behind when rank 1 dies."""
    folder = tmp_path_factory.mktemp("job")
    try:
        mp.spawn(job.first_job, args=(_free_port(), folder), nprocs=job.WORLD)
    except (mp.ProcessExitedException, mp.ProcessRaisedException):  # whichever rank is noticed first
        if not (folder / "checkpoint.pt").exists():
            raise
        return folder
    raise AssertionError("rank 1 was to die")


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(job.WORLD)]


def _assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# ---- DDP, shared noise ---------------------------------------------------------------------------


def test_shared_noise_keeps_the_ranks_bit_identical(ranks):
    _assert_same(ranks[0]["ddp"], ranks[1]["ddp"])


def test_shared_noise_is_the_run_of_one_process(ranks):
    # 200 steps with no_sync accumulation, uneven last batches and clipping; only the order of sums differs.
    for name, value in job.ddp_run_on_one_process().items():
        torch.testing.assert_close(ranks[0]["ddp"][name], value, rtol=2e-3, atol=2e-4)


def test_a_job_whose_rank_died_resumes_on_the_identical_trajectory(folder, ranks):
    mp.spawn(job.second_job, args=(_free_port(), folder), nprocs=job.WORLD)
    for rank in range(job.WORLD):
        _assert_same(torch.load(folder / f"resumed{rank}.pt"), ranks[rank]["straight"])


# ---- independent noise ---------------------------------------------------------------------------


def _independent_by_hand():
    """Ten steps with one sample of each rank's seed, folded into one mean."""
    module = job.model()
    params = list(module.parameters())
    bucket = ParamBucket(params, range(len(params)), [0] * len(params))
    bucket.hess.fill_(job.SETTINGS["hess_init"])
    for i, p in enumerate(params):
        bucket.view(bucket.mean, i).copy_(p.detach())
    bucket.set_hyper([[0.1, 0.9, 0.99, 1e-4, 50.0, float("inf"), 1.0, 0.0]])
    for step in range(10):
        for rank in range(job.WORLD):
            seed = job.SETTINGS["seed"] + rank
            ivon_twin.ivon_sample(bucket, seed=seed, draw=1, train=True, adopt=False)
            module.zero_grad()
            job.loss_of(module, job.batch(step, rank)).backward()
            grads = [p.grad for p in params]
            ivon_twin.ivon_fold(bucket, grads, seed=seed, draw=1, count=rank + 1, price=True)
        active = [True] * len(params)
        ivon_twin.ivon_step(
            bucket, None, active, seed=0, draw=0, draws=1, price=True, debias=True, check=True
        )
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("run", ["independent", "independent_ddp"])
def test_independent_ranks_draw_their_own_samples_and_agree_on_the_mean(run, ranks):
    first, second = (dict(rank[run]) for rank in ranks)
    assert not torch.equal(first.pop("sample"), second.pop("sample"))
    _assert_same(first, second)
    for name, value in _independent_by_hand().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


def test_the_hessian_variance_falls_as_one_over_ranks(ranks):
    one, two = (ranks[0]["hess"][sync]["change"] for sync in ("shared", "independent"))
    ratio = one.double().var() / two.double().var()
    assert ratio.item() == pytest.approx(job.WORLD, rel=0.06)  # 4 standard errors
    assert torch.equal(two, ranks[1]["hess"]["independent"]["change"])


def test_shared_noise_sends_nothing_and_independent_noise_one_message(ranks):
    for rank in ranks:
        assert rank["hess"]["shared"]["sent"] == []
        assert rank["hess"]["independent"]["sent"] == [2 * job.WIDTH]


def test_independent_noise_on_averaged_gradients_is_an_error(ranks):
    for rank in ranks:
        assert "Call bayeslora.keep_gradients_local(ddp_model)" in rank["forgotten"]


def test_models_that_differ_over_the_ranks_are_an_error(ranks):
    for rank in ranks:
        for what, message in rank["unequal"].items():
            assert (
                f"the ranks have different {what}" in message and "give every rank the same model" in message
            )
        assert len(rank["unequal"]) == 2


def test_a_step_that_one_rank_skips_is_said_with_the_rank(ranks):
    assert ranks[0]["drifting"] == []
    (line,) = ranks[1]["drifting"]
    assert "skipped 1 of 1 steps" in line
    assert "on rank 1 of 2 (a rank that does not say so took them, and its weights are others now)" in line


def test_keep_gradients_local_wants_ddp():
    with pytest.raises(ValueError, match=r"model \(Linear\) holds no DistributedDataParallel"):
        keep_gradients_local(nn.Linear(2, 2))


# ---- FSDP2 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run():
    module = job.sharded_model(False)
    opt = IVON(module.parameters(), **job.SETTINGS)
    job.sharded_steps(module, opt, 0, job.SHARD_STEPS)
    return module, opt


def test_shards_follow_the_trajectory_of_the_whole(ranks, whole_run):
    module, opt = whole_run
    assert opt.skipped_steps == 1  # a NaN in one rank's rows skips the step on all
    for rank, result in enumerate(ranks):
        sharded = result["sharded"]
        assert sharded["kinds"] == ["DTensor"]
        assert sharded["rows"] == [[3, 3, 1, 1], [2, 2, 0, 0]][rank]
        assert sharded["skipped"] == 1
        for name, value in job.state_of(module, opt).items():
            torch.testing.assert_close(sharded["state"][name], value, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(sharded["replicated"][name], value, rtol=1e-6, atol=1e-7)


def test_what_shards_cannot_do_is_refused(ranks):
    for result in ranks:
        independent, columns = result["sharded"]["refused"]
        assert "needs each rank's own gradients, which fully_shard has averaged" in independent
        assert "sharded by rows, Shard(0), as fully_shard makes them; got (Shard(dim=1),)" in columns


def test_the_posterior_of_shards_is_that_of_the_whole(ranks, whole_run):
    module, opt = whole_run
    posterior = Posterior.from_optimizer(module, opt)
    with posterior.sample(seed=9):
        sample = [p.detach().clone() for p in module.parameters()]
    predicted = posterior.predict(job.batch(0, 0), 2)
    before = [p.detach().clone() for p in module.parameters()]
    try:
        pruned = posterior.prune(0.5)
        pruned_weight = module[0].weight.detach().clone()
    finally:
        with torch.no_grad():
            for p, value in zip(module.parameters(), before, strict=True):
                p.copy_(value)
    for result in (rank["sharded"] for rank in ranks):
        for own, value in zip(result["sample"], sample, strict=True):
            torch.testing.assert_close(own, value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result["predicted"], predicted)
        assert result["pruned"] == pruned
        torch.testing.assert_close(result["pruned_weight"], pruned_weight, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_of_two_shards_resumes_on_two_and_on_one(folder, ranks):
    for result in (rank["sharded"] for rank in ranks):
        _assert_same(result["resumed"], result["state"])
    module = job.sharded_model(False)
    opt = IVON(module.parameters(), **job.SETTINGS)
    job.load_distributed(module, opt, folder / "dcp")
    job.sharded_steps(module, opt, job.CHECKPOINT, job.SHARD_STEPS)
    for name, value in job.state_of(module, opt).items():
        torch.testing.assert_close(ranks[0]["sharded"]["state"][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_shards_of_any_number_draw_the_noise_of_the_whole(count):
    """By the element's index in the whole tensor, whatever the offset of a shard modulo four."""
    whole = nn.Parameter(torch.zeros(10, 3))

    def sample(params, streams, offsets):
        bucket = ParamBucket(params, streams, [0] * len(params), offsets)
        bucket.hess.fill_(1.0)
        bucket.set_hyper([[0.0, 0.0, 0.0, 0.0, 1.0, float("inf"), 1.0, 0.0]])
        ivon_twin.ivon_sample(bucket, seed=3, draw=2)

    sample([whole], [4], [0])
    offset = 0
    for rows in torch.zeros(10, 3).chunk(count):
        part = nn.Parameter(rows.clone())
        sample([part], [4], [offset])
        assert torch.equal(part, whole.detach().view(-1)[offset : offset + part.numel()].view(part.shape))
        offset += part.numel()
    assert offset == whole.numel()


# ---- what is refused -----------------------------------------------------------------------------


def _weight(**attributes):
    weight = nn.Parameter(torch.zeros(3))
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


def test_deepspeed_and_fsdp1_are_refused_at_construction(monkeypatch):
    for attribute, engine in (
        ("ds_id", "DeepSpeed"),
        ("_is_flat_param", "FSDP1"),
        ("_fsdp_flattened", "FSDP1"),
    ):
        with pytest.raises(ValueError, match=engine):
            IVON([_weight(**{attribute: True})], **job.SETTINGS)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed .* use DDP, or FSDP2"):
        IVON([_weight()], **job.SETTINGS)


def test_parameters_that_deepspeed_replaced_are_refused_before_the_first_sample(monkeypatch):
    weight = _weight()
    opt = IVON([weight], **job.SETTINGS)
    opt.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    opt.train()  # somebody else's business
    opt = IVON([weight], **job.SETTINGS)
    opt.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(ValueError, match="DeepSpeed ZeRO has replaced"):
        opt.train()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"sync must be 'shared' .* got 'sometimes'"):
        IVON([_weight()], **job.SETTINGS, sync="sometimes")
