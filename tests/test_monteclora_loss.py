"""MonteCLoRA's losses: closed forms against torch.distributions, extremes, and trainers that accumulate."""

import pytest
import torch
from monteclora_models import BATCH, TOKENS, bank_of, gradients, patched_model, peft_model
from peft import LoraConfig
from peft.helpers import MontecloraTrainerMixin
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import distributions
from transformers import Trainer, TrainingArguments

import bayeslora
from bayeslora import monteclora_math as mm
from bayeslora import samplers

FP64 = torch.float64


def _tables(ranks, copies=1):
    return mm.SiteTables(ranks, copies, range(len(ranks) * copies), torch.device("cpu"))


@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 1]])
def test_gaussian_kl_is_torchs(ranks):
    variances = torch.rand(3, sum(ranks), dtype=FP64) * 20 + 1e-3
    found = mm.gaussian_kl(variances, _tables(ranks), components=4)
    start = 0
    for site, r in enumerate(ranks):
        expected = 0.0
        for m in range(3):
            ours = distributions.MultivariateNormal(
                torch.zeros(r, dtype=FP64), torch.diag(variances[m, start : start + r])
            )
            prior = distributions.MultivariateNormal(torch.zeros(r, dtype=FP64), torch.eye(r, dtype=FP64))
            expected += 4 * distributions.kl_divergence(ours, prior).item() / 3
        assert found[site].item() == pytest.approx(expected, rel=1e-12)
        start += r


@pytest.mark.parametrize("prior", [0.1, 1.0, 7.0])
def test_dirichlet_kl_is_torchs(prior):
    alpha = torch.logspace(-1.3, 1.7, 24, dtype=FP64).view(6, 4)  # 0.05 to 50
    expected = distributions.kl_divergence(
        distributions.Dirichlet(alpha), distributions.Dirichlet(torch.full_like(alpha, prior))
    )
    torch.testing.assert_close(mm.dirichlet_kl(alpha, prior), expected, rtol=1e-10, atol=1e-10)


def test_pefts_dirichlet_kl_is_none():
    """A sign is flipped, so that it is negative where no KL is, and it overflows."""
    sampler = MontecloraSampler(4, 2, num_samples=3, dirichlet_prior=0.1, buffer_size=1, device="cpu")
    alpha = torch.full((3,), 1.0)
    assert sampler.dirichlet_kl(alpha) < -10
    assert mm.dirichlet_kl(alpha.double(), 0.1).item() == pytest.approx(2.3054872)
    large = torch.full((3,), 40.0)
    assert not torch.isfinite(sampler.dirichlet_kl(large))
    assert torch.isfinite(mm.dirichlet_kl(large.double(), 0.1))


def test_wishart_kl_is_the_mean_log_ratio():
    """torch has no KL of Wisharts: its log densities at our samples, 4 standard errors."""
    s = torch.tensor([0.3, -0.2, 0.1], dtype=FP64)
    w = samplers.wishart(3, torch.diag(torch.exp(s)), 20_000, seed=1)
    ours = distributions.Wishart(df=torch.tensor(3.0).double(), scale_tril=torch.diag(torch.exp(s)))
    prior = distributions.Wishart(df=torch.tensor(3.0).double(), scale_tril=torch.eye(3, dtype=FP64))
    ratio = ours.log_prob(w) - prior.log_prob(w)
    found = mm.wishart_kl(s, _tables([3])).item()
    assert abs(ratio.mean() - found) < 4 * ratio.std() / len(ratio) ** 0.5
    # And once exactly: r/2 (tr V - ln |V| - r).
    v = torch.exp(2 * s)
    assert found == pytest.approx(1.5 * (v.sum() - v.log().sum() - 3).item(), rel=1e-12)


@pytest.mark.parametrize("std", [-40.0, 0.0, 40.0])
@pytest.mark.parametrize("prior", [-30.0, 0.0, 30.0])
def test_loss_and_gradients_are_finite_at_extremes(std, prior):
    model = patched_model()
    for name, p in model.named_parameters():
        if "std_prior" in name:
            p.data.fill_(std)
        elif "expert_weights_prior" in name:
            p.data.fill_(prior)
    with torch.no_grad():
        model(**BATCH)
    loss = bayeslora.monteclora_loss(model)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_pefts_loss_is_not_finite_where_ours_is():
    model = peft_model()
    for name, p in model.named_parameters():
        if "expert_weights_prior" in name:
            p.data.fill_(4.0)
    model(**BATCH)
    assert not torch.isfinite(model.base_model._get_monteclora_loss())
    ours = patched_model()
    ours.load_state_dict(model.state_dict())
    ours(**BATCH)
    assert torch.isfinite(bayeslora.monteclora_loss(ours))


