"""The IVON kernels against their twin, and the twin against the equations in fp64."""

import math

import pytest
import torch

from bayeslora.kernels import ivon, ivon_twin, noise_twin
from bayeslora.kernels.param_bucket import HYPER_WIDTH, NONFINITE, SKIPPED, STEP, ParamBucket

HYPER = [
    # lr, beta1, beta2, weight_decay, ess, clip_radius, variance_scale
    [0.1, 0.9, 0.99, 1e-2, 100.0, 0.5, 1.0],
    [0.2, 0.8, 0.999, 1e-3, 1000.0, math.inf, 0.25],
]
# Largest difference between kernel and twin, relative to the largest magnitude in the tensor.
SLACK = {
    torch.float64: 1e-7,  # noise is fp32 in both, and its logs and cosines may round differently
    torch.float32: 2e-5,  # the same, amplified where z scales a gradient
    torch.bfloat16: 2**-7,  # one rounding of the parameter may fall to the other side
    torch.float16: 2**-9,
}
IMPLEMENTATIONS = pytest.mark.parametrize("price", [True, False], ids=["price", "gradsq"])
MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float32)
DOUBLE = (torch.float64,) * 5


RAGGED = [(7,), (33, 50), (1, 63), (1023,), (6, 10)]
REGULAR = [(8,), (33, 48), (1, 64), (1024,), (8, 10)]


def _bucket(dtypes, device, offsets=(0, 6, 0, 3, 0), shapes=RAGGED):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(device, d) for s, d in zip(shapes, dtypes, strict=True)]
    params[4] = params[4].t()  # memory not in element order
    bucket = ParamBucket(params, [0, 5, 2, 3, 9], [0, 0, 1, 1, 1], offsets, num_groups=2)
    bucket.hess.fill_(1.0)
    for i, p in enumerate(params):
        bucket.view(bucket.mean, i).copy_(p)
        bucket.view(bucket.hess, i).copy_(torch.rand(p.shape, generator=generator) + 0.1)
        bucket.view(bucket.momentum, i).copy_(torch.randn(p.shape, generator=generator))
    bucket.set_hyper([row + [0.0] * (HYPER_WIDTH - len(row)) for row in HYPER])
    return bucket


def _grads(bucket, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in bucket.params]


