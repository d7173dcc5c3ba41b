"""Whose row is whose: models whose layers do not read the samples row by row are run a sample at a time."""

import logging
import threading

import pytest
import tiny_lm
import torch
import torch._dynamo.testing
from peft import LoraConfig, get_peft_model
from torch import nn

from bayeslora import IVON, Posterior, patch
from bayeslora.lora_samples import OPEN
from bayeslora.posterior_batched import SampledLayers

SEEDS = [3, 8, 2**63 + 1]


class _Model(nn.Module):
    """Layers "a" and "b", which get adapters, and a head."""

    def __init__(self, table=5):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(table, 16))


class TimeFirst(_Model):
    def forward(self, x):
        return self.c(torch.relu(self.b(self.a(x).transpose(0, 1))).mean(0))


class TimeFirstThroughout(_Model):
    def forward(self, x):
        return self.c(torch.relu(self.b(self.a(x.transpose(0, 1)))).mean(0))


class TimeMajorRows(_Model):
    def forward(self, x):
        rows = self.a(x.transpose(0, 1).reshape(-1, 8))
        return self.c(self.b(torch.relu(rows))).view(x.shape[1], -1, 3).transpose(0, 1)


class Classes(_Model):
    def forward(self, x):
        return self.a(x).mean(1) @ self.b(self.table).T


class Prompt(_Model):
    def forward(self, x):
        return self.c(self.a(x) + self.b(self.table[None]))[:, -1]


class Reversed(_Model):
    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x)).flip(0)).flip(0))


class Centred(_Model):
    def forward(self, x):
        x = self.a(x)
        return self.c(self.b(torch.relu(x - x.mean(0))))


class HalfAndHalf(_Model):
    def forward(self, x):
        late = torch.arange(len(x)) >= len(x) // 2
        return self.c(self.b(torch.relu(self.a(x)) + self.table[late.long()][:, None]))


class Experts(_Model):
    def forward(self, x):
        flat = self.a(x).flatten(0, 1)
        chosen = (flat @ self.table.T).argmax(-1)
        out = torch.zeros_like(flat)
        for expert, layer in enumerate((self.b, self.c)):
            out[chosen == expert, : layer.out_features] = layer(flat[chosen == expert])
        return out.view(*x.shape[:2], 16)


class Gathered(_Model):
    def forward(self, x):
        flat, chosen = self.a(x).flatten(0, 1), x[..., 0].flatten() > 0
        out = torch.zeros_like(flat)
        out[chosen] = self.b(flat[chosen])
        return self.c(out.view(*x.shape[:2], 16))


class SortedTokens(_Model):
    def forward(self, x):
        flat = self.a(x).flatten(0, 1)
        order = (flat @ self.table.T).argmax(-1).argsort(stable=True)
        out = torch.empty(len(flat), 3)
        out[order] = self.c(torch.relu(self.b(flat[order])))
        return out.view(*x.shape[:2], 3)


class Counting(_Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x):
        x = self.a(x)
        self.seen.add_(x.detach().mean((0, 1)))
        return self.c(self.b(x))


class RowMajorRows(_Model):
    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x.reshape(-1, 8))))).view(*x.shape[:2], 3)


class Windows(_Model):
    def forward(self, x):
        windows = self.b(torch.relu(self.a(x.reshape(-1, 2, 8))))
        return self.c(windows).view(*x.shape[:2], 3)


def _posterior(model, targets=("a", "b")):
    torch.manual_seed(1)
    model = patch(get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)))
    opt = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=20.0, hess_init=1.0)
    return Posterior.from_optimizer(model.eval(), opt)


def _inputs(*shape):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(0))


