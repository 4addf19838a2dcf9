"""Drawn scenes with masks, for the demo and the tests.

A scene is some shapes on a background, lying over each other in one light. Each class has an
outline and a family of textures; colour, contrast, scale and direction are drawn anew for each
shape from the same ranges for all classes, so that texture tells the class and colour does not.
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
from torchvision.transforms.functional import to_pil_image

from ..checks import one_of, raise_together, whole
from ..data.folders import IMAGES, MASKS

SPLITS = ("train", "val")
MIN_SIDE = 32  # below it a texture's period is less than two pixels


class Scene(NamedTuple):
    """A drawn image and its mask.

    Attributes:
        image: ``(3, h, w)`` float32 RGB in [0, 1].
        mask: ``(h, w)`` uint8 class ids, positions in `CLASSES`.
    """

    image: Tensor
    mask: Tensor


# Outlines: points (2, h, w) in radii of the shape, and a proportion in [0, 1] -> signed distance
# (h, w) to the outline in radii, below 0 inside.


def disc(xy: Tensor, proportion: float) -> Tensor:
    """An ellipse, from round to 3:4 (its distance is exact on the outline only)."""
    return radius(xy, 1 + proportion / 3) - 0.9


def rectangle(xy: Tensor, proportion: float) -> Tensor:
    """A rectangle, from square to 1:2."""
    return box(xy, 0.85, 0.85 - 0.42 * proportion)


def triangle(xy: Tensor, proportion: float) -> Tensor:
    """A triangle of equal sides, its corners cut by up to a sixth of the side."""
    sides, corners = (
        torch.stack([rotate(xy, start + k * 2 * pi / 3)[0] for k in range(3)]).amax(dim=0)
        for start in (0.0, pi)
    )
    return torch.maximum(sides - 0.6, corners - (1.2 - 0.3 * proportion))


def ring(xy: Tensor, proportion: float) -> Tensor:
    """A ring, its band from a third to half a radius wide."""
    half = 0.17 + 0.08 * proportion
    return (radius(xy) - (0.95 - half)).abs() - half


def star(xy: Tensor, proportion: float) -> Tensor:
    """A star of five points, from slender to stout."""
    fold = 2 * pi / 5
    angle = torch.atan2(xy[1], xy[0]).remainder(fold) - fold / 2
    x, y = radius(xy) * angle.cos(), radius(xy) * angle.sin().abs()
    valley = 0.5 + 0.16 * proportion
    # The edge from the point (1.1, 0) to the valley, half a fold further round.
    run, rise = valley * cos(fold / 2) - 1.1, valley * sin(fold / 2)
    return ((x - 1.1) * rise - y * run) / hypot(run, rise)


def cross(xy: Tensor, proportion: float) -> Tensor:
    """A cross of two bars, from slender to stout."""
    width = 0.28 + 0.14 * proportion
    return torch.minimum(box(xy, 1.0, width), box(xy, width, 1.0))


def radius(xy: Tensor, flat: float = 1.0) -> Tensor:
    """Distance from the middle, the height counted ``flat`` times."""
    return torch.hypot(xy[0], flat * xy[1])


def box(xy: Tensor, width: float, height: float) -> Tensor:
    """Signed distance to a box of these half sides, along the axes."""
    return torch.maximum(xy[0].abs() - width, xy[1].abs() - height)


# Textures: points (2, h, w) in periods of the pattern -> (h, w), 0 first colour, 1 second colour.


def dots(xy: Tensor, gen: Generator) -> Tensor:
    """Dots on a square lattice."""
    return soft_step(uniform(0.26, 0.36, gen) - radius(xy.remainder(1) - 0.5))


def stripes(xy: Tensor, gen: Generator) -> Tensor:
    """Straight stripes."""
    return soft_step((2 * pi * xy[0]).sin() / 4 + uniform(-0.08, 0.08, gen))


def squares(xy: Tensor, gen: Generator) -> Tensor:
    """A board of squares, the dark ones a little larger or smaller than the light ones."""
    board = (pi * xy[0]).sin() * (pi * xy[1]).sin()
    return soft_step(board / 3 + uniform(-0.03, 0.03, gen))


def waves(xy: Tensor, gen: Generator) -> Tensor:
    """Lines that swing from side to side."""
    swing = uniform(0.3, 0.45, gen) * (2 * pi * xy[1] / uniform(1.8, 2.6, gen)).sin()
    return soft_step((2 * pi * (xy[0] + swing)).sin() / 4)


def grain(xy: Tensor, gen: Generator) -> Tensor:
    """Blotches without order."""
    h, w = xy.shape[1:]
    across = (xy[:, 0, -1] - xy[:, 0, 0]).norm().item() * w / (w - 1)  # periods, edge to edge
    cells = max(2, round(1.6 * across * h / w)), max(2, round(1.6 * across))
    return soft_step(noise(cells, (h, w), gen) - uniform(0.45, 0.55, gen))


def bricks(xy: Tensor, gen: Generator) -> Tensor:
    """Bricks twice as long as high, each row shifted by half a brick, in joints."""
    row = xy[1].floor()
    along = (xy[0] / 2 + row / 2).remainder(1)
    joint = torch.minimum(1 - (2 * along - 1).abs(), 0.5 - ((xy[1] - row) - 0.5).abs())
    return soft_step(uniform(0.1, 0.16, gen) - joint)


def soft_step(level: Tensor) -> Tensor:
    """0 below zero, 1 above, with a short slope between."""
    return (6 * level + 0.5).clamp(0, 1)


Outline = Callable[[Tensor, float], Tensor]
Texture = Callable[[Tensor, Generator], Tensor]
SHAPES: dict[str, tuple[Outline, Texture]] = {
    "disc": (disc, dots),
    "rectangle": (rectangle, stripes),
    "triangle": (triangle, squares),
    "ring": (ring, waves),
    "star": (star, grain),
    "cross": (cross, bricks),
}
CLASSES: tuple[str, ...] = ("background", *SHAPES)
"""The classes' names; a class id in a mask is a position in it."""
CLASSES_FILE = "classes.txt"
CLASSES_TEXT = "".join(f"{label} {name}\n" for label, name in enumerate(CLASSES))
"""What `CLASSES_FILE` holds."""


