"""What other callbacks ask about the stages of a Trainer's compression callbacks, without knowing their type."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from lightning_obc.callbacks import compat


@runtime_checkable
class RunsStages(Protocol):
    """A callback that changes weights in stages.

    Attributes:
        stages_run: Single steps of the recipe that have run on the present weights.
        final_figures: Validation figures measured after the last of them; empty when there are none.
    """

    @property
    def stages_run(self) -> int: ...

    @property
    def final_figures(self) -> dict[str, float]: ...


def stage_callbacks(trainer: Trainer) -> list[RunsStages]:
    """The trainer's callbacks that run stages."""
    return [callback for callback in compat.callbacks(trainer) if isinstance(callback, RunsStages)]


def stages_run(trainer: Trainer) -> int:
    """Stages that have run, over all of the trainer's callbacks."""
    return sum(callback.stages_run for callback in stage_callbacks(trainer))


def final_figures(trainer: Trainer) -> dict[str, float]:
    """Validation figures of the weights after the last stage, where the one callback with stages measured them.

    With several callbacks it cannot be told whose stage came last: nothing is returned then.
    """
    found = [callback for callback in stage_callbacks(trainer) if callback.stages_run]
    return dict(found[0].final_figures) if len(found) == 1 else {}
