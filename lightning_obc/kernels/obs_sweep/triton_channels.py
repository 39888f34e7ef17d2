"""The sweep over channels on CUDA: two launches of Triton a step, and matrix products between panels.

All problems take their steps side by side. How far each shrinks is known, so that nothing waits for the device.
Index legend as in :mod:`.triton_channel_kernels`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from lightning_obc.kernels.hessian_update.precision import exact_products
from lightning_obc.kernels.obs_sweep.channels import ChannelOutput, ChannelPlan, empty_output, start
from lightning_obc.kernels.obs_sweep.triton_channel_kernels import (
    Channels,
    choose_kernel,
    eliminate_kernel,
    start_kernel,
)
from lightning_obc.kernels.obs_sweep.triton_chunk import register_limit

# Lines of a panel.
LINES = 64
# Numbers that a program holds of its blocks, and of its rows: 4 for each of 256 threads, so that two programs share a
# multiprocessor. One channel of more than 32 columns alone is 4096.
_HELD = 1024


def sweep(plan: ChannelPlan) -> ChannelOutput:
    """Run the plan on the device of its weights."""
    out = empty_output(plan)
    device = out.losses.device
    with exact_products(device.type), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        weight, inverse, bad = start(plan)
        out.broken.logical_or_(bad)
        size = weight.shape[-1] // plan.channels
        per_panel = max(1, min(plan.steps, LINES // size))
        channels = _lay_out(plan, weight, inverse, per_panel * size)
        _launch_start(channels, size)
        pivot, done = torch.empty(len(weight), dtype=torch.int64, device=device), 0
        while done < plan.steps:
            steps = min(per_panel, plan.steps - done)
            for step in range(steps):
                _choose(channels, pivot, out, done + step)
                _eliminate(channels, pivot, step * size, size)
            done += steps
            out.broken.logical_or_(channels.broken.view(len(weight), -1).any(1))
            if done < plan.steps:
                channels = _flushed(channels, steps * size, plan.channels - done, size)
    out.broken.logical_or_(~torch.isfinite(out.losses).all(1))
    return out


def _lay_out(plan: ChannelPlan, weight: Tensor, inverse: Tensor, lines: int) -> Channels:
    """All problems with the columns of a channel side by side, and memory for their panels."""
    groups, parts, _, columns = weight.shape
    count, size = plan.channels, columns // plan.channels
    device, shared = weight.device, not plan.own_inverses
    at = torch.arange(columns, device=device).reshape(size, count).T.flatten()
    ordered = weight[..., at]
    products = (ordered.mT @ ordered)[:, 0].contiguous() if shared else None
    return Channels(
        inverse=inverse[:, :, at[:, None], at].reshape(groups * parts, columns, columns).contiguous(),
        products=products,
        weight=None if shared else ordered.reshape(groups * parts, columns).clone(),
        lines=weight.new_empty(groups * parts, lines, columns),
        pulls=weight.new_empty(groups, lines, columns) if shared else None,
        blocks=weight.new_empty(groups * parts, count, size, size),
        shares=weight.new_empty(groups, count, size, size) if shared else None,
        factor=weight.new_empty(groups * parts, triton.cdiv(count, _tile(size)["TILE"]), 1 + shared, size, size),
        score=weight.new_empty(groups, parts, count),
        channel=torch.arange(count, device=device).expand(groups, count).contiguous(),
        broken=torch.zeros(groups * parts, dtype=torch.int32, device=device),
    )


def _tile(size: int) -> dict[str, int]:
    """Channels of a program, and the power of two from the columns of one."""
    padded = triton.next_power_of_2(size)
    return {"TILE": max(1, min(64, _HELD // padded**2)), "SIZE": padded}


def _options(size: int) -> dict[str, int | bool]:
    """Threads and registers of a program. Left alone, the compiler spills to make room for programs there are not."""
    return {"num_warps": 8, "enable_fp_fusion": True} | register_limit(128 if size <= 32 else 255)


def _grid(channels: Channels, tile: int) -> tuple[int, int]:
    return len(channels.inverse), triton.cdiv(channels.score.shape[2], tile)


def _launch_start(channels: Channels, size: int) -> None:
    _, parts, count = channels.score.shape
    tile = _tile(size)
    start_kernel[_grid(channels, tile["TILE"])](channels, parts, count, size, **tile, **_options(size))


def _choose(channels: Channels, pivot: Tensor, out: ChannelOutput, step: int) -> None:
    groups, parts, count = channels.score.shape
    choose_kernel[(groups,)](
        channels.score,
        channels.channel,
        pivot,
        out.order[:, step:],
        out.losses[:, step:],
        out.order.shape[1],
        parts,
        count,
        COLS=triton.next_power_of_2(count),
        enable_fp_fusion=False,
    )


def _eliminate(channels: Channels, pivot: Tensor, done: int, size: int) -> None:
    _, parts, count = channels.score.shape
    tile = _tile(size)
    limit = channels.lines.shape[1]
    eliminate_kernel[_grid(channels, tile["TILE"])](
        channels, pivot, done, limit, parts, count, size, **tile, **_options(size)
    )


def _flushed(channels: Channels, lines: int, count: int, size: int) -> Channels:
    """The living channels alone, in their order, with a panel's lines taken out of ``G`` and ``A``."""
    groups, parts, _ = channels.score.shape
    dead = torch.isinf(channels.score[:, 0]).to(torch.int8)
    alive = torch.argsort(dead, dim=1, stable=True)[:, :count]
    columns = (alive[:, :, None] * size + torch.arange(size, device=alive.device)).flatten(1)
    by_part, slots = columns.repeat_interleave(parts, 0), alive.repeat_interleave(parts, 0)

    def taken(tensor: Tensor, at: Tensor) -> Tensor:
        """Entries of the last dimension of ``[n, ·, …]``."""
        return tensor.gather(-1, at[:, None].expand(-1, tensor.shape[1], -1)).contiguous()

    def square(matrix: Tensor, at: Tensor) -> Tensor:
        return taken(matrix.gather(1, at[:, :, None].expand(-1, -1, matrix.shape[2])), at)

    def blocks(tensor: Tensor, at: Tensor) -> Tensor:
        return tensor.gather(1, at[:, :, None, None].expand(-1, -1, size, size))

    v = taken(channels.lines[:, :lines], by_part)
    inverse = square(channels.inverse, by_part).baddbmm_(v.mT, v, alpha=-1)
    products = pulls = shares = None
    if channels.products is not None and channels.pulls is not None and channels.shares is not None:
        u = taken(channels.pulls[:, :lines], columns)
        products = square(channels.products, columns).baddbmm_(v.mT, u, alpha=-1).baddbmm_(u.mT, v, alpha=-1)
        pulls = u.new_empty(groups, channels.pulls.shape[1], columns.shape[1])
        shares = blocks(channels.shares, alive)
    return Channels(
        inverse=inverse,
        products=products,
        weight=None if channels.weight is None else channels.weight.gather(1, by_part),
        lines=v.new_empty(len(v), channels.lines.shape[1], columns.shape[1]),
        pulls=pulls,
        blocks=blocks(channels.blocks, slots),
        shares=shares,
        factor=channels.factor,
        score=taken(channels.score, alive),
        channel=channels.channel.gather(1, alive),
        broken=channels.broken,
    )
