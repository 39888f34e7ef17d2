"""Many layers in few lines: those with one reason together, the first of them by name."""

from __future__ import annotations

from collections.abc import Mapping

NAMED = 3


def by_reason(reasons: Mapping[str, str], one: str, several: str) -> list[str]:
    """One line for every reason: all its layers are counted, the first three named.

    Args:
        reasons: Reason by name of the layer; the model itself is ``""``.
        one: How a line about one layer begins, ``"left as it was"``.
        several: How one about several begins, ``"left as they were"``.

    Returns:
        ``one: NAME (REASON)``, or ``several: N layers (REASON): NAME, NAME, NAME and M more``, in the order in which
        the reasons first occur.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name or "the model itself")
    return [
        f"{one}: {names[0]} ({reason})"
        if len(names) == 1
        else f"{several}: {len(names)} layers ({reason}): {first_of(names)}"
        for reason, names in groups.items()
    ]


def first_of(names: list[str]) -> str:
    """The first names, and how many more there are; one more is named rather than counted."""
    if len(names) <= NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
