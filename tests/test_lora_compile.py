"""The patched layer under ``torch.compile`` without a graph break, and a whole step as a CUDA graph."""

import copy
import shutil
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import bayeslora
from bayeslora import lora_ops, lora_passes
from bayeslora.lora_group import remove_groups

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, the same terms added in another order
VOCABULARY = 64
# torch says so of the first product in autograd's own thread, whoever asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _adapted(model, targets, device, **config):
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": targets, **config}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return bayeslora.patch(model.to(device))


def _llama(device, **config):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _adapted(
        LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=VOCABULARY)),
        "all-linear",
        device,
        **config,
    )


def _gpt2(device, **config):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return _adapted(model, ["c_attn", "c_proj", "c_fc"], device, fan_in_fan_out=True, **config)


def _tokens(device, length=7):
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1)).to(device)


def _results(model, call, tokens):
    """Logits, and the adapters' gradients, with the masks of one seed."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = call(input_ids=tokens, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _assert_alike(got, want, **tolerance):
    assert len(got) == len(want) > 2
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, **(tolerance or CLOSE))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_second_derivatives_are_right_or_refused(dropout_p, backend, device, monkeypatch):
    """A backend that leaves the backward to torch gets them; AOTAutograd, inductor's too, has none."""
    monkeypatch.setattr("bayeslora.patching.chain_serves", lambda *_: False)
    model = _adapted(nn.Sequential(nn.Linear(6, 5)), ["0"], device, lora_dropout=dropout_p).double()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)

    def hessian(call):
        torch.manual_seed(3)
        return torch.autograd.functional.hessian(lambda x: call(x).square().sum(), x)

    compiled = torch.compile(model, backend=backend)
    if backend == "eager":
        torch.testing.assert_close(hessian(compiled), hessian(model))
    else:
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            hessian(compiled)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("build", [_llama, _gpt2])
def test_a_model_compiles_into_one_graph(build, dropout_p, device):
    """Compiled layers are not grouped: each draws its own mask, as an eager model without groups does."""
    model = build(device, lora_dropout=dropout_p).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = _results(model, compiled, _tokens(device))
    assert len(graphs) == 1
    remove_groups(model)
    _assert_alike(got, _results(model, model, _tokens(device)))


def test_several_shapes_compile_into_one_more_graph(device):
    model = _llama(device)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch in (2, 3, 4, 5):
        x = torch.randn(batch, 6, 32, device=device)
        torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    assert counter.frame_count == 2  # static, then dynamic


def test_a_change_of_the_weights_between_compiled_calls_counts(device):
    model = _llama(device)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 32, device=device)
    before = compiled(x)
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)


def test_autocast_compiles(device):
    model = _llama(device)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 32, device=device)
    results = []
    for call in (layer, compiled):
        layer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert results[1][0].dtype == torch.bfloat16
    _assert_alike(results[1], results[0], rtol=0.0, atol=0.0)


@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="needs a C++ compiler"
)
def test_a_layer_compiles_with_inductor(device):
    model = _llama(device)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 6, 32, device=device, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        y = call(torch.nn.functional.silu(x))
        (y * 2).square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    _assert_alike(results[1], results[0])


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, True), (True, False, False)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
def test_the_registered_operators_keep_their_promises(needed, dropout_p, adapter_dtype, device):
    def draw(*shape, needs=False, dtype=torch.float32):
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(needs)

    arguments = (
        draw(2, 3, 10, needs=needed[0]),
        draw(10, 6).t(),
        draw(6),
        draw(4, 10, needs=needed[1], dtype=adapter_dtype),
        draw(6, 4, needs=needed[2], dtype=adapter_dtype),
        1.7,
        dropout_p,
        torch.tensor(5, device=device) if dropout_p else None,
        torch.float32,
        None,
    )
    # fp64 gradients of fp32 products; a gradient that opcheck expands takes other products than a dense one
    torch.library.opcheck(lora_ops._lora_linear, arguments, rtol=1e-5, atol=1e-6)


def test_the_operators_say_that_they_follow_torch_compiles_rules(device):
    """Some users let it take no others: ``only_allow_pt2_compliant_ops``."""
    layer = [torch.randn(shape, device=device) for shape in ((6, 5), (6,), (2, 5), (6, 2))]

    def call(x):
        return lora_ops.compiled_lora_linear(x, tuple(layer), 2.0, 0.0, None, x.dtype)

    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        assert compiled(torch.randn(3, 5, device=device)).shape == (3, 6)


