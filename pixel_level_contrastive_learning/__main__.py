"""``python -m pixel_level_contrastive_learning`` does what ``pixelcl`` does."""

import atexit
import os
import signal
import sys
import warnings
from types import FrameType


def leave(number: int, _: object) -> None:
    """Exit at once, with the code of a signal."""
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; while a library is being imported, exit at once instead."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def without_code(message: Warning | str, *_: object, **__: object) -> str:
    """A warning for people who did not write the code that it comes from."""
    return f"warning: {message}\n"


def main() -> int:
    """Run a command; its exit code."""
    warnings.formatwarning = without_code
    # A run installs its own handlers; before and after it there is nothing to save, and libraries
    # that are being imported answer KeyboardInterrupt in ways of their own.
    signal.signal(signal.SIGTERM, leave)
    if hasattr(signal, "pthread_sigmask"):  # Python takes its handlers away while it ends
        atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, (signal.SIGTERM,))
    before = signal.signal(signal.SIGINT, leave)
    try:
        from .cli import main as command
    except ModuleNotFoundError as error:
        from .checks import not_installed

        sys.exit(f"error: {not_installed(error.name)}")
    if sys.argv[1:2] != ["pretrain"]:
        # A command imports what it needs once it has read its flags.
        signal.signal(signal.SIGINT, interrupt if before is signal.default_int_handler else before)
    return command()


if __name__ == "__main__":
    sys.exit(main())
