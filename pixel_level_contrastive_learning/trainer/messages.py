"""What is told while running: to the terminal, and to the log once there is a folder for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = logging.getLogger("pixel_level_contrastive_learning")
ESCAPED = "backslashreplace"
"""How the bytes of a file's name that are no text are told."""


class Terminal(logging.Handler):
    """Writes messages to what is standard error at the moment, which a progress bar redirects."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.INFO and not getattr(record, "file_only", False):
            text = self.format(record).encode(errors=ESCAPED).decode()
            sys.stderr.write(f"{text}\n")


class RunLog(logging.Handler):
    """Writes messages to a file, once there is a folder for it; holds them until then."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.held: list[logging.LogRecord] = []
        self.file: logging.FileHandler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.file is None:
            self.held.append(record)
        else:
            self.file.handle(record)

    def open(self, path: Path) -> None:
        """Append to a file from now on, beginning with what was held."""
        self.file = logging.FileHandler(path, encoding="utf-8", errors=ESCAPED)
        self.file.setFormatter(self.formatter)
        for record in self.held:
            self.file.handle(record)
        self.held.clear()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()


@contextmanager
def logged(*, to_terminal: bool) -> Iterator[RunLog]:
    """A context in which the package's messages are kept for a file, and told on standard error.

    Args:
        to_terminal: Whether to tell them.
    """
    log = RunLog()
    handlers: list[logging.Handler] = [log, Terminal()] if to_terminal else [log]
    level = LOG.level
    LOG.setLevel(logging.DEBUG)  # the terminal leaves out what is only for the file
    for handler in handlers:
        LOG.addHandler(handler)
    try:
        yield log
    finally:
        LOG.setLevel(level)
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()
