"""Which batches calibration sees: a seeded choice of samples that leaves the training's loader alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_obc.calibration.batches import batch_size_of
from lightning_obc.calibration.rng import RandomState, preserved_rng, seed_everything
from lightning_obc.errors import EmptyCalibrationError
from lightning_obc.specs import Calibration

_DEFAULT_BATCH_SIZE = 32
# Samplers that can reach the whole data set; others restrict it, and their choice is kept.
_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


@dataclass(frozen=True)
class Numbered:
    """A batch of a round with its place in it.

    Attributes:
        batch: The batch; None where another rank runs it and it was not made here.
        index: Number of the batch within the round.
        start: Number of its first sample within the round.
        size: Samples in it.
    """

    batch: Any
    index: int
    start: int
    size: int


class CalibrationBatches:
    """Batches that come out the same every time, whatever the global random state.

    Iteration draws from random states of its own, seeded by (seed, round), and stops after the batch that reaches
    ``samples``. The global states are put back around every batch.

    Args:
        make: Makes a fresh iterable of batches; called under the private random state.
        samples: Number of samples after which the iteration ends.
        seed: Seed of the augmentation.
        length: Number of batches, when it is known.
        sizes: Samples of every batch, where ``make(rank, size)`` can also make just every ``size``-th batch, from
            number ``rank`` on. None: all batches are made to get at some of them.
        origin: What the batches are made from, for errors.
    """

    def __init__(
        self,
        make: Callable[..., Iterable[Any]],
        *,
        samples: int,
        seed: int,
        length: int | None = None,
        sizes: Sequence[int] | None = None,
        origin: Any = None,
    ) -> None:
        self.origin = origin
        self._make, self._samples, self._seed, self._sizes = make, samples, seed, sizes
        self._length = length if sizes is None else len(sizes)
        self._round = 0

    def set_round(self, number: int) -> None:
        """Choose the augmentation of the next iterations: the same samples, other random transforms."""
        self._round = number

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the number of calibration batches is not known before they are iterated")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        left = self._samples
        for batch in self._drawn(self._make):
            left -= batch_size_of(batch)
            yield batch
            if left <= 0:
                return

    def part(self, rank: int, size: int) -> Iterator[Numbered]:
        """All batches in their order, of which only number ``rank``, ``rank + size``, … need to be there."""
        if self._sizes is None or size == 1:
            yield from _numbered(self)
            return
        mine, start = self._drawn(lambda: self._make(rank, size)), 0
        for index, samples in enumerate(self._sizes):
            yield Numbered(next(mine) if index % size == rank else None, index, start, samples)
            start += samples

    def _drawn(self, make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """What an iterable yields under the private random state."""
        private = self._start()
        with preserved_rng():
            private.restore()
            iterator = iter(make())
            private = RandomState.capture()
        while True:
            with preserved_rng():
                private.restore()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                private = RandomState.capture()
            yield batch

    def _start(self) -> RandomState:
        with preserved_rng():
            seed_everything(_mixed(self._seed, self._round))
            return RandomState.capture()


def numbered_part(batches: Iterable[Any], rank: int, size: int) -> Iterator[Numbered]:
    """The batches of one round with their places; only those of rank ``rank`` of ``size`` need to be there.

    Ranks share whole batches, every ``size``-th one to each: a batch goes through the model exactly as it would in one
    process, no sample counts twice, and numbers of samples do not depend on the number of ranks.
    """
    if isinstance(batches, CalibrationBatches):
        return batches.part(rank, size)
    return _numbered(batches)


def own_part(batches: Iterable[Any], rank: int, size: int) -> Iterable[Any]:
    """The batches of one round that are this rank's own."""
    if size == 1:
        return batches
    return (found.batch for found in numbered_part(batches, rank, size) if found.index % size == rank)


def _numbered(batches: Iterable[Any]) -> Iterator[Numbered]:
    start = 0
    for index, batch in enumerate(batches):
        size = batch_size_of(batch)
        yield Numbered(batch, index, start, size)
        start += size


def calibration_batches(source: Any, spec: Calibration) -> CalibrationBatches:
    """The calibration batches of a source, the same for the callback, :func:`~lightning_obc.compress` and the CLI.

    * A map-style ``DataLoader`` or ``Dataset``: a fresh sequential loader over a seeded random choice of
      ``min(samples, len)`` samples, the same in every round; collate function, workers and pinning are kept.
    * A ``DataLoader`` with a batch sampler of its own or an iterable data set: a fresh copy.
    * A tensor ``[samples, …]``: split into batches, in order.
    * A sequence, or any other iterable, of batches: as they are, up to ``samples``. What can be iterated only once is
      kept in memory up to there.

    Args:
        source: Where the data comes from; neither it nor its sampler is changed.
        spec: Number of samples, batch size (for loaders, data sets and tensors) and seed.
    """
    if isinstance(source, CalibrationBatches):
        return source
    if isinstance(source, Tensor):
        source = source.split(spec.batch_size or _DEFAULT_BATCH_SIZE)
    if isinstance(source, Dataset):
        size = spec.batch_size or _DEFAULT_BATCH_SIZE
        source = DataLoader(source, batch_size=size)
    if isinstance(source, DataLoader):
        return _from_loader(source, spec)
    if isinstance(source, Iterator):
        # It can be iterated only once, and every stage and round needs a pass of its own.
        with preserved_rng():
            seed_everything(_mixed(spec.seed, 0))
            source = list(_up_to(source, spec.samples))
    length = _batches_until(source, spec.samples) if isinstance(source, Sequence) else None
    return CalibrationBatches(lambda: source, samples=spec.samples, seed=spec.seed, length=length, origin=source)


