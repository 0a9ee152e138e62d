"""What a file of records holds: measured in one pass, and shown in a terminal and on a page."""

from __future__ import annotations

from rrhf.records.inspection.measures import inspect_records
from rrhf.records.inspection.page import inspection_html
from rrhf.records.inspection.terminal import format_inspection

__all__ = ["format_inspection", "inspect_records", "inspection_html"]
