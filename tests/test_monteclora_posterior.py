"""Posterior.from_monteclora: samples by seed, their law, predictions, pruning, and files that PEFT reads."""

import copy
import json

import pytest
import torch
from crashes import interrupted_at
from monteclora_models import BATCH, bank_of, patched_model, peft_model, tiny_llama
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import bayeslora
from bayeslora import Posterior

ONE_LAYER = {"target_modules": r".*layers\.0\.self_attn\.q_proj"}


def _adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def posterior():
    return Posterior.from_monteclora(patched_model())


def test_samples_are_named_by_their_seed_and_put_back(posterior):
    mean = _adapter(posterior.model)
    with posterior.sample(seed=7):
        first = _adapter(posterior.model)
    with posterior.sample(seed=7, variance_scale=0.0):
        assert _same(_adapter(posterior.model), mean)
    with posterior.sample(seed=7):
        assert _same(_adapter(posterior.model), first)
        with posterior.sample(seed=8):
            assert not _same(_adapter(posterior.model), first)
        assert _same(_adapter(posterior.model), first)
    with pytest.raises(KeyError), posterior.sample(seed=7):
        raise KeyError
    assert _same(_adapter(posterior.model), mean)
    assert sum(not torch.equal(first[n], mean[n]) for n in mean) == 6  # each layer's A
    with pytest.raises(ValueError, match="variance_scale"), posterior.sample(1, variance_scale=-1.0):
        pass


def test_autocast_casts_each_sample_anew(posterior):
    weight = bank_of(posterior.model).layers[0].lora_A["default"].weight
    ones = torch.ones(weight.shape[1], 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # which keeps its casts of leaves that want gradients
        for seed in (None, 3, 4, None):
            with torch.enable_grad(), posterior.sample(seed) if seed else torch.enable_grad():
                assert torch.equal(torch.mm(weight, ones), torch.mm(weight.bfloat16(), ones))


def test_a_sample_is_the_training_draw_of_that_seed():
    model = patched_model(options={"seed": 9})
    posterior = Posterior.from_monteclora(model)
    part = bank_of(model).parts[0]
    part.refresh(False)  # draw 0
    with posterior.sample(seed=9):
        for site, output in enumerate(part.current.outputs):
            torch.testing.assert_close(part.matrix(site), output, rtol=1e-6, atol=1e-7)


def test_no_noise_is_added_within_a_sample_in_train_mode(posterior):
    with torch.no_grad(), posterior.sample(seed=1):
        assert torch.equal(posterior.model(**BATCH).logits, posterior.model(**BATCH).logits)
    with torch.no_grad():
        assert not torch.equal(posterior.model(**BATCH).logits, posterior.model(**BATCH).logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "mixture", "outer_samples": 2}, {"perturb": "B"}, {"dirichlet": "logistic_normal"}],
)
def test_variance_is_that_of_the_samples(options):
    posterior = Posterior.from_monteclora(patched_model(ONE_LAYER, options))
    (name, mean), (_, variance) = *posterior.mean.items(), *posterior.variance.items()
    parameter = dict(posterior.model.named_parameters())[name]
    squares = torch.zeros_like(mean)
    for seed in range(400):
        with posterior.sample(seed):
            squares += (parameter.detach() - mean).square() / 400
    axis = 0 if options.get("perturb") == "B" else 1
    # By rank: 4 standard errors of the mean of 400 chi-squares of 3 are 16%, and ‖π‖² varies.
    torch.testing.assert_close(squares.mean(axis), variance.mean(axis), rtol=0.2, atol=0.0)


def test_predict_averages_the_samples_probabilities(posterior):
    inputs = {"input_ids": BATCH["input_ids"]}
    found = posterior.predict(inputs, num_samples=3, seed=4)
    assert posterior.model.training
    model = posterior.model.eval()
    expected = torch.zeros_like(found)
    for seed in (4, 5, 6):
        with torch.no_grad(), posterior.sample(seed):
            expected += model(**inputs).logits.softmax(-1) / 3
    torch.testing.assert_close(found, expected)


def test_training_on_does_not_change_the_posterior(posterior):
    with posterior.sample(seed=3):
        before = _adapter(posterior.model)
    with torch.no_grad():
        for n, p in posterior.model.named_parameters():
            if "lora_A" in n or "sampler" in n:
                p.add_(1.0)
    with posterior.sample(seed=3):
        after = _adapter(posterior.model)
    assert all(torch.equal(after[n], before[n]) for n in after if "lora_A" in n)


def test_pruning_zeroes_the_ranks_of_largest_variance(posterior):
    count = posterior.prune(0.4)
    assert count == 6 * int(0.4 * 96) == posterior.prune(0.4)
    for name, variance in posterior.variance.items():
        pruned = variance == 0
        assert pruned.sum() == 38
        full = Posterior.from_monteclora(patched_model()).variance[name]
        assert full[pruned].min() >= full[~pruned].max()
        with posterior.sample(seed=2):
            assert not dict(posterior.model.named_parameters())[name][pruned].any()
    with pytest.raises(ValueError, match="ratio must be in"):
        posterior.prune(1.0)


@pytest.mark.parametrize("onto", ["base", "peft", "patched"])
def test_saved_and_loaded_it_gives_the_same_samples(posterior, tmp_path, onto):
    bayeslora.configure_monteclora(posterior.model, perturb="both", sample_scaler=0.02, sparse=True)
    posterior = Posterior.from_monteclora(posterior.model)
    posterior.prune(0.2)
    with posterior.sample(seed=5):
        expected = _adapter(posterior.model)
    posterior.save_pretrained(tmp_path)
    model = {"base": tiny_llama, "peft": peft_model, "patched": patched_model}[onto]()
    loaded = Posterior.from_pretrained(model, tmp_path)
    assert loaded.pruned == [0.2]
    with loaded.sample(seed=5):
        assert _same(_adapter(loaded.model), expected)


