"""The chain of torch's operators: small calls of a patched layer that are compiled or without gradients."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import bayeslora
from bayeslora import lora_chain, lora_products, patching

K, R = 12, 3
BASES = {
    "linear": lambda: nn.Linear(K, 20),
    "without bias": lambda: nn.Linear(K, 20, bias=False),
    "Conv1D": lambda: Conv1D(20, K),
}
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")


@pytest.fixture
def chains(monkeypatch, device) -> list:
    """Lets the chain serve the tests' device too; grows by the rows of x at each eager call it serves."""
    rows: list[int] = []

    def spy(x, call):
        rows.append(x.numel() // K)
        return lora_chain.chain(x, call)

    monkeypatch.setattr(lora_chain, "_EAGER_DEVICES", frozenset({device.type}))
    monkeypatch.setattr(patching, "chain", spy)
    return rows


@pytest.fixture
def always(chains, monkeypatch) -> list:
    """Eager calls with gradients too: as torch.compile differentiates them, without its compiler."""
    monkeypatch.setattr(patching, "chain_serves", lambda *_: True)
    return chains


def _pair(device, base="linear", dtype=torch.float32, adapter_dtype=None, **config):
    """A patched one-layer model and its twin under PEFT's own forward."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layer = BASES[base]()
    plain = get_peft_model(
        model,
        LoraConfig(
            **{
                "r": R,
                "lora_alpha": 5,
                "target_modules": ["layer"],
                "fan_in_fan_out": base == "Conv1D",
                **config,
            }
        ),
    )
    plain.to(device, dtype)
    for name, p in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5)
            p.data = p.data.to(adapter_dtype or dtype)
    return bayeslora.patch(copy.deepcopy(plain)), plain


def _results(model, x, call=None):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (model if call is None else call)(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (2, 3, 2, K), (0, K), (2, 0, K)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_are_pefts(base, shape, device, always):
    patched, plain = _pair(device, base)
    x = torch.randn(shape, device=device)
    for got, want in zip(_results(patched, x), _results(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(patched(x), plain(x), rtol=1e-4, atol=1e-5)
    assert always == [x.numel() // K] * 2


def test_strides_do_not_matter(device, always):
    patched, plain = _pair(device)
    x = torch.randn(K, 4, 3, device=device).permute(2, 1, 0)
    for got, want in zip(_results(patched, x), _results(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert always


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_pefts(dtype, device, always):
    x = torch.randn(64, K, device=device).to(dtype)
    patched, plain = _pair(device, dtype=dtype)
    exact = copy.deepcopy(plain).double()
    truth = _results(exact, x.double())
    for got, peft, want in zip(_results(patched, x), _results(plain, x), truth, strict=True):
        error, allowed = ((value.double() - want).norm() for value in (got, peft))
        assert got.dtype == dtype
        assert error <= 2 * allowed  # sums of a few dozen numbers, in another order
    assert always


def test_the_output_may_be_changed_in_place_and_the_input_stays(device, always):
    patched, plain = _pair(device)
    x = torch.randn(5, K, device=device)
    before = x.clone()
    changed = (lambda x, m=m: m(x).mul_(2).add_(1) for m in (patched, plain))
    for got, want in zip(
        *(_results(m, x, c) for m, c in zip((patched, plain), changed, strict=True)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    assert always


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_bits(use_reentrant, device, always):
    patched, _ = _pair(device)
    x = torch.randn(5, K, device=device)
    want = _results(patched, x)
    got = _results(patched, x, lambda x: checkpoint(patched, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(always) == 3


def test_an_adapter_changed_before_backward_is_an_error(device, always):
    patched, _ = _pair(device)
    y = patched(torch.randn(5, K, device=device, requires_grad=True))
    with torch.no_grad():
        next(p for n, p in patched.named_parameters() if "lora_B" in n).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert always


def test_it_can_be_differentiated_twice(device, always):
    patched, plain = _pair(device)
    results = []
    for model in (patched, plain):
        x = torch.ones(2, K, device=device, requires_grad=True)
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert always


def test_without_gradients_adapters_are_cast(device, chains):
    patched, plain = _pair(device, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.randn(6, K, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(patched(x), plain(x), rtol=0.02, atol=0.05)
    with torch.inference_mode():
        assert patched(x).dtype == torch.bfloat16
    assert chains == [6, 6]


def test_autocast_casts_adapters_and_rounds_as_pefts_layers_do(device, always):
    patched, plain = _pair(device, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.randn(64, K, device=device, dtype=torch.bfloat16)
    truth = _results(copy.deepcopy(plain).double(), x.double())

    def autocast(model):
        with torch.autocast(device.type, torch.bfloat16):
            return _results(model, x)

    for got, peft, want in zip(autocast(patched), autocast(plain), truth, strict=True):
        assert got.dtype == peft.dtype
        error, allowed = ((value.double() - want).norm() for value in (got, peft))
        assert error <= 2 * allowed
    assert always == [64]


@pytest.mark.parametrize("case", ["gradients", "dropout", "autocast", "rows", "size"])
def test_other_calls_are_left_to_the_fused_function(case, device, chains, monkeypatch):
    config = {"lora_dropout": 0.5} if case == "dropout" else {}
    patched, _ = _pair(device, **config)
    if case == "rows":
        monkeypatch.setattr(lora_products, "_KERNEL_ROWS", 6)
    if case == "size":
        monkeypatch.setattr(lora_chain, "_MULTIPLICATIONS", 6 * 20 * K - 1)
    x = torch.randn(6, K, device=device)
    with (
        torch.set_grad_enabled(case == "gradients"),
        torch.autocast(device.type, torch.bfloat16, enabled=case == "autocast"),
    ):
        patched(x)
        assert not chains
        if case in ("rows", "size"):
            patched(x[:5])
            assert chains == [5]


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_calls_take_it_on_any_device_and_adapters_are_cast(adapter_dtype, device):
    patched, plain = _pair(device, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    x = torch.randn(6, K, device=device, dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    for got, want in zip(_results(patched, x, compiled), _results(plain, x), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02 * want.abs().max().item())
    assert "bayeslora" not in _operators(patched, x)


def test_large_calls_compile_into_the_fused_operator(device, monkeypatch):
    monkeypatch.setattr(lora_products, "_KERNEL_ROWS", 6)
    patched, _ = _pair(device)
    assert "bayeslora" in _operators(patched, torch.randn(6, K, device=device))
    assert "bayeslora" not in _operators(patched, torch.randn(5, K, device=device))


def _operators(model, x) -> str:
    """The names of the operators that a compiled forward of the model consists of."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x)
    return " ".join(str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.gpu
def test_a_graph_records_the_fused_function(device, chains):
    patched, plain = _pair(device)
    x = torch.randn(6, K, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        patched(x)
    assert len(chains) == 1
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = patched(x)
    graph.replay()
    assert len(chains) == 1
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
