"""Structured pruning: whole input channels leave, for all rows and kernel positions together.

The rows share the set that leaves, so they share ``G`` as well and one elimination serves the layer. Removing the
columns ``S`` of a channel costs ``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` (ZipLM, arXiv 2302.04089, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.obs.problem import Problem


def structured_order(problem: Problem, channels: int, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy order in which input channels leave.

    Args:
        problem: The prepared problem, ``d = positions · channels``.
        channels: Input channels per problem.
        steps: How many channels leave, over all ``g`` problems together.

    Returns:
        ``order [steps, 2]`` int64 of (problem, channel) and ``losses [steps]`` float64. Ties go to the lower index.

    Raises:
        NotPositiveDefiniteError: A pivot block is not positive definite.
    """
    groups, _, columns = problem.weight.shape
    weight, inverse = problem.weight.double().clone(), problem.inverse.clone()
    members = torch.arange(columns, device=weight.device).reshape(columns // channels, channels).T
    gone = torch.zeros(groups, channels, dtype=torch.bool, device=weight.device)
    bad = torch.zeros((), dtype=torch.bool, device=weight.device)
    order, losses = [], []
    scores = _scores(weight, inverse, members, gone, bad)
    for _ in range(steps):
        # Indices stay on the device and have a dimension (one without would be read), so that no step waits for it.
        flat = scores.argmin().reshape(1)
        group, channel = flat // channels, flat % channels
        order.append(torch.cat([group, channel]))
        losses.append(scores.flatten().index_select(0, flat)[0])
        one_weight, one_inverse = weight[group], inverse[group]
        _eliminate_(one_weight[0], one_inverse[0], members[channel][0])
        weight.index_copy_(0, group, one_weight)
        inverse.index_copy_(0, group, one_inverse)
        gone.view(-1).index_fill_(0, flat, True)
        scores = scores.index_copy(0, group, _scores(one_weight, one_inverse, members, gone[group], bad))
    if bool(bad):
        raise NotPositiveDefiniteError(
            "A channel's block of the inverse Hessian is not positive definite",
            expected="a positive definite inverse",
            remedy="use more calibration samples or a larger damping",
        )
    if not order:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return torch.stack(order), torch.stack(losses)


def _scores(weight: Tensor, inverse: Tensor, members: Tensor, gone: Tensor, bad: Tensor) -> Tensor:
    """Cost of every channel, ``[g, channels]``; infinite for those that are gone. Raises the flag ``bad`` in place."""
    blocks = inverse[:, members[:, :, None], members[:, None, :]]
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(gone[..., None, None], identity, blocks))
    bad |= torch.any(info > 0)
    columns = weight[:, :, members].permute(0, 2, 3, 1)
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    return torch.where(gone, torch.inf, half.square().sum((2, 3)) / 2)


def _eliminate_(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Fix ``columns`` of all rows ``[R, d]`` at zero, in place."""
    block, _ = torch.linalg.cholesky_ex(inverse[columns[:, None], columns])
    pivot = torch.linalg.solve_triangular(block, inverse[columns], upper=False)
    step = torch.linalg.solve_triangular(block, weight[:, columns].T, upper=False)
    weight -= step.T @ pivot
    inverse -= pivot.T @ pivot
    weight[:, columns] = 0.0
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
