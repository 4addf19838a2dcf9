"""From settings and plan to parts: data, backbone, learner, loader, optimiser."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision.amp import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from .. import run_layout
from ..backbones.checkpoint import AS_HANDED, ZERO_INIT, BackboneCard, card_in
from ..backbones.custom import is_module_handed
from ..backbones.factory import build_backbone, finer_layer, zero_last_norms
from ..backbones.hub import hub_config, on_hub
from ..backbones.state_dict import load_weights
from ..backbones.stem import patch_size
from ..data.cache import DecodedCache, can_share
from ..data.loader import TwoViewLoader, build_loader
from ..data.sources import ItemSource, Source, Subset, open_source, split_held_out
from ..data.statistics import Statistics, measure
from ..evaluation.features import native_bfloat16
from ..files import write_whole
from ..modules.encoder import each_level
from ..modules.feature_info import FeatureInfo
from ..pixel_cl import PixelCL
from .auto import Info, RunPlan
from .config import PRETRAINED, PretrainConfig
from .config_io import start_weights
from .logging import LOG
from .system import Devices, cores_per_process, free_memory

FUSED = ("adam", "adamw", "sgd")
"""Optimisers that torch updates in one pass over the weights: a third of the time on a CPU."""
LEARNER_SETTINGS = (
    *("projection_size", "projection_hidden_size", "ppm_num_layers", "ppm_gamma", "alpha"),
    *("instance_weight", "distance_thres", "similarity_temperature", "pixel_levels"),
    "level_weights",
)
"""Settings that the learner takes by the same names."""


class TrainingData(NamedTuple):
    """The images of a run."""

    train: Source
    held_out: Source  # a few that are only looked at; none of few images
    statistics: Statistics


def open_data(data: Any, config: PretrainConfig, resumed: Path | None) -> TrainingData:
    """Open the images and measure their statistics; those in the folder of a resumed run stay."""
    source = open_source(data, leave_out=config.out, pages=config.pages, nodata=config.nodata)
    train, held_out = split_held_out(source)
    stored = resumed / run_layout.STATISTICS if resumed is not None else None
    if stored is not None and stored.exists():
        statistics, images = read_statistics(stored)
        if images not in (None, len(source)):
            LOG.warning(
                "there are %d images, but the run began with %d%s",
                len(source),
                images,
                ": some of those held out now may have been trained on" * (len(held_out) > 0),
            )
    else:
        channels = None if config.channels == "auto" else config.channels
        statistics = measure(source, channels=channels, seed=config.seed)
    return TrainingData(train, held_out, statistics)


def read_statistics(path: Path) -> tuple[Statistics, int | None]:
    """What `save_statistics` wrote: the statistics, and of how many images."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = [field.name for field in fields(Statistics)]  # older versions wrote others, too
        plain: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if n in names
        }
        return Statistics(**plain), values.get("images")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); restore it, or delete it to have the images "
            "measured again"
        ) from error


def save_statistics(data: TrainingData, folder: Path) -> None:
    """Write `statistics.json`, once: a resumed run keeps it."""
    path = folder / run_layout.STATISTICS
    if not path.exists():
        images = len(data.train) + len(data.held_out)
        write_whole(path, json.dumps(asdict(data.statistics) | {"images": images}, indent=2))


def build_net(
    config: PretrainConfig, size: tuple[int, int], channels: int, *, load: bool
) -> nn.Module:
    """The backbone with its start weights, in train mode; ``load``: no checkpoint brings them.

    Raises:
        ValueError: An unknown model, or weights that do not fit.
    """
    pretrained = load and config.weights == PRETRAINED
    net = build_backbone(
        config.model,
        channels=channels,
        image_size=size,
        pretrained=pretrained,
        config=network_config(config),
    )
    if load and config.zero_init_residual and not has_given_weights(config):
        zero_last_norms(net)
    if load and config.weights not in (None, PRETRAINED):
        LOG.info("weights from %s:\n%s", config.weights, load_weights(net, config.weights))
    return net.train()


