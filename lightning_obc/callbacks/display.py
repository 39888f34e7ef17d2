"""Progress with time left: in the Rich bar or the TQDM bar that the Trainer has, or as sparse lines without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_obc.callbacks import compat

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_PERCENT = 100.0
_SECONDS_BETWEEN_DRAWINGS = 0.1

SECONDS_BETWEEN_LINES = 30.0


def say(module: LightningModule, text: str) -> None:
    """Print on the main process, above the bar where one is running."""
    trainer = module.trainer
    if compat.swallows_prints(trainer.progress_bar_callback):
        if trainer.is_global_zero:
            print(text, flush=True)
    else:
        module.print(text)


class Display:
    """A context in which ``update(description, completed, total)`` moves a bar on the main process.

    With a running Rich bar, tasks are added to its display and hidden at the end; with any other bar, or a Rich bar
    that is not running at this moment, a transient TQDM bar comes and goes. A Trainer without a progress bar gets a
    line about every half minute, in Lightning's log.
    """

    def __init__(self, trainer: Trainer) -> None:
        bar: Any = trainer.progress_bar_callback
        enabled = bar is not None and bar.is_enabled
        self._rich: Any = compat.rich_progress(bar) if enabled else None
        self._tqdm = enabled and self._rich is None and trainer.is_global_zero
        self._lines = not enabled and trainer.is_global_zero
        self._tasks: dict[str, Any] = {}
        self._drawn = 0.0
        self._window: float | None = None

    def __enter__(self) -> Display:
        if self._rich is not None:
            # Rich takes the speed from the last half minute only: a layer that takes longer would have no time left.
            self._window, self._rich.speed_estimate_period = self._rich.speed_estimate_period, float("inf")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for phase in list(self._tasks):
            self._end(phase)
        if self._rich is not None and self._window is not None:
            self._rich.speed_estimate_period = self._window

    def update(self, description: str, completed: float, total: float) -> None:
        """Move the bar of a phase: the part of the description before the first ``": "``. A total of 0 is unknown."""
        phase = description.partition(": ")[0]
        if self._rich is not None:
            self._update_rich(phase, description, completed, total)
        elif self._tqdm or self._lines:
            if phase not in self._tasks:
                self._tasks[phase] = _transient(description, total or None) if self._tqdm else _Lines(total)
            bar = self._tasks[phase]
            bar.set_description_str(description, refresh=False)
            bar.update(completed - bar.n)
        if completed >= total > 0:
            # The next pass of the same kind has a clock of its own.
            self._end(phase)

    def _update_rich(self, phase: str, description: str, completed: float, total: float) -> None:
        # Its columns print counts: of batches as they are, of floating point operations as percent.
        if total != int(total) or total > 1e6:
            completed, total = int(_PERCENT * completed / total), _PERCENT
        if phase not in self._tasks:
            self._tasks[phase] = self._rich.add_task(description, total=int(total) or float("inf"))
        self._rich.update(self._tasks[phase], description=description, completed=int(completed))
        # Lightning's display draws only when it is told to.
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = time.monotonic()
            self._rich.refresh()

    def _end(self, phase: str) -> None:
        task = self._tasks.pop(phase, None)
        if task is None:
            return
        if self._rich is not None:
            # A removed task breaks the Rich bar's own bookkeeping; a hidden one does not.
            self._rich.update(task, visible=False)
            self._rich.refresh()
        else:
            task.close()


class _Lines:
    """Stands in for a bar where there is none: a line now and then."""

    def __init__(self, total: float) -> None:
        self.n, self.total, self.description = 0.0, total, ""
        self.started = self.last = time.monotonic()

    def set_description_str(self, description: str, refresh: bool = True) -> None:
        self.description = description

    def update(self, more: float) -> None:
        self.n += more
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        progress = "working"
        if self.total and self.n > 0:
            left = (now - self.started) * (self.total - self.n) / self.n
            progress = f"{100 * self.n / self.total:.0f} %, about {clock(left)} left"
        rank_zero_info(f"{self.description}: {progress}")

    def close(self) -> None:
        """Lines stay."""


def clock(seconds: float) -> str:
    """A duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _transient(description: str, total: float | None) -> Any:
    from tqdm import tqdm

    # To the stream of Lightning's own bars, so that they make room for each other.
    layout = _FORMAT if total else None
    return tqdm(desc=description, total=total, leave=False, bar_format=layout, dynamic_ncols=True, file=sys.stdout)
