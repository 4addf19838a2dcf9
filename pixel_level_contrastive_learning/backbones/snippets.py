"""Code that loads an exported file and feeds its network, as text for whoever exports it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

from torch import nn

from .checkpoint import BackboneCard
from .custom import OBJECT, custom_file, custom_function, custom_kwargs, import_from_folder
from .factory import (
    parse_model_name,
    timm_kwargs,
    timm_settings,
    torchvision_kwargs,
    transformers_config,
)
from .onnx import AXES, INPUT
from .stem import find_stem

OWN_READER = "# images with {} channels need your own mapper (a loading step)\n"
GRAY_FIRST = "# first in the pipeline: dict(type='LoadImageFromFile', color_type='grayscale')\n"
"""Notes for frameworks that read only colour images, or gray ones only when configured to."""
DEPTHS = {f"resnet{depth}": depth for depth in (18, 34, 50, 101, 152)}
"""The ResNets that all of these libraries build alike."""


def how_to(kind: str, net: nn.Module, card: BackboneCard, path: Path) -> str:
    """What loads an exported file and feeds its network, where this package is not installed."""
    if kind in ("mmseg", "detectron2"):  # these scale and normalise as they are configured
        return configuration(kind, card, str(path))
    return f"import torch\n{loading(kind, net, card, path)}\n{feeding(card)}"


def loading(kind: str, net: nn.Module, card: BackboneCard, path: Path) -> str:
    """The lines that load an exported file, once torch is imported."""
    file, (_, name) = str(path), parse_model_name(card.model)
    if kind == "smp" and card.model.startswith("torchvision/"):
        return dedent(f"""\
            import segmentation_models_pytorch as smp

            net = smp.Unet({name!r}, encoder_weights=None, in_channels={card.channels})
            net.encoder.load_state_dict(torch.load({file!r}, weights_only=True))
            """)
    if kind == "smp":
        return dedent(f"""\
            import segmentation_models_pytorch as smp

            net = smp.Unet(
                {"tu-" + name!r}, encoder_weights=True, in_channels={card.channels},
                pretrained_cfg_overlay={timm_overlay(net, card, file)},
            )
            """)
    if kind == "transformers":
        return f"from transformers import AutoModel\n\nnet = AutoModel.from_pretrained({file!r})\n"
    lines = building(net, card)
    if kind == "timm":  # not by checkpoint_path, which accepts no other classifier
        lines[-1] = f"{lines[-1].removesuffix(')')}, pretrained=True,"
        lines += [
            f"    pretrained_cfg_overlay={timm_overlay(net, card, file)},",
            ")  # the run trained no classifier: add num_classes=N, or features_only=True for maps",
        ]
        return "\n".join([*lines, ""])
    state = f"torch.load({file!r}, weights_only=True)"
    if path.suffix == ".safetensors":
        lines.insert(0, "from safetensors.torch import load_file")
        state = f"load_file({file!r})"
    if name.startswith("mnasnet"):  # which asks for the version of its code, see `load_state`
        lines += ["state = net.state_dict()", f"state.update({state})"]
        state = "state"
    lines.append(f"net.load_state_dict({state})")
    if card.model.startswith("torchvision/"):
        classifier = list(net.state_dict())[-1].rpartition(".")[0]
        lines.append(f"# The run trained no classifier: replace {classifier} after loading.")
    return "\n".join([*lines, ""])


def timm_overlay(net: nn.Module, card: BackboneCard, file: str) -> dict[str, Any]:
    """What has timm load a file as its own weights, adapted to what is asked for."""
    overlay: dict[str, Any] = {"file": file, "input_size": (card.channels, *card.image_size)}
    if card.channels != 3:  # else timm before 1.0.31 takes the stem for one of three channels
        overlay["first_conv"] = None
    classes = timm_settings(card.config or {}).get("num_classes")
    overlay |= {} if classes is None else {"num_classes": classes}
    # Older versions expect a file in the format of the model's own weights, such as npz.
    special = getattr(net, "pretrained_cfg", {}).get("custom_load")
    return overlay | {"custom_load": False} if special else overlay


def building(net: nn.Module, card: BackboneCard) -> list[str]:
    """The lines that build a network as it was built here, once torch is imported."""
    library, name = parse_model_name(card.model)
    images = card.channels, card.image_size
    if library == "timm":
        kwargs = timm_settings(card.config or {}) | timm_kwargs(name, *images)
        return ["import timm", "", f"net = timm.create_model({arguments(repr(name), kwargs)})"]
    if library == "torchvision":
        kwargs = torchvision_kwargs(name, *images)
        call = f"models.get_model({arguments(repr(name), {'weights': None, **kwargs})})"
        lines = ["from torchvision import models", "", f"net = {call}"]
    elif library == "hub":
        assert card.config is not None
        config = transformers_config(card.config, *images).to_diff_dict()
        kind = config.pop("model_type")
        lines = ["from transformers import AutoConfig, AutoModel", ""]
        lines.append(f"config = AutoConfig.for_model({arguments(repr(kind), config)})")
        return [*lines, "net = AutoModel.from_config(config)"]
    elif name.startswith(f"{OBJECT}:"):
        return ["net = ...  # your network, as passed to pretrain"]
    else:
        with import_from_folder(name):
            kwargs = custom_kwargs(custom_function(name), *images)
        module, _, function = name.rpartition(":")
        lines = []
        if (file := custom_file(name)) is not None:
            lines, module = ["import sys", f"sys.path.insert(0, {str(file.parent)!r})"], file.stem
        if all(part.isidentifier() for part in module.split(".")):
            lines += [f"from {module} import {function}", ""]
        else:
            lines += ["from importlib import import_module", ""]
            function = f"import_module({module!r}).{function}"
        lines.append(f"net = {function}({arguments('', kwargs)})")
    stem = find_stem(net)
    if card.channels != 3 and "channels" not in kwargs and stem is not None:
        # The library builds networks only for red, green and blue.
        name, conv = stem
        shape = ", ".join(map(str, conv.weight.shape))
        lines += [
            f"stem = net.get_submodule({name!r})",
            f"stem.in_channels = {card.channels}",
            f"stem.weight = torch.nn.Parameter(stem.weight.new_empty({shape}))",
        ]
    return lines


def arguments(first: str, kwargs: Mapping[str, Any]) -> str:
    """The arguments of a call, as they stand in code."""
    given = [first] if first else []
    return ", ".join([*given, *(f"{key}={value!r}" for key, value in kwargs.items())])


def running(card: BackboneCard, path: Path, free: Collection[str]) -> str:
    """The lines that run an ONNX program on images, where torch is not installed either."""
    fixed = dict(zip(AXES, ("2", *map(str, card.image_size)), strict=True))
    batch, *size = (name if name in free else value for name, value in fixed.items())
    only = "" if len(free) == len(AXES) else ", of this size only"
    shape = ", ".join([batch, str(card.channels), *size])
    return dedent(f"""\
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession({str(path)!r})


        def net(images):  # ({shape}) float32{only}: vector (batch, c), map (batch, c, h, w)
            return session.run(None, {{{INPUT!r}: images}})

        """) + feeding(card, "np.array({}, np.float32).reshape", "astype(np.float32)", "clip")


def feeding(
    card: BackboneCard,
    array: str = "torch.tensor({}).view",
    to_float: str = "float()",
    clip: str = "clamp",
) -> str:
    """The lines that scale and normalise images as in training: of torch, or in other words."""
    numbers = {"low": card.low, "high": card.high, "mean": card.mean, "std": card.std}
    kind, scaled = "8-bit", f"x.{to_float} / 255"
    if card.low is not None:
        kind, scaled = "16-bit or float", f"((x.{to_float} - low) / (high - low)).{clip}(0, 1)"
    order = ", red green blue" if card.channels == 3 else ""
    lines = [
        f"{name} = {array.format(list(values))}(-1, 1, 1)"
        for name, values in numbers.items()
        if values is not None
    ]
    return "\n".join(lines) + dedent(f"""


        def prepared(x):  # (b, {card.channels}, h, w), {kind} values{order}: net(prepared(x))
            x = {scaled}
            return (x - mean) / std
        """)


def configuration(kind: str, card: BackboneCard, file: str) -> str:
    """The part of a configuration that loads a ResNet from a file; statistics of raw values."""
    low = card.low or (0.0,) * card.channels
    high = card.high or (255.0,) * card.channels
    scales = list(zip(low, high, strict=True))
    mean = [round(a + (b - a) * m, 4) for (a, b), m in zip(scales, card.mean, strict=True)]
    std = [round((b - a) * s, 4) for (a, b), s in zip(scales, card.std, strict=True)]
    _, name = parse_model_name(card.model)
    depth, rgb = DEPTHS[name], card.channels == 3
    note = "" if card.channels in (1, 3) else OWN_READER.format(card.channels)
    if kind == "mmseg":
        note = GRAY_FIRST if card.channels == 1 else note
        return note + dedent(f"""\
            backbone = dict(
                type="ResNet", depth={depth}, in_channels={card.channels}, style="pytorch",
                init_cfg=dict(type="Pretrained", checkpoint={file!r}),
            )
            data_preprocessor = dict(mean={mean}, std={std}, bgr_to_rgb={rgb})
            """)
    narrow = ", RES2_OUT_CHANNELS: 64" if depth < 50 else ""
    return note + dedent(f"""\
        MODEL:
          WEIGHTS: {json.dumps(file, ensure_ascii=False)}
          PIXEL_MEAN: {mean}
          PIXEL_STD: {std}
          RESNETS: {{DEPTH: {depth}, STRIDE_IN_1X1: False{narrow}}}
        INPUT: {{FORMAT: {"L" if card.channels == 1 else "RGB"}}}
        """)
