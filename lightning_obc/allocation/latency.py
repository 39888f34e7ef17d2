"""Time per layer and level: a table that the user supplies, or one that is measured on this machine."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.allocation.levels import Level
from lightning_obc.calibration import call_forward
from lightning_obc.calibration.collect import eager_forward, undisturbed
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.errors import LayerNotReachedError, SpecError
from lightning_obc.files import write_whole
from lightning_obc.layers.parts import LayerPart

Runner = Callable[[str, nn.Module, Tensor, Level], Callable[[], Any]]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds per layer and level.

    Attributes:
        seconds: ``{layer: {level: seconds}}``, by level names.
        overhead: Seconds of everything that is not in the table; part of the dense model's time and of every budget,
            as are the dense seconds of layers in the table that are not searched.

    Raises:
        SpecError: Times that are negative or not finite.
    """

    seconds: Mapping[str, Mapping[str, float]]
    overhead: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            f"{layer} at {level}: {value}"
            for layer, levels in self.seconds.items()
            for level, value in levels.items()
            if not _is_time(value)
        ]
        if not _is_time(self.overhead):
            wrong.append(f"overhead: {self.overhead}")
        if wrong:
            raise SpecError("Some timings are not possible", got="; ".join(wrong[:8]), expected="finite seconds >= 0")

    def costs(self, levels: Mapping[str, Sequence[Level]]) -> dict[str, dict[str, float]]:
        """The table restricted to the levels that layers have. A level that is not timed by its full name counts as
        the level without its zeros, which generic kernels do not profit from.

        Raises:
            SpecError: A layer or level without a timing.
        """
        table: dict[str, dict[str, float]] = {}
        lacking: list[str] = []
        for name, available in levels.items():
            table[name] = {}
            for level in available:
                row, plain = self.seconds.get(name, {}), Level(None, level.grid, level.activations).name
                if level.name not in row and plain not in row:
                    lacking.append(f"{name} at {level}")
                else:
                    table[name][level.name] = float(row.get(level.name, row.get(plain, 0.0)))
        if lacking:
            raise SpecError(
                "Some layers and levels have no timing",
                got="; ".join(lacking[:8]) + (f"; and {len(lacking) - 8} more" if len(lacking) > 8 else ""),
                expected="seconds for every level of every layer",
                remedy="measure them, or leave these levels out of the database",
            )
        return table

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        content = {"overhead": self.overhead, "seconds": self.seconds}
        write_whole(Path(path), lambda part: Path(part).write_text(json.dumps(content, indent=1), encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a JSON file ``{"seconds": {layer: {level: seconds}}, "overhead": seconds}``.

        Raises:
            SpecError: The file cannot be read, or holds impossible timings.
        """
        try:
            content = json.loads(Path(path).read_text())
            return cls(content["seconds"], content.get("overhead", 0.0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(
                "A latency table cannot be read",
                got=f"{path}: {error!r}",
                expected='JSON with {"seconds": {layer: {level: seconds}}}',
            ) from None


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def measure_latency(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any,
    *,
    levels: Sequence[Level] = (Level(),),
    runner: Runner | None = None,
    whole: Callable[[], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    repeats: int = 20,
    warmup: int = 3,
) -> LatencyTable:
    """Time every layer on the input that one batch gives it, and the whole model.

    Levels of one layer are timed in turns, so that a machine that slows down slows them all; medians are kept.

    Args:
        model: The model.
        layers: Layers by name; all must be modules of their own.
        batch: One batch; its size is that of the deployment.
        levels: Levels to time.
        runner: ``runner(name, module, input, level)`` prepares a layer at a level and returns a function that runs it
            once, for example in ONNX Runtime. None times the module itself in PyTorch, where every level takes as long
            as the dense one; only the dense level may be asked for then.
        whole: Runs the whole dense model by the means of ``runner``. What it takes beyond its dense layers becomes the
            table's ``overhead``; without it, and with a runner, the overhead is 0.
        forward: ``forward(model, batch)``; None means the default of calibration.
        repeats: Timed runs.
        warmup: Runs before them.

    Raises:
        SpecError: Levels other than the dense one without a runner.
        LayerNotReachedError: The batch does not pass through a layer.
    """
    others = [level.name for level in levels if level != Level()]
    if runner is None and others:
        raise SpecError(
            "PyTorch runs every level at the speed of the dense layer",
            got=others[:8],
            expected="a runner that executes compressed layers",
            remedy="pass runner=, for example one that exports to ONNX Runtime",
        )
    run = runner or _torch_runner
    with preserved_rng(), undisturbed(model), eager_forward(), torch.no_grad():
        inputs = _inputs(model, layers, batch, forward)
        everything = whole
        if everything is None and runner is None:
            everything = lambda: (forward or call_forward)(model, batch)  # noqa: E731
        total = 0.0 if everything is None else _medians({"model": everything}, repeats, warmup)["model"]
        seconds = {
            name: _medians({level.name: run(name, module, inputs[name], level) for level in levels}, repeats, warmup)
            for name, module in layers.items()
        }
    dense = sum(times[Level().name] for times in seconds.values() if Level().name in times)
    return LatencyTable(seconds, max(0.0, total - dense))


def _torch_runner(name: str, module: nn.Module, x: Tensor, level: Level) -> Callable[[], Any]:
    if x.device.type != "cuda":
        return lambda: module(x)

    def run() -> None:
        module(x)
        torch.cuda.synchronize(x.device)

    return run


def _inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Callable[[nn.Module, Any], Any] | None
) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if found is not None:
                inputs.setdefault(name, found.detach().clone())

        return hook

    try:
        for name, module in layers.items():
            if not isinstance(module, LayerPart):
                handles.append(module.register_forward_pre_hook(keep(name), with_kwargs=True))
        (forward or call_forward)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in inputs]
    if missing:
        raise LayerNotReachedError(
            "Some layers cannot be timed: the batch does not pass through them as modules of their own",
            got=", ".join(missing),
            remedy="exclude them",
        )
    return inputs


def _medians(runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}