def test_the_folder_loads_in_plain_peft_as_the_mean(posterior, tmp_path):
    posterior.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    expected = get_peft_model_state_dict(posterior.model)
    for name, value in get_peft_model_state_dict(theirs).items():
        assert torch.equal(value, expected[name]), name


def test_damaged_folders_are_named_and_leave_the_model(posterior, tmp_path):
    posterior.prune(0.1)
    posterior.save_pretrained(tmp_path)
    other = peft_model({"r": 5})
    before = _adapter(other)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors.*has shape \(3, 32\), in the model"):
        Posterior.from_pretrained(other, tmp_path)
    assert _same(_adapter(other), before)
    file = tmp_path / "posterior_config.json"
    config = json.loads(file.read_text())
    del config["options"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no key 'options'"):
        Posterior.from_pretrained(peft_model(), tmp_path)


def _options(**values):
    return lambda config: config["options"].update(values)


def _drop_option(config):
    del config["options"]["sparse"]


REFUSED = {
    "another estimator": (_options(estimator="best"), "estimator must be one of"),
    "no sparse": (_drop_option, "'options' must name"),
    "one more option": (_options(seed=3), "'options' must name"),
    "sparse of a string": (_options(sparse="no"), "'sparse' must be true or false"),
    "half an outer sample": (_options(outer_samples=1.5), "'outer_samples' an integer"),
    "no outer samples": (_options(outer_samples=0), "outer_samples must be an integer >= 1"),
    "a list of options": (lambda config: config.update(options=[1]), "'options' must name"),
    "a scale of NaN": (
        lambda config: config.update(sample_scaler=float("nan")),
        "sample_scaler must be finite",
    ),
    "a scale of a string": (
        lambda config: config.update(sample_scaler="1"),
        "'sample_scaler' must be a number",
    ),
    "no parameters": (lambda config: config.update(parameters=[]), "'parameters' must list"),
    "half of the parameters": (lambda config: config["parameters"].pop(), "do not both perturb"),
    "another matrix perturbed": (_options(perturb="B"), "do not both perturb"),
    "pruned ratios": (lambda config: config.update(pruned=[2]), "has pruned="),
}


@pytest.mark.parametrize("onto", ["base", "patched"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_folder_changes_nothing(case, onto, posterior, tmp_path):
    spoil, match = REFUSED[case]
    posterior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "posterior_config.json").read_text())
    spoil(config)
    del config["digest"]  # as an older folder, in which only values tell
    (tmp_path / "posterior_config.json").write_text(json.dumps({**config, "format_version": 1}))
    model = tiny_llama() if onto == "base" else patched_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    options = None if onto == "base" else bank_of(model).options
    with pytest.raises(ValueError, match=match):
        Posterior.from_pretrained(model, tmp_path)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], v) and after[n].requires_grad == r for n, (v, r) in before.items())
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert onto == "base" or bank_of(model).options is options


def test_masks_that_are_none_are_refused(posterior, tmp_path):
    posterior.prune(0.1)
    for number, change in enumerate((lambda m: m + 1, lambda m: m.float(), lambda m: m[:1], lambda m: 1 - m)):
        folder = tmp_path / str(number)
        posterior.save_pretrained(folder)
        masks = load_file(folder / "posterior.safetensors")
        save_file(
            {key: change(mask).contiguous() for key, mask in masks.items()}, folder / "posterior.safetensors"
        )
        with pytest.raises(ValueError, match=r"posterior\.safetensors.*(must be 0, as uint8|has shape)"):
            Posterior.from_pretrained(tiny_llama(), folder)


def test_an_interrupted_prune_prunes_all_or_nothing():
    original = Posterior.from_monteclora(patched_model(ONE_LAYER))
    done = copy.deepcopy(original)
    lines = interrupted_at(0, lambda: done.prune(0.3))
    states = [(list(p.pruned), _adapter(p.model), p.mean) for p in (original, done)]
    found = []
    for number in range(1, lines + 1, 3):
        posterior = copy.deepcopy(original)
        interrupted_at(number, lambda posterior=posterior: posterior.prune(0.3))
        same = [
            posterior.pruned == pruned
            and _same(_adapter(posterior.model), adapter)
            and _same(posterior.mean, mean)
            for pruned, adapter, mean in states
        ]
        found.append(same.index(True))
    assert lines > 30 and found == sorted(found)


def test_a_model_without_monteclora_is_named():
    with pytest.raises(ValueError, match=r"call bayeslora.patch\(model\)"):
        Posterior.from_monteclora(peft_model())


def test_ivons_posterior_over_a_monteclora_adapter_comes_back_from_disk(tmp_path):
    model = patched_model()
    opt = bayeslora.IVON([p for p in model.parameters() if p.requires_grad], lr=1e-2, ess=1e4)
    with opt.sampled_params(train=True):
        model(**BATCH).loss.backward()
    opt.step()
    posterior = Posterior.from_optimizer(model, opt)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tiny_llama(), tmp_path)
    with posterior.sample(seed=3), loaded.sample(seed=3):
        expected, found = dict(model.named_parameters()), dict(loaded.model.named_parameters())
        assert all(torch.equal(found[name], expected[name]) for name in posterior.parameters)
