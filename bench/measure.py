"""How the benchmarks measure: interleaved rounds, medians with spread, host time apart from GPU time."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
_SLEEP_CYCLES = 20_000_000  # keeps the GPU busy for about 10 ms while the host queues work behind it


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def environment() -> dict[str, str]:
    """Return the device and the versions that a result depends on."""
    found = {"device": device_name(), "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "peft", "ivon-opt"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def spread(samples: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": middle, "q1": low, "q3": high, "rounds": len(samples)}


def _wall(fn: Callable[[], object], inner: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        fn()
    synchronize()
    return (time.perf_counter() - start) / inner


def _host(fn: Callable[[], object], inner: int) -> float:
    """Time until the calls return, with the GPU held up so that none of them waits for it."""
    synchronize()
    if torch.cuda.is_available():
        torch.cuda._sleep(_SLEEP_CYCLES * 4)
    start = time.perf_counter()
    for _ in range(inner):
        fn()
    return (time.perf_counter() - start) / inner


def _gpu(fn: Callable[[], object], inner: int) -> float:
    """Time on the GPU alone: the host queues everything while the GPU is held up."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES * 4)
    start.record()
    for _ in range(inner):
        fn()
    end.record()
    synchronize()
    return start.elapsed_time(end) / 1e3 / inner


def interleaved(
    contestants: dict[str, Callable[[], object]], *, rounds: int = 15, inner: int = 4, warmup: int = 3
) -> dict[str, dict[str, dict[str, float]]]:
    """Time each contestant in turn, round by round (A B C A B C ...).

    Returns:
        name -> kind ("wall", "host", "gpu"; "gpu" only on a GPU) -> median and quartiles, in seconds a call.
    """
    for fn in contestants.values():
        for _ in range(warmup):
            fn()
    kinds = {"wall": _wall, "host": _host} | ({"gpu": _gpu} if torch.cuda.is_available() else {})
    samples: dict[str, dict[str, list[float]]] = {name: {k: [] for k in kinds} for name in contestants}
    for _ in range(rounds):
        for name, fn in contestants.items():
            for kind, measure in kinds.items():
                samples[name][kind].append(measure(fn, inner))
    return {name: {k: spread(v) for k, v in by_kind.items()} for name, by_kind in samples.items()}


def copy_bandwidth(bytes_moved: int = 2 << 30) -> float:
    """Return bytes per second of a large device copy, counting bytes read and bytes written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(bytes_moved // 8, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    measure = _gpu if torch.cuda.is_available() else _wall
    for _ in range(3):
        target.copy_(source)
    return bytes_moved / statistics.median(measure(lambda: target.copy_(source), 4) for _ in range(9))


def result_file(name: str, folder: Path | None = None, device: str | None = None) -> Path:
    """Return where `write_results` puts the results of that name on this device, or on the one named."""
    slug = "".join(c if c.isalnum() else "_" for c in device or device_name()).strip("_").lower()
    return (folder or RESULTS) / f"{name}_{slug}.json"


def write_results(
    name: str, rows: list[dict[str, object]], folder: Path | None = None, key: Sequence[str] = ()
) -> Path:
    """Write rows and the environment to ``<name>_<device>.json``.

    With ``key``, the fields that name a case, the file's rows of other cases stay, so that one case can be
    measured again: unless they were measured in another environment.
    """
    file = result_file(name, folder)
    document = {"environment": environment(), "rows": rows}
    if key and file.exists():
        before = json.loads(file.read_text())
        if before["environment"] == document["environment"]:
            document["rows"] = replace_rows(before["rows"], rows, key)
    write_json(file, document)
    return file


def replace_rows(
    before: list[dict[str, object]], rows: list[dict[str, object]], key: Sequence[str]
) -> list[dict[str, object]]:
    """Return ``before`` with the cases that ``rows`` has, in the order of the key's fields."""

    def case(row: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(row[field]) for field in key)

    new = {case(row) for row in rows}
    return sorted([*(row for row in before if case(row) not in new), *rows], key=case)


def write_json(file: Path, document: dict[str, object]) -> None:
    """Write a result file, making its folder where needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")
