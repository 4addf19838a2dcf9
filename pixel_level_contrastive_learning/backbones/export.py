"""Exports: a run's backbone as a file for other libraries, and the lines that use it there."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..checks import one_of, raise_together
from ..files import write_whole
from .checkpoint import BackboneCard, clean_state, read_backbone
from .factory import (
    default_image_size,
    model_name,
    own_file,
    own_function,
    own_settings,
    timm_settings,
    torchvision_settings,
)
from .state_dict import KeyReport, fill, home, read_tensors, weights_file
from .stem import stem_of

SUFFIXES = {
    "torchvision": ".pth",
    "timm": ".safetensors",
    "safetensors": ".safetensors",
    "state-dict": ".pth",
    "smp": ".pth",
    "mmseg": ".pth",
    "detectron2": ".pkl",
}
"""What `export` writes, and how the files' names end."""
HEADLESS = {"smp", "mmseg", "detectron2"}
"""Formats for networks without a classifier."""

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""The ResNets that all of these libraries build alike."""
ENCODERS = {*DEPTHS, "resnext50_32x4d", "resnext101_32x8d"}
"""Those that segmentation-models-pytorch builds like torchvision."""
ALIKE = {*ENCODERS, "wide_resnet50_2", "wide_resnet101_2"}
"""Those that torchvision and timm build alike, name by name."""


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        path: The file.
        format: One of `SUFFIXES`.
        report: What of the file, read again, fits the backbone; a classifier is missing where the
            format has none.
        how_to: What loads it without this package and brings images to it: Python; for detectron2 a
            configuration.
    """

    path: Path
    format: str
    report: KeyReport
    how_to: str

    def __str__(self) -> str:
        return f"{self.path}\n{self.report}\n\n{self.how_to.rstrip()}"


def export(run: str | Path, format: str, out: str | Path | None = None) -> Exported:  # noqa: A002
    """Write a run's backbone for another library, and how to load and feed it there.

    ``torchvision`` and ``timm`` hold every weight under the library's names, as do ``safetensors``
    and ``state-dict`` for any model. ``smp`` is an encoder of segmentation-models-pytorch,
    ``mmseg`` and ``detectron2`` a backbone there (ResNets). A ResNet of torchvision goes to timm,
    and back.

    Args:
        run: A run directory, or a file with its card.
        format: One of `SUFFIXES`.
        out: The file to write. Default: ``backbone-FORMAT`` in the run directory, with the suffix
            of the format.

    Raises:
        ValueError: An unknown format, one that has no such model, or no backbone to export.
        OSError: The file cannot be written.
    """
    raise_together(one_of("format", format, SUFFIXES))
    source = weights_file(run)
    net, card, _ = read_backbone(source)
    card = replace(card, model=model_there(card.model, format))
    beside = home(source) / f"backbone-{format}{SUFFIXES[format]}"
    path = beside if out is None else Path(out).expanduser()
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"out is {str(path)!r}; for {format} it must end in {SUFFIXES[format]}")
    state = clean_state(net)
    if format in HEADLESS:
        state = {name: held for name, held in state.items() if not name.startswith("fc.")}
    if format == "detectron2":
        write_whole(path, detectron2_file(state))
    else:
        if format not in HEADLESS:
            write_whole(path.with_suffix(".json"), card.to_json())
        write_whole(path, state_file(state, path.suffix))
        state = read_tensors(path)
    report = fill(net, state, str(path))
    return Exported(path, format, report, how_to(format, net, card, path.resolve()))


def model_there(model: str, format: str) -> str:  # noqa: A002
    """The model's name in the library that a format is for.

    Raises:
        ValueError: It has no such model.
    """
    library, name = model_name(model)
    architecture = name.partition(".")[0] if library == "timm" else name
    alike = library != "own" and architecture in ALIKE
    there = dict.fromkeys(("safetensors", "state-dict"), model)
    if library != "own":
        there[library] = model
    if alike:
        there.setdefault("torchvision", f"torchvision/{architecture}")
        there.setdefault("timm", f"timm/{architecture}")
    if alike and architecture in ENCODERS:
        there["smp"] = f"torchvision/{architecture}"
    elif library == "timm" and default_image_size(model) is None:  # its transformers are not
        there["smp"] = model
    if alike and architecture in DEPTHS:
        there["mmseg"] = there["detectron2"] = f"torchvision/{architecture}"
    if format not in there:
        raise ValueError(
            f"format is {format!r}, which has no {model}; for this model: "
            f"{', '.join(one for one in SUFFIXES if one in there)}"
        )
    return there[format]


def state_file(state: dict[str, Tensor], suffix: str) -> bytes:
    """A state dict as the content of a file."""
    if suffix == ".safetensors":
        return save(state, metadata={"format": "pt"})
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def detectron2_file(state: Mapping[str, Tensor]) -> bytes:
    """A ResNet's state dict as a file of detectron2."""
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    held = {"model": arrays, "__author__": "pixelcl", "matching_heuristics": True}
    return pickle.dumps(held)


def detectron2_name(name: str) -> str:
    """What detectron2 calls a weight of torchvision's ResNet.

    ``layer1`` is ``res2`` there, what comes before it the ``stem``, batch norm the ``norm`` of its
    convolution, and the convolution on the side the ``shortcut``.
    """
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def how_to(format: str, net: nn.Module, card: BackboneCard, path: Path) -> str:  # noqa: A002
    """What loads an exported file, and feeds its network, where this package is not installed."""
    file, name = str(path), model_name(card.model).name
    if format in ("mmseg", "detectron2"):  # these scale and normalise as they are configured
        return configuration(format, name, card, file)
    return f"import torch\n{loading(format, net, card, path)}\n{feeding(card)}"


