"""SIGINT and SIGTERM: the first ends the step at hand and saves, the second exits at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from lightning.fabric import Fabric

from .logging import LOG
from .system import is_writer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASK_EVERY = 10
"""Steps between the processes' asking each other whether one was asked to stop."""


class Interrupted(SystemExit):  # an end that was asked for, not an error
    """The run was asked to stop, and has saved. Its code is 128 and the signal's number."""


class StopSignal:
    """Notes that a signal asks the run to stop.

    A context manager: its handlers are installed inside, and those from before come back after.
    Forked processes inherit them: there SIGINT is left to the parent, and SIGTERM ends the process.

    Attributes:
        number: Of the signal that was received.
        alone: Whether no other process of the run waits for this one's next step.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.alone = True
        self.at_rest = False
        self.owner = os.getpid()
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note the first signal, or leave where nothing would be lost; exit at the second."""
        name = signal.Signals(number).name
        if os.getpid() != self.owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.number is not None:
            LOG.warning("%s again: exiting at once", name)
            os._exit(128 + number)
        self.number = number
        if hasattr(signal, "SIGCHLD"):
            # A signal to the whole process group also ends the loader's workers, at which torch
            # would raise here, in mid-step. The step has its batch and needs no other.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.at_rest and self.alone:
            LOG.warning("%s: stopping", name)
            self.exit_if_received()
        LOG.warning("%s: the run saves and stops after this step; repeat to exit at once", name)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """A context in which a signal ends the run at once: no step is being made.

        Raises:
            Interrupted: Inside, or on entry if a signal came before.
        """
        if self.alone:
            self.exit_if_received()
        self.at_rest = True
        try:
            yield
        finally:
            self.at_rest = False

    @contextmanager
    def killing(self, active: bool) -> Iterator[None]:
        """A context in which a signal kills: torch awaits other machines there, deaf to Python."""
        handlers = self.before if active else {}
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in handlers:
                signal.signal(number, self.handle)

    def received_anywhere(self, fabric: Fabric, step: int) -> bool:
        """Whether a process of the run was asked to stop; several ask every `ASK_EVERY` steps."""
        if fabric.world_size > 1:
            if step % ASK_EVERY:
                return False
            number = torch.tensor(self.number or 0, device=fabric.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number) or None
        return self.number is not None

    def exit_if_received(self) -> None:
        """Exit if a signal was received: with code 130 after SIGINT, 143 after SIGTERM.

        Processes that do not write exit with 0: Lightning kills the one that writes, and may be
        saving, a few seconds after any other code.

        Raises:
            Interrupted: One was.
        """
        if self.number is not None:
            raise Interrupted(128 + self.number if is_writer() else 0)
