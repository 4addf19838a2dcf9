"""``python -m pixel_level_contrastive_learning`` does what ``pixelcl`` does."""

import atexit
import os
import signal
import sys
import warnings

from .checks import not_installed


def leave(number: int, _: object) -> None:
    """Exit at once, with the code of a signal."""
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


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
        sys.exit(f"error: {not_installed(error.name)}")
    if sys.argv[1:2] != ["pretrain"]:
        signal.signal(signal.SIGINT, before)
    return command()


if __name__ == "__main__":
    sys.exit(main())