def loading(format: str, net: nn.Module, card: BackboneCard, path: Path) -> str:  # noqa: A002
    """The lines that load an exported file, once torch is imported."""
    file, name = str(path), model_name(card.model).name
    if format == "smp" and card.model.startswith("torchvision/"):
        return dedent(f"""\
            import segmentation_models_pytorch as smp

            net = smp.Unet({name!r}, encoder_weights=None, in_channels={card.channels})
            net.encoder.load_state_dict(torch.load({file!r}, weights_only=True))
            """)
    if format == "smp":
        overlay = {"file": file, "input_size": (card.channels, *card.image_size)}
        return dedent(f"""\
            import segmentation_models_pytorch as smp

            net = smp.Unet(
                {"tu-" + name!r}, encoder_weights=True, in_channels={card.channels},
                pretrained_cfg_overlay={overlay},
            )
            """)
    if format == "timm":
        settings = called(timm_settings(name, card.channels, card.image_size))
        return dedent(f"""\
            import timm

            net = timm.create_model({name!r}{settings}, checkpoint_path={file!r})
            """)
    reading, state = ["from safetensors.torch import load_file"], f"load_file({file!r})"
    if path.suffix != ".safetensors":
        reading, state = [], f"torch.load({file!r}, weights_only=True)"
    return "\n".join([*reading, *built(net, card), f"net.load_state_dict({state})", ""])


def feeding(card: BackboneCard) -> str:
    """The lines that make of images what the network was trained on, with its own numbers."""
    numbers = {"low": card.low, "high": card.high, "mean": card.mean, "std": card.std}
    kind, scaled = "8-bit", "x.float() / 255"
    if card.low is not None:
        kind, scaled = "16-bit or float", "((x.float() - low) / (high - low)).clamp(0, 1)"
    order = ", red green blue" if card.channels == 3 else ""
    lines = [
        f"{name} = torch.tensor({list(values)}).view(-1, 1, 1)"
        for name, values in numbers.items()
        if values is not None
    ]
    return "\n".join(lines) + dedent(f"""


        def prepared(x):  # (b, {card.channels}, h, w), {kind} values{order}: net(prepared(x))
            x = {scaled}
            return (x - mean) / std
        """)


def configuration(format: str, name: str, card: BackboneCard, file: str) -> str:  # noqa: A002
    """The part of a configuration that takes a ResNet from a file; statistics of raw values."""
    low = card.low or (0.0,) * card.channels
    high = card.high or (255.0,) * card.channels
    scales = list(zip(low, high, strict=True))
    mean = [round(a + (b - a) * m, 4) for (a, b), m in zip(scales, card.mean, strict=True)]
    std = [round((b - a) * s, 4) for (a, b), s in zip(scales, card.std, strict=True)]
    depth, rgb = DEPTHS[name], card.channels == 3
    if format == "mmseg":
        return dedent(f"""\
            backbone = dict(
                type="ResNet", depth={depth}, in_channels={card.channels}, style="pytorch",
                init_cfg=dict(type="Pretrained", checkpoint={file!r}),
            )
            data_preprocessor = dict(mean={mean}, std={std}, bgr_to_rgb={rgb})
            """)
    narrow = ", RES2_OUT_CHANNELS: 64" if depth < 50 else ""
    return dedent(f"""\
        MODEL:
          WEIGHTS: {file!r}
          PIXEL_MEAN: {mean}
          PIXEL_STD: {std}
          RESNETS: {{DEPTH: {depth}, STRIDE_IN_1X1: False{narrow}}}
        INPUT: {{FORMAT: RGB}}
        """)


def built(net: nn.Module, card: BackboneCard) -> list[str]:
    """The lines that build a network as it was built here, once torch is imported."""
    library, name = model_name(card.model)
    settings: Mapping[str, Any]
    if library == "timm":
        settings = timm_settings(name, card.channels, card.image_size)
        return ["import timm", "", f"net = timm.create_model({name!r}{called(settings)})"]
    if library == "torchvision":
        settings = torchvision_settings(name, card.channels, card.image_size)
        lines = ["from torchvision import models", ""]
        lines.append(f"net = models.get_model({name!r}, weights=None{called(settings)})")
    else:
        where, _, function = name.rpartition(":")
        file = own_file(name)
        lines = [] if file is None else ["import sys", f"sys.path.insert(0, {str(file.parent)!r})"]
        settings = own_settings(own_function(name), card.channels, card.image_size)
        module, told = where if file is None else file.stem, called(settings).removeprefix(", ")
        if all(part.isidentifier() for part in module.split(".")):
            lines += [f"from {module} import {function}", "", f"net = {function}({told})"]
        else:
            lines += ["from importlib import import_module", ""]
            lines.append(f"net = import_module({module!r}).{function}({told})")
    stem = stem_of(net)
    if card.channels != 3 and "channels" not in settings and stem is not None:
        # Its library knows of red, green and blue only.
        name, conv = stem
        told = conv.extra_repr()  # type: ignore[no-untyped-call]  # untyped in torch
        kernels = re.sub(r"=([a-z]\w*)", r"='\1'", told)  # padding=same
        lines.append(f"net.set_submodule({name!r}, torch.nn.Conv2d({kernels}))")
    return lines


def called(settings: Mapping[str, Any]) -> str:
    """Settings as they stand in a call, after what stands there already."""
    return "".join(f", {name}={value!r}" for name, value in settings.items())
