"""The command line: each command parses its flags, calls one function and prints the result.

Exit codes: 0 success; 1 failed, such as a full disk or a missing library; 2 wrong flags, settings
or files; 130 stopped by SIGINT (Ctrl-C); 143 stopped by SIGTERM. With `--json` standard output is
one JSON document; messages go to standard error in any case.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from io import TextIOWrapper
from json import dumps
from math import isfinite
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import tyro

from . import run_layout
from .arguments import parse_config, positionals_first
from .checks import ALLOW_COMMANDS, Pages, not_installed, one_of, raise_together
from .files import CannotWriteError
from .trainer.config import PretrainConfig


def print_json(content: object) -> None:
    """Print plain values, others as text, as one JSON document."""
    print(dumps(content, indent=1, ensure_ascii=False, default=str, allow_nan=False))


def pretrain(config: PretrainConfig, *, json: bool = False) -> None:
    """Pretrain a backbone on unlabelled images."""
    from .trainer.trainer import run

    result = run(config)
    writes = bool(result.metrics) if config.dry_run else result.backbone is not None
    if json and writes:
        figures = {n: value if isfinite(value) else None for n, value in result.metrics.items()}
        print_json({"run": None if config.dry_run else result.run_dir, "metrics": figures})
    elif config.dry_run:
        for name, value in result.metrics.items():
            print(f"{name}: {value:.4g}")
    elif writes:
        run_dir = quote(str(result.run_dir))
        print(f"run: {result.run_dir}")
        print(f"next: pixelcl visualize {run_dir}")
        print(f"      pixelcl evaluate {run_dir} --data LABELLED")


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
    """Compare weights with random ones, with labels (--data) or without (--images).

    Args:
        weights: One or more of: a run, an exported file, torchvision/NAME[=FILE],
            timm/NAME[=FILE], hf://OWNER/NAME or random:MODEL.
        data: Folder with images/{train,val} and masks/{train,val}.
        images: Folder of unlabelled images.
        protocol: How to evaluate with labels. linear, linear-all (a map of each stride), knn,
            hummingbird and overclustering read frozen features; finetune trains the network. By
            default linear, linear-all and knn; with --fractions also finetune.
        layers: Layers to read; by default the trained one.
        fraction: Fraction of the masks to use.
        fractions: Several fractions, for a label curve: mIoU against the number of masks.
        seeds: Number of seeds to repeat with; by default 3 for finetune and with --fractions,
            else 1.
        seed: The first seed.
        size: Size of the images: their shorter side, or height and width; without labels, size of
            the views.
        split: The images to evaluate on.
        steps: Steps of fine-tuning.
        out: Folder for evaluation.json (without labels: correspondence.json) and pictures.
        device: Device to compute on, such as cpu or cuda:1; by default a GPU if there is one.
        pages: How to read files with several pages or frames; by default as in the run.
        nodata: Value that means "not measured" in the images; by default as in the run.
        ids: Class id of each value in the masks, such as "0:0,255:1"; by default values are ids.
        colours: File with the class of each colour in the masks, one per line: 128 0 0 road.
        json: Print the content of evaluation.json instead of a table.
    """
    given = {name: value for name, value in locals().items() if name != "json"}
    from .evaluation.evaluate import evaluate as evaluated
    from .trainer.logging import logging_to

    with logging_to(terminal=True):  # fine-tuning takes a while: show each network's result
        result = evaluated(**given)
    if json:
        print(result.to_json(), end="")
        return
    print(result.table())
    print(result.sentence)
    if out is not None and result.curves:
        print(f"label curve: {Path(out) / run_layout.LABEL_CURVE}")
    if out is None and (Path(weights[-1]).expanduser() / run_layout.CONFIG).is_file():
        run = quote(weights[-1])
        print(f"(--out {run} keeps this with the run, for the report of `pixelcl visualize`)")


def features(
    weights: tyro.conf.Positional[str],
    images: tyro.conf.Positional[tuple[str, ...]],
    out: str,
    layer: str | None = None,
    format: Literal["npy", "safetensors", "zarr"] = "npy",  # noqa: A002  # it names the flag
    size: int | tuple[int, int] | None = None,
    pca: Literal[3] | None = None,
    device: str | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
    json: bool = False,
) -> None:
    """Write dense features of every image in a folder; run it again to continue.

    Args:
        weights: A run, an exported file, torchvision/NAME[=FILE], timm/NAME[=FILE],
            hf://OWNER/NAME or random:MODEL.
        images: Folders of images, text files of paths, or shards.
        out: Folder for the features and features.json, which describes them.
        layer: Layer to read; by default the trained one.
        format: npy and safetensors write one file per image, zarr (extra zarr) a group of arrays.
        size: Size of the images: their shorter side, or height and width.
        pca: 3 also draws the features as pictures, by their first three principal components.
        device: Device to compute on, such as cpu or cuda:1; by default a GPU if there is one.
        pages: How to read files with several pages or frames; by default as in the run.
        nodata: Value that means "not measured" in the images; by default as in the run.
        json: Print the content of features.json.
    """
    given = {name: value for name, value in locals().items() if name != "json"}
    from .trainer.logging import logging_to
    from .visualization.feature_files import features as written

    with logging_to(terminal=True):
        result = written(**given)
    if json:
        print(result.to_json(), end="")
        return
    print(f"features: {result.folder} ({result})")
    if pca is not None:
        print(f"pictures: {result.folder / run_layout.PICTURES}")


def visualize(
    run: tyro.conf.Positional[str],
    images: str | None = None,
    out: str | None = None,
    device: str | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
) -> None:
    """Write a report: one HTML page that shows what a run learned.

    Args:
        run: Folder of the run, or a file of its weights.
        images: Folder of images to show; by default those of the run.
        out: The HTML file; by default report.html in the run's folder.
        device: Device to compute on, such as cpu or cuda:1; by default a GPU if there is one.
        pages: How to read files with several pages or frames; by default as in the run.
        nodata: Value that means "not measured" in the images; by default as in the run.
    """
    given = dict(locals())
    from .trainer.logging import logging_to
    from .visualization.report import visualize as visualized

    with logging_to(terminal=True):  # the verdict
        print(f"report: {visualized(**given)}")


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
    ]
    | None = None,
    out: str | None = None,
    json: bool = False,
    push: str | None = None,
    private: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write a run's backbone for another library, or upload it to the Hugging Face Hub.

    Args:
        run: Folder of the run, its backbone.safetensors or a checkpoint of it.
        format: The library that will read it; by default the first of these that has the model:
            torchvision if it does, timm for its own, safetensors for most others.
        out: The file to write; by default backbone-FORMAT in the run's folder, for a checkpoint
            backbone-NAME-FORMAT.
        json: Print what was written, which keys matched and how to load it as JSON; with --push
            the files' sizes and the page.
        push: Upload it instead, with a page describing the run, to OWNER/NAME on the Hub;
            hf://OWNER/NAME then reads it. Not with --format or --out.
        private: With --push, make the repository private if it is new.
        licence: With --push, licence of the weights, such as mit or cc-by-4.0.
        dry_run: With --push, print what would be uploaded, and upload nothing.
    """
    of_push: dict[str, Any] = {"private": private, "licence": licence, "dry_run": dry_run}
    unread = of_push if push is None else {"format": format, "out": out}
    if given := ", ".join(f"--{name.replace('_', '-')}" for name, value in unread.items() if value):
        raise ValueError(
            f"{given} needs --push OWNER/NAME; add it, or leave {given} out"
            if push is None
            else f"{given} does not go with --push, which writes no file; leave one of them out"
        )
    if push is not None:
        from .backbones.push import push as pushed

        uploaded = pushed(run, push, **of_push)
        sizes = {name: len(content) for name, content in uploaded.files.items()}
        if json:
            print_json({**uploaded._asdict(), "files": sizes, "page": uploaded.page})
        else:
            print(uploaded)
        return
    from .backbones.export import export as exported

    result = exported(run, format, out)
    if json:
        print_json({**result._asdict(), "report": str(result.report)})
    else:
        print(result)


