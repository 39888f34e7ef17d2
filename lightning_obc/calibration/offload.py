"""A model that stays in host memory while one block of it at a time is on the device that computes.

The code between blocks runs on the host, and so do tables of embeddings; everything else that has parameters or buffers
is brought to the device for a call, with the call's inputs, and its outputs come back. Parameters and buffers remain
the same objects, and their host memory too: optimizers, hooks and views of it notice nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from lightning_obc.calibration.nested import mapped
from lightning_obc.distributed import is_sharded
from lightning_obc.errors import CalibrationError, SpecError
from lightning_obc.layers import adapter_for, is_lookup, modules_outside_blocks, parts_of
from lightning_obc.specs import Calibration


def execution_device(name: str | None) -> torch.device | None:
    """The device that ``Calibration.execution_device`` names; None for None, and for ``"auto"`` without an accelerator.

    Raises:
        SpecError: There is no such device here.
    """
    if name is None:
        return None
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return None if found is None else torch.empty(0, device=found).device
    try:
        device = torch.device(name)
        # An index, such as that of the current GPU, where the name has none.
        made = torch.empty(0, device=device).device
        return made if device.index is None else device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SpecError(
            "Calibration.execution_device cannot be used",
            got=f"{name!r}: {str(error).splitlines()[0]}",
            expected='a device of this machine, such as "cuda:0", or "auto"',
        ) from error


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module and all inside it, each once."""
    found = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return list(found.values())


def _unit(units: Mapping[int, nn.Module], layer: nn.Module) -> nn.Module:
    """What is brought to the device for a layer: its block, or the layer's own module outside of all blocks."""
    adapter = adapter_for(layer)
    owner = layer if adapter is None else adapter.owner(layer)
    return units.get(id(owner), owner)


def _units(model: nn.Module) -> dict[int, nn.Module]:
    """By id of every module that may be brought to the device: the outermost one around it that may."""
    frames = {id(module) for module in modules_outside_blocks(model)}
    units: dict[int, nn.Module] = {}

    def visit(module: nn.Module, unit: nn.Module | None) -> None:
        if unit is None and (id(module) not in frames or (module is not model and _works_by_itself(module))):
            unit = module
        if unit is not None:
            units.setdefault(id(module), unit)
        for child in module.children():
            visit(child, unit)

    visit(model, None)
    return units


def _works_by_itself(module: nn.Module) -> bool:
    """True outside of blocks for modules that use tensors in their own forward pass, and hold no block."""
    own = next(module.parameters(recurse=False), next(module.buffers(recurse=False), None)) is not None
    return (own or bool(parts_of(module))) and not any(
        type(child) in (nn.Sequential, nn.ModuleList) for child in module.modules()
    )


@dataclass
class _Visitor:
    """A tensor that is on the device, and its place in host memory."""

    tensor: Tensor
    home: Tensor
    users: int = 0


@dataclass
class _Call:
    """The outermost call that is under way: whose it is, and what was moved for it."""

    module: nn.Module
    depth: int = 1
    brought: list[Tensor] = field(default_factory=list)
    inputs: dict[int, tuple[Tensor, Tensor, int | None]] = field(default_factory=dict)
    # Lists and mappings: as they are on the host, as they were sent, and what these held then.
    containers: dict[int, tuple[Any, Any, list[Any]]] = field(default_factory=dict)


