"""What a batch that is only tried must not leave behind, in a model and in the data that it was drawn from."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.distributed import is_sharded

# Elements of a parameter. Forward passes that write to parameters (initialisation from the first data, codebooks)
# write to small ones; copies of the large ones would double the memory of a large model.
_LARGEST_COPY = 2**22
# How far the objects behind a loader are followed, and the largest container of theirs that is kept.
_MOST_OBJECTS, _MOST_ENTRIES, _DEEPEST, _LONGEST = 1000, 50_000, 6, 10_000


@contextmanager
def untouched(model: nn.Module, source: Any = None) -> Iterator[None]:
    """Whatever runs inside leaves model, data and random states as they were.

    Put back are: random states, of objects behind the loader too (data sets, transforms and samplers with generators
    of their own); parameters of up to four million elements; attributes of modules and of these objects, and what
    their lists, dicts, sets and deques hold. Modes and buffers are the business of
    :func:`~lightning_obc.calibration.isolation.traceless`.

    Args:
        model: The model.
        source: The loader or data set that batches are drawn from, if any.
    """
    with preserved_rng():
        # Sharding keeps its own books in the modules, and exchanges their parameters: they are left to it.
        sharded = any(map(is_sharded, model.parameters()))
        kept = [_Kept(found) for found in (*(() if sharded else model.modules()), *_behind(source))]
        own = () if sharded else model.parameters()
        parameters = [(p, p.detach().clone()) for p in own if p.numel() <= _LARGEST_COPY]
        try:
            yield
        finally:
            for one in kept:
                one.put_back()
            with torch.no_grad():
                for parameter, value in parameters:
                    # Where a NaN is in it, it is copied again: that changes nothing.
                    if parameter.device != value.device or not torch.equal(parameter, value):
                        parameter.copy_(value)


class _Kept:
    """An object's attributes, with copies of their containers and the states of their random generators."""

    def __init__(self, owner: Any) -> None:
        self._attributes: dict[str, Any] = vars(owner)
        self._before = dict(self._attributes)
        values = list(self._before.values())
        self._held = [(value, _copy(value)) for value in values if _is_container(value)]
        self._states = [(value, state) for value in (owner, *values) if (state := _generator_state(value)) is not None]

    def put_back(self) -> None:
        now = self._attributes
        for name in [name for name in now if name not in self._before]:
            del now[name]
        for name, value in self._before.items():
            if name not in now or now[name] is not value:
                now[name] = value
        for container, copy in self._held:
            if not _same_entries(container, copy):
                container.clear()
                container.extend(copy) if isinstance(container, (list, deque)) else container.update(copy)
        for generator, state in self._states:
            _set_generator_state(generator, state)


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set, deque)) and len(value) <= _LONGEST


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, (list, deque)) else dict(value) if isinstance(value, dict) else set(value)


def _same_entries(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), copy.items(), strict=True)
        return all(a is b and x is y for (a, x), (b, y) in pairs)
    if isinstance(container, set):
        return container == copy
    return all(a is b for a, b in zip(container, copy, strict=True))


def _behind(source: Any) -> list[Any]:
    """Objects with attributes that a loader or data set leads to: itself, data sets, samplers, transforms."""
    found: dict[int, Any] = {}
    level = [] if source is None else [source]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for value in level:
            if len(inner) > _MOST_ENTRIES:
                break
            if isinstance(value, (list, tuple)) and len(value) <= _LONGEST:
                inner += [entry for entry in value if not isinstance(entry, (str, bytes, int, float, Tensor))]
            elif isinstance(value, dict) and len(value) <= _LONGEST:
                inner += list(value.values())
            elif _has_state(value) and id(value) not in found and len(found) < _MOST_OBJECTS:
                found[id(value)] = value
                inner += list(vars(value).values())
        level = inner
    return list(found.values())


def _has_state(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, ModuleType, FunctionType, MethodType, Tensor, nn.Module)
    )


def _generator_state(value: Any) -> Any:
    """The state of a random generator of PyTorch, NumPy or Python; None for everything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return value.bit_generator.state
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state()
    return None


def _set_generator_state(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = state
    else:
        value.set_state(state)
