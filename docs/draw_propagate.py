"""Draw the picture that opens the README: the method at a glance, one direction of it.

python docs/draw_propagate.py [OUT]

The scene, the crops, the matches and the likeness are computed, not painted: the crops are cut and
matched by the package itself.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from einops import rearrange, reduce
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from numpy import ndindex
from torch import Tensor
from torch.nn import functional

from pixel_level_contrastive_learning.demo.scenes import draw_scene
from pixel_level_contrastive_learning.geometry import box_to_map, cell_centres, positive_mask
from pixel_level_contrastive_learning.views import cut_views

WIDTH, HEIGHT = 2000, 900  # pixels, and the units of everything drawn here
DPI = 200
INK, GRAY, PALE, LINE = "#1c2430", "#667085", "#f3f5f9", "#c3cad6"
ONE, TWO = "#2563eb", "#e8590c"
GRID = (7, 7)
SCENE, SOURCE = 615, (560, 420)
BOXES = torch.tensor([[58.0, 216, 358, 516], [140.0, 142, 396, 398]])
MIRRORED = torch.tensor([False, True])
VIEW = 280  # side of a view
ONLINE, TARGET = 312, 700  # heights of the two branches
VIEWS = ((556, ONLINE - VIEW / 2), (556, TARGET - VIEW / 2))  # upper left corners
CELL = 32  # whose propagation is shown
MAP = 196  # side of a feature map in step 4
MAPS = ((1692, ONLINE - MAP / 2), (1692, TARGET - MAP / 2))
Point = tuple[float, float]


# Strokes.


def write(axes: Axes, at: Point, text: str, size: float = 25, color: str = INK, **more) -> None:
    """Text of this height in pixels, centred on a point unless told otherwise."""
    style = {"ha": "center", "va": "center", "fontsize": size * 72 / DPI, "color": color}
    axes.text(*at, text, **{**style, **more})


def heading(axes: Axes, x: float, number: int, title: str, subtitle: str) -> None:
    """A step of the method: its number, its name, and what it is about."""
    axes.add_patch(Circle((x + 22, 56), 22, color=INK))
    write(axes, (x + 22, 57), str(number), 26, "white", weight="bold")
    write(axes, (x + 60, 56), title, 31, weight="bold", ha="left")
    write(axes, (x + 60, 98), subtitle, 24, GRAY, ha="left")


def arrow(axes: Axes, start: Point, stop: Point, color: str = INK, bend: float = 0, **more) -> None:
    """An arrow from point to point."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    style |= {"connectionstyle": f"arc3,rad={bend}", "joinstyle": "miter"}
    axes.add_patch(FancyArrowPatch(start, stop, color=color, **{**style, **more}))


def line(axes: Axes, start: Point, stop: Point, color: str, width: float = 1.6, **more) -> None:
    """A line from point to point with a white rim, so that it shows on a picture."""
    for lw, shade in ((width + 1.4, "white"), (width, color)):
        axes.plot(*zip(start, stop, strict=True), color=shade, lw=lw, **more)


def block(axes: Axes, middle: Point, size: Point, text: str, fill: str, height: float = 24) -> None:
    """A rounded box with a name in it."""
    (x, y), (w, h) = middle, size
    box = (x - w / 2 + 10, y - h / 2 + 10), w - 20, h - 20
    axes.add_patch(FancyBboxPatch(*box, "round,pad=10", fc=fill, ec=INK, lw=1.2, zorder=5))
    write(axes, middle, text, height, zorder=6)


def funnel(axes: Axes, middle: Point, size: Point, text: str, fill: str) -> None:
    """A network that makes an image small: a box that narrows to the right."""
    (x, y), (w, h) = middle, size
    corners = [(x - w / 2, y - h / 2), (x + w / 2, y - h / 3.6), (x + w / 2, y + h / 3.6)]
    corners.append((x - w / 2, y + h / 2))
    axes.add_patch(Polygon(corners, fc=fill, ec=INK, lw=1.2, joinstyle="round"))
    write(axes, middle, text)


