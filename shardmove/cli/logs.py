"""Logs: one event name and its fields a line, on standard error. Never row values, never secrets."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum

import structlog
from structlog.typing import Processor


class Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error as it is when a line is written: a live display may have put itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr


def configure(level: Level | None) -> None:
    """Sets up structlog, and the standard library's loggers with it. The last call counts."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = _StandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=14, sort_keys=False),
            ],
        )
    )
    # It warns of each pipeline that an expected error ended; the errors themselves reach us as exceptions.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    root = logging.getLogger()
    root.handlers = [each for each in root.handlers if not isinstance(each, _StandardError)] + [handler]
    root.setLevel((level or _default_level()).upper())


def _default_level() -> Level:
    """On a terminal the display says what happens; elsewhere the log does."""
    return Level.WARNING if sys.stderr.isatty() else Level.INFO
