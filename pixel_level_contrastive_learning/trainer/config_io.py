"""Settings from and to files: defaults, a run that is resumed, a recipe, a file, those given."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from .. import run_layout
from ..checks import check_limits, counted, one_of, raise_together
from ..files import absolute_model, read_settings_file, read_settings_if_any
from .config import CONFIG_LIMITS, HOW_TO_START, NAMES, PRETRAINED, RECIPES, PretrainConfig

REPLACES: dict[str, dict[str, Any]] = {
    "epochs": {"steps": None},
    "steps": {"epochs": "auto"},
    "batch_size": {"accumulate": "auto"},
    "pixel_layer": {"pixel_levels": "auto"},
    "pixel_levels": {"pixel_layer": "auto"},
}
"""Settings that a setting takes the place of, and how these are then left."""
BY_DATA, BY_LENGTH = ("data", "pages"), ("data", "steps", "epochs", "batch_size")
OF_LENGTH = "warmup_epochs", "checkpoint_every", "picture_every", "probe_every"
"""Settings that a run chooses by its length; of a resumed run only these are chosen anew."""
CHOSEN_BY: dict[str, tuple[str, ...]] = {
    "channels": BY_DATA,
    "image_size": BY_DATA,
    "epochs": BY_DATA,
    "blur_sigma": ("image_size",),
    "pixel_levels": ("model", "weights", "image_size"),
    "pixel_layer": ("model", "image_size", "pixel_levels"),
    "instance_layer": ("model", "image_size"),
    "lr": ("model", "weights", "optimizer"),
    "accumulate": ("model", "image_size", "pixel_layer", "precision", "devices", "num_nodes"),
    **dict.fromkeys(OF_LENGTH, BY_LENGTH),
}
"""Settings that a run chooses by others: where one of these is changed, they are chosen anew."""
OTHER_NAMES = {
    "learning_rate": "lr",
    **dict.fromkeys(("max_epochs", "num_epochs"), "epochs"),
    **dict.fromkeys(("max_steps", "num_steps"), "steps"),
    "num_workers": "workers",
    "output_dir": "out",
    **dict.fromkeys(("arch", "backbone"), "model"),
    **dict.fromkeys(("gpus", "num_gpus"), "devices"),
}
"""What other libraries call a setting."""
CHOSEN = "chosen"
"""What `config.yaml` holds beside settings: those that were `auto`, and what was chosen."""
FIXED = (
    "model",
    "weights",
    "zero_init_residual",
    "channels",
    "loss",
    "pixel_layer",
    "instance_layer",
    "projection_size",
    "projection_hidden_size",
    "ppm_num_layers",
    "optimizer",
)
"""Settings that a resumed run keeps, since its weights have their shape."""
MACHINE = (
    *("accelerator", "devices", "num_nodes", "strategy", "workers"),
    *("cache", "graph", "loggers"),
)
"""Settings that say where and how fast a run goes, and of which no weight tells."""


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that were named somewhere; a later source overrides an earlier one.

    The sources: the run that is resumed, a recipe named in a file, the file, a recipe given by
    name, and what was given.

    Args:
        given: Settings by name, from flags or from Python.

    Raises:
        ValueError: An unknown name, with the nearest right ones; a file that cannot be read;
            settings of a probe without one; two lengths of a run.
    """
    raise_together(*unknown_names(given, "settings"), two_lengths(given))
    run, file, rechosen = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    overrides = ChainMap(dict(given), *map(dict, recipe_of(given)))
    if given.get("config") is not None:
        path = Path(given["config"]).expanduser()
        file = read_settings(path)
        raise_together(two_lengths(file, f"{path}: "))
        rechosen = chosen_anew(file, chosen_in(path, file), overrides)
        overrides = ChainMap(*overrides.maps, file, *map(dict, recipe_of(file)))
    folder = overrides.get("out") if overrides.get("resume") else None
    if folder is not None:
        path = Path(folder).expanduser() / run_layout.CONFIG
        run = resumed_settings(path.parent)
        by_length = set(chosen_in(path, run)).intersection(OF_LENGTH)
        rechosen |= chosen_anew(run, by_length, overrides)
    sources = run, *recipe_of(file), file, *recipe_of(given), given
    merged: dict[str, Any] = {}
    for source in sources:
        for name, unset in REPLACES.items():
            if source.get(name) is not None:
                merged |= {other: value for other, value in unset.items() if other not in source}
        merged |= source
    merged |= rechosen
    if merged.get("probe") is None:  # a run writes the probe_every that it would have had
        idle = {name: merged.get(name) for name in ("ids", "colours")}
        idle |= {"probe_every": given.get("probe_every")}
        raise_together(
            *(
                f"{name} is {value!r} without probe; add probe, or leave {name} out"
                for name, value in idle.items()
                if value not in (None, "auto")
            )
        )
    return merged


