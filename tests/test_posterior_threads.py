"""Several threads, or processes, predict with one model."""

import copy
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_lm import make_model

from bayeslora import IVON, Posterior, patch
from bayeslora.reversible import Inference

PROMPT = torch.randint(3, 20, (2, 4), generator=torch.Generator().manual_seed(0))
THREADS = 4


@pytest.fixture
def posterior():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = patch(get_peft_model(make_model(20), config))
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=20.0)
    return Posterior.from_optimizer(model, opt)


@pytest.fixture
def often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _in_threads(work):
    """Return what each thread's call of ``work`` with its number gives, or raises."""
    found = [None] * THREADS

    def call(i):
        try:
            found[i] = work(i)
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("batched", [False, True], ids=["in turn", "one pass"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_threads_get_the_answers_of_one(batched, training, posterior, often):
    model = posterior.model.train(training)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = [posterior.predict(PROMPT, 2, seed=10 * i, batched=batched) for i in range(THREADS)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    for _ in range(3):
        found = _in_threads(lambda i: posterior.predict(PROMPT, 2, seed=10 * i, batched=batched))
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(module.training == training for module in model.modules())


def test_posteriors_of_a_model_and_of_its_wrapper_take_turns(posterior, often):
    class Last(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens).logits

    other = Posterior(Last(posterior.model), posterior.parameters)
    expected = [posterior.predict(PROMPT, 2, seed=10 * i) for i in range(THREADS)]
    for _ in range(3):
        found = _in_threads(lambda i: (posterior, other)[i % 2].predict(PROMPT, 2, seed=10 * i))
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)


def test_a_pass_sees_nothing_of_a_sample_in_the_weights(posterior):
    expected = posterior.predict(PROMPT, 3, batched=True)
    with posterior.sample(9, variance_scale=5.0):
        found = _in_threads(lambda _: posterior.predict(PROMPT, 3, batched=True))
    for got in found:
        torch.testing.assert_close(got, expected)


def test_the_last_to_predict_puts_the_model_back_in_train_mode(posterior):
    model = posterior.model.train()
    first, second = Inference(model), Inference(model)
    first.__enter__()
    with second:
        first.__exit__()
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_parameters_that_processes_share_take_no_sample(posterior):
    expected = posterior.predict(PROMPT, 2)
    own = copy.deepcopy(posterior)
    posterior.model.share_memory()
    before = {n: p.detach().clone() for n, p in posterior.model.named_parameters()}
    with pytest.raises(ValueError, match=r"memory that other processes share.*copy.deepcopy\(posterior\)"):
        posterior.predict(PROMPT, 2)
    assert all(torch.equal(p, before[n]) for n, p in posterior.model.named_parameters())
    torch.testing.assert_close(posterior.predict(PROMPT, 2, batched=True), expected)
    for private in (own, copy.deepcopy(posterior)):
        assert torch.equal(private.predict(PROMPT, 2), expected)
