"""The embedded data set: drawn scenes with masks, for the demo and the tests.

A scene is some shapes on a background, lying over each other in one light. Each class has an
outline and a family of textures; colour, contrast, scale and direction are drawn anew for each
shape from what is common to all, so that colour tells nothing about the class and texture nearly
everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, hypot, pi, sin
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Generator, Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from ..checks import one_of, raise_together, whole
from ..data.sources import IMAGES, MASKS

SPLITS = ("train", "val")
SMALLEST_SIDE = 32  # below it a texture's period is less than two pixels


class Scene(NamedTuple):
    """A drawn image and what each of its pixels shows.

    Attributes:
        image: ``(3, h, w)`` float32 RGB in [0, 1].
        mask: ``(h, w)`` uint8 class ids, positions in `CLASSES`.
    """

    image: Tensor
    mask: Tensor


# Outlines: points (2, h, w) in radii of the shape, and a knob in [0, 1] for its proportions ->
# signed distance (h, w) to the outline in radii, below 0 inside.


def disc(at: Tensor, knob: float) -> Tensor:
    """An ellipse, from round to 3:4 (its distance is exact on the outline only)."""
    return rounded(at, 1 + knob / 3) - 0.9


def rectangle(at: Tensor, knob: float) -> Tensor:
    """A rectangle, from square to 1:2."""
    return box(at, 0.85, 0.85 - 0.42 * knob)


def triangle(at: Tensor, knob: float) -> Tensor:
    """A triangle of equal sides, its corners cut by up to a sixth of the side."""
    sides, corners = (
        torch.stack([turned(at, turn + k * 2 * pi / 3)[0] for k in range(3)]).amax(dim=0)
        for turn in (0.0, pi)
    )
    return torch.maximum(sides - 0.6, corners - (1.2 - 0.3 * knob))


def ring(at: Tensor, knob: float) -> Tensor:
    """A ring, its band from a third to half a radius wide."""
    half = 0.17 + 0.08 * knob
    return (rounded(at) - (0.95 - half)).abs() - half


def star(at: Tensor, knob: float) -> Tensor:
    """A star of five points, from slender to stout."""
    fold = 2 * pi / 5
    angle = torch.atan2(at[1], at[0]).remainder(fold) - fold / 2
    radius = rounded(at)
    x, y = radius * angle.cos(), radius * angle.sin().abs()
    valley = 0.5 + 0.16 * knob
    # The edge from the point (1.1, 0) to the valley, half a fold further round.
    run, rise = valley * cos(fold / 2) - 1.1, valley * sin(fold / 2)
    return ((x - 1.1) * rise - y * run) / hypot(run, rise)


def cross(at: Tensor, knob: float) -> Tensor:
    """A cross of two bars, from slender to stout."""
    width = 0.28 + 0.14 * knob
    return torch.minimum(box(at, 1.0, width), box(at, width, 1.0))


def rounded(at: Tensor, flat: float = 1.0) -> Tensor:
    """Distance from the middle, the height counted ``flat`` times."""
    x, y = at
    return torch.hypot(x, flat * y)


def box(at: Tensor, width: float, height: float) -> Tensor:
    """Signed distance to a box of these half sides, along the axes."""
    return torch.maximum(at[0].abs() - width, at[1].abs() - height)


# Textures: points (2, h, w) in periods of the pattern, and the dice -> (h, w) from 0 (first ink)
# to 1 (second ink).


def dots(at: Tensor, dice: Generator) -> Tensor:
    """Dots on a square lattice."""
    return soft(between(0.26, 0.36, dice) - rounded(at.remainder(1) - 0.5))


def stripes(at: Tensor, dice: Generator) -> Tensor:
    """Straight stripes."""
    return soft((2 * pi * at[0]).sin() / 4 + between(-0.08, 0.08, dice))


def checks(at: Tensor, dice: Generator) -> Tensor:
    """A board of squares, the dark ones a little larger or smaller than the light ones."""
    board = (pi * at[0]).sin() * (pi * at[1]).sin()
    return soft(board / 3 + between(-0.03, 0.03, dice))


def waves(at: Tensor, dice: Generator) -> Tensor:
    """Lines that swing from side to side."""
    swing = between(0.3, 0.45, dice) * (2 * pi * at[1] / between(1.8, 2.6, dice)).sin()
    return soft((2 * pi * (at[0] + swing)).sin() / 4)


def grain(at: Tensor, dice: Generator) -> Tensor:
    """Blotches without order."""
    h, w = at.shape[1:]
    across = (at[:, 0, -1] - at[:, 0, 0]).norm().item() * w / (w - 1)  # periods, edge to edge
    cells = max(2, round(1.6 * across * h / w)), max(2, round(1.6 * across))
    return soft(noise(cells, (h, w), dice) - between(0.45, 0.55, dice))


def bricks(at: Tensor, dice: Generator) -> Tensor:
    """Bricks twice as long as high, each row shifted by half a brick; the joints are the ink."""
    row = at[1].floor()
    along = (at[0] / 2 + row / 2).remainder(1)
    joint = torch.minimum(1 - (2 * along - 1).abs(), 0.5 - ((at[1] - row) - 0.5).abs())
    return soft(between(0.1, 0.16, dice) - joint)


def soft(level: Tensor) -> Tensor:
    """A pattern's level as ink: 0 below zero, 1 above, with a short slope between."""
    return (6 * level + 0.5).clamp(0, 1)


