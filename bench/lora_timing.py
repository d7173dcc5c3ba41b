"""Interleaved GPU timing through CUDA graphs, and errors against fp64, for the LoRA benchmarks."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[int], object]  # takes the index of the input set to work on


def rotations(bytes_per_set: int, l2_bytes: int = 50 * 2**20) -> int:
    """Return how many input sets to rotate so that none is left in L2 from its last use."""
    return max(2, min(8, -(-3 * l2_bytes // max(bytes_per_set, 1))))


def _capture(call: Call, sets: int, repeats: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            call(i % sets)
    return graph


def interleaved(calls: dict[str, Call], sets: int, repeats: int, rounds: int = 7) -> dict[str, list[float]]:
    """Return microseconds a call, one number a round, of graphs replayed A B C, A B C, ...

    Args:
        calls: name to function; each is captured ``repeats`` times over rotating input sets.
        sets: number of input sets.
        repeats: calls in a graph.
        rounds: times each graph is measured, after one warm-up replay.
    """
    graphs = {name: _capture(call, sets, repeats) for name, call in calls.items()}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1e3 / repeats)
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the spread: half the range between the quartiles."""
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median_us": round(statistics.median(times), 2),
        "spread_us": round((quartiles[2] - quartiles[0]) / 2, 2),
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return ``‖value - truth‖ / ‖truth‖``; NaN where value holds one."""
    return ((value.double() - truth).norm() / truth.norm()).item()
