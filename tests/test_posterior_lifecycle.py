"""A posterior moved, merged, averaged, multiplied and pushed; several of them in one model."""

import copy
import importlib.util

import pytest
import torch
from crashes import interrupted_at
from monteclora_models import patched_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON, Posterior, patch

TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))


def _base(dtype=torch.float32, hidden_size=32, intermediate_size=48):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def _posterior(seed=1, adapter="default", r=3, ess=50.0, base=None, **settings):
    torch.manual_seed(seed)
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = patch(get_peft_model(base or _base(), config, adapter)).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.data.normal_(std=0.3)
    posterior = IVON(params, lr=0.1, ess=ess, hess_init=1.0).posterior(model)
    for g in posterior.parameters.values():
        g.hess.uniform_(0.3, 3.0)
    return posterior


@pytest.fixture
def posterior():
    return _posterior()


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def _adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _samples(posterior, seed=3):
    with posterior.sample(seed):
        return _adapter(posterior.model)


# ---- other devices, dtypes, bases ----------------------------------------------------------------


def test_a_posterior_loads_onto_another_dtype_and_follows_its_model(posterior, tmp_path):
    posterior.save_pretrained(tmp_path)
    half = Posterior.from_pretrained(_base(torch.bfloat16), tmp_path)
    assert _same(half.mean, posterior.mean)
    assert _same(_samples(half), _samples(posterior))  # PEFT keeps the adapter in fp32
    probs = half.predict({"input_ids": TOKENS}, 4)
    torch.testing.assert_close(probs, posterior.predict({"input_ids": TOKENS}, 4), atol=0.02, rtol=0.1)
    before = _samples(posterior)
    posterior.model.double()
    after = _samples(posterior)
    assert all(
        torch.equal(v.double(), after[n]) or torch.allclose(v.double(), after[n]) for n, v in before.items()
    )
    posterior.model.bfloat16()
    assert _same(_samples(posterior), {n: v.bfloat16() for n, v in before.items()})


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_posterior_loads_onto_a_quantized_base(tmp_path, device, caplog):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes needs blocks of 64 whole on some CPUs
    posterior = _posterior(base=_base(**sizes))
    posterior.save_pretrained(tmp_path / "adapter")
    _base(**sizes).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map=str(device), dtype=torch.float32
    )
    loaded = Posterior.from_pretrained(quantized, tmp_path / "adapter")
    patch(loaded.model)
    for name, value in _samples(posterior).items():
        torch.testing.assert_close(_samples(loaded)[name].cpu(), value, rtol=1e-5, atol=1e-6)
    batch = {"input_ids": TOKENS.to(device)}
    with caplog.at_level("INFO", "bayeslora"):
        together = loaded.predict(batch, 2, batched=True, average=False)
    assert any("one after another" in record.message for record in caplog.records)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert torch.equal(together, loaded.predict(batch, 2, average=False))


@pytest.mark.gpu
def test_a_posterior_moves_to_a_gpu_with_its_model(posterior):
    before = _samples(posterior)
    posterior.model.cuda()
    for name, value in _samples(posterior).items():
        torch.testing.assert_close(value.cpu(), before[name], rtol=1e-5, atol=1e-6)


# ---- several adapters ----------------------------------------------------------------------------


