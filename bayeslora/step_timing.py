"""Timing several things against each other: interleaved rounds, and the ratios within them.

The contestants run in turn (A B C, C B A, ...), so that what slows the machine for a while slows all of them.
A ratio is the median of the ratios within rounds, with the interval that the sign test gives a median.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FEWEST_ROUNDS = 7


@dataclass
class Contestant:
    """One way to train: takes a step when called, and returns the loss.

    Args:
        name: as in the table.
        step: takes the step.
        seconds: of a step, one entry a round.
        peak_bytes: memory that this contestant alone would need at its peak; 0 on a CPU.
    """

    name: str
    step: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def time_rounds(
    contestants: list[Contestant],
    seconds: float,
    fewest: int = _FEWEST_ROUNDS,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Add interleaved rounds to the contestants' ``seconds``.

    Args:
        contestants: timed in turn.
        seconds: no further round begins after them.
        fewest: rounds all the same.
        enough: asked after those; True ends the rounds early.
    """
    inner = 1
    began, rounds = time.perf_counter(), 0
    with collector_paused():
        while rounds < fewest or (time.perf_counter() - began < seconds and not enough()):
            order = contestants if rounds % 2 == 0 else contestants[::-1]
            for contestant in order:
                contestant.seconds.append(_time(contestant.step, inner))
            if rounds == 0:  # short steps are timed several at once
                fastest = min(contestant.seconds[-1] for contestant in contestants)
                inner = max(1, min(8, round(0.05 / fastest)))
            rounds += 1


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector out of what is timed, as `timeit` does.

    Its passes over a model's objects take milliseconds, and fall on one contestant or another by chance.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _time(step: Callable[[], object], inner: int) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        step()
    synchronize()
    return (time.perf_counter() - start) / inner


def ratio(of: Contestant, to: Contestant) -> dict[str, float]:
    """Return the median of the ratios within rounds, its 95% interval, and the number of rounds."""
    rounds = min(len(of.seconds), len(to.seconds))
    ratios = sorted(a / b for a, b in zip(of.seconds[-rounds:], to.seconds[-rounds:], strict=True))
    low, high = sign_interval(rounds)
    return {"median": statistics.median(ratios), "low": ratios[low], "high": ratios[high], "rounds": rounds}


def sign_interval(n: int, confidence: float = 0.95) -> tuple[int, int]:
    """Return the indices, among n sorted values, between which the median lies with that confidence.

    Exact and free of assumptions: values fall below the median as coins fall. Where n is too small
    (below 6 at 95%), the smallest and the largest.
    """
    low, tail = 0, 1 + n  # of 2**n equally likely outcomes, those with at most low + 1 values below
    while low + 1 < (n + 1) // 2 and tail / 2**n <= (1 - confidence) / 2:
        low += 1
        tail += math.comb(n, low + 1)
    return low, n - 1 - low
