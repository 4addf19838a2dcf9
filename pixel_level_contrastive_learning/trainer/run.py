"""`pretrain`: from images to a backbone, in one call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from .config import PretrainConfig
from .course import PretrainResult, Run
from .directory import LOG_FILE, RunDirectory
from .interruption import Interruption
from .machine import is_writer
from .messages import logged
from .settings import CONFIG_FILE, configured, settings_of

LOG = logging.getLogger("pixel_level_contrastive_learning")


def pretrain(data: Any = None, out: str | Path | None = None, **settings: Any) -> PretrainResult:
    """Pretrain a backbone on images without labels.

    Args:
        data: A folder of images, or several; a text file of paths; WebDataset shards; or a Python
            sequence of tensors, arrays or PIL images, or a torch data set.
        out: Folder of the run.
        **settings: The settings of `PretrainConfig` by name, each as `pixelcl pretrain --help`
            tells it.

    Returns:
        The backbone, the figures of the last step, and the folder.

    Raises:
        ValueError: A setting unknown or out of range (all at once), a folder in use, images or
            weights that cannot be read.
        NotFiniteError: The loss became NaN; the last good checkpoint is kept, if there was one.
        Interrupted: The run was told to stop, and has saved.
    """
    named, objects = told_apart(data)
    paths = {name: str(value) for name, value in settings.items() if isinstance(value, Path)}
    given = settings | paths | named | ({} if out is None else {"out": str(out)})
    return run(configured(settings_of(given)), objects)


def signature() -> Signature:
    """The signature of `pretrain` as its settings make it, for editors and `help`."""
    own = [field for field in fields(PretrainConfig) if field.name not in ("data", "out")]
    kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    first = [Parameter(name, kinds[0], default=None) for name in ("data", "out")]
    rest = [Parameter(f.name, kinds[1], default=f.default, annotation=f.type) for f in own]
    return Signature([*first, *rest], return_annotation=PretrainResult)


setattr(pretrain, "__signature__", signature())  # noqa: B010  # functions have no such field


def told_apart(data: Any) -> tuple[dict[str, Any], Any]:
    """Data given by name, as settings; or the Python object that it is."""
    if data is None:
        return {}, None
    if isinstance(data, (str, Path)):
        return {"data": (str(data),)}, None
    if isinstance(data, (tuple, list)) and all(isinstance(one, (str, Path)) for one in data):
        return {"data": tuple(str(one) for one in data)}, None
    return {}, data


def run(config: PretrainConfig, objects: Any = None) -> PretrainResult:
    """Do what the settings say.

    Args:
        config: The settings.
        objects: Images that are Python objects, in place of `config.data`.

    Raises:
        ValueError: See `pretrain`.
    """
    if config.out is None:
        raise ValueError("out is not given; name the folder of the run, such as --out runs/mine")
    directory = RunDirectory(Path(config.out).expanduser().absolute())
    if not config.data and objects is None:
        if config.resume and not (directory.path / CONFIG_FILE).is_file():
            raise ValueError(
                f"out is {config.out!r}, where no run is to go on with; name the folder of one, or "
                "name images to begin a new one"
            )
        if config.resume:
            raise ValueError(
                f"data is not given, and the run in {config.out!r} was given Python objects: pass "
                "the same to pretrain()"
            )
        if directory.holds_run():
            raise ValueError(
                f"data is not given; {config.out!r} holds a run, with which --resume goes on. For "
                "a new one name a folder of images"
            )
        raise ValueError("data is not given; name a folder of images")
    if directory.path.resolve() in [Path(place).expanduser().resolve() for place in config.data]:
        raise ValueError(
            f"out is {config.out!r}, where the images are, too; give the run a folder of its own"
        )
    if is_writer():
        directory.check(resume=config.resume, overwrite=config.overwrite)
        if config.overwrite:
            directory.refuse_within([*config.data, *([config.probe] if config.probe else [])])
    with (
        logged(to_terminal=is_writer()) as log,
        quiet_lightning(),
        Interruption() as interruption,
    ):
        try:
            planned = Run(config, objects, directory, interruption)
            interruption.leave()
            if config.dry_run:
                found = planned.tried()
                interruption.leave()
                return found
            if is_writer():  # only now: what was refused leaves no trace
                directory.prepare(overwrite=config.overwrite)
                log.open(directory.path / LOG_FILE)
            return planned.done()
        except Exception as error:
            LOG.error("%s: %s", type(error).__name__, error, extra={"file_only": True})
            raise


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """A context in which Lightning says only what is wrong."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings(
                "ignore", message="FSDP2-wrapped module"
            )  # ours add nothing in place
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
