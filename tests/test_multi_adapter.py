"""Two adapters in one model, each with its optimizer and posterior: train one, switch, train the other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON, Posterior, patch

TOKENS = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))


def _base(device):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(device)


def _two_adapters(device):
    model = get_peft_model(_base(device), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    return patch(model)


def _of(model, adapter):
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n}


def _copy(parameters):
    return {n: p.detach().clone() for n, p in parameters.items()}


def _train(model, opt, steps, device):
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        with opt.sampled_params(train=True):
            loss = model(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss
            loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def _optimizer(parameters, seed):
    return IVON(list(parameters.values()), lr=0.5, ess=1e3, hess_init=0.1, seed=seed)


@pytest.mark.parametrize("shared", [False, True], ids=["two_optimizers", "one_optimizer"])
def test_one_trains_while_the_other_stands_still(shared, device, tmp_path):
    model = _two_adapters(device)
    opts = {name: _optimizer(_of(model, name), seed) for seed, name in enumerate(("first", "second"))}
    if shared:
        opts = dict.fromkeys(opts, _optimizer({**_of(model, "first"), **_of(model, "second")}, 0))
    saved = {}
    for turn in range(2):
        for name, other in (("first", "second"), ("second", "first")):
            model.set_adapter(name)
            before, still = _copy(_of(model, name)), _copy(_of(model, other))
            state = {n: _copy(opts[other].state[p]) for n, p in _of(model, other).items()}
            _train(model, opts[name], 3, device)
            assert all(not torch.equal(p, before[n]) for n, p in _of(model, name).items())
            for n, p in _of(model, other).items():
                assert torch.equal(p, still[n]), n
                for key, value in state[n].items():
                    assert torch.equal(opts[other].state[p][key], value), (n, key)
            if turn == 1 and not shared:
                saved[name] = _copy(_of(model, name))
    if shared:
        assert set(opts["first"].posterior(model).parameters) == {
            *_of(model, "first"),
            *_of(model, "second"),
        }
        return
    for name, opt in opts.items():  # also of the adapter that is frozen now
        posterior = opt.posterior(model)
        assert set(posterior.parameters) == set(_of(model, name))
        posterior.save_pretrained(tmp_path)
        loaded = Posterior.from_pretrained(_base(device), tmp_path / name)
        model.set_adapter(name)
        query = {"input_ids": TOKENS.to(device)}
        torch.testing.assert_close(posterior.predict(query, 2), loaded.predict(query, 2))
        for n, value in saved[name].items():
            assert torch.equal(_of(model, name)[n], value)


def test_switching_back_goes_on_as_if_never_left(device):
    runs = []
    for away in (False, True):
        model = _two_adapters(device)
        first, second = (_optimizer(_of(model, name), 3) for name in ("first", "second"))
        model.set_adapter("first")
        losses = _train(model, first, 3, device)
        if away:
            model.set_adapter("second")
            _train(model, second, 2, device)
            model.set_adapter("first")
        runs.append(losses + _train(model, first, 3, device))
    assert runs[0] == runs[1]
