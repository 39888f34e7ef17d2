"""A second device on a machine that has none: ``cpu:0`` beside ``cpu``.

PyTorch computes on both alike. :class:`DeviceDouble` keeps apart what was moved to ``cpu:0``, or made from it, and what
was not: such tensors say that ``cpu:0`` is their device, moves there and back are copies, and the memory of each tensor
counts while anything refers to it. In :meth:`DeviceDouble.forward`, an operation on tensors of both devices is an
error, as it is between a CPU and a GPU. (Not elsewhere: the solvers run on a CPU here, with numba.)
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST, DEVICE = torch.device("cpu"), torch.device("cpu:0")
# What takes tensors of two devices: copies, and indices of the host.
_BOTH = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.index.Tensor)


class MixedDevicesError(RuntimeError):
    """An operation on tensors of both devices."""


class DeviceDouble(TorchFunctionMode):
    """Inside, ``cpu:0`` is another device.

    Attributes:
        peak: Most bytes that were there at once.
        peak_of_passes: The same while batches went through the model.
        arrived: Bytes that were moved there, all together.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._operations, self._stack = _Operations(self), ExitStack()
        self.peak = self.peak_of_passes = self.arrived = 0
        self.strict = False

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run a batch; nothing may mix the devices."""
        self.strict = True
        try:
            return model(batch)
        finally:
            self.strict = False

    def __enter__(self) -> DeviceDouble:
        self._stack.enter_context(self._operations)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @property
    def live(self) -> int:
        """Bytes that are there now."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def holds(self, tensor: Tensor) -> bool:
        """True for a tensor that lies there."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry is not None and not entry[0].expired()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if not self.holds(tensor):
            self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.peak = max(self.peak, self.live)
            self.peak_of_passes = max(self.peak_of_passes, self.live if self.strict else 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if self.holds(args[0]) else func(*args)
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        out = func(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            self.add(out)  # The dispatcher is not told of its device.
        return out

    def _moved(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        to = [*args, *kwargs.values()]
        named = [torch.device(x) for x in to if isinstance(x, (str, torch.device))]
        target = HOST if func is Tensor.cpu else named[0] if named else None
        away = self.holds(tensor)
        if target is None or (target == DEVICE) == away:
            # The device stays: what else is asked for is a type, or a copy.
            keep = [x for x in args if not isinstance(x, (str, torch.device))]
            rest = {key: x for key, x in kwargs.items() if key != "device"}
            return Tensor.to(tensor, *keep, **rest) if keep or rest else tensor
        with _Aside(self):
            moved = func(tensor, *args, **kwargs)
            moved = moved.clone() if moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata else moved
        if target == DEVICE:
            self.add(moved)
            self.arrived += moved.nbytes
        return moved

    def watch(self, model: nn.Module, seen: dict[str, list[bool]]) -> None:
        """From now on, note for every call of a module with tensors of its own whether these are there."""

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                seen.setdefault(name, []).append(all(map(self.holds, own)))

            return hook

        for name, module in model.named_modules():
            if next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]), None) is not None:
                module.register_forward_pre_hook(note(name))


class _Operations(TorchDispatchMode):
    """Follows what is computed from tensors of the device."""

    def __init__(self, double: DeviceDouble) -> None:
        super().__init__()
        self.double, self.aside = double, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, holds = kwargs or {}, self.double.holds
        out = func(*args, **kwargs)
        if self.aside:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [holds(tensor) for tensor in inputs]
        # As on a GPU: single numbers of the host may take part.
        mixed = any(there) and not all(here or not x.dim() for here, x in zip(there, inputs, strict=True))
        if self.double.strict and mixed and func not in _BOTH:
            raise MixedDevicesError(str(func))
        # Conversions name a device too; moves come from DeviceDouble._moved.
        target = None if func is torch.ops.aten._to_copy.default else kwargs.get("device")
        if func is torch.ops.aten.copy_.default or not (any(there) if target is None else target == DEVICE):
            return out
        sources = [tensor.untyped_storage()._cdata for tensor in inputs]
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in sources:
                self.double.add(leaf)
        return out


class _Aside:
    """Moves are no operations."""

    def __init__(self, double: DeviceDouble) -> None:
        self._operations = double._operations

    def __enter__(self) -> None:
        self._operations.aside += 1

    def __exit__(self, *error: Any) -> None:
        self._operations.aside -= 1
