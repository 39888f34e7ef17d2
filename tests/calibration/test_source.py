from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_obc.calibration import batch_size_of, calibration_batches
from lightning_obc.errors import CalibrationError
from lightning_obc.specs import Calibration


class Augmented(Dataset[tuple[Tensor, int]]):
    """Sample ``i`` is ``i`` plus noise from all three generators."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return index + 0.1 * (torch.rand(2) + random.random() + np.random.rand()), index


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for index in range(50):
            yield index + torch.rand(1)


def ids(batches: Any) -> list[int]:
    return [int(i) for _, batch in batches for i in batch]


def values(batches: Any) -> list[Tensor]:
    return [batch[0] if isinstance(batch, (list, tuple)) else batch for batch in batches]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_loader_gives_a_seeded_choice_of_its_samples() -> None:
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True)
    batches = calibration_batches(loader, Calibration(samples=20, seed=3))
    chosen = ids(batches)
    assert len(chosen) == len(set(chosen)) == 20
    assert chosen != sorted(chosen)
    assert len(batches) == 3
    assert [len(batch) for _, batch in batches] == [8, 8, 4]
    assert ids(calibration_batches(loader, Calibration(samples=20, seed=4))) != chosen
    assert sorted(ids(calibration_batches(loader, Calibration(samples=1024)))) == list(range(50))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_batches_and_rounds_differ_in_augmentation_only(workers: int) -> None:
    def make(seed: int = 3) -> Any:
        loader = DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
        return calibration_batches(loader, Calibration(samples=20, seed=seed))

    batches = make()
    first, again = values(batches), values(batches)
    torch.rand(7)
    assert equal(first, again)
    assert equal(first, values(make()))
    order = ids(batches)
    batches.set_round(1)
    assert ids(batches) == order
    assert not equal(values(batches), first)
    batches.set_round(0)
    assert equal(values(batches), first)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["loader", "list"])
def test_ranks_share_whole_batches_with_the_same_augmentation(workers: int, kind: str) -> None:
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
    batches: Any = calibration_batches(loader, Calibration(samples=42))
    if kind == "list":
        batches = calibration_batches(list(batches), Calibration(samples=42))
    batches.set_round(2)
    whole = values(batches)
    for size in (2, 4, 7):
        found = {}
        for rank in range(size):
            parts = list(batches.part(rank, size))
            assert [(part.index, part.start, part.size) for part in parts] == [
                (index, 8 * index, len(batch)) for index, batch in enumerate(whole)
            ]
            found |= {part.index: part.batch[0] for part in parts if part.index % size == rank}
        assert equal([found[index] for index in sorted(found)], whole)


@pytest.mark.parametrize("source", ["loader", "stream", "batch sampler", "iterable"])
def test_global_random_states_are_left_alone_between_batches(source: str) -> None:
    dataset = Augmented()
    made: Any = {
        "loader": lambda: DataLoader(dataset, batch_size=8, shuffle=True),
        "stream": lambda: DataLoader(Stream(), batch_size=8),
        "batch sampler": lambda: DataLoader(
            dataset, batch_sampler=type("Own", (BatchSampler,), {})(RandomSampler(dataset), 8, False)
        ),
        "iterable": lambda: (torch.rand(4) for _ in range(5)),
    }[source]()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    seen = 0
    for _ in calibration_batches(made, Calibration(samples=20)):
        seen += 1
        assert torch.equal(torch.get_rng_state(), state[0])
        assert np.array_equal(np.random.get_state()[1], state[1])
        assert random.getstate() == state[2]
    assert seen >= 3


def test_the_consumers_draws_do_not_change_the_batches() -> None:
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True)
    plain = values(calibration_batches(loader, Calibration(samples=20)))
    disturbed = []
    for batch in calibration_batches(loader, Calibration(samples=20)):
        torch.rand(3), np.random.rand(), random.random()
        disturbed.append(batch[0])
    assert equal(plain, disturbed)


@pytest.mark.parametrize("own", [False, True])
def test_the_training_loader_goes_on_as_if_nothing_had_happened(own: bool) -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5)
        sampler = RandomSampler(range(50), generator=generator)
        batch_sampler = type("Own", (BatchSampler,), {})(sampler, 8, False) if own else BatchSampler(sampler, 8, False)
        return DataLoader(TensorDataset(torch.arange(50.0)), batch_sampler=batch_sampler)

    expected = [batch[0] for batch in loader()]
    train = loader()
    list(calibration_batches(train, Calibration(samples=20)))
    assert equal([batch[0] for batch in train], expected)


def test_a_sampler_that_restricts_the_data_is_respected() -> None:
    loader = DataLoader(Augmented(), batch_size=4, sampler=SubsetRandomSampler([3, 5, 7, 11, 13]))
    assert sorted(ids(calibration_batches(loader, Calibration(samples=20)))) == [3, 5, 7, 11, 13]
    assert len(ids(calibration_batches(loader, Calibration(samples=2)))) == 2


def test_loader_settings_are_kept() -> None:
    def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in items])}

    loader = DataLoader(Augmented(), batch_size=8, collate_fn=collate, drop_last=True)
    batches = list(calibration_batches(loader, Calibration(samples=10)))
    assert [batch["x"].shape[0] for batch in batches] == [8, 2]
    batches = list(calibration_batches(loader, Calibration(samples=10, batch_size=5)))
    assert [batch["x"].shape[0] for batch in batches] == [5, 5]


def test_streams_stop_after_the_samples() -> None:
    loader = DataLoader(Stream(), batch_size=8)
    batches = calibration_batches(loader, Calibration(samples=20))
    first = values(batches)
    assert [len(batch) for batch in first] == [8, 8, 8]
    assert equal(first, values(batches))
    with pytest.raises(TypeError, match="not known"):
        len(batches)
    assert [len(b) for b in values(calibration_batches(Stream(), Calibration(samples=9, batch_size=3)))] == [3, 3, 3]


def test_a_loader_without_batching_of_its_own() -> None:
    dataset = Subset([torch.full((4, 1), float(i)) for i in range(10)], range(10))
    loader = DataLoader(dataset, batch_size=None)
    assert equal(values(calibration_batches(loader, Calibration(samples=9))), [dataset[0], dataset[1], dataset[2]])


def test_batches_of_ones_own_are_taken_as_they_are() -> None:
    own = [torch.randn(4, 2), torch.randn(3, 2), torch.randn(4, 2)]
    batches = calibration_batches(own, Calibration())
    assert all(mine is theirs for mine, theirs in zip(own, batches, strict=True))
    assert len(batches) == 3
    limited = calibration_batches(own, Calibration(samples=5))
    assert len(limited) == len(list(limited)) == 2
    assert calibration_batches(batches, Calibration()) is batches


def test_data_sets_and_tensors() -> None:
    x = torch.arange(50.0).unsqueeze(1)
    chosen = torch.cat(values(calibration_batches(TensorDataset(x), Calibration(samples=40))))
    assert len(chosen.unique()) == 40
    assert equal(values(calibration_batches(x, Calibration(batch_size=20))), list(x.split(20)))


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(3, 2), torch.zeros(5)), 3),
        ([torch.zeros(3, 2), torch.zeros(3)], 3),
        ({"x": torch.zeros(4, 2), "name": "text"}, 4),
        ({"name": "text", "x": torch.zeros(4, 2)}, 4),
        (({"x": torch.zeros(4, 2)}, torch.zeros(4)), 4),
        (([torch.zeros(3, 5, 5), torch.zeros(3, 6, 4)], ["a", "b"]), 2),
        (
            (
                (torch.zeros(3, 5, 5), torch.zeros(3, 5, 5)),
                ({"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(3, 4)}),
            ),
            2,
        ),
        ([torch.zeros(3, 5, 5), torch.zeros(3, 5, 5)], 3),
        (([torch.zeros(3, 5, 5), torch.zeros(3, 5, 5)],), 2),
        (([torch.zeros(7, 9, 2), torch.zeros(7)], torch.zeros(7)), 7),
        (([torch.zeros(7, 9, 2), torch.zeros(7)],), 7),
        (((torch.zeros(9, 7, 2), torch.zeros(7)), torch.zeros(7)), 7),
        (((torch.zeros(7, 2), torch.zeros(7, 2)), torch.zeros(7)), 7),
        ({"pair": [torch.zeros(7, 2), torch.zeros(7, 2)], "name": "text", "labels": torch.zeros(7)}, 7),
        (torch.tensor(1.0), 1),
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(4), torch.zeros(2)]), 2),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size_of(batch) == size


@pytest.mark.parametrize("batch", ["text", [], {}, {"name": "text"}, None, 3])
def test_batch_size_that_cannot_be_told(batch: Any) -> None:
    with pytest.raises(CalibrationError, match="cannot be told"):
        batch_size_of(batch)
