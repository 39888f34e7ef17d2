"""Structured pruning on a GPU, for :mod:`gpu_parts`: parity of the sweep over channels, its times beside torch's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from gpu_plan import STRUCTURED, channel_work

from lightning_obc.kernels.obs_sweep import ChannelOutput, SweepInput, sweep_channels
from lightning_obc.linalg import safe_inverse

if TYPE_CHECKING:
    from gpu_parts import Place


def problem_of(rows: int, channels: int, positions: int, device: str, zeros: float = 0.0) -> SweepInput:
    """A layer in float64, ``zeros`` of its weights zero already, others in every row."""
    generator = torch.Generator(device).manual_seed(0)
    columns = channels * positions
    # Float32 products would not be symmetric to the last digit, and backends read different triangles.
    x = torch.randn(columns, 2 * columns + 7, generator=generator, device=device).double()
    solved = safe_inverse((2 * x @ x.mT / x.shape[1])[None], 0.01)
    weight = torch.randn(1, rows, columns, generator=generator, device=device).double()
    keep = torch.rand(weight.shape, generator=generator, device=device) >= zeros if zeros else None
    return SweepInput(weight if keep is None else weight * keep, solved.inverse, solved.damped_hessian, keep)


def sweep(problem: SweepInput, channels: int, backend: str = "triton", steps: int | None = None) -> ChannelOutput:
    own = problem.keep is not None
    return sweep_channels(problem, channels, channels if steps is None else steps, own_inverses=own, backend=backend)


def parity(place: Place) -> dict[str, Any]:
    """Ragged layers with and without zeros: small ones against the oracle on the CPU, a wide one (several panels)
    against the torch backend on the same device."""
    small, wide = ([(2, 5, 2)], (2, 7, 2)) if place.rehearse else ([(8, 37, 9), (8, 333, 1), (8, 7, 49)], (64, 257, 9))
    cases = [(shape, "naive", zeros) for shape in small for zeros in (0.0, 0.3)] + [(wide, "torch", 0.0)]
    worst = {"parity": True, "same": 1.0, "loss": 0.0}
    for (rows, channels, positions), judge, zeros in cases:
        problem = problem_of(rows, channels, positions, place.device, zeros)
        judged = SweepInput(*(None if t is None else t.cpu() for t in vars(problem).values()))
        got = sweep(problem, channels)
        oracle = sweep(judged if judge == "naive" else problem, channels, judge)
        same = (got.order.cpu() == oracle.order.cpu()).double().mean().item()
        loss = (got.losses.cpu() / oracle.losses.cpu() - 1).abs().max().item()
        worst["same"], worst["loss"] = min(worst["same"], same), max(worst["loss"], loss)
        # The bounds of the test suite: float64, so every step and its loss.
        worst["parity"] &= not bool(got.broken.any()) and same == 1.0 and loss <= 1e-8
    return worst


def structured(place: Place) -> None:
    """Seconds of the sweep over the input channels of ResNet-50's convolutions, and of the torch backend beside it."""
    if not place.earlier.get("parity", {}).get("patterns", {}).get("structured", {}).get("parity"):
        raise SystemExit("Not timed: parity of the sweep over channels is not green.")
    network = [(5, 2, 1), (7, 1, 2)] if place.rehearse else sorted(STRUCTURED, key=lambda one: one[0] * one[1])
    rows = 3 if place.rehearse else 512
    found: dict[str, Any] = {"rows": rows, "layers": [], "expected": len(network) + 1}
    # Last, rows with zeros of their own: an inverse for each.
    cases = [(*layer, rows, 0.0) for layer in network] + [(*network[0][:2], 0, min(rows, 64), 0.5)]
    for channels, positions, layers, count, zeros in cases:
        problem = problem_of(count, channels, positions, place.device, zeros)
        times, peaks = {}, {}
        for backend in ("triton", "torch"):
            work = partial(sweep, problem, channels, backend)
            work(steps=min(2, channels))  # compiles
            peaks[backend] = place.peak(work)
            times[backend] = place.seconds(work, 1 if place.rehearse else 3)
        flop, moved, launches = channel_work(channels, positions)
        row = {"channels": channels, "positions": positions, "layers": layers, "zeros": zeros, "seconds": times}
        found["layers"].append(row | {"flop": flop, "bytes": moved, "launches": launches, "peak_gib": peaks["triton"]})
        place.save(found)
