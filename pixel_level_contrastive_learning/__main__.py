"""``python -m pixel_level_contrastive_learning`` does what ``pixelcl`` does."""

import os
import signal
import sys

from .checks import not_installed


def main() -> int:
    """Run a command; its exit code."""
    # A run installs its own handler; before and after it there is nothing to save.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        from .cli import main as command
    except ModuleNotFoundError as error:
        sys.exit(f"error: {not_installed(error.name)}")
    return command()


if __name__ == "__main__":
    sys.exit(main())
