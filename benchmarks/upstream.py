"""Research code from a user's own checkout, run on a CPU without a change to its files.

Nothing of that code is part of this project. What it needs to run without CUDA is patched in this process for the time
of a call, and listed in :data:`ADJUSTMENTS`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

ADJUSTMENTS = (
    "`torch.cuda.synchronize` does nothing (the code calls it after every batch of rows)",
    "its log lines are read instead of printed: the loss that it reports is in them",
    "GPTQ and SparseGPT only: `transformers` is an empty stand-in at import, of which they need one class name",
    "twin in float64 only: `Tensor.float` means `Tensor.double`, and the default type is float64",
)
# What a checkout must have, by the name of its option.
NEEDED = {
    "checkout": ("trueobs", "TrueOBS", "https://github.com/IST-DASLab/OBC"),
    "gptq": ("gptq", "GPTQ", "https://github.com/IST-DASLab/gptq"),
    "sparsegpt": ("sparsegpt", "SparseGPT", "https://github.com/IST-DASLab/sparsegpt"),
}
_REPORTED = re.compile(r"error\s+(\S+)")


@dataclass(frozen=True)
class Upstream:
    """A checkout that is ready to run.

    Attributes:
        solver: The class that holds one layer.
        quantizer: The class of its grids.
        source: Address and commit.
    """

    solver: Any
    quantizer: Any
    source: str


def load(option: str, folder: Path) -> Upstream:
    """Import a checkout's solver and its grids, and leave no trace of their module names.

    Raises:
        SystemExit: The folder is no such checkout.
    """
    name, kind, address = NEEDED[option]
    for file in (f"{name}.py", "quant.py"):
        if not (folder / file).is_file():
            raise SystemExit(f"--{option} {folder}: no {file} in it; expected a checkout of {address}")
    stand_in = types.ModuleType("transformers")
    stand_in.Conv1D = type("Conv1D", (), {})  # type: ignore[attr-defined]
    names = ("transformers", "quant", name)
    before = {each: sys.modules.pop(each) for each in names if each in sys.modules}
    try:
        sys.modules["transformers"] = stand_in
        with mock.patch.object(sys, "path", [str(folder), *sys.path]), contextlib.redirect_stdout(io.StringIO()):
            solver = getattr(importlib.import_module(name), kind)
            quantizer = importlib.import_module("quant").Quantizer
    finally:
        for each in names:
            sys.modules.pop(each, None)
        sys.modules.update(before)
    return Upstream(solver, quantizer, f"{address} at {commit_of(folder)}")


def commit_of(folder: Path) -> str:
    """The commit of a checkout, and whether its files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return "an unknown commit (not the root of a git checkout)"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit (no git checkout)"


@contextlib.contextmanager
def on_cpu(double: bool = False) -> Iterator[io.StringIO]:
    """Upstream's code runs on a CPU inside, in float64 where asked for; what it prints is collected."""
    log = io.StringIO()
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        stack.enter_context(contextlib.redirect_stdout(log))
        if double:
            stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float64)
        yield log


@dataclass(frozen=True)
class Solved:
    """What upstream's code made of one layer.

    Attributes:
        weights: ``[R, d]``, one for every level.
        reported: The loss that it reports for each.
        seconds: Time of the solver; making the layer is left out.
    """

    weights: list[Tensor]
    reported: list[float]
    seconds: float


Solve = Callable[[Upstream, Any, nn.Linear], "list[Tensor] | None"]


def run(
    upstream: Upstream,
    solve: Solve,
    weight: Tensor,
    hessian: Tensor,
    clock: Callable[[], float],
    *,
    double: bool = False,
    **options: Any,
) -> Solved:
    """Solve ``weight [R, d]`` under the undamped ``hessian [d, d]`` with upstream's code.

    Args:
        upstream: Whose code.
        solve: Calls it on a solver and its layer; returns the weights of all levels, None for those in the layer.
        weight: Any floating type.
        hessian: float64.
        clock: Seconds.
        double: In float64 throughout, instead of float32.
        **options: For the solver's constructor.
    """
    dtype = torch.float64 if double else torch.float32
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.to(dtype).clone()
    with on_cpu(double) as log:
        solver = upstream.solver(layer, **options)
        solver.H = hessian.clone() if solver.H.dtype == torch.float64 else hessian.to(dtype)
        start = clock()
        weights = solve(upstream, solver, layer)
        seconds = clock() - start
    found = [layer.weight.data] if weights is None else weights
    reported = [float(number) for number in _REPORTED.findall(log.getvalue())]
    return Solved([each.reshape(weight.shape).clone() for each in found], reported, seconds)
