"""A run before its first step: its settings checked, its data opened, its learner built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import run_layout
from ..augment import Normalise
from ..backbones.custom import OBJECT
from ..data.segmentation import SegmentationDataset, open_labelled
from ..pixel_cl import PixelCL
from . import build
from .auto import RunPlan, resolve, view_size
from .config import PretrainConfig
from .config_io import as_yaml, resume_changes, settings_in
from .logging import LOG
from .memory import estimate
from .metrics import check_loggers
from .run_dir import RunDir
from .system import Devices, describe, find_devices, free_memory, is_writer
from .training_step import make_views, slice_batch
from .validation import draw_batch

DRY_RUN_IMAGES = 16
"""Images that a dry run takes through the network, at most."""


class Setup(NamedTuple):
    """A run that is ready to start."""

    plan: RunPlan
    data: build.TrainingData
    learner: PixelCL  # on the CPU
    devices: Devices
    probe_splits: Sequence[SegmentationDataset]  # to fit a probe on, and to score it on; or none
    before: dict[str, Any] | None  # settings of the run that is resumed; None for a new run

    @property
    def normalise(self) -> Normalise:
        """Brings views to about zero mean and unit variance."""
        return Normalise(self.data.statistics.mean, self.data.statistics.std)


def check_places(config: PretrainConfig, objects: Any) -> RunDir:
    """The run's folder, once it is clear that it may be written and that there is data.

    Raises:
        ValueError: No folder or no data is given, or the folder is in use.
    """
    if config.out is None:
        raise ValueError("out is not given; name the folder of the run, such as --out runs/mine")
    run_dir = RunDir(Path(config.out).expanduser().absolute())
    if not config.data and objects is None:
        if config.resume and not (run_dir.path / run_layout.CONFIG).is_file():
            raise ValueError(
                f"out is {config.out!r}, where there is no run to resume; name the folder of one, "
                "or name images to start a new one"
            )
        if config.resume:
            raise ValueError(
                f"data is not given, and the run in {config.out!r} was given Python objects: pass "
                "the same to pretrain()"
            )
        if run_dir.holds_run():
            raise ValueError(
                f"data is not given; {config.out!r} holds a run, which --resume goes on with. For "
                "a new one name a folder of images"
            )
        raise ValueError("data is not given; name a folder of images, before the flags")
    if run_dir.path.resolve() in [Path(place).expanduser().resolve() for place in config.data]:
        raise ValueError(
            f"out is {config.out!r}, where the images are, too; give the run a folder of its own"
        )
    if is_writer():
        run_dir.check_not_training()
        run_dir.check(resume=config.resume, overwrite=config.overwrite)
        if config.overwrite:
            run_dir.check_outside([*config.data, *([config.probe] if config.probe else [])])
    return run_dir


def set_up(config: PretrainConfig, objects: Any, run_dir: RunDir) -> Setup:
    """Open the data, build the learner, resolve the plan; writes nothing.

    Raises:
        ValueError: Images, masks, weights or layers that cannot be used.
    """
    devices = find_devices(config)
    check_loggers(config.loggers)
    LOG.info("%s", describe(devices))
    before = settings_in(run_dir.path) if config.resume else {}
    resume_changes(config, before)  # refuses another model before it is built
    resumed = run_dir.path if config.resume else None
    data = build.open_data(objects if objects is not None else config.data, config, resumed)
    probe_splits: Sequence[SegmentationDataset] = ()
    if config.probe is not None:
        probe_splits = open_labelled(
            config.probe,
            ids=config.ids,
            colours=config.colours,
            pages=config.pages,
            nodata=config.nodata,
        )
    size, channels = view_size(config, data.statistics.median_size), data.statistics.channels
    torch.manual_seed(config.seed)
    load = not (config.resume and run_dir.checkpoint_paths())
    net = build.build_net(config, size, channels, load=load)
    learner = build.build_learner(config, net, size, channels)
    plan = resolve(config, build.find_info(data, devices, learner))
    setup = Setup(plan, data, learner, devices, probe_splits, before if config.resume else None)
    log_setup(setup, dry_run=config.dry_run)
    return setup


def log_setup(setup: Setup, *, dry_run: bool) -> None:
    """Log the data and the plan; the settings go to the log file, and are printed by a dry run."""
    plan, schedule, statistics = setup.plan, setup.plan.schedule, setup.data.statistics
    scaled = ""
    if statistics.low is not None:
        low, high = rounded(statistics.low), rounded(statistics.high)
        scaled = f"; values from {low} to {high} become 0 to 1"
    LOG.info(
        "%d images to train on, %d held out, typically %d x %d with %d channels; mean %s, std %s%s",
        len(setup.data.train),
        len(setup.data.held_out),
        *statistics.median_size,
        statistics.channels,
        rounded(statistics.mean),
        rounded(statistics.std),
        scaled,
    )
    LOG.info(
        "%d steps of %d images (%d an epoch, %d of warm-up), learning rate up to %.3g, %s, "
        "views of %d x %d pixels, pixel loss on %s, instance loss on %s, %s workers",
        schedule.steps,
        plan.batch_size,
        schedule.steps_per_epoch,
        schedule.warmup_steps,
        schedule.peak_lr,
        plan.precision,
        *plan.view_size,
        ", ".join(map(str, setup.learner.online_encoder.pixel_hooks)),
        plan.settings.instance_layer,
        plan.workers,
    )
    if plan.settings.weights is not None:
        LOG.info(
            "start weights are trained as a whole, with a learning rate of %.3g for 256 images",
            plan.settings.lr,
        )
    if plan.model.startswith(f"{OBJECT}:"):
        LOG.info(
            "the run cannot build %s again: pass it as model= to load_backbone, evaluate, "
            "visualize and export, and to pretrain with resume=True",
            plan.model.removeprefix(f"{OBJECT}:"),
        )
    if len(setup.data.train) < plan.batch_size:
        LOG.warning(
            "there are fewer images (%d) than a batch has (%d): some come twice in a batch",
            len(setup.data.train),
            plan.batch_size,
        )
    if plan.sharded and setup.probe_splits:
        LOG.warning("with fsdp no process has the whole network: nothing is probed or drawn")
    level = logging.INFO if dry_run else logging.DEBUG
    LOG.log(level, "settings:\n%s", as_yaml(plan.settings))


def rounded(values: Sequence[float] | None) -> str:
    """Some numbers as a text of three digits each."""
    return "-" if values is None else ", ".join(f"{value:.3g}" for value in values)


def dry_run(setup: Setup, run_dir: RunDir) -> dict[str, float]:
    """What a batch looks like and what a step takes, without training."""
    plan, learner = setup.plan, setup.learner
    loader = build.build_train_loader(plan, setup.data, 0, None)
    batch = slice_batch(next(iter(loader)), slice(DRY_RUN_IMAGES))
    with torch.no_grad():
        terms = learner(make_views(batch, setup.normalise, plan), return_terms=True)
    images = len(batch.one)
    without = int(terms.images_without_pairs)
    needed = estimate(learner, plan)
    found = {
        "positive_pairs": float(terms.positive_pairs) / images,
        "images_without_pairs": without,
        "memory_mib": needed.total(plan.images_per_process) / 2**20,
    }
    LOG.info(
        "%.1f matching pairs an image; %d of %d images have none",
        found["positive_pairs"],
        without,
        images,
    )
    device = torch.device(plan.device)
    free = free_memory(device) / 2**20
    LOG.info("%s; %.0f MiB are free on %s", needed.describe(plan.images_per_process), free, device)
    if plan.compares_pixels:
        [path] = draw_batch(batch, learner, setup.normalise, plan, run_dir.path, count=1)
        LOG.info("a preview is in %s", path)
    return found
