"""Layers that read one input are computed together, and only where each alone would give the same."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

import bayeslora
from bayeslora import lora_chain, lora_group
from bayeslora.kernels import lora_linear_twin as twin
from bayeslora.lora_group import find_groups
from bayeslora.lora_linear import apply_layers
from bayeslora.lora_passes import LoraWeights
from bayeslora.patching import FusedLoraLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, the same terms added in another order
# torch says so of the first product in autograd's own thread, whoever asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def _no_chain(monkeypatch):
    """Calls as small as these would take the chain of ``lora_chain.py`` on a GPU, layer by layer."""
    monkeypatch.setattr(lora_chain, "_EAGER_DEVICES", frozenset())


def _plain(block, x):
    return block.q_proj(x), block.k_proj(x), block.v_proj(x)


class Block(nn.Module):
    """Three layers of different widths, called as ``body`` does."""

    def __init__(self):
        super().__init__()
        for name, width in zip(NAMES, (12, 6, 9), strict=True):
            self.add_module(name, nn.Linear(10, width, bias=name == "k_proj"))
        self.body = _plain

    def forward(self, *inputs):
        return self.body(self, *inputs)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, *inputs):
        return self.block(*inputs)


def _pair(device, body=_plain, **config):
    """A patched model and its unpatched twin."""
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 6, "target_modules": list(NAMES), **config}
    model = get_peft_model(Model(), LoraConfig(**config)).to(device)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    _block(model).body = body
    return bayeslora.patch(copy.deepcopy(model)), model


def _block(model):
    return model.base_model.model.block


def _x(device, seed=1):
    return torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(seed)).to(device)


def _results(model, *inputs):
    """Outputs, and gradients in the inputs and the adapters (None where there is none)."""
    model.zero_grad()
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = model(*(leaf * 1 for leaf in leaves))
    sum(y.float().square().sum() for y in outputs if y is not None and y.requires_grad).backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    return [*outputs, *(leaf.grad for leaf in leaves), *gradients]


def _assert_alike(patched, plain, *inputs):
    for got, want in zip(_results(patched, *inputs), _results(plain, *inputs), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, **CLOSE)


def _nothing_is_parked(model):
    groups = [m.__dict__["_lora_group"][0] for m in model.modules() if "_lora_group" in m.__dict__]
    return bool(groups) and all(group._parked is None and group._scope is None for group in groups)


@pytest.fixture
def sizes(monkeypatch):
    """Grows by the number of layers that each grouped call computes."""
    seen: list[int] = []

    def spy(x, layers, *arguments):
        seen.append(len(layers))
        return apply_layers(x, layers, *arguments)

    monkeypatch.setattr(lora_group, "apply_layers", spy)
    return seen


@pytest.mark.parametrize("config", [{}, {"target_modules": ["q_proj", "v_proj"]}], ids=["qkv", "qv"])
def test_one_call_gives_every_result(config, device, sizes):
    patched, plain = _pair(device, **config)
    _assert_alike(patched, plain, _x(device))
    assert sizes == [len(config.get("target_modules", NAMES))]
    assert _nothing_is_parked(patched)
    with torch.no_grad():
        for got, want in zip(patched(_x(device)), plain(_x(device)), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
    assert len(sizes) == 2


def _last_first(block, x):
    v = block.v_proj(x)
    return block.q_proj(x), block.k_proj(x), v


def test_the_order_of_the_calls_changes_no_bit(device, sizes):
    patched, _ = _pair(device)
    want = _results(patched, _x(device))
    _block(patched).body = _last_first
    for got, expected in zip(_results(patched, _x(device)), want, strict=True):
        assert torch.equal(got, expected)
    assert sizes == [3, 3]


def _two_inputs(block, x, z):
    return block.q_proj(x), block.k_proj(z), block.v_proj(z)


def _copy_of_the_input(block, x):
    return block.q_proj(x), block.k_proj(x.clone()), block.v_proj(x.view_as(x))


def _input_changed_in_place(block, x):
    x = x.clone()
    with torch.no_grad():
        q = block.q_proj(x)
        x.mul_(2)
        k = block.k_proj(x)
    return q, k, block.v_proj(x)


def _called_twice(block, x):
    return block.q_proj(x) + block.q_proj(x), block.k_proj(x) * block.k_proj(x), block.v_proj(x)


def _without_gradients(block, x):
    q = block.q_proj(x)
    with torch.no_grad():
        k = block.k_proj(x)
    return q, k, block.v_proj(x)


def _in_inference_mode(block, x):
    with torch.inference_mode():
        z = x.clone()
        inferred = [layer(z) for layer in (block.q_proj, block.k_proj)]
    return *(y.clone() for y in inferred), block.v_proj(x)


def _output_changed_in_place(block, x):
    q = block.q_proj(x)
    q *= 2
    return q, block.k_proj(x).add_(1), block.v_proj(x)


def _frozen_halfway(block, x):
    q = block.q_proj(x)
    block.k_proj.lora_A["default"].weight.requires_grad_(False)
    k, v = block.k_proj(x), block.v_proj(x)
    return q, k.detach(), v


def _part_unused(block, x):
    block.k_proj(x)
    return block.q_proj(x), block.v_proj(x)


def _part_never_called(block, x):
    return (block.v_proj(x),)


def _recomputed_parts(use_reentrant):
    def body(block, x):
        q = checkpoint(block.q_proj, x, use_reentrant=use_reentrant)
        k = block.k_proj(x)
        return q, k, checkpoint(block.v_proj, x, use_reentrant=use_reentrant)

    return body


def _nested(block, x):
    q = block.q_proj(x)
    body, block.body = block.body, _plain
    inner = block(x * 2)
    block.body = body
    return q + inner[0], block.k_proj(x) + inner[1], block.v_proj(x) + inner[2]


BODIES = {
    function.__name__: function
    for function in (
        _copy_of_the_input,
        _input_changed_in_place,
        _called_twice,
        _without_gradients,
        _in_inference_mode,
        _output_changed_in_place,
        _frozen_halfway,
        _part_unused,
        _part_never_called,
        _nested,
    )
} | {"reentrant": _recomputed_parts(True), "non-reentrant": _recomputed_parts(False)}


@pytest.mark.parametrize("body", BODIES)
def test_whatever_the_parent_does_the_results_are_pefts(body, device):
    patched, plain = _pair(device, BODIES[body])
    _assert_alike(patched, plain, _x(device))
    _assert_alike(patched, plain, _x(device, seed=2))
    assert _nothing_is_parked(patched)


def test_a_layer_with_another_input_computes_its_own(device):
    patched, plain = _pair(device, _two_inputs)
    _assert_alike(patched, plain, _x(device), _x(device, seed=2))


def _change_in_place(layer):
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3)


def _replace(layer):
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach() * 3)


def _change_base(layer):
    with torch.no_grad():
        layer.base_layer.weight.mul_(3)


def _rescale(layer):
    layer.scaling["default"] = 0.5


def _disable(layer):
    layer._disable_adapters = True


def _hook(layer):
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))


@pytest.mark.parametrize("change", [_change_in_place, _replace, _change_base, _rescale, _disable, _hook])
def test_a_change_between_the_calls_counts(change, device):
    def body(block, x):
        q = block.q_proj(x)
        change(block.k_proj)
        return q, block.k_proj(x), block.v_proj(x)

    patched, plain = _pair(device, body)
    with torch.no_grad():
        for got, want in zip(patched(_x(device)), plain(_x(device)), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("where", ["first", "second"])
def test_autocast_entered_halfway(where, device):
    def body(block, x):
        with torch.autocast(device.type, torch.bfloat16, enabled=where == "first"):
            q = block.q_proj(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=where == "second"):
            return q, block.k_proj(x), block.v_proj(x)

    patched, plain = _pair(device, body)
    for got, want in zip(patched(_x(device)), plain(_x(device)), strict=True):
        assert got.dtype == want.dtype
        # The LoRA term rounds in other places than PEFT's: a few ulps of bf16 of the largest partial sum.
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.3 if got.dtype == torch.bfloat16 else 1e-4)


HOOKS = {
    "pre": lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    "post": lambda layer: layer.register_forward_hook(lambda _m, _i, output: output * 2),
    "full backward": lambda layer: layer.register_full_backward_hook(lambda _m, g, _o: (g[0] * 2,)),
    "full backward pre": lambda layer: layer.register_full_backward_pre_hook(lambda _m, g: (g[0] * 2,)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_a_member_do_what_they_do(hook, name, device):
    patched, plain = _pair(device)
    for model in (patched, plain):
        HOOKS[hook](getattr(_block(model), name))
    _assert_alike(patched, plain, _x(device))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rank_pattern": {"k_proj": 7}, "alpha_pattern": {"k_proj": 14}}, [3]),
        ({"alpha_pattern": {"k_proj": 9}}, [2]),  # another scaling
    ],
)
def test_what_differs_between_members(config, expected, device, sizes):
    patched, plain = _pair(device, **config)
    _assert_alike(patched, plain, _x(device))
    assert sizes == expected


def test_a_member_without_the_active_adapter_is_left_out(device, sizes):
    patched, plain = _pair(device)
    for model in (patched, plain):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        model.set_adapter("other")
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "other" in name:
                nn.init.normal_(parameter)
    _assert_alike(patched, plain, _x(device))
    assert sizes == [2]


def test_a_frozen_member_gets_no_gradient(device):
    patched, plain = _pair(device)
    for model in (patched, plain):
        _block(model).k_proj.lora_A["default"].weight.requires_grad_(False)
        _block(model).v_proj.requires_grad_(False)
    _assert_alike(patched, plain, _x(device))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_a_is_frozen_and_the_input_is_data(dtype, dropout_p, device):
    """LoRA-FA's first layer: a backward of B alone, which reads no B."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    x, ranks, seed = draw(2, 5, 10), (3, 1, 4), torch.tensor(7, device=device)
    weights = [draw(n, 10).to(dtype) for n in (12, 6, 9)]
    lora_as = [draw(r, 10) for r in ranks]
    lora_bs = [draw(len(w), r).requires_grad_() for w, r in zip(weights, ranks, strict=True)]
    layers = [(w, None, a, b) for w, a, b in zip(weights, lora_as, lora_bs, strict=True)]
    dys = [draw(2, 5, len(w)).to(dtype) for w in weights]
    outputs = apply_layers(x.to(dtype), layers, 2.0, dropout_p, seed if dropout_p else None)
    found = torch.autograd.grad(outputs, lora_bs, dys)
    for layer, dy, got in zip(layers, dys, found, strict=True):
        (alone,) = apply_layers(x.to(dtype), [layer], 2.0, dropout_p, seed if dropout_p else None)
        torch.testing.assert_close(got, torch.autograd.grad(alone, layer[3], dy)[0], **CLOSE)


