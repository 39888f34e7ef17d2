"""Other solvers with the engine's interface, for comparison and for very wide layers."""

from lightning_obc.baselines.adaprune import adaprune
from lightning_obc.baselines.gptq import gptq
from lightning_obc.baselines.magnitude import magnitude
from lightning_obc.baselines.rounding import round_to_nearest
from lightning_obc.baselines.sparsegpt import sparsegpt

__all__ = ["adaprune", "gptq", "magnitude", "round_to_nearest", "sparsegpt"]
