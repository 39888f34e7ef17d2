"""Magnitude pruning of one layer: the smallest weights go, the others stay as they are."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from lightning_obc.baselines.units import grouped, ungrouped
from lightning_obc.errors import SpecError
from lightning_obc.obs.damping import with_damping
from lightning_obc.obs.problem import HessianLike, check_channels, prepare
from lightning_obc.obs.prune import check_fit
from lightning_obc.obs.select import zeros_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, Misfit, Pattern, Structured, Unstructured, parse_pattern


def magnitude(
    weight: Tensor,
    hessian: HessianLike,
    pattern: Pattern | str | float,
    *,
    channels: int | None = None,
    misfit: Misfit = "error",
    damping: float | str = 0.01,
) -> LayerSolution:
    """Remove the weights (groups, blocks, channels) of least magnitude of the layer; nothing compensates.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``. Weights that are zero already count and stay zero.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic; only measures the error.
        pattern: A pattern or its shorthand.
        channels, misfit: As in :func:`lightning_obc.obs.prune`.
        damping: Only enters ``damping_loss``; ``"auto"`` adds the held-out error.

    Raises:
        PatternError, ShapeError, NonFiniteError, NotPositiveDefiniteError: See :func:`lightning_obc.obs.prune`.
    """
    pattern = parse_pattern(pattern)
    channels = check_channels(weight.shape[-1], channels)
    check_fit(pattern, channels, misfit)

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        problem = prepare(rows, half, damping)
        dense = problem.original_batched()
        mask = magnitude_mask(pattern, dense, channels)
        return problem.solution(dense * mask, mask, problem.status("magnitude"))

    return with_damping(weight, hessian, damping, solve)


@singledispatch
def magnitude_mask(pattern: Pattern, weight: Tensor, channels: int) -> Tensor:
    """Keep-mask ``[g, R, d]`` of the largest weights; existing zeros leave first, ties go to the lower index."""
    raise SpecError("This pattern has no magnitude mask", got=type(pattern).__name__)


def _smallest(scores: Tensor, share: float) -> Tensor:
    """True for the ``ceil(share · n)`` smallest entries, over all dimensions."""
    order = torch.sort(scores.flatten(), stable=True).indices[: zeros_for(share, scores.numel())]
    gone = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    gone[order] = True
    return gone.reshape(scores.shape)


@magnitude_mask.register
def _unstructured(pattern: Unstructured, weight: Tensor, channels: int) -> Tensor:
    return ~_smallest(weight.abs(), pattern.sparsity) & (weight != 0)


@magnitude_mask.register
def _nm(pattern: NM, weight: Tensor, channels: int) -> Tensor:
    size = grouped(weight.abs(), channels, pattern.m)
    largest = torch.sort(size, dim=-1, descending=True, stable=True).indices[..., : pattern.n]
    keep = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, largest, True)
    return ungrouped(keep, channels) & (weight != 0)


@magnitude_mask.register
def _block(pattern: Block, weight: Tensor, channels: int) -> Tensor:
    blocks = grouped(weight.double().square(), channels, pattern.size)
    gone = _smallest(blocks.sum(-1), pattern.sparsity)
    return ungrouped(~gone[..., None].expand_as(blocks), channels) & (weight != 0)


@magnitude_mask.register
def _structured(pattern: Structured, weight: Tensor, channels: int) -> Tensor:
    by_channel = weight.double().square().reshape(*weight.shape[:2], -1, channels)
    gone = _smallest(by_channel.sum((1, 2)), pattern.sparsity)
    return (~gone[:, None, None].expand_as(by_channel)).reshape(weight.shape) & (weight != 0)
