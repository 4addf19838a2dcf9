"""Segmentation: shares, bounds and judges against hand arithmetic and slow loops."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_cards import preparation
from torch.nn.functional import cosine_similarity, one_hot
from torch.profiler import ProfilerActivity, profile

from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.evaluation import logistic, probes
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.evaluation.logistic import Curvature, affine, fit_logistic
from pixel_level_contrastive_learning.evaluation.metrics import PreparedSplit, Scored
from pixel_level_contrastive_learning.evaluation.probes import (
    HUMMINGBIRD,
    KNN,
    DivergedError,
    FeatureBank,
    ProbeTask,
    Voting,
    by_cells,
    cell_iou,
    class_shares,
    gather,
    held_out_last,
    linear_classifier,
    neighbour_classifier,
    run_probes,
)


def gather_one(reader, split, size=32, **settings) -> FeatureBank:
    """The bank of all layers that a reader reads."""
    whole = PreparedSplit(split, preparation(size))
    return gather(reader, whole, [reader.layers], **settings)[0]


def probed(reader, train, val, protocol="linear", keep=()) -> Scored:
    """The scores of a single probe."""
    task = ProbeTask(protocol, PreparedSplit(train, preparation(32)), tuple(reader.layers))
    return run_probes(reader, [task], PreparedSplit(val, preparation(32)), keep=keep)[0]


# What cells show.


@pytest.mark.parametrize(
    ("mask", "grid", "expected"),
    [
        (
            [[0, 1, 2, 2], [0, 0, 255, 2], [255, 255, 1, 1], [255, 255, 1, 0]],
            (2, 2),
            [[0.75, 0.25, 0], [0, 0, 0.75], [0, 0, 0], [0.25, 0.75, 0]],
        ),
        # Five pixels for two cells: the middle one's centre, 2.5, begins the second.
        ([[0, 0, 1, 1, 1]], (1, 2), [[1, 0, 0], [0, 1, 0]]),
        # Cells without pixels show nothing.
        ([[0]], (2, 2), [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]),
    ],
)
def test_shares_by_hand(mask, grid, expected) -> None:
    shares = class_shares(torch.tensor(mask, dtype=torch.uint8), grid, 3)
    assert shares.tolist() == expected


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_iou_of_cells_by_hand(monkeypatch, rows) -> None:
    monkeypatch.setattr(logistic, "BLOCK_ENTRIES", 3 * rows)
    shares = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0]])
    cells = one_hot(torch.tensor([0, 0, 1]), 3).float()
    as_they_are = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    # Class 0: 1.5 of 2; class 1: 1 of 1.5; class 2 is nowhere.
    assert cell_iou(as_they_are, cells, shares) == pytest.approx((1.5 / 2 + 1 / 1.5) / 2)


# What is kept.

ORDER = [0, 1, 2, 3, 5, 6, 7, 8, 4, 9]
"""Of ten images: the last fifths of the stretches come last."""


def test_all_cells_are_kept_with_what_they_show(reader, train) -> None:
    bank = gather_one(reader, train)
    # Maps of 8 x 12 cells; of each first row half the pixels are ignored.
    assert bank.cells.shape == (960, 3)
    assert bank.first_held == 8 * 96
    assert bank.shares.sum(1)[:13].tolist() == [0.5] * 12 + [1]
    assert torch.equal(bank.cells.argmax(1), bank.shares.argmax(1))  # colours are classes
    torch.testing.assert_close(bank.cells, torch.cat(own_cells(reader, train, ORDER)))


def own_cells(reader, split, order) -> list[torch.Tensor]:
    """All cells of each image, one image at a time."""
    ready = [preparation(32).normalised(split.read(i).pixels[None] / 255) for i in order]
    return [reader(pixels)[0].flatten(1).T for pixels in ready]


def test_cells_all_ignored_are_left_out(reader, train) -> None:
    bank = gather_one(reader, train, 64)
    # Twice as fine: the first row of cells lies wholly in ignored pixels.
    assert bank.cells.shape == (10 * 15 * 24, 3)
    assert bank.shares.sum(1).min() == 1


def of_one(rows: torch.Tensor, cells: torch.Tensor) -> bool:
    """Whether all rows are among the cells."""
    return bool((torch.cdist(rows, cells, p=1).min(1).values < 1e-5).all())


@pytest.mark.parametrize("each", [1, 20])
def test_memory_is_bounded_and_every_image_gives_its_share(reader, train, each) -> None:
    most = 4 * (3 + 3) * (10 * each + 9)  # a cell more of each would not fit
    banks = [gather_one(reader, train, seed=seed, most_bytes=most) for seed in (0, 0, 1)]
    assert banks[0].cells.shape == banks[0].shares.shape == (10 * each, 3)
    assert banks[0].first_held == 8 * each
    cells = own_cells(reader, train, ORDER)
    assert all(map(of_one, banks[0].cells.split(each), cells))
    assert torch.equal(banks[0].cells, banks[1].cells)
    assert not torch.equal(banks[0].cells, banks[2].cells)
    assert torch.equal(banks[2].cells.argmax(1), banks[2].shares.argmax(1))


@pytest.mark.parametrize(("most", "given", "held_out"), [(4, [0, 2, 5, 7], 1), (1, [0], 0)])
def test_images_are_left_out_evenly_where_a_cell_of_each_is_too_many(
    reader, train, most, given, held_out
) -> None:
    bank = gather_one(reader, train, most_bytes=4 * (3 + 3) * most + 23)
    assert bank.cells.shape == bank.shares.shape == (most, 3)
    assert bank.first_held == most - held_out
    assert all(map(of_one, bank.cells.split(1), own_cells(reader, train, given)))
    assert linear_classifier(bank)(bank.cells).isfinite().all()


def peak(call, folder) -> int:
    """The most bytes that torch holds during a call beyond those it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        torch.empty(1)
        call()
    watch.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"] for event in events if event["name"] == "[memory]"]
    return max(size["Total Allocated"] for size in sizes) - sizes[0]["Total Allocated"]


