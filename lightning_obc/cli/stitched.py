"""What ``search`` and ``apply`` share: their checkpoints carry the compression of a stitched model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from lightning_obc.activations import ActivationQuantizer
from lightning_obc.allocation import Level
from lightning_obc.callbacks.held import HeldLayer
from lightning_obc.callbacks.state import PREFIX, RunState
from lightning_obc.callbacks.timetable import Timetable
from lightning_obc.obs import LayerSolution


class StitchedRun(Callback):
    """Base of the callbacks that stitch: in checkpoints they stand where an ``OBCCallback`` would.

    Args:
        identity: What the run is; its representation tells the states of different runs apart.
    """

    def __init__(self, identity: object) -> None:
        self._identity, self._state = repr(identity), dict[str, Any]()

    @property
    def state_key(self) -> str:
        return PREFIX + hashlib.sha256(self._identity.encode()).hexdigest()[:12]

    def state_dict(self) -> dict[str, Any]:
        """The compression that the saved weights carry, as an ``OBCCallback`` would keep it, with activation ranges."""
        return self._state

    def carry(
        self,
        levels: Mapping[str, Level],
        solutions: Mapping[str, LayerSolution],
        quantizer: ActivationQuantizer | None,
        **more: Any,
    ) -> None:
        """Take over what has been stitched, for the checkpoints that are saved from now on."""
        state = RunState(Timetable([]))
        for name, solution in solutions.items():
            level = levels.get(name, Level())
            if level.weights != Level():
                mask = None if level.pattern is None else solution.mask.detach().cpu()
                state.held.layers[name] = HeldLayer(mask, solution.grid, None, level.pattern)
        state.inputs = {} if quantizer is None else quantizer.frozen()
        self._state = {**state.state_dict(), **more}