def _assert_close(got, expected):
    for i, (p, q) in enumerate(zip(got.params, expected.params, strict=True)):
        for name in ("mean", "hess", "momentum"):
            x = got.view(getattr(got, name), i).cpu()
            y = expected.view(getattr(expected, name), i).cpu()
            scale = max(float(y.abs().max()), 1.0)
            torch.testing.assert_close(x, y, rtol=0, atol=SLACK[x.dtype] * scale)
        scale = max(float(q.abs().max()), 1.0)
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=0, atol=SLACK[p.dtype] * scale)
    assert got.control.tolist() == expected.control.tolist()
    torch.testing.assert_close(got.beta1_power.cpu(), expected.beta1_power.cpu(), rtol=1e-15, atol=0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtypes", [MIXED, DOUBLE], ids=["mixed", "fp64"])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("regular", [True, False], ids=["regular", "ragged"])
def test_steps_agree_with_twin(dtypes, price, debias, regular, device):
    layout = {"offsets": (0, 4, 0, 8, 0), "shapes": REGULAR} if regular else {}
    got, expected = _bucket(dtypes, device, **layout), _bucket(dtypes, "cpu", **layout)
    assert got.regular == regular
    for draw in range(1, 4):
        for kernels, bucket in ((ivon, got), (ivon_twin, expected)):
            kernels.ivon_sample(bucket, seed=3, draw=1, train=True)
            grads = _grads(bucket, draw)
            grads[2] = None
            active = [g is not None for g in grads]
            kernels.ivon_step(
                bucket, grads, active, seed=3, draw=1, draws=1, price=price, debias=debias, check=True
            )
    _assert_close(got, expected)
    assert got.control[STEP] == 3


@IMPLEMENTATIONS
def test_several_samples_agree_with_twin(price, device):
    got, expected = _bucket(MIXED, device), _bucket(MIXED, "cpu")
    for kernels, bucket in ((ivon, got), (ivon_twin, expected)):
        for count in range(1, 4):
            kernels.ivon_sample(bucket, seed=1, draw=count, train=True, adopt=count == 1)
            grads = _grads(bucket, count)
            if count == 2:
                grads[0] = None
            kernels.ivon_fold(bucket, grads, seed=1, draw=count, count=count, price=price)
        scale = torch.tensor(8.0, device=bucket.device)
        active = [True] * 5
        kernels.ivon_step(
            bucket,
            None,
            active,
            seed=0,
            draw=0,
            draws=3,
            price=price,
            debias=True,
            check=True,
            grad_scale=scale,
        )
    _assert_close(got, expected)


@pytest.mark.parametrize("implementation", [ivon, ivon_twin], ids=["triton", "twin"])
def test_a_step_starts_its_running_means_anew(implementation, device):
    """A step whose gradient was NaN leaves NaN there, which must not reach the next step."""
    bucket = _bucket(MIXED, device if implementation is ivon else "cpu")
    for average in bucket.averages():
        average.fill_(math.nan)
    implementation.ivon_fold(bucket, _grads(bucket, 0), seed=1, draw=1, count=1, price=True)
    for i in range(len(bucket.params)):
        for average in bucket.averages():
            assert torch.isfinite(bucket.view(average, i)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("implementation", [ivon, ivon_twin], ids=["triton", "twin"])
def test_nonfinite_gradient_skips_the_whole_step(value, implementation, device):
    bucket = _bucket(MIXED, device if implementation is ivon else "cpu")
    before = [bucket.mean.clone(), bucket.hess.clone(), bucket.momentum.clone()]
    rest = [p.clone() for p in bucket.params]
    implementation.ivon_sample(bucket, seed=3, draw=1)
    assert not torch.equal(bucket.params[0], rest[0])
    grads = _grads(bucket, 1)
    grads[3][1000] = value
    implementation.ivon_step(
        bucket, grads, [True] * 5, seed=3, draw=1, draws=1, price=True, debias=True, check=True
    )
    for now, then in zip([bucket.mean, bucket.hess, bucket.momentum], before, strict=True):
        assert torch.equal(now, then)
    for p, q in zip(bucket.params, rest, strict=True):
        assert torch.equal(p, q)
    assert bucket.control.tolist()[:6] == [0, 1, 1, 0, 0, 0]
    assert bucket.beta1_power.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("implementation", [ivon, ivon_twin], ids=["triton", "twin"])
def test_flag_and_found_inf_are_obeyed(implementation, device):
    bucket = _bucket(MIXED, device if implementation is ivon else "cpu")
    grads = _grads(bucket, 1)
    arguments = {"seed": 0, "draw": 1, "draws": 1, "price": True, "debias": True, "check": False}
    implementation.ivon_check(bucket, grads)
    assert bucket.control[NONFINITE] == 0
    grads[1][3, 4] = math.nan
    implementation.ivon_check(bucket, grads)
    assert bucket.control[NONFINITE] == 1
    implementation.ivon_step(bucket, grads, [True] * 5, **arguments)
    found = torch.ones((), device=bucket.device)
    implementation.ivon_step(bucket, _grads(bucket, 1), [True] * 5, found_inf=found, **arguments)
    assert bucket.control[SKIPPED] == 2
    implementation.ivon_step(bucket, _grads(bucket, 1), [True] * 5, found_inf=found * 0, **arguments)
    assert bucket.control[STEP] == 1


def test_sample_is_mean_plus_scaled_noise_in_fp64(device):
    bucket = _bucket(DOUBLE, device)
    means = [p.clone() for p in bucket.params]
    ivon.ivon_sample(bucket, seed=11, draw=4)
    for i, (p, m) in enumerate(zip(bucket.params, means, strict=True)):
        row = HYPER[bucket.param_groups[i]]
        offset = bucket.element_offsets[i]
        z = noise_twin.randn(p.numel(), seed=11, draw=4, stream=bucket.streams[i], offset=offset).double()
        std = (row[6] / (row[4] * (bucket.view(bucket.hess, i) + row[3]))).sqrt()
        torch.testing.assert_close(p.cpu(), (m + std * z.view(p.shape).to(device)).cpu(), rtol=0, atol=1e-5)
    ivon.ivon_restore(bucket)
    for p, m in zip(bucket.params, means, strict=True):
        assert torch.equal(p, m)


@pytest.mark.parametrize("implementation", [ivon, ivon_twin], ids=["triton", "twin"])
def test_parameter_wins_over_stored_mean(implementation, device):
    place = device if implementation is ivon else torch.device("cpu")
    # The interpreter truncates to bf16 where the hardware (and torch) round to nearest.
    half = torch.float16 if implementation is ivon and device.type == "cpu" else torch.bfloat16
    bucket = _bucket((torch.float32, half, *MIXED[2:]), place)
    fine = bucket.view(bucket.mean, 1)
    fine.add_(1e-4)  # below the resolution of many elements: there the finer mean must survive
    unchanged = fine.to(half) == bucket.params[1]
    expected = torch.where(unchanged, fine, bucket.params[1].float())
    bucket.params[0][2] = 9.0
    implementation.ivon_sample(bucket, seed=0, draw=1)
    assert bucket.view(bucket.mean, 0)[2] == 9.0
    assert unchanged.any() and not unchanged.all()
    assert torch.equal(bucket.view(bucket.mean, 1), expected)


def test_shards_sample_what_the_whole_tensor_samples(device):
    whole = torch.zeros(100, device=device)
    shards = [torch.zeros(n, device=device) for n in (7, 26, 67)]
    buckets = [ParamBucket([whole], [3], [0])]
    buckets += [ParamBucket([s], [3], [0], [o]) for s, o in zip(shards, (0, 7, 33), strict=True)]
    for bucket in buckets:
        bucket.hess.fill_(1.0)
        bucket.set_hyper([[*HYPER[0], 0.0]])
        ivon.ivon_sample(bucket, seed=5, draw=1)
    assert torch.equal(torch.cat(shards), whole)
