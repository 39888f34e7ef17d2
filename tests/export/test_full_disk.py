"""A disk that is full, for real: the operating system refuses to let any file grow beyond a limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compressed_models import compress_, residual_net

from lightning_obc.errors import ExportError
from lightning_obc.export import export_onnx, load_packed, save_compressed_tensors, save_packed
from lightning_obc.report import report_record, save_report
from lightning_obc.report.result import CompressionReport
from lightning_obc.specs import IntGrid

resource = pytest.importorskip("resource", reason="needs limits of the operating system")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails as on a full disk; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def model_and_state():
    net = residual_net(width=32)
    return net, compress_(net, IntGrid(4))


def refused(write, folder: Path, size: int = 2000) -> None:
    """Writing fails by name, and every file of the folder is what it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with files_of_at_most(size), pytest.raises(ExportError, match=r"cannot be written.*nothing was overwritten"):
        write()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_packed_files(model_and_state, tmp_path):
    net, state = model_and_state
    path = tmp_path / "net.safetensors"
    refused(lambda: save_packed(net, state, path), tmp_path)
    save_packed(net, state, path)
    refused(lambda: save_packed(net, state, path, overwrite=True), tmp_path)
    load_packed(residual_net(width=32), path)


def test_compressed_tensors(model_and_state, tmp_path):
    net, state = model_and_state
    save_compressed_tensors(net, state, tmp_path)
    refused(lambda: save_compressed_tensors(net, state, tmp_path, overwrite=True), tmp_path)


def test_onnx_files(model_and_state, tmp_path):
    pytest.importorskip("onnxscript")
    net, state = model_and_state
    path = tmp_path / "net.onnx"
    path.write_bytes(b"mine")
    refused(
        lambda: export_onnx(net, torch.randn(1, 1, 8, 8), path, solutions=state, overwrite=True), tmp_path, size=10_000
    )


def test_reports(model_and_state, tmp_path):
    record = report_record(CompressionReport(model_and_state[0], []))
    record["title"] = "long " * 1000
    save_report(record, tmp_path / "run", formats=["json", "md"])
    refused(lambda: save_report(record, tmp_path / "run", formats=["json"], overwrite=True), tmp_path)
