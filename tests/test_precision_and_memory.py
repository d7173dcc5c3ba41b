"""A patched model under IVON in every precision, with every memory saver, and compiled at several lengths."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON, patch

TOKENS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _model(device, dtype=torch.float32, patched=True, autocast_adapter_dtype=True, layers=2, **lora):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,
    )
    base = LlamaForCausalLM(config).to(device, dtype)
    lora = LoraConfig(r=4, target_modules=ALL_LINEAR, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base, lora, autocast_adapter_dtype=autocast_adapter_dtype).train()
    return patch(model) if patched else model


def _optimizer(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return IVON(trained, lr=0.2, ess=1e4, hess_init=0.1, rescale_lr=False, clip_radius=0.1, seed=3)


# ---- precision -----------------------------------------------------------------------------------


class Precision(NamedTuple):
    dtype: torch.dtype
    adapters_fp32: bool = True
    autocast: torch.dtype | None = None
    scaler: bool = False


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16, adapters_fp32=False),
    "bf16_fp32_adapters": Precision(torch.bfloat16),
    "bf16_autocast": Precision(torch.float32, autocast=torch.bfloat16),
    "bf16_autocast_over_bf16": Precision(torch.bfloat16, autocast=torch.bfloat16),
    "fp16_autocast_scaler": Precision(torch.float32, autocast=torch.float16, scaler=True),
    "fp16_fp32_adapters_scaler": Precision(torch.float16, autocast=torch.float16, scaler=True),
}


def _losses(precision, device, patched, steps=8):
    model = _model(device, precision.dtype, patched, precision.adapters_fp32)
    opt = _optimizer(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=precision.scaler)
    tokens = TOKENS.to(device)
    losses = []
    for _ in range(steps):
        with opt.sampled_params(train=True):
            with torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None):
                loss = model(input_ids=tokens, labels=tokens).loss
            scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss.item())
    assert opt.skipped_steps == 0
    for p, state in opt.state.items():
        assert all(value.dtype == torch.float32 for value in state.values())
        assert torch.equal(p, state["mean"].to(p.dtype))
    expected = torch.float32 if precision.adapters_fp32 else precision.dtype
    assert {p.dtype for p in opt.state} == {expected}
    return losses


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_trains_as_fp32_does(name, device):
    precision = PRECISIONS[name]
    truth = _losses(PRECISIONS["fp32"], device, patched=False)
    own = _losses(precision, device, patched=True)
    pefts = _losses(precision, device, patched=False)
    assert truth[-1] < 0.95 * truth[0]
    # fp32 differs by orders of summation; halves by roundings of 2^-9 (bf16) through two layers and 8 steps.
    slack = 1e-4 if precision == PRECISIONS["fp32"] else 0.02
    for loss, peft, exact in zip(own, pefts, truth, strict=True):
        assert abs(loss - exact) <= abs(peft - exact) + slack * exact


# ---- memory savers -------------------------------------------------------------------------------

SAVERS = ["checkpointing_reentrant", "checkpointing", "offload", "checkpointing_offload"]


def _dropout_losses(device, saver):
    model = _model(device, lora_dropout=0.2)
    if saver.startswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": saver.endswith("reentrant")})
        model.enable_input_require_grads()
    opt = _optimizer(model)
    tokens = TOKENS.to(device)
    torch.manual_seed(5)
    losses = []
    for _ in range(4):
        hooks = torch.autograd.graph.save_on_cpu() if "offload" in saver else contextlib.nullcontext()
        with opt.sampled_params(train=True):
            with hooks:
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("saver", SAVERS)
def test_memory_savers_change_no_loss(saver, device):
    rel = 1e-6 if device.type == "cpu" else 1e-4  # attention's backward on a GPU sums in no fixed order
    assert _dropout_losses(device, saver) == pytest.approx(_dropout_losses(device, "none"), rel=rel)


# ---- torch.compile -------------------------------------------------------------------------------


def test_a_compiled_model_recompiles_at_most_once_a_new_length(device):
    model = _model(device, layers=1)
    opt = _optimizer(model)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    eager = _model(device, layers=1)
    eager_opt = _optimizer(eager)
    seen, frames = set(), []
    for length in (8, 12, 16, 8):
        tokens = TOKENS.repeat(1, 3)[:, :length].to(device)
        losses = []
        for module, call, optimizer in ((model, compiled, opt), (eager, eager, eager_opt)):
            with optimizer.sampled_params(train=True):
                loss = call(input_ids=tokens, labels=tokens).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                module.eval()
                losses.append((loss.item(), call(input_ids=tokens).logits))
                module.train()
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
        torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-3, atol=1e-4)
        frames.append(counter.frame_count - sum(frames))
        # Training and inference are one graph each.
        assert frames[-1] <= (0 if length in seen else 2), frames
        seen.add(length)