def two_lengths(source: Mapping[str, Any], where: str = "") -> str | None:
    """The error message about a source that gives the length of a run twice."""
    steps, epochs = source.get("steps"), source.get("epochs")
    if steps is None or epochs in (None, "auto"):
        return None
    return f"{where}steps is {steps} and epochs is {epochs}; give one of them"


def chosen_in(path: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that a run chose, by its `config.yaml`, and that are still what it chose."""
    record = read_settings_if_any(path).get(CHOSEN)
    chosen = record.items() if isinstance(record, dict) else ()
    return tuple(name for name, value in chosen if plain(settings.get(name)) == plain(value))


def chosen_anew(
    file: Mapping[str, Any], chosen: Iterable[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """`auto` for what the run of a file chose by settings that are now given other values."""
    changed = {name for name, value in given.items() if plain(value) != file.get(name)}
    rechosen: dict[str, Any] = {}
    for name, influences in CHOSEN_BY.items():
        if name in chosen and name not in given and changed.intersection(influences):
            rechosen[name] = "auto"
            changed.add(name)
    return rechosen


def recipe_of(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of the recipe that a source names, if it names one."""
    name = source.get("recipe")
    if name is not None:
        raise_together(one_of("recipe", name, tuple(RECIPES)))
        yield RECIPES[name]


def to_config(settings: Mapping[str, Any]) -> PretrainConfig:
    """The settings as a `PretrainConfig`, values turned into `plain` ones.

    Raises:
        ValueError: Values out of range, all at once.
    """
    return PretrainConfig(**{name: plain(value) for name, value in settings.items()})


def plain(value: Any) -> Any:
    """A value with tuples for lists, and with Python's numbers for those of NumPy."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def unknown_names(given: Iterable[str], where: str) -> Iterator[str]:
    """The error about each name that is no setting, with the nearest names."""
    for name in given:
        if name not in NAMES:
            dashed = str(name).replace("-", "_")
            usual = OTHER_NAMES.get(dashed)
            near = [usual] if usual else get_close_matches(dashed, NAMES, n=3, cutoff=0.5)
            hint = f"; perhaps {' or '.join(near)}" if near else ""
            yield f"{where}: {name!r} is no setting{hint}; `pixelcl pretrain --help-all` lists them"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: There is no such file, it holds no mapping, or a name in it is unknown.
    """
    content = read_settings_file(path)
    content.pop(CHOSEN, None)
    settings = {name: plain(value) for name, value in content.items()}
    if isinstance(settings.get("data"), str):
        settings["data"] = (settings["data"],)
    messages = (f"{path}: {message}" for message in check_limits(settings, CONFIG_LIMITS))
    raise_together(*unknown_names(content, str(path)), *messages)
    return settings


def resumed_settings(folder: Path) -> dict[str, Any]:
    """The settings that the run in a folder resumes with; empty if it has no `config.yaml`.

    Micro-batches that the run chose stay `auto`: its checkpoint has their number.
    """
    path = folder / run_layout.CONFIG
    settings = read_settings(path) if path.is_file() else {}
    if "accumulate" in chosen_in(path, settings):
        settings["accumulate"] = "auto"
    return settings


def as_yaml(config: PretrainConfig, chosen: Iterable[str] = ()) -> str:
    """The settings as the text of a `config.yaml`, without those that say how to start.

    ``chosen`` are the names of those that were `auto`.
    """
    settings, of_run = absolute_settings(config), set(chosen)
    values = {name: as_list(settings[name]) for name in NAMES if name not in HOW_TO_START}
    if of_run:
        values[CHOSEN] = {name: as_list(settings[name]) for name in NAMES if name in of_run}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)


