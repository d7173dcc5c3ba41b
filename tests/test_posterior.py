"""Posterior: exact samples by seed, prediction, pruning, and the folder on disk."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON, Posterior, patch, unpatch
from bayeslora.kernels import noise_twin

TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))


def _base(hidden_size=32, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(device, dtype)


def _lora(base, r=4, **settings):
    torch.manual_seed(1)
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    return get_peft_model(base, config)


def _trained(model, steps=3):
    device = next(model.parameters()).device
    tokens = TOKENS.to(device)
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=100.0, hess_init=0.1, seed=2)
    for _ in range(steps):
        with opt.sampled_params(train=True):
            model(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()
        opt.zero_grad()
    return opt


@pytest.fixture(scope="module")
def trained():
    model = _lora(_base())
    return model, _trained(model)


@pytest.fixture
def posterior(trained):
    model, opt = copy.deepcopy(trained)
    return Posterior.from_optimizer(model, opt)


@pytest.fixture
def folder(posterior, tmp_path):
    posterior.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- samples and predictions ---------------------------------------------------------------------


def test_sample_is_the_named_gaussian_draw(posterior):
    mean = _adapter(posterior.model)
    with posterior.sample(seed=7, variance_scale=0.5):
        for name, gaussian in posterior.parameters.items():
            z = noise_twin.randn(gaussian.mean.numel(), seed=7, draw=0, stream=gaussian.stream)
            std = (0.5 / (gaussian.ess * (gaussian.hess + gaussian.weight_decay))).sqrt()
            expected = gaussian.mean + std * z.view_as(std)
            torch.testing.assert_close(gaussian.parameter, expected, rtol=1e-6, atol=1e-6)
            assert not torch.equal(gaussian.parameter, mean[name])
    assert _same(_adapter(posterior.model), mean)


def test_sample_is_the_optimizers_sample_of_that_seed(trained):
    model, opt = copy.deepcopy(trained)
    posterior = opt.posterior(model)
    with opt.sampled_params(seed=9):
        from_optimizer = _adapter(model)
    with posterior.sample(seed=9):
        assert _same(_adapter(model), from_optimizer)


def test_samples_nest_and_survive_exceptions(posterior):
    mean = _adapter(posterior.model)
    with posterior.sample(seed=1):
        outer = _adapter(posterior.model)
        with posterior.sample(seed=2):
            assert not _same(_adapter(posterior.model), outer)
        assert _same(_adapter(posterior.model), outer)
    with pytest.raises(KeyError), posterior.sample(seed=1):
        raise KeyError
    assert _same(_adapter(posterior.model), mean)


@pytest.mark.parametrize("source", ["posterior", "optimizer"])
def test_samples_within_one_autocast_are_not_its_first_ones_casts(source, trained):
    """Autocast keeps what it has cast of a parameter until its context ends."""
    model, opt = copy.deepcopy(trained)
    posterior = Posterior.from_optimizer(model, opt)
    sample = posterior.sample if source == "posterior" else lambda seed: opt.sampled_params(seed=seed)
    model.eval()

    def logits():
        return model(input_ids=TOKENS).logits

    def alone(context):
        with context, torch.autocast("cpu", torch.bfloat16):
            return logits()

    with torch.no_grad():
        expected = [alone(sample(3)), alone(sample(4)), alone(torch.no_grad())]
        with torch.autocast("cpu", torch.bfloat16):
            found = []
            for seed in (3, 4):
                with sample(seed):
                    found.append(logits())
            found.append(logits())
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


class _Last(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens).logits[:, -1]


@pytest.mark.parametrize("batched", [False, True])
def test_a_peft_model_inside_of_another_is_asked_for_its_adapter_too(batched):
    """Samples of an adapter that is not in use would all be one prediction, without a word."""
    inner = patch(_lora(_base()))
    model = _Last(inner)
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=100.0)
    posterior = Posterior.from_optimizer(model, opt)
    inner.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    inner.set_adapter("other")
    with pytest.raises(ValueError, match=r"set_adapter\('default'\)"):
        posterior.predict(TOKENS, 2, batched=batched)
    inner.set_adapter("default")
    assert posterior.predict(TOKENS, 2, batched=batched).shape == (2, 50)


def test_a_compiled_models_posterior_says_whose_to_make_it(tmp_path):
    model = torch.compile(_lora(_base()), backend="eager")
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=100.0)
    posterior = Posterior.from_optimizer(model, opt)
    for call in (lambda: posterior.save_pretrained(tmp_path), posterior.merge):
        with pytest.raises(TypeError, match=r"from_optimizer\(model\._orig_mod, optimizer\)"):
            call()
    assert not list(tmp_path.iterdir())


def test_from_optimizer_inside_a_sample_takes_the_mean(trained):
    model, opt = copy.deepcopy(trained)
    mean = _adapter(model)
    opt.train()
    posterior = Posterior.from_optimizer(model, opt)
    assert _same(_adapter(model), mean)
    assert all(torch.equal(posterior.mean[n], mean[n]) for n in mean)


def test_posterior_is_not_changed_by_more_training(trained):
    model, opt = copy.deepcopy(trained)
    posterior = Posterior.from_optimizer(model, opt)
    with posterior.sample(seed=3):
        before = _adapter(model)
    with opt.sampled_params(train=True):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    opt.step()
    moved = _adapter(model)
    with posterior.sample(seed=3):
        assert _same(_adapter(model), before)
    assert _same(_adapter(model), moved)


def test_predict_is_the_mean_over_samples(posterior):
    model = posterior.model
    model.train()
    batch = {"input_ids": TOKENS}
    probabilities = posterior.predict(batch, num_samples=3, seed=5)
    assert model.training and probabilities.shape == (2, 7, 50)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 7))
    model.eval()
    expected = torch.zeros(2, 7, 50)
    with torch.no_grad():
        for seed in (5, 6, 7):
            with posterior.sample(seed):
                expected += model(**batch).logits.softmax(-1) / 3
    torch.testing.assert_close(probabilities, expected)
    at_mean = model(**batch).logits.softmax(-1)
    torch.testing.assert_close(posterior.predict(batch, num_samples=1, variance_scale=0.0), at_mean)
    torch.testing.assert_close(posterior.predict(TOKENS, num_samples=3, seed=5), expected)


def test_plain_modules_and_fp64():
    model = nn.Linear(4, 3).double()
    opt = IVON(model.parameters(), lr=0.1, ess=10.0)
    posterior = opt.posterior(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert posterior.predict(x, num_samples=2).shape == (5, 3)
    assert posterior.variance["weight"].dtype == torch.float64
    torch.testing.assert_close(posterior.variance["weight"], torch.full((3, 4), 1 / (10 * 1.0001)).double())
    with pytest.raises(TypeError, match="PEFT"):
        posterior.save_pretrained("unused")


@pytest.mark.gpu
def test_samples_agree_between_cpu_and_gpu(folder):
    on_cpu = Posterior.from_pretrained(_base(), folder)
    on_gpu = Posterior.from_pretrained(_base(device="cuda"), folder)
    with on_cpu.sample(7), on_gpu.sample(7):
        for a, b in zip(_adapter(on_cpu.model).values(), _adapter(on_gpu.model).values(), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)
    on_cpu.model.cuda()
    with on_cpu.sample(7), on_gpu.sample(7):
        assert _same(_adapter(on_cpu.model), _adapter(on_gpu.model))


# ---- pruning -------------------------------------------------------------------------------------


def test_prune_zeroes_the_largest_variances_of_each_matrix(posterior):
    variance = {n: v.clone() for n, v in posterior.variance.items()}
    mean = {n: m.clone() for n, m in posterior.mean.items()}
    count = posterior.prune(0.25)
    assert count == sum(v.numel() // 4 for v in variance.values())
    with posterior.sample(seed=1):
        sample = _adapter(posterior.model)
    for name, p in _adapter(posterior.model).items():
        pruned = posterior.variance[name] == 0
        assert int(pruned.sum()) == p.numel() // 4
        assert variance[name][pruned].min() >= variance[name][~pruned].max()
        for tensor in (p, sample[name], posterior.mean[name]):
            assert tensor[pruned].eq(0).all()
        assert torch.equal(posterior.mean[name][~pruned], mean[name][~pruned])
        assert sample[name][~pruned].ne(0).all()


def test_prune_counts_what_is_pruned_already(posterior):
    first = posterior.prune(0.1)
    assert posterior.prune(0.1) == first
    assert posterior.prune(0.05) == first
    assert posterior.prune(0.2) == sum(math.floor(0.2 * p.numel()) for p in posterior.mean.values())
    assert posterior.pruned == [0.1, 0.1, 0.05, 0.2]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_prune_ratio_out_of_range(posterior, ratio):
    before = _adapter(posterior.model)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
        posterior.prune(ratio)
    assert _same(_adapter(posterior.model), before)


# ---- the folder ----------------------------------------------------------------------------------


def test_folder_loads_in_plain_peft_as_the_mean(posterior, folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "posterior.safetensors",
        "posterior_config.json",
    ]
    plain = PeftModel.from_pretrained(_base(), folder)
    assert _same(_adapter(plain), _adapter(posterior.model))


@pytest.mark.parametrize("onto", ["base", "peft"])
@pytest.mark.parametrize("pruned", [False, True])
def test_round_trip_gives_the_same_samples(posterior, tmp_path, onto, pruned):
    if pruned:
        posterior.prune(0.3)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_base() if onto == "base" else _lora(_base()), tmp_path)
    assert loaded.pruned == posterior.pruned
    batch = {"input_ids": TOKENS}
    assert torch.equal(loaded.predict(batch, 2), posterior.predict(batch, 2))
    assert _same(_adapter(loaded.model), _adapter(posterior.model))


def test_bf16_adapter_keeps_its_fp32_mean(tmp_path):
    model = _lora(_base(dtype=torch.bfloat16))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
    posterior = Posterior.from_optimizer(model, _trained(model))
    posterior.save_pretrained(tmp_path)
    other = _lora(_base(dtype=torch.bfloat16))
    for name, p in other.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
    loaded = Posterior.from_pretrained(other, tmp_path)
    for name, mean in posterior.mean.items():
        assert not torch.equal(mean, mean.bfloat16().float())
        assert torch.equal(loaded.mean[name], mean)
    with posterior.sample(4), loaded.sample(4):
        assert _same(_adapter(posterior.model), _adapter(loaded.model))


def test_modules_to_save_and_other_adapter_names(tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(_base(), config, adapter_name="mine")
    posterior = Posterior.from_optimizer(model, _trained(model))
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_base(), tmp_path / "mine")
    assert any("lm_head" in name for name in loaded.parameters)
    batch = {"input_ids": TOKENS}
    assert torch.equal(loaded.predict(batch, 2), posterior.predict(batch, 2))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["lora on head", "lora on embedding", "saved embedding", "trained tokens"],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_embeddings(settings, tied, tmp_path):
    def base():
        model = _base()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return model

    model = get_peft_model(base(), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    posterior = Posterior.from_optimizer(model, _trained(model, 1))
    with posterior.sample(5):  # the mean is saved, also of tied names
        posterior.save_pretrained(tmp_path)
    batch = {"input_ids": TOKENS}
    expected = posterior.predict(batch, 3)
    other = get_peft_model(base(), LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    for model, name in (
        (base(), None),
        (PeftModel.from_pretrained(base(), str(tmp_path)), None),
        (other, "x"),
    ):
        loaded = Posterior.from_pretrained(model, tmp_path, name)
        torch.testing.assert_close(loaded.predict(batch, 3), expected)
        with torch.no_grad():
            at_rest = loaded.model(TOKENS).logits
        torch.testing.assert_close(loaded.predict(batch, 1, variance_scale=0.0), at_rest.softmax(-1))
        loaded.save_pretrained(tmp_path / "again")


def test_inference_mode_leaves_a_posterior_for_later(trained, folder):
    batch, trained, base = {"input_ids": TOKENS}, copy.deepcopy(trained), _base()
    with torch.inference_mode():
        made = [Posterior.from_optimizer(*trained), Posterior.from_pretrained(base, folder)]
        before = [p.predict(batch, 2) for p in made]
    for posterior, expected in zip(made, before, strict=True):
        assert torch.equal(posterior.predict(batch, 2), expected)
        patch(posterior.model)
        torch.testing.assert_close(posterior.predict(batch, 2, batched=True), expected)
        posterior.predict(batch, 2, variance_scale=0.5)
        posterior.prune(0.1)
        unpatch(posterior.model)


def test_parameter_outside_the_adapter_cannot_be_saved(tmp_path):
    model = _lora(_base())
    model.get_input_embeddings().weight.requires_grad_(True)
    posterior = Posterior.from_optimizer(model, _trained(model, 1))
    with pytest.raises(ValueError, match=r"embed_tokens.*modules_to_save"):
        posterior.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _drop(folder, name):
    (folder / name).unlink()


def _truncate(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def _drop_key(folder, name):
    tensors = load_file(folder / name)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / name)


def _reshape(folder, name):
    tensors = load_file(folder / name)
    key = sorted(tensors)[0]
    tensors[key] = torch.ones(3, 3)
    save_file(tensors, folder / name)


def _negate(folder, name):
    tensors = load_file(folder / name)
    save_file({k: -v for k, v in tensors.items()}, folder / name)


def _future(folder, name):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, "format_version": 99}))


FILES = ["adapter_config.json", "adapter_model.safetensors", "posterior.safetensors", "posterior_config.json"]


@pytest.mark.parametrize(
    ("damage", "name", "error", "match"),
    [
        *[(_drop, name, FileNotFoundError, f"{name}.*missing") for name in FILES],
        (_truncate, FILES[1], ValueError, f"{FILES[1]}.*damaged"),
        (_truncate, FILES[2], ValueError, f"{FILES[2]}.*damaged"),
        (_truncate, FILES[3], ValueError, f"{FILES[3]}.*JSON"),
        (_drop_key, FILES[1], ValueError, f"{FILES[1]}.*has no tensor.*lora_A"),
        (_drop_key, FILES[2], ValueError, f"{FILES[2]}.*has no tensor.*lora_A"),
        (_reshape, FILES[2], ValueError, r"lora_A.*\(3, 3\).*\(4, 32\)"),
        (_negate, FILES[2], ValueError, f"{FILES[2]}.*not positive"),
        (_future, FILES[3], ValueError, "format_version 99"),
    ],
)
@pytest.mark.parametrize("onto", ["base", "peft"])
def test_damaged_folder_is_refused_and_changes_nothing(folder, damage, name, error, match, onto):
    damage(folder, name)
    model = _base() if onto == "base" else _lora(_base())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        Posterior.from_pretrained(model, folder)
    assert _same(model.state_dict(), before)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 1}}]
)
def test_folder_of_another_scaling_is_refused(folder, settings):
    model = _lora(_base(), **settings)
    before = _adapter(model)
    (name,) = settings
    with pytest.raises(ValueError, match=f"adapter_config.json.* has {name}="):
        Posterior.from_pretrained(model, folder)
    assert _same(_adapter(model), before)


def test_a_base_that_does_not_fit_trains_on(folder):
    base = _base(hidden_size=16)
    base.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="has shape"):
        Posterior.from_pretrained(base, folder)
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_folder_of_another_rank_or_model_is_refused(folder):
    model = _lora(_base(), r=8)
    before = _adapter(model)
    with pytest.raises(ValueError, match=r"adapter_model.*lora_A.*\(4, 32\).*\(8, 32\)"):
        Posterior.from_pretrained(model, folder)
    assert _same(_adapter(model), before)
    base = _base(hidden_size=16)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"adapter_model.*lora_A.*\(4, 32\).*\(4, 16\)"):
        Posterior.from_pretrained(base, folder)
    assert _same(base.state_dict(), before)
    with pytest.raises(ValueError, match="does not fit the model"):
        Posterior.from_pretrained(nn.Sequential(nn.Linear(3, 3)), folder)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        Posterior.from_pretrained(_base(), folder / "nowhere")


class _Listing(_Last):
    def forward(self, tokens):
        return [tokens]


def test_bad_arguments(trained):
    model, opt = copy.deepcopy(trained)
    with pytest.raises(TypeError, match="AdamW"):
        Posterior.from_optimizer(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="not in the model"):
        Posterior.from_optimizer(_lora(_base()), opt)
    posterior = Posterior.from_optimizer(model, opt)
    with pytest.raises(ValueError, match="num_samples"):
        posterior.predict({"input_ids": TOKENS}, num_samples=0)
    with pytest.raises(ValueError, match="variance_scale"):
        posterior.predict({"input_ids": TOKENS}, variance_scale=-1.0)
    with pytest.raises(ValueError, match="variance_scale"), posterior.sample(0, variance_scale=math.inf):
        pass
    with pytest.raises(TypeError, match="logits"):
        Posterior(_Listing(model), posterior.parameters).predict(TOKENS, num_samples=1)
