"""Corrections after compression: batch-norm reset, statistics and bias correction, global tuning."""

from __future__ import annotations

from lightning_obc.correction.batch_norm import reset_batch_norm
from lightning_obc.correction.channels import has_bias
from lightning_obc.correction.moments import ChannelMoments, NormStatistics, record_statistics
from lightning_obc.correction.result import CorrectedLayer, CorrectionReport
from lightning_obc.correction.stage import DenseReference, check_correction, dense_references, run_correction
from lightning_obc.correction.statistics import correct_bias, correct_statistics
from lightning_obc.correction.tuning import tune_global, tune_vectors

__all__ = [
    "ChannelMoments",
    "CorrectedLayer",
    "CorrectionReport",
    "DenseReference",
    "NormStatistics",
    "check_correction",
    "correct_bias",
    "correct_statistics",
    "dense_references",
    "has_bias",
    "record_statistics",
    "reset_batch_norm",
    "run_correction",
    "tune_global",
    "tune_vectors",
]