def as_list(value: Any) -> Any:
    """A list for a tuple, a new one each time: YAML would write an alias for one that it knows."""
    return list(value) if isinstance(value, tuple) else value


def absolute_settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings by name, with absolute paths, to be read from anywhere."""
    return asdict(config) | {
        "model": absolute_model(config.model),
        "data": tuple("::".join(map(absolute, place.split("::"))) for place in config.data),
        "out": config.out and absolute(config.out),
        "weights": start_weights(config.weights),
        "probe": config.probe and absolute(config.probe),
        "colours": config.colours and absolute(config.colours),
    }


def start_weights(weights: str | None) -> str | None:
    """The weights that a run starts from, with an absolute path."""
    return weights if weights in (None, PRETRAINED) else absolute(weights)


def absolute(place: str) -> str:
    """A path made absolute; what is no path here, such as a URL, as it is."""
    if place.endswith(".tar") and "://" not in place and not place.startswith("pipe:"):
        return str(Path(place).expanduser().absolute())  # a pattern of shards, which is no path
    path = Path(place).expanduser()
    return (
        str(path.absolute()) if path.exists() or (path.parent.is_dir() and "/" in place) else place
    )


def differences(old: Mapping[str, Any], new: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings whose value changed: (old, new) by name.

    A run's folder may have moved, and with it the file of a model of one's own.
    """
    current = absolute_settings(new)
    if without_folder(str(old.get("model"))) == without_folder(new.model):
        current["model"] = old["model"]
    return {
        name: (old[name], current[name])
        for name in NAMES
        if name in old and name not in (*HOW_TO_START, "out") and old[name] != current[name]
    }


def without_folder(model: str) -> str:
    """A model's name without the folder that its file lies in."""
    file, colon, function = model.rpartition(":")
    return f"{Path(file).name}:{function}" if colon and file.endswith(".py") else model


def resume_changes(config: PretrainConfig, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from those ``before`` of the run that is resumed: (old, new) by name.

    Raises:
        ValueError: Its weights depend on one of them.
    """
    changed = differences(before, config)
    fixed = [name for name in FIXED if name in changed and changed[name][1] != "auto"]
    # What has no weight is not trained, and the optimiser does not know it.
    fixed += [n for n in ("alpha", "instance_weight") if n in changed and 0 in changed[n]]
    if fixed:
        changes = ", ".join(f"{n} from {changed[n][0]!r} to {changed[n][1]!r}" for n in fixed)
        raise ValueError(
            f"a run cannot resume with other weights: {changes}; leave these unchanged, or "
            "start a new run in another folder with --weights"
        )
    if "strategy" in changed and config.strategy == "fsdp":
        raise ValueError(
            "strategy is 'fsdp', but the run began without it: its optimiser state is not sharded; "
            "leave strategy unchanged, or start a new run in another folder with --weights"
        )
    return changed


def check_idle_changes(changed: Iterable[str], done: int, steps: int) -> None:
    """Refuse changed settings that no step would be trained with: config.yaml would be wrong."""
    changed = tuple(name for name in changed if name not in MACHINE)
    if not changed or done < steps:
        return
    length = {"steps", "epochs"}.intersection(changed)
    names = ", ".join(n for n in changed if not length or n not in (*length, *OF_LENGTH))
    idle = f": no steps are left to train with another {names}; leave that unchanged, or"
    raise ValueError(
        f"{counted(done, 'step')} done and {steps} wanted{idle if names else ';'} give --steps or "
        f"--epochs for more than {done}, or start a new run in another folder with "
        "--weights"
    )
