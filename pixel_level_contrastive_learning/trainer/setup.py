"""A run before its first step: its settings checked, its data opened, its learner built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import run_layout
from ..augment import Normalise
from ..backbones.custom import OBJECT
from ..backbones.stem import patch_size
from ..checks import counted
from ..data.folders import IMAGES, MASKS
from ..data.segmentation import SegmentationDataset, open_labelled
from ..data.sources import MIN_IMAGES_TO_HOLD_OUT
from ..pixel_cl import PixelCL
from . import build
from .auto import RunPlan, resolve, view_size
from .config import PretrainConfig
from .config_io import as_yaml, resume_changes, resumed_settings, start_weights
from .logging import LOG
from .memory import MIB, estimate
from .metrics import check_loggers, few_pairs
from .run_dir import RunDir
from .system import Devices, describe, find_devices, free_memory, is_writer
from .training_step import make_views
from .validation import draw_batch

FEW_IMAGES = 10
"""Images below which a run is taken for a mistake."""
LARGE_VIEW = 2.0
"""Times the longer side of an image that a view may measure; beyond it is taken for a mistake."""
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
        raise ValueError("out is not given; give the run's folder, such as --out runs/mine")
    run_dir = RunDir(Path(config.out).expanduser().absolute())
    if not config.data and objects is None:
        if config.resume and not (run_dir.path / run_layout.CONFIG).is_file():
            raise ValueError(
                f"out is {config.out!r}, which has no run to resume; give a run's folder, or give "
                "images to start a new run"
            )
        hint = "give a folder of images, before the flags"
        if config.resume:
            hint = "the run used Python objects: pass the same ones to pretrain()"
        elif run_dir.holds_run():
            hint = (
                f"{config.out!r} holds a run: use --resume to continue it, or give a folder of "
                "images to start a new one"
            )
        raise ValueError(f"data is not given; {hint}")
    if run_dir.path.resolve() in [Path(place).expanduser().resolve() for place in config.data]:
        raise ValueError(
            f"out is {config.out!r}, which is the images' folder; give the run another folder"
        )
    if is_writer():
        run_dir.check_not_training()
        run_dir.check(resume=config.resume, overwrite=config.overwrite)
        if config.overwrite:
            places = config.probe, config.config, start_weights(config.weights)
            run_dir.check_outside([*config.data, *filter(None, places)])
    return run_dir


def set_up(config: PretrainConfig, objects: Any, run_dir: RunDir) -> Setup:
    """Open the data, build the learner, resolve the plan; writes nothing.

    Raises:
        ValueError: Images, masks, weights, layers or an optimiser that cannot be used.
    """
    devices = find_devices(config)
    check_loggers(config.loggers)
    LOG.info("%s", describe(devices))
    before = resumed_settings(run_dir.path) if config.resume else {}
    resume_changes(config, before)  # refuses another model before it is built
    resumed = run_dir.path if config.resume else None
    data = build.open_data(objects if objects is not None else config.data, config, resumed)
    probe_splits: Sequence[SegmentationDataset] = ()
    if config.probe is not None:
        options = {name: getattr(config, name) for name in ("ids", "colours", "pages", "nodata")}
        probe_splits = open_labelled(config.probe, **options)
    size, channels = view_size(config, data.statistics.median_size), data.statistics.channels
    torch.manual_seed(config.seed)
    load = not (config.resume and run_dir.checkpoint_paths())
    net = build.build_net(config, size, channels, load=load)
    fitting = view_size(config, data.statistics.median_size, patch_size(net))
    if fitting != size:
        size = fitting
        torch.manual_seed(config.seed)
        net = build.build_net(config, size, channels, load=load)
    learner = build.build_learner(config, net, size, channels)
    plan = resolve(config, build.find_info(config, data, devices, learner))
    build.build_optimizer(learner, plan, set(learner.unreached_parameters()))  # refuses its name
    setup = Setup(plan, data, learner, devices, probe_splits, before if config.resume else None)
    log_setup(setup, dry_run=config.dry_run)
    return setup


def log_setup(setup: Setup, *, dry_run: bool) -> None:
    """Log the data and the plan; the settings go to the log file, and are printed by a dry run."""
    plan, schedule, statistics = setup.plan, setup.plan.schedule, setup.data.statistics
    images, (h, w) = len(setup.data.train), statistics.median_size
    scaled = ""
    if statistics.low is not None:
        low, high = rounded(statistics.low), rounded(statistics.high)
        scaled = f"; values from {low} to {high} become 0 to 1"
    LOG.info(
        f"{counted(images, 'image')} to train on, {len(setup.data.held_out)} held out, "
        f"typically {h} x {w} with {counted(statistics.channels, 'channel')}; "
        f"mean {rounded(statistics.mean)}, std {rounded(statistics.std)}{scaled}"
    )
    cache = f"; up to {ceil(plan.cache_bytes / MIB)} MiB of decoded images stay in memory"
    cache = cache if build.keeps_decoded(setup.data.train, plan) else ""
    layers = ", ".join(map(str, setup.learner.online_encoder.pixel_hooks))
    pixel = f"pixel loss on {layers}" if plan.compares_pixels else "no pixel loss"
    instance = f"instance loss on {plan.settings.instance_layer}"
    instance = instance if plan.settings.instance_weight else "no instance loss"
    LOG.info(
        f"{counted(schedule.steps, 'step')} of {counted(plan.batch_size, 'image')} "
        f"({schedule.steps_per_epoch} per epoch, {schedule.warmup_steps} of warm-up), "
        f"learning rate up to {schedule.peak_lr:.3g}, {plan.precision}, "
        f"views of {plan.view_size[0]} x {plan.view_size[1]} pixels, {pixel}, {instance}; "
        f"loader workers: {plan.workers}{cache}"
    )
    log_remarks(setup)
    level = logging.INFO if dry_run else logging.DEBUG
    LOG.log(level, "settings:\n%s", as_yaml(plan.settings, plan.chosen))


def log_remarks(setup: Setup) -> None:
    """Log what this run should know of, and warn of what looks like a mistake."""
    plan, schedule, images = setup.plan, setup.plan.schedule, len(setup.data.train)
    longer = max(setup.data.statistics.median_size)
    if min(plan.view_size) > LARGE_VIEW * longer:
        LOG.warning(
            f"views are {min(plan.view_size) / longer:.2g} times as large as the images, which "
            "costs time and adds no detail; lower image_size, the size of the views"
        )
    if schedule.warmup_steps == schedule.steps:
        LOG.warning(
            "the warm-up takes the whole run, so the learning rate never reaches its peak; lower "
            "warmup_epochs, or train longer"
        )
    if build.has_given_weights(plan.settings):
        LOG.info(
            "all layers of the given weights are trained, with a learning rate of "
            f"{plan.settings.lr:.3g} for 256 images"
        )
    origin, _, name = plan.model.partition(":")
    if origin == OBJECT:
        LOG.info(
            f"the run cannot rebuild {name}: pass it as model= to load_backbone, evaluate, "
            "visualize and export, and to pretrain with resume=True"
        )
    for place in plan.settings.data:
        folder = Path(place).expanduser()
        labelled = folder.parent if folder.name == IMAGES else folder
        train, val = (labelled / IMAGES / split for split in ("train", "val"))
        if train.is_dir() and val.is_dir() and (labelled / MASKS).is_dir():
            LOG.info(f"training on both {train} and {val}; to evaluate on val, give {train} only")
    if images < FEW_IMAGES:
        LOG.warning(
            f"{counted(images, 'image')} to train on: far too few to learn from; check that data "
            "covers all of them, or treat this run as a test of the settings"
        )
    if images < plan.batch_size:
        LOG.warning(
            f"fewer images ({images}) than the batch size ({plan.batch_size}): some appear twice "
            "in a batch"
        )
    if not len(setup.data.held_out) and plan.picture_every:
        LOG.info(
            f"fewer than {MIN_IMAGES_TO_HOLD_OUT} images: none are held out, so whether cells find "
            "the same spot in another view is not measured; use `pixelcl evaluate RUN --images DIR`"
        )
    if plan.sharded and (plan.picture_every or setup.probe_splits):
        LOG.warning("with fsdp no process has the whole network: no probes and no pictures")


def rounded(values: Sequence[float] | None) -> str:
    """Some numbers as a text of three digits each."""
    return "-" if values is None else ", ".join(f"{value:.3g}" for value in values)


def dry_run(setup: Setup, run_dir: RunDir) -> dict[str, float]:
    """What a batch looks like and what a step takes, without training."""
    plan, learner = setup.plan, setup.learner
    needed, free = estimate(learner, plan), free_memory(torch.device(plan.device)) / MIB
    LOG.info(
        f"{needed.describe(plan.images_per_process)}; {free:.0f} MiB are free on {plan.device}"
    )
    count = min(DRY_RUN_IMAGES, plan.images_per_process)
    small = replace(plan, batch_size=count, processes=1, workers=0, cache_bytes=0)
    batch = next(iter(build.build_train_loader(small, setup.data, 0, None)))
    with torch.no_grad():
        terms = learner(make_views(batch, setup.normalise, plan), return_terms=True)
    images, unpaired = len(batch.one), int(terms.images_without_pairs)
    pairs = float(terms.positive_pairs) / images
    if plan.compares_pixels:
        LOG.info(f"{pairs:.1f} matching pairs per image; {unpaired} of {images} images have none")
        if warning := few_pairs(unpaired, images):
            LOG.warning(warning)
        [path] = draw_batch(batch, learner, setup.normalise, plan, run_dir.path, count=1)
        LOG.info("preview written to %s", path)
    else:
        LOG.info("the pixel loss is off (alpha is 0): no pairs to count or preview")
    memory = needed.total(plan.images_per_process) / MIB
    return {"positive_pairs": pairs, "images_without_pairs": unpaired, "memory_mib": memory}
