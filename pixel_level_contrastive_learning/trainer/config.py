"""The settings of a run: flags, file, help, Python signature and `config.yaml` come from them.

Imports no torch, so that flags are parsed and checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args, get_origin, get_type_hints

import tyro

from ..checks import (
    LIMITS,
    Check,
    Pages,
    above,
    at_least,
    check_limits,
    is_number,
    one_of,
    raise_together,
    something_to_learn,
    unless,
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
    "pixel_levels": 1,
    "alpha": 1.0,
    "instance_weight": 0.0,  # off in the released scripts
    "clip_grad": 0.0,
}

RECIPES: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {"pixpro-100ep": PIXPRO | {"epochs": 100}, "pixpro-400ep": PIXPRO | {"epochs": 400}}
)
"""Settings by the recipe's name; settings that a recipe does not name keep their defaults.

The values are those of the authors' release. Two differences remain: timm's LARS divides by the sum
of the norms of gradient and decay, theirs by the norm of their sum; and our instance branch, which
their scripts turn off, pools before its projector.
"""


Auto = Literal["auto"]
Logger = Literal["tensorboard", "csv", "wandb", "mlflow"]
PRETRAINED = "pretrained"
"""Instead of a weights file: the weights that the model's library offers."""
PRECISIONS = {
    "auto": "auto",
    **dict.fromkeys(("float32", "32", "32-true", "fp32"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16", "bf16-mixed"), "bfloat16"),
}
"""Names of precisions, including Lightning's, and what they mean."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The settings of a run: same settings, data and seed, same weights.

    Settings that are `auto` are chosen for your data and machine, and printed; `config.yaml` in the
    run's folder records what was chosen.
    """

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """Unlabelled images: folders (searched recursively), text files with one path per line,
    or WebDataset shards such as shards-{000000..000099}.tar."""
    out: str | None = None
    """Folder of the run (required).
    It must be new or empty, unless --resume or --overwrite is given."""
    config: str | None = None
    """YAML file of settings, such as the config.yaml of an earlier run. Flags override it.
    What that run chose from a setting you change, such as lr from --optimizer, is chosen again."""
    recipe: str | None = None
    """Settings of the PixPro authors: pixpro-100ep or pixpro-400ep. Flags override them."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint.
    Settings not given are taken from that run."""
    overwrite: bool = False
    """Replace the run in --out with a new one."""
    dry_run: bool = False
    """Print the settings, pairs per image and estimated memory, draw a preview, and exit."""

    pages: Pages | None = None
    """How to read files with several pages or frames: as separate images, as channels of one image,
    or only the first.
    By default, unnamed gray pages are channels if every file has the same number of them, at most
    16; all others are images. What was found is printed."""
    nodata: float | None = None
    """Value that means "not measured", such as -9999, in addition to NaN and GDAL's tag."""

    model: str = "torchvision/resnet50"
    """Backbone: torchvision/NAME, timm/NAME, hf://OWNER/NAME for a repository of pixelcl, timm or
    transformers on the Hugging Face Hub, or your own function, path/to/file.py:function."""
    weights: str | None = None
    """Initial weights: a file, a run's folder, hf://OWNER/NAME or hf://OWNER/NAME/FILE on the Hub,
    or `pretrained` for those of the model's library or repository. Random by default."""
    channels: int | Auto = "auto"
    """Channels of the images.
    auto: found from the images."""
    pixel_layer: str | tuple[str, ...] | Auto = "auto"
    """Layer whose feature map the pixel loss uses (`pixelcl layers MODEL` lists them).
    Or several, coarse to fine: the loss is their mean; pictures and probes show the first.
    auto: the deepest map with at least 4x4 cells and a stride of at most 32."""
    pixel_levels: int | Auto = "auto"
    """How many layers --pixel-layer auto chooses: its default, then the deepest map of each finer
    stride. With 2, a ResNet learns at strides 32 and 16.
    auto: 2 from random weights, if there is a finer map with a stride of at least 8; else 1."""
    level_weights: tuple[float, ...] = ()
    """Relative weight of each pixel layer in the pixel loss.
    Equal by default."""
    instance_layer: str | Auto = "auto"
    """Layer whose features the instance loss uses.
    auto: the pooled vector after the last map, else the pixel layer, averaged."""
    zero_init_residual: bool = False
    """Initialise the last batch norm of each residual block to 0.
    Ignored if --weights is given, or if the model is a network passed in Python.
    Only for long runs: in a few hundred steps the blocks hardly move away from zero."""

    image_size: int | tuple[int, int] | Auto = "auto"
    """Size of the views in pixels: one number, or height and width.
    auto: 224, or less (a multiple of 32, at least 64) if the images are smaller; cut to whole
    patches of a vision transformer."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image's area."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of a crop (width / height)."""
    prob_hflip: float = 0.5
    """Probability that a view is flipped left to right."""
    prob_vflip: float = 0.0
    """Probability that a view is flipped upside down."""
    max_rotation: float = 0.0
    """Views are rotated by a random angle of up to this many degrees, in either direction."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.0)
    """Strength of the colour jitter: brightness, contrast, saturation, hue.
    Saturation and hue apply only to images with three channels."""
    prob_jitter: float = 0.8
    """Probability of colour jitter for a view."""
    prob_gray: float = 0.2
    """Probability that a view is converted to grayscale."""
    prob_blur: tuple[float, float] = (0.5, 0.5)
    """Probability of Gaussian blur, for the first and the second view."""
    blur_sigma: tuple[float, float] | Auto = "auto"
    """Smallest and largest sigma of the Gaussian blur, in pixels.
    auto: 0.1 and 2 for views of 224 pixels, in proportion for other sizes."""
    prob_solarise: tuple[float, float] = (0.0, 0.0)
    """Probability of solarising, for the first and the second view (three channels only)."""

    loss: Literal["pixpro", "pixcontrast"] = "pixpro"
    """Pixel loss."""
    alpha: float = 1.0
    """Weight of the pixel loss; 0 skips its computation."""
    instance_weight: float = 0.1
    """Weight of the instance loss; 0 skips its computation.
    At 1 it dominates the pixel loss if the images show few different scenes."""
    projection_size: int = 256
    """Output channels of the projection heads."""
    projection_hidden_size: int = 2048
    """Hidden channels of the projection and prediction heads."""
    ppm_num_layers: Literal[0, 1, 2] = 1
    """Layers of the transform in the pixel propagation module (PPM)."""
    ppm_gamma: float = 2.0
    """Exponent of the similarity in the pixel propagation module, at least 1; higher is sharper."""
    distance_thres: float = 0.7
    """Two cells are a positive pair if their centres are closer than this, in diagonals of the
    larger of the two views' cells."""
    similarity_temperature: float = 0.3
    """Temperature of the PixContrast loss."""

    batch_size: int | Auto = "auto"
    """Images per step, in total over all devices.
    auto: 256 on a GPU, 32 on a CPU, fewer if there are not that many images."""
    accumulate: int | Auto = "auto"
    """Micro-batches per step and device (gradient accumulation).
    auto: as few as fit into memory."""
    epochs: int | Auto = "auto"
    """Passes over the images.
    auto: 100; up to 1000 below 3000 images, fewer than 100 above 1.28 million images."""
    steps: int | None = None
    """Length of the run in steps, instead of --epochs."""
    optimizer: str = "adamw"
    """Name of a timm optimiser, such as adamw, lars, sgd or lamb."""
    lr: float | Auto = "auto"
    """Peak learning rate for a batch of 256 images.
    It is scaled with the batch: linearly for SGD and LARS, with the square root for all others.
    auto: by optimiser (adamw 2e-3; 1e-3 from given weights or without batch norm)."""
    weight_decay: float = 1e-4
    """Weight decay; one-dimensional parameters (biases, norm layers) have none."""
    warmup_epochs: float | Auto = "auto"
    """Epochs of linear warm-up.
    auto: a tenth of the run."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine schedule, at most the peak."""
    target_momentum: float = 0.99
    """EMA momentum of the target network at the start; a cosine schedule raises it to 1."""
    clip_grad: float = 0.0
    """Maximum gradient norm (clipping); 0 turns clipping off."""
    seed: int = 0
    """Random seed."""
    precision: str = "auto"
    """float32 or bfloat16 (mixed precision by autocast).
    auto: bfloat16 if the hardware supports it natively, but float32 on a CPU for views under 32
    pixels, since torch computes their gradients wrongly in bfloat16."""

    workers: int | Auto = "auto"
    """Data loading workers per device.
    auto: a quarter of the cores for training on a CPU; on a GPU all but one, at most 16."""
    cache: Literal["auto", "ram", "off"] = "auto"
    """Keep decoded images in memory, so that each is decoded once; samples stay the same.
    ram: as many as fit into half of the free memory.
    auto: all of them, if they fit into a quarter of it and are used more than once."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Type of device.
    auto: a CUDA GPU if there is one, else the CPU. mps is untested."""
    devices: int | Auto = "auto"
    """Devices per machine.
    auto: all GPUs (one in a notebook), or one process on the CPU."""
    num_nodes: int = 1
    """Number of machines; torchrun or srun starts the command on each."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How devices share the work: ddp replicates the network, fsdp (FSDP2) shards it.
    auto: ddp."""

    graph: Literal["auto", "off"] = "off"
    """Launch each step as one CUDA graph, which saves host time with small networks.
    auto: on one GPU, if the step can be captured and its graph gives the same result; if not, the
    log says so.
    Off by default, since it was only tested on a CPU so far."""

    checkpoint_every: int | Auto = "auto"
    """Steps between checkpoints.
    auto: 1000 on a GPU; one epoch on a CPU, but at least 100 and at most 1000 steps."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep; the oldest are deleted."""
    max_broken: float = 0.01
    """Fraction of unreadable images above which the run stops.
    Unless it is 0, a single unreadable image is always accepted."""
    loggers: tuple[Logger, ...] = ("tensorboard",)
    """Loggers to write metrics to, in addition to metrics.jsonl."""
    picture_every: int | Auto = "auto"
    """Steps between pictures of the features; 0 draws none.
    auto: ten per run, fewer if they would take too much time."""
    probe: str | None = None
    """Labelled folder (images/{train,val} and masks/{train,val}) to probe during training.
    The checkpoint with the highest mean IoU is kept as best.ckpt."""
    ids: str | None = None
    """Class id of each value in the masks of --probe, such as "0:0,255:1"; default: the value."""
    colours: str | None = None
    """File with the class of each colour in the masks of --probe, one per line: 128 0 0 road."""
    probe_protocol: Literal["linear", "knn"] = "knn"
    """Probe: a linear classifier, or k nearest neighbours."""
    probe_every: int | Auto = "auto"
    """Epochs between probes.
    auto: ten probes per run."""

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in NAMES}
        conflict = None
        if self.resume is True and self.overwrite is True:
            conflict = "resume and overwrite are both given; keep the run (--resume) or replace it"
        no_loss = something_to_learn(self.alpha, self.instance_weight)
        raise_together(*check_limits(values, CONFIG_LIMITS), conflict, no_loss)


HOW_TO_START = ("config", "resume", "overwrite", "dry_run")
"""Fields that say how to start and not what the run is: never written to `config.yaml`."""
NAMES = tuple(field.name for field in fields(PretrainConfig))


def plain_text(name: str, value: object) -> str | None:
    """The error message about anything but a text that is not empty."""
    return unless(isinstance(value, str) and value != "", name, value, "a text that is not empty")


def texts(name: str, value: object, allowed: tuple[str, ...] | None = None) -> str | None:
    """The error message about anything but a sequence of texts, each among those allowed."""
    if not isinstance(value, (tuple, list)) or any(plain_text(name, one) for one in value):
        return f"{name} is {value!r}; it must be a list of texts, none empty"
    messages = (one_of(name, one, allowed) for one in value) if allowed else ()
    return next((message for message in messages if message), None)


def number(name: str, value: object) -> str | None:
    """The error message about anything but a finite number."""
    return None if is_number(value) else f"{name} is {value!r}; it must be a number"


def text_or_texts(name: str, value: object) -> str | None:
    """The error message about anything but a text, or at least one in a sequence."""
    several = isinstance(value, (tuple, list)) and value
    message = (texts if several else plain_text)(name, value)
    return message and f"{name} is {value!r}; it must be a text or a list of texts, none empty"


def numbers(name: str, value: object, count: int) -> str | None:
    """The error message about anything but ``count`` numbers from 0 to 1."""
    if not isinstance(value, (tuple, list)) or len(value) != count:
        return f"{name} is {value!r}; it must be {count} numbers from 0 to 1"
    return next((m for one in value if (m := within(name, one, 0, 1))), None)


def low_high(name: str, value: object) -> str | None:
    """The error message about anything but ``(low, high)`` with ``0 < low <= high``."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))
    if pair and 0 < value[0] <= value[1]:  # type: ignore[index]
        return None
    return f"{name} is {value!r}; it must be (low, high) with 0 < low <= high"


def precision(name: str, value: object) -> str | None:
    """The error message about an unknown precision."""
    return one_of(name, str(value), tuple(PRECISIONS))


OWN_LIMITS: Mapping[str, Check] = {
    **{
        name: partial(one_of, allowed=get_args(hint))
        for name, hint in get_type_hints(PretrainConfig).items()
        if get_origin(hint) is Literal
    },
    **dict.fromkeys(("out", "config", "weights", "probe", "ids", "colours"), plain_text),
    **dict.fromkeys(("model", "instance_layer", "optimizer"), plain_text),
    "pixel_layer": text_or_texts,
    **dict.fromkeys(
        ("resume", "overwrite", "dry_run", "zero_init_residual"),
        partial(one_of, allowed=(True, False)),
    ),
    "data": texts,
    "nodata": number,
    "recipe": partial(one_of, allowed=tuple(RECIPES)),
    **dict.fromkeys(("aspect_ratio", "blur_sigma"), low_high),
    **dict.fromkeys(("prob_jitter", "prob_gray"), partial(within, low=0, high=1)),
    **dict.fromkeys(("prob_blur", "prob_solarise"), partial(numbers, count=2)),
    "jitter": partial(numbers, count=4),
    **dict.fromkeys(
        (
            *("batch_size", "accumulate", "epochs", "steps", "devices", "num_nodes"),
            *("checkpoint_every", "keep_checkpoints", "probe_every"),
        ),
        partial(whole, low=1),
    ),
    **dict.fromkeys(("workers", "picture_every"), partial(whole, low=0)),
    "lr": partial(above, low=0),
    **dict.fromkeys(
        ("warmup_epochs", "weight_decay", "final_lr", "clip_grad"), partial(at_least, low=0)
    ),
    "precision": precision,
    "loggers": partial(texts, allowed=get_args(Logger)),
}
"""The limits of the settings that no other module takes."""


def limit(name: str, value: object, check: Check, kind: str) -> str | None:
    """The error message of a check; None and `auto` pass where the field's type names them."""
    if (value is None and "None" in kind) or (value == "auto" and "Auto" in kind):
        return None
    message = check(name, value)
    whole_or = message and "Auto" in kind and kind.startswith(("int | Auto", "float | Auto"))
    return f"{message}, or 'auto'" if whole_or else message


CONFIG_LIMITS: Mapping[str, Check] = {
    field.name: partial(limit, check={**LIMITS, **OWN_LIMITS}[field.name], kind=str(field.type))
    for field in fields(PretrainConfig)
}
"""The limits of every setting."""
