"""Where the stages' messages go."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rrhf.common.launch import rank_and_world


class _LogFile(logging.FileHandler):
    """A file of messages whose disk may be full: that is said once, and no work ends of it."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.said:
            self.said = True
            print(f"{self.baseFilename}: cannot be written: {error.strerror}: free some space", file=sys.stderr)


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
        file = _LogFile(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(file)
