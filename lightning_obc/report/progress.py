"""A progress bar with time left, for runs without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

Progress = Callable[[str, float, float], None]


@contextmanager
def shown(progress: Progress | bool) -> Iterator[Progress | None]:
    """Turn ``progress`` of a public function into a callback: a tqdm bar for True, nothing for False."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        bar = _Bar()
        try:
            yield bar.update
        finally:
            bar.close()


class _Bar:
    """One tqdm bar at a time: calibration and solving count different units of work."""

    def __init__(self) -> None:
        self.phase = ""
        self.bar: tqdm | None = None

    def update(self, description: str, completed: float, total: float) -> None:
        from tqdm.auto import tqdm

        phase = description.partition(":")[0]
        if phase != self.phase or self.bar is None:
            self.close()
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining} left"
            self.bar, self.phase = tqdm(total=total or None, bar_format=layout if total else None), phase
        self.bar.set_description_str(description, refresh=False)
        self.bar.update(completed - self.bar.n)
        if total and completed >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
