"""Channels of a traced model: which entries of which tensors stand or fall together.

Every index along a dimension that can be cut carries a *channel*, a number. Operations that treat channels one by one
hand them on, operations that combine two tensors channel by channel make their channels one, and whatever else sees a
tensor pins its channels: those stay. A channel may go once no weight that stays reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node

from lightning_obc.export.graph import module_name

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Dimensions of a tensor that carry channels together.

    Attributes:
        dims: Dimensions, ascending.
        ids: Channels, one axis for each of ``dims``.
    """

    dims: tuple[int, ...]
    ids: Ids


Labels = tuple[Group, ...]


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies channels.

    Attributes:
        name: Its layer.
        weight: The parameter.
        rows, columns: Channels that it makes and reads.
        source: What its input carries: several columns of one channel behind a flattening.
        row_dim, column_dim: Their dimensions in the weight.
    """

    name: str
    weight: Tensor
    rows: Ids
    columns: Ids
    source: Ids
    row_dim: int
    column_dim: int

    def nonzero(self) -> Flags:
        """``[rows, columns]``: where any weight between two channels is not zero."""
        flags = (self.weight.detach() != 0).movedim((self.row_dim, self.column_dim), (0, 1))
        flags = flags.flatten(2).any(-1) if flags.dim() > 2 else flags
        return np.asarray(flags.cpu().numpy())


@dataclass(frozen=True)
class Written:
    """An operation whose sizes may be written into the model's code, so that only a run tells whether it follows.

    Attributes:
        node: The operation.
        owner: The module whose forward it belongs to.
        groups: Groups of its output, or of one of them.
    """

    node: Node
    owner: str
    groups: Labels


@dataclass
class Channels:
    """All channels of a model, and what is known of them."""

    parent: list[int] = field(default_factory=list)
    tensors: dict[int, list[Ids]] = field(default_factory=dict)
    pins: list[tuple[Ids, str]] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    boxes: list[Ids] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    def new(self, count: int) -> Ids:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def of(self, tensor: Tensor) -> list[Ids]:
        """Channels along each dimension of a parameter or buffer, made at its first use."""
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = [self.new(size) for size in tensor.shape]
        return self.tensors[id(tensor)]

    def find(self, one: int) -> int:
        parent = self.parent
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    def unite(self, a: Ids, b: Ids) -> None:
        """Make channels one, entry by entry (arrays that broadcast to each other)."""
        for one, other in zip(*(part.ravel().tolist() for part in np.broadcast_arrays(a, b)), strict=True):
            self.parent[self.find(one)] = self.find(other)

    def unite_along(self, ids: Ids, axes: tuple[int, ...]) -> Ids:
        """Make the channels along some axes one; the channels that remain, with these axes taken out."""
        first = ids[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(ids.ndim))]
        self.unite(ids, first)
        return first.reshape([size for axis, size in enumerate(ids.shape) if axis not in axes])

    def roots(self) -> Ids:
        return np.array([self.find(one) for one in range(len(self.parent))], np.int64)

    def pin(self, ids: Ids, reason: str) -> None:
        self.pins.append((ids.ravel(), reason))

    def pin_labels(self, labels: Labels, reason: str) -> None:
        for group in labels:
            self.pin(group.ids, reason)


@dataclass(frozen=True)
class Survival:
    """Which channels stay.

    Attributes:
        roots: The representative of every channel.
        live: By representative: True when it stays.
    """

    roots: Ids
    live: Flags

    def of(self, ids: Ids) -> Flags:
        flags: Flags = self.live[self.roots[ids]]
        return flags

    def sizes(self, group: Group) -> Iterator[tuple[int, int, int]]:
        """Dimension, size and what is left of it, for the dimensions of a group that get smaller."""
        flags = self.of(group.ids)
        for axis, dim in enumerate(group.dims):
            others = tuple(other for other in range(flags.ndim) if other != axis)
            left = int(flags.any(others).sum())
            if left != flags.shape[axis]:
                yield dim, flags.shape[axis], left


@dataclass(frozen=True)
class Runs:
    """A weight with a scale for every run of columns, which stay representable when runs keep equal lengths.

    Attributes:
        columns: Channels of the columns, in order (at one kernel position).
        groups: The run that each belongs to, ascending.
        rows: Rows of the weight.
        bits: Width of its codes.
        scale_bits: Width of a scale and its zero point.
    """

    columns: Ids
    groups: Ids
    rows: int
    bits: int
    scale_bits: int

    def revived(self, live: Flags) -> Flags:
        """Columns that stay so that scales need not be repeated too often: the cheapest of all run lengths."""
        counts = np.bincount(self.groups, live)
        longest = int(np.bincount(self.groups).max())
        best = min(
            (size for size in range(1, longest + 1) if longest % size == 0), key=lambda size: self._cost(counts, size)
        )
        missing = (-counts.astype(np.int64)) % best
        # The first dead columns of each run.
        order = np.cumsum(~live) - np.concatenate([[0], np.cumsum(np.bincount(self.groups, ~live))])[self.groups]
        flags: Flags = live | (~live & (order <= missing[self.groups]))
        return flags

    def _cost(self, counts: NDArray[Any], size: int) -> float:
        columns = float((np.ceil(counts / size) * size).sum())
        return columns * self.bits + columns / size * self.scale_bits


def surviving(channels: Channels, runs: list[Runs], blocked: list[tuple[Ids, str]]) -> Survival:
    """The smallest set of channels that stays: what is pinned, what a weight in a row that stays reads, and no less.

    Args:
        channels: Of the model.
        runs: Weights with scales per run of columns.
        blocked: Channels that must stay besides.
    """
    roots = channels.roots()
    survival = Survival(roots, np.zeros(len(roots), np.bool_))
    for ids, _ in (*channels.pins, *blocked):
        survival.live[roots[ids]] = True
    weights = [(reader, reader.nonzero()) for reader in channels.readers]
    while True:
        before = int(survival.live.sum())
        for reader, nonzero in weights:
            read = nonzero[survival.of(reader.rows)].any(0)
            survival.live[roots[reader.columns[read]]] = True
        if int(survival.live.sum()) != before:
            continue
        _complete(channels, runs, survival)
        if int(survival.live.sum()) == before:
            return survival


def _complete(channels: Channels, runs: list[Runs], survival: Survival) -> None:
    """Layers keep a channel, tensors stay boxes, runs of columns keep equal lengths."""
    live, roots = survival.live, survival.roots
    dims = [ids for dims in channels.tensors.values() for ids in dims]
    for ids in (*dims, *channels.boxes):
        if ids.size and not survival.of(ids).any():
            live[roots[ids.flat[0]]] = True
    for ids in channels.boxes:
        flags = survival.of(ids)
        axes = range(flags.ndim)
        box = np.ones((1,) * flags.ndim, np.bool_)
        for axis in axes:
            box = box & flags.any(tuple(other for other in axes if other != axis), keepdims=True)
        live[roots[ids[box]]] = True
    for one in runs:
        live[roots[one.columns[one.revived(survival.of(one.columns))]]] = True


def owner_of(node: Node) -> str:
    """The innermost module whose forward an operation belongs to."""
    return module_name(node)


def inside(node: Node, kind: type[nn.Module]) -> bool:
    """True for an operation of a module of this type, or of one within it."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return any(entry[1] in (kind, f"{kind.__module__}.{kind.__qualname__}") for entry in stack)


def shape_of(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()
