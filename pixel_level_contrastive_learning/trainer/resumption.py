"""Resumption: what a run that goes on may change, and what it must keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .config import PretrainConfig
from .directory import RunDirectory
from .settings import CONFIG_FILE, differences, read_settings

FIXED = (
    "model",
    "weights",
    "zero_init_residual",
    "channels",
    "loss",
    "pixel_layer",
    "instance_layer",
    "projection_size",
    "projection_hidden_size",
    "ppm_num_layers",
    "optimizer",
)
"""Settings that a run keeps when it is resumed, since its weights have their shape."""


def compared(config: PretrainConfig, directory: RunDirectory) -> dict[str, tuple[Any, Any]]:
    """What differs from the run that is resumed, by name: old and new.

    Raises:
        ValueError: Something that its weights depend on.
    """
    path = directory.path / CONFIG_FILE
    if not path.is_file():
        return {}
    changed = differences(read_settings(path), config)
    wrong = [name for name in FIXED if name in changed and changed[name][1] != "auto"]
    # What weighs nothing is not trained, and the optimiser does not know it.
    wrong += [n for n in ("alpha", "instance_weight") if n in changed and 0 in changed[n]]
    if wrong:
        listed = ", ".join(f"{n} from {changed[n][0]!r} to {changed[n][1]!r}" for n in wrong)
        raise ValueError(
            f"a run cannot go on with other weights: {listed}; leave these as they were, or "
            "start a new run in another folder with --weights"
        )
    return changed


def refuse_misfits(own: Mapping[str, Tensor], held: Mapping[str, Any]) -> None:
    """Find out whether a checkpoint's weights fit, before anything of the run is changed.

    Args:
        own: What the learner has.
        held: What the checkpoint has.

    Raises:
        ValueError: Some have other shapes.
    """
    for name in own.keys() & held.keys():
        here, there = tuple(own[name].shape), tuple(held[name].shape)
        if here != there:
            raise ValueError(
                f"a run cannot go on with other weights: {name} has the shape {there} in the "
                f"checkpoint and {here} now; leave image_size and the model as they were, or "
                "start a new run in another folder with --weights"
            )


def refuse_idle_changes(changed: Iterable[str], done: int, steps: int) -> None:
    """Find out whether settings changed that nothing will be trained with.

    Args:
        changed: Their names.
        done: Steps that were trained.
        steps: Steps of the whole run.

    Raises:
        ValueError: Some did: what is written of the run would no longer be true of it.
    """
    names = ", ".join(changed)
    if names and done >= steps:
        raise ValueError(
            f"{done} steps are done and {steps} wanted: nothing is left to train with another "
            f"{names}; leave these as they were, give more --steps or --epochs, or start a new run "
            "in another folder with --weights"
        )
