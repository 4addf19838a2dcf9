"""Pairs and their loader: a function of seed, epoch and index; broken files; resuming."""

import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixel_level_contrastive_learning.augment import Factors, Photometry, change_colour
from pixel_level_contrastive_learning.data import dataset
from pixel_level_contrastive_learning.data.dataset import (
    SampleKey,
    TooManyBrokenError,
    TwoViewBatch,
    epoch_order,
    seeded_generator,
)
from pixel_level_contrastive_learning.data.loader import (
    StreamSampler,
    TwoViewLoader,
    build_loader,
    cores,
)
from pixel_level_contrastive_learning.data.sources import (
    Source,
    Subset,
    open_source,
    split_held_out,
)
from pixel_level_contrastive_learning.data.statistics import Statistics, measure
from pixel_level_contrastive_learning.geometry import cell_centres
from pixel_level_contrastive_learning.trainer.logging import logging_to

PLAIN = Photometry(prob_jitter=0, prob_gray=0, prob_blur=0)
HALF_A_PIXEL = 0.5


def loader(source: Source, **settings: object) -> TwoViewLoader:
    """A loader of small views, with some settings of its own."""
    usual: dict = {"image_size": (24, 32), "batch_size": 4, "seed": 0, "max_broken": 1.0}
    return build_loader(source, measure(source), **(usual | settings))


def flat(pairs: TwoViewBatch) -> list[Tensor]:
    """All tensors of a batch."""
    *tensors, factors_one, factors_two, index = pairs
    return [*tensors, *factors_one, *factors_two, index]


def same(one: TwoViewBatch, two: TwoViewBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(two), strict=True))


def joined(batches: list[TwoViewBatch]) -> list[Tensor]:
    """The samples of several batches as one."""
    return [torch.cat(parts) for parts in zip(*map(flat, batches), strict=True)]


