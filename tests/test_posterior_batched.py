"""Several posterior samples in one pass: predict and generate equal one pass a sample, sample for sample."""

import copy
import inspect
import logging
import re
import threading

import pytest
import torch
import torch._dynamo.testing
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from bayeslora import IVON, Posterior, patch, unpatch
from bayeslora.kernels.lora_perturbed_twin import Perturbation
from bayeslora.lora_samples import OPEN, LayerSamples, NotBatched
from bayeslora.posterior_batched import SampledLayers

PROMPT = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(0))
SEEDS = [7, 2**64 - 3, 11]


def _llama_config():
    return LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )


def _base(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(_llama_config()), "all-linear"
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=50,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
        return GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=4.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), ["q", "v", "wi", "wo"]


def _posterior(base, targets, task="CAUSAL_LM", ess=20.0, **settings):
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=targets, task_type=task, lora_dropout=0.1, **settings)
    model = patch(get_peft_model(base, config))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=ess, hess_init=1.0)
    posterior = Posterior.from_optimizer(model, opt)
    for g in posterior.parameters.values():  # a Hessian of its own for every element
        g.hess.uniform_(0.3, 3.0)
    return posterior


def _of_kind(kind):
    base, targets = _base(kind)
    return _posterior(base, targets, "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM")


@pytest.fixture(scope="module")
def llama():
    return _of_kind("llama")


def _state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _unchanged(model, before):
    held = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return held and not OPEN.any and not OPEN.by_thread


def _lines(caplog):
    """Return what was logged, but that the posteriors here are of untrained optimizers."""
    lines = [record.message for record in caplog.records if record.name == "bayeslora"]
    return [line for line in lines if "no step was taken" not in line]


def _in_turn(posterior, run):
    results = []
    posterior.model.eval()
    for seed in SEEDS:
        with posterior.sample(seed), torch.no_grad():
            results.append(run())
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_predict_is_one_pass_a_sample(kind, caplog):
    posterior = _of_kind(kind)
    model = posterior.model
    before = _state(model)
    batch = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    expected = _in_turn(posterior, lambda: model(**batch).logits.softmax(-1))
    assert (expected[0] - expected[1]).abs().max() > 0.05  # samples that differ, or the test sees nothing
    rows = []
    model.register_forward_hook(lambda *call: rows.append(len(call[-1].logits)))
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.predict(batch, seeds=SEEDS, batched=True, average=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    averaged = posterior.predict(batch, seeds=SEEDS, batched=True)
    assert rows == [1, 4, 6, 6] and not _lines(caplog)  # the probe's two passes, once, and a pass each
    torch.testing.assert_close(averaged, expected.mean(0), rtol=1e-4, atol=1e-5)
    assert _unchanged(model, before)


@pytest.mark.parametrize("length", [6, 4], ids=["length = rows", "length != rows"])
def test_a_model_that_puts_the_sequence_first_is_run_a_sample_at_a_time(length, caplog):
    """XLNet reads ``(length, batch, K)``: cut along the length, samples would mix without an error."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48, initializer_range=0.3)
    posterior = _posterior(XLNetLMHeadModel(config), ["layer_1", "layer_2"])
    tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    expected = _in_turn(posterior, lambda: posterior.model(input_ids=tokens).logits.softmax(-1))
    assert (expected[0] - expected[1]).abs().max() > 0.02
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.predict({"input_ids": tokens}, seeds=SEEDS, batched=True, average=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(_lines(caplog)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sequences_as_long_as_there_are_rows_share_a_pass(dtype, caplog):
    llama = _of_kind("llama")
    llama.model.to(dtype)
    tokens = torch.randint(50, (2, 2 * len(SEEDS)), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = llama.predict(tokens, seeds=SEEDS, batched=True, average=False)
    assert not _lines(caplog)
    expected = _in_turn(llama, lambda: llama.model(input_ids=tokens).logits.float().softmax(-1))
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=tolerance)


class _Patches(nn.Module):
    """Reads all images' patches in one tensor and says where each image begins, as Qwen2-VL does."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 5)

    def forward(self, pixel_values, counts):
        assert pixel_values.shape[0] == int(counts.sum()), "the patches are not the images'"
        parts = self.proj(pixel_values).split(counts.tolist())
        return torch.stack([part.mean(0) for part in parts])


def test_a_tensor_that_is_not_a_row_a_sequence_makes_samples_take_turns(caplog):
    posterior = _posterior(_Patches(), ["proj"], task=None)
    draw = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(7, 8, generator=draw), "counts": torch.tensor([3, 4])}
    expected = _in_turn(posterior, lambda: posterior.model(**batch).softmax(-1))
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.predict(batch, seeds=SEEDS, batched=True, average=False)
    torch.testing.assert_close(found, expected)
    assert "samples run one after another" in _lines(caplog)[0]


