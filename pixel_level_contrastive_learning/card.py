"""The card of a backbone: what is needed to use its weights, as JSON beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from .checks import per_channel, raise_together, size_pair, whole
from .keys import WEIGHTS, home
from .own_models import own_file

ZERO_INIT = "zero-init residual"
"""A start from random weights whose residual blocks are identities."""


def this_version() -> str:
    """The version of this package."""
    try:
        return version("pixel-level-contrastive-learning")
    except PackageNotFoundError:  # run from a folder, not installed
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class BackboneCard:
    """What is needed to use a backbone's weights; a JSON file beside them.

    Attributes:
        model: The name it is built by, see `build_backbone`.
        channels: Channels of its images.
        image_size: ``(height, width)`` of the views it was trained on.
        mean: Per-channel mean the images were normalised with, for values in [0, 1].
        std: Per-channel standard deviation, likewise.
        low: Per-channel value that becomes 0 where 16-bit or float data are scaled to [0, 1]; None
            for 8-bit data, which are divided by 255.
        high: The value that becomes 1, likewise.
        pixel_layer: The layer whose map the pixel loss read.
        instance_layer: The layer whose average the instance loss read.
        start: What training started from: ``random``, ``zero-init residual`` (random, residual
            blocks as identities), ``pretrained``, or a file.
        seed: The seed of the run.
        version: The version of this package that wrote it.
    """

    model: str
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    pixel_layer: str
    instance_layer: str
    start: str = "random"
    seed: int = 0
    version: str = this_version()

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON has lists where we have tuples
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        raise_together(
            whole("channels", self.channels, 1),
            size_pair("image_size", self.image_size),
            *(
                per_channel(name, getattr(self, name), self.channels)
                for name in ("mean", "std", "low", "high")
            ),
        )

    def to_json(self) -> str:
        """The card as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The card in a JSON text.

        Raises:
            ValueError: It is no JSON, or lacks a field, or has one of no meaning or out of range.
        """
        held = json.loads(text)
        if not isinstance(held, dict):
            raise ValueError(
                f"it holds {type(held).__name__}, not an object with the card's fields"
            )
        names = {field.name for field in fields(cls)}
        needed = names - {"low", "high", "start", "seed", "version"}
        if missing := sorted(needed - held.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
        if unknown := sorted(held.keys() - names):
            near = get_close_matches(unknown[0], names, n=1)
            perhaps = f" (perhaps {near[0]!r})" if near else ""
            raise ValueError(f"it has {unknown[0]!r}{perhaps}, which this version does not know")
        return cls(**held)


def read_card(weights: Path) -> BackboneCard:
    """The card beside a file of weights; a model's file that has moved is looked for there, too.

    A checkpoint's is that of its run.

    Raises:
        ValueError: There is none, or it is wrong.
    """
    folder = home(weights)
    beside = weights if folder == weights.parent else folder / WEIGHTS
    path = beside.with_suffix(".json")
    if not path.is_file():
        raise ValueError(
            f"{weights} has no card {path.name} beside it, so nobody knows which network it is of; "
            "put the card there, or fill a network of your own: load_weights(net, path)"
        )
    try:
        card = BackboneCard.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # not JSON is a ValueError, too
        raise ValueError(f"{path} is not a backbone's card: {error}") from error
    file = own_file(card.model)
    if file is None or file.is_file():
        return card
    moved = folder / file.name
    if not moved.is_file():
        raise ValueError(
            f"{path} names {file}, which is not there; put the file beside the card, or set "
            '"model" in the card to where it is now'
        )
    return replace(card, model=f"{moved}:{card.model.rpartition(':')[2]}")