@pytest.fixture
def pictures() -> Source:
    """Twelve images in memory, of different sizes."""
    dice = np.random.default_rng(0)
    return open_source(
        [dice.integers(0, 256, (40 + 7 * i, 90 - 3 * i, 3), dtype=np.uint8) for i in range(12)]
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve PNG files, each of its own gray."""
    for i in range(12):
        Image.new("RGB", (60, 50), (20 * i,) * 3).save(tmp_path / f"{i:02d}.png")
    return tmp_path


# What a batch is.


def test_convention_shapes_and_types(pictures) -> None:
    batch = next(iter(loader(pictures)))
    assert [tensor.shape for tensor in flat(batch)] == [
        *[(4, 3, 24, 32)] * 2,
        *[(4, 2, 3)] * 2,
        *[(4,)] * 13,
    ]
    assert batch.one.dtype == batch.two.dtype == torch.uint8
    assert batch.map_one.dtype == torch.float32
    assert batch.index.dtype == torch.int64
    assert type(batch) is TwoViewBatch
    assert type(batch.factors_one) is Factors
    assert batch.one.is_contiguous(memory_format=torch.channels_last)
    change_colour(batch.one / 255, batch.factors_one)


def test_deep_data_comes_as_floats_of_the_unit_range() -> None:
    images = [torch.rand(2, 50, 60) * 3000 - 500 for _ in range(5)]
    batch = next(iter(loader(open_source(images))))
    assert batch.one.shape == (4, 2, 24, 32)
    assert batch.one.dtype == torch.float32
    assert batch.one.min() >= 0
    assert batch.one.max() <= 1
    assert batch.one.std() > 0.1


def test_an_image_of_its_own_coordinates_reads_back() -> None:
    y, x = torch.meshgrid(torch.arange(97) + 0.5, torch.arange(131) + 0.5, indexing="ij")
    source = open_source([torch.stack((x, y))] * 8)
    form = Statistics(2, (0, 0), (1, 1), (0.0, 0.0), (200.0, 200.0), (97, 131))
    for rotation in (0, 30):
        batches = build_loader(
            source, form, image_size=(24, 32), batch_size=8, prob_vflip=0.5, max_rotation=rotation
        )
        batch = next(iter(batches))
        for pixels, to_image in ((batch.one, batch.map_one), (batch.two, batch.map_two)):
            expected = cell_centres(to_image, (24, 32)).mT.unflatten(2, (24, 32))
            assert (200 * pixels - expected).abs().max() < HALF_A_PIXEL
            assert len(to_image.flatten(1).unique(dim=0)) == 8
        assert not torch.equal(batch.map_one, batch.map_two)


def test_crops_and_flips_are_drawn_as_asked(pictures) -> None:
    batches = list(loader(pictures, crop_area=(0.25, 0.25), aspect_ratio=(1, 1), prob_hflip=1.0))
    for batch in batches:
        for maps in (batch.map_one, batch.map_two):
            assert (maps[:, 0, 0] < 0).all()
            assert (maps[:, 1, 1] > 0).all()
            for index, to_image in zip(batch.index.tolist(), maps, strict=True):
                height, width = pictures.open(index).size
                area = (to_image[0, 0] * to_image[1, 1]).abs() / (height * width)
                assert area == pytest.approx(0.25, rel=0.06)  # whole pixels


def test_only_colour_photographs_are_solarised() -> None:
    always = Photometry(prob_solarise=1.0)
    for channels in (1, 3):
        images = torch.randint(0, 256, (4, channels, 30, 30), dtype=torch.uint8)
        batch = next(iter(loader(open_source(list(images)), photometry=(PLAIN, always))))
        assert batch.factors_two.solarise.all() == (channels == 3)
        assert not batch.factors_one.solarise.any()
        assert (batch.factors_one.brightness == 1).all()


# A function of seed, epoch and index.


def test_a_sample_is_the_same_alone_and_in_any_batch(pictures) -> None:
    alone = joined(list(loader(pictures, batch_size=1)))
    for batch_size in (3, 12):
        samples = joined(list(loader(pictures, batch_size=batch_size)))
        assert all(torch.equal(a, b) for a, b in zip(alone, samples, strict=True))


def test_what_a_sample_goes_through_does_not_hang_on_its_position(pictures) -> None:
    view_loader = loader(pictures)
    key = view_loader.sampler.key(5)
    one, two = (view_loader.loader.dataset[[k]].batch for k in (key, key._replace(position=7)))
    assert same(one, two)


def test_an_image_is_changed_anew_each_epoch_and_by_each_seed(pictures) -> None:
    view_loader = loader(pictures, batch_size=12)
    first, second = next(iter(view_loader)), next(iter(view_loader))
    other = next(iter(loader(pictures, batch_size=12, seed=1)))
    for batch in (second, other):
        assert sorted(batch.index.tolist()) == list(range(12))
        first_order, order = first.index.argsort(), batch.index.argsort()
        assert (first.map_one[first_order] != batch.map_one[order]).flatten(1).any(dim=1).all()
        assert (first.factors_one.sigma[first_order] != batch.factors_one.sigma[order]).all()


def test_no_other_generator_is_drawn_from(pictures) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(pictures))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_workers_give_what_this_process_gives(folder) -> None:
    source = open_source(folder)
    alone, shared = loader(source), loader(source, workers=2)
    for _ in range(2):  # the workers live on
        batches = list(shared)
        assert len(batches) == 3
        for one, two in zip(alone, batches, strict=True):
            assert same(one, two)
        assert batches[0].one.is_shared()
    assert shared.waited > 0


def test_processes_see_the_same_samples_with_the_same_changes(pictures) -> None:
    alone = list(loader(pictures, batch_size=6))
    ranks = [list(loader(pictures, batch_size=3, rank=r, world=2)) for r in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        shared = zip(flat(whole), joined(parts), strict=True)
        assert all(torch.equal(one, two) for one, two in shared)


@pytest.mark.parametrize(("area", "scale"), [(0.01, 1), (0.06, 2), (0.25, 4), (1.0, 8)])
def test_a_large_jpeg_is_decoded_as_small_as_its_views_allow(area, scale, tmp_path) -> None:
    Image.effect_noise((1600, 1600), 50).save(tmp_path / "a.jpg")
    source = open_source(tmp_path)
    opened, asked = source.open(0), []

    def load(wanted: int) -> object:
        asked.append(wanted)
        return opened.load(wanted)

    source.open = lambda index: replace(opened, load=load)
    settings: dict = {"crop_area": (area, area), "aspect_ratio": (1, 1)}
    views = loader(source, image_size=(130, 130), batch_size=1, **settings)
    asked.clear()  # of what was looked at for the statistics
    next(iter(views))
    assert asked == [scale]  # one decode for both views


def test_few_or_many_files_held_at_once_make_no_difference(pictures, monkeypatch) -> None:
    expected = next(iter(loader(pictures, batch_size=12)))
    monkeypatch.setattr(dataset, "MAX_OPEN_VALUES", 1)
    assert same(next(iter(loader(pictures, batch_size=12))), expected)


# Resuming.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_stood(folder, workers) -> None:
    source = open_source(folder)
    whole = loader(source, batch_size=3)
    expected = [batch for _ in range(2) for batch in whole]
    view_loader = loader(source, batch_size=3, workers=workers)
    assert len(view_loader) == 4
    seen = []
    for batch in view_loader:
        seen.append(batch)
        if len(seen) == 2:
            break
    assert view_loader.sampler.samples == 6  # not what workers have loaded ahead
    resumed = loader(source, batch_size=3, workers=workers)
    resumed.start_at(6)
    seen += [batch for _ in range(2) for batch in resumed]
    assert all(same(one, two) for one, two in zip(seen, expected, strict=True))
    view_loader.start_at(0)
    assert same(next(iter(view_loader)), expected[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_ahead_over_the_ends_of_epochs(folder, workers) -> None:
    alone = loader(open_source(folder), batch_size=1)
    view_loader = loader(open_source(folder), batch_size=12, workers=workers)
    first = list(view_loader)
    assert (ahead := view_loader.ahead) is not None
    for epoch in range(1, 4):  # of one batch each
        assert view_loader.sampler.samples == 12 * epoch
        first += list(view_loader)
        assert view_loader.ahead is ahead
    assert [batch.index.tolist() for batch in first] == [
        [batch.index.item() for batch in alone] for _ in range(4)
    ]
    view_loader.start_at(12)
    assert same(next(iter(view_loader)), first[1])


# Broken files.


def spoil(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number:02d}.png").write_bytes(b"text" * number)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_takes_the_place_of_a_broken_one(folder, tmp_path, workers) -> None:
    source = open_source(folder)
    before = next(iter(loader(source, batch_size=12)))
    order = before.index.tolist()
    spoil(folder, order[2], order[3], order[11])
    skipped = tmp_path / "skipped.txt"
    view_loader = loader(
        source, batch_size=12, workers=workers, skipped_file=skipped, max_broken=0.25
    )
    batch = next(iter(view_loader))
    expected = list(order)
    expected[2] = expected[3] = order[4]
    expected[11] = order[0]  # the order goes round
    assert batch.index.tolist() == expected
    # Of the same size, so the dice of the place give the same map.
    assert torch.equal(batch.map_one, before.map_one)
    assert batch.one[2].unique().tolist() == [20 * order[4]]
    lines = skipped.read_text().splitlines()
    assert len(lines) == len(view_loader.broken) == 3
    assert all(line.split("\t")[0].endswith(".png") for line in lines)
    assert all("not an image" in line or "0 bytes" in line for line in lines)
    list(view_loader)
    list(view_loader)
    assert skipped.read_text().splitlines() == lines  # told once
    resumed = loader(source, batch_size=12, skipped_file=skipped)
    list(resumed)
    assert skipped.read_text().splitlines() == lines  # in a resumed run too


@pytest.mark.parametrize("damage", ["truncated", "vanished", "deep", "folder"])
def test_no_damage_is_fatal(folder, damage) -> None:
    source = open_source(folder)
    view_loader = loader(source, batch_size=12)
    path = folder / "05.png"
    if damage == "truncated":
        Image.effect_noise((60, 50), 90).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "deep":
        Image.new("I;16", (60, 50)).save(path)
    else:
        path.unlink()
    if damage == "folder":
        path.mkdir()
    batch = next(iter(view_loader))
    assert 5 not in batch.index
    assert list(view_loader.broken) == [str(path)]


def test_one_broken_file_of_a_few_does_not_stop_the_run(folder, tmp_path) -> None:
    source = open_source(folder)
    form = measure(source)
    spoil(folder, 5)
    settings: dict = {"image_size": (8, 8), "batch_size": 3, "seed": 0, "workers": 0}
    assert len(list(build_loader(source, form, **settings))) == 4
    spoil(folder, 6)
    with pytest.raises(
        TooManyBrokenError, match=r"^2 of 12 images cannot be used, more than the 1\.00%"
    ):
        list(build_loader(source, form, **settings))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_files_stop_the_run(folder, tmp_path, workers) -> None:
    source = open_source(folder)
    form = measure(source)
    spoil(folder, 1, 2, 3)
    skipped = tmp_path / "skipped.txt"

    def run(max_broken: float) -> None:
        settings: dict = {"image_size": (8, 8), "batch_size": 3, "seed": 0, "workers": workers}
        list(build_loader(source, form, max_broken=max_broken, skipped_file=skipped, **settings))

    run(0.25)  # 3 of 12 are not more than a quarter
    assert len(skipped.read_text().splitlines()) == 3
    with pytest.raises(TooManyBrokenError) as error:
        run(0.2)
    message = str(error.value)
    assert "3 of 12 images cannot be used, more than the 20.00% that max_broken allows" in message
    assert "fix or remove them, or continue with a larger max_broken" in message
    assert "not an image that can be read" in message
    skipped.unlink()
    with pytest.raises(TooManyBrokenError, match=r"^1 of 12 images cannot be used") as error:
        run(0.0)  # already the worker finds too many
    assert "Traceback" not in str(error.value)
    assert len(skipped.read_text().splitlines()) == 1
    spoil(folder, *range(12))
    with pytest.raises(TooManyBrokenError, match=r"^no image can be read any more"):
        run(1.0)
    assert len(skipped.read_text().splitlines()) == 12


def test_a_name_cannot_break_the_list(tmp_path) -> None:
    for name in ("a\nb\tc.png", "d.png"):
        Image.new("L", (9, 9)).save(tmp_path / name)
    view_loader = loader(open_source(tmp_path), batch_size=2, skipped_file=tmp_path / "skipped.txt")
    (tmp_path / "a\nb\tc.png").write_bytes(b"")
    list(view_loader)
    (line,) = (tmp_path / "skipped.txt").read_text().splitlines()
    assert line.split("\t")[0].endswith("a\\nb\\tc.png")


def test_a_name_that_is_no_text_is_listed_once_by_its_bytes(tmp_path, capsys, monkeypatch) -> None:
    # What pytest catches of the log it sends to other processes, as text.
    monkeypatch.setattr(logging.getLogger("pixel_level_contrastive_learning"), "propagate", False)
    name = os.fsencode(tmp_path) + b"/\xff\xc2\x85.png"  # the end is a line break in Unicode
    for path in (os.fsdecode(name), tmp_path / "d.png"):
        Image.new("L", (9, 9)).save(path)
    source = open_source(tmp_path)
    form = measure(source)
    Path(os.fsdecode(name)).write_bytes(b"")
    skipped = tmp_path / "skipped.txt"
    with logging_to(terminal=True) as log:
        log.open(tmp_path / "train.log")
        for _ in range(2):  # and once more by a run that goes on
            list(build_loader(source, form, image_size=(8, 8), batch_size=2, skipped_file=skipped))
    assert skipped.read_bytes() == name + b"\tthe file is empty (0 bytes)\n"
    for text in ((tmp_path / "train.log").read_text(encoding="utf-8"), capsys.readouterr().err):
        assert "/\\udcff\x85.png: the file is empty (0 bytes)" in text


def test_a_worker_lives_through_ctrl_c(folder) -> None:
    view_loader = loader(open_source(folder), workers=1, prefetch=1)
    batches = iter(view_loader)
    next(batches)
    for worker in view_loader.loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 2


def test_a_worker_says_nothing_of_a_run_that_hangs_up() -> None:
    program = """
import socket
from multiprocessing import resource_sharer
from pixel_level_contrastive_learning.data.loader import follow_the_run

follow_the_run(0)
address, _ = resource_sharer.DupFd(1)._id
with socket.socket(socket.AF_UNIX) as run:
    run.connect(address)
resource_sharer.stop(timeout=20)
raise ValueError("of the worker itself")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.endswith("ValueError: of the worker itself\n")


# The rest.


def test_settings_out_of_range_are_refused_together(pictures) -> None:
    with pytest.raises(ValueError) as error:
        loader(pictures, crop_area=(0.5, 0.2), workers=-1, prob_hflip=2, max_broken=-1, prefetch=0)
    names = [line.split(" is ")[0] for line in str(error.value).splitlines()]
    assert names == ["crop_area", "prob_hflip", "max_broken", "workers", "prefetch"]


def test_few_images_are_held_out_and_none_of_a_small_set() -> None:
    for count, expected in ((1, 0), (199, 0), (200, 4), (999, 19), (100_000, 256)):
        source = Subset(open_source([0]), torch.zeros(count, dtype=torch.int64))
        training, held_out = (part.indices for part in split_held_out(source))
        assert len(held_out) == expected
        assert torch.equal(torch.cat((training, held_out)).sort().values, torch.arange(count))
        torch.manual_seed(count)
        assert torch.equal(split_held_out(source)[1].indices, held_out)


def test_the_loader_loads_neither_kornia_nor_a_decoder() -> None:
    heavy = "('kornia', 'tifffile', 'webdataset', 'torchvision', 'PIL')"
    code = (
        "import sys, pixel_level_contrastive_learning.data.loader; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_strip_a_speck_and_a_giant_make_a_batch(tmp_path) -> None:
    Image.new("RGB", (10000, 1), (50, 50, 50)).save(tmp_path / "strip.png")
    Image.new("RGB", (1, 10000), (50, 50, 50)).save(tmp_path / "tower.png")
    Image.new("RGB", (2, 2), (50, 50, 50)).save(tmp_path / "speck.png")
    Image.new("L", (20000, 20000), 50).save(tmp_path / "giant.jpg")
    batch = next(iter(loader(open_source(tmp_path))))
    assert sorted(batch.index.tolist()) == [0, 1, 2, 3]
    for views in (batch.one, batch.two):
        assert views.unique().tolist() == [50]


# Real images.


@pytest.mark.parametrize(
    ("name", "channels", "deep", "count"),
    [("camvid", 3, False, 367), ("nuclei", 3, False, 220), ("hippocampus16", 1, True, 1206)],
)
def test_real_folders_need_nothing_but_their_name(streets, name, channels, deep, count) -> None:
    folder = streets.parent / name / "images" / "train"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    source = open_source(folder)
    assert len(source) == count
    form = measure(source, sample=50)
    assert form.channels == channels
    assert (form.low is not None) == deep
    view_loader = build_loader(source, form, image_size=(64, 64), batch_size=16, max_broken=0.0)
    batch = next(iter(view_loader))
    pixels = batch.one if deep else batch.one / 255
    assert pixels.shape == (16, channels, 64, 64)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert pixels.mean(dim=(0, 2, 3)).sub(torch.tensor(form.mean)).abs().max() < 0.2


def stream(order: StreamSampler, passes: int = 1) -> list[SampleKey]:
    """The samples of some passes, the clock moved as a loader moves it."""
    samples = []
    for _ in range(passes):
        for batch in islice(order, order.batches_left):
            samples += batch
            order.start_at(order.samples + order.samples_per_step)
    return samples


def test_every_image_comes_once_an_epoch() -> None:
    samples = stream(StreamSampler(10, 4, seed=0), passes=5)  # two batches a pass: 40 samples
    assert [place.epoch for place in samples] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    assert [place.position for place in samples] == list(range(10)) * 4
    for start in range(0, 40, 10):
        assert sorted(place.index for place in samples[start : start + 10]) == list(range(10))
    assert samples[:10] != samples[10:20]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert stream(StreamSampler(50, 5, seed=1)) == stream(StreamSampler(50, 5, seed=1))
    assert stream(StreamSampler(50, 5, seed=1)) != stream(StreamSampler(50, 5, seed=2))
    orders = [epoch_order(*numbers, 50) for numbers in [(0, 0), (0, 1), (1, 0)]]
    assert not any(torch.equal(one, other) for one, other in combinations(orders, 2))


def test_fewer_images_than_a_batch_wrap_round() -> None:
    order = StreamSampler(3, 8, seed=0)
    assert len(order) == 1
    batch = next(iter(order))
    assert [place.epoch for place in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_run_goes_on_with_another_batch_size() -> None:
    whole = stream(StreamSampler(100, 5, seed=0), passes=2)
    order = StreamSampler(100, 10, seed=0)
    order.start_at(30)
    assert stream(order) == whole[30:100]  # to the end of the epoch
    assert stream(order) == whole[100:200]


def test_generators_differ_with_every_number() -> None:
    def draw(*numbers: int) -> float:
        return torch.rand(2, generator=seeded_generator(*numbers)).sum().item()

    numbers = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 0), (1, 1, 11), (1, 11, 1)]
    assert len({draw(*key) for key in numbers}) == len(numbers)
    assert draw(1, 2) == draw(1, 2)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        StreamSampler(0, 0, seed=-1, rank=2, world=2)
    assert str(error.value).splitlines() == [
        "images is 0; it must be a whole number of at least 1",
        "batch_size is 0; it must be a whole number of at least 1",
        "seed is -1; it must be a whole number of at least 0",
        "rank is 2; it must be below world (2)",
    ]
    with pytest.raises(ValueError, match=r"samples is 1.5; it must be a whole number"):
        StreamSampler(3, 1, seed=0).start_at(1.5)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000\n", 8), ("300000 100000\n", 3), ("150000 100000\n", 2), ("900000 100000\n", 8)],
)
def test_cores_are_those_that_the_container_leaves(monkeypatch, tmp_path, limit, expected) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("pixel_level_contrastive_learning.data.loader.CGROUP", tmp_path)
    assert cores() == 8
    (tmp_path / "cpu.max").write_text(limit)
    assert cores() == expected
