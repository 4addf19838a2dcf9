"""The small run and its report, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evil_run import EVIL, make_images, make_run
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from pixel_level_contrastive_learning.evaluation.results import Evaluation, Row
from pixel_level_contrastive_learning.visualization.report import visualize


@pytest.fixture(scope="session")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose settings, scores and images are called what pages break on."""
    place = tmp_path_factory.mktemp("pictures")
    run = make_run(place / "run <b>&amp;", make_images(place / "images"))
    rows = (
        Row("random weights", {"mIoU": 0.125}, {"mIoU": 0.0}, {EVIL: 0.25}),
        Row(EVIL, {"mIoU": 0.375}, {"mIoU": 0.011}, {EVIL: 0.5}),
    )
    Evaluation(
        weights=EVIL, data="x", protocol="linear", settings={}, rows=rows, sentence=f"Good. {EVIL}"
    ).write(run)
    (run / "pictures").mkdir()
    picture = to_pil_image(interpolate(torch.rand(1, 3, 4, 8), scale_factor=20)[0])
    for step in range(0, 900, 100):
        picture.save(run / "pictures" / f"step-{step:08d}.png")
    return run


@pytest.fixture(scope="session")
def report(evil_run: Path) -> Path:
    """Its report."""
    return visualize(evil_run, out=evil_run.parent / "report.html", count=4)


@pytest.fixture
def run_maker(tmp_path: Path) -> Callable[..., Path]:
    """Makes further runs: ``run_maker(name, **settings)``."""
    images = make_images(tmp_path / "images", 2)
    return lambda name, **settings: make_run(tmp_path / name, images, **settings)
