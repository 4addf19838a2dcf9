"""What is told while running: to the terminal, and to the log once there is a folder for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


def as_line(line: dict[str, float]) -> str:
    """The figures of a step as one line of the log."""
    chosen = ("loss", "pixel_cosine", "instance_cosine", "positive_pairs", "spread", "grad_norm")
    shown = ", ".join(f"{name} {line[name]:.4g}" for name in chosen if name in line)
    return (
        f"step {line['step']:.0f}: {shown}, lr {line['lr']:.3g}, "
        f"{line['images_per_second']:.4g} images/s, {line['waiting']:.0%} waiting for data"
    )


class Bar:
    """The progress bar: figures, speed, waiting, memory and time left. None but on a terminal.

    Args:
        steps: Steps of the run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=2,
        )

    def start(self, done: int) -> None:
        """Show the bar."""
        self.task = self.progress.add_task("pretrain", total=self.steps, completed=done, figures="")
        self.progress.start()

    def show(self, line: dict[str, float]) -> None:
        """Show the figures of a step."""
        if self.progress.disable:
            return
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident()
        figures = (
            f"loss {line['loss']:.3f}  pixel_cosine {line['pixel_cosine']:.3f}  "
            f"{line['images_per_second']:.0f} images/s  waiting {line['waiting']:.0%}  "
            f"{used / 2**30:.1f} GiB"
        )
        self.progress.update(self.task, completed=line["step"], figures=figures)

    def stop(self) -> None:
        """Take the bar away, leaving its last line."""
        self.progress.stop()


def resident() -> float:
    """Memory of this process in bytes: the most it ever had."""
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
