"""Under inductor: layers that read one tensor become one node of the compiled graph.

Eager calls are grouped as they happen (``lora_group.py``), which Dynamo cannot follow through a module's
state. Here the graph is at hand: `LoraGroupPass` runs over each graph that inductor compiles, forward or
backward, after autograd has been traced, and joins nodes of ``lora_ops.py`` that have the same x:

- ``lora_linear`` (several) -> ``lora_linear_group``: x read once for the layers' h, which are slices of one
  tensor from then on;
- ``lora_linear_backward`` (several) -> ``lora_linear_group_backward``: x read once for dA, of which the
  layers' are slices, and one dx in place of the sum of theirs, which is found and taken out; what else the
  sum has (x's gradient from a layer without LoRA) is added to it.

Nodes stay apart where joining would change what they compute or when it can be: dropout (each node has a
mask of its own), gradients not all wanted, A or dy of several dtypes, operands that come after the first
forward node, a dy that depends on another of the nodes, dx's that anything but their sum reads. So do nodes
that are far apart, as cross attention's k and v of several blocks, which read one tensor too: their outputs
and gradients would wait for each other in memory. Inductor alone runs such passes; other backends compile a
node a layer. Afterwards ``lora_cast_pass.py`` goes over the same graph.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import lora_cast_pass, lora_ops
from .lora_cast_pass import cast_once

_FORWARD = torch.ops.bayeslora.lora_linear.default
_BACKWARD = torch.ops.bayeslora.lora_linear_backward.default
_ADD = torch.ops.aten.add.Tensor
_SLICE = torch.ops.aten.slice.Tensor
_BETWEEN = 1  # layers that may lie between two of a group: parallel attention's output, between q and fc1

Order = dict[fx.Node, int]


class LoraGroupPass(CustomGraphPass):
    """The pass, in the form that inductor calls and caches compiled graphs by."""

    def __call__(self, graph: fx.Graph) -> None:
        """Go over a graph that inductor is about to compile."""
        group_layers(graph)
        cast_once(graph)

    def uuid(self) -> Any:
        """Return what tells one version of the pass from another."""
        return get_hash_for_files((__file__, lora_cast_pass.__file__, lora_ops.__file__))


_PASS = LoraGroupPass()


def install() -> None:
    """Have inductor run the pass from now on, unless its place is taken by somebody else's."""
    if config.post_grad_custom_pre_pass is None:
        config.post_grad_custom_pre_pass = _PASS


def remove() -> None:
    """Undo `install`; somebody else's pass stays."""
    if getattr(config, "post_grad_custom_pre_pass", None) is _PASS:
        config.post_grad_custom_pre_pass = None


def group_layers(graph: fx.Graph) -> int:
    """Join what can be joined, in place; return the number of groups made."""
    made = 0
    for target, join in ((_FORWARD, _join_forward), (_BACKWARD, _join_backward)):
        order = {node: i for i, node in enumerate(graph.nodes)}
        layers = sorted(graph.find_nodes(op="call_function", target=target), key=order.__getitem__)
        made += sum(join(graph, nodes, order) for nodes in _alike(layers) if len(nodes) > 1)
    if made:
        graph.lint()
    return made


