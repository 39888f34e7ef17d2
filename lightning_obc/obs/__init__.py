"""The OBS engine on matrices: sweep, prune, quantize."""

from lightning_obc.obs.block_sweep import BlockSweep, sweep_blocks
from lightning_obc.obs.problem import Problem, prepare
from lightning_obc.obs.prune import prune
from lightning_obc.obs.quantize import quantize
from lightning_obc.obs.solution import LayerSolution, Status
from lightning_obc.obs.structured import StructuredSweep, sweep_structured
from lightning_obc.obs.sweep import Sweep, sweep

__all__ = [
    "BlockSweep",
    "LayerSolution",
    "Problem",
    "Status",
    "StructuredSweep",
    "Sweep",
    "prepare",
    "prune",
    "quantize",
    "sweep",
    "sweep_blocks",
    "sweep_structured",
]