Outline = Callable[[Tensor, float], Tensor]
Texture = Callable[[Tensor, Generator], Tensor]
SHAPES: dict[str, tuple[Outline, Texture]] = {
    "disc": (disc, dots),
    "rectangle": (rectangle, stripes),
    "triangle": (triangle, checks),
    "ring": (ring, waves),
    "star": (star, grain),
    "cross": (cross, bricks),
}
CLASSES: tuple[str, ...] = ("background", *SHAPES)
"""The classes' names; a class id in a mask is a position in it."""
CLASSES_TEXT = "".join(f"{label} {name}\n" for label, name in enumerate(CLASSES))
"""What `classes.txt` of drawn scenes holds."""


def draw_scene(index: int, size: tuple[int, int] = (160, 160), seed: int = 0) -> Scene:
    """The scene of this number: the same arguments give the same bits.

    Nothing else has a say, neither the scenes drawn before nor any other generator.

    Args:
        index: Which scene of the seed, from 0 up; no two below 2**32 share their dice.
        size: ``(height, width)`` in pixels.
        seed: Which series of scenes, from 0 up.

    Raises:
        ValueError: The index or the seed is below 0, or a side is below `SMALLEST_SIDE`.
    """
    raise_together(drawable(size), whole("index", index, 0), whole("seed", seed, 0))
    # torch's CPU generator reads 32 bits of its seed; an odd step visits each word once.
    dice = Generator().manual_seed((0x9E3779B1 * index + 0x85EBCA6B * seed) % 2**32)
    at = points(size)
    light = 2 * pi * between(0, 1, dice)
    image = background(at, dice)
    mask = torch.zeros(size, dtype=torch.uint8)
    for _ in range(whole_between(2, 6, dice)):
        label = whole_between(1, len(SHAPES), dice)
        image, covered = lay_shape(image, at, light, *SHAPES[CLASSES[label]], dice)
        mask[covered] = label
    image = image * (1 + between(0.1, 0.4, dice) * turned(at, light)[0])
    image = image + between(0.01, 0.03, dice) * torch.randn(3, *size, generator=dice)
    return Scene(image.clamp(0, 1), mask)


