"""Ctrl-C and SIGTERM: the first lets the step end, the second leaves at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

LOG = logging.getLogger("pixel_level_contrastive_learning")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):  # an end that was asked for, not an error
    """The run was asked to stop, has saved and stopped. Its code is 128 and the signal's number."""


class Interruption:
    """Notes that a signal asked the run to stop.

    A context: the handlers are there inside, and those that were there before come back after.
    Processes forked from this one inherit them: there SIGINT is left to the parent and SIGTERM
    ends the process.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.owner = os.getpid()
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in SIGNALS}
            self.watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def watch(self) -> None:
        """Take the signals (again: Lightning puts handlers of its own when it starts)."""
        if self.before:
            for number in SIGNALS:
                signal.signal(number, self.note)

    def note(self, number: int, _: FrameType | None) -> None:
        """Note the first signal; leave at the second."""
        name = signal.Signals(number).name
        if os.getpid() != self.owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal is not None:
            LOG.warning("%s again: leaving at once", name)
            os._exit(128 + number)
        self.signal = number
        if hasattr(signal, "SIGCHLD"):
            # A signal to the whole group ends the workers as well, at which torch would raise here
            # in the middle of the step. The step has its batch and needs no other.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        LOG.warning("%s: the run stops after this step and saves; once more leaves at once", name)

    def leave(self) -> None:
        """Leave if a signal came: with 130 after Ctrl-C, 143 after SIGTERM.

        Raises:
            Interrupted: One came.
        """
        if self.signal is not None:
            raise Interrupted(128 + self.signal)
