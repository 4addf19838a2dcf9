"""Backbones by name: ``torchvision/NAME``, ``timm/NAME``, ``hf://OWNER/NAME``, a function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

from torch import nn
from torchvision import models

from ..augment import IMAGENET_MEAN, IMAGENET_STD
from ..checks import check_limits, import_extra, raise_together
from ..modules.feature_info import FeatureInfo
from .custom import custom_net
from .hub import HUB, fetch, fetch_weights, hub_config, is_card, on_hub, place_of, preprocessor
from .state_dict import load_matching, read_state_dict, take_rgb, tell
from .stem import adapt_channels

Size = tuple[int, int]
Config = dict[str, Any]
LIBRARIES = ("torchvision", "timm")
FINER_STRIDE = 8
"""Smallest stride of a second layer that is read by default."""


def build_backbone(
    model: str,
    *,
    channels: int = 3,
    image_size: int | Size | None = None,
    pretrained: bool = False,
    config: Config | None = None,
) -> nn.Module:
    """A network by its name, for images of this many channels and this size.

    It is what its library builds, classifier included, so that its weights go back there. One
    thing differs: a last batch norm of a residual block that timm initialises to 0 is 1 here, as in
    torchvision.

    Args:
        model: ``torchvision/NAME``, ``timm/NAME``, ``hf://OWNER/NAME`` (a repository that
            `pixelcl export --push`, timm or transformers wrote), ``path/to/file.py:function`` or
            ``package.module:function``. A function of your own is called with those of
            ``channels=``, ``image_size=`` and ``pretrained=`` that its signature takes.
        channels: Channels of the images; a stem made for others is adapted, see `adapt_channels`.
        image_size: Side in pixels or ``(height, width)``. Only networks of a fixed input size need
            it; None leaves them at their own.
        pretrained: Whether to download the weights of the library or repository (once).
        config: What describes the network of a repository, where it was read before.

    Raises:
        ValueError: An unknown name, or a network that cannot be built for these images.
        ConnectionError: The weights could not be downloaded.

    >>> build_backbone("torchvision/resnet18", channels=5).conv1.weight.shape
    torch.Size([64, 5, 7, 7])
    """
    sizes = {} if image_size is None else {"image_size": image_size}
    raise_together(*check_limits({"channels": channels, **sizes}))
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    library, name = parse_model_name(model)
    if library == "hub":
        return hub_net(name, channels, size, pretrained, config or hub_config(name))
    builders = {"torchvision": torchvision_net, "timm": timm_net, "custom": custom_net}
    return builders[library](name, channels, size, pretrained)


def parse_model_name(model: str) -> tuple[str, str]:
    """The library, ``torchvision``, ``timm``, ``hub`` or ``custom``, and the model's name there."""
    if on_hub(model):
        place = place_of(model)
        if place.file is not None:
            raise ValueError(f"model is {model!r}, a file; give the repository alone: {place}")
        return "hub", model
    advice = f"give torchvision/NAME, timm/NAME, {HUB}OWNER/NAME or path/to/file.py:function"
    library, slash, name = model.partition("/")
    if slash and library in LIBRARIES:
        known = model_names(library)
        architecture = name.partition(".")[0] if library == "timm" else name  # a tag may follow
        if architecture in known:
            return library, name
        near = [f"{library}/{other}" for other in get_close_matches(architecture, known, n=3)]
        hint = f"perhaps {' or '.join(near)}" if near else advice
        raise ValueError(f"model is {model!r}; {library} has no such network: {hint}")
    where, colon, function = model.rpartition(":")
    if colon and where and function.isidentifier():
        return "custom", model
    near = [f"{library}/{model}" for library in LIBRARIES if model in model_names(library)]
    hint = f"perhaps {' or '.join(near)}" if near else advice
    raise ValueError(f"model is {model!r}; it has no library: {hint}")


def model_names(library: str) -> list[str]:
    """The classifiers of torchvision, or the architectures of timm."""
    names: list[str]
    names = models.list_models(module=models) if library == "torchvision" else timm().list_models()
    return names


def timm() -> Any:
    """The library timm, imported when first needed: it takes half a second."""
    return import_extra("timm")