def test_unused_outputs_are_freed_when_the_call_ends(device, monkeypatch):
    kept = []

    def spy(*arguments):
        outputs = apply_layers(*arguments)
        kept.extend(weakref.ref(y) for y in outputs)
        return outputs

    monkeypatch.setattr(lora_group, "apply_layers", spy)
    patched, _ = _pair(device, _part_never_called)
    gc.disable()  # by reference counts alone
    try:
        (v,) = patched(_x(device))
        assert [y() is not None for y in kept] == [False, False, True]
        assert v is kept[2]()
    finally:
        gc.enable()


def _failing(block, x):
    block.q_proj(x)
    raise KeyError("body")


def test_an_exception_leaves_nothing_behind(device):
    patched, plain = _pair(device, _failing)
    with pytest.raises(KeyError, match="body"):
        patched(_x(device))
    assert _nothing_is_parked(patched)
    for model in (patched, plain):
        _block(model).body = _plain
    _assert_alike(patched, plain, _x(device))


def test_layers_called_from_elsewhere_are_not_grouped(device, sizes):
    patched, plain = _pair(device)
    x = _x(device)
    for name in NAMES:
        got, want = (getattr(_block(model), name)(x) for model in (patched, plain))
        torch.testing.assert_close(got, want, **CLOSE)
    for got, want in zip(_block(patched).forward(x), plain(x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    assert sizes == []


def test_two_threads_get_their_own_results(device):
    patched, plain = _pair(device)
    meet = threading.Barrier(2)

    def body(block, x):
        meet.wait()
        q = block.q_proj(x)
        meet.wait()
        return q, block.k_proj(x), block.v_proj(x)

    _block(patched).body = body
    results = {}

    def run(seed):
        with torch.no_grad():
            results[seed] = [patched(_x(device, seed)) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        want = plain(_x(device, seed))
        for outputs in results[seed]:
            for got, expected in zip(outputs, want, strict=True):
                torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("via", ["deepcopy", "pickle"])
def test_copies_are_grouped_and_share_nothing(via, device, sizes):
    patched, plain = _pair(device)
    clone = copy.deepcopy(patched) if via == "deepcopy" else pickle.loads(pickle.dumps(patched))
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.zero_()
    _assert_alike(clone, plain, _x(device))
    assert sizes == [3]
    assert not _results(patched, _x(device))[0].any()
    assert sizes == [3, 3]


def test_copying_in_the_middle_of_a_call(device):
    clones = []

    def body(block, x):
        q = block.q_proj(x)
        del block.body
        clones.append(copy.deepcopy(block))
        block.body = body
        return q, block.k_proj(x), block.v_proj(x)

    patched, plain = _pair(device, body)
    patched(_x(device))
    clones[0].body = _plain
    for got, want in zip(clones[0](_x(device)), _plain(_block(plain), _x(device)), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copy_of_one_layer_does_not_take_its_place(copier, device, sizes):
    patched, plain = _pair(device)
    lone = copier(_block(patched).q_proj)
    torch.testing.assert_close(lone(_x(device)), _block(plain).q_proj(_x(device)), **CLOSE)
    assert sizes == []
    _assert_alike(patched, plain, _x(device))
    assert sizes == [3]


def test_unpatch_takes_out_every_hook(device, sizes):
    patched, plain = _pair(device)
    bayeslora.patch(patched)
    assert len(_block(patched)._forward_hooks) == len(_block(patched)._forward_pre_hooks) == 1
    bayeslora.unpatch(patched)
    for module in patched.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called)
        assert "_lora_group" not in module.__dict__
    _assert_alike(patched, plain, _x(device))
    assert sizes == []


def test_a_model_whose_layers_are_gone_still_runs(device):
    patched, plain = _pair(device)
    merged = patched.merge_and_unload()
    for _ in range(2):
        for got, want in zip(merged(_x(device)), plain(_x(device)), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
        for module in merged.modules():  # the first call took out what was left
            assert not (module._forward_hooks or module._forward_pre_hooks)
            assert not module._forward_hooks_always_called


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_repeats_the_masks(use_reentrant, device, sizes):
    patched, _ = _pair(device, lora_dropout=0.4)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = patched

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=use_reentrant)

    torch.manual_seed(4)
    want = _results(patched, _x(device))
    torch.manual_seed(4)
    got = _results(Checkpointed(), _x(device))
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value, expected)
    assert sizes == [3] * 3
    assert _nothing_is_parked(patched)


def test_one_mask_for_a_group_and_a_fresh_one_for_each_call(device):
    patched, _ = _pair(device, lora_dropout=0.5)
    block = _block(patched)
    with torch.no_grad():  # v repeats q, so that both show their mask
        block.v_proj.base_layer.weight.copy_(block.q_proj.base_layer.weight[:9])
        block.v_proj.base_layer.bias = block.q_proj.base_layer.bias = None
        block.v_proj.lora_A["default"].weight.copy_(block.q_proj.lora_A["default"].weight)
        block.v_proj.lora_B["default"].weight.copy_(block.q_proj.lora_B["default"].weight[:9])
    q, _, v = patched(_x(device))
    torch.testing.assert_close(q[..., :9], v, **CLOSE)
    assert not torch.allclose(patched(_x(device))[0], q, **CLOSE)


@pytest.mark.parametrize("parts", [(0,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_second_derivatives(parts, device, sizes):
    """Also where the loss does not depend on every output of the call."""
    patched, plain = (model.double() for model in _pair(device))
    x = _x(device).double().requires_grad_()
    results = []
    for model in (patched, plain):
        outputs = model(x)
        adapters = [p for n, p in model.named_parameters() if "lora_" in n]
        loss = sum(outputs[part].square().sum() for part in parts)
        first = torch.autograd.grad(loss, [x, *adapters], create_graph=True, materialize_grads=True)
        norm = sum(gradient.square().sum() for gradient in first)
        results.append([*first, *torch.autograd.grad(norm, [x, *adapters], materialize_grads=True)])
    assert sizes == [3]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("retain_graph", [False, True])
def test_outputs_differentiated_in_separate_backward_passes(retain_graph, order, device, sizes):
    """Under PEFT each pass frees a graph of its own; here the outputs share one node."""
    results = []
    for model in _pair(device):
        x = _x(device).requires_grad_()
        outputs = model(x)
        for part in order:
            outputs[part].square().sum().backward(retain_graph=retain_graph)
        if retain_graph:
            outputs[order[0]].square().sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            outputs[order[0]].sum().backward()
        results.append([x.grad, *(p.grad for n, p in model.named_parameters() if "lora_" in n)])
    assert sizes == [3]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_change_in_place_between_two_backward_passes_is_an_error(device, sizes):
    patched, _ = _pair(device)
    q, k, _ = patched(_x(device).requires_grad_())
    q.sum().backward()
    with torch.no_grad():
        _block(patched).k_proj.lora_B["default"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="second time"):
        k.sum().backward()
    assert sizes == [3]


def test_what_is_kept_for_another_backward_pass_is_freed_with_the_last(device):
    patched, _ = _pair(device)
    outputs = patched(_x(device).requires_grad_())
    node = outputs[0].grad_fn
    outputs[1].sum().backward()
    assert node.kept is not None
    (outputs[0].sum() + outputs[2].sum()).backward()
    assert node.kept is None


def _layers(dtype, device, adapter_dtype, k=63):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, to=dtype):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device=device, dtype=to)

    sizes = ((100, 16), (1, 3), (63, 1))
    return [
        LoraWeights(
            draw(n, k),
            draw(n) if r == 3 else None,
            draw(r, k, to=adapter_dtype).requires_grad_(),
            draw(n, r, to=adapter_dtype).requires_grad_(),
        )
        for n, r in sizes
    ]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_as_accurate_as_the_twin_of_each_layer(dtype, adapter_dtype, dropout_p, device):
    layers = _layers(dtype, device, adapter_dtype)
    x = torch.randn(2, 51, 63, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    seed = torch.tensor(5, device=device)

    def results(to, function):
        leaf = x.detach().to(to or dtype).requires_grad_()
        copies = [
            LoraWeights(*(t if t is None else t.detach().to(to or t.dtype) for t in layer))
            for layer in layers
        ]
        adapters = [t.requires_grad_() for layer in copies for t in layer[2:]]
        ys = function(leaf, copies)
        loss = sum((y.double() * y.double().detach().sin()).sum() for y in ys)
        return [*ys, *torch.autograd.grad(loss, [leaf, *adapters])]

    def twins(leaf, copies):
        return [twin.lora_linear(leaf, *layer, 1.7, dropout_p, seed) for layer in copies]

    got = results(None, lambda leaf, copies: apply_layers(leaf, copies, 1.7, dropout_p, seed))
    for value, plain, truth in zip(got, results(None, twins), results(torch.float64, twins), strict=True):
        assert value.dtype == plain.dtype
        error, allowed = ((v.double() - truth).abs().max() / truth.abs().max() for v in (value, plain))
        # As in test_lora_linear: a maximum over few elements varies; one rounding where the twin is exact.
        assert error <= 3 * allowed + 2 * torch.finfo(dtype).eps


def _adapted(model, targets):
    return bayeslora.patch(get_peft_model(model, LoraConfig(r=2, target_modules=targets)))


def _group_names(model):
    names = {module: name for name, module in model.named_modules()}
    return [
        tuple(names[layer].rpartition(".")[2] for layer in layers)
        for _, layers in find_groups(model, FusedLoraLinear)
    ]


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def test_groups_are_found_by_name():
    llama = LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2, vocab_size=8))
    assert _group_names(_adapted(llama, "all-linear")) == [NAMES, ("gate_proj", "up_proj")]
    bert = BertModel(BertConfig(**TINY, vocab_size=8))
    assert _group_names(_adapted(bert, "all-linear")) == [("query", "key", "value")]
    t5 = T5Model(
        T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            vocab_size=8,
            feed_forward_proj="gated-gelu",
        )
    )
    self_attention, cross_attention, mlp = ("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1")
    assert _group_names(_adapted(t5, "all-linear")) == [
        self_attention,
        mlp,
        self_attention,
        cross_attention,
        mlp,
    ]


def test_cross_attention_computes_nothing_in_vain(device, sizes, monkeypatch):
    unused = []
    close = lora_group.LoraGroup.close

    def spy(self, *arguments):
        unused.extend(self._parked.outputs if self._parked else ())
        close(self, *arguments)

    monkeypatch.setattr(lora_group.LoraGroup, "close", spy)
    torch.manual_seed(0)
    t5 = T5Model(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=8)).to(device)
    tokens = torch.tensor([[1, 2, 3]], device=device)
    plain = get_peft_model(t5, LoraConfig(r=2, target_modules=["q", "k", "v"])).eval()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    patched = bayeslora.patch(copy.deepcopy(plain))
    got, want = (m(input_ids=tokens, decoder_input_ids=tokens).last_hidden_state for m in (patched, plain))
    torch.testing.assert_close(got, want, **CLOSE)
    assert sizes == [3, 3, 2]
    assert unused == []


@pytest.mark.gpu
def test_another_stream_computes_its_own(device, sizes):
    side = torch.cuda.Stream()

    def body(block, x):
        q = block.q_proj(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            k = block.k_proj(x)
        torch.cuda.current_stream().wait_stream(side)
        return q, k, block.v_proj(x)

    patched, plain = _pair(device, body)
    _assert_alike(patched, plain, _x(device))
    assert sizes[:2] == [3, 3]
