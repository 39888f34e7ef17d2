"""How calibration data is drawn and used. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Union, get_args

from lightning_obc.errors import SpecError

CalibrationMode = Literal["independent", "sequential", "asymmetric"]
Together = Literal["layer", "block", "all"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(f"Calibration.{name} is not possible", got=value, expected="an integer of at least 1")


@dataclass(frozen=True)
class Calibration:
    """How the calibration data is drawn, and what the statistics of a layer come from.

    Args:
        samples: Number of training samples (images or sequences). The paper uses 1024.
        rounds: Passes over the same samples; more than one pays only with random augmentation (paper: 10).
        batch_size: Samples per forward pass; ``None`` keeps the loader's own.
        seed: Seed of the choice of samples and of the augmentation.
        mode: Which inputs a layer is solved for. ``"independent"`` (the paper): those of the model as it was before
            the stage, for all layers. ``"sequential"``: those that come from the layers already compressed.
            ``"asymmetric"``: as sequential, and the layer's weights are first moved to where they make the outputs of
            the model before the stage from these inputs.
        mixing: How far ``"asymmetric"`` moves the weights: 1 all the way, towards 0 less. Few calibration samples
            can make less better.
        together: What ``"sequential"`` and ``"asymmetric"`` compress at once, before they calibrate again: a
            ``"layer"``, a ``"block"`` (an element of a ``Sequential`` or ``ModuleList``), or ``"all"`` layers, which
            is what ``"independent"`` means.
        memory: Bytes for the statistics that live at once, as a number or with a unit (``"2 GiB"``). Layers that do
            not fit together are calibrated in several passes, with the same result. ``None`` sets no limit.
        device_memory: Bytes of the layers' device, such as a GPU, for the statistics that live at once. The others are
            kept in host memory and brought to the device for every update, with the same result. ``None`` keeps all
            on the device.
        execution_device: Device that computes for a model that stays where it is: ``"cuda:0"``, or ``"auto"`` for the
            accelerator of this machine, where there is one. The blocks of the model (elements of a ``Sequential`` or
            ``ModuleList``) and other layers come to it one at a time, with their inputs, are calibrated and solved
            there and go back: for models that are larger than a GPU. The result is that of the same device without.
            ``device_memory`` then limits the weights of the block together with the statistics. ``None``: the device
            that the model is on.
        cache: Bytes of host memory, as for ``memory``, in which ``"sequential"`` and ``"asymmetric"`` keep the outputs
            of blocks that are finished, so that a pass need not run through these again. The result is the same.
            ``None`` keeps nothing; with an ``execution_device``, where all modes keep outputs, as much as there is.
        pooled: Solve all groups of a grouped or depthwise convolution for one Hessian, the mean over its groups, which
            is known better from few samples, instead of each for its own. Losses are measured with their own.
        bias: Whenever layers have been compressed, shift their biases so that the means of their outputs are again
            those of the model before the stage; layers behind them are calibrated on what comes of it.
        positions: Use at most so many positions (of a feature map, or tokens) of every sample in one call of a layer,
            drawn at random, seeded by ``seed``. The products of large feature maps then cost less, and the Hessians
            and losses are unbiased estimates, and marked so. ``None`` uses all. Only for ``"independent"``.

    Raises:
        SpecError: A value that is unknown or out of range, or two that do not go together.
    """

    samples: int = 1024
    rounds: int = 1
    batch_size: int | None = None
    seed: int = 0
    mode: CalibrationMode = "independent"
    mixing: float = 1.0
    together: Together = "layer"
    memory: Union[int, str, None] = None
    device_memory: Union[int, str, None] = None
    execution_device: Union[str, None] = None
    cache: Union[int, str, None] = None
    pooled: bool = False
    bias: bool = False
    positions: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "rounds"):
            _check_count(name, getattr(self, name))
        if self.batch_size is not None:
            _check_count("batch_size", self.batch_size)
        for name, value, allowed in (
            ("mode", self.mode, get_args(CalibrationMode)),
            ("together", self.together, get_args(Together)),
        ):
            if value not in allowed:
                raise SpecError(f"Calibration.{name} is unknown", got=repr(value), expected=f"one of {allowed}")
        self._check_mixing()
        self._check_positions()
        parse_bytes(self.memory)
        parse_bytes(self.device_memory, "device_memory")
        parse_bytes(self.cache, "cache")
        self._check_device()
        if self.cache is not None and not self.paired and self.execution_device is None:
            raise SpecError(
                "Calibration.cache is for passes behind compressed layers",
                got=f"cache={self.cache!r} with mode={self.mode!r}",
                expected='mode="sequential" or "asymmetric", or an execution_device',
            )

    def _check_device(self) -> None:
        name = self.execution_device
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[a-z]+(:\d+)?", name)):
            raise SpecError(
                "Calibration.execution_device is no name of a device",
                got=repr(name),
                expected='a name such as "cuda:0", or "auto"',
            )

    def _check_mixing(self) -> None:
        if not 0 < self.mixing <= 1:
            raise SpecError(
                "Calibration.mixing is not possible",
                got=self.mixing,
                expected="0 < mixing <= 1",
                remedy='mode="sequential" does not move the weights at all',
            )
        if self.mixing != 1 and self.mode != "asymmetric":
            raise SpecError(
                "Calibration.mixing says how far the asymmetric mode goes",
                got=f"mixing={self.mixing} with mode={self.mode!r}",
                expected='mode="asymmetric"',
            )

    def _check_positions(self) -> None:
        if self.positions is None:
            return
        _check_count("positions", self.positions)
        if self.paired:
            raise SpecError(
                "Calibration.positions is for one pass over the model as it was",
                got=f"positions={self.positions} with mode={self.mode!r}",
                expected='mode="independent"',
                remedy="draw fewer samples instead",
            )

    @property
    def paired(self) -> bool:
        """True when the inputs of a layer depend on the layers compressed before it."""
        return self.mode != "independent"

    @property
    def recentring(self) -> float:
        """α of ``W + α·W·D·(H' + λ̄I)⁻¹``: ``mixing`` in the asymmetric mode, otherwise 0."""
        return self.mixing if self.mode == "asymmetric" else 0.0

    @property
    def memory_bytes(self) -> int | None:
        """``memory`` in bytes."""
        return parse_bytes(self.memory)

    @property
    def device_bytes(self) -> int | None:
        """``device_memory`` in bytes."""
        return parse_bytes(self.device_memory, "device_memory")

    @property
    def cache_bytes(self) -> int | None:
        """``cache`` in bytes."""
        return parse_bytes(self.cache, "cache")


def parse_bytes(value: Union[int, str, None], name: str = "memory") -> int | None:
    """``"2 GiB"`` is ``2 * 2**30``; units are B, KB, MB, GB, KiB, MiB and GiB, in any case.

    Raises:
        SpecError: Not a positive number of bytes.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(value))
    unit = None if match is None or isinstance(value, bool) else _UNITS.get(match.group(2).upper())
    size = 0 if match is None or unit is None else int(float(match.group(1)) * unit)
    if size < 1:
        raise SpecError(
            f"Calibration.{name} is not an amount of memory",
            got=repr(value),
            expected='a positive number of bytes, also with a unit such as "500 MiB"',
        )
    return size
