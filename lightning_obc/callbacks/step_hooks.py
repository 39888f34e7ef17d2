"""A function that runs behind every step of every optimizer of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


class StepHooks:
    """Hooks of one fit on its optimizers. Copies and pickles have none."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": []}

    def attach(self, trainer: Trainer, after_step: Callable[[], None]) -> None:
        """Call ``after_step()`` behind every step, instead of what was attached before. Optimizers of other libraries
        may know no hooks: the end of a batch is the time for them."""
        self.detach()
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(lambda *_: after_step()))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
