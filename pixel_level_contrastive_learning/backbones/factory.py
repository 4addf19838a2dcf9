"""Backbones: from a name such as ``torchvision/resnet50`` to a network, and its layers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, NamedTuple
from zlib import crc32

from torch import nn
from torchvision import models

from ..augment import IMAGENET_MEAN, IMAGENET_STD
from ..checks import raise_together, size_pair, whole
from ..modules.feature_info import Survey
from .state_dict import fill
from .stem import adapt_channels

__all__ = [
    "TappableLayer",
    "adapt_channels",
    "build_backbone",
    "default_image_size",
    "default_layers",
    "tappable_layers",
]

Size = tuple[int, int]


def own_net(name: str, channels: int, image_size: Size | None, pretrained: bool) -> nn.Module:
    """What a function of one's own builds.

    The function is called with those of ``channels=``, ``image_size=`` and ``pretrained=`` that its
    signature takes and that are given. What it builds without being told of the channels is adapted
    to them where it refuses them.

    Args:
        name: ``path/to/file.py:function`` or ``package.module:function``.
        channels: Channels of the images.
        image_size: Their ``(height, width)``, or None.
        pretrained: Whether the function shall give pretrained weights.

    Raises:
        ValueError: There is no such function, it gives no network, or has no weights to give.
    """
    with beside(name):
        function = own_function(name)
        if pretrained and "pretrained" not in inspect.signature(function).parameters:
            raise ValueError(
                f"{name} takes no pretrained=, so it has no weights to give; start from random "
                "ones, or give a file"
            )
        told = own_settings(function, channels, image_size)
        net = function(**told, **({"pretrained": True} if pretrained else {}))
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} gave {type(net).__name__}; it must return a torch.nn.Module")
    fits = "channels" in told or sees(net, channels, image_size or (224, 224))
    return net if fits else adapt_channels(net, channels)


def own_settings(
    function: Callable[..., Any], channels: int, image_size: Size | None
) -> dict[str, Any]:
    """What a function of one's own is told of the images: what its signature has a name for."""
    told = {"channels": channels, "image_size": None if image_size is None else tuple(image_size)}
    takes = inspect.signature(function).parameters
    return {key: value for key, value in told.items() if key in takes and value is not None}


def sees(net: nn.Module, channels: int, image_size: Size) -> bool:
    """Whether a network takes images of this many channels."""
    try:
        Survey(net, channels, image_size)
    except ValueError:
        return False
    return True


def own_file(name: str) -> Path | None:
    """The file of ``file.py:function``; None for a module."""
    where = name.rpartition(":")[0]
    return Path(where).expanduser() if where.endswith(".py") else None