def prepare(
    data: tyro.conf.Positional[tuple[str, ...]],
    out: str,
    max_side: int | None = None,
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
    """Write images into shards, with large ones scaled down or cut, so that training decodes less.

    Run it again to continue after an interruption. With --tile, rasters, slides and all images
    larger than a tile are cut, in bounded memory.

    Args:
        data: Folders of images, text files of paths, or shards.
        out: Folder of the shards; give it to `pixelcl pretrain` afterwards.
        max_side: Longer side of the images in the shards, in pixels, by default 640; smaller ones
            stay unchanged. Not with --tile.
        quality: Quality of the JPEGs, 1 to 95.
        images_each: Images per shard.
        max_broken: Fraction of unreadable images above which it stops; unless it is 0, one may be.
        workers: Threads; by default one per core.
        pages: How to read files with several pages or frames, as for `pixelcl pretrain`.
        nodata: Value that means "not measured" in the images, such as -9999.
        tile: Side of the tiles that large images are cut into, in pixels; by default none is cut.
        overlap: How far neighbouring tiles overlap, in pixels.
        level: Level of pyramids and slides to cut; by default 0, the full image.
        mpp: Pixel size of the tiles, instead of a level: micrometres, or metres for a map.
        keep_empty: Keep tiles with nothing but nodata or plain background.
    """
    given = dict(locals())
    from .data.shard_writer import write_shards
    from .trainer.logging import logging_to

    with logging_to(terminal=True):
        report = write_shards(**given)
    print(report)


def layers(
    model: tyro.conf.Positional[str],
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
    json: bool = False,
) -> None:
    """List the layers of a model that the losses can read, and the defaults.

    Args:
        model: torchvision/NAME, timm/NAME, hf://OWNER/NAME, or your own path/to/file.py:function.
        image_size: Side of the views in pixels, or height and width.
        channels: Channels of the images.
        json: Print JSON instead of a table.
    """
    from .backbones.factory import build_backbone, default_layers, finer_layer, list_layers
    from .modules.feature_info import FeatureInfo

    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    net = build_backbone(model, channels=channels, image_size=size)
    info = FeatureInfo(net, channels, size)
    listed = list_layers(info)
    pixel = instance = None
    try:
        pixel, instance = default_layers(info)
        finer = finer_layer(info)
        both = f" (from random weights also {finer})" if finer else ""
        defaults = f"{pixel}{both} for the pixel level, {instance} for the instance level"
    except ValueError as error:
        defaults = str(error)
    if json:
        rows = [
            {"layer": layer.name, "type": layer.type_name, "stride": layer.stride}
            | {"channels": layer.channels, "cells": layer.grid}
            for layer in listed
        ]
        about = {"model": model, "image_size": size, "channels": channels, "layers": rows}
        print_json({**about, "pixel_layer": pixel, "instance_layer": instance})
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("layer", overflow="fold"), "type", "stride", "channels", "cells")
    for layer in listed:
        cells = f"{layer.grid[0]}x{layer.grid[1]}"
        table.add_row(layer.name, layer.type_name, f"{layer.stride:g}", str(layer.channels), cells)
    Console().print(table)
    print(f"by default: {defaults}")


