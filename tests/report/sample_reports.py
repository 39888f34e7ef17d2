"""Reports of small runs, made by the engine's own result types without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_obc.grid_fitting import fit_grid
from lightning_obc.layers import adapter_for, select_layers
from lightning_obc.obs.solution import LayerSolution, Status
from lightning_obc.report import CompressionReport, LayerReport, StageReport, report_record
from lightning_obc.specs import IntGrid, Prune, Quantize

HOSTILE = "<script>alert(1)</script>"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.Linear(32, 10),
        nn.Embedding(5, 8),
    )


def sample_report(bits: int = 4, seed: int = 0) -> tuple[CompressionReport, dict[str, torch.Tensor]]:
    """A pruned and quantized network with one layer that failed and one that was left out; and its dense weights."""
    model = network()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    grid = IntGrid(bits, scale="minmax")
    pruned, quantized = [], []
    solutions = {}
    for index, (name, module) in enumerate(select_layers(model, exclude=["Embedding"]).items()):
        adapter = adapter_for(module)
        assert adapter is not None
        weight = adapter.weight_matrix(module)
        mask = torch.rand(weight.shape, generator=generator) < 0.5
        fitted = fit_grid(weight * mask, grid)
        codes = fitted.encode(weight * mask)
        solution = LayerSolution(
            fitted.dequantize(codes), mask, 0.1 * 10**-index, 0.0, 1.0, Status("numba", 0.01), fitted, codes
        )
        adapter.write_weight_(module, solution.weight)
        failed = name == "4"
        row: dict[str, Any] = {
            "name": name,
            "type": type(module).__name__,
            "shape": tuple(module.weight.shape),
            "damping_loss": 0.0,
            "held_out": 0.02 if index % 2 else None,
            "seconds": 0.1 * (index + 1),
        }
        done = {"loss": solution.loss, "relative_error": solution.relative_error, "sparsity": 0.5}
        pruned.append(LayerReport(**row, **done, stage="Prune(0.5)", bits=32, status="ok", compressed=True))
        if failed:
            status = f"kept: Cholesky failed {HOSTILE}"
            done = {"loss": 0.0, "relative_error": 0.0, "sparsity": 0.5}
            quantized.append(LayerReport(**row, **done, stage="q", bits=32, status=status, compressed=False))
        else:
            solutions[name] = solution
            quantized.append(LayerReport(**row, **done, stage="q", bits=bits, status="ok", compressed=True))
    stages = [
        StageReport("Prune(0.5)", pruned, {}, {}, 256, 1.5),
        StageReport(f"Quantize({grid})", quantized, {"3": "excluded"}, solutions, 256, 2.5),
    ]
    left = {"5": "no adapter for Embedding"}
    return CompressionReport(model, stages, left, {"accuracy": (0.99, 0.98 - 0.01 * seed)}), dense


def sample_record(bits: int = 4, seed: int = 0) -> dict[str, Any]:
    """Its record, with everything that a report can show."""
    report, dense = sample_report(bits, seed)
    curve = [(k / 20, 1e-4 * 10 ** (k / 5)) for k in range(20)]
    return report_record(
        report,
        title=f"Run {seed} & more",
        recipe=[Prune(0.5), Quantize(bits)],
        plans=["Plan of Prune(0.5): 4 layers"],
        dense=dense,
        curves=dict.fromkeys(report.solutions, curve),
        trade_off={
            "x": "size [MiB]",
            "y": "accuracy",
            "points": [{"x": 1, "y": 0.9, "label": "2 bits"}, {"x": 2, "y": 0.97}],
        },
        measured=[
            {
                "name": "float",
                "latency": 0.01,
                "spread": 0.001,
                "throughput": 100,
                "size": 4e6,
                "memory": None,
                "speedup": 1.0,
            },
            {
                "name": "int8",
                "latency": 0.004,
                "spread": 0.001,
                "throughput": 250,
                "size": 1e6,
                "memory": 3e6,
                "speedup": 2.5,
            },
        ],
    )
