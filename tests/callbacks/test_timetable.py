"""Times of stages, without a Trainer."""

from __future__ import annotations

import pytest

from lightning_obc.callbacks import timetable as t
from lightning_obc.errors import ScheduleError, SpecError
from lightning_obc.schedules import Gradual, Plateau
from lightning_obc.specs import NM, Block, Prune, Quantize


def test_a_gradual_stage_becomes_its_steps():
    steps = t.expand([Prune(0.8, at={"epoch": 2}, schedule=Gradual(4, every=2, initial=0.2)), Quantize(4)])
    assert [step.at for step in steps] == [{"epoch": 2}, {"epoch": 4}, {"epoch": 6}, {"epoch": 8}, "train_end"]
    assert [step.parsed.sparsity for step in steps[:4]] == pytest.approx([0.2, 0.8 - 0.6 * 8 / 27, 0.8 - 0.6 / 27, 0.8])


def test_linear_curve_and_other_patterns():
    steps = t.expand([Prune(Block(4, 0.6), at={"step": 0}, schedule=Gradual(3, every=10, curve="linear"))])
    assert [step.pattern.sparsity for step in steps] == pytest.approx([0.0, 0.3, 0.6])
    assert [step.at for step in steps] == [{"step": 0}, {"step": 10}, {"step": 20}]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prune("2:4", at={"epoch": 1}, schedule=Gradual(3)), "gradually"),
        (lambda: Prune(NM(2, 4), at={"epoch": 1}, schedule=Gradual(3)), "gradually"),
        (lambda: Prune(0.5, schedule=Gradual(3)), "first epoch or step"),
        (lambda: Prune(0.5, at={"epoch": 1}, schedule=Gradual(3, initial=0.6)), "above its final"),
        (lambda: Gradual(1), "steps"),
        (lambda: Gradual(3, every=0), "every"),
        (lambda: Gradual(3, initial=1.0), "initial"),
        (lambda: Gradual(3, curve="square"), "curve"),
        (lambda: Plateau("val_loss", patience=0), "patience"),
        (lambda: Plateau("val_loss", mode="least"), "mode"),
        (lambda: Plateau("val_loss", min_delta=-1), "min_delta"),
        (lambda: Prune(0.5, at="some day"), "time"),
        (lambda: Prune(0.5, at={"epoch": -1}), "time"),
        (lambda: Prune(0.5, at={"epoch": 1, "step": 2}), "time"),
        (lambda: Prune(0.5, at={"epoch": True}), "time"),
        (lambda: Quantize(4, after="melt"), "after"),
    ],
)
def test_specs_that_cannot_be_meant(make, words):
    with pytest.raises(SpecError, match=words):
        make()


@pytest.mark.parametrize(
    "ats",
    [
        ["train_end", "train_start"],
        [{"epoch": 1}, "train_start"],
        ["train_end", {"epoch": 1}],
        [{"epoch": 3}, {"epoch": 2}],
        [{"step": 3}, {"epoch": 1}, {"step": 2}],
    ],
)
def test_disorder_is_refused(ats):
    with pytest.raises(ScheduleError, match="order of their times"):
        t.check_order([Prune(0.5, at=at) for at in ats])


def test_order_that_can_be_kept():
    t.check_order([Prune(0.5, at=at) for at in ("train_start", {"epoch": 1}, {"step": 9}, {"epoch": 1}, "train_end")])
    t.check_order([Prune(0.5, at="validate"), Prune(0.5, at="train_start")])
    t.check_order([])


@pytest.mark.parametrize(
    ("at", "epochs", "steps", "ok"),
    [
        ({"epoch": 2}, 3, -1, True),
        ({"epoch": 3}, 3, -1, False),
        ({"epoch": 3}, -1, -1, True),
        ({"epoch": 3}, None, -1, True),
        ({"step": 10}, 3, 10, True),
        ({"step": 11}, 3, 10, False),
    ],
)
def test_times_after_the_end_are_refused(at, epochs, steps, ok):
    stage = Prune(0.5, at=at)
    if ok:
        t.check_order([stage], max_epochs=epochs, max_steps=steps)
    else:
        with pytest.raises(ScheduleError, match="never run"):
            t.check_order([stage], max_epochs=epochs, max_steps=steps)


def test_due_keeps_the_order():
    stages = [Prune(0.3, at={"epoch": 1}), Prune(0.4, at={"step": 5}), Prune(0.5, at={"epoch": 2}), Quantize(4)]
    table = t.Timetable(list(stages))
    assert table.due(t.at_epoch(0)) == []
    assert table.due(t.at_step(5)) == [], "the first stage has not run"
    assert table.due(t.at_epoch(1)) == [0]
    table.done.append(0)
    assert table.due(t.at_epoch(2)) == []
    assert table.due(t.at_step(7)) == [1]
    table.done.append(1)
    assert table.due(t.at_epoch(4)) == [2], "an epoch that is over still counts"
    table.done.append(2)
    assert table.due(t.at_train_end) == [3]
    assert table.open() == [stages[3]]


def test_validation_stages_are_apart():
    table = t.Timetable([Prune(0.5, at="validate"), Quantize(4, at="train_end")])
    assert table.due(t.at_train_end) == [1]
    assert table.due(t.at_validate, fitting=False) == [0]