def demo(out: str = "runs/demo", steps: int = 100, overwrite: bool = False) -> None:
    """Draw scenes, pretrain a ResNet-18 on them, evaluate it and write the report.

    Args:
        out: Folder for everything.
        steps: Pretraining steps.
        overwrite: Replace an earlier demo in the folder.
    """
    from .demo.demo import run_demo

    evaluation, report = run_demo(Path(out), steps=steps, overwrite=overwrite)
    print(evaluation.table())
    print(evaluation.sentence)
    print(f"label curve: {Path(out) / 'run' / run_layout.LABEL_CURVE}")
    print(f"report: {report}")


COMMANDS_FLAG = "--allow-commands"
"""The flag that lets shards be commands; never taken from a file, which may be somebody else's."""
COMMANDS = (pretrain, prepare, evaluate, features, visualize, export, layers, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with these arguments, by default those of the program; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # file names may hold bytes that are not text
        sys.stdout.reconfigure(errors="backslashreplace")
    if COMMANDS_FLAG in given:  # as a variable, which the other processes of a run inherit
        given.remove(COMMANDS_FLAG)
        os.environ[ALLOW_COMMANDS] = "1"
    try:
        if given[:1] == ["pretrain"]:
            words = [word for word in given[1:] if word != "--json"]
            pretrain(parse_config(words, pretrain.__doc__ or ""), json="--json" in given)
        elif given == ["--version"]:
            print(version("pixel-level-contrastive-learning"))
        else:
            known = {command.__name__: command for command in COMMANDS}
            if given and not given[0].startswith("-"):
                raise_together(one_of("command", given[0], known))
                given[1:] = positionals_first(known[given[0]], given[1:])
            tyro.extras.subcommand_cli_from_dict(
                known,
                prog="pixelcl",
                description="Pretrain a backbone at pixel level on your own images. "
                "(`pixelcl --version` prints the version.)",
                args=given or ["--help"],
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
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, OSError, MemoryError) as error:
        resume = given[:1] == ["pretrain"] and isinstance(error, CannotWriteError)
        print(f"error: {error}{' (continue the run with --resume)' * resume}", file=sys.stderr)
        return 1
    return 0