def picture(axes: Axes, image: Tensor, box: tuple, frame: str, width: float = 2.4) -> None:
    """An image ``(3, h, w)`` in a box ``(x0, y0, x1, y1)`` with a frame."""
    x0, y0, x1, y1 = box
    coarse = (image.clamp(0, 1) * 40).round() / 40  # noise that nobody sees doubles the file
    pixels = rearrange(coarse, "c h w -> h w c").numpy()
    axes.imshow(pixels, extent=(x0, x1, y1, y0), interpolation="nearest")
    shape = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=frame, lw=width, zorder=2)
    axes.add_patch(shape)


def square(corner: Point, side: float) -> tuple[float, float, float, float]:
    """A square's box from its upper left corner."""
    return (*corner, corner[0] + side, corner[1] + side)


def middles(corner: Point, side: float) -> list[Point]:
    """The middles of the cells, row by row, of a square picture of a feature map."""
    x, y = corner
    step = side / GRID[1]
    return [(x + step * (i + 0.5), y + step * (j + 0.5)) for j, i in ndindex(GRID)]


def cells(axes: Axes, corner: Point, side: float, fills: list, edge: tuple) -> None:
    """The cells of a feature map, each in its fill."""
    step = side / GRID[1]
    for (x, y), fill in zip(middles(corner, side), fills, strict=True):
        low = (x - step / 2, y - step / 2)
        axes.add_patch(Rectangle(low, step, step, fc=fill, ec=edge, lw=0.6))


def dots(axes: Axes, corner: Point, side: float, hues: list, matched: Tensor) -> None:
    """A dot in each cell that has a match, in the colour of its place."""
    for centre, hue, is_matched in zip(middles(corner, side), hues, matched, strict=True):
        if is_matched:
            axes.add_patch(Circle(centre, 8.5, fc=hue, ec="white", lw=0.9, zorder=4))


# What is computed.


def place_colours(centres: Tensor) -> list:
    """A colour for each place ``(n, 2)`` in the source: hue to the right, darker down."""
    low, high = BOXES[:, :2].amax(dim=0), BOXES[:, 2:].amin(dim=0)
    x, y = ((centres - low) / (high - low)).clamp(0, 1).T
    return list(hsv_to_rgb(torch.stack(((1.14 - 0.28 * x) % 1, 0.75 + 0.1 * y, 1 - 0.35 * y), -1)))


def patches(view: Tensor) -> Tensor:
    """The pixels ``(n, p, 3)`` of each cell of a view ``(3, h, w)``."""
    return rearrange(view, "c (h y) (w x) -> (h w) (y x) c", h=GRID[0], w=GRID[1])


def likeness(view: Tensor) -> Tensor:
    """How much each cell resembles each, ``(n, n)``: ``relu(cos) ** 2`` as in the module.

    A stand-in for what a network sees: hue and spread of a cell, less the average cell's.
    """
    mean, spread = patches(view).mean(dim=1), patches(view).std(dim=1)
    features = torch.cat((6 * mean / mean.sum(dim=-1, keepdim=True), spread), dim=-1)
    features = functional.normalize(features - features.mean(dim=0), dim=-1)
    return (features @ features.T).clamp(0, 1).square()


def chosen_pairs(matches: Tensor) -> list[tuple[int, int]]:
    """Some matches ``(i, j)`` to draw as lines, spread over the overlap."""
    rows = [row for row in range(len(matches)) if matches[row].any()]
    return [(i, int(matches[i].nonzero()[0])) for i in rows[1::8]]


# The steps.


