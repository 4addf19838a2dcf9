"""From settings and plan to parts: data, backbone, learner, loader, optimiser."""

from __future__ import annotations

import json
from dataclasses import asdict
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
from ..backbones.factory import build_backbone, zero_last_norms
from ..backbones.hub import hub_config, on_hub
from ..backbones.state_dict import load_weights
from ..data.loader import TwoViewLoader, build_loader
from ..data.sources import Source, open_source, split_held_out
from ..data.statistics import Statistics, measure
from ..evaluation.features import native_bfloat16
from ..files import write_whole
from ..modules.encoder import each_level
from ..pixel_cl import PixelCL
from .auto import Info, RunPlan
from .config import PRETRAINED, PretrainConfig
from .config_io import start_weights
from .logging import LOG
from .system import Devices, cores_per_process

FUSED = ("adam", "adamw", "sgd")
"""Optimisers that torch updates in one pass over the weights: a third of the time on a CPU."""


class TrainingData(NamedTuple):
    """The images of a run.

    Attributes:
        train: Images that are trained on.
        held_out: A few that are only looked at; none of few images.
        statistics: Their size, channels and range.
    """

    train: Source
    held_out: Source
    statistics: Statistics


def open_data(data: Any, config: PretrainConfig, resumed: Path | None) -> TrainingData:
    """Open the images and measure their statistics; a resumed run keeps those it began with.

    Args:
        data: Folders and the like, or a Python sequence or data set.
        config: The settings.
        resumed: Folder of the run that is resumed; None for a new one.
    """
    source = open_source(data, leave_out=config.out, pages=config.pages, nodata=config.nodata)
    stored = None if resumed is None else resumed / run_layout.STATISTICS
    if stored is not None and stored.exists():
        try:
            values = json.loads(stored.read_text(encoding="utf-8"))
            images = values.pop("images", len(source))
            plain: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
                if name not in ("smallest", "sampled")  # of older versions
            }
            statistics = Statistics(**plain)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{stored} cannot be read ({error}); restore it, or remove it and the images are "
                "measured again"
            ) from error
        if images != len(source):
            LOG.warning(
                "there are %d images, and there were %d when the run began: of those held out now "
                "some may have been trained on",
                len(source),
                images,
            )
    else:
        channels = None if config.channels == "auto" else config.channels
        statistics = measure(source, channels=channels, seed=config.seed)
    return TrainingData(*split_held_out(source, config.seed), statistics)


def save_statistics(data: TrainingData, folder: Path) -> None:
    """Write `statistics.json`, once: a resumed run keeps it."""
    path = folder / run_layout.STATISTICS
    if not path.exists():
        images = len(data.train) + len(data.held_out)
        write_whole(path, json.dumps(asdict(data.statistics) | {"images": images}, indent=2))


def build_net(
    config: PretrainConfig, size: tuple[int, int], channels: int, *, load: bool
) -> nn.Module:
    """The backbone with its start weights; ``load`` is false where a checkpoint brings them.

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
    if load and config.weights is None and config.zero_init_residual:
        zero_last_norms(net)
    elif load and config.weights not in (None, PRETRAINED):
        LOG.info("weights from %s:\n%s", config.weights, load_weights(net, config.weights))
    return net


def network_config(config: PretrainConfig) -> dict[str, Any] | None:
    """What describes a network on the Hub; a resumed run has it. None for other networks."""
    if not on_hub(config.model):
        return None
    card = card_in(Path(config.out)) if config.resume and config.out else None
    return hub_config(config.model) if card is None else card.config


def build_learner(
    config: PretrainConfig, net: nn.Module, size: tuple[int, int], channels: int
) -> PixelCL:
    """The learner around a backbone, in the memory layout that convolutions are fastest in.

    Raises:
        ValueError: A layer that cannot be used.
    """
    learner = PixelCL(
        net,
        size,
        hidden_layer_pixel=layer_keys(config.pixel_layer),
        hidden_layer_instance=layer_key(config.instance_layer),
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
        pixel_levels=config.pixel_levels,
        level_weights=config.level_weights,
    )
    return learner.to(memory_format=torch.channels_last)


def layer_key(name: str) -> str | int | None:
    """A layer as the learner takes it: a name, an index, or None for its default."""
    return None if name == "auto" else name_or_index(name)


def layer_keys(names: str | tuple[str, ...]) -> str | int | list[str | int] | None:
    """One layer or several, likewise."""
    return layer_key(names) if isinstance(names, str) else [name_or_index(name) for name in names]


def name_or_index(name: str) -> str | int:
    """A layer's name, or the number that the text is."""
    return int(name) if name.removeprefix("-").isdecimal() and "." not in name else name


