"""How operations that compute hand channels on, by the functional operators that :mod:`torch.export` records."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lightning_obc.export.channel_tracker import Found, Tracker, argument, name_of, rule, speaking
from lightning_obc.export.channels import Channels, Group, Ids, Reader, shape_of
from lightning_obc.export.graph import Graph
from lightning_obc.export.view_rules import shift


def track(graph: Graph, tensors: dict[str, Tensor]) -> Channels:
    """The channels of a traced model, by all rules that there are.

    Args:
        graph: The traced model.
        tensors: Parameters and buffers of the model by name; tied ones are one object.
    """
    return Tracker(graph, tensors).channels


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
        transposed = "transpose" in name_of(node)
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


@rule("pointwise")
def _pointwise(to: Tracker, node: Node) -> Found | None:
    """Entry by entry, with broadcasting: channels that meet become one."""
    rank = len(shape_of(node))
    operands = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), torch.Tensor)]
    shifted = [shift(to.labels(one), rank - len(shape_of(one))) for one in operands]
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
    to.channels.pin_labels(tuple(refused), f"{speaking(node)} joins them with a tensor that has none")
    return tuple(result)


@rule("mean", "sum", "amax", "amin", "softmax", "log_softmax", "_softmax")
def _reduce(to: Tracker, node: Node) -> Found | None:
    """Over dimensions without channels; those that go are taken out of the others' numbers."""
    x: Any = node.args[0]
    rank, given = len(shape_of(x)), argument(node, "dim")
    dims = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
    over = {int(dim) % rank for dim in dims}
    lost = tuple(group for group in to.labels(x) if over & set(group.dims))
    to.channels.pin_labels(lost, f"{speaking(node)} runs over them")
    kept = [group for group in to.labels(x) if not over & set(group.dims)]
    gone = over if len(shape_of(node)) < rank else set()
    return tuple(Group(tuple(dim - sum(o < dim for o in gone) for dim in g.dims), g.ids) for g in kept)


@rule("layer_norm", "rms_norm")
def _layer_norm(to: Tracker, node: Node) -> Found | None:
    x: Any = node.args[0]
    first = len(shape_of(x)) - len(argument(node, "normalized_shape"))
    lost = tuple(group for group in to.labels(x) if max(group.dims) >= first)
    to.channels.pin_labels(lost, f"{speaking(node)} runs over them")
    to.pin([argument(node, "weight"), argument(node, "bias")], "its width is that of its input")
    return tuple(group for group in to.labels(x) if max(group.dims) < first)


_SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")


@rule(*(f"{name}{dims}d" for name in _SPATIAL for dims in (1, 2, 3)))
def _pool(to: Tracker, node: Node) -> Found | None:
    spatial = int(name_of(node)[-2])
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
    labels = shift(to.labels(mask), missing)
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
