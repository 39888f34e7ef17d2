"""A profile written down as YAML, and the compressed model made from it again, without a database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from lightning_obc.activations import ActivationGrid, ActivationQuantizer
from lightning_obc.allocation.build import Hessians
from lightning_obc.allocation.corrector import Corrector
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.rebuild import rebuild
from lightning_obc.allocation.solve import Recipe, choose_damping, infeasible, new_record, solve_levels_
from lightning_obc.allocation.stitch import Choice, layer_adapter, level_of, set_activations
from lightning_obc.allocation.storage import from_triangle, triangle
from lightning_obc.calibration import calibration_batches, collect_hessians
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import PatternError, SpecError
from lightning_obc.files import write_whole
from lightning_obc.hessian import Hessian
from lightning_obc.layers import select_layers
from lightning_obc.layers.parts import LayerPart
from lightning_obc.obs import LayerSolution, prepare
from lightning_obc.specs import Calibration

PROFILE_FORMAT = 1
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class ProfileRecipe:
    """What a recipe file says.

    Attributes:
        solve: How levels are solved.
        calibration: Samples, rounds, batch size and seed of the calibration.
        levels: Level by layer name.
        activations: How activation ranges are found, where a level has quantized inputs.
        correct: What runs after stitching.
    """

    solve: Recipe
    calibration: Mapping[str, Any]
    levels: Mapping[str, Level]
    activations: ActivationGrid | None = None
    correct: Correct | None = None


@dataclass(frozen=True)
class RecipeResult:
    """What :func:`run_recipe` has done to the model.

    Attributes:
        recipe: The recipe.
        solutions: The engine's solutions by layer name.
        quantizer: The activation ranges, enabled; None when all inputs stay in floating point.
    """

    recipe: ProfileRecipe
    solutions: Mapping[str, LayerSolution] = field(repr=False)
    quantizer: ActivationQuantizer | None = field(default=None, repr=False)


def write_recipe(
    path: str | Path,
    database: Database,
    profile: Choice,
    *,
    activations: ActivationGrid | None = None,
    correct: Correct | None = None,
    remarks: Mapping[str, Any] | None = None,
) -> None:
    """Write a profile as YAML: how it was solved, and the level of every layer. Run by :func:`run_recipe`.

    Args:
        path: The file.
        database: The database that the profile belongs to.
        profile: Level by layer name.
        activations: How activation ranges were found.
        correct: What ran after stitching.
        remarks: Plain figures to keep with it (budget, cost, metric); they are not read again.
    """
    import yaml

    levels = {name: level_of(database, name, level) for name, level in profile.items()}
    quantized = any(level.activations for level in levels.values())
    content: dict[str, Any] = {
        "format": PROFILE_FORMAT,
        "solve": asdict(database.recipe) | {"backend": "auto"},
        "calibration": database.calibration,
        "remarks": dict(remarks or {}),
    }
    if quantized and activations is not None:
        content["activations"] = _changed(activations, ActivationGrid())
    if correct is not None:
        content["correct"] = {"method": correct.method} | _changed(correct, Correct(correct.method, at=correct.at))
    content["layers"] = {name: level.to_dict() for name, level in levels.items()}
    text = yaml.safe_dump(content, sort_keys=False)
    write_whole(Path(path), lambda part: Path(part).write_text(text, encoding="utf-8"))


def _changed(spec: Any, default: Any) -> dict[str, Any]:
    """What a specification says differently from another one."""
    values = {entry.name: getattr(spec, entry.name) for entry in fields(spec)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def read_recipe(path: str | Path) -> ProfileRecipe:
    """Read a file of :func:`write_recipe`.

    Raises:
        SpecError: The file cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if content["format"] != PROFILE_FORMAT:
            raise ValueError(f"format {content['format']}")
        levels = {name: Level.from_dict(values) for name, values in content["layers"].items()}
        Calibration(**(content["calibration"] or {}))
        quantized = any(level.activations for level in levels.values())
        return ProfileRecipe(
            Recipe(**content["solve"]),
            dict(content["calibration"] or {}),
            levels,
            ActivationGrid(**content.get("activations", {})) if quantized else None,
            Correct(**content["correct"]) if "correct" in content else None,
        )
    except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        raise SpecError(
            "A recipe cannot be read",
            got=f"{path}: {error}",
            expected=f"a file that a search has written, of format {PROFILE_FORMAT}",
            remedy="look in the folder search among the logs, for names like spdy-0.5.yaml",
        ) from None


def recipe_layers(model: nn.Module, recipe: ProfileRecipe) -> dict[str, nn.Module]:
    """The layers of a recipe.

    Raises:
        LayerNotFoundError: The model lacks one.
        PatternError: A layer has input channels that its level does not fit.
    """
    layers = select_layers(model, list(recipe.levels))
    for name, level in recipe.levels.items():
        reason = infeasible(level, layer_adapter(layers[name]).shape(layers[name]).channels)
        if reason is not None:
            raise _unfit(name, level, reason)
    return layers


