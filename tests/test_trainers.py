"""One run under HF Trainer, TRL, accelerate and Lightning: the losses and weights of a hand-written loop.

Every trainer takes the same model and settings; hooks note the batches it feeds and the losses it gets, and
the loop is run on those batches.
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from bayeslora import IVON, Posterior, PosteriorCallback, patch
from bayeslora.posterior_checks import check_ivon
from bayeslora.posterior_files import read_folder

pytestmark = pytest.mark.usefixtures("one_gpu", "fresh_accelerate")

STEPS, WARMUP, ACCUMULATION, CLIP = 6, 2, 2, 0.05
IVON_SETTINGS = {"lr": 0.1, "ess": 1e3, "hess_init": 0.1, "seed": 3}


class _Tokens(Dataset):
    def __init__(self, rows=24, seed=0):
        self.rows = torch.randint(3, 50, (rows, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def _model(patched=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    return patch(model) if patched else model


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _optimizer(model):
    return IVON(_trained(model), **IVON_SETTINGS)


def _scheduler(opt):
    return get_linear_schedule_with_warmup(opt, WARMUP, STEPS)


class _Record:
    """The arguments of a model's training calls, and the losses they gave."""

    def __init__(self, model):
        self.calls, self.losses = [], []
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, _args, kwargs, output):
        if torch.is_grad_enabled():
            kept = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch"}
            self.calls.append({k: v for k, v in kwargs.items() if k in kept})
            self.losses.append(output.loss.item())


def _values(model):
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def _assert_is_the_hand_written_loop(record, model, device, rel=0.0):
    if device.type != "cpu":  # attention's backward sums in no fixed order there
        rel = max(rel, 1e-4)
    assert len(record.calls) == STEPS * ACCUMULATION
    hand = _model().to(device).train()
    opt = _optimizer(hand)
    scheduler = _scheduler(opt)
    losses = []
    for step in range(STEPS):
        with opt.sampled_params(train=True):
            for call in record.calls[ACCUMULATION * step : ACCUMULATION * (step + 1)]:
                loss = hand(**call).loss
                losses.append(loss.item())
                (loss if "num_items_in_batch" in call else loss / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(_trained(hand), CLIP)
        opt.step()
        opt.zero_grad()
        scheduler.step()
    assert record.losses == pytest.approx(losses, rel=rel, abs=0)
    assert len(set(losses)) == len(losses)
    for name, value in _values(hand).items():
        torch.testing.assert_close(value, _values(model)[name], rtol=rel, atol=rel)


def _arguments(folder, device, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": CLIP,
        "warmup_steps": WARMUP,
        "lr_scheduler_type": "linear",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        **changes,
    }


# ---- number for number ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_hf_trainer(how, tmp_path, device):
    model = _model()
    record = _Record(model)
    if how == "optimizers":
        opt = _optimizer(model)
        given = {"optimizers": (opt, _scheduler(opt))}
    else:
        given = {"optimizer_cls_and_kwargs": (IVON, {**IVON_SETTINGS, "weight_decay": 1e-4})}
    arguments = TrainingArguments(**_arguments(tmp_path, device, weight_decay=1e-4))
    Trainer(model, arguments, train_dataset=_Tokens(), eval_dataset=_Tokens(4), **given).train()
    _assert_is_the_hand_written_loop(record, model, device)


def test_trl_sft_trainer(tmp_path, device):
    trl = pytest.importorskip("trl")
    from datasets import Dataset as HfDataset
    from tiny_lm import make_tokenizer

    model = _model()
    record = _Record(model)
    opt = _optimizer(model)
    rows = HfDataset.from_dict({"input_ids": _Tokens().rows.tolist()})
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    arguments = trl.SFTConfig(**_arguments(tmp_path, device, bf16=False, gradient_checkpointing=False))
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
        optimizers=(opt, _scheduler(opt)),
        callbacks=[PosteriorCallback()],
    )
    trainer.train()
    # TRL computes log-probabilities in chunks: its gradients are summed in another order.
    _assert_is_the_hand_written_loop(record, model, device, rel=1e-5)
    _assert_checkpoint_is_the_posterior(model, opt, tmp_path / f"checkpoint-{STEPS}")


def test_accelerate_loop(device):
    from accelerate import Accelerator

    model = _model()
    record = _Record(model)
    opt = _optimizer(model)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=device.type == "cpu")
    loader = DataLoader(_Tokens(), batch_size=2)
    model, wrapped, loader, scheduler = accelerator.prepare(model, opt, loader, _scheduler(opt))
    for batch in loader:
        with accelerator.accumulate(model):
            wrapped.train()
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(_trained(model), CLIP)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
    _assert_is_the_hand_written_loop(record, accelerator.unwrap_model(model), device)