def draw_scene(index: int, size: tuple[int, int] = (160, 160), seed: int = 0) -> Scene:
    """Draw the scene of this number: the same arguments give the same bits.

    Args:
        index: Which scene of the seed, from 0 up; no two below 2**32 are drawn alike.
        size: ``(height, width)`` in pixels, at least 32 a side.
        seed: Which series of scenes, from 0 up.

    Raises:
        ValueError: A value out of range.

    >>> image, mask = draw_scene(0, size=(96, 128))
    >>> image.shape, mask.unique().tolist()
    (torch.Size([3, 96, 128]), [0, 3, 5, 6])
    """
    raise_together(drawable_size(size), whole("index", index, 0), whole("seed", seed, 0))
    # torch's CPU generator reads 32 bits of its seed; an odd step visits each word once.
    gen = Generator().manual_seed((0x9E3779B1 * index + 0x85EBCA6B * seed) % 2**32)
    xy = pixel_centres(size)
    light = 2 * pi * uniform(0, 1, gen)
    image = draw_background(xy, gen)
    mask = torch.zeros(size, dtype=torch.uint8)
    for _ in range(randint(2, 6, gen)):
        label = randint(1, len(SHAPES), gen)
        image, covered = draw_shape(image, xy, light, *SHAPES[CLASSES[label]], gen)
        mask[covered] = label
    image = image * (1 + uniform(0.1, 0.4, gen) * rotate(xy, light)[0])
    image = image + uniform(0.01, 0.03, gen) * torch.randn(3, *size, generator=gen)
    return Scene(image.clamp(0, 1), mask)


def draw_background(xy: Tensor, gen: Generator) -> Tensor:
    """What lies behind the shapes, ``(3, h, w)``: clouds over a gradient, some in bands."""
    h, w = xy.shape[1:]
    slope = 0.5 + uniform(0.2, 0.6, gen) * rotate(xy, 2 * pi * uniform(0, 1, gen))[0]
    depth = uniform(0.3, 0.8, gen)
    octaves = [noise((4 * 2**k, 4 * 2**k), (h, w), gen) * depth**k for k in range(4)]
    clouds = torch.stack(octaves).sum(dim=0) / sum(depth**k for k in range(4))
    shade = torch.lerp(slope, clouds, uniform(0.4, 0.9, gen))
    if uniform(0, 1, gen) < 0.5:
        bands = rotate(xy, 2 * pi * uniform(0, 1, gen))[0] / uniform(0.12, 0.5, gen)
        shade = shade + uniform(0.1, 0.25, gen) * (2 * pi * (bands + clouds / 2)).sin()
    return blend(two_colours(gen), shade.clamp(0, 1))


