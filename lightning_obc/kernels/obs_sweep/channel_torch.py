"""The sweep over channels in batched torch, on any device: one rank-``s`` update of every ``G`` a step.

All problems take their steps side by side. Nothing waits for the device. Index legend as in :mod:`.channels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.kernels.hessian_update.precision import exact_products
from lightning_obc.kernels.obs_sweep.channels import ChannelOutput, ChannelPlan, start


def sweep(plan: ChannelPlan) -> ChannelOutput:
    """Run the plan."""
    weight, inverse, bad = start(plan)
    weight, inverse = weight.clone(), inverse.clone(memory_format=torch.contiguous_format)
    groups, parts, _, columns = weight.shape
    device, positions = weight.device, columns // plan.channels
    members = torch.arange(columns, device=device).reshape(positions, plan.channels).T
    gone = torch.zeros(groups, plan.channels, dtype=torch.bool, device=device)
    order, losses = [], []
    with exact_products(device.type):
        for _ in range(plan.steps):
            scores = _scores(weight, inverse, members, gone, bad)
            channel = scores.argmin(1, keepdim=True)
            order.append(channel[:, 0])
            losses.append(scores.gather(1, channel)[:, 0])
            gone.scatter_(1, channel, True)
            _eliminate_(weight.flatten(0, 1), inverse.flatten(0, 1), members[channel[:, 0]].repeat_interleave(parts, 0))
    return ChannelOutput(torch.stack(order, 1), torch.stack(losses, 1), bad)


def _scores(weight: Tensor, inverse: Tensor, members: Tensor, gone: Tensor, bad: Tensor) -> Tensor:
    """Cost of every channel, ``[g, C]``; infinite for those that are gone. Raises the flags ``bad`` in place."""
    blocks = inverse[:, :, members[:, :, None], members[:, None, :]]
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(gone[:, None, :, None, None], identity, blocks))
    bad |= (info > 0).any(2).any(1)
    columns = weight[..., members].permute(0, 1, 3, 4, 2)
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    return torch.where(gone, torch.inf, half.square().sum((1, 3, 4)) / 2)


def _eliminate_(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Fix ``columns [n, s]`` of ``weight [n, Q, d]`` at zero under ``inverse [n, d, d]``, in place."""
    across = columns[:, None].expand(-1, weight.shape[1], -1)
    lines = columns[:, :, None].expand(-1, -1, inverse.shape[2])
    rows = inverse.gather(1, lines)
    block, _ = torch.linalg.cholesky_ex(rows.gather(2, columns[:, None].expand(-1, columns.shape[1], -1)))
    pivot = torch.linalg.solve_triangular(block, rows, upper=False)
    step = torch.linalg.solve_triangular(block, weight.gather(2, across).mT, upper=False)
    weight.baddbmm_(step.mT, pivot, alpha=-1)
    inverse.baddbmm_(pivot.mT, pivot, alpha=-1)
    weight.scatter_(2, across, 0.0)
    inverse.scatter_(1, lines, 0.0)
    inverse.scatter_(2, lines.mT, 0.0)
