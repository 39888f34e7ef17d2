"""Every use of Lightning's private names, in one place (tried with lightning 2.6.6).

Elsewhere in this package only Lightning's public interface is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_obc.calibration import preserved_rng, rereadable
from lightning_obc.distributed import Ranks, SingleProcess, all_ranks
from lightning_obc.errors import CalibrationError, StrategyError

_AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def callbacks(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks; an attribute that Lightning sets without declaring it."""
    return vars(trainer)["callbacks"]


def fast_dev_run(trainer: Trainer) -> bool:
    return bool(vars(trainer)["fast_dev_run"])


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs at this moment."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def validation_metrics(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What the validation that ends now has logged; ``trainer.callback_metrics`` has older metrics too."""
    results = trainer._results
    return {} if results is None else dict(results.metrics(on_step=False)["callback"])


def validates(trainer: Trainer) -> bool:
    """True when the training has validations."""
    return trainer.enable_validation and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Write values to every logger of the trainer, also where ``self.log`` is not allowed."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=logged_step(trainer))


def swallows_prints(bar: ProgressBar | None) -> bool:
    """True for a TQDM bar that is not running at this moment: what is printed through it is lost then."""
    if not isinstance(bar, TQDMProgressBar) or not bar.is_enabled:
        return False
    names = ("_train_progress_bar", "_val_progress_bar", "_test_progress_bar", "_predict_progress_bar")
    bars = (getattr(bar, name, None) for name in names)
    return all(running is None or running.disable for running in bars)


def end_run() -> NoReturn:
    """End what the trainer is doing now, cleanly and as finished; to be called in a hook."""
    raise _TunerExitException


def save_with_score(checkpoint: ModelCheckpoint, trainer: Trainer, score: Tensor | None) -> None:
    """Let a checkpoint callback write a file now, with a score of its own, and its "last" file too."""
    candidates = checkpoint._monitor_candidates(trainer)
    if checkpoint.monitor is not None and score is not None:
        checkpoint._save_topk_checkpoint(trainer, candidates | {checkpoint.monitor: score})
    else:
        checkpoint._save_none_monitor_checkpoint(trainer, candidates)
    checkpoint._save_last_checkpoint(trainer, candidates)


def calibration_source(trainer: Trainer) -> Any:
    """Where calibration data comes from: ``calibration_dataloader()`` of the datamodule or module, or the train loader.

    The training's own loader and its iterators are not touched.

    Raises:
        CalibrationError: There is neither.
    """
    datamodule: LightningDataModule | None = vars(trainer).get("datamodule")
    if trainer.state.fn != TrainerFn.FITTING and datamodule is not None:
        # Outside of fit, Lightning has set the datamodule up for another stage: its train split may not exist.
        call._call_lightning_datamodule_hook(trainer, "setup", stage="fit")
    make = _own_calibration(trainer)
    if make is not None:
        return make()
    source = trainer.fit_loop._data_source
    if source.instance is None or (
        isinstance(source.instance, (LightningModule, LightningDataModule))
        and not is_overridden("train_dataloader", source.instance)
    ):
        raise CalibrationError(
            "There is no calibration data",
            got="no train_dataloader",
            expected="calibration_dataloader() or train_dataloader() on the datamodule or the module",
            remedy="pass a datamodule, or define calibration_dataloader() on the LightningModule",
        )
    return _first_loader(_request_dataloader(source))


def _own_calibration(trainer: Trainer) -> Callable[[], Any] | None:
    """``calibration_dataloader`` of the datamodule or the module, where there is one."""
    for owner in (vars(trainer).get("datamodule"), trainer.lightning_module):
        make = getattr(owner, "calibration_dataloader", None)
        if callable(make):
            return make  # type: ignore[no-any-return]
    return None


def triable_source(trainer: Trainer) -> Any:
    """:func:`calibration_source`, if one batch of it can be read beforehand without being missed later; else None.

    Of training data that may be readable only once (iterators, iterable data sets) nothing is read. What
    ``calibration_dataloader()`` returns is there for calibration alone, unless it is always the same iterator.
    """
    source = calibration_source(trainer)
    if rereadable(source):
        return source
    make = _own_calibration(trainer)
    if make is None or isinstance(getattr(source, "dataset", None), Iterator):
        return None
    return None if isinstance(source, Iterator) and make() is source else source


