"""The examples in docstrings run, and print what they say."""

import doctest
from importlib import import_module

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora

MODULES = ["bayeslora.ivon_prior", "bayeslora.mbr", "bayeslora.uncertainty"]
POSTERIOR = [
    "add_adapter", "generate", "merge", "predict", "product", "prune", "prune_sweep", "push_to_hub", "sample",
    "variance_sweep",
]  # fmt: skip
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_modules(name):
    found = doctest.testmod(import_module(name), optionflags=FLAGS)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.fixture(scope="module")
def names():
    """What the examples of `Posterior` speak of: a posterior, tokens, and questions with two answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = bayeslora.patch(get_peft_model(LlamaForCausalLM(config), lora)).eval()
    opt = bayeslora.IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=100.0)

    def questions(num_samples, variance_scale):
        probs = posterior.predict(tokens, max(num_samples, 1), variance_scale=variance_scale)[:, -1, :2]
        return probs / probs.sum(-1, keepdim=True), torch.tensor([0, 1])

    tokens, posterior = torch.randint(3, 50, (2, 5)), opt.posterior(model)
    found = {"bayeslora": bayeslora, "torch": torch, "posterior": posterior, "tokens": tokens}
    return {**found, "questions": questions}


@pytest.mark.parametrize("method", POSTERIOR)
def test_examples_of_posterior(method, names):
    text = getattr(bayeslora.Posterior, method).__doc__
    example = doctest.DocTestParser().get_doctest(text, dict(names), method, None, 0)
    assert example.examples
    assert doctest.DocTestRunner(optionflags=FLAGS).run(example).failed == 0
