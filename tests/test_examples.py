"""The examples run as a reader would run them, and leave behind what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

from pixel_level_contrastive_learning.scenes import save_scenes

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str, cwd: Path) -> str:
    """What an example prints, run in a process of its own with warnings as errors."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_pretrains_a_resnet_on_a_folder(tmp_path: Path) -> None:
    save_scenes(tmp_path / "scenes", {"train": 4, "val": 1}, size=(96, 120))
    flags = "--size", "64", "--batch", "2", "--steps", "2", "--out", "net.pt"
    out = run("pretrain_loop.py", "scenes/images/train", *flags, cwd=tmp_path)
    assert "pixel_cosine" in out
    trained = torch.load(tmp_path / "net.pt", weights_only=False)
    assert type(trained) is models.ResNet
    torch.manual_seed(0)
    fresh = models.resnet18(weights=None)
    assert trained.state_dict().keys() == fresh.state_dict().keys()
    assert not torch.equal(trained.conv1.weight, fresh.conv1.weight)


def test_the_loop_takes_real_photographs(streets: Path, tmp_path: Path) -> None:
    flags = "--size", "64", "--batch", "2", "--steps", "1", "--out", "net.pt"
    out = run("pretrain_loop.py", str(streets / "images" / "val"), *flags, cwd=tmp_path)
    assert "positive_pairs" in out
    assert (tmp_path / "net.pt").stat().st_size > 0


def test_a_network_of_ones_own_on_five_channels(tmp_path: Path) -> None:
    out = run("custom_backbone.py", cwd=tmp_path)
    assert out.count("pixel_cosine") == 5
    assert "never trained: online_encoder.net.head.bias, online_encoder.net.head.weight" in out
    assert torch.load(tmp_path / "satellite-net.pt")["stages.0.0.weight"].shape[1] == 5


@pytest.mark.parametrize("script", sorted(file.name for file in EXAMPLES.glob("*.py")))
def test_an_example_fits_on_a_page(script: str) -> None:
    assert len((EXAMPLES / script).read_text().splitlines()) <= 60
