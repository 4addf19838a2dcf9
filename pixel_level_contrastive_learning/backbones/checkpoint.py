"""Backbones on disk: weights, and next to them a card that says how to use them."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..checks import check_limits, installed_version, one_of, per_channel, raise_together
from ..files import write_whole
from ..modules.feature_info import FeatureInfo
from ..modules.hooks import plain_name
from ..run_layout import CARD, card_path
from .custom import Model, custom_file, handed_name, handing_over
from .factory import (
    build_backbone,
    default_image_size,
    default_layers,
    default_statistics,
    parse_model_name,
    refuse_code,
)
from .fingerprint import differs, fingerprint_of
from .hub import HUB, hub_config, is_card, on_hub, place_of
from .state_dict import (
    GIVE_RUN,
    ONNX,
    KeyReport,
    check_code,
    find_weights,
    load_matching,
    read_state_dict,
    tell,
    tensors_of,
)

if TYPE_CHECKING:
    from ..pixel_cl import PixelCL

ZERO_INIT = "zero-init residual"
"""Training started from random weights whose residual blocks are identities."""
AS_HANDED = "as handed over"
"""Training started from the current weights of a network passed in Python."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BackboneCard:
    """What is needed to use a backbone's weights; a JSON file next to them.

    Attributes:
        model: The name that `build_backbone` takes.
        channels: Channels of its images.
        image_size: ``(height, width)`` of the views it was trained on.
        mean: Per-channel mean the images were normalised with, for values in [0, 1].
        std: Per-channel standard deviation, likewise.
        low: Per-channel value that becomes 0 when 16-bit or float data are scaled to [0, 1]; None
            for 8-bit data, which are divided by 255.
        high: The value that becomes 1, likewise.
        pixel_layer: The layer whose map the pixel loss read, or several; see `shown_layer`.
        instance_layer: The layer whose average the instance loss read.
        start: What training started from: ``random``, ``zero-init residual`` (random, residual
            blocks as identities), ``pretrained``, ``as handed over``, or a file.
        seed: The seed of the run.
        version: The version of this package that wrote it.
        config: Configuration of a network from a repository on the Hub, so that it can be built
            without the repository; None for other networks.
        fingerprint: What the network's code computes, see `fingerprint_of`; it is ignored when
            cards are compared. None if it is not known.

    Raises:
        ValueError: A value out of range.
    """

    model: str
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    pixel_layer: str | tuple[str, ...]
    instance_layer: str
    start: str = "random"
    seed: int = 0
    version: str = installed_version("pixel-level-contrastive-learning")
    config: dict[str, Any] | None = None
    fingerprint: tuple[float, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for entry in fields(self):  # JSON has lists where we have tuples
            if isinstance(value := getattr(self, entry.name), list):
                object.__setattr__(self, entry.name, tuple(value))
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size,) * 2)
        given = {"mean": self.mean or (), "std": self.std or (), "low": self.low, "high": self.high}
        layers = {"pixel_layer": self.pixel_layers, "instance_layer": (self.instance_layer,)}
        raise_together(
            *check_limits({"channels": self.channels, "image_size": self.image_size}),
            *(per_channel(name, values, self.channels) for name, values in given.items()),
            *(
                f"{name} is {getattr(self, name)!r}; it must name a layer"
                for name, names in layers.items()
                if not names or not all(isinstance(layer, str) for layer in names)
            ),
        )

    @property
    def pixel_layers(self) -> tuple[str, ...]:
        """The layers whose maps the pixel loss read."""
        return self.pixel_layer if isinstance(self.pixel_layer, tuple) else (self.pixel_layer,)

    @property
    def shown_layer(self) -> str:
        """The layer that evaluation, probes and pictures read: the first pixel layer."""
        return self.pixel_layers[0]

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """The image size that the network was built for; None if it takes any."""
        is_fixed = default_image_size(self.model, self.config) is not None
        return self.image_size if is_fixed else None

    def build(
        self, image_size: tuple[int, int] | None = None, *, pretrained: bool = False
    ) -> nn.Module:
        """The network, without the weights of a file; see `build_backbone`."""
        return build_backbone(
            self.model,
            channels=self.channels,
            image_size=image_size or self.image_size,
            pretrained=pretrained,
            config=self.config,
        )

    def to_json(self) -> str:
        """The card as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The card in a JSON text; a ValueError or TypeError says what is wrong with it."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"it is a {type(values).__name__}, not an object with fields")
        names = [entry.name for entry in fields(cls)]
        raise_together(*(one_of("field", name, names) for name in values))
        return cls(**values)


def read_card(weights: Path, from_hub: bool = False) -> BackboneCard:
    """The card next to a weights file; for a checkpoint, that of its run."""
    path = card_path(weights)
    if not path.is_file():
        tip = f"put the card there, name a library's model with it, as in timm/NAME={weights}, or "
        tip += "load the file into your network: load_weights(net, path)"
        hint = GIVE_RUN if weights.suffix == ONNX or (weights.parent / CARD).is_file() else tip
        raise ValueError(
            f"{weights} has no card {path.name} next to it to say which network it is of; {hint}"
        )
    try:
        card = BackboneCard.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # not JSON is a ValueError, too
        raise ValueError(f"{path} is not a backbone's card: {error}") from error
    if (handed := handed_name()) is not None:
        return replace(card, model=handed, config=None)
    if from_hub:
        refuse_code(card.model)
    file = custom_file(card.model)
    if file is None or file.is_file():
        return card
    moved = path.parent / file.name  # with the run
    if not moved.is_file():
        raise ValueError(
            f"{path} names {file}, which does not exist; put the file beside the card, or set "
            '"model" in the card to where it is now'
        )
    return replace(card, model=f"{moved}:{card.model.rpartition(':')[2]}")


def card_in(folder: Path, name: str = CARD) -> BackboneCard | None:
    """The card in a folder, by default a run's; None where there is none, or a damaged one."""
    path = folder / name
    try:
        return BackboneCard.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, TypeError):  # it is written anew
        return None


