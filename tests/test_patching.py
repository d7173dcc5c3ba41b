"""`patch` on tiny random Llama and GPT-2 models: everything PEFT does goes on working, with its results."""

import copy
import logging
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import bayeslora
from bayeslora import patching
from bayeslora.patching import FusedLoraLinear

VOCABULARY = 64
# fp32 throughout: the fused layer adds the same terms in another order, over two layers and a softmax.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def _gpt2() -> nn.Module:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, **no_dropout))


FAMILIES = {
    "llama": (_llama, {"target_modules": "all-linear"}, 14),
    "gpt2": (_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
}


def _randomize(model: nn.Module, seed: int = 0) -> None:
    """Make every adapter weight count: PEFT starts lora_B at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def _adapted(device: torch.device, family: str = "llama", **config) -> PeftModel:
    build, targets, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(**{"r": 3, "lora_alpha": 5, **targets, **config}))
    _randomize(model)
    return model.to(device)


def _pair(device: torch.device, family: str = "llama", **config) -> tuple[PeftModel, PeftModel]:
    """A patched model and its unpatched twin."""
    model = _adapted(device, family, **config)
    return bayeslora.patch(copy.deepcopy(model)), model


def _tokens(device: torch.device) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)


def _logits(model: nn.Module, **arguments) -> torch.Tensor:
    parameter = next(model.parameters())
    return model(input_ids=_tokens(parameter.device), **arguments).logits


def _loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = _tokens(next(model.parameters()).device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in gradients)
    return {"loss": loss.detach(), **gradients}


def _assert_same(got, want, **tolerance) -> None:
    assert got.keys() == want.keys()
    for name in got:
        value, expected = (tensors[name].as_subclass(torch.Tensor) for tensors in (got, want))
        torch.testing.assert_close(
            value, expected, **(tolerance or CLOSE), msg=lambda m, name=name: f"{name}: {m}"
        )


def _fused_layers(model: nn.Module) -> list[FusedLoraLinear]:
    return [module for module in model.modules() if type(module) is FusedLoraLinear]


def _some_layer(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.fixture
def fused_calls(monkeypatch) -> list:
    """Grows by the adapter's name at each call that the fused forward serves."""
    calls: list[str] = []
    forward = patching._fused_forward

    def spy(layer, x, call):
        calls.extend(name for name, a in layer.lora_A.items() if a.weight is call.lora_a)
        return forward(layer, x, call)

    monkeypatch.setattr(patching, "_fused_forward", spy)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients(family, use_rslora, device, fused_calls):
    patched, plain = _pair(device, family, use_rslora=use_rslora)
    _assert_same(_loss_and_gradients(patched), _loss_and_gradients(plain))
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)
    assert len(fused_calls) == 2 * FAMILIES[family][2]