def no_batches(batches: Iterable[Any], message: str = "The calibration data yields no sample") -> EmptyCalibrationError:
    """The error of batches that turn out to be none.

    Args:
        batches: The batches.
        message: What is wrong, in one sentence.
    """
    origin = getattr(batches, "origin", None)
    return EmptyCalibrationError(
        message,
        got=_told(batches if origin is None else origin),
        expected="at least one batch with at least one sample",
        remedy="check the data set, the sampler and drop_last, or pass a list of batches",
    )


def _told(source: Any) -> str:
    """What batches come from, and how much there is, as far as it can be told."""
    kind = type(source).__name__
    if isinstance(source, DataLoader):
        batching = f"batch_size={source.batch_size}, drop_last={source.drop_last}"
        return f"{kind} of {_count(source, 'batches')} over {_told(source.dataset)} ({batching})"
    return f"{kind} of {_count(source, 'samples' if isinstance(source, Dataset) else 'batches')}"


def _count(source: Any, unit: str) -> str:
    try:
        return f"{len(source)} {unit}"
    except (TypeError, NotImplementedError):
        return f"an unknown number of {unit}"


def rereadable(source: Any) -> bool:
    """True for data of which a batch can be read beforehand without being missed later: tensors, sequences of batches,
    and data sets and loaders with random access. Iterators and iterable data sets may be readable only once."""
    if isinstance(source, CalibrationBatches):
        source = source.origin
    if isinstance(source, DataLoader):
        source = source.dataset
    return isinstance(source, (Tensor, Sequence, Dataset)) and not isinstance(source, IterableDataset)


def _from_loader(loader: DataLoader[Any], spec: Calibration) -> CalibrationBatches:
    plain = type(loader.batch_sampler) is BatchSampler and not isinstance(loader.dataset, IterableDataset)
    if not plain:
        limits: dict[str, Any] = {"samples": spec.samples, "seed": spec.seed, "origin": loader}
        return CalibrationBatches(lambda: _fresh_copy(loader, spec), **limits)
    chosen = _choose(loader.sampler, loader.dataset, spec)
    size = spec.batch_size or loader.batch_size or _DEFAULT_BATCH_SIZE
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def make(rank: int = 0, ranks: int = 1) -> DataLoader[Any]:
        # The private random state says which augmentation every sample gets, whoever draws it and in which order.
        dataset = _Reproducible(loader.dataset, int(torch.randint(2**62, ())))
        return DataLoader(dataset, batch_sampler=parts[rank::ranks], **_kept(loader))

    sizes = [len(part) for part in parts]
    return CalibrationBatches(make, samples=len(chosen), seed=spec.seed, sizes=sizes, origin=loader)


@dataclass(frozen=True)
class _Reproducible(Dataset[Any]):
    """A data set whose samples draw from random states of their own: ``(seed, index)`` decides about augmentation."""

    dataset: Any
    seed: int

    def __getitem__(self, index: Any) -> Any:
        seed_everything(_mixed(self.seed, index))
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        if callable(getattr(self.dataset, "__getitems__", None)):
            seed_everything(_mixed(self.seed, indices[0]))
            return self.dataset.__getitems__(indices)
        return [self[index] for index in indices]


def _choose(sampler: Any, dataset: Any, spec: Calibration) -> list[int]:
    """A seeded random choice among the samples that a sampler can reach."""
    if isinstance(sampler, _WHOLE):
        population = list(range(len(dataset)))
    else:
        with preserved_rng():
            seed_everything(spec.seed)
            population = sorted(set(_unlinked(sampler)))
    generator = torch.Generator().manual_seed(spec.seed)
    order = torch.randperm(len(population), generator=generator)[: spec.samples].tolist()
    return [population[index] for index in order]


def _fresh_copy(loader: DataLoader[Any], spec: Calibration) -> DataLoader[Any]:
    """The same loader again, with generators of its own."""
    if isinstance(loader.dataset, IterableDataset):
        size = spec.batch_size or loader.batch_size if loader.batch_size is not None else None
        return DataLoader(loader.dataset, batch_size=size, **_kept(loader))
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=_unlinked(loader.sampler), **_kept(loader))
    return DataLoader(loader.dataset, batch_sampler=_unlinked(loader.batch_sampler), **_kept(loader))


def _unlinked(sampler: Any) -> Any:
    """A copy of a sampler, and of those inside it, that draws from generators of its own."""
    if not hasattr(sampler, "__dict__"):
        return sampler
    twin = copy.copy(sampler)
    for name, value in vars(sampler).items():
        if isinstance(value, torch.Generator):
            setattr(twin, name, value.clone_state())
        elif name in ("sampler", "batch_sampler"):
            setattr(twin, name, _unlinked(value))
    return twin


def _kept(loader: DataLoader[Any]) -> dict[str, Any]:
    """The settings of a loader that a fresh one takes over."""
    return {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }


def _up_to(batches: Iterator[Any], samples: int) -> Iterator[Any]:
    while samples > 0 and (batch := next(batches, None)) is not None:
        samples -= batch_size_of(batch)
        yield batch


def _batches_until(batches: Sequence[Any], samples: int) -> int:
    count = 0
    for batch in batches:
        if samples <= 0:
            break
        samples -= batch_size_of(batch)
        count += 1
    return count


def _mixed(seed: int, number: int) -> int:
    """One seed for each (seed, round)."""
    return (seed * 1_000_003 + number * 7_919) % 2**63
