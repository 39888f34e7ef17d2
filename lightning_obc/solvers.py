"""Which solver a stage runs, and how its result is refined. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Union, get_args

from lightning_obc.errors import SpecError

PruneSolver = Literal["obs", "sparsegpt", "sparsegpt-act", "adaprune", "magnitude"]
QuantizeSolver = Literal["obs", "gptq", "gptq-act", "rtn"]
Order = Literal["auto", "greedy", "activation", "ascending"]


@dataclass(frozen=True)
class Refine:
    """Local search after the greedy solver, on the damped objective, which it can only lower.

    Args:
        sweeps: Passes of coordinate descent over the columns, at most; each is followed by a refit of the scales.
        swaps: Exchanges of a kept for a removed weight per row, at most.
        seconds: Time limit per layer, or None. A result that a time limit cut short may differ from run to run.
        judge: Keep of each row only as much refinement as lowered the error on the other half of the calibration
            samples. Costs two more solves of the layer. Without both halves every refinement is kept.
        restart: Refine codes from other starts as well and let each row have the best end: the results of the other
            orders that ``order="auto"`` has tried, otherwise that of the activation order.

    Raises:
        SpecError: A number that is out of range.
    """

    sweeps: int = 10
    swaps: int = 32
    seconds: float | None = None
    judge: bool = True
    restart: bool = True

    def __post_init__(self) -> None:
        for name in ("sweeps", "swaps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"Refine.{name} is too small", got=value, expected="an integer of at least 1")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise SpecError("Refine.seconds is not possible", got=self.seconds, expected="a positive number, or None")


def parse_refine(value: Union[bool, Refine]) -> Refine | None:
    """``True`` is ``Refine()``, ``False`` is no refinement.

    Raises:
        SpecError: Anything else.
    """
    if isinstance(value, Refine):
        return value
    if isinstance(value, bool):
        return Refine() if value else None
    raise SpecError("refine has the wrong type", got=repr(value), expected="True, False or a Refine")


def check_order(order: str) -> None:
    """Raise SpecError unless ``order`` is one that codes can be found in."""
    if order not in get_args(Order):
        raise SpecError("Unknown order", got=repr(order), expected=f"one of {get_args(Order)}")


def check_solver(solver: str, refine: Union[bool, Refine], *, quantize: bool) -> None:
    """Refuse unknown solvers, solvers of the other kind of stage, and refinement of anything but OBS.

    Raises:
        SpecError: The stage cannot be meant.
    """
    allowed, other = get_args(PruneSolver), get_args(QuantizeSolver)
    if quantize:
        allowed, other = other, allowed
    if solver not in allowed:
        kind, wrong = ("Quantize", "prunes") if quantize else ("Prune", "quantizes")
        raise SpecError(
            f"A {kind} stage cannot use this solver",
            got=f"{solver!r}" + (f", which only {wrong}" if solver in other else ""),
            expected=f"one of {allowed}",
        )
    if parse_refine(refine) is not None and solver != "obs":
        raise SpecError(
            "Refinement starts from the OBS solution",
            got=f"refine with solver={solver!r}",
            expected='solver="obs"',
            remedy="drop refine, or use the default solver",
        )
