"""Segmentation: shares, bounds and judges against hand arithmetic and slow loops."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, one_hot

from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation import regression, segmentation
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.evaluation.labelled import open_labelled
from pixel_level_contrastive_learning.evaluation.preparation import Preparation
from pixel_level_contrastive_learning.evaluation.segmentation import (
    Bank,
    by_cells,
    cell_iou,
    class_shares,
    gather,
    held_out_last,
    linear_judge,
    neighbour_judge,
    probed,
)


def preparation(size: int) -> Preparation:
    return Preparation(Statistics(3, (0.5,) * 3, (0.25,) * 3, None, None, (1, 1), (1, 1), 0), size)


# What cells show.


def test_shares_by_hand() -> None:
    mask = torch.tensor([[0, 1, 2, 2], [0, 0, 255, 2], [255, 255, 1, 1], [255, 255, 1, 0]])
    shares = class_shares(mask.to(torch.uint8), (2, 2), 3)
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 0.75], [0, 0, 0], [0.25, 0.75, 0]]


def test_a_pixel_belongs_to_the_cell_that_holds_its_centre() -> None:
    # Five pixels for two cells: the middle one's centre, 2.5, begins the second.
    shares = class_shares(torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.uint8), (1, 2), 2)
    assert shares.tolist() == [[1, 0], [0, 1]]


def test_cells_without_pixels_show_nothing() -> None:
    shares = class_shares(torch.zeros(1, 1, dtype=torch.uint8), (2, 2), 2)
    assert shares.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]


def test_iou_of_cells_by_hand() -> None:
    shares = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0]])
    scores = one_hot(torch.tensor([0, 0, 1]), 3).float()
    # Class 0: 1.5 of 2; class 1: 1 of 1.5; class 2 is nowhere.
    assert cell_iou(scores, shares) == pytest.approx((1.5 / 2 + 1 / 1.5) / 2)


# What is kept.


def test_all_cells_are_kept_with_what_they_show(labelled, plain) -> None:
    train, _ = open_labelled(labelled)
    reader = Reader(plain, ["patches"], 3, (32, 48))
    bank = gather(reader, train, preparation(32))
    # Maps of 8 x 12 cells; of each first row half the pixels are ignored.
    assert bank.cells.shape == (960, 3)
    assert bank.ends.tolist() == list(range(96, 961, 96))
    assert bank.shares.sum(1)[:13].tolist() == [0.5] * 12 + [1]
    assert torch.equal(bank.cells.argmax(1), bank.shares.argmax(1))  # colours are classes
    third = train.read(2)
    ready = preparation(32).normalised(third.pixels[None] / 255)
    expected = reader(ready)[0].flatten(1).T
    torch.testing.assert_close(bank.cells[192:288], expected)


def test_cells_all_ignored_are_left_out(labelled, plain) -> None:
    train, _ = open_labelled(labelled)
    bank = gather(Reader(plain, ["patches"], 3, (32, 48)), train, preparation(64))
    # Twice as fine: the first row of cells lies wholly in ignored pixels.
    assert bank.cells.shape == (10 * 15 * 24, 3)
    assert bank.shares.sum(1).min() == 1


def test_memory_is_bounded_and_every_image_gives_its_share(labelled, plain) -> None:
    train, _ = open_labelled(labelled)
    reader = Reader(plain, ["patches"], 3, (32, 48))
    banks = [
        gather(reader, train, preparation(32), seed=seed, most_bytes=10 * 20 * 3 * 4)
        for seed in (0, 0, 1)
    ]
    assert banks[0].cells.shape == (200, 3)
    assert banks[0].ends.tolist() == list(range(20, 201, 20))
    assert torch.equal(banks[0].cells, banks[1].cells)
    assert not torch.equal(banks[0].cells, banks[2].cells)
    assert torch.equal(banks[2].cells.argmax(1), banks[2].shares.argmax(1))


def test_images_of_many_sizes_are_kept(labelled, plain) -> None:
    from PIL import Image

    for kind in ("images", "masks"):
        path = labelled / kind / "train" / "5.png"
        with Image.open(path) as image:
            image.resize((96, 32), Image.Resampling.NEAREST).save(path)
    train, _ = open_labelled(labelled)
    bank = gather(Reader(plain, ["patches"], 3, (32, 48)), train, preparation(32))
    assert bank.ends.diff().tolist() == [96] * 4 + [192] + [96] * 4
    assert torch.equal(bank.cells.argmax(1), bank.shares.argmax(1))


@pytest.mark.parametrize(
    ("count", "held"),
    [
        (40, [8, 9, 18, 19, 28, 29, 38, 39]),
        (20, [4, 9, 14, 19]),
        (2, [1]),
        (1, []),
    ],
)
def test_whole_stretches_of_images_choose_the_strength(count, held) -> None:
    order, first = held_out_last(count)
    assert order[first:] == held
    assert sorted(order) == list(range(count))


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 11, 37, 367])
def test_about_a_fifth_is_held_out(count) -> None:
    order, first = held_out_last(count)
    assert sorted(order) == list(range(count))
    assert 1 <= count - first <= max(1, math.ceil(count / 4))


# Judges.


def coloured(count: int) -> Bank:
    """Cells of three classes around three points, on an odd scale, and what they show."""
    shown = torch.arange(count) % 3
    cells = torch.eye(3)[shown] * 50 + torch.randn(count, 3) + torch.tensor([1000.0, 0, -7])
    return Bank(cells, one_hot(shown, 3).float(), torch.arange(10, count + 1, 10))


@pytest.mark.parametrize("first_held", [8, 10])
def test_a_linear_judge_tells_classes_apart(first_held) -> None:
    bank = coloured(100)
    own = coloured(60)
    judge = linear_judge(bank, first_held)
    assert torch.equal(judge(own.cells).argmax(1), own.shares.argmax(1))


def test_a_linear_judge_stands_a_channel_that_is_always_the_same() -> None:
    bank, own = coloured(100), coloured(60)
    constant = bank._replace(cells=torch.cat([bank.cells, torch.full((100, 1), 3.0)], 1))
    judge = linear_judge(constant, 8)
    scores = judge(torch.cat([own.cells, torch.full((60, 1), 3.0)], 1))
    assert scores.isfinite().all()
    assert torch.equal(scores.argmax(1), own.shares.argmax(1))


def test_a_class_that_is_not_among_the_training_cells_is_never_chosen() -> None:
    bank = coloured(100)
    more = bank._replace(shares=torch.cat([bank.shares, torch.zeros(100, 1)], 1))
    assert linear_judge(more, 8)(coloured(60).cells).argmax(1).max() == 2


@pytest.mark.parametrize(
    ("ious", "chosen"), [((1, 2, 3, 2, 1), 1e-3), ((3, 1, 1, 1, 3), 1e-1), ((1, 1, 1, 1, 2), 1e-5)]
)
def test_the_strength_that_serves_held_out_images_best_is_taken(monkeypatch, ious, chosen) -> None:
    waiting, fits = iter(ious), []

    def counted(scores, shares):
        assert len(shares) == 20  # the last two of ten images
        return next(waiting)

    def noted(cells, shares, strength, *others):
        fits.append((len(cells), strength))
        return regression.fitted(cells, shares, strength, *others)

    monkeypatch.setattr(segmentation, "cell_iou", counted)
    monkeypatch.setattr(segmentation, "fitted", noted)
    linear_judge(coloured(100), 8)
    assert fits == [(80, strength) for strength in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)] + [(100, chosen)]


def slow_votes(bank: Bank, own: torch.Tensor) -> torch.Tensor:
    """Votes cell by cell."""
    mean = bank.cells.mean(0)
    votes = []
    for cell in own:
        cosines = cosine_similarity((cell - mean)[None], bank.cells - mean)
        nearest = cosines.argsort(descending=True)[:20]
        weights = (cosines[nearest] / 0.07).exp()
        votes.append((weights[:, None] * bank.shares[nearest]).sum(0) / weights.sum())
    return torch.stack(votes)


def test_neighbours_vote_as_in_the_slow_loop(monkeypatch) -> None:
    bank = Bank(torch.randn(70, 5), torch.rand(70, 3), torch.tensor([70]))
    own = torch.randn(33, 5)
    expected = slow_votes(bank, own)
    torch.testing.assert_close(neighbour_judge(bank)(own), expected)
    monkeypatch.setattr(segmentation, "TABLE_ENTRIES", 70 * 4)
    torch.testing.assert_close(neighbour_judge(bank)(own), expected)


def test_few_neighbours_are_enough() -> None:
    bank = Bank(torch.randn(3, 5), torch.eye(3), torch.tensor([3]))
    assert neighbour_judge(bank)(bank.cells).argmax(1).tolist() == [0, 1, 2]


def test_neighbours_are_drawn_where_there_are_too_many(monkeypatch) -> None:
    monkeypatch.setattr(segmentation, "BANK_CELLS", 30)
    bank, own = coloured(90), coloured(20)
    first, again, other = (neighbour_judge(bank, seed)(own.cells) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.argmax(1), own.shares.argmax(1))


# All of it.


def test_scores_stand_where_their_cells_are(plain) -> None:
    predict = by_cells(Reader(plain, ["patches"], 3, (16, 24)), lambda cells: 2 * cells)
    pixels = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(predict(pixels), 2 * plain(pixels).detach())


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_classes_that_are_colours_are_found(labelled, plain, protocol) -> None:
    train, val = open_labelled(labelled)
    reader = Reader(plain, ["patches"], 3, (32, 48))
    state = torch.get_rng_state()
    scored = probed(reader, train, val, preparation(32), protocol=protocol, keep=[2])
    assert torch.equal(torch.get_rng_state(), state)
    # Not all: between cells the largest of three blended scores may lie half a cell off.
    assert scored.scores.miou > 0.9
    assert scored.kept[2].shape == (32, 48)
    again = probed(reader, train, val, preparation(32), protocol=protocol)
    assert again.scores == scored.scores
