"""The one list of knobs: flags, file, help, Python signature and `config.yaml` come from it.

Imports no torch, so that flags are answered and checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

import tyro

from ..checks import (
    above,
    at_least,
    is_number,
    one_of,
    raise_together,
    ratio_range,
    size_pair,
    something_to_learn,
    whole,
    within,
)

PIXPRO: dict[str, object] = {
    "model": "torchvision/resnet50",
    "zero_init_residual": True,
    "image_size": 224,
    "batch_size": 1024,
    "optimizer": "lars",
    "lr": 1.0,
    "final_lr": 1e-6,
    "warmup_epochs": 5.0,
    "weight_decay": 1e-5,
    "target_momentum": 0.99,
    "crop_area": (0.08, 1.0),
    "aspect_ratio": (3 / 4, 4 / 3),
    "prob_hflip": 0.5,
    "prob_vflip": 0.0,
    "max_rotation": 0.0,
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "prob_jitter": 0.8,
    "prob_gray": 0.2,
    "prob_blur": (1.0, 0.1),
    "blur_sigma": (0.1, 2.0),
    "prob_solarise": (0.0, 0.2),
    "projection_size": 256,
    "projection_hidden_size": 4096,  # the release; the paper says 2048
    "ppm_num_layers": 1,
    "ppm_gamma": 2.0,
    "distance_thres": 0.7,
    "loss": "pixpro",
    "alpha": 1.0,
    "instance_weight": 0.0,  # off in the released scripts
    "clip_grad": 0.0,
}

RECIPES: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {"pixpro-100ep": PIXPRO | {"epochs": 100}, "pixpro-400ep": PIXPRO | {"epochs": 400}}
)
"""Settings by the recipe's name; what a recipe does not name keeps its default."""


Auto = Literal["auto"]
PRETRAINED = "pretrained"
"""In place of a file of weights: those that the model's library offers."""

