"""The search for non-uniform levels under a budget, inside a validation run of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_obc.allocation import LatencyTable, Level, SearchResult
from lightning_obc.allocation.latency import measure_latency
from lightning_obc.allocation.summary import loss_curves, point_report
from lightning_obc.allocation.tradeoff import default_levels, search
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display, say
from lightning_obc.callbacks.passes import collector
from lightning_obc.callbacks.recording import started_with
from lightning_obc.cli.exporting import onnx_sample
from lightning_obc.cli.search_options import COUNTED, SearchOptions
from lightning_obc.cli.stitched import StitchedRun
from lightning_obc.errors import ExportError, OBCError, SpecError
from lightning_obc.export import layer_runner, model_runner
from lightning_obc.layers import is_lookup, select_layers
from lightning_obc.layers.parts import LayerPart
from lightning_obc.report import default_formats, report_record, save_report


class SearchRun(StitchedRun):
    """Searches at the end of validation, and writes curve, recipes, checkpoints and reports."""

    def __init__(self, options: SearchOptions) -> None:
        super().__init__(options)
        self.options = options
        self.result: SearchResult | None = None
        self.directory: Path | None = None
        self._notes: list[str] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.options.look(trainer, pl_module)

    def figures(self, logged: dict[str, float]) -> None:
        """Find out from what a validation has logged that there is nothing to judge by.

        Raises:
            SpecError: There is no such figure, or several and none is named.
        """
        _metric_name(logged, self.options.metric, "; without a sanity check: --trainer.num_sanity_val_steps=0")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad(), Display(trainer) as display:
            self.result = self._search(trainer, pl_module, display)
        say(pl_module, f"\n{self.result.table()}")
        with torch.inference_mode(False), torch.no_grad():
            self.directory = self._folder(trainer)
            self._write(trainer, pl_module, self.result, self.directory)
        say(pl_module, f"curve, recipes, checkpoints and reports: {self.directory}")

    def _search(self, trainer: Trainer, module: LightningModule, display: Display) -> SearchResult:
        options = self.options
        collect = collector(trainer, module, options.calibration, display)
        name = _metric_name(compat.evaluate(trainer), options.metric)
        sign = 1.0 if options.mode == "max" else -1.0

        def metric(model: nn.Module) -> float:
            return sign * compat.evaluate(trainer)[name]

        levels = None if options.levels is None else options.levels.make()
        cost = self._cost(module, collect.batches, collect.forward, levels)
        result = search(
            module,
            collect.batches,
            options.budgets,
            metric,
            cost=cost,
            levels=levels,
            methods=options.methods,
            scores=options.scores,
            correct=options.correct,
            directory=options.database,
            layers=options.layers,
            exclude=options.exclude,
            calibration=options.calibration,
            forward=collect.forward,
            recipe=options.solve,
            activations=options.activations,
            edges_at_8=options.edges_at_8,
            mask_cost=options.mask_cost,
            spdy=options.spdy,
            progress=display.update,
            metric_name=name if sign > 0 else f"-{name}",
        )
        result.notes.extend(self._notes)
        return result

    def _cost(self, module: LightningModule, batches: Any, forward: Any, levels: list[Level] | None) -> Any:
        """The cost's name, or seconds per layer: measured through ONNX Runtime, or read from a file."""
        options = self.options
        if options.cost in COUNTED:
            return options.cost
        if options.cost != "seconds":
            return LatencyTable.load(options.cost)
        wanted = levels if levels is not None else default_levels(LatencyTable({}))
        # Generic kernels do not profit from zeros: levels are timed without theirs.
        timed = list(dict.fromkeys(Level(None, level.grid, level.activations) for level in [Level(), *wanted]))
        layers = {
            name: layer
            for name, layer in select_layers(module, options.layers, options.exclude).items()
            if not (isinstance(layer, LayerPart) or is_lookup(layer))
        }
        batch = next(iter(batches))
        runner, whole = layer_runner(threads=options.threads, linear=options.linear), None
        try:
            whole = model_runner(module, onnx_sample(module, batch), threads=options.threads)
        except OBCError as error:
            self._notes.append(f"The rest of the network is not in these times: it cannot be timed as a whole. {error}")
        table = measure_latency(module, layers, batch, levels=timed, runner=runner, whole=whole, forward=forward)
        if whole is not None:
            dense = sum(row[Level().name] for row in table.seconds.values())
            self._notes.append(
                f"Of these times {1e3 * table.overhead:.4g} ms per batch are what the dense network takes beyond its "
                f"layers ({1e3 * dense:.4g} ms, each timed alone in ONNX Runtime); they are part of every point."
            )
        return table

    def _folder(self, trainer: Trainer) -> Path:
        """The folder for the results, made."""
        folder = self.options.folder(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                "The folder cannot be made", got=f"{folder}: {error.strerror}", expected="a writable folder"
            ) from error
        return folder

    def _write(self, trainer: Trainer, module: LightningModule, result: SearchResult, folder: Path) -> None:
        result.write(folder)
        result.plot(folder / "curve.svg")
        dense = {key: value.detach().clone() for key, value in module.state_dict().items()}
        try:
            for budget in dict.fromkeys(point.budget for point in result.points):
                point = result.point(budget)
                solutions = result.apply_(module, point)
                levels = result.database.profile_levels(point.profile)
                chosen = {"profile": dict(point.profile), "budget": point.budget}
                self.carry(levels, solutions, result.quantizer, **chosen)
                trainer.save_checkpoint(folder / f"compressed-{budget:g}.ckpt", weights_only=False)
                record = report_record(
                    point_report(result, module, point, solutions),
                    title=f"{type(module).__name__} within {100 * budget:g} % of its {_COSTS[result.cost_name]}",
                    dense=dense,
                    curves=loss_curves(result.database),
                    trade_off=result.chart(),
                    reproduce="\n".join([*started_with(), f"# levels of all layers: {point.method}-{budget:g}.yaml"]),
                )
                target = folder / f"compressed-{budget:g}.report"
                save_report(record, target, formats=default_formats(), overwrite=True)
                _restore(module, dense)
        finally:
            if result.quantizer is not None:
                result.quantizer.disable()
            _restore(module, dense)


_COSTS = {"bops": "bit operations (BOPs)", "flops": "FLOPs", "bytes": "bytes", "seconds": "time"}


def _restore(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for key, value in module.state_dict().items():
        value.copy_(state[key])


def _metric_name(figures: dict[str, float], wanted: str | None, more: str = "") -> str:
    """The validation figure to judge by: the one named, or the only one; ``more`` ends the error's remedy.

    Raises:
        SpecError: There is no such figure, or several and none is named.
    """
    if wanted in figures:
        return str(wanted)
    if wanted is None and len(figures) == 1:
        return next(iter(figures))
    raise SpecError(
        "The search needs one validation figure to judge by",
        got=repr(wanted) if wanted is not None else "no name",
        expected=f"one of {list(figures)}" if figures else "figures that validation_step logs",
        remedy=f"name it with metric, and say with mode whether large or small is good{more}",
    )
