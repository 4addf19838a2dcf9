"""The command line: each command parses, calls one function and prints what came back."""

from __future__ import annotations

import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

import tyro

from .checks import not_installed
from .trainer.config import PretrainConfig
from .trainer.config_io import settings_of, to_config

OPTIONS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def pretrain(config: PretrainConfig) -> None:
    """Pretrain a backbone on images without labels."""
    from .trainer.trainer import run

    result = run(config)
    if config.dry_run:
        for name, value in result.metrics.items():
            print(f"{name}: {value:.4g}")
    if result.backbone is not None:  # on the one process that writes
        print(f"run: {result.run_dir}")


def evaluate(
    weights: tyro.conf.Positional[str],
    data: str | None = None,
    images: str | None = None,
    protocol: Literal["linear", "knn", "finetune"] = "linear",
    layers: tuple[str, ...] | None = None,
    fraction: float = 1.0,
    seeds: int | None = None,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    split: str = "val",
    steps: int = 200,
    out: str | None = None,
    device: str | None = None,
) -> None:
    """Say what weights are worth, beside random ones: with labels or without.

    Args:
        weights: A run, an exported file, torchvision/NAME, timm/NAME or random:MODEL.
        data: Folder with images/{train,val} and masks/{train,val}.
        images: Folder of images without labels.
        protocol: How to probe.
        layers: Layers to probe; the one that was trained where none is named.
        fraction: Share of the masks to use.
        seeds: How often to repeat, each time with the next seed; 3 for finetune, else 1.
        seed: The first seed.
        size: What images are fed at: the shorter side, or height and width; without labels the
            size of the views.
        split: Which images to judge by.
        steps: Updates of fine-tuning.
        out: Folder for evaluation.json, without labels correspondence.json, and pictures.
        device: Where to compute, such as cpu or cuda:1; a GPU where there is one and none is named.
    """
    from .evaluation.evaluate import evaluate as evaluated
    from .trainer.logging import logging_to

    with logging_to(terminal=True):  # fine-tuning takes a while: each network's figure as it comes
        found = evaluated(
            weights,
            data=data,
            images=images,
            protocol=protocol,
            layers=layers,
            fraction=fraction,
            seeds=seeds,
            seed=seed,
            size=size,
            split=split,
            steps=steps,
            out=out,
            device=device,
        )
    print(found.table())
    print(found.sentence)
    if out is None and (Path(weights).expanduser() / "config.yaml").is_file():
        print(f"(--out {weights} keeps this with the run, for the report of `pixelcl visualize`)")


def visualize(
    run: tyro.conf.Positional[str],
    images: str | None = None,
    out: str = "report.html",
    device: str | None = None,
) -> None:
    """Write one page that shows what a run learned.

    Args:
        run: Folder of the run.
        images: Folder of images to show; those of the run where none is named.
        out: The page.
        device: Where to compute, such as cpu or cuda:1; a GPU where there is one and none is named.
    """
    from .visualization.report import visualize as visualized

    print(f"report: {visualized(run, images=images, out=out, device=device)}")


def export(
    run: tyro.conf.Positional[str],
    format: Literal[  # noqa: A002  # it names the flag
        "torchvision", "timm", "safetensors", "state-dict", "smp", "mmseg", "detectron2"
    ] = "torchvision",
    out: str | None = None,
) -> None:
    """Write a run's backbone for another library.

    Args:
        run: Folder of the run, or its backbone.safetensors.
        format: Who is to read it.
        out: The file; beside the backbone where none is named.
    """
    from .backbones.export import export as exported

    print(exported(run, format, out))


