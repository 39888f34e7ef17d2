"""Measurements: turns, medians and tables with an injected clock; real files for size, memory and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_models import compress_, residual_net

from lightning_obc.errors import ExportError
from lightning_obc.export import Measurement, benchmark, benchmark_table, export_onnx, open_session, slower_files
from lightning_obc.export.runtime import quantizes_activations
from lightning_obc.specs import IntGrid

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    images = torch.randn(4, 1, 8, 8)
    net = residual_net(width=32)
    export_onnx(net, images, folder / "float.onnx")
    state = compress_(net, IntGrid(8, symmetric=True))
    export_onnx(net, images, folder / "int8.onnx", solutions=state, calibration=[images])
    export_onnx(net, images, folder / "weights.onnx", solutions=state)
    return {name: folder / f"{name}.onnx" for name in ("float", "int8", "weights")}


class Clock:
    """Every look at the clock takes the next of the given steps."""

    def __init__(self, *steps: float) -> None:
        self.steps, self.now, self.looks = steps, 0.0, 0

    def __call__(self) -> float:
        self.now += self.steps[self.looks % len(self.steps)]
        self.looks += 1
        return self.now


def test_files_run_in_turns_and_medians_are_compared(files):
    # Per round: the first file takes 4 s and the second one 2 s, with 1 s in between.
    clock = Clock(1, 4, 1, 2)
    pair = {"float": files["float"], "int8": files["int8"]}
    dense, small = benchmark(pair, batch=8, rounds=5, warmup=1, threads=1, memory=False, timer=clock)
    assert clock.looks == 20
    assert (dense.latency, small.latency) == (4, 2)
    assert (dense.speedup, small.speedup) == (1, 2)
    assert (dense.throughput, small.throughput) == (2, 4)
    assert dense.spread == 0
    assert small.size == files["int8"].stat().st_size < dense.size / 2
    table = benchmark_table([dense, small])
    assert table.splitlines()[-1] == (f"| int8 | 2000.000 | 0.000 | 4.0 | {small.size / 2**20:.2f} | – | 2.00× |")


def test_a_slower_file_is_called_slower():
    def one(name: str, latency: float, size: int, speedup: float) -> Measurement:
        return Measurement(name, latency, 0.001, 1 / latency, size, None, speedup, 1, 1, 9)

    dense = one("dense.onnx", 0.010, 3000, 1.0)
    assert slower_files([dense, one("a.onnx", 0.011, 1000, 0.91), one("b.onnx", 0.005, 1000, 2.0)]) == []
    (text,) = slower_files([dense, one("a.onnx", 0.020, 1000, 0.5)])
    assert text.startswith(
        "a.onnx is slower than dense.onnx on this machine: 20.000 ms instead of 10.000 ms (0.50×), and 3.0×"
    )
    assert "without quantized activations" in text


def test_memory_is_that_of_a_process_of_its_own(files):
    (entry,) = benchmark([files["float"]], rounds=2, warmup=0, threads=1)
    assert entry.name == "float.onnx"
    if Path("/proc/self/status").exists():
        assert entry.memory is not None
        assert files["float"].stat().st_size < entry.memory < 2**30


def test_sessions_know_whether_activations_are_quantized(files):
    assert [quantizes_activations(files[name]) for name in ("float", "int8", "weights")] == [False, True, False]


def test_given_inputs_and_what_is_wrong_with_them(files, tmp_path):
    images = torch.randn(3, 1, 8, 8).numpy()
    (entry,) = benchmark([files["float"]], inputs={"images": images}, rounds=1, memory=False)
    assert entry.batch == 3
    assert entry.spread == 0
    with pytest.raises(ExportError, match="Expected: images"):
        benchmark([files["float"]], inputs={"x": images}, rounds=1)
    with pytest.raises(ExportError, match="nothing to measure"):
        benchmark([])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot load.*broken"):
        open_session(tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match="cannot load"):
        open_session(tmp_path / "nothing.onnx")
