"""Subcommands on files alone: reports of runs, and times of exported models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

from jsonargparse import ArgumentParser

from lightning_obc.errors import SpecError
from lightning_obc.export import Measurement, benchmark_table, slower_files
from lightning_obc.export import benchmark as measure
from lightning_obc.files import check_target, write_whole
from lightning_obc.report import compare_reports, load_record, save_report

FORMATS = ["html", "md", "json"]


def run(args: Sequence[str]) -> Any:
    """Parse and run ``report`` or ``benchmark``."""
    parser = ArgumentParser(prog="lightning-obc")
    subcommands = parser.add_subcommands()
    for name, (function, several, about) in _SUBCOMMANDS.items():
        inner = ArgumentParser(description=(function.__doc__ or "").partition("\n")[0])
        inner.add_argument(several, nargs="+", help=about)
        inner.add_function_arguments(function, skip={several})
        subcommands.add_subcommand(name, inner)
    config = parser.parse_args(list(args))
    function = _SUBCOMMANDS[config.subcommand][0]
    return function(**vars(config[config.subcommand]))


def report(
    runs: list[str],
    output: Optional[str] = None,
    formats: list[str] = FORMATS,
    benchmark: Optional[str] = None,
    overwrite: bool = False,
) -> list[Path]:
    """Draw the report of one run, or several runs side by side.

    Args:
        runs: Records (``*.json``) that a run wrote beside its checkpoint, or folders that hold one.
        output: Path of the report without its ending; by default ``report`` in the folder of the only record, or
            ``comparison`` in the current folder.
        formats: Some of html, md and json.
        benchmark: JSON file of ``lightning-obc benchmark``, to be shown in the report of one run.
        overwrite: Replace existing files.
    """
    records = [_record_file(Path(run)) for run in runs]
    if not records:
        raise SpecError("There is nothing to report on", got="no runs", expected="records, or folders with records")
    if len(records) > 1:
        if benchmark is not None:
            raise SpecError("Measurements belong to one run", got=f"{len(records)} runs", expected="one run")
        written = compare_reports(records, output or "comparison", formats=formats, overwrite=overwrite)
    else:
        record = load_record(records[0])
        if benchmark is not None:
            record = record | {"measured": _measurements(Path(benchmark))}
        written = save_report(record, output or records[0].parent / "report", formats=formats, overwrite=overwrite)
    print("\n".join(map(str, written)))
    return written


def _record_file(path: Path) -> Path:
    """The record that a path means: the file itself, or the only record of a folder."""
    if not path.is_dir():
        return path
    found = sorted(path.rglob("*.report.json"))
    if len(found) != 1:
        raise SpecError(
            "A folder does not hold one record",
            got=f"{path}: {', '.join(str(file.relative_to(path)) for file in found[:8]) or 'none'}",
            expected="one file *.report.json",
            remedy="name the file",
        )
    return found[0]


def _measurements(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [vars(Measurement(**row)) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise SpecError(
            "Measurements cannot be read", got=f"{path}: {error}", expected="the JSON file of lightning-obc benchmark"
        ) from error
    return rows


def benchmark(
    files: list[str],
    batch: int = 1,
    rounds: int = 50,
    warmup: int = 5,
    threads: int = 0,
    memory: bool = True,
    output: Optional[str] = None,
    overwrite: bool = False,
) -> list[Measurement]:
    """Run ONNX files in ONNX Runtime, in turns: latency, throughput, size on disk and peak memory.

    Args:
        files: The files; speed-ups are relative to the first one.
        batch: Samples per run.
        rounds: Timed runs of each file.
        warmup: Runs before.
        threads: Threads of the runtime; 0 lets it choose.
        memory: Measure peak memory too, each file in a process of its own.
        output: JSON file for the figures, which ``lightning-obc report --benchmark`` shows.
        overwrite: Replace an existing file.
    """
    target = None if output is None else check_target(output, overwrite)
    found = measure(_labelled(files), batch=batch, rounds=rounds, warmup=warmup, threads=threads, memory=memory)
    print("\n\n".join([benchmark_table(found), *slower_files(found)]))
    if target is not None:
        text = json.dumps([entry.to_dict() for entry in found], indent=1) + "\n"
        write_whole(target, partial(_write, text))
    return found


def _labelled(files: Sequence[str]) -> dict[str, str]:
    """Files by their names; by their whole paths where two share one."""
    names = [Path(file).name for file in files]
    return {file if names.count(name) > 1 else name: file for name, file in zip(names, files, strict=True)}


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


_SUBCOMMANDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "report": (report, "runs", "Records (*.report.json) that runs wrote beside their checkpoints, or their folders."),
    "benchmark": (benchmark, "files", "ONNX files; speed-ups are relative to the first one."),
}
