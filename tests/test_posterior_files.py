"""A posterior's folder: written whole, read as copies, checked first, and loaded whole or not at all."""

import copy
import json
import os
import shutil

import pytest
import torch
from crashes import interrupted_at, killed_at
from monteclora_models import patched_model, tiny_llama
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny_lm import make_model

from bayeslora import IVON, Posterior, patch
from bayeslora.posterior_checks import check_ivon
from bayeslora.posterior_files import read_folder

TOKENS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
SEEDS = [5, 6]
MEAN, HESS, CONFIG = "adapter_model.safetensors", "posterior.safetensors", "posterior_config.json"
TARGETS = ["q_proj", "v_proj"]


def _base():
    return make_model(50)


def _peft(config=None):
    torch.manual_seed(1)
    config = config or LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(_base(), config).eval()


def _posterior(model, ess=50.0, hess=1.0):
    params = [p for p in model.parameters() if p.requires_grad]
    return IVON(params, lr=0.1, ess=ess, hess_init=hess).posterior(model)


def _probs(posterior):
    return posterior.predict(TOKENS, seeds=SEEDS)


def _state(model):
    """All that a load may not change where it fails."""
    tensors = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    return tensors, modules, list(getattr(model, "peft_config", ()))


def _same(a, b):
    values = (torch.equal(a[0][n][0], v) and a[0][n][1] == wanted for n, (v, wanted) in b[0].items())
    return a[0].keys() == b[0].keys() and all(values) and a[1:] == b[1:]


@pytest.fixture(scope="module")
def posterior():
    return _posterior(_peft())


@pytest.fixture
def folder(posterior, tmp_path):
    posterior.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit(file, **values):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **values}))


def _change(file, change):
    save_file({key: change(value) for key, value in load_file(file).items()}, file)


def _without_digests(folder):
    """As folders of format version 1 are, in which only values tell."""
    config = json.loads((folder / CONFIG).read_text())
    del config["digest"], config["files"]
    (folder / CONFIG).write_text(json.dumps({**config, "format_version": 1}))


# ---- what PEFT's file holds ----------------------------------------------------------------------

HELD = [
    VeraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    PveraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    UniLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
    TinyLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
    VBLoRAConfig(r=2, topk=2, num_vectors=8, vector_length=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    IA3Config(target_modules=TARGETS, feedforward_modules=[], task_type="CAUSAL_LM"),
]


@pytest.mark.parametrize("config", HELD, ids=lambda config: type(config).__name__)
@pytest.mark.filterwarnings("ignore")
def test_every_adapter_that_pefts_file_holds_comes_back(config, tmp_path):
    posterior = _posterior(_peft(copy.deepcopy(config)), ess=1e4)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_base(), tmp_path)
    assert torch.equal(_probs(loaded), _probs(posterior))
    assert (_probs(posterior) - posterior.predict(TOKENS, 1, variance_scale=0.0)).abs().max() > 1e-5