def find_info(data: TrainingData, devices: Devices, learner: PixelCL) -> Info:
    """What `resolve` needs to know of data, system and network."""
    encoder = learner.online_encoder
    return Info(
        images=len(data.train),
        typical_size=data.statistics.median_size,
        channels=data.statistics.channels,
        device=devices.kind,
        native_bfloat16=native_bfloat16(devices.kind),
        processes=devices.processes,
        cores=cores_per_process(devices),
        batch_norm=any(isinstance(module, _BatchNorm) for module in learner.net.modules()),
        pixel_layer=encoder.pixel_layer,
        instance_layer=encoder.instance_hook.name,
    )


def build_card(plan: RunPlan, statistics: Statistics) -> BackboneCard:
    """What is needed to use the backbone."""
    settings = plan.settings
    random = AS_HANDED if is_module_handed() else "random"
    random = ZERO_INIT if settings.zero_init_residual else random
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
        start=start_weights(settings.weights) or random,
        seed=plan.seed,
        config=network_config(settings),
    )


def build_train_loader(
    plan: RunPlan, data: TrainingData, rank: int, folder: Path | None
) -> TwoViewLoader:
    """The loader of one process; the one that writes lists unreadable images in the folder."""
    placement = plan.placement
    assert placement.area_range is not None
    return build_loader(
        data.train,
        data.statistics,
        image_size=plan.view_size,
        batch_size=plan.images_per_process,
        crop_area=placement.area_range,
        aspect_ratio=placement.aspect_range,
        prob_hflip=placement.prob_hflip,
        prob_vflip=placement.prob_vflip,
        max_rotation=placement.max_rotation,
        photometry=plan.photometry,
        seed=plan.seed,
        workers=plan.workers,
        rank=rank,
        world=plan.processes,
        max_broken=plan.max_broken,
        skipped_file=None if folder is None else folder / run_layout.SKIPPED,
        pin_memory=plan.device == "cuda",
    )


class Autocast(MixedPrecision):
    """bfloat16 autocast; Fabric's own rounds the inputs too, and with them coordinates of views."""

    def convert_input(self, data: Any) -> Any:
        return data


def build_fabric(plan: RunPlan, devices: Devices) -> Fabric:
    """Lightning Fabric for the plan's devices, strategy and precision."""
    return Fabric(
        accelerator=devices.kind,
        devices=devices.per_node,
        num_nodes=devices.nodes,
        strategy=build_strategy(plan),
        plugins=[Autocast("bf16-mixed", devices.kind)] if plan.precision == "bfloat16" else [],
    )


def build_strategy(plan: RunPlan) -> Strategy | str:
    """How processes share the work.

    Sharding is torch's second (`fully_shard`): parameters stay whole tensors to the eye, while the
    first flattens them, so that the target could not follow.
    """
    if plan.processes == 1:
        return "auto"
    if plan.sharded:
        return ModelParallelStrategy(
            shard, data_parallel_size=plan.processes, tensor_parallel_size=1
        )
    # Batch norm's buffers are each process's own: in training nobody reads them.
    return DDPStrategy(
        find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def build_optimizer(learner: nn.Module, plan: RunPlan, idle: set[str]) -> torch.optim.Optimizer:
    """Timm's optimiser over the parameters that the loss reaches.

    Parameters of one dimension have no weight decay, and so no LARS either, as with the authors.

    Args:
        learner: What is trained.
        plan: Name, learning rate and weight decay.
        idle: Names of parameters that the loss never reaches.

    Raises:
        ValueError: timm has no optimiser of that name.
    """
    named = [(n, p) for n, p in learner.named_parameters() if p.requires_grad and n not in idle]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused: dict[str, Any] = {"fused": True} if not plan.sharded and plan.optimizer in FUSED else {}
    try:
        return create_optimizer_v2(
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
            f"optimizer is {plan.optimizer!r}, which timm cannot make ({error}); perhaps "
            f"{' or '.join(near)}"
        ) from error


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
