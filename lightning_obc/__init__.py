"""Optimal Brain Compression (arXiv 2208.11580) for PyTorch Lightning.

Everything public is reachable from here and is imported when it is first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_obc import baselines, errors, obs
    from lightning_obc.allocation.tradeoff import search
    from lightning_obc.callbacks import (
        BatchNormReset,
        CompressedCheckpoint,
        CompressionMonitor,
        MaskGuard,
        OBCCallback,
    )
    from lightning_obc.correction_spec import Correct
    from lightning_obc.distributed import all_ranks
    from lightning_obc.export import export_onnx, load_packed, save_packed, shrink, to_semi_structured
    from lightning_obc.forecast import Plan, plan
    from lightning_obc.grids import Grid
    from lightning_obc.hessian import Hessian
    from lightning_obc.obs import LayerSolution
    from lightning_obc.pipeline import compress
    from lightning_obc.report import CompressionReport
    from lightning_obc.schedules import Gradual, Plateau
    from lightning_obc.solvers import Refine
    from lightning_obc.specs import (
        NM,
        ActivationGrid,
        Block,
        Calibration,
        IntGrid,
        Prune,
        PruneOverride,
        Quantize,
        QuantizeOverride,
        Structured,
        Unstructured,
    )

__version__ = "0.1.0"

_HOME = {
    "search": "lightning_obc.allocation.tradeoff",
    "BatchNormReset": "lightning_obc.callbacks",
    "CompressedCheckpoint": "lightning_obc.callbacks",
    "CompressionMonitor": "lightning_obc.callbacks",
    "MaskGuard": "lightning_obc.callbacks",
    "OBCCallback": "lightning_obc.callbacks",
    "Correct": "lightning_obc.correction_spec",
    "all_ranks": "lightning_obc.distributed",
    "Plan": "lightning_obc.forecast",
    "plan": "lightning_obc.forecast",
    "Grid": "lightning_obc.grids",
    "Hessian": "lightning_obc.hessian",
    "LayerSolution": "lightning_obc.obs",
    "compress": "lightning_obc.pipeline",
    "CompressionReport": "lightning_obc.report",
    "export_onnx": "lightning_obc.export",
    "load_packed": "lightning_obc.export",
    "save_packed": "lightning_obc.export",
    "shrink": "lightning_obc.export",
    "to_semi_structured": "lightning_obc.export",
    "Gradual": "lightning_obc.schedules",
    "Plateau": "lightning_obc.schedules",
    "Refine": "lightning_obc.solvers",
    "NM": "lightning_obc.specs",
    "ActivationGrid": "lightning_obc.specs",
    "Block": "lightning_obc.specs",
    "Calibration": "lightning_obc.specs",
    "IntGrid": "lightning_obc.specs",
    "Prune": "lightning_obc.specs",
    "PruneOverride": "lightning_obc.specs",
    "Quantize": "lightning_obc.specs",
    "QuantizeOverride": "lightning_obc.specs",
    "Structured": "lightning_obc.specs",
    "Unstructured": "lightning_obc.specs",
}
_MODULES = ("baselines", "errors", "obs")

__all__ = [
    "NM",
    "ActivationGrid",
    "BatchNormReset",
    "Block",
    "Calibration",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "CompressionReport",
    "Correct",
    "Gradual",
    "Grid",
    "Hessian",
    "IntGrid",
    "LayerSolution",
    "MaskGuard",
    "OBCCallback",
    "Plan",
    "Plateau",
    "Prune",
    "PruneOverride",
    "Quantize",
    "QuantizeOverride",
    "Refine",
    "Structured",
    "Unstructured",
    "__version__",
    "all_ranks",
    "baselines",
    "compress",
    "errors",
    "export_onnx",
    "load_packed",
    "obs",
    "plan",
    "save_packed",
    "search",
    "shrink",
    "to_semi_structured",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
