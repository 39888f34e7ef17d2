"""What structured pruning gains once the channels have left: a network shaped like ResNet-18 in ONNX Runtime.

    python -m benchmarks.structured --folder structured --out benchmarks/results

In every residual block the inner channels of least norm leave: the second convolution no longer reads them, the first
one no longer makes them. Weights are random, since which channels leave changes neither size nor speed. A file with
the same zeros, but whole layers, runs beside each. Outputs are compared with the masked model's before anything is
timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.artifacts import environment
from lightning_obc.export import benchmark, benchmark_table, export_onnx, open_session, shrink

IMAGE = (1, 3, 224, 224)


def masked(share: float) -> nn.Module:
    """ResNet-18 whose blocks do not read a share of their inner channels."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("conv2"):
                assert isinstance(module, nn.Conv2d)
                order = module.weight.square().sum((0, 2, 3)).argsort()
                module.weight[:, order[: round(share * len(order))]] = 0
    return model


def write(folder: Path, x: Tensor) -> dict[str, Path]:
    """Dense, masked and smaller models as files.

    Raises:
        SystemExit: A smaller file computes something else than the masked model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"float32": folder / "dense.onnx"}
    export_onnx(masked(0.0), x, files["float32"], overwrite=True)
    for share in (0.25, 0.5, 0.75):
        model = masked(share)
        small = shrink(model, x).model
        for name, one in (("zeros alone", model), ("channels gone", small)):
            path = folder / f"{name.replace(' ', '-')}-{share:g}.onnx"
            files[f"{100 * share:.0f} % of inner channels, {name}"] = path
            export_onnx(one, x, path, overwrite=True)
            with torch.no_grad():
                expected = model(x).numpy()
            session = open_session(path, threads=1)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            if np.abs(found - expected).max() > 1e-4 * np.abs(expected).max():
                raise SystemExit(f"{path} computes something else")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where files are written")
    parser.add_argument("--out", type=Path, help="measure the files and write the table here")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    arguments = parser.parse_args()
    x = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    files = write(arguments.folder, x)
    if arguments.out is None:
        return
    measured = benchmark(files, batch=1, rounds=arguments.rounds, threads=arguments.threads)
    where = environment(arguments.threads)
    table = benchmark_table(measured, "ResNet-18, random weights, 224×224, batch 1")
    head = (
        f"Measured on {where['processor']} with {where['threads']} thread(s) of ONNX Runtime {where['onnxruntime']}; "
        f"PyTorch {where['torch']}. The files run in turns; the speed-up is the median over rounds of the dense file's "
        "time over this one's."
    )
    print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "structured.md").write_text(f"# Structured pruning, channels gone\n\n{head}\n\n{table}\n")


if __name__ == "__main__":
    main()
