"""Layers that read one tensor become one node of a compiled graph, and compute what they did apart."""

import copy
import gc
import operator
import shutil
import weakref

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora
from bayeslora import lora_graph_pass, lora_ops, patch, patching

GROUPED = (
    torch.ops.bayeslora.lora_linear_group.default,
    torch.ops.bayeslora.lora_linear_group_backward.default,
)
CAST = torch.ops.bayeslora.cast_adapters.default
SINGLE = (torch.ops.bayeslora.lora_linear.default, torch.ops.bayeslora.lora_linear_backward.default)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _llama(device, dtype=torch.float64, layers=2, **lora):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
        )
    ).to(device, dtype)
    lora = {"r": 3, "target_modules": "all-linear", **lora}
    model = patch(get_peft_model(base, LoraConfig(**lora), autocast_adapter_dtype=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def _tokens(device):
    return torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)


def _results(model, call, tokens):
    model.zero_grad()
    logits = call(input_ids=tokens, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


class Counted:
    """A compiler that runs the pass, and counts the nodes before and after."""

    def __init__(self, passes=True):
        self.passes, self.nodes, self.ready, self.sources = passes, [], [], []
        self.backend = aot_autograd(
            fw_compiler=self.compile, partition_fn=min_cut_rematerialization_partition
        )

    def compile(self, graph_module, _inputs):
        if self.passes:
            lora_graph_pass.LoraGroupPass()(graph_module.graph)
            graph_module.recompile()
        targets = [node.target for node in graph_module.graph.nodes]
        self.nodes.append({target: targets.count(target) for target in (*SINGLE, *GROUPED, CAST)})
        self.sources += [len(n.args[0]) for n in graph_module.graph.nodes if n.target is CAST]
        layers = (node for node in graph_module.graph.nodes if node.target in (*SINGLE, *GROUPED))
        self.ready.append(sum(node.args[-1] is not None for node in layers))
        return make_boxed_func(graph_module.forward)


@pytest.fixture
def one_node_a_layer(monkeypatch):
    """Compiled layers are operators at any size; small ones would be torch's own operators."""
    monkeypatch.setattr("bayeslora.patching.chain_serves", lambda *_: False)


@pytest.mark.parametrize("how", ["one dtype", "fp32 adapters", "checkpointed"])
def test_groups_of_a_model_compute_what_their_layers_do(how, device, one_node_a_layer):
    layers, passes = (1, 2) if how == "checkpointed" else (2, 1)  # a backward then makes the forward again
    model = _llama(device, layers=layers)
    for name, parameter in model.named_parameters():
        if "lora_" in name and how == "fp32 adapters":
            parameter.data = parameter.data.float()
    if how == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    tokens, counted = _tokens(device), Counted()
    expected = _results(model, torch.compile(model, backend=Counted(passes=False).backend), tokens)
    torch._dynamo.reset()
    found = _results(model, torch.compile(model, backend=counted.backend), tokens)
    nodes = {kind: sum(graph[kind] for graph in counted.nodes) for kind in (*SINGLE, *GROUPED)}
    forward, backward = ([nodes[kind] for kind in kinds] for kinds in zip(SINGLE, GROUPED, strict=True))
    assert forward == [2 * layers * passes] * 2  # o and down; q, k and v, gate and up
    assert backward == [2 * layers] * 2
    assert sum(graph[CAST] for graph in counted.nodes) == (2 if how == "fp32 adapters" else 0)
    assert sum(counted.ready) == (sum(forward + backward) if how == "fp32 adapters" else 0)
    assert len(found) == len(expected) == 1 + 14 * layers
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        tolerance = 1e-5 if how == "fp32 adapters" else 1e-11
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-3 * tolerance)


def test_a_graph_without_gradients_is_grouped_too(device, one_node_a_layer):
    model, counted, tokens = _llama(device).eval(), Counted(), _tokens(device)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        found = torch.compile(model, backend=counted.backend)(input_ids=tokens).logits
    assert counted.nodes[0][GROUPED[0]] == 4
    torch.testing.assert_close(found, expected)


def test_layers_with_dropout_stay_apart_and_share_the_cast(device, one_node_a_layer):
    model, counted = _llama(device, lora_dropout=0.3), Counted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    results = []
    for each in (Counted(passes=False), counted):
        torch._dynamo.reset()
        torch.manual_seed(5)
        results.append(_results(model, torch.compile(model, backend=each.backend), _tokens(device)))
    assert [sum(nodes[kind] for kind in GROUPED) for nodes in counted.nodes] == [0, 0]
    assert [nodes[CAST] for nodes in counted.nodes] == [1, 1]
    assert counted.ready == [14, 14]
    for got, want in zip(*reversed(results), strict=True):
        assert torch.equal(got, want)


def _scaled_adapter(x, weights):
    """An A that the graph computes: its layer casts for itself, whichever it is."""
    first, second = ((w, None, a, b) for w, a, b in weights[:2])
    y = lora_ops.compiled_lora_linear(x, first, 2.0, 0.0, None, torch.float32)
    computed = (*second[:2], second[2] * 2, second[3])
    return y * lora_ops.compiled_lora_linear(y @ first[0], computed, 2.0, 0.0, None, torch.float32)


def test_a_backward_that_makes_its_forward_again_casts_each_adapter_once(device):
    """The forward's layer and the backward's are in one graph then."""
    weights = [(w.float().detach(), a, b) for w, a, b in _weights(2, device)]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    tensors, results = [x, *(t for set_ in weights for t in set_[1:])], []

    def layer(x, set_):
        return lora_ops.compiled_lora_linear(
            x, (set_[0], None, *set_[1:]), 2.0, 0.0, None, torch.float32
        ).sin()

    def function(x, weights):
        for set_ in weights:
            x = torch.utils.checkpoint.checkpoint(layer, x, set_, use_reentrant=False) @ weights[0][0]
        return x

    for passes in (False, True):
        torch._dynamo.reset()
        counted = Counted(passes)
        out = torch.compile(function, backend=counted.backend, fullgraph=True)(x, weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    forward, backward = counted.nodes
    assert (forward[SINGLE[0]], backward[SINGLE[0]], backward[SINGLE[1]]) == (2, 2, 2)
    assert counted.sources == [4, 4]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_adapters_that_are_no_inputs_are_left_to_their_layer(device):
    weights = _weights(2, device)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(4)).to(device)
    weights = [(w.float().detach(), a, b) for w, a, b in weights]
    tensors, results = [t for set_ in weights for t in set_[1:]], []
    for passes in (False, True):
        torch._dynamo.reset()
        counted = Counted(passes)
        out = torch.compile(_scaled_adapter, backend=counted.backend, fullgraph=True)(x, weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert counted.nodes[0][CAST] == 1
    assert counted.nodes[0][SINGLE[0]] == 2
    assert counted.ready[0] == 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def _weights(count, device):
    draw = torch.Generator().manual_seed(3)
    shapes = (6, 5), (2, 5), (6, 2)
    sets = [
        [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes] for _ in range(count)
    ]
    return [tuple(tensor.to(device).requires_grad_(i > 0) for i, tensor in enumerate(set_)) for set_ in sets]


def _call(x, weights):
    return lora_ops.compiled_lora_linear(x, (weights[0], None, *weights[1:]), 2.0, 0.0, None, x.dtype)


def _product_of_two(x, weights):
    first = _call(x, weights[0]).sin()
    return first * _call(x, weights[1])


def _two_of_three(x, weights):
    """The third layer's gradient of x comes between the two's: theirs have no sum of their own."""
    return _call(x, weights[0]) + _call(x * 2, weights[2]) * _call(x, weights[1])


def _far_apart(x, weights):
    """Two and two of one input, with three between that read others."""
    first = _call(x, weights[0]) + _call(x, weights[1])
    for i in range(3):
        first = first + _call(x * (first.mean() + i), weights[2])
    return first + _call(x, weights[3]).sin() + _call(x, weights[4]).cos()


def _two_dtypes(x, weights):
    """As where autocast is on for one of them."""
    narrow = (weights[1][0], None, *weights[1][1:])
    return _call(x, weights[0]) + lora_ops.compiled_lora_linear(x, narrow, 2.0, 0.0, None, torch.float32)


def _frozen_adapter(x, weights):
    return _product_of_two(x, weights)


@pytest.mark.parametrize(
    ("function", "forwards", "backwards"),
    [
        (_product_of_two, 1, 1),
        (_two_of_three, 1, 1),
        (_far_apart, 2, 2),
        (_two_dtypes, 0, 0),
        (_frozen_adapter, 1, 0),
    ],
)
def test_what_can_be_joined_and_what_not(function, forwards, backwards, device):
    weights = _weights(5, device)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(device)
    x.requires_grad_()
    if function is _frozen_adapter:
        weights[1][1].requires_grad_(False)
    tensors = [t for t in (x, *(t for set_ in weights for t in set_[1:])) if t.requires_grad]
    results, counts = [], []
    for passes in (False, True):
        torch._dynamo.reset()
        counted = Counted(passes)
        out = torch.compile(function, backend=counted.backend, fullgraph=True)(x, weights)
        gradients = torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)
        results.append([out, *(g for g in gradients if g is not None)])
        counts.append([nodes[kind] for nodes, kind in zip(counted.nodes, GROUPED, strict=True)])
    assert counts == [[0, 0], [forwards, backwards]]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def _graph_of(build):
    graph = torch.fx.Graph()
    names = ["x", "dy", "w", "a", "b", "h"]
    values = {name: graph.placeholder(name) for name in names}
    values["dy"].meta["val"] = torch.empty(1)
    build(graph, values)
    return graph


def test_a_gradient_that_waits_for_anothers_is_not_joined_with_it():
    def build(graph, values):
        first = graph.call_function(SINGLE[1], _arguments(values, values["dy"]))
        first.meta["val"] = (torch.empty(1),) * 3
        dx = graph.call_function(operator.getitem, (first, 0))
        dx.meta["val"] = torch.empty(1)
        second = graph.call_function(SINGLE[1], _arguments(values, dx))
        second.meta["val"] = (torch.empty(1),) * 3
        graph.output(graph.call_function(operator.getitem, (second, 0)))

    graph = _graph_of(build)
    assert lora_graph_pass.group_layers(graph) == 0


@pytest.mark.parametrize("how", ["alone", "with others", "read twice", "of another dtype"])
def test_only_gradients_that_are_added_and_read_nowhere_else_become_one(how):
    add = torch.ops.aten.add.Tensor

    def build(graph, values):
        def call(target, *arguments, like=None):
            node = graph.call_function(target, arguments)
            node.meta["val"] = torch.empty(1, dtype=like)
            return node

        parts = []
        for _ in range(3):
            node = graph.call_function(SINGLE[1], _arguments(values, values["dy"]))
            node.meta["val"] = (torch.empty(1),) * 3
            parts.append(call(operator.getitem, node, 0))
        total = call(add, parts[2], parts[0])
        if how in ("with others", "of another dtype"):
            wide = torch.float64 if how == "of another dtype" else None
            values["x"].meta["val"] = torch.empty(1, dtype=wide)
            total = call(add, total, values["x"], like=wide)
            total = call(add, call(add, parts[1], values["dy"], like=None), total, like=wide)
        else:
            total = call(add, parts[1], total)
        graph.output((total, parts[0]) if how == "read twice" else (total,))

    graph = _graph_of(build)
    assert lora_graph_pass.group_layers(graph) == (how in ("alone", "with others"))
    adds = [node for node in graph.nodes if node.target is add]
    assert len(adds) == {"alone": 0, "with others": 2, "read twice": 2, "of another dtype": 4}[how]
    if how == "with others":
        leaves = {arg for node in adds for arg in node.args} - set(adds)
        (dx,) = (leaf for leaf in leaves if leaf.op != "placeholder")
        assert {leaf.name for leaf in leaves - {dx}} == {"x", "dy"}
        assert (dx.args[0].target, dx.args[1]) == (GROUPED[1], 0)


def _arguments(values, dy):
    return (dy, *(values[name] for name in ("x", "w", "a", "b", "h")), 2.0, 0.0, None, True, True, True, None)


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
def test_the_registered_operators_keep_their_promises(needs_x, adapter_dtype, device):
    draw = torch.Generator().manual_seed(5)

    def tensor(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=draw).to(device, dtype)

    x, sizes, ranks = tensor(2, 3, 10), (6, 4), (3, 2)
    weights, biases = [tensor(10, n).t() for n in sizes], [tensor(6), None]
    lora_as = [tensor(r, 10, dtype=adapter_dtype) for r in ranks]
    lora_bs = [tensor(n, r, dtype=adapter_dtype) for n, r in zip(sizes, ranks, strict=True)]
    arguments = (x, weights, biases, lora_as, lora_bs, 1.7, torch.float32, None)
    torch.library.opcheck(lora_ops._lora_linear_group, arguments, rtol=1e-5, atol=1e-6)
    hidden = lora_ops._lora_linear_group(*arguments)[2].split(ranks, 1)
    dys = [tensor(2, 3, n) for n in sizes]
    results = []
    for columns in (hidden, [column.contiguous() for column in hidden]):
        arguments = (dys, x, weights, lora_as, lora_bs, columns, 1.7, needs_x, None)
        torch.library.opcheck(lora_ops._lora_linear_group_backward, arguments, rtol=1e-5, atol=1e-6)
        results.append(lora_ops._lora_linear_group_backward(*arguments))
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_adapters_of_a_graph_are_cast_and_stacked(dtype, device):
    draw = torch.Generator().manual_seed(6)
    sources = [
        torch.randn(rows, columns, generator=draw).to(device) for rows, columns in ((2, 5), (3, 5), (4, 2))
    ]
    torch.library.opcheck(lora_ops._cast_adapters, (sources, [2, 1], dtype))
    stacked, single = lora_ops._cast_adapters(sources, [2, 1], dtype)
    assert torch.equal(stacked, torch.cat(sources[:2]).to(dtype))
    assert torch.equal(single, sources[2].to(dtype))


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_in_order_are_joined_where_they_lie(dim):
    whole = torch.arange(24.0).view(4, 6)
    parts = whole.split((1, 2, 1) if dim == 0 else (1, 3, 2), dim)
    joined = lora_ops._joined(parts, dim)
    assert joined.data_ptr() == whole.data_ptr()
    assert torch.equal(joined, whole)
    for others in (parts[::-1], parts[:2] + parts[:1], [part.clone() for part in parts], parts[::2]):
        copied = lora_ops._joined(others, dim)
        assert copied.is_contiguous()
        assert copied.data_ptr() not in [part.data_ptr() for part in others]
        assert torch.equal(copied, torch.cat(list(others), dim))


def test_patch_takes_inductors_place_for_the_pass_unless_it_is_taken(device):
    with config.patch(post_grad_custom_pre_pass=None):
        _llama(device)
        installed = config.post_grad_custom_pre_pass
        assert isinstance(installed, lora_graph_pass.LoraGroupPass)
        assert installed.uuid() == copy.deepcopy(installed).uuid()
    with config.patch(post_grad_custom_pre_pass=len):
        _llama(device)
        assert config.post_grad_custom_pre_pass is len


def test_a_torch_without_a_place_for_the_pass_is_patched_all_the_same(device, monkeypatch):
    def absent():
        raise AttributeError("post_grad_custom_pre_pass does not exist")

    monkeypatch.setattr(lora_graph_pass, "install", absent)
    model = _llama(device)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is patching.FusedLoraLinear


def test_the_last_unpatch_gives_inductors_place_back(device, monkeypatch):
    monkeypatch.setattr(patching, "_fused_layers", weakref.WeakSet())
    with config.patch(post_grad_custom_pre_pass=None):
        first, second, third = (_llama(device) for _ in range(3))
        twin = copy.deepcopy(first)
        del second  # collected: as good as unpatched
        gc.collect()
        for model in (first, third):
            bayeslora.unpatch(model)
            assert config.post_grad_custom_pre_pass is lora_graph_pass._PASS
        bayeslora.unpatch(twin)
        assert config.post_grad_custom_pre_pass is None
        bayeslora.patch(first)
        assert config.post_grad_custom_pre_pass is lora_graph_pass._PASS
        config.post_grad_custom_pre_pass = len
        bayeslora.unpatch(first)
        assert config.post_grad_custom_pre_pass is len


@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="needs a C++ compiler"
)
def test_inductor_runs_the_pass(device, one_node_a_layer, monkeypatch):
    made, copied = [], []
    group, join = lora_graph_pass.group_layers, lora_ops._joined
    monkeypatch.setattr(lora_graph_pass, "group_layers", lambda graph: made.append(group(graph)))

    def joined(parts, dim):
        whole = join(parts, dim)
        copied.append(whole.data_ptr() != parts[0].data_ptr())
        return whole

    monkeypatch.setattr(lora_ops, "_joined", joined)
    model = _llama(device, torch.float32)
    block = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for call in (block, torch.compile(block, fullgraph=True)):
        model.zero_grad()
        with config.patch(force_disable_caches=True):  # a graph from the cache has been gone over already
            y = call(x.requires_grad_())
            y.square().sum().backward()
        results.append([y, *(p.grad for p in block.parameters() if p.grad is not None)])
    assert made == [1, 1]  # forward and backward
    assert copied == [False, False]  # h and dA
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
