"""Scripts written for ivon-opt, run with only the import changed: the same losses from the same noise.

The loop is that of the IVON-LoRA papers (Cong et al., 2024): ``sampled_params(train=True)`` around forward
and backward, ``sampled_params()`` for each member of the ensemble at evaluation, ``rescale_lr=False``.
"""

import ivon as ivon_opt
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora
from bayeslora import patch
from bayeslora.kernels import noise_twin

SEED = 7
TRAIN = torch.randint(3, 40, (16, 6), generator=torch.Generator().manual_seed(0))
TEST = torch.randint(3, 40, (5, 6), generator=torch.Generator().manual_seed(1))


def _model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config).double(), lora, autocast_adapter_dtype=False)


def ivon_lora_script(ivon_class, model, mc_samples=1, **settings):
    """The published loop; returns the training losses and the ensemble's test probabilities."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = ivon_class(
        params,
        lr=0.03,
        ess=1e4,
        hess_init=5e-3,
        beta1=0.9,
        beta2=0.999,
        weight_decay=1e-6,
        clip_radius=0.05,
        rescale_lr=False,
        **settings,
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
    losses = []
    for step in range(12):
        batch = TRAIN[4 * (step % 4) : 4 * (step % 4) + 4]
        for _ in range(mc_samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    probabilities = []
    with torch.no_grad():
        for _ in range(4):
            with optimizer.sampled_params(train=False):
                probabilities.append(model(input_ids=TEST).logits.softmax(-1))
        at_mean = model(input_ids=TEST).logits.softmax(-1)
    return torch.tensor(losses), torch.stack(probabilities).mean(0), at_mean


def _our_noise(params, train_draws):
    """A stand-in for ``torch.randn`` in ivon-opt that gives it the normals of our draws."""
    draws = iter([*range(1, train_draws + 1), *range(1 << 31, (1 << 31) + 4)])  # training, then evaluation

    def randn(numel, device=None, dtype=None):
        draw = next(draws)
        parts = []
        for stream, p in enumerate(params):
            group = torch.arange((p.numel() + 3) // 4)
            normals = noise_twin.randn4x(SEED, draw, torch.full_like(group, stream), group)
            parts.append(torch.stack(normals, dim=-1).view(-1)[: p.numel()])
        return torch.cat(parts).to(device, dtype)

    return randn


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_the_published_loop_with_only_the_import_changed(mc_samples, monkeypatch):
    ours = ivon_lora_script(bayeslora.IVON, patch(_model()), mc_samples, seed=SEED)
    model = _model()
    with monkeypatch.context() as changed:
        trained = [p for p in model.parameters() if p.requires_grad]
        changed.setattr(torch, "randn", _our_noise(trained, 12 * mc_samples))
        theirs = ivon_lora_script(ivon_opt.IVON, model, mc_samples)
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-7)  # Llama takes norms and loss in fp32
    assert not torch.allclose(ours[1], ours[2], rtol=1e-3)