def draw_shape(
    image: Tensor, xy: Tensor, light: float, outline: Outline, texture: Texture, gen: Generator
) -> tuple[Tensor, Tensor]:
    """The image with one more shape and its shadow, and where the shape lies; light in radians."""
    h, w = image.shape[1:]
    size = uniform(0.14, 0.3, gen)
    angle, proportion = 2 * pi * uniform(0, 1, gen), uniform(0, 1, gen)
    reach = torch.tensor((w, h)) / min(h, w) / 2 - 0.08  # the middle lies inside the image
    middle = rearrange((2 * torch.rand(2, generator=gen) - 1) * reach, "xy -> xy 1 1")
    here = xy - middle
    away = torch.tensor((-cos(light), -sin(light))).mul(uniform(0.02, 0.05, gen))

    cast = outline(rotate(here - rearrange(away, "xy -> xy 1 1"), angle) / size, proportion) * size
    image = image * (1 - uniform(0.3, 0.5, gen) * (0.5 - cast / 0.06).clamp(0, 1))

    period = 0.04 * 2 ** uniform(0, 1, gen)  # in short sides: 6 to 13 pixels of 160
    pattern = rotate(xy, 2 * pi * uniform(0, 1, gen)) / period + uniform(0, 1, gen)
    lit = 1 + 0.15 * rotate(here, light)[0] / size
    paint = blend(two_colours(gen), texture(pattern, gen)) * lit
    distance = outline(rotate(here, angle) / size, proportion) * size * min(h, w)  # pixels
    return torch.lerp(image, paint, (0.5 - distance).clamp(0, 1)), distance < 0


def pixel_centres(size: tuple[int, int]) -> Tensor:
    """The pixels' centres ``(2, h, w)`` as ``(x, y)`` from the image's middle, in short sides."""
    h, w = size
    y, x = ((torch.arange(side) + 0.5 - side / 2) / min(size) for side in size)
    return torch.stack((repeat(x, "w -> h w", h=h), repeat(y, "h -> h w", w=w)))


def rotate(xy: Tensor, angle: float) -> Tensor:
    """The points ``(2, h, w)`` in axes that are rotated by an angle in radians."""
    x, y = xy
    return torch.stack((cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x))


def noise(cells: tuple[int, int], size: tuple[int, int], gen: Generator) -> Tensor:
    """Smooth noise ``(h, w)`` around 0.5 that changes from cell to cell of a coarse grid."""
    values = rearrange(torch.rand(cells, generator=gen), "h w -> 1 1 h w")
    fine = functional.interpolate(values, size, mode="bicubic", align_corners=False)
    return rearrange(fine, "1 1 h w -> h w")


def two_colours(gen: Generator) -> Tensor:
    """Two colours ``(2, 3)``, RGB in [0, 1]: a warm light one and a cool dark one, either first."""
    # One palette for all: where a class has a hue of its own, two views agree by colour, and a
    # network pretrained on them learns nothing of the textures.
    hues = torch.tensor([[uniform(-0.05, 0.17, gen)], [uniform(0.45, 0.75, gen)]])
    saturations = torch.tensor([[uniform(0.1, 0.45, gen)], [uniform(0.2, 0.7, gen)]])
    values = torch.tensor([[uniform(0.75, 0.95, gen)], [uniform(0.25, 0.4, gen)]])
    rgb = (2 * pi * (hues - torch.tensor((0, 1 / 3, 2 / 3)))).cos()
    pair = values * (1 - saturations * (1 - rgb) / 2)
    return pair.flip(0) if uniform(0, 1, gen) < 0.5 else pair


def blend(pair: Tensor, share: Tensor) -> Tensor:
    """The colours ``(3, h, w)`` from the first of two (share 0) to the second (1)."""
    first, second = rearrange(pair, "colour rgb -> colour rgb 1 1")
    return torch.lerp(first, second, share)


def uniform(low: float, high: float, gen: Generator) -> float:
    """A number from ``[low, high)``."""
    return low + (high - low) * torch.rand((), generator=gen).item()


def randint(low: int, high: int, gen: Generator) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=gen).item())


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
    in_use = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    raise_together(
        f"folder is {str(folder)!r}, which is in use; name a new or empty one" if in_use else None,
        *(one_of("split", split, SPLITS) for split in count),
        *(whole(f"count[{split!r}]", number, 1) for split, number in count.items()),
        drawable_size(size),
        whole("seed", seed, 0),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLASSES_FILE).write_text(CLASSES_TEXT, encoding="utf-8")  # first: it marks the folder
    for split, number in count.items():
        for kind in (IMAGES, MASKS):
            (folder / kind / split).mkdir(parents=True)
        for index in range(SPLITS.index(split), len(SPLITS) * number, len(SPLITS)):
            image, mask = draw_scene(index, size, seed)
            name = f"{split}/{index:06d}.png"
            to_pil_image((image * 255).round().to(torch.uint8)).save(folder / IMAGES / name)
            to_pil_image(mask).save(folder / MASKS / name)


def drawable_size(size: object) -> str | None:
    """Allow sizes that a scene can be drawn at."""
    sides = size if isinstance(size, (tuple, list)) else ()
    if len(sides) == 2 and all(whole("side", side, MIN_SIDE) is None for side in sides):
        return None
    return (
        f"size is {size!r}; it must be (height, width), whole numbers of at least {MIN_SIDE} "
        "pixels, such as (160, 160)"
    )
