"""Which batches calibration sees: a seeded choice of samples that leaves the training's loader alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    Subset,
    WeightedRandomSampler,
)

from lightning_obc.calibration.batches import batch_size_of
from lightning_obc.calibration.rng import RandomState, preserved_rng, seed_everything
from lightning_obc.specs import Calibration

_DEFAULT_BATCH_SIZE = 32
# Samplers that can reach the whole data set; others restrict it, and their choice is kept.
_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


class CalibrationBatches:
    """Batches that come out the same every time, whatever the global random state.

    Iteration draws from random states of its own, seeded by (seed, round), and stops after the batch that reaches
    ``samples``. The global states are put back around every batch.

    Args:
        make: Makes a fresh iterable of batches; called under the private random state.
        samples: Number of samples after which the iteration ends.
        seed: Seed of the augmentation.
        length: Number of batches, when it is known.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], *, samples: int, seed: int, length: int | None) -> None:
        self._make, self._samples, self._seed, self._length = make, samples, seed, length
        self._round = 0

    def set_round(self, number: int) -> None:
        """Choose the augmentation of the next iterations: the same samples, other random transforms."""
        self._round = number

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the number of calibration batches is not known before they are iterated")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        private = self._start()
        left = self._samples
        with preserved_rng():
            private.restore()
            iterator = iter(self._make())
            private = RandomState.capture()
        while left > 0:
            with preserved_rng():
                private.restore()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                private = RandomState.capture()
            left -= batch_size_of(batch)
            yield batch

    def _start(self) -> RandomState:
        with preserved_rng():
            seed_everything(_mixed(self._seed, self._round))
            return RandomState.capture()


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
    return CalibrationBatches(lambda: source, samples=spec.samples, seed=spec.seed, length=length)


def _from_loader(loader: DataLoader[Any], spec: Calibration) -> CalibrationBatches:
    plain = type(loader.batch_sampler) is BatchSampler and not isinstance(loader.dataset, IterableDataset)
    if not plain:
        return CalibrationBatches(lambda: _fresh_copy(loader, spec), samples=spec.samples, seed=spec.seed, length=None)
    chosen = _choose(loader.sampler, loader.dataset, spec)
    size = spec.batch_size or loader.batch_size or _DEFAULT_BATCH_SIZE

    def make() -> DataLoader[Any]:
        return DataLoader(Subset(loader.dataset, chosen), batch_size=size, **_kept(loader))

    return CalibrationBatches(make, samples=len(chosen), seed=spec.seed, length=-(-len(chosen) // size))


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