@contextmanager
def unlogged(module: LightningModule) -> Iterator[None]:
    """Inside, ``self.log`` of the module does nothing: forward passes that log are not allowed in every hook."""
    names = ("log", "log_dict")
    vars(module).update(dict.fromkeys(names, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)


def _first_loader(loaders: Any) -> Any:
    """The only loader of a collection of train loaders.

    Raises:
        CalibrationError: There are several, and which one to calibrate on is not for this package to guess.
    """
    flat = CombinedLoader(loaders, "sequential").flattened
    if len(flat) != 1:
        raise CalibrationError(
            "There are several train loaders",
            got=f"{len(flat)} loaders",
            expected="one loader to calibrate on",
            remedy="define calibration_dataloader() on the datamodule or the module",
        )
    return flat[0]


def to_device(trainer: Trainer, batch: Any) -> Any:
    """A batch through the precision plugin, the batch hooks and the transfer, as in the training loop."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Run the validation loop once, beside whatever is going on, and return the scalars it logs.

    No callback hears of it, no logger is written to, and the loops' progress, the metrics that callbacks monitor and
    the random states stay as they were. Without a validation step or validation data the result is empty. Of several
    ranks it is the mean.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    owner, slot = (trainer.fit_loop.epoch_loop, "val_loop") if fitting else (trainer, "validate_loop")
    original: _EvaluationLoop = getattr(owner, slot)
    if not original._data_source.is_defined():
        return {}
    fn = TrainerFn.FITTING if fitting else TrainerFn.VALIDATING
    loop = _EvaluationLoop(trainer, fn, RunningStage.VALIDATING, verbose=False, inference_mode=False)
    loop._data_source = original._data_source
    with _aside(trainer, original):
        setattr(owner, slot, loop)
        try:
            loop.run()
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
            return _mean_over_ranks(ranks(trainer), found)
        finally:
            loop._results.reset()
            loop.teardown()
            setattr(owner, slot, original)


def _mean_over_ranks(ranks: Ranks, figures: dict[str, float]) -> dict[str, float]:
    """Figures that were logged without ``sync_dist`` are those of one rank's data alone."""
    found = ranks.gather(figures)
    return {name: sum(theirs.get(name, value) for theirs in found) / len(found) for name, value in figures.items()}


@contextmanager
def _aside(trainer: Any, loop: _EvaluationLoop) -> Iterator[None]:
    """Set the trainer's callbacks, loggers, metrics and stage aside, and put them back."""
    module = trainer.lightning_module
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    saved = trainer._logger_connector, trainer.callbacks, trainer.loggers, trainer.state.stage, module._current_fx_name
    clock = getattr(trainer, "_last_val_time", None)
    try:
        trainer._logger_connector = _LoggerConnector(trainer)
        trainer.callbacks, trainer.loggers = _silent_bars(trainer), []
        trainer.state.stage = RunningStage.VALIDATING
        with preserved_rng(), torch.no_grad():
            yield
    finally:
        trainer._last_val_time = clock
        trainer._logger_connector, trainer.callbacks, trainer.loggers, trainer.state.stage, fx = saved
        module._current_fx_name = fx
        for submodule, training in modes:
            submodule.training = training


def is_trained(trainer: Trainer) -> bool:
    """True when the Trainer has reached its last epoch or its last step."""
    epochs, steps = trainer.max_epochs or 0, trainer.max_steps
    done = trainer.current_epoch
    return trainer.global_step > 0 and (0 < epochs <= done or 0 < steps <= trainer.global_step)


@contextmanager
def on_device(trainer: Trainer) -> Iterator[None]:
    """The model back on the device of the strategy, which has been torn down."""
    trainer.lightning_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        trainer.lightning_module.cpu()


def _silent_bars(trainer: Trainer) -> list[Callback]:
    """A running Rich display draws from a thread of its own, and insists on a Rich bar among the callbacks."""
    running = any(isinstance(callback, RichProgressBar) for callback in callbacks(trainer))
    return [RichProgressBar(refresh_rate=0)] if running else []


def rich_progress(bar: ProgressBar) -> Any:
    """The running display of a ``RichProgressBar``, or None for every other bar."""
    progress = getattr(bar, "progress", None)
    return None if progress is None or getattr(bar, "_progress_stopped", True) else progress


@dataclass(frozen=True)
class Average:
    """The averaged model of a callback, and the number of values in it, where it counts them."""

    model: torch.nn.Module
    count: torch.Tensor | None


def averages(trainer: Trainer) -> list[Average]:
    """Averaged models of the Trainer's callbacks, as far as they exist now."""
    found: list[Average] = []
    for callback in callbacks(trainer):
        model = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and model is not None:
            found.append(Average(model.module, model.n_averaged))
        elif isinstance(callback, StochasticWeightAveraging) and model is not None:
            found.append(Average(model, callback.n_averaged))
    return found


def behind_averaging(trainer: Trainer, callback: Callback) -> None:
    """Call ``callback`` after those that average weights: it holds what they have averaged, and compresses at the end
    what they put into the model. Lightning's own order is kept otherwise.

    Raises:
        StrategyError: Sharded weights are averaged, which Lightning's callbacks cannot.
    """
    present = callbacks(trainer)
    last = max((i for i, other in enumerate(present) if isinstance(other, _AVERAGING)), default=-1)
    if last >= 0 and isinstance(trainer.strategy, ModelParallelStrategy):
        raise StrategyError(
            "Averages of sharded weights cannot be held",
            got=f"{type(present[last]).__name__} with {type(trainer.strategy).__name__}",
            expected="averaging on a single device or with DDP",
            remedy="drop the averaging callback, or use another strategy",
        )
    if present.index(callback) < last:
        others = [other for other in present[: last + 1] if other is not callback]
        vars(trainer)["callbacks"] = [*others, callback, *present[last + 1 :]]


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which compression would be wrong.

    Raises:
        StrategyError: The strategy is not supported.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        _check_data_parallel(strategy)
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise StrategyError(
            "This strategy is not supported",
            got=f"{type(strategy).__name__}{_why_not(strategy)}",
            expected='a single device, "ddp", or ModelParallelStrategy with fully_shard',
            remedy='Trainer(strategy="ddp"), or compress the trained checkpoint on one device',
        )


def check_precision(trainer: Trainer, offloaded: bool) -> None:
    """Refuse autocast for blocks that compute on another device than the Trainer's: it would not reach them.

    Raises:
        StrategyError: Mixed precision, and blocks that are brought to an execution device.
    """
    if offloaded and isinstance(trainer.precision_plugin, MixedPrecision):
        raise StrategyError(
            "Mixed precision holds for the Trainer's own device only",
            got=f"precision={trainer.precision!r} with Calibration.execution_device",
            expected='precision="32-true" or another true precision',
            remedy="leave Calibration.execution_device out, or change the Trainer's precision",
        )


def _why_not(strategy: Strategy) -> str:
    """What stands in the way."""
    if isinstance(strategy, FSDPStrategy):
        return ", whose flat parameters hold parts of several weights"
    if "deepspeed" in type(strategy).__name__.lower():
        return ", whose engine owns weights and optimizer states"
    return ""


def _check_data_parallel(strategy: ModelParallelStrategy) -> None:
    if strategy._tensor_parallel_size != 1:
        raise StrategyError(
            "Tensor parallelism is not supported",
            got=f"ModelParallelStrategy(tensor_parallel_size={strategy._tensor_parallel_size!r})",
            expected="tensor_parallel_size=1, and every process in data_parallel_size",
            remedy="shard with fully_shard only, or compress the trained checkpoint on one device",
        )


def ranks(trainer: Trainer) -> Ranks:
    """The processes of the trainer."""
    return all_ranks() if trainer.world_size > 1 else SingleProcess()


def same_path(trainer: Trainer, path: Path) -> Path:
    """The path that rank 0 has chosen; files that it writes must not change the choice of others."""
    return trainer.strategy.broadcast(path)
