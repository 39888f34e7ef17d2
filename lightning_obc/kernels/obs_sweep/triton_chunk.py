"""A chunk of rows through the Triton kernels: panels, compaction, flushes; all queued without waiting for the device.

Index legend as in :mod:`.triton_kernels`. How many slots a panel can leave alive is bounded from what is known before
the sweep, so that no launch depends on a number the device has yet to compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from lightning_obc.kernels.obs_sweep.triton_block_kernels import BlockSizes, block_panel_kernel
from lightning_obc.kernels.obs_sweep.triton_kernels import RUNNING, WORN, Lines, Sizes, Working, panel_kernel
from lightning_obc.kernels.obs_sweep.triton_move import move_kernel
from lightning_obc.kernels.obs_sweep.types import OUTLIER_TOLERANCE, REFRESH, WORN_FLOAT32, SweepPlan

# Lines of G start at multiples of this many elements, so that the kernels load 16 bytes at a time.
ALIGNMENT = 16


@dataclass(frozen=True)
class Tuning:
    """Launch parameters; ``docs/gpu.md`` says where the figures come from.

    Attributes:
        rows: Rows of a program.
        columns: Most slots of a tile; a power of two.
        depth: Earlier columns of a panel that are loaded at a time.
        lines: Lines of ``G`` that a program of the compaction moves.
        steps: Most columns of a panel.
    """

    rows: int = 1
    columns: int = 1024
    depth: int = 8
    lines: int = 4
    steps: int = 128

    def tile(self, size: int) -> int:
        """Slots of a tile for a working set: no wider than it needs, and at least a warp's."""
        return min(self.columns, max(128, triton.next_power_of_2(size)))

    def warps(self, size: int, itemsize: int) -> int:
        """16 bytes per thread: the sum over a panel's earlier columns then stays within a thread."""
        return max(1, self.tile(size) * itemsize // 512)

    def places(self, size: int, itemsize: int) -> int:
        """Blocks of a tile: one per thread, and at least a warp's on a GPU."""
        return max(1, self.tile(size) * itemsize // 16)

    def panel(self, size: int) -> int:
        """Columns of a panel that starts with ``size`` slots: wide working sets make flushes dear, narrow cheap."""
        return min(self.steps, size, 128 if size > 1536 else 64 if size > 512 else 32)


@dataclass(frozen=True)
class Job:
    """What the chunks of one sweep share.

    Attributes:
        plan: The checked problem.
        lines: Its rows, and the outputs.
        tuning: Launch parameters.
        slack: Steps that a fresh row's groups can swallow without one of them closing.
        extra: Columns that leave, not eliminated, with each step after those.
        block: ``c`` of a sweep over blocks of that many consecutive columns; None when single columns leave.
    """

    plan: SweepPlan
    lines: Lines
    tuning: Tuning
    slack: int = 0
    extra: int = 0
    block: int | None = None

    @property
    def columns(self) -> int:
        return self.plan.problem.weight.shape[2]

    @property
    def each(self) -> int:
        """Columns eliminated by a step."""
        return self.block or 1

    def panel(self, size: int) -> int:
        """Steps of a panel that starts with ``size`` slots."""
        return max(1, self.tuning.panel(size) // self.each)


@dataclass
class Chunk:
    """Rows in flight.

    Attributes:
        matrix: ``[n, ≥ m, line]``, ``G``: of the ``n`` problems while shared, then of the ``P`` rows.
        shared: Whether rows of a problem still share its ``G``; slots are columns then.
        size: ``m``.
        remaining: Most steps that a row has still to make.
        slack, extra: As in :class:`Job`, from here on.
        working: State of the rows.
        made: Steps queued so far.
        begun: ``m`` at the start.
    """

    matrix: Tensor
    shared: bool
    size: int
    remaining: int
    slack: int
    extra: int
    working: Working
    made: int = 0
    begun: int = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.size

    @property
    def rows(self) -> int:
        return len(self.working.row)

    @property
    def width(self) -> int:
        return self.working.weight.shape[1]


def aligned(size: int) -> int:
    """``size`` rounded up to whole vectors."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def bytes_per_row(job: Job) -> int:
    """Working memory of one row in flight: its ``G``, its panel, and vectors of state and of compaction indices."""
    width, steps = aligned(job.columns), job.panel(job.columns) * job.each
    vectors = steps + 4 + job.each
    return job.plan.problem.weight.element_size() * width * (width + vectors) + 80 * width


def run(job: Job, chunk: Chunk) -> None:
    """Eliminate until every row has ended, broken or worn out, or few columns are left and all count as worn out.

    Queues work; waits for nothing.
    """
    while chunk.size > 0 and chunk.remaining > 0:
        steps = min(job.panel(chunk.size), chunk.remaining)
        if job.block is None:
            _launch_panel(job, chunk, steps)
        else:
            _launch_block_panel(job, chunk, steps, job.block)
        chunk.remaining -= steps
        chunk.made += steps
        # Groups can swallow ``slack`` steps without closing; every later step closes one and takes ``extra`` more.
        closing = max(0, steps - chunk.slack)
        chunk.slack = max(0, chunk.slack - steps)
        smaller = chunk.size - steps * job.each - closing * chunk.extra
        if smaller <= 0 or chunk.remaining == 0:
            return
        if job.plan.groups is None and REFRESH * smaller <= chunk.begun:
            status = chunk.working.status
            status.masked_fill_(status == RUNNING, WORN)
            return
        _compact(job, chunk, smaller, steps * job.each)
        _flush(chunk, steps * job.each)


def _launch_panel(job: Job, chunk: Chunk, steps: int) -> None:
    plan, tuning, working = job.plan, job.tuning, chunk.working
    dtype = working.weight.dtype
    warps = tuning.warps(chunk.size, dtype.itemsize)
    sizes = Sizes(
        stride=chunk.matrix.stride(0),
        line=chunk.matrix.stride(1),
        width=chunk.width,
        panel=working.panel.stride(0),
        columns=job.columns,
        length=plan.steps,
        groups=0 if plan.groups is None else len(plan.groups.quota),
    )
    panel_kernel[(triton.cdiv(chunk.rows, tuning.rows),)](
        job.lines,
        working,
        sizes,
        chunk.matrix,
        chunk.rows,
        chunk.size,
        steps,
        chunk.made,
        MAX_CODE=0 if plan.grid is None else plan.grid.max_code,
        FAR=0.5 * (1 + OUTLIER_TOLERANCE),
        WORN_RATIO=_worn_ratio(dtype),
        ROWS=tuning.rows,
        COLS=tuning.tile(chunk.size),
        DEPTH=tuning.depth,
        num_warps=warps,
        # Contraction would give a weight that lies on its grid point an error.
        enable_fp_fusion=False,
        # Two programs of 256 threads share a multiprocessor. Left alone, the compiler spills to make room for a third.
        **register_limit(128 if warps == 8 else None),
    )


def register_limit(registers: int | None) -> dict[str, int]:
    """Options of a launch that hold the compiler to so many registers; AMD's has no such option."""
    return {} if registers is None or torch.version.hip is not None else {"maxnreg": registers}


def _worn_ratio(dtype: torch.dtype) -> float:
    return WORN_FLOAT32 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps


def _launch_block_panel(job: Job, chunk: Chunk, steps: int, block: int) -> None:
    tuning, working = job.tuning, chunk.working
    dtype, filled = working.weight.dtype, triton.next_power_of_2(block)
    warps = tuning.warps(chunk.size, dtype.itemsize)
    sizes = BlockSizes(
        stride=chunk.matrix.stride(0),
        line=chunk.matrix.stride(1),
        width=chunk.width,
        panel=working.panel.stride(0),
        blocks=working.diagonal.stride(0),
        columns=job.columns,
        length=job.plan.steps,
    )
    block_panel_kernel[(triton.cdiv(chunk.rows, tuning.rows),)](
        job.lines,
        working,
        sizes,
        chunk.matrix,
        chunk.rows,
        chunk.size,
        steps,
        chunk.made,
        WORN_RATIO=_worn_ratio(dtype),
        SIZE=block,
        C=filled,
        ROWS=tuning.rows,
        COLS=tuning.tile(chunk.size),
        PLACES=tuning.places(chunk.size, dtype.itemsize),
        DEPTH=max(1, tuning.depth // filled),
        num_warps=warps,
        enable_fp_fusion=False,
        # Left alone, the compiler spills a few bytes to keep small programs within 128 or 168 registers.
        **register_limit(255 if warps <= 2 else None),
    )


def _compact(job: Job, chunk: Chunk, size: int, lines: int) -> None:
    """Move what lives in the last slots into dead ones before them, in ``G``, panel and state."""
    working = chunk.working
    hole, source = _moves(working.column[:, : chunk.size], size)
    origin = torch.arange(chunk.size, device=hole.device).expand(chunk.rows, -1).scatter(1, hole, source)
    if chunk.shared:
        line = aligned(size)
        matrix = chunk.matrix.new_empty(chunk.rows, size, line)
        every = torch.arange(size, device=hole.device).expand(chunk.rows, -1).contiguous()
        _move(job, chunk, matrix, every, origin, size)
        chunk.matrix, chunk.shared = matrix, False
        working.owner.copy_(torch.arange(chunk.rows, device=hole.device))
    else:
        _move(job, chunk, chunk.matrix, hole, origin, size)
    for state in (working.weight, working.column):
        state.scatter_(1, hole, state.gather(1, source))
    panel = working.panel[:, :lines]
    panel.scatter_(2, hole[:, None].expand(-1, lines, -1), panel.gather(2, source[:, None].expand(-1, lines, -1)))
    chunk.size = size


def _moves(column: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Dead slots below ``size`` and the living slots from there on that take their places, both ``[P, m - size]``.

    Where there are fewer, the last slot takes its own place, which changes nothing.
    """
    rows, total = column.shape
    room = total - size
    dead, alive = column[:, :size] < 0, column[:, size:] >= 0
    count = alive.sum(1, keepdim=True)

    def places(chosen: Tensor, first: int) -> Tensor:
        # The extra place at the end takes everything that is not chosen or has no partner.
        rank = chosen.cumsum(1) - 1
        index = torch.where(chosen & (rank < count), rank, room)
        slot = torch.arange(first, first + chosen.shape[1], device=column.device).expand(rows, -1)
        return slot.new_full((rows, room + 1), total - 1).scatter_(1, index, slot)[:, :room]

    idle = torch.arange(room, device=column.device) >= count
    hole = places(dead, 0).masked_fill_(idle, total - 1)
    source = places(alive, size).masked_fill_(idle, total - 1)
    return hole.contiguous(), source.contiguous()


def _move(job: Job, chunk: Chunk, target: Tensor, hole: Tensor, origin: Tensor, size: int) -> None:
    tuning = job.tuning
    move_kernel[(triton.cdiv(chunk.rows, tuning.rows), triton.cdiv(hole.shape[1], tuning.lines))](
        chunk.matrix,
        chunk.matrix.stride(0),
        chunk.matrix.stride(1),
        chunk.working.owner,
        target,
        target.stride(0),
        target.stride(1),
        hole,
        origin,
        chunk.rows,
        size,
        hole.shape[1],
        origin.stride(0),
        MIRROR=not chunk.shared,
        ROWS=tuning.rows,
        LINES=tuning.lines,
        COLS=tuning.tile(size),
        num_warps=4,
        enable_fp_fusion=False,
    )


def _flush(chunk: Chunk, lines: int) -> None:
    """``G -= V Vᵀ`` on the slots that are left."""
    panel = chunk.working.panel[:, :lines, : chunk.size]
    chunk.matrix[:, : chunk.size, : chunk.size].baddbmm_(panel.mT, panel, alpha=-1)
