"""Where activations are quantized in an exported graph, and with which ranges.

Two ways. With ranges of layer inputs alone, exactly those inputs are quantized. With calibration data, every tensor
between quantized layers is quantized once, also at convolutions that feed an addition: only then do runtimes keep the
whole path in integers, and only then is the file faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from lightning_obc.errors import ExportError, NonFiniteError
from lightning_obc.export.graph import (
    CONVOLUTIONS,
    LINEAR,
    Graph,
    Sample,
    arguments_of,
    aten,
    insert_tensor,
    module_name,
    users,
)
from lightning_obc.export.ops import operators
from lightning_obc.export.ranges import ActivationRange

_FUSED_AFTER = frozenset({aten.relu.default})
_SAME_RANGE = frozenset(
    op
    for family in (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)
    for op in (getattr(family, "default", None),)
    if op is not None
)
_CARRIERS = _SAME_RANGE | {aten.add.Tensor, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.cat.default}
_MOVERS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
        aten.dropout.default,
    }
)


def core_nodes(graph: Graph) -> dict[Node, str]:
    """Convolutions and linear layers with dequantized weights, with the name of their weight."""
    return {
        node: graph.weights[node.args[1]]
        for node in graph.module.graph.nodes
        if node.op == "call_function"
        and (node.target in CONVOLUTIONS or node.target in LINEAR)
        and node.args[1] in graph.weights
    }


def input_tensors(
    graph: Graph, ranges: Mapping[str, ActivationRange], keys: Mapping[str, list[str]]
) -> dict[Node, ActivationRange]:
    """The tensors that enter the named layers, with their ranges.

    Args:
        graph: The traced model.
        ranges: By name of the layer.
        keys: Names of the weights by layer.

    Raises:
        ExportError: A name that is no quantized layer of the graph.
    """
    core = core_nodes(graph)
    used = set(core.values())
    known = [name for name, weights in keys.items() if used & set(weights)]
    if missing := [name for name in ranges if name not in known]:
        raise ExportError(
            "Activation ranges name layers that are not quantized",
            got=", ".join(missing),
            expected=f"quantized layers: {', '.join(known) or 'none'}",
            remedy="drop them from activations, or quantize their weights",
        )
    by_weight = {weight: ranges[name] for name in ranges for weight in keys[name]}
    found: dict[Node, ActivationRange] = {}
    for node, weight in core.items():
        source = node.args[0]
        if weight in by_weight and isinstance(source, Node):
            found.setdefault(source, by_weight[weight])
    return found


def connected_tensors(graph: Graph) -> list[Node]:
    """Every tensor on the integer path: inputs of quantized layers, and what flows from one to another."""
    core = set(core_nodes(graph))
    carriers = _connecting(graph, core)
    chosen: dict[Node, None] = {}
    for node in graph.module.graph.nodes:
        if node in core:
            chosen[node.args[0]] = None
        elif node in carriers:
            chosen |= dict.fromkeys(_sources(node))
        if node in core | carriers:
            end = _after_activation(node)
            if any(user in core | carriers for user in _consumers(end)):
                chosen[end] = None
    # The path runs through views unchanged: what is quantized before a view needs no second rounding after it.
    return [node for node in chosen if _through_views(node) is node or _through_views(node) not in chosen]


def _connecting(graph: Graph, core: set[Node]) -> set[Node]:
    """Additions, poolings and concatenations that lie between quantized layers."""
    carriers = {
        node
        for node in graph.module.graph.nodes
        if node.op == "call_function" and node.target in _CARRIERS and _is_tensor(node) and len(_sources(node)) > 0
    }
    while True:
        ends = {_after_activation(node) for node in core | carriers}
        dead = {
            node
            for node in carriers
            if not any(_through_views(source) in ends for source in _sources(node))
            or not any(user in core | carriers for user in _consumers(_after_activation(node)))
        }
        if not dead:
            return carriers
        carriers -= dead


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()


def _sources(node: Node) -> list[Node]:
    if node.target is aten.add.Tensor:
        inputs = [argument for argument in node.args[:2] if isinstance(argument, Node)]
        return inputs if len(inputs) == 2 and all(_is_activation(source) for source in inputs) else []
    found: Any = node.args[0]
    inputs = list(found) if isinstance(found, (list, tuple)) else [found]
    return [source for source in inputs if isinstance(source, Node) and _is_activation(source)]


def _is_activation(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op != "get_attr" and (not isinstance(value, Tensor) or value.dim() > 0)


def _after_activation(node: Node) -> Node:
    """The tensor after a ReLU that runtimes fuse into the operator before it, or the node itself."""
    following = users(node)
    return following[0] if len(following) == 1 and following[0].target in _FUSED_AFTER else node


def _through_views(node: Node) -> Node:
    while node.op == "call_function" and node.target in _MOVERS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _consumers(node: Node) -> list[Node]:
    """Users of a tensor, looking through views."""
    found: list[Node] = []
    for user in users(node):
        found += _consumers(user) if user.op == "call_function" and user.target in _MOVERS else [user]
    return found


class _Observer(Interpreter):
    """Runs the graph and keeps the extremes of some tensors."""

    def __init__(self, module: nn.Module, watched: Iterable[Node]) -> None:
        super().__init__(module)  # type: ignore[arg-type]
        self.extremes: dict[Node, tuple[float, float]] = dict.fromkeys(watched, (0.0, 0.0))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.extremes:
            low, high = (float(extreme) for extreme in torch.aminmax(value.detach()))
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                raise NonFiniteError(
                    "Activations hold NaN or Inf", got=module_name(n) or n.name, expected="finite activations"
                )
            old = self.extremes[n]
            self.extremes[n] = min(old[0], low), max(old[1], high)
        return value


def measure_ranges(
    graph: Graph, tensors: Iterable[Node], batches: Iterable[Sample], bits: int = 8
) -> dict[Node, ActivationRange]:
    """Smallest and largest value of every tensor over the batches, as ranges of ``bits`` bits.

    Raises:
        ExportError: No batches. NonFiniteError: NaN or Inf in a tensor.
    """
    observer, count = _Observer(graph.module, tensors), 0
    device = next((p.device for p in graph.module.buffers()), torch.device("cpu"))
    with torch.no_grad():
        for batch in batches:
            args, kwargs = arguments_of(batch)
            if kwargs:
                raise ExportError(
                    "Calibration batches are mappings", got=list(kwargs), expected="tensors, or tuples of arguments"
                )
            observer.run(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
            count += 1
    if not count:
        raise ExportError("There is no calibration data for activations", got="0 batches", expected="at least one")
    return {node: ActivationRange.between(low, high, bits) for node, (low, high) in observer.extremes.items()}


def share_ranges(ranges: Mapping[Node, ActivationRange]) -> dict[Node, ActivationRange]:
    """Poolings that only pick values take the range of their input: integer kernels need both to be one."""
    shared = dict(ranges)
    for node in ranges:
        if node.target in _SAME_RANGE and isinstance(node.args[0], Node) and node.args[0] in shared:
            shared[node] = shared[node.args[0]]
    return shared


def quantize_activations(graph: Graph, ranges: Mapping[Node, ActivationRange]) -> dict[str, ActivationRange]:
    """Insert one quantize-dequantize after every tensor, for all its uses; the graph is edited in place.

    Returns:
        The ranges by the name of the tensor in the graph.
    """
    _, quantize = operators()
    for node, limits in ranges.items():
        following = node.next
        name = f"{node.name}_range"
        value = node.meta.get("val")
        device = value.device if isinstance(value, Tensor) else torch.device("cpu")
        scale = insert_tensor(graph, f"{name}.scale", torch.tensor(limits.scale, device=device), following)
        zero = torch.tensor(limits.zero_point, dtype=torch.uint8, device=device)
        point = insert_tensor(graph, f"{name}.zero_point", zero, following)
        with graph.module.graph.inserting_before(following):
            new = graph.module.graph.call_function(quantize, (node, scale, point, limits.max_code))
        node.replace_all_uses_with(new, delete_user_cb=partial(is_not, new))
    graph.module.graph.lint()
    return {node.name: limits for node, limits in ranges.items()}
