"""All that a run asks of calibration data: Hessians, paired statistics, and the order of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.calibration.collect import Forward, Gathering, Progress, batch_runner, collect_hessians, not_reached
from lightning_obc.calibration.dense import DenseWeights
from lightning_obc.calibration.inputs import LayerInputs
from lightning_obc.calibration.isolation import traceless
from lightning_obc.calibration.memory import on_host
from lightning_obc.calibration.offload import Offload, offloading, staying, unit_bytes
from lightning_obc.calibration.paired import collect_paired
from lightning_obc.calibration.replay import Replay
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.calibration.source import no_batches, own_part
from lightning_obc.distributed import Ranks, SingleProcess, exchange, is_sharded
from lightning_obc.errors import CalibrationError, EmptyCalibrationError, OBCError
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.layers import adapter_for
from lightning_obc.specs import Calibration


@dataclass
class Collector:
    """Collects statistics of one model, in as many passes as it is asked for.

    Attributes:
        model: The model.
        batches: The batches of one pass; re-iterable when there is more than one pass.
        spec: Rounds, mode and memory.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches.
        passes: Passes so far.
        replay: Outputs of finished blocks, where they are kept.
        offload: What brings the model's blocks to another device, where they stay on the host.
    """

    model: nn.Module
    batches: Iterable[Any]
    spec: Calibration
    forward: Forward | None = None
    progress: Progress | None = None
    ranks: Ranks = field(default_factory=SingleProcess)
    passes: int = 0
    replay: Replay | None = None
    offload: Offload | None = None

    @contextmanager
    def executing(self) -> Iterator[Offload | None]:
        """Inside, passes compute on the execution device of the calibration, block by block."""
        with offloading(self.model, self.spec) as self.offload:
            try:
                yield self.offload
            finally:
                self.offload = self.replay = None

    def __call__(self, layers: Mapping[str, nn.Module], owners: Mapping[str, int] | None = None) -> dict[str, Hessian]:
        """Hessians of layers, as :func:`~lightning_obc.calibration.collect_hessians`."""
        options = self._options | {"on_host": self._on_host(layers), "owners": owners}
        options |= {"positions": self.spec.positions, "seed": self.spec.seed, "replay": self.replay}
        return self._counted(lambda batches: collect_hessians(self.model, layers, batches, **options))

    def paired(
        self,
        layers: Mapping[str, nn.Module],
        dense: DenseWeights,
        unfit: dict[str, OBCError] | None = None,
        owners: Mapping[str, int] | None = None,
    ) -> dict[str, PairedHessian]:
        """Paired statistics, as :func:`~lightning_obc.calibration.paired.collect_paired`."""
        options = self._options | {"replay": self.replay, "on_host": self._on_host(layers), "owners": owners}
        options["unfit"] = unfit
        return self._counted(lambda batches: collect_paired(self.model, layers, batches, dense, **options))

    def keep_blocks(self, layers: Mapping[str, nn.Module]) -> None:
        """From now on, keep the outputs of finished blocks; ``layers`` in the order in which batches reach them."""
        limit = self.spec.cache_bytes
        if limit is None and self.offload is None:
            return
        batch = self._counted(lambda batches: next(iter(batches)))
        run = batch_runner(self.model, self.forward, offload=self.offload)
        kept = math.inf if limit is None else limit
        steady = not self.spec.paired or self.spec.together == "all"
        self.replay = Replay(self.model, layers, run, kept, batch, steady=steady, offload=self.offload)

    @property
    def by_block(self) -> bool:
        """True when a pass for one block costs that block alone, on all ranks."""
        mine = self.offload is not None and self.replay is not None and self.replay.fit
        return all(exchange(self.ranks, mine))

    def advance(self, left: Sequence[str], dense: DenseWeights | None = None) -> None:
        """Say which layers are still to be compressed; after the last one, what was kept is forgotten.

        Args:
            left: Names of these layers.
            dense: The weights of what has been compressed so far.
        """
        if self.replay is None:
            return
        self.replay.advance(left)
        if not left:
            self.replay.release()
        elif self.offload is not None and self.replay.unkept("before", 1):
            self._counted(lambda batches: self._keep_outputs(batches, dense or DenseWeights()))

    def _keep_outputs(self, batches: Iterable[Any], dense: DenseWeights) -> None:
        """Run finished blocks once more, alone: otherwise they would be brought again for every batch of a pass."""
        assert self.replay is not None
        run = batch_runner(self.model, self.forward, offload=self.offload)
        streams = ("before", "behind") if self.spec.paired else ("before",)
        with traceless(self.model), staying(self.offload, self.replay.unkept("before", 1)):
            for done, batch in enumerate(Gathering({}, self.ranks).numbered(batches, self.spec.rounds), start=1):
                for stream in streams:
                    if not (layers := self.replay.unkept(stream, done)):
                        continue
                    weights = dense.restored() if stream == "before" else nullcontext()
                    with weights, preserved_rng(), self.replay.running(stream, done, list(layers)):
                        run(batch)

    def order(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Names of the layers in the order in which batches reach them; no more batches are run than that takes.

        Raises:
            LayerNotReachedError: No batch passes through some of them.
        """
        mine = self._counted(lambda batches: _order(self.model, layers, batches, self._run))
        return exchange(self.ranks, mine)[0]

    def reached(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Names of the layers that the first batch reaches, in the order in which it does."""
        found = self._counted(lambda batches: _first_batch(self.model, layers, batches, self._run))
        return [name for name, inputs in found.items() if inputs]

    def fed_from_outside(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """Names of the layers whose inputs none of these layers has a part in, as the first batch shows.

        Their inputs stay, bit for bit, when the weights of all these layers change.
        """
        weights = DenseWeights()
        for module in layers.values():
            weights.keep(module)
        before = self._counted(lambda batches: _first_batch(self.model, layers, batches, self._run))
        try:
            weights.disturb_()
            after = self._counted(lambda batches: _first_batch(self.model, layers, batches, self._run))
        finally:
            weights.put_back_()
        mine = {name for name in layers if _equal(before[name], after[name])}
        return exchange(self.ranks, mine)[0]

    def visit(self, run: Callable[[Iterable[Any]], Any]) -> Any:
        """One more pass: call ``run`` with this rank's batches; with all of them where parameters are sharded.

        Raises:
            CalibrationError: They can be iterated only once, and have been.
        """
        if any(map(is_sharded, self.model.parameters())):
            return self._counted(run)
        return self._counted(lambda batches: run(own_part(batches, self.ranks.rank, self.ranks.size)))

    @property
    def _options(self) -> dict[str, Any]:
        shared = {"rounds": self.spec.rounds, "progress": self.progress, "ranks": self.ranks}
        return {"forward": self.forward, "offload": self.offload, **shared}

    def _run(self, batch: Any) -> Any:
        return batch_runner(self.model, self.forward, offload=self.offload)(batch)

    def _on_host(self, layers: Mapping[str, nn.Module]) -> set[str]:
        shapes = {name: adapter.shape(module) for name, module in layers.items() if (adapter := adapter_for(module))}
        return on_host(shapes, self.spec, 0 if self.offload is None else unit_bytes(self.model, layers))

    def _counted(self, run: Callable[[Iterable[Any]], Any]) -> Any:
        self.passes += 1
        try:
            return run(self.batches)
        except EmptyCalibrationError as error:
            if self.passes == 1:
                raise
            raise CalibrationError(
                "The calibration data can be iterated only once",
                got=f"no batch in pass {self.passes}",
                expected=f"the same batches in every pass, as {self.spec} needs them",
                remedy="pass a list or a DataLoader instead of an iterator",
            ) from error


def _order(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], run: Callable[[Any], Any]
) -> list[str]:
    seen: dict[str, None] = {}
    inputs = LayerInputs(layers, lambda name, module, x: seen.setdefault(name))
    empty = True
    with traceless(model), inputs.watched(model):
        for batch in batches:
            empty = False
            with inputs.one_batch():
                run(batch)
            if len(seen) == len(layers):
                return list(seen)
    if empty:
        raise no_batches(batches)
    raise not_reached([name for name in layers if name not in seen])


def _first_batch(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], run: Callable[[Any], Any]
) -> dict[str, list[Tensor]]:
    """Inputs of the layers on the first batch, none of those that it misses."""
    seen: dict[str, list[Tensor]] = {}

    def receive(name: str, module: nn.Module, x: Tensor) -> None:
        # On the host: those of all layers at once may be more than a device holds that computes block by block.
        seen.setdefault(name, []).append(x.to("cpu", copy=True))

    inputs = LayerInputs(layers, receive)
    with traceless(model), inputs.watched(model), inputs.one_batch():
        for batch in batches:
            run(batch)
            break
        else:
            raise no_batches(batches)
    return {name: seen.get(name, []) for name in layers}


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
