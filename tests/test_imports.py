"""The architecture, held by reading every import of the package (docs/design.md has the table)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_obc"
LEAVES = {
    "errors",
    "brief",
    "schedules",
    "activation_spec",
    "calibration_spec",
    "correction_spec",
    "solvers",
    "specs",
    "patterns",
    "grids",
    "grid_fitting",
    "hessian",
    "files",
    "distributed",
    "checksum",
}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),  # lazy: only type-checking imports, which are not counted
    "errors": set(),
    "brief": set(),
    "files": {"errors"},
    "checksum": set(),
    "distributed": {"errors"},
    "schedules": {"errors"},
    "solvers": {"errors"},
    "activation_spec": {"errors"},
    "calibration_spec": {"errors"},
    "patterns": {"errors"},
    "specs": {"errors", "schedules", "solvers", "activation_spec", "calibration_spec", "patterns"},
    "correction_spec": {"errors", "schedules", "specs"},
    "hessian": {"errors", "brief"},
    "grids": {"specs", "errors", "brief"},
    "grid_fitting": {"specs", "errors", "grids"},
    "linalg": {"errors"},
    "kernels": {"linalg", "errors"},
    "layers": LEAVES | {"kernels"},
    "calibration": LEAVES | {"kernels", "layers"},
    "obs": LEAVES | {"kernels", "linalg"},
    "baselines": LEAVES | {"kernels", "linalg", "obs"},
    "allocation": LEAVES | {"obs", "baselines", "layers", "calibration", "activations", "correction", "report"},
    "activations": LEAVES | {"layers", "obs", "calibration"},
    "correction": LEAVES | {"layers", "obs", "calibration"},
    "export": LEAVES | {"layers", "obs", "activations"},
    "report": LEAVES | {"layers", "obs"},
    "metrics": LEAVES | {"layers", "obs"},
    "layerwise": LEAVES | {"layers", "calibration"},
    "planning": LEAVES | {"layerwise", "layers", "calibration", "obs", "report", "correction"},
    "rehearsal": LEAVES | {"planning", "calibration"},
    "solving": LEAVES | {"obs", "baselines"},
    "timing": LEAVES | {"obs", "solving"},
    "forecast": LEAVES | {"timing", "layerwise", "planning", "layers", "calibration", "obs"},
    "store": LEAVES | {"obs"},
    "shared_rows": LEAVES | {"kernels"},
    "origins": LEAVES | {"obs"},
    "team": LEAVES | {"obs", "report", "shared_rows"},
    "stage_run": LEAVES
    | {
        "team",
        "store",
        "origins",
        "planning",
        "solving",
        "layers",
        "calibration",
        "obs",
        "correction",
        "activations",
        "report",
    },
    "pipeline": LEAVES
    | {
        "stage_run",
        "team",
        "store",
        "origins",
        "layerwise",
        "planning",
        "rehearsal",
        "layers",
        "calibration",
        "correction",
        "report",
    },
    "callbacks": LEAVES
    | {
        "team",
        "store",
        "origins",
        "layerwise",
        "planning",
        "rehearsal",
        "forecast",
        "stage_run",
        "pipeline",
        "metrics",
        "report",
        "export",
        "layers",
        "calibration",
        "correction",
        "activations",
        "obs",
    },
    "cli": LEAVES
    | {
        "layerwise",
        "planning",
        "rehearsal",
        "forecast",
        "callbacks",
        "pipeline",
        "allocation",
        "export",
        "report",
        "layers",
        "calibration",
        "correction",
        "activations",
        "obs",
    },
}
HEAVY_OWNERS = {"lightning": {"callbacks", "cli"}, "torchmetrics": {"metrics", "callbacks"}}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(path: Path) -> list[str]:
    """Dotted names imported anywhere in a file, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names += [f"{base}.{alias.name}" if base == "lightning_obc" else base for alias in node.names]
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_table(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not in the import table"
    for name in runtime_imports(path):
        head, _, rest = name.partition(".")
        if head == "lightning_obc":
            target = rest.partition(".")[0]
            assert target in ALLOWED[part] | {part}, f"{part} must not import {target}"
        if head in HEAVY_OWNERS:
            assert part in HEAVY_OWNERS[head], f"{part} must not import {head}"
        if part in {"obs", "baselines", "linalg"}:
            assert not f"{name}.".startswith("torch.nn."), f"{part} sees matrices, not modules"


def test_table_has_no_cycle_between_leaves_and_the_rest() -> None:
    done: set[str] = set()
    remaining = dict(ALLOWED)
    while remaining:
        ready = [name for name, needs in remaining.items() if needs - {name} <= done]
        assert ready, f"imports go in a circle among {sorted(remaining)}"
        done |= set(ready)
        for name in ready:
            del remaining[name]


def test_importing_is_light() -> None:
    code = (
        "import sys, lightning_obc as obc; obc.__version__; dir(obc);"
        "heavy = {'torch', 'lightning', 'numba', 'torchmetrics', 'triton'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_every_public_name_resolves() -> None:
    import lightning_obc as obc

    for name in obc.__all__:
        assert getattr(obc, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = obc.no_such_name


def test_engine_import_changes_no_global_state() -> None:
    code = (
        "import torch; before = (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32,"
        "torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled());"
        "import lightning_obc.obs, lightning_obc.pipeline;"
        "after = (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32,"
        "torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled());"
        "assert before == after, (before, after); assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
