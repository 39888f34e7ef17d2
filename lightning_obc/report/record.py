"""A run as plain data: what the HTML, Markdown and JSON reports are all made of.

The record holds only numbers, strings, lists and mappings, so that it survives JSON, and a report can be drawn again,
or compared with others, long after the run.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from lightning_obc.errors import FingerprintError
from lightning_obc.layers import select_layers
from lightning_obc.report.histograms import histograms
from lightning_obc.report.result import CompressionReport
from lightning_obc.report.samples import WeightSample

FORMAT, VERSION = "lightning_obc.report", 2
PACKAGES = ("lightning-obc", "torch", "lightning", "numba", "triton", "numpy", "torchvision", "transformers")
# What every reader of a record takes for granted.
_PARTS: dict[str, type] = {
    "title": str,
    "stages": list,
    "left_dense": dict,
    "figures": dict,
    "corrections": list,
    "recipe": list,
    "sizes": dict,
    "environment": dict,
}
_ROW = ("name", "loss", "relative_error", "sparsity", "bits", "compressed")
Record = dict[str, Any]
Curve = Sequence[tuple[float, float]]


def report_record(
    report: CompressionReport,
    *,
    title: str = "Compression report",
    recipe: Sequence[Any] | None = None,
    plans: Sequence[Any] | None = None,
    dense: Mapping[str, Union[Tensor, WeightSample]] | None = None,
    curves: Mapping[str, Curve] | None = None,
    trade_off: Mapping[str, Any] | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
    reproduce: str | None = None,
) -> Record:
    """Everything a report shows.

    Args:
        report: The run.
        title: Heading.
        recipe: The stages as given, shown as code; default those of the report.
        plans: Plans of the stages, shown as text; default those of the report.
        dense: State dict of the model before compression, or samples of its layers' weights, for histograms of weights
            before; default what the report holds.
        curves: Loss curves of sweeps by layer: pairs of sparsity and relative error; default those of the layers' rows.
        trade_off: ``{"x": name, "y": name, "points": [{"x": …, "y": …, "label": …}, …]}``.
        measured: Rows of :func:`lightning_obc.export.benchmark`, as dictionaries.
        reproduce: Command or script that repeats the run; default a call of :func:`lightning_obc.compress`.
    """
    stages = [code(stage) for stage in (report.recipe if recipe is None else recipe)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        **_without_curves(report.to_dict()),
        "left_dense": dict(report.left_dense) | unselected(report),
        "notes": list(report.notes),
        "recipe": stages,
        "plans": [str(plan) for plan in (report.plans if plans is None else plans)],
        "sizes": sizes(report),
        "histograms": _histograms(report, report.dense if dense is None else dense),
        "curves": sweep_curves(report)
        if curves is None
        else [_curve(name, "", False, c) for name, c in curves.items()],
        "trade_off": dict(trade_off) if trade_off else None,
        "measured": [dict(row) for row in measured],
        "environment": environment(),
        "reproduce": reproduce or _call(stages),
    }


def _call(stages: Sequence[str]) -> str:
    body = "".join(f"        {stage},\n" for stage in stages)
    return (
        f"import lightning_obc as obc\n\nobc.compress(\n    model,\n    batches,\n    [\n{body}    ],\n)"
        if stages
        else ""
    )


def code(value: Any) -> str:
    """A specification as the Python expression that makes it again, without what is left at its default."""
    if is_dataclass(value) and not isinstance(value, type):
        given = [
            f"{entry.name}={code(getattr(value, entry.name))}"
            for entry in fields(value)
            if entry.init and not _is_default(entry, getattr(value, entry.name))
        ]
        prefix = "obc." if type(value).__module__.startswith("lightning_obc.") else ""
        return f"{prefix}{type(value).__name__}({', '.join(given)})"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(code, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {code(entry)}' for key, entry in value.items())}}}"
    return repr(value)


def _is_default(entry: Field[Any], value: Any) -> bool:
    default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    return default is not MISSING and type(value) is type(default) and bool(value == default)


def unselected(report: CompressionReport) -> dict[str, str]:
    """Layers that could be compressed, but that no stage was asked to."""
    known = set(report.layers) | {name for stage in report.stages for name in stage.skipped} | set(report.left_dense)
    names = select_layers(report.model) if report.stages else {}
    return {name: "no stage selects it" for name in names if name not in known}


def environment() -> dict[str, str]:
    """Versions of what the result depends on, and the machine."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_initialized() else _processor()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def sizes(report: CompressionReport) -> dict[str, float]:
    """Weights of the compressed layers: how many, share of zeros, mean bits, and what theory saves.

    ``bits_per_weight`` counts the codes of kept weights and the entropy of the mask. Zeros that only rounding made have
    a code; they are no part of a mask.
    """
    total = zeros = bits = dense = 0.0
    for name, row in report.layers.items():
        solution = report.solutions.get(name)
        count = float(torch.Size(row.shape).numel())
        pruned = row.sparsity if solution is None else solution.sparsity
        total += count
        zeros += count * row.sparsity
        bits += count * ((1 - pruned) * row.bits + _entropy(pruned))
        dense += count * 32
    if not total:
        return {}
    return {"weights": total, "sparsity": zeros / total, "bits_per_weight": bits / total, "ratio": dense / bits}


