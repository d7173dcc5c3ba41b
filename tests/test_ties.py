"""Two parameters over one memory: one noise, one state, both gradients; also PEFT's tied adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_lm import make_model
from torch import nn

import bayeslora.ivon_samples
from bayeslora import IVON, Posterior
from bayeslora.kernels import ivon as kernels
from bayeslora.kernels import ivon_twin
from bayeslora.ties import find_ties

SETTINGS = {"lr": 0.05, "ess": 50.0, "hess_init": 0.25, "beta2": 0.9, "seed": 3}
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _weight(device="cpu"):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def _loss(w, v):
    """Through ``w (4, 5)`` and ``v (5, 4)``, as an autoencoder with tied weights."""
    x = X.to(w.device)
    return (x @ w.T @ v.T - x).square().mean()


def _run(params, loss, steps=4, samples=1, opt=None):
    opt = opt or IVON(params, **SETTINGS)
    seen = []
    for _ in range(steps):
        for _ in range(samples):
            with opt.sampled_params(train=True):
                seen.append(params[0].detach().clone())
                loss().backward()
            opt.zero_grad()
        opt.step()
    return opt, seen


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("module", [kernels, ivon_twin], ids=["triton", "twin"])
def test_a_transposed_view_trains_as_the_one_parameter_that_it_is(module, samples, device, monkeypatch):
    monkeypatch.setattr(bayeslora.ivon_samples, "ivon_kernels", lambda _: module)
    one = nn.Parameter(_weight(device))
    alone, expected = _run([one], lambda: _loss(one, one.T), samples=samples)
    w = nn.Parameter(_weight(device))
    v = nn.Parameter(w.detach().T)
    opt, seen = _run([w, v], lambda: _loss(w, v), samples=samples)
    for own, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w, one, rtol=1e-10, atol=1e-12)
    for key in ("mean", "momentum", "hess"):
        torch.testing.assert_close(opt.state[w][key], alone.state[one][key], rtol=1e-10, atol=1e-12)
        assert torch.equal(opt.state[v][key], opt.state[w][key].T)


@pytest.mark.parametrize("used", [0, 1])
def test_the_gradient_of_either_counts(used):
    one = nn.Parameter(_weight())
    _run([one], lambda: (X @ one.T).square().mean())
    w = nn.Parameter(_weight())
    tied = [w, nn.Parameter(w.detach().T)]
    _run(tied, lambda: (X @ (tied[1] if used else w.T)).square().mean())
    torch.testing.assert_close(w, one, rtol=1e-10, atol=1e-12)


def test_a_frozen_one_is_trained_by_the_other():
    w = nn.Parameter(_weight(), requires_grad=False)
    v = nn.Parameter(w.detach().T)
    opt, _ = _run([w, v], lambda: _loss(w, v))
    assert not torch.equal(w, _weight())
    assert torch.equal(opt.state[w]["mean"], w) and torch.equal(opt.state[v]["mean"], v)


def test_the_state_resumes_exactly():
    w = nn.Parameter(_weight())
    v = nn.Parameter(w.detach().T)
    opt, _ = _run([w, v], lambda: _loss(w, v), steps=2)
    saved = copy.deepcopy((w.detach(), opt.state_dict()))
    _run([w, v], lambda: _loss(w, v), steps=2, opt=opt)
    again = nn.Parameter(saved[0])
    tied = nn.Parameter(again.detach().T)
    resumed = IVON([again, tied], **{**SETTINGS, "seed": 9})
    resumed.load_state_dict(saved[1])
    _run([again, tied], lambda: _loss(again, tied), steps=2, opt=resumed)
    assert torch.equal(again, w)
    saved[1]["state"][1]["hess"] = 2.0 * saved[1]["state"][1]["hess"]
    with pytest.raises(ValueError, match="parameters 0 and 1 share one memory, but their 'hess' differ"):
        resumed.load_state_dict(saved[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda w: [w, w[1:]],
        lambda w: [w[:, :3], w[:, 2:]],
        lambda w: [w, w.view(-1)],
        lambda w: [w, w.view(torch.int64).view(torch.float32)],
    ],
)
def test_views_that_overlap_otherwise_are_refused(make):
    with pytest.raises(ValueError, match="share a part of their memory"):
        IVON([nn.Parameter(view) for view in make(_weight())], **SETTINGS)


def test_other_layouts_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="holds elements twice"):
        IVON([nn.Parameter(torch.zeros(1).expand(4))], **SETTINGS)
    w = nn.Parameter(_weight())
    groups = [{"params": [w]}, {"params": [nn.Parameter(w.detach())], "lr": 1.0}]
    with pytest.raises(ValueError, match="in group 1 has the memory of one in group 0"):
        IVON(groups, **SETTINGS)
    opt = IVON([w], **SETTINGS)
    with pytest.raises(ValueError, match="in group 1 has the memory"):
        opt.add_param_group(groups[1])
    assert len(opt.param_groups) == 1


def test_views_that_do_not_overlap_are_trained_apart():
    w = _weight()
    assert find_ties([w[:, :2], w[:, 2:], w[:0]]) == {}
    params = [nn.Parameter(w[:, :2]), nn.Parameter(w[:, 2:])]
    opt = IVON(params, **SETTINGS)
    opt.train()
    assert not any(torch.equal(p, q) for p, q in zip(params, _weight().split([2, 3], dim=1), strict=True))


def _tied_model():
    model = make_model(40)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    lora = LoraConfig(
        r=4,
        init_lora_weights=False,
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _trained_posterior():
    model = _tied_model()
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    opt = IVON(_trained(model), **SETTINGS)
    for _ in range(2):
        with opt.sampled_params(train=True):
            model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
    return model, opt, opt.posterior(model), ids


def test_pefts_tied_adapters_have_one_posterior(tmp_path):
    model, opt, posterior, ids = _trained_posterior()
    a, b, tied_b, tied_a = _trained(model)  # lora_embedding_A and B, and lm_head's B and A
    assert a.data_ptr() == tied_a.data_ptr() and b.data_ptr() == tied_b.data_ptr()
    with opt.sampled_params(seed=4):
        sample = [p.detach().clone() for p in _trained(model)]
    with posterior.sample(4):
        assert all(map(torch.equal, _trained(model), sample))
    posterior.prune(0.3)  # after two steps many variances are equal
    assert [g.parameter for g in posterior.parameters.values()] == [a, b]
    for p, mean in zip((a, b), posterior.mean.values(), strict=True):
        assert int((p == 0.0).sum()) >= int(0.3 * p.numel()) and torch.equal(mean, p)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(_tied_model(), tmp_path)
    with posterior.sample(4), loaded.sample(4):
        assert all(map(torch.equal, _trained(model), _trained(loaded.model)))
    probabilities = [p.predict({"input_ids": ids}, 2) for p in (posterior, loaded)]
    assert torch.equal(*probabilities)
    assert torch.equal(loaded.predict({"input_ids": ids}, 2, batched=True), probabilities[0])


def test_their_posterior_is_the_prior_of_the_next_task():
    model, _, posterior, _ = _trained_posterior()
    opt = IVON(_trained(model), prior=posterior, **SETTINGS)
    opt.train()
    for p in _trained(model):
        name = next(n for n, g in posterior.parameters.items() if g.parameter.data_ptr() == p.data_ptr())
        gaussian = posterior.parameters[name]
        wanted = gaussian.hess + gaussian.weight_decay + SETTINGS["hess_init"]  # ess is the same
        found = opt.state[p]["hess"]
        torch.testing.assert_close(found if found.shape == wanted.shape else found.T, wanted)
