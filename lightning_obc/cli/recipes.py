"""A recipe of a search run on a dense model, inside a validation run that has loaded and scored it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_obc.allocation import ProfileRecipe, read_recipe, run_recipe
from lightning_obc.allocation.recipe import recipe_layers
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display
from lightning_obc.callbacks.passes import collector
from lightning_obc.callbacks.recording import free_path
from lightning_obc.cli.ahead import trial
from lightning_obc.cli.stitched import StitchedRun
from lightning_obc.report import render
from lightning_obc.report.tables import figure_cells
from lightning_obc.specs import Calibration


@dataclass(frozen=True)
class Applied:
    """What a recipe has made.

    Attributes:
        recipe: The recipe.
        figures: Validation figures of the dense and the compressed model.
        checkpoint: The compressed checkpoint; None when none was wanted.
    """

    recipe: ProfileRecipe = field(repr=False)
    figures: Mapping[str, tuple[float, float]]
    checkpoint: Path | None


class RecipeRun(StitchedRun):
    """Runs a recipe at the end of validation, measures the model again, and writes the checkpoint."""

    def __init__(self, recipe: Path, output: Union[bool, str]) -> None:
        self.path, self.output = recipe, output
        # Before anything else happens: a file that cannot be read.
        self.recipe = read_recipe(recipe)
        super().__init__(self.recipe)
        self.result: Applied | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = recipe_layers(pl_module, self.recipe)
        with trial(trainer, pl_module, Calibration(**self.recipe.calibration)) as collect:
            if collect is not None:
                collect.order(layers)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad(), Display(trainer) as display:
            dense = compat.evaluate(trainer)
            collect = collector(trainer, pl_module, Calibration(**self.recipe.calibration), display)
            source = compat.calibration_source(trainer)
            done = run_recipe(pl_module, self.path, source, forward=collect.forward, progress=display.update)
            self.carry(done.recipe.levels, done.solutions, done.quantizer)
            small = compat.evaluate(trainer)
        figures = {name: (dense[name], value) for name, value in small.items() if name in dense}
        rows = [[name, *figure_cells(*pair)] for name, pair in figures.items()]
        pl_module.print("\n" + render(f"Recipe {self.path.name}", ("figure", "dense", "compressed", "change"), rows))
        self.result = Applied(self.recipe, figures, self._save(trainer))

    def _save(self, trainer: Trainer) -> Path | None:
        if self.output is False:
            return None
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        path = free_path(folder, self.path.stem) if self.output is True else Path(self.output)
        path = compat.same_path(trainer, path)
        trainer.save_checkpoint(path, weights_only=False)
        return path
