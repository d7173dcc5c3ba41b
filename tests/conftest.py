"""Kernels run compiled on a GPU where there is one, else on CPU through Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other


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
def one_gpu(monkeypatch):
    """HF Trainer on one GPU also where there are several, over which it would spread every batch."""
    from transformers import TrainingArguments

    count = TrainingArguments.n_gpu
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: min(count.fget(arguments), 1)))