def test_several_posteriors_live_in_one_model(tmp_path):
    first, second = _posterior(1), _posterior(2, r=2)
    expected = [p.predict({"input_ids": TOKENS}, 3) for p in (first, second)]
    first.save_pretrained(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    one = Posterior.from_pretrained(_base(), tmp_path / "1")
    patch(one.model)
    two = Posterior.from_pretrained(one.model, tmp_path / "2", adapter_name="second")
    assert one.model is two.model and one.model.active_adapters == ["second"]
    for batched in (False, True):
        for adapter, loaded, wanted in (("second", two, expected[1]), ("default", one, expected[0])):
            one.model.set_adapter(adapter)
            found = loaded.predict({"input_ids": TOKENS}, 3, batched=batched)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    two.save_pretrained(tmp_path / "again")
    again = Posterior.from_pretrained(_base(), tmp_path / "again" / "second", adapter_name="other")
    assert [*again.model.peft_config] == ["other"]
    assert _same(dict(enumerate(again.mean.values())), dict(enumerate(second.mean.values())))


def test_an_adapter_that_does_not_fit_is_taken_out_again(posterior, tmp_path):
    posterior.save_pretrained(tmp_path)
    other = _posterior(2)
    wide = get_peft_model(_base(hidden_size=16), LoraConfig(target_modules=["q_proj"]))
    for model in (other.model, wide):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        if model is wide:
            with pytest.raises(ValueError, match="lora_A"):
                Posterior.from_pretrained(model, tmp_path, adapter_name="new")
        else:
            with pytest.raises(FileNotFoundError):
                Posterior.from_pretrained(model, tmp_path / "nowhere", adapter_name="new")
        assert _same(model.state_dict(), before) and [*model.peft_config] == ["default"]


# ---- merge, average ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("copy_model", [True, False])
def test_merged_weights_predict_as_the_sample(posterior, seed, copy_model):
    if seed is None:
        wanted = _logits(posterior.model)
    else:
        with posterior.sample(seed):
            wanted = _logits(posterior.model)
    before = {n: t.clone() for n, t in posterior.model.state_dict().items()}
    plain = posterior.merge(seed, copy_model=copy_model)
    assert type(plain) is LlamaForCausalLM
    assert not any("lora_" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(_logits(plain), wanted, rtol=1e-4, atol=1e-4)
    if copy_model:
        assert _same(posterior.model.state_dict(), before)
        assert posterior.predict({"input_ids": TOKENS}, 2, batched=True).shape == (2, 7, 50)


def test_merging_what_is_not_finite_changes_nothing(posterior):
    before, kinds = _adapter(posterior.model), [type(m) for m in posterior.model.modules()]
    list(posterior.mean.values())[-1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        posterior.merge(seed=1, copy_model=False)
    assert _same(before, _adapter(posterior.model))
    assert kinds == [type(m) for m in posterior.model.modules()]


@pytest.mark.parametrize("kind", ["ivon", "monteclora"])
def test_an_adapter_that_is_not_in_use_is_refused(kind, posterior):
    if kind == "monteclora":
        posterior = Posterior.from_monteclora(patched_model().eval())
    model, batch = posterior.model, {"input_ids": TOKENS}
    wanted = posterior.predict(batch, 2)
    posterior.add_adapter("other", seeds=[3])
    for change, match, back in (
        (lambda: model.set_adapter("other"), r"call model.set_adapter\('default'\)", model.set_adapter),
        (model.merge_adapter, "'default' is merged", lambda name: model.unmerge_adapter()),
    ):
        change()
        for call in (
            lambda: posterior.predict(batch, 2),
            lambda: posterior.predict(batch, 2, batched=True),
            lambda: posterior.generate(TOKENS, 2, max_new_tokens=2),
            posterior.merge,
        ):
            with pytest.raises(ValueError, match=match):
                call()
        back("default")
    torch.testing.assert_close(posterior.predict(batch, 2), wanted)
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters are disabled"):
        posterior.predict(batch, 2)
    model.base_model.merge_adapter(["other"])  # PEFT then leaves out what is active
    with pytest.raises(ValueError, match="'other' is merged, so samples of 'default'"):
        posterior.predict(batch, 2)
    model.unmerge_adapter()
    model.merge_and_unload()
    with pytest.raises(ValueError, match="no longer in the model"):
        posterior.predict(batch, 2)


def test_an_adapter_of_the_mean_a_sample_and_an_average(posterior):
    model = posterior.model
    draws = [_samples(posterior, s) for s in (1, 2, 3)]
    posterior.add_adapter("mean")
    posterior.add_adapter("sample", 2)
    posterior.add_adapter("average", [1, 2, 3])
    assert model.active_adapters == ["default"]
    held = dict(model.named_parameters())
    for name, mean in posterior.mean.items():
        assert torch.equal(held[name.replace(".default.", ".mean.")], mean)
        assert torch.equal(held[name.replace(".default.", ".sample.")], draws[1][name])
        average = sum(d[name] for d in draws) / 3
        torch.testing.assert_close(held[name.replace(".default.", ".average.")], average)
    with pytest.raises(ValueError, match="has an adapter 'mean'"):
        posterior.add_adapter("mean")
    with pytest.raises(ValueError, match="seeds is empty"):
        posterior.add_adapter("none", [])
    assert "none" not in model.peft_config


# ---- product -------------------------------------------------------------------------------------


def test_product_is_the_product_of_the_densities():
    first, second = _posterior(1, ess=50.0), _posterior(2, adapter="other", ess=20.0)
    kept = copy.deepcopy(first.mean)
    merged = Posterior.product([first, second], weights=[1.0, 0.5])
    assert merged.model is first.model and _same(first.mean, kept)
    x = torch.randn(3)
    for name, mean in merged.mean.items():
        parts = [(1.0, first, name), (0.5, second, name.replace(".default.", ".other."))]
        value = sum(w / p.variance[n] for w, p, n in parts)
        torch.testing.assert_close(1 / merged.variance[name], value)
        # log densities differ from the weighted sum of the parts' by a constant
        ours = [-0.5 * ((v - mean) ** 2 / merged.variance[name]) for v in x]
        theirs = [sum(-0.5 * w * (v - p.mean[n]) ** 2 / p.variance[n] for w, p, n in parts) for v in x]
        gaps = torch.stack([a - b for a, b in zip(ours, theirs, strict=True)])
        torch.testing.assert_close(gaps[1:], gaps[:1].expand_as(gaps[1:]), rtol=1e-3, atol=1e-2)
        assert torch.equal(merged.parameters[name].parameter, mean)
    with merged.sample(1):
        assert not torch.equal(merged.parameters[name].parameter, merged.mean[name])


def test_product_with_pruned_elements_takes_what_the_other_knows():
    first, second = _posterior(1), _posterior(2)
    first.prune(0.5)
    second.prune(0.1)
    merged = Posterior.product([first, second])
    for name, mean in merged.mean.items():
        only_first = (first.variance[name] == 0) & (second.variance[name] > 0)
        assert torch.allclose(mean[only_first], second.mean[name][only_first])
        both = (first.variance[name] == 0) & (second.variance[name] == 0)
        assert mean[both].eq(0).all() and merged.variance[name][both].eq(0).all()


def test_product_refuses_what_does_not_fit(posterior):
    before = _adapter(posterior.model)
    with pytest.raises(ValueError, match="posteriors is empty"):
        Posterior.product([])
    with pytest.raises(ValueError, match=r"has shape \(2, 32\) in posterior 1, \(3, 32\) in the first"):
        Posterior.product([posterior, _posterior(r=2)])
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="do not both have"):
        Posterior.product([posterior, IVON(linear.parameters(), lr=0.1, ess=1.0).posterior(linear)])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights must be 2 finite numbers > 0"):
            Posterior.product([posterior, posterior], weights)
    assert _same(_adapter(posterior.model), before)


def test_an_interrupted_product_leaves_the_first_model_or_merges():
    original, other = _posterior(1), _posterior(2)
    done = copy.deepcopy(original)
    lines = interrupted_at(0, lambda: Posterior.product([done, other]))
    states, found = [_adapter(p.model) for p in (original, done)], []
    for number in range(1, lines + 1, 7):
        first = copy.deepcopy(original)
        interrupted_at(number, lambda first=first: Posterior.product([first, other]))
        found.append([_same(_adapter(first.model), state) for state in states].index(True))
    assert lines > 50 and found == sorted(found)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 1}}]
)
def test_product_refuses_matrices_that_are_scaled_otherwise(settings, posterior):
    before, other = _adapter(posterior.model), _posterior(2, **settings)
    with pytest.raises(ValueError, match=r"has scaling .* in posterior 1"):
        Posterior.product([posterior, other])
    assert _same(_adapter(posterior.model), before)


