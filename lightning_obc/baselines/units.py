"""Runs of consecutive input channels that a pattern ties together: groups of N:M, blocks, single weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.obs.columns import Unit


def units_of(columns: int, channels: int, size: int) -> list[Unit]:
    """``(start, stop)`` of every unit in column order; the last one of each kernel position may be short."""
    return [
        (start, min(start + size, position + channels))
        for position in range(0, columns, channels)
        for start in range(position, position + channels, size)
    ]


def grouped(tensor: Tensor, channels: int, size: int) -> Tensor:
    """``[g, R, d]`` as ``[g, R, positions, units, size]``; short last units are padded with zeros."""
    split = tensor.reshape(*tensor.shape[:2], -1, channels)
    return torch.constant_pad_nd(split, (0, -channels % size)).reshape(*split.shape[:3], -1, size)


def ungrouped(tensor: Tensor, channels: int) -> Tensor:
    """Inverse of :func:`grouped`: ``[g, R, d]`` without the padding."""
    groups, rows, positions = tensor.shape[:3]
    return tensor.reshape(groups, rows, positions, -1)[..., :channels].reshape(groups, rows, -1)
