"""The folder of a run: its lock, what may be written there, checkpoints, metrics of past steps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from filelock import FileLock, Timeout

from .. import run_layout
from ..files import cannot_write, check_writable, write_whole
from .logging import LOG

ORPHANS_LIVE = 15.0
"""Seconds that the loader's workers may outlive a killed run, and hold its lock."""
STEPS = frozenset({"step", "hit_step"})
"""What counts steps in a line of metrics: its own, and when it was last measured how often cells
find their spot."""


class RunDir:
    """The folder of a run, at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / run_layout.CHECKPOINTS

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder where this run may not be written; writes nothing.

        Raises:
            ValueError: It is a file, holds something and neither flag is given, or something that
                the run would replace or could not go on from.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out is {self.path}, which is a file; name a folder")
        if str(self.path).encode(errors="ignore").decode() != str(self.path):
            raise ValueError(
                f"out is {str(self.path)!r}, which is not UTF-8; give a folder whose name is"
            )
        check_writable("out", self.path)
        if (resume or overwrite) and not self.holds_run():
            for name in run_layout.EVERYTHING:
                dry_run = name == run_layout.PREVIEW and self.holds_dry_run()
                if (self.path / name).exists() and not dry_run:
                    raise ValueError(
                        f"out is {self.path}, which is not a run but has {name}, which a run would "
                        "replace; name another folder"
                    )
        if resume and (self.path / run_layout.WEIGHTS).exists() and not self.checkpoint_paths():
            raise ValueError(
                f"out is {self.path}, a finished run without checkpoints to resume from; start a "
                f"new one with --weights {self.path} in another folder, or replace it (--overwrite)"
            )
        leftovers = (run_layout.PREVIEW, *run_layout.LOCK_FILES)  # left by a dry run, and by a kill
        used = self.path.is_dir() and any(
            path.name not in leftovers for path in self.path.iterdir()
        )
        if used and not resume and not overwrite:
            raise ValueError(
                f"out is {self.path}, which is not empty; resume the run in it (--resume), "
                "replace it (--overwrite), or name another folder"
            )

    def holds_dry_run(self) -> bool:
        """Whether the previews here are a run's, dry or not, and nobody else's pictures."""
        previews = self.path / run_layout.PREVIEW
        return previews.is_dir() and all(
            p.match(f"{run_layout.PAIRS}*.png") for p in previews.iterdir()
        )

    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / run_layout.CONFIG).is_file() or self.checkpoints.is_dir()

    def check_outside(self, places: Sequence[str]) -> None:
        """Refuse to overwrite a run that is needed: for its images, masks, weights or settings."""
        for place in places:
            path = Path(place).expanduser()
            as_named = path.absolute(), self.path.absolute()
            for needed, run in (as_named, (path.resolve(), self.path.resolve())):
                if needed == run:
                    raise ValueError(
                        f"{place!r} is the run that --overwrite would remove; name another out"
                    )
                for name in run_layout.EVERYTHING:
                    if needed.is_relative_to(run / name):
                        raise ValueError(
                            f"{place!r} is inside {self.path / name}, which --overwrite would "
                            "remove; name another out"
                        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process may train here; the folder is made.

        The system gives the lock back when its process ends, however it ends. A folder that was
        made and holds nothing at the end is removed.

        Raises:
            ValueError: Another process trains here, or nothing can be written.
        """
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.acquire()
            (self.path / run_layout.LOCK_HOLDER).write_text(f"{os.getpid()} {socket.gethostname()}")
        except OSError as error:
            raise ValueError(
                f"out is {self.path}, which is not writable ({error.strerror}); name a folder "
                "that you may write to"
            ) from error
        try:
            yield
        finally:
            for name in run_layout.LOCK_FILES:
                (self.path / name).unlink(missing_ok=True)
            lock.release()
            if is_new:
                with suppress(OSError):  # it is not empty
                    self.path.rmdir()

    def check_not_training(self) -> None:
        """Refuse a folder where another process trains; writes nothing."""
        if (self.path / run_layout.LOCK).exists():
            self.acquire().release()

    def acquire(self) -> FileLock:
        """The lock, taken; waits only for workers that a killed run has left behind."""
        lock = FileLock(self.path / run_layout.LOCK)
        deadline = time.monotonic() + ORPHANS_LIVE
        while True:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                pid, host = self.lock_holder()
                if is_running(pid, host) or time.monotonic() > deadline:
                    raise ValueError(
                        f"out is {self.path}, where process {pid} on {host} is training; wait for "
                        "it to end, stop it, or name another folder"
                    ) from None
                time.sleep(0.2)
            else:
                if (self.path / run_layout.LOCK).exists():
                    return lock
                lock.release()  # the one before has just removed the file

    def lock_holder(self) -> tuple[str, str]:
        """Process id and host of the process that trains here."""
        with suppress(OSError, ValueError):
            pid, host = (self.path / run_layout.LOCK_HOLDER).read_text().split(maxsplit=1)
            return pid, host
        return "?", "?"

    def remove_run(self) -> None:
        """Remove what runs write, and nothing else."""
        for name in run_layout.EVERYTHING:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def truncate(self, step: int) -> int:
        """Drop the lines of metrics and probes after a step (all at 0); how many those were.

        A last line that a killed run left unfinished is dropped too. Lines that `renumber` has made
        take their places first.
        """
        dropped = 0
        for path in self.records():
            with suppress(FileNotFoundError):
                renumbered(path, step).replace(path)
            lines = path.read_bytes().splitlines()
            kept: list[bytes] = []
            newest = -1
            for line in lines:
                number = step_of_line(line)
                if newest < number <= step and step:  # in order: damaged digits may repeat one
                    newest = number
                    kept.append(line)
            if lines:
                write_whole(path, b"".join(line + b"\n" for line in kept))
            dropped += len(lines) - len(kept)
        return dropped

    def records(self) -> list[Path]:
        """The files there that have a line a step."""
        paths = (self.path / name for name in (run_layout.METRICS, run_layout.PROBE))
        return [path for path in paths if path.exists()]

    def last_metrics(self) -> dict[str, Any]:
        """The metrics of the last step that was written down; nothing where none was."""
        path = self.path / run_layout.METRICS
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        metrics: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return metrics

    def checkpoint_path(self, step: int) -> Path:
        """The file of a step's checkpoint."""
        return self.checkpoints / f"{run_layout.STEP}{step:08d}.ckpt"

    def numbered(self) -> list[Path]:
        """The checkpoints of single steps, newest first."""
        return sorted(self.checkpoints.glob(f"{run_layout.STEP}*.ckpt"), reverse=True)

    def checkpoint_paths(self) -> list[Path]:
        """The checkpoints, newest first, and the link to one of them after all others."""
        return [*self.numbered(), *self.checkpoints.glob(run_layout.LAST)]

    def newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read and its contents, or None.

        One that cannot be read, such as one cut off by a full disk, is named in a warning.

        Raises:
            ValueError: There are some, and none can be read.
            OSError: The disk does not answer.
        """
        paths = self.checkpoint_paths()
        for path in paths:
            try:
                checkpoint = read_checkpoint(path)
                int(checkpoint["steps_done"])
            except FileNotFoundError:  # renumbered by another process
                continue
            except Exception as error:  # whatever a broken file makes the reader raise
                if isinstance(error, MemoryError) or (
                    isinstance(error, OSError) and error.errno != errno.EINVAL  # of a file cut off
                ):
                    raise  # another time it may be read
                LOG.warning(
                    "the checkpoint %s cannot be read (%s: %s); using the one before it",
                    path,
                    type(error).__name__,
                    str(error).splitlines()[0] if str(error) else "",
                )
            else:
                return path, checkpoint
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {self.checkpoints} can be read; nothing "
                "was deleted: check the disk, or start again with --overwrite"
            )
        return None

    def save_checkpoint(self, checkpoint: dict[str, Any], step: int, keep: int) -> None:
        """Write a step's checkpoint whole, name it the last, and remove all but ``keep``."""
        path = self.checkpoint_path(step)
        write_whole(path, lambda file: torch.save(checkpoint, file))
        self.link(path, run_layout.LAST)
        for old in self.numbered()[keep:]:
            old.unlink()

    def mark_best(self, step: int) -> None:
        """Name the checkpoint of a step the best."""
        path = self.checkpoint_path(step)
        # A run whose numbered checkpoints are gone was resumed from the link to the last.
        self.link(path if path.exists() else path.with_name(run_layout.LAST), run_layout.BEST)

    def link(self, path: Path, name: str) -> None:
        """Give a checkpoint a second name, in one act; a copy where there are no hard links."""
        part = self.checkpoints / f".{name}.part"
        try:
            part.unlink(missing_ok=True)
            try:
                os.link(path, part)
            except OSError:
                shutil.copyfile(path, part)
            part.replace(self.checkpoints / name)
            part.unlink(missing_ok=True)  # of two names of one file none was replaced
        except OSError as error:
            raise cannot_write(self.checkpoints / name, error) from error

    def renumber(self, checkpoint: Path, step: int, new_step: int) -> None:
        """Count the step of a checkpoint as another, since batches have another size from it on.

        Lines of metrics and the checkpoint, which becomes the last, get the new numbers, all at
        once wherever the run is killed; other checkpoints go.
        """
        for path in self.records():
            entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for line in entries:
                for name in STEPS.intersection(line):
                    line[name] = -(-line[name] * new_step // step)  # the first step stays one
            lines = {line["step"]: line for line in entries}  # of equals the last stays
            text = "".join(json.dumps(line) + "\n" for line in lines.values())
            write_whole(renumbered(path, new_step), text)
        moved = self.checkpoint_path(new_step)
        for name in (run_layout.LAST, moved.name):
            self.link(checkpoint, name)
        for path in reversed(self.numbered()):  # the newest last: then its new number counts
            if path != moved:
                path.unlink()
        self.truncate(new_step)

    def discard_after(self, step: int) -> None:
        """Rename checkpoints of later steps, which cannot be read; remove unfinished files."""
        for path in self.numbered():
            if step_of(path) > step:
                path.replace(path.with_suffix(".broken"))
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(".*.part"):
                path.unlink()


def renumbered(record: Path, step: int) -> Path:
    """Where the lines of a file wait until its run counts as many steps."""
    return record.with_name(f".{record.name}.{step}.part")


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 for a link to one."""
    number = checkpoint.stem.removeprefix(run_layout.STEP)
    return int(number) if number.isdecimal() else -1


def is_running(pid: str, host: str) -> bool:
    """Whether a process of this or, for all that is known, another host is alive."""
    if host != socket.gethostname() or not pid.isdecimal():
        return host != "?"
    try:
        if Path("/proc/self").exists():
            stat = Path(f"/proc/{pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] not in "ZX"  # ended, and not reaped
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def step_of_line(line: bytes) -> int:
    """The step of a line of metrics; -1 where it cannot be read."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return -1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; only tensors and plain values are ever loaded.

    Raises:
        ValueError: A part of it is damaged.
    """
    with ZipFile(path) as parts:  # torch writes checksums and does not compare them
        damaged = parts.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint
