"""The drawn scenes: the same on every run, and a task worth learning for."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor

from pixel_level_contrastive_learning.demo import scenes
from pixel_level_contrastive_learning.demo.scenes import (
    CLASSES,
    Scene,
    draw_scene,
    save_scenes,
)

SIZE = (96, 128)


@pytest.fixture(scope="module")
def hundred() -> list[Scene]:
    return [draw_scene(index, SIZE) for index in range(100)]


def same(one: Scene, two: Scene) -> bool:
    return torch.equal(one.image, two.image) and torch.equal(one.mask, two.mask)


def read(file: Path) -> Tensor:
    with Image.open(file) as image:
        return pil_to_tensor(image)


# The same on every run.


def test_a_scene_depends_on_its_arguments_alone() -> None:
    torch.manual_seed(1)
    first = draw_scene(7, SIZE, seed=3)
    torch.manual_seed(2)
    draw_scene(8, SIZE, seed=3)
    assert same(draw_scene(7, SIZE, seed=3), first)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_scene(0, SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_index_and_seed_each_make_another_scene() -> None:
    images = [draw_scene(i, SIZE, seed).image for i in range(3) for seed in (0, 1, 2**32 + 2)]
    assert len({image.numpy().tobytes() for image in images}) == 9


# What a scene holds.


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (160, 160)])
def test_shapes_types_and_ranges(size: tuple[int, int]) -> None:
    image, mask = draw_scene(0, size)
    assert (image.shape, image.dtype) == ((3, *size), torch.float32)
    assert (mask.shape, mask.dtype) == (size, torch.uint8)
    assert image.isfinite().all()
    assert image.min() >= 0
    assert image.max() <= 1


def test_every_class_is_common_and_background_is_most(hundred: list[Scene]) -> None:
    assert CLASSES[0] == "background"
    counts = torch.bincount(torch.stack([mask for _, mask in hundred]).long().flatten())
    share = counts / counts.sum()
    assert len(share) == len(CLASSES)
    assert 0.5 < share[0] < 0.8
    assert share[1:].min() > 0.02


@pytest.mark.parametrize("name", CLASSES[1:])
def test_the_mask_lies_where_the_paint_lies(name: str) -> None:
    # On a canvas of 1000 paint is about 1, and the shadow at its darkest is 500.
    gen = torch.Generator().manual_seed(0)
    at, blank = scenes.pixel_centres((96, 96)), torch.full((3, 96, 96), 1000.0)
    image, covered = scenes.draw_shape(blank, at, 0.0, *scenes.SHAPES[name], gen)
    level = image.amax(dim=0)
    assert covered.sum() > 200
    assert covered[level < 249].all()  # more than half paint
    assert not covered[level > 501].any()
    assert (level[covered] < 2).float().mean() > 0.75  # only the edge is mixed


@pytest.mark.parametrize(
    ("outline", "inside", "outside"),
    [
        (scenes.disc, (0.0, 0.0), (0.8, 0.8)),
        (scenes.rectangle, (0.8, 0.8), (0.9, 0.0)),
        (scenes.triangle, (-1.1, 0.0), (0.65, 0.0)),
        (scenes.ring, (0.0, 0.8), (0.0, 0.0)),
        (scenes.star, (-1.0, 0.0), (0.8, 0.0)),
        (scenes.cross, (0.9, 0.0), (0.5, 0.5)),
    ],
)
def test_outlines_are_what_they_are_called(outline, inside, outside) -> None:
    distance = outline(torch.tensor([inside, outside]).T[..., None], 0.0)
    assert distance[0] < 0 < distance[1]


def test_shapes_are_textured_and_the_background_is_calmer(hundred: list[Scene]) -> None:
    rough = torch.zeros(len(CLASSES))
    for image, mask in hundred:
        gray = image.mean(dim=0)
        steps = (gray[:, 4:] - gray[:, :-4]).abs()  # four pixels: about half a period
        for label in range(len(CLASSES)):
            lies = (mask[:, 4:] == label) & (mask[:, :-4] == label)
            rough[label] += steps[lies].mean() if lies.any() else 0
    appears = torch.tensor([sum(bool((m == k).any()) for _, m in hundred) for k in range(7)])
    assert (rough / appears)[1:].min() > 2 * (rough / appears)[0]


def test_mean_colour_does_not_tell_the_class(hundred: list[Scene]) -> None:
    pieces = [
        (image[:, mask == label].mean(dim=1), label - 1)
        for image, mask in hundred
        for label in range(1, len(CLASSES))
        if (mask == label).sum() > 50
    ]
    colours = functional.pad(torch.stack([colour for colour, _ in pieces]), (0, 1), value=1.0)
    labels = torch.tensor([label for _, label in pieces])
    fitted = torch.linalg.lstsq(colours, functional.one_hot(labels).float()).solution
    assert ((colours @ fitted).argmax(dim=1) == labels).float().mean() < 1 / 3  # chance: 1 / 6


# On disk.


def test_saved_files_read_back_and_splits_share_no_scene(tmp_path: Path) -> None:
    save_scenes(tmp_path / "set", {"train": 3, "val": 2}, SIZE, seed=9)
    names = {split: [f"{i:06d}.png" for i in indices] for split, indices in INDICES.items()}
    for split, indices in INDICES.items():
        for kind in ("images", "masks"):
            folder = tmp_path / "set" / kind / split
            assert sorted(file.name for file in folder.iterdir()) == names[split]
        for index, name in zip(indices, names[split], strict=True):
            image, mask = draw_scene(index, SIZE, seed=9)
            assert torch.equal(read(tmp_path / "set/masks" / split / name)[0], mask)
            saved = read(tmp_path / "set/images" / split / name) / 255
            torch.testing.assert_close(saved, image, rtol=0, atol=0.5 / 255 + 1e-6)
    listed = (tmp_path / "set" / "classes.txt").read_text().splitlines()
    assert listed == [f"{label} {name}" for label, name in enumerate(CLASSES)]


INDICES = {"train": [0, 2, 4], "val": [1, 3]}


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"index": -1}, "index is -1; it must be a whole number of at least 0"),
        ({"index": 0, "seed": 0.5}, "seed is 0.5; it must be a whole number of at least 0"),
        ({"index": 0, "size": (160, 31)}, r"size is \(160, 31\); .* at least 32 .* \(160, 160\)"),
        ({"index": 0, "size": 160}, r"size is 160; it must be \(height, width\)"),
    ],
)
def test_scenes_that_cannot_be_drawn(arguments, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        draw_scene(**arguments)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"count\['val'\] is 0; .*\nsize is .*\nseed is -1; "):
        save_scenes(tmp_path, {"val": 0}, (8, 8), seed=-1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        ({"vall": 3}, r"split is 'vall'; it must be one of 'train', 'val' \(perhaps 'val'\)"),
        ({"train": 0}, r"count\['train'\] is 0; it must be a whole number of at least 1"),
    ],
)
def test_splits_that_cannot_be_saved(tmp_path: Path, count, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        save_scenes(tmp_path, count, SIZE)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="which is in use; name a new or empty one"):
        save_scenes(tmp_path, {"train": 1}, SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
