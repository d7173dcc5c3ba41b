"""Quantized bases: bitsandbytes int8 and nf4 with the LoRA part fused, GPTQ and AWQ left to PEFT."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from tiny_lm import make_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bayeslora
from bayeslora import IVON, Posterior, patch, unpatch

TOKENS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))
KINDS = ["int8", "nf4"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """Of widths that are multiples of 64, the block that bitsandbytes needs whole on some CPUs."""
    folder = tmp_path_factory.mktemp("base")
    make_model(64, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def _model(base_folder, kind, device, dtype=torch.float32, prepare=False, **lora):
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=config, device_map=str(device), dtype=dtype
    )
    if prepare:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, **lora))
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).mul(0.1).to(p)
    return model


def _gradients(model, device, autocast=None):
    model.zero_grad()
    tokens = TOKENS.to(device)
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach().float(), "logits": output.logits.detach().float(), **grads}


def _assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert ((got[name] - value).abs().max() / scale).item() <= tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_pefts(kind, base_folder, device, caplog):
    model = _model(base_folder, kind, device)
    want = _gradients(model, device)
    assert sum("lora" in name for name in want) == 28
    with caplog.at_level(logging.INFO, "bayeslora"):
        patch(model)
    assert caplog.messages[-1] == "patched 14 of 14 LoRA layers"
    classes = {type(m).__qualname__ for m in model.modules() if "lora" in type(m).__module__}
    assert {"int8": "FusedLora8bit", "nf4": "FusedLora4bit"}[kind] in classes
    assert patch(model) is model  # again: nothing changes
    # int8 rounds activations: on the GPU its own products are not exact either.
    _assert_close(_gradients(model, device), want, 1e-5 if device.type == "cpu" else 2e-2)
    unpatch(model)
    assert not any(type(m).__module__ == "bayeslora.lora_quantized" for m in model.modules())
    _assert_close(_gradients(model, device), want, 1e-6 if device.type == "cpu" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_half_precision_is_as_good_as_pefts(kind, how, base_folder, device):
    truth = _gradients(_model(base_folder, kind, device), device)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    autocast = None if how == "bf16" else torch.bfloat16
    model = _model(base_folder, kind, device, dtype)
    peft = _gradients(model, device, autocast)
    got = _gradients(patch(model), device, autocast)
    for name, value in truth.items():
        own, pefts = ((run[name] - value).norm() / value.norm() for run in (got, peft))
        # PEFT computes the LoRA term in fp32, we in bf16: some roundings of 2^-9 more, through two layers.
        assert own <= 1.5 * pefts + 8 * 2.0**-9, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_and_gradient_checkpointing(kind, use_reentrant, base_folder, device):
    """The recomputation draws the mask of the forward: the gradients are those without checkpointing."""
    runs = []
    for checkpointing in (False, True):
        model = patch(_model(base_folder, kind, device, prepare=True, lora_dropout=0.3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        runs.append(_gradients(model, device))
    _assert_close(runs[1], runs[0], 1e-5 if device.type == "cpu" else 2e-2)


def test_the_dropped_gradient_is_that_of_the_mask(device):
    pytest.importorskip("bitsandbytes")
    from bayeslora.lora_quantized import add_lora

    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), (5, 7), (2, 7), (3, 2))
    ]
    base, x, a, b = (t.to(device).requires_grad_() for t in tensors)

    def same_mask(*args):
        torch.manual_seed(4)
        return add_lora(*args, scaling=0.5, dropout_p=0.4)

    assert torch.autograd.gradcheck(same_mask, (base, x, a, b))


@pytest.mark.parametrize("frozen", ["nothing", "x", "A", "B"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_second_derivatives(frozen, dropout_p, device):
    """Through A where x is a function of it, as in any model, and where the loss is linear in the output."""
    pytest.importorskip("bitsandbytes")
    from bayeslora.lora_quantized import add_lora

    generator = torch.Generator().manual_seed(0)
    shapes = {"base": (5, 3), "x": (5, 7), "A": (2, 7), "B": (3, 2)}
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_(name != frozen)
        for name, shape in shapes.items()
    ]

    def same_mask(base, x, a, b):
        torch.manual_seed(4)
        return add_lora(base, x.square(), a, b, scaling=0.5, dropout_p=dropout_p)

    assert torch.autograd.gradgradcheck(same_mask, leaves)


def test_a_mode_and_hooks_on_all_modules_see_torchs_operators(base_folder, device):
    model = patch(_model(base_folder, "int8", device))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    with torch.no_grad():
        x = torch.randn(2, layer.in_features, device=device)
        want, seen = layer(x), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            hooked = layer(x)
        finally:
            handle.remove()
        with FlopCounterMode(display=False) as counter:
            counted = layer(x)
    assert seen.count(nn.Linear) == 2  # A and B
    assert counter.get_total_flops() >= 2 * 2 * 4 * (layer.in_features + layer.out_features)
    tolerance = 1e-5 if device.type == "cpu" else 2e-2
    _assert_close({"hooked": hooked, "counted": counted}, {"hooked": want, "counted": want}, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_tools_see_pefts_names(kind, base_folder, device):
    model = _model(base_folder, kind, device)
    want = [(status.name, status.module_type) for status in model.get_layer_status()]
    patch(model)
    assert [(status.name, status.module_type) for status in model.get_layer_status()] == want


@pytest.mark.parametrize("kind", KINDS)
def test_ivon_trains_and_the_posterior_comes_back(kind, base_folder, device, tmp_path):
    losses = []
    for patched in (True, False):
        model = _model(base_folder, kind, device, prepare=True).train()
        if patched:
            patch(model)
        opt = IVON(
            [p for p in model.parameters() if p.requires_grad], lr=0.05, ess=1e4, hess_init=0.1, seed=3
        )
        losses.append([])
        for _ in range(4):
            with opt.sampled_params(train=True):
                loss = model(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss
                loss.backward()
            opt.step()
            opt.zero_grad()
            losses[-1].append(loss.item())
        if patched:
            posterior = opt.posterior(model)
            posterior.save_pretrained(tmp_path)
            query = {"input_ids": TOKENS.to(device)}
            loaded = Posterior.from_pretrained(_model(base_folder, kind, device, prepare=True), tmp_path)
            torch.testing.assert_close(
                posterior.predict(query, 2), loaded.predict(query, 2), rtol=0.02, atol=1e-3
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if device.type == "cpu" else 1e-2)


@pytest.mark.parametrize(
    ("module", "layer_name", "base_name"),
    [("gptq", "GPTQLoraLinear", "QuantLinear"), ("awq", "AwqLoraLinear", "WQLinear_GEMM")],
)
def test_gptq_and_awq_are_left_to_peft_with_a_line(module, layer_name, base_name, caplog):
    """Their kernels need a GPU and their own packages: a layer of a class that lives where PEFT's does."""
    model = get_peft_model(make_model(64), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = type(layer_name, (PeftLoraLinear,), {"__module__": f"peft.tuners.lora.{module}"})
    layer.base_layer.__class__ = type(base_name, (nn.Linear,), {})
    with caplog.at_level(logging.INFO, "bayeslora"):
        bayeslora.patch(model)
    assert caplog.messages == [f"patched 3 of 4 LoRA layers; left to PEFT: quantized base ({base_name}): 1"]
    assert type(layer).__name__ == layer_name
    model(input_ids=TOKENS)
