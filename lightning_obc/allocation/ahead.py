"""What a search can find out before it solves a level: whether batches reach its layers, and budgets its levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lightning_obc.allocation.choices import choices
from lightning_obc.allocation.costs import CostName, LevelSize
from lightning_obc.allocation.latency import LatencyTable
from lightning_obc.allocation.levels import Level, check_levels
from lightning_obc.allocation.search import Programme
from lightning_obc.allocation.solve import infeasible
from lightning_obc.allocation.stitch import layer_adapter
from lightning_obc.calibration import Collector, rereadable, untouched
from lightning_obc.layers import is_lookup, select_layers
from lightning_obc.layers.base import ProblemShape
from lightning_obc.obs.select import zeros_for
from lightning_obc.patterns import NM, Block, Structured, Unstructured
from lightning_obc.specs import Calibration

Forward = Callable[[nn.Module, Any], Any]


def look_ahead(
    model: nn.Module,
    source: Iterable[Any],
    levels: Sequence[Level],
    budgets: Sequence[float],
    cost: CostName | LatencyTable,
    *,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    forward: Forward | None = None,
    mask_cost: bool = False,
    edges_at_8: bool = False,
) -> None:
    """Try one calibration batch, and refuse budgets that no choice of these levels can meet, whatever solving brings.

    Model, data and random states are untouched afterwards. Data that may be readable only once is not read: nothing is
    tried then.

    Args:
        model: The model; it need not be trained yet.
        source: The calibration data.
        levels: Levels to choose from.
        budgets: Shares of the dense cost.
        cost: What is counted.
        layers: Names, globs or type names; None means every supported layer.
        exclude: Names, globs or type names that stay dense.
        calibration: How the batches are drawn.
        forward: ``forward(model, batch)`` runs a batch.
        mask_cost: As in :func:`~lightning_obc.search`.
        edges_at_8: As in :func:`~lightning_obc.search`.

    Raises:
        LayerNotFoundError: A name, glob or type matches nothing.
        CalibrationError: The model cannot be called with a batch. LayerNotReachedError: No batch reaches some layers.
        BudgetError: A budget that is out of reach.
    """
    chosen = {name: m for name, m in select_layers(model, layers, exclude).items() if not is_lookup(m)}
    if not rereadable(source):
        return
    with untouched(model, getattr(source, "origin", source)):
        Collector(model, source, calibration or Calibration(), forward).order(chosen)
        how: dict[str, Any] = {"forward": forward, "mask_cost": mask_cost, "edges_at_8": edges_at_8}
        shares = choices(model, ExpectedLevels(chosen, levels), cost, levels, source, **how).as_shares()
    Programme(shares.table, budgets, buckets=1, fixed=shares.fixed, notes=shares.notes)


class ExpectedLevels:
    """Stands where a database would, before there is one: no level leaves less of a layer than it says here.

    Args:
        layers: The layers by name.
        levels: The levels that are to be solved.
    """

    def __init__(self, layers: dict[str, nn.Module], levels: Sequence[Level]) -> None:
        self._modules, self._wanted = layers, check_levels(levels)
        self._shapes = {name: layer_adapter(module).shape(module) for name, module in layers.items()}

    @property
    def layers(self) -> list[str]:
        return list(self._modules)

    def levels(self, layer: str) -> list[Level]:
        """The levels that fit a layer."""
        return [level for level in self._wanted if infeasible(level, self._shapes[layer].channels) is None]

    def missing(self) -> dict[str, dict[str, str]]:
        """The levels that do not fit, with the reason."""
        found = {
            name: {level.name: reason for level in self._wanted if (reason := infeasible(level, shape.channels))}
            for name, shape in self._shapes.items()
        }
        return {name: reasons for name, reasons in found.items() if reasons}

    def sizes(self) -> dict[str, dict[str, LevelSize]]:
        """What is left of every layer at each of its levels, at the least."""
        return {name: {level.name: self._size(name, level) for level in self.levels(name)} for name in self.layers}

    def _size(self, name: str, level: Level) -> LevelSize:
        shape, module = self._shapes[name], self._modules[name]
        weights = shape.groups * shape.rows * shape.columns
        kept = weights
        if level.pattern is not None:
            # Zeros that are there already may lie where they count twice.
            kept -= most_zeros(level, shape) + int((layer_adapter(module).current(module) == 0).sum())
        return LevelSize(level, weights, max(0, kept), _scales(level, shape))


def most_zeros(level: Level, shape: ProblemShape) -> int:
    """The most weights that a level's pattern prunes in a layer without zeros."""
    pattern, per_group = level.pattern, shape.rows * shape.columns
    if isinstance(pattern, NM):
        return shape.groups * per_group * (pattern.m - pattern.n) // pattern.m
    if isinstance(pattern, Unstructured):
        return zeros_for(pattern.sparsity, shape.groups * per_group)
    if isinstance(pattern, Structured):
        return shape.groups * zeros_for(pattern.sparsity, shape.channels) * per_group // shape.channels
    if isinstance(pattern, Block):
        positions = shape.columns // shape.channels
        blocks = shape.groups * shape.rows * positions * -(-shape.channels // pattern.size)
        return min(shape.groups * per_group, zeros_for(pattern.sparsity, blocks) * pattern.size)
    return shape.groups * per_group


def _scales(level: Level, shape: ProblemShape) -> int:
    if level.grid is None:
        return 0
    if level.grid.granularity == "tensor":
        return 1
    return shape.groups * shape.rows * (shape.columns // level.grid.group_size if level.grid.group_size else 1)
