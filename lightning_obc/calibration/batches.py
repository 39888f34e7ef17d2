"""What a batch is: its size, its device, the inputs that a model's forward wants."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_obc.calibration.failure import CALL_ERRORS, CALL_OTHERWISE, about_the_call, batch_failed, described
from lightning_obc.errors import CalibrationError

_ACCEPTED = (
    "a forward that takes the first element of a batch (or, of several arguments, the elements of that), "
    "or the entries of a mapping by name"
)
_STEP = (
    "its calibration_step got the batch",
    "a calibration_step that takes such batches",
    "let calibration_step do with a batch what training does, or give calibration_dataloader() the batches it takes",
)
_LABELS = ("labels", "label", "label_ids", "targets", "target")


def batch_size_of(batch: Any) -> int:
    """Number of samples in a batch: the first dimension of the first tensor found.

    Tuples and lists are ``(inputs, targets, …)``: their first element counts. Where that is itself a sequence of
    tensors, it holds either several inputs of a batch (``(x, lengths)``), which have samples in their first dimensions,
    or one tensor for each sample (images of different sizes). The elements behind it (targets) tell which; without
    them, tensors of different numbers of dimensions are several inputs, and others one sample each. Mappings count by
    their first value that holds a tensor.

    Raises:
        CalibrationError: No tensor is found.
    """
    size = _size(batch)
    if size is None:
        raise CalibrationError(
            "The size of a batch cannot be told",
            got=type(batch).__name__,
            expected="a tensor, a sequence that starts with the inputs, or a mapping with tensors",
        )
    return size


def token_mask_of(batch: Any) -> Tensor | None:
    """Bool ``[samples, tokens]``, True for real tokens, of a batch that carries an ``attention_mask``, else None."""
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _size(batch: Any) -> int | None:
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(parts, (list, tuple)):
        return None
    for index, part in enumerate(parts):
        if _are_tensors(part):
            return _size_of_several(part, parts[index + 1 :])
        if (size := _size(part)) is not None:
            return size
    return None


def _are_tensors(part: Any) -> bool:
    sequence = isinstance(part, (list, tuple)) and not isinstance(part, PackedSequence)
    return sequence and len(part) > 0 and all(isinstance(item, Tensor) for item in part)


def _size_of_several(tensors: Sequence[Tensor], behind: Sequence[Any]) -> int:
    """Samples in a sequence of tensors: several inputs of one batch, or one tensor for each sample."""
    shared = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    inputs = len({tensor.dim() for tensor in tensors}) > 1
    told = next((len(one) for one in behind if _has_length(one)), None)
    if told is not None and (told in shared or told == len(tensors)):
        return told
    # Targets say nothing: tensors of one rank are images, for want of anything that tells them from several inputs.
    return _size(tensors[0]) or 1 if inputs else len(tensors)


def _has_length(one: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dim() > 0
    return isinstance(one, (list, tuple)) and not isinstance(one, PackedSequence)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; containers are rebuilt, everything else is passed on."""
    if isinstance(batch, (Tensor, PackedSequence)):
        return batch.to(device=device)  # type: ignore[call-arg]
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else rebuilt(batch, moved)
    if isinstance(batch, tuple):
        items = [to_device(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if isinstance(batch, list):
        return [to_device(item, device) for item in batch]
    return batch


def rebuilt(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """Mappings of other types (tokenizer outputs, ordered dicts) keep their type when it takes a dict."""
    try:
        return type(batch)(moved)  # type: ignore[call-arg]
    except TypeError:
        return moved


def call_forward(model: nn.Module, batch: Any) -> Any:
    """Send a batch through a model the way calibration does by default.

    ``model.calibration_step(batch)`` when the model has one. Otherwise its forward: a tensor as it is; of a sequence
    ``(inputs, targets, …)`` the first element, and of that, where it is a sequence and the forward needs several
    arguments, one element for each; of a mapping the entries that the forward has parameters for, labels left out.

    Raises:
        CalibrationError: The model fails on the batch; the layer, and what it was called with, are named.
    """
    step = getattr(model, "calibration_step", None)
    if callable(step):
        with calling(model, batch, *_STEP):
            return step(batch)
    inputs = inputs_of(model, batch)
    with calling(model, batch, _sent(batch, inputs), _ACCEPTED):
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if takes_each(model, inputs) else model(inputs)


@contextmanager
def calling(model: nn.Module, batch: Any, called: str, expected: str, remedy: str = CALL_OTHERWISE) -> Iterator[None]:
    """Around one batch through a model: errors inside say which layer failed on what.

    Raises:
        CalibrationError: In the place of an error that a call with the wrong arguments or shapes raises.
    """
    try:
        yield
    except CALL_ERRORS as error:
        if not about_the_call(error):
            raise
        raise batch_failed(model, batch, called, expected, error, remedy) from error


def _sent(batch: Any, inputs: Any) -> str:
    """What the forward was called with."""
    if isinstance(inputs, Mapping):
        return f"the forward got the entries {', '.join(map(repr, inputs)) or 'of no known name'} of a mapping"
    first = "its first element, " if isinstance(batch, (list, tuple)) else ""
    return f"the forward got {first}{described(inputs)}"


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """What the forward of a model takes of a batch: a mapping of keyword arguments, a sequence of positional ones
    (where :func:`takes_each` says so), or one argument."""
    if isinstance(batch, (list, tuple)) and batch and not isinstance(batch, PackedSequence):
        batch = batch[0]
    return _accepted(model, batch) if isinstance(batch, Mapping) else batch


def takes_each(model: nn.Module, inputs: Any) -> bool:
    """Whether inputs are a sequence of as many elements as a forward, which needs more than one, can take."""
    if not isinstance(inputs, (list, tuple)) or isinstance(inputs, PackedSequence):
        return False
    positional = [p for p in _parameters(model) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is inspect.Parameter.empty for p in positional)
    return 1 < needed <= len(inputs) <= len(positional)


def _parameters(model: nn.Module) -> Sequence[inspect.Parameter]:
    inner = getattr(model, "_orig_mod", model)
    return list(inspect.signature(inner.forward).parameters.values())


def _accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(model)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = set(batch)
    else:
        names = {p.name for p in parameters}
    return {key: value for key, value in batch.items() if key in names and key not in _LABELS}
