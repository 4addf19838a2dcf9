"""The method as slow plain loops, one line for each thought of the paper.

Propagate Yourself (PixPro), Xie et al., CVPR 2021, arXiv:2011.10043. Written from the paper and the
conventions of the guide, apart from the package, so that the two can be held against each other.
Geometry is computed in Python floats and comes back as float64; losses and propagation keep the
dtype and the graph of what they get. The ``plain_`` forms at the end say the same with whole
``(b, n, n)`` tensors: quadratic memory, fast enough for maps on which loops are hopeless.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6
"""The least length that ``unit`` divides by."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far the package may stray from these loops, relative and absolute."""

Grid = tuple[int, int]


# Where views look: sec. 3.1, which warps the pixels of both views to the original image.


def view_map(
    size: tuple[int, int],
    ratio: float = 1.0,
    x: float = 0.5,
    y: float = 0.5,
    mirrored: bool = False,
    flipped: bool = False,
    degrees: float = 0.0,
    shear: float = 0.0,
) -> Tensor:
    """The ``(2, 3)`` float64 map of a crop that is flipped, sheared, then turned about its centre.

    An affine map is known by where three corners go, so three corners are followed.

    Args:
        size: ``(height, width)`` of the source image, in pixels.
        ratio: Side of the crop as a share of the image's side, above 0.
        x: Place of the crop, 0 (left) to 1 (right).
        y: Place of the crop, 0 (top) to 1 (bottom).
        mirrored: Left and right are swapped.
        flipped: Top and bottom are swapped.
        degrees: Turn from the x axis towards the y axis, clockwise to the eye since y points down.
        shear: Pixels moved to the right per pixel downwards.
    """
    height, width = size
    centre_x = width * (x * (1 - ratio) + ratio / 2)
    centre_y = height * (y * (1 - ratio) + ratio / 2)
    angle = math.radians(degrees)

    def follow(u: float, v: float) -> tuple[float, float]:
        right = (0.5 - u if mirrored else u - 0.5) * width * ratio
        down = (0.5 - v if flipped else v - 0.5) * height * ratio
        right = right + shear * down
        turned_right = right * math.cos(angle) - down * math.sin(angle)
        turned_down = right * math.sin(angle) + down * math.cos(angle)
        return centre_x + turned_right, centre_y + turned_down

    origin, end_of_u, end_of_v = follow(0, 0), follow(1, 0), follow(0, 1)
    rows = [[end_of_u[k] - origin[k], end_of_v[k] - origin[k], origin[k]] for k in (0, 1)]
    return torch.tensor(rows, dtype=torch.float64)


def box_to_map(boxes: Tensor, mirrored: Tensor) -> Tensor:
    """``(b, 2, 3)`` float64 maps of boxes ``(b, 4)``, from right to left where ``mirrored``."""
    maps = []
    for (x0, y0, x1, y1), swapped in zip(boxes.tolist(), mirrored.tolist(), strict=True):
        left, right = (x1, x0) if swapped else (x0, x1)
        maps.append([[right - left, 0.0, left], [0.0, y1 - y0, y0]])
    return torch.tensor(maps, dtype=torch.float64)


def cell_centres(to_image: Tensor, grid: Grid) -> Tensor:
    """``(b, h * w, 2)`` float64 centres ``(x, y)`` in source pixels, row by row."""
    h, w = grid
    images = []
    for (xu, xv, x0), (yu, yv, y0) in to_image.tolist():
        centres = []
        for row in range(h):
            for column in range(w):
                u, v = (column + 0.5) / w, (row + 0.5) / h
                centres.append([xu * u + xv * v + x0, yu * u + yv * v + y0])
        images.append(centres)
    return torch.tensor(images, dtype=torch.float64)


def cell_diagonals(to_image: Tensor, grid: Grid) -> Tensor:
    """``(b,)`` float64 root mean square of a cell's two diagonals, which are one unless sheared."""
    h, w = grid
    images = []
    for (xu, xv, _), (yu, yv, _) in to_image.tolist():
        falling = math.hypot(xu / w + xv / h, yu / w + yv / h)
        rising = math.hypot(xu / w - xv / h, yu / w - yv / h)
        images.append(math.sqrt((falling**2 + rising**2) / 2))
    return torch.tensor(images, dtype=torch.float64)


def distances(one: Tensor, two: Tensor, grid_one: Grid, grid_two: Grid) -> Tensor:
    """``(b, n1, n2)`` float64 distances of cells, in diagonals of the larger of the two cells.

    Sec. 3.1 counts in diagonals of a feature map bin, so that views of any scale can be compared.
    """
    centres_one, centres_two = cell_centres(one, grid_one), cell_centres(two, grid_two)
    diagonals_one, diagonals_two = cell_diagonals(one, grid_one), cell_diagonals(two, grid_two)
    images = []
    for image in range(len(one)):
        diagonal = max(diagonals_one[image].item(), diagonals_two[image].item())
        rows = []
        for from_point in centres_one[image].tolist():
            row = []
            for to_point in centres_two[image].tolist():
                row.append(math.dist(from_point, to_point) / diagonal)
            rows.append(row)
        images.append(rows)
    return torch.tensor(images, dtype=torch.float64)


