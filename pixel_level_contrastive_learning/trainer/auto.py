"""Where `auto` ends: `resolve` turns settings and what was found out into a `RunPlan`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import ceil, cos, pi, sqrt
from typing import Any

from ..augment import Photometry, blur_of
from ..checks import counted
from .config import NAMES, PRECISIONS, Auto, PretrainConfig

LINEAR = ("sgd", "momentum", "nesterov", "lars", "larc")
"""Parts of the names of optimisers whose learning rate grows in proportion to the batch."""
BASE_LR = {"adam": 2e-3, "lamb": 5e-3, "lars": 1.0, "sgd": 0.1, "momentum": 0.1}
"""Default peak learning rate for 256 images, by the beginning of an optimiser's name."""
GENTLE_ADAM_LR = 1e-3
"""Adam's default where the backbone has no batch norm, which tolerates more, and where it starts
from good weights: of 1e-4, 3e-4 and 1e-3 the last has the largest mean gain over three domains."""
WARMUP_SHARE = 0.1
"""Share of the run that is warm-up by default."""
WARMUP_FROM = 1 / 100
"""Share of the peak learning rate at step 0, as in the authors' release."""
VIEW_PAIRS = 300_000
"""Small data sets are repeated until about this many pairs of views were drawn, ..."""
EPOCHS = (100, 1000)
"""... within these epochs, ..."""
MOST_VIEW_PAIRS = 128_000_000
"""... and large ones until this many: a hundred epochs of ImageNet."""
PICTURE_COST = 16
"""Images whose training costs as much as one round of pictures: 128 views forward, against four
forward passes and one backward pass of each image, which cost eight forward passes."""
PICTURE_SHARE = 0.015
"""Largest share of the run's time that pictures take by default."""
CACHE_SHARE = {"auto": 0.25, "ram": 0.5}
"""Largest share of the free memory that decoded images take, over all processes of a machine."""
CACHE_ROOM = 1.3
"""Bytes kept ready for images of the typical size: some are larger, or are kept at two scales."""
CAPTURED_ON = ("cuda",)
"""Kinds of device on which a step is launched as one graph by default."""
BFLOAT16_SIDE = 32
"""Smallest side of views, in pixels, for bfloat16 on a CPU: of a plain ResNet-18 on views of 8
pixels, torch's gradients are then infinite, and others each time."""
VIEW_SIDES = (64, 224)
"""Smallest and largest default side of the views, in pixels."""


@dataclass(frozen=True)
class Info:
    """What was found out of data, system and network."""

    images: int  # to train on
    typical_size: tuple[int, int]  # median (height, width) of the images
    channels: int
    value_bytes: int  # of a decoded value: 1, or 4 where the data is deeper than 8 bits
    free_memory: int  # bytes for each process, for images among others
    device: str  # cuda, cpu or mps
    native_bfloat16: bool  # whether the device has bfloat16 instructions
    processes: int  # of the run, over all machines
    cores: int  # for each process
    batch_norm: bool  # whether the backbone has any
    given_weights: bool  # whether it starts from weights of its own, and not from random ones
    pixel_layer: str | tuple[str, ...]  # name of the layer for the pixel loss, or of several
    instance_layer: str
    patch: tuple[int, int] = (1, 1)  # (height, width) of the patches that it cuts images into


@dataclass(frozen=True)
class Schedule:
    """The length of a run, its learning rate and target momentum as functions of the step."""

    steps: int
    steps_per_epoch: int  # they show every image about once
    warmup_steps: int  # of linear warm-up; step ``warmup_steps`` is the first at the peak
    peak_lr: float
    final_lr: float  # where the learning rate's half cosine arrives at step ``steps``
    target_momentum: float  # at the start; it grows to 1 by half a cosine

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0 (the authors' schedule)."""
        if step <= self.warmup_steps:
            done = step / self.warmup_steps if self.warmup_steps else 1.0
            return self.peak_lr * (WARMUP_FROM + (1 - WARMUP_FROM) * done)
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + cos(pi * done)) / 2

    def momentum(self, step: int) -> float:
        """The target momentum of the update after a step, counted from 0.

        The authors update the target before a step: the update after step ``s`` is theirs of
        ``k = s + 1``.
        """
        return 1 - (1 - self.target_momentum) * (cos(pi * (step + 1) / self.steps) + 1) / 2


