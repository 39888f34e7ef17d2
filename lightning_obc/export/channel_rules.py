"""How operations hand channels on, by the functional operators that :mod:`torch.export` records.

An operation without a rule pins the channels of everything that it sees.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from lightning_obc.export.channels import Channels, Group, Ids, Labels, Reader, Written, inside, owner_of, shape_of
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
                self.pin(inputs, f"{_speaking(node)} sees all of them")
            if found is None or any(self.labels(one) for one in inputs if not self.is_state(one)):
                self._why[node] = f"its input comes through {_speaking(node)}"
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
            self.channels.pin_labels(tuple(mine), f"{_speaking(node)} has them in several dimensions")
            mine = []
        return (mine[0].ids if mine else None), rest


def getattr_or_none(module: nn.Module, name: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None


Rule = Callable[[Tracker, Node], Union[Found, None]]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return add


# Element by element, although PyTorch does not tag them so.
_UNTAGGED = ("hardswish", "hardsigmoid", "hardtanh", "relu6", "softplus", "selu", "celu", "log_sigmoid", "softshrink")


def rule_for(node: Node) -> Rule | None:
    if node.target is operator.getitem:
        return _getitem
    name = _name(node)
    if name in _RULES:
        return _RULES[name]
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return _pointwise if tagged or name in _UNTAGGED else None


def _name(node: Node) -> str:
    """Name of the operator without overload; in-place ones are called like the others."""
    return (
        str(getattr(getattr(node.target, "overloadpacket", None), "_qualified_op_name", node.target))
        .removeprefix("aten::")
        .rstrip("_")
    )


def _speaking(node: Any) -> str:
    if not isinstance(node, Node):
        return str(node)
    name = _name(node) if node.op == "call_function" else node.name
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
    if _name(node) == "linear" and (weight := to.state(node.args[1])) is not None:
        rows, columns = to.channels.of(weight)
        for ids in (rows, columns):
            to.channels.pin(ids, "nn.MultiheadAttention keeps its width")
        name = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
        to.channels.readers.append(Reader(name, weight, rows, columns, columns, 0, 1))
    return None


@rule("linear")
def _linear(to: Tracker, node: Node) -> Found | None:
    return _multiply(to, node, len(shape_of(node.args[0])) - 1, 0, 1)  # type: ignore[arg-type]


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(to: Tracker, node: Node) -> Found | None:
    x, weight, groups = argument(node, "input"), to.state(argument(node, "weight")), argument(node, "groups")
    if weight is None:
        return None
    axis = len(shape_of(x)) - weight.dim() + 1
    if any(dim > axis for group in to.labels(x) for dim in group.dims):
        return None
    if groups == 1:
        transposed = "transpose" in _name(node)
        return _multiply(to, node, axis, int(transposed), int(not transposed))
    if not groups == weight.shape[0] == shape_of(x)[axis] == shape_of(node)[axis]:
        return None
    return _by_channel(to, node, axis, [weight, to.state(argument(node, "bias"))])


def _multiply(to: Tracker, node: Node, axis: int, row_dim: int, column_dim: int) -> Found | None:
    """A weight between the channels of its input and new ones."""
    x, weight, bias = argument(node, "input"), to.state(argument(node, "weight")), argument(node, "bias")
    if weight is None or (bias is not None and not to.is_state(bias)) or to.is_state(x):
        return None
    ids, rest = to.along(x, axis)
    rows, columns = (to.channels.of(weight)[dim] for dim in (row_dim, column_dim))
    to.pin_kernel(weight, 2)
    if ids is None:
        to.channels.pin(columns, to.why(x))
    else:
        to.channels.unite(columns, ids)
    if bias is not None:
        to.channels.unite(to.channels.of(to.tensors[str(bias.target)])[0], rows)
    name = str(argument(node, "weight").target).rpartition(".")[0]
    to.channels.readers.append(
        Reader(name, weight, rows, columns, columns if ids is None else ids, row_dim, column_dim)
    )
    return (*rest, Group((axis,), rows))


@rule("batch_norm", "instance_norm")
def _norm(to: Tracker, node: Node) -> Found | None:
    names = ("weight", "bias", "running_mean", "running_var")
    given = [argument(node, name) for name in names]
    if any(one is not None and not to.is_state(one) for one in given):
        return None
    return _by_channel(to, node, 1, [to.state(one) for one in given])


def _by_channel(to: Tracker, node: Node, axis: int, states: list[Tensor | None]) -> Found | None:
    """A module with one entry per channel along the first dimension of each of its tensors."""
    ids, rest = to.along(argument(node, "input"), axis)
    for state in states:
        if state is not None and ids is None:
            to.channels.pin(to.channels.of(state)[0], to.why(argument(node, "input")))
        elif state is not None and ids is not None:
            to.channels.unite(to.channels.of(state)[0], ids)
        if state is not None:
            to.pin_kernel(state, 1)
    return rest if ids is None else (*rest, Group((axis,), ids))


@rule("embedding")
def _embedding(to: Tracker, node: Node) -> Found | None:
    table = to.state(node.args[0])
    if table is None or to.labels(node.args[1]):
        return None
    rows, columns = to.channels.of(table)
    to.channels.pin(rows, "rows of a table are looked up by index")
    return (Group((len(shape_of(node)) - 1,), columns),)


@rule("_assert_tensor_metadata")
def _nothing(to: Tracker, node: Node) -> Found | None:
    return ()


@rule("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "to", "_to_copy", "detach", "alias")
def _same(to: Tracker, node: Node) -> Found | None:
    return to.labels(node.args[0])


def _pointwise(to: Tracker, node: Node) -> Found | None:
    """Entry by entry, with broadcasting: channels that meet become one."""
    rank = len(shape_of(node))
    operands = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), torch.Tensor)]
    shifted = [_shift(to.labels(one), rank - len(shape_of(one))) for one in operands]
    shapes = [(1,) * (rank - len(shape_of(one))) + shape_of(one) for one in operands]
    result: list[Group] = []
    refused: list[Group] = []
    for group in sorted({g.dims: g for labels in shifted for g in labels}.values(), key=lambda g: -len(g.dims)):
        same = [g.ids for labels in shifted for g in labels if g.dims == group.dims]
        full = sum(any(shape[dim] > 1 for dim in group.dims) for shape in shapes)
        if full == len(same) and all(ids.shape == group.ids.shape for ids in same):
            for ids in same:
                to.channels.unite(group.ids, ids)
            result.append(group)
        else:
            # A tensor of this size without channels, or with others, sees each index.
            refused += [g for labels in shifted for g in labels if g.dims == group.dims]
    to.channels.pin_labels(tuple(refused), f"{_speaking(node)} joins them with a tensor that has none")
    return tuple(result)


def _shift(labels: Labels, by: int) -> Labels:
    return tuple(Group(tuple(dim + by for dim in group.dims), group.ids) for group in labels)


@rule("permute", "transpose", "t")
def _permute(to: Tracker, node: Node) -> Found | None:
    rank = len(shape_of(node))
    order: Any = list(range(rank))
    if _name(node) == "permute":
        order = [dim % rank for dim in argument(node, "dims")]
    elif rank > 1:
        a, b = (0, 1) if _name(node) == "t" else (argument(node, "dim0") % rank, argument(node, "dim1") % rank)
        order[a], order[b] = b, a
    return tuple(_ascending(tuple(order.index(dim) for dim in g.dims), g.ids) for g in to.labels(node.args[0]))


def _ascending(dims: tuple[int, ...], ids: Ids) -> Group:
    order = sorted(range(len(dims)), key=lambda axis: dims[axis])
    return Group(tuple(dims[axis] for axis in order), np.transpose(ids, order))


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    labels = to.labels(x)
    result: list[Group] = []
    for group in labels:
        moved = _through_view(group, shape_of(x), shape_of(node))
        if moved is None:
            to.channels.pin(group.ids, f"{_speaking(node)} cuts through them")
            continue
        if len(moved.dims) > 1:
            to.channels.boxes.append(moved.ids)
        result.append(moved)
    if _name(node) not in ("flatten", "squeeze", "unsqueeze") and result:
        to.channels.written.append(Written(node, owner_of(node), tuple(result)))
    return tuple(result)


def _through_view(group: Group, old: tuple[int, ...], new: tuple[int, ...]) -> Group | None:
    """A group after a view, or None when its dimensions are torn apart from each other."""
    for start, stop, new_start, new_stop in _blocks(old, new):
        if not set(group.dims) <= set(range(start, stop)):
            if set(group.dims) & set(range(start, stop)):
                return None
            continue
        shape = [old[dim] if dim in group.dims else 1 for dim in range(start, stop)]
        spread = np.broadcast_to(group.ids.reshape(shape), old[start:stop]).reshape(new[new_start:new_stop])
        dims = [dim for dim in range(new_start, new_stop) if new[dim] > 1]
        # Dimensions along which the channels do not change carry none.
        moving = [d for d in dims if bool((spread != spread.take([0], axis=d - new_start)).any())]
        picked = spread[tuple(slice(None) if dim in moving else 0 for dim in range(new_start, new_stop))]
        return Group(tuple(moving), picked) if moving else None
    return None


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> Iterable[tuple[int, int, int, int]]:
    """Runs of dimensions of two shapes that hold the same entries: start and stop in both."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, new_start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[start:i])) != (right := math.prod(new[new_start:j])):
            if (left < right and i < len(old)) or j == len(new):
                i += 1
            else:
                j += 1
        yield start, i, new_start, j