PRECISIONS = {
    "auto": "auto",
    **dict.fromkeys(("float32", "32", "32-true", "fp32"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16", "bf16-mixed"), "bfloat16"),
}
"""What may be asked for, Lightning's names included, and what is meant."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides a run: same settings, data and seed, same weights.

    What is `auto` is decided when data and machine have been seen; `config.yaml` in the run's
    folder keeps what was decided.
    """

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of images (searched to any depth), text files of paths, or WebDataset shards such as
    shards-{0000..0099}.tar."""
    out: str | None = None
    """Folder of the run, new or empty unless --resume or --overwrite is given. Needed."""
    config: str | None = None
    """YAML file of settings, such as the config.yaml of a run; flags count more."""
    recipe: str | None = None
    """The authors' settings: pixpro-100ep or pixpro-400ep; flags count more."""
    resume: bool = False
    """Go on where the run in --out stopped, at the step; settings not given are the run's."""
    overwrite: bool = False
    """Replace the run in --out."""
    dry_run: bool = False
    """Show the settings, pairs per image, the memory estimate and one preview, and stop."""

    model: str = "torchvision/resnet50"
    """The backbone: torchvision/NAME, timm/NAME, or your own path/to/file.py:function."""
    weights: str | None = None
    """Weights to start from: a file, a run, or `pretrained` for the library's own."""
    channels: int | Auto = "auto"
    """Channels of the images."""
    pixel_layer: str | Auto = "auto"
    """Layer for the pixel level (see `pixelcl layers`); auto: the deepest map of at least 4x4
    cells and a stride of at most 32."""
    instance_layer: str | Auto = "auto"
    """Layer for the instance level; auto: the pooled vector."""
    zero_init_residual: bool = False
    """Begin with the last batch norm of each residual block at 0, unless there are weights to start
    from. For long runs: the blocks of a short one hardly leave it."""

    image_size: int | tuple[int, int] | Auto = "auto"
    """Size of the views in pixels, one number or height and width; auto: 224, or what small images
    allow."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop, as a share of the image's area."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width of a crop, as a share of its height."""
    prob_hflip: float = 0.5
    """Share of views flipped left to right."""
    prob_vflip: float = 0.0
    """Share of views flipped upside down."""
    max_rotation: float = 0.0
    """Largest turn of a view in degrees, either way."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.0)
    """Strength of the change in brightness, contrast, saturation and hue."""
    prob_jitter: float = 0.8
    """Share of views changed in these."""
    prob_gray: float = 0.2
    """Share of views that lose their colour."""
    prob_blur: tuple[float, float] = (0.5, 0.5)
    """Share of blurred views, first and second view."""
    blur_sigma: tuple[float, float] | Auto = "auto"
    """Smallest and largest blur in pixels; auto: 0.1 and 2 for views of 224 pixels, less of
    smaller ones."""
    prob_solarise: tuple[float, float] = (0.0, 0.0)
    """Share of solarised views, first and second view (images of three channels only)."""

    loss: Literal["pixpro", "pixcontrast"] = "pixpro"
    """The pixel loss."""
    alpha: float = 1.0
    """Weight of the pixel loss; 0 skips its branch."""
    instance_weight: float = 0.1
    """Weight of the instance loss; 0 skips its branch. At 1, images of few scenes let it drown the
    pixel loss."""
    projection_size: int = 256
    """Channels of the projections."""
    projection_hidden_size: int = 2048
    """Hidden channels of projectors and predictor."""
    ppm_num_layers: Literal[0, 1, 2] = 1
    """Depth of the propagation module's transform."""
    ppm_gamma: float = 2.0
    """Sharpness of the propagation module's likeness, at least 1."""
    distance_thres: float = 0.7
    """Cells match under this distance, in diagonals of the larger of the two views' cells."""
    similarity_temperature: float = 0.3
    """Temperature of pixcontrast."""

    batch_size: int | Auto = "auto"
    """Images a step, over all devices; auto: 256 on a GPU, 32 on a CPU, fewer of few images."""
    accumulate: int | Auto = "auto"
    """Parts that a device takes its share of a batch in; auto: as few as memory allows."""
    epochs: int | Auto = "auto"
    """Passes over the images; auto: 100, more of fewer than 3000 images."""
    steps: int | None = None
    """Steps of the run, in place of epochs."""
    optimizer: str = "adamw"
    """Any optimiser of timm by its name, such as adamw, lars, sgd or lamb."""
    lr: float | Auto = "auto"
    """Peak learning rate for a batch of 256 images. It grows with the batch: with its square root
    for optimisers of the Adam family, in proportion for others. auto: by the optimiser's name, less
    for networks without batch norm."""
    weight_decay: float = 1e-4
    """Weight decay; one-dimensional parameters have none."""
    warmup_epochs: float | Auto = "auto"
    """Epochs of linear warm-up; auto: a tenth of the run."""
    final_lr: float = 1e-6
    """Where the learning rate's cosine ends."""
    target_momentum: float = 0.99
    """Share of itself that the target keeps at the start; it grows to 1 by a cosine."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 is no limit."""
    seed: int = 0
    """Seed of everything random."""
    precision: str = "auto"
    """float32 or bfloat16 (autocast); auto: bfloat16 where the hardware does it natively."""

    workers: int | Auto = "auto"
    """Processes that load images, for each device."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Kind of device; auto: gpu (CUDA) where there is one, else cpu. Nobody has tried mps."""
    devices: int | Auto = "auto"
    """Devices on each machine; auto: all GPUs (in a notebook, one), or one CPU process."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How devices share the work: ddp copies the network, fsdp shards it."""

    checkpoint_every: int | Auto = "auto"
    """Steps between checkpoints; auto: 1000 on a GPU, elsewhere an epoch, from 100 to 1000."""
    keep_checkpoints: int = 3
    """How many of them to keep."""
    max_broken: float = 0.01
    """Share of images that may be broken before the run stops; unless it is 0, one always may."""
    loggers: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where figures go besides metrics.jsonl (Lightning's loggers)."""
    picture_every: int | Auto = "auto"
    """Steps between pictures of what the network sees; auto: ten in a run, fewer in one so short
    that they would take more than 2 % of its time. 0 draws none."""
    probe: str | None = None
    """Folder with images/{train,val} and masks/{train,val}: a probe during training, and the
    best checkpoint by it."""
    probe_protocol: Literal["linear", "knn"] = "knn"
    """How to probe."""
    probe_every: int | Auto = "auto"
    """Epochs between probes; auto: ten in a run."""

    def __post_init__(self) -> None:
        raise_together(*problems(self))


HOW_TO_START = ("config", "resume", "overwrite", "dry_run")
"""Fields that say how to begin and not what the run is: never written to `config.yaml`."""
NAMES = tuple(field.name for field in fields(PretrainConfig))


def problems(config: PretrainConfig) -> Iterable[str | None]:
    """The complaint about each value that is out of range, None for each that will do."""
    c = config
    texts = ("out", "config", "weights", "probe")
    switches = ("resume", "overwrite", "dry_run", "zero_init_residual")
    for name in texts:
        yield text_or_none(name, getattr(c, name))
    for name in ("model", "pixel_layer", "instance_layer", "optimizer"):
        yield text_or_none(name, getattr(c, name) or 0)
    for name in switches:
        yield one_of(name, getattr(c, name), (True, False))
    yield several_texts("data", c.data)
    yield None if c.recipe is None else one_of("recipe", c.recipe, tuple(RECIPES))
    if c.resume and c.overwrite:
        yield "resume and overwrite are both given; keep the run (--resume) or replace it"

    yield or_auto("channels", c.channels, whole, 1)
    yield None if c.image_size == "auto" else size_pair("image_size", c.image_size)
    yield ratio_range("crop_area", c.crop_area)
    yield from low_high("aspect_ratio", c.aspect_ratio, above=0)
    if c.blur_sigma != "auto":
        yield from low_high("blur_sigma", c.blur_sigma, above=0)
    for name in ("prob_hflip", "prob_vflip", "prob_jitter", "prob_gray"):
        yield within(name, getattr(c, name), 0, 1)
    for name in ("prob_blur", "prob_solarise"):
        yield from numbers(name, getattr(c, name), 2, 0, 1)
    yield from numbers("jitter", c.jitter, 4, 0, 1)
    yield within("max_rotation", c.max_rotation, 0, 180)

    yield one_of("loss", c.loss, ("pixpro", "pixcontrast"))
    yield at_least("alpha", c.alpha, 0)
    yield at_least("instance_weight", c.instance_weight, 0)
    yield something_to_learn(c.alpha, c.instance_weight)
    yield whole("projection_size", c.projection_size, 1)
    yield whole("projection_hidden_size", c.projection_hidden_size, 1)
    yield one_of("ppm_num_layers", c.ppm_num_layers, (0, 1, 2))
    yield at_least("ppm_gamma", c.ppm_gamma, 1)
    yield above("distance_thres", c.distance_thres, 0)
    yield above("similarity_temperature", c.similarity_temperature, 0)

    for name in ("batch_size", "accumulate", "epochs", "checkpoint_every", "probe_every"):
        yield or_auto(name, getattr(c, name), whole, 1)
    yield None if c.steps is None else whole("steps", c.steps, 1)
    yield or_auto("lr", c.lr, above, 0)
    yield or_auto("warmup_epochs", c.warmup_epochs, at_least, 0)
    for name in ("weight_decay", "final_lr", "clip_grad"):
        yield at_least(name, getattr(c, name), 0)
    yield within("target_momentum", c.target_momentum, 0, 1)
    yield whole("seed", c.seed, 0)
    yield one_of("precision", str(c.precision), tuple(PRECISIONS))

    yield or_auto("workers", c.workers, whole, 0)
    yield or_auto("picture_every", c.picture_every, whole, 0)
    yield or_auto("devices", c.devices, whole, 1)
    yield one_of("accelerator", c.accelerator, ("auto", "cpu", "gpu", "mps"))
    yield whole("num_nodes", c.num_nodes, 1)
    yield one_of("strategy", c.strategy, ("auto", "ddp", "fsdp"))
    yield whole("keep_checkpoints", c.keep_checkpoints, 1)
    yield within("max_broken", c.max_broken, 0, 1)
    yield several_texts("loggers", c.loggers)
    if several_texts("loggers", c.loggers) is None:
        for logger in c.loggers:
            yield one_of("loggers", logger, ("tensorboard", "csv", "wandb", "mlflow"))
    yield one_of("probe_protocol", c.probe_protocol, ("linear", "knn"))


def or_auto(name: str, value: object, check: Any, low: float) -> str | None:
    """The complaint of a check, which is told that ``auto`` will do as well."""
    if value == "auto":
        return None
    complaint: str | None = check(name, value, low)
    return complaint and f"{complaint}, or 'auto'"


def text_or_none(name: str, value: object) -> str | None:
    """The complaint about anything but a text or nothing."""
    if value is None or (isinstance(value, str) and value):
        return None
    return f"{name} is {value!r}; it must be a text"


def several_texts(name: str, value: object) -> str | None:
    """The complaint about anything but a sequence of texts."""
    if isinstance(value, (tuple, list)) and all(isinstance(one, str) and one for one in value):
        return None
    return f"{name} is {value!r}; it must be a list of texts"


def numbers(name: str, value: object, count: int, low: float, high: float) -> Iterable[str | None]:
    """The complaint about anything but ``count`` numbers from ``low`` to ``high``."""
    if isinstance(value, (tuple, list)) and len(value) == count:
        for one in value:
            yield within(name, one, low, high)
    else:
        yield f"{name} is {value!r}; it must be {count} numbers from {low} to {high}"


def low_high(name: str, value: object, above: float) -> Iterable[str | None]:
    """The complaint about anything but ``(low, high)`` with ``above < low <= high``."""
    fits = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))
    if not fits or not above < value[0] <= value[1]:  # type: ignore[index]
        yield f"{name} is {value!r}; it must be (low, high) with {above} < low <= high"
