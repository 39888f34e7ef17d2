"""Put a profile into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

from torch import nn

from lightning_obc.activations import ActivationQuantizer
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level
from lightning_obc.errors import LayerNotFoundError, SpecError
from lightning_obc.layers import LayerAdapter, adapter_for, select_layers
from lightning_obc.obs import LayerSolution

Choice = Mapping[str, Union[str, Level]]


def stitch(
    model: nn.Module, database: Database, profile: Choice, *, quantizer: ActivationQuantizer | None = None
) -> dict[str, LayerSolution]:
    """Write the levels of a profile into the model, in place. Layers it does not name become dense again.

    Everything is looked up and rebuilt before the first weight is written.

    Args:
        model: The model the database belongs to; other levels may be stitched in already.
        database: The levels.
        profile: Level (or its name) by layer name.
        quantizer: Given, and frozen, it is set to the profile's activation bits and enabled.

    Returns:
        The solution of every layer of the database, for export and reports.

    Raises:
        LayerNotFoundError, DatabaseError: A layer or level that is not in the database.
        PatternError: A level that no longer fits its pattern.
        SpecError: A level with quantized activations, and no quantizer, or one of another model.
    """
    unknown = sorted(set(profile) - set(database.layers))
    if unknown:
        raise LayerNotFoundError(
            "A profile names layers that are not in the database", got=unknown[:8], expected=str(database.layers[:12])
        )
    levels = {name: level_of(database, name, profile.get(name, Level())) for name in database.layers}
    if quantizer is None and any(level.activations for level in levels.values()):
        raise SpecError(
            "A profile quantizes activations",
            got=next(f"{name}: {level}" for name, level in levels.items() if level.activations),
            expected="an ActivationQuantizer with frozen ranges",
            remedy="pass quantizer=ActivationQuantizer(model).observe(batches).freeze()",
        )
    solutions = {name: database.solution(name, level) for name, level in levels.items()}
    modules = select_layers(model)
    if quantizer is not None and any(level.activations for level in levels.values()):
        quantizer.check_model(model)
    for name, solution in solutions.items():
        layer_adapter(modules[name]).check_matrix(modules[name], solution.weight)
    for name, solution in solutions.items():
        layer_adapter(modules[name]).write_weight_(modules[name], solution.weight)
    if quantizer is not None:
        set_activations(quantizer, levels)
    return solutions


def set_activations(quantizer: ActivationQuantizer, levels: Mapping[str, Level]) -> None:
    """Set a frozen quantizer to the levels' activation bits, and enable it when there are any."""
    quantizer.set_bits({name: levels[name].activations if name in levels else None for name in quantizer.bits})
    quantizer.enable()


def level_of(database: Database, name: str, level: str | Level) -> Level:
    """A layer's level, given as such or by its name."""
    return database.level(name, level if isinstance(level, str) else level.name)


def layer_adapter(module: nn.Module) -> LayerAdapter:
    """The adapter of a layer that is known to have one."""
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter
