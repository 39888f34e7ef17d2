"""Reports of compression runs."""

from lightning_obc.report.result import CompressionReport, LayerReport, StageReport
from lightning_obc.report.tables import correction_table, markdown, render, report_table, stage_table

__all__ = [
    "CompressionReport",
    "LayerReport",
    "StageReport",
    "correction_table",
    "markdown",
    "render",
    "report_table",
    "stage_table",
]
