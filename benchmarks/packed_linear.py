"""What linear layers gain that compute from packed codes: a sentence encoder and one step of a text decoder.

    python -m benchmarks.packed_linear --folder packed --out benchmarks/results

Weights are random and rounded to nearest, since how codes were found changes neither size nor speed. Every file of a
network runs in turns with the others, and each is checked first: its outputs must be those of its reference in PyTorch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_obc as obc
from benchmarks.artifacts import environment, nearest_
from lightning_obc.export import LinearKernel, benchmark, benchmark_table, export_onnx, open_session

GROUPS = obc.IntGrid(4, granularity="group", group_size=128, scale="minmax")
EIGHT = obc.IntGrid(8, symmetric=True, scale="minmax")
FILES: tuple[tuple[str, obc.IntGrid | None, LinearKernel], ...] = (
    ("float32", None, "dequantize"),
    ("4 bits, dequantized by the runtime", GROUPS, "dequantize"),
    ("4 bits, packed", GROUPS, "packed"),
    ("4 bits, packed-int8", GROUPS, "packed-int8"),
    ("8 bits, packed-int8", EIGHT, "packed-int8"),
)


class Step(nn.Module):
    """The linear layers of decoder blocks (attention's four and a gated MLP), for rows that are one token each."""

    def __init__(self, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4)) for _ in range(blocks)
        )
        self.gate = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for (query, key, value, output), gate, up, down in zip(
            self.attention, self.gate, self.up, self.down, strict=True
        ):
            # What one token of context leaves of attention: a gate of each value.
            x = x + output(torch.sigmoid(query(x) * key(x)) * value(x))
            x = x + down(nn.functional.silu(gate(x)) * up(x))
        return x


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.0, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


@dataclass(frozen=True)
class Network:
    """A network and the shapes of the inputs that it is measured with."""

    title: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


NETWORKS = (
    Network("Encoder, 6 layers of width 384, one sequence of 16 tokens", encoder, ((1, 16, 384),)),
    Network("Encoder, 6 layers of width 384, one sequence of 128 tokens", encoder, ((1, 128, 384),)),
    Network(
        "Linear layers of a decoder block, width 2048, hidden 5632, one token per row",
        lambda: Step(2048, 5632, 1),
        ((1, 2048), (8, 2048)),
    ),
)


def write(network: Network, folder: Path) -> dict[str, Path]:
    """The files of a network by name, each compared with its reference on one input."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for index, (name, grid, kernel) in enumerate(FILES):
        torch.manual_seed(0)
        model = network.build().eval()
        state = {} if grid is None else nearest_(model, grid)
        sample = torch.randn(network.shapes[0])
        path = folder / f"{index}.onnx"
        done = export_onnx(model, sample, path, solutions=state, linear=kernel, overwrite=True)
        check(done.reference, path, sample, kernel)
        found[name] = path
    return found


def check(reference: nn.Module, path: Path, sample: Tensor, kernel: LinearKernel) -> None:
    """Refuse a file whose outputs are not the reference's: to float32's rounding, most of them with integer kernels."""
    session = open_session(path)
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: sample.numpy()})[0])
    with torch.no_grad():
        wanted = reference(sample)
    error, largest = (got - wanted).abs(), float(wanted.abs().max())
    # Integer kernels round a few inputs on a boundary the other way, which later layers spread.
    most, all_ = (1e-3, 0.02) if kernel == "packed-int8" else (1e-5, 1e-5)
    if float(error.median()) > most * largest or float(error.max()) > all_ * largest:
        raise SystemExit(f"{path}: outputs off by {float(error.max()):.1e} of {largest:.1e}: not measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where files are written")
    parser.add_argument("--out", type=Path, help="where the tables are written")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    arguments = parser.parse_args()
    tables, records = [], []
    for index, network in enumerate(NETWORKS):
        files = write(network, arguments.folder / str(index))
        for shape in network.shapes:
            name = open_session(next(iter(files.values()))).get_inputs()[0].name
            inputs = {name: torch.randn(shape).numpy()}
            measured = benchmark(files, inputs=inputs, rounds=arguments.rounds, threads=arguments.threads)
            title = f"{network.title}, {shape[0]} row{'s' if shape[0] > 1 else ''}"
            tables.append(benchmark_table(measured, title))
            print(tables[-1], flush=True)
            records.append({"title": title, "measured": [row.to_dict() for row in measured]})
    if arguments.out is None:
        return
    where = environment(arguments.threads)
    head = (
        f"Measured on {where['processor']} ({'with' if where['vnni'] else 'without'} VNNI) with {where['threads']} "
        f"thread(s) of ONNX Runtime {where['onnxruntime']}; PyTorch {where['torch']}, Python {where['python']}. Codes "
        "of 4 bits have a scale per 128 inputs, those of 8 bits one per row. The files of a table run in turns; the "
        "speed-up is the median over rounds of the first file's time over this one's."
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = "\n\n".join(["# Linear layers from packed codes", head, *tables]) + "\n"
    (arguments.out / "packed_linear.md").write_text(page)
    record = {"environment": where, "cases": records}
    (arguments.out / "packed_linear.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
