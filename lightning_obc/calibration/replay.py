"""Outputs of blocks that will not change any more, kept in host memory: a batch need not run through them again.

A pass for one block then costs that block instead of the whole network. The code between blocks always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_obc.calibration.inputs import LayerInputs
from lightning_obc.calibration.isolation import traceless
from lightning_obc.calibration.nested import is_opaque, leaves
from lightning_obc.calibration.offload import Offload
from lightning_obc.calibration.rng import RandomState
from lightning_obc.layers import adapter_for, block_of

Run = Callable[[Any], Any]


class _Enough(BaseException):
    """Ends a forward pass behind the block of interest; no handler of the model's must stop it."""


@dataclass(frozen=True)
class _Kept:
    """A tensor in host memory; without data only its shape, where nothing looks at its values."""

    tensor: Tensor
    device: torch.device

    @classmethod
    def of(cls, leaf: Any) -> Any:
        return cls(leaf.detach().to("cpu", copy=True), leaf.device) if isinstance(leaf, Tensor) else leaf

    @staticmethod
    def without_data(leaf: Any) -> Any:
        return _Kept(leaf.tensor.to("meta"), leaf.device) if isinstance(leaf, _Kept) else leaf

    @staticmethod
    def live(leaf: Any) -> Any:
        if not isinstance(leaf, _Kept):
            return leaf
        if leaf.tensor.is_meta:
            return torch.zeros_like(leaf.tensor, device=leaf.device)
        return leaf.tensor.to(leaf.device, copy=True)

    @property
    def size(self) -> int:
        return 0 if self.tensor.is_meta else self.tensor.nbytes


@dataclass
class _Probe:
    """What one batch shows: outputs of the blocks in the order of their calls, and inputs of blocks and layers."""

    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    unfit: bool = False


