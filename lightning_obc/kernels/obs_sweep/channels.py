"""The sweep over whole input channels, which leave for all rows and kernel positions together.

The rows share what leaves, so they share ``G``: one elimination of ``d`` columns serves all of them, where the other
sweeps make one for every row. It costs no more than the inverse that it starts from, and is made in float64 throughout.
Removing the columns ``S`` of a channel costs ``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` (paper, section 4, "block-sparsity", summed
over the rows; ZipLM, arXiv 2302.04089, section 3.1).

Problems of a layer do not touch each other, so each has an order of its own; the caller merges them.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns; ``C`` channels of ``s`` columns (``d = s·C``, and column
``k·C + c`` is position ``k`` of channel ``c``); ``P`` inverses of a problem with ``Q`` rows each, ``P·Q = R`` and ``P``
is 1 or ``R``; ``T`` steps.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.obs_sweep.dispatch import check_problem, resolve_among
from lightning_obc.kernels.obs_sweep.types import SweepInput

# A backend is a module with ``sweep(plan)``.
_MODULES = {
    "naive": "lightning_obc.kernels.obs_sweep.channel_naive",
    "torch": "lightning_obc.kernels.obs_sweep.channel_torch",
    "numba": "lightning_obc.kernels.obs_sweep.channel_compiled",
    "triton": "lightning_obc.kernels.obs_sweep.triton_channels",
}
# A program holds whole diagonal blocks in its registers.
LARGEST_TRITON_CHANNEL = 64
# The compiled sweep works on the diagonal blocks of 16 channels at a time, also where there are fewer, and from about
# 16 positions on these are larger than the first cache. On channels of that many positions torch was faster (at 16 as
# fast, within 3 %) up to so many channels, with one inverse and with one for every row
# (``benchmarks/results/channels_1core.md``).
TORCH_POSITIONS, TORCH_CHANNELS, TORCH_OWN_CHANNELS = 16, 32, 8


@dataclass(frozen=True)
class ChannelPlan:
    """A checked problem, as every backend receives it.

    Attributes:
        problem: In float64. Weights of ``keep=False`` are zero already, cost nothing and stay out of the elimination.
        channels: ``C``.
        steps: ``T``, the channels that leave each problem.
        own_inverses: Every row has an inverse of its own, without its zeros (``P = R``); otherwise all rows of a
            problem have one, without the columns that are zero in all of them (``P = 1``).
    """

    problem: SweepInput
    channels: int
    steps: int
    own_inverses: bool

    def alive(self) -> Tensor | None:
        """``[g, P, d]`` bool, columns that are not zero already; None where all are."""
        keep = self.problem.keep
        if keep is None:
            return None
        alive = keep if self.own_inverses else keep.any(1, keepdim=True)
        return None if bool(alive.all()) else alive


@dataclass(frozen=True)
class ChannelOutput:
    """What an elimination of channels recorded.

    Attributes:
        order: ``[g, T]`` int64, channel that left at each step. Ties go to the lower channel.
        losses: ``[g, T]`` float64, the increase of the damped loss of all rows at each step.
        broken: ``[g]`` bool, True where the block of a channel was not positive definite.
    """

    order: Tensor
    losses: Tensor
    broken: Tensor


def channel_backend(
    backend: str, device_type: str, positions: int, channels: int | None = None, own_inverses: bool = False
) -> str:
    """What sweeps channels of ``positions`` columns when ``backend`` is asked for.

    Args:
        backend: What was asked for; ``"auto"`` takes what was measured to be faster.
        device_type: Where the weights are.
        positions: Columns of a channel.
        channels: How many there are; None where only the errors matter.
        own_inverses: Whether every row has an inverse of its own.

    Raises:
        BackendError: ``"triton"`` for channels of more than 64 columns, or a backend that cannot run there.
    """
    allowed = tuple(name for name in _MODULES if name != "triton" or positions <= LARGEST_TRITON_CHANNEL)
    name = resolve_among(backend, device_type, allowed, f"channels of {positions} columns")
    few = channels is not None and channels <= (TORCH_OWN_CHANNELS if own_inverses else TORCH_CHANNELS)
    return "torch" if backend == "auto" and name == "numba" and positions >= TORCH_POSITIONS and few else name


def sweep_channels(
    problem: SweepInput, channels: int, steps: int, *, own_inverses: bool = False, backend: str = "auto"
) -> ChannelOutput:
    """Eliminate channels of every problem, cheapest first.

    Args:
        problem: Weights ``[g, R, d]`` in float64 with the damped Hessian and its inverse. Weights of ``keep=False`` are
            zero, and stay out.
        channels: ``C``, input channels of a problem.
        steps: Channels that leave each problem, at most ``C``.
        own_inverses: See :class:`ChannelPlan`.
        backend: As of :func:`~lightning_obc.kernels.obs_sweep.sweep_prune`. ``"naive"`` is to be read and compared
            with; it inverts the Hessian itself.

    Raises:
        ShapeError, NonFiniteError, BackendError: As of :func:`~lightning_obc.kernels.obs_sweep.sweep_prune`; or weights
            that are not float64, or channels that do not divide the columns.
    """
    check_problem(problem)
    columns = problem.weight.shape[2]
    if problem.weight.dtype != torch.float64:
        raise ShapeError("Channels are swept in float64", got=problem.weight.dtype, expected="torch.float64")
    if channels < 1 or columns % channels or not 0 <= steps <= channels:
        raise ShapeError(
            "Channels do not fit the problem",
            got=f"{steps} of {channels} channels, {columns} columns",
            expected="channels that divide the columns, and no more steps than channels",
        )
    name = channel_backend(backend, problem.weight.device.type, columns // channels, channels, own_inverses)
    plan = ChannelPlan(problem, channels, steps, own_inverses)
    return empty_output(plan) if steps == 0 else importlib.import_module(_MODULES[name]).sweep(plan)


def empty_output(plan: ChannelPlan) -> ChannelOutput:
    """The output before the first step."""
    weight = plan.problem.weight
    order = torch.full((len(weight), plan.steps), -1, dtype=torch.int64, device=weight.device)
    return ChannelOutput(order, weight.new_zeros(order.shape), torch.zeros_like(order[:, 0:0]).any(1))


def start(plan: ChannelPlan) -> tuple[Tensor, Tensor, Tensor]:
    """What the fast backends begin with.

    Returns:
        Weights ``[g, P, Q, d]``; inverses ``[g, P, d, d]`` of the damped Hessian on what is not zero already, and the
        identity on what is; where a restricted Hessian was not positive definite, ``[g]`` bool. The identity is coupled
        with nothing, so that a channel with zeros has a positive definite block. Nobody may write to the first two.
    """
    problem, alive = plan.problem, plan.alive()
    groups, rows, columns = problem.weight.shape
    parts = rows if plan.own_inverses else 1
    weight = problem.weight.reshape(groups, parts, rows // parts, columns)
    if alive is None:
        bad = torch.zeros(groups, dtype=torch.bool, device=weight.device)
        return weight, problem.inverse[:, None].expand(groups, parts, columns, columns), bad
    restricted = problem.hessian[:, None] * (alive[..., None] & alive[..., None, :])
    restricted.diagonal(dim1=-2, dim2=-1).add_((~alive).double())
    factor, info = torch.linalg.cholesky_ex(restricted)
    return weight, torch.cholesky_inverse(factor), (info > 0).any(1)