def prepare(
    data: tyro.conf.Positional[tuple[str, ...]],
    out: str,
    max_side: int = 640,
    quality: int = 90,
    images_each: int = 1000,
    max_broken: float = 0.01,
    workers: int | None = None,
) -> None:
    """Write images into shards once, large ones made smaller, so that training decodes less.

    Call it again to go on with what was cut off.

    Args:
        data: Folders of images, text files of paths, or shards.
        out: Folder of the shards; give it to `pixelcl pretrain` afterwards.
        max_side: Longer side of the images in the shards, in pixels; smaller ones are kept as are.
        quality: Of the JPEGs written, 1 to 95.
        images_each: Images a shard.
        max_broken: Share of images that may be unreadable before it stops; unless it is 0, one may.
        workers: Threads; one for each core where none is given.
    """
    from .data.shard_writer import pack
    from .trainer.logging import logging_to

    with logging_to(terminal=True):
        packed = pack(
            data,
            out,
            max_side=max_side,
            quality=quality,
            images_each=images_each,
            max_broken=max_broken,
            workers=workers,
        )
    print(packed)


def layers(
    model: tyro.conf.Positional[str],
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
) -> None:
    """List the layers of a model that can be tapped, and which are where none is named.

    Args:
        model: torchvision/NAME, timm/NAME, or your own path/to/file.py:function.
        image_size: Side of the views in pixels, or height and width.
        channels: Channels of the images.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from .backbones.factory import build_backbone, default_layers, tappable_layers

    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    net = build_backbone(model, channels=channels, image_size=size)
    table = Table(Column("layer", overflow="fold"), "type", "stride", "channels", "cells")
    for layer in tappable_layers(net, channels, size):
        cells = f"{layer.grid[0]}x{layer.grid[1]}"
        table.add_row(layer.name, layer.type_name, f"{layer.stride:g}", str(layer.channels), cells)
    Console().print(table)
    try:
        pixel, instance = default_layers(net, channels, size)
        taken = f"{pixel} for the pixel level, {instance} for the instance level"
    except ValueError as error:
        taken = str(error)
    print(f"where none is named: {taken}")


def demo(out: str = "runs/demo", steps: int = 100, overwrite: bool = False) -> None:
    """Draw scenes, pretrain a ResNet-18 on them, evaluate it and write the report.

    Args:
        out: Folder for all of it.
        steps: Steps of pretraining.
        overwrite: Replace what an earlier demo left there.
    """
    from .demo.demo import run_demo

    evaluation, report = run_demo(Path(out), steps=steps, overwrite=overwrite)
    print(evaluation.table())
    print(evaluation.sentence)
    print(f"report: {report}")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (pretrain, prepare, evaluate, visualize, export, layers, demo)
}


def starting_points(arguments: Sequence[str]) -> dict[str, object]:
    """The flags that name settings to start from: the run that is resumed, a file, a recipe."""
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--out", "--config", "--recipe"):
        first.add_argument(flag)
    first.add_argument("--resume", action="store_true")
    try:
        named = vars(first.parse_known_args(list(arguments))[0])
    except ArgumentError:  # a flag without its value, which is told by the parser of all flags
        return {}
    return {name: value for name, value in named.items() if value}


def chosen(arguments: Sequence[str]) -> PretrainConfig:
    """The settings that flags, files and recipes come to.

    Raises:
        ValueError: A file or recipe that there is not, or values out of range.
    """
    named = starting_points(arguments)
    base = to_config(settings_of(named))
    parsed = tyro.cli(
        PretrainConfig,
        prog="pixelcl pretrain",
        description=pretrain.__doc__,
        args=list(arguments),
        default=base,
        # With both forms of each switch: a recipe or a run may have turned on what a flag repeats.
        config=(tyro.conf.OmitArgPrefixes,),
    )
    before, now = asdict(base), asdict(parsed)
    given = {name: value for name, value in now.items() if value != before[name]}
    return to_config(settings_of(named | given))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    Args:
        arguments: What follows the name of the program; default: what it was started with.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if given[:1] == ["pretrain"]:
            pretrain(chosen(given[1:]))
        else:
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="pixelcl",
                description="Pretrain a backbone at pixel level on your own images.",
                args=given,
                config=OPTIONS,
            )
    except ValueError as error:  # the user's mistake
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error.name)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, MemoryError) as error:  # what went wrong on the way
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
