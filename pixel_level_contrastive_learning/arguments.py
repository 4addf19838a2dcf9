"""Command-line arguments: their order, the settings of a run in them, and the help.

Imports no torch.
"""

from __future__ import annotations

import ast
import re
import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, make_dataclass
from difflib import get_close_matches
from inspect import cleandoc
from itertools import pairwise, takewhile
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from .checks import raise_together
from .trainer import config
from .trainer.config import NAMES, PretrainConfig
from .trainer.config_io import OTHER_NAMES, settings_of, to_config, unknown_names

GROUP_FROM = {
    "data": "run",
    "pages": "data",
    "model": "network",
    "image_size": "views",
    "loss": "loss",
    "batch_size": "training",
    "workers": "machine",
    "checkpoint_every": "run",
}
"""The group of settings that begins with a setting."""
FIRST = (
    *("data", "out", "resume", "overwrite", "dry_run", "model", "weights", "image_size", "loss"),
    *("epochs", "steps", "batch_size", "lr", "workers", "devices", "probe"),
)
"""The settings that `--help` lists; `--help-all` lists all."""
MORE = {
    "help_all": "List all flags, not only those that matter most.",
    "allow_commands": "Run shards that are commands (pipe:...) in a shell.",
    "json": "Print the metrics as JSON; with --dry-run, its figures.",
}
"""Flags that are not settings."""
NUMBERS = {int: "a whole number", float: "a number"}
HELP = ("-h", "--help", "--help-all")


def positionals_first(command: Callable[..., object], words: Sequence[str]) -> list[str]:
    """The words of a command with the positional ones first.

    A flag of several values would take those behind it, too. It takes what can be a value of it.

    Args:
        command: The function or class whose parameters the flags are.
        words: What was typed after its name.

    Raises:
        ValueError: Values that their flags cannot have, all at once; a flag of several texts took
            every word, and none is left for the first positional parameter.
    """
    hints = get_type_hints(command, include_extras=True)
    first: list[str] = []
    flags: list[str] = []
    wrong: list[str] = []
    greedy: dict[str, list[str]] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not is_flag(word):
            first.append(word)
            continue
        following = list(takewhile(lambda other: not is_flag(other), left))
        hint = hints.get(word.removeprefix("--").replace("-", "_"))
        if hint is not None:
            following = values_of(hint, following)
            wrong += [refused(word, value, hint) for value in following if not fits(hint, value)]
        elif word.startswith("--no-") or "=" in word:
            following = []
        del left[: len(following)]
        flags += [word, *following]
        if len(following) > 1 and str in leaves(hint):
            greedy[word] = following
    raise_together(*wrong)
    positional = next((name.upper() for name, hint in hints.items() if is_positional(hint)), "")
    elsewhere = {"--resume", "--config", *HELP} & {flag.partition("=")[0] for flag in flags}
    if positional and not first and greedy and not elsewhere:
        flag, taken = next(iter(greedy.items()))
        raise ValueError(
            f"{flag} took {' and '.join(map(repr, taken))}, and nothing is left for {positional}; "
            f"put it first: {taken[-1]} {flag} {' '.join(taken[:-1])}"
        )
    return first + flags


def is_flag(word: str) -> bool:
    """Whether a word is a flag, and not a number below 0."""
    return word.startswith("-") and len(word) > 1 and not can_be(float, word)


def is_positional(hint: Any) -> bool:
    """Whether the parameter of a type is given by place; the others are flags."""
    return hasattr(hint, "__metadata__")


def values_of(hint: Any, words: list[str]) -> list[str]:
    """The words that a flag takes of those behind it, the first of them right or wrong."""
    most = most_values(hint)
    if get_origin(hint) is tuple and Ellipsis not in get_args(hint):
        return words[:most]
    more = takewhile(lambda word: fits(hint, word), words[1:most])
    return words[: min(1, most) + len(list(more))]


def most_values(hint: Any) -> int:
    """How many words a flag of a type takes at most."""
    parts = get_args(hint)
    if hint is bool:
        return 0
    if get_origin(hint) is tuple:
        return len(parts) if Ellipsis not in parts else sys.maxsize
    return 1 if get_origin(hint) is Literal else max(map(most_values, parts), default=1)


def leaves(hint: Any) -> list[Any]:
    """The types and the literal values that a type is made of."""
    parts = [part for arg in get_args(hint) for part in leaves(arg)] if get_args(hint) else [hint]
    return [part for part in dict.fromkeys(parts) if part is not Ellipsis]


def fits(hint: Any, word: str) -> bool:
    """Whether a word can be a value of a type."""
    return any(can_be(kind, word) for kind in leaves(hint))


