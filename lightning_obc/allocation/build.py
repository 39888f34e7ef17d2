"""Build a database: store Hessians, solve the levels of each layer, write each file when it is whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from torch import Tensor, nn

from lightning_obc.allocation.database import Database
from lightning_obc.allocation.index import (
    Entry,
    dense_weights,
    entry_of,
    hessian_file,
    index_file,
    levels_file,
    merged_index,
    read_hessian,
    stored_levels,
)
from lightning_obc.allocation.levels import Level, check_levels
from lightning_obc.allocation.record import LayerRecord
from lightning_obc.allocation.solve import Recipe, choose_damping, new_record, solve_levels_
from lightning_obc.allocation.storage import read_tensors, triangle, write_json, write_tensors
from lightning_obc.errors import DamagedFileError, FingerprintError, NotPositiveDefiniteError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.layers import is_lookup, select_layers

Hessians = Union[Mapping[str, Hessian], Callable[[Mapping[str, nn.Module]], Mapping[str, Hessian]]]
_Content = TypeVar("_Content")
Progress = Callable[[str, float, float], None]


def build_database(
    path: str | Path,
    model: nn.Module,
    levels: Sequence[Level],
    hessians: Hessians,
    *,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Database:
    """Solve levels of a model's layers into a directory, or go on with what is there.

    Whatever was written whole is kept: an interrupted build goes on with the next layer, and a build with more levels
    adds only those. A layer that cannot be solved keeps its dense level alone, with the reason in ``missing()``.

    Args:
        path: Directory of the database; made if it does not exist.
        model: The dense model; not changed.
        levels: Levels to offer; the dense one is always among them. Levels that a layer cannot have are left out.
        hessians: Statistics by layer name, or a function from layers to them that is called only for those whose
            Hessian is not stored yet.
        layers: Names, globs or type names; None means every supported layer.
        exclude: Names, globs or type names to leave out.
        recipe: How to solve.
        calibration: Plain values that say how the statistics were gathered; part of the fingerprint.
        progress: Called as ``progress(description, completed, total)``.

    Raises:
        FingerprintError: The directory holds a database of another model, calibration or recipe.
        DamagedFileError: Its index is damaged. Other damaged files are made again, with a warning.
        LayerNotFoundError, SpecError: The selection or the levels cannot be used.
    """
    path, recipe = Path(path), recipe or Recipe()
    wanted = check_levels(levels)
    # Rows of embeddings are looked up: they cost no operations, and are not pruned.
    chosen = {name: m for name, m in select_layers(model, layers, exclude).items() if not is_lookup(m)}
    dense = dense_weights(model, list(chosen))
    entries = {
        name: entry_of(number, name, module, dense[name]) for number, (name, module) in enumerate(chosen.items())
    }
    index = merged_index(path, entries, wanted, recipe, dict(calibration or {}))
    write_json(index_file(path), index)
    damping = _store_hessians(path, chosen, entries, dense, hessians, recipe)
    known = stored_levels(index)
    for done, (name, entry) in enumerate(entries.items()):
        if progress is not None:
            progress(f"Database: {name}", done, len(entries))
        _build_layer(path, name, entry, dense[name], damping[name], known, recipe)
    if progress is not None:
        progress("Database", len(entries), len(entries))
    return Database.open(path, model)


def _build_layer(
    path: Path, name: str, entry: Entry, weight: Tensor, damping: float, levels: Sequence[Level], recipe: Recipe
) -> None:
    file = levels_file(path, entry)
    names = [level.name for level in levels]
    hessian: Tensor | None = None
    stored = _stored(lambda: LayerRecord.from_file(*read_tensors(file), levels)) if file.exists() else None
    if stored is None:
        hessian = read_hessian(path, name, entry, weight.shape[-1])
        record = new_record(weight, hessian.to(weight.device), damping)
    else:
        record = stored
    todo = [level for level in levels if level.name not in record.levels and level.name not in record.missing]
    if stored is not None and not todo:
        return
    if hessian is None:
        hessian = read_hessian(path, name, entry, weight.shape[-1])
    try:
        solve_levels_(record, weight, hessian.to(weight.device), entry.channels, todo, recipe)
    except NotPositiveDefiniteError as error:
        # One bad layer must not lose the database; it stays dense and says why.
        record.missing |= {level.name: str(error) for level in todo if level.name not in record.levels}
    tensors, metadata = record.to_file(names)
    write_tensors(file, tensors, metadata | {"layer": name, "weight": entry.weight})


def _stored(read: Callable[[], _Content]) -> _Content | None:
    """What a file holds; None when it is damaged (a warning says so), so that it is made again."""
    try:
        return read()
    except DamagedFileError as error:
        warnings.warn(f"A file of the database is made again: {error}")
        return None


def _store_hessians(
    path: Path,
    layers: Mapping[str, nn.Module],
    entries: Mapping[str, Entry],
    dense: Mapping[str, Tensor],
    hessians: Hessians,
    recipe: Recipe,
) -> dict[str, float]:
    """Write the triangles that are not stored yet; the damping of every layer.

    Raises:
        FingerprintError: A statistic that is given differs from the one that is stored.
    """
    damping = {name: share for name, entry in entries.items() if (share := _damping(path, entry)) is not None}
    absent = {name: layers[name] for name in entries if name not in damping}
    given = (hessians(absent) if absent else {}) if callable(hessians) else hessians
    lacking = [name for name in absent if name not in given]
    if lacking:
        raise SpecError("Some layers have no Hessian", got=", ".join(lacking[:8]), expected="one for every layer")
    for name, entry in entries.items():
        file = hessian_file(path, entry)
        if name in absent:
            statistic = given[name]
            damping[name] = choose_damping(dense[name], statistic.to(dense[name].device), recipe)
            metadata = {"samples": sum(statistic.samples), "weight": entry.weight, "damping": damping[name]}
            write_tensors(file, {"triangle": triangle(statistic.full())}, metadata)
        elif name in given:
            _check_same(name, read_tensors(file)[0]["triangle"], triangle(given[name].full()))
    return damping


def _damping(path: Path, entry: Entry) -> float | None:
    """The damping that goes with a stored triangle; None where there is none, or it is damaged."""
    file = hessian_file(path, entry)
    stored = _stored(lambda: read_tensors(file)) if file.exists() else None
    return None if stored is None else float(stored[1]["damping"])


def _check_same(name: str, stored: Tensor, given: Tensor) -> None:
    # Sums in another order differ in the last bits.
    scale = float(stored.abs().max())
    if stored.shape != given.shape or not torch.allclose(stored, given, rtol=1e-4, atol=1e-5 * scale):
        raise FingerprintError(
            "The database was built with another calibration",
            got=f"another Hessian for layer {name!r}",
            expected="the same calibration data",
            remedy="use another directory, or the calibration it was begun with",
        )
