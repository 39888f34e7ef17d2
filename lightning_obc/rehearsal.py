"""A calibration batch sent through the model before anything else happens: what cannot work fails now, not in hours."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_obc.calibration import Collector, untouched
from lightning_obc.distributed import all_or_none
from lightning_obc.errors import LayerNotReachedError
from lightning_obc.planning import StagePlan


def rehearse(collect: Collector, plans: Sequence[StagePlan]) -> None:
    """Try the calibration of stages with one batch; with more only where one does not reach all layers.

    The model, the data and the random states are untouched afterwards (:func:`~lightning_obc.calibration.untouched`);
    data that can be read only once must not be given. All ranks run the same batches, and fail together.

    Args:
        collect: What collects the statistics of the stages later on, or another one like it.
        plans: The plans of the stages.

    Raises:
        CalibrationError: The model cannot be called with a calibration batch.
        EmptyCalibrationError: There is no batch.
        LayerNotReachedError: No calibration batch reaches some layers; they are named, with their stages.
    """
    layers = {layer.name: layer.module for plan in plans for layer in plan.layers}
    origin = getattr(collect.batches, "origin", collect.batches)
    with all_or_none(collect.ranks), untouched(collect.model, origin), collect.executing():
        try:
            collect.order(layers)
        except LayerNotReachedError as error:
            raise _named(error, plans) from error


def _named(error: LayerNotReachedError, plans: Sequence[StagePlan]) -> LayerNotReachedError:
    missing = str(error.got).split(", ")
    by_stage = {str(plan.stage): [x.name for x in plan.layers if x.name in missing] for plan in plans}
    wanted = "; ".join(f"{stage} of {', '.join(names)}" for stage, names in by_stage.items() if names)
    return LayerNotReachedError(
        "No calibration batch passes through some of the layers that the recipe compresses",
        got=wanted,
        expected="the forward pass of the model in evaluation mode to call every layer of a stage",
        remedy=f"leave them out with exclude={missing}, or give the model a calibration_step(batch) that calls them as "
        "training does",
    )
