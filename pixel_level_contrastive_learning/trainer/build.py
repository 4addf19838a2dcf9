"""From settings to parts: the images, the backbone, the learner, the task."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..augment import Normalise
from ..backbones.checkpoint import ZERO_INIT, BackboneCard
from ..backbones.factory import build_backbone, zero_last_norms
from ..backbones.state_dict import load_weights
from ..data.loader import held_out
from ..data.sources import Chosen, Source, open_source
from ..data.statistics import Statistics, measure
from ..files import write_whole
from ..pixel_cl import PixelCL
from .auto import Clock, Facts, base_lr, peak_lr
from .config import PretrainConfig
from .config_io import PRETRAINED, start_of
from .run_dir import RunDirectory
from .system import Devices, cores, native_bfloat16
from .training_step import LearningRate, Practice, PretrainTask, TargetMomentum

LOG = logging.getLogger("pixel_level_contrastive_learning")
STATISTICS_FILE = "statistics.json"
"""What `weights` is where the library's own are meant."""


class Images(NamedTuple):
    """What a run learns from.

    Attributes:
        training: The images that are trained on.
        held_out: A few that are only looked at; none of few images.
        statistics: What was measured of them.
    """

    training: Source
    held_out: Source
    statistics: Statistics


def images_of(data: Any, config: PretrainConfig, directory: RunDirectory | None) -> Images:
    """The images, looked at: how many, how large, how bright.

    A run that is resumed keeps what it measured when it began.

    Args:
        data: Folders and the like, or a Python sequence or data set.
        config: The settings.
        directory: The run to go on with; None for a new one.
    """
    source = open_source(data, leave_out=config.out)
    stored = None if directory is None else directory.path / STATISTICS_FILE
    if stored is not None and stored.exists():
        held = json.loads(stored.read_text(encoding="utf-8"))
        began_with = held.pop("images", len(source))
        if began_with != len(source):
            LOG.warning(
                "there are %d images, and there were %d when the run began: of those held out now "
                "some may have been trained on",
                len(source),
                began_with,
            )
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in held.items()}
        statistics = Statistics(**plain)
    else:
        channels = None if config.channels == "auto" else config.channels
        statistics = measure(source, channels=channels, seed=config.seed)
    training, kept = held_out(source, config.seed)
    return Images(Chosen(source, training), Chosen(source, kept), statistics)


def facts_of(images: Images, devices: Devices) -> Facts:
    """What decides the settings that are `auto`."""
    return Facts(
        images=len(images.training),
        typical_size=images.statistics.median_size,
        channels=images.statistics.channels,
        device=devices.kind,
        native_bfloat16=native_bfloat16(devices.kind),
        processes=devices.processes,
        cores=max(1, cores() // (1 if SLURMEnvironment.detect() else devices.each_node)),
    )


def check_batch(config: PretrainConfig, devices: Devices) -> None:
    """Find out whether batch norm in the projectors has enough images on each device.

    Raises:
        ValueError: It has a single one.
    """
    assert isinstance(config.batch_size, int)
    if config.instance_weight > 0 and config.batch_size < 2 * devices.processes:
        raise ValueError(
            f"batch_size is {config.batch_size} on {devices.processes} devices, but batch norm "
            f"has no statistics of one image; give {2 * devices.processes} or more, or an "
            "instance_weight of 0"
        )


def view_size(config: PretrainConfig) -> tuple[int, int]:
    """The ``(height, width)`` of the views, once it is decided."""
    assert config.image_size != "auto"
    size = config.image_size
    return size if isinstance(size, tuple) else (size, size)


def backbone_of(config: PretrainConfig, channels: int, *, empty: bool = False) -> nn.Module:
    """The backbone with the weights it starts from; ``empty`` where a checkpoint brings them.

    Raises:
        ValueError: An unknown model, or weights that do not fit.
    """
    net = build_backbone(
        config.model,
        channels=channels,
        image_size=view_size(config),
        pretrained=config.weights == PRETRAINED and not empty,
    )
    if empty:
        return net
    if config.weights is None:
        if config.zero_init_residual:
            zero_last_norms(net)
    elif config.weights != PRETRAINED:
        LOG.info("weights from %s:\n%s", config.weights, load_weights(net, config.weights))
    return net


def learner_of(config: PretrainConfig, net: nn.Module, channels: int) -> PixelCL:
    """The learner around a backbone, in the memory layout that convolutions are fastest in.

    Raises:
        ValueError: A layer that cannot be tapped.
    """
    learner = PixelCL(
        net,
        view_size(config),
        hidden_layer_pixel=layer(config.pixel_layer),
        hidden_layer_instance=layer(config.instance_layer),
        projection_size=config.projection_size,
        projection_hidden_size=config.projection_hidden_size,
        moving_average_decay=config.target_momentum,
        ppm_num_layers=config.ppm_num_layers,
        ppm_gamma=config.ppm_gamma,
        distance_thres=config.distance_thres,
        similarity_temperature=config.similarity_temperature,
        alpha=config.alpha,
        use_pixpro=config.loss == "pixpro",
        channels=channels,
        instance_weight=config.instance_weight,
    )
    return learner.to(memory_format=torch.channels_last)


def layer(name: str) -> str | int | None:
    """A layer as the learner takes it: a name, an index, or None for its own choice."""
    if name == "auto":
        return None
    return int(name) if name.removeprefix("-").isdecimal() and "." not in name else name


def fitted(config: PretrainConfig, learner: PixelCL) -> PretrainConfig:
    """The settings with what the network decides: the layers taken and the learning rate."""
    encoder = learner.online_encoder
    norms = any(isinstance(module, _BatchNorm) for module in learner.net.modules())
    return replace(
        config,
        pixel_layer=encoder.pixel_tap.name,
        instance_layer=encoder.instance_tap.name,
        lr=base_lr(config.optimizer, batch_norm=norms) if config.lr == "auto" else config.lr,
    )


def practice_of(config: PretrainConfig, clock: Clock) -> Practice:
    """How the learner is trained."""
    assert config.blur_sigma != "auto"
    rate = LearningRate(peak_lr(config), clock.steps, clock.warmup, config.final_lr)
    return Practice(
        lr=rate,
        momentum=TargetMomentum(config.target_momentum, clock.steps),
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        accumulate=1 if config.accumulate == "auto" else config.accumulate,
        seed=config.seed,
        largest_sigma=config.blur_sigma[1],
    )


def card_of(config: PretrainConfig, statistics: Statistics) -> BackboneCard:
    """What is needed to use the backbone."""
    random = ZERO_INIT if config.zero_init_residual else "random"
    return BackboneCard(
        model=config.model,
        channels=statistics.channels,
        image_size=view_size(config),
        mean=statistics.mean,
        std=statistics.std,
        low=statistics.low,
        high=statistics.high,
        pixel_layer=config.pixel_layer,
        instance_layer=config.instance_layer,
        start=start_of(config.weights) or random,
        seed=config.seed,
    )


def task_of(
    config: PretrainConfig, learner: PixelCL, statistics: Statistics, clock: Clock
) -> PretrainTask:
    """The learner and how it is trained."""
    normalise = Normalise(statistics.mean, statistics.std)
    return PretrainTask(learner, normalise, practice_of(config, clock))


def save_statistics(images: Images, directory: RunDirectory) -> None:
    """Keep what was measured of the images with the run, and how many they are."""
    count = len(images.training) + len(images.held_out)
    text = json.dumps(asdict(images.statistics) | {"images": count}, indent=2)
    write_whole(directory.path / STATISTICS_FILE, text)
