"""Pretrain a backbone at pixel level on images without labels (arXiv:2011.10043)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluation.table import evaluate
    from .exports import export
    from .modules.ppm import PPM
    from .pictures.report import visualize
    from .pixel_cl import PixelCL
    from .trainer.run import pretrain
    from .views import View
    from .weights import load_backbone

__all__ = [
    "PPM",
    "PixelCL",
    "View",
    "evaluate",
    "export",
    "load_backbone",
    "pretrain",
    "visualize",
]

ROOMS = {
    "PPM": ".modules.ppm",
    "PixelCL": ".pixel_cl",
    "View": ".views",
    "evaluate": ".evaluation.table",
    "export": ".exports",
    "load_backbone": ".weights",
    "pretrain": ".trainer.run",
    "visualize": ".pictures.report",
}


def __getattr__(name: str) -> object:
    """The public name, loaded when first asked for: importing the package loads no torch."""
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value: object = getattr(import_module(ROOMS[name], __name__), name)
    except ModuleNotFoundError as error:
        from .checks import not_installed

        raise ModuleNotFoundError(not_installed(error.name), name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
