"""Post-training quantization: 4-bit weights from 512 images, without any training.

    python -m examples.post_training

The model is changed in place. What comes back, a report, has one row per layer and all that export needs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from jsonargparse import auto_cli

import lightning_obc as obc
from examples.digits import CHECKPOINT, accuracy, trained


def main(checkpoint: str = CHECKPOINT) -> dict[str, float]:
    """Quantize, print the layers, and compare with the dense network.

    Args:
        checkpoint: The trained network; it is trained first where there is none.
    """
    model, data = trained(checkpoint)
    dense = accuracy(model, data)

    report = obc.compress(model, data.train_dataloader(), obc.Quantize(4), calibration=obc.Calibration(samples=512))
    print(report.table())

    small = accuracy(model, data)
    with tempfile.TemporaryDirectory() as folder:
        packed = obc.save_packed(model, report.solutions, Path(folder) / "digits.safetensors")
    print(f"test accuracy with 4-bit weights: {100 * small:.2f} % (dense float32: {100 * dense:.2f} %)")
    print(f"file: {packed.size / 1024:.0f} KiB (dense float32: {packed.dense_size / 1024:.0f} KiB)")
    return {"dense": dense, "compressed": small, "ratio": packed.ratio}


if __name__ == "__main__":
    auto_cli(main)
