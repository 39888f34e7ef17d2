"""Everything there is to learn on a CUDA device, in one command and about nine minutes.

    python benchmarks/gpu.py                        # writes benchmarks/results/gpu.md and gpu.json
    python benchmarks/gpu.py --rehearse FOLDER      # tiny, on a CPU through Triton's interpreter; writes there

Every part (:mod:`gpu_parts`) is a process of its own with a time limit: one that fails, hangs or brings the device down
is recorded with its last lines, and the rest goes on. Both files are written after every part. A sweep whose parity is
red is not timed. The status is 0 when all parts are done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_report import markdown

HERE = Path(__file__).parent
SCRIPT = HERE / "gpu_parts.py"
# Seconds; together with what starting a process takes, nine minutes.
LIMITS = {"parity": 60, "tests": 175, "shapes": 175, "structured": 35, "wide": 45, "memory": 25, "semi-structured": 25}


@dataclass
class Part:
    """What became of a part.

    Attributes:
        name: Key of :data:`LIMITS`.
        status: ``"done"``, or how it ended.
        seconds: Wall clock, with the start of the process.
        found: What it has saved, even if it did not get to its end.
        tail: The last lines that it printed, where it failed.
    """

    name: str
    status: str = "not run"
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    tail: str = ""


def run(part: Part, limit: float, rehearse: bool, earlier: Path) -> None:
    """Run a part in a process of its own. ``earlier`` holds what the parts before it have found."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        saved, log = Path(folder) / "found.json", Path(folder) / "log"
        command = [sys.executable, "-W", "ignore", str(SCRIPT), part.name, str(saved), str(earlier)]
        started = time.perf_counter()
        with log.open("w") as output:
            # A group of its own, so that what a part has started ends with it.
            process = subprocess.Popen(
                [*command, *(["--rehearse"] if rehearse else [])],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, limit))
                part.status = "done" if code == 0 else f"failed with status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                part.status = f"stopped after {limit:.0f} s"
        part.seconds = time.perf_counter() - started
        if saved.exists():
            part.found = json.loads(saved.read_text())
        if part.status != "done":
            part.tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def write(folder: Path, parts: list[Part]) -> None:
    """Both files; each is written beside its place and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"parts": [asdict(part) for part in parts]}
    for name, text in (("gpu.json", json.dumps(report, indent=1) + "\n"), ("gpu.md", markdown(report["parts"]))):
        fresh = folder / f".{name}.new"
        fresh.write_text(text)
        fresh.replace(folder / name)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", metavar="FOLDER", type=Path, help="tiny and on a CPU; results go to FOLDER")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    args = parser.parse_args(arguments)
    rehearse = args.rehearse is not None
    folder, end = args.rehearse if rehearse else args.results, time.perf_counter() + 60 * args.minutes
    parts = [Part(name) for name in args.parts]
    write(folder, parts)
    for part in parts:
        run(part, min(LIMITS[part.name], end - time.perf_counter()), rehearse, folder / "gpu.json")
        write(folder, parts)
        print(f"{part.name}: {part.status}, {part.seconds:.0f} s\n{part.tail}", flush=True)
    print((folder / "gpu.md").read_text())
    return 0 if all(part.status == "done" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
