"""The folder of a run: who may write there, what stands in it, and how a file comes into it whole.

What must be whole is written by `files.write_whole`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from ..backbones.state_dict import CHECKPOINTS, LAST, WEIGHTS
from ..data.sources import PREDICTIONS
from ..evaluation.results import LABELLED_FILE, UNLABELLED_FILE
from ..files import cannot_write, write_whole
from .config import PretrainConfig
from .config_io import CONFIG_FILE, differences, read_settings

LOG = logging.getLogger("pixel_level_contrastive_learning")
METRICS_FILE = "metrics.jsonl"
PROBE_FILE = "probe.jsonl"
LOG_FILE = "train.log"
PREVIEW = "preview"
BEST = "best.ckpt"
OURS = (
    CONFIG_FILE,
    METRICS_FILE,
    LOG_FILE,
    "statistics.json",
    "skipped.txt",
    CHECKPOINTS,
    PREVIEW,
    "pictures",
    WEIGHTS,
    "backbone.json",
    "bad_batch.pt",
    LABELLED_FILE,
    UNLABELLED_FILE,
    PREDICTIONS,
    PROBE_FILE,
    "lightning_logs",
    "tensorboard",
    "csv",
    "wandb",
    "mlflow",
)
"""What a run writes, and so what replacing it removes; nothing else in the folder is touched."""


class RunDirectory:
    """The folder of a run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Find out whether a run may be written here, without writing anything.

        Raises:
            ValueError: It is a file, or there is something in it and neither is asked for.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out is {self.path}, which is a file; name a folder")
        if str(self.path).encode(errors="ignore").decode() != str(self.path):
            raise ValueError(f"out is {str(self.path)!r}, which is no UTF-8; name a folder that is")
        if overwrite and not self.holds_run():
            foreign = [
                name
                for name in OURS
                if (self.path / name).exists() and not (name == PREVIEW and self.holds_dry_run())
            ]
            if foreign:
                raise ValueError(
                    f"out is {self.path}, which holds no run but has {foreign[0]}, which a run "
                    "would replace; name another folder"
                )
        used = self.path.is_dir() and any(
            path.name != PREVIEW
            for path in self.path.iterdir()  # all that a dry run leaves
        )
        if used and not resume and not overwrite:
            raise ValueError(
                f"out is {self.path}, which is not empty; go on with the run in it (--resume), "
                "replace it (--overwrite), or name another folder"
            )

    def holds_dry_run(self) -> bool:
        """Whether the previews here are those of a run, dry or not, and nobody else's pictures."""
        held = self.path / PREVIEW
        return held.is_dir() and all(path.match("pairs-*.png") for path in held.iterdir())

    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / CONFIG_FILE).is_file() or self.checkpoints.is_dir()

    def refuse_within(self, places: Sequence[str]) -> None:
        """Find out whether replacing the run here would remove what it is to learn from.

        Raises:
            ValueError: One of the places lies in a folder of the run.
        """
        for place in places:
            path = Path(place).expanduser().absolute()
            for name in OURS:
                if path.is_relative_to(self.path / name):
                    raise ValueError(
                        f"{place!r} lies in {self.path / name}, which --overwrite would remove; "
                        "name another out"
                    )

    def prepare(self, *, overwrite: bool) -> None:
        """Make the folder, and remove the run in it if it is to be replaced.

        Raises:
            ValueError: It cannot be made.
        """
        if overwrite:
            self.remove_run()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"out is {self.path}, where nothing can be written ({error.strerror}); name a "
                "folder that you may write to"
            ) from error

    def remove_run(self) -> None:
        """Remove what runs write, and nothing else."""
        for name in OURS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Write `config.yaml`."""
        write_whole(self.path / CONFIG_FILE, text)

    def cut_metrics(self, step: int) -> int:
        """Drop the lines of metrics after a step (all of them at 0); how many those were.

        A last line that a killed run left unfinished is dropped too.
        """
        return sum(self.cut(self.path / name, step) for name in (METRICS_FILE, PROBE_FILE))

    def cut(self, path: Path, step: int) -> int:
        """Drop the lines of a file after a step; how many those were."""
        if not path.exists():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if step and 0 <= step_of(line) <= step]
        if len(kept) < len(lines):
            write_whole(path, b"".join(kept))
        return len(lines) - len(kept)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def checkpoint_paths(self) -> list[Path]:
        """The checkpoints, newest first, and the link to one of them after all others."""
        numbered = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        return [*numbered, *self.checkpoints.glob(LAST)]

    def newest_checkpoint(self) -> tuple[Path, int] | None:
        """The newest checkpoint that can be read and its step, or None.

        One that cannot be read, such as one cut off by a full disk, is named in a warning.

        Raises:
            ValueError: There are some, and none can be read.
            OSError: The disk does not answer.
        """
        paths = self.checkpoint_paths()
        for path in paths:
            try:
                step = read_checkpoint(path)["steps_done"]
            except FileNotFoundError:  # renumbered by another process
                continue
            except (OSError, MemoryError):  # another time it may be read
                raise
            except Exception as error:  # whatever a broken file makes the reader raise
                LOG.warning(
                    "the checkpoint %s cannot be read (%s: %s); taking the one before it",
                    path,
                    type(error).__name__,
                    str(error).splitlines()[0] if str(error) else "",
                )
            else:
                return path, int(step) if path.name == LAST else step_in(path)
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {self.checkpoints} can be read; nothing "
                "was removed: look at the disk, or begin anew with --overwrite"
            )
        return None

    def renumber(self, checkpoint: Path, step: int, now: int) -> None:
        """Count the steps up to a checkpoint otherwise, since batches are of another size from it.

        Lines of metrics and the checkpoint, which becomes the last, get the new numbers; other
        checkpoints go.

        Args:
            checkpoint: The one to go on from.
            step: The step it was saved at.
            now: What this step is called from now on.
        """
        for name in (METRICS_FILE, PROBE_FILE):
            path = self.path / name
            if path.exists():
                held = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                # Rounded up, so that the first step stays one; of equals the last stays.
                lines = {-(-line["step"] * now // step): line for line in held}
                text = "".join(json.dumps(lines[n] | {"step": n}) + "\n" for n in lines)
                write_whole(path, text)
        self.name_also(checkpoint, LAST)
        moved = checkpoint.replace(self.checkpoint_path(now))
        for path in self.checkpoints.glob("step-*.ckpt"):
            if path != moved:
                path.unlink()

    def name_also(self, path: Path, name: str) -> None:
        """Give a checkpoint a second name, in one act; a copy where there are no hard links."""
        beside = self.checkpoints / f".{name}.part"
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)
        beside.replace(self.checkpoints / name)

    def prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest numbered checkpoints."""
        for path in sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)[keep:]:
            path.unlink()

    def forget_after(self, step: int) -> None:
        """Put aside checkpoints of later steps, which could not be read; remove unfinished ones."""
        for path in self.checkpoints.glob("step-*.ckpt"):
            if step_in(path) > step:
                path.replace(path.with_suffix(".broken"))
        for path in self.checkpoints.glob(".*.part"):
            path.unlink()