def draw_source(axes: Axes, source: Tensor) -> None:
    """Step 1: the image, and the two crops in it."""
    heading(axes, 40, 1, "Cut two views", "each knows where it lies")
    (height, width), left = SOURCE, 40
    top = (ONLINE + TARGET - height) / 2
    picture(axes, source, (left, top, left + width, top + height), LINE, 0.8)
    write(axes, (left + width / 2, top - 24), "image", 25, GRAY, weight="bold")
    starts = BOXES[0, [2, 1]], BOXES[1, [2, 3]]  # the corners the arrows leave from
    for box, start, color, corner in zip(BOXES.tolist(), starts, (ONE, TWO), VIEWS, strict=True):
        x0, y0, x1, y1 = box
        for lw, shade in ((3.6, "white"), (2.2, color)):
            shape = Rectangle((left + x0, top + y0), x1 - x0, y1 - y0, fill=False, ec=shade, lw=lw)
            axes.add_patch(shape)
        start = (left + float(start[0]), top + float(start[1]))
        arrow(axes, start, (corner[0] - 8, corner[1] + VIEW / 2), color, lw=1.6)


def draw_views(axes: Axes, views: tuple, matches: Tensor, colours: list) -> None:
    """Step 2: the views, the cells of their feature maps, and which of them match."""
    heading(axes, 500, 2, "Match pixels", "closer than 0.7 cell diagonals")
    names = ("view one", "view two, flipped")
    matched = matches.any(dim=1), matches.any(dim=0)
    for view, corner, color, name, mask, hues in zip(
        views, VIEWS, (ONE, TWO), names, matched, colours, strict=True
    ):
        picture(axes, view, square(corner, VIEW), color)
        cells(axes, corner, VIEW, [(1, 1, 1, 0.1 if h else 0.65) for h in mask], (1, 1, 1, 0.7))
        dots(axes, corner, VIEW, hues, mask)
        above = corner[1] - 22 if color == ONE else corner[1] + VIEW + 26
        write(axes, (corner[0] + VIEW / 2, above), name, 24, color, weight="bold")
    link(axes, VIEWS, VIEW, matches, colours[0])


def link(axes: Axes, corners: tuple, side: float, matches: Tensor, hues: list) -> None:
    """Lines between some matched cells of two maps."""
    one, two = (middles(corner, side) for corner in corners)
    for i, j in chosen_pairs(matches):
        line(axes, one[i], two[j], hues[i], zorder=3)
        for end in (one[i], two[j]):
            axes.add_patch(Circle(end, 8.5, fc=hues[i], ec="white", lw=0.9, zorder=4))


def draw_branches(axes: Axes, one: Tensor) -> None:
    """Step 3: online network with pixel propagation, target network without gradient."""
    heading(axes, 950, 3, "Propagate", "each pixel gathers from the pixels like it")
    for y, fill, name, side in ((ONLINE, "white", "online", -1), (TARGET, PALE, "target", 1)):
        arrow(axes, (VIEWS[0][0] + VIEW + 8, y), (928, y))
        funnel(axes, (1005, y), (150, 130), "backbone", fill)
        arrow(axes, (1080, y), (1116, y))
        block(axes, (1185, y), (134, 72), "projector", fill)
        write(axes, (1095, y + side * 92), f"{name} network", 25, weight="bold")
    for x in (1005, 1185):
        arrow(axes, (x, ONLINE + 72), (x, TARGET - 72), GRAY, linestyle=(0, (3, 2)))
    write(axes, (1095, 506), "moving\naverage", 24, GRAY, linespacing=1.3)
    arrow(axes, (1252, ONLINE), (1310, ONLINE))
    arrow(axes, (1252, TARGET), (MAPS[1][0] - 8, TARGET))
    for x in (1422, 1436):
        line(axes, (x - 8, TARGET + 22), (x + 8, TARGET - 22), INK, 1.5)
    write(axes, (1429, TARGET + 50), "stop-gradient", 24, GRAY)
    draw_propagation(axes, one)


