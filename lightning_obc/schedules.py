"""When a stage runs: times, plateaus and gradual schedules. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Optional, Union

from lightning_obc.errors import SpecError


@dataclass(frozen=True)
class Plateau:
    """A stage's time: when a monitored metric has stopped improving.

    Values count from when the stages before are done. Once the metric has stopped improving, the stage runs before the
    next training batch: the next validation, and the checkpoints after it, describe the compressed weights. When it
    stops with the last validation of the training, the stage runs at the end of the training. Stages in a row with
    equal ``at`` run together, like those with equal epochs.

    Args:
        monitor: Name of a metric that the LightningModule logs: in its validation steps, or, then looked at once per
            epoch, in its training steps with ``on_epoch=True``.
        patience: Values without an improvement after which the stage runs.
        mode: ``"min"`` when smaller is better, ``"max"`` when larger is.
        min_delta: Smallest change that counts as an improvement. NaN is none.
        latest: Epoch, counted from 0, before which the stage runs even without a plateau; a training that ends earlier
            runs it at its end. None: without a plateau the stage does not run, and a warning says so.
        nth: Tells plateaus of one metric apart: stages with ``nth=1``, then stages with ``nth=2`` wait for one plateau
            after the other.

    Raises:
        SpecError: A value that is unknown or out of range.
    """

    monitor: str
    patience: int = 3
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    latest: Optional[int] = None
    nth: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise SpecError("Plateau.monitor is no name", got=repr(self.monitor), expected='such as "val_loss"')
        for name, least in (("patience", 1), ("nth", 1), ("latest", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise SpecError(f"Plateau.{name} is not possible", got=value, expected=f"an integer >= {least}")
        if self.mode not in ("min", "max"):
            raise SpecError("Plateau.mode is unknown", got=repr(self.mode), expected='"min" or "max"')
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise SpecError("Plateau.min_delta is not possible", got=self.min_delta, expected="a finite number >= 0")

    def improves(self, value: float, best: float) -> bool:
        """True when a value is better than the best before by more than ``min_delta``; NaN never is."""
        change = best - value if self.mode == "min" else value - best
        return change > self.min_delta

    def __str__(self) -> str:
        return f"{'plateau' if self.nth == 1 else f'plateau {self.nth}'} of {self.monitor}"


@dataclass(frozen=True)
class Gradual:
    """Reach a sparsity in several steps, with training between them.

    Step ``i`` of ``0 … n - 1`` prunes to ``s + (initial - s)·(1 - i/(n - 1))**p``, with ``s`` the sparsity of the
    stage's pattern and ``p`` 3 (``"cubic"``: Zhu and Gupta, arXiv 1710.01878) or 1 (``"linear"``).

    Args:
        steps: Number ``n`` of pruning steps, at least 2; the first runs at the stage's ``at``.
        every: Epochs or optimizer steps (the unit of ``at``) from one pruning step to the next.
        initial: Sparsity after the first pruning step.
        curve: ``"cubic"`` or ``"linear"``.

    Raises:
        SpecError: A value that is unknown or out of range.
    """

    steps: int
    every: int = 1
    initial: float = 0.0
    curve: Literal["cubic", "linear"] = "cubic"

    def __post_init__(self) -> None:
        if not 0 <= self.initial < 1:
            raise SpecError("Gradual.initial lies outside [0, 1)", got=self.initial, expected="a fraction of zeros")
        if self.steps < 2:
            raise SpecError("Gradual.steps is too small", got=self.steps, expected="at least 2")
        if self.every < 1:
            raise SpecError("Gradual.every is too small", got=self.every, expected="at least 1")
        if self.curve not in ("cubic", "linear"):
            raise SpecError("Gradual.curve is unknown", got=repr(self.curve), expected='"cubic" or "linear"')

    def sparsities(self, final: float) -> list[float]:
        """Sparsity after each pruning step, from ``initial`` to ``final``."""
        power = 3 if self.curve == "cubic" else 1
        left = ((1 - i / (self.steps - 1)) ** power for i in range(self.steps))
        return [final + (self.initial - final) * share for share in left]


At = Union[str, dict[str, int], Plateau]


def times(at: At) -> list[tuple[str, int]]:
    """The unit and number of an ``{"epoch": k}`` or ``{"step": k}``, in a list; empty for every other time."""
    return list(at.items()) if isinstance(at, dict) else []


def check_at(at: At) -> None:
    """Validate a stage's time.

    Raises:
        SpecError: It is none of the known times.
    """
    if isinstance(at, Plateau):
        return
    if isinstance(at, str):
        if at not in ("train_start", "train_end", "validate"):
            raise SpecError(
                "A stage's time cannot be read",
                got=repr(at),
                expected='"train_start", "train_end", "validate", {"epoch": k}, {"step": k} or a Plateau',
            )
    elif (
        not isinstance(at, dict)
        or len(at) != 1
        or next(iter(at)) not in ("epoch", "step")
        or not isinstance(next(iter(at.values())), int)
        or isinstance(next(iter(at.values())), bool)
        or next(iter(at.values())) < 0
    ):
        raise SpecError("A stage's time cannot be read", got=at, expected='{"epoch": k} or {"step": k} with k >= 0')
