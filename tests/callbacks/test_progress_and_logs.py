"""Progress with time left in every kind of bar, and figures in every kind of log."""

from __future__ import annotations

import csv
import io
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import lightning_obc as obc
from lightning_obc.callbacks import display
from lightning_obc.callbacks.display import Display
from tests.callbacks.small import Small, loader, quiet_trainer

STAGES = [obc.Prune("2:4", at="train_start"), obc.Prune(0.75, at={"epoch": 1}), obc.Quantize(4)]


def callback(**options):
    return obc.OBCCallback(STAGES, obc.Calibration(samples=32), save_checkpoint=False, **options)


class Probe(Callback):
    """Shows progress in hooks of all kinds, and remembers what could be seen meanwhile and afterwards."""

    def __init__(self, look, pause: float = 0.005) -> None:
        self.look, self.pause, self.seen, self.after = look, pause, {}, {}

    def _show(self, hook: str, trainer) -> None:
        with Display(trainer) as shown:
            for done in range(4):
                shown.update("calibration", done, 8)
                shown.update("Prune(2:4): conv", done * 1e9, 8e9)
                time.sleep(self.pause)
            self.seen[hook] = self.look(trainer)
        self.after[hook] = self.look(trainer)

    def on_train_start(self, trainer, pl_module) -> None:
        self._show("train_start", trainer)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._show("epoch", trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self._show("train_end", trainer)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self._show("validate", trainer)


def rich_tasks(trainer) -> list:
    progress = trainer.progress_bar_callback.progress
    tasks = [] if progress is None else progress.tasks
    return [
        (task.description, int(task.completed), task.total, task.time_remaining is not None)
        for task in tasks
        if task.visible and ("calibration" in task.description or "Prune" in task.description)
    ]


def test_the_rich_bar_shows_time_left_and_forgets_it_afterwards(tmp_path, capsys):
    console = {"file": io.StringIO(), "force_terminal": True, "width": 120}
    bar, probe = RichProgressBar(console_kwargs=console), Probe(rich_tasks, pause=0.06)
    trainer = quiet_trainer(tmp_path, bar, probe, max_epochs=2, enable_progress_bar=True)
    trainer.fit(Small(), loader(), loader(1))
    trainer.validate(Small(), loader(1), verbose=False)
    # Counts of operations are too long for the bar's columns: they come as percent.
    expected = [("calibration", 3, 8, True), ("Prune(2:4): conv", 37, 100, True)]
    for hook in ("epoch", "train_end", "validate"):
        assert probe.seen[hook] == expected, hook
        assert probe.after[hook] == [], hook
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console["file"].getvalue())
    assert re.search(r"Prune\(2:4\): conv .*(25|37)/100 +\d:\d\d:\d\d • \d:\d\d:\d\d", drawn), drawn[-3000:]
    # Before the bar has started there is a bar of our own.
    assert probe.seen["train_start"] == expected or "Prune(2:4): conv:  38%" in capsys.readouterr().out


