"""Atomic files: written beside their place, synced, and moved there; and files of settings.

A full disk or a killed process leaves what was there before.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that know no fsync."""
BEFORE_RENAMING_AGAIN = 0.2
"""Seconds after which a renaming that failed is tried once more."""


class CannotWriteError(OSError):
    """A file could not be written; what was there before is still there."""


def write_whole(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: text (UTF-8), bytes, or what a function writes into it.

    Missing folders are created. Raises `CannotWriteError` where the disk is full or the like.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # the same disk: a rename, no copy
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8", "backslashreplace"))
            elif isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            sync(file)
        rename(part, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer tells a full disk as RuntimeError
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError | RuntimeError) -> CannotWriteError:
    """The error for a file that could not be written, with what to do."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    reason = reason or type(error).__name__
    there = next((folder for folder in path.parents if folder.is_dir()), None)
    left = shutil.disk_usage(there).free / 2**20 if there else None
    # torch's writer tells a full disk in words of its own, and its part of a file is still there.
    by_torch = isinstance(error, RuntimeError) and left is not None and left < 1
    number = errno.ENOSPC if by_torch else getattr(error, "errno", None)
    reason = "the disk is full" if number == errno.ENOSPC else reason
    full = number in (errno.ENOSPC, errno.EDQUOT)
    free = f" ({left:.0f} MiB free)" if full and left is not None else ""
    return CannotWriteError(
        f"{path} could not be written: {reason}{free}; nothing that existed is lost: "
        f"{'make room or ' * full}choose another place, and try again"
    )


def sync(file: IO[bytes]) -> None:
    """Make what was written to a file durable, where its file system can."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        tell_once("files cannot be synced here, so a power cut may cost new ones", str(error))


def rename(path: Path, to: Path) -> None:
    """Move a file to its place, in a second attempt if need be, as network file systems ask for."""
    try:
        path.replace(to)
    except OSError as error:
        if not path.exists():
            raise
        tell_once("a file could not be renamed at once and is tried again", str(error))
        time.sleep(BEFORE_RENAMING_AGAIN)
        path.replace(to)


@cache
def tell_once(message: str, reason: str) -> None:
    """Warn of something about the disk, the first time that it happens."""
    log.warning("%s (%s)", message, reason)


def check_writable(name: str, place: str | Path) -> None:
    """Refuse a place where no folder can be written, before any work is done for it.

    Nothing is written. Raises `ValueError`.
    """
    path = Path(place).expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{name} is {str(place)!r}, but {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"{name} is {str(place)!r}, where nothing can be written ({there} is read-only or not "
            "yours); name a place that you may write to"
        )


@contextmanager
def sole_writer(lock: Path) -> Iterator[None]:
    """A context in which no other call writes into the folder of a lock's file; it is created.

    Raises:
        ValueError: Another one does.
    """
    from filelock import FileLock, Timeout  # of the extra `train`

    folder = lock.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"out is {str(folder)!r}, where another call is writing; wait for its end, or name "
            "another folder"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make the renaming of a file durable, where the system can."""
    with suppress(OSError):  # Windows and some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_settings_file(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    1e-3 is a number (YAML 1.1 takes it for a text). Aliases (``*name``) are refused: a few lines of
    them can name gigabytes. So are keys that stand twice.

    Raises:
        ValueError: There is no such file, or it holds no mapping.
    """
    import yaml  # of the extra `train`

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*name); write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):
                names = [key.value for key, _ in node.value]
                twice = next(name for name in names if names.count(name) > 1)
                raise yaml.YAMLError(f"it has {twice} twice; keep one")
            return mapping

    # YAML 1.1 takes yes, no, on and off for booleans; `cache: off` is a word.
    Loader.yaml_implicit_resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    advice = "give the config.yaml of a run, or a file with lines such as 'epochs: 100'"
    try:
        read = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the settings in {path} cannot be read ({error}); {advice}") from error
    if not isinstance(read, dict):
        what = "is empty" if read is None else f"holds a {type(read).__name__} and no settings"
        raise ValueError(f"{path} {what}; {advice}")
    return read


def read_settings_if_any(path: Path) -> dict[str, Any]:
    """The mapping that a file of a run holds, YAML or JSON; an empty one where there is no file."""
    return read_settings_file(path) if path.is_file() else {}


def absolute_model(model: str) -> str:
    """A model's name; one in a file has the file's absolute path."""
    file, colon, function = model.rpartition(":")
    is_file = colon and file.endswith(".py") and Path(file).expanduser().is_file()
    return f"{Path(file).expanduser().absolute()}:{function}" if is_file else model