def background(at: Tensor, dice: Generator) -> Tensor:
    """What lies behind the shapes, ``(3, h, w)``: clouds over a gradient, some in bands."""
    h, w = at.shape[1:]
    slope = 0.5 + between(0.2, 0.6, dice) * turned(at, 2 * pi * between(0, 1, dice))[0]
    depth = between(0.3, 0.8, dice)
    octaves = [noise((4 * 2**k, 4 * 2**k), (h, w), dice) * depth**k for k in range(4)]
    clouds = torch.stack(octaves).sum(dim=0) / sum(depth**k for k in range(4))
    shade = torch.lerp(slope, clouds, between(0.4, 0.9, dice))
    if between(0, 1, dice) < 0.5:
        bands = turned(at, 2 * pi * between(0, 1, dice))[0] / between(0.12, 0.5, dice)
        shade = shade + between(0.1, 0.25, dice) * (2 * pi * (bands + clouds / 2)).sin()
    return mix(inks(dice), shade.clamp(0, 1))


def lay_shape(
    image: Tensor, at: Tensor, light: float, outline: Outline, texture: Texture, dice: Generator
) -> tuple[Tensor, Tensor]:
    """The image ``(3, h, w)`` with one more shape and its shadow, and where the shape lies.

    ``at`` are the pixels' `points`; ``light`` is the direction the light comes from, in radians.
    """
    h, w = image.shape[1:]
    radius, angle, knob = (
        between(0.14, 0.3, dice),
        2 * pi * between(0, 1, dice),
        between(0, 1, dice),
    )
    reach = torch.tensor((w, h)) / min(h, w) / 2 - 0.08  # the middle lies inside the image
    middle = rearrange((2 * torch.rand(2, generator=dice) - 1) * reach, "xy -> xy 1 1")
    here = at - middle
    away = torch.tensor((-cos(light), -sin(light))).mul(between(0.02, 0.05, dice))

    cast = outline(turned(here - rearrange(away, "xy -> xy 1 1"), angle) / radius, knob) * radius
    image = image * (1 - between(0.3, 0.5, dice) * (0.5 - cast / 0.06).clamp(0, 1))

    period = 0.04 * 2 ** between(0, 1, dice)  # in short sides: 6 to 13 pixels of 160
    grid = turned(at, 2 * pi * between(0, 1, dice)) / period + between(0, 1, dice)
    lit = 1 + 0.15 * turned(here, light)[0] / radius
    paint = mix(inks(dice), texture(grid, dice)) * lit
    distance = outline(turned(here, angle) / radius, knob) * radius * min(h, w)  # pixels
    return torch.lerp(image, paint, (0.5 - distance).clamp(0, 1)), distance < 0


def points(size: tuple[int, int]) -> Tensor:
    """The pixels' centres ``(2, h, w)`` as ``(x, y)`` from the image's middle, in short sides."""
    h, w = size
    y, x = ((torch.arange(side) + 0.5 - side / 2) / min(size) for side in size)
    return torch.stack((repeat(x, "w -> h w", h=h), repeat(y, "h -> h w", w=w)))


def turned(at: Tensor, angle: float) -> Tensor:
    """The points ``(2, h, w)`` in axes that are turned by an angle in radians."""
    x, y = at
    return torch.stack((cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x))


def noise(cells: tuple[int, int], size: tuple[int, int], dice: Generator) -> Tensor:
    """Smooth noise ``(h, w)`` around 0.5 that changes from cell to cell of a coarse grid."""
    values = rearrange(torch.rand(cells, generator=dice), "h w -> 1 1 h w")
    fine = functional.interpolate(values, size, mode="bicubic", align_corners=False)
    return rearrange(fine, "1 1 h w -> h w")


def inks(dice: Generator) -> Tensor:
    """Two colours ``(2, 3)``, RGB in [0, 1]: a warm light one and a cool dark one, either first.

    All shapes and backgrounds draw from one palette. Where each has a hue of its own, two views
    agree by colour, and a network pretrained on them learns nothing of the textures.
    """
    hues = torch.tensor([[between(-0.05, 0.17, dice)], [between(0.45, 0.75, dice)]])
    strengths = torch.tensor([[between(0.1, 0.45, dice)], [between(0.2, 0.7, dice)]])
    values = torch.tensor([[between(0.75, 0.95, dice)], [between(0.25, 0.4, dice)]])
    rgb = (2 * pi * (hues - torch.tensor((0, 1 / 3, 2 / 3)))).cos()
    pair = values * (1 - strengths * (1 - rgb) / 2)
    return pair.flip(0) if between(0, 1, dice) < 0.5 else pair