class Wide:
    """Reads features of as many channels as wanted, one cell for 4 x 4 pixels."""

    layers = ("wide",)

    def __init__(self, channels: int) -> None:
        self.count = channels

    def channels(self, _) -> int:
        return self.count

    def read(self, pixels: torch.Tensor, choices):
        b, _, h, w = pixels.shape
        return (torch.ones(b, self.count, h // 4, w // 4) for _ in choices)


@pytest.mark.parametrize(("channels", "classes"), [(64, 3), (3, 150)])
def test_a_bank_stays_within_its_bound_while_it_grows(
    labelled, tmp_path, channels, classes
) -> None:
    names = "\n".join(f"kind {label}" for label in range(classes))
    (labelled / "classes.txt").write_text(names)
    for number in range(1, 10):  # the first has the fewest cells
        widen(labelled, number, 48 + 24 * number)
    train, _ = open_labelled(labelled)
    many = train.subset(list(range(10)) * 16)
    banks, most = [], 2**23
    taken = peak(
        lambda: banks.append(gather_one(Wide(channels), many, most_bytes=most)),
        tmp_path,
    )
    assert 0.8 * most < len(banks[0].cells) * 4 * (channels + classes) <= most
    assert taken < most + 2**21  # beside it stands one image with its features


def test_the_tables_of_a_linear_classifier_are_small(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(logistic, "BLOCK_ENTRIES", 2**13)
    cells, shares = torch.randn(8000, 4), torch.rand(8000, 40)
    bank = FeatureBank(cells, shares, 6000)
    taken = peak(lambda: linear_classifier(bank), tmp_path)
    # Blocks of 32 KiB, weights of 800 bytes, against a bank of 1.4 MB.
    assert taken < 6 * 4 * 2**13 + 80 * 800
    wide = FeatureBank(torch.randn(3000, 512), torch.rand(3000, 3), 2000)
    taken = peak(lambda: linear_classifier(wide), tmp_path)
    # And tables of channels by channels.
    assert taken < 6 * 4 * 2**13 + 80 * 4 * 513 * 3 + 6 * 4 * 512**2


def test_the_tables_of_neighbours_are_small(monkeypatch, tmp_path) -> None:
    classifiers, bank = [], FeatureBank(torch.randn(20000, 16), torch.rand(20000, 3), 20000)
    taken = peak(lambda: classifiers.append(neighbour_classifier(bank)), tmp_path)
    assert taken < 4 * bank.cells.numel() * 2.5
    few = neighbour_classifier(FeatureBank(torch.randn(30, 4), torch.rand(30, 40), 30))
    monkeypatch.setattr(probes, "TABLE_ENTRIES", 2**13)
    taken = peak(lambda: few(torch.ones(8000, 4)), tmp_path)
    # The cells that ask, and votes in parts and as a whole, beside tables of 32 KiB.
    assert taken < 4 * 8000 * (3 * 4 + 2 * 40) + 6 * 4 * 2**13


def widen(folder, number, width) -> None:
    """Stretch a training image and its mask."""
    for kind in ("images", "masks"):
        path = folder / kind / "train" / f"{number}.png"
        with Image.open(path) as image:
            wide = image.resize((width, 32), Image.Resampling.NEAREST)
        wide.save(path)


def test_images_of_many_sizes_are_kept(labelled, reader) -> None:
    widen(labelled, 5, 96)
    train, _ = open_labelled(labelled)
    bank = gather_one(reader, train)
    assert len(bank.cells) == 9 * 96 + 192
    assert torch.equal(bank.cells.argmax(1), bank.shares.argmax(1))


@pytest.mark.parametrize(
    ("count", "held_out"),
    [
        (40, [8, 9, 18, 19, 28, 29, 38, 39]),
        (20, [4, 9, 14, 19]),
        (16, [5, 10, 15]),  # three stretches
        (9, [8]),
        (2, [1]),
        (1, []),
    ],
)
def test_whole_stretches_of_images_choose_the_strength(count, held_out) -> None:
    order, first = held_out_last(count)
    assert order[first:] == held_out
    assert sorted(order) == list(range(count))


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 11, 37, 367])
def test_about_a_fifth_is_held_out(count) -> None:
    order, first = held_out_last(count)
    assert sorted(order) == list(range(count))
    assert 1 <= count - first <= max(1, math.ceil(count / 4))


# Judges.


def coloured(count: int) -> FeatureBank:
    """Cells of three classes around three points, on an odd scale, and what they show."""
    shown = torch.arange(count) % 3
    cells = torch.eye(3)[shown] * 50 + torch.randn(count, 3) + torch.tensor([1000.0, 0, -7])
    return FeatureBank(cells, one_hot(shown, 3).float(), 8 * count // 10)


def test_a_linear_classifier_tells_classes_apart() -> None:
    bank = coloured(60)
    classify = linear_classifier(coloured(100))
    assert torch.equal(classify(bank.cells).argmax(1), bank.shares.argmax(1))


def test_a_channel_that_changes_only_later_has_no_say() -> None:
    """Off its mean by rounding alone, it would be blown up a million times."""
    dice = torch.Generator().manual_seed(0)
    classes = torch.arange(200) % 2
    features = classes[:, None] + 0.1 * torch.randn(200, 4, generator=dice)
    cells = torch.cat([features, 0.7 + 6e-8 * classes[:, None]], dim=1)  # one bit apart
    classify = linear_classifier(FeatureBank(cells.clone(), one_hot(classes, 2).float(), 160))
    cells[:, 4] += 0.5
    assert torch.equal(classify(cells).argmax(1), classes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_features_that_are_no_numbers_are_refused(
    reader, train, val, plain, protocol, value
) -> None:
    with torch.no_grad():
        plain.patches.weight[0] = value
    with pytest.raises(
        DivergedError, match="patches of this network give NaN or infinite features"
    ):
        probed(reader, train, val, protocol)


def test_a_class_that_is_not_among_the_training_cells_is_never_chosen() -> None:
    bank = coloured(100)
    more = bank._replace(shares=torch.cat([bank.shares, torch.zeros(100, 1)], 1))
    assert linear_classifier(more)(coloured(60).cells).argmax(1).max() == 2


@pytest.mark.parametrize(
    ("ious", "chosen"), [((1, 2, 3, 2, 1), 1e-3), ((3, 1, 1, 1, 3), 1e-1), ((1, 1, 1, 1, 2), 1e-5)]
)
def test_the_strength_that_serves_held_out_images_best_is_taken(monkeypatch, ious, chosen) -> None:
    waiting = iter(ious)

    def counted(weights, cells, shares):
        assert len(cells) == len(shares) == 20  # the last two of ten images
        return next(waiting)

    monkeypatch.setattr(probes, "cell_iou", counted)
    fits = noted_fits(monkeypatch)
    linear_classifier(coloured(100))
    assert fits == [(80, strength) for strength in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)] + [(100, chosen)]


@pytest.mark.parametrize("first_held", [0, 100])
def test_nothing_is_chosen_where_one_side_has_no_cells(monkeypatch, first_held) -> None:
    fits, bank = noted_fits(monkeypatch), coloured(60)
    classify = linear_classifier(coloured(100)._replace(first_held=first_held))
    assert fits == [(100, 1e-2)]
    assert torch.equal(classify(bank.cells).argmax(1), bank.shares.argmax(1))


def noted_fits(monkeypatch) -> list[tuple[int, float]]:
    """Cells and strength of each fit from now on."""
    fits = []

    def noted(cells, shares, strength, *others):
        fits.append((len(cells), strength))
        return fit_logistic(cells, shares, strength, *others)

    monkeypatch.setattr(probes, "fit_logistic", noted)
    return fits


def slow_votes(bank: FeatureBank, cells: torch.Tensor, voting: Voting) -> torch.Tensor:
    """Votes cell by cell."""
    mean = bank.cells.mean(0) if voting.centred else torch.zeros(bank.cells.shape[1])
    votes = []
    for cell in cells:
        cosines = cosine_similarity((cell - mean)[None], bank.cells - mean)
        nearest = cosines.argsort(descending=True)[: voting.neighbours]
        weights = (cosines[nearest] / voting.temperature).exp()
        votes.append((weights[:, None] * bank.shares[nearest]).sum(0) / weights.sum())
    return torch.stack(votes)


@pytest.mark.parametrize("voting", [KNN, HUMMINGBIRD])
def test_neighbours_vote_as_in_the_slow_loop(monkeypatch, voting) -> None:
    bank = FeatureBank(torch.randn(70, 5) + 1, torch.rand(70, 3), 70)
    cells = torch.randn(33, 5)
    expected = slow_votes(bank, cells, voting)
    classify = neighbour_classifier(bank, voting)
    torch.testing.assert_close(classify(cells), expected)
    monkeypatch.setattr(probes, "TABLE_ENTRIES", 70 * 4)
    torch.testing.assert_close(classify(cells), expected)


def test_the_figures_of_the_papers() -> None:
    assert (KNN.neighbours, KNN.temperature) == (20, 0.07)
    assert (HUMMINGBIRD.neighbours, HUMMINGBIRD.temperature) == (30, 0.02)
    assert HUMMINGBIRD.most_cells >= 100_000


def test_a_linear_fit_takes_a_bounded_part_of_the_cells(monkeypatch) -> None:
    monkeypatch.setattr(probes, "FIT_ENTRIES", 3 * 50)
    fits, bank = noted_fits(monkeypatch), coloured(1000)
    classify = linear_classifier(bank)
    assert fits[-1][0] == 50
    assert 30 < fits[0][0] < 48  # four fifths were drawn, too
    fresh = coloured(60)
    assert torch.equal(classify(fresh.cells).argmax(1), fresh.shares.argmax(1))


def test_few_neighbours_are_enough() -> None:
    cells = torch.randn(3, 5)
    classify = neighbour_classifier(FeatureBank(cells.clone(), torch.eye(3), 3))
    assert classify(cells).argmax(1).tolist() == [0, 1, 2]


def test_neighbours_are_drawn_where_there_are_too_many() -> None:
    bank, asked, few = coloured(90), coloured(20), KNN._replace(most_cells=30)
    first, again, other = (neighbour_classifier(bank, few, s)(asked.cells) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.argmax(1), asked.shares.argmax(1))


# All of it.


def test_scores_stand_where_their_cells_are(plain) -> None:
    reader = Reader(plain, ["patches"], 3, (16, 24))
    twice = ["patches"], lambda cells: 2 * cells
    pixels = torch.rand(2, 3, 16, 24)
    (scores,) = by_cells(reader, [twice], torch.device("cpu"))(pixels)
    torch.testing.assert_close(scores, 2 * plain(pixels).detach())


def test_where_a_gpu_has_no_room_the_cpu_fits(reader, train, val, monkeypatch, caplog) -> None:
    undisturbed = probed(reader, train, val)
    seen = []

    def full_at_first(bank: FeatureBank) -> probes.Classifier:
        seen.append(bank.cells.clone())
        if len(seen) == 1:
            raise torch.OutOfMemoryError
        return linear_classifier(bank)

    monkeypatch.setattr(probes, "linear_classifier", full_at_first)
    with caplog.at_level("INFO"):
        assert probed(reader, train, val) == undisturbed
    assert torch.equal(*seen)
    assert "not enough GPU memory" in caplog.text


@pytest.mark.parametrize("room", [3, 1, 0])
def test_a_batch_is_read_in_parts_where_the_gpu_has_no_room(
    reader, train, val, monkeypatch, room
) -> None:
    undisturbed, maps = probed(reader, train, val), Reader.maps

    def bounded(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        if len(pixels) > room:
            raise torch.OutOfMemoryError
        return maps(self, pixels)

    monkeypatch.setattr(Reader, "maps", bounded)
    if room == 0:
        with pytest.raises(
            torch.OutOfMemoryError, match="for an image at 32x48 pixels; give a small"
        ):
            probed(reader, train, val)
        return
    assert probed(reader, train, val) == undisturbed
    pixels = torch.rand(5, 3, 32, 48)
    assert torch.equal(reader(pixels), torch.cat([*map(reader, pixels.split(1))]))


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_classes_that_are_colours_are_found(reader, train, val, protocol) -> None:
    state = torch.get_rng_state()
    scored = probed(reader, train, val, protocol, keep=[2])
    assert torch.equal(torch.get_rng_state(), state)
    # Not all: between cells the largest of three blended scores may lie half a cell off.
    assert scored.scores.miou > 0.9
    assert scored.kept[2].shape == (32, 48)
    again = probed(reader, train, val, protocol)
    assert again.scores == scored.scores


def test_probes_that_are_the_same_reach_the_same(reader, train, val) -> None:
    """As `linear` and `linear-all` are of a network whose maps all have one stride."""
    task = ProbeTask("linear", PreparedSplit(train, preparation(32)), tuple(reader.layers))
    one, two = run_probes(reader, [task, task], PreparedSplit(val, preparation(32)))
    assert one.scores == two.scores == probed(reader, train, val).scores


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_a_few_images_may_be_annotated(labelled, reader, protocol, first) -> None:
    # Either none of those at the end of a stretch, or none but those.
    blank = (2, 7) if first else (0, 1, 3, 4, 5, 6, 8, 9)
    for number in blank:
        path = labelled / f"masks/train/{number}.png"
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(path)
    train, val = open_labelled(labelled)
    bank = gather_one(reader, train)
    assert 0 < bank.first_held < len(bank.cells)  # the strength is chosen all the same
    assert probed(reader, train, val, protocol).scores.miou > 0.9


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Features that vary far more along some directions than along others, and shares."""
    turn, _ = torch.linalg.qr(torch.randn(12, 12))
    cells = (torch.randn(300, 12) * torch.logspace(-1.5, 1.5, 12)) @ turn
    cells = (cells - cells.mean(0)) / cells.std(0)
    shares = torch.softmax(cells[:, :3] + torch.randn(300, 3), dim=1) * torch.rand(300, 1)
    return cells, shares


def loss(cells, shares, strength, weights) -> torch.Tensor:
    likelihood = torch.log_softmax(cells @ weights[:-1] + weights[-1], dim=1)
    penalty = strength / 2 * weights[:-1].square().sum()
    return -(shares * likelihood).sum() / shares.sum() + penalty


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_the_minimum_is_that_of_plain_newton_steps(strength) -> None:
    cells, shares = problem()
    exact = torch.zeros(13, 3, dtype=torch.float64)
    for _ in range(30):
        values = (cells.double(), shares.double(), strength)
        weights = exact.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(*values, weights), weights)
        table = torch.autograd.functional.hessian(lambda w, v=values: loss(*v, w), exact)
        # The classes' biases may shift together: hence the pseudo-inverse.
        step = torch.linalg.pinv(table.reshape(39, 39), hermitian=True) @ slope.flatten()
        exact = exact - step.view(13, 3)
    fitted = fit_logistic(cells, shares, strength, torch.zeros(13, 3), Curvature.of(cells))
    lowest = loss(cells.double(), shares.double(), strength, exact).item()
    reached = loss(cells.double(), shares.double(), strength, fitted.double()).item()
    assert lowest - 1e-7 < reached < lowest + 1e-4
    chosen, best = (affine(cells.double(), w.double()).argmax(1) for w in (fitted, exact))
    assert (chosen == best).float().mean() > 0.98


def test_where_a_fit_starts_does_not_matter_and_nothing_is_drawn() -> None:
    cells, shares = problem()
    curvature, zeros = Curvature.of(cells), torch.zeros(13, 3)
    starts, state = (zeros, zeros, torch.randn(13, 3)), torch.get_rng_state()
    first, again, other = (fit_logistic(cells, shares, 1e-2, s, curvature) for s in starts)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    ends = [loss(cells, shares, 1e-2, weights).item() for weights in (first, other)]
    assert ends[0] == pytest.approx(ends[1], abs=2e-4)


@pytest.mark.parametrize("rows", [1, 70, 299])
def test_a_fit_in_blocks_is_the_fit_at_once(monkeypatch, rows) -> None:
    cells, shares = (table.double() for table in problem())
    curvature, start = Curvature.of(cells), torch.zeros(13, 3, dtype=torch.float64)
    at_once = fit_logistic(cells, shares, 1e-2, start, curvature)
    monkeypatch.setattr(logistic, "BLOCK_ENTRIES", 3 * rows + 2)
    in_blocks = fit_logistic(cells, shares, 1e-2, start, curvature)
    torch.testing.assert_close(in_blocks, at_once, rtol=0, atol=1e-9)


def test_curvature_to_powers_that_cancel() -> None:
    cells, _ = problem()
    curvature = Curvature.of(cells)
    table = 0.1 * cells.mT @ cells / 300 + 0.01 * torch.eye(12)
    torch.testing.assert_close(curvature.scaled(0.01, 1.0), table, rtol=1e-3, atol=1e-3)
    both = curvature.scaled(0.01, 0.5) @ curvature.scaled(0.01, -0.5)
    torch.testing.assert_close(both, torch.eye(12), rtol=0, atol=1e-3)


def test_curvature_saves_steps(monkeypatch) -> None:
    cells, shares = problem()
    evaluations = []

    def counted(*values):
        evaluations[-1] += 1
        return affine(*values)

    monkeypatch.setattr(logistic, "affine", counted)
    for curvature in (Curvature.of(cells), Curvature(torch.ones(12), torch.eye(12))):
        evaluations.append(0)
        fit_logistic(cells, shares, 1e-4, torch.zeros(13, 3), curvature)
    assert evaluations[0] < 0.7 * evaluations[1]
