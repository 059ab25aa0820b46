"""Log records as JSON lines. Records carry their figures as attributes (``extra``), so that no text has to be parsed.

handler.setFormatter(pagemgr.logs.JsonFormatter())        # in an engine
pagemgr --log-format json serve                           # from the command line

Loggers are called ``pagemgr.*``; they say nothing until a handler is set, and never a token id, a tenant or a salt.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

TEXT = "%(relativeCreated)7.0f ms %(levelname)s %(name)s: %(message)s"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One object a line: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, then the record's figures."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=True)


class TextFormatter(logging.Formatter):
    """For people: the milliseconds since the start, the message, and its figures behind it."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without a traceback."""
        figures = [f"{name}={value}" for name, value in vars(record).items() if name not in _STANDARD]
        return " ".join([super().formatMessage(record), *figures])
