"""The calibration of a recipe, tried when a run begins: what cannot work ends it then, and not at its stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_obc.calibration import Collector, call_forward, preserved_rng, untouched
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display
from lightning_obc.callbacks.passes import collector, edges
from lightning_obc.distributed import all_or_none
from lightning_obc.errors import LayerNotReachedError
from lightning_obc.layerwise import Edges
from lightning_obc.planning import plan_stage
from lightning_obc.rehearsal import rehearse
from lightning_obc.specs import Calibration, Stage


class Beginning:
    """Tries one calibration batch at the beginning of a run, or the first training batch where that must do.

    Nothing is changed by it: not the model, the random states, nor the data. Training data that may be readable only
    once is not read for it: the first batch that training itself reads serves then.
    """

    def __init__(self) -> None:
        self._waiting: list[Stage] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_waiting": []}

    def look(
        self, trainer: Trainer, module: LightningModule, spec: Calibration, stages: Sequence[Stage], *, trying: bool
    ) -> Optional[Edges]:
        """The layers that batches reach first and last, as far as a stage asks for them and data can be read.

        Args:
            trainer: At the beginning of a run, with model and data.
            module: Its module.
            spec: How the stages will calibrate.
            stages: Stages that this run has before it.
            trying: Also try whether a calibration batch reaches all their layers.

        Raises:
            CalibrationError: The model cannot be called with a calibration batch, or there is no data.
            EmptyCalibrationError: There is no batch. LayerNotReachedError: Batches do not reach some layers.
        """
        self._waiting = []
        if not stages:
            return None
        with ExitStack() as stack:
            inside = torch.inference_mode(False), torch.no_grad(), untouched(module), compat.unlogged(module)
            for context in (*inside, all_or_none(compat.ranks(trainer))):
                stack.enter_context(context)
            display = stack.enter_context(Display(trainer))
            source = compat.triable_source(trainer)
            if source is None:
                self._waiting = list(stages) if trying else []
                return None
            reached = edges(trainer, module, spec, stages, source)
            if trying:
                plans = [plan_stage(module, stage, spec, reached) for stage in stages]
                display.update("trying one calibration batch", 0, 0)
                rehearse(collector(trainer, module, spec, display, source), plans)
        return reached

    def look_at(self, trainer: Trainer, module: LightningModule, spec: Calibration, batch: Any) -> None:
        """Try the first batch of the training, where no other could be read beforehand.

        One batch of unknown data does not prove that a layer is never reached: that is a warning here.

        Raises:
            CalibrationError: The model cannot be called with it.
        """
        stages, self._waiting = self._waiting, []
        if not stages:
            return

        def forward(model: nn.Module, own: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return call_forward(model, own)

        # Forward passes may write to their inputs.
        mine = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, batch)
        collect = Collector(module, [mine], spec, forward=forward, ranks=compat.ranks(trainer))
        with torch.no_grad(), compat.unlogged(module), preserved_rng():
            try:
                rehearse(collect, [plan_stage(module, stage, spec) for stage in stages])
            except LayerNotReachedError as error:
                rank_zero_warn(
                    f"The first training batch does not reach some layers of the recipe: {error.got}. If no "
                    f"calibration batch does, their stage will end the run. {(error.remedy or '').capitalize()}."
                )
