"""Export: a run's backbone as a file for another library, and the code that loads it there."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..checks import import_extra, one_of, raise_together
from ..files import write_whole
from ..run_layout import CARD, EXPORTED, run_folder
from .checkpoint import BackboneCard, card_in, clean_state_dict, read_backbone, save_card
from .custom import (
    Model,
    handing_over,
)
from .factory import (
    LIBRARIES,
    default_image_size,
    parse_model_name,
)
from .hub import is_card, on_hub
from .onnx import onnx_program
from .snippets import DEPTHS, how_to, running
from .state_dict import ONNX, KeyReport, find_weights, load_matching, read_state_dict

FORMATS = {
    "torchvision": ".pth",
    "timm": ".safetensors",
    "safetensors": ".safetensors",
    "state-dict": ".pth",
    "smp": ".pth",
    "mmseg": ".pth",
    "detectron2": ".pkl",
    "onnx": ONNX,
    "transformers": "",
}
"""What `export` writes, and the suffixes of the files; that of transformers is a folder."""
HEADLESS = {"smp", "mmseg", "detectron2"}
"""Formats for networks without a classifier."""
SMP_ALIKE = {*DEPTHS, "resnext50_32x4d", "resnext101_32x8d"}
"""Those that segmentation-models-pytorch builds like torchvision."""
ELSEWHERE = {"avgpool": "global_pool", "relu": "act1"}
ELSEWHERE |= {two: one for one, two in ELSEWHERE.items()} | {"act2": "relu", "act3": "relu"}
"""Layers that torchvision and timm call otherwise in these."""
TIMM_ALIKE = {*SMP_ALIKE, "wide_resnet50_2", "wide_resnet101_2"}
"""Those that torchvision and timm build alike, name by name."""


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        path: The file.
        format: One of `FORMATS`.
        report: Which keys of the file, read again, match the backbone; the classifier is missing if
            the format has none.
        how_to: Code that loads the file without this package and feeds images to it: Python; for
            detectron2 a configuration.
        step: Steps a checkpoint was trained for; None for other weights.
    """

    path: Path
    format: str
    report: KeyReport
    how_to: str
    step: int | None = None

    def __str__(self) -> str:
        of = "" if self.step is None else f" (a checkpoint, after {self.step} steps)"
        lines = [f"{self.path}{of}", str(self.report)]
        if self.format in HEADLESS and self.report.missing:
            lines.append(f"(nothing is lost: {self.format} does not use the classifier)")
        return "\n".join([*lines, "", self.how_to.rstrip()])


def export(
    run: str | Path,
    format: str | None = None,  # noqa: A002  # it names the flag
    out: str | Path | None = None,
    *,
    model: Model | None = None,
) -> Exported:
    """Write a run's backbone for another library, and how to load and feed it there.

    ``torchvision`` and ``timm`` contain every weight under the library's names, as do
    ``safetensors`` and ``state-dict`` for any model. ``smp`` is an encoder for
    segmentation-models-pytorch, ``mmseg`` and ``detectron2`` a backbone for these (ResNets). A
    torchvision ResNet can go to timm, and back. ``transformers`` is a folder for
    ``from_pretrained``, for models from that library. ``onnx`` outputs the pooled vector and the
    map of the trained layer, checked against the network; batch and image size are dynamic where
    the network allows it.

    Args:
        run: A run directory, a file with its card, or ``hf://OWNER/NAME[/FILE]``.
        format: One of `FORMATS`. Default: the first of them that has the model.
        out: The file or folder to write. Default: ``backbone-FORMAT`` in the run directory, for a
            checkpoint ``backbone-NAME-FORMAT``, for another file ``STEM-FORMAT`` next to it, with
            the format's suffix; required for sources on the Hub.
        model: As for `load_backbone`.

    Raises:
        ValueError: An unknown format, one that has no such model, no backbone to export, one that
            lacks weights of the model, or an ``out`` whose card would replace another file.
        OSError: The file cannot be written.

    >>> export("runs/streets", "torchvison")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: format is 'torchvison'; it must be one of ... (perhaps 'torchvision')
    """
    nowhere = f"out is None, and {run} is not a run's folder; name a file for the export"
    raise_together(
        None if format is None else one_of("format", format, FORMATS),
        nowhere if out is None and on_hub(run) else None,
    )
    source = find_weights(run)
    with handing_over(model):
        net, card, loaded = read_backbone(run)
    kind, card = named_in(card, net, format)
    folder, step = run_folder(source), None
    prefix = f"{source.stem}-"
    if folder != source.parent:
        step = torch.load(source, "cpu", weights_only=True, mmap=True).get("steps_done")
        prefix = EXPORTED + prefix * (Path(run).suffix == ".ckpt")
    default = folder / f"{prefix}{kind}{FORMATS[kind]}"
    path = default if out is None else Path(out).expanduser()
    if FORMATS[kind] not in ("", path.suffix):
        raise ValueError(f"out is {str(path)!r}; for {kind} it must end in {FORMATS[kind]}")
    if path.resolve() == source.resolve():
        raise ValueError(f"out is {str(path)!r}, the weights that are exported; name another file")
    state = clean_state_dict(net)
    if kind in HEADLESS:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if loaded is not None and not state.keys().isdisjoint([*loaded.missing, *loaded.mismatched]):
        raise ValueError(
            f"{source} does not have all weights of its model, and random ones are not exported; "
            f"use the model's code from training, or train again.\n{loaded}"
        )
    how = None
    if kind == "detectron2":
        write_whole(path, detectron2_file(state))
    elif kind == "onnx":
        program = onnx_program(net, card)
        write_whole(path, program.content)
        how = running(card, path.resolve(), program.free)
    elif kind == "transformers":
        net.save_pretrained(path)  # type: ignore[operator]  # a network of transformers has it
        state = import_extra("transformers").AutoModel.from_pretrained(path).state_dict()
    else:
        if kind not in HEADLESS:
            refuse_other_card(path, card)
            save_card(path, card)
        if path.suffix == ".safetensors":
            write_whole(path, save(state, metadata={"format": "pt"}))
        else:
            write_whole(path, lambda file: torch.save(state, file))
        state = read_state_dict(path)
    report = load_matching(net, state, str(path))
    how = how or how_to(kind, net, card, path.resolve())
    return Exported(path, kind, report, how, step)


