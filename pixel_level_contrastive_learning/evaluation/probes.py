"""Probes: class scores from frozen features, cell by cell.

Features of the training images are read once and kept, as many as a stated bound allows. A
classifier is made of them: a linear layer, fitted until it has converged, or the votes of the
nearest cells, or clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from ..data.segmentation import IGNORED
from .clusters import ClusterClassifier
from .features import Reader, device_of, in_parts
from .logistic import Curvature, affine, fit_logistic, row_blocks
from .metrics import Predict, PreparedSplit, Scored, batches, score

log = logging.getLogger(__name__)

MOST_BYTES = 2**29
"""Features and class shares of cells that are kept: 512 MiB. Beyond it each image gives an
equal share of its cells, drawn by a seed."""
FIT_ENTRIES = 2**25
"""Numbers in the features that a linear layer is fitted to: 128 MiB."""
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
TABLE_ENTRIES = 2**23
"""Cosines of cells, and votes, that are held at a time: 32 MiB in a table."""


def class_shares(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """What part of each cell of a grid ``(h, w)`` each class covers, ``(h * w, classes)`` float32.

    The mask ``(height, width)`` uint8 averaged over the cells' areas; a pixel belongs to the cell
    that holds its centre, and `IGNORED` counts for no class.
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


class FeatureBank(NamedTuple):
    """Cells of images that are kept."""

    cells: Tensor  # (n, c) float32 features
    shares: Tensor  # (n, classes) float32, see class_shares; no row is all zero
    first_held: int  # the row where the images begin that choose the strength, see held_out_last

    def to(self, device: torch.device) -> Self:
        """The bank on another device."""
        return self._replace(cells=self.cells.to(device), shares=self.shares.to(device))

    def drawn(self, count: int, seed: int = 0) -> Self:
        """So many of the cells, drawn by a seed, in the same order; all where there are fewer."""
        if len(self.cells) <= count:
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.cells), generator=generator)[:count].sort().values
        first_held = int((chosen < self.first_held).sum())
        chosen = chosen.to(self.cells.device)
        return type(self)(self.cells[chosen], self.shares[chosen], first_held)


