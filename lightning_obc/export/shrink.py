"""Layers that are physically smaller: channels that nothing reads leave, and with them the outputs that fed them.

A channel that no row of a layer reads need not be computed. Structured pruning makes such channels; other zeros do not
change what is left to compute. Which channels stand or fall together is read off the traced model
(:mod:`lightning_obc.export.channels`): through residual sums a channel goes when all readers of the sum leave it
unread, through attention when it is a whole head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_obc.activations import unquantized
from lightning_obc.errors import ExportError
from lightning_obc.export.channel_rules import track
from lightning_obc.export.channels import Channels, Flags, Ids, Reader, Runs, Survival, Written, surviving
from lightning_obc.export.graph import Sample, arguments_of, evaluation, trace
from lightning_obc.export.resizing import Slices, carried, carry_inputs_, group_numbers, set_sizes_, slice_
from lightning_obc.export.weights import CompressedWeight, Solutions, compressed_state, layer_adapter, named_layers

_NO_COUNT = ("dim", "size", "width", "channel", "feature")


@dataclass(frozen=True)
class Shrunk:
    """A model whose unread channels are gone.

    Attributes:
        model: A copy with smaller layers and the same state-dict keys; the model that was passed in is unchanged.
        removed: Channels that left, by the layer that no longer reads them.
        kept: Layers with channels that nothing reads, but that had to stay, with the reason.
        before: Parameters of the model.
        after: Parameters of the copy.
        solutions: Masks, codes and grids of the copy, by layer name, for ``save_packed`` and ``export_onnx``.
        sizes: Sizes that are attributes of the copy's modules, by module name: plain numbers, which ``save_packed``
            takes so that ``load_packed`` can make a new model as small.
    """

    model: nn.Module = field(repr=False)
    removed: Mapping[str, int]
    kept: Mapping[str, str]
    before: int
    after: int
    solutions: Mapping[str, CompressedWeight] = field(default_factory=dict, repr=False)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [f"{self.after} of {self.before} parameters left ({self.before / max(1, self.after):.2f}× fewer)"]
        lines += [f"{name}: {count} input channels removed" for name, count in self.removed.items()]
        return "\n".join([*lines, *(f"{name}: unread channels stay: {reason}" for name, reason in self.kept.items())])


def shrink(model: nn.Module, sample: Sample, solutions: Solutions | None = None) -> Shrunk:
    """Take channels that nothing reads out of the layers that make, hand on and read them.

    A channel goes when every weight that reads it is zero there: through batch-norms, activations, pooling, depthwise
    convolutions, flattening, concatenations and residual sums, whose readers must all leave it unread. Of attention
    written with linear layers, whole heads go. What must stay is in ``kept`` with the reason.

    Args:
        model: Traceable by ``torch.export``; evaluated in evaluation mode, not changed. Quantized inputs stay so.
        sample: Example input: a tensor, a sequence of positional arguments or a mapping of keyword arguments. Outputs
            of model and copy are compared on it, in float64 where the model allows it, without input quantization.
        solutions: Compressed weights by layer name (``CompressionReport.solutions``), to be carried over.

    Raises:
        ExportError: The model cannot be traced or run, its weights are not those of the solutions, or the copy's output
            differs beyond rounding. ShapeError, LayerNotFoundError: The solutions belong to another model.
    """
    model = getattr(model, "_orig_mod", model)
    state = compressed_state(model, solutions or {})
    with unquantized(model):
        graph = trace(model, sample, dynamic_batch=False, decompose=False)
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    channels = track(graph, tensors)
    cutter = _Cutter(model, sample, channels, list(_runs(model, channels, state)))
    survival, small, sizes = cutter.cut()
    slices = cutter.slices(survival)
    carry_inputs_(small, model, slices)
    moved = compressed_state(small, carried(model, small, slices, state))
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, small))
    removed, kept = _account(channels, survival, cutter.blocked)
    for copied, original in zip(small.modules(), model.modules(), strict=True):
        copied.training = original.training
    return Shrunk(small, removed, kept, before, after, moved, sizes)


class _Cutter:
    """Cuts copies of a model, and finds out what its code follows."""

    def __init__(self, model: nn.Module, sample: Sample, channels: Channels, runs: list[Runs]) -> None:
        self.model, self.channels, self.runs = model, channels, runs
        self.blocked: list[tuple[Ids, str]] = []
        self._all = np.arange(len(channels.parent))
        self._sample = sample
        self._judge = _Judge(model, sample)

    def cut(self) -> tuple[Survival, nn.Module, dict[str, dict[str, int]]]:
        """The smallest copy that computes the same.

        Raises:
            ExportError: It computes something else for no reason that can be found.
        """
        survival = surviving(self.channels, self.runs, [])
        small, sizes = self._attempt(survival, {})
        error = self._judge(small)
        if error is None:
            return survival, small, sizes
        wholes: dict[int, bool] = {}
        for roots, owner in self._written(survival):
            self._try_alone(survival, roots, owner, wholes)
        survival = surviving(self.channels, self.runs, self.blocked)
        small, sizes = self._attempt(survival, wholes)
        if (error := self._judge(small)) is not None:
            raise ExportError(
                "The smaller model computes something else",
                got=error,
                expected="the same outputs but for rounding",
                remedy="report this model; nothing was changed",
            )
        return survival, small, sizes

    def _try_alone(self, survival: Survival, roots: set[int], owner: str, wholes: dict[int, bool]) -> None:
        """Whether a model follows where these channels alone go; they are blocked otherwise."""
        mine = np.isin(survival.roots, list(roots))
        others = (self._all[~survival.of(self._all) & ~mine], "")
        for whole in (False, True):
            alone = surviving(self.channels, self.runs, [*self.blocked, others])
            modes = dict.fromkeys(roots, whole)
            if (error := self._judge(self._attempt(alone, modes)[0])) is None:
                wholes.update(modes)
                return
        self.blocked.append((self._all[mine], f"the code of {owner or 'the model'} has its sizes written in ({error})"))

    def _written(self, survival: Survival) -> list[tuple[set[int], str]]:
        """Channels that leave and whose number the model's code may know, in sets that go together."""
        found: list[tuple[set[int], str]] = []
        for written in self.channels.written:
            roots, owner = _dead(survival, written), written.owner
            if not roots:
                continue
            for other in [one for one in found if one[0] & roots]:
                found.remove(other)
                roots, owner = roots | other[0], other[1]
            found.append((roots, owner))
        return found

    def slices(self, survival: Survival) -> Slices:
        slices = Slices()
        for key, dims in self.channels.tensors.items():
            flags = [survival.of(ids) for ids in dims]
            if not all(flag.all() for flag in flags):
                slices.kept[key] = [None if f.all() else torch.from_numpy(np.flatnonzero(f)) for f in flags]
        return slices

    def _attempt(self, survival: Survival, wholes: Mapping[int, bool]) -> tuple[nn.Module, dict[str, dict[str, int]]]:
        small = copy.deepcopy(self.model).eval()
        sizes = slice_(small, self.model, self.slices(survival))
        modules = dict(small.named_modules())
        for written in self.channels.written:
            module = modules.get(written.owner.partition("@")[0])
            if module is None:
                continue
            whole = any(wholes.get(root, False) for root in _dead(survival, written))
            changed = dict(_attributes(survival, written, vars(module), whole))
            set_sizes_(module, changed)
            if changed:
                sizes.setdefault(written.owner.partition("@")[0], {}).update(changed)
        return small, sizes


