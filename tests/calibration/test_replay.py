"""Outputs of finished blocks in host memory: fewer calls, the same bits, a bound that holds."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from awkward_chains import CallsABlockTwice, DrawsNumbers
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.calibration import Collector
from lightning_obc.calibration.replay import Replay
from lightning_obc.errors import SpecError
from lightning_obc.layers import select_layers
from lightning_obc.stage_run import run_stage

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.back(self.wide(x).relu())


class Chain(nn.Module):
    """Blocks in a row, with code between them that works in place on what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
            x.add_(0.1)
        return self.head(self.norm(x))


class Skips(Chain):
    """The second half also sees what the first half made."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second) + second
        return self.head(self.norm(self.blocks[3](third) + first))


class Twice(CallsABlockTwice, Chain):
    pass


class Draws(DrawsNumbers, Chain):
    pass


class Borrows(Chain):
    """A layer of the first block is used behind the last one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[0].back(self.blocks[0].wide(x)))


def compressed(kind: type[nn.Module], cache: Any, **options: Any) -> tuple[dict[str, Tensor], Counter[str], Collector]:
    """State dict, calls of every block, and the collector."""
    torch.manual_seed(0)
    model, x = kind(), torch.randn(60, 7, 5)
    spec = obc.Calibration(mode=options.pop("mode", "asymmetric"), cache=cache, **options)
    collect = Collector(model, [x[:25], x[25:50], x[50:]], spec)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    run_stage(model, obc.Quantize(3), collect, on_failure="raise")
    return model.state_dict(), calls, collect


@pytest.mark.parametrize("kind", [Chain, Skips, Twice, Draws, Borrows])
@pytest.mark.parametrize(
    "options",
    [{}, {"together": "block"}, {"mode": "sequential", "memory": "3 KiB"}, {"rounds": 2}, {"bias": True}],
    ids=str,
)
def test_the_result_is_the_same_bit_for_bit(kind: type[nn.Module], options: dict[str, Any]) -> None:
    plain, calls, _ = compressed(kind, None, **options)
    kept, fewer, collect = compressed(kind, "1 MiB", **options)
    assert all(torch.equal(value, kept[name]) for name, value in plain.items())
    assert collect.replay is not None
    assert collect.replay.size == 0
    if kind in (Chain, Skips):
        assert collect.replay.most > 0
        assert fewer.total() < calls.total()
    else:
        assert collect.replay.most == 0


def test_a_pass_costs_its_block() -> None:
    _, calls, collect = compressed(Chain, "1 MiB", together="block")
    plain = compressed(Chain, None, together="block")[1]
    # Three batches in two streams: for the layer in front of all blocks, for the block itself, and to keep its output;
    # beside that, single batches that show how the layers depend on each other.
    looks = 2 + 2 * 4
    assert all(calls[f"blocks.{index}.wide"] <= 3 * 6 + looks for index in range(4))
    assert calls["blocks.3.wide"] < plain["blocks.3.wide"]
    assert plain["blocks.0.wide"] >= 6 * 6
    # Of a chain, one output for each batch and stream.
    assert collect.replay.most == 2 * 60 * 7 * WIDTH * 4
    assert compressed(Skips, "1 MiB", together="block")[2].replay.most > collect.replay.most


def test_the_limit_holds() -> None:
    plain = compressed(Chain, None)[0]
    limit = 2 * 25 * 7 * WIDTH * 4
    kept, _, collect = compressed(Chain, limit)
    assert 0 < collect.replay.most <= limit
    assert all(torch.equal(value, kept[name]) for name, value in plain.items())


def test_which_blocks_are_finished() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(4, 5)
    layers = {name: select_layers(model)[name] for name in ("stem", "blocks.0.wide", "blocks.0.back", "blocks.1.wide")}
    replay = Replay(model, layers, model, 10**6, x)
    ran: list[str] = []
    for name, block in model.blocks.named_children():
        block.wide.register_forward_hook(lambda *_, name=name: ran.append(name))
    for left, expected in (
        (["blocks.0.wide", "blocks.0.back", "blocks.1.wide"], "0"),
        (["blocks.0.back", "blocks.1.wide"], "0"),
        (["blocks.1.wide"], "01"),
        (["blocks.1.wide"], "1"),
        ([], "123"),
    ):
        replay.advance(left)
        with replay.running("behind", 1, left[:1]), torch.no_grad():
            model(x)
        assert "".join(ran) == expected
        ran.clear()
    before = copy.deepcopy(model.state_dict())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_plan_says_so_and_other_modes_refuse_it() -> None:
    spec = obc.Calibration(mode="sequential", cache="2 MiB")
    assert "kept in 2 MiB of host memory" in str(obc.plan(Chain(), obc.Quantize(4), calibration=spec))
    with pytest.raises(SpecError, match="cache"):
        obc.Calibration(cache="2 MiB")
    with pytest.raises(SpecError, match=r"Calibration\.cache"):
        obc.Calibration(mode="sequential", cache="much")
