"""Pretrain a backbone at pixel level on unlabelled images (arXiv:2011.10043)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backbones.checkpoint import load_backbone
    from .backbones.export import export
    from .evaluation.evaluate import evaluate
    from .modules.ppm import PPM
    from .pixel_cl import PixelCL
    from .step_graph import CapturedStep
    from .trainer.trainer import pretrain
    from .views import View
    from .visualization.feature_files import features
    from .visualization.report import visualize

__all__ = [
    "PPM",
    "CapturedStep",
    "PixelCL",
    "View",
    "evaluate",
    "export",
    "features",
    "load_backbone",
    "pretrain",
    "visualize",
]

MODULES = {
    "CapturedStep": ".step_graph",
    "PPM": ".modules.ppm",
    "PixelCL": ".pixel_cl",
    "View": ".views",
    "evaluate": ".evaluation.evaluate",
    "export": ".backbones.export",
    "features": ".visualization.feature_files",
    "load_backbone": ".backbones.checkpoint",
    "pretrain": ".trainer.trainer",
    "visualize": ".visualization.report",
}


def __getattr__(name: str) -> object:
    """A public name, imported at its first use: importing the package loads no torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .checks import import_extra

    value: object = getattr(import_extra(f"{__name__}{MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