@dataclass(frozen=True)
class RunPlan:
    """Everything that decides a run, resolved: nothing is `auto` any more."""

    settings: PretrainConfig  # for `config.yaml`; nothing else reads them
    chosen: tuple[str, ...]  # names of the settings that were `auto`
    model: str
    schedule: Schedule
    view_size: tuple[int, int]  # (height, width)
    crop_area: tuple[float, float]  # smallest and largest share of the image
    aspect_ratio: tuple[float, float]  # smallest and largest width / height of a crop
    prob_hflip: float
    prob_vflip: float
    max_rotation: float  # degrees
    photometry: tuple[Photometry, Photometry]  # colour change of the first and the second view
    batch_size: int  # images a step, over all processes
    processes: int  # over all machines
    workers: int  # loader processes for each device
    cache_bytes: int  # for decoded images, in each process of the run; 0 for none
    accumulate: int  # parts that a process takes its share of a batch in; 0: as memory allows
    optimizer: str  # its name in timm
    weight_decay: float  # of weights with two dimensions or more
    clip_grad: float  # largest norm of the gradient; 0 is no limit
    precision: str  # float32 or bfloat16
    device: str  # cuda, cpu or mps
    sharded: bool  # whether processes hold a shard of the network each (FSDP2)
    captured: bool  # whether steps are launched as one CUDA graph, where that is possible
    seed: int
    compares_pixels: bool  # whether the pixel loss has weight
    distance_thres: float  # cells match under this distance
    max_broken: float  # share of images that may be unreadable
    checkpoint_every: int  # steps
    keep_checkpoints: int
    picture_every: int  # steps; 0 for none
    probe_every: int  # steps; 0 for none
    probe_protocol: str  # linear or knn
    loggers: tuple[str, ...]  # besides `metrics.jsonl`

    @property
    def images_per_process(self) -> int:
        """Images of a step on each process."""
        return self.batch_size // self.processes


