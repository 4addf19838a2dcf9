"""What every test stands on: seeds, one thread a worker, labelled images, real ones if any."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from pixel_level_contrastive_learning import step_graph
from pixel_level_contrastive_learning.step_graph import StepGraph

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("fixed")
torch.set_num_threads(1)  # the suite runs two workers on two cores

SHARED = Path(os.environ.get("PIXELCL_SHARED", Path(__file__).parents[2] / "shared"))

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    """Makes a context in which whatever waits for the GPU is an error."""

    @contextmanager
    def context() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            try:
                torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return context


class Repeated:
    """What a CUDA graph of a step does: it takes the step again, on the same tensors."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph, self.step, self.fixed = graph, graph.step, graph.fixed
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with self.graph.capturable():
            self.graph.optimizer.zero_grad()
            results = self.step(*self.fixed)
        self.graph.results = self.graph.results or results
        for result, new in zip(self.graph.results, results, strict=True):
            result.copy_(new)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Callable[[StepGraph], Any]:
    """Steps are captured on the CPU as on a GPU, by a stand-in for CUDA graphs."""

    def recorded(graph: StepGraph) -> Any:
        return Repeated(graph), ()

    monkeypatch.setattr(step_graph, "why_not", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(StepGraph, "recorded", recorded)
    return recorded


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that remembers nothing, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def streets() -> Path:
    """A folder of real street scenes: images/{train,val}, masks/{train,val}."""
    folder = SHARED / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set PIXELCL_SHARED to where they are")
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Ten and four images of 32 x 48 pixels whose three classes are three colours and noise."""
    dice = np.random.default_rng(0)
    folder = tmp_path / "labelled"
    for split, count in (("train", 10), ("val", 4)):
        for number in range(count):
            mask = np.kron(dice.integers(0, 3, (4, 6)), np.ones((8, 8), int))
            image = COLOURS[mask] + dice.integers(-20, 20, (32, 48, 3))
            mask[:2] = 255
            save(folder / "images" / split / f"{number}.png", image)
            save(folder / "masks" / split / f"{number}.png", mask)
    (folder / "classes.txt").write_text("0 red\n1 green\n2 blue\n")
    return folder