def test_an_adapter_of_which_peft_saves_something_else_is_refused_with_the_reason(tmp_path):
    posterior = _posterior(_peft(PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")))
    with pytest.raises(ValueError, match="a P_TUNING adapter does not hold it as it is, only"):
        posterior.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_half_precision_prompts_keep_their_fp32_mean(tmp_path):
    model = _peft(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    model.prompt_encoder.bfloat16()
    posterior = _posterior(model)
    (gaussian,) = posterior.parameters.values()
    gaussian.mean.add_(1e-5)
    posterior.save_pretrained(tmp_path)
    (loaded,) = Posterior.from_pretrained(_base(), tmp_path).mean.values()
    assert torch.equal(loaded, gaussian.mean)


def test_fp64_adapters_come_back_exactly(tmp_path):
    model = _peft().double()
    posterior = _posterior(model)
    for g in posterior.parameters.values():
        g.hess.uniform_(0.3, 3.0)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_peft().double(), tmp_path)
    for name, g in posterior.parameters.items():
        assert torch.equal(loaded.parameters[name].mean, g.mean)
        assert torch.equal(loaded.parameters[name].hess, g.hess)


def test_a_hessian_below_zero_that_weight_decay_lifts_comes_back(tmp_path):
    """IVON keeps h + δ positive, not h."""
    model = _peft()
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=50.0, weight_decay=0.5)
    posterior = opt.posterior(model)
    for g in posterior.parameters.values():
        g.hess.uniform_(-0.4, 0.1)
    posterior.save_pretrained(tmp_path)
    assert torch.equal(_probs(Posterior.from_pretrained(_base(), tmp_path)), _probs(posterior))


@pytest.mark.parametrize("spoil", ["mean", "hess"])
def test_what_could_not_be_loaded_is_not_saved(spoil, tmp_path):
    posterior = _posterior(_peft())
    gaussian = next(iter(posterior.parameters.values()))
    getattr(gaussian, spoil)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj.*(NaN or infinity|not positive)"):
        posterior.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- what the posterior keeps --------------------------------------------------------------------


def _with_head(optimizer="ivon"):
    """A LoRA and a head; the head is trained at its mean by IVON, or by another optimizer."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = patch(_peft(config))
    groups = {"lora": [], "head": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups["lora" if "lora" in name else "head"].append(p)
    settings = {"lr": 0.5, "ess": 1e3, "hess_init": 0.1}
    if optimizer == "ivon":
        others = {"params": groups["head"], "perturb": False}
        return model, [IVON([{"params": groups["lora"]}, others], **settings)]
    return model, [IVON(groups["lora"], **settings), torch.optim.SGD(groups["head"], lr=0.5)]


def _train(model, optimizers, steps):
    for _ in range(steps):
        with optimizers[0].sampled_params(train=True):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize("optimizer", ["ivon", "another"])
def test_more_training_changes_nothing_of_a_kept_posterior(optimizer, tmp_path):
    model, optimizers = _with_head(optimizer)
    _train(model, optimizers, 2)
    kept = optimizers[0].posterior(model)
    wanted, text = _probs(kept), kept.generate(TOKENS, seeds=SEEDS, max_new_tokens=6)
    kept.save_pretrained(tmp_path / "1")
    _train(model, optimizers, 3)
    moved = _state(model)
    assert torch.equal(_probs(kept), wanted)
    assert torch.equal(kept.generate(TOKENS, seeds=SEEDS, max_new_tokens=6), text)
    kept.save_pretrained(tmp_path / "2")
    assert _same(_state(model), moved)
    for name in (MEAN, HESS):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert torch.equal(_probs(Posterior.from_pretrained(_base(), tmp_path / "2")), wanted)
    kept.add_adapter("mean", seeds=None)
    model.set_adapter("mean")
    plain = PeftModel.from_pretrained(_base(), str(tmp_path / "1")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    model.set_adapter("default")
    with torch.no_grad():
        merged = kept.merge(copy_model=False)(input_ids=TOKENS).logits
        torch.testing.assert_close(merged, plain(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_has_moved_makes_samples_take_turns(caplog):
    model, optimizers = _with_head()
    _train(model, optimizers, 1)
    kept = optimizers[0].posterior(model)
    wanted = _probs(kept)
    with caplog.at_level("INFO", "bayeslora"):
        torch.testing.assert_close(kept.predict(TOKENS, seeds=SEEDS, batched=True), wanted)
        assert "one after another" not in caplog.text
        _train(model, optimizers, 1)
        torch.testing.assert_close(kept.predict(TOKENS, seeds=SEEDS, batched=True), wanted)
    assert "lm_head.modules_to_save.default.weight has changed since the posterior was made" in caplog.text


def test_a_monteclora_posterior_keeps_what_is_not_perturbed(tmp_path):
    model = patched_model().eval()
    kept = Posterior.from_monteclora(model)
    wanted = _probs(kept)
    kept.save_pretrained(tmp_path / "1")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    assert torch.equal(_probs(kept), wanted)
    kept.save_pretrained(tmp_path / "2")
    loaded = Posterior.from_pretrained(tiny_llama(), tmp_path / "2")
    torch.testing.assert_close(_probs(loaded), wanted)


def test_a_trained_head_outside_the_adapter_is_not_lost_without_a_word(tmp_path):
    model = _peft()
    head = model.get_output_embeddings().weight.requires_grad_(True)
    lora = [p for p in model.parameters() if p.requires_grad and p is not head]
    groups = [{"params": lora}, {"params": [head], "perturb": False}]
    posterior = IVON(groups, lr=0.1, ess=50.0).posterior(model)
    with pytest.raises(ValueError, match=r"lm_head.*modules_to_save"):
        posterior.save_pretrained(tmp_path / "new")


# ---- one save ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MEAN, HESS, CONFIG, "adapter_config.json"])
def test_files_of_two_saves_never_pass_for_one(name, folder, tmp_path):
    model = _peft(LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    _posterior(model, ess=60.0, hess=2.0).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / name, folder / name)
    base = _base()
    before = _state(base)
    with pytest.raises(ValueError, match=r"is of another save than .*posterior_config\.json"):
        Posterior.from_pretrained(base, folder)
    assert _same(_state(base), before)


def test_any_number_that_is_changed_is_noticed(folder):
    entries = json.loads((folder / CONFIG).read_text())["parameters"]
    next(iter(entries.values()))["ess"] = 51.0
    _edit(folder / CONFIG, parameters=entries)
    with pytest.raises(ValueError, match=f"{CONFIG}' has been changed since it was saved"):
        Posterior.from_pretrained(_base(), folder)


def test_the_base_models_place_may_be_edited(folder, posterior):
    _edit(folder / "adapter_config.json", base_model_name_or_path="/moved", inference_mode=False)
    assert torch.equal(_probs(Posterior.from_pretrained(_base(), folder)), _probs(posterior))


def test_an_older_folder_without_digests_loads(folder, posterior):
    _without_digests(folder)
    assert torch.equal(_probs(Posterior.from_pretrained(_base(), folder)), _probs(posterior))


def test_other_files_of_the_folder_stay(folder, posterior):
    (folder / "tokenizer.json").write_text("mine")
    (folder / "other").mkdir()
    (folder / "other" / MEAN).write_text("mine too")
    card = (folder / "README.md").read_text().replace("# Model Card", "# My Card")
    (folder / "README.md").write_text(card)
    posterior.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "mine"
    assert (folder / "other" / MEAN).read_text() == "mine too"
    assert "# My Card" in (folder / "README.md").read_text()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_save_that_is_killed_leaves_the_old_posterior_or_the_new(tmp_path):
    model = _peft(LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    old, new = _posterior(model, ess=50.0), _posterior(model, ess=60.0)
    for g in new.parameters.values():
        g.mean.add_(1.0)

    def read(folder):
        saved = read_folder(folder, {"ivon": check_ivon})
        key, entry = next(iter(saved.config["parameters"].items()))
        return entry["ess"], bool(saved.values[key].abs().sum() > saved.values[key].numel() / 2)

    found = []
    for number in range(4, 1000, 5):  # every fifth of its file operations
        folder = tmp_path / str(number)
        old.save_pretrained(folder)
        killed = killed_at(number, lambda folder=folder: new.save_pretrained(folder))
        found.append(read(folder))
        if not killed:
            break
    assert found == sorted(found) and set(found) == {(50.0, False), (60.0, True)}


# ---- a loaded posterior --------------------------------------------------------------------------


def test_a_loaded_posterior_does_not_follow_its_files(folder, posterior, tmp_path):
    loaded = Posterior.from_pretrained(_base(), folder)
    for name in (MEAN, HESS):
        size = os.path.getsize(folder / name)
        with open(folder / name, "r+b") as file:  # as cp and rsync --inplace do
            file.write(b"\0" * size)
            file.truncate(0)
    for name, g in posterior.parameters.items():
        assert torch.equal(loaded.parameters[name].mean, g.mean)
        assert torch.equal(loaded.parameters[name].hess, g.hess)


def test_a_loaded_adapter_is_trainable_where_asked(folder, posterior):
    frozen = Posterior.from_pretrained(_base(), folder)
    assert not [p for p in frozen.model.parameters() if p.requires_grad]
    loaded = Posterior.from_pretrained(_base(), folder, is_trainable=True)
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(g.parameter) for g in loaded.parameters.values()}
    opt = IVON(trained, lr=0.1, ess=50.0, prior=loaded)
    _train(loaded.model, [opt], 1)
    assert not torch.equal(trained[0], loaded.parameters[next(iter(loaded.parameters))].mean)
    again = Posterior.from_pretrained(frozen.model, folder, is_trainable=True)
    assert all(g.parameter.requires_grad for g in again.parameters.values())


# ---- what is refused -----------------------------------------------------------------------------


def _entries(**values):
    def change(folder):
        entries = json.loads((folder / CONFIG).read_text())["parameters"]
        _edit(folder / CONFIG, parameters={key: {**entry, **values} for key, entry in entries.items()})

    return change


def _tensors(name, change):
    return lambda folder: _change(folder / name, change)


def _prune_without_a_zero(folder):
    _change(folder / HESS, lambda v: torch.full_like(v, float("inf")))


REFUSED = {
    "ess below 0": (_entries(ess=-5.0), "has ess=-5.0"),
    "ess of NaN": (_entries(ess=float("nan")), "has ess=nan"),
    "ess beyond fp32": (_entries(ess=10**400), "has ess=1"),
    "ess of a string": (_entries(ess="50"), "has ess='50'"),
    "weight_decay of NaN": (_entries(weight_decay=float("nan")), "has weight_decay=nan"),
    "weight_decay so negative": (_entries(weight_decay=-0.1), "has weight_decay=-0.1"),
    "one stream for all": (_entries(stream=0), "both have stream 0"),
    "half a stream": (_entries(stream=0.5), "has stream=0.5"),
    "a stream that is true": (_entries(stream=True), "has stream=True"),
    "no parameters": (lambda f: _edit(f / CONFIG, parameters={}), "'parameters' must list"),
    "a list of parameters": (lambda f: _edit(f / CONFIG, parameters=[1]), "'parameters' must list"),
    "entries that are none": (lambda f: _edit(f / CONFIG, parameters={"a": 1}), "the entry of 'a' is 1"),
    "another method": (lambda f: _edit(f / CONFIG, method="laplace"), "has method 'laplace'"),
    "a method of no name": (lambda f: _edit(f / CONFIG, method=["ivon"]), "has method"),
    "a ratio of pruning": (lambda f: _edit(f / CONFIG, pruned=[1.5]), "has pruned="),
    "a mean of NaN": (_tensors(MEAN, lambda v: v * float("nan")), f"{MEAN}': .* holds NaN"),
    "a complex mean": (_tensors(MEAN, lambda v: v.to(torch.complex64)), "has dtype torch.complex64"),
    "an integer Hessian": (_tensors(HESS, lambda v: v.to(torch.int8)), "has dtype torch.int8"),
    "an integer mean": (_tensors(MEAN, lambda v: v.to(torch.int32)), "has dtype torch.int32"),
    "a Hessian of NaN": (_tensors(HESS, lambda v: v * float("nan")), f"{HESS}': .*not positive"),
    "pruned and not zero": (_prune_without_a_zero, "pruned element .* whose mean is not zero"),
    "nested for ever": (lambda f: (f / CONFIG).write_text("[" * 100_000), "is not valid JSON"),
    "a list for a config": (lambda f: (f / CONFIG).write_text("[]"), "holds a list"),
    "a list for PEFT": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds a list"),
    "no kind of adapter": (lambda f: _edit(f / "adapter_config.json", peft_type="X"), "no adapter's config"),
    "a rank that fits no memory": (
        lambda f: _edit(f / "adapter_config.json", r=10**9),
        r"\(1000000000, 32\)",
    ),
    "a head that is not there": (
        lambda f: _edit(f / "adapter_config.json", modules_to_save=["lm_head"]),
        "has no tensor .*lm_head",
    ),
}


@pytest.mark.parametrize("onto", ["base", "peft"])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_no_posterior_can_be_is_refused_and_changes_nothing(case, onto, folder):
    spoil, match = REFUSED[case]
    _without_digests(folder)
    spoil(folder)
    model = _base() if onto == "base" else _peft()
    before = _state(model)
    with pytest.raises(ValueError, match=match) as error:
        Posterior.from_pretrained(model, folder, "new" if onto == "peft" else None)
    assert "\n" not in str(error.value)
    assert _same(_state(model), before)


# ---- failures and interrupts ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("onto", ["base", "new", "existing", "monteclora"])
def test_a_load_is_undone_whatever_fails(onto, error, folder, tmp_path, monkeypatch):
    import peft

    if onto == "monteclora":
        folder, model = tmp_path / "monteclora", patched_model()
        source = patched_model()
        torch.nn.init.normal_(next(p for n, p in source.named_parameters() if "lora_A" in n))
        Posterior.from_monteclora(source).save_pretrained(folder)
    else:
        model = _base() if onto == "base" else _peft()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    original = peft.set_peft_model_state_dict

    def fails(*arguments, **settings):
        original(*arguments, **settings)
        raise error("as if")

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fails)
    before = _state(model)
    with pytest.raises(error, match="as if"):
        Posterior.from_pretrained(model, folder, "two" if onto == "new" else None)
    assert _same(_state(model), before)
    monkeypatch.undo()
    Posterior.from_pretrained(model, folder, "two" if onto == "new" else None)


def _gaussians(posterior):
    tensors = {
        n: (g.mean.clone(), g.hess.clone(), g.parameter.detach().clone())
        for n, g in posterior.parameters.items()
    }
    return list(posterior.pruned), tensors


def _are(posterior, state):
    pruned, tensors = _gaussians(posterior)
    return pruned == state[0] and all(map(torch.equal, sum(tensors.values(), ()), sum(state[1].values(), ())))


def test_an_interrupted_prune_prunes_all_or_nothing():
    model = _peft(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    original = _posterior(model)
    done = copy.deepcopy(original)
    lines = interrupted_at(0, lambda: done.prune(0.3))
    states = _gaussians(original), _gaussians(done)
    found = []
    for number in range(1, lines + 1, 2):
        posterior = copy.deepcopy(original)
        interrupted_at(number, lambda posterior=posterior: posterior.prune(0.3))
        found.append([_are(posterior, state) for state in states].index(True))
        with posterior.sample(3):  # the kernels' copies are not of another state
            value = next(iter(posterior.parameters.values()))
            assert bool((value.parameter == 0.0).any()) == bool(found[-1])
    assert lines > 30 and found == sorted(found)


@pytest.mark.parametrize("call", ["add_adapter", "base", "new"])
def test_an_interrupt_leaves_the_model_as_it_was(call, posterior, folder):
    def prepared():
        if call == "add_adapter":
            own = copy.deepcopy(posterior)
            return own.model, lambda: own.add_adapter("two", seeds=SEEDS)
        model = _base() if call == "base" else _peft()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        return model, lambda: Posterior.from_pretrained(model, folder, "two" if call == "new" else None)

    prepared()[1]()  # what is imported and found once only
    lines = interrupted_at(0, prepared()[1], ("bayeslora", "peft"))
    for number in (lines * part // 9 for part in range(1, 9)):
        model, run = prepared()
        before = _state(model)
        interrupted_at(number, run, ("bayeslora", "peft"))
        assert _same(_state(model), before), number