def test_lightning(tmp_path, device):
    lightning = pytest.importorskip("lightning.pytorch")
    from bayeslora import LightningCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = _model().train()
            self.means = []

        def training_step(self, batch, _index):
            return self.model(**batch).loss

        def validation_step(self, batch, _index):
            opt = self.optimizers(use_pl_optimizer=False)
            for p in _trained(self.model):
                assert not opt.state[p] or torch.equal(p, opt.state[p]["mean"])
            return self.model(**batch).loss

        def configure_optimizers(self):
            opt = _optimizer(self.model)
            schedule = {"scheduler": _scheduler(opt), "interval": "step"}
            return {"optimizer": opt, "lr_scheduler": schedule}

    module = Module()
    record = _Record(module.model)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=CLIP,
        val_check_interval=3,  # in the middle of a step
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        default_root_dir=str(tmp_path),
        callbacks=[LightningCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(_Tokens(), batch_size=2), DataLoader(_Tokens(4), batch_size=2))
    _assert_is_the_hand_written_loop(record, module.model, device)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    for name, value in _values(module).items():
        assert torch.equal(saved[name].cpu(), value)


def _accumulate_under_lightning(lightning, folder, *callbacks):
    """Two steps of two micro-batches of a linear layer under IVON."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def training_step(self, batch, _index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return IVON(self.parameters(), lr=0.1, ess=10.0)

    trainer = lightning.Trainer(
        max_steps=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Module(), DataLoader(torch.randn(4, 3), batch_size=1))


def test_lightning_writes_the_mean_in_the_middle_of_a_step(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from bayeslora import LightningCallback

    class SavesEveryBatch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, _outputs, _batch, index):
            trainer.save_checkpoint(tmp_path / f"{index}.ckpt")
            state = module.optimizers(use_pl_optimizer=False).state
            self.mean = {n: state[p]["mean"].clone() for n, p in module.named_parameters()}

    saves = SavesEveryBatch()
    _accumulate_under_lightning(lightning, tmp_path, saves, LightningCallback())
    means = [torch.load(tmp_path / f"{i}.ckpt", weights_only=False)["state_dict"] for i in range(4)]
    for name in saves.mean:
        assert torch.equal(means[1][name], means[2][name])  # the second in the middle of a step
        assert torch.equal(means[3][name], saves.mean[name])
        assert not torch.equal(means[2][name], means[3][name])


def test_lightning_that_accumulates_without_the_callback_is_refused(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    with pytest.raises(RuntimeError, match="LightningCallback"):
        _accumulate_under_lightning(lightning, tmp_path)


def test_accelerate_resumes_at_the_mean_from_the_middle_of_a_step(tmp_path):
    from accelerate import Accelerator

    def prepared():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        return accelerator, *accelerator.prepare(model, IVON(model.parameters(), lr=0.1, ess=10.0))

    accelerator, model, opt = prepared()
    for batch in torch.randn(3, 4, 3):
        with accelerator.accumulate(model):
            opt.train()
            accelerator.backward(model(batch).square().mean())
            opt.step()
            opt.zero_grad()
    accelerator.save_state(str(tmp_path))
    sample = _values(model)
    opt.eval()
    mean = _values(model)
    accelerator, model, opt = prepared()
    accelerator.load_state(str(tmp_path))
    for name, value in _values(model).items():
        assert torch.equal(value, mean[name])
    opt.train()
    for name, value in _values(model).items():
        assert torch.equal(value, sample[name])


# ---- the posterior beside the checkpoints --------------------------------------------------------


def _assert_checkpoint_is_the_posterior(model, opt, folder):
    """The folder holds the model's adapter and the optimizer's Hessian, for PEFT and for us."""
    loaded = Posterior.from_pretrained(_model(patched=False), folder)
    current = opt.posterior(model)
    assert loaded.parameters.keys() == current.parameters.keys()
    for name, gaussian in current.parameters.items():
        assert torch.equal(loaded.parameters[name].mean.cpu(), gaussian.mean.cpu()), name
        assert torch.equal(loaded.parameters[name].hess.cpu(), gaussian.hess.cpu()), name


class _Means(TrainerCallback):
    """Notes the mean after every step and evaluation, and that the parameters hold it."""

    def __init__(self, model, opt):
        self.model, self.opt, self.at = model, opt, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.at[state.global_step] = {
            n: self.opt.state[p]["mean"].cpu().clone()
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        self._holds_mean(state)

    def _holds_mean(self, state):
        for name, value in _values(self.model).items():
            assert torch.equal(value, self.at[state.global_step][name]), name

    def on_evaluate(self, args, state, control, **kwargs):
        self._holds_mean(state)

    on_save = on_evaluate


@pytest.mark.parametrize("save_only_model", [False, True])
def test_every_checkpoint_is_a_posterior_and_the_best_comes_back(save_only_model, tmp_path, device):
    model = _model()
    opt = IVON(_trained(model), **{**IVON_SETTINGS, "lr": 20.0})  # so large that it soon overfits
    means = _Means(model, opt)
    settings = {
        "max_steps": 40,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_only_model": save_only_model,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**_arguments(tmp_path, device, **settings)),
        train_dataset=_Tokens(4),
        eval_dataset=_Tokens(40, seed=1),
        optimizers=(opt, None),
        callbacks=[PosteriorCallback(), means, EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step < 40  # stopped early
    best = trainer.state.best_model_checkpoint
    best_step = int(best.rpartition("-")[2])
    assert 0 < best_step < trainer.state.global_step
    for name, value in _values(model).items():
        assert torch.equal(value, means.at[best_step][name])
    for folder in tmp_path.glob("checkpoint-*"):
        step = int(folder.name.rpartition("-")[2])
        assert (folder / "optimizer.pt").exists() is not save_only_model
        posterior = Posterior.from_pretrained(_model(patched=False), folder)
        for name, mean in posterior.mean.items():
            assert torch.equal(mean.cpu(), means.at[step][name])
    posterior = Posterior.from_pretrained(model, best)
    assert posterior.predict({"input_ids": _Tokens(2).rows.to(device)}, 2).shape == (2, 6, 50)


@pytest.mark.gpu
def test_a_checkpoint_of_one_device_resumes_on_another(tmp_path):
    runs = {}
    for name, use_cpu, resume in (("cpu", True, None), ("gpu", False, "cpu"), ("back", True, "gpu")):
        model = _model()
        opt = _optimizer(model)
        steps = {"cpu": 2, "gpu": 4, "back": STEPS}[name]
        settings = _arguments(tmp_path / name, torch.device("cpu"), use_cpu=use_cpu, max_steps=steps)
        trainer = Trainer(
            model,
            TrainingArguments(**settings),
            train_dataset=_Tokens(),
            eval_dataset=_Tokens(4),
            optimizers=(opt, get_linear_schedule_with_warmup(opt, WARMUP, STEPS)),
        )
        trainer.train(resume and str(tmp_path / resume / f"checkpoint-{steps - 2}"))
        runs[name] = _values(model)
    model = _model()
    opt = _optimizer(model)
    settings = _arguments(tmp_path / "straight", torch.device("cpu"), use_cpu=True)
    trainer = Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=_Tokens(),
        eval_dataset=_Tokens(4),
        optimizers=(opt, _scheduler(opt)),
    )
    trainer.train()
    for name, value in _values(model).items():  # the devices' products differ in their last bits
        torch.testing.assert_close(runs["back"][name], value, rtol=1e-3, atol=1e-4)


def test_callback_refuses_what_it_cannot_save(tmp_path, device):
    arguments = TrainingArguments(**_arguments(tmp_path, device, eval_strategy="no"))
    trainer = Trainer(_model(), arguments, train_dataset=_Tokens(), callbacks=[PosteriorCallback()])
    with pytest.raises(TypeError, match=r"must be a bayeslora.IVON, got .*Adam"):
        trainer.train()
    base = _model().unload()
    opt = IVON(base.parameters(), **IVON_SETTINGS)
    trainer = Trainer(
        base, arguments, train_dataset=_Tokens(), optimizers=(opt, None), callbacks=[PosteriorCallback()]
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM; pass the model through"):
        trainer.train()
    prompts = get_peft_model(base, PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    trainer = Trainer(
        prompts, arguments, train_dataset=_Tokens(), optimizers=(_optimizer(prompts), None),
        callbacks=[PosteriorCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="a P_TUNING adapter does not hold it as it is"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("best", [False, True])
def test_an_old_checkpoint_goes_once_the_new_one_has_its_posterior(best, tmp_path, device, monkeypatch):
    model = _model()
    settings = {"save_total_limit": 1, "save_steps": 1, "eval_steps": 1, "max_steps": 4}
    if best:
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    deleted, delete = [], shutil.rmtree

    def checked(path, *args, **kwargs):
        if Path(path).parent == tmp_path and Path(path).name.startswith("checkpoint-"):
            others = [folder for folder in tmp_path.glob("checkpoint-*") if folder != Path(path)]
            whole = [read_folder(folder, {"ivon": check_ivon}) for folder in others]
            deleted.append((path, len(whole)))
        delete(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", checked)
    arguments = TrainingArguments(**_arguments(tmp_path, device, **settings))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=_Tokens(),
        eval_dataset=_Tokens(4),
        optimizers=(IVON(_trained(model), **{**IVON_SETTINGS, "lr": 20.0}), None),
        callbacks=[PosteriorCallback()],
    )
    trainer.train()
    assert len(deleted) == 3 and all(whole for _, whole in deleted)
    (left,) = tmp_path.glob("checkpoint-*")
    assert left.name == (Path(trainer.state.best_model_checkpoint).name if best else "checkpoint-4")
    Posterior.from_pretrained(_model(patched=False), left)
    assert type(arguments.save_total_limit) is int and arguments.save_total_limit == 1
    assert torch.load(left / "training_args.bin", weights_only=False).save_total_limit == 1
