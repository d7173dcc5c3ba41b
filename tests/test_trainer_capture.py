"""CapturedTrainer trains as Trainer does: eagerly where it must, and through its graphs.

On a CPU a stand-in for the graph runs the recorded step again, so that all but the recording is tested.
"""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bayeslora import IVON, CapturedTrainer, patch, trainer_capture

pytestmark = pytest.mark.usefixtures("one_gpu")
LENGTHS = (4, 7, 8, 5, 8, 6, 3, 8)


class _Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        length = LENGTHS[index // 2 % len(LENGTHS)]  # both rows of a batch
        return torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(index))


def _collate(rows):
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def _train(kind, folder, device, optimizer="IVON", **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = patch(get_peft_model(LlamaForCausalLM(config), lora))
    trained = [p for p in model.parameters() if p.requires_grad]
    trained.append(nn.Parameter(torch.ones(3)))  # never used
    model.register_parameter("unused", trained[-1])
    if optimizer == "IVON":
        opt = IVON(trained, lr=0.05, ess=1e3, hess_init=0.1, seed=3)
    else:
        opt = torch.optim.AdamW(trained, lr=0.01)
    resume = settings.pop("resume_from_checkpoint", None)
    own = {k: settings.pop(k) for k in ("pad_lengths", "capture_warmup", "max_graphs") if k in settings}
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 9,
            "per_device_train_batch_size": 2,
            "max_grad_norm": 0.3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": device.type == "cpu",
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            **settings,
        }
    )
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=_Rows(),
        data_collator=_collate,
        optimizers=(opt, None),
        **own,
    )
    trainer.train(resume_from_checkpoint=resume)
    logs = [
        (log["loss"], log["grad_norm"], log["learning_rate"])
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return trainer, torch.tensor(logs), [p.detach().cpu().clone() for p in trained]


def _assert_same(got, expected):
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    for p, q in zip(got[2], expected[2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


class _Again:
    """Stands for a CUDA graph: runs the step again and writes where the recording wrote."""

    def __init__(self, graphs, run):
        self.graphs, self.run = graphs, run
        self.adds = any(p.grad is not None for p in graphs._params)
        self.loss = run().clone()
        self.grads = [p.grad for p in graphs._params]
        if self.adds:  # recording executes nothing
            torch._foreach_zero_([g for g in self.grads if g is not None])
        self.replays = 0

    def replay(self):
        self.replays += 1
        for p, grad in zip(self.graphs._params, self.grads, strict=True):
            p.grad = grad if self.adds else None
        self.loss.copy_(self.run())
        for p, grad in zip(self.graphs._params, self.grads, strict=True):
            assert (p.grad is None) == (grad is None)
            if grad is not None and not self.adds:
                grad.copy_(p.grad)


@pytest.fixture
def graphs(monkeypatch, device):
    """The graphs made: real ones on a GPU, stand-ins on a CPU."""
    made = []
    capture = trainer_capture._StepGraphs._capture

    def record(self, run):
        graph, loss = capture(self, run) if device.type == "cuda" else (_Again(self, run), None)
        made.append(graph)
        return graph, graph.loss if loss is None else loss

    monkeypatch.setattr(trainer_capture._StepGraphs, "_capture", record)
    if device.type == "cpu":
        monkeypatch.setattr(trainer_capture, "_reason_for_eager", lambda _: None)
        monkeypatch.setattr(trainer_capture._StepGraphs, "_run_aside", trainer_capture._StepGraphs._run)
    return made


@pytest.mark.parametrize("optimizer", ["IVON", "AdamW"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_captured_training_is_trainers(tmp_path, device, graphs, accumulation, optimizer):
    settings = {"gradient_accumulation_steps": accumulation, "optimizer": optimizer}
    expected = _train(Trainer, tmp_path, device, **settings)
    got = _train(CapturedTrainer, tmp_path, device, pad_lengths=(4, 8), capture_warmup=1, **settings)
    _assert_same(got, expected)
    assert got[0].step_graphs.captured == len(graphs) == 2
    if device.type == "cpu":
        assert sum(graph.replays for graph in graphs) >= 5 * accumulation


def test_shapes_beyond_the_largest_number_of_graphs_run_eagerly(tmp_path, device, graphs):
    expected = _train(Trainer, tmp_path, device, gradient_accumulation_steps=2)
    got = _train(
        CapturedTrainer, tmp_path, device, max_graphs=1, capture_warmup=1, gradient_accumulation_steps=2
    )
    _assert_same(got, expected)
    assert len(graphs) == 1


def test_resume_from_a_checkpoint(tmp_path, device, graphs):
    settings = {"pad_lengths": (8,), "capture_warmup": 1}
    expected = _train(CapturedTrainer, tmp_path, device, save_strategy="steps", save_steps=5, **settings)
    checkpoint = str(tmp_path / "checkpoint-5")
    got = _train(CapturedTrainer, tmp_path, device, resume_from_checkpoint=checkpoint, **settings)
    _assert_same(got, expected)
    assert len(graphs) == 2


def test_parameters_that_moved_are_recorded_anew(tmp_path, device, graphs):
    moved = []

    class Moving(CapturedTrainer):
        def training_step(self, model, *args):
            if self.state.global_step == 5 and not moved:
                for p in model.parameters():
                    p.data = p.data.clone()
                    moved.append(p)
            return super().training_step(model, *args)

    expected = _train(Trainer, tmp_path, device)
    got = _train(Moving, tmp_path, device, pad_lengths=(8,), capture_warmup=1)
    _assert_same(got, expected)
    assert len(graphs) == 2


def test_step_that_cannot_be_recorded_goes_on_eagerly(tmp_path, device, graphs, monkeypatch, caplog):
    def fail(self, run):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(trainer_capture._StepGraphs, "_capture", fail)
    expected = _train(Trainer, tmp_path, device)
    with caplog.at_level(logging.WARNING, logger="bayeslora"):
        got = _train(CapturedTrainer, tmp_path, device, capture_warmup=1)
    _assert_same(got, expected)
    assert [r.message for r in caplog.records if r.name == "bayeslora"] == [
        "CapturedTrainer runs eagerly: the step cannot be captured: operation not permitted"
    ]


def test_runs_eagerly_without_a_gpu_and_says_so_once(tmp_path, caplog):
    cpu = torch.device("cpu")
    expected = _train(Trainer, tmp_path, cpu)
    with caplog.at_level(logging.WARNING, logger="bayeslora"):
        got = _train(CapturedTrainer, tmp_path, cpu, pad_lengths=(8,))
    assert torch.equal(got[1], expected[1])
    assert len([r for r in caplog.records if r.name == "bayeslora"]) == 1
    assert "not on a CUDA device" in caplog.text


def test_bad_arguments():
    with pytest.raises(ValueError, match="capture_warmup"):
        CapturedTrainer(capture_warmup=0)
