"""What every test stands on: seeds, one thread a worker, the real images if they are there."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("fixed")
torch.set_num_threads(1)  # the suite runs two workers on two cores

SHARED = Path(os.environ.get("PIXELCL_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def streets() -> Path:
    """A folder of real street scenes: images/{train,val}, masks/{train,val}."""
    folder = SHARED / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set PIXELCL_SHARED to where they are")
    return folder