def _both(posterior, x, caplog):
    """Return the log lines of predictions in one pass, held against those of one sample at a time."""
    expected = posterior.predict(x, seeds=SEEDS, average=False)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # samples that differ, or the test sees nothing
    caplog.clear()
    with caplog.at_level(logging.INFO, "bayeslora"):
        found = posterior.predict(x, seeds=SEEDS, batched=True, average=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not OPEN.any
    return [record.message for record in caplog.records if record.name == "bayeslora"]


@pytest.mark.parametrize(
    ("kind", "table", "length"),
    [
        *[(TimeFirst, 5, length) for length in (4, 5, 6, 12)],  # the probe's rows, the samples', multiples
        *[(TimeFirstThroughout, 5, length) for length in (1, 4, 6)],
        *[(TimeMajorRows, 5, length) for length in (3, 4, 6)],
        *[(Classes, classes, 3) for classes in (3, 4, 6, 8, 24)],
        *[(Prompt, length, length) for length in (1, 4, 6)],
        (Reversed, 5, 3),
        (Centred, 5, 3),
        (HalfAndHalf, 2, 3),
        (Experts, 2, 6),
        (SortedTokens, 4, 6),
    ],
)
def test_a_model_that_does_not_keep_samples_in_rows_is_run_in_turn(kind, table, length, caplog):
    torch.manual_seed(0)
    model = kind(table)
    for p in model.parameters():
        p.data.normal_(std=0.5)
    (line,) = _both(_posterior(model), _inputs(2, length), caplog)
    assert line.startswith("samples run one after another: ")


@pytest.mark.parametrize("kind", [RowMajorRows, Windows])
def test_rows_flattened_in_order_share_a_pass(kind, caplog):
    assert not _both(_posterior(kind()), _inputs(2, 6), caplog)


@pytest.mark.parametrize("side", ["q_proj", "k_proj"])
def test_layers_that_only_attention_reads_share_a_pass(side, caplog):
    posterior = _posterior(tiny_lm.make_model(50), [side])
    assert not _both(posterior, torch.randint(3, 50, (2, 6)), caplog)


def test_one_probe_serves_batches_of_every_size(caplog):
    posterior, calls = _posterior(RowMajorRows()), []
    caplog.clear()
    posterior.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    for rows, length in ((2, 3), (1, 5), (4, 2)):
        with caplog.at_level(logging.INFO, "bayeslora"):
            posterior.predict(_inputs(rows, length), seeds=SEEDS, batched=True)
    assert calls == [1, 4, 6, 3, 12] and not caplog.records
    posterior.model.base_model.model.c = nn.Linear(16, 3)  # another model
    posterior.predict(_inputs(2, 3), seeds=SEEDS, batched=True)
    assert calls[5:] == [1, 4, 6]


def test_tokens_gathered_as_in_no_probe_make_samples_take_turns(caplog):
    """All tokens of the first batch are gathered, of the second some."""
    posterior, x = _posterior(Gathered()), _inputs(2, 6)
    x[..., 0] = 3.0
    assert not _both(posterior, x, caplog)
    x[0, :3, 0] = x[1, 2, 0] = -3.0
    assert "which samples cannot share" in _both(posterior, x, caplog)[0]


def test_a_model_that_keeps_statistics_is_run_in_turn_and_sees_no_probe(caplog):
    posterior = _posterior(Counting())
    assert "changes its buffers" in _both(posterior, _inputs(2, 3), caplog)[0]
    assert posterior.model.seen.isfinite().all()


def test_an_error_of_the_batch_is_the_models_own(caplog):
    posterior = _posterior(RowMajorRows())
    with pytest.raises(RuntimeError, match=r"shape '\[-1, 8\]' is invalid"):
        posterior.predict(_inputs(2, 3)[..., :7], seeds=SEEDS, batched=True)
    assert not _both(posterior, _inputs(2, 3), caplog)


# ---- generation ------------------------------------------------------------------------------------


def test_generation_of_a_model_with_a_time_first_block_is_run_in_turn(caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    posterior = _posterior(LlamaForCausalLM(config), ["q_proj", "up_proj"])
    prompt = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "seeds": SEEDS}
    block = posterior.model.base_model.model.model.layers[0].mlp
    forward = block.forward
    caplog.clear()
    with caplog.at_level(logging.INFO, "bayeslora"):
        expected = posterior.generate(prompt, batched=False, **settings)
        assert torch.equal(posterior.generate(prompt, **settings), expected) and not caplog.records
        block.forward = lambda x: forward(x.transpose(0, 1)).transpose(0, 1)
        assert torch.equal(posterior.generate(prompt, **settings), expected)
    assert caplog.messages[0].startswith("samples run one after another: ")


# ---- compiled models -------------------------------------------------------------------------------


@pytest.fixture
def counter():
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "turns"), [(TimeFirst, True), (Classes, True), (RowMajorRows, False)])
@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiled_models_are_probed_as_they_are_written(kind, turns, part, counter, caplog):
    model = kind(6)
    posterior = _posterior(model)
    if part == "model":
        model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    else:
        model.b.compile(backend=counter)
    lines = _both(posterior, _inputs(2, 6), caplog)
    assert bool(lines) == turns
    assert counter.frame_count == (1 if turns else 2)  # one graph in turn, one for all samples


def test_a_pass_in_one_thread_is_none_in_another(counter):
    posterior, x = _posterior(RowMajorRows()), _inputs(3, 4)
    model = posterior.model.base_model.model
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        plain = model(x)
        expected = posterior.predict(x, seeds=SEEDS, average=False)
    found = {}

    @torch.no_grad()
    def call():
        found["eager"], found["compiled"] = model(x), compiled(x)

    with torch.no_grad(), SampledLayers(posterior).active(SEEDS, 1.0):
        own = compiled(x.repeat(3, 1, 1)).view(3, 3, 4, 3).softmax(-1)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(found["eager"], plain, rtol=0, atol=0)
    torch.testing.assert_close(found["compiled"], plain)


@pytest.mark.gpu
def test_cuda_graphs_of_a_compiled_model_replay_no_earlier_samples():
    posterior, x = _posterior(RowMajorRows()), _inputs(2, 6).cuda()
    model = posterior.model.cuda().base_model.model
    model.forward = torch.compile(model.forward, mode="reduce-overhead")
    for first in range(4):
        found = posterior.predict(x, 3, seed=first, batched=True, average=False)
        torch.testing.assert_close(found, posterior.predict(x, 3, seed=first, average=False))
    torch._dynamo.reset()
