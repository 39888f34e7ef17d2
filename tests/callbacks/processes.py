"""Starts the ranks of a test as processes of their own, with a time limit, and brings back what each of them saved.

The processes know of each other what Lightning's own launcher would tell them.
"""

from __future__ import annotations

import importlib
import socket
import time
from pathlib import Path
from typing import Any

from children import start


def run_processes(module: str, function: str, size: int, folder: Path, limit: float = 300.0) -> list[Any]:
    """What ``function()`` of a module in this folder returns on every rank.

    Raises:
        AssertionError: A rank failed, or did not end in time; all are ended then.
    """
    import torch

    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(size),
        "OBC_TEST_RANKS": str(size),
        "OBC_TEST_FOLDER": str(folder),
    }
    results = [folder / f"{function}-{rank}-of-{size}.pt" for rank in range(size)]
    ranks = [
        start(
            _rank,
            module,
            function,
            str(result),
            folder=folder,
            output=result.with_suffix(".log"),
            environment=environment | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
        )
        for rank, result in enumerate(results)
    ]
    end = time.monotonic() + limit
    codes = [rank.wait(max(0.0, end - time.monotonic())).code for rank in ranks]
    texts = [rank.text() for rank in ranks]
    tails = "\n".join(f"--- rank {rank}\n{text[-6000:]}" for rank, text in enumerate(texts))
    assert codes == [0] * size, f"exit codes {codes}\n{tails}"
    return [
        torch.load(result, weights_only=False) | {"output": text} for result, text in zip(results, texts, strict=True)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(module: str, function: str, result: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.save(getattr(importlib.import_module(module), function)(), result)
