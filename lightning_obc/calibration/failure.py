"""What is said when a batch does not go through a model: which layer it was, what that got, and how it was called."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.errors import CalibrationError, OBCError, ShapeError

CALL_OTHERWISE = "give the model a calibration_step(batch) that calls it as training does, or pass forward="


def described(value: Any, most: int = 4) -> str:
    """A batch in a few words: types, shapes and dtypes of what it holds."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        held = [f"{key!r}: {described(item)}" for key, item in value.items()]
        return f"{type(value).__name__}({_few(held, most)})"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({_few([described(item) for item in value], most)})"
    return type(value).__name__


def _few(parts: list[str], most: int) -> str:
    more = [f"{len(parts) - most} more"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


# What a call with the wrong arguments or shapes raises; interrupts and errors of other kinds are not about the batch.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


def batch_failed(
    model: nn.Module, batch: Any, called: str, expected: str, error: Exception, remedy: str = CALL_OTHERWISE
) -> CalibrationError:
    """The error to raise for one of :data:`CALL_ERRORS` that came out of a forward pass.

    Args:
        model: The model.
        batch: The calibration batch.
        called: What was called, and with what.
        expected: What would have worked.
        error: What came out.
        remedy: What the user can do.
    """
    layer, place = _layer(model, error.__traceback__), _place(error.__traceback__)
    told = str(error).strip().splitlines() or [""]
    what = f"{type(error).__name__}: {told[0]}" + (f" ({place})" if place else "")
    return CalibrationError(
        "A calibration batch cannot be sent through the model" + (f": it fails in {layer}" if layer else ""),
        got=f"{what}; {called}; the batch is {described(batch)}",
        expected=expected,
        remedy=remedy,
    )


def about_the_call(error: Exception) -> bool:
    """False for errors that say already what is wrong (of hooks), and for a device that is out of memory."""
    return not isinstance(error, (OBCError, torch.OutOfMemoryError))


def misfit_input(name: str, module: nn.Module, x: Tensor, weight: Tensor) -> ShapeError:
    """The error of an input whose shape does not fit the layer that gets it."""
    return ShapeError(
        f"Layer {name!r} ({type(module).__name__}) gets an input that does not fit its weight",
        got=f"input {described(x)}, weight {described(weight)}",
        expected="as many features or channels as the weight has, and no less than its kernel",
        remedy=f"compare the calibration batches with those of training; or {CALL_OTHERWISE}",
    )


def _layer(model: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost module of the model that was being called, with its input."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame in _frames(traceback):
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module) or id(module) not in names or frame.f_code.co_name.startswith("__"):
            continue
        name = names[id(module)]
        given = _first_argument(frame)
        label = f"layer {name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"
        found = label if given is None else f"{label}, which gets {described(given)}"
    return found


def _first_argument(frame: FrameType) -> Any:
    """What a method was called with, as far as it still has it; None otherwise."""
    code, known = frame.f_code, frame.f_locals
    if code.co_argcount > 1:
        return known.get(code.co_varnames[1])
    if not code.co_flags & inspect.CO_VARARGS:
        return None
    packed = known.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
    return packed[0] if packed else None


def _place(traceback: TracebackType | None) -> str:
    """File and line of the last code in the traceback that belongs to neither PyTorch nor this package."""
    ours = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    place = ""
    step = traceback
    while step is not None:
        code = step.tb_frame.f_code
        if not os.path.abspath(code.co_filename).startswith(ours) and os.path.exists(code.co_filename):
            place = f"{os.path.basename(code.co_filename)}:{step.tb_lineno} in {code.co_name}"
        step = step.tb_next
    return place


def _frames(traceback: TracebackType | None) -> list[FrameType]:
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames
