"""Where settings come from: defaults, a run to go on with, a recipe, a file, then those given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..checks import one_of, raise_together
from .config import HOW_TO_START, NAMES, RECIPES, PretrainConfig

CONFIG_FILE = "config.yaml"
"""The name of a run's settings in its folder."""
PRETRAINED = "pretrained"
"""What stands in place of a file of weights for those of the model's library."""
INSTEAD_OF: dict[str, dict[str, Any]] = {
    "epochs": {"steps": None},
    "steps": {"epochs": "auto"},
    "batch_size": {"accumulate": "auto"},
}
"""What a setting takes the place of, and how that is then left."""


class Loader(yaml.SafeLoader):
    """Reads YAML safely, and 1e-3 as the number it is (YAML 1.1 takes it for a text)."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that were named somewhere, the later source counting more.

    The sources: the run that is resumed, a recipe named in a file, the file, a recipe given by
    name, and what was given.

    Args:
        given: Settings by name, from flags or from Python.

    Raises:
        ValueError: An unknown name, with the nearest right ones; a file that cannot be read.
    """
    raise_together(*unknown(given, "settings"))
    sources: list[Mapping[str, Any]] = []
    if given.get("resume") and given.get("out") is not None:
        held = Path(given["out"]).expanduser() / CONFIG_FILE
        if held.is_file():
            sources.append(read_settings(held))
    if given.get("config") is not None:
        file = read_settings(Path(given["config"]).expanduser())
        sources += [*recipe_of(file), file]
    sources += [*recipe_of(given), given]
    merged: dict[str, Any] = {}
    for source in sources:
        for name, left in INSTEAD_OF.items():
            if source.get(name) is not None:
                merged |= {other: value for other, value in left.items() if other not in source}
        merged |= source
    return merged


def recipe_of(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of the recipe that a source names, if it names one."""
    name = source.get("recipe")
    if name is not None:
        raise_together(one_of("recipe", name, tuple(RECIPES)))
        yield RECIPES[name]


def configured(settings: Mapping[str, Any]) -> PretrainConfig:
    """The settings as a `PretrainConfig`, lists turned into tuples.

    Raises:
        ValueError: Values out of range, all at once.
    """
    plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    return PretrainConfig(**plain)


def unknown(given: Mapping[str, Any], where: str) -> Iterator[str]:
    """The complaint about each name that no setting has."""
    for name in given:
        if name not in NAMES:
            dashed = str(name).replace("-", "_")
            near = get_close_matches(dashed, NAMES, n=3, cutoff=0.5)
            hint = f"; perhaps {' or '.join(near)}" if near else ""
            yield f"{where}: {name!r} is no setting{hint}; `pixelcl pretrain --help` lists them"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: There is no such file, it holds no mapping, or a name in it is unknown.
    """
    try:
        text = path.read_text(encoding="utf-8")
        read = yaml.load(text, Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"the settings in {path} cannot be read ({error}); give the config.yaml of a run, or a "
            "file with lines such as 'epochs: 100'"
        ) from error
    if not isinstance(read, dict):
        raise ValueError(
            f"{path} holds a {type(read).__name__}; it must hold lines such as 'epochs: 100'"
        )
    raise_together(*unknown(read, str(path)))
    return {n: tuple(v) if isinstance(v, list) else v for n, v in read.items()}


def as_yaml(config: PretrainConfig) -> str:
    """The settings as the text of a `config.yaml`, without those that say how to start."""
    plain: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in placed(config).items()
        if name not in HOW_TO_START
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None)


def placed(config: PretrainConfig) -> dict[str, Any]:
    """The settings by name, those that name files and folders from wherever they are read."""
    return asdict(config) | {
        "model": from_anywhere(config.model),
        "data": tuple("::".join(map(absolute, place.split("::"))) for place in config.data),
        "out": config.out and absolute(config.out),
        "weights": start_of(config.weights),
        "probe": config.probe and absolute(config.probe),
    }


def start_of(weights: str | None) -> str | None:
    """The weights that a run starts from, from wherever they are read."""
    return weights if weights in (None, PRETRAINED) else absolute(weights)


def absolute(place: str) -> str:
    """A place from wherever it is read; what is no path here, such as a URL, as it is."""
    if place.endswith(".tar") and "://" not in place and not place.startswith("pipe:"):
        return str(Path(place).expanduser().absolute())  # a pattern of shards, which is no path
    path = Path(place).expanduser()
    return (
        str(path.absolute()) if path.exists() or (path.parent.is_dir() and "/" in place) else place
    )


def from_anywhere(model: str) -> str:
    """A model's name wherever it is read: one in a file has the file's whole path."""
    file, colon, function = model.rpartition(":")
    found = colon and file.endswith(".py") and Path(file).expanduser().is_file()
    return f"{Path(file).expanduser().absolute()}:{function}" if found else model


def differences(old: Mapping[str, Any], new: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings whose value changed: name -> (old, new).

    A folder of a run may have moved, and with it the file of a model of one's own.
    """
    now = placed(new)
    if short(str(old.get("model"))) == short(new.model):
        now["model"] = old["model"]
    return {
        name: (old[name], now[name])
        for name in NAMES
        if name in old and name not in (*HOW_TO_START, "out") and old[name] != now[name]
    }


def short(model: str) -> str:
    """A model's name without the folder that its file lies in."""
    file, colon, function = model.rpartition(":")
    return f"{Path(file).name}:{function}" if colon and file.endswith(".py") else model
