"""Labels the channels of every tensor of a graph, operation by operation.

How an operation hands them on is a *rule*; one without a rule pins the channels of everything that it sees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.fx import Node

from lightning_obc.export.channels import Channels, Group, Ids, Labels, Reader, inside, owner_of
from lightning_obc.export.graph import Graph

Found = Union[Labels, list[Labels]]


class Tracker:
    """Runs over a graph once and labels every tensor of it.

    Args:
        graph: The traced model.
        tensors: Parameters and buffers of the model by name; tied ones are one object.
    """

    def __init__(self, graph: Graph, tensors: dict[str, Tensor]) -> None:
        self.channels = Channels()
        self.tensors = tensors
        self._found: dict[Node, Found] = {}
        self._why: dict[Node, str] = {}
        for node in graph.module.graph.nodes:
            if node.op == "get_attr" and "val" not in node.meta:
                node.meta["val"] = getattr_or_none(graph.module, str(node.target))
            self._visit(node)

    def _visit(self, node: Node) -> None:
        inputs = node.all_input_nodes
        self._why[node] = next((self._why[one] for one in inputs if not self.is_state(one)), "its input is a constant")
        if node.op == "placeholder":
            self._why[node] = "its input comes from outside"
        elif node.op == "output":
            self.pin(inputs, "the model returns them")
        elif node.op == "call_function":
            # Its heads fill the width of its input, whatever they are needed for.
            rule = _fixed if inside(node, nn.MultiheadAttention) else rule_for(node)
            found = None if rule is None else rule(self, node)
            if found is None:
                self.pin(inputs, f"{speaking(node)} sees all of them")
            if found is None or any(self.labels(one) for one in inputs if not self.is_state(one)):
                self._why[node] = f"its input comes through {speaking(node)}"
            self._found[node] = () if found is None else found

    def state(self, node: Any) -> Tensor | None:
        """The parameter or buffer that a node reads, or None."""
        return self.tensors.get(str(node.target)) if isinstance(node, Node) and node.op == "get_attr" else None

    def is_state(self, node: Any) -> bool:
        return self.state(node) is not None

    def labels(self, node: Any) -> Labels:
        """Groups of one tensor; those of parameters and buffers run along every dimension."""
        if not isinstance(node, Node):
            return ()
        if (tensor := self.state(node)) is not None:
            return tuple(Group((dim,), ids) for dim, ids in enumerate(self.channels.of(tensor)) if len(ids) > 1)
        found = self._found.get(node, ())
        return found if isinstance(found, tuple) else ()

    def several(self, node: Node) -> list[Labels]:
        found = self._found.get(node, ())
        return found if isinstance(found, list) else []

    def pin(self, nodes: Iterable[Any], reason: str) -> None:
        for node in nodes:
            self.channels.pin_labels(self.labels(node), reason)
            for labels in self.several(node) if isinstance(node, Node) else []:
                self.channels.pin_labels(labels, reason)

    def why(self, node: Any) -> str:
        return self._why.get(node, "its input is a constant")

    def pin_kernel(self, weight: Tensor, first: int) -> None:
        """Dimensions of a weight behind its channels are no channels."""
        for ids in self.channels.of(weight)[first:]:
            self.channels.pin(ids, "kernel positions stay")

    def along(self, node: Any, dim: int) -> tuple[Ids | None, Labels]:
        """The channels along one dimension, and the other groups; a group of several dimensions is pinned."""
        groups = self.labels(node)
        mine = [group for group in groups if dim in group.dims]
        rest = tuple(group for group in groups if dim not in group.dims)
        if mine and mine[0].dims != (dim,):
            self.channels.pin_labels(tuple(mine), f"{speaking(node)} has them in several dimensions")
            mine = []
        return (mine[0].ids if mine else None), rest


def getattr_or_none(module: nn.Module, name: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None


Rule = Callable[[Tracker, Node], Union[Found, None]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names; ``getitem`` and ``pointwise`` stand for all of their kind."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


# Element by element, although PyTorch does not tag them so.
_UNTAGGED = ("hardswish", "hardsigmoid", "hardtanh", "relu6", "softplus", "selu", "celu", "log_sigmoid", "softshrink")


def rule_for(node: Node) -> Rule | None:
    if node.target is operator.getitem:
        return RULES.get("getitem")
    name = name_of(node)
    if name in RULES:
        return RULES[name]
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return RULES.get("pointwise") if tagged or name in _UNTAGGED else None


def name_of(node: Node) -> str:
    """Name of the operator without overload; in-place ones are called like the others."""
    return (
        str(getattr(getattr(node.target, "overloadpacket", None), "_qualified_op_name", node.target))
        .removeprefix("aten::")
        .rstrip("_")
    )


def speaking(node: Any) -> str:
    if not isinstance(node, Node):
        return str(node)
    name = name_of(node) if node.op == "call_function" else node.name
    owner = owner_of(node)
    return f"{name} in {owner}" if owner else name


def argument(node: Node, name: str) -> Any:
    """An argument by the name in the operator's schema."""
    schema = getattr(node.target, "_schema")  # noqa: B009 (operators are typed as any callable)
    for index, entry in enumerate(schema.arguments):
        if entry.name == name:
            return node.args[index] if index < len(node.args) else node.kwargs.get(name, entry.default_value)
    return None


def _fixed(to: Tracker, node: Node) -> Found | None:
    """Nothing is cut, but layers say so."""
    if name_of(node) == "linear" and (weight := to.state(node.args[1])) is not None:
        rows, columns = to.channels.of(weight)
        for ids in (rows, columns):
            to.channels.pin(ids, "nn.MultiheadAttention keeps its width")
        name = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
        to.channels.readers.append(Reader(name, weight, rows, columns, columns, 0, 1))
    return None
