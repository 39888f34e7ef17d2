"""The sweep over channels on a CPU: compiled panels, and matrix products between them.

Choosing and eliminating a panel's channels is compiled (:mod:`.channel_panel`); after a panel the living channels move
into the first slots, and the panel's lines leave the lower triangles of ``G`` and ``A`` in a few products of torch,
which use all threads. Many small problems are one panel each, and go to the threads whole.

Index legend as in :mod:`.channels`; ``M`` positions of all teams, ``n`` lines of a panel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_obc.kernels.hessian_update.precision import exact_products
from lightning_obc.kernels.obs_sweep import channel_panel as kernel
from lightning_obc.kernels.obs_sweep.channel_panel import Channels
from lightning_obc.kernels.obs_sweep.channels import ChannelOutput, ChannelPlan, empty_output, start
from lightning_obc.kernels.obs_sweep.lanes import LANES
from lightning_obc.kernels.threads import run_blocks

# Lines of a panel, and columns up to which a problem is one panel.
LINES, SINGLE = 96, 192
# Rows of a triangle that one product updates.
TILE = 384


def sweep(plan: ChannelPlan) -> ChannelOutput:
    """Run the plan on the CPU."""
    out = empty_output(plan)
    weight, inverse, bad = start(plan)
    out.broken.logical_or_(bad)
    groups, columns = len(weight), weight.shape[-1]
    threads = min(groups, torch.get_num_threads()) if columns <= SINGLE else 1

    def begin() -> Callable[[int, int], None]:
        def do(first: int, last: int) -> None:
            for g in range(first, last):
                good = _sweep(plan, weight[g], inverse[g], out.order[g], out.losses[g])
                out.broken[g] |= not good

        return do

    with exact_products("cpu"):
        run_blocks(groups, max(1, groups // (4 * threads)), threads, begin)
    return out


def _sweep(plan: ChannelPlan, weight: Tensor, inverse: Tensor, order: Tensor, losses: Tensor) -> bool:
    """One problem, ``weight [P, Q, d]`` under ``inverse [P, d, d]``; False where it broke."""
    columns = weight.shape[-1]
    size = columns // plan.channels
    per_panel = plan.steps if columns <= SINGLE else max(1, min(plan.steps, LINES // size))
    channels = _lay_out(plan, weight, inverse, per_panel * size)
    teams = all_teams = len(channels.alive) // LANES
    good, done = kernel.begin(teams, size, channels), 0
    sink, cost = order.numpy(), losses.numpy()
    while done < plan.steps:
        steps = min(per_panel, plan.steps - done)
        here = slice(done, done + steps)
        good &= kernel.panel(steps, teams, size, all_teams, sink[here], cost[here], channels)
        done += steps
        if done < plan.steps:
            teams = kernel.compact(plan.channels - done, teams, size, all_teams, channels)
            _flush(channels, steps * size, teams * LANES * size)
    return good and bool(np.isfinite(cost).all())


def _lay_out(plan: ChannelPlan, weight: Tensor, inverse: Tensor, lines: int) -> Channels:
    """A problem by position, with memory for its panels."""
    parts, rows, columns = weight.shape
    count, size = plan.channels, columns // plan.channels
    teams = -(-count // LANES)
    length = teams * LANES * size
    slot, member = torch.arange(columns) % count, torch.arange(columns) // count
    at = (slot // LANES) * LANES * size + member * LANES + slot % LANES
    shared = not plan.own_inverses
    spread = torch.zeros(parts, length, length, dtype=torch.float64)
    spread.diagonal(dim1=1, dim2=2).fill_(1.0)
    spread[:, at[:, None], at] = inverse
    by_position = torch.zeros(parts, rows, length, dtype=torch.float64)
    by_position[..., at] = weight
    products = by_position.mT @ by_position if shared else by_position.new_zeros(0, length, length)
    entries = teams * size * size * LANES

    def zeros(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.zeros(shape)

    return Channels(
        inverse=spread.numpy(),
        products=products.numpy(),
        weight=zeros(0, length) if shared else by_position[:, 0].contiguous().numpy(),
        lines=zeros(parts * lines, length),
        pulls=zeros(lines, length if shared else 0),
        blocks=zeros(parts * entries),
        shares=zeros(entries if shared else 0),
        score=zeros(teams * LANES),
        alive=np.arange(teams * LANES) < count,
        channel=np.arange(teams * LANES),
        at_pivot=zeros(lines, size),
        pull_at_pivot=zeros(lines, size),
        block=zeros(size, size),
        share=zeros(size, size),
        scale=zeros(4, size),
        team=zeros(3 * size * size * LANES + 4 * LANES),
        ones=np.ones(LANES),
        moved=zeros(size, length),
    )


def _flush(channels: Channels, lines: int, length: int) -> None:
    """Take a panel's lines out of the lower triangles, on the positions that are left."""
    limit = len(channels.pulls)
    for part, inverse in enumerate(torch.from_numpy(channels.inverse)):
        v = torch.from_numpy(channels.lines[part * limit : part * limit + lines, :length])
        for first in range(0, length, TILE):
            last = min(length, first + TILE)
            inverse[first:last, :last].addmm_(v[:, first:last].T, v[:, :last], alpha=-1)
    for products in torch.from_numpy(channels.products):
        # v uᵀ + u vᵀ is one product of lines on top of each other.
        u = torch.from_numpy(channels.pulls[:lines, :length])
        left, right = torch.cat([v, u]), torch.cat([u, v])
        for first in range(0, length, TILE):
            last = min(length, first + TILE)
            products[first:last, :last].addmm_(left[:, first:last].T, right[:, :last], alpha=-1)
