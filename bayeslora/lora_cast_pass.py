"""Under inductor: the adapters of all layers are cast once a graph, not in every layer.

fp32 adapters under a bf16 base, PEFT's default, are cast at every call. An operator that does it for itself
launches a kernel for two to six small matrices, in both directions; `cast_once` goes over a graph that
``lora_graph_pass.py`` has grouped and has one node, before the first layer, cast all that are inputs of the
graph: as a rule all there are. What the graph keeps for it is a copy of the adapters in the base's dtype.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import lora_ops  # noqa: F401 - registers the operators

_OPS = torch.ops.bayeslora
_CAST = _OPS.cast_adapters.default
# Of each operator: where its A, B and dtype stand, the last the dtype itself or dy, which has it.
_PLACES = {
    _OPS.lora_linear.default: (3, 4, 8),
    _OPS.lora_linear_group.default: (3, 4, 6),
    _OPS.lora_linear_backward.default: (3, 4, 0),
    _OPS.lora_linear_group_backward.default: (3, 4, 0),
}


def cast_once(graph: fx.Graph) -> int:
    """Give layers their adapters in the dtype they compute in, in place; return for how many it was done."""
    layers: dict[tuple[torch.dtype, torch.device], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in _PLACES and node.args[-1] is None:
            dtype, (parts, *_) = _dtype(node), _matrices(node)
            if _gains(node, dtype):
                layers.setdefault((dtype, parts[0].meta["val"].device), []).append(node)
    for (dtype, _), nodes in layers.items():
        _cast(graph, nodes, dtype)
    if layers:
        graph.lint()
    return sum(map(len, layers.values()))


def _dtype(node: fx.Node) -> torch.dtype:
    at = node.args[_PLACES[node.target][2]]  # type: ignore[index]
    at = at[0] if isinstance(at, Sequence) else at
    return at.meta["val"].dtype if isinstance(at, fx.Node) else at  # type: ignore[return-value]


def _matrices(node: fx.Node) -> list[tuple[fx.Node, ...]]:
    """Return what a layer, or a group, wants in its dtype: its A, to be stacked, and each B."""
    at_a, at_b, _ = _PLACES[node.target]  # type: ignore[index]
    lora_a: Any = node.args[at_a]
    lora_b: Any = node.args[at_b]
    if isinstance(lora_a, fx.Node):
        return [(lora_a,), (lora_b,)]
    return [tuple(lora_a), *((part,) for part in lora_b)]


def _gains(node: fx.Node, dtype: torch.dtype) -> bool:
    """Tell whether a layer would cast, and its adapters are there before the graph starts."""
    adapters = [part for parts in _matrices(node) for part in parts]
    inputs = all(part.op == "placeholder" for part in adapters)
    return inputs and any(part.meta["val"].dtype != dtype for part in adapters)


def _cast(graph: fx.Graph, nodes: Sequence[fx.Node], dtype: torch.dtype) -> None:
    # Each once: where a backward makes its forward again, both are in one graph.
    matrices = list(dict.fromkeys(parts for node in nodes for parts in _matrices(node)))
    sources = [part for parts in matrices for part in parts]
    counts = [len(parts) for parts in matrices]
    with graph.inserting_before(nodes[0]):
        whole = graph.call_function(_CAST, (sources, counts, dtype))
        whole.meta["val"] = _CAST([part.meta["val"] for part in sources], counts, dtype)
        outs = {}
        for i, parts in enumerate(matrices):
            outs[parts] = graph.call_function(operator.getitem, (whole, i))
            outs[parts].meta["val"] = whole.meta["val"][i]
    for node in nodes:
        node.args = (*node.args[:-1], [outs[parts] for parts in _matrices(node)])
