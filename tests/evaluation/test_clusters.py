"""Overclustering: k-means and matching against slow loops and by hand."""

from itertools import permutations
from operator import getitem

import pytest
import torch

from pixel_level_contrastive_learning.evaluation.clusters import (
    ClusterClassifier,
    kmeans,
    match_clusters,
    nearest_centre,
)


def blobs(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells around three points, and which they are around."""
    shown = torch.arange(count) % 3
    return 10 * torch.eye(3)[shown] + 0.3 * torch.randn(count, 3), shown


def test_clusters_are_found_and_their_centres_are_means() -> None:
    cells, shown = blobs()
    centres = kmeans(cells, 3)
    clusters = nearest_centre(cells, centres)
    for label in range(3):
        (cluster,) = set(clusters[shown == label].tolist())
        torch.testing.assert_close(centres[cluster], cells[shown == label].mean(0))


def test_the_nearest_centre_is_that_of_the_slow_loop(monkeypatch) -> None:
    monkeypatch.setattr("pixel_level_contrastive_learning.evaluation.clusters.BLOCK_CELLS", 7)
    cells, centres = torch.randn(50, 4), torch.randn(6, 4)
    slow = [min(range(6), key=lambda k: (cell - centres[k]).norm().item()) for cell in cells]
    assert nearest_centre(cells, centres).tolist() == slow


def test_a_seed_decides_the_start_and_nothing_else_is_drawn() -> None:
    cells = torch.randn(300, 4)
    state = torch.get_rng_state()
    first, again, other = (kmeans(cells, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("cells", [torch.zeros(9, 2), torch.arange(4.0)[:, None]])
def test_fewer_or_equal_cells_are_no_trouble(cells) -> None:
    centres = kmeans(cells, 5)
    assert centres.isfinite().all()
    assert len(centres) == min(5, len(cells))


def test_as_many_clusters_as_classes_are_matched_one_to_one() -> None:
    for _ in range(20):
        table = torch.rand(4, 4)
        best = max(permutations(range(4)), key=lambda p: sum(table[i, p[i]] for i in range(4)))
        assert match_clusters(table).tolist() == list(best)


def test_more_clusters_each_take_their_largest_class() -> None:
    table = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    assert match_clusters(table).tolist() == [0, 1, 0]


def slow_classes(cells, shares, centres) -> list[int]:
    """The class of each cell, cell by cell: of all one-to-one namings, or else cluster by cluster.

    With as many clusters as classes the naming is the best of all (arXiv:2204.13101, sec. 4).
    """
    count, kinds = len(centres), shares.shape[1]
    directions = [cell / cell.norm() for cell in cells]
    clusters = [min(range(count), key=lambda k: (cell - centres[k]).norm()) for cell in directions]
    table = [[0.0] * kinds for _ in range(count)]
    for k, share in zip(clusters, shares.tolist(), strict=True):
        table[k] = [a + b for a, b in zip(table[k], share, strict=True)]
    if count == kinds:
        named = max(permutations(range(kinds)), key=lambda p: sum(map(getitem, table, p)))
    else:
        named = [max(range(kinds), key=row.__getitem__) for row in table]
    return [named[k] for k in clusters]


@pytest.mark.parametrize("count", [4, 9])
def test_clusters_of_any_cells_are_settled_and_named_as_in_the_slow_loop(count) -> None:
    cells, shares = torch.randn(200, 5) * torch.rand(200, 1), torch.rand(200, 4)
    classify = ClusterClassifier(cells, shares, count, seed=0)
    directions = cells / cells.norm(dim=1, keepdim=True)
    clusters = torch.cdist(directions, classify.centres).argmin(dim=1)
    means = torch.stack([directions[clusters == k].mean(dim=0) for k in range(count)])
    torch.testing.assert_close(classify.centres, means)
    slow = slow_classes(cells, shares, classify.centres)
    assert classify(cells).argmax(1).tolist() == slow


@pytest.mark.parametrize("count", [3, 8])
def test_cells_get_the_class_of_their_cluster(count) -> None:
    cells, shown = blobs()
    shares = torch.nn.functional.one_hot((shown + 1) % 3, 3).float()
    classify = ClusterClassifier(cells, shares, count, seed=0)
    more, shown = blobs(30)
    assert torch.equal(classify(more).argmax(1), (shown + 1) % 3)
