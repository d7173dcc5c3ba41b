"""Counter-based Gaussian noise: the one source of randomness, as Triton device functions.

Noise is a pure function of ``(seed, stream, draw, element)``::

    words(g) = Philox4x32-10(key = seed, counter = (g, draw, stream, 0))       g = element // 4
    u_k      = (words_k + 1/2) / 2^32                                          k = 0..3
    z_0, z_1 = sqrt(-2 ln u_0) · (cos, sin)(2π u_1)                            (Box-Muller)
    z_2, z_3 = sqrt(-2 ln u_2) · (cos, sin)(2π u_3)
    noise    = z_{element % 4}

Nothing depends on block sizes, the launch grid, the device, the dtype, or the way a tensor is cut into
shards, so a kernel redraws what it needs and noise is never stored. ``noise_twin.py`` states the same
in plain torch.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import triton
import triton.language as tl


@triton.jit
def philox4x(seed, draw, stream, group):
    """Return the four Philox4x32-10 words of each element group.

    Args:
        seed: 64-bit integer scalar, the key.
        draw: integer scalar, the index of the sample (its low 32 bits count).
        stream: integer scalar, the index of the tensor (its low 32 bits count).
        group: integer block, ``element // 4`` (its low 32 bits count).

    Returns:
        Four uint32 blocks of ``group``'s shape.
    """
    c0 = group.to(tl.uint32)
    zero = tl.zeros_like(c0)
    c1 = zero + draw.to(tl.uint32)
    c2 = zero + stream.to(tl.uint32)
    return tl.philox(seed.to(tl.uint64), c0, c1, c2, zero)


@triton.jit
def _unit_open(word):
    """Map a uint32 word to fp32 in (0, 1]: ``(word + 1/2) / 2^32``, rounded to nearest."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _cos_sin_turn(word):
    """Return ``(cos, sin)(2π (word + 1/2) / 2^32)`` to fp32 rounding, without a branch.

    The word splits exactly into the nearest quarter turn q and a rest of at most an eighth of a turn;
    polynomials give cosine and sine of the rest (libdevice's would carry a slow path for large angles).
    """
    rest = (word << 2).to(tl.int32, bitcast=True) >> 2
    q = (word + 0x20000000) >> 30
    t = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09  # (π/2) / 2^30
    z = t * t
    sine = t + t * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cosine = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * z + z * z * cosine
    odd = (q & 1) != 0
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return tl.where(((q + 1) & 2) != 0, -c, c), tl.where((q & 2) != 0, -s, s)


@triton.jit
def _box_muller(word_radius, word_angle):
    radius = tl.sqrt(-2.0 * tl.log(_unit_open(word_radius)))
    cosine, sine = _cos_sin_turn(word_angle)
    return radius * cosine, radius * sine


@triton.jit
def randn4x(seed, draw, stream, group):
    """Return four fp32 blocks of standard normals, the noise of elements ``4·group + (0, 1, 2, 3)``."""
    w0, w1, w2, w3 = philox4x(seed, draw, stream, group)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def interleave4(v0, v1, v2, v3):
    """Put four ``[n]`` blocks into element order: ``[v0[0], v1[0], v2[0], v3[0], v0[1], ...]``, ``[4n]``."""
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def randn_block(seed, draw, stream, group_start, BLOCK: tl.constexpr):
    """Return the ``[BLOCK]`` normals of elements ``4·group_start + (0 .. BLOCK-1)``, in element order."""
    group = group_start + tl.arange(0, BLOCK // 4)
    z0, z1, z2, z3 = randn4x(seed, draw, stream, group)
    return interleave4(z0, z1, z2, z3)
