"""When stages run: their single steps in order, and which of them is due. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightning_obc.correction_spec import Correct
from lightning_obc.errors import ScheduleError
from lightning_obc.schedules import Plateau, times
from lightning_obc.specs import Prune, Stage

_RANK = {"train_start": 0, "train_end": 2}


def expand(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with every gradual schedule written out, in order."""
    return [step for stage in stages for step in (stage.steps() if isinstance(stage, Prune) else [stage])]


def check_order(stages: Sequence[Stage], *, max_epochs: int | None = None, max_steps: int = -1) -> None:
    """Refuse stages that cannot run in the order in which they are written, or at all.

    Args:
        stages: Expanded stages.
        max_epochs: Epochs of the training; None or -1 when there is no limit.
        max_steps: Optimizer steps of the training; -1 when there is no limit.

    Raises:
        ScheduleError: A time that comes before that of an earlier stage, or after the end of the training.
    """
    _check_corrections(stages)
    training = [stage for stage in stages if stage.at != "validate"]
    last: dict[str, tuple[int, Stage]] = {}
    rank = (0, training[0]) if training else None
    for stage in training:
        assert rank is not None
        own = _RANK.get(stage.at, 1) if isinstance(stage.at, str) else 1
        if own < rank[0]:
            raise _disorder(rank[1], stage)
        rank = (own, stage)
        for unit, number in times(stage.at):
            if unit in last and number < last[unit][0]:
                raise _disorder(last[unit][1], stage)
            last[unit] = (number, stage)
            _check_reachable(stage, unit, number, {"epoch": max_epochs, "step": max_steps}[unit])


def _check_corrections(stages: Sequence[Stage]) -> None:
    """Training moves the model on: a reference is only good for the stages that run at the same time."""
    for index, stage in enumerate(stages):
        if not (isinstance(stage, Correct) and stage.needs_dense):
            continue
        if not any(not isinstance(other, Correct) and other.at == stage.at for other in stages[:index]):
            raise ScheduleError(
                f"{stage} has nothing to correct at its time",
                got=f"at={stage.at!r} without a Prune or Quantize before it at that time",
                expected="a correction behind the stages it corrects, at the same time",
                remedy='give it the same at, or use method="batch_norm", which needs no dense model',
            )


def _check_reachable(stage: Stage, unit: str, number: int, limit: int | None) -> None:
    if limit is None or limit < 0:
        return
    if number >= limit if unit == "epoch" else number > limit:
        raise ScheduleError(
            f"{stage} would never run",
            got=f"{unit} {number}",
            expected=f"an epoch below {limit}" if unit == "epoch" else f"a step of at most {limit}",
            remedy=f'train longer, or use at="train_end"; {unit}s are counted from 0',
        )


def _disorder(before: Stage, after: Stage) -> ScheduleError:
    return ScheduleError(
        "Stages are not in the order of their times",
        got=f"{before} at {before.at}, then {after} at {after.at}",
        expected="stages in the order in which they run",
        remedy="sort them by time; stages of other layers that overlap with a gradual one go into an OBCCallback "
        "of their own",
    )


@dataclass
class Timetable:
    """The steps of a recipe, and those that are done.

    Attributes:
        stages: Expanded stages, in order.
        done: Indices of the stages that have run.
    """

    stages: list[Stage]
    done: list[int] = field(default_factory=list)

    def due(self, is_due: Callable[[Stage], bool], *, fitting: bool = True) -> list[int]:
        """Indices to run now, in order: the next ones that are due and have nothing unfinished before them."""
        indices = []
        for index, stage in enumerate(self.stages):
            if index in self.done or (stage.at == "validate") == fitting:
                continue
            if not is_due(stage):
                break
            indices.append(index)
        return indices

    def open(self) -> list[Stage]:
        """Stages of the training that have not run."""
        return [s for index, s in enumerate(self.stages) if index not in self.done and s.at != "validate"]

    def next_plateau(self) -> Plateau | None:
        """The plateau that the next stage of the training waits for, if it does."""
        left = self.open()
        return left[0].at if left and isinstance(left[0].at, Plateau) else None

    @property
    def started(self) -> bool:
        return bool(self.done)


def at_train_start(stage: Stage) -> bool:
    return stage.at == "train_start"


def at_epoch(epoch: int) -> Callable[[Stage], bool]:
    """Due at the start of an epoch; also when their epoch is already over, as after resuming a dense checkpoint."""

    def is_due(stage: Stage) -> bool:
        if isinstance(stage.at, Plateau):
            return stage.at.latest is not None and stage.at.latest <= epoch
        return stage.at == "train_start" or any(u == "epoch" and n <= epoch for u, n in times(stage.at))

    return is_due


def at_step(step: int) -> Callable[[Stage], bool]:
    return lambda stage: any(unit == "step" and number <= step for unit, number in times(stage.at))


def at_plateau(reached: Callable[[Plateau], bool]) -> Callable[[Stage], bool]:
    return lambda stage: isinstance(stage.at, Plateau) and reached(stage.at)


def at_train_end(stage: Stage) -> bool:
    """Also due: what had to run at the latest in an epoch that never came."""
    return stage.at == "train_end" or (isinstance(stage.at, Plateau) and stage.at.latest is not None)


def any_of(*times_of: Callable[[Stage], bool]) -> Callable[[Stage], bool]:
    return lambda stage: any(is_due(stage) for is_due in times_of)


def at_validate(stage: Stage) -> bool:
    return stage.at == "validate"
