"""Tiny MonteCLoRA models for the tests: PEFT's own, and the same patched."""

import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora

VOCABULARY = 64
TOKENS = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(7))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def tiny_llama(hidden_size=32):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def peft_model(lora=None, **monteclora):
    """A model with PEFT's MonteCLoRA on q, k and v; nothing in it is zero."""
    config = {"num_samples": 4, "sample_scaler": 0.05, "use_entropy": True, "buffer_size": 2, **monteclora}
    lora = {"r": 3, "target_modules": ["q_proj", "k_proj", "v_proj"], **(lora or {})}
    model = get_peft_model(tiny_llama(), LoraConfig(monteclora_config=MontecloraConfig(**config), **lora))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.data.copy_(0.5 * torch.rand(parameter.shape, generator=generator))
    return model.train()


def patched_model(lora=None, options=None, **monteclora):
    model = bayeslora.patch(peft_model(lora, **monteclora))
    bayeslora.configure_monteclora(model, **{"seed": 5, **(options or {})})
    return model


def bank_of(model):
    return next(m._monteclora["default"][0] for m in model.modules() if "_monteclora" in m.__dict__)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
