"""Checks of values, and the limits that the learner and the trainer share.

A check returns None for a value that is allowed; otherwise the error message, which names the
value received, the values allowed and the next step. `raise_together` raises all messages at once.
This module imports no torch, since the command line checks its flags before it loads anything.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import inf, isfinite
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args


def raise_together(*messages: str | None) -> None:
    """Raise one ``ValueError`` with every message; do nothing if all of them are None."""
    found = [message for message in messages if message is not None]
    if found:
        raise ValueError("\n".join(found))


def counted(count: int, noun: str) -> str:
    """A number of things in a message: of one the plain noun, of others its plural."""
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Seconds in a message, in the unit that suits them.

    >>> duration(42), duration(742), duration(7420)
    ('42 s', '12 min', '2.1 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite real number (``True`` and ``False`` are not)."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def unless(allowed: bool, name: str, value: object, words: str) -> str | None:
    """None if a value is allowed, else the message with what is."""
    return None if allowed else f"{name} is {value!r}; it must be {words}"


def at_least(name: str, value: object, low: float) -> str | None:
    """Allow numbers from ``low`` up."""
    allowed = is_number(value) and value >= low
    return unless(allowed, name, value, f"a number of at least {low}")


def above(name: str, value: object, low: float) -> str | None:
    """Allow numbers above ``low``."""
    return unless(is_number(value) and value > low, name, value, f"a number above {low}")


def within(name: str, value: object, low: float, high: float) -> str | None:
    """Allow numbers from ``low`` to ``high``, both included."""
    allowed = is_number(value) and low <= value <= high
    return unless(allowed, name, value, f"a number from {low} to {high}")


def share(name: str, value: object) -> str | None:
    """Allow numbers above 0, at most 1."""
    return unless(is_number(value) and 0 < value <= 1, name, value, "a number above 0, at most 1")


def whole(name: str, value: object, low: int, high: float = inf) -> str | None:
    """Allow whole numbers from ``low`` to ``high``, both included."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        return unless(False, name, value, f"a whole number of at least {low}")
    return unless(value <= high, name, value, f"a whole number of at most {high}")


def one_of(name: str, value: object, allowed: Collection[object]) -> str | None:
    """Allow the values listed; the message names the nearest of them."""
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return None
    shown = {str(choice): choice for choice in allowed}
    near = get_close_matches(str(value), shown, n=1)
    hint = f" (perhaps {shown[near[0]]!r})" if near else ""
    return f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}{hint}"


def ratio_range(name: str, value: object, of: str = "side") -> str | None:
    """Allow pairs ``(low, high)`` with ``0 < low <= high <= 1``, shares of an image's ``of``."""
    allowed = f"{name} is {value!r}; it must be (low, high) with 0 < low <= high <= 1"
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_number, value)):
        return f"{allowed}, such as (0.6, 0.8)"
    low, high = value
    if low > high:
        return f"{allowed}; swap the two: ({high}, {low})"
    if low <= 0 or high > 1:
        return f"{allowed}: a share of the image's {of}"
    return None