@pytest.mark.parametrize("use_entropy", [False, True])
def test_the_loss_is_pefts_but_for_the_dirichlet(use_entropy):
    model = patched_model(use_entropy=use_entropy, kl_loss_weight=0.01)
    model(**BATCH)
    part = bank_of(model).parts[0]
    noise = part.current.noise
    std_prior, prior = part.priors()
    alpha = mm.concentrations(prior)
    weights = mm.mixture_weights(alpha, noise, False)[0].float()
    variances = mm.row_variances(std_prior, part.tables, noise.chi_square)[0].view(6, 3).float()
    total = 0.0
    for i in range(6):
        sampler = part.sampler(i)
        kl = (
            sampler.wishart_kl(torch.diag(sampler.std_prior.exp()))
            + sampler.multivariate_kl(torch.diag(variances[i]))
            + mm.dirichlet_kl(alpha[i], 0.1)
        )
        total = total + 0.01 * kl + (weights[i].square().sum() if use_entropy else 0.0)
    torch.testing.assert_close(bayeslora.monteclora_loss(model).double(), (total / 6).double())


def test_both_losses_may_be_differentiated_one_after_the_other():
    together, apart = patched_model(), patched_model()
    (together(**BATCH).loss + bayeslora.monteclora_loss(together)).backward()
    apart(**BATCH).loss.backward()
    bayeslora.monteclora_loss(apart).backward()
    expected = gradients(together)
    for name, gradient in gradients(apart).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_eval_and_other_adapters_have_no_loss():
    model = patched_model()
    model(**BATCH)
    assert bayeslora.monteclora_loss(model) > 0
    assert model.base_model._get_monteclora_loss("other") == 0.0
    with pytest.raises(ValueError, match="adapter_name is 'other'"):
        bayeslora.monteclora_loss(model, "other")
    model.eval()
    assert bayeslora.monteclora_loss(model) == 0.0 == model.base_model._get_monteclora_loss()


# ---- trainers -------------------------------------------------------------------------------------------


class _MixinTrainer(MontecloraTrainerMixin, Trainer):
    pass


def _rows():
    """Four questions of different numbers of answer tokens: micro-batches of different weight."""
    rows = []
    for i, tokens in enumerate(TOKENS):
        labels = tokens.clone()
        labels[: 2 * i] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def _train(model, tmp_path, kind, accumulation):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    kind(model=model, args=arguments, train_dataset=_rows()).train()
    return {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}


@pytest.mark.parametrize("trainer", ["mixin", "plain"])
def test_trainers_count_the_loss_once_under_accumulation(trainer, tmp_path):
    options = {"resample": "step", "add_loss": trainer == "plain"}
    kind = Trainer if trainer == "plain" else _MixinTrainer
    steps = []
    for accumulation in (1, 4):
        model = patched_model(options=options, kl_loss_weight=0.1)
        steps.append(_train(model, tmp_path, kind, accumulation))
    model = patched_model(options={"resample": "step"}, kl_loss_weight=0.1)
    rows = _rows()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    (model(**batch).loss + bayeslora.monteclora_loss(model)).backward()
    expected = gradients(model)
    for name, change in steps[0].items():
        torch.testing.assert_close(change, -0.1 * expected[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(steps[1][name], change, rtol=1e-3, atol=1e-6)


def test_peft_counts_the_loss_once_a_micro_batch(tmp_path):
    """The defect: with the KL dominant, four micro-batches move the priors four times as far."""
    moved = []
    for accumulation in (1, 4):
        steps = _train(
            peft_model(kl_loss_weight=0.1, use_entropy=False), tmp_path, _MixinTrainer, accumulation
        )
        moved.append(torch.cat([s for n, s in steps.items() if "expert_weights_prior" in n]).norm())
    assert moved[1] / moved[0] > 3.5


def test_an_adapter_that_is_not_active_adds_no_loss_and_draws_nothing():
    model = patched_model(options={"add_loss": True})
    plain = patched_model()
    for m in (model, plain):
        m.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
        m(**BATCH)
    drawn = bank_of(model).parts[0].counter.item()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**BATCH).loss, plain(**BATCH).loss)
    for m in (model, plain):
        m.set_adapter("plain")
    assert torch.equal(model(**BATCH).loss, plain(**BATCH).loss)
    assert bank_of(model).parts[0].counter.item() == drawn


def test_the_loss_is_added_once_to_the_models_own():
    model, plain = patched_model(options={"add_loss": True}), patched_model()
    loss = model(**BATCH).loss
    expected = plain(**BATCH).loss
    torch.testing.assert_close(loss, expected + bayeslora.monteclora_loss(plain))
    assert bayeslora.monteclora_loss(model) == 0.0 == model.base_model._get_monteclora_loss()
