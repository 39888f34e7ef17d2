"""Quantized inputs as part of a recipe: through the pipeline, in its report, and into the files that are exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.activations import ActivationQuantizer, attached, detach, fake_quantize
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import SpecError
from lightning_obc.stage_run import run_stage


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_inputs_are_rounded_behind_the_quantized_weights(net: Net, images: Tensor) -> None:
    keys = list(net.state_dict())
    report = obc.compress(net, images, obc.Quantize(4, activations=6))
    assert list(net.state_dict()) == keys
    assert {row.name: row.input_bits for row in report.stages[0].layers} == dict.fromkeys(("stem", "mix", "head"), 6)
    assert "4, input 6" in report.table()
    # By hand: the same ranges from an observer on the quantized weights, the same rounding before every layer.
    twin = Net().eval()
    twin.load_state_dict(net.state_dict())
    grids = ActivationQuantizer(twin, bits=6).observe(list(images.split(32))).freeze().grids

    def rounded(name: str, x: Tensor) -> Tensor:
        grid = grids[name]
        return fake_quantize(x, grid.scale.flatten(), grid.zero_point.flatten(), grid.max_code)

    x = torch.relu(twin.stem(rounded("stem", images)))
    x = torch.relu(twin.mix(rounded("mix", x))).mean((2, 3))
    for name, grid in grids.items():
        torch.testing.assert_close(report.activations[name].scale, grid.scale, rtol=0.02, atol=0)
    torch.testing.assert_close(net(images), twin.head(rounded("head", x)), rtol=0.1, atol=0.02)
    dense = twin(images)
    assert not torch.equal(net(images), dense)
    detach(net)
    assert torch.equal(net(images), dense)


def test_later_stages_replace_ranges_and_see_rounded_inputs(net: Net, images: Tensor) -> None:
    spec = obc.ActivationGrid(4, range="minmax")
    stages = [obc.Quantize(8, activations=spec, edges=7), obc.Quantize(8, layers=["mix"], activations=5)]
    report = obc.compress(net, images, stages)
    assert {name: one.spec.bits for name, one in attached(net).items()} == {"stem": 7, "mix": 5, "head": 7}
    assert {name: grid.spec.bits for name, grid in report.activations.items()} == {"stem": 7, "mix": 5, "head": 7}
    assert [row.input_bits for row in report.stages[0].layers] == [7, 4, 7]
    hooks = [hook for module in net.modules() for hook in module._forward_pre_hooks.values()]
    assert len(hooks) == 3
    seen: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        net(images)
    codes = seen[0] / attached(net)["head"].grid.scale.flatten()
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)


def test_layers_have_ranges_of_their_own(net: Net, images: Tensor) -> None:
    own = {"head": {"activations": obc.ActivationGrid(6, granularity="channel")}}
    obc.compress(net, images, obc.Quantize(8, activations=8, edges="skip", overrides={"mix": {"activations": 3}}))
    assert {name: one.spec.bits for name, one in attached(net).items()} == {"mix": 3}
    obc.compress(net, images, obc.Quantize(8, activations=8, overrides=own))  # type: ignore[arg-type]
    found = attached(net)
    assert {name: one.spec.bits for name, one in found.items()} == {"stem": 8, "mix": 8, "head": 6}
    assert {name: one.axis for name, one in found.items()} == {"stem": None, "mix": None, "head": -1}


def test_what_has_no_input_of_its_own_is_named(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    report = obc.compress(model, images[:, 0], obc.Quantize(8, activations=8))
    rows = {row.name: row for row in report.stages[0].layers}
    assert rows["0"].input_bits == 8
    assert rows["0"].status == "ok"
    assert rows["1.self_attn.in_proj"].input_bits is None
    assert "input not quantized" in rows["1.self_attn.in_proj"].status
    assert rows["1.self_attn.in_proj"].compressed


def test_hessians_alone_are_refused_before_anything_changes(net: Net, images: Tensor) -> None:
    before = net.stem.weight.clone()
    with pytest.raises(SpecError, match="needs batches"):
        run_stage(net, obc.Quantize(4, activations=8), lambda layers: collect_hessians(net, layers, [images]))
    assert torch.equal(net.stem.weight, before)


@pytest.mark.parametrize("activations", [1, 9, True, "8"])
def test_impossible_widths(activations: object) -> None:
    with pytest.raises(SpecError, match="bit width of activations"):
        obc.Quantize(4, activations=activations)  # type: ignore[arg-type]


def test_packed_files_carry_the_ranges(net: Net, images: Tensor, tmp_path: Path) -> None:
    spec = obc.ActivationGrid(5, granularity="channel")
    report = obc.compress(net, images, obc.Quantize(4, exclude=["stem"], activations=spec))
    expected = net(images)
    obc.save_packed(net, report.solutions, tmp_path / "small.safetensors")
    other = Net().eval()
    obc.load_packed(other, tmp_path / "small.safetensors")
    assert set(attached(other)) == {"mix", "head"}
    assert torch.equal(other(images), expected)


def test_onnx_files_round_the_same_inputs(net: Net, images: Tensor, tmp_path: Path) -> None:
    """Given nothing but the model and its solutions, and against the model itself."""
    pytest.importorskip("onnxscript")
    from lightning_obc.export import open_session

    report = obc.compress(net, images, obc.Quantize(8, activations=8))
    done = obc.export_onnx(net, images[:2], tmp_path / "small.onnx", solutions=report.solutions)
    assert len(done.activations) == 3
    session = open_session(tmp_path / "small.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = net(images).numpy()
    # A value on a rounding boundary may fall to the other side; each moves the output by a step of one input.
    step = float(report.activations["head"].scale) * float(net.head.weight.detach().abs().max())
    assert np.abs(out - expected).max() < 3 * step
    assert attached(net), "the model itself is as it was"
