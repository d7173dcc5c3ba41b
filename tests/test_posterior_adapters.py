"""Which adapter a tensor belongs to: adapters called like modules, tied matrices, bases that PEFT changes."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_lm import make_model

from bayeslora import IVON, Posterior, patch
from bayeslora.posterior_adapters import adapter_of, places

TOKENS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
SEEDS = [5, 6]


def _base(tied=False):
    model = make_model(50)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def _config(targets=("q_proj", "v_proj"), **settings):
    settings.setdefault("init_lora_weights", False)
    return LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **settings)


def _peft(config=None, base=None, adapter="default"):
    torch.manual_seed(1)
    return get_peft_model(base or _base(), config or _config(), adapter).eval()


def _posterior(model, ess=50.0):
    return IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=ess).posterior(model)


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def _tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _tie(model):
    """Let q, k and v of each layer share one A, as ShareLoRA does."""
    for layer in model.base_model.model.model.layers:
        attention = layer.self_attn
        for other in (attention.k_proj, attention.v_proj):
            other.lora_A["default"].weight = attention.q_proj.lora_A["default"].weight
    return model


# ---- adapters called like modules ----------------------------------------------------------------


@pytest.fixture
def numbered():
    """A posterior of adapter "1" beside adapter "0", which is the name of the only adapted layer, too."""
    model = _peft(_config(layers_to_transform=[0]), adapter="0")
    model.add_adapter("1", _config(layers_to_transform=[0]))
    model.set_adapter("1")
    return _posterior(patch(model))


def test_an_adapter_is_found_in_the_modules_not_in_names(numbered):
    assert adapter_of(numbered.model, [g.parameter for g in numbered.parameters.values()]) == "1"
    names = {place.name for place in places(numbered.model) if place.adapter == "1"}
    assert names == set(numbered.parameters)
    assert len(names) == len(places(numbered.model)) // 2


def test_an_adapter_called_as_a_layer_predicts_and_is_copied(numbered):
    wanted = numbered.predict(TOKENS, seeds=SEEDS, average=False)
    found = numbered.predict(TOKENS, seeds=SEEDS, average=False, batched=True)
    torch.testing.assert_close(found, wanted)
    before = _tensors(numbered.model)
    numbered.add_adapter("2", seeds=SEEDS[:1])
    after = _tensors(numbered.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    numbered.model.set_adapter("2")
    torch.testing.assert_close(_logits(numbered.model).softmax(-1), wanted[0])


def test_an_adapter_called_as_a_layer_is_saved_whole(numbered, tmp_path):
    """PEFT itself leaves out of its file all of the layer that is called as the other adapter."""
    numbered.save_pretrained(tmp_path)
    wanted = numbered.predict(TOKENS, seeds=SEEDS)
    for adapter in (None, "0"):
        loaded = Posterior.from_pretrained(_base(), tmp_path / "1", adapter)
        torch.testing.assert_close(loaded.predict(TOKENS, seeds=SEEDS), wanted)
    plain = PeftModel.from_pretrained(_base(), str(tmp_path / "1")).eval()
    torch.testing.assert_close(_logits(plain), _logits(numbered.model))
    assert set(numbered.model.peft_config) == {"0", "1"}


@pytest.mark.parametrize("name", ["../out", "/out", "a/b", "a.b", "", ".."])
def test_names_that_are_paths_are_refused(name, numbered, tmp_path):
    numbered.save_pretrained(tmp_path / "in")
    for call in (
        lambda: numbered.add_adapter(name),
        lambda: Posterior.from_pretrained(_base(), tmp_path / "in" / "1", name),
    ):
        with pytest.raises(ValueError, match="cannot be an adapter's name"):
            call()
    with pytest.raises(TypeError, match="must be a string, got 3"):
        numbered.add_adapter(3)


def test_an_adapter_named_by_an_absolute_path_is_not_written_there(tmp_path):
    out = tmp_path / "out"  # a module's name as torch has it: no dot
    posterior = _posterior(_peft(adapter=str(out)))
    with pytest.raises(ValueError, match="cannot be an adapter's name"):
        posterior.save_pretrained(tmp_path / "in")
    assert not out.exists() and not (tmp_path / "in").exists()


# ---- tied matrices -------------------------------------------------------------------------------


@pytest.fixture
def tied():
    return _posterior(patch(_tie(_peft(_config(["q_proj", "k_proj", "v_proj"])))))


def test_a_shared_matrix_is_perturbed_in_every_layer_of_a_pass(tied):
    wanted = tied.predict(TOKENS, seeds=SEEDS, average=False)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    torch.testing.assert_close(tied.predict(TOKENS, seeds=SEEDS, average=False, batched=True), wanted)
    settings = {"seeds": SEEDS, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(*(tied.generate(TOKENS, batched=batched, **settings) for batched in (False, True)))


def test_an_adapter_of_a_shared_matrix_is_the_sample(tied):
    wanted = tied.predict(TOKENS, seeds=SEEDS[:1])
    tied.add_adapter("one", seeds=SEEDS[0])
    tied.model.set_adapter("one")
    torch.testing.assert_close(_logits(tied.model).softmax(-1), wanted)


@pytest.mark.parametrize("onto", ["base", "untied", "tied"])
def test_a_shared_matrix_comes_back_from_disk(onto, tied, tmp_path):
    tied.prune(0.2)
    tied.save_pretrained(tmp_path / "1")
    wanted = tied.predict(TOKENS, seeds=SEEDS)
    model = _base() if onto == "base" else _peft(_config(["q_proj", "k_proj", "v_proj"]))
    loaded = Posterior.from_pretrained(_tie(model) if onto == "tied" else model, tmp_path / "1")
    assert len(loaded.parameters) == (len(tied.parameters) if onto == "tied" else len(tied.parameters) + 4)
    torch.testing.assert_close(loaded.predict(TOKENS, seeds=SEEDS), wanted)
    loaded.save_pretrained(tmp_path / "2")
    again = Posterior.from_pretrained(_base(), tmp_path / "2")
    torch.testing.assert_close(again.predict(TOKENS, seeds=SEEDS), wanted)


def test_what_the_model_ties_and_the_folder_does_not_is_refused(tmp_path):
    _posterior(_peft(_config(["q_proj", "k_proj", "v_proj"]))).save_pretrained(tmp_path)
    model = _tie(_peft(_config(["q_proj", "k_proj", "v_proj"])))
    before = _tensors(model)
    with pytest.raises(ValueError, match="are two tensors; in the model they are one"):
        Posterior.from_pretrained(model, tmp_path)
    assert _same(_tensors(model), before)


@pytest.mark.filterwarnings("ignore")
def test_pefts_own_tied_adapter_comes_back_from_disk(tmp_path):
    """The head's A is the embedding's B seen from its other side."""
    config = _config(["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True, init_lora_weights=True)
    model = _peft(config, _base(tied=True))
    params = [p for name, p in model.named_parameters() if p.requires_grad and "lm_head" not in name]
    for p in params:
        p.data.normal_(std=0.1)
    posterior = IVON(params, lr=0.1, ess=50.0).posterior(model)
    assert not posterior.fixed  # a sample of the embedding's is one of the head's
    wanted = posterior.predict(TOKENS, seeds=SEEDS)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_base(tied=True), tmp_path)
    torch.testing.assert_close(loaded.predict(TOKENS, seeds=SEEDS), wanted)


# ---- adapters whose start changes the base -------------------------------------------------------


@pytest.fixture(params=["pissa", "olora"])
def changed_base(request):
    model = _peft(_config(init_lora_weights=request.param))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return _posterior(model, ess=1e3)


def test_adding_an_adapter_leaves_the_base(changed_base, tmp_path):
    model = changed_base.model
    wanted, before = changed_base.predict(TOKENS, seeds=SEEDS[:1]), _tensors(model)
    changed_base.add_adapter("one", seeds=SEEDS[0])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.set_adapter("one")
    torch.testing.assert_close(_logits(model).softmax(-1), wanted)
    model.save_pretrained(tmp_path, selected_adapters=["one"])  # PEFT starts from a bare base
    plain = PeftModel.from_pretrained(_base(), str(tmp_path / "one")).eval()
    torch.testing.assert_close(_logits(plain).softmax(-1), wanted)


def test_it_is_loaded_onto_a_bare_base_and_beside_itself(changed_base, tmp_path):
    changed_base.save_pretrained(tmp_path)
    wanted = changed_base.predict(TOKENS, seeds=SEEDS)
    loaded = Posterior.from_pretrained(_base(), tmp_path)
    torch.testing.assert_close(loaded.predict(TOKENS, seeds=SEEDS), wanted)
    second = Posterior.from_pretrained(loaded.model, tmp_path, "second")
    torch.testing.assert_close(second.predict(TOKENS, seeds=SEEDS), wanted)
    loaded.model.set_adapter("default")
    torch.testing.assert_close(loaded.predict(TOKENS, seeds=SEEDS), wanted)


@pytest.mark.parametrize("adapter", [None, "second"])
def test_it_is_not_loaded_where_other_adapters_need_the_base(adapter, changed_base, tmp_path):
    changed_base.save_pretrained(tmp_path)
    model = _peft()
    before = _tensors(model)
    with pytest.raises(ValueError, match=r"base changed by|changes the base"):
        Posterior.from_pretrained(model, tmp_path, adapter)
    assert _same(_tensors(model), before) and list(model.peft_config) == ["default"]


def test_a_start_that_the_folder_does_not_hold_is_refused_on_a_bare_base(tmp_path):
    model = _peft(_config(init_lora_weights=True))
    model.peft_config["default"].init_lora_weights = "lora_ga"  # as after its start, from gradients
    posterior = _posterior(model)
    posterior.save_pretrained(tmp_path)
    base = _base()
    before = _tensors(base)
    with pytest.raises(
        ValueError, match=r"start \(lora_ga\) changed the base by what the folder does not hold"
    ):
        Posterior.from_pretrained(base, tmp_path)
    assert _same(_tensors(base), before)
    loaded = Posterior.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(loaded.predict(TOKENS, seeds=SEEDS), posterior.predict(TOKENS, seeds=SEEDS))