def mix(pair: Tensor, share: Tensor) -> Tensor:
    """The colours ``(3, h, w)`` from the first of two inks (0) to the second (1)."""
    first, second = rearrange(pair, "ink rgb -> ink rgb 1 1")
    return torch.lerp(first, second, share)


def between(low: float, high: float, dice: Generator) -> float:
    """A number drawn evenly from ``[low, high)``."""
    return low + (high - low) * torch.rand((), generator=dice).item()


def whole_between(low: int, high: int, dice: Generator) -> int:
    """A whole number drawn evenly from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=dice).item())


class Scenes(Dataset[Scene]):
    """Scenes 0 to ``count - 1``, drawn when asked for; size and seed as for `draw_scene`."""

    def __init__(self, count: int, size: tuple[int, int] = (160, 160), seed: int = 0) -> None:
        raise_together(drawable(size), whole("count", count, 1), whole("seed", seed, 0))
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        return draw_scene(range(self.count)[index], self.size, self.seed)


def save_scenes(
    folder: str | Path, count: Mapping[str, int], size: tuple[int, int] = (160, 160), seed: int = 0
) -> None:
    """Write scenes as a segmentation data set of PNG files.

    ``images/{split}/NAME.png`` are RGB, ``masks/{split}/NAME.png`` hold class ids, and each line of
    ``classes.txt`` is an id and its name. NAME is the scene's index: even in ``train`` and odd in
    ``val``, so that a scene is never in both and one split's count leaves the other as it is.

    Args:
        folder: Where to write; new or empty.
        count: Scenes per split, such as ``{"train": 400, "val": 100}``.
        size: As for `draw_scene`.
        seed: As for `draw_scene`.

    Raises:
        ValueError: A value is out of range, a split unknown, or the folder in use.
    """
    folder = Path(folder)
    raise_together(
        vacant(folder),
        *(one_of("split", split, SPLITS) for split in count),
        *(whole(f"count[{split!r}]", number, 1) for split, number in count.items()),
        drawable(size),
        whole("seed", seed, 0),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text(CLASSES_TEXT, encoding="utf-8")  # first: it is a mark, too
    for split, number in count.items():
        for kind in (IMAGES, MASKS):
            (folder / kind / split).mkdir(parents=True)
        for index in range(SPLITS.index(split), len(SPLITS) * number, len(SPLITS)):
            image, mask = draw_scene(index, size, seed)
            name = f"{split}/{index:06d}.png"
            to_pil_image((image * 255).round().to(torch.uint8)).save(folder / IMAGES / name)
            to_pil_image(mask).save(folder / MASKS / name)


def are_drawn(folder: str | Path) -> bool:
    """Whether `save_scenes` wrote a folder, or began to."""
    path = Path(folder) / "classes.txt"
    return path.is_file() and path.read_bytes() == CLASSES_TEXT.encode()


def drawable(size: object) -> str | None:
    """The complaint about a size that no scene can be drawn at."""
    sides = size if isinstance(size, (tuple, list)) else ()
    if len(sides) == 2 and all(whole("side", side, SMALLEST_SIDE) is None for side in sides):
        return None
    return (
        f"size is {size!r}; it must be (height, width), whole numbers of at least {SMALLEST_SIDE} "
        "pixels, such as (160, 160)"
    )


def vacant(folder: Path) -> str | None:
    """The complaint about a folder that is there and is not empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    return f"folder is {str(folder)!r}, which is in use; it must be new or empty, so name another"
