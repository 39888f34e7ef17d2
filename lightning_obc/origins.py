"""Weights of layers before the first of several stages, so that the last can tell what all of them have cost.

A stage measures its error against the weights that it began with. Of a layer that is pruned and then quantized, the
second error says nothing of the first; both together are the error against the weights before the first stage. These
are kept on the CPU, one copy in the layer's own type (less than the solution of one stage, which reports keep too), of
layers that a later stage solves again, and dropped with the last of them.

What moved the weights in between, such as training, is no error of compression: a layer that does not begin a stage
with what the stage before left has no such figure any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_obc.distributed import digest
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.obs import LayerSolution
from lightning_obc.obs.measure import relative_error


@dataclass(frozen=True)
class Origin:
    """One layer before its first stage.

    Attributes:
        weight: ``[g, R, d]``, the layer's dtype, on the CPU.
        left: Digest of the weight that the last finished stage left in the layer; empty before the first.
    """

    weight: Tensor
    left: str = ""


class Origins:
    """The weights before the first stage, of all layers that several stages solve one after the other."""

    def __init__(self) -> None:
        self._kept: dict[str, Origin] = {}
        self._lost: set[str] = set()
        self._plans: list[frozenset[str]] = []
        self._is_open = False

    def expect(self, plans: Sequence[Collection[str]], solved: Collection[str] = ()) -> None:
        """Stages are about to run, with nothing but corrections between them.

        Args:
            plans: Names of the layers of each.
            solved: Layers that stages have solved before.
        """
        self._plans, self._is_open = [frozenset(names) for names in plans], True
        self._lost = set(solved) - set(self._kept)

    def begin(self) -> None:
        """The first of the expected stages begins."""
        self._plans = self._plans[1:]

    def meet(self, name: str, weight: Tensor) -> None:
        """A layer's weight ``[g, R, d]`` as a stage finds it."""
        known = self._kept.get(name)
        if known is not None and known.left:
            if known.left != digest(weight):
                self._lose(name)
        elif name not in self._lost and self._is_expected(name):
            with torch.inference_mode(False):
                self._kept[name] = Origin(weight.detach().to("cpu", copy=True))

    def error(self, name: str, solution: LayerSolution, statistic: Hessian | PairedHessian) -> float | None:
        """Relative output error of a solution against the weight before the layer's first stage, on the statistic that
        it was solved for; None where that weight is unknown, or something else has moved it since."""
        if not self._is_open or name in self._lost:
            return None
        known = self._kept.get(name)
        if known is None or not known.left:
            return solution.relative_error
        return relative_error(known.weight.to(solution.weight.device), solution.weight, statistic)

    def leave(self, name: str, weight: Tensor) -> None:
        """A stage is over: what it leaves in a layer that it solved, ``[g, R, d]``."""
        if name in self._kept and self._is_expected(name):
            self._kept[name] = replace(self._kept[name], left=digest(weight))
        else:
            self._lose(name)

    def forget(self) -> None:
        """All expected stages are over: nothing is kept."""
        self._kept, self._plans, self._is_open = {}, [], False

    def _is_expected(self, name: str) -> bool:
        return any(name in names for names in self._plans)

    def _lose(self, name: str) -> None:
        self._kept.pop(name, None)
        self._lost.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only; empty but for a run that was stopped between two stages."""
        return {name: {"weight": one.weight, "left": one.left} for name, one in self._kept.items() if one.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = {name: Origin(one["weight"], one["left"]) for name, one in state.items()}
        self._lost, self._plans, self._is_open = set(), [], False
