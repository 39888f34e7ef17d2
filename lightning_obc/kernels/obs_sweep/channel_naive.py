"""The oracle of the sweep over channels: the formula of the paper, one channel at a time, for all rows (float64).

It inverts the damped Hessian itself, so that it also judges the ``inverse`` that the other backends start from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.channels import ChannelOutput, ChannelPlan, empty_output

Floats = NDArray[np.float64]


def sweep(plan: ChannelPlan) -> ChannelOutput:
    """Run the plan; results come back on the device of the weights."""
    out = empty_output(plan)
    for g in range(len(out.order)):
        problem = _Elimination(plan, g)
        for step in range(plan.steps):
            costs = [problem.cost(channel) for channel in range(plan.channels)]
            best = int(np.argmin(costs))
            out.order[g, step], out.losses[g, step] = best, costs[best]
            problem.remove(best)
        out.broken[g] = not bool(torch.isfinite(out.losses[g]).all())
    return out


class _Elimination:
    """One problem: its parts are rows that share an inverse, each with the columns that are left in it."""

    def __init__(self, plan: ChannelPlan, g: int) -> None:
        weight = plan.problem.weight[g].cpu().numpy()
        hessian = plan.problem.hessian[g].cpu().numpy()
        rows, columns = weight.shape
        keep = np.ones_like(weight, bool) if plan.problem.keep is None else plan.problem.keep[g].cpu().numpy()
        parts = np.split(np.arange(rows), rows if plan.own_inverses else 1)
        self.channel_of = np.arange(columns) % plan.channels
        self.gone: set[int] = set()
        self.left = [np.flatnonzero(keep[part].any(0)) for part in parts]
        self.weight = [weight[np.ix_(part, left)] for part, left in zip(parts, self.left, strict=True)]
        self.inverse = [np.linalg.inv(hessian[np.ix_(left, left)]) for left in self.left]

    def cost(self, channel: int) -> float:
        """``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` over all rows."""
        if channel in self.gone:
            return np.inf
        total = 0.0
        for left, weight, inverse in zip(self.left, self.weight, self.inverse, strict=True):
            inside = self.channel_of[left] == channel
            block, removed = inverse[np.ix_(inside, inside)], weight[:, inside]
            total += float(np.sum(removed * np.linalg.solve(block, removed.T).T)) / 2
        return total

    def remove(self, channel: int) -> None:
        """``w -= w_S (G_SS)⁻¹ G_S`` in every row, and ``G -= G_:S (G_SS)⁻¹ G_S:``."""
        self.gone.add(channel)
        for part, left in enumerate(self.left):
            inside = self.channel_of[left] == channel
            weight, inverse, stay = self.weight[part], self.inverse[part], ~inside
            move = np.linalg.solve(inverse[np.ix_(inside, inside)], inverse[inside][:, stay])
            self.weight[part] = weight[:, stay] - weight[:, inside] @ move
            self.inverse[part] = inverse[np.ix_(stay, stay)] - inverse[stay][:, inside] @ move
            self.left[part] = left[stay]
