"""The command line: each command parses its flags, calls one function and prints the result.

Exit codes: 0 success; 1 failed, such as a full disk or a missing library; 2 wrong flags, settings
or files; 130 stopped by SIGINT (Ctrl-C); 143 stopped by SIGTERM.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

import tyro

from . import run_layout
from .checks import Pages, not_installed
from .trainer.config import PretrainConfig
from .trainer.config_io import settings_of, to_config


def pretrain(config: PretrainConfig) -> None:
    """Pretrain a backbone on images without labels."""
    from .trainer.trainer import run

    result = run(config)
    if config.dry_run:
        for name, value in result.metrics.items():
            print(f"{name}: {value:.4g}")
    if result.backbone is not None:  # on the process that writes
        print(f"run: {result.run_dir}")


Protocol = Literal["linear", "linear-all", "knn", "hummingbird", "overclustering", "finetune"]


def evaluate(
    weights: tyro.conf.Positional[tuple[str, ...]],
    data: str | None = None,
    images: str | None = None,
    protocol: tuple[Protocol, ...] | None = None,
    layers: tuple[str, ...] | None = None,
    fraction: float = 1.0,
    fractions: tuple[float, ...] | None = None,
    seeds: int | None = None,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    split: str = "val",
    steps: int = 1000,
    out: str | None = None,
    device: str | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
    ids: str | None = None,
    colours: str | None = None,
    json: bool = False,
) -> None:
    """Evaluate weights beside random ones, with labels (--data) or without (--images).

    Args:
        weights: One or several: a run, an exported file, torchvision/NAME, timm/NAME,
            hf://OWNER/NAME or random:MODEL.
        data: Folder with images/{train,val} and masks/{train,val}.
        images: Folder of images without labels.
        protocol: How to evaluate with labels. linear, linear-all (a map of each stride), knn,
            hummingbird and overclustering read frozen features, finetune trains the network. By
            default linear, linear-all and knn; with --fractions finetune, too.
        layers: Layers to read; by default the one that was trained.
        fraction: Share of the masks to use.
        fractions: Several shares, for a label curve: mIoU over the number of masks.
        seeds: How many seeds to repeat with; by default 3 for finetune and with --fractions,
            else 1.
        seed: The first seed.
        size: Size of the images, their shorter side or height and width; without labels, size of
            the views.
        split: The images to evaluate on.
        steps: Steps of fine-tuning.
        out: Folder for evaluation.json (without labels: correspondence.json) and pictures.
        device: Device to compute on, such as cpu or cuda:1; by default a GPU if there is one.
        pages: What several pages or frames in a file are, as for `pixelcl pretrain`.
        nodata: Value of images where nothing was measured, such as -9999.
        ids: Ids of the values in the masks, such as "0:0,255:1"; by default values are ids.
        colours: File that names the class of each colour in the masks, one a line: 128 0 0 road.
        json: Print the content of evaluation.json instead of a table.
    """
    from .evaluation.evaluate import evaluate as evaluated
    from .trainer.logging import logging_to

    with logging_to(terminal=True):  # fine-tuning takes a while: show each network's result
        result = evaluated(
            weights,
            data=data,
            images=images,
            protocol=protocol,
            layers=layers,
            fraction=fraction,
            fractions=fractions,
            seeds=seeds,
            seed=seed,
            size=size,
            split=split,
            steps=steps,
            out=out,
            device=device,
            pages=pages,
            nodata=nodata,
            ids=ids,
            colours=colours,
        )
    if json:
        print(result.to_json(), end="")
        return
    print(result.table())
    print(result.sentence)
    if out is not None and result.curves:
        print(f"label curve: {Path(out) / run_layout.LABEL_CURVE}")
    if out is None and (Path(weights[-1]).expanduser() / run_layout.CONFIG).is_file():
        print(
            f"(--out {weights[-1]} keeps this with the run, for the report of `pixelcl visualize`)"
        )


def visualize(
    run: tyro.conf.Positional[str],
    images: str | None = None,
    out: str = "report.html",
    device: str | None = None,
) -> None:
    """Write a report: one HTML page that shows what a run learned.

    Args:
        run: Folder of the run.
        images: Folder of images to show; by default those of the run.
        out: The HTML file.
        device: Device to compute on, such as cpu or cuda:1; by default a GPU if there is one.
    """
    from .visualization.report import visualize as visualized

    print(f"report: {visualized(run, images=images, out=out, device=device)}")


def export(
    run: tyro.conf.Positional[str],
    format: Literal[  # noqa: A002  # it names the flag
        "torchvision",
        "timm",
        "safetensors",
        "state-dict",
        "smp",
        "mmseg",
        "detectron2",
        "onnx",
        "transformers",
    ] = "torchvision",
    out: str | None = None,
    push: str | None = None,
    private: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write a run's backbone for another library, or upload it to the Hugging Face Hub.

    Args:
        run: Folder of the run, or its backbone.safetensors.
        format: The library that is to read it.
        out: The file to write; by default backbone-FORMAT in the run's folder.
        push: Instead, upload it with a page written from the run to OWNER/NAME on the Hub;
            hf://OWNER/NAME then reads it.
        private: With --push, make the repository private if it is new.
        licence: With --push, licence of the weights, such as mit or cc-by-4.0.
        dry_run: With --push, print what would be uploaded, and upload nothing.
    """
    if push is not None:
        from .backbones.push import push as pushed

        print(pushed(run, push, private=private, licence=licence, dry_run=dry_run))
        return
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
    pages: Pages | None = None,
    nodata: float | None = None,
    tile: int | None = None,
    overlap: int = 0,
    level: int | None = None,
    mpp: float | None = None,
    keep_empty: bool = False,
) -> None:
    """Write images into shards, large ones scaled down or cut, so that training decodes less.

    Run it again to continue after an interruption. With --tile, rasters, slides and all images
    larger than a tile are cut, in bounded memory.

    Args:
        data: Folders of images, text files of paths, or shards.
        out: Folder of the shards; give it to `pixelcl pretrain` afterwards.
        max_side: Longer side of the images in the shards, in pixels; smaller ones are kept as are.
        quality: Quality of the JPEGs, 1 to 95.
        images_each: Images per shard.
        max_broken: Share of images that may be unreadable before it stops; unless it is 0, one may.
        workers: Threads; by default one per core.
        pages: What several pages or frames in a file are, as for `pixelcl pretrain`.
        nodata: Value of images where nothing was measured, such as -9999.
        tile: Side of the tiles that large images are cut into, in pixels; by default none is cut.
        overlap: How far neighbouring tiles overlap, in pixels.
        level: Level of pyramids and slides to cut; by default 0, the full image.
        mpp: Size of a tile's pixels, in place of a level: micrometres, or metres of a map.
        keep_empty: Keep tiles that hold nothing but nodata or plain background.
    """
    from .data.shard_writer import write_shards
    from .trainer.logging import logging_to

    with logging_to(terminal=True):
        report = write_shards(
            data,
            out,
            max_side=max_side,
            quality=quality,
            images_each=images_each,
            max_broken=max_broken,
            workers=workers,
            pages=pages,
            nodata=nodata,
            tile=tile,
            overlap=overlap,
            level=level,
            mpp=mpp,
            keep_empty=keep_empty,
        )
    print(report)


