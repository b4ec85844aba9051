"""One line a record, for people or for machines; a request's fields at its end."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal


class _Console(logging.Formatter):
    """Time, level, message, and fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Add the fields behind the message."""
        fields: dict[str, object] = getattr(record, "fields", {})
        line = super().formatMessage(record)
        return " ".join([line, *(f"{name}={value}" for name, value in fields.items())])


class _Json(logging.Formatter):
    """A JSON object: `time` (UTC, ISO 8601), `level`, `logger`, `message`, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record on one line, its traceback included."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(log_format: Literal["console", "json"]) -> None:
    """Send every log record of this process to stderr."""
    handler = logging.StreamHandler()
    formatter: logging.Formatter = _Console()
    if log_format == "json":
        formatter = _Json()
        formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It warns of each cast to the 16 bits that 8-bit matmuls take.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # transformers imports it where it is installed, and it warns of kernels that it lacks.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    # ... and makes torch warn of its enums.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
