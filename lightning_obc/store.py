"""Durable solutions of single layers: an interrupted run goes on behind the last layer that it solved.

One safetensors file per layer and stage, written beside its place and renamed. Its header has the scalars of the
solution, a checksum of the tensors, and a fingerprint of everything that determines the result: the stage, the weight
that was solved, the calibration statistic and the version of the package.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_obc.distributed import digest
from lightning_obc.errors import ExportError, FingerprintError
from lightning_obc.files import PathLike, replacing
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.obs import LayerSolution
from lightning_obc.obs.parts import solution_from_parts, solution_parts
from lightning_obc.specs import Stage

FORMAT = 1
# The order of floating-point sums may differ between two runs; data, seeds and models that differ move far more.
_SAME_STATISTIC = 1e-4


@dataclass(frozen=True)
class LayerProblem:
    """What determines the solution of a layer.

    Attributes:
        name: Qualified name of the layer.
        stage: What is done to it.
        weight: ``[g, R, d]``, the weight before.
        statistic: The calibration statistic that the solver gets.
        mixing: Share of the errors of earlier layers that this one makes up for (0 without recentring).
        pooled: True when the groups of a convolution share one Hessian.
    """

    name: str
    stage: Stage
    weight: Tensor
    statistic: Hessian | PairedHessian
    mixing: float = 0.0
    pooled: bool = False

    def fingerprint(self) -> dict[str, Any]:
        """Plain values: the stage, a digest of the weight, and a summary of the statistic."""
        return {
            "format": FORMAT,
            "layer": self.name,
            "version": _version(),
            "stage": repr(self.stage),
            "mixing": self.mixing,
            "pooled": self.pooled,
            "weight": f"{self.weight.dtype} {list(self.weight.shape)} {digest(self.weight)}",
            "statistic": _summary(self.statistic),
        }


class SolutionStore:
    """A folder with the solutions of one run.

    Args:
        folder: Made if it is not there.

    Raises:
        ExportError: The folder cannot be made or written into.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / ".writable"):
                pass
            (self.folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise ExportError(
                "The folder for solved layers cannot be made",
                got=f"{self.folder}: {error.strerror or error}",
                expected="a folder that can be written",
                remedy="choose another store",
            ) from error

    def stage(self, index: int) -> StageStore:
        """The part of the store that belongs to stage ``index`` of the recipe."""
        return StageStore(self.folder, index)


class StageStore:
    """Solved layers of one stage; see :class:`SolutionStore`."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder, self.index = folder, index

    def path(self, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]
        tag = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / f"stage{self.index:02d}-{readable}-{tag}.safetensors"

    def load(self, problem: LayerProblem) -> LayerSolution | None:
        """The stored solution of a problem; None when there is none, or its file is damaged (a warning says so).

        Raises:
            FingerprintError: The file was written for another stage, weight or calibration.
        """
        path = self.path(problem.name)
        if not path.exists():
            return None
        try:
            header, tensors = _read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            warnings.warn(f"{path} is damaged and the layer is solved again: {error}")
            return None
        _check(path, json.loads(header["fingerprint"]), problem.fingerprint())
        return solution_from_parts(json.loads(header["solution"]), tensors, problem.weight.device)

    def save(self, problem: LayerProblem, solution: LayerSolution) -> None:
        """Write a solution, whole or not at all. A file that cannot be written costs a warning, not the run."""
        scalars, tensors = solution_parts(solution)
        header = {
            "fingerprint": json.dumps(problem.fingerprint()),
            "solution": json.dumps(scalars),
            "checksum": _checksum(tensors),
        }
        try:
            with replacing(self.path(problem.name)) as part:
                save_file(tensors, part, metadata=header)
        except (ExportError, SafetensorError) as error:
            warnings.warn(f"The solution of {problem.name} is not durable: {error}")


def _version() -> str:
    try:
        return version("lightning-obc")
    except PackageNotFoundError:
        return "not installed"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(" ".join(f"{key} {digest(tensors[key])}" for key in sorted(tensors)).encode()).hexdigest()


def _summary(statistic: Hessian | PairedHessian) -> dict[str, Any]:
    """Sample numbers, and of every matrix its size and the mean of its entries against fixed signs."""
    paired = isinstance(statistic, PairedHessian)
    hessian = statistic.hessian if isinstance(statistic, PairedHessian) else statistic
    matrices = [hessian.halves[0], hessian.halves[1]]
    if isinstance(statistic, PairedHessian):
        matrices += [statistic.cross, statistic.difference]
    summary = [figure for matrix in matrices for figure in _figures(matrix)]
    if hessian.rows is not None:
        summary += [float(hessian.rows.sum()), float((hessian.rows * _ramp(hessian.rows)).sum())]
    return {"samples": list(hessian.samples), "paired": paired, "figures": summary}


def _figures(matrix: Tensor) -> list[float]:
    """Figures of a ``[g, d, d]`` matrix of which no two calibrations share all."""
    ramp = _ramp(matrix)
    weighted = (matrix @ ramp.unsqueeze(-1)).squeeze(-1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    norm = float(matrix.norm())
    return [norm, float(diagonal.sum()), float((diagonal * ramp).sum()), float((weighted * ramp).sum())]


def _ramp(like: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape[:-1])


def _check(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    plain = [key for key in wanted if key != "statistic" and stored.get(key) != wanted[key]]
    other = plain if _close(stored.get("statistic", {}), wanted["statistic"]) else [*plain, "statistic"]
    if other:
        parts = "; ".join(f"{key} {stored.get(key)}" for key in other if key != "statistic")
        raise FingerprintError(
            "Solved layers in the store belong to another run: another " + ", another ".join(other),
            got=f"{path}" + (f": {parts}" if parts else ""),
            expected="; ".join(f"{key} {wanted[key]}" for key in other if key != "statistic")
            or "the same calibration data, seed, mode and earlier layers",
            remedy=f"delete the folder {path.parent}, or give this run a store of its own",
        )


def _close(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a.get("samples") != b["samples"] or a.get("paired") != b["paired"]:
        return False
    mine, theirs = a["figures"], b["figures"]
    # Against the norm of its own matrix: a difference that is zero but for rounding has no scale of its own.
    size = max((abs(x) for x in theirs), default=0.0)
    return len(mine) == len(theirs) and all(
        abs(x - y) <= _SAME_STATISTIC * size for x, y in zip(mine, theirs, strict=True)
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    if header["checksum"] != _checksum(tensors):
        raise ValueError("its checksum does not fit")
    return header, tensors
