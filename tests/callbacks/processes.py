"""Starts the ranks of a test as processes of their own, with a time limit, and brings back what each of them saved.

Run as a script, it is one of these ranks: ``processes.py MODULE FUNCTION RESULT`` calls the function and saves what it
returns. The processes know of each other what Lightning's own launcher would tell them.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_processes(module: str, function: str, size: int, folder: Path, limit: float = 150.0) -> list[Any]:
    """What ``function()`` of a module in this folder returns on every rank.

    Raises:
        AssertionError: A rank failed, or did not end in time; all are ended then.
    """
    import torch

    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": "0",
        "OBC_TEST_RANKS": str(size),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OBC_TEST_FOLDER": str(folder),
    }
    command = [sys.executable, __file__, module, function]
    results = [folder / f"{function}-{rank}-of-{size}.pt" for rank in range(size)]
    logs = [result.with_suffix(".log").open("w+") for result in results]
    ranks = [
        subprocess.Popen(
            [*command, str(result)],
            env=environment | {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        for rank, (result, log) in enumerate(zip(results, logs, strict=True))
    ]
    try:
        codes = [rank.wait(timeout=limit) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        texts = [log.seek(0) or log.read() for log in logs]
        for log in logs:
            log.close()
    tails = "\n".join(f"--- rank {rank}\n{text[-6000:]}" for rank, text in enumerate(texts))
    assert codes == [0] * size, f"exit codes {codes}\n{tails}"
    return [
        torch.load(result, weights_only=False) | {"output": text} for result, text in zip(results, texts, strict=True)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    torch.save(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(), sys.argv[3])