def positive_mask(
    one: Tensor, two: Tensor, grid_one: Grid, grid_two: Grid, threshold: float
) -> Tensor:
    """``(b, n1, n2)`` bool, the pairs ``A(i, j) = 1`` of sec. 3.1, Eq. 1.

    A pair exactly at the threshold is not one, as in the authors' code (the paper writes ``<=``).
    """
    return distances(one, two, grid_one, grid_two) < threshold


# What the network learns from: sec. 3.1, Eq. 2, and sec. 3.2, Eq. 3-5.


def unit(x: Tensor, dim: int) -> Tensor:
    """``x`` with its vectors along ``dim`` scaled to length 1; a vector of zeros stays as it is."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(EPSILON)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of two vectors ``(d,)``, as a scalar."""
    return torch.dot(unit(a, 0), unit(b, 0))


def propagate(x: Tensor, transform: Callable[[Tensor], Tensor], gamma: float) -> Tensor:
    """Pixel propagation of maps ``(b, c, h, w)``: sec. 3.2, Eq. 3 and 4.

    ``y_i = sum_j relu(cos(x_i, x_j)) ** gamma * g(x_j)`` over all pixels ``j`` of the map, ``i``
    among them. ``transform`` is ``g``; its output is scaled to length 1, as in the authors' code.
    """
    b, _, h, w = x.shape
    transformed = transform(x)
    images = []
    for image in range(b):
        pixels = [x[image, :, row, column] for row in range(h) for column in range(w)]
        values = [transformed[image, :, row, column] for row in range(h) for column in range(w)]
        values = [unit(value, 0) for value in values]
        smoothed = []
        for pixel in pixels:
            total = torch.zeros_like(values[0])
            for other, value in zip(pixels, values, strict=True):
                likeness = cosine(pixel, other).clamp_min(0) ** gamma
                total = total + likeness * value
            smoothed.append(total)
        images.append(torch.stack(smoothed, dim=-1).reshape(-1, h, w))
    return torch.stack(images)


def pixpro_loss(propagated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """One direction of sec. 3.2, Eq. 5, as ``2 - 2 cos`` so that it lies in [0, 4].

    Per image the mean over its positive pairs, 0 without any; then the mean over the batch.
    """
    images = []
    for y, z, positive in zip(propagated, target, mask, strict=True):
        cosines = []
        for i in range(y.shape[1]):
            for j in range(z.shape[1]):
                if positive[i, j]:
                    cosines.append(cosine(y[:, i], z[:, j]))
        if cosines:
            images.append(2 - 2 * sum(cosines) / len(cosines))
        else:
            images.append(y.sum() * 0 + z.sum() * 0)
    return sum(images) / len(images)


def pixcontrast_loss(online: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """One direction of sec. 3.1, Eq. 2.

    Per pixel with at least one positive ``-log(sum_pos exp(cos / t) / sum_all exp(cos / t))``; the
    mean over such pixels of an image, 0 without any; then the mean over the batch.
    """
    images = []
    for x, z, positive in zip(online, target, mask, strict=True):
        pixels = []
        for i in range(x.shape[1]):
            alike, everything = 0, 0
            for j in range(z.shape[1]):
                weight = (cosine(x[:, i], z[:, j]) / temperature).exp()
                everything = everything + weight
                if positive[i, j]:
                    alike = alike + weight
            if positive[i].any():
                pixels.append(-(alike / everything).log())
        if pixels:
            images.append(sum(pixels) / len(pixels))
        else:
            images.append(x.sum() * 0 + z.sum() * 0)
    return sum(images) / len(images)


def instance_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of whole images beside that of pixels (sec. 3): the batch's mean ``2 - 2 cos``."""
    images = [2 - 2 * cosine(p, t) for p, t in zip(prediction, target, strict=True)]
    return sum(images) / len(images)


# The same with whole (b, n, n) tensors, for maps on which loops take too long.


def plain_propagate(x: Tensor, transform: Callable[[Tensor], Tensor], gamma: float) -> Tensor:
    """``propagate`` with the whole likeness in memory."""
    pixels = unit(x.flatten(2), 1)
    values = unit(transform(x).flatten(2), 1)
    likeness = (pixels.mT @ pixels).relu() ** gamma
    return (values @ likeness.mT).reshape(*values.shape[:2], *x.shape[2:])


def plain_pixpro_loss(propagated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """``pixpro_loss`` with every cosine in memory."""
    cosines = unit(propagated, 1).mT @ unit(target, 1)
    pairs = mask.sum(dim=(1, 2))
    mean = (cosines * mask).sum(dim=(1, 2)) / pairs.clamp_min(1)
    return ((2 - 2 * mean) * (pairs > 0)).mean()


def plain_pixcontrast_loss(
    online: Tensor, target: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """``pixcontrast_loss`` with every cosine in memory."""
    weights = (unit(online, 1).mT @ unit(target, 1) / temperature).exp()
    anchors = mask.any(dim=2)
    share = (weights * mask).sum(dim=2) / weights.sum(dim=2)
    costs = -share.masked_fill(~anchors, 1.0).log()
    return (costs.sum(dim=1) / anchors.sum(dim=1).clamp_min(1)).mean()