def size_pair(name: str, value: object) -> str | None:
    """Allow sizes in pixels: one int, or ``(height, width)``."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    allowed = len(sides) == 2 and all(whole(name, side, 1) is None for side in sides)
    words = "a whole number of pixels or (height, width), such as 224"
    return unless(allowed, name, value, words)


def callable_or_none(name: str, value: object) -> str | None:
    """Allow functions, and None."""
    words = "callable: views (b, c, h, w) in, the same shape out"
    return unless(value is None or callable(value), name, value, words)


def something_to_learn(alpha: object, instance_weight: object) -> str | None:
    """Refuse a loss without terms."""
    if alpha == 0 and instance_weight == 0:
        return "alpha and instance_weight are both 0; set at least one of them above 0"
    return None


def weights_above_0(name: str, values: object) -> str | None:
    """Allow sequences of numbers above 0, empty ones as well."""
    listed = values if isinstance(values, (tuple, list)) else [None]
    allowed = all(is_number(value) and value > 0 for value in listed)
    return unless(allowed, name, values, "a list of numbers above 0, one per pixel layer")


def per_channel(name: str, values: Sequence[float] | None, channels: object) -> str | None:
    """Allow None or one number per channel; a standard deviation is above 0."""
    if values is None:
        return None
    sized = isinstance(values, Sized) and isinstance(values, Iterable)
    if not sized or len(values) != channels or not all(map(is_number, values)):
        return f"{name} is {values!r}; it must be {channels} numbers, one per channel"
    if name == "std" and min(values) <= 0:
        return f"std is {values!r}; every value must be above 0"
    return None


ALLOW_COMMANDS = "PIXELCL_ALLOW_COMMANDS"
"""The environment variable without which no shard that is a command is run."""
EXTRAS = {
    "rasterio": ("rasters", "cutting TIFFs and giant pictures into tiles"),
    "openslide": ("slides", "cutting whole-slide images into tiles"),
    "pydicom": ("dicom", "reading DICOM"),
    "nibabel": ("nifti", "reading NIfTI"),
    "pillow_heif": ("heic", "reading HEIC"),
    "zarr": ("zarr", "reading and writing Zarr"),
    "huggingface_hub": ("hub", "reading from and writing to the Hugging Face Hub"),
    "transformers": ("transformers", "a network of transformers"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), ("onnx", "an export to ONNX")),
}
"""The extra of a library that is not in ``train``, and what it is for."""


def not_installed(library: str | None) -> str:
    """The error message for a library that comes with the extras."""
    extra, what = EXTRAS.get(library or "", ("train", "everything beside PixelCL itself"))
    return (
        f"{library} is not installed; {what} needs the extra {extra}: "
        f"pip install 'pixel-level-contrastive-learning[{extra}]'"
    )


def installed_version(library: str) -> str:
    """The version of a library; ``unknown`` where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"


def import_extra(name: str) -> Any:
    """A module of an extra; where it is not installed, the error says which extra has it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name  # OpenSlide's names none
        raise ModuleNotFoundError(not_installed(missing), name=missing) from error


Pages = Literal["images", "channels", "first"]
"""What several images in a file are read as."""
Check = Callable[[str, object], str | None]
"""Takes a name and a value; returns None or the error message."""

LIMITS: Mapping[str, Check] = {
    "channels": partial(whole, low=1),
    "image_size": size_pair,
    "crop_area": partial(ratio_range, of="area"),
    "cutout_ratio_range": ratio_range,
    "cutout_interpolate_mode": partial(one_of, allowed=("bilinear", "nearest", "bicubic")),
    **dict.fromkeys(
        ("prob_hflip", "prob_vflip", "prob_rand_hflip", "prob_rand_vflip", "max_broken"),
        partial(within, low=0, high=1),
    ),
    "max_rotation": partial(within, low=0, high=180),
    **dict.fromkeys(("augment_fn", "augment_fn2"), callable_or_none),
    **dict.fromkeys(("projection_size", "projection_hidden_size"), partial(whole, low=1)),
    "ppm_num_layers": partial(one_of, allowed=(0, 1, 2)),
    "ppm_gamma": partial(at_least, low=1),  # below 1 the gradient at a right angle is infinite
    "distance_thres": partial(above, low=0),
    "pixel_levels": partial(whole, low=1),
    "level_weights": weights_above_0,
    "similarity_temperature": partial(above, low=0),
    **dict.fromkeys(("alpha", "instance_weight"), partial(at_least, low=0)),
    "use_pixpro": partial(one_of, allowed=(True, False)),
    **dict.fromkeys(("moving_average_decay", "target_momentum"), partial(within, low=0, high=1)),
    "seed": partial(whole, low=0, high=2**63 - 1),  # the largest in 64 bits
    "pages": partial(one_of, allowed=get_args(Pages)),
}
"""The limits of every value that more than one module takes, by the value's name."""


def check_limits(values: Mapping[str, object], limits: Mapping[str, Check] = LIMITS) -> list[str]:
    """The error messages for all values outside their limits, in the order of the values.

    Args:
        values: Values by name; those without a limit, such as a function's other arguments, pass.
        limits: A check for each name.

    >>> for message in check_limits({"max_rotation": 200, "alpha": 1.0, "ppm_num_layers": 3}):
    ...     print(message)
    max_rotation is 200; it must be a number from 0 to 180
    ppm_num_layers is 3; it must be one of 0, 1, 2
    """
    messages = (limits[name](name, values[name]) for name in values if name in limits)
    return [message for message in messages if message is not None]
