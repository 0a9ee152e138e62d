"""An inspection as text."""

from __future__ import annotations

from typing import Any

from rrhf.common.presentation import text_table
from rrhf.records.inspection.tables import inspection_tables


def format_inspection(result: dict[str, Any]) -> str:
    """Return what ``inspect_records`` measured as text for a terminal."""
    tables = inspection_tables(result)
    blocks = [f"{table.title}\n{text_table(table.header, table.rows, indent='  ')}" for table in tables]
    blocks += [f"Warning: {warning}" for warning in result["warnings"]]
    return "\n\n".join(blocks) + "\n"
