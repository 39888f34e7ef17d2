"""The parts of :mod:`gpu`, each to be run as a process: ``gpu_parts.py PART SAVED EARLIER [--rehearse]``.

A part saves what it has found after every step, so that a time limit costs only the rest. Random inputs of the layers'
shapes: the work does not depend on the values. In a rehearsal everything is tiny and runs on a CPU.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import gpu_channels
import torch
from gpu_plan import RESNET50, WIDE, Shape
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.kernels.hessian_update.precision import exact_products
from lightning_obc.kernels.obs_sweep import (
    ColumnBlocks,
    GridInput,
    NMGroups,
    SweepInput,
    SweepOutput,
    sweep_blocks,
    sweep_prune,
    sweep_quantize,
)
from lightning_obc.linalg import safe_inverse

ROOT = Path(__file__).parent.parent
Sweep = Callable[..., SweepOutput]
# What can become of a test but passing, as JUnit's format calls it.
BAD = ("failure", "error", "skipped")


@dataclass(frozen=True)
class Place:
    """Where a part runs, how large, what the parts before it have found, and where to save."""

    rehearse: bool
    earlier: dict[str, dict[str, Any]]
    saved: Path

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def name(self) -> str:
        return "a CPU, through Triton's interpreter" if self.rehearse else torch.cuda.get_device_name()

    def save(self, found: dict[str, Any]) -> None:
        fresh = self.saved.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        fresh.replace(self.saved)

    def wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Median time of some runs."""
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak(self, work: Callable[[], Any]) -> float:
        """GiB allocated at most while it runs."""
        if self.rehearse:
            work()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**30

    def green(self) -> list[str]:
        """Sweeps that may be timed: those whose parity an earlier part has seen."""
        found = self.earlier.get("parity", {}).get("patterns", {})
        return [name for name in SWEEPS if found.get(name, {}).get("parity")]