def test_generation(device):
    patched, plain = _pair(device)
    arguments = {"input_ids": _tokens(device), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(patched.generate(**arguments), plain.generate(**arguments))


def _assert_as_accurate_as_peft(got, peft_got, truth, dtype) -> None:
    """PEFT's LoRA term runs in fp32 or is rounded elsewhere: allow 4 more roundings, through 2 layers."""
    assert got.keys() == peft_got.keys() == truth.keys()
    for name, value in truth.items():
        assert got[name].dtype == peft_got[name].dtype
        error, peft_error = ((r[name].float() - value).norm() / value.norm() for r in (got, peft_got))
        assert error <= 2 * peft_error + 4 * torch.finfo(dtype).eps, (name, error, peft_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model_with_fp32_adapters(dtype, device):
    """What PEFT makes by default of a model in half precision."""
    truth = _adapted(device)
    plain = copy.deepcopy(truth).to(dtype)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    patched = bayeslora.patch(copy.deepcopy(plain))
    got, peft_got, want = map(_loss_and_gradients, (patched, plain, truth))
    _assert_as_accurate_as_peft(got, peft_got, want, dtype)


def test_autocast(device, fused_calls):
    patched, plain = _pair(device)
    want = _loss_and_gradients(plain)
    with torch.autocast(device.type, torch.bfloat16):
        assert _logits(patched).dtype == torch.bfloat16
        peft_got = _loss_and_gradients(plain)
        got = _loss_and_gradients(patched)  # backward inside of autocast
        tokens = _tokens(device)
        patched.zero_grad()
        loss = patched(input_ids=tokens, labels=tokens).loss
    loss.backward()  # and outside
    assert len(fused_calls) == 3 * 14
    _assert_as_accurate_as_peft(got, peft_got, want, torch.bfloat16)
    outside = {
        "loss": loss.detach(),
        **{n: p.grad for n, p in patched.named_parameters() if p.grad is not None},
    }
    _assert_as_accurate_as_peft(outside, peft_got, want, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_with_the_same_masks(family, use_reentrant, device, fused_calls):
    patched = bayeslora.patch(_adapted(device, family, lora_dropout=0.3)).train()
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(patched)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        fused_calls.clear()
        torch.manual_seed(5)
        results.append(_loss_and_gradients(model))
        assert len(fused_calls) == FAMILIES[family][2] * (2 if checkpointing else 1)
    assert len(results[0]) > 1
    _assert_same(results[1], results[0], rtol=0.0, atol=0.0)
    torch.manual_seed(6)
    assert not torch.equal(_loss_and_gradients(patched)["loss"], results[0]["loss"])


def test_dropout_follows_the_dropout_modules_mode(device):
    patched, plain = _pair(device, lora_dropout=0.5)
    torch.testing.assert_close(_logits(patched.eval()), _logits(plain.eval()), **CLOSE)
    assert not torch.equal(_logits(patched.train()), _logits(patched))
    for layer in _fused_layers(patched):
        layer.lora_dropout.eval()
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)


def test_gradients_reach_the_embedding_output(device):
    patched, plain = _pair(device)
    outputs = []
    for model in (patched, plain):
        model.enable_input_require_grads()
        kept = []
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda m, i, out, kept=kept: (out.retain_grad(), kept.append(out))[0])
        _loss_and_gradients(model)
        outputs.append(kept[0])
    assert outputs[0].requires_grad
    torch.testing.assert_close(outputs[0].grad, outputs[1].grad, **CLOSE)


def test_state_dict_and_saved_folder(device, tmp_path):
    patched, plain = _pair(device)
    assert patched.state_dict().keys() == plain.state_dict().keys()
    _assert_same(get_peft_model_state_dict(patched), get_peft_model_state_dict(plain), rtol=0.0, atol=0.0)
    patched.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    got, want = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("patched", "plain"))
    _assert_same(got, want, rtol=0.0, atol=0.0)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(_llama(), tmp_path / "patched").to(device)
    torch.testing.assert_close(_logits(loaded), _logits(plain), rtol=0.0, atol=0.0)
    peft.set_peft_model_state_dict(patched, {name: value * 2 for name, value in want.items()})
    peft.set_peft_model_state_dict(plain, {name: value * 2 for name, value in want.items()})
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload(family, device):
    patched, plain = _pair(device, family)
    before = _logits(patched).detach()
    merged = patched.merge_and_unload()
    assert not _fused_layers(merged)
    torch.testing.assert_close(_logits(merged), before, **CLOSE)
    torch.testing.assert_close(_logits(merged), _logits(plain.merge_and_unload()), rtol=0.0, atol=0.0)


def test_merge_and_unmerge(device, fused_calls):
    patched, plain = _pair(device)
    patched.merge_adapter()
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)
    assert not fused_calls
    patched.unmerge_adapter()
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)
    assert fused_calls


def test_disabled_adapters(device, fused_calls):
    patched, plain = _pair(device)
    with patched.disable_adapter(), plain.disable_adapter():
        base = _logits(patched)
        assert torch.equal(base, _logits(plain))
        assert not fused_calls
    assert not torch.allclose(_logits(patched), base, **CLOSE)
    assert fused_calls


