"""Models that stay on the host while one block at a time computes elsewhere: same bits, bounded memory, no trace."""

from __future__ import annotations

import copy
import gc
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward_chains import CallsABlockTwice, DrawsNumbers
from device_double import DEVICE, DeviceDouble
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lightning_obc as obc
from lightning_obc.calibration import Collector, DenseWeights
from lightning_obc.calibration import offload as offload_module
from lightning_obc.calibration.offload import Offload, offload_of
from lightning_obc.correction import record_statistics
from lightning_obc.errors import CalibrationError, DeviceMemoryError, SpecError
from lightning_obc.layers import select_layers
from lightning_obc.planning import plan_stage

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.back = nn.Linear(WIDTH, 48), nn.BatchNorm1d(48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.back(self.norm(self.wide(x)).relu())


class Chain(nn.Module):
    """Layers before and behind blocks in a row, with code between them that works in place on what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
            x.add_(self.shift)
        return self.head(self.norm(x))


class Twice(CallsABlockTwice, Chain):
    pass


class Draws(DrawsNumbers, Chain):
    pass


class Borrows(Chain):
    """Layers of the first block are called behind the last one, and the weight of another by a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.blocks[0].back(self.blocks[0].wide(x))
        return self.head(x) + F.linear(x, self.head.weight)


class InPlace(nn.Module):
    """Blocks that work in place on their input, which the code between them uses again; one hands its input through."""

    class Rectify(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.relu_())

    class Same(Rectify):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(self.layer(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Rectify(), self.Same(), self.Rectify()])

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.blocks[0](x) + x
        z = self.blocks[1](y)
        z.mul_(2)
        return self.blocks[2](y + z) + z


class Tied(nn.Module):
    """A table of embeddings that is also the head's weight, and attention that gets a tuple and a mapping."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.feed, self.recurrent = nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)

        def forward(self, given: tuple[Tensor, Tensor], options: dict[str, Tensor]) -> dict[str, Any]:
            x, y = given
            x = x + self.attention(x, y, y, need_weights=False)[0] * options["scale"]
            return {"states": (x, self.recurrent(self.feed(x))[0])}

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(8, WIDTH), nn.ModuleList(self.Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.table((x.abs() * 4).long().clamp(max=7))
        for layer in self.layers:
            x, y = layer((x, y), options={"scale": x.mean()})["states"]
        return self.head(x + y)


class Writes(Chain):
    """Blocks that write to a list, a mapping and an object, which the next ones and the code behind them read."""

    class Layer(Block):
        def forward(self, x: Tensor, seen: list[Tensor], state: dict[str, Any], other: Any) -> None:  # type: ignore[override]
            y = super().forward(x + state["mean"] + other.mean.to(x.device))
            seen.append(y)
            state["mean"], other.mean = y.mean(0), y.mean(0)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, state, other, seen = self.stem(x), {"mean": torch.zeros(WIDTH)}, SimpleNamespace(), list[Tensor]()
        other.mean = torch.zeros(WIDTH)
        for block in self.blocks:
            block(x, seen, state=state, other=other)
            x = seen[-1]
        return self.head(torch.stack(seen).sum(0) + state["mean"])


@dataclass(frozen=True)
class Held:
    x: Tensor


class Holds(Chain):
    """Blocks that take a data class and return another, or a mapping that PyTorch does not know."""

    class Layer(Block):
        def forward(self, given: Held) -> Any:  # type: ignore[override]
            return Held(super().forward(given.x))

    class Other(Layer):
        def forward(self, given: Held) -> Any:
            return UserDict(x=super().forward(given).x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Layer(), self.Other(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            found = block(Held(x))
            found = found["x"] if isinstance(found, UserDict) else found.x
            x = found.mul_(1.1) + x
        return self.head(x)


def made(kind: Callable[[], nn.Module]) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(16, 8)
    return model.eval(), list(x.split(8))


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


MODES: dict[str, dict[str, Any]] = {
    "independent": {},
    "memory": {"memory": "30 KiB"},
    "layer": {"mode": "sequential"},
    "block": {"mode": "asymmetric", "together": "block", "bias": True},
    "all": {"mode": "asymmetric", "together": "all"},
    "little kept": {"mode": "asymmetric", "together": "block", "cache": "2 KiB"},
    "on host": {"mode": "sequential", "together": "block", "device_memory": "250 KiB"},
}


STAGES = [obc.Prune("2:4", layers=["blocks.*"], solver="sparsegpt"), obc.Quantize(4, solver="gptq")]


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_the_bits_of_a_run_that_moves_nothing(name: str) -> None:
    (model, batches), settings = made(Chain), MODES[name]
    moved = copy.deepcopy(model)
    plain = {key: value for key, value in settings.items() if key not in ("cache", "device_memory")}
    obc.compress(model, batches, STAGES, calibration=obc.Calibration(**plain), on_failure="raise")
    spec = obc.Calibration(execution_device=str(DEVICE), **settings)
    obc.compress(moved, batches, STAGES, calibration=spec, on_failure="raise")
    assert same_bits(model, moved)


@pytest.mark.parametrize("name", ["independent", "block"])
def test_no_module_computes_on_the_host_and_nothing_stays_on_the_device(name: str) -> None:
    (model, batches), seen = made(Chain), dict[str, list[bool]]()
    spec = obc.Calibration(execution_device=str(DEVICE), **MODES[name])
    with DeviceDouble() as double:
        double.watch(model, seen)
        obc.compress(model, batches, STAGES, calibration=spec, on_failure="raise", forward=double.forward)
        gc.collect()
        assert double.live == 0
    assert {"stem", "head", "blocks.0.wide", "blocks.2.norm", "blocks.2.back"} <= set(seen)
    assert all(all(found) for called, found in seen.items() if called)
    if name == "independent":
        # The batch that is tried when the run begins; for each of two stages once for the order of the layers, once for
        # the probe, and one pass of two batches.
        assert len(seen["blocks.1.wide"]) == 1 + 2 * (1 + 1 + 2)


@pytest.mark.parametrize("kind", [Twice, Draws, Borrows, InPlace, Tied, Writes, Holds])
@pytest.mark.parametrize("paired", [False, True])
def test_every_kind_of_network_has_the_statistics_of_a_pass_that_moves_nothing(
    kind: Callable[[], nn.Module], paired: bool
) -> None:
    model, batches = made(kind)
    options: dict[str, Any] = {"mode": "sequential", "together": "block"} if paired else {}
    stage = obc.Quantize(4, solver="rtn")
    plain, moved = copy.deepcopy(model), copy.deepcopy(model)
    obc.compress(plain, batches, stage, calibration=obc.Calibration(**options), on_failure="raise")
    spec = obc.Calibration(execution_device=str(DEVICE), **options)
    obc.compress(moved, batches, stage, calibration=spec, on_failure="raise")
    assert same_bits(plain, moved)
    layers = select_layers(model)
    expected = Collector(model, batches, obc.Calibration())(layers)
    with DeviceDouble() as double:
        collect = Collector(model, batches, spec, double.forward)
        with collect.executing():
            found = collect.paired(layers, DenseWeights()) if paired else collect(layers)
        halves = {name: (one.hessian if paired else one).halves for name, one in found.items()}
        assert all(map(double.holds, halves.values()))
    assert all(torch.equal(halves[name], hessian.halves) for name, hessian in expected.items())


@pytest.mark.parametrize("kind", [InPlace, Writes, Holds])
def test_outputs_are_not_kept_where_blocks_write_to_what_they_are_given(kind: Callable[[], nn.Module]) -> None:
    model, batches = made(kind)
    moved, stage = copy.deepcopy(model), obc.Quantize(3, solver="gptq")
    obc.compress(model, batches, stage, on_failure="raise")
    with DeviceDouble() as double:
        # Several passes, of which the later ones would begin with kept outputs; seven layers never fit at once.
        spec = obc.Calibration(execution_device=str(DEVICE), memory="5 KiB")
        obc.compress(moved, batches, stage, calibration=spec, on_failure="raise", forward=double.forward)
    assert same_bits(model, moved)


def test_masks_without_memory_of_their_own_in_inference_mode() -> None:
    class Masked(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x, mask = self.stem(x), torch.ones(1).expand(len(x))
            for block in self.blocks:
                x = block(x, scale=mask.unsqueeze(1))
            return self.head(x)

    model, batches = made(Masked)
    moved, stage = copy.deepcopy(model), obc.Quantize(4, solver="gptq")
    with torch.inference_mode():
        obc.compress(model, batches, stage, on_failure="raise")
        spec = obc.Calibration(execution_device=str(DEVICE))
        obc.compress(moved, batches, stage, calibration=spec, on_failure="raise")
    assert same_bits(model, moved)


def test_inputs_of_all_layers_are_compared_on_the_host() -> None:
    model, batches = made(Chain)
    with DeviceDouble() as double:
        collect = Collector(model, batches, obc.Calibration(execution_device=str(DEVICE)), double.forward)
        with collect.executing():
            collect.fed_from_outside(select_layers(model))
        # One block, its inputs, and what it computes of them; the inputs of eight layers are twelve KiB more.
        assert double.peak < 4 * (2 * 48 * WIDTH + 5 * 48 + WIDTH) + 8 + 4 * 8 * (4 * 48 + 2 * WIDTH)


@pytest.mark.parametrize("method", ["_put_back", "_bring"])
def test_an_interrupt_between_a_move_and_the_next_line(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(Chain)
    before, pointers = copy.deepcopy(model), [p.data_ptr() for p in model.parameters()]
    done = list[None]()
    real = Offload.__dict__["_put_back"].__func__

    def interrupted(visitor: Any) -> None:
        if len(done) == 20:
            done.append(None)
            raise KeyboardInterrupt
        done.append(None)
        real(visitor)

    class Visitor(offload_module._Visitor):
        def __init__(self, tensor: Tensor, home: Tensor) -> None:
            done.append(None)
            if len(done) == 20:
                raise KeyboardInterrupt
            super().__init__(tensor, home)

    if method == "_put_back":
        monkeypatch.setattr(Offload, "_put_back", staticmethod(interrupted))
    else:
        monkeypatch.setattr(offload_module, "_Visitor", Visitor)
    with DeviceDouble() as double:
        spec = obc.Calibration(execution_device=str(DEVICE))
        with pytest.raises(KeyboardInterrupt):
            obc.compress(model, batches, obc.Quantize(4, solver="rtn"), calibration=spec, forward=double.forward)
        assert not any(double.holds(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert same_bits(model, before)


def test_an_interrupt_within_a_block_of_a_correction_is_what_arrives() -> None:
    model, batches = made(Chain)
    model.train()
    means = [block.norm.running_mean.clone() for block in model.blocks]

    def forward(model: nn.Module, batch: Tensor) -> Any:
        double.strict = True  # And stays so: nothing that cleans up may mix devices either.
        return model(batch)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with DeviceDouble() as double:
        with Offload(model, DEVICE).active():
            model.blocks[1].back.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                record_statistics(model, batches, layers={"head": model.head}, forward=forward)
        assert not any(double.holds(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert all(torch.equal(block.norm.running_mean, mean) for block, mean in zip(model.blocks, means, strict=True))
    assert all(module.training for module in model.modules())


def test_lengths_of_packed_sequences_stay_on_the_host() -> None:
    places: list[tuple[bool, ...]] = []

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, [5, 4, 2], batch_first=True)
            for block in self.blocks:
                packed, _ = block(packed)
            return pad_packed_sequence(packed, batch_first=True)[0]

    model = Recurrent()
    with DeviceDouble() as double:
        spec = obc.Calibration(execution_device=str(DEVICE))
        # PyTorch's own code around packed sequences asks for the real device, so mixing cannot be looked for here.
        collect = Collector(model, [torch.randn(3, 5, 8)], spec)
        with collect.executing():
            for block in model.blocks:
                block.register_forward_pre_hook(
                    lambda _, args: places.append((double.holds(args[0].data), double.holds(args[0].batch_sizes)))
                )
            collect(select_layers(model))
    assert places == [(True, False)] * 2


def test_peak_is_the_largest_block_its_statistics_and_one_batch() -> None:
    class Wide(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))
            self.stem, self.shift = nn.Linear(8, 256), nn.Parameter(torch.zeros(256))
            self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x).relu_()
            return self.head(self.norm(x))

    model, batches = made(Wide)
    layers = select_layers(model, ["blocks.*"])
    spec = obc.Calibration(execution_device=str(DEVICE))
    plan = plan_stage(model, obc.Prune("2:4", layers=["blocks.*"], solver="magnitude"), spec)
    assert [need.layers for need in plan.needs] == [(name,) for name in layers]
    need = plan.needs[0]
    assert (need.weights, need.statistics) == (4 * 256 * 257, 2 * 8 * 256**2)
    with DeviceDouble() as double:
        obc.compress(model, batches, plan.stage, calibration=spec, on_failure="raise", forward=double.forward)
        calibrating, all_of_it = double.peak_of_passes, double.peak
    # Of a batch: inputs and outputs of the block, and the product of the positions with its rounding to float64.
    batch = 2 * 4 * 8 * 256 + (4 + 8) * 256**2
    assert calibrating <= need.weights + need.statistics + batch
    assert need.weights + need.statistics <= calibrating
    assert all_of_it <= need.total
    assert all_of_it < 6 * (need.weights + need.statistics)  # what all blocks at once would take, without solving any
    # Every block goes there once for its pass, beside once each for the batch that is tried first, the order of layers,
    # the probe and its solution.
    assert double.arrived < 6 * 6 * need.weights


def test_parameters_buffers_hooks_and_optimizers_notice_nothing() -> None:
    model, batches = made(Chain)
    model.train()
    model.blocks[1].wide.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(batches[0]).square().sum().backward()
    optimizer.step()
    before = [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    buffers = {name: (id(b), b.data_ptr(), b.clone()) for name, b in model.named_buffers()}
    view, calls = model.blocks[0].wide.weight.data.view(-1), list[str]()
    model.blocks[0].register_forward_pre_hook(lambda m, args: calls.append("before"))
    model.blocks[0].register_forward_hook(lambda m, args, out: calls.append("behind"))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    spec = obc.Calibration(execution_device=str(DEVICE))
    obc.compress(model, batches, obc.Prune(0.5, layers=["blocks.*"], solver="magnitude"), calibration=spec)
    after = [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    assert [entry[:4] for entry in after] == [entry[:4] for entry in before]
    assert all(a[4] is b[4] for a, b in zip(after, before, strict=True))
    assert torch.equal(view.view(48, WIDTH), model.blocks[0].wide.weight.data)
    assert (view == 0).double().mean() == pytest.approx(0.5, abs=0.01)
    for name, buffer in model.named_buffers():
        assert (id(buffer), buffer.data_ptr()) == buffers[name][:2]
        assert torch.equal(buffer, buffers[name][2])
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert calls[:2] == ["before", "behind"]
    assert model.training
    model(batches[0]).square().sum().backward()
    optimizer.step()
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_corrections_compute_there_too() -> None:
    stages = [obc.Prune(0.5, layers=["blocks.*"], solver="magnitude"), obc.Correct("batch_norm"), obc.Correct("bias")]
    model, batches = made(Chain)
    moved, seen = copy.deepcopy(model), dict[str, list[bool]]()
    obc.compress(model, batches, stages, on_failure="raise")
    with DeviceDouble() as double:
        double.watch(moved, seen)
        spec = obc.Calibration(execution_device=str(DEVICE))
        obc.compress(moved, batches, stages, calibration=spec, on_failure="raise", forward=double.forward)
    assert same_bits(model, moved)
    assert all(all(found) for name, found in seen.items() if name)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.2.back", "head"])
def test_after_an_error_everything_is_back_on_the_host(error: type[BaseException], where: str) -> None:
    model, batches = made(Chain)
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= 4:  # In a pass, not in the first look at the order.
            raise error("made to fail")

    with DeviceDouble() as double:
        handle = model.get_submodule(where).register_forward_hook(fail)
        spec = obc.Calibration(execution_device=str(DEVICE), mode="sequential")
        with pytest.raises(error, match="made to fail"):
            obc.compress(model, batches, obc.Quantize(4, solver="rtn"), calibration=spec, forward=double.forward)
        assert not any(double.holds(tensor) for tensor in (*model.parameters(), *model.buffers()))
    handle.remove()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    same = {key: torch.equal(value, before[key]) for key, value in model.state_dict().items()}
    # Layers before the one that failed are compressed already in this mode; nothing else has changed.
    assert all(same[key] for key in same if not key.endswith("weight"))
    model(batches[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_bits_are_those_of_a_model_that_is_there() -> None:
    stages = [obc.Prune("2:4", layers=["blocks.*"], backend="torch"), obc.Quantize(4, backend="torch")]
    for options in MODES["independent"], MODES["block"]:
        model, batches = made(Chain)
        moved = copy.deepcopy(model)
        obc.compress(model.cuda(), batches, stages, calibration=obc.Calibration(**options), on_failure="raise")
        before = torch.cuda.memory_allocated()
        spec = obc.Calibration(execution_device="cuda", **options)
        obc.compress(moved, batches, stages, calibration=spec, on_failure="raise")
        assert torch.cuda.memory_allocated() <= before
        assert all(tensor.device.type == "cpu" for tensor in (*moved.parameters(), *moved.buffers()))
        assert same_bits(model.cpu(), moved)


def test_plan_says_what_is_needed_and_refuses_by_name() -> None:
    model, batches = made(Chain)
    # 48 inputs: two halves of 18 KiB, and 16 inputs 4 KiB; a block is 7.5 KiB; solving 150 KiB.
    spec = obc.Calibration(execution_device=str(DEVICE), device_memory="200 KiB")
    plan = obc.plan(model, obc.Quantize(4, layers=["blocks.*"]), batches[0], calibration=spec)
    assert "5 groups" not in str(plan)
    assert "one block after the other on cpu:0: at most 0.18 MiB" in str(plan)
    assert [len(part) for part in plan.stages[0].plan.passes] == [2, 2, 2]
    assert plan.to_dict()["stages"][0]["device"][1]["layers"] == ["blocks.1.wide", "blocks.1.back"]
    tight = obc.Calibration(execution_device=str(DEVICE), device_memory="20 KiB")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DeviceMemoryError, match=r"Not even one block fits.*blocks\.2\.wide, blocks\.2\.back"):
        obc.compress(model, batches, obc.Quantize(4), calibration=tight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_plan_estimates_passes_that_begin_behind_finished_blocks() -> None:
    class Long(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(12))

    (model, batches), calls = made(Long), list[nn.Module]()
    model.blocks[0].wide.register_forward_hook(lambda module, *_: calls.append(module))
    spec = obc.Calibration(execution_device=str(DEVICE))
    obc.plan(model, obc.Quantize(4, layers=["blocks.*"], solver="rtn"), batches[0], calibration=spec)
    # For the order, for the probe, for its own pass: not for those of the other eleven.
    assert len(calls) == 3


def test_what_is_refused() -> None:
    model, batches = made(Chain)
    here = obc.Calibration(execution_device="cpu")
    assert offload_of(model, here) is None
    assert offload_of(model, obc.Calibration()) is None
    assert plan_stage(model, obc.Quantize(4), here).needs == ()
    for name in ("GPU 1", 3, "cuda:x"):
        with pytest.raises(SpecError, match="no name of a device"):
            obc.Calibration(execution_device=name)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="cannot be used"):
        obc.compress(model, batches, obc.Quantize(4), calibration=obc.Calibration(execution_device="nosuch"))
    stages = [obc.Prune(0.5), obc.Correct("global")]
    with pytest.raises(SpecError, match="trains the whole model at once"):
        obc.compress(model, batches, stages, calibration=obc.Calibration(execution_device=str(DEVICE)))
    with pytest.raises(CalibrationError, match="not initialised yet"):
        Offload(nn.Sequential(nn.LazyLinear(3)), DEVICE)


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made(Chain)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert offload_of(model, obc.Calibration(execution_device="auto")) is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: DEVICE)
    with DeviceDouble():
        offload = offload_of(model, obc.Calibration(execution_device="auto"))
    assert offload is not None
    assert offload.device == DEVICE
