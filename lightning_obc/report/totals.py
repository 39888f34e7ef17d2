"""The error of all stages together, where a layer went through several of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def is_told(rows: Iterable[Row]) -> bool:
    """True where rows have an error of all stages that is another than that of their own stage."""
    return any(row.get("total_error") not in (None, row["relative_error"]) for row in rows)


def final_errors(stages: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Per compressed layer the relative error of all its stages; None where it is not known.

    Of a layer that one stage alone has compressed it is that stage's error, in records from before there were totals
    too.
    """
    found: dict[str, float | None] = {}
    for stage in stages:
        for row in stage["layers"]:
            if row["compressed"]:
                total, name = row.get("total_error"), row["name"]
                found[name] = row["relative_error"] if total is None and name not in found else total
    return found


def note(stages: Iterable[Mapping[str, Any]]) -> str:
    """How many layers have no such error, and why; empty when all have one."""
    unknown = sum(error is None for error in final_errors(stages).values())
    if not unknown:
        return ""
    which = "1 layer has" if unknown == 1 else f"{unknown} layers have"
    return (
        f"{which} no error of all stages: training or a correction moved the weights in between, or it could not be "
        "computed, which the log then says."
    )