@rule("expand", "expand_as")
def _expand(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    labels = _shift(to.labels(x), len(shape_of(node)) - len(shape_of(x)))
    if any(shape_of(node)[dim] != size for g in labels for dim, size in zip(g.dims, g.ids.shape, strict=True)):
        return None
    if labels:
        to.channels.written.append(Written(node, owner_of(node), labels))
    return labels


@rule("cat", "concat")
def _cat(to: Tracker, node: Node) -> Found | None:
    parts: Any = node.args[0]
    dim = int(argument(node, "dim")) % len(shape_of(node))
    alike: dict[tuple[int, ...], list[Ids]] = {}
    pieces: list[Ids] = []
    for part in parts:
        ids, rest = to.along(part, dim)
        if ids is None:
            ids = to.channels.new(shape_of(part)[dim])
            to.channels.pin(ids, to.why(part))
        pieces.append(ids)
        for group in rest:
            alike.setdefault(group.dims, []).append(group.ids)
    result = [Group((dim,), np.concatenate(pieces))]
    for dims, found in alike.items():
        if len(found) == len(parts) and all(ids.shape == found[0].shape for ids in found):
            for ids in found[1:]:
                to.channels.unite(found[0], ids)
            result.append(Group(dims, found[0]))
        else:
            to.channels.pin_labels(tuple(Group(dims, ids) for ids in found), f"{_speaking(node)} joins them to others")
    return tuple(result)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(to: Tracker, node: Node) -> Found | None:
    values: Any = node.meta["val"]
    x: Any = node.args[0]
    dim = int(argument(node, "dim")) % len(shape_of(x))
    found, start = [], 0
    single = _name(node) == "unbind"
    for value in values:
        length = 1 if single else int(value.shape[dim])
        found.append(_taken(to, node, dim, range(start, start + length), drop=single))
        start += length
    return found


@rule("select")
def _select(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    dim, index = int(argument(node, "dim")) % len(shape_of(x)), argument(node, "index")
    if not isinstance(index, int):
        return None
    index %= shape_of(x)[dim]
    return _taken(to, node, dim, range(index, index + 1), drop=True)


@rule("slice")
def _slice(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    dim = int(argument(node, "dim")) % len(shape_of(x))
    start, end, step = argument(node, "start"), argument(node, "end"), argument(node, "step")
    if not all(isinstance(bound, (int, type(None))) for bound in (start, end, step)):
        return None
    return _taken(to, node, dim, range(shape_of(x)[dim])[slice(start, end, step)], drop=False)


@rule("glu")
def _glu(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    dim = int(argument(node, "dim")) % len(shape_of(x))
    half = shape_of(x)[dim] // 2
    first = _taken(to, node, dim, range(half), drop=False)
    second = _taken(to, node, dim, range(half, 2 * half), drop=False)
    for one, other in zip(first, second, strict=True):
        to.channels.unite(one.ids, other.ids)
    return first


def _taken(to: Tracker, node: Node, dim: int, which: range, drop: bool) -> Labels:
    """Groups of some indices along a dimension, which goes when there is but one and ``drop`` is set."""
    result: list[Group] = []
    for group in to.labels(node.args[0]):
        dims, ids = group.dims, group.ids
        if dim in dims:
            axis = dims.index(dim)
            if len(dims) == 1 and drop:
                to.channels.pin(ids, f"{_speaking(node)} picks one of them")
                continue
            ids = ids.take(list(which), axis=axis)
            if drop:
                ids, dims = ids.squeeze(axis), tuple(one for one in dims if one != dim)
        if drop:
            dims = tuple(one - (one > dim) for one in dims)
        result.append(Group(dims, ids))
        if dim in group.dims:
            to.channels.written.append(Written(node, owner_of(node), (result[-1],)))
            if len(dims) > 1:
                to.channels.boxes.append(ids)
    return tuple(result)


def _getitem(to: Tracker, node: Node) -> Found | None:
    source, index = node.args
    several = to.several(source)  # type: ignore[arg-type]
    return several[index] if several and isinstance(index, int) else None


@rule("mean", "sum", "amax", "amin", "softmax", "log_softmax", "_softmax")
def _reduce(to: Tracker, node: Node) -> Found | None:
    """Over dimensions without channels; those that go are taken out of the others' numbers."""
    x: Any = node.args[0]
    rank, given = len(shape_of(x)), argument(node, "dim")
    dims = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
    over = {int(dim) % rank for dim in dims}
    lost = tuple(group for group in to.labels(x) if over & set(group.dims))
    to.channels.pin_labels(lost, f"{_speaking(node)} runs over them")
    kept = [group for group in to.labels(x) if not over & set(group.dims)]
    gone = over if len(shape_of(node)) < rank else set()
    return tuple(Group(tuple(dim - sum(o < dim for o in gone) for dim in g.dims), g.ids) for g in kept)


@rule("layer_norm", "rms_norm")
def _layer_norm(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    first = len(shape_of(x)) - len(argument(node, "normalized_shape"))
    lost = tuple(group for group in to.labels(x) if max(group.dims) >= first)
    to.channels.pin_labels(lost, f"{_speaking(node)} runs over them")
    to.pin([argument(node, "weight"), argument(node, "bias")], "its width is that of its input")
    return tuple(group for group in to.labels(x) if max(group.dims) < first)


_SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")


@rule(*(f"{name}{dims}d" for name in _SPATIAL for dims in (1, 2, 3)))
def _pool(to: Tracker, node: Node) -> Found | None:
    spatial = int(_name(node)[-2])
    return _trailing(to, node, spatial) if isinstance(node.meta.get("val"), torch.Tensor) else None


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d")
def _upsample(to: Tracker, node: Node) -> Found | None:
    return _trailing(to, node, len(shape_of(node)) - 2)


@rule("pad", "constant_pad_nd")
def _pad(to: Tracker, node: Node) -> Found | None:
    return _trailing(to, node, len(argument(node, "pad")) // 2)


def _trailing(to: Tracker, node: Node, count: int) -> Found | None:
    """An operation over the last dimensions, each entry before them for itself."""
    labels = to.labels(node.args[0])
    last = len(shape_of(node)) - count
    return None if any(dim >= last for group in labels for dim in group.dims) else labels


@rule("scaled_dot_product_attention")
def _attention(to: Tracker, node: Node) -> Found | None:
    """Heads are channels; within a head everything meets."""
    operands = [argument(node, name) for name in ("query", "key", "value")]
    groups = [to.labels(one) for one in operands]
    rank = len(shape_of(node))
    head, last = rank - 3, rank - 1
    if any(len(one) != 1 or one[0].dims != (head, last) for one in groups) or head < 0:
        return None
    heads = [to.channels.unite_along(one[0].ids, (1,)) for one in groups]
    if any(len(one) != len(heads[0]) for one in heads):
        return None
    for one in heads[1:]:
        to.channels.unite(heads[0], one)
    if (mask := argument(node, "attn_mask")) is not None and not _meets_heads(to, mask, rank, heads[0]):
        return None
    return groups[2]


def _meets_heads(to: Tracker, mask: Node, rank: int, heads: Ids) -> bool:
    """True for a mask that is the same for all heads, or that has the channels of the heads."""
    missing = rank - len(shape_of(mask))
    labels = _shift(to.labels(mask), missing)
    if not labels:
        return rank - 3 < missing or shape_of(mask)[rank - 3 - missing] == 1
    if len(labels) != 1 or labels[0].dims != (rank - 3,):
        return False
    to.channels.unite(labels[0].ids, heads)
    return True


@rule("matmul", "bmm")
def _matmul(to: Tracker, node: Node) -> Found | None:
    """Products of activations: what is summed over meets, and so do heads on both sides."""
    a, b = node.args[:2]
    rank = len(shape_of(node))
    if len(shape_of(a)) != rank or len(shape_of(b)) != rank or len(to.labels(a)) > 1 or len(to.labels(b)) > 1:  # type: ignore[arg-type]
        return None
    left, right = (next(iter(to.labels(one)), None) for one in (a, b))
    if left is None and right is not None and right.dims == (rank - 1,):
        return (right,)
    if right is None and left is not None and left.dims == (rank - 2,):
        return (left,)
    if left is None or right is None:
        return None if left or right else ()
    batch = tuple(dim for dim in left.dims if dim < rank - 2)
    if batch != tuple(dim for dim in right.dims if dim < rank - 2):
        return None
    if not batch and (left.dims, right.dims) != ((rank - 1,), (rank - 2,)):
        return None
    heads = [
        to.channels.unite_along(one.ids, tuple(i for i, dim in enumerate(one.dims) if dim not in batch))
        for one in (left, right)
    ]
    if heads[0].shape != heads[1].shape:
        return None
    to.channels.unite(*heads)
    if right.dims == (*batch, rank - 1):
        return (right,)
    return (Group(batch, heads[0]),) if batch else ()
