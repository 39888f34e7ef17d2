"""Export and deployment: 8-bit weights and activations as ONNX, run and timed in ONNX Runtime.

    python -m examples.onnx_runtime

The file holds exactly the codes, scales and zero points that the engine found; nothing is fitted again. The digits
network is far too small to become faster; benchmarks/results/artifacts.md has networks that do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli

import lightning_obc as obc
from examples.digits import CHECKPOINT, accuracy, trained
from lightning_obc.export import benchmark, benchmark_table, open_session


def main(checkpoint: str = CHECKPOINT, rounds: int = 100) -> dict[str, float]:
    """Quantize, export, and compare accuracy, size and latency with the dense network.

    Args:
        checkpoint: The trained network; it is trained first where there is none.
        rounds: Timed runs of each file.
    """
    model, data = trained(checkpoint)
    images, labels = next(iter(data.test_dataloader()))
    train = torch.stack([image for image, _ in data.train])
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("float32", "int8")}
        obc.export_onnx(model, images[:1], files["float32"])
        dense = accuracy(model, data)

        report = obc.compress(model, train, obc.Quantize(8), calibration=obc.Calibration(samples=512))
        done = obc.export_onnx(
            model, images[:1], files["int8"], solutions=report.solutions, calibration=train[:512].split(64)
        )
        assert len(done.weights) == len(report.solutions), "every layer is stored as integers"

        session = open_session(files["int8"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        small = float((torch.from_numpy(logits).argmax(1) == labels).double().mean())
        measured = benchmark(files, batch=64, rounds=rounds, threads=1)
    print(benchmark_table(measured, "Digits CNN, batch 64, one thread; speed-up relative to float32"))
    print(f"test accuracy in ONNX Runtime, 8 bits: {100 * small:.2f} % (PyTorch, float32: {100 * dense:.2f} %)")
    return {"dense": dense, "compressed": small, "smaller": measured[0].size / measured[1].size}


if __name__ == "__main__":
    auto_cli(main)
