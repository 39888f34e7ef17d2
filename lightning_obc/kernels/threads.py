"""Rows in parallel threads, for compiled code that releases the GIL.

Plain Python threads drive it, so that nothing depends on numba's threading layers: calls from several threads, and from
forked children, are safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def run_blocks(count: int, block: int, threads: int, begin: Callable[[], Callable[[int, int], None]]) -> None:
    """Do ``count`` items in blocks of ``block``, each by the thread that is free first.

    Args:
        begin: Called once by every thread; returns what does the items ``first … last``, with that thread's own memory.
    """
    starts = itertools.count(0, block)

    def work() -> None:
        do = begin()
        for start in iter(lambda: next(starts), None):
            if start >= count:
                return
            do(start, min(start + block, count))

    if threads == 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