class _OneImage(nn.Module):
    """Reads an image for the prompts that name it, as vision-language models do."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 5)

    def forward(self, prompts, image):
        named = prompts[..., 0] > 0
        seen = torch.zeros(*prompts.shape[:2], 5)
        seen[named] = self.proj(image)[: int(named.sum())].expand(int(named.sum()), -1)
        return self.proj(prompts) + 3 * seen


def test_an_image_among_several_prompts_is_not_for_all(caplog):
    posterior = _posterior(_OneImage(), ["proj"], task=None)
    prompts = -torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))
    prompts[1, 2, 0] = 1.0
    batch = {"prompts": prompts, "image": torch.ones(1, 8)}
    expected = _in_turn(posterior, lambda: posterior.model(**batch).softmax(-1))
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.predict(batch, seeds=SEEDS, batched=True, average=False)
    torch.testing.assert_close(found, expected)
    assert "image has shape (1, 8) for 2 sequences" in _lines(caplog)[0]


def _cached(model, tokens):
    """Return the cache of a prefix, and the name that this transformers has for it."""
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    names = inspect.signature(model.get_base_model().forward).parameters
    return ("cache" if "cache" in names else "past_key_values"), cache


@pytest.mark.parametrize("batched", [True, False])
def test_every_sample_finds_the_cache_of_the_caller(llama, batched):
    name, cache = _cached(llama.model.eval(), PROMPT[:, :3])

    def own():
        return llama.model(input_ids=PROMPT[:, 3:], **{name: copy.deepcopy(cache)}).logits.softmax(-1)

    expected = _in_turn(llama, own)
    batch = {"input_ids": PROMPT[:, 3:], name: cache}
    found = llama.predict(batch, seeds=SEEDS, average=False, batched=batched)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert cache.get_seq_length() == 3


def test_generation_goes_on_from_a_copy_of_the_callers_cache(llama):
    name, cache = _cached(llama.model.eval(), PROMPT[:, :3])
    settings = {"max_new_tokens": 4, "do_sample": False}

    def own():
        return llama.model.generate(input_ids=PROMPT, **{name: copy.deepcopy(cache)}, **settings)

    expected = _in_turn(llama, own)
    found = llama.generate(PROMPT, seeds=SEEDS, **{name: cache}, **settings)
    assert torch.equal(found[:, :, 0], expected) and cache.get_seq_length() == 3


def test_what_a_sample_cannot_get_a_copy_of_is_refused(llama):
    with pytest.raises(TypeError, match="each sample needs a copy of marker, a lock"):
        llama.predict({"input_ids": PROMPT, "marker": threading.Lock()}, 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate_is_one_generate_a_sample(kind, how, caplog):
    posterior = _of_kind(kind)
    model = posterior.model
    before = _state(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    k = how.get("num_return_sequences", 1)

    def padded():
        tokens = model.generate(input_ids=PROMPT, **settings).view(2, k, -1)
        return nn.functional.pad(tokens, (0, 14 - tokens.shape[-1]))

    expected = _in_turn(posterior, padded)
    assert not torch.equal(expected[0], expected[1])
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.generate(PROMPT, seeds=SEEDS, **settings)
    assert found.shape[:3] == (3, 2, k) and not _lines(caplog)
    assert torch.equal(nn.functional.pad(found, (0, 14 - found.shape[-1])), expected)
    assert _unchanged(model, before)


def test_the_sequential_route_and_chunks_give_the_same(llama):
    batch = {"input_ids": PROMPT}
    whole = llama.generate(batch, 3, max_new_tokens=6, do_sample=False)
    for how in ({"batched": False}, {"max_batch": 2}, {"max_batch": 5}):
        assert torch.equal(llama.generate(batch, 3, max_new_tokens=6, do_sample=False, **how), whole)
    expected = llama.predict(batch, 3, batched=False, average=False)
    for most in (1, 4, None):
        found = llama.predict(batch, 3, batched=True, average=False, max_batch=most)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_settings_for_the_prompts_of_one_sample_run_in_turn(llama, caplog):
    allowed = [[3, 4, 5], [6, 7, 8]]
    prompts = {
        "prefix_allowed_tokens_fn": (PROMPT, lambda prompt, ids: allowed[prompt]),
        "prompt_lookup_num_tokens": (PROMPT[:1], 2),
    }
    for name, (prompt, value) in prompts.items():
        settings = {"max_new_tokens": 3, "do_sample": False, name: value}
        with caplog.at_level(logging.INFO, "bayeslora"):
            found = llama.generate(prompt, seeds=SEEDS, **settings)
        assert f"samples run one after another: {name}" in caplog.text
        expected = _in_turn(llama, lambda p=prompt, s=settings: llama.model.generate(input_ids=p, **s))
        assert torch.equal(found[:, :, 0], expected)


def test_a_configuration_that_asks_for_a_dict_gives_the_tokens(llama):
    expected = llama.generate(PROMPT, 2, max_new_tokens=3)
    config = copy.deepcopy(llama.model.generation_config)
    config.update(return_dict_in_generate=True, output_scores=True, max_new_tokens=3)
    for batched in (True, False):
        assert torch.equal(llama.generate(PROMPT, 2, generation_config=config, batched=batched), expected)


def test_the_configuration_says_how_many_sequences(llama):
    config = GenerationConfig(num_beams=3, num_return_sequences=2, max_new_tokens=3, pad_token_id=0)
    expected = _in_turn(llama, lambda: llama.model.generate(input_ids=PROMPT, generation_config=config))
    for batched in (True, False):
        found = llama.generate(PROMPT, seeds=SEEDS, generation_config=config, batched=batched)
        assert torch.equal(found.flatten(1, 2), expected)
    assert llama.generate(PROMPT, 2, num_return_sequences=3, generation_config=config).shape[2] == 3


def test_the_last_position_of_a_model_is_enough_for_one_token(caplog):
    posterior = _of_kind("gpt2")
    length = posterior.model.config.max_position_embeddings
    prompt = torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.generate(prompt, 2, max_new_tokens=1)
    assert not _lines(caplog)
    assert torch.equal(found, posterior.generate(prompt, 2, max_new_tokens=1, batched=False))


def test_shorter_answers_end_in_the_models_padding_under_another_configuration(llama):
    prompt = torch.randint(3, 50, (1, 5), generator=torch.Generator().manual_seed(1))
    llama.model.generation_config.pad_token_id = 0
    first, *others = llama.generate(prompt, 8, max_new_tokens=6, do_sample=False)[:, 0, 0, 5].tolist()
    assert set(others) - {first}  # one answer ends at once, another goes on
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=first)
    found = llama.generate(prompt, 8, generation_config=config, batched=False)
    assert found[0, 0, 0, 6:].eq(0).all() and found.shape[-1] > 6
    assert torch.equal(found, llama.generate(prompt, 8, generation_config=config))


def test_seeds_may_be_an_array_and_a_batch_empty(llama):
    expected = llama.predict(PROMPT, 3, average=False)
    for seeds in (torch.arange(3), torch.arange(3).numpy()):
        assert torch.equal(llama.predict(PROMPT, seeds=seeds, average=False), expected)
    for batched in (True, False):
        with pytest.raises(RuntimeError, match="0 elements"):  # the model's own
            llama.predict(PROMPT[:0], 3, batched=batched)


def test_sampled_tokens_come_from_every_sample(llama):
    torch.manual_seed(0)
    found = llama.generate(PROMPT, 4, num_return_sequences=3, max_new_tokens=6, do_sample=True)
    assert found.shape[:3] == (4, 2, 3)
    assert torch.equal(found[..., :5], PROMPT[None, :, None].expand(4, 2, 3, 5))
    assert len({tuple(row.tolist()) for row in found[:, 0].flatten(0, 1)}) > 6


def test_memory_that_runs_out_halves_the_chunk(llama, caplog):
    model, rows = llama.model, []
    before = _state(model)

    def refuse(_module, _args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        expected = llama.predict({"input_ids": PROMPT}, 5, average=False)
        llama.predict({"input_ids": PROMPT}, 1, batched=True)
        rows.clear()
        with caplog.at_level(logging.INFO, "bayeslora"):
            found = llama.predict({"input_ids": PROMPT}, 5, batched=True, average=False)
    finally:
        handle.remove()
    assert rows == [10, 6, 4, 4, 2]
    assert _lines(caplog) == [
        "out of memory with 5 samples at once; going on with 3",
        "out of memory with 3 samples at once; going on with 2",
    ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert _unchanged(model, before)


def test_out_of_memory_with_one_sample_is_raised(llama):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = _state(llama.model)
    handle = llama.model.register_forward_pre_hook(refuse)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            llama.predict({"input_ids": PROMPT}, 2, batched=True)
    finally:
        handle.remove()
    assert _unchanged(llama.model, before)


def test_an_interrupted_generation_leaves_the_mean(llama):
    class Stop(Exception):
        pass

    def interrupt(*_):
        raise Stop

    before = _state(llama.model)
    llama.model.train()
    for batched in (True, False):
        with pytest.raises(Stop):
            llama.generate(PROMPT, 2, max_new_tokens=4, stopping_criteria=[interrupt], batched=batched)
        assert _unchanged(llama.model, before)
    assert llama.model.training
    llama.model.eval()


def _head():
    config = _llama_config()
    config.num_labels = 3
    torch.manual_seed(0)
    return _posterior(LlamaForSequenceClassification(config), ["q_proj", "v_proj"], "SEQ_CLS")


def _unpatched():
    posterior = _of_kind("llama")
    unpatch(posterior.model)
    return posterior


def _bf16_adapters():
    posterior = _of_kind("llama")
    for g in posterior.parameters.values():
        g.parameter.data = g.parameter.data.bfloat16()
    return posterior


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_head, "score.*is not lora_A or lora_B"),
        (_unpatched, "is not lora_A or lora_B"),
        (_bf16_adapters, "bfloat16 adapters"),
        (lambda: _posterior(*_base("llama"), use_dora=True), "is not lora_A|DoRA"),
    ],
    ids=["head", "unpatched", "bf16", "dora"],
)
def test_what_cannot_share_a_pass_runs_in_turn_and_says_so(make, reason, caplog):
    posterior = make()
    before = _state(posterior.model)
    expected = posterior.predict({"input_ids": PROMPT}, seeds=SEEDS, average=False)
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.predict({"input_ids": PROMPT}, seeds=SEEDS, batched=True, average=False)
    assert torch.equal(found, expected)
    (line,) = _lines(caplog)
    assert re.match(f"samples run one after another: .*({reason})", line)
    assert _unchanged(posterior.model, before)


def test_an_adapter_switched_within_the_pass_is_not_sampled():
    posterior = _of_kind("llama")
    model = posterior.model
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad(), SampledLayers(posterior).active(SEEDS, 1.0):
        model(input_ids=PROMPT[:1].expand(len(SEEDS), -1))
        model.set_adapter("other")
        with pytest.raises(NotBatched, match="does not serve"):
            model(input_ids=PROMPT[:1].expand(len(SEEDS), -1))


def test_only_some_matrices_perturbed_and_pruned_ones():
    base, targets = _base("llama")
    posterior = _posterior(base, targets)
    for name in list(posterior.parameters):
        if "q_proj.lora_A" in name or "up_proj" in name:
            del posterior.parameters[name]
    posterior.prune(0.3)
    expected = posterior.predict({"input_ids": PROMPT}, seeds=SEEDS, average=False, variance_scale=0.5)
    for scale in ({"variance_scale": 0.5}, {"ess_scale": 2.0}):
        found = posterior.predict({"input_ids": PROMPT}, seeds=SEEDS, batched=True, average=False, **scale)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_many_samples_and_fp64():
    posterior = _of_kind("llama")
    posterior.model.double()
    for g in posterior.parameters.values():
        g.mean, g.hess = g.mean.double(), g.hess.double()
    batch = {"input_ids": PROMPT[:1, :1]}
    expected = posterior.predict(batch, 65, average=False)
    found = posterior.predict(batch, 65, average=False, batched=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_samples": 0}, "num_samples must be >= 1"),
        ({"num_samples": -2}, "num_samples must be >= 1"),
        ({"num_samples": 2, "seeds": [1, 2, 3]}, "seeds has 3 elements for num_samples=2"),
        ({"seeds": []}, "seeds has 0 elements"),
        ({"variance_scale": -1.0}, "variance_scale must be finite"),
        ({"variance_scale": float("nan")}, "variance_scale must be finite"),
        ({"ess_scale": 0.0}, "ess_scale must be > 0"),
        ({"ess_scale": 2.0, "variance_scale": 2.0}, "two names of one scale"),
        ({"max_batch": 0}, "max_batch must be >= 1"),
    ],
)
def test_bad_arguments(llama, arguments, match):
    before = _state(llama.model)
    for call in (llama.predict, llama.generate):
        with pytest.raises(ValueError, match=match):
            call({"input_ids": PROMPT}, **arguments)
    assert _unchanged(llama.model, before)


def test_bad_arguments_of_generate(llama):
    for arguments, match in (
        ({"num_samples": 2.0}, "num_samples must be an integer, got 2.0"),
        ({"num_samples": True}, "num_samples must be an integer, got True"),
        ({"max_batch": 2.5}, "max_batch must be an integer, got 2.5"),
        ({"seeds": 5}, r"seeds must be a sequence of integers, got 5; one alone: seeds=\[5\]"),
    ):
        with pytest.raises(TypeError, match=match):
            llama.generate(PROMPT, **arguments)
    with pytest.raises(TypeError, match="seeds must be integers"):
        llama.generate(PROMPT, seeds=[0.5])
    for seed in (0.5, "1", None, True):
        for call in (lambda s: llama.sample(s).__enter__(), lambda s: llama.predict(PROMPT, 1, seed=s)):
            with pytest.raises(TypeError, match="seed must be an integer"):
                call(seed)
    for inputs in ("text", [1, 2], PROMPT.tolist(), {}):
        with pytest.raises(TypeError, match="inputs hold no tensor; pass token ids"):
            llama.generate(inputs, 2)
    for inputs in (PROMPT[0], PROMPT[:0]):
        with pytest.raises(ValueError, match=r"pass \(batch, length\) with batch >= 1"):
            llama.generate(inputs, 2)
    with pytest.raises(ValueError, match="num_return_sequences must be >= 1"):
        llama.generate(PROMPT, 2, num_return_sequences=0)
    with pytest.raises(ValueError, match="return_dict_in_generate belongs to one sample"):
        llama.generate(PROMPT, 2, return_dict_in_generate=True)
    linear = nn.Linear(3, 3)
    posterior = IVON(linear.parameters(), lr=0.1, ess=10.0).posterior(linear)
    with pytest.raises(TypeError, match="Linear has no generate"):
        posterior.generate(PROMPT, 2)


def test_a_compiled_model_is_one_graph_and_takes_new_samples(llama):
    batch = {"input_ids": PROMPT}
    expected = [llama.predict(batch, seeds=seeds, average=False) for seeds in (SEEDS, [3, 4, 5])]
    llama.model.eval()
    with torch.no_grad():
        plain = llama.model.base_model.model(**batch).logits
    inner = llama.model.base_model.model
    counter = torch._dynamo.testing.CompileCounter()
    inner.forward = torch.compile(inner.forward, backend=counter, fullgraph=True)
    try:
        for seeds, wanted in zip((SEEDS, [3, 4, 5]), expected, strict=True):
            found = llama.predict(batch, seeds=seeds, average=False, batched=True)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(inner(**batch).logits, plain)
    finally:
        del inner.forward
        torch._dynamo.reset()
    assert counter.frame_count == 2  # with samples and without


@pytest.mark.parametrize(
    ("samples", "rows", "rank", "kept"),
    [
        (4, 1, 2, True),  # 4 samples of 2 x (64 + 64): a quarter of 64 x 64
        (4, 16, 2, True),
        (4, 17, 2, False),  # a prompt
        (5, 1, 2, False),  # more than a quarter
        (64, 1, 2, True),  # faster on the GPU too
        (64, 2, 2, False),
    ],
)
def test_samples_are_kept_where_they_are_few_and_their_rows_too(samples, rows, rank, kept):
    a, b = torch.zeros(rank, 64), torch.zeros(64, rank)
    index = torch.zeros(samples, dtype=torch.int64)
    layer = LayerSamples("default", a, b, Perturbation(a, b, index, index, 0, 1), torch.float32)
    assert layer._keeps(torch.zeros(samples, rows, 64), torch.zeros(64, 64)) == kept


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [3, 70])
def test_kernels_agree_with_one_pass_a_sample(samples):
    posterior = _of_kind("llama")
    model = posterior.model.cuda()
    batches = [{"input_ids": PROMPT.cuda()}, {"input_ids": PROMPT[:1, :1].cuda()}]
    truth = [posterior.predict(batch, samples, average=False) for batch in batches]
    for batch, wanted in zip(batches, truth, strict=True):
        found = posterior.predict(batch, samples, average=False, batched=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 8, "do_sample": False}
    in_turn = posterior.generate(PROMPT.cuda(), samples, batched=False, **settings)
    assert torch.equal(posterior.generate(PROMPT.cuda(), samples, **settings), in_turn)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16()
    for batch, wanted in zip(batches, truth, strict=True):
        in_turn, found = (posterior.predict(batch, samples, average=False, batched=b) for b in (False, True))
        own = (in_turn - wanted).square().mean().sqrt()  # bf16's error without us
        assert (found - wanted).square().mean().sqrt() < 1.5 * own + 1e-3