class Offload:
    """Brings the blocks of a model to a device, one at a time, while it is :meth:`active`.

    Args:
        model: The model, in host memory.
        device: The device that computes.

    Raises:
        CalibrationError: Parameters that are shared over ranks, or not initialised yet.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.host = next((tensor.device for tensor in tensors_of(model)), torch.device("cpu"))
        self._check()
        self._units = _units(model)
        self._outside = {id(module) for module in modules_outside_blocks(model)}
        self._visitors: dict[int, _Visitor] = {}
        self._call: _Call | None = None
        self._staying: set[int] = set()
        self._left_out: set[int] = set()
        self._resident: dict[int, list[Tensor]] = {}

    def _check(self) -> None:
        for name, parameter in self.model.named_parameters():
            unfit = "sharded over ranks" if is_sharded(parameter) else None
            unfit = "not initialised yet" if is_lazy(parameter) else unfit
            if unfit is not None:
                raise CalibrationError(
                    "Blocks of this model cannot be brought to another device",
                    got=f"execution_device={str(self.device)!r}, and {name} is {unfit}",
                    expected="whole parameters in host memory",
                    remedy="leave Calibration.execution_device out",
                )

    @contextmanager
    def active(self) -> Iterator[Offload]:
        """Inside, every forward pass of the model computes on the device; afterwards all of it is back on the host."""
        modules = {id(module): module for module in self.model.modules()}
        with ExitStack() as stack:
            stack.callback(self._all_home)
            for frame in modules_outside_blocks(self.model):
                if id(frame) not in self._units:
                    # A call that was cut short, by an exception that PyTorch's hooks do not see, is over here.
                    stack.callback(frame.register_forward_pre_hook(lambda *_: self._settle(), prepend=True).remove)
            for key in self._units:
                module = modules[key]
                # First of all: other hooks see what the module itself sees.
                before = module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
                behind = module.register_forward_hook(self._behind, with_kwargs=True, always_call=True)
                stack.callback(before.remove)
                stack.callback(behind.remove)
            yield self

    @contextmanager
    def staying(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """The blocks of these layers stay on the device from batch to batch, until the end.

        Not layers outside of all blocks: the code between blocks may use their weights too.
        """
        units = [_unit(self._units, layer) for layer in layers]
        self._staying = {id(unit) for unit in units} - self._outside
        try:
            yield
        finally:
            self._staying = set()
            self._settle()
            for brought in self._resident.values():
                self._go_home(brought)
            self._resident = {}

    @contextmanager
    def left_out(self, module: nn.Module) -> Iterator[None]:
        """Inside, nothing is brought for calls of this module."""
        self._left_out.add(id(module))
        try:
            yield
        finally:
            self._left_out.discard(id(module))

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Around a forward pass: one that was cut short leaves nothing behind on the device."""
        try:
            yield
        finally:
            self._settle()

    # One call.
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._call is not None:
            self._call.depth += self._call.module is module
            return None
        if id(module) in self._left_out:
            return None
        if is_lookup(module) and self._units[id(module)] is module and not self._is_here(module):
            return None
        self._call = call = _Call(module)
        if id(module) not in self._resident:
            for tensor in tensors_of(module):
                self._bring(tensor)
                call.brought.append(tensor)
        return tuple(map(self._sent, args)), {key: self._sent(value) for key, value in kwargs.items()}

    def _behind(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._call
        if call is None or call.module is not module:
            return None
        call.depth -= 1
        if call.depth:
            return None
        try:
            return self._received(output)
        finally:
            self._settle()

    def _settle(self) -> None:
        """End the call under way: its inputs show what was done to them in place, and its tensors go home."""
        call, self._call = self._call, None
        if call is None:
            return
        if id(call.module) in self._staying and call.brought:
            self._resident[id(call.module)] = call.brought
        else:
            self._go_home(call.brought)
        with torch.no_grad():
            for original, moved, version in call.inputs.values():
                if (version is None or moved._version != version) and not _overlaps(original):
                    original.copy_(moved)
        for container, sent, held in call.containers.values():
            now = _entries(sent)
            if len(now) != len(held) or any(a is not b for a, b in zip(now, held, strict=True)):
                self._write_back(call, container, sent)

    def _sent(self, value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return value.to(device=self.device)  # type: ignore[call-arg]
        call = self._call
        assert call is not None
        if not isinstance(value, Tensor):
            if not isinstance(value, (list, MutableMapping)):
                return mapped(self._sent, value)
            if id(value) not in call.containers:
                sent = mapped(self._sent, value)
                call.containers[id(value)] = value, sent, _entries(sent)
            return call.containers[id(value)][1]
        if value.device == self.device:
            return value
        known = call.inputs.get(id(value))
        if known is None:
            moved = value.to(self.device)
            known = call.inputs[id(value)] = (value, moved, None if moved.is_inference() else moved._version)
        return known[1]

    def _received(self, value: Any, call: _Call | None = None) -> Any:
        call = call or self._call
        if isinstance(value, PackedSequence):
            return value.to(device=self.host)  # type: ignore[call-arg]
        if call is None:
            return value
        # What was handed through, perhaps changed in place, is still the same tensor, list or mapping.
        handed: Iterable[tuple[Any, ...]] = (*call.inputs.values(), *call.containers.values())
        for original, sent, _ in handed:
            if sent is value:
                return original
        if isinstance(value, Tensor):
            return value.to(self.host)
        return mapped(lambda entry: self._received(entry, call), value)

    def _write_back(self, call: _Call, container: Any, sent: Any) -> None:
        """A list or mapping that a block wrote to shows what it wrote."""
        if isinstance(container, list):
            container[:] = [self._received(entry, call) for entry in sent]
            return
        entries = {key: self._received(entry, call) for key, entry in sent.items()}
        for key in [key for key in container if key not in entries]:
            del container[key]
        container.update(entries)

    # Tensors.
    def _is_here(self, module: nn.Module) -> bool:
        return any(id(tensor) in self._visitors for tensor in tensors_of(module))

    def _bring(self, tensor: Tensor) -> None:
        visitor = self._visitors.get(id(tensor))
        if visitor is None:
            # Tensors made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                home = tensor.data
                # On record before it moves, and until it is back: an interrupt may come between any two lines.
                visitor = self._visitors[id(tensor)] = _Visitor(tensor, home)
                if home.device != self.device:
                    tensor.data = home.to(self.device)
        visitor.users += 1

    def _go_home(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            visitor = self._visitors[id(tensor)]
            visitor.users -= 1
            if visitor.users == 0:
                self._put_back(visitor)
                del self._visitors[id(tensor)]

    @staticmethod
    def _put_back(visitor: _Visitor) -> None:
        tensor, home = visitor.tensor, visitor.home
        with torch.inference_mode(False), torch.no_grad():
            here = tensor.data
            # Changed or not: batch-norm statistics are, and a pass may put other weights in for a while.
            if here.data_ptr() != home.data_ptr() and not _overlaps(home):
                home.copy_(here)
            tensor.data = home

    def _all_home(self) -> None:
        self._call, self._resident = None, {}
        for visitor in self._visitors.values():
            self._put_back(visitor)
        self._visitors = {}


def _entries(container: Any) -> list[Any]:
    return list(container) if isinstance(container, list) else [x for pair in container.items() for x in pair]


def _overlaps(tensor: Tensor) -> bool:
    """True for expanded tensors, which nothing can write to."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def offload_of(model: nn.Module, spec: Calibration) -> Offload | None:
    """What brings blocks of a model to ``spec.execution_device``; None when all of it is there, or none is named."""
    device = execution_device(spec.execution_device)
    if device is None or all(tensor.device == device for tensor in tensors_of(model)):
        return None
    return Offload(model, device)


@contextmanager
def offloading(model: nn.Module, spec: Calibration) -> Iterator[Offload | None]:
    """Inside, forward passes of the model compute on ``spec.execution_device``; see :func:`offload_of`."""
    offload = offload_of(model, spec)
    with nullcontext(None) if offload is None else offload.active():
        yield offload


def staying(offload: Offload | None, layers: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
    """:meth:`Offload.staying`, or nothing."""
    return nullcontext() if offload is None else offload.staying(layers.values())


def unit_bytes(model: nn.Module, layers: Mapping[str, nn.Module]) -> int:
    """Memory of what is brought to the device in a pass for these layers: tensors that several share count once."""
    units = _units(model)
    tensors = {id(tensor): tensor.nbytes for layer in layers.values() for tensor in tensors_of(_unit(units, layer))}
    return sum(tensors.values())