def run_recipe(
    model: nn.Module,
    path: str | Path,
    batches: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress | None = None,
) -> RecipeResult:
    """Make the compressed model of a recipe from the dense one: calibrate, solve, stitch, quantize inputs, correct.

    On the data, and on the kind of machine, of the search the result is that of the search.

    Args:
        model: The dense model; changed in place once every layer is solved.
        path: File of :func:`write_recipe`.
        batches: Calibration data, as for :func:`lightning_obc.compress`.
        forward: ``forward(model, batch)`` runs a batch.
        progress: Called as ``progress(description, completed, total)``.

    Raises:
        SpecError: The recipe cannot be read.
        LayerNotFoundError: The model lacks a layer of the recipe.
        PatternError: A layer cannot have its level.
    """
    recipe = read_recipe(path)
    spec = Calibration(**recipe.calibration)
    source = calibration_batches(batches, spec)
    modules = recipe_layers(model, recipe)
    quantizer = None
    if recipe.activations is not None:
        names = [name for name in recipe.levels if not isinstance(modules[name], LayerPart)]
        quantizer = ActivationQuantizer(model, names, spec=recipe.activations).observe(source, forward=forward).freeze()
    corrector = None if recipe.correct is None else Corrector(recipe.correct, model, source, forward)
    drawing: dict[str, Any] = {"positions": spec.positions, "seed": spec.seed}
    hessians = collect_hessians(
        model, modules, source, forward=forward, rounds=spec.rounds, progress=progress, **drawing
    )
    solutions = _apply(model, recipe, hessians, quantizer, progress)
    if corrector is not None:
        corrector(model, recipe.levels)
    return RecipeResult(recipe, solutions, quantizer)


def apply_recipe(
    model: nn.Module,
    path: str | Path,
    hessians: Hessians,
    *,
    quantizer: ActivationQuantizer | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerSolution]:
    """Make the compressed layers of a recipe from statistics that are there already; nothing is corrected.

    Every Hessian comes from the dense model, as in the database.

    Args:
        model: The dense model; changed in place once every layer is solved.
        path: File of :func:`write_recipe`.
        hessians: Statistics of the dense model by layer name, or a function from layers to them.
        quantizer: Given, and frozen, it is set to the recipe's activation bits and enabled.
        progress: Called as ``progress(description, completed, total)``.

    Raises:
        SpecError, LayerNotFoundError, PatternError: As :func:`run_recipe`.
    """
    recipe = read_recipe(path)
    given = hessians(select_layers(model, list(recipe.levels))) if callable(hessians) else hessians
    return _apply(model, recipe, given, quantizer, progress)


def _apply(
    model: nn.Module,
    recipe: ProfileRecipe,
    hessians: Mapping[str, Hessian],
    quantizer: ActivationQuantizer | None,
    progress: Progress | None,
) -> dict[str, LayerSolution]:
    modules = select_layers(model, list(recipe.levels))
    solutions: dict[str, LayerSolution] = {}
    for done, (name, level) in enumerate(recipe.levels.items()):
        if progress is not None:
            progress(f"Recipe: {name}", done, len(recipe.levels))
        solutions[name] = _solve(name, modules[name], level, hessians[name], recipe.solve)
    for name, solution in solutions.items():
        layer_adapter(modules[name]).write_weight_(modules[name], solution.weight)
    if quantizer is not None:
        set_activations(quantizer, recipe.levels)
    return solutions


def _solve(name: str, module: nn.Module, level: Level, statistic: Hessian, recipe: Recipe) -> LayerSolution:
    """One level of one layer, by the same steps (and the same rounding of the Hessian) as in a database."""
    adapter = layer_adapter(module)
    weight, channels = adapter.weight_matrix(module), adapter.shape(module).channels
    damping = choose_damping(weight, statistic.to(weight.device), recipe)
    hessian = from_triangle(triangle(statistic.full()), weight.shape[-1]).to(weight.device)
    record = new_record(weight, hessian, damping)
    solve_levels_(record, weight, hessian, channels, [level.weights], recipe)
    if level.weights.name in record.missing:
        raise _unfit(name, level, record.missing[level.weights.name])
    return rebuild(name, record, level, weight, channels, lambda: prepare(weight, hessian, damping))


def _unfit(name: str, level: Level, reason: str) -> PatternError:
    return PatternError(
        f"Layer {name!r} cannot have the recipe's level {level}",
        got=reason,
        expected="a level that fits the layer",
        remedy="use the model that the recipe was written for",
    )
