"""Which statistics live on the device of their layer, and which in host memory."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_obc.layers import ProblemShape
from lightning_obc.specs import Calibration


def half_bytes(shape: ProblemShape) -> int:
    """Memory of one float64 ``[g, d, d]``, which an update works on."""
    return 8 * shape.groups * shape.columns**2


def statistic_bytes(shape: ProblemShape, paired: bool) -> int:
    """Memory of a layer's statistic: two halves; behind compressed layers also the cross product and the difference."""
    return (4 if paired else 2) * half_bytes(shape)


def on_host(shapes: Mapping[str, ProblemShape], spec: Calibration, taken: int = 0) -> set[str]:
    """Names of the layers of one pass whose statistics live in host memory, so that the others fit ``device_memory``.

    The largest that fit stay. As soon as one does not, room for the largest working copy is set aside. ``taken`` bytes
    of the device are in use for something else.
    """
    if spec.device_bytes is None:
        return set()
    limit = spec.device_bytes - taken
    order = sorted(shapes, key=lambda name: -half_bytes(shapes[name]))
    away = _without_room(order, shapes, spec.paired, limit)
    while away:
        room = limit - max(half_bytes(shapes[name]) for name in away)
        more = _without_room(order, shapes, spec.paired, room)
        if more == away:
            break
        away = more
    return away


def _without_room(order: list[str], shapes: Mapping[str, ProblemShape], paired: bool, room: int) -> set[str]:
    away = set()
    for name in order:
        size = statistic_bytes(shapes[name], paired)
        if size <= room:
            room -= size
        else:
            away.add(name)
    return away
