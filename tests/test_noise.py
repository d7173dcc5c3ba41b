"""The noise contract: published vectors, agreement of kernel and twin, the law, and independence of cuts."""

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from bayeslora.kernels import noise_twin
from bayeslora.kernels.noise import interleave4, philox4x, randn_block

# Known-answer vectors of Philox4x32-10, from the Random123 distribution: key, counter, words.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _philox_kernel(key_ptr, counter_ptr, out_ptr):
    lane = tl.arange(0, 1)
    c0 = tl.load(counter_ptr + 0 + lane).to(tl.uint32)
    c1 = tl.load(counter_ptr + 1 + lane).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 + lane).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 + lane).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(key_ptr).to(tl.uint64), c0, c1, c2, c3)
    tl.store(out_ptr + 0 + lane, w0.to(tl.int64))
    tl.store(out_ptr + 1 + lane, w1.to(tl.int64))
    tl.store(out_ptr + 2 + lane, w2.to(tl.int64))
    tl.store(out_ptr + 3 + lane, w3.to(tl.int64))


@triton.jit(do_not_specialize=["seed", "draw", "stream", "first_group"])
def _words_kernel(out_ptr, numel, seed, draw, stream, first_group, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    group = first_group + start // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox4x(seed, draw, stream, group)
    index = start + tl.arange(0, BLOCK)
    words = interleave4(w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64))
    tl.store(out_ptr + index, words, mask=index < numel)


@triton.jit(do_not_specialize=["seed", "draw", "stream", "first_group"])
def _randn_kernel(out_ptr, numel, seed, draw, stream, first_group, BLOCK: tl.constexpr):
    for tile in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        index = tile * BLOCK + tl.arange(0, BLOCK)
        z = randn_block(seed, draw, stream, first_group + tile * (BLOCK // 4), BLOCK)
        tl.store(out_ptr + index, z.to(out_ptr.dtype.element_ty), mask=index < numel)


def _randn(numel, seed, draw, stream, device, first_group=0, block=256, programs=7, dtype=torch.float32):
    out = torch.full((numel,), float("nan"), device=device, dtype=dtype)
    _randn_kernel[(programs,)](out, numel, seed, draw, stream, first_group, BLOCK=block)
    return out


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(key, counter, words, device):
    twin = noise_twin.philox4x32(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in twin) == words
    out = torch.zeros(4, dtype=torch.int64, device=device)
    packed = key[0] | key[1] << 32
    seed = torch.tensor([packed - (1 << 64) if packed >= 1 << 63 else packed], device=device)
    _philox_kernel[(1,)](seed, torch.tensor(counter, dtype=torch.int64, device=device), out)
    assert tuple(out.tolist()) == words


@pytest.mark.parametrize("seed", [0, 1, -5, 2**62 + 3])
@pytest.mark.parametrize(
    ("draw", "stream", "first_group"), [(0, 0, 0), (2**31 + 7, 3, 11), (9, 10_000, 2**31)]
)
def test_words_agree_with_twin_bit_for_bit(seed, draw, stream, first_group, device):
    numel = 1023
    out = torch.full((numel,), -1, dtype=torch.int64, device=device)
    _words_kernel[(triton.cdiv(numel, 128),)](out, numel, seed, draw, stream, first_group, BLOCK=128)
    twin = noise_twin.random_words(numel, seed=seed, draw=draw, stream=stream, offset=4 * first_group)
    assert torch.equal(out.cpu(), twin)


def test_normals_agree_with_twin(device):
    out = _randn(100_003, 7, 3, 2, device, block=1024)
    twin = noise_twin.randn(100_003, seed=7, draw=3, stream=2)
    # Both round fp32 logs and cosines; the log's error grows where the radius is near zero.
    torch.testing.assert_close(out.cpu(), twin, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("block", [64, 256, 1024])
@pytest.mark.parametrize("programs", [1, 3, 16])
def test_normals_do_not_depend_on_block_or_grid(block, programs, device):
    reference = _randn(5000, 1, 2, 3, device)
    assert torch.equal(_randn(5000, 1, 2, 3, device, block=block, programs=programs), reference)


@pytest.mark.parametrize(
    "dtype",
    # The interpreter truncates to bf16 where the hardware rounds to nearest.
    [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16, torch.float64],
)
def test_normals_of_other_dtypes_are_the_rounded_ones(dtype, device):
    reference = _randn(1000, 1, 2, 3, device)
    assert torch.equal(_randn(1000, 1, 2, 3, device, dtype=dtype), reference.to(dtype))


@pytest.mark.parametrize("cuts", [(4, 500), (1, 63), (7, 8, 9), (333,)])
def test_shards_together_are_the_whole_tensor(cuts, device):
    whole = noise_twin.randn(1000, seed=4, draw=1, stream=0)
    bounds = [0, *cuts, 1000]
    shards = [noise_twin.randn(b - a, seed=4, draw=1, stream=0, offset=a) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(shards), whole)
    from_group_3 = _randn(100, 4, 1, 0, device, first_group=3)
    assert torch.equal(from_group_3, _randn(112, 4, 1, 0, device)[12:])


@pytest.mark.parametrize("implementation", ["twin", "triton"])
def test_normals_follow_their_law(implementation, device):
    n = 1_000_000
    if implementation == "twin":
        z = noise_twin.randn(n, seed=12, draw=0, stream=5)
    else:
        z = _randn(n, 12, 0, 5, device, block=1 << 14, programs=4).cpu()
    z = z.double()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 0.01
    lanes = z.view(-1, 4)
    assert (torch.corrcoef(lanes.T) - torch.eye(4)).abs().max() < 4 / (n / 4) ** 0.5


def test_streams_draws_and_seeds_are_uncorrelated():
    n = 100_000
    names = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1 << 32, 0, 0)]
    z = torch.stack([noise_twin.randn(n, seed=s, draw=d, stream=t) for s, d, t in names])
    assert (torch.corrcoef(z) - torch.eye(len(names))).abs().max() < 4.5 / n**0.5
