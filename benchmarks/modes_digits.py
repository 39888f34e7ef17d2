"""Output error of the digits network by calibration mode, on images that neither training nor calibration has seen.

python -m benchmarks.modes_digits --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_obc as obc
from benchmarks.machine import describe
from benchmarks.search import trained_digits

STAGES = {
    "4 bits": obc.Quantize(4),
    "3 bits": obc.Quantize(3),
    "2:4": obc.Prune("2:4", misfit="skip"),
    "80 % zeros": obc.Prune(0.8),
}
MODES: dict[str, dict[str, Any]] = {
    "independent": {},
    "independent, biases": {"bias": True},
    "sequential by layer": {"mode": "sequential"},
    "asymmetric by block": {"mode": "asymmetric", "together": "block"},
    "asymmetric by layer": {"mode": "asymmetric"},
    "asymmetric by layer, half": {"mode": "asymmetric", "mixing": 0.5},
    "asymmetric by layer, biases": {"mode": "asymmetric", "bias": True},
}


@torch.no_grad()
def measure(model: nn.Module, fit: Tensor, unseen: tuple[Tensor, Tensor], stage: Any, mode: dict[str, Any]) -> Any:
    """Relative squared error of the outputs, accuracy, and seconds."""
    small, started = copy.deepcopy(model), time.perf_counter()
    spec = obc.Calibration(samples=len(fit), batch_size=128, **mode)
    obc.compress(small, fit, stage, calibration=spec, on_failure="raise")
    seconds = time.perf_counter() - started
    wanted, found = model(unseen[0]), small(unseen[0])
    error = float((found - wanted).square().sum() / wanted.square().sum())
    return {"error": error, "accuracy": float((found.argmax(1) == unseen[1]).float().mean()), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--samples", type=int, default=1024)
    options = parser.parse_args()
    model, (images, _), unseen = trained_digits()
    fit = images[: options.samples]
    with torch.no_grad():
        dense = float((model(unseen[0]).argmax(1) == unseen[1]).float().mean())
    rows = {
        name: {level: measure(model, fit, unseen, stage, mode) for level, stage in STAGES.items()}
        for name, mode in MODES.items()
    }
    lines = ["| mode | " + " | ".join(STAGES) + " |", "|---|" + "---|" * len(STAGES)]
    for name, row in rows.items():
        cells = [f"{100 * case['error']:.3g} %, {100 * case['accuracy']:.1f} %" for case in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = (
        f"# Calibration modes on the digits network\n\nCalibrated on {len(fit)} training images, measured on "
        f"{len(unseen[0])} that neither training nor calibration has seen; dense accuracy {100 * dense:.1f} %. No "
        "batch-norm reset, no training.\n\nCells: squared error of the network's outputs relative to the dense "
        f"outputs, and accuracy.\n\n{chr(10).join(lines)}\n\nRan on {describe()}.\n"
    )
    record = {"samples": len(fit), "dense_accuracy": dense, "machine": describe(), "modes": rows}
    (options.out / "modes_digits.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "modes_digits.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
