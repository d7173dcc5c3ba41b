"""Patched layers under what follows modules or operators: second derivatives, hooks, modes, tracers.

The truth is PEFT's own model, which all of these see through.
"""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad, functional
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import bayeslora
from bayeslora import lora_chain, patching

K = 6
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # fp64
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS", "ignore::DeprecationWarning")


class Attention(nn.Module):
    """Three layers that read one tensor and one that does not, with something between that is not linear."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(K, K, bias=name == "k_proj"))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj((q * k).tanh() + v)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


@pytest.fixture(autouse=True)
def _no_chain(monkeypatch):
    """Calls as small as these would take the chain of ``lora_chain.py`` on a GPU, layer by layer."""
    monkeypatch.setattr(lora_chain, "_EAGER_DEVICES", frozenset())


def _pair(device, **config):
    """A patched model and its unpatched twin, fp64."""
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": r".*_proj", "init_lora_weights": False, **config}
    model = get_peft_model(Model(), LoraConfig(**config)).to(device, torch.float64)
    return bayeslora.patch(copy.deepcopy(model)), model


def _x(device):
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _assert_alike(got, want, **tolerance):
    assert len(got) == len(want) > 0
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, **(tolerance or CLOSE))


@pytest.fixture
def fused_calls(monkeypatch):
    """Grows by 1 at each call of a layer that the fused function computes."""
    calls = []
    apply_layers = patching.apply_layers

    def spy(x, layers, *arguments):
        calls.extend(layers)
        return apply_layers(x, layers, *arguments)

    monkeypatch.setattr(patching, "apply_layers", spy)
    monkeypatch.setattr("bayeslora.lora_group.apply_layers", spy)
    return calls


DERIVATIVES = {
    "hessian": functional.hessian,
    "hessian, vectorized": lambda f, x: functional.hessian(f, x, vectorize=True),
    "hvp": lambda f, x: functional.hvp(f, x, x.sin())[1],
    "vhp": lambda f, x: functional.vhp(f, x, x.sin())[1],
    "jvp": lambda f, x: functional.jvp(f, x, x.sin())[1],
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_in_the_input(derivative, device, fused_calls):
    x = _x(device)
    results = [DERIVATIVES[derivative](lambda x, m=m: m(x).square().sum(), x) for m in _pair(device)]
    _assert_alike(results[:1], results[1:])
    assert results[0].abs().max() > 0.1
    assert fused_calls


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "lora_A", "lora_B"])
def test_derivatives_in_the_adapters(frozen, checkpointed, device):
    """Of a norm of the gradients, in the input and the adapters: every mixed derivative counts."""
    results = []
    for model in _pair(device):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and frozen not in name)
        x = _x(device).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        leaves = [x, *_trained(model)]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*(g.detach() for g in first), *second])
    _assert_alike(*results)


def test_a_gradient_with_a_graph_is_that_without(device):
    """Also in half precision under autocast, and with dropout: the same mask."""
    patched, _ = _pair(device, lora_dropout=0.3)
    patched.float().train()
    x = _x(device).float().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = patched(x).float().square().sum()
    leaves = [x, *_trained(patched)]
    with_graph = torch.autograd.grad(loss, leaves, create_graph=True)
    want = torch.autograd.grad(loss, leaves)
    for got, expected in zip(with_graph, want, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        scale = expected.abs().max()
        # sums of a few bf16 roundings (2^-8 each), in another order
        torch.testing.assert_close(got / scale, expected / scale, rtol=0.0, atol=2.0**-5)


def test_forward_mode_derivatives(device, fused_calls):
    tangents = []
    for model in _pair(device):
        x = _x(device)
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.sin()))).tangent)
    _assert_alike(tangents[:1], tangents[1:])
    assert not fused_calls


HOOKS = {
    "forward": (modules.register_module_forward_hook, lambda seen, m, _x, y: seen.append(type(m)) or 2 * y),
    "forward_pre": (
        modules.register_module_forward_pre_hook,
        lambda seen, m, x: seen.append(type(m)) or (2 * x[0],),
    ),
    "backward": (
        modules.register_module_full_backward_hook,
        lambda seen, m, dx, _dy: seen.append(type(m)) or tuple(2 * d for d in dx),
    ),
    "backward_pre": (
        modules.register_module_full_backward_pre_hook,
        lambda seen, m, dy: seen.append(type(m)) or (2 * dy[0],),
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_all_modules_see_and_change_the_layers_parts(kind, device, fused_calls):
    register, hook = HOOKS[kind]
    results, counts = [], []
    for model in _pair(device):
        seen = []

        def on_linear(m, *arguments, seen=seen):
            return hook(seen, m, *arguments) if type(m) is nn.Linear else None

        handle = register(on_linear)
        try:
            x = _x(device).requires_grad_()
            model(x).square().sum().backward()
        finally:
            handle.remove()
        counts.append(len(seen))
        results.append([x.grad, *(p.grad for p in _trained(model))])
    assert counts == [12, 12]
    assert not fused_calls
    _assert_alike(*results)


def test_hooks_on_all_modules_see_the_parts_of_a_layer_that_was_compiled_before(device):
    layer, seen = _pair(device)[0].base_model.model.attention.o_proj, []
    compiled = torch.compile(layer, backend="eager")
    compiled(_x(device))
    handle = modules.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        compiled(_x(device))
    finally:
        handle.remove()
        torch.compiler.reset()
    assert seen.count(nn.Linear) == 3


@pytest.mark.parametrize("what", ["step", "backward"])
def test_counted_operations_are_pefts(what, device):
    counts = []
    for model in _pair(device):
        x, counter = _x(device).requires_grad_(), FlopCounterMode(display=False)
        if what == "step":
            with counter:
                model(x).sum().backward()
        else:
            loss = model(x).sum()
            with counter:
                loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def _keep_all(_context, _operator, *_arguments, **_keywords):
    return CheckpointPolicy.MUST_SAVE


def _keep_products(_context, operator, *_arguments, **_keywords):
    kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("policy", "dropout_p"), [(_keep_all, 0.0), (_keep_products, 0.4)])
def test_selective_checkpointing(policy, dropout_p, device, fused_calls):
    contexts = partial(create_selective_checkpoint_contexts, policy)
    results = []
    for model in _pair(device, lora_dropout=dropout_p):
        torch.manual_seed(3)
        x = _x(device).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in _trained(model))])
    _assert_alike(*results)
    assert not fused_calls


def test_traced_models_run_without_the_library(device):
    patched, plain = _pair(device)
    x = _x(device)
    for traced in (torch.jit.trace(patched, x), make_fx(patched)(x)):
        assert "bayeslora" not in str(traced.graph)
        torch.testing.assert_close(traced(2 * x), plain(2 * x), **CLOSE)


class CountLinears(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is nn.functional.linear
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_pefts_functions(device, fused_calls):
    counts = []
    for model in _pair(device):
        with CountLinears() as mode:
            model(_x(device))
        counts.append(mode.count)
    assert counts == [12, 12]
    assert not fused_calls


def test_a_default_device_changes_nothing(device, fused_calls):
    patched, _ = _pair(device)
    x = _x(device)
    with torch.device(device):
        patched(x)
    assert len(fused_calls) == 4


class Wrapped(torch.Tensor):
    """A tensor whose operators are its own, as DTensor's are: it has no memory that a kernel could read."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside):
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, dtype=inside.dtype, device=inside.device, requires_grad=inside.requires_grad
        )
        wrapped.inside = inside
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        assert "out" not in (kwargs or {})
        unwrap = partial(torch.utils._pytree.tree_map_only, Wrapped, lambda t: t.inside)
        result = operator(*unwrap(args), **unwrap(kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapped, result)


def test_a_tensor_with_operators_of_its_own_takes_pefts_forward(device, fused_calls):
    patched, plain = _pair(device)
    with torch.no_grad():
        got = patched(Wrapped(_x(device)))
        assert type(got) is Wrapped
        torch.testing.assert_close(got.inside, plain(_x(device)), **CLOSE)
    assert not fused_calls
