"""What each rank runs in test_distributed_trainers.py: HF Trainer under DDP, accelerate, FSDP2."""

import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bayeslora import IVON, PosteriorCallback, keep_gradients_local, patch
from bayeslora.patching import FusedLoraLinear

WORLD, STEPS = 2, 6
SETTINGS = {"lr": 0.1, "ess": 1e3, "hess_init": 0.1, "seed": 3}


class Tokens(Dataset):
    def __len__(self):
        return 21  # uneven over two ranks and batches of two

    def __getitem__(self, index):
        row = torch.randint(3, 50, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def rows(start, stop):
    return torch.stack([Tokens()[i]["input_ids"] for i in range(start, stop)])


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def model():
    lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"], task_type="CAUSAL_LM")
    return patch(get_peft_model(base(), lora)).train()


def optimizer(module, **settings):
    return IVON([p for p in module.parameters() if p.requires_grad], **SETTINGS, **settings)


def trained(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def trainer_run(folder, **settings):
    module = model()
    opt = optimizer(module, **settings)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=STEPS,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
    )
    trainer = Trainer(
        module, arguments, train_dataset=Tokens(), optimizers=(opt, None), callbacks=[PosteriorCallback()]
    )
    if settings:
        keep_gradients_local(trainer)
    trainer.train()
    return {"parallel": str(arguments.parallel_mode), "weights": trained(module)}


def fsdp_steps(module, opt):
    """Every rank takes the whole batch: the run of one process."""
    for step in range(STEPS):
        batch = rows(2 * step, 2 * step + 2)
        opt.train()
        module(input_ids=batch, labels=batch).loss.backward()
        opt.step()
        opt.zero_grad()


def sharded(module):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in module.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def fsdp_run(folder):
    module = sharded(model())
    opt = optimizer(module)
    fsdp_steps(module, opt)
    opt.posterior(module).save_pretrained(folder)
    fused = sum(type(m) is FusedLoraLinear for m in module.modules())
    return {n: p.full_tensor() for n, p in trained(module).items()}, fused


def switched_run():
    """The optimizer is built before the shards, and gets them as accelerate's FSDP2 hands them over.

    (accelerate itself prepares FSDP on GPUs only.)
    """
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    module = model()
    opt = optimizer(module)
    addresses = {n: p.data_ptr() for n, p in module.named_parameters()}
    for group in opt.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1)
            group["params"][i].data_ptr = p.data_ptr()
    sharded(module)
    fsdp2_switch_optimizer_parameters(opt, {addresses[n]: p for n, p in module.named_parameters()})
    fsdp_steps(module, opt)
    return {n: p.full_tensor() for n, p in trained(module).items()}


def accelerate_independent_run(rank):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module = model()
    opt = optimizer(module, sync="independent")
    wrapped, opt = accelerator.prepare(module, opt)
    keep_gradients_local(wrapped)
    for step in range(STEPS):
        batch = rows(2 * step + rank, 2 * step + rank + 1)
        opt.train()
        accelerator.backward(wrapped(input_ids=batch, labels=batch).loss)
        opt.step()
        opt.zero_grad()
    return trained(module)


def job(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results = {"trainer": trainer_run(folder / "trainer")}
    results["trainer independent"] = trainer_run(folder / "independent", sync="independent")
    results["independent"] = accelerate_independent_run(rank)
    results["fsdp"], results["fused"] = fsdp_run(folder / "fsdp")
    results["switched"] = switched_run()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
