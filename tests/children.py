"""Processes of their own for tests, that start in no time.

They are forks of a server that has imported PyTorch, Lightning and this package, which takes seconds, and has done
nothing else: it has no threads, no model and no random numbers drawn. What a fresh interpreter does when it imports the
package is what ``test_imports.py`` looks at.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning_obc.pipeline", "lightning_obc.callbacks", "lightning_obc.allocation"])


@dataclass(frozen=True)
class Child:
    """A process that was started; ``output`` is a file that gets both of its streams."""

    process: BaseProcess
    output: Path

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, limit: float) -> Child:
        """Wait until it ends; what takes more than ``limit`` seconds is killed."""
        self.process.join(limit)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self

    def text(self) -> str:
        """What it has printed; nothing where it could not even start."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def start(
    function: Callable[..., object], *arguments: Any, folder: Path, output: Path, environment: Mapping[str, str] = {}
) -> Child:
    """Call a function that can be pickled in a process of its own, in a folder and with more environment variables.

    Variables that a library reads when it is imported come too late.
    """
    job = (function, arguments, str(folder), str(output), dict(environment))
    process = SERVER.Process(target=_run, args=job)
    process.start()
    return Child(process, output)


def script(code: str, *arguments: str, folder: Path, limit: float = 150.0) -> Child:
    """Run the code of a script to its end, as ``python -c`` would."""
    return start(_script, code, arguments, folder=folder, output=folder / "output.txt").wait(limit)


def _run(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    folder: str,
    output: str,
    environment: dict[str, str],
) -> None:
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    os.chdir(folder)
    function(*arguments)


def _script(code: str, arguments: tuple[str, ...]) -> None:
    main = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = main, ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), main.__dict__)