def _alike(layers: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return the nodes that may be joined, of ``layers`` in the graph's order."""
    groups: list[list[fx.Node]] = []
    latest: dict[Any, tuple[int, list[fx.Node]]] = {}
    for i, node in enumerate(layers):
        key = _key(node)
        if key is None:
            continue
        position, group = latest.get(key, (-1, []))
        if not group or i - position > 1 + _BETWEEN:
            group = []
            groups.append(group)
        group.append(node)
        latest[key] = i, group
    return groups


def _key(node: fx.Node) -> Any:
    """Return what nodes of a group have in common, or None for a node that joins none."""
    if (
        node.kwargs
        or node.args[-1] is not None
        or any(user.target is not operator.getitem for user in node.users)
    ):
        return None
    if node.target is _FORWARD:
        x, _, _, _, _, scaling, dropout_p, seed, dtype, _ = node.args
        return None if dropout_p or seed is not None else (x, scaling, dtype)
    dy, x, _, _, _, _, scaling, dropout_p, seed, needs_x, *needs, _ = node.args
    if dropout_p or seed is not None or not all(needs):
        return None
    return x, scaling, needs_x, node.meta["val"][1].dtype, dy.meta["val"].dtype  # type: ignore[union-attr]


def _parts(node: fx.Node) -> dict[int, fx.Node]:
    """Return the one node that takes each output of ``node``; of those that are taken."""
    return {user.args[1]: user for user in node.users}  # type: ignore[misc]


def _outputs(graph: fx.Graph, group: fx.Node, values: Sequence[Any]) -> list[fx.Node]:
    """Add a node for each output of ``group``, behind it."""
    group.meta["val"] = list(values)
    nodes = []
    with graph.inserting_after(group):
        for i, value in reversed(list(enumerate(values))):
            nodes.append(graph.call_function(operator.getitem, (group, i)))
            nodes[-1].meta["val"] = value
    return nodes[::-1]


def _slices(graph: fx.Graph, whole: fx.Node, dim: int, like: Sequence[Any]) -> list[fx.Node]:
    """Add a node for each part of ``whole`` along ``dim``, of the sizes of ``like``, behind it."""
    nodes, start, after = [], 0, whole
    for value in like:
        end = start + value.shape[dim]
        with graph.inserting_after(after):
            after = graph.call_function(_SLICE, (whole, dim, start, end))
        after.meta["val"] = whole.meta["val"].narrow(dim, start, end - start)
        nodes.append(after)
        start = end
    return nodes


def _joined(values: Sequence[Any], dim: int) -> Any:
    """Return an example of the tensor that ``values`` are the parts of."""
    shape = list(values[0].shape)
    shape[dim] = sum(value.shape[dim] for value in values)
    return values[0].new_empty(shape)


def _replace(graph: fx.Graph, nodes: Iterable[fx.Node], replaced: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Give the users of old outputs the new ones, and take old outputs and ``nodes`` out."""
    for old, new in replaced:
        old.replace_all_uses_with(new)
    for node in nodes:
        for user in list(node.users):
            graph.erase_node(user)
        graph.erase_node(node)


def _join_forward(graph: fx.Graph, nodes: list[fx.Node], order: Order) -> bool:
    first = min(nodes, key=order.__getitem__)
    nodes = [node for node in nodes if all(order[operand] < order[first] for operand in node.all_input_nodes)]
    if len(nodes) < 2 or any(_takes_twice(node) for node in nodes):
        return False
    x, _, _, _, _, scaling, _, _, dtype, _ = first.args
    weights, biases, lora_as, lora_bs = (
        list(column) for column in zip(*(n.args[1:5] for n in nodes), strict=True)
    )
    with graph.inserting_before(first):
        group = graph.call_function(
            torch.ops.bayeslora.lora_linear_group.default,
            (x, weights, biases, lora_as, lora_bs, scaling, dtype, None),
        )
    ys, hidden = zip(*(node.meta["val"] for node in nodes), strict=True)
    outputs = _outputs(graph, group, [*ys, _joined(hidden, 1)])
    columns = _slices(graph, outputs.pop(), 1, hidden)
    new = dict(zip(nodes, zip(outputs, columns, strict=True), strict=True))
    _replace(graph, nodes, [(old, new[node][i]) for node in nodes for i, old in _parts(node).items()])
    return True


def _join_backward(graph: fx.Graph, nodes: list[fx.Node], order: Order) -> bool:
    last = max(nodes, key=order.__getitem__)
    # As in the forward, so that the layers' h lie side by side.
    nodes = sorted(nodes, key=lambda node: order[node.args[5]])  # type: ignore[index]
    if any(_takes_twice(node) for node in nodes) or _depend_on_each_other(nodes, order):
        return False
    needs_x = bool(last.args[9])
    total = _Sum([], [])
    if needs_x:
        found = _sum_of([_parts(node).get(0) for node in nodes])
        if found is None:
            return False
        total = found
    inside = {*nodes, *total.adds}
    readers = (user for node in nodes for part in node.users for user in part.users)
    if any(order[reader] < order[last] for reader in readers if reader not in inside):
        return False
    dys, _, weights, lora_as, lora_bs, hidden = (
        list(column) for column in zip(*(node.args[:6] for node in nodes), strict=True)
    )
    with graph.inserting_before(last):
        group = graph.call_function(
            torch.ops.bayeslora.lora_linear_group_backward.default,
            (dys, last.args[1], weights, lora_as, lora_bs, hidden, last.args[6], needs_x, None),
        )
    _, das, dbs = zip(*(node.meta["val"] for node in nodes), strict=True)
    dx, da, *outputs = _outputs(graph, group, [last.meta["val"][0], _joined(das, 0), *dbs])
    if needs_x:
        _replace_sum(graph, total, dx)
    new = dict(zip(nodes, zip(_slices(graph, da, 0, das), outputs, strict=True), strict=True))
    parts = [(node, i, old) for node in nodes for i, old in _parts(node).items()]
    _replace(graph, nodes, [(old, new[node][i - 1]) for node, i, old in parts if i > 0])
    return True


def _takes_twice(node: fx.Node) -> bool:
    """Tell whether one output of ``node`` is taken by two nodes, which `_parts` would confuse."""
    return len(_parts(node)) != len(node.users)


class _Sum(NamedTuple):
    """Additions, the whole sum last, and what they add besides the terms asked for."""

    adds: list[fx.Node]
    others: list[fx.Node]


def _sum_of(terms: Sequence[fx.Node | None]) -> _Sum | None:
    """Return the additions whose result holds all ``terms``; it may hold others.

    None where there are none: a term that is missing, read twice, or not in one sum with the others.
    """
    wanted = set(terms)
    if None in wanted or len(wanted) != len(terms):
        return None
    node, left, total = terms[0], wanted - {terms[0]}, _Sum([], [])
    assert node is not None
    while left:
        reader = _only_reader(node)
        if reader is None or not _is_addition(reader):
            return None
        a, b = reader.args
        found, below = _terms_of(b if a is node else a, wanted)  # type: ignore[arg-type]
        left -= found
        total.adds.extend((*below.adds, reader))
        total.others.extend(below.others)
        node = reader
    return total


def _terms_of(node: fx.Node, wanted: set[fx.Node | None]) -> tuple[set[fx.Node], _Sum]:
    """Return those of ``wanted`` that ``node``, a summand, is the sum of, and how."""
    if _only_reader(node) is not None:
        if node in wanted:
            return {node}, _Sum([], [])
        if _is_addition(node):
            (a, below_a), (b, below_b) = (_terms_of(arg, wanted) for arg in node.args)  # type: ignore[arg-type]
            if a or b:
                return a | b, _Sum([*below_a.adds, *below_b.adds, node], [*below_a.others, *below_b.others])
    return set(), _Sum([], [node])


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: fx.Node) -> bool:
    """Tell whether ``node`` adds two nodes of its own shape and dtype."""
    if node.target is not _ADD or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
        return False
    return all(isinstance(arg, fx.Node) and _is_like(arg.meta["val"], node.meta["val"]) for arg in node.args)


def _is_like(value: Any, other: Any) -> bool:
    """Tell whether two examples have one dtype and shape, for all that is known of sizes that vary."""
    if not isinstance(value, torch.Tensor) or value.dtype != other.dtype or value.dim() != other.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(value.shape, other.shape, strict=True))


def _replace_sum(graph: fx.Graph, total: _Sum, dx: fx.Node) -> None:
    """Put ``dx`` in the place of the terms that it is the sum of."""
    if not total.adds:
        return
    root = total.adds[-1]
    with graph.inserting_before(root):
        for other in total.others:
            dx = graph.call_function(_ADD, (other, dx))
            dx.meta["val"] = root.meta["val"]
    root.replace_all_uses_with(dx)
    for add in reversed(total.adds):
        graph.erase_node(add)


def _depend_on_each_other(nodes: Sequence[fx.Node], order: Order) -> bool:
    """Tell whether an operand of one of ``nodes`` is computed from another's output."""
    members, end = set(nodes), max(order[node] for node in nodes)
    for node in nodes:
        seen, waiting = {node}, [node]
        while waiting:
            for user in waiting.pop().users:
                if user in members:
                    return True
                if user not in seen and order[user] < end:
                    seen.add(user)
                    waiting.append(user)
    return False
