"""The options of ``lightning-obc search``, and what they let it find out before anything is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

from lightning.pytorch import LightningModule, Trainer

from lightning_obc.allocation import SPDY, LatencyTable, Level, Recipe, block_ladder, product, unstructured_ladder
from lightning_obc.allocation.ahead import look_ahead
from lightning_obc.allocation.curve import Method
from lightning_obc.allocation.search import check_budgets
from lightning_obc.allocation.tradeoff import METHODS, default_levels
from lightning_obc.cli.ahead import trial
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import ExportError, SpecError
from lightning_obc.export import LinearKernel, layer_runner
from lightning_obc.specs import ActivationGrid, Calibration

COUNTED = ("flops", "bops", "bytes")


@dataclass(frozen=True)
class Levels:
    """Levels that a layer may take: every pattern with every pair of bit widths, and ladders of densities.

    Args:
        patterns: Patterns as in ``Prune``, such as ``"2:4"`` or ``0.5``; null keeps all weights.
        bits: Pairs of bit widths of weights and activations; null leaves that side floating point.
        ladder: Smallest density of an unstructured ladder 1, 0.9, 0.81, …; null for none.
        blocks: Smallest density of such a ladder of blocks; null for none.
        block_size: Consecutive input channels of a block.
        ladder_bits: Pairs of bit widths for every level of the ladders.
    """

    patterns: list[Union[str, int, float, None]] = field(default_factory=lambda: [None])
    bits: list[tuple[Optional[int], Optional[int]]] = field(default_factory=lambda: [(None, None)])
    ladder: Optional[float] = None
    blocks: Optional[float] = None
    block_size: int = 4
    ladder_bits: list[tuple[Optional[int], Optional[int]]] = field(default_factory=lambda: [(None, None)])

    def __post_init__(self) -> None:
        self.make()

    def make(self) -> list[Level]:
        """The levels."""
        ladder = [] if self.ladder is None else unstructured_ladder(self.ladder)
        ladder += [] if self.blocks is None else block_ladder(self.block_size, self.blocks)
        patterns = [level.pattern for level in ladder if level.pattern is not None]
        return [*product(self.patterns, self.bits), *product(patterns, self.ladder_bits)]


@dataclass(frozen=True)
class SearchOptions:
    """The options of ``lightning-obc search``; see :meth:`OBCTrainer.search`."""

    budgets: Sequence[float]
    cost: str = "bops"
    levels: Optional[Levels] = None
    metric: Optional[str] = None
    mode: Literal["max", "min"] = "max"
    methods: Sequence[Method] = METHODS
    scores: Literal["error", "sensitivity", "loss"] = "sensitivity"
    correct: Optional[Correct] = None
    calibration: Calibration = field(default_factory=Calibration)
    spdy: Optional[SPDY] = None
    solve: Recipe = field(default_factory=Recipe)
    activations: Optional[ActivationGrid] = None
    layers: Optional[Sequence[str]] = None
    exclude: Optional[Sequence[str]] = None
    edges_at_8: bool = False
    mask_cost: bool = False
    threads: int = 1
    database: Optional[str] = None
    output: Optional[str] = None
    overwrite: bool = False
    linear: LinearKernel = "dequantize"

    def check(self) -> None:
        """Refuse what can be refused before anything runs."""
        check_budgets(self.budgets, 0.0, dense=1.0)
        if self.cost not in (*COUNTED, "seconds"):
            if not self.cost.endswith(".json"):
                raise SpecError(
                    "Unknown cost",
                    got=repr(self.cost),
                    expected=f"one of {', '.join(COUNTED)}, seconds, or the JSON file of a latency table",
                )
            LatencyTable.load(self.cost)
        if self.cost == "seconds":
            # A missing extra shows now, not behind a training.
            layer_runner(threads=self.threads, linear=self.linear)
        elif self.linear != "dequantize":
            raise SpecError(
                "How linear layers are exported counts in measured time alone",
                got=f"linear {self.linear} with cost {self.cost}",
                expected="cost seconds",
                remedy="leave --linear to export",
            )
        if self.output is not None:
            self.check_folder(Path(self.output))

    def check_folder(self, folder: Path) -> None:
        """Refuse to write over the results of another search.

        Raises:
            ExportError: They are in the folder.
        """
        if (folder / "curve.json").exists() and not self.overwrite:
            raise ExportError(
                "The folder holds the results of a search already",
                got=str(folder),
                expected="a new folder",
                remedy="choose another one with --output, or pass --overwrite true",
            )

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Find out at the beginning of a run what would stop the search: with one batch, and by what levels can cost.

        Raises:
            ExportError: The folder cannot be used. Others: As :func:`~lightning_obc.allocation.ahead.look_ahead`.
        """
        self.check_folder(self.folder(trainer))
        # What the levels cost in seconds is measured later: whether a budget of time can be kept shows then.
        cost, budgets = (self.cost, self.budgets) if self.cost != "seconds" else ("flops", [1.0])
        known: Any = cost if cost in COUNTED else LatencyTable.load(cost)
        levels = default_levels(known) if self.levels is None else self.levels.make()
        with trial(trainer, module, self.calibration) as collect:
            if collect is not None:
                look_ahead(
                    module,
                    collect.batches,
                    levels,
                    budgets,
                    known,
                    layers=self.layers,
                    exclude=self.exclude,
                    calibration=self.calibration,
                    forward=collect.forward,
                    mask_cost=self.mask_cost,
                    edges_at_8=self.edges_at_8,
                )

    def folder(self, trainer: Trainer) -> Path:
        """Where the results go: among the logs, or where it was asked for."""
        if self.output is not None:
            return Path(self.output)
        return Path(trainer.log_dir or trainer.default_root_dir) / "search"
