"""How we say no: the value received, the values allowed, the next step.

Each check returns ``None`` when the value will do and one sentence when it will not, so that
`raise_together` can name everything that is wrong at once. Imports no torch: the command line
checks its flags before it loads anything heavy.
"""

from collections.abc import Collection, Iterable, Sequence, Sized
from difflib import get_close_matches
from math import isfinite
from numbers import Real
from typing import TypeGuard


def raise_together(*problems: str | None) -> None:
    """Raise one ``ValueError`` that lists every problem found; return if there is none."""
    found = [problem for problem in problems if problem is not None]
    if found:
        raise ValueError("\n".join(found))


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite real number (``True`` and ``False`` are not)."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def at_least(name: str, value: object, low: float) -> str | None:
    """The complaint about a number below ``low``."""
    if is_number(value) and value >= low:
        return None
    return f"{name} is {value!r}; it must be a number of at least {low}"


def above(name: str, value: object, low: float) -> str | None:
    """The complaint about a number that is not above ``low``."""
    if is_number(value) and value > low:
        return None
    return f"{name} is {value!r}; it must be a number above {low}"


def not_installed(library: str | None) -> str:
    """The complaint about a library that comes with the extras."""
    return (
        f"{library} is not installed; everything beside PixelCL itself needs the extras: "
        "pip install 'pixel-level-contrastive-learning[train]'"
    )


def within(name: str, value: object, low: float, high: float) -> str | None:
    """The complaint about a number outside ``[low, high]``."""
    if is_number(value) and low <= value <= high:
        return None
    return f"{name} is {value!r}; it must be a number from {low} to {high}"


def share(name: str, value: object) -> str | None:
    """The complaint about anything but a share above 0."""
    if is_number(value) and 0 < value <= 1:
        return None
    return f"{name} is {value!r}; it must be a number above 0, at most 1"


def whole(name: str, value: object, low: int) -> str | None:
    """The complaint about anything but a whole number of at least ``low``."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= low:
        return None
    return f"{name} is {value!r}; it must be a whole number of at least {low}"


def one_of(name: str, value: object, allowed: Collection[object]) -> str | None:
    """The complaint about a value that is not among ``allowed``, with the nearest right ones."""
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return None
    shown = {str(choice): choice for choice in allowed}
    near = get_close_matches(str(value), shown, n=1)
    hint = f" (perhaps {shown[near[0]]!r})" if near else ""
    return f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}{hint}"


def ratio_range(name: str, value: object) -> str | None:
    """The complaint about anything but a pair ``(low, high)`` with ``0 < low <= high <= 1``."""
    allowed = f"{name} is {value!r}; it must be (low, high) with 0 < low <= high <= 1"
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_number, value)):
        return f"{allowed}, such as (0.6, 0.8)"
    low, high = value
    if low > high:
        return f"{allowed}; swap the two: ({high}, {low})"
    if low <= 0 or high > 1:
        return f"{allowed}: a share of the image's side"
    return None


def size_pair(name: str, value: object) -> str | None:
    """The complaint about anything but a size in pixels: one int, or ``(height, width)``."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) == 2 and all(whole(name, side, 1) is None for side in sides):
        return None
    return (
        f"{name} is {value!r}; it must be a whole number of pixels or (height, width), such as 224"
    )


def callable_or_none(name: str, value: object) -> str | None:
    """The complaint about anything but a function of one batch, or nothing."""
    if value is None or callable(value):
        return None
    return f"{name} is {value!r}; it must be callable: views (b, c, h, w) in, the same shape out"


def something_to_learn(alpha: object, instance_weight: object) -> str | None:
    """The complaint about a loss without terms."""
    if alpha == 0 and instance_weight == 0:
        return "alpha and instance_weight are both 0; set at least one of them above 0"
    return None


def per_channel(name: str, values: Sequence[float] | None, channels: object) -> str | None:
    """The complaint about statistics that are not one number a channel."""
    if values is None:
        return None
    sized = isinstance(values, Sized) and isinstance(values, Iterable)
    if not sized or len(values) != channels or not all(map(is_number, values)):
        return f"{name} is {values!r}; it must be {channels} numbers, one a channel"
    if name == "std" and min(values) <= 0:
        return f"std is {values!r}; every value must be above 0"
    return None
