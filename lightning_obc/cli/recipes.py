"""A recipe of a search run on a dense model, inside a validation run that has loaded and scored it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_obc.activations import ActivationQuantizer
from lightning_obc.allocation import Level, ProfileRecipe, read_recipe, run_recipe
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display
from lightning_obc.callbacks.held import HeldLayer
from lightning_obc.callbacks.passes import collector
from lightning_obc.callbacks.state import PREFIX, RunState
from lightning_obc.callbacks.timetable import Timetable
from lightning_obc.obs import LayerSolution
from lightning_obc.report import render
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


def compression_state(
    levels: Mapping[str, Level], solutions: Mapping[str, LayerSolution], quantizer: ActivationQuantizer | None
) -> dict[str, Any]:
    """What a checkpoint keeps of a stitched model: the state that an ``OBCCallback`` would have."""
    state = RunState(Timetable([]))
    for name, solution in solutions.items():
        level = levels.get(name, Level())
        if level.weights != Level():
            mask = None if level.pattern is None else solution.mask.detach().cpu()
            state.held.layers[name] = HeldLayer(mask, solution.grid, None, level.pattern)
    state.inputs = {} if quantizer is None else quantizer.frozen()
    return state.state_dict()


class RecipeRun(Callback):
    """Runs a recipe at the end of validation, measures the model again, and writes the checkpoint."""

    def __init__(self, recipe: Path, output: Union[bool, str]) -> None:
        self.path, self.output = recipe, output
        # Before anything else happens: a file that cannot be read.
        self.recipe = read_recipe(recipe)
        self.result: Applied | None = None
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        return PREFIX + hashlib.sha256(repr(self.recipe).encode()).hexdigest()[:12]

    def state_dict(self) -> dict[str, Any]:
        """The compression that the saved weights carry."""
        return self._state

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad(), Display(trainer) as display:
            dense = compat.evaluate(trainer)
            collect = collector(trainer, pl_module, Calibration(**self.recipe.calibration), display)
            source = compat.calibration_source(trainer)
            done = run_recipe(pl_module, self.path, source, forward=collect.forward, progress=display.update)
            self._state = compression_state(done.recipe.levels, done.solutions, done.quantizer)
            small = compat.evaluate(trainer)
        figures = {name: (dense[name], value) for name, value in small.items() if name in dense}
        rows = [[name, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] for name, (a, b) in figures.items()]
        pl_module.print("\n" + render(f"Recipe {self.path.name}", ("figure", "dense", "compressed", "change"), rows))
        self.result = Applied(self.recipe, figures, self._save(trainer))

    def _save(self, trainer: Trainer) -> Path | None:
        if self.output is False:
            return None
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        path = folder / f"{self.path.stem}.ckpt" if self.output is True else Path(self.output)
        trainer.save_checkpoint(path, weights_only=False)
        return path
