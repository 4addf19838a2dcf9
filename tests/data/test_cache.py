"""Decoded images in memory: the same samples, decoded once, by all workers together."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pixel_level_contrastive_learning.augment import Photometry
from pixel_level_contrastive_learning.data import cache
from pixel_level_contrastive_learning.data.cache import DecodedCache, can_share
from pixel_level_contrastive_learning.data.image import SCALES, ImageError, to_tensor
from pixel_level_contrastive_learning.data.loader import build_loader
from pixel_level_contrastive_learning.data.sources import Source, open_source
from pixel_level_contrastive_learning.data.statistics import measure

ROOM = 2**22


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JPEGs, large ones among them, and a gray PNG."""
    dice = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 60), (900, 700), (64, 64), (90, 70)]):
        pixels = dice.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    Image.fromarray(dice.integers(0, 255, (50, 30), dtype=np.uint8)).save(tmp_path / "4.png")
    return tmp_path


def batches(source: Source, **settings: object) -> list[torch.Tensor]:
    """All tensors of three passes over the images, whose small views decode at several scales."""
    loader = build_loader(
        source, measure(source), image_size=(24, 24), batch_size=4, max_rotation=20, **settings
    )
    loaded = [batch for _ in range(3) for batch in loader]
    return [
        tensor for batch in loaded for tensor in (batch.one, batch.two, batch.map_one, batch.index)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_the_same_bit_for_bit(folder, workers) -> None:
    source = open_source(str(folder))
    kept = DecodedCache(source, ROOM)
    expected, actual = batches(source), batches(kept, workers=workers)
    assert all(map(torch.equal, actual, expected))
    assert kept.used > 40 * 60 * 3 + 64 * 64 * 3
    scales = [{int(place) for place in places if place} for places in kept.places]
    assert max(map(len, scales)) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_is_read_once_by_all_workers_together(folder, workers) -> None:
    source = DecodedCache(open_source(str(folder)), ROOM)
    plain = Photometry(prob_jitter=0, prob_gray=0, prob_blur=0)
    loader = build_loader(
        source,
        measure(source),
        image_size=(24, 24),
        batch_size=5,
        crop_area=(1, 1),
        aspect_ratio=(1, 1),
        photometry=(plain, plain),
        workers=workers,
        prefetch=1,
        max_broken=0,
    )
    for _ in range(2):  # a batch that is ahead was decoded before
        list(loader)
    for path in folder.iterdir():
        path.unlink()
    for _ in range(2):
        assert [len(batch.one) for batch in loader] == [5]


def test_deep_images_come_back_as_they_were(tmp_path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", planarconfig="separate")
    source = open_source(str(tmp_path))
    kept = DecodedCache(source, ROOM)
    for _ in range(2):
        image = kept.open(0)
        assert (image.size, image.channels, image.high_depth) == ((20, 30), 3, True)
        assert torch.equal(image.decode().pixels, torch.from_numpy(values))
    assert kept.used > values.nbytes


def test_scale_and_origin_of_a_turned_jpeg_come_back(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    dice = np.random.default_rng(0).integers(0, 255, (903, 755, 3), dtype=np.uint8)
    Image.fromarray(dice).save(tmp_path / "a.jpg", exif=exif)
    source = open_source(str(tmp_path))
    kept = DecodedCache(source, ROOM)
    for scale in SCALES:
        expected = source.open(0).decode(scale)
        for _ in range(2):
            decoded = kept.open(0).decode(scale)
            assert (decoded.scale, decoded.origin) == (expected.scale, expected.origin)
            assert torch.equal(to_tensor(decoded.pixels), to_tensor(expected.pixels))


def test_a_small_image_comes_in_full_at_any_scale_and_is_kept_once(folder) -> None:
    kept = DecodedCache(open_source(str(folder / "0.jpg")), ROOM)
    assert {kept.open(0).decode(scale).scale for scale in SCALES} == {1}
    assert 40 * 60 * 3 < kept.used < 40 * 60 * 3 + 200


def test_images_with_missing_values_are_decoded_anew(tmp_path) -> None:
    values = np.ones((20, 30), np.float32)
    values[3:6] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    kept = DecodedCache(open_source(str(tmp_path)), ROOM)
    for _ in range(2):
        assert kept.open(0).decode().known.logical_not().sum() == 90
    assert kept.used == 0


def test_what_does_not_fit_is_decoded_anew(folder) -> None:
    source = open_source(str(folder))
    kept = DecodedCache(source, 64 * 64 * 3 + 500)
    assert all(map(torch.equal, batches(kept), batches(source)))
    assert 0 < kept.used <= 64 * 64 * 3 + 500


def test_a_broken_image_stays_broken(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    kept = DecodedCache(open_source(str(tmp_path)), ROOM)
    for _ in range(2):
        with pytest.raises(ImageError):
            kept.open(0).decode()
    assert kept.name(0).endswith("a.png")


def test_a_killed_writer_stops_nobody(folder, monkeypatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.01)
    source = open_source(str(folder))
    kept = DecodedCache(source, ROOM)
    kept.lock.acquire()  # as by a worker that was killed with it
    assert all(map(torch.equal, batches(kept), batches(source)))
    assert kept.used == 0


def test_only_forked_workers_share(monkeypatch) -> None:
    monkeypatch.setattr(cache.multiprocessing, "get_start_method", lambda **_: "spawn")
    assert can_share(0)
    assert not can_share(2)
    monkeypatch.undo()
    assert can_share(2) == (cache.multiprocessing.get_start_method() == "fork")


def test_how_processes_start_stays_for_the_user_to_choose() -> None:
    code = """
import multiprocessing, torch
from pixel_level_contrastive_learning.data.cache import DecodedCache, can_share
from pixel_level_contrastive_learning.data.sources import open_source
DecodedCache(open_source([torch.zeros(3, 8, 8)]), 2**20)
can_share(2)
multiprocessing.set_start_method("spawn")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