def _dead(survival: Survival, written: Written) -> set[int]:
    roots = np.concatenate([survival.roots[group.ids.ravel()] for group in written.groups])
    return set(roots[~survival.live[roots]].tolist())


def _attributes(
    survival: Survival, written: Written, attributes: Mapping[str, Any], whole: bool
) -> Iterator[tuple[str, int]]:
    """Attributes that hold a size which changes: those named like a number of heads, or all of this value."""
    for group in written.groups:
        for _, size, left in survival.sizes(group):
            for name, value in attributes.items():
                count = "head" in name and not any(word in name for word in _NO_COUNT)
                if type(value) is int and value == size and (whole or count):
                    yield name, left


class _Judge:
    """Compares a copy's outputs with the model's, in float64 where the model runs in it."""

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        self._arguments = arguments_of(sample)
        try:
            self._double = True
            self._expected = self._outputs(model)
        except Exception:
            self._double = False
            try:
                self._expected = self._outputs(model)
            except Exception as error:
                raise ExportError("The model does not run on the sample", got=_first_line(error)) from error

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        args, kwargs = self._arguments
        if self._double:
            model = copy.deepcopy(model).double()
            args, kwargs = _as_double(args), _as_double(kwargs)
        with ExitStack() as stack:
            for context in (unquantized(model), evaluation(model), torch.no_grad()):
                stack.enter_context(context)
            return _tensors(model(*args, **kwargs))

    def __call__(self, small: nn.Module) -> str | None:
        """What is wrong with a copy, or None."""
        try:
            found = self._outputs(small)
        except Exception as error:
            return _first_line(error)
        if [one.shape for one in found] != [one.shape for one in self._expected]:
            return "outputs of another shape"
        # Sums over fewer terms round otherwise, by some units in the last place of the largest output.
        bound = 1e-9 if self._double else max(torch.finfo(one.dtype).eps for one in self._floating()) ** 0.5
        worst = 0.0
        for a, b in zip(self._expected, found, strict=True):
            change = (b.double() - a.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)
            worst = max(worst, float(change) if bool(torch.isfinite(change)) else float("inf"))
        return None if worst < bound else f"outputs that differ by {worst:.2g} of the largest one"

    def _floating(self) -> list[Tensor]:
        return [one for one in self._expected if one.is_floating_point()] or [torch.zeros(1)]


