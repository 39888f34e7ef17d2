"""A progress bar with time left, for runs without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, float, float], None]


@contextmanager
def shown(progress: Progress | bool) -> Iterator[Progress | None]:
    """Turn ``progress`` of a public function into a callback: a tqdm bar for True, nothing for False."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        from tqdm.auto import tqdm

        bars: dict[str, tqdm] = {}

        def update(description: str, completed: float, total: float) -> None:
            # One bar for each phase: calibration and solving have different units of work.
            phase = description.partition(":")[0]
            if phase not in bars:
                bars[phase] = tqdm(
                    total=total, desc=description, bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}"
                )
            bars[phase].set_description_str(description, refresh=False)
            bars[phase].update(completed - bars[phase].n)

        try:
            yield update
        finally:
            for bar in bars.values():
                bar.close()