def network_config(config: PretrainConfig) -> dict[str, Any] | None:
    """What describes a network on the Hub; a resumed run has it. None for other networks."""
    if not on_hub(config.model):
        return None
    card = card_in(Path(config.out).expanduser()) if config.resume and config.out else None
    return hub_config(config.model) if card is None else card.config


def build_learner(
    config: PretrainConfig, net: nn.Module, size: tuple[int, int], channels: int
) -> PixelCL:
    """The learner around a backbone, in the memory layout that convolutions are fastest in.

    Raises:
        ValueError: A layer that cannot be used.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in LEARNER_SETTINGS}
    settings["pixel_levels"] = pixel_levels(config, net, size, channels)
    learner = PixelCL(
        net,
        size,
        hidden_layer_pixel=None if config.pixel_layer == "auto" else config.pixel_layer,
        hidden_layer_instance=None if config.instance_layer == "auto" else config.instance_layer,
        moving_average_decay=config.target_momentum,
        use_pixpro=config.loss == "pixpro",
        channels=channels,
        **settings,
    )
    return learner.to(memory_format=torch.channels_last)


def pixel_levels(
    config: PretrainConfig, net: nn.Module, size: tuple[int, int], channels: int
) -> int:
    """How many layers the pixel loss reads: from random weights by default two, where there are."""
    if config.pixel_levels != "auto":
        return config.pixel_levels
    if config.pixel_layer != "auto" or config.alpha == 0 or has_given_weights(config):
        return 1
    return 1 if finer_layer(FeatureInfo(net, channels, size)) is None else 2


def has_given_weights(config: PretrainConfig) -> bool:
    """Whether training starts from weights that were named, or those of a network handed over."""
    return config.weights is not None or is_module_handed()


def find_info(
    config: PretrainConfig, data: TrainingData, devices: Devices, learner: PixelCL
) -> Info:
    """What `resolve` needs to know of data, system and network."""
    encoder = learner.online_encoder
    return Info(
        images=len(data.train),
        typical_size=data.statistics.median_size,
        channels=data.statistics.channels,
        value_bytes=1 if data.statistics.low is None else 4,
        free_memory=free_memory(torch.device("cpu")) // devices.per_node,
        device=devices.kind,
        native_bfloat16=native_bfloat16(devices.kind),
        processes=devices.processes,
        cores=cores_per_process(devices),
        batch_norm=any(isinstance(module, _BatchNorm) for module in learner.net.modules()),
        given_weights=has_given_weights(config),
        pixel_layer=encoder.pixel_layer,
        instance_layer=encoder.instance_hook.name,
        patch=patch_size(learner.net),
    )


def build_card(plan: RunPlan, statistics: Statistics) -> BackboneCard:
    """What is needed to use the backbone."""
    settings = plan.settings
    random = ZERO_INIT if settings.zero_init_residual else "random"
    return BackboneCard(
        model=plan.model,
        channels=statistics.channels,
        image_size=plan.view_size,
        mean=statistics.mean,
        std=statistics.std,
        low=statistics.low,
        high=statistics.high,
        pixel_layer=settings.pixel_layer,
        instance_layer=settings.instance_layer,
        start=start_weights(settings.weights) or (AS_HANDED if is_module_handed() else random),
        seed=plan.seed,
        config=network_config(settings),
    )


def build_train_loader(
    plan: RunPlan, data: TrainingData, rank: int, folder: Path | None
) -> TwoViewLoader:
    """The loader of one process; the one that writes lists unreadable images in the folder."""
    return build_loader(
        kept_decoded(data.train, plan),
        data.statistics,
        image_size=plan.view_size,
        batch_size=plan.images_per_process,
        crop_area=plan.crop_area,
        aspect_ratio=plan.aspect_ratio,
        prob_hflip=plan.prob_hflip,
        prob_vflip=plan.prob_vflip,
        max_rotation=plan.max_rotation,
        photometry=plan.photometry,
        seed=plan.seed,
        workers=plan.workers,
        rank=rank,
        world=plan.processes,
        max_broken=plan.max_broken,
        skipped_file=None if folder is None else folder / run_layout.SKIPPED,
        pin_memory=plan.device == "cuda",
    )


def keeps_decoded(source: Source, plan: RunPlan) -> bool:
    """Whether decoded images are kept: where all workers can share them, and none is there yet."""
    in_memory = isinstance(source, Subset) and isinstance(source.source, ItemSource)
    return plan.cache_bytes > 0 and not in_memory and can_share(plan.workers)


def kept_decoded(source: Source, plan: RunPlan) -> Source:
    """The images, each decoded once where there is room for it."""
    if not keeps_decoded(source, plan):
        return source
    try:
        return DecodedCache(source, plan.cache_bytes)
    except OSError as error:
        LOG.info("decoded images are not cached: not enough memory (%s)", error)
        return source


class Autocast(MixedPrecision):
    """bfloat16 autocast; Fabric's own rounds the inputs too, and with them coordinates of views."""

    def convert_input(self, data: Any) -> Any:
        return data