def test_product_refuses_heads_that_are_not_sampled_and_differ():
    posteriors = []
    for change in (0.0, 0.0, 0.1):
        config = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        )
        torch.manual_seed(1)
        model = get_peft_model(_base(), config)
        head = model.get_output_embeddings().modules_to_save["default"].weight
        head.data.add_(change)
        lora = [p for p in model.parameters() if p.requires_grad and p is not head]
        groups = [{"params": lora}, {"params": [head], "perturb": False}]
        posteriors.append(IVON(groups, lr=0.1, ess=50.0).posterior(model))
    one, same, other = posteriors
    merged = Posterior.product([one, same])
    assert torch.equal(
        merged.predict(TOKENS, 2, variance_scale=0.0), one.predict(TOKENS, 1, variance_scale=0.0)
    )
    with pytest.raises(ValueError, match=r"lm_head.*not sampled, differs in posterior 1"):
        Posterior.product([one, other])


# ---- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_push_uploads_the_folder(adapter, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub

    posterior, calls = _posterior(adapter=adapter), []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **settings):
            calls.append(("create", repo_id, settings))

        def upload_folder(self, repo_id, folder_path, **settings):
            shutil.copytree(folder_path, tmp_path / "hub")
            return repo_id, settings

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    found = posterior.push_to_hub("me/mine", token="t", private=True, commit_message="first")
    assert found == ("me/mine", {"commit_message": "first"})
    assert calls == [("token", "t"), ("create", "me/mine", {"exist_ok": True, "private": True})]
    loaded = Posterior.from_pretrained(_base(), tmp_path / "hub")
    with posterior.sample(3), loaded.sample(3):
        torch.testing.assert_close(_logits(loaded.model), _logits(posterior.model))
    assert (tmp_path / "hub" / "README.md").is_file()  # PEFT's model card
    assert isinstance(PeftModel.from_pretrained(_base(), str(tmp_path / "hub")), PeftModel)


