"""What PEFT's own tests ask of a LoRA model, asked of a patched one and of its twin: the answers are one.

Every operation on every kind of model; ``tests/peft_suite.py`` runs PEFT's tests themselves.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

import bayeslora

IDS = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, the same terms in another order


class Model(nn.Module):
    """A layer of each kind that LoRA adapts, three of them reading one tensor, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.dense = Conv1D(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.embed(ids)
        x = (self.q_proj(x) * self.k_proj(x)).tanh() + self.v_proj(x)
        x = self.conv(x.transpose(1, 2)).relu().transpose(1, 2).contiguous()
        return self.head(self.dense(x))


LINEAR = ["q_proj", "k_proj", "v_proj"]
CONFIGS = {
    "linear": {"target_modules": LINEAR},
    "regular expression": {"target_modules": r".*_proj|head"},
    "Conv1D": {"target_modules": ["dense"], "fan_in_fan_out": True},
    "convolution and embedding": {"target_modules": ["conv", "embed", "q_proj"]},
    "saved modules": {"target_modules": LINEAR, "modules_to_save": ["head"]},
    "trained biases": {"target_modules": LINEAR, "bias": "lora_only"},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 3}},
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "PiSSA": {"target_modules": LINEAR, "init_lora_weights": "pissa"},
    "adapter bias": {"target_modules": LINEAR, "lora_bias": True, "exclude_modules": ["v_proj"]},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": {"embed": [1, 3]}},
}


def _build(config):
    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(r=3, lora_alpha=4, **config))
    _randomize(model)
    return model.eval()


def _randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def _second(model, config):
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=2, **config))
    _randomize(model, 3)


def _train(model, config, tmp_path):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(IDS).square().mean().backward()
        optimizer.step()
    return {**parameters, **{f"gradient of {name}": p.grad for name, p in parameters.items()}}


def _merge(model, config, tmp_path):
    model.merge_adapter(safe_merge=True)
    merged = model(IDS)
    model.unmerge_adapter()
    return {"merged": merged, "unmerged": model(IDS), "unloaded": model.merge_and_unload()(IDS)}


def _disable(model, config, tmp_path):
    with model.disable_adapter():
        disabled = model(IDS)
    return {"disabled": disabled, "enabled": model(IDS)}


def _switch(model, config, tmp_path):
    _second(model, config)
    first = model(IDS)
    model.set_adapter("second")
    trained = {n: torch.tensor(p.requires_grad) for n, p in model.named_parameters()}
    second = model(IDS)
    model.delete_adapter("default")
    return {**trained, "first": first, "second": second, "alone": model(IDS), "train": _loss(model)}


def _both_active(model, config, tmp_path):
    _second(model, config)
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS)
    model.base_model.set_adapter(["second"])
    return {"both": both, "second": model(IDS)}


def _loss(model):
    return model(IDS).square().mean()


def _save(model, config, tmp_path):
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    loaded = bayeslora.patch(loaded) if _is_patched(model) else loaded
    return {**get_peft_model_state_dict(model), "loaded": loaded.eval()(IDS), "train": _loss(loaded.train())}


def _is_patched(model):
    return any(type(module).__module__ == "bayeslora.patching" for module in model.modules())


def _half(model, config, tmp_path):
    return {"bf16": model.to(torch.bfloat16)(IDS).float()}


def _copied(model, config, tmp_path):
    twin = copy.deepcopy(model)
    _randomize(twin, 5)
    return {"twin": twin(IDS), "model": model(IDS), "unloaded": twin.unload()(IDS)}


OPERATIONS = (_train, _merge, _disable, _save, _half, _copied)
WITH_TWO = (_switch, _both_active)
ALONE = ("PiSSA", "saved modules", "tokens", "trained biases")  # PEFT adds no second adapter to these
ROWS = [
    pytest.param(CONFIGS[name], operation, id=f"{name}-{operation.__name__[1:]}")
    for name in CONFIGS
    for operation in (*OPERATIONS, *(() if name in ALONE else WITH_TWO))
]


@pytest.mark.parametrize(("config", "operation"), ROWS)
def test_a_patched_model_answers_as_pefts(config, operation, tmp_path):
    plain = _build(config)
    patched = bayeslora.patch(copy.deepcopy(plain))
    assert patched.get_layer_status() == plain.get_layer_status()
    got, want = (operation(model, config, tmp_path / str(i)) for i, model in enumerate((patched, plain)))
    assert got.keys() == want.keys()
    tolerance = {"rtol": 0.05, "atol": 0.05} if operation is _half else CLOSE  # some roundings of 2^-8
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
