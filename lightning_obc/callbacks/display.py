"""Progress with time left, in the Rich bar or the TQDM bar that the Trainer has; tables that do not break the bars."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_obc.callbacks import compat

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Display:
    """A context in which ``update(description, completed, total)`` moves a bar on the main process.

    With a Rich bar, tasks are added to its display and hidden at the end; with a TQDM bar, a transient bar comes and
    goes; a Trainer without a progress bar shows nothing.
    """

    def __init__(self, trainer: Trainer) -> None:
        bar: Any = trainer.progress_bar_callback
        enabled = bar is not None and bar.is_enabled and trainer.is_global_zero
        self._rich = compat.rich_progress(bar) if enabled else None
        self._tqdm = enabled and self._rich is None and isinstance(bar, TQDMProgressBar)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for task in self._tasks.values():
            if self._rich is not None:
                # A removed task breaks the Rich bar's own bookkeeping; a hidden one does not.
                self._rich.update(task, visible=False)
            else:
                task.close()
        self._tasks.clear()

    def update(self, description: str, completed: float, total: float) -> None:
        """Move the bar of a phase: the part of the description before the first ``": "``. A total of 0 is unknown."""
        phase = description.partition(": ")[0]
        if self._rich is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._rich.add_task(description, total=total or float("inf"))
            self._rich.update(
                self._tasks[phase], description=description, completed=completed, total=total or float("inf")
            )
        elif self._tqdm:
            if phase not in self._tasks:
                self._tasks[phase] = _transient(total or None)
            bar = self._tasks[phase]
            bar.set_description_str(description, refresh=False)
            bar.update(completed - bar.n)


def _transient(total: float | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, leave=False, bar_format=_FORMAT, dynamic_ncols=True)