class Replay:
    """Runs batches through a model whose first blocks are finished.

    Blocks are those of :func:`~lightning_obc.layers.blocks_of`. Nothing is kept for models that draw random numbers,
    call a block more than once, or use the weights of a layer outside of its block; nor where a block writes to a
    tensor, a list, a mapping or an object that it is given, or returns an object whose tensors cannot be told.

    Args:
        model: The model.
        layers: The layers that will be calibrated, in the order in which batches reach them.
        run: Runs one batch.
        limit: Bytes of host memory; batches whose outputs do not fit run through all blocks.
        batch: One batch; it is run to see how the blocks depend on each other.
        steady: No weights change between the passes: what a block returns in the last pass for its layers is final.
        offload: What brings blocks to another device; those whose outputs are kept need not come.

    Attributes:
        fit: Whether outputs can be kept for this model.
        size: Bytes that are kept now.
        most: Most bytes that were kept at once.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        run: Run,
        limit: float,
        batch: Any,
        *,
        steady: bool = False,
        offload: Offload | None = None,
    ) -> None:
        self._model, self._run, self._limit, self._steady = model, run, limit, steady
        self._layers, self._offload = layers, offload
        found = {name: block_of(model, name) for name in layers}
        self._home = {name: block[0] for name, block in found.items() if block is not None}
        self._blocks = dict(block for block in found.values() if block is not None)
        self._finished: list[str] = []
        self._open, self._full = list(layers), set[tuple[str, int]]()
        self._kept: dict[tuple[str, int], dict[str, Any]] = {}
        self.size = self.most = 0
        probe = self._probed(batch, {})
        self.fit = not probe.unfit
        self._blocks = {} if probe.unfit else {name: self._blocks[name] for name in probe.outputs}
        self._calls = [] if probe.unfit else probe.calls
        self._alone = {name for name in self._blocks if self._hides_earlier(batch, probe, name)}

    def advance(self, left: Sequence[str]) -> None:
        """Say which layers are still to be compressed: blocks in front of the first of them are finished."""
        order, self._open = list(self._layers), list(left)
        first = min((order.index(name) for name in left), default=len(order))
        still_open = {self._home.get(name) for name in order[first:]}
        self._finished = [name for name in self._blocks if name not in still_open]

    def release(self) -> None:
        """Forget all outputs."""
        self._kept.clear()
        self._full.clear()
        self.size, self._finished = 0, []

    @contextmanager
    def running(self, stream: str, batch: int, layers: Sequence[str]) -> Iterator[None]:
        """Around the forward pass of a batch; it ends behind the last block or layer that the pass is for.

        Args:
            stream: Which weights are in the model, ``"before"`` or ``"behind"``.
            batch: Number of the batch, the same in every pass.
            layers: Names of the layers that the pass is for.
        """
        key = (stream, batch)
        kept = self._kept.get(key, {})
        closing = self._closing(layers) - set(kept)
        with ExitStack() as stack:
            for name in self._finished:
                module = self._blocks[name]
                if name in kept:
                    stack.enter_context(self._replaced(module, kept[name]))
                else:
                    closing.add(name)
            for name in closing:
                stack.callback(self._blocks[name].register_forward_hook(self._keeper(key, name)).remove)
            if (last := self._last(layers)) is not None:
                stack.callback(last.register_forward_hook(_stop).remove)
            stack.enter_context(suppress(_Enough))
            yield

    def unkept(self, stream: str, batch: int) -> dict[str, nn.Module]:
        """Layers of finished blocks whose outputs could be kept, and are not."""
        key = (stream, batch)
        names = set() if key in self._full else set(self._finished) - set(self._kept.get(key, {}))
        return {name: layer for name, layer in self._layers.items() if self._home.get(name) in names}

    def _closing(self, layers: Sequence[str]) -> set[str]:
        """Blocks whose last pass this is, where no weight changes any more."""
        if not self._steady:
            return set()
        later = {self._home.get(name) for name in self._open if name not in layers}
        return {self._home[name] for name in layers if name in self._home} & set(self._blocks) - later

    def _last(self, layers: Sequence[str]) -> nn.Module | None:
        """The module behind which a pass for these layers may end: the last of their calls, as the probe shows."""
        names = {self._home.get(name, name) for name in layers}
        if not names or any(self._calls.count(name) != 1 for name in names):
            return None
        name = max(names, key=self._calls.index)
        if name in self._blocks:
            return self._blocks[name]
        adapter = adapter_for(self._layers[name])
        return None if adapter is None else adapter.owner(self._layers[name])

    def _keeper(self, key: tuple[str, int], name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            before, added = self._kept.get(key, {}), tree_map(_Kept.of, output)
            older = {k: tree_map(_Kept.without_data, v) for k, v in before.items()} if name in self._alone else before
            after = older | {name: added}
            size = self.size - _size(before) + _size(after)
            if size <= self._limit:
                self._kept[key] = after
                self.size, self.most = size, max(self.most, size)
            else:
                self._full.add(key)

        return keep

    @contextmanager
    def _replaced(self, module: nn.Module, output: Any) -> Iterator[None]:
        with nullcontext() if self._offload is None else self._offload.left_out(module), _replaced(module, output):
            yield

    def _probed(self, batch: Any, replaced: Mapping[str, Any]) -> _Probe:
        """Run one batch, with some blocks replaced by what they returned."""
        probe, running = _Probe(), [""]

        def receive(name: str, module: nn.Module, x: Tensor) -> None:
            home = self._home.get(name, "")
            probe.unfit |= home != running[0]
            if not home:
                probe.calls.append(name)
                # On the host: the device has room for one block and its inputs, not for all layers'.
                probe.inputs.setdefault(name, []).append(x.to("cpu", copy=True))

        inputs = LayerInputs(self._layers, receive)
        with ExitStack() as stack:
            for context in (traceless(self._model), inputs.watched(self._model), inputs.one_batch()):
                stack.enter_context(context)
            for name, module in self._blocks.items():
                if name in replaced:
                    stack.enter_context(self._replaced(module, replaced[name]))
                before, behind = _recorders(name, probe, running)
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(behind).remove)
            state = RandomState.capture()
            self._run(batch)
            probe.unfit |= not state.same_as(RandomState.capture())
        return probe

    def _hides_earlier(self, batch: Any, probe: _Probe, name: str) -> bool:
        """True when nothing behind a block looks at the values of earlier blocks' outputs."""
        order = list(self._blocks)
        index = order.index(name)
        earlier = {k: tree_map(_Kept.without_data, probe.outputs[k]) for k in order[:index]}
        try:
            found = self._probed(batch, probe.outputs | earlier)
        except Exception:
            return False
        compared = [k for k in probe.inputs if k not in order[: index + 1]]
        return all(_equal(found.inputs.get(k, []), probe.inputs[k]) for k in compared)


def _recorders(name: str, probe: _Probe, running: list[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    given: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        probe.unfit |= name in probe.inputs or bool(running[0])
        given[:] = (args, kwargs), _state_of((args, kwargs))
        probe.inputs[name] = [x.clone() if isinstance(x, Tensor) else x for x in leaves((args, kwargs))]
        probe.calls.append(name)
        running[0] = name

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        probe.outputs[name] = tree_map(_Kept.of, output)
        probe.unfit |= _state_of(given[0]) != given[1] or not _equal(probe.inputs[name], leaves(given[0]))
        probe.unfit |= any(map(is_opaque, leaves(output)))
        given.clear()
        running[0] = ""

    return before, behind


def _state_of(given: Any) -> list[Any]:
    """What a block was given, so far as it can write to it: entries of containers, and attributes of objects.

    Tensors of its arguments count by their identity here: their values are compared apart.
    """
    found: list[Any] = []
    for leaf in leaves(given):
        found.append(id(leaf))
        held = dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
        if not isinstance(leaf, (Tensor, nn.Module)):
            found += [(key, id(x), x._version if _versioned(x) else 0) for key, x in held.items()]
    return found


def _versioned(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Enough


@contextmanager
def _replaced(module: nn.Module, output: Any) -> Iterator[None]:
    """The module returns ``output`` inside, whatever it is called with."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: tree_map(_Kept.live, output)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own  # type: ignore[method-assign]


def _size(outputs: Mapping[str, Any]) -> int:
    return sum(leaf.size for leaf in tree_flatten(dict(outputs))[0] if isinstance(leaf, _Kept))


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Tensors equal bit for bit; other things only need to be as many."""
    pairs = list(zip(first, second, strict=False))
    return len(first) == len(second) and all(
        isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)
    )
