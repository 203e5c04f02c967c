"""Logging: one readable line per event, from one rank unless asked otherwise; every rank's own in a file. Knows nothing
of torch.
"""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from typing_extensions import override

from megatron_omega.host.redaction import RedactingFormatter, redact_tracebacks

_NAME = "megatron_omega"
_FILE_BYTES, _OLDER_FILES = 4 << 20, 2


def get_logger(module: str = _NAME) -> logging.Logger:
    """Return the logger of `module`, a child of the package's logger."""
    return logging.getLogger(module if module.startswith(_NAME) else f"{_NAME}.{module}")


def configure_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send the package's log to stderr, without secrets: all levels on rank 0, elsewhere warnings with the rank."""
    logger = logging.getLogger(_NAME)
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    where = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(RedactingFormatter(f"%(asctime)s {where}%(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    redact_tracebacks()
    quiet_dependencies()


class _RankFile(RotatingFileHandler):
    """A file that grows to some megabytes and is then set aside. What cannot be written is lost, without a word."""

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        pass


def keep_log(path: Path) -> None:
    """Write the package's log of this process to a file too, all levels. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RankFile(path, maxBytes=_FILE_BYTES, backupCount=_OLDER_FILES, encoding="utf-8", delay=True)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.getLogger(_NAME).addHandler(handler)


def quiet_dependencies() -> None:
    """Keep the engine's own chatter down to warnings, unless the user set its level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "DEEPSPEED_LOG_LEVEL" not in os.environ:
        os.environ["DEEPSPEED_LOG_LEVEL"] = "warning"
