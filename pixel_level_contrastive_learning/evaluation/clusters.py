"""Overclustering: cells grouped without labels, the groups then named by the masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

ITERATIONS = 50
"""Steps of k-means, at most; it ends when no cell changes its cluster."""
BLOCK_CELLS = 2**14
"""Cells whose distances to all centres are held at a time."""


def kmeans(cells: Tensor, count: int, seed: int = 0) -> Tensor:
    """Centres ``(count, c)`` of clusters of cells ``(n, c)``.

    Found by Lloyd's steps from a k-means++ start, which the seed decides; fewer where there are
    fewer cells. Costs ``n c count`` a step.

    >>> kmeans(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2).sort(dim=0).values.flatten()
    tensor([ 0.5000, 10.5000])
    """
    count = min(count, len(cells))
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(cells), (), generator=generator))]
    nearest = (cells - cells[chosen[0]]).square().sum(dim=1)
    for draw in torch.rand(count - 1, generator=generator).tolist():
        reach = nearest.double().cumsum(dim=0)  # each cell as likely as it is far away
        place = int(torch.searchsorted(reach, draw * reach[-1])) if reach[-1] > 0 else len(chosen)
        chosen.append(min(place, len(cells) - 1))
        nearest = nearest.minimum((cells - cells[chosen[-1]]).square().sum(dim=1))
    centres = cells[chosen].clone()
    before = None
    for _ in range(ITERATIONS):
        labels = nearest_centre(cells, centres)
        if before is not None and torch.equal(labels, before):
            break
        before = labels
        sizes = torch.bincount(labels, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, labels, cells)
        filled = sizes > 0  # a centre without cells stays where it is
        centres[filled] = sums[filled] / sizes[filled, None]
    return centres


def nearest_centre(cells: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each cell ``(n, c)``, ``(n,)`` int64."""
    half = centres.square().sum(dim=1) / 2
    return torch.cat(
        [(block @ centres.mT - half).argmax(dim=1) for block in torch.split(cells, BLOCK_CELLS)]
    )


def match_clusters(table: Tensor) -> Tensor:
    """The class of each cluster, ``(k,)`` int64, by how much of each it holds, ``(k, classes)``.

    With as many clusters as classes each class is given to one cluster, so that most is right in
    all (Hungarian matching); with more, each cluster takes the class that fills most of it
    (arXiv:2204.13101, sec. 4).

    >>> match_clusters(torch.tensor([[5.0, 4.0], [6.0, 1.0]])).tolist()
    [1, 0]
    """
    if len(table) > table.shape[1]:
        return table.argmax(dim=1)
    from scipy.optimize import linear_sum_assignment

    _, classes = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    return torch.from_numpy(classes).to(table.device)


class ClusterClassifier:
    """Class scores by the class of a cell's cluster.

    Args:
        cells: ``(n, c)`` cells to cluster, of the images that are scored.
        shares: ``(n, classes)`` what they show; used for the matching alone.
        count: Of clusters.
        seed: Decides the start of k-means.
    """

    def __init__(self, cells: Tensor, shares: Tensor, count: int, seed: int) -> None:
        cells = normalize(cells, dim=1)
        self.centres = kmeans(cells, count, seed)
        table = shares.new_zeros(len(self.centres), shares.shape[1])
        table.index_add_(0, nearest_centre(cells, self.centres), shares)
        self.classes = match_clusters(table)
        self.count = shares.shape[1]

    def __call__(self, cells: Tensor) -> Tensor:
        """Scores ``(n, classes)`` of cells ``(n, c)``: 1 for the class of their cluster, else 0."""
        clusters = nearest_centre(normalize(cells, dim=1), self.centres)
        return one_hot(self.classes[clusters], self.count).float()
