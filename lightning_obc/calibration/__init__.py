"""From batches to Hessians: the choice of data, the pass with hooks, and the mergeable statistic."""

from __future__ import annotations

from lightning_obc.calibration.batches import batch_size_of, call_forward, inputs_of, takes_each, to_device
from lightning_obc.calibration.collect import collect_hessians
from lightning_obc.calibration.collector import Collector
from lightning_obc.calibration.dense import DenseWeights
from lightning_obc.calibration.device import DeviceNeed, device_needs
from lightning_obc.calibration.isolation import eager_forward, undisturbed
from lightning_obc.calibration.memory import on_host, statistic_bytes
from lightning_obc.calibration.offload import Offload, execution_device, offload_of, offloading
from lightning_obc.calibration.paired import PairedAccumulator, check_comparable, collect_paired
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.calibration.source import CalibrationBatches, calibration_batches, no_batches, rereadable
from lightning_obc.calibration.statistic import HessianAccumulator, check_finite
from lightning_obc.calibration.untouched import untouched

__all__ = [
    "CalibrationBatches",
    "Collector",
    "DenseWeights",
    "DeviceNeed",
    "HessianAccumulator",
    "Offload",
    "PairedAccumulator",
    "batch_size_of",
    "calibration_batches",
    "call_forward",
    "check_comparable",
    "check_finite",
    "collect_hessians",
    "collect_paired",
    "device_needs",
    "eager_forward",
    "execution_device",
    "inputs_of",
    "no_batches",
    "offload_of",
    "offloading",
    "on_host",
    "preserved_rng",
    "rereadable",
    "statistic_bytes",
    "takes_each",
    "to_device",
    "undisturbed",
    "untouched",
]
