"""Reporting of a run: tables, pictures, the HTML report, Weights & Biases."""

from bdistil.reporting.report import write_report
from bdistil.reporting.tables import curve_table
from bdistil.reporting.tracking import RunLogger, Tracking

__all__ = [
    "RunLogger",
    "Tracking",
    "curve_table",
    "write_report",
]