def test_several_adapters(device, fused_calls):
    """Switched, batched, weighted, combined, added after the patch and deleted."""
    patched, plain = _pair(device)
    for model in (patched, plain):
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"]))
        _randomize(model, seed=2)

    def assert_both_give(expected_calls: int, **arguments) -> torch.Tensor:
        fused_calls.clear()
        logits = _logits(patched.eval(), **arguments)
        torch.testing.assert_close(logits, _logits(plain.eval(), **arguments), **CLOSE)
        assert len(fused_calls) == expected_calls
        return logits

    first = assert_both_give(14)
    for model in (patched, plain):
        model.set_adapter("other")
    second = assert_both_give(4)
    assert set(fused_calls) == {"other"}
    assert not torch.allclose(first, second, **CLOSE)

    mixed = assert_both_give(0, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed[0], first[0], **CLOSE)
    torch.testing.assert_close(mixed[1], second[1], **CLOSE)

    for model in (patched, plain):
        model.base_model.set_adapter(["default", "other"])
    assert_both_give(10)  # q_proj and v_proj hold two active adapters, the other five of a block one
    for model in (patched, plain):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "mixture", combination_type="cat")
        model.set_adapter("mixture")
    assert_both_give(14)
    for model in (patched, plain):
        model.delete_adapter("mixture")
        model.set_adapter("default")
    torch.testing.assert_close(assert_both_give(14), first, **CLOSE)


def test_scaled_adapters(device):
    patched, plain = _pair(device)
    for model in (patched, plain):
        for module in model.modules():
            if isinstance(module, PeftLoraLinear):
                module.scale_layer(0.5)
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)
    with peft.helpers.rescale_adapter_scale(patched, 3.0), peft.helpers.rescale_adapter_scale(plain, 3.0):
        torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)


@pytest.mark.parametrize("via", ["deepcopy", "pickle"])
def test_copies_stay_patched_and_share_nothing(via, device, fused_calls):
    patched, plain = _pair(device)
    clone = copy.deepcopy(patched) if via == "deepcopy" else pickle.loads(pickle.dumps(patched))
    assert len(_fused_layers(clone)) == len(_fused_layers(patched)) == 14
    _assert_same(_loss_and_gradients(clone), _loss_and_gradients(plain))
    assert len(fused_calls) == 14
    _randomize(clone, seed=9)
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)


def test_pefts_tools_say_what_they_say_of_the_unpatched_model(device):
    patched, plain = _pair(device)
    assert patched.get_layer_status() == plain.get_layer_status()
    assert patched.get_model_status() == plain.get_model_status()
    assert repr(patched) == repr(plain)
    assert {type(m).__name__ for m in patched.modules()} == {type(m).__name__ for m in plain.modules()}


def test_hooks_on_the_layer_fire_and_it_stays_fused(device, fused_calls):
    patched, _ = _pair(device)
    layer, seen = _some_layer(patched), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    patched.enable_input_require_grads()
    _loss_and_gradients(patched)
    assert seen == ["before", "after", "backward"]
    assert len(fused_calls) == 14


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "full_backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "full_backward_pre": lambda module, seen: module.register_full_backward_pre_hook(
        lambda *_: seen.append(1)
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "submodule", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"]
)
def test_hooks_on_a_submodule_fire(hook, submodule, device, fused_calls):
    patched, plain = _pair(device)
    seen: list = []
    handle = HOOKS[hook](_some_layer(patched).get_submodule(submodule), seen)
    patched.enable_input_require_grads()
    _assert_same(_loss_and_gradients(patched), _loss_and_gradients(plain))
    assert seen == [1]
    assert len(fused_calls) == 13
    handle.remove()
    _loss_and_gradients(patched)
    assert len(fused_calls) == 13 + 14


def _with_own_forward(layer):
    base = layer.base_layer
    forward = base.forward
    base.forward = lambda x: forward(x) + 1.0


