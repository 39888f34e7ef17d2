"""Whether integer kernels without VNNI could overflow on a file's weights.

On AVX2 without VNNI, runtimes multiply uint8 activations with int8 weights by an instruction that adds two products in
16 bits and saturates at 32767. With weights of more than 7 bits two neighbours can exceed it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from lightning_obc.export.ops import StoredCodes

_LIMIT = 2**15 - 1
_LARGEST_ACTIVATION = 255


def may_saturate(codes: StoredCodes) -> bool:
    """True when the two largest centred codes of one output could exceed 16 bits with full activations.

    Which weights are neighbours depends on the kernel, so any two of the same output channel count. The zero point is
    taken out by the kernel after the products, so codes count as they are stored.
    """
    rows = codes.codes.reshape(codes.codes.shape[0], -1).to(torch.int32)
    if rows.shape[1] < 2:
        return False
    high, low = rows.topk(2).values.sum(1), rows.topk(2, largest=False).values.sum(1)
    return bool((_LARGEST_ACTIVATION * torch.maximum(high, -low) > _LIMIT).any())


def has_vnni() -> bool | None:
    """Whether this machine's CPU has integer dot products that do not saturate; None when that cannot be told."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return None
    return "vnni" in flags


def saturation_warning(codes: Mapping[str, StoredCodes]) -> str | None:
    """A warning that names the layers at risk, or None."""
    risky = [name for name, stored in codes.items() if may_saturate(stored)]
    if not risky:
        return None
    here = {True: "this machine has it", False: "this machine lacks it", None: "unknown on this machine"}[has_vnni()]
    shown = ", ".join(risky[:3]) + (f" and {len(risky) - 3} more" if len(risky) > 3 else "")
    return (
        f"On CPUs without VNNI ({here}) the products of 8-bit activations and 8-bit weights can saturate in {shown}; "
        "export with activation_bits=7, or quantize to 7 bits, for such machines."
    )
