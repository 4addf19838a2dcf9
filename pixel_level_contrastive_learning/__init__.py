"""Pretrain a backbone at pixel level on images without labels (arXiv:2011.10043)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modules.ppm import PPM
    from .pixel_cl import PixelCL
    from .views import View

__all__ = ["PPM", "PixelCL", "View"]

ROOMS = {"PPM": ".modules.ppm", "PixelCL": ".pixel_cl", "View": ".views"}


def __getattr__(name: str) -> object:
    """The public name, loaded when first asked for: importing the package loads no torch."""
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(ROOMS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