def gather(
    reader: Reader,
    split: PreparedSplit,
    choices: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
) -> list[FeatureBank]:
    """Features of a split's cells with what they show, within a bound of memory.

    Where not even a cell of each image can be kept, images are left out evenly. Beside the banks
    stand the network and a batch of images with their features.

    Args:
        reader: Reads the network.
        split: Images with masks.
        choices: Of the reader's layers, each for a bank.
        seed: Decides which cells are kept where not all can be.
        most_bytes: What a bank may take, a cell of it at least.

    Raises:
        DivergedError: Features that are NaN or infinite.
    """
    classes = len(split.classes)
    rows = [most_bytes // (4 * (reader.channels(layers) + classes)) for layers in choices]
    count = min(len(split), *rows)
    order, first_held = held_out_last(count)
    chosen = split.of(split.dataset.subset([len(split) * i // count for i in order]))
    # The whole bound at once: pages that are never written take no memory, growing would copy.
    tables = [
        (torch.empty(most, reader.channels(layers)), torch.empty(most, classes))
        for layers, most in zip(choices, rows, strict=True)
    ]
    generators = [torch.Generator().manual_seed(seed) for _ in choices]
    ends = [[0] for _ in choices]

    def read(pixels: Tensor) -> list[Tensor]:
        return [maps.cpu() for maps in finite_features(reader, pixels, choices)]

    for batch in batches(chosen):
        every = in_parts(read, batch.pixels)
        for maps, (cells, shares), most, generator, end in zip(
            every, tables, rows, generators, ends, strict=True
        ):
            grid = maps.shape[-2], maps.shape[-1]
            images = rearrange(maps, "b c h w -> b (h w) c")
            for features, mask in zip(images, batch.masks, strict=True):
                share = class_shares(mask, grid, classes)
                known = share.sum(dim=1).nonzero().flatten()
                if len(known) > most // count:
                    drawn = torch.randperm(len(known), generator=generator)
                    known = known[drawn[: most // count]]
                place = slice(end[-1], end[-1] + len(known))
                cells[place], shares[place] = features[known], share[known]
                end.append(place.stop)
    return [
        FeatureBank(cells[: end[-1]], shares[: end[-1]], end[first_held])
        for (cells, shares), end in zip(tables, ends, strict=True)
    ]


class DivergedError(RuntimeError):
    """A network gives features or class scores that are NaN or infinite."""


def finite_features(
    reader: Reader, pixels: Tensor, choices: Sequence[Sequence[str]]
) -> Iterator[Tensor]:
    """What the reader reads of some choices of its layers; an error where it is not finite."""
    for layers, maps in zip(choices, reader.read(pixels, choices), strict=True):
        if not maps.isfinite().all():
            raise DivergedError(
                f"{' and '.join(layers)} of this network give NaN or infinite features for these "
                "images: it has diverged; use an earlier checkpoint, or a lower learning rate"
            )
        yield maps


Classifier = Callable[[Tensor], Tensor]
"""Cells ``(n, c)`` to class scores ``(n, classes)``, the largest meaning the likeliest; both on the
device of the bank that it was made of."""


def held_out_last(count: int) -> tuple[list[int], int]:
    """An order of images that ends with those that choose the strength, and where these begin.

    They are whole stretches, since neighbours in a film look alike: the last fifth of each quarter,
    or of larger parts where a quarter has fewer than five.
    """
    stretches = max(1, min(STRETCHES, count // 5))
    held_out = [i for i in range(count) if 5 * (stretches * i % count) >= 4 * count]
    held_out = held_out or list(range(count))[1:][-1:]
    rest = sorted(set(range(count)) - set(held_out))
    return rest + held_out, len(rest)


def linear_classifier(bank: FeatureBank) -> Classifier:
    """One 1x1 convolution on standardised features: a multinomial logistic regression, converged.

    Fitted to the shares of classes in each cell by L-BFGS, with no learning rate and no seed. The
    L2 strength is chosen by the mean IoU of held-out images' cells; then all are fitted. Beyond
    `FIT_ENTRIES` cells are drawn, always the same ones. They are standardised in place.
    """
    bank = bank.drawn(max(1, FIT_ENTRIES // bank.cells.shape[1]))
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
            weights = fit_logistic(
                cells[:cut], bank.shares[:cut], one, weights, curvature, CHOOSING_TOLERANCE
            )
            iou = cell_iou(weights, cells[cut:], bank.shares[cut:])
            tried.append((iou, one, weights))
        _, strength, weights = max(tried, key=lambda trial: trial[:2])
    weights = fit_logistic(cells, bank.shares, strength, weights, curvature)
    # The standardisation is folded in, so that the classifier takes features as they are.
    weights = torch.cat([weights[:-1] / std[:, None], weights[-1:]])
    weights[-1] -= mean @ weights[:-1]
    return lambda features: affine(features, weights)


def cell_iou(weights: Tensor, cells: Tensor, shares: Tensor) -> float:
    """Mean IoU of cells by their shares, over classes that are there or were given."""
    table = shares.new_zeros(shares.shape[1], shares.shape[1], dtype=torch.float64)
    for cell_block, share_block in row_blocks(cells, shares):
        table.index_add_(0, affine(cell_block, weights).argmax(dim=1), share_block.double())
    both = table.sum(dim=0) + table.sum(dim=1) - table.diag()
    return float((table.diag() / both)[both > 0].mean())


class Voting(NamedTuple):
    """How the nearest training cells vote."""

    neighbours: int  # how many vote
    temperature: float  # cosines are divided by it before votes are weighed by their exponential
    most_cells: int  # training cells that neighbours are looked for among, drawn of all
    centred: bool  # whether the mean of the training cells is taken out of all features


KNN = Voting(20, 0.07, 2**15, centred=True)
"""The weights of arXiv:2104.14294."""
HUMMINGBIRD = Voting(30, 0.02, 2**17, centred=False)
"""Dense nearest-neighbour retrieval as in arXiv:2306.01667, whose memory is drawn of augmented
images, too: here each training image gives its cells once."""


def neighbour_classifier(bank: FeatureBank, voting: Voting = KNN, seed: int = 0) -> Classifier:
    """The votes of the most similar training cells: nothing is trained.

    Votes are class shares, weighed by ``exp(cosine / temperature)``. Costs a cosine for each pair
    of cells, made in blocks. The seed decides which cells are drawn where there are too many.
    """
    cells, shares, _ = bank.drawn(voting.most_cells, seed)
    mean = cells.mean(dim=0) if voting.centred else cells.new_zeros(cells.shape[1])
    known = normalize(cells - mean, dim=1)
    count = min(voting.neighbours, len(known))

    def classify(features: Tensor) -> Tensor:
        asked = normalize(features - mean, dim=1)
        votes = []
        rows = max(1, TABLE_ENTRIES // max(len(known), count * shares.shape[1]))
        for first in range(0, len(asked), rows):
            cosines, nearest = (asked[first : first + rows] @ known.mT).topk(count, dim=1)
            weights = torch.softmax(cosines / voting.temperature, dim=1)
            votes.append((weights[..., None] * shares[nearest]).sum(dim=1))
        return torch.cat(votes)

    return classify


class ProbeTask(NamedTuple):
    """A probe to fit; of clusters to the images that are scored, whose masks name the clusters."""

    protocol: str  # linear, knn, hummingbird or clusters
    train: PreparedSplit  # what is learnt from
    layers: tuple[str, ...]  # which it reads
    clusters: int = 0  # how many there are

    def fit(self, bank: FeatureBank, seed: int) -> Classifier:
        """The classifier; a linear one standardises the bank in place."""
        if self.protocol == "linear":
            return linear_classifier(bank)
        if self.protocol == "clusters":
            return ClusterClassifier(bank.cells, bank.shares, self.clusters, seed)
        voting = KNN if self.protocol == "knn" else HUMMINGBIRD
        return neighbour_classifier(bank, voting, seed)


def run_probes(
    reader: Reader,
    probes: Sequence[ProbeTask],
    scored: PreparedSplit,
    *,
    seed: int = 0,
    keep: Sequence[int] = (),
) -> list[Scored]:
    """How well frozen features tell classes apart, by some probes at once.

    Features are read once for all probes of the same images, and once for those that are scored.

    Args:
        reader: Reads the network.
        probes: What is fitted.
        scored: What is scored.
        seed: Decides which cells are kept where not all can be, and the start of clusters.
        keep: Images whose predictions are to be kept, by their place in ``scored``.

    Raises:
        DivergedError: Features that are NaN or infinite.
    """

    def fit(device: torch.device) -> list[Scored]:
        classifiers: dict[int, Classifier] = {}
        for train in {id(probe.train.dataset): probe.train for probe in probes}.values():
            same = [i for i, probe in enumerate(probes) if probe.train.dataset is train.dataset]
            choices = list(dict.fromkeys(probes[i].layers for i in same))
            banks = dict(zip(choices, gather(reader, train, choices, seed=seed), strict=True))
            while banks:
                layers, bank = banks.popitem()
                bank = bank.to(device)
                indices = [i for i in same if probes[i].layers == layers]
                fitted: dict[tuple[str, int], Classifier] = {}
                # Linear ones last.
                for i in sorted(indices, key=lambda i: probes[i].protocol == "linear"):
                    kind = probes[i].protocol, probes[i].clusters
                    if kind not in fitted:  # the bank is another once a linear one was fitted
                        fitted[kind] = probes[i].fit(bank, seed)
                    classifiers[i] = fitted[kind]
        readers = [(probe.layers, classifiers[i]) for i, probe in enumerate(probes)]
        return score(by_cells(reader, readers, device), scored, len(probes), keep)

    device = device_of(reader.net)
    if device.type != "cuda":  # MPS knows neither eigenvectors nor float64
        device = torch.device("cpu")
    try:
        return fit(device)
    except torch.OutOfMemoryError:
        log.info("not enough GPU memory for the cells of the training images: fitting on the CPU")
    return fit(torch.device("cpu"))


def by_cells(
    reader: Reader,
    classifiers: Sequence[tuple[Sequence[str], Classifier]],
    device: torch.device,
) -> Predict:
    """Predictors out of a reader and classifiers of some layers' cells, which work on a device."""
    choices = list(dict.fromkeys(tuple(layers) for layers, _ in classifiers))

    def predict(pixels: Tensor) -> list[Tensor]:
        scores: dict[int, Tensor] = {}
        for layers, maps in zip(choices, finite_features(reader, pixels, choices), strict=True):
            cells = rearrange(maps.to(device), "b c h w -> (b h w) c")
            h, w = maps.shape[-2:]
            for i, (wanted, classify) in enumerate(classifiers):
                if tuple(wanted) == layers:
                    scores[i] = rearrange(classify(cells), "(b h w) k -> b k h w", h=h, w=w)
        return [scores[i] for i in range(len(classifiers))]

    return predict
