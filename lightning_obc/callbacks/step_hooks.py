"""A function that runs behind every step of every optimizer of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

Touched = Callable[[frozenset[int]], bool]


class StepHooks:
    """Hooks of one fit on its optimizers. Copies and pickles have none."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": []}

    def attach(self, trainer: Trainer, after_step: Callable[[Touched | None], None]) -> None:
        """Call ``after_step`` behind every step, instead of what was attached before. Optimizers of other libraries
        may know no hooks: the end of a batch is the time for them.

        Args:
            trainer: The trainer, with its optimizers.
            after_step: Is told which parameters, by their ids, the step may have changed; None means all. With several
                optimizers the others' must be left alone: a graph through them may wait for its backward pass (as in
                a GAN, whose generator has made its output before the discriminator steps).
        """
        self.detach()
        optimizers = list(trainer.optimizers)
        for optimizer in optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                others = [other for other in optimizers if other is not optimizer]

                def hook(stepped: Any, *_: Any, others: list[Any] = others) -> None:
                    after_step(_touched_by(stepped, others) if others else None)

                self._handles.append(optimizer.register_step_post_hook(hook))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _touched_by(optimizer: Any, others: list[Any]) -> Touched:
    """Parameters of this optimizer, and those of none."""
    mine, theirs = _ids([optimizer]), _ids(others)
    return lambda parameters: bool(parameters & mine) or not parameters & theirs


def _ids(optimizers: list[Any]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
