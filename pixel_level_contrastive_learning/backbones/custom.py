"""Networks of the user: ``path/to/file.py:function``, ``module:function``, Python objects."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from torch import nn

from ..modules.feature_info import FeatureInfo
from .stem import adapt_channels, find_stem

OBJECT = "object"
"""``object:NAME`` is a network, or a function that builds one, handed over in Python."""
Model = nn.Module | Callable[..., nn.Module]
HANDED: ContextVar[Model | None] = ContextVar("HANDED", default=None)
BESIDE: dict[str, Path] = {}
"""Modules that the files of models imported from beside them, and the folder of each."""


@contextmanager
def handing_over(model: object) -> Iterator[str | None]:
    """A context in which ``object:NAME`` can be built; gives this name, or None if it is no object.

    Args:
        model: A network, of which copies are taken, or a function as in a file; else nothing.
    """
    if not callable(model):
        yield None
        return
    token = HANDED.set(model)
    try:
        yield handed_name()
    finally:
        HANDED.reset(token)


def handed_name() -> str | None:
    """The name of what is handed over; None where nothing is."""
    model = HANDED.get()
    if model is None:
        return None
    name = type(model).__name__ if is_module_handed() else getattr(model, "__name__", "")
    return f"{OBJECT}:{name if name.isidentifier() else 'function'}"


def is_module_handed() -> bool:
    """Whether what is handed over is a network with weights of its own."""
    return isinstance(HANDED.get(), nn.Module)


def handed_function(wanted: str) -> Callable[..., nn.Module]:
    """What builds the network that is handed over."""
    model = HANDED.get()
    if model is None:
        raise ValueError(
            f"the network was handed over in Python ({wanted}) and cannot be built from its name; "
            "pass it again as model=, to load_backbone, evaluate, visualize, export and pretrain"
        )
    return partial(copy.deepcopy, model) if isinstance(model, nn.Module) else model


def draw_anew(net: nn.Module) -> nn.Module:
    """The network, the weights of its layers drawn as they are when layers are made."""
    for module in net.modules():
        for name in ("reset_parameters", "_reset_parameters"):  # of attention
            if callable(reset := getattr(module, name, None)):
                reset()
    return net


def custom_net(
    name: str, channels: int, image_size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    """What the user's function builds; a stem that refuses the channels is adapted to them."""
    with import_from_folder(name):
        function = custom_function(name)
        if pretrained and "pretrained" not in inspect.signature(function).parameters:
            raise ValueError(
                f"{name} takes no pretrained=, so it has no pretrained weights; start from random "
                "ones, or give a file"
            )
        kwargs = custom_kwargs(function, channels, image_size)
        given = kwargs | ({"pretrained": True} if pretrained else {})
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            raise ValueError(
                f"{name} cannot be called: {error}; give the argument a default, or name a "
                "function that sets it"
            ) from error
        net = function(**given)
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} gave {type(net).__name__}; it must return a torch.nn.Module")
    if "channels" not in kwargs:
        try:
            FeatureInfo(net, channels, image_size or (224, 224))
        except ValueError as error:
            stem = find_stem(net)
            if stem is not None and stem[1].in_channels != channels:
                return adapt_channels(net, channels)
            if image_size is not None:  # else the size of the trial may be what it refuses
                raise ValueError(
                    f"{name} builds a network that fails on an image: {error} (the function gets "
                    "channels= and image_size= if its signature takes them)"
                ) from error
    return net


def custom_kwargs(
    function: Callable[..., Any], channels: int, image_size: tuple[int, int] | None
) -> dict[str, Any]:
    """Those of ``channels=`` and ``image_size=`` that the user's function takes."""
    known = {"channels": channels, "image_size": None if image_size is None else tuple(image_size)}
    takes = inspect.signature(function).parameters
    return {key: value for key, value in known.items() if key in takes and value is not None}


def custom_file(name: str) -> Path | None:
    """The file of ``file.py:function``; None for ``module:function``."""
    where = name.rpartition(":")[0]
    return Path(where).expanduser() if where.endswith(".py") else None


def custom_function(name: str) -> Callable[..., Any]:
    """The user's function; get and call it in `import_from_folder`."""
    where, _, wanted = name.rpartition(":")
    if where == OBJECT:
        return handed_function(wanted)
    file = custom_file(name)
    module = import_module(where) if file is None else import_file(file)
    function: Callable[..., Any] | None = getattr(module, wanted, None)
    if isinstance(function, nn.Module):
        raise ValueError(f"{name} is a network; name a function that returns one")
    if not callable(function):
        names = [other for other, value in vars(module).items() if callable(value)]
        near = get_close_matches(wanted, names, n=3)
        hint = f"perhaps {' or '.join(near)}" if near else "name a function that builds it"
        raise ValueError(f"{where} has no function {wanted!r}; {hint}")
    return function


@contextmanager
def import_from_folder(name: str) -> Iterator[None]:
    """Let a model's file import what lies beside it, as a script can."""
    file = custom_file(name)
    folder = Path.cwd() if file is None else file.resolve().parent
    if file is not None:
        forget_namesakes(folder)
    before = {*sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    except ModuleNotFoundError as error:
        where = name.rpartition(":")[0]
        is_model = file is None and f"{where}.".startswith(f"{error.name}.")
        raise ValueError(
            f"there is no module {where!r}; give a path such as nets/{where}.py:function, or run "
            "where the module can be imported"
            if is_model
            else f"{name} imports {error.name}, which cannot be found; install it, or put it into "
            f"{folder}"
        ) from error
    except ImportError as error:
        if file is None or "relative import" not in str(error):
            raise
        above, inside = file.resolve().parent, name.rpartition(":")[2]
        raise ValueError(
            f"{name} imports from its own package ({error}); run in {above.parent} and give "
            f"{above.name}.{file.stem}:{inside}"
        ) from error
    finally:
        sys.path.remove(str(folder))
        if file is not None:
            new = sys.modules.keys() - before
            BESIDE.update((module, folder) for module in new if lies_in(folder, module))


def forget_namesakes(folder: Path) -> None:
    """Forget modules beside other files of models that have the name of what lies in a folder."""
    for module, other in [*BESIDE.items()]:
        here = folder / module.partition(".")[0]
        if other != folder and (here.is_dir() or here.with_suffix(".py").is_file()):
            sys.modules.pop(module, None)
            del BESIDE[module]


def lies_in(folder: Path, module: str) -> bool:
    """Whether a module that was imported, or the package that it is part of, lies in a folder."""
    top = sys.modules.get(module.partition(".")[0])
    places = [getattr(top, "__file__", None) or "", *getattr(top, "__path__", [])]
    return any(Path(place).parent == folder for place in places)


def import_file(file: Path) -> ModuleType:
    """The module in a file, read anew, under a name that no other module has."""
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