def _entropy(share: float) -> float:
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def sweep_curves(report: CompressionReport) -> list[dict[str, Any]]:
    """Loss curves of the sweeps of every stage, for every layer that had one."""
    return [
        _curve(layer.name, stage.stage, layer.bits <= 8, layer.curve)
        for stage in report.stages
        for layer in stage.layers
        if layer.curve
    ]


def _curve(name: str, stage: str, rounding: bool, points: Curve) -> dict[str, Any]:
    plain = [[float(f"{share:.5g}"), float(f"{loss:.5g}")] for share, loss in points]
    return {"name": name, "stage": stage, "x": "share rounded" if rounding else "sparsity", "points": plain}


def _without_curves(plain: dict[str, Any]) -> dict[str, Any]:
    """A report as plain values; curves have their own place in a record."""
    for stage in plain["stages"]:
        stage["layers"] = [{key: value for key, value in row.items() if key != "curve"} for row in stage["layers"]]
    return plain


def _histograms(report: CompressionReport, dense: Mapping[str, Union[Tensor, WeightSample]]) -> dict[str, Any]:
    """Those of stages of which a resumed run has no solutions any more, and of all others."""
    layers = select_layers(report.model) if report.solutions else {}
    return dict(report.histograms) | histograms(report.solutions, dense, layers)


def load_record(path: Union[str, Path]) -> Record:
    """Read a record that :func:`save_report` wrote as JSON.

    Raises:
        FingerprintError: The file is no report, of another version, or parts of it are missing.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FingerprintError(
            "The report cannot be read", got=f"{path}: {error}", expected="the JSON file of a report"
        ) from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        found = record.get("version") if isinstance(record, dict) else type(record).__name__
        raise FingerprintError(
            "The file is not a report that this version reads", got=f"{path}: {found}", expected=f"{FORMAT} {VERSION}"
        )
    if damaged := _damage(record):
        raise FingerprintError(
            "Parts of a report are missing",
            got=f"{path}: {damaged}",
            expected="the JSON file of a report as it was written",
            remedy="write the report again, or leave the file out",
        )
    return record


def _damage(record: Record) -> str:
    """The first part of a record that is not what reports are drawn from; empty when all are."""
    wrong = [name for name, kind in _PARTS.items() if not isinstance(record.get(name), kind)]
    if wrong:
        return f"no {wrong[0]}"
    for number, stage in enumerate(record["stages"]):
        if not (
            isinstance(stage, dict) and isinstance(stage.get("layers"), list) and {"stage", "seconds"} <= set(stage)
        ):
            return f"stage {number} has no layers, name or time"
        for row in stage["layers"]:
            if missing := [key for key in _ROW if not isinstance(row, dict) or key not in row]:
                return f"a layer of stage {number} has no {missing[0]}"
    return ""


def bits_text(row: Mapping[str, Any]) -> str:
    """Bit width of a layer's weight, and of its input where that is quantized too."""
    inputs = row.get("input_bits")
    return str(row["bits"]) if inputs is None else f"{row['bits']}, input {inputs}"


def work_rows(stage: Mapping[str, Any]) -> list[list[str]]:
    """What each of several processes did in a stage, as cells: rank, layers, Gflop, seconds."""
    return [
        [str(part["rank"]), f"{part['layers']:.3g}", f"{part['flops'] / 1e9:.3g}", f"{part['seconds']:.2f}"]
        for part in stage.get("work", ())
    ]


WORK = ("rank", "layers", "estimated Gflop", "time [s]")


def last_rows(record: Record) -> list[dict[str, Any]]:
    """The last row of every layer that was compressed, and the only row of one that was not."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in record["stages"]:
        for row in stage["layers"]:
            if row["compressed"] or row["name"] not in rows:
                rows[row["name"]] = row
    return list(rows.values())
