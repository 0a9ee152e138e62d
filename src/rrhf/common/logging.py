"""Where the stages' messages go."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rrhf.common.launch import rank_and_world


def set_up_logging(log_file: Path | None = None) -> None:
    """What the stages say goes to stderr, and to ``log_file`` with the time."""
    logger = logging.getLogger("rrhf")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    if rank_and_world()[0] == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(file)