def layers(
    model: tyro.conf.Positional[str],
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
) -> None:
    """List the layers of a model that the losses can read, and the default ones.

    Args:
        model: torchvision/NAME, timm/NAME, hf://OWNER/NAME, or your own path/to/file.py:function.
        image_size: Side of the views in pixels, or height and width.
        channels: Channels of the images.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from .backbones.factory import build_backbone, default_layers, list_layers

    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    net = build_backbone(model, channels=channels, image_size=size)
    table = Table(Column("layer", overflow="fold"), "type", "stride", "channels", "cells")
    for layer in list_layers(net, channels, size):
        cells = f"{layer.grid[0]}x{layer.grid[1]}"
        table.add_row(layer.name, layer.type_name, f"{layer.stride:g}", str(layer.channels), cells)
    Console().print(table)
    try:
        pixel, instance = default_layers(net, channels, size)
        defaults = f"{pixel} for the pixel level, {instance} for the instance level"
    except ValueError as error:
        defaults = str(error)
    print(f"by default: {defaults}")


def demo(out: str = "runs/demo", steps: int = 100, overwrite: bool = False) -> None:
    """Draw scenes, pretrain a ResNet-18 on them, evaluate it and write the report.

    Args:
        out: Folder for all of it.
        steps: Steps of pretraining.
        overwrite: Replace an earlier demo in the folder.
    """
    from .demo.demo import run_demo

    evaluation, report = run_demo(Path(out), steps=steps, overwrite=overwrite)
    print(evaluation.table())
    print(evaluation.sentence)
    print(f"label curve: {Path(out) / 'run' / run_layout.LABEL_CURVE}")
    print(f"report: {report}")


COMMANDS = (pretrain, prepare, evaluate, visualize, export, layers, demo)


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


def parse_config(arguments: Sequence[str]) -> PretrainConfig:
    """The settings from flags, and from the file, recipe or resumed run that they name."""
    flags = base_flags(arguments)
    base = to_config(settings_of(flags))
    parsed = tyro.cli(
        PretrainConfig,
        prog="pixelcl pretrain",
        description=pretrain.__doc__,
        args=list(arguments),
        default=base,
        # With --no-X for each switch --X, which a recipe or a resumed run may have turned on.
        config=(tyro.conf.OmitArgPrefixes,),
    )
    before, now = asdict(base), asdict(parsed)
    given = {name: value for name, value in now.items() if value != before[name]}
    return to_config(settings_of(flags | given))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with these arguments, by default those of the program; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # file names may hold bytes that are not text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if given[:1] == ["pretrain"]:
            pretrain(parse_config(given[1:]))
        else:
            tyro.extras.subcommand_cli_from_dict(
                {command.__name__: command for command in COMMANDS},
                prog="pixelcl",
                description="Pretrain a backbone at pixel level on your own images.",
                args=given,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
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
    except (RuntimeError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
