"""What ``search`` and ``apply`` look at when a run begins, so that mistakes do not come behind hours of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_obc.calibration import Collector, untouched
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display
from lightning_obc.callbacks.passes import check_destination, collector
from lightning_obc.errors import ExportError
from lightning_obc.specs import Calibration


@contextmanager
def trial(trainer: Trainer, module: LightningModule, spec: Calibration) -> Iterator[Optional[Collector]]:
    """What collects from calibration data that may be tried; None where they can be read only once.

    Inside, forward passes log nothing; afterwards module and random states are as they were.
    """
    quiet = torch.inference_mode(False), torch.no_grad(), untouched(module), compat.unlogged(module)
    with ExitStack() as stack:
        for context in quiet:
            stack.enter_context(context)
        display = stack.enter_context(Display(trainer))
        source = compat.triable_source(trainer)
        if source is None:
            yield None
        else:
            display.update("trying one calibration batch", 0, 0)
            yield collector(trainer, module, spec, display, source)


class LookAhead(Callback):
    """In the training that comes before a search: looks at its beginning, and once at what a validation logs.

    Args:
        look: Called with Trainer and module once model and data are there.
        figures: Called with the scalars that the first validation has logged; not with none of a sanity check.
    """

    def __init__(
        self, look: Callable[[Trainer, LightningModule], None], figures: Callable[[dict[str, float]], Any]
    ) -> None:
        self._look, self._figures, self._is_over = look, figures, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The sanity check is the first validation; where there is none, or it logs nothing, that of the first epoch.
        # Later ones may leave figures out: no reason to end a training.
        logged = compat.validation_metrics(trainer)
        if self._is_over or (trainer.sanity_checking and not logged):
            return
        self._is_over = True
        self._figures({name: float(value) for name, value in logged.items() if value.numel() == 1})


def check_output(output: Union[bool, str], ckpt_path: Optional[str]) -> None:
    """Refuse a place for the compressed checkpoint where it cannot be written, or would replace the dense one.

    Raises:
        ExportError: So it is.
    """
    if isinstance(output, bool):
        return
    check_destination(output)
    there = ckpt_path is not None and Path(output).exists() and Path(ckpt_path).exists()
    if ckpt_path is not None and there and Path(output).samefile(ckpt_path):
        raise ExportError(
            "The compressed checkpoint would replace the one that it is made from",
            got=f"output={output}, ckpt_path={ckpt_path}",
            expected="another file",
            remedy="choose another output",
        )