# ------------------------------------------------------------------------------------------------- the sweeps
def problem_of(rows: int, columns: int, device: str, zeros: float = 0.0) -> SweepInput:
    """A layer, ``zeros`` of its weights zero already."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(columns, 2 * columns + 7, generator=generator, device=device)
    hessian = (2 * x @ x.mT / x.shape[1]).double()[None]
    weight = torch.randn(1, rows, columns, generator=generator, device=device)
    keep = torch.rand(weight.shape, generator=generator, device=device) >= zeros if zeros else None
    inverse = safe_inverse(hessian, 0.01)
    return SweepInput(weight if keep is None else weight * keep, inverse.inverse.float(), inverse.damped_hessian, keep)


def prune(problem: SweepInput, backend: str = "triton", **more: Any) -> SweepOutput:
    return sweep_prune(problem, backend=backend, **more)


def two_of_four(problem: SweepInput, backend: str = "triton") -> SweepOutput:
    group = torch.arange(problem.weight.shape[2], device=problem.weight.device) // 4
    return sweep_prune(problem, groups=NMGroups(group, torch.bincount(group) // 2), backend=backend)


def quantize(problem: SweepInput, backend: str = "triton") -> SweepOutput:
    # In float32 first: the judge in float64 has to see the same grid.
    scale = (problem.weight.float().abs().amax(2, keepdim=True) * 0.8 / 7.5).to(problem.weight.dtype)
    grid = GridInput(scale.expand_as(problem.weight), torch.full_like(problem.weight, 8.0), 15)
    return sweep_quantize(problem, grid, backend=backend)


def blocks_of_four(problem: SweepInput, backend: str = "triton") -> SweepOutput:
    columns = torch.arange(problem.weight.shape[2], device=problem.weight.device)
    short = columns.new_full((-len(columns) % 4,), -1)
    return sweep_blocks(problem, ColumnBlocks(torch.cat([columns, short]).view(-1, 4)), backend=backend)


SWEEPS: dict[str, Sweep] = {
    "unstructured": prune,
    "2:4": two_of_four,
    "quantize, 4 bits": quantize,
    "blocks of 4": blocks_of_four,
}


def in_float64(problem: SweepInput) -> SweepInput:
    """The same problem on the CPU, without the rounding of its inverse."""
    hessian, keep = problem.hessian.cpu(), None if problem.keep is None else problem.keep.cpu()
    return SweepInput(problem.weight.double().cpu(), torch.linalg.inv(hessian), hessian, keep)


# --------------------------------------------------------------------------------------------------- the parts
def parity(place: Place) -> None:
    """Ragged layers with and without zeros: small ones against the oracle, wide ones (several panels and tiles) against
    the torch backend in float64 on the CPU, which the test suite holds to the oracle."""
    found: dict[str, Any] = {"device": place.name, "torch": torch.__version__, "python": platform.python_version()}
    found["patterns"] = {}
    small, wide = (6, 9) if place.rehearse else (333, 2311)
    for name, sweep in SWEEPS.items():
        worst = {"parity": True, "same": 1.0, "loss": 0.0}
        for columns, judge, zeros in ((small, "naive", 0.0), (small, "naive", 0.3), (wide, "torch", 0.0)):
            problem = problem_of(2, columns, place.device, zeros)
            got, oracle = sweep(problem), sweep(in_float64(problem), backend=judge)
            same = (got.order.cpu() == oracle.order).double().mean().item()
            expected = oracle.losses.sum(-1)
            difference = (got.losses.cpu().double().sum(-1) - expected).abs()
            loss = (difference / expected.clamp(min=1e-30)).max().item()
            worst["same"], worst["loss"] = min(worst["same"], same), max(worst["loss"], loss)
            # The bounds of the test suite.
            worst["parity"] &= not got.any_broken and same >= 0.99 and loss <= 1e-5
        found["patterns"][name] = worst
        place.save(found)
    found["patterns"]["structured"] = gpu_channels.parity(place)
    place.save(found)
    if not all(worst["parity"] for worst in found["patterns"].values()):
        raise SystemExit("Parity is red.")


def tests(place: Place) -> None:
    """``pytest -m gpu`` on the files that have such tests."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    if place.rehearse:
        files = [ROOT / "tests" / "export" / "test_semi_structured.py"]
    # Its lines go to the log as they come, so that a time limit shows how far it got.
    result = place.saved.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", f"--junitxml={result}"]
    code = subprocess.run([*command, *map(str, files)], cwd=ROOT).returncode
    if result.exists():
        cases = list(ElementTree.parse(result).getroot().iter("testcase"))
        names = {what: [_name(case) for case in cases if case.find(what) is not None] for what in BAD}
        counts = {"passed": len(cases) - sum(map(len, names.values())), **{what: len(names[what]) for what in BAD}}
        place.save({"counts": counts, "failures": [*names["failure"], *names["error"]][:40]})
    if code:
        raise SystemExit(code)


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def shapes(place: Place) -> None:
    """Seconds of every pattern on every layer shape of ResNet-50, and of the rank-1 implementation on the device."""
    network = [Shape(2, 5, 1), Shape(3, 8, 2)] if place.rehearse else sorted(RESNET50, key=lambda shape: shape.flop)
    found: dict[str, Any] = {"speed": matrix_speed(place), "layers": [], "patterns": place.green()}
    found["expected"] = len(network)
    for shape in network:
        problem, times = problem_of(shape.rows, shape.columns, place.device), {}
        warm_up = SweepInput(problem.weight[:, :2], problem.inverse, problem.hessian)
        peaks = [0.0]
        for name in place.green():
            SWEEPS[name](warm_up)  # compiles
            once: list[float] = []
            peaks.append(place.peak(partial(_timed, place, partial(SWEEPS[name], problem), once)))
            # Medians of three where that is cheap.
            repeats = 2 if once[0] < 0.5 and not place.rehearse else 0
            once += [place.seconds(partial(SWEEPS[name], problem)) for _ in range(repeats)]
            times[name] = statistics.median(once)
        times["rank-1"] = rank_one_seconds(place, problem)
        row = {"rows": shape.rows, "columns": shape.columns, "layers": shape.layers, "seconds": times}
        found["layers"].append(row | {"peak_gib": max(peaks)})
        place.save(found)


def _timed(place: Place, work: Callable[[], Any], into: list[float]) -> None:
    into.append(place.seconds(work))


def matrix_speed(place: Place) -> float:
    """Float32 flop per second of a large product without TF32."""
    size = 64 if place.rehearse else 8192
    a = torch.randn(size, size, device=place.device)
    with exact_products(place.device):
        place.seconds(lambda: a @ a)
        return 2 * float(size) ** 3 / place.seconds(lambda: a @ a, 3)


def rank_one_seconds(place: Place, problem: SweepInput) -> float:
    """Time of the whole layer by one full rank-1 update of every row's ``G`` per weight.

    The update costs the same at every step and for every batch of rows, so some rows and steps are timed and scaled up.
    """
    total, columns = problem.weight.shape[1:]
    rows = max(1, min(total, int(8e9 / (4 * columns**2))))
    steps = min(16, columns)
    inverse = problem.inverse.expand(rows, -1, -1).clone()

    def work() -> Tensor:
        weight = problem.weight[0, :rows].clone()
        alive = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
        for _ in range(steps):
            diagonal = inverse.diagonal(dim1=1, dim2=2)
            pivot = torch.where(alive, weight.square() / diagonal, torch.inf).argmin(1, keepdim=True)
            v = inverse.gather(1, pivot[:, :, None].expand(-1, -1, columns))[:, 0]
            v = v / diagonal.gather(1, pivot).sqrt()
            weight -= weight.gather(1, pivot) / v.gather(1, pivot) * v
            inverse.baddbmm_(v[:, :, None], v[:, None, :], alpha=-1)
            alive.scatter_(1, pivot, False)
        return weight

    with exact_products(place.device):
        place.seconds(work)
        return place.seconds(work) * total / rows * columns / steps


