"""Files that are whole or not there."""

import os

import pytest

from pixel_level_contrastive_learning.files import CannotWriteError, write_whole


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CannotWriteError, match=r"file.txt could not be written: the disk is full \(\d+ MiB free\)"
    ):
        write_whole(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_what_breaks_in_the_middle_leaves_what_was_there(tmp_path, kind) -> None:
    path = tmp_path / "a"
    write_whole(path, lambda file: file.write(b"old"))

    def broken(file: object) -> None:
        file.write(b"ne")
        raise kind("unplugged\nand more")

    with pytest.raises(CannotWriteError, match=r"a could not be written: unplugged \(.* nothing"):
        write_whole(path, broken)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_place_where_nothing_can_be_is_told(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(CannotWriteError, match=r"b could not be written: File exists"):
        write_whole(tmp_path / "file" / "b", b"new")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch) -> None:
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), rename(*paths)))
    write_whole(tmp_path / "file.txt", b"new")
    assert done == ["sync", "replace", "sync"]
    assert (tmp_path / "file.txt").read_bytes() == b"new"