def draw_propagation(axes: Axes, one: Tensor) -> None:
    """What the pixel propagation module does for one pixel of view one."""
    side, corner = 210, (1318, ONLINE - 105)
    small = functional.interpolate(one[None], (side, side), mode="area")[0]
    picture(axes, small, square(corner, side), INK, 1.4)
    like = likeness(one)[CELL]
    veils = [(1, 1, 1, 0.94 * (1 - similarity)) for similarity in like.sqrt().tolist()]
    cells(axes, corner, side, veils, (1, 1, 1, 0.5))
    places = middles(corner, side)
    for j in (like > 0.3).nonzero().flatten().tolist():
        line(axes, places[j], places[CELL], INK, 1.2, zorder=3)
    axes.add_patch(Circle(places[CELL], 11, fc=ONE, ec="white", lw=1.4, zorder=4))
    write(axes, (corner[0] + side / 2, corner[1] - 26), "pixel propagation", 25, weight="bold")
    formula = r"$y_i=\sum_j\,\mathrm{relu}(\cos(x_i,x_j))^{\gamma}\;g(x_j)$"
    write(axes, (corner[0] + side / 2, corner[1] + side + 52), formula, 27)
    arrow(axes, (corner[0] + side + 8, ONLINE), (MAPS[0][0] - 8, ONLINE))


def draw_loss(axes: Axes, matches: Tensor, colours: list) -> None:
    """Step 4: the matched pixels agree."""
    heading(axes, 1630, 4, "Agree", "pixel by matched pixel")
    matched = matches.any(dim=1), matches.any(dim=0)
    for corner, color, name, mask, hues in zip(
        MAPS, (ONE, TWO), ("$y$", "$x'$"), matched, colours, strict=True
    ):
        fills = [hue if h else PALE for hue, h in zip(hues, mask, strict=True)]
        cells(axes, corner, MAP, fills, (1, 1, 1, 1))
        axes.add_patch(Rectangle(corner, MAP, MAP, fill=False, ec=color, lw=2.4))
        write(axes, (corner[0] + MAP + 34, corner[1] + MAP / 2), name, 36)
    link(axes, MAPS, MAP, matches, [INK] * len(matches))
    middle = MAPS[0][0] + MAP / 2
    block(axes, (middle, 506), (300, 116), "", "white")
    write(axes, (middle, 486), "$2-2\\,\\cos(y_i,\\,x'_j)$", 34, zorder=6)
    write(axes, (middle, 534), "+ views swapped", 24, GRAY, zorder=6)


def draw_instance(axes: Axes) -> None:
    """The small branch beside: one vector a view."""
    y = 852
    axes.add_patch(FancyBboxPatch((950, y - 24), 990, 48, "round,pad=10", fc=PALE, ec="none"))
    write(axes, (958, y), "Beside it, per image:", 23, GRAY, ha="left")
    for x, w, name in ((1290, 86, "pool"), (1438, 130, "projector"), (1606, 130, "predictor")):
        block(axes, (x, y), (w, 46), name, "white", 22)
    for x in (1333, 1503, 1671):
        arrow(axes, (x, y), (x + 38, y))
    write(axes, (1826, y), "$2-2\\,\\cos(q,\\,z')$", 26)


def draw(out: Path) -> None:
    """Compute the views and their matches, and draw them into ``out``."""
    big = draw_scene(SCENE, (4 * SOURCE[0], 4 * SOURCE[1])).image
    source = reduce(big, "c (h 4) (w 4) -> c h w", "mean")
    to_image = box_to_map(BOXES, MIRRORED)
    one, two = cut_views(source.expand(2, -1, -1, -1), to_image, (VIEW, VIEW))
    two = two.roll(1, dims=0).lerp(two, 0.55) * 1.05  # the colour change of an augmentation
    matches = positive_mask(to_image[:1], to_image[1:], GRID, GRID, 0.7)[0]
    colours = [place_colours(centres) for centres in cell_centres(to_image, GRID)]

    figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    draw_source(axes, source)
    draw_views(axes, (one, two), matches, colours)
    draw_branches(axes, one)
    draw_loss(axes, matches, colours)
    draw_instance(axes)
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="auto")
    axes.axis("off")
    figure.savefig(out, dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    mpl.use("agg")
    mpl.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "propagate.png")
