"""From the engine to every artifact: what a run returns is all that export and reports need."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_models import residual_net

import lightning_obc as obc
from lightning_obc.export import compressed_state, open_session, read_onnx_weights
from lightning_obc.report import report_record, save_report

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_a_pruned_and_quantized_run_becomes_files(tmp_path):
    net = residual_net(width=32)
    dense = copy.deepcopy(net)
    images = torch.randn(64, 1, 8, 8)
    stages = [obc.Prune("2:4", exclude=["stem"], misfit="skip"), obc.Quantize(4)]
    report = obc.compress(
        net, images.split(16), stages, metrics={"norm": lambda model: float(model(images).detach().norm())}
    )
    state = compressed_state(net, report.solutions)
    assert set(state) == {"stem", "conv1", "conv2", "head"}

    packed = obc.save_packed(net, report.solutions, tmp_path / "net.safetensors")
    other = residual_net(seed=9, width=32)
    loaded = obc.load_packed(other, packed.path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())
    groups = other.conv1.weight.permute(0, 2, 3, 1).reshape(-1, 4)
    assert int(groups.count_nonzero(-1).max()) <= 2
    assert packed.ratio > 2

    path = tmp_path / "net.onnx"
    obc.export_onnx(other, images[:1], path, solutions=loaded)
    assert read_onnx_weights(path).keys() == {f"{name}.weight" for name in state}
    session = open_session(path, threads=1)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net(images).detach(), rtol=1e-4, atol=1e-5)

    record = report_record(report, recipe=stages, dense=dense.state_dict())
    assert record["figures"]["norm"][0] == pytest.approx(float(dense(images).detach().norm()))
    assert all(data["before"] for data in record["histograms"].values())
    assert len(save_report(record, tmp_path / "report", formats=["md", "json"])) == 2
