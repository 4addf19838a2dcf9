"""Files that are whole or not there."""

import errno
import os

import pytest

from pixel_level_contrastive_learning import files
from pixel_level_contrastive_learning.files import CannotWriteError, check_writable, write_whole


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk is full \(\d+ MiB free\); .* lost: make room or choose another"),
        (errno.EDQUOT, r"Disk quota exceeded \(\d+ MiB free\); .* lost: make room or choose"),
        (errno.EIO, "Input/output error; nothing that existed is lost: choose another place, and"),
    ],
)
def test_a_file_is_replaced_only_when_it_is_whole(tmp_path, monkeypatch, number, message) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, b"old")

    def broken(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CannotWriteError, match=f"file.txt could not be written: {message}"):
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

    with pytest.raises(CannotWriteError, match=r"a could not be written: unplugged; nothing"):
        write_whole(path, broken)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_error_without_words_is_told_by_its_name(tmp_path) -> None:
    def fail(_: object) -> None:
        raise OSError

    with pytest.raises(CannotWriteError, match="could not be written: OSError; nothing that ex"):
        write_whole(tmp_path / "a", fail)


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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_sync_is_told_once(tmp_path, monkeypatch, caplog, number) -> None:
    def unknown(_: int) -> None:
        raise OSError(number, os.strerror(number))

    files.tell_once.cache_clear()
    monkeypatch.setattr(os, "fsync", unknown)
    for name in ("a", "b"):
        write_whole(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    [record] = caplog.records
    assert record.message.startswith("files cannot be synced here, so a power cut may")


def test_a_renaming_that_fails_once_is_tried_again(tmp_path, monkeypatch, caplog) -> None:
    failures = [OSError(errno.ESTALE, "Stale file handle")]
    rename = os.replace

    def once(*paths: object) -> None:
        if failures:
            raise failures.pop()
        rename(*paths)

    files.tell_once.cache_clear()
    monkeypatch.setattr(files, "BEFORE_RENAMING_AGAIN", 0)
    monkeypatch.setattr(os, "replace", once)
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert "a file could not be renamed at once and is tried again" in caplog.text
    failures += [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(CannotWriteError, match="Input/output error"):
        write_whole(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_a_file_is_no_place_for_a_folder(tmp_path, below) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ValueError) as error:
        check_writable("out", tmp_path / "a" / below)
    assert str(error.value) == (
        f"out is {str(tmp_path / 'a' / below)!r}, but {tmp_path / 'a'} is a file; name a folder"
    )


def test_a_place_that_cannot_be_written_is_refused_without_a_trace(tmp_path, monkeypatch) -> None:
    check_writable("out", tmp_path / "new" / "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError) as error:
        check_writable("out", tmp_path / "new" / "folder")
    assert str(error.value) == (
        f"out is {str(tmp_path / 'new' / 'folder')!r}, where nothing can be written ({tmp_path} is "
        "read-only or not yours); name a place that you may write to"
    )
    assert not any(tmp_path.iterdir())


def test_an_empty_file_of_settings_is_called_empty(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("# epochs: 100\n")
    with pytest.raises(ValueError, match=r"mine\.yaml is empty; give the config\.yaml of a run"):
        files.read_settings_file(tmp_path / "mine.yaml")


def test_a_setting_that_stands_twice_is_refused(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("data: imgs\nepochs: 3\ndata: labelled\n")
    with pytest.raises(ValueError, match=r"cannot be read \(it has data twice; keep one\)"):
        files.read_settings_file(tmp_path / "mine.yaml")
