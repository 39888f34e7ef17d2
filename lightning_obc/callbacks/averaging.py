"""Averages of the weights that other callbacks keep (EMA, SWA): they get the zeros and grids of the live weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_obc.callbacks import compat
from lightning_obc.callbacks.held import HeldCopy, HeldWeights


class Averages:
    """The averaged models of one Trainer.

    An average of weights from before and after a compression has neither zeros nor grid points. So an average starts
    again from the compressed model after each stage, and after every update it is put back on masks and grids: pruned
    weights are zero, frozen ones are those of the live model, and trained quantized ones go to the nearest grid point.
    """

    def __init__(self) -> None:
        self._copies: list[HeldCopy] = []

    def bind(self, trainer: Trainer, held: HeldWeights) -> None:
        """Connect with the averages that exist now."""
        self._copies = [held.copy_of(average.model) for average in compat.averages(trainer)]

    def unbind(self) -> None:
        self._copies = []

    def apply_(self) -> None:
        """Put the held weights of every average back in their place."""
        for copy in self._copies:
            copy.apply_()

    @torch.no_grad()
    def restart_(self, trainer: Trainer, module: LightningModule, held: HeldWeights) -> None:
        """The live model has been compressed: averages go on from it, as their first value."""
        for average in compat.averages(trainer):
            sources: Any = [*module.parameters(), *module.buffers()]
            targets: Any = [*average.model.parameters(), *average.model.buffers()]
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            if average.count is not None:
                average.count.clamp_(max=1)
        self.bind(trainer, held)

    def transferred_(self, held: HeldWeights) -> None:
        """An average may have been copied into the live model: training on the grid goes on from there."""
        if self._copies:
            held.rebase_()