def test_plain_modules_are_refused():
    linear = nn.Linear(2, 2)
    posterior = IVON(linear.parameters(), lr=0.1, ess=1.0).posterior(linear)
    for call in (posterior.merge, lambda: posterior.add_adapter("x"), lambda: posterior.push_to_hub("a/b")):
        with pytest.raises(TypeError, match="PEFT model"):
            call()


# ---- MonteCLoRA ----------------------------------------------------------------------------------


def test_a_monteclora_posterior_merges_and_is_refused_where_it_is_no_gaussian(caplog):
    model = patched_model().eval()
    posterior = Posterior.from_monteclora(model)
    with posterior.sample(4):
        wanted = _logits(model)
    assert (wanted - _logits(model)).abs().max() > 1e-2
    for copy_model in (True, False):
        if not copy_model:
            posterior.add_adapter("average", [1, 2])
            assert [*model.peft_config] == ["default", "average"]
            assert model.active_adapters == ["default"]
            with pytest.raises(TypeError, match="product needs IVON posteriors"):
                Posterior.product([posterior, posterior])
            with pytest.raises(TypeError, match="prune_sweep needs an IVON posterior"):
                posterior.prune_sweep([(TOKENS, TOKENS[:, 0])], [0.1])
            with caplog.at_level("INFO", "bayeslora"):
                assert posterior.generate(TOKENS, 2, max_new_tokens=2).shape == (2, 2, 1, 9)
            assert "samples run one after another" in caplog.text
        torch.testing.assert_close(
            _logits(posterior.merge(4, copy_model=copy_model)), wanted, rtol=1e-4, atol=1e-4
        )
