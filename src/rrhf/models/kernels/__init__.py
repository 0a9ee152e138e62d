"""The same numbers faster, by device."""