def resolve(config: PretrainConfig, info: Info) -> RunPlan:
    """What the settings come to, given what was found out.

    Raises:
        ValueError: A batch that the processes cannot share, an optimiser without a default learning
            rate, or a final learning rate above the peak.
    """
    size = view_size(config, info.typical_size, info.patch)
    batch = unless_auto(config.batch_size, default_batch_size(info))
    check_batch(batch, info.processes, instance_weight=config.instance_weight)
    per_epoch = max(1, info.images // batch)
    epochs = unless_auto(config.epochs, default_epochs(info.images))
    steps = epochs * per_epoch if config.steps is None else config.steps
    share = config.warmup_epochs
    warmup = round(WARMUP_SHARE * steps if share == "auto" else share * per_epoch)
    lr, peak_lr = learning_rate(config, batch, gentle=info.given_weights or not info.batch_norm)
    if config.final_lr > peak_lr:
        raise ValueError(
            f"final_lr is {config.final_lr:g}, above the peak learning rate of {peak_lr:.3g} for "
            f"{batch} images; lower it, or raise lr"
        )
    schedule = Schedule(
        steps, per_epoch, min(warmup, steps), peak_lr, config.final_lr, config.target_momentum
    )
    blur = blur_of(min(size)) if config.blur_sigma == "auto" else config.blur_sigma
    precision = PRECISIONS[str(config.precision)]
    if precision == "auto":
        trusted = info.device != "cpu" or min(size) >= BFLOAT16_SIDE
        precision = "bfloat16" if info.native_bfloat16 and trusted else "float32"
    affordable = ceil(PICTURE_COST / (PICTURE_SHARE * (batch // info.processes)))
    epoch_or_so = 1000 if info.device == "cuda" else min(max(per_epoch, 100), 1000)
    probe_epochs = unless_auto(config.probe_every, max(1, round(steps / per_epoch / 10)))
    settings = replace(
        config,
        channels=info.channels,
        image_size=size if len(set(size)) > 1 or size == config.image_size else size[0],
        pixel_layer=info.pixel_layer,
        pixel_levels=1 if isinstance(info.pixel_layer, str) else len(info.pixel_layer),
        instance_layer=info.instance_layer,
        blur_sigma=blur,
        batch_size=batch,
        epochs=epochs if config.steps is None else config.epochs,
        lr=lr,
        warmup_epochs=schedule.warmup_steps / per_epoch if share == "auto" else share,
        precision=precision,
        checkpoint_every=unless_auto(config.checkpoint_every, epoch_or_so),
        picture_every=unless_auto(config.picture_every, max(steps // 10, affordable)),
        probe_every=probe_epochs,
    )
    sharded = info.processes > 1 and config.strategy == "fsdp"
    first, second = (
        Photometry(
            jitter=config.jitter,
            prob_jitter=config.prob_jitter,
            prob_gray=config.prob_gray,
            prob_blur=prob_blur,
            sigma=blur,
            prob_solarise=prob_solarise,
        )
        for prob_blur, prob_solarise in zip(config.prob_blur, config.prob_solarise, strict=True)
    )
    derived: dict[str, Any] = {
        "settings": settings,
        "chosen": tuple(
            name for name in NAMES if "auto" == getattr(config, name) != getattr(settings, name)
        ),
        "schedule": schedule,
        "view_size": size,
        "photometry": (first, second),
        "processes": info.processes,
        "workers": unless_auto(config.workers, default_workers(info)),
        "cache_bytes": cache_bytes(config.cache, info, passes=steps / per_epoch),
        "accumulate": unless_auto(config.accumulate, 0),
        "device": info.device,
        "sharded": sharded,
        "captured": info.device in CAPTURED_ON and config.graph == "auto",
        "compares_pixels": config.alpha > 0,
        "probe_every": 0 if config.probe is None or sharded else probe_epochs * per_epoch,
    }
    names = {field.name for field in fields(RunPlan)} - derived.keys()
    return RunPlan(**derived, **{name: getattr(settings, name) for name in names})


def learning_rate(config: PretrainConfig, batch_size: int, *, gentle: bool) -> tuple[float, float]:
    """The learning rate for 256 images, and the run's peak: the one place where they are decided.

    The peak grows with the batch: in proportion for SGD and LARS, with its square root for others.
    ``gentle`` is for networks that a large one would harm, see `GENTLE_ADAM_LR`.

    Raises:
        ValueError: ``lr`` is `auto` and the optimiser has no default.
    """
    name = config.optimizer.lower()
    if config.lr != "auto":
        base = config.lr
    else:
        prefixes = [prefix for prefix in BASE_LR if name.startswith(prefix)]
        if not prefixes:
            raise ValueError(
                f"optimizer is {config.optimizer!r}, which has no default learning rate; set lr, "
                "or use adamw, lamb, lars or sgd"
            )
        base = BASE_LR[prefixes[0]]
        if prefixes[0] == "adam" and gentle:
            base = GENTLE_ADAM_LR
    share = batch_size / 256
    return base, base * (sqrt(share) if is_adaptive(name) else share)


def is_adaptive(optimizer: str) -> bool:
    """Whether an optimiser divides gradients by their size, as all but SGD and LARS do."""
    return not any(name in optimizer.lower() for name in LINEAR)


def view_size(
    config: PretrainConfig, typical_size: tuple[int, int], patch: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """``(height, width)`` of the views; by default 224, or the multiple of 32 that images allow.

    What patches would leave out of a default is cut off.
    """
    if isinstance(config.image_size, tuple):
        return config.image_size
    if config.image_size != "auto":
        return config.image_size, config.image_size
    smallest, largest = VIEW_SIDES
    side = min(largest, max(smallest, min(typical_size) // 32 * 32))
    h, w = patch
    return side // h * h, side // w * w


def unless_auto(value: int | Auto, default: int) -> int:
    """The value, or the default where it is `auto`."""
    return default if value == "auto" else value


def default_batch_size(info: Info) -> int:
    """Default images a step: 256 on a GPU, 32 on a CPU, and no more than there are."""
    size = 256 if info.device == "cuda" else 32
    while size > max(info.images, 2):
        size //= 2
    return max(-(-size // info.processes) * info.processes, 2 * info.processes)


def check_batch(batch_size: int, processes: int, *, instance_weight: float) -> None:
    """Refuse a batch that the processes cannot share, or that leaves one image to batch norm."""
    if batch_size % processes:
        fits = -(-batch_size // processes) * processes
        raise ValueError(
            f"batch_size is {batch_size}, which {processes} processes cannot share equally; give "
            f"a multiple of {processes}, such as {fits}"
        )
    if instance_weight > 0 and batch_size < 2 * processes:
        raise ValueError(
            f"batch_size is {batch_size} on {counted(processes, 'device')}, but batch norm needs "
            f"more than one image; give {2 * processes} or more, or an instance_weight of 0"
        )


def default_epochs(images: int) -> int:
    """Default passes over the images: 100, more of few images, fewer of very many."""
    fewest, most = EPOCHS
    epochs = min(max(VIEW_PAIRS // images, fewest), most)
    return max(1, min(epochs, MOST_VIEW_PAIRS // images))


def cache_bytes(cache: str, info: Info, *, passes: float) -> int:
    """Bytes for decoded images; 0 where none are kept."""
    if cache == "off":
        return 0
    height, width = info.typical_size
    needed = int(info.images * height * width * info.channels * info.value_bytes * CACHE_ROOM)
    most = int(info.free_memory * CACHE_SHARE[cache])
    if cache == "auto" and (needed > most or passes <= 1):
        return 0
    return min(needed, most)


def default_workers(info: Info) -> int:
    """Default loader processes for each device: a CPU that trains has few cores to spare."""
    if info.device == "cpu":
        return max(1, info.cores // 4)
    return max(1, min(16, info.cores - 1))
