"""What does not answer is given up, named, and passed over; what answers is read as it is."""

import os
from threading import Event

import numpy as np
import pytest
from PIL import Image

from pixel_level_contrastive_learning.data import reading
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.loader import build_loader
from pixel_level_contrastive_learning.data.reading import in_time, read_bytes
from pixel_level_contrastive_learning.data.shard_writer import write_shards
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import measure

GIVEN_UP = r"^no answer within 0\.3 s; perhaps its network mount is gone$"


@pytest.fixture
def hangs(monkeypatch):
    """Makes whatever opens a file or folder called so wait until the test ends."""
    gone = Event()
    monkeypatch.setattr(reading, "PATIENCE", 0.3)
    monkeypatch.setattr(reading, "LESS_PATIENCE", 0.1)

    def make(function: str, name: str) -> None:
        answers = getattr(os, function)

        def waits(path, *args, **settings):
            if os.path.basename(os.fspath(path)) == name:
                gone.wait()
            return answers(path, *args, **settings)

        monkeypatch.setattr(os, function, waits)

    yield make
    gone.set()
    reading.STUCK.clear()


def photos(folder, count: int = 8) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")


def test_a_call_that_does_not_answer_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(reading, "PATIENCE", 0.3)
    monkeypatch.setattr(reading, "LESS_PATIENCE", 0.1)
    answer = Event()
    with pytest.raises(ImageError, match=GIVEN_UP):
        in_time(answer.wait, "/far/a.png")
    with pytest.raises(ImageError, match=r"^no answer within 0\.1 s"):
        in_time(Event().wait, "/far/b.png")
    with pytest.raises(ImageError, match=GIVEN_UP):
        in_time(Event().wait, "/near/c.png")
    assert in_time(lambda: 7, "/far/d.png") == 7
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, "/far/e.png")
    reading.STUCK.clear()


def test_patience_comes_back_with_the_answer(monkeypatch) -> None:
    monkeypatch.setattr(reading, "PATIENCE", 0.3)
    monkeypatch.setattr(reading, "LESS_PATIENCE", 0.0)
    answer = Event()
    with pytest.raises(ImageError):
        in_time(answer.wait, "/far/a.png")
    answer.set()
    reading.STUCK["/far"].results.put(reading.STUCK["/far"].results.get(timeout=9))  # it is there
    assert in_time(lambda: answer.wait(0.05), "/far/a.png")


def test_threads_are_used_again_and_end_before_a_process_is_forked() -> None:
    reading.end_idle()
    for _ in range(5):
        in_time(int, "")
    [helper] = reading.IDLE
    if (child := os.fork()) == 0:
        os._exit(in_time(lambda: 3, ""))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert not helper.is_alive()


@pytest.mark.parametrize("part", [3, 10, 64])
def test_long_files_are_read_by_parts(tmp_path, monkeypatch, part) -> None:
    monkeypatch.setattr(reading, "PART", part)
    content, path = bytes(range(30)), tmp_path / "a"
    path.write_bytes(content)
    assert read_bytes(str(path)) == content
    assert read_bytes(str(path), 4, 20) == content[4:24]
    with pytest.raises(ImageError, match=r"^the file ends after 2 of 20 bytes$"):
        read_bytes(str(path), 28, 20)


def test_a_file_that_hangs_is_a_broken_image(tmp_path, hangs) -> None:
    photos(tmp_path / "photos")
    hangs("open", "3.jpg")
    source = open_source(tmp_path / "photos")
    assert len(source) == 8
    with pytest.raises(ImageError, match="no answer within"):
        source.open(3)
    measured = measure(source)
    assert measured.median_size == (40, 40)
    for workers in (0, 2):
        loader = build_loader(
            source, measured, image_size=(16, 16), batch_size=4, workers=workers, max_broken=0.2
        )
        assert [len(batch.index) for batch in loader] == [4, 4]
        assert list(loader.broken) == [source.name(3)]
        assert loader.broken[source.name(3)].reason.startswith("no answer within 0.")
    report = write_shards(tmp_path / "photos", tmp_path / "out", max_broken=0.2)
    assert (report.images, report.skipped) == (7, 1)
    assert (tmp_path / "out" / "skipped.txt").read_text().startswith(f"{source.name(3)}\tno answer")


def test_a_folder_that_hangs_is_told_and_left_out(tmp_path, hangs, caplog) -> None:
    photos(tmp_path / "here", 2)
    photos(tmp_path / "far", 2)
    photos(tmp_path / "linked", 1)
    hangs("scandir", "far")
    assert len(open_source(tmp_path)) == 3
    message = f"a folder cannot be read and is left out: {tmp_path / 'far'}: no answer within 0.3 s"
    assert message in caplog.text


def test_a_place_that_hangs_is_refused(tmp_path, hangs) -> None:
    photos(tmp_path / "far", 1)
    hangs("stat", "far")
    with pytest.raises(ValueError, match=r"far', which cannot be read: no answer within 0\.3 s"):
        open_source(tmp_path / "far")
