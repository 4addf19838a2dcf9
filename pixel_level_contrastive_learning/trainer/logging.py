"""Messages to the terminal and to `train.log`, and the progress bar."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..checks import duration

LOG = logging.getLogger("pixel_level_contrastive_learning")
ERRORS = "backslashreplace"
"""How bytes of a file name that are no text are written."""
BAR_FROM = 120
"""Columns from which a terminal has room for a bar beside all figures."""


class TerminalHandler(logging.Handler):
    """Writes to what is standard error at the moment, which a progress bar redirects."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.INFO and not getattr(record, "file_only", False):
            text = self.format(record).encode(errors=ERRORS).decode()
            sys.stderr.write(f"{text}\n")


class LogFile(logging.FileHandler):
    """A file that loses messages where the disk is full; whoever writes results tells of that."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class LateFileHandler(MemoryHandler):
    """Writes to a file, once there is a folder for it; keeps records until then."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize)

    def open(self, path: Path) -> None:
        """Append to a file from now on, beginning with the records kept."""
        file = LogFile(path, encoding="utf-8", errors=ERRORS)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.setTarget(file)
        self.capacity = 0
        self.flush()

    def close(self) -> None:
        file = self.target
        super().close()
        if file is not None:
            file.close()


@contextmanager
def logging_to(*, terminal: bool) -> Iterator[LateFileHandler]:
    """A context in which the package's messages go to a file to be opened, and to the terminal.

    They reach the script's own handlers too, unless one of these would print them a second time.
    """
    file = LateFileHandler()
    handlers: list[logging.Handler] = [file, TerminalHandler()] if terminal else [file]
    level, propagate = LOG.level, LOG.propagate
    LOG.propagate = propagate and not any(map(writes_to_terminal, logging.root.handlers))
    LOG.setLevel(logging.DEBUG)  # the terminal leaves out what is only for the file
    for handler in handlers:
        LOG.addHandler(handler)
    try:
        yield file
    finally:
        LOG.setLevel(level)
        LOG.propagate = propagate
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()


def writes_to_terminal(handler: logging.Handler) -> bool:
    """Whether a handler writes to standard output or error, by itself or through rich."""
    stream = getattr(handler, "stream", getattr(getattr(handler, "console", None), "file", None))
    return stream is not None and stream in (sys.stdout, sys.stderr)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """A context in which Lightning says only what is wrong."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing in place
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def metrics_line(metrics: dict[str, float], steps: int, seconds_left: float | None = None) -> str:
    """The metrics of one of some steps as a line of the log, with the seconds left if known."""
    names = ("loss", "pixel_cosine", "instance_cosine", "positive_pairs", "spread", "grad_norm")
    listed = ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    return (
        f"step {metrics['step']:.0f}/{steps}: {listed}, lr {metrics['lr']:.3g}, "
        f"{metrics['images_per_second']:.4g} images/s, {metrics['waiting']:.0%} waiting for data"
        f"{'' if seconds_left is None else f', {duration(seconds_left)} left'}"
    )


class ProgressBar(Progress):
    """Steps, time left, metrics, speed, waiting and memory; nothing where there is no terminal.

    A narrow terminal sees the first of these, and no bar.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=None)] if console.width >= BAR_FROM else ()),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,
        )

    def show(self, metrics: dict[str, float]) -> None:
        """Show the metrics of a step."""
        if self.disable:
            return
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        parts = [
            f"loss {metrics['loss']:.3f}",
            f"pixel_cosine {metrics['pixel_cosine']:.3f}",
            f"{metrics['images_per_second']:.0f} images/s",
            f"waiting {metrics['waiting']:.0%}",
            f"{used / 2**30:.1f} GiB",
        ]
        task = self.tasks[0]
        steps = 2 * len(f"{task.total:.0f}") + 1
        room = self.console.width - len(f"{task.description}   00:00:00") - steps
        while parts and len("  ".join(parts)) > room:
            parts.pop()
        self.update(task.id, completed=metrics["step"], metrics="  ".join(parts))


def peak_memory() -> float:
    """Largest memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
