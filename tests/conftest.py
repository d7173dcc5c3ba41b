"""Kernels run compiled on a GPU where there is one, else on CPU through Triton's interpreter."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also keeps bitsandbytes from fetching native code
if paths := os.environ.get("PYTHONPATH"):  # the processes that tests start in other folders
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other


def pytest_configure():
    if "TRITON_INTERPRET" not in os.environ or find_spec("triton") is None:
        return
    import triton

    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise pytest.UsageError(
            "Triton 3.6's interpreter cannot run with NumPy 2.4: pip install 'numpy<2.4' or 'triton>=3.7'"
        )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run in this session: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fresh_accelerate():
    """Accelerate's state, of which a process has one, as of a new process before and after the test."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_gpu(monkeypatch):
    """HF Trainer on one GPU also where there are several, over which it would spread every batch."""
    from transformers import TrainingArguments

    count = TrainingArguments.n_gpu
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: min(count.fget(arguments), 1)))