def begin_card(path: Path, net: nn.Module, card: BackboneCard, resumed: bool) -> None:
    """Write the card of a run, beside its weights to come; warn if it goes on with other code."""
    if resumed and (before := card_in(path.parent)) is not None:
        warn_of_other_code(net, before, str(path.parent))
    save_card(path, with_fingerprint(card, net))


def save_backbone(path: str | Path, net: nn.Module, card: BackboneCard) -> None:
    """Write a backbone's weights and its card: ``X.safetensors`` and ``X.json``."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {str(path)!r}; it must end in .safetensors")
    tensors = clean_state_dict(net)
    # First: whoever finds weights finds a card beside them.
    save_card(path, with_fingerprint(card, net))
    write_whole(path, save(tensors, metadata={"format": "pt"}))


def with_fingerprint(card: BackboneCard, net: nn.Module) -> BackboneCard:
    """The card of a network that knows what its code computes."""
    return replace(card, fingerprint=fingerprint_of(net, card.channels, card.image_size))


def warn_of_other_code(net: nn.Module, card: BackboneCard, source: str) -> None:
    """Warn where a network does something else than when its card was written."""
    if card.fingerprint and differs(card.fingerprint, with_fingerprint(card, net).fingerprint):
        warnings.warn(
            f"{source}: the model's code gives different results than during the run, with the "
            "same weights; use the code (or the library version) of the run, or train again",
            stacklevel=3,
        )


def save_card(path: str | Path, card: BackboneCard) -> None:
    """Write the card of the weights in a file, which need not exist yet: ``X.json`` for ``X.pt``.

    Args:
        path: The weights file.
        card: How to use them. If the model is your own file, its path is made absolute.

    Raises:
        CannotWriteError: The disk is full, or similar.
    """
    file = custom_file(card.model)
    if file is not None:
        card = replace(card, model=f"{file.resolve()}:{card.model.rpartition(':')[2]}")
    write_whole(Path(path).expanduser().with_suffix(".json"), card.to_json())


def card_of(learner: PixelCL, model: str, **fields: Any) -> BackboneCard:
    """The card of a backbone from your own training loop.

    Args:
        learner: Supplies the size and channels of its views, its layers, its mean and standard
            deviation.
        model: The name of its backbone, as `build_backbone` takes it.
        **fields: Other fields of `BackboneCard`, or replacements for the learner's: ``low`` and
            ``high`` if the loop scales 16-bit or float values, ``start`` if it does not start from
            random weights, ``mean`` and ``std`` if it normalises the views itself.

    Raises:
        ValueError: An unknown model, a field out of range, or no mean and standard deviation for a
            learner whose own ``augment_fn`` normalises.
    """
    parse_model_name(model)  # an unknown one is refused here, not where the card is read
    encoder, normalise = learner.online_encoder, learner.views.augment.one.normalise
    known: dict[str, Any] = {
        "model": model,
        "channels": learner.views.channels,
        "image_size": learner.views.size,
        "pixel_layer": encoder.pixel_layer,
        "instance_layer": encoder.instance_hook.name,
    }
    if normalise is not None:
        for name in ("mean", "std"):  # float32 values as they were given: 0.485, not 0.48500001
            values = getattr(normalise, name).flatten().tolist()
            known[name] = tuple(float(f"{value:.7g}") for value in values)
    elif not {"mean", "std"} <= fields.keys():
        raise ValueError(
            "the learner's augment_fn normalises by itself, and its mean and std are not known; "
            "give both to card_of, for values in [0, 1]"
        )
    return BackboneCard(**(known | fields))


def clean_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The state dict under the library's names, on the CPU, no two tensors sharing memory."""
    state = tensors_of(net)
    if others := net.state_dict().keys() - state.keys():
        log.warning("%s of %s are not tensors and are left out", sorted(others), type(net).__name__)
    learned = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    learned |= {name for name in state if name.endswith(("running_mean", "running_var"))}
    wrong = [
        name
        for name, value in state.items()  # a mask may hold minus infinity
        if value.isnan().any() or (name in learned and value.isinf().any())
    ]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong[:3])} of {type(net).__name__} hold NaN or infinite values, so the "
            f"backbone is not written ({len(wrong)} of {len(state)} tensors); use the last good "
            "checkpoint"
        )
    return {
        plain_name(name): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


class Loaded(NamedTuple):
    """A backbone with its card.

    Attributes:
        net: The network, in train mode, as its library builds it.
        card: How to use it.
        report: Which keys of the file match; None if there is no file.
    """

    net: nn.Module
    card: BackboneCard
    report: KeyReport | None


def read_backbone(
    source: str | Path, *, channels: int | None = None, image_size: tuple[int, int] | None = None
) -> Loaded:
    """A backbone from a run, a file or a library.

    A card may name a function of your own, which is run to build the network: read only cards
    whose origin you trust.

    Args:
        source: A run directory (for an unfinished run, its last checkpoint), a checkpoint in one, a
            weights file with its card next to it (`save_backbone`, `save_card`, `export`), such a
            file on the Hub (``hf://OWNER/NAME[/FILE]``), ``torchvision/NAME``, ``timm/NAME`` or
            ``hf://OWNER/NAME`` for the weights of a library or repository, ``timm/NAME=FILE`` or
            ``torchvision/NAME=FILE`` for those of a file without a card, fed as the library's own,
            or ``random:MODEL`` for random ones.
        channels: Channels of the images. Pretrained and random backbones are built for them
            (default: 3); a file's must match.
        image_size: ``(height, width)`` of the images, for networks with a fixed input size.
            Default: the card's, the network's own, or 224.

    Raises:
        ValueError: The source does not exist, its card is missing or wrong, or it is for other
            images; your own network that it names does not have exactly its weights.
        ConnectionError: Pretrained weights could not be downloaded.

    >>> net, card, report = read_backbone("random:torchvision/resnet18")
    >>> card.pixel_layer, card.instance_layer
    ('layer4', 'avgpool')
    """
    if not is_file(source):
        return from_library(str(source), channels, image_size)
    path = find_weights(source)
    card = read_card(path, on_hub(source))
    if channels is not None and channels != card.channels:
        raise ValueError(
            f"{path} takes images of {card.channels} channels, not {channels}; give it images of "
            f"{card.channels}, or adapt it: adapt_channels(load_backbone(path), {channels})"
        )
    net = card.build(image_size)
    report = load_matching(net, read_state_dict(path), str(path))
    if parse_model_name(card.model)[0] == "custom":
        check_code(str(path), [*report.missing, *report.mismatched], report.unexpected)
    tell(report, str(path), card.model)
    if report.complete and image_size in (None, card.image_size):
        warn_of_other_code(net, card, str(path))
    return Loaded(net, card, report)


def load_backbone(path: str | Path, *, model: Model | None = None) -> nn.Module:
    """The backbone of a run or file, with its weights, in train mode as its library builds it.

    Args:
        path: As for `read_backbone`, which also returns the card and the key report.
        model: The network, or a function that builds it, instead of the one that the card names.
            Required for a run on a network passed in Python.

    Raises:
        ValueError: There is no backbone, or nothing in the file matches.

    >>> load_backbone("random:torchvision/resnet18").fc
    Linear(in_features=512, out_features=1000, bias=True)
    """
    with handing_over(model):
        return read_backbone(path).net


def is_file(source: str | Path) -> bool:
    """Whether weights are a run or a file with a card, and not a library's or random ones."""
    name = str(source)
    if name.startswith("random:"):
        return False
    if on_hub(name):
        return place_of(name).file is not None or is_card(hub_config(name))
    return not name.startswith(("torchvision/", "timm/")) or Path(name).exists()


def from_library(name: str, channels: int | None, image_size: tuple[int, int] | None) -> Loaded:
    """A backbone without a card, and the one it would have."""
    model, _, file = (name, "", "") if name.startswith((HUB, "random:")) else name.partition("=")
    model = model.removeprefix("random:")
    pretrained, channels = model == name, 3 if channels is None else channels
    size = image_size or default_image_size(model) or (224, 224)
    net = build_backbone(model, channels=channels, image_size=size, pretrained=pretrained)
    pixel, instance = default_layers(FeatureInfo(net, channels, size))
    mean, std = default_statistics(model, channels)
    card = BackboneCard(
        model=model,
        channels=channels,
        image_size=size,
        mean=mean,
        std=std,
        pixel_layer=pixel,
        instance_layer=instance,
        start="pretrained" if pretrained else file or "random",
        config=hub_config(model) if on_hub(model) else None,
    )
    if not file:
        return Loaded(net, card, None)
    report = load_matching(net, read_state_dict(find_weights(file)), file)
    tell(report, file, model)
    return Loaded(net, card, report)
