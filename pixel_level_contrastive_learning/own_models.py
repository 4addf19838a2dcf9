"""Own models: networks that a function in a file or module of the user's builds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from torch import nn

from .modules.survey import Survey
from .stems import adapt_channels

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