def test_second_derivatives_of_a_compiled_layer_are_an_error(device):
    layer = _llama(device).base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32, device=device, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad|create_graph"):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_a_model_compiles_with_inductor_on_a_gpu(dropout_p, device):
    model = _llama(device, lora_dropout=dropout_p).train()
    tokens = _tokens(device)
    got = _results(model, torch.compile(model, fullgraph=True), tokens)
    remove_groups(model)
    want = _results(model, model, tokens)
    if dropout_p == 0.0:  # Inductor draws other numbers than eager
        _assert_alike(got, want, rtol=1e-3, atol=1e-4)
    else:
        assert all(value.isfinite().all() for value in got)
        assert not torch.allclose(got[0], want[0], **CLOSE)


@pytest.mark.gpu
def test_a_compiled_model_runs_in_inductors_graphs(device):
    """mode="reduce-overhead": what the operators launch is captured, and replayed with other weights."""
    model = _llama(device)
    eager, compiled = copy.deepcopy(model), torch.compile(model, mode="reduce-overhead")
    tokens = _tokens(device)
    for step in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        got = [value.clone() for value in _results(model, compiled, tokens)]
        _assert_alike(got, _results(eager, eager, tokens), rtol=1e-3, atol=1e-4)
        tokens = (tokens * 5 + 3 + step) % VOCABULARY
        with torch.no_grad():
            for p, q in zip(model.parameters(), eager.parameters(), strict=True):
                if p.requires_grad:
                    p.mul_(1.2)
                    q.copy_(p)


def _captured(model, tokens):
    """A graph of forward and backward, and what it writes: the logits and the gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model.zero_grad()
            model(input_ids=tokens, use_cache=False).logits.float().square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(input_ids=tokens, use_cache=False).logits
        logits.float().square().mean().backward()
    return graph, [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_replays_with_new_inputs_and_weights(dtype, device):
    model = _llama(device)
    for name, p in model.named_parameters():
        if "lora_" not in name:  # with bf16: adapters in fp32, cast within the graph
            p.data = p.data.to(dtype)
    eager = copy.deepcopy(model)
    tokens = _tokens(device)
    graph, static = _captured(model, tokens)
    for step in range(3):
        tokens.copy_((tokens * 5 + 3 + step) % VOCABULARY)
        with torch.no_grad():
            for p, q in zip(model.parameters(), eager.parameters(), strict=True):
                if p.requires_grad:
                    p.mul_(1.5)
                    q.copy_(p)
        graph.replay()
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-2}
        _assert_alike(static, _results(eager, eager, tokens), **tolerance)


@pytest.mark.gpu
def test_a_replayed_step_draws_fresh_masks(device):
    model = _llama(device, lora_dropout=0.4).train()
    tokens = _tokens(device)  # the graph reads it
    graph, static = _captured(model, tokens)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([value.clone() for value in static])
    for first, second in pairwise(replays):
        assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_captured_step_with_dropout_has_the_gradients_of_its_own_masks(device):
    """A short step along a replay's gradient, under the same masks, lowers the loss by its squared norm."""
    model = _llama(device, lora_dropout=0.4).train()
    tokens = _tokens(device)  # the graph reads it
    graph, static = _captured(model, tokens)
    parameters = [p for p in model.parameters() if p.grad is not None]

    def replay():
        torch.cuda.manual_seed(7)
        graph.replay()
        return static[0].double().square().mean().item()

    loss = replay()
    gradients = [g.clone() for g in static[1:]]
    squared_norm = sum(g.double().square().sum().item() for g in gradients)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p.sub_(0.01 * loss / squared_norm * g)
    # The second order of a change by 1% is about 1% of it; another mask would change the loss by far more.
    assert abs((loss - replay()) / (0.01 * loss) - 1) < 0.1


def test_the_operators_backward_is_where_the_kernels_routes_are(device, monkeypatch):
    calls = []
    straight = lora_passes.all_gradients
    monkeypatch.setattr(lora_passes, "all_gradients", lambda *a: (calls.append(1), straight(*a))[1])
    layer = [torch.randn(shape, device=device) for shape in ((20, 12), (20,), (3, 12), (20, 3))]
    x = torch.randn(6, 12, device=device, requires_grad=True)
    for adapter in layer[2:]:
        adapter.requires_grad_()
    lora_ops.compiled_lora_linear(x, tuple(layer), 2.0, 0.0, None, torch.float32).sum().backward()
    assert calls
    with torch.no_grad():
        dy = torch.ones(6, 20, device=device)
        torch.testing.assert_close(x.grad, dy @ layer[0] + 2.0 * dy @ layer[3] @ layer[2])
