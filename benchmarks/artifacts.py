"""What exported files weigh and how fast they run here: the digits CNN and a network shaped like ResNet-18.

    python -m benchmarks.artifacts digits resnet18 --folder artifacts
    python -m benchmarks.artifacts --folder artifacts --out benchmarks/results

The first command writes the files, the second one measures them. On Linux the second one can also measure the kernels
of a processor that has AVX2 alone, by hiding AVX-512 and VNNI of one that has more:

    cc -O2 -shared -fPIC -o hide.so benchmarks/hide_avx512.c
    LD_PRELOAD=./hide.so python -m benchmarks.artifacts --folder artifacts --out benchmarks/results

Every file of a network is run in turns with the others. The digits CNN is trained and compressed by OBS; ResNet-18 has
random weights rounded to nearest, since how codes were found changes neither size nor speed.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.export import (
    CompressedWeight,
    benchmark,
    benchmark_table,
    compressed_state,
    export_onnx,
    open_session,
    save_packed,
)
from lightning_obc.export.saturation import has_vnni
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.layers import adapter_for, select_layers

EIGHT = obc.IntGrid(8, symmetric=True)
FOUR = obc.IntGrid(4)


@dataclass(frozen=True)
class Artifact:
    """A compressed model that becomes a file.

    Attributes:
        name: What was done to it.
        model: The model.
        state: Its compressed weights.
        integer: True to quantize activations as well.
    """

    name: str
    model: nn.Module
    state: dict[str, CompressedWeight]
    integer: bool = False


def nearest_(model: nn.Module, grid: obc.IntGrid | None, pattern: str | None = None) -> dict[str, CompressedWeight]:
    """Prune by magnitude and round to nearest, in place; layers that the pattern does not fit stay dense."""
    state = {}
    for name, module in select_layers(model).items():
        adapter = adapter_for(module)
        assert adapter is not None
        weight, channels = adapter.weight_matrix(module), adapter.shape(module).channels
        mask = torch.ones_like(weight, dtype=torch.bool)
        if pattern is not None:
            kept, size = map(int, pattern.split(":"))
            if channels % size == 0:
                ranks = weight.abs().reshape(-1, size).argsort(-1, descending=True).argsort(-1)
                mask = (ranks < kept).reshape(weight.shape)
        weight = weight * mask + 0.0
        fitted = None if grid is None else fit_grid(weight, grid, channels=channels)
        weight = weight if fitted is None else fitted.quantize(weight)
        adapter.write_weight_(module, weight)
        state[name] = CompressedWeight.from_weight(weight, mask, fitted)
    return state


def resnet18(resolution: int) -> Iterator[Artifact]:
    """ResNet-18 with random weights, as torchvision builds it."""
    from torchvision.models import resnet18 as build

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    yield Artifact("float32", fresh(), {})
    for name, grid, pattern, integer in (
        ("8-bit weights and activations", EIGHT, None, True),
        ("4-bit weights, 8-bit activations", FOUR, None, True),
        ("4-bit weights", FOUR, None, False),
        ("2:4, 4-bit weights", FOUR, "2:4", False),
        ("2:4", None, "2:4", False),
    ):
        if resolution < 224 and not integer:
            continue
        model = fresh()
        yield Artifact(name, model, nearest_(model, grid, pattern), integer)


def digits() -> tuple[list[Artifact], Tensor, Tensor, Tensor]:
    """The example's CNN after 12 epochs and its compressed forms; calibration images, test images and labels."""
    import lightning as L

    from examples.digits import DigitsClassifier, DigitsData

    L.seed_everything(0, workers=True)
    data, module = DigitsData(), DigitsClassifier()
    L.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    images = torch.stack([image for image, _ in data.train])
    test = torch.stack([image for image, _ in data.test])
    labels = torch.stack([label for _, label in data.test])
    weights = module.eval().state_dict()
    artifacts = [Artifact("float32", module, {})]
    recipes: list[tuple[str, list[Any], bool]] = [
        ("8-bit weights and activations", [obc.Quantize(EIGHT)], True),
        ("4-bit weights, 8-bit activations", [obc.Quantize(FOUR)], True),
        ("4-bit weights", [obc.Quantize(FOUR)], False),
        ("2:4, 4-bit weights", [obc.Prune("2:4", misfit="skip"), obc.Quantize(FOUR)], False),
    ]
    for name, stages, integer in recipes:
        model = DigitsClassifier().eval()
        model.load_state_dict(weights)
        report = obc.compress(model, images.split(64), stages, calibration=obc.Calibration(samples=1024))
        artifacts.append(Artifact(name, model, compressed_state(model, report.solutions), integer))
    return artifacts, images, test, labels


@dataclass(frozen=True)
class Case:
    """One network at one input size, its files written.

    Attributes:
        title: What it is.
        files: ONNX files by artifact.
        packed: Bytes of every artifact as packed safetensors.
        accuracy: Share of the test images that each file gets right in ONNX Runtime; empty without data.
        shape: Shape of one input.
        batches: Batch sizes to measure.
        rounds: Timed runs, as a multiple of the number asked for.
    """

    title: str
    files: dict[str, Path]
    packed: dict[str, int]
    accuracy: dict[str, float]
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int = 1


