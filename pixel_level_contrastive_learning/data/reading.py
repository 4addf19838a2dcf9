"""Read files that may never answer: what takes too long is given up, and is then a broken image.

A read that hangs, as on a network mount that is gone, cannot be interrupted. So it is made by a
thread that is kept for it, and a thread that hangs is left behind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, Any, TypeVar

from .image import CUT, MAX_BYTES, ImageError

T = TypeVar("T")

PATIENCE, LESS_PATIENCE = 60.0, 5.0
"""Seconds after which a read is given up; and where another one in its folder still hangs."""
READER_PATIENCE = 600.0
"""Seconds that a reader may compute with what has been read."""
PART = 2**26
"""Bytes that must arrive within that time; longer files are read by such parts."""
NO_WAITING = getattr(os, "O_NONBLOCK", 0)
"""A flag with which the opening of a named pipe does not wait for somebody to write to it."""


class Helper(Thread):
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self.results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while call := self.calls.get():
            try:
                self.results.put((call(), None))
            except BaseException as error:  # raised where the call was asked for
                self.results.put((None, error))
            del call  # and what it holds


IDLE: list[Helper] = []
STUCK: dict[str, Helper] = {}
"""By folder, the last helper there that did not answer."""


def in_time(call: Callable[[], T], place: str | None) -> T:
    """What a call returns that reads a file, or a folder; or one that only computes, of no place.

    Raises:
        ImageError: It does not answer.
    """
    folder = None if place is None else os.path.dirname(place)
    stuck = STUCK.get(folder or "")
    limit = LESS_PATIENCE if stuck and stuck.results.empty() else PATIENCE
    if folder is None:
        limit = READER_PATIENCE
    helper = None
    with suppress(IndexError):
        helper = IDLE.pop()
    helper = helper or Helper()
    helper.calls.put(call)
    try:
        result, error = helper.results.get(timeout=limit)
    except Empty:
        if folder is None:
            raise ImageError(f"its content was not decoded within {limit:g} s") from None
        STUCK[folder] = helper
        raise ImageError(
            f"no answer within {limit:g} s; perhaps its network mount is gone"
        ) from None
    IDLE.append(helper)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]  # of the call


def end_idle() -> None:
    """End the threads that wait for a call: a process is forked safely only without any."""
    while IDLE:
        helper = IDLE.pop()
        helper.calls.put(None)
        helper.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=end_idle, after_in_child=STUCK.clear)


class Kept:
    """Opened files that are kept for who asks for them again, each used by one thread at a time.

    Args:
        most: How many are kept: those that were used last.
    """

    def __init__(self, most: int) -> None:
        self.most, self.lock = most, Lock()
        self.files: list[tuple[Hashable, Any]] = []
        self.left: list[tuple[Hashable, Any]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.leave)

    def leave(self) -> None:
        """Use no file that another process moves in; a decoder may not even be closed here."""
        self.left += self.files
        self.lock, self.files = Lock(), []

    @contextmanager
    def opened(self, key: Hashable, open_it: Callable[[], Any]) -> Iterator[Any]:
        """One that was kept under a key, or else one that is opened now; kept unless it fails."""
        with self.lock:
            index = next((i for i, (other, _) in enumerate(self.files) if other == key), None)
            file = None if index is None else self.files.pop(index)[1]
        file = open_it() if file is None else file
        try:
            yield file
        except BaseException:
            file.close()
            raise
        with self.lock:
            self.files.append((key, file))
            old = self.files.pop(0)[1] if len(self.files) > self.most else None
        if old is not None:
            old.close()


def version_of(path: str) -> Hashable:
    """What changes when a file is written anew."""
    status = os.stat(path)
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def open_regular(path: str) -> IO[bytes]:
    """A file, opened for reading.

    Raises:
        OSError: It cannot be opened.
        ImageError: It is a pipe, a socket or a device, which may never end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAITING))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ImageError("a pipe, a socket or a device, and not a file")
    return file


def read_bytes(path: str, offset: int = 0, length: int = -1) -> bytes:
    """A file, or a part of it.

    Raises:
        ImageError: It cannot be read, does not answer, is too long, or ends before that part.
    """
    parts: list[bytes] = []
    left = length
    while left and (not parts or parts[-1]):
        try:
            part, left = in_time(partial(read_part, path, offset, left), path)
        except OSError as error:
            raise ImageError(error.strerror or type(error).__name__) from error
        parts.append(part)
        offset += len(part)
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(content) < length:
        raise ImageError(f"the file ends after {len(content)} of {length} bytes")
    return content


def read_part(path: str, offset: int, length: int) -> tuple[bytes, int]:
    """At most `PART` bytes of a file from ``offset`` on, and how many of those wanted are left."""
    with open_regular(path) as file:
        if length < 0:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ImageError(f"a file of {size / 2**30:.1f} GiB; {CUT}")
            length = size
        file.seek(offset)
        content = file.read(min(length, PART))
        return content, length - len(content)