def named_in(card: BackboneCard, net: nn.Module, kind: str | None) -> tuple[str, BackboneCard]:
    """The format, by default the first, and a card for it; a ValueError where it has no model."""
    model, config = card.model, card.config
    while config is not None and is_card(config):  # of a repository of ours
        model, config = config["model"], config.get("config")
    if config is not None and "architecture" in config:
        model = f"timm/{config['architecture']}"
    library, name = parse_model_name(model)
    architecture = name.partition(".")[0] if library == "timm" else name
    is_resnet = library in LIBRARIES and architecture in TIMM_ALIKE
    names = dict.fromkeys(("safetensors", "state-dict", "onnx"), model)
    if library in LIBRARIES:
        names[library] = model
    if is_of_transformers(net):
        names["transformers"] = model
    if is_resnet:
        names.setdefault("torchvision", f"torchvision/{architecture}")
        names.setdefault("timm", f"timm/{architecture}")
    if is_resnet and architecture in SMP_ALIKE:
        names["smp"] = f"torchvision/{architecture}"
    elif library == "timm" and default_image_size(model) is None:  # it has no transformers
        names["smp"] = model
    if is_resnet and architecture in DEPTHS:
        names["mmseg"] = names["detectron2"] = f"torchvision/{architecture}"
    known = [name for name in FORMATS if name in names]
    chosen = kind or known[0]
    if chosen not in names:
        raise ValueError(
            f"format is {chosen!r}, which does not fit {card.model}; choose from {', '.join(known)}"
        )
    card = replace(card, model=names[chosen], config=config)
    if library in LIBRARIES and not card.model.startswith(f"{library}/"):
        pixel = tuple(map(layer_elsewhere, card.pixel_layers))
        card = replace(
            card,
            pixel_layer=pixel[0] if isinstance(card.pixel_layer, str) else pixel,
            instance_layer=layer_elsewhere(card.instance_layer),
        )
    return chosen, card


def layer_elsewhere(name: str) -> str:
    """What the other of torchvision and timm calls a layer of a ResNet."""
    first, dot, last = name.rpartition(".")
    return f"{first}{dot}{ELSEWHERE.get(last, last)}"


def refuse_other_card(path: Path, card: BackboneCard) -> None:
    """Refuse a file whose card would replace that of other weights, or what is no card."""
    place = path.with_suffix(".json")
    if not place.is_file():
        return
    suffixes = {file.suffix for file in path.parent.iterdir() if file.stem == path.stem}
    old = card_in(place.parent, place.name)
    if old is None or (old != card and (suffixes - {path.suffix, ".json"} or place.name == CARD)):
        what = "not a card" if old is None else "the card of other weights"
        raise ValueError(f"out is {str(path)!r}; {place} exists and is {what}: name another file")


def is_of_transformers(net: nn.Module) -> bool:
    """Whether a network is one of transformers, which need not be imported."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(net).__mro__)


def detectron2_file(state: Mapping[str, Tensor]) -> bytes:
    """A ResNet's state dict as a file of detectron2."""
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    return pickle.dumps({"model": arrays, "__author__": "pixelcl", "matching_heuristics": True})


def detectron2_name(name: str) -> str:
    """What detectron2 calls a weight of torchvision's ResNet: ``res2.0.shortcut.norm.weight``."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