def test_the_rich_bar_shows_time_left_of_layers_that_take_minutes(tmp_path):
    class SlowLayers(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            progress, minutes = trainer.progress_bar_callback.progress, iter(range(100))
            usual, clock = progress.speed_estimate_period, progress.get_time
            progress.get_time = lambda: 60.0 * next(minutes)
            with Display(trainer) as shown:
                for done in range(4):
                    shown.update("Prune(2:4): conv", done * 1e9, 8e9)
                self.seen = rich_tasks(trainer)
            self.restored = progress.speed_estimate_period == usual
            progress.get_time = clock

    slow = SlowLayers()
    bar = RichProgressBar(console_kwargs={"file": io.StringIO(), "force_terminal": True})
    trainer = quiet_trainer(tmp_path, bar, slow, max_epochs=1, enable_progress_bar=True)
    trainer.fit(Small(), loader())
    assert slow.seen == [("Prune(2:4): conv", 37, 100, True)]
    assert slow.restored


def test_the_tqdm_bar_has_a_transient_one_beside_it(tmp_path, capsys):
    def look(trainer) -> str:
        return capsys.readouterr().out

    probe = Probe(look, pause=0.06)  # TQDM draws ten times a second.
    trainer = quiet_trainer(tmp_path, TQDMProgressBar(), probe, max_epochs=1, enable_progress_bar=True)
    trainer.fit(Small(), loader(), loader(1))
    for hook in ("train_start", "epoch", "train_end"):
        assert re.search(r"calibration: +[1-9]\d*%\|.*\| 00:00<00:0\d", probe.seen[hook]), probe.seen[hook]
        assert re.search(r"Prune\(2:4\): conv: +[1-9]\d*%\|", probe.seen[hook])
        assert "calibration" not in probe.after[hook]


def test_without_a_bar_there_are_lines_now_and_then(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(display, "rank_zero_info", lines.append)
    quiet_trainer(tmp_path, Probe(lambda trainer: None), max_epochs=1).fit(Small(), loader())
    assert lines == []  # Nothing takes half a minute here.
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    quiet_trainer(tmp_path, callback(verbose=False), max_epochs=2).fit(Small(), loader())
    assert any(line.startswith("calibration: 50 %, about 0:00 left") for line in lines), lines
    assert any(line.startswith("Prune(2:4): fc: ") and line.endswith(" left") for line in lines), lines


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_durations_are_clocks(seconds, text):
    assert display.clock(seconds) == text


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_staged_run_passes_through_a_bar(tmp_path, bar, capsys):
    run = callback()
    trainer = quiet_trainer(tmp_path, run, bar(), max_epochs=2, enable_progress_bar=True)
    trainer.fit(Small(), loader(), loader(1))
    said = capsys.readouterr()
    assert run.stages_run == 3
    for stage in STAGES:
        assert f"Plan of {stage}" in said.out
        assert f"{stage}: 2 layers" in said.out
    assert "Error" not in said.err


class Memory(Logger):
    """The least that a logger is."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.points.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    loggers = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tensorboard"), Memory()]
    trainer = quiet_trainer(folder, callback(verbose=False), max_epochs=2, logger=loggers, log_every_n_steps=1)
    trainer.fit(Small(), loader(), loader(1))
    return folder, loggers[2].points


def check_points(points: list[tuple[int, dict[str, float]]]) -> None:
    """Each stage left a point of its own with its losses, its layers and the model as a whole."""
    stages = {int(values["obc/stage"]): (step, values) for step, values in points if "obc/loss" in values}
    assert sorted(stages) == [1, 2, 3]
    assert [stages[number][0] for number in (1, 2, 3)] == [0, 6, 12]
    for values in (entry[1] for entry in stages.values()):
        assert values["obc/loss"] > 0
        assert values["obc/conv/relative_error"] > 0
        assert 0 < values["obc/sparsity"] <= 1
    assert stages[1][1]["obc/fc/sparsity"] == 0.5
    assert stages[3][1]["obc/fc/bits"] == 4
    assert stages[3][1]["obc/compression_ratio"] > stages[2][1]["obc/compression_ratio"] > 1
    assert any("obc/val_loss" in values for _, values in points)


def test_any_logger_gets_stages_layers_and_losses(logged):
    check_points(logged[1])


def test_the_csv_logger_keeps_them_all(logged):
    (file,) = Path(logged[0]).rglob("metrics.csv")
    table = list(csv.DictReader(file.open()))
    check_points([(int(row["step"]), {k: float(v) for k, v in row.items() if v}) for row in table])


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    return events


def test_tensorboard_gets_figures_and_histograms_too(logged):
    pytest.importorskip("matplotlib")
    events = accumulated(Path(logged[0]) / "tensorboard" / "version_0")
    tags = events.Tags()
    assert {"obc/loss", "obc/conv/sparsity", "obc/sparsity"} <= set(tags["scalars"])
    assert {"obc_weights/conv", "obc_weights/fc"} <= set(tags["histograms"])
    figures = [tag for tag in tags["images"] if tag.startswith("obc/")]
    assert len(figures) == 3
    (image,) = events.Images(figures[0])
    assert image.width >= 600
    assert [entry.step for entry in events.Histograms("obc_weights/fc")] == [0, 6, 12]


def test_without_matplotlib_a_hint_and_the_histograms_are_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    logger = TensorBoardLogger(tmp_path, "tensorboard")
    run = obc.OBCCallback([obc.Quantize(4)], obc.Calibration(samples=16), save_checkpoint=False, verbose=False)
    with pytest.warns(UserWarning, match=r"No figures in TensorBoard.*lightning-obc\[tensorboard\]"):
        quiet_trainer(tmp_path, run, max_epochs=1, logger=logger).fit(Small(), loader())
    tags = accumulated(Path(logger.log_dir)).Tags()
    assert tags["images"] == []
    assert "obc_weights/fc" in tags["histograms"]


def test_pictures_leave_the_global_state_alone(logged):
    """Figures are drawn without pyplot's current figure, its windows, or a random number."""
    from lightning_obc.callbacks.pictures import _figure
    from lightning_obc.report import LayerReport, StageReport

    rows = [
        LayerReport(f"layer{i}", "Linear", (4, 4), "Prune(2:4)", 0.5, 32, 1.0, 0.0, i / 100, None, "ok", 0.1, True)
        for i in range(100)
    ]
    before = torch.get_rng_state()
    figure = _figure(StageReport("Prune(2:4)", rows))
    assert torch.equal(before, torch.get_rng_state())
    assert "40 layers of smaller error left out" in figure._suptitle.get_text()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"layer{i}" for i in range(40, 100)]