def can_be(kind: Any, word: str) -> bool:
    """Whether a word can be a value of a plain type, or is a literal one."""
    if kind not in (int, float):
        return kind is str or word == ("None" if kind is NoneType else str(kind))
    try:
        kind(word)
    except ValueError:
        return False
    return True


def refused(flag: str, word: str, hint: Any) -> str:
    """The error message about a value that a flag cannot have."""
    kinds = [kind for kind in leaves(hint) if kind is not NoneType]
    allowed = [NUMBERS.get(kind) or repr(kind) for kind in kinds]
    near = get_close_matches(word, map(str, kinds), n=1)
    perhaps = f" (perhaps {near[0]!r})" if near else ""
    return f"{flag} is {word!r}; it must be {' or '.join(allowed)}{perhaps}"


def base_flags(arguments: Sequence[str]) -> dict[str, object]:
    """The flags that give other settings their defaults: a resumed run, a file, a recipe."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--out", "--config", "--recipe"):
        parser.add_argument(flag)
    parser.add_argument("--resume", action="store_true")
    try:
        flags = vars(parser.parse_known_args(list(arguments))[0])
    except ArgumentError:  # a flag without its value, which the parser of all flags reports
        return {}
    return {name: value for name, value in flags.items() if value}


def parse_config(arguments: Sequence[str], about: str = "") -> PretrainConfig:
    """The settings from flags, and from the file, recipe or resumed run that they name.

    Args:
        arguments: What was typed after `pretrain`.
        about: What the command does, for the help.
    """
    if set(HELP) & set(arguments):
        print_help(about, whole="--help-all" in arguments)
    arguments = positionals_first(PretrainConfig, arguments)
    typed = {word.partition("=")[0].replace("-", "_") for word in arguments if is_flag(word)}
    raise_together(*unknown_names([n[2:] for n in typed if n[2:] in OTHER_NAMES], "flags"))
    flags = base_flags(arguments)
    base = to_config(settings_of(flags))
    parsed = tyro.cli(
        PretrainConfig,
        prog="pixelcl pretrain",
        description=about,
        args=arguments,
        default=base,
        # With --no-X for each switch --X, which a recipe or a resumed run may have turned on.
        config=(tyro.conf.OmitArgPrefixes,),
    )
    before, now = asdict(base), asdict(parsed)
    given = {n: value for n, value in now.items() if value != before[n] or f"__{n}" in typed}
    return to_config(settings_of(flags | given))


def print_help(about: str, *, whole: bool) -> None:
    """Print the settings of a run in groups, those that matter first or all; ends the program."""
    texts, hints = setting_texts(), get_type_hints(PretrainConfig, include_extras=True)
    groups: dict[str, list[Any]] = {}
    group = ""
    for name in NAMES:
        group = GROUP_FROM.get(name, group)
        if not whole and name not in FIRST:
            continue
        hint, default = hints[name], getattr(PretrainConfig, name)
        shown = default not in (None, ()) and default is not False
        text = tyro.conf.arg(
            help=texts[name],
            help_behavior_hint=f"(default: {default})" if shown else "",
            metavar=None if hint is bool else metavar(hint),
        )
        groups.setdefault(group, []).append((name, Annotated[hint, text], field(default=default)))
    parts: list[Any] = []
    for name, about_it in MORE.items():
        text = tyro.conf.arg(help=about_it, help_behavior_hint="")
        parts.append((name, Annotated[bool, text], field(default=False)))
    for group, settings in groups.items():
        section = make_dataclass(group, settings, frozen=True)
        parts.append((group, section, field(default_factory=section)))
    tyro.cli(
        make_dataclass("Settings", parts),
        prog="pixelcl pretrain",
        description=about,
        args=["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def setting_texts() -> dict[str, str]:
    """The docstring of each setting, a line a sentence at most."""
    body = ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body
    [settings] = (node for node in body if getattr(node, "name", "") == PretrainConfig.__name__)
    assert isinstance(settings, ast.ClassDef)
    return {
        one.target.id: re.sub(r"(?<!\.)\n", " ", cleandoc(two.value.value))
        for one, two in pairwise(settings.body)
        if isinstance(one, ast.AnnAssign)
        and isinstance(one.target, ast.Name)
        and isinstance(two, ast.Expr)
        and isinstance(two.value, ast.Constant)
        and isinstance(two.value.value, str)
    }


def metavar(hint: Any) -> str:
    """How the values of a type are written in the help."""
    if is_positional(hint):
        return "DATA ..."
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        one, *more = map(metavar, (arg for arg in get_args(hint) if arg is not Ellipsis))
        return " ".join([one, *more]) if more else f"{one} ..."
    parts = [metavar(arg) for arg in get_args(hint) if arg is not NoneType]
    return "|".join(parts) if parts else str(hint.__name__).upper()