def write(artifacts: list[Artifact], calibration: Tensor, folder: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """Every artifact as ONNX, by name, and its size as packed safetensors."""
    files, packed = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for index, artifact in enumerate(artifacts):
        files[artifact.name] = folder / f"{index}.onnx"
        export_onnx(
            artifact.model,
            calibration[:2],
            files[artifact.name],
            solutions=artifact.state,
            calibration=calibration.split(64) if artifact.integer else None,
            overwrite=True,
        )
        target = folder / f"{index}.safetensors"
        packed[artifact.name] = save_packed(artifact.model, artifact.state, target, overwrite=True).size
    return files, packed


def accuracies(files: dict[str, Path], images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of test images that every file gets right in ONNX Runtime."""
    found = {}
    for name, path in files.items():
        session = open_session(path)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        found[name] = float((torch.from_numpy(logits).argmax(1) == labels).double().mean())
    return found


def prepare(networks: list[str], folder: Path) -> list[Case]:
    """Train, compress and write all files; nothing is timed here."""
    cases = []
    if "digits" in networks:
        artifacts, images, test, labels = digits()
        files, packed = write(artifacts, images, folder / "digits")
        found = accuracies(files, test, labels)
        cases.append(Case("Digits CNN, 8×8", files, packed, found, (1, 8, 8), (1, 64), rounds=10))
    for resolution in (64, 224) if "resnet18" in networks else ():
        torch.manual_seed(0)
        calibration = torch.randn(4, 3, resolution, resolution)
        files, packed = write(list(resnet18(resolution)), calibration, folder / f"resnet18-{resolution}")
        title = f"ResNet-18, random weights, {resolution}×{resolution}"
        cases.append(Case(title, files, packed, {}, tuple(calibration.shape[1:]), (1,)))
    return cases


def measure(case: Case, rounds: int, threads: int) -> tuple[dict[str, Any], list[str]]:
    """Measurements of one case as data and as tables."""
    record: dict[str, Any] = {"title": case.title, "packed": case.packed, "accuracy": case.accuracy, "measured": []}
    tables = []
    for batch in case.batches:
        name = open_session(next(iter(case.files.values()))).get_inputs()[0].name
        inputs = {name: torch.randn(batch, *case.shape).numpy()}
        measured = benchmark(case.files, inputs=inputs, rounds=case.rounds * rounds, threads=threads)
        record["measured"].append([entry.to_dict() for entry in measured])
        tables.append(benchmark_table(measured, f"{case.title}, batch {batch}"))
        print(tables[-1], flush=True)
    return record, [*tables, notes(case)]


def notes(case: Case) -> str:
    """Packed sizes, and accuracy where there is data, below a table."""
    dense = case.packed["float32"]
    lines = [
        f"- {name}: {size / 2**20:.3f} MiB as packed safetensors, {dense / size:.2f}× smaller"
        + (f"; accuracy in ONNX Runtime {100 * case.accuracy[name]:.2f} %" if case.accuracy else "")
        for name, size in case.packed.items()
    ]
    return "\n".join(lines)


def environment(threads: int) -> dict[str, Any]:
    import onnxruntime

    return {
        "processor": _processor(),
        "vnni": has_vnni() and not hidden(),
        "hidden": hidden(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def hidden() -> bool:
    """True when the processor's AVX-512 and VNNI are hidden from this process (``benchmarks/hide_avx512.c``)."""
    cpuinfo = Path("/proc/cpuinfo")
    there = cpuinfo.exists() and "avx512f" in cpuinfo.read_text()
    return there and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def save(cases: list[Case], folder: Path) -> None:
    entries = [
        asdict(case) | {"files": {name: str(path.relative_to(folder)) for name, path in case.files.items()}}
        for case in cases
    ]
    (folder / "cases.json").write_text(json.dumps(entries, indent=1))


def load(folder: Path) -> list[Case]:
    return [
        Case(
            **entry
            | {
                "files": {name: folder / path for name, path in entry["files"].items()},
                "shape": tuple(entry["shape"]),
                "batches": tuple(entry["batches"]),
            }
        )
        for entry in json.loads((folder / "cases.json").read_text())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="digits, resnet18")
    parser.add_argument("--folder", type=Path, required=True, help="where files are written, and read from to measure")
    parser.add_argument("--out", type=Path, help="measure the files in the folder and write the tables here")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    arguments = parser.parse_args()
    if arguments.networks:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        save(prepare(arguments.networks, arguments.folder), arguments.folder)
    if arguments.out is None:
        return
    measured = [measure(case, arguments.rounds, arguments.threads) for case in load(arguments.folder)]
    where = environment(arguments.threads)
    vnni = "with VNNI" if where["vnni"] else "without VNNI"
    if where["hidden"]:
        vnni = "its AVX-512 and VNNI hidden from the process, so that ONNX Runtime takes its AVX2 kernels"
    head = (
        f"Measured on {where['processor']} ({vnni}) with {where['threads']} thread(s) of ONNX Runtime "
        f"{where['onnxruntime']}; PyTorch {where['torch']}, Python {where['python']}. The files of a table run in "
        "turns; the speed-up is the median over rounds of the first file's time over this one's."
    )
    parts = ["# Files that other tools run", head, *(part for _, tables in measured for part in tables)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "artifacts_avx2" if where["hidden"] else "artifacts"
    (arguments.out / f"{name}.md").write_text("\n\n".join(parts) + "\n")
    record = {"environment": where, "cases": [record for record, _ in measured]}
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
