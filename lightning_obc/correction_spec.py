"""The stage that repairs what pruning and quantizing leave behind. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_obc.errors import SpecError
from lightning_obc.schedules import At, check_at
from lightning_obc.specs import Stage

CorrectionMethod = Literal["batch_norm", "statistics", "bias", "global", "vectors"]
_TUNING = ("global", "vectors")
_BATCHES = {"batch_norm": 100, "statistics": 16, "bias": 16}


@dataclass(frozen=True)
class Correct(Stage):
    """Correct a compressed model with calibration data (paper, section 6). Masks and grids stay as they are.

    Args:
        method: ``"batch_norm"`` measures running statistics anew; ``"statistics"`` matches mean and standard deviation
            of every norm layer's output channels to the dense model's; ``"bias"`` removes the mean shift of the
            compressed layers' outputs; ``"global"`` tunes the remaining weights of all compressed layers together
            (global AdaPrune; weights of quantized layers stay); ``"vectors"`` tunes biases and norm layers only.
        at: When the callback runs the stage, as for :class:`~lightning_obc.specs.Prune`.
        layers: Names, globs or type names: of norm layers for the first two methods, of weight-carrying layers for the
            others. ``None`` means every norm layer, or every layer that was compressed.
        exclude: Names, globs or type names to leave out.
        batches: Most calibration batches to use. ``None`` means 100 for ``"batch_norm"``, 16 for ``"statistics"`` and
            ``"bias"``, which go over them once per layer, and all for tuning.
        momentum: Of ``"batch_norm"`` only: weight of the newest batch. ``None`` averages over all batches.
        lr: Learning rate of tuning. ``None`` means 1e-5 for ``"global"`` and 1e-4 for ``"vectors"``.
        epochs: Most epochs of tuning. ``None`` means 100; it stops earlier when held-out batches stop improving.
        time_limit: Seconds after which tuning stops. ``None`` means no limit.

    Raises:
        SpecError: A value that is unknown or out of range, or that the method has no use for.
    """

    method: CorrectionMethod = "batch_norm"
    at: At = "train_end"
    layers: list[str] | None = None
    exclude: list[str] | None = None
    batches: int | None = None
    momentum: float | None = None
    lr: float | None = None
    epochs: int | None = None
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(CorrectionMethod):
            raise SpecError(
                "Correct.method is unknown", got=repr(self.method), expected=f"one of {get_args(CorrectionMethod)}"
            )
        check_at(self.at)
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise SpecError("Correct.momentum is not possible", got=self.momentum, expected="a number in (0, 1]")
        for name in ("batches", "epochs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SpecError(f"Correct.{name} is too small", got=value, expected="an integer of at least 1")
        for name in ("lr", "time_limit"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SpecError(f"Correct.{name} is not possible", got=value, expected="a positive number")
        self._check_belonging()

    def _check_belonging(self) -> None:
        given = [name for name in ("lr", "epochs", "time_limit") if getattr(self, name) is not None]
        foreign = [] if self.tuning_method else given
        if self.momentum is not None and self.method != "batch_norm":
            foreign = [*foreign, "momentum"]
        if foreign:
            raise SpecError(
                f'Correct("{self.method}") has no such setting',
                got=", ".join(foreign),
                expected='momentum with "batch_norm"; lr, epochs and time_limit with "global" and "vectors"',
            )

    @property
    def batches_limit(self) -> int | None:
        """Most batches, the method's own default filled in; None means all."""
        return self.batches if self.batches is not None else _BATCHES.get(self.method)

    @property
    def needs_dense(self) -> bool:
        """True when the dense model, or what was recorded of it, must be known."""
        return self.method != "batch_norm"

    @property
    def tuning_method(self) -> bool:
        """True for the methods that tune parameters, and need a copy of the dense model for it."""
        return self.method in _TUNING

    @property
    def tuning(self) -> dict[str, Any]:
        """The settings of tuning that were given."""
        given = {"lr": self.lr, "epochs": self.epochs, "time_limit": self.time_limit}
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        return f"Correct({self.method})"