def _as_double(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: _as_double(value) for key, value in tree.items()}
    return type(tree)(_as_double(value) for value in tree) if isinstance(tree, (tuple, list)) else tree


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for value in output for tensor in _tensors(value)] if isinstance(output, (tuple, list)) else []


def _runs(model: nn.Module, channels: Channels, state: Mapping[str, CompressedWeight]) -> Iterator[Runs]:
    """Layers with several scales per row."""
    modules = named_layers(model)
    readers = {id(reader.weight): reader for reader in channels.readers}
    for name, weight in state.items():
        module, adapter = layer_adapter(name, modules)
        reader = readers.get(id(adapter.current(module)))
        if reader is None or weight.scale is None or weight.bits is None or weight.scale.shape[-1] == 1:
            continue
        numbers = adapter.to_module_layout(module, weight.expand(group_numbers(weight)))
        numbers = numbers.movedim((reader.row_dim, reader.column_dim), (0, 1))[0].reshape(len(reader.columns), -1)[:, 0]
        groups = torch.unique_consecutive(numbers, return_inverse=True)[1].numpy()
        bits = weight.scale.element_size() * 8 + (0 if weight.symmetric else weight.bits)
        yield Runs(reader.columns, groups, len(reader.rows), weight.bits, bits)


def _account(
    channels: Channels, survival: Survival, blocked: list[tuple[Ids, str]]
) -> tuple[dict[str, int], dict[str, str]]:
    """Channels that left by layer, and why others that nothing in a layer reads stay."""
    reasons: dict[int, str] = {}
    for ids, reason in (*channels.pins, *blocked):
        for root in np.unique(survival.roots[ids]).tolist():
            reasons.setdefault(root, reason)
    reads = [(one, np.asarray(one.nonzero()[survival.of(one.rows)].any(0))) for one in channels.readers]
    removed: dict[str, int] = {}
    kept: dict[str, str] = {}
    for reader, read in reads:
        live = survival.of(reader.columns)
        if not live.all():
            removed[reader.name] = len(np.unique(reader.source[~live]))
        if (stays := live & ~read).any():
            root = int(survival.roots[reader.columns[stays][0]])
            kept[reader.name] = reasons.get(root) or _read_elsewhere(reader, root, reads, survival)
    return removed, kept


def _read_elsewhere(reader: Reader, root: int, reads: list[tuple[Reader, Flags]], survival: Survival) -> str:
    for other, read in reads:
        if root in survival.roots[other.columns[read]]:
            return f"{other.name} reads them" if other is not reader else f"{reader.name} reads them in part"
    return "what they belong to must not be empty, or would be cut unevenly"