def wide(place: Place) -> None:
    """One 4096×4096 layer to 4 bits."""
    if "quantize, 4 bits" not in place.green():
        raise SystemExit("Not timed: parity of the quantization is not green.")
    rows, columns = (3, 8) if place.rehearse else (WIDE.rows, WIDE.columns)
    problem, once = problem_of(rows, columns, place.device), list[float]()
    quantize(SweepInput(problem.weight[:, :2], problem.inverse, problem.hessian))
    peak = place.peak(partial(_timed, place, partial(quantize, problem), once))
    place.save({"rows": rows, "columns": columns, "seconds": once[0], "peak_gib": peak})


def memory(place: Place) -> None:
    """More rows asked for at once than fit: the chunk is halved, one message is logged, and the order is the same."""
    from lightning_obc.kernels.obs_sweep import triton_backend

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    triton_backend.log.addHandler(handler)
    problem = problem_of(*((5, 4) if place.rehearse else (512, 1152)), place.device)
    expected = prune(problem, memory_budget=2**28)
    with _scarce(place, problem):
        got = prune(problem, memory_budget=2**40)
    same = (got.order == expected.order).double().mean().item()
    place.save({"messages": messages, "same": same})
    if len(messages) != 1 or same < 0.99:
        raise SystemExit(f"{len(messages)} messages, {same:.2%} of all steps equal")


def _scarce(place: Place, problem: SweepInput) -> AbstractContextManager[object]:
    """Room for about a third of the rows: really so on a device, pretended in a rehearsal."""
    from lightning_obc.kernels.obs_sweep import triton_backend

    rows, columns = problem.weight.shape[1:]
    if not place.rehearse:
        torch.cuda.empty_cache()
        wanted = torch.cuda.memory_reserved() + rows // 3 * 4.3 * columns**2 * 1.2
        torch.cuda.set_per_process_memory_fraction(wanted / torch.cuda.get_device_properties(0).total_memory)
        return nullcontext()
    run = triton_backend.run

    def pretend(job: Any, chunk: Any) -> None:
        if chunk.rows > rows // 3:
            raise torch.OutOfMemoryError("pretended")
        run(job, chunk)

    return mock.patch.object(triton_backend, "run", pretend)


def semi_structured(place: Place) -> None:
    """2:4 linear layers through ``to_semi_structured``, with the times that it decided by."""
    sizes = [(64, 64)] if place.rehearse else [(4096, 4096), (11008, 4096), (1024, 1024)]
    model = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in sizes))
    for layer in model:
        groups = layer.weight.data.unflatten(1, (-1, 4))
        groups.scatter_(2, groups.abs().argsort(2)[:, :, :2], 0.0)
    model = model.half().to(place.device)
    x = [torch.randn(128, columns, dtype=torch.float16, device=place.device) for _, columns in sizes]
    with torch.no_grad():
        dense = [layer(part).float() for layer, part in zip(model, x, strict=True)]
    pretended: dict[str, Any] = {}
    if place.rehearse:
        pretended = {"timer": lambda module, x: place.seconds(lambda: module(x)), "convert": torch.clone}
    conversions = obc.to_semi_structured(model, tokens=16 if place.rehearse else 4096, **pretended)
    with torch.no_grad():
        errors = [
            ((layer(part).float() - before).abs().max() / before.abs().max()).item()
            for layer, part, before in zip(model, x, dense, strict=True)
        ]
    lines = [
        {"shape": f"{rows}×{columns}", "reason": c.reason, "dense": c.dense, "sparse": c.sparse, "error": error}
        for (rows, columns), c, error in zip(sizes, conversions.layers, errors, strict=True)
    ]
    place.save({"tokens": conversions.tokens, "layers": lines})
    # Float16 sums of some thousand products, in another order.
    if max(errors) > 0.02:
        raise SystemExit(f"A converted layer's output is off by {max(errors):.1e}")


PARTS: dict[str, Callable[[Place], None]] = {
    "parity": parity,
    "tests": tests,
    "shapes": shapes,
    "structured": gpu_channels.structured,
    "wide": wide,
    "memory": memory,
    "semi-structured": semi_structured,
}


def main(arguments: list[str]) -> int:
    name, saved, earlier = arguments[:3]
    rehearse = "--rehearse" in arguments
    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device, and there is none here.")
    parts = json.loads(Path(earlier).read_text())["parts"]
    PARTS[name](Place(rehearse, {part["name"]: part["found"] for part in parts}, Path(saved)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
