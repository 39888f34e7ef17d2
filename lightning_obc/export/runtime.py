"""What exported files gain on this machine: latency, throughput, size and memory in ONNX Runtime, side by side."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_obc.errors import ExportError
from lightning_obc.files import PathLike, require

_BYTES_PER_MIB = 2**20
_ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class Measurement:
    """One file on this machine.

    Attributes:
        name: Label of the file.
        latency: Median seconds of one run.
        spread: Half of the interquartile range of the runs, in seconds.
        throughput: Samples per second at the median latency.
        size: Bytes on disk.
        memory: Peak resident bytes of a process that loads and runs the file, above those of the runtime alone; None
            where the operating system does not tell.
        speedup: Median over the rounds of the first file's time divided by this one's in the same round.
        batch: Samples per run.
        threads: Threads of the runtime.
        rounds: Number of timed runs.
    """

    name: str
    latency: float
    spread: float
    throughput: float
    size: int
    memory: int | None
    speedup: float
    batch: int
    threads: int
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_session(path: PathLike, *, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU that computes what the file says.

    By default the runtime quantizes activations by itself in front of some quantized weights, and dequantizes weights
    anew in every run when activations stay in floating point. Both are switched off here.

    Args:
        path: The file.
        threads: Threads within an operator; 0 lets the runtime choose.

    Raises:
        ExportError: The file cannot be loaded. MissingExtraError: The extra ``onnx`` is not installed.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        if not quantizes_activations(path):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            "ONNX Runtime cannot load the file",
            got=f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="an ONNX file whose operators the runtime knows",
        ) from error


def quantizes_activations(path: PathLike) -> bool:
    """True when a file quantizes tensors at run time, so that integer kernels can run.

    Looks for the operator's name in pieces of the file: parsing it would need a copy of all weights.
    """
    wanted, piece = b"QuantizeLinear", 2**20
    tail = b""
    with Path(path).open("rb") as file:
        while block := file.read(piece):
            if wanted in tail + block:
                return True
            tail = block[-len(wanted) :]
    return False


def random_inputs(session: Any, batch: int, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """Random inputs of a session: dimension 0 is the batch, other open dimensions must be given in ``shapes``.

    Raises:
        ExportError: An input with an open dimension or a type that cannot be made up.
    """
    generator = np.random.default_rng(0)
    inputs = {}
    for entry in session.get_inputs():
        shape = list((shapes or {}).get(entry.name) or [batch, *entry.shape[1:]])
        if entry.type not in _ELEMENT_TYPES or not all(isinstance(size, int) for size in shape):
            raise ExportError(
                f"No random input can be made for {entry.name!r}",
                got=f"{entry.type} {entry.shape}",
                expected="float or int64 inputs of known shape",
                remedy="pass inputs or shapes",
            )
        kind = _ELEMENT_TYPES[entry.type]
        integer = np.issubdtype(kind, np.integer)
        values = generator.integers(0, 2, shape) if integer else generator.standard_normal(shape)
        inputs[entry.name] = values.astype(kind)
    return inputs


def benchmark(
    files: Mapping[str, PathLike] | Sequence[PathLike],
    *,
    inputs: Mapping[str, Any] | None = None,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    rounds: int = 50,
    warmup: int = 5,
    threads: int = 0,
    memory: bool = True,
    timer: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Run several ONNX files in turns, one run of each per round, so that all meet the same state of the machine.

    Args:
        files: Files by label, or files alone; the first one is the baseline of ``speedup``.
        inputs: Arrays by input name; default random ones.
        batch: Samples per run of random inputs.
        shapes: Whole shapes of inputs whose dimensions are open beyond the first.
        rounds: Timed runs of each file.
        warmup: Runs before.
        threads: Threads of the runtime; 0 lets it choose.
        memory: Measure peak memory, each file in a process of its own.
        timer: Clock in seconds.

    Raises:
        ExportError: A file that cannot be loaded or run, or nothing to measure.
    """
    named = dict(files) if isinstance(files, Mapping) else {Path(file).name: file for file in files}
    if not named or rounds < 1:
        raise ExportError("There is nothing to measure", got=f"{len(named)} files, {rounds} rounds")
    sessions = {name: open_session(path, threads=threads) for name, path in named.items()}
    feeds = {name: _feed(session, inputs, batch, shapes) for name, session in sessions.items()}
    for name, session in sessions.items():
        for _ in range(warmup):
            session.run(None, feeds[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            started = timer()
            session.run(None, feeds[name])
            times[name].append(timer() - started)
    first = times[next(iter(times))]
    return [
        _measurement(name, Path(named[name]), times[name], first, feeds[name], threads, memory, shapes)
        for name in named
    ]


def _feed(
    session: Any, inputs: Mapping[str, Any] | None, batch: int, shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, Any]:
    if inputs is None:
        return random_inputs(session, batch, shapes)
    expected = [entry.name for entry in session.get_inputs()]
    if missing := [name for name in expected if name not in inputs]:
        raise ExportError("Inputs are missing", got=list(inputs), expected=", ".join(missing))
    return {name: np.asarray(inputs[name]) for name in expected}


def _measurement(
    name: str,
    path: Path,
    times: Sequence[float],
    first: Sequence[float],
    feed: Mapping[str, Any],
    threads: int,
    memory: bool,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Measurement:
    latency = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (latency, latency, latency)
    batch = int(next(iter(feed.values())).shape[0]) if feed else 1
    return Measurement(
        name=name,
        latency=latency,
        spread=(high - low) / 2,
        throughput=batch / latency,
        size=path.stat().st_size,
        memory=peak_memory(path, {key: list(value.shape) for key, value in feed.items()}, threads) if memory else None,
        speedup=statistics.median(base / own for base, own in zip(first, times, strict=True)),
        batch=batch,
        threads=threads,
        rounds=len(times),
    )


_PROBE = """
import json, sys
import numpy, onnxruntime
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
from lightning_obc.export.runtime import open_session, random_inputs
path, threads, shapes = json.loads(sys.argv[1])
before = peak()
session = open_session(path, threads=threads)
feed = random_inputs(session, 1, shapes)
for _ in range(3):
    session.run(None, feed)
print(peak() - before)
"""


def peak_memory(path: PathLike, shapes: Mapping[str, Sequence[int]], threads: int = 0) -> int | None:
    """Peak resident bytes that loading and running a file adds, in a process of its own; None where unknown.

    The runtime itself and Python are not counted.
    """
    import json

    if not Path("/proc/self/status").exists():
        return None
    arguments = json.dumps([str(path), threads, {name: list(shape) for name, shape in shapes.items()}])
    done = subprocess.run([sys.executable, "-c", _PROBE, arguments], capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return int(lines[-1]) if done.returncode == 0 and lines else None


def benchmark_table(measurements: Sequence[Measurement], title: str = "Measured in ONNX Runtime") -> str:
    """The measurements as a Markdown table under a title."""
    header = ["file", "latency [ms]", "± [ms]", "samples/s", "size [MiB]", "peak memory [MiB]", "speed-up"]
    rows = [
        [
            entry.name,
            f"{1e3 * entry.latency:.3f}",
            f"{1e3 * entry.spread:.3f}",
            f"{entry.throughput:.1f}",
            f"{entry.size / _BYTES_PER_MIB:.2f}",
            "–" if entry.memory is None else f"{entry.memory / _BYTES_PER_MIB:.1f}",
            f"{entry.speedup:.2f}×",
        ]
        for entry in measurements
    ]
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---", *["---:"] * (len(header) - 1)], *rows]]
    return "\n".join([f"**{title}**", "", *lines])


def slower_files(measurements: Sequence[Measurement]) -> list[str]:
    """One sentence for every file that is slower than the first one beyond the scatter of their times.

    Args:
        measurements: The first one is the baseline.
    """
    found = []
    for entry in measurements[1:]:
        first = measurements[0]
        if entry.latency - entry.spread > first.latency + first.spread:
            smaller = f", and {first.size / entry.size:.1f}× smaller" if entry.size < first.size else ""
            found.append(
                f"{entry.name} is slower than {first.name} on this machine: {1e3 * entry.latency:.3f} ms instead of "
                f"{1e3 * first.latency:.3f} ms ({entry.speedup:.2f}×){smaller}. Quantizing and dequantizing cost "
                "small layers more than integers save: where time counts, export without quantized activations (same "
                "size, time of floating point), or keep such layers in floating point (search --cost seconds measures "
                "them)."
            )
    return found
