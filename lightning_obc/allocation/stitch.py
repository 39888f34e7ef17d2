"""Put a profile into a model, and write it down so that it can be made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Union

from torch import nn

from lightning_obc.activations import ActivationQuantizer
from lightning_obc.allocation.build import Hessians
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.rebuild import rebuild
from lightning_obc.allocation.solve import Recipe, choose_damping, new_record, solve_levels_
from lightning_obc.allocation.storage import from_triangle, triangle
from lightning_obc.errors import LayerNotFoundError, PatternError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.layers import LayerAdapter, adapter_for, select_layers
from lightning_obc.obs import LayerSolution, prepare

PROFILE_FORMAT = 1
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
        SpecError: A level with quantized activations, and no quantizer.
    """
    unknown = sorted(set(profile) - set(database.layers))
    if unknown:
        raise LayerNotFoundError(
            "A profile names layers that are not in the database", got=unknown[:8], expected=str(database.layers[:12])
        )
    levels = {name: _level(database, name, profile.get(name, Level())) for name in database.layers}
    if quantizer is None and any(level.activations for level in levels.values()):
        raise SpecError(
            "A profile quantizes activations",
            got=next(f"{name}: {level}" for name, level in levels.items() if level.activations),
            expected="an ActivationQuantizer with frozen ranges",
            remedy="pass quantizer=ActivationQuantizer(model).observe(batches).freeze()",
        )
    solutions = {name: database.solution(name, level) for name, level in levels.items()}
    modules = select_layers(model)
    for name, solution in solutions.items():
        _adapter(modules[name]).check_matrix(modules[name], solution.weight)
    for name, solution in solutions.items():
        _adapter(modules[name]).write_weight_(modules[name], solution.weight)
    if quantizer is not None:
        set_activations(quantizer, levels)
    return solutions


def set_activations(quantizer: ActivationQuantizer, levels: Mapping[str, Level]) -> None:
    """Set a frozen quantizer to the levels' activation bits, and enable it when there are any."""
    quantizer.set_bits({name: levels[name].activations if name in levels else None for name in quantizer.bits})
    quantizer.enable()


def _level(database: Database, name: str, level: str | Level) -> Level:
    return database.level(name, level if isinstance(level, str) else level.name)


def _adapter(module: nn.Module) -> LayerAdapter:
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter


def write_recipe(
    path: str | Path, database: Database, profile: Choice, *, remarks: Mapping[str, Any] | None = None
) -> None:
    """Write a profile as YAML: how it was solved, and the level of every layer. Read by :func:`apply_recipe`.

    Args:
        path: The file.
        database: The database that the profile belongs to.
        profile: Level by layer name.
        remarks: Plain figures to keep with it (budget, cost, metric); they are not read again.
    """
    import yaml

    levels = {name: _level(database, name, level).to_dict() for name, level in profile.items()}
    content = {
        "format": PROFILE_FORMAT,
        "solve": asdict(database.recipe) | {"backend": "auto"},
        "calibration": database.calibration,
        "remarks": dict(remarks or {}),
        "layers": levels,
    }
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))


def read_recipe(path: str | Path) -> tuple[Recipe, dict[str, Any], dict[str, Level]]:
    """How to solve, the calibration, and the level of every layer of a file of :func:`write_recipe`.

    Raises:
        SpecError: The file cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
        if content["format"] != PROFILE_FORMAT:
            raise ValueError(f"format {content['format']}")
        levels = {name: Level.from_dict(values) for name, values in content["layers"].items()}
        return Recipe(**content["solve"]), dict(content["calibration"] or {}), levels
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SpecError(
            "A recipe cannot be read", got=f"{path}: {error}", expected=f"a recipe of format {PROFILE_FORMAT}"
        ) from None


def apply_recipe(
    model: nn.Module,
    path: str | Path,
    hessians: Hessians,
    *,
    quantizer: ActivationQuantizer | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, LayerSolution]:
    """Make the compressed model of a recipe again, without a database: only the levels it names are solved.

    Every Hessian comes from the dense model, as in the database.

    Args:
        model: The dense model; changed in place once every layer is solved.
        path: File of :func:`write_recipe`.
        hessians: Statistics of the dense model by layer name, or a function from layers to them.
        quantizer: Given, and frozen, it is set to the recipe's activation bits and enabled.
        progress: Called as ``progress(description, completed, total)``.

    Raises:
        SpecError: The recipe cannot be read.
        LayerNotFoundError: The model lacks a layer of the recipe.
        PatternError: A layer cannot have its level.
    """
    recipe, _, levels = read_recipe(path)
    modules = select_layers(model, list(levels))
    given = hessians(modules) if callable(hessians) else hessians
    solutions: dict[str, LayerSolution] = {}
    for done, (name, level) in enumerate(levels.items()):
        if progress is not None:
            progress(f"Recipe: {name}", done, len(levels))
        solutions[name] = _solve(name, modules[name], level, given[name], recipe)
    for name, solution in solutions.items():
        _adapter(modules[name]).write_weight_(modules[name], solution.weight)
    if quantizer is not None:
        set_activations(quantizer, levels)
    return solutions


def _solve(name: str, module: nn.Module, level: Level, statistic: Hessian, recipe: Recipe) -> LayerSolution:
    """One level of one layer, by the same steps (and the same rounding of the Hessian) as in a database."""
    adapter = _adapter(module)
    weight, channels = adapter.weight_matrix(module), adapter.shape(module).channels
    damping = choose_damping(weight, statistic.to(weight.device), recipe)
    hessian = from_triangle(triangle(statistic.full()), weight.shape[-1]).to(weight.device)
    record = new_record(weight, hessian, damping)
    solve_levels_(record, weight, hessian, channels, [level.weights], recipe)
    if level.weights.name in record.missing:
        raise PatternError(
            f"Layer {name!r} cannot have the recipe's level {level}",
            got=record.missing[level.weights.name],
            expected="a level that fits the layer",
            remedy="use the model that the recipe was written for",
        )
    return rebuild(name, record, level, weight, channels, lambda: prepare(weight, hessian, damping))
