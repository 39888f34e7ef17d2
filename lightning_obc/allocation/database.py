"""A database of solved levels: one file per layer, a Hessian triangle per layer, and an index with a fingerprint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_obc.allocation.costs import CostTable, LevelSize
from lightning_obc.allocation.index import (
    Entry,
    check_fingerprint,
    dense_weights,
    hessian_file,
    index_file,
    levels_file,
    read_hessian,
    read_index,
    stored_levels,
    wanted_levels,
)
from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.rebuild import rebuild
from lightning_obc.allocation.record import LayerRecord, LevelRecord
from lightning_obc.allocation.solve import Recipe
from lightning_obc.allocation.storage import check_exists, read_tensors
from lightning_obc.errors import DatabaseError, FingerprintError, LayerNotFoundError
from lightning_obc.obs import LayerSolution, Problem, prepare

CACHE_BYTES = 2**30


@dataclass(frozen=True)
class DatabaseSize:
    """Bytes on disk.

    Attributes:
        weights: Number of weights of all layers.
        levels: Files with levels, and the index.
        hessians: Files with Hessian triangles.
        by_level: Bytes of packed tensors of every stored level, over all layers; ladders share theirs evenly.
    """

    weights: int
    levels: int
    hessians: int
    by_level: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        per_weight = self.levels / max(1, self.weights)
        return (
            f"{len(self.by_level)} stored levels of {self.weights} weights: {self.levels} bytes "
            f"({per_weight:.3f} per weight), and {self.hessians} bytes of Hessian triangles"
        )


class Database:
    """Solved levels of a model's layers, read layer by layer. Made by :func:`build_database` or :meth:`open`.

    The dense weights are copied when it is opened, so that levels can be stitched into the model again and again.
    """

    def __init__(self, path: Path, index: Mapping[str, Any], model: nn.Module) -> None:
        self.path = path
        self.recipe = Recipe(**index["recipe"])
        self.calibration: dict[str, Any] = dict(index["calibration"])
        self._levels, self._wanted = stored_levels(index), wanted_levels(index)
        self._entries = {name: Entry(**values) for name, values in index["layers"].items()}
        self._dense = dense_weights(model, list(self._entries))
        check_fingerprint(self._entries, self._dense)
        self._records: dict[str, LayerRecord] = {}
        self._problem: tuple[str, Problem] | None = None
        self._cache: OrderedDict[tuple[str, str], LayerSolution] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, model: nn.Module) -> Database:
        """Open a database of ``model``, whose weights must be the dense ones it was built for.

        Raises:
            DatabaseError: A file is missing or damaged.
            FingerprintError: It belongs to another model.
        """
        path = Path(path)
        database = cls(path, read_index(path), model)
        for entry in database._entries.values():
            check_exists(levels_file(path, entry))
            check_exists(hessian_file(path, entry))
        return database

    @property
    def layers(self) -> list[str]:
        return list(self._entries)

    def record(self, layer: str) -> LayerRecord:
        """What is stored about a layer; read when first asked for.

        Raises:
            LayerNotFoundError: The layer is not in the database.
            DatabaseError: Its file is missing or damaged.
        """
        if layer not in self._records:
            entry = self._entry(layer)
            tensors, metadata = read_tensors(levels_file(self.path, entry))
            if metadata.get("weight") != entry.weight:
                raise FingerprintError(
                    f"The file of layer {layer!r} belongs to another model",
                    got=metadata.get("weight"),
                    expected=entry.weight,
                    remedy="delete it and build the database again",
                )
            self._records[layer] = LayerRecord.from_file(tensors, metadata, self._levels)
        return self._records[layer]

    def _entry(self, layer: str) -> Entry:
        if layer not in self._entries:
            raise LayerNotFoundError(
                "A layer is not in the database", got=repr(layer), expected=f"one of {self.layers[:12]}"
            )
        return self._entries[layer]

    def levels(self, layer: str) -> list[Level]:
        """The levels that a layer has, the dense one first."""
        stored = self.record(layer).levels
        return [level for level in self._wanted if level.weights.name in stored]

    def level(self, layer: str, name: str) -> Level:
        """A level of a layer by its name.

        Raises:
            DatabaseError: The layer does not have it.
        """
        for level in self.levels(layer):
            if level.name == name:
                return level
        wanted = next((level.weights.name for level in self._wanted if level.name == name), name)
        reason = self.record(layer).missing.get(wanted)
        raise DatabaseError(
            f"Layer {layer!r} has no level {name!r}",
            got=reason,
            expected=f"one of {[level.name for level in self.levels(layer)][:12]}",
            remedy="choose another level, or build the database again with this one",
        )

    def profile_levels(self, profile: Mapping[str, str]) -> dict[str, Level]:
        """The level of every layer under a profile; layers it does not name are dense.

        Raises:
            DatabaseError: A layer does not have its level.
        """
        return {name: self.level(name, profile.get(name, Level().name)) for name in self.layers}

    def missing(self) -> dict[str, dict[str, str]]:
        """Levels that layers cannot have, with the reason: ``{layer: {level: reason}}``."""
        return {name: dict(self.record(name).missing) for name in self.layers if self.record(name).missing}

    def level_record(self, layer: str, level: Level) -> LevelRecord:
        """What is stored of a level's weights: mask or codes, and losses."""
        return self.record(layer).levels[level.weights.name]

    def sizes(self) -> dict[str, dict[str, LevelSize]]:
        """What is left of every layer at each of its levels, ready for a cost table."""
        sizes: dict[str, dict[str, LevelSize]] = {}
        for name in self.layers:
            weights = self.record(name).weights
            records = {level: self.level_record(name, level) for level in self.levels(name)}
            sizes[name] = {
                level.name: LevelSize(level, weights, record.kept, record.scales) for level, record in records.items()
            }
        return sizes

    def losses(self) -> CostTable:
        """Squared output error per sample of every level of every layer, weights alone."""
        return {
            name: {level.name: self.level_record(name, level).loss for level in self.levels(name)}
            for name in self.layers
        }

    def references(self) -> dict[str, float]:
        """Squared output per sample of every dense layer (without bias)."""
        return {name: self.record(name).reference for name in self.layers}

    def hessian(self, layer: str) -> Tensor:
        """``H [g, d, d]`` float64 of a layer, undamped, as every level was solved with it.

        Raises:
            DatabaseError: Its file is missing or damaged.
        """
        return read_hessian(self.path, layer, self._entry(layer), self._dense[layer].shape[-1])

    def solution(self, layer: str, level: Level | str) -> LayerSolution:
        """A level's weights, rebuilt: from the mask and the Hessian, or from the codes. Kept in memory for next time.

        Raises:
            LayerNotFoundError, DatabaseError: The layer or level is not in the database, or its file is missing.
            PatternError: What is stored does not obey the level's pattern.
        """
        self._entry(layer)
        chosen = self.level(layer, level if isinstance(level, str) else level.name).weights
        key = (layer, chosen.name)
        if key not in self._cache:
            record, dense, channels = self.record(layer), self._dense[layer], self._entry(layer).channels
            self._cache[key] = rebuild(layer, record, chosen, dense, channels, lambda: self._prepared(layer))
            self._trim_cache()
        self._cache.move_to_end(key)
        return self._cache[key]

    def _prepared(self, layer: str) -> Problem:
        if self._problem is None or self._problem[0] != layer:
            self._problem = (layer, prepare(self._dense[layer], self.hessian(layer), self.record(layer).damping))
        return self._problem[1]

    def _trim_cache(self) -> None:
        def size(solution: LayerSolution) -> int:
            return solution.weight.numel() * (solution.weight.element_size() + 2)

        total = sum(size(solution) for solution in self._cache.values())
        while total > CACHE_BYTES and len(self._cache) > 1:
            total -= size(self._cache.popitem(last=False)[1])

    def size(self) -> DatabaseSize:
        """Bytes on disk, those of Hessians apart."""
        by_level: dict[str, float] = {}
        for name in self.layers:
            record = self.record(name)
            for level in record.levels:
                by_level[level] = by_level.get(level, 0.0) + record.level_bytes(level)
        entries = self._entries.values()
        files = [levels_file(self.path, entry) for entry in entries]
        return DatabaseSize(
            weights=sum(self.record(name).weights for name in self.layers),
            levels=sum(file.stat().st_size for file in [*files, index_file(self.path)]),
            hessians=sum(hessian_file(self.path, entry).stat().st_size for entry in entries),
            by_level=by_level,
        )