def _parametrized(layer):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Double())


def _of_a_linear_subclass(layer):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    layer.base_layer.__class__ = Shifted


def _with_an_adapter_of_a_tensor_subclass(layer):
    class Marked(torch.Tensor):
        pass

    weight = layer.lora_A["default"].weight.data.as_subclass(Marked)
    layer.lora_A["default"].weight = nn.Parameter(weight)


def _with_tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(1.5, device=layer.weight.device)


def _with_trainable_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def _with_other_dropout(layer):
    layer.lora_dropout["default"] = nn.Hardtanh(-0.1, 0.1)


def _with_full_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(1.0)


CHANGES = [
    _with_own_forward,
    _parametrized,
    _of_a_linear_subclass,
    _with_an_adapter_of_a_tensor_subclass,
    _with_tensor_scaling,
    _with_trainable_base,
    _with_other_dropout,
    _with_full_dropout,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed_after_the_patch_falls_back(change, device, fused_calls):
    patched, plain = _pair(device)
    for model in (patched, plain):
        change(_some_layer(model))
    results = []
    for model in (patched, plain):
        logits = _logits(model)
        logits.square().sum().backward()
        results.append(
            {"logits": logits, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        )
    _assert_same(*results)
    assert len(fused_calls) == 13
    assert ("layers.0.self_attn.q_proj.base_layer.weight" in str(results[0].keys())) == (
        change is _with_trainable_base
    )


def _with_a_bias_in_the_adapter(layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.zeros(layer.out_features))


def _with_a_trainable_bias(layer):
    layer.base_layer.bias = nn.Parameter(torch.zeros(layer.out_features))


def _of_integers(layer):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.char(), requires_grad=False)


def _with_another_adapter_layer(layer):
    layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"])


def _with_a_variant(layer):
    layer.lora_variant["default"] = object()


@pytest.mark.parametrize(
    "change",
    [
        *CHANGES,
        _with_a_bias_in_the_adapter,
        _with_a_trainable_bias,
        _of_integers,
        _with_another_adapter_layer,
        _with_a_variant,
        *(
            (lambda layer, hook=hook, name=name: hook(layer.get_submodule(name), []))
            for hook in HOOKS.values()
            for name in ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default")
        ),
    ],
)
def test_a_call_is_served_where_patch_knows_no_reason_against_it(change, device):
    """What is asked in one go at every call is what `patch` asks with its reasons."""
    layer = _some_layer(bayeslora.patch(_adapted(device)))
    x = torch.randn(2, 32, device=device)
    assert patching._unsupported(layer, "default") is None
    assert patching._served_call(layer, x) is not None
    change(layer)
    assert patching._unsupported(layer, "default") is not None
    assert patching._served_call(layer, x) is None


LEFT = {
    "DoRA": ({"use_dora": True}, 0, "DoRA: 14"),
    "bias": ({"lora_bias": True}, 0, "bias in the adapter: 14"),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, 2, "Embedding: 1"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_supported_is_left_and_said(case, device, caplog, fused_calls):
    config, fused, reason = LEFT[case]
    plain = _adapted(device, **config)
    layers = fused + int(reason.rpartition(" ")[2])
    with caplog.at_level(logging.INFO, "bayeslora"):
        patched = bayeslora.patch(copy.deepcopy(plain))
    assert [r.getMessage() for r in caplog.records if r.name == "bayeslora"] == [
        f"patched {fused} of {layers} LoRA layers; left to PEFT: {reason}"
    ]
    assert len(_fused_layers(patched)) == fused
    torch.testing.assert_close(_logits(patched.eval()), _logits(plain.eval()), **CLOSE)
    assert len(fused_calls) == fused


def test_a_quantized_base_is_named(device, caplog):
    """Without bitsandbytes at hand: a layer of a class that lives where PEFT's 4-bit one does."""
    model = _adapted(device)
    layer = _some_layer(model)
    layer.__class__ = type("Linear4bit", (PeftLoraLinear,), {"__module__": "peft.tuners.lora.bnb"})
    layer.base_layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    with caplog.at_level(logging.INFO, "bayeslora"):
        bayeslora.patch(model)
    assert caplog.messages == ["patched 13 of 14 LoRA layers; left to PEFT: quantized base (Linear4bit): 1"]


def test_a_dora_adapter_added_to_a_patched_model_falls_back(device, fused_calls):
    patched, plain = _pair(device)
    for model in (patched, plain):
        model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
        _randomize(model, seed=4)
        model.set_adapter("dora")
    torch.testing.assert_close(_logits(patched), _logits(plain), **CLOSE)
    assert not fused_calls


def test_the_named_adapter_decides(device):
    model = _adapted(device, use_dora=True)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert len(_fused_layers(bayeslora.patch(copy.deepcopy(model)))) == 0
    assert len(_fused_layers(bayeslora.patch(copy.deepcopy(model), "plain"))) == 4
    model.set_adapter("plain")
    assert len(_fused_layers(bayeslora.patch(model))) == 4


def test_patch_is_idempotent_and_undone(device, caplog, fused_calls):
    model = _adapted(device)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.INFO, "bayeslora"):
        assert bayeslora.patch(model) is model
        assert bayeslora.patch(model) is model
    assert caplog.messages == ["patched 14 of 14 LoRA layers"] * 2
    assert len(_fused_layers(model)) == 14
    assert all(isinstance(layer, PeftLoraLinear) for layer in _fused_layers(model))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters

    assert bayeslora.unpatch(model) is model
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    _logits(model)
    assert not fused_calls
    assert bayeslora.unpatch(model) is model


def test_adapters_of_transformers_own_integration(device):
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"transformers' own add_adapter asks for peft {MIN_PEFT_VERSION}, not {peft.__version__}")
    torch.manual_seed(0)
    model = _llama()
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj"]), "mine")
    _randomize(model)
    model.to(device)
    patched = bayeslora.patch(copy.deepcopy(model), "mine")
    assert len(_fused_layers(patched)) == 2
    torch.testing.assert_close(_logits(patched), _logits(model), **CLOSE)


