"""Dataclasses of tensors that print in a line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor


class Brief:
    """Base of dataclasses made with ``repr=False``: tensors are shown by dtype and shape, not by what they hold."""

    def __repr__(self) -> str:
        names = [one.name for one in fields(self) if one.repr]  # type: ignore[arg-type]
        shown = (f"{name}={_brief(getattr(self, name))}" for name in names)
        return f"{type(self).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"[{', '.join(map(_brief, value))}]"
    return repr(value)
