"""Segmentation: class scores from frozen features, cell by cell.

Features are read once and kept, as many as a stated bound allows. Two judges: one linear layer,
fitted until it has converged, and the neighbours among the cells, which need no fitting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from ..data.segmentation import IGNORED, SegmentationDataset
from .features import Preparation, Reader, device_of
from .metrics import Predict, Scored, feed, score

TOLERANCE = 2e-6
"""A fit has converged when a step lowers the loss by less."""
BLOCK_ENTRIES = 2**18
"""Scores of cells that are held at a time: 1 MiB in a table, of which a fit needs three."""


def affine(cells: Tensor, weights: Tensor) -> Tensor:
    """Scores of cells ``(n, c)`` by weights ``(c + 1, classes)``, the last row added to all."""
    return torch.addmm(weights[-1], cells, weights[:-1])


def blocks(cells: Tensor, shares: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cells ``(n, c)`` and their shares ``(n, classes)``, `BLOCK_ENTRIES` shares at a time."""
    rows = max(1, BLOCK_ENTRIES // shares.shape[1])
    return zip(torch.split(cells, rows), torch.split(shares, rows), strict=True)


class Curvature(NamedTuple):
    """How steep the fit is along each direction of the features: eigenvectors of ``X'X / n``.

    Features vary a hundred thousand times more along some directions than along others; in
    coordinates in which all are alike, L-BFGS needs a fifth of the steps.

    Attributes:
        values: ``(c,)``, at least 0.
        vectors: ``(c, c)``, one a column.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, cells: Tensor) -> Self:
        """Of standardised features ``(n, c)``; costs ``n c^2 + c^3``."""
        values, vectors = torch.linalg.eigh(cells.mT @ cells / len(cells))
        return cls(values.clamp(min=0), vectors)

    def scaled(self, strength: float, power: float) -> Tensor:
        """``(c, c)``: the second derivative at this L2 strength, roughly, to a power."""
        # A tenth: p (1 - p), the curvature of the softmax, averaged over likely p.
        return (self.vectors * (0.1 * self.values + strength).pow(power)) @ self.vectors.mT


def fitted(
    cells: Tensor,
    shares: Tensor,
    strength: float,
    start: Tensor,
    curvature: Curvature,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """The weights that minimise cross-entropy plus ``strength / 2`` times their squared sum.

    Beside its arguments it holds tables of a block's scores, some fifty of the weights' size and
    two of ``(c, c)``.

    Args:
        cells: ``(n, c)`` standardised features.
        shares: ``(n, classes)``; a cell counts as much as its shares sum to.
        strength: Of the L2 penalty, which leaves the bias out.
        start: ``(c + 1, classes)`` to begin at. The problem is convex: it decides the time alone.
        curvature: Of the features; decides the time alone, likewise.
        tolerance: The fit ends when a step lowers the loss by less.
    """
    back = curvature.scaled(strength, -0.5)
    even = torch.cat([curvature.scaled(strength, 0.5) @ start[:-1], start[-1:]])
    even.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [even],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )
    whole = shares.sum()

    def weights() -> Tensor:
        return torch.cat([back @ even[:-1], even[-1:]])

    def terms(now: Tensor) -> Iterator[Tensor]:
        yield strength / 2 * now[:-1].square().sum()
        for own, part in blocks(cells, shares):
            yield -(part * torch.log_softmax(affine(own, now), dim=1)).sum() / whole

    def closure() -> float:
        optimiser.zero_grad()
        now = weights()
        leaf = now.detach().requires_grad_()  # adds up the slopes of all terms
        loss = 0.0
        for term in terms(leaf):
            term.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            loss += term.item()
        now.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights().detach()


log = logging.getLogger(__name__)

MOST_BYTES = 2**29
"""Features and class shares of training cells that are kept: 512 MiB. Beyond it each image gives an
equal share of its cells, drawn by a seed."""
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""L2 strengths that the linear layer is tried with, strongest first."""
FEW_STRENGTH = 1e-2
"""The strength where there is one image, and so no other to choose it by."""
CHOOSING_TOLERANCE = 2e-5
"""How far the fits go among which the strength is chosen; more steps change no IoU by 0.003."""
STRETCHES = 4
"""Stretches of the training images whose last fifth chooses the strength."""
CONSTANT = 1e-6
"""A channel whose deviation is at most this share of its mean is one that never changes."""
NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Cosines are divided by it before neighbours are weighed by their exponential, as in
arXiv:2104.14294."""
BANK_CELLS = 2**15
"""Training cells that neighbours are looked for among, at most."""
TABLE_ENTRIES = 2**23
"""Cosines of cells, and votes, that are held at a time: 32 MiB in a table."""


def class_shares(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """What part of each cell each class covers: the mask, averaged over the cells' areas.

    Args:
        mask: ``(height, width)`` uint8 class ids; `IGNORED` counts for no class.
        grid: Cells ``(h, w)``. A pixel belongs to the cell that holds its centre.
        classes: How many there are.

    Returns:
        ``(h * w, classes)`` float32, rows that sum to the part of the cell that is not ignored.
    """
    rows, columns = (
        ((torch.arange(side) + 0.5) * cells / side).long()
        for side, cells in zip(mask.shape, grid, strict=True)
    )
    cell = (rows[:, None] * grid[1] + columns).flatten()
    cells = grid[0] * grid[1]
    ids = mask.flatten().long()
    known = ids != IGNORED
    places = cell[known] * classes + ids[known]
    counts = torch.bincount(places, minlength=cells * classes).view(cells, classes).float()
    return counts / torch.bincount(cell, minlength=cells).clamp(min=1)[:, None]


class Bank(NamedTuple):
    """Cells of training images that are kept.

    Attributes:
        cells: ``(n, c)`` float32 features.
        shares: ``(n, classes)`` float32, see `class_shares`; no row is all zero.
        first_held: The row where the images begin that choose the strength, see `held_out_last`.
    """

    cells: Tensor
    shares: Tensor
    first_held: int

    def to(self, device: torch.device) -> Self:
        """The bank on another device, where it is judged by."""
        return self._replace(cells=self.cells.to(device), shares=self.shares.to(device))


def gather(
    reader: Reader,
    split: SegmentationDataset,
    prepare: Preparation,
    *,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
) -> Bank:
    """Features of a split's cells with what they show, within a bound of memory.

    Where not even a cell of each image can be kept, images are left out evenly. Beside the bank
    stand the network and a batch of images with their features.

    Args:
        reader: Reads the network.
        split: Images with masks.
        prepare: What is done to the images first.
        seed: Decides which cells are kept where not all can be.
        most_bytes: What the bank may take, a cell of it at least.

    Raises:
        Diverged: Features that are NaN or infinite.
    """
    classes = len(split.classes)
    most = most_bytes // (4 * (reader.channels + classes))
    count = min(len(split), most)
    order, first_held = held_out_last(count)
    chosen = split.subset([len(split) * i // count for i in order])
    # The whole bound at once: pages that are never written take no memory, growing would copy.
    cells, shares = torch.empty(most, reader.channels), torch.empty(most, classes)
    each = most // count
    dice = torch.Generator().manual_seed(seed)
    ends = [0]
    for fed in feed(chosen, prepare):
        maps = known_maps(reader, fed.pixels).cpu()
        grid = maps.shape[-2], maps.shape[-1]
        for own, mask in zip(rearrange(maps, "b c h w -> b (h w) c"), fed.masks, strict=True):
            share = class_shares(mask, grid, classes)
            known = share.sum(dim=1).nonzero().flatten()
            if len(known) > each:
                known = known[torch.randperm(len(known), generator=dice)[:each]]
            rows = slice(ends[-1], ends[-1] + len(known))
            cells[rows], shares[rows] = own[known], share[known]
            ends.append(rows.stop)
    return Bank(cells[: ends[-1]], shares[: ends[-1]], ends[first_held])


class Diverged(ValueError):  # noqa: N818  # reads as what it says
    """A network gives features that are NaN or infinite."""


def known_maps(reader: Reader, pixels: Tensor) -> Tensor:
    """What the reader reads.

    Raises:
        Diverged: Some of it is NaN or infinite.
    """
    maps = reader(pixels)
    if not maps.isfinite().all():
        raise Diverged(
            f"{' and '.join(reader.layers)} of this network give features that are NaN or infinite "
            "for these images, by which nothing can be told apart: it has diverged; take an "
            "earlier checkpoint, or a smaller learning rate"
        )
    return maps


Judge = Callable[[Tensor], Tensor]
"""Cells ``(n, c)`` to class scores ``(n, classes)``, the largest meaning the likeliest; both on the
device of the bank that it was made of."""


def held_out_last(count: int) -> tuple[list[int], int]:
    """An order of images that ends with those that choose the strength, and where these begin.

    They are whole stretches, since neighbours in a film look alike: the last fifth of each quarter.
    """
    held = [i for i in range(count) if 5 * (STRETCHES * i % count) >= 4 * count]
    held = held or list(range(count))[1:][-1:]
    rest = sorted(set(range(count)) - set(held))
    return rest + held, len(rest)


def linear_judge(bank: Bank) -> Judge:
    """One 1x1 convolution on standardised features: a multinomial logistic regression, converged.

    Fitted to the shares of classes in each cell by L-BFGS, with no learning rate and no seed. The
    L2 strength is chosen by the mean IoU of held-out images' cells; then all are fitted.

    Args:
        bank: Training cells. They are standardised in place.
    """
    mean, std = bank.cells.mean(dim=0), bank.cells.std(dim=0, correction=0)
    # What is the same in all cells differs by rounding, which must not be blown up: it has no say.
    std = std.masked_fill(std <= CONSTANT * mean.abs(), torch.inf)
    cells = bank.cells.sub_(mean).div_(std)
    curvature = Curvature.of(cells)
    weights = cells.new_zeros(cells.shape[1] + 1, bank.shares.shape[1])
    weights[-1] = bank.shares.mean(dim=0).clamp(min=1e-6).log()  # each class as often as it is
    strength = FEW_STRENGTH
    cut = bank.first_held
    if 0 < cut < len(cells):
        tried: list[tuple[float, float, Tensor]] = []
        for one in STRENGTHS:
            weights = fitted(
                cells[:cut], bank.shares[:cut], one, weights, curvature, CHOOSING_TOLERANCE
            )
            iou = cell_iou(weights, cells[cut:], bank.shares[cut:])
            tried.append((iou, one, weights))
        _, strength, weights = max(tried, key=lambda own: own[:2])
    weights = fitted(cells, bank.shares, strength, weights, curvature)
    # The standardisation is folded in, so that whoever judges need not know of it.
    weights = torch.cat([weights[:-1] / std[:, None], weights[-1:]])
    weights[-1] -= mean @ weights[:-1]
    return lambda own: affine(own, weights)


def cell_iou(weights: Tensor, cells: Tensor, shares: Tensor) -> float:
    """Mean IoU of cells by their shares, over classes that are there or were given."""
    table = shares.new_zeros(shares.shape[1], shares.shape[1], dtype=torch.float64)
    for own, part in blocks(cells, shares):
        table.index_add_(0, affine(own, weights).argmax(dim=1), part.double())
    both = table.sum(dim=0) + table.sum(dim=1) - table.diag()
    return float((table.diag() / both)[both > 0].mean())


def neighbour_judge(bank: Bank, seed: int = 0) -> Judge:
    """The votes of the `NEIGHBOURS` most similar training cells: nothing is trained.

    Likeness is the cosine of features from which the training cells' mean is taken out; votes are
    class shares, weighed by ``exp(cosine / TEMPERATURE)``. Of more than `BANK_CELLS` training cells
    that many are drawn, and copied. Costs a cosine for each pair of cells, made in blocks.

    Args:
        bank: Training cells. They, or the copies, are scaled to length 1 in place.
        seed: Decides which are drawn.
    """
    cells, shares = bank.cells, bank.shares
    if len(cells) > BANK_CELLS:
        dice = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(cells), generator=dice)[:BANK_CELLS]
        cells, shares = cells[drawn], shares[drawn]
    mean = cells.mean(dim=0)
    known = normalize(cells.sub_(mean), dim=1, out=cells)
    count = min(NEIGHBOURS, len(known))

    def judge(own: Tensor) -> Tensor:
        asked = normalize(own - mean, dim=1)
        votes = []
        rows = max(1, TABLE_ENTRIES // max(len(known), count * shares.shape[1]))
        for first in range(0, len(asked), rows):
            cosines, nearest = (asked[first : first + rows] @ known.mT).topk(count, dim=1)
            weights = torch.softmax(cosines / TEMPERATURE, dim=1)
            votes.append((weights[..., None] * shares[nearest]).sum(dim=1))
        return torch.cat(votes)

    return judge


def by_cells(reader: Reader, judge: Judge, device: torch.device | str = "cpu") -> Predict:
    """A predictor out of a reader of features and a judge of cells, which works on a device."""

    def predict(pixels: Tensor) -> Tensor:
        maps = known_maps(reader, pixels).to(device)
        scores = judge(rearrange(maps, "b c h w -> (b h w) c")).cpu()
        h, w = maps.shape[-2:]
        return rearrange(scores, "(b h w) k -> b k h w", h=h, w=w)

    return predict


def probed(
    reader: Reader,
    train: SegmentationDataset,
    judged: SegmentationDataset,
    prepare: Preparation,
    *,
    protocol: str = "linear",
    seed: int = 0,
    keep: Sequence[int] = (),
) -> Scored:
    """How well frozen features tell classes apart.

    Args:
        reader: Reads the network.
        train: What is learnt from.
        judged: What is scored.
        prepare: What is done to images first.
        protocol: ``linear`` or ``knn``.
        seed: Decides which cells are kept where not all can be; nothing else is drawn.
        keep: Images whose predictions are to be kept, by their place in ``judged``.
    """
    bank = gather(reader, train, prepare, seed=seed)
    make = linear_judge if protocol == "linear" else partial(neighbour_judge, seed=seed)
    device = device_of(reader.net)
    if device.type != "cuda":  # MPS knows neither eigenvectors nor float64
        device = torch.device("cpu")
    try:
        return score(by_cells(reader, make(bank.to(device)), device), judged, prepare, keep)
    except torch.OutOfMemoryError:
        log.info("the GPU has no room for the cells of the training images: the CPU fits")
    return score(by_cells(reader, make(bank), "cpu"), judged, prepare, keep)
