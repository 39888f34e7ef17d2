"""What a benchmark ran on, how fast its matrix unit is, and how much memory a call takes."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

Clock = Callable[[], float]


def describe() -> str:
    """CPU model, threads, and versions; no names of machines or people."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model}, {capability}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    )


def matrix_speed(size: int = 1536, repeats: int = 3, clock: Clock = time.perf_counter) -> float:
    """Float32 flop per second of a square product, the median of a few."""
    a = torch.randn(size, size)
    return statistics.median(2 * size**3 / seconds(lambda: a @ a, clock) for _ in range(repeats))


def seconds(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that a call adds to this process's resident memory at its peak, sampled every 2 ms."""
    statm = Path("/proc/self/statm")
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, resident()) - before
