"""Reports of compression runs."""

from lightning_obc.report.compare import compare_records, compare_reports
from lightning_obc.report.document import default_formats, render_json, render_markdown, save_report
from lightning_obc.report.html import render_html
from lightning_obc.report.record import code, load_record, report_record
from lightning_obc.report.result import CompressionReport, LayerReport, RankWork, StageReport
from lightning_obc.report.samples import WeightSample, weight_samples
from lightning_obc.report.tables import correction_table, markdown, render, report_table, stage_table

__all__ = [
    "CompressionReport",
    "LayerReport",
    "RankWork",
    "StageReport",
    "WeightSample",
    "code",
    "compare_records",
    "compare_reports",
    "correction_table",
    "default_formats",
    "load_record",
    "markdown",
    "render",
    "render_html",
    "render_json",
    "render_markdown",
    "report_record",
    "report_table",
    "save_report",
    "stage_table",
    "weight_samples",
]
