"""Export: a run's backbone as a file for another library, and the code that loads it there."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..checks import import_extra, one_of, raise_together
from ..files import write_whole
from ..run_layout import EXPORTED
from .checkpoint import BackboneCard, clean_state_dict, read_backbone, save_card
from .custom import (
    OBJECT,
    Model,
    custom_file,
    custom_function,
    custom_kwargs,
    handing_over,
    import_from_folder,
)
from .factory import (
    LIBRARIES,
    default_image_size,
    parse_model_name,
    timm_kwargs,
    timm_settings,
    torchvision_kwargs,
    transformers_config,
)
from .hub import is_card, on_hub
from .onnx import AXES, INPUT, onnx_program
from .state_dict import KeyReport, find_weights, load_matching, read_state_dict, run_folder
from .stem import find_stem

FORMATS = {
    "torchvision": ".pth",
    "timm": ".safetensors",
    "safetensors": ".safetensors",
    "state-dict": ".pth",
    "smp": ".pth",
    "mmseg": ".pth",
    "detectron2": ".pkl",
    "onnx": ".onnx",
    "transformers": "",
}
"""What `export` writes, and the suffixes of the files; that of transformers is a folder."""
HEADLESS = {"smp", "mmseg", "detectron2"}
"""Formats for networks without a classifier."""
DEPTHS = {f"resnet{depth}": depth for depth in (18, 34, 50, 101, 152)}
"""The ResNets that all of these libraries build alike."""
SMP_ALIKE = {*DEPTHS, "resnext50_32x4d", "resnext101_32x8d"}
"""Those that segmentation-models-pytorch builds like torchvision."""
TIMM_ALIKE = {*SMP_ALIKE, "wide_resnet50_2", "wide_resnet101_2"}
"""Those that torchvision and timm build alike, name by name."""


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        path: The file.
        format: One of `FORMATS`.
        report: What of the file, read again, fits the backbone; a classifier is missing where the
            format has none.
        how_to: What loads the file without this package and feeds images to it: Python; for
            detectron2 a configuration.
        step: Steps that a checkpoint had been trained for; None of other weights.
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
            lines.append(f"(nothing is lost: the classifier, which {self.format} does not take)")
        return "\n".join([*lines, "", self.how_to.rstrip()])


def export(
    run: str | Path,
    format: str | None = None,  # noqa: A002
    out: str | Path | None = None,
    *,
    model: Model | None = None,
) -> Exported:
    """Write a run's backbone for another library, and how to load and feed it there.

    ``torchvision`` and ``timm`` hold every weight under the library's names, as do ``safetensors``
    and ``state-dict`` for any model. ``smp`` is an encoder of segmentation-models-pytorch,
    ``mmseg`` and ``detectron2`` a backbone there (ResNets). A ResNet of torchvision can go to timm,
    and back. ``transformers`` is a folder for its ``from_pretrained``, of a model from there.
    ``onnx`` gives the pooled vector and the map of the trained layer, checked against the network;
    batch and size of its images are free where the network allows it.

    Args:
        run: A run directory, a file with its card, or ``hf://OWNER/NAME[/FILE]``.
        format: One of `FORMATS`. Default: the first of them that has the model.
        out: The file or folder to write. Default: ``backbone-FORMAT`` in the run directory, of a
            checkpoint ``backbone-NAME-FORMAT``, with the suffix of the format; to be given for
            what is on the Hub.
        model: As for `load_backbone`.

    Raises:
        ValueError: An unknown format, one that has no such model, no backbone to export, or one
            that lacks weights of the model.
        OSError: The file cannot be written.

    >>> export("runs/streets", "torchvison")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: format is 'torchvison'; it must be one of ... (perhaps 'torchvision')
    """
    nowhere = f"out is None, and {run} is no folder of a run; name a file for the export"
    raise_together(
        None if format is None else one_of("format", format, FORMATS),
        nowhere if out is None and on_hub(run) else None,
    )
    source = find_weights(run)
    with handing_over(model):
        net, card, loaded = read_backbone(run)
    kind, card = named_in(card, net, format)
    step, mark = None, ""
    if run_folder(source) != source.parent:
        step = torch.load(source, "cpu", weights_only=True, mmap=True).get("steps_done")
        mark = f"{source.stem}-" * (Path(run).suffix == ".ckpt")
    default = run_folder(source) / f"{EXPORTED}{mark}{kind}{FORMATS[kind]}"
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
            f"use the model as it was trained, or train again.\n{loaded}"
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
            save_card(path, card)
        if path.suffix == ".safetensors":
            write_whole(path, save(state, metadata={"format": "pt"}))
        else:
            write_whole(path, lambda file: torch.save(state, file))
        state = read_state_dict(path)
    report = load_matching(net, state, str(path))
    how = how or how_to(kind, net, card, path.resolve())
    return Exported(path, kind, report, how, step)


def named_in(
    card: BackboneCard,
    net: nn.Module,
    format: str | None,  # noqa: A002
) -> tuple[str, BackboneCard]:
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
    chosen = format or known[0]
    if chosen not in names:
        raise ValueError(
            f"format is {chosen!r}, which has no {card.model}; for this model: {', '.join(known)}"
        )
    return chosen, replace(card, model=names[chosen], config=config)


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


def how_to(format: str, net: nn.Module, card: BackboneCard, path: Path) -> str:  # noqa: A002
    """What loads an exported file and feeds its network, where this package is not installed."""
    if format in ("mmseg", "detectron2"):  # these scale and normalise as they are configured
        return configuration(format, card, str(path))
    return f"import torch\n{loading(format, net, card, path)}\n{feeding(card)}"


def loading(format: str, net: nn.Module, card: BackboneCard, path: Path) -> str:  # noqa: A002
    """The lines that load an exported file, once torch is imported."""
    file, (_, name) = str(path), parse_model_name(card.model)
    if format == "smp" and card.model.startswith("torchvision/"):
        return dedent(f"""\
            import segmentation_models_pytorch as smp

            net = smp.Unet({name!r}, encoder_weights=None, in_channels={card.channels})
            net.encoder.load_state_dict(torch.load({file!r}, weights_only=True))
            """)
    if format == "smp":
        return dedent(f"""\
            import segmentation_models_pytorch as smp

            net = smp.Unet(
                {"tu-" + name!r}, encoder_weights=True, in_channels={card.channels},
                pretrained_cfg_overlay={timm_overlay(net, card, file)},
            )
            """)
    if format == "transformers":
        return f"from transformers import AutoModel\n\nnet = AutoModel.from_pretrained({file!r})\n"
    lines = building(net, card)
    if format == "timm":  # not by checkpoint_path, which takes no other classifier
        lines[-1] = f"{lines[-1].removesuffix(')')}, pretrained=True,"
        lines += [
            f"    pretrained_cfg_overlay={timm_overlay(net, card, file)},",
            ")  # the run trained no classifier: add num_classes=N, or features_only=True for maps",
        ]
        return "\n".join([*lines, ""])
    if path.suffix == ".safetensors":
        lines.insert(0, "from safetensors.torch import load_file")
        lines.append(f"net.load_state_dict(load_file({file!r}))")
    else:
        lines.append(f"net.load_state_dict(torch.load({file!r}, weights_only=True))")
    if card.model.startswith("torchvision/"):
        classifier = list(net.state_dict())[-1].rpartition(".")[0]
        lines.append(f"# The run trained no classifier: replace {classifier} after loading.")
    return "\n".join([*lines, ""])


def timm_overlay(net: nn.Module, card: BackboneCard, file: str) -> dict[str, Any]:
    """What has timm load a file as its own weights, adapted to what is asked for."""
    overlay = {"file": file, "input_size": (card.channels, *card.image_size)}
    classes = timm_settings(card.config or {}).get("num_classes")
    overlay |= {} if classes is None else {"num_classes": classes}
    # Older versions take a file to be in the format of the model's own weights, such as npz.
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
        return ["net = ...  # your network, as it was handed over"]
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
        # The library knows red, green and blue only.
        name, conv = stem
        options = conv.extra_repr()  # type: ignore[no-untyped-call]  # untyped in torch
        options = re.sub(r"=([a-z]\w*)", r"='\1'", options)  # padding=same
        lines.append(f"net.set_submodule({name!r}, torch.nn.Conv2d({options}))")
    return lines


def arguments(first: str, kwargs: Mapping[str, Any]) -> str:
    """The arguments of a call, as they stand in code."""
    given = [first] if first else []
    return ", ".join([*given, *(f"{key}={value!r}" for key, value in kwargs.items())])


def running(card: BackboneCard, path: Path, free: Collection[str]) -> str:
    """The lines that run an ONNX program on images, where torch is not installed either."""
    fixed = dict(zip(AXES, ("2", *map(str, card.image_size)), strict=True))
    batch, *size = (name if name in free else own for name, own in fixed.items())
    only = "" if len(free) == len(AXES) else ", of just this size"
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


def configuration(format: str, card: BackboneCard, file: str) -> str:  # noqa: A002
    """The part of a configuration that loads a ResNet from a file; statistics of raw values."""
    low = card.low or (0.0,) * card.channels
    high = card.high or (255.0,) * card.channels
    scales = list(zip(low, high, strict=True))
    mean = [round(a + (b - a) * m, 4) for (a, b), m in zip(scales, card.mean, strict=True)]
    std = [round((b - a) * s, 4) for (a, b), s in zip(scales, card.std, strict=True)]
    _, name = parse_model_name(card.model)
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