def _gradient_in_parameters(layer, x):
    parameters = dict(layer.named_parameters())
    return torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)


def _gradient_in_x(layer, x):
    return {"x": torch.func.grad(lambda x: layer(x).square().sum())(x)}


def _one_call_per_row(layer, x):
    return {"y": torch.func.vmap(layer)(x)}


@pytest.mark.parametrize("transform", [_gradient_in_parameters, _gradient_in_x, _one_call_per_row])
def test_functorch_transforms_fall_back(transform, device, fused_calls):
    patched, plain = (_some_layer(model) for model in _pair(device))
    x = torch.randn(4, 32, device=device)
    _assert_same(transform(patched, x), transform(plain, x))
    assert not fused_calls


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_compiled_layer_gives_the_same_gradients(dropout_p, device):
    layer = _some_layer(bayeslora.patch(_adapted(device, lora_dropout=dropout_p)))
    x = torch.randn(2, 5, 32, device=device)
    torch.compiler.reset()
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        torch.manual_seed(3)
        call(x).square().sum().backward()
        results.append({n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
    assert len(results[0]) == 2
    _assert_same(*results)
    torch.compiler.reset()


def test_a_model_without_lora_is_an_error():
    with pytest.raises(ValueError, match=r"model \(Linear\) has no LoRA layers.*get_peft_model"):
        bayeslora.patch(nn.Linear(2, 2))


def test_an_unknown_adapter_is_an_error_and_changes_nothing(device):
    model = _adapted(device)
    with pytest.raises(ValueError, match=r"adapter_name is 'mine'; the model's adapters are \['default'\]"):
        bayeslora.patch(model, "mine")
    assert not _fused_layers(model)