def own_function(name: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` or ``package.module:function`` names.

    Raises:
        ValueError: There is no such file, module or function.
    """
    where, _, wanted = name.rpartition(":")
    file = own_file(name)
    with beside(name):
        module = module_named(where) if file is None else module_of(file)
    function = getattr(module, wanted, None)
    if not callable(function):
        names = [own for own, value in vars(module).items() if callable(value)]
        near = get_close_matches(wanted, names, n=3)
        perhaps = f"; perhaps {' or '.join(near)}" if near else "; name a function that builds it"
        raise ValueError(f"{where} has no function {wanted!r}{perhaps}")
    found: Callable[..., Any] = function
    return found


@contextmanager
def beside(name: str) -> Iterator[None]:
    """A context in which what lies beside a model's file can be imported, as by a script.

    Raises:
        ValueError: A module is imported that is nowhere.
    """
    file = own_file(name)
    folder = str(Path.cwd() if file is None else file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} imports {error.name}, which is not there; install it, or put it into {folder}"
        ) from error
    finally:
        sys.path.remove(folder)


def module_named(name: str) -> ModuleType:
    """A module by its dotted name."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # found, but something that it imports is not
        raise ValueError(
            f"there is no module {name!r}; give a path such as nets/{name}.py:function, or run "
            "where the module can be imported"
        ) from error


def module_of(file: Path) -> ModuleType:
    """The module in a file, run anew, under a name that no other module has."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give the path to your .py file, then :function")
    name = f"{file.stem}_{crc32(str(file.resolve()).encode()):08x}"
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    spec.loader.exec_module(module)
    return module


class ModelName(NamedTuple):
    """Where a network comes from: ``torchvision``, ``timm`` or ``own``, and its name there."""

    library: str
    name: str


def model_name(model: str) -> ModelName:
    """A network's name, taken apart.

    Args:
        model: ``torchvision/NAME``, ``timm/NAME``, ``path/to/file.py:function`` or
            ``package.module:function``.

    Raises:
        ValueError: It is none of these, or the library has no such network; the nearest are named.
    """
    library, slash, name = model.partition("/")
    if slash and library in LIBRARIES:
        known = LIBRARIES[library]()
        architecture = name.partition(".")[0] if library == "timm" else name  # a tag may follow
        if architecture in known:
            return ModelName(library, name)
        near = get_close_matches(architecture, known, n=3)
        perhaps = f"perhaps {' or '.join(f'{library}/{one}' for one in near)}" if near else GIVE
        raise ValueError(f"model is {model!r}; {library} has no such network: {perhaps}")
    where, colon, function = model.rpartition(":")
    if colon and where and function.isidentifier():
        return ModelName("own", model)
    homes = [f"{library}/{model}" for library, names in LIBRARIES.items() if model in names()]
    perhaps = f"perhaps {' or '.join(homes)}" if homes else GIVE
    raise ValueError(f"model is {model!r}; it has no library: {perhaps}")


GIVE = "give torchvision/NAME, timm/NAME or path/to/file.py:function"


def torchvision_names() -> list[str]:
    """The classifiers of torchvision, which are what it has of backbones."""
    names: list[str] = models.list_models(module=models)
    return names


def timm_names() -> list[str]:
    """The architectures of timm."""
    names: list[str] = timm().list_models()
    return names


LIBRARIES: dict[str, Callable[[], list[str]]] = {
    "torchvision": torchvision_names,
    "timm": timm_names,
}


def timm() -> ModuleType:
    """The library timm, loaded when first needed."""
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError(
            "timm is not installed; pip install timm, or take a model of torchvision"
        ) from error


def build_backbone(
    model: str,
    *,
    channels: int = 3,
    image_size: int | Size | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A network by its name, ready for images of this many channels and this size.

    It is what its library builds, classifier and all, so that its weights go back there; only where
    timm's residual blocks would begin as identities, they begin open, as torchvision's. A function
    of one's own is called with those of ``channels=``, ``image_size=`` and ``pretrained=`` that
    its signature takes.

    Args:
        model: ``torchvision/NAME``, ``timm/NAME``, ``path/to/file.py:function`` or
            ``package.module:function``.
        channels: Channels of the images; a stem made for others is adapted, see `adapt_channels`.
        image_size: Pixels a side or ``(height, width)``, which only networks of a fixed input size
            heed; None leaves them at their own.
        pretrained: Whether to fetch the library's weights (from the internet, once).

    Raises:
        ValueError: An unknown name, or a network that cannot be built for these images.
        ConnectionError: The weights could not be fetched.
    """
    raise_together(
        whole("channels", channels, 1),
        None if image_size is None else size_pair("image_size", image_size),
    )
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    library, name = model_name(model)
    builders = {"torchvision": torchvision_net, "timm": timm_net, "own": own_net}
    return builders[library](name, channels, size, pretrained)


def torchvision_settings(name: str, channels: int, image_size: Size | None) -> dict[str, Any]:
    """What torchvision has to be told to build a network as it is built here.

    Raises:
        ValueError: A transformer that takes only square images is wanted for others.
    """
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads lie behind no tap, and refuse small images.
        return {"aux_logits": False, "init_weights": False, "transform_input": channels == 3}
    if image_size is None:
        return {}
    if name == "maxvit_t":
        return {"input_size": tuple(image_size)}
    if name.startswith("vit_"):
        height, width = image_size
        if height != width:
            raise ValueError(
                f"torchvision/{name} takes square images only, not {height}x{width}; give one "
                "side, or take a ViT of timm, such as timm/vit_base_patch16_224"
            )
        return {"image_size": height}
    return {}


def torchvision_net(
    name: str, channels: int, image_size: Size | None, pretrained: bool
) -> nn.Module:
    """A network of torchvision."""
    model = f"torchvision/{name}"
    settings = torchvision_settings(name, channels, image_size)
    plain = torchvision_settings(name, 3, None)
    if not pretrained:
        with building(model, image_size):
            net = models.get_model(name, weights=None, **settings)
        return adapt_channels(net, channels, keep=False)
    with building(model, None):
        net = models.get_model(name, weights="DEFAULT", **plain)
    if not settings.keys() <= plain.keys():  # torchvision gives weights to its own size only
        with building(model, image_size):
            sized = models.get_model(name, weights=None, **settings)
        fill(sized, net.state_dict(), f"the weights of {model}")
        net = sized
    return adapt_channels(net, channels)


def timm_settings(name: str, channels: int, image_size: Size | None) -> dict[str, Any]:
    """What timm has to be told to build a network as it is built here."""
    settings: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
    if image_size is not None and timm().get_pretrained_cfg(name).fixed_input_size:
        settings["img_size"] = tuple(image_size)
    return settings


def timm_net(name: str, channels: int, image_size: Size | None, pretrained: bool) -> nn.Module:
    """A network of timm, which adapts stems and position embeddings by itself."""
    model = f"timm/{name}"
    if pretrained and not timm().is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {model}; start from random ones, or give a file")
    with building(model, image_size):
        settings = timm_settings(name, channels, image_size)
        net: nn.Module = timm().create_model(name, pretrained=pretrained, **settings)
    if not pretrained:
        begin_norms_at_one(net)
    return net


def begin_norms_at_one(net: nn.Module) -> None:
    """Set batch norms that begin at 0, as timm has it in its residual networks, to 1.

    So random weights are alike in both libraries, and every block takes part from the first step.
    """
    for norm in net.modules():
        if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or norm.weight.is_meta:
            continue
        if not norm.weight.any():
            nn.init.ones_(norm.weight)


def zero_last_norms(net: nn.Module) -> bool:
    """Set the last batch norm of each residual block to 0, so that blocks begin as identities.

    Returns:
        Whether there are any: networks such as ConvNeXt have none.
    """
    found = False
    for block in net.modules():
        if hasattr(block, "zero_init_last"):  # timm
            block.zero_init_last()  # type: ignore[operator]  # whatever has that name
            found = True
            continue
        for name in ("bn3", "bn2"):  # torchvision: bottlenecks, then basic blocks
            norm = getattr(block, name, None)
            if hasattr(block, "conv1") and isinstance(norm, nn.BatchNorm2d):
                nn.init.zeros_(norm.weight)
                found = True
                break
    return found


@contextmanager
def building(model: str, image_size: Size | None) -> Iterator[None]:
    """Say what to do where a network cannot be built or its weights cannot be fetched."""
    try:
        yield
    except OSError as error:  # each library has its own for a connection that fails
        raise ConnectionError(
            f"the pretrained weights of {model} could not be fetched: {error}; look at the "
            "connection, or fetch them on another machine and give the file, or start from random "
            "weights"
        ) from error
    except Exception as error:  # whatever a library raises: assertions, too
        size = "" if image_size is None else f" for images of {image_size[0]}x{image_size[1]}"
        own = default_image_size(model)
        wanted = "any size" if own is None else f"{own[0]}x{own[1]}"
        raise ValueError(
            f"{model} cannot be built{size}: {error}; it is made for {wanted}"
        ) from error


def default_image_size(model: str) -> Size | None:
    """The ``(height, width)`` a network of fixed input size wants; None where any size will do.

    Raises:
        ValueError: An unknown name.
    """
    library, name = model_name(model)
    if library == "torchvision" and (name == "maxvit_t" or name.startswith("vit_")):
        return 224, 224
    if library == "timm" and (cfg := timm().get_pretrained_cfg(name)).fixed_input_size:
        _, height, width = cfg.input_size
        return height, width
    return None


def default_statistics(model: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that pretrained weights expect, for values in [0, 1].

    Those of red, green and blue for three channels, their average for any other count.
    """
    library, name = model_name(model)
    mean: Iterable[float] = IMAGENET_MEAN
    std: Iterable[float] = IMAGENET_STD
    if library == "timm":
        cfg = timm().get_pretrained_cfg(name)
        mean, std = cfg.mean, cfg.std
    if channels != 3:
        mean, std = ((fmean(values),) * channels for values in (mean, std))
    return tuple(mean), tuple(std)


class TappableLayer(NamedTuple):
    """A layer that a learner can read.

    Attributes:
        name: Its name in the network, as the flags and keywords take it.
        type_name: The name of its class.
        stride: Pixels of the image a cell covers, along the longer way.
        channels: Its channels.
        grid: Its cells ``(h, w)``; ``(1, 1)`` for a vector, which serves the instance level only.
    """

    name: str
    type_name: str
    stride: float
    channels: int
    grid: Size


def tappable_layers(net: nn.Module, channels: int, image_size: Size) -> list[TappableLayer]:
    """The layers of a network that can be tapped, in the order in which they run.

    Layers that give the very same tensor, such as a stage and its last block, are listed once, by
    the shortest name; the others may be tapped all the same.

    Raises:
        ValueError: The network refuses images of this size and channels.
    """
    survey = Survey(net, channels, image_size)
    listed: dict[int, TappableLayer] = {}
    for layer in survey.layers:
        reading = layer.reading
        if reading is None or not layer.carries_gradient:
            continue
        if layer.is_map and not reading.is_square:
            continue
        seen = listed.get(layer.output_id)
        if seen is None or layer.name.count(".") < seen.name.count("."):
            listed[layer.output_id] = TappableLayer(
                layer.name, layer.type_name, layer.stride, reading.channels, reading.grid
            )
    return list(listed.values())


def default_layers(net: nn.Module, channels: int, image_size: Size) -> tuple[str, str]:
    """The layers that are tapped where none is named: for the pixel and for the instance level.

    Raises:
        ValueError: The network refuses images of this size and channels, or has no map for them of
            at least 4x4 cells.
    """
    survey = Survey(net, channels, image_size)
    pixel = survey.default_pixel()
    return pixel, survey.default_instance(pixel)
