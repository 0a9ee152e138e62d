"""The report of a run, or of several side by side: one HTML file that opens without a network."""

from __future__ import annotations

from rrhf.report.page import write_report
from rrhf.report.plots import gain_figure, save_picture

__all__ = ["gain_figure", "save_picture", "write_report"]