def step_in(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.removeprefix("step-"))


def step_of(line: bytes) -> int:
    """The step of a line of metrics; -1 where it cannot be read."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return -1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; only tensors and plain values are ever loaded."""
    read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return read


class WholeCheckpoints(CheckpointIO):
    """Checkpoints that are either whole or not there.

    Lightning's own are moved from a temporary folder, which is no single act across disks.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ARG002  # named by Lightning
    ) -> None:
        """Write a checkpoint.

        Raises:
            CannotWriteError: It could not be written.
        """
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,  # noqa: ARG002
        weights_only: bool | None = None,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Read a checkpoint."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


class MetricsFile:
    """`metrics.jsonl`: one line of figures a step.

    Args:
        path: The file, appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Append lines.

        Raises:
            CannotWriteError: The disk is full or the like.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise cannot_write(self.path, error) from error


FIXED = (
    "model",
    "weights",
    "zero_init_residual",
    "channels",
    "loss",
    "pixel_layer",
    "instance_layer",
    "projection_size",
    "projection_hidden_size",
    "ppm_num_layers",
    "optimizer",
)
"""Settings that a run keeps when it is resumed, since its weights have their shape."""


def compared(config: PretrainConfig, directory: RunDirectory) -> dict[str, tuple[Any, Any]]:
    """What differs from the run that is resumed, by name: old and new.

    Raises:
        ValueError: Something that its weights depend on.
    """
    path = directory.path / CONFIG_FILE
    if not path.is_file():
        return {}
    changed = differences(read_settings(path), config)
    wrong = [name for name in FIXED if name in changed and changed[name][1] != "auto"]
    # What weighs nothing is not trained, and the optimiser does not know it.
    wrong += [n for n in ("alpha", "instance_weight") if n in changed and 0 in changed[n]]
    if wrong:
        listed = ", ".join(f"{n} from {changed[n][0]!r} to {changed[n][1]!r}" for n in wrong)
        raise ValueError(
            f"a run cannot go on with other weights: {listed}; leave these as they were, or "
            "start a new run in another folder with --weights"
        )
    return changed


def refuse_misfits(own: Mapping[str, Tensor], held: Mapping[str, Any]) -> None:
    """Find out whether a checkpoint's weights fit, before anything of the run is changed.

    Args:
        own: What the learner has.
        held: What the checkpoint has.

    Raises:
        ValueError: Some have other shapes.
    """
    for name in own.keys() & held.keys():
        here, there = tuple(own[name].shape), tuple(held[name].shape)
        if here != there:
            raise ValueError(
                f"a run cannot go on with other weights: {name} has the shape {there} in the "
                f"checkpoint and {here} now; leave image_size and the model as they were, or "
                "start a new run in another folder with --weights"
            )


def refuse_idle_changes(changed: Iterable[str], done: int, steps: int) -> None:
    """Find out whether settings changed that nothing will be trained with.

    Args:
        changed: Their names.
        done: Steps that were trained.
        steps: Steps of the whole run.

    Raises:
        ValueError: Some did: what is written of the run would no longer be true of it.
    """
    names = ", ".join(changed)
    if names and done >= steps:
        raise ValueError(
            f"{done} steps are done and {steps} wanted: nothing is left to train with another "
            f"{names}; leave these as they were, give more --steps or --epochs, or start a new run "
            "in another folder with --weights"
        )
