"""What `auto` comes to, once data and machine have been seen. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, sqrt

from ..augment import blur_of
from .config import PRECISIONS, PretrainConfig

ADAM_FAMILY = ("adam", "lamb", "lion", "nadam", "radam", "adan", "laprop", "adopt", "muon")
"""Beginnings of the names of optimisers that divide gradients by their size."""
BASE_LR = {"adam": 2e-3, "lamb": 5e-3, "lars": 1.0, "sgd": 0.1, "momentum": 0.1}
"""Peak learning rate for 256 images by the beginning of an optimiser's name."""
LR_WITHOUT_BATCH_NORM = 1e-3
"""What Adam gets instead where the backbone has no batch norm to bear more."""
WARMUP_SHARE = 0.1
"""Share of the run that is warm-up where nothing is said."""
IMAGES_SEEN = 300_000
"""Few images are seen until about this many views pairs were drawn, ..."""
EPOCHS = (100, 1000)
"""... within these epochs, ..."""
MOST_IMAGES_SEEN = 128_000_000
"""... and many images until this many: a hundred epochs of ImageNet."""
LOOK = 16
"""Images whose training takes as long as a look at the network: there 128 views go forward; here
two of each image, twice, and back once, which costs as much."""
LOOK_SHARE = 0.015
"""Share of the time between two looks that one may take."""
VIEW_SIDES = (64, 224)
"""Smallest and largest side of the views where nothing is said, in pixels."""


@dataclass(frozen=True)
class Facts:
    """What was seen of data and machine.

    Attributes:
        images: Images to train on.
        typical_size: Median ``(height, width)`` of the images.
        channels: Channels of the images.
        device: ``cuda``, ``cpu`` or ``mps``.
        native_bfloat16: Whether the device computes in bfloat16 natively.
        processes: Processes of the run, over all machines.
        cores: Cores that each process may use.
    """

    images: int
    typical_size: tuple[int, int]
    channels: int
    device: str
    native_bfloat16: bool
    processes: int
    cores: int


@dataclass(frozen=True)
class Clock:
    """How long a run lasts.

    Attributes:
        steps: Steps of the run.
        steps_per_epoch: Steps that show every image about once.
        warmup: Steps of the warm-up.
    """

    steps: int
    steps_per_epoch: int
    warmup: int


def decided(config: PretrainConfig, facts: Facts) -> PretrainConfig:
    """The settings with everything decided that data and machine decide.

    Left `auto` are devices and workers, which do not change the result; layers and learning rate,
    which the network decides; and the parts that a batch is taken in, which memory decides.

    Raises:
        ValueError: A batch that does not divide among the processes, an optimiser without a known
            learning rate.
    """
    chosen: dict[str, object] = {"channels": facts.channels}
    size = view_side(facts.typical_size) if config.image_size == "auto" else config.image_size
    chosen["image_size"] = size
    if config.blur_sigma == "auto":
        chosen["blur_sigma"] = blur_of(min(size) if isinstance(size, tuple) else size)
    batch = batch_size(facts) if config.batch_size == "auto" else config.batch_size
    chosen["batch_size"] = batch
    if batch % facts.processes or batch < facts.processes:
        fits = -(-batch // facts.processes) * facts.processes
        raise ValueError(
            f"batch_size is {batch}, which {facts.processes} processes cannot share equally; give "
            f"a multiple of {facts.processes}, such as {fits}"
        )
    if config.epochs == "auto" and config.steps is None:
        chosen["epochs"] = epochs(facts.images)
    if config.lr == "auto":
        base_lr(config.optimizer)  # refuses what it does not know before the network is built
    wanted = PRECISIONS[str(config.precision)]
    native = "bfloat16" if facts.native_bfloat16 else "float32"
    chosen["precision"] = native if wanted == "auto" else wanted
    done = replace(config, **chosen)  # type: ignore[arg-type]  # one type a field
    clock = clock_of(done, facts.images)
    chosen["warmup_epochs"] = clock.warmup / clock.steps_per_epoch
    if config.checkpoint_every == "auto":
        often = min(max(clock.steps_per_epoch, 100), 1000)
        chosen["checkpoint_every"] = 1000 if facts.device == "cuda" else often
    if config.picture_every == "auto":
        seldom = ceil(LOOK / (LOOK_SHARE * (batch // facts.processes)))
        chosen["picture_every"] = max(clock.steps // 10, seldom)
    if config.probe_every == "auto":
        chosen["probe_every"] = max(1, round(clock.steps / clock.steps_per_epoch / 10))
    return replace(config, **chosen)  # type: ignore[arg-type]


def clock_of(config: PretrainConfig, images: int) -> Clock:
    """How long a run with decided batch and epochs lasts."""
    assert isinstance(config.batch_size, int)
    per_epoch = max(1, images // config.batch_size)
    steps = config.steps
    if steps is None:
        assert isinstance(config.epochs, int)
        steps = config.epochs * per_epoch
    share = config.warmup_epochs
    warmup = round(WARMUP_SHARE * steps) if share == "auto" else round(share * per_epoch)
    return Clock(steps, per_epoch, min(warmup, steps))


def peak_lr(config: PretrainConfig) -> float:
    """The largest learning rate of a run: that of 256 images, scaled with the batch."""
    assert isinstance(config.lr, float | int)
    assert isinstance(config.batch_size, int)
    share = config.batch_size / 256
    return config.lr * (sqrt(share) if is_adaptive(config.optimizer) else share)


def is_adaptive(optimizer: str) -> bool:
    """Whether an optimiser is of the Adam family, whose steps do not grow with the gradient."""
    return optimizer.lower().startswith(ADAM_FAMILY)


def base_lr(optimizer: str, *, batch_norm: bool = True) -> float:
    """The default peak learning rate of an optimiser for 256 images.

    Args:
        optimizer: Its name.
        batch_norm: Whether the backbone has batch norm.

    Raises:
        ValueError: There is none.
    """
    for name, lr in BASE_LR.items():
        if optimizer.lower().startswith(name):
            return lr if batch_norm or name != "adam" else LR_WITHOUT_BATCH_NORM
    raise ValueError(
        f"optimizer is {optimizer!r}, for which no learning rate is known; give one with lr, or "
        "take adamw, lamb, lars or sgd"
    )


def view_side(typical_size: tuple[int, int]) -> int:
    """The side of the views: 224, or the multiple of 32 that small images allow."""
    smallest, largest = VIEW_SIDES
    return min(largest, max(smallest, min(typical_size) // 32 * 32))


def batch_size(facts: Facts) -> int:
    """Images a step: 256 on a GPU, 32 on a CPU, and no more than there are."""
    most = 256 if facts.device == "cuda" else 32
    while most > max(facts.images, 2):
        most //= 2
    return max(-(-most // facts.processes) * facts.processes, 2 * facts.processes)


def epochs(images: int) -> int:
    """Passes over the images: 100, more of few images, fewer of very many."""
    few, many = EPOCHS
    wanted = min(max(IMAGES_SEEN // images, few), many)
    return max(1, min(wanted, MOST_IMAGES_SEEN // images))


def workers(config: PretrainConfig, facts: Facts) -> int:
    """Loading processes for each device: a CPU that trains has few cores to spare."""
    if config.workers != "auto":
        return config.workers
    if facts.device == "cpu":
        return max(1, facts.cores // 4)
    return max(1, min(16, facts.cores - 1))