def build_fabric(plan: RunPlan, devices: Devices) -> Fabric:
    """Lightning Fabric for the plan's devices, strategy and precision.

    Sharding is torch's second (`fully_shard`): parameters stay whole tensors to the eye, while the
    first flattens them, so that the target could not follow.
    """
    strategy: Strategy | str = "auto"
    if plan.sharded:
        strategy = ModelParallelStrategy(shard, plan.processes, tensor_parallel_size=1)
    elif plan.processes > 1:
        # Batch norm's buffers are each process's own: in training nobody reads them.
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Fabric(
        accelerator=devices.kind,
        devices=devices.per_node,
        num_nodes=devices.nodes,
        strategy=strategy,
        plugins=[Autocast("bf16-mixed", devices.kind)] if plan.precision == "bfloat16" else [],
    )


def build_optimizer(learner: nn.Module, plan: RunPlan, idle: set[str]) -> torch.optim.Optimizer:
    """Timm's optimiser over the parameters that the loss reaches.

    Those that it never reaches are ``idle``. Parameters of one dimension have no weight decay, and
    so no LARS either, as with the authors.

    Raises:
        ValueError: timm has no optimiser of that name, or one of second derivatives.
    """
    named = [(n, p) for n, p in learner.named_parameters() if p.requires_grad and n not in idle]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused: dict[str, Any] = {"fused": True} if not plan.sharded and plan.optimizer in FUSED else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            [group for group in groups if group["params"]],
            opt=plan.optimizer,
            lr=plan.schedule.peak_lr,
            momentum=0.9,
            **fused,
        )
    except (ValueError, AssertionError, KeyError) as error:
        names = [str(name) for name in list_optimizers()]
        near = get_close_matches(plan.optimizer, names, n=3) or ["adamw", "lars", "sgd", "lamb"]
        raise ValueError(
            f"optimizer is {plan.optimizer!r}, which timm cannot build ({error}); perhaps "
            f"{' or '.join(near)}"
        ) from error
    if getattr(optimizer, "is_second_order", False):  # as timm's own loop asks
        raise ValueError(
            f"optimizer is {plan.optimizer!r}, which needs second derivatives, and the losses have "
            "none; use adamw, lars, sgd or lamb"
        )
    return optimizer


def shard(learner: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Give each process a shard of the learner's parts (FSDP2)."""
    assert isinstance(learner, PixelCL)
    learner.to(mesh.device_type).to(memory_format=torch.contiguous_format)  # it shards no other
    for part in (
        learner.online_encoder,
        learner.online_predictor,
        *each_level(learner.propagate_pixels),
        learner.target_encoder,
    ):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"])
    return learner
