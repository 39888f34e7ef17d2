"""How operations that only rearrange hand channels on: permutations, views, concatenations, parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch.fx import Node

from lightning_obc.export.channel_tracker import Found, Tracker, argument, name_of, rule, speaking
from lightning_obc.export.channels import Group, Ids, Labels, Written, owner_of, shape_of


def shift(labels: Labels, by: int) -> Labels:
    """The same groups, that many dimensions further on."""
    return tuple(Group(tuple(dim + by for dim in group.dims), group.ids) for group in labels)


@rule("permute", "transpose", "t")
def _permute(to: Tracker, node: Node) -> Found | None:
    rank = len(shape_of(node))
    order: Any = list(range(rank))
    if name_of(node) == "permute":
        order = [dim % rank for dim in argument(node, "dims")]
    elif rank > 1:
        a, b = (0, 1) if name_of(node) == "t" else (argument(node, "dim0") % rank, argument(node, "dim1") % rank)
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
            to.channels.pin(group.ids, f"{speaking(node)} cuts through them")
            continue
        if len(moved.dims) > 1:
            to.channels.boxes.append(moved.ids)
        result.append(moved)
    if name_of(node) not in ("flatten", "squeeze", "unsqueeze") and result:
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
    labels = shift(to.labels(x), len(shape_of(node)) - len(shape_of(x)))
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
            to.channels.pin_labels(tuple(Group(dims, ids) for ids in found), f"{speaking(node)} joins them to others")
    return tuple(result)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(to: Tracker, node: Node) -> Found | None:
    values: Any = node.meta["val"]
    x: Any = node.args[0]
    dim = int(argument(node, "dim")) % len(shape_of(x))
    found, start = [], 0
    single = name_of(node) == "unbind"
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
                to.channels.pin(ids, f"{speaking(node)} picks one of them")
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


@rule("getitem")
def _getitem(to: Tracker, node: Node) -> Found | None:
    source, index = node.args
    several = to.several(source)  # type: ignore[arg-type]
    return several[index] if several and isinstance(index, int) else None
