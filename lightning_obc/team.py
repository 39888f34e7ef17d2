"""The layers that are solved at one time, shared over ranks: who solves what, and how every rank gets all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_obc.distributed import Ranks, all_or_none, check_same, exchange, is_sharded, reshard_
from lightning_obc.obs import LayerSolution
from lightning_obc.obs.parts import solution_from_parts, solution_parts
from lightning_obc.report import RankWork
from lightning_obc.shared_rows import LEAST_FLOPS, drive, serve
from lightning_obc.specs import Prune, Stage, Structured


@dataclass(frozen=True)
class Outcome:
    """What became of a layer: a solution, or the reason why there is none.

    Attributes:
        solution: The solution.
        status: ``"ok"``, or everything out of the ordinary.
        seconds: Time of the solve.
        inherited: See :class:`~lightning_obc.report.LayerReport`.
        total: Its ``total_error``.
    """

    solution: LayerSolution | None
    status: str
    seconds: float
    inherited: float | None = None
    total: float | None = None


@dataclass(frozen=True)
class Division:
    """Who does what.

    Attributes:
        together: Layers whose rows all ranks share, one after the other.
        owners: The rank that solves a layer, or drives the others on it, by its name.
    """

    together: tuple[str, ...]
    owners: Mapping[str, int]


def divide(costs: Mapping[str, float], splittable: Collection[str], size: int) -> Division:
    """Layers to ranks: the costliest first, each to the rank with the least to do so far.

    As long as one layer alone is more than a rank's fair share, all ranks share its rows instead.

    Args:
        costs: Flop by name.
        splittable: Names of the layers whose rows can be shared.
        size: Number of ranks.
    """
    order = sorted(costs, key=lambda name: -costs[name])
    together: list[str] = []
    left = sum(costs.values())
    for name in order if size > 1 else []:
        if costs[name] < LEAST_FLOPS or costs[name] * size <= left:
            break
        if name in splittable:
            together.append(name)
            left -= costs[name]
    owners = {name: index % size for index, name in enumerate(together)}
    loads = [0.0] * size
    for name in order:
        if name not in owners:
            owners[name] = min(range(size), key=loads.__getitem__)
            loads[owners[name]] += costs[name]
    return Division(tuple(together), owners)


def rows_splittable(stage: Stage) -> bool:
    """True when a stage does most of its work row by row, in kernels that can share rows."""
    structured = isinstance(stage, Prune) and isinstance(stage.parsed, Structured)
    return getattr(stage, "solver", "") == "obs" and not structured


def begin_together(model: nn.Module, ranks: Ranks) -> None:
    """Make sure that all ranks work on the same model: their parameters must agree, buffers are those of rank 0.

    Raises:
        RankError: Parameters differ; nothing has been changed then.
    """
    if ranks.size == 1:
        return
    reshard_(model)
    check_same(ranks, _unsharded(dict(model.named_parameters())), "parameters")
    with torch.no_grad():
        # Ranks that train together keep running statistics of their own data; those of rank 0 are what is saved.
        for buffer in model.buffers():
            ranks.broadcast_(buffer, 0)


@contextmanager
def same_on_all(model: nn.Module, ranks: Ranks | None) -> Iterator[None]:
    """A block that changes parameters and buffers alike on all ranks, or, when any rank fails in it, on none.

    Raises:
        RankError: They differ afterwards.
    """
    if ranks is None or ranks.size == 1:
        yield
        return
    values = [*model.parameters(), *model.buffers()]
    before = [value.detach().clone() for value in values]
    try:
        with all_or_none(ranks):
            yield
            check_same(ranks, _unsharded({**dict(model.named_parameters()), **dict(model.named_buffers())}), "weights")
    except Exception:
        with torch.no_grad():
            for value, old in zip(values, before, strict=True):
                value.copy_(old)
        raise


def _unsharded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}


@dataclass
class Team:
    """The ranks at work on one stage.

    Attributes:
        ranks: The ranks.
        work: What this rank has done so far.
    """

    ranks: Ranks
    work: RankWork = field(default_factory=RankWork)

    def __post_init__(self) -> None:
        self.work.rank = self.ranks.rank

    def divide(self, costs: Mapping[str, float], splittable: Collection[str]) -> Division:
        """See :func:`divide`."""
        return divide(costs, splittable, self.ranks.size)

    def solve(
        self,
        division: Division,
        costs: Mapping[str, float],
        devices: Mapping[str, torch.device],
        solve: Callable[[str], Outcome],
    ) -> dict[str, Outcome]:
        """Outcomes of all layers, the same on every rank.

        Args:
            division: Who does what.
            costs: Flop by name, of the layers to solve.
            devices: Device of each layer's weight on this rank.
            solve: Solves a layer that this rank owns. Its errors stop the stage on all ranks.
        """
        outcomes: dict[str, Outcome] = {}
        for name in (name for name in division.together if name in costs):
            with self._counted(1 / self.ranks.size, costs[name]):
                if division.owners[name] == self.ranks.rank:
                    outcomes[name] = drive(self.ranks, partial(solve, name))
                else:
                    serve(self.ranks, division.owners[name], devices[name])
            # The rank that fails must not leave the others waiting for it at the next layer.
            exchange(self.ranks)
        for name in costs:
            if division.owners[name] == self.ranks.rank and name not in outcomes:
                with self._counted(1, costs[name]):
                    outcomes[name] = solve(name)
        return self._sent(list(costs), division.owners, outcomes, devices)

    def end(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> list[RankWork]:
        """Compare parameters and masks over ranks; returns what each rank did, nothing for a single process.

        Raises:
            RankError: They differ.
        """
        if self.ranks.size == 1:
            return []
        check_same(self.ranks, _unsharded(dict(model.named_parameters())), "parameters")
        check_same(self.ranks, masks, "masks")
        return exchange(self.ranks, self.work)

    @contextmanager
    def _counted(self, share: float, flops: float) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.work.layers += share
        self.work.flops += share * flops
        self.work.seconds += time.perf_counter() - started

    def _sent(
        self,
        names: Sequence[str],
        owners: Mapping[str, int],
        outcomes: Mapping[str, Outcome],
        devices: Mapping[str, torch.device],
    ) -> dict[str, Outcome]:
        ranks = self.ranks
        if ranks.size == 1:
            return dict(outcomes)
        parts = {
            name: None if outcome.solution is None else solution_parts(outcome.solution)
            for name, outcome in outcomes.items()
        }
        found = exchange(ranks, {name: _headline(outcomes[name], parts[name]) for name in outcomes})
        received: dict[str, Outcome] = {}
        for name in names:
            owner = owners[name]
            status, seconds, inherited, total, scalars, specs = found[owner][name]
            solution = None
            if scalars is not None:
                mine = parts.get(name)
                tensors = {
                    key: ranks.broadcast_(torch.empty(shape, dtype=dtype) if mine is None else mine[1][key], owner)
                    for key, (shape, dtype) in specs.items()
                }
                solution = solution_from_parts(scalars, tensors, devices[name])
            received[name] = Outcome(solution, status, seconds, inherited, total)
        return received


def _headline(outcome: Outcome, parts: tuple[dict[str, Any], dict[str, torch.Tensor]] | None) -> tuple[Any, ...]:
    scalars, tensors = (None, {}) if parts is None else parts
    specs = {key: (list(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    return outcome.status, outcome.seconds, outcome.inherited, outcome.total, scalars, specs
