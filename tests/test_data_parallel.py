"""Under nn.DataParallel, which HF Trainer takes where it sees several GPUs and no launcher.

Its copies of a model hold no parameters of their own, and run in threads. On a CPU torch's own code makes
the copies with a stand-in for the broadcast, and they are called one after the other.
"""

import copy
import sys

import pytest
import torch
from monteclora_models import BATCH, patched_model, tiny_llama
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import replicate
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from bayeslora import IVON, patch, patching

TOKENS = BATCH["input_ids"]


@pytest.fixture
def copies(monkeypatch):
    """Returns two copies of a model, as DataParallel's forward makes them."""

    def broadcast(tensors, devices, detach=False):
        return [[t.detach() if detach else t * 1 for t in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda model: replicate(model, [0, 1])


def _model():
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return patch(model)


def _loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def _gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _hooks(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def test_copies_leave_the_models_hooks_alone(copies):
    model = _model()
    before = _hooks(model)
    for part in copies(model):
        _loss(part, TOKENS)
    assert _hooks(model) == before
    assert sum(map(sum, before)) > 0


def test_copies_give_the_models_loss_and_gradients_and_say_whose_forward_they_use(copies, caplog):
    model = _model()
    alone = copy.deepcopy(model)
    expected = _loss(alone, TOKENS)
    expected.backward()
    patching._say_that_replicas_are_pefts.cache_clear()
    found = sum(_loss(part, half) for part, half in zip(copies(model), TOKENS.chunk(2), strict=True)) / 2
    found.backward()
    torch.testing.assert_close(found, expected)
    gradients = _gradients(model)
    assert gradients.keys() == _gradients(alone).keys() and len(gradients) == 28
    for name, value in _gradients(alone).items():
        torch.testing.assert_close(gradients[name], value, msg=name)
    assert [r.message for r in caplog.records if "DataParallel" in r.message] == [caplog.messages[-1]]
    assert "torchrun" in caplog.text


def test_copies_of_monteclora_refuse_to_train_and_predict_at_the_mean(copies):
    model = patched_model()
    for part in copies(model):
        with pytest.raises(RuntimeError, match="DataParallel"):
            part(**BATCH)
    first = _loss(model, TOKENS)
    assert first.isfinite() and first != _loss(model, TOKENS)  # the model itself still draws
    model.eval()
    with torch.no_grad():
        expected = model(**BATCH).logits
        for part in copies(model):
            torch.testing.assert_close(part(**BATCH).logits, expected)


class _Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        tokens = torch.randint(3, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def _train(folder, batch_size):
    model = _model()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = IVON(trained, lr=0.05, ess=1e4, hess_init=0.1, seed=3)
    settings = {"max_steps": 6, "per_device_train_batch_size": batch_size, "report_to": []}
    settings |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **settings)
    Trainer(model, arguments, train_dataset=_Rows(), optimizers=(opt, None)).train()
    return arguments.n_gpu, {name: p.detach().cpu() for name, p in model.named_parameters() if "lora" in name}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_trainer_over_several_gpus_without_a_launcher_is_one_gpu_with_their_batches(tmp_path, request):
    count, found = _train(tmp_path / "several", 2)
    assert count > 1
    request.getfixturevalue("one_gpu")
    one, expected = _train(tmp_path / "one", 2 * count)
    assert one == 1
    start = dict(_model().named_parameters())
    for name, value in expected.items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
