"""``python -m pixel_level_contrastive_learning`` does what ``pixelcl`` does."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