def default_image_size(model: str, config: Config | None = None) -> Size | None:
    """The ``(height, width)`` of a network of fixed input size; None where any size will do."""
    library, name = parse_model_name(model)
    if library == "hub":
        config = config or hub_config(name)
        if is_card(config):
            return default_image_size(config["model"], config.get("config"))
        if "architecture" not in config:
            size = getattr(transformers_config(config), "image_size", None)
            return (size, size) if isinstance(size, int) else size and tuple(size)
        library, name = "timm", config["architecture"]
    if library == "torchvision" and (name == "maxvit_t" or name.startswith("vit_")):
        return 224, 224
    if library == "timm" and (cfg := timm().get_pretrained_cfg(name)).fixed_input_size:
        _, height, width = cfg.input_size
        return height, width
    return None


def default_statistics(model: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that pretrained weights expect, averaged for any channels but RGB."""
    library, name = parse_model_name(model)
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    if library == "timm":
        cfg = timm().get_pretrained_cfg(name)
        mean, std = cfg.mean, cfg.std
    elif library == "hub":
        config = hub_config(name)
        given = config.get("pretrained_cfg", config)
        settings = preprocessor(place_of(name)) if "model_type" in config else None
        if settings is not None:
            given = {key.removeprefix("image_"): value for key, value in settings.items()}
            if not settings.get("do_normalize", "mean" in given):
                mean, std, given = (0.0,) * 3, (1.0,) * 3, {}
        mean, std = given.get("mean", mean), given.get("std", std)
    if len(mean) != channels:
        mean, std = ((fmean(values),) * channels for values in (mean, std))
    return tuple(mean), tuple(std)


def torchvision_kwargs(name: str, channels: int, image_size: Size | None) -> dict[str, Any]:
    """The keywords that torchvision builds a network with."""
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads refuse small images, and nothing here reads them.
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
                "side, or use a ViT of timm, such as timm/vit_base_patch16_224"
            )
        return {"image_size": height}
    return {}


def torchvision_net(
    name: str, channels: int, image_size: Size | None, pretrained: bool
) -> nn.Module:
    """A network of torchvision."""
    model = f"torchvision/{name}"
    kwargs = torchvision_kwargs(name, channels, image_size)
    if not pretrained:
        with explain_errors(model, image_size):
            net = models.get_model(name, weights=None, **kwargs)
        return adapt_channels(net, channels, keep=False)
    default_kwargs = torchvision_kwargs(name, 3, None)
    with explain_errors(model, None):
        net = models.get_model(name, weights="DEFAULT", **default_kwargs)
    if not kwargs.keys() <= default_kwargs.keys():  # torchvision loads weights at its own size only
        with explain_errors(model, image_size):
            sized = models.get_model(name, weights=None, **kwargs)
        load_matching(sized, net.state_dict(), f"the weights of {model}")
        net = sized
    return adapt_channels(net, channels)


def timm_kwargs(name: str, channels: int, image_size: Size | None) -> dict[str, Any]:
    """The keywords that timm builds a network with."""
    kwargs: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
    if image_size is not None and timm().get_pretrained_cfg(name).fixed_input_size:
        kwargs["img_size"] = tuple(image_size)
    return kwargs


def timm_net(
    name: str, channels: int, image_size: Size | None, pretrained: bool, **settings: Any
) -> nn.Module:
    """A network of timm, which adapts stems and position embeddings itself."""
    model = f"timm/{name}"
    if pretrained and not timm().is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {model}; start from random ones, or give a file")
    with explain_errors(model, image_size):
        kwargs = settings | timm_kwargs(name, channels, image_size)
        net: nn.Module = timm().create_model(name, pretrained=pretrained, **kwargs)
    if not pretrained:
        norms = (module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
        for norm in norms:
            if norm.affine and not norm.weight.is_meta and not norm.weight.any():
                nn.init.ones_(norm.weight)
    return net


def timm_settings(config: Config) -> Config:
    """The keywords that timm builds the network of a repository with."""
    classes = {key: config[key] for key in ("num_classes",) if key in config}
    return {**classes, **config.get("model_args", {})}


def refuse_code(model: str) -> None:
    """Refuse a network that is built by code, where a repository names it: it may do anything."""
    if parse_model_name(model)[0] == "custom":
        raise ValueError(
            f"the repository has weights of {model}, but not its code; get the code, "
            "and give it as --model (in Python as model=) and the repository as --weights"
        )


def hub_net(
    model: str, channels: int, image_size: Size | None, pretrained: bool, config: Config
) -> nn.Module:
    """The network that a repository describes; no code of the repository runs."""
    if is_card(config):
        inner, inner_config = config["model"], config.get("config")
        refuse_code(inner)
        net = build_backbone(inner, channels=channels, image_size=image_size, config=inner_config)
    elif "architecture" in config:
        net = timm_net(config["architecture"], channels, image_size, False, **timm_settings(config))
    else:
        net = transformers_net(model, channels, image_size, config)
    if pretrained:
        file = fetch_weights(model)
        if "model_type" in config:
            fetch(place_of(model), "config.json")  # beside it
            with explain_errors(model, None, config):
                automatic = import_extra("transformers").AutoModel
                given = automatic.from_pretrained(file.parent, config=transformers_config(config))
            state = given.state_dict()
        else:
            state = read_state_dict(file)
        report = load_matching(net, state, f"the weights of {model}")
        tell(report, f"the file {file}", model)
        take_rgb(net, model, report)
    return net


def transformers_net(
    model: str, channels: int, image_size: Size | None, config: Config
) -> nn.Module:
    """A network of transformers.

    For images that are not square it is built at its own size where it then takes them and built at
    theirs does not: DINOv2 fits position embeddings itself, but those of a square only.
    """

    def built(size: Size | None) -> nn.Module:
        sized_config = transformers_config(config, channels, size)
        net = import_extra("transformers").AutoModel.from_config(sized_config)
        return adapt_channels(net, channels, keep=False)

    with explain_errors(model, image_size, config):
        if image_size is None or image_size[0] == image_size[1]:
            return built(image_size)
        try:
            net = built(image_size)
            FeatureInfo(net, channels, image_size)
        except Exception:  # whatever the network says
            net = built(None)
            FeatureInfo(net, channels, image_size)
        return net


def transformers_config(
    config: Config, channels: int | None = None, image_size: Size | None = None
) -> Any:
    """The configuration of a network of transformers; of one with a text part, its vision part."""
    kinds = import_extra("transformers").CONFIG_MAPPING
    kind = config["model_type"]
    if kind not in kinds:
        raise ValueError(f"transformers has no networks of the kind {kind!r}; update transformers")
    made = kinds[kind].from_dict(config)
    made = getattr(made, "vision_config", made)
    if channels is not None and hasattr(made, "num_channels"):
        made.num_channels = channels
    if image_size is not None and hasattr(made, "image_size"):
        is_one = isinstance(made.image_size, int) and image_size[0] == image_size[1]
        made.image_size = image_size[0] if is_one else [*image_size]
    return made


@contextmanager
def explain_errors(
    model: str, image_size: Size | None, config: Config | None = None
) -> Iterator[None]:
    """Say what to do where a network cannot be built or its weights cannot be downloaded."""
    try:
        yield
    except OSError as error:  # each library has its own for a connection that fails
        raise ConnectionError(
            f"the pretrained weights of {model} could not be downloaded: {error}; check the "
            "connection and the free disk space, or download them on another machine and give the "
            "file, or start from random weights"
        ) from error
    except Exception as error:  # libraries raise anything, assertions too
        size = "" if image_size is None else f" for images of {image_size[0]}x{image_size[1]}"
        default = default_image_size(model, config)
        fit = "any size" if default is None else f"{default[0]}x{default[1]}"
        raise ValueError(f"{model} cannot be built{size}: {error}; it is made for {fit}") from error


def zero_last_norms(net: nn.Module) -> bool:
    """Set the last batch norm of residual blocks to 0, as identities; whether there are any."""
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


class LayerInfo(NamedTuple):
    """A layer that a learner can read: its stride in pixels and its cells ``(h, w)``."""

    name: str
    type_name: str
    stride: float
    channels: int
    grid: Size


def list_layers(info: FeatureInfo) -> list[LayerInfo]:
    """The layers that a learner can read, as they run; of those with one output the shortest."""
    listed: dict[int, LayerInfo] = {}
    for layer in info.layers:
        layout = layer.layout
        if layout is None or not layer.carries_gradient:
            continue
        if layer.is_map and not layout.is_square:
            continue
        seen = listed.get(id(layer.output))
        if seen is None or layer.name.count(".") < seen.name.count("."):
            listed[id(layer.output)] = LayerInfo(
                layer.name, layer.type_name, layer.stride, layout.channels, layout.grid
            )
    return list(listed.values())


def default_layers(info: FeatureInfo) -> tuple[str, str]:
    """The layers read by default: for the pixel and for the instance level."""
    [pixel] = info.default_pixels()
    return pixel, info.default_instance(pixel)


def finer_layer(info: FeatureInfo) -> str | None:
    """The second layer of the pixel level, read where a network starts from random weights."""
    finer = islice(info.levels(), 1, 2)
    return next((layer.name for layer in finer if layer.stride >= FINER_STRIDE), None)
