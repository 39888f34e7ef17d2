"""The OBS sweep: every backend behind two functions, a third for blocks of columns that leave together, a fourth for
input channels that leave in all rows at once.

``naive`` is the oracle (float64, one weight at a time), ``torch`` runs panels in batched torch on any device,
``numba`` is the CPU default. Backends are imported when first used.
"""

from __future__ import annotations

from lightning_obc.kernels.obs_sweep.blocks import ColumnBlocks, block_backend, sweep_blocks
from lightning_obc.kernels.obs_sweep.channels import ChannelOutput, channel_backend, sweep_channels
from lightning_obc.kernels.obs_sweep.dispatch import resolve_among, resolve_backend, sweep_prune, sweep_quantize
from lightning_obc.kernels.obs_sweep.types import GridInput, NMGroups, SweepInput, SweepOutput

__all__ = [
    "ChannelOutput",
    "ColumnBlocks",
    "GridInput",
    "NMGroups",
    "SweepInput",
    "SweepOutput",
    "block_backend",
    "channel_backend",
    "resolve_among",
    "resolve_backend",
    "sweep_blocks",
    "sweep_channels",
    "sweep_prune",
    "sweep_quantize",
]
