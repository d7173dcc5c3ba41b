"""IVON and a patched model under HF Trainer: accumulation, clipping, a scheduler, a checkpoint, a resume."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bayeslora import IVON, Posterior, patch

pytestmark = pytest.mark.usefixtures("one_gpu")


class _Tokens(Dataset):
    def __init__(self):
        self.rows = torch.randint(50, (160, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def _model(patched, dropout):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=dropout)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    return patch(model) if patched else model


def _trainer(folder, device, *, patched=True, dropout=0.1, **arguments):
    model = _model(patched, dropout)
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=1e3, hess_init=0.1, seed=3)
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.05,
        "warmup_steps": 5,
        "lr_scheduler_type": "linear",
        "save_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "logging_steps": 5,
        "report_to": [],
        "use_cpu": device.type == "cpu",
        "seed": 1,
        "disable_tqdm": True,
        **arguments,
    }
    data = _Tokens()
    arguments = TrainingArguments(**settings)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, optimizers=(opt, None)
    )
    return trainer, model, opt


def _state(model, opt):
    tensors = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors |= {f"{name}.{k}": v.cpu().clone() for k, v in opt.state[p].items()}
    return tensors


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_resume_matches_the_uninterrupted_run_exactly(tmp_path, device, gradient_checkpointing):
    settings = {"gradient_checkpointing": gradient_checkpointing}
    trainer, model, opt = _trainer(tmp_path / "straight", device, **settings)
    trainer.train()
    straight = _state(model, opt)
    assert trainer.state.global_step == 20
    start = _model(True, 0.1).state_dict()
    assert any(not torch.equal(p, start[n].cpu()) for n, p in straight.items() if n in start)

    trainer, model, opt = _trainer(tmp_path / "resumed", device, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-10"))
    assert trainer.state.global_step == 20
    resumed = _state(model, opt)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    posterior = Posterior.from_optimizer(model, trainer.optimizer)
    assert posterior.predict({"input_ids": _Tokens().rows[:2].to(device)}, 2).shape == (2, 6, 50)


def test_trainer_is_the_hand_written_loop(tmp_path, device):
    trainer, model, opt = _trainer(
        tmp_path, device, dropout=0.0, eval_strategy="no", save_strategy="no", max_steps=5
    )
    batches = [{k: v.to(device) for k, v in b.items()} for b in trainer.get_train_dataloader()]
    trainer.train()

    hand = _model(True, 0.0).to(device).train()
    opt_hand = IVON([p for p in hand.parameters() if p.requires_grad], lr=0.1, ess=1e3, hess_init=0.1, seed=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt_hand, lambda step: step / 5)  # all warm-up
    for step in range(5):
        with opt_hand.sampled_params(train=True):
            for batch in batches[4 * step : 4 * step + 4]:
                (hand(**batch).loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.05)
        opt_hand.step()
        opt_hand.zero_grad()
        scheduler.step()
    for name, value in _state(model, opt).items():
        torch.testing.assert_close(value, _state(hand, opt_hand)[name], rtol=1e-4, atol=1e-6)


def test_patched_and_unpatched_models_train_alike(tmp_path, device):
    runs = []
    for patched in (True, False):
        trainer, model, opt = _trainer(
            tmp_path,
            device,
            patched=patched,
            dropout=0.0,
            eval_strategy="no",
            save_strategy="no",
            max_steps=4,
        )
        trainer.train()
        runs.append(_state(model, opt))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-4, atol=1e-6)
