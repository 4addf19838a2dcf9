"""`features`: dense features of every image as files, and pictures of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import count, islice
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..backbones.checkpoint import is_file
from ..backbones.custom import Model, handing_over
from ..backbones.state_dict import tensors_of
from ..checks import Pages, counted, import_extra, one_of, raise_together, size_pair
from ..data.image import ImageError, LazyImage
from ..data.loader import cores, in_order
from ..data.sources import Source, file_of, file_state, open_source
from ..evaluation.baselines import random_net, read_all, reading_of
from ..evaluation.correspondence import evenly, left_out, none_left
from ..evaluation.features import Preparation, Reader, Size, chosen_device, in_parts
from ..evaluation.probes import finite_features
from ..files import check_writable, sole_writer, write_whole
from ..run_layout import FEATURES, LOCK, MAPS, PICTURES, ZARR_MAPS
from .matches import to_pil
from .pca import Basis, pca_colours

log = logging.getLogger(__name__)

Format = Literal["npy", "safetensors", "zarr"]
BATCH = 16
"""Images of one size that are run at once, at most."""
SAVED_EVERY, TIMES_SAVING = 10, 10
"""Seconds after which the index is written again, and times what writing it took, which a long one
needs: a killed process loses no more work."""
THREADS = cores()
PROGRESS_EVERY = 30
"""Seconds from one line about the progress to the next."""
MAPS_OF_BASIS, CELLS_OF_BASIS = 64, 1024
"""Maps that the colours of all are found from, and cells of each of them."""


class Identity(NamedTuple):
    """What tells an image from others, and itself from what it was before."""

    path: str
    state: str


class Prepared(NamedTuple):
    """An image as the network is fed it, the ``(height, width)`` that it has, and which it is."""

    pixels: Tensor
    size: Size
    identity: Identity


@dataclass
class FeatureFolder:
    """Dense features of images in a folder.

    Attributes:
        folder: The folder.
        index: The content of its ``features.json``: ``layer``, ``channels``, ``normalisation`` and
            so on, and ``images``, with an entry for each: its ``name``, its ``path`` and the
            ``state`` of its file (see `identity_of`), its ``file`` of features, its ``size``, the
            size it was ``fed`` at, its ``grid`` of cells and the ``stride`` of a cell in fed
            pixels, each ``[height, width]``.
    """

    folder: Path
    index: dict[str, Any]

    def __len__(self) -> int:
        return len(self.index["images"])

    def __str__(self) -> str:
        images, channels = counted(len(self), "image"), counted(self.index["channels"], "channel")
        return f"{images}, {self.index['layer']}, {channels}"

    def map(self, number: int) -> Tensor:
        """The features ``(channels, h, w)`` float32 of an image, by its position in the index."""
        path = self.folder / self.index["images"][number]["file"]
        if self.index["format"] == "safetensors":
            return load_file(path)["features"]
        array = np.load(path) if path.suffix == ".npy" else import_extra("zarr").open(path)[:]
        return torch.from_numpy(array)

    def picture(self, number: int) -> Path:
        """Where the picture of an image's features is, if it was drawn."""
        return self.folder / PICTURES / f"{Path(self.index['images'][number]['file']).stem}.png"

    def forget(self, states: Mapping[str, str]) -> dict[str, int]:
        """Drop what is not whole from the index: maps that are gone, and those of other images.

        Args:
            states: The state that images have now, by their path.

        Returns:
            The numbers of maps to write anew, by the path of their image, so that no old one stays.
        """
        kept: list[dict[str, Any]] = []
        rewritten: dict[str, int] = {}
        for entry in self.index["images"]:
            if (
                "state" in entry  # not in an index of an older version
                and states.get(entry["path"], entry["state"]) == entry["state"]
                and (self.folder / entry["file"]).exists()
            ):
                kept.append(entry)
            elif entry.get("path") in states:
                rewritten[entry["path"]] = number_of(entry)
        self.index["images"] = kept
        return rewritten

    def free_numbers(self, taken: Collection[int]) -> Iterator[int]:
        """Numbers that no map's file begins with, nor are otherwise taken, in order."""
        used = {*taken, *map(number_of, self.index["images"])}
        return (number for number in count() if number not in used)

    def write(self, number: int, name: str, features: Tensor, image: Prepared) -> None:
        """Write the features ``(channels, h, w)`` of an image, and note them in the index."""
        kind = self.index["format"]
        stem = f"{number:06d}_{''.join(c if c.isalnum() else '_' for c in Path(name).stem)[:60]}"
        array = features.cpu().contiguous()
        file = f"{ZARR_MAPS}/{stem}" if kind == "zarr" else f"{MAPS}/{stem}.{kind}"
        if kind == "zarr":
            group = import_extra("zarr").open_group(self.folder / ZARR_MAPS, mode="a")
            group.create_array(stem, data=array.numpy(), overwrite=True)
        elif kind == "npy":
            write_whole(self.folder / file, lambda stream: np.save(stream, array.numpy()))
        else:
            write_whole(self.folder / file, save({"features": array}))
        size, fed, grid = map(list, (image.size, image.pixels.shape[-2:], array.shape[-2:]))
        stride = [round(a / b, 4) for a, b in zip(fed, grid, strict=True)]
        entry = {"name": name, **image.identity._asdict(), "file": file, "size": size, "fed": fed}
        self.index["images"].append(entry | {"grid": grid, "stride": stride})

    def save_index(self) -> None:
        """Write the index."""
        write_whole(self.folder / FEATURES, self.to_json())

    def to_json(self) -> str:
        """The index as JSON text."""
        return json.dumps(self.index, ensure_ascii=False) + "\n"

    @classmethod
    def opened(cls, folder: Path, weights: str, settings: Mapping[str, Any]) -> Self:
        """A new folder, or what an interrupted process left of one with the same settings.

        Raises:
            ValueError: The folder holds something else.
        """
        path = folder / FEATURES
        if path.is_file():
            try:
                index = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path} is not a file of pixelcl features ({error}); delete {folder}, or "
                    "choose another folder"
                ) from error
            expected = json.loads(json.dumps(settings))  # with lists in place of tuples
            if different := [name for name, value in expected.items() if index.get(name) != value]:
                raise ValueError(
                    f"out is {str(folder)!r}, which holds features with other settings "
                    f"({', '.join(different)}); choose another folder, or delete this one"
                )
            return cls(folder, index)
        if any(path.name != LOCK for path in folder.glob("*")):
            raise ValueError(
                f"out is {str(folder)!r}, which holds other files; choose a new or empty folder"
            )
        return cls(folder, {"weights": weights, **settings, "images": [], "left_out": []})


def features(
    weights: str | Path,
    images: Any,
    *,
    out: str | Path,
    layer: str | None = None,
    format: Format = "npy",  # noqa: A002  # it names the flag
    size: int | Size | None = None,
    pca: Literal[3] | None = None,
    device: str | None = None,
    model: Model | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
) -> FeatureFolder:
    """Dense features of every image, one file each, with an index that describes them.

    The same call continues after an interruption and adds new images, normalised like the earlier
    ones. Images whose file has changed in size or modification time (in memory: in its pixels) are
    read again, as is everything in a folder written by a version that did not record these.

    Args:
        weights: A run, a file of `save_backbone` or `export`, ``torchvision/NAME[=FILE]``,
            ``timm/NAME[=FILE]``, ``hf://OWNER/NAME`` or ``random:MODEL``, see `read_backbone`.
        images: A folder, a list of paths and so on, as for `pretrain`.
        out: Folder for the files: new, empty, or that of an earlier call with the same settings.
        layer: The layer. Default: the trained one, else the deepest map.
        format: ``npy`` and ``safetensors`` (key ``features``) write one file per image, ``zarr`` a
            group with one array per image; all ``(channels, h, w)`` float32.
        size: Size at which images are fed: the shorter side in pixels, or exactly
            ``(height, width)``. Default: 1.4 times the views in training.
        pca: 3 also draws each image's features as a picture: the first three principal components
            of all images as red, green and blue.
        device: Where to compute; default: a GPU if there is one.
        model: As for `load_backbone`.
        pages: How files with several images are read. Default: as in the run.
        nodata: Value that means "not measured", likewise.

    Returns:
        The folder; read its maps with ``map``.

    Raises:
        ValueError: Values out of range, no such weights, layer or images, or ``out`` holds
            something else.
        ModuleNotFoundError: ``zarr`` is requested but not installed.
        CannotWriteError: The disk is full, or similar.
        DivergedError: The network's features are NaN or infinite.
    """
    raise_together(
        one_of("format", format, get_args(Format)),
        None if size is None else size_pair("size", size),
        None if pca is None else one_of("pca", pca, (3,)),
    )
    if format == "zarr":
        import_extra("zarr")
    check_writable("out", out)
    place = chosen_device(device)
    reading = reading_of([weights], pages=pages, nodata=nodata)
    source = open_source(images, leave_out=out, **reading)
    with handing_over(model):
        [(net, card, _)] = read_all([weights], source)
        if str(weights).startswith("random:"):
            net = random_net(card, seed=0)  # the same ones when the call is repeated
    net.to(place)
    reader = Reader(net, (layer and [layer]) or [card.shown_layer], card.channels, card.image_size)
    prepare = Preparation.of(card, size, net)
    normalisation = {name: getattr(card, name) for name in ("mean", "std", "low", "high")}
    fixed = {"normalisation": normalisation} if is_file(weights) else {}  # else it is measured
    settings = {
        "model": card.model,
        "weights_digest": weights_digest(net),
        "layer": reader.layers[0],
        "channels": reader.channels(),
        "format": format,
        "size": prepare.size,
        **reading,
    }
    folder = Path(out).expanduser()
    with sole_writer(folder / LOCK):
        feature_folder = FeatureFolder.opened(folder, str(weights), settings | fixed)
        # New images share the normalisation of the earlier ones.
        statistics = feature_folder.index.setdefault("normalisation", normalisation)
        statistics = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in statistics.items()
        }
        prepare = replace(prepare, statistics=replace(prepare.statistics, **statistics))
        write_maps(feature_folder, source, prepare, reader)
        if pca is not None:
            draw_pictures(feature_folder)
    return feature_folder


def number_of(entry: Mapping[str, Any]) -> int:
    """The number that the file of an entry's map begins with."""
    return int(Path(entry["file"]).name.split("_")[0])


def weights_digest(net: nn.Module) -> str:
    """A short text that other weights do not have."""
    digest = blake2b(digest_size=8)
    for name, value in sorted(tensors_of(net).items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity_of(source: Source, index: int, image: LazyImage | None = None) -> Identity:
    """The absolute path of an image, and size and time of its file; in memory a digest of it."""
    name, file = source.name(index), file_of(source, index)
    if file is not None:
        return Identity(os.path.abspath(name), file_state(file))
    with suppress(OSError, ImageError):  # which is reported where the image is read
        pixels = (image or source.open(index)).read()
        content = repr(pixels.shape).encode() + pixels.numpy().tobytes()
        return Identity(name, blake2b(content, digest_size=8).hexdigest())
    return Identity(os.path.abspath(name), "")


def write_maps(folder: FeatureFolder, source: Source, prepare: Preparation, reader: Reader) -> None:
    """Write the features of the images that a folder lacks.

    Raises:
        ValueError: None of the images can be used.
        DivergedError: Features that are NaN or infinite.
    """
    remaining: Sequence[int] = range(len(source))
    rewritten: dict[str, int] = {}
    if done := len(folder):  # else each image is read but once, which tells them apart
        with ThreadPoolExecutor(THREADS) as pool:
            identities = in_order(partial(identity_of, source), remaining, THREADS, pool)
            places = {identity: index for index, identity in identities}
        rewritten = folder.forget({identity.path: identity.state for identity in places})
        written = {Identity(entry["path"], entry["state"]) for entry in folder.index["images"]}
        remaining = [index for identity, index in places.items() if identity not in written]
        done = len(written)
        if others := len(written - places.keys()):
            message = f"the folder holds features of {others} images that were not given"
            log.info("%s; adding %d", message, len(remaining))
        elif done:
            log.info("%d images done, %d left", done, len(remaining))
    numbers = folder.free_numbers(rewritten.values())
    refused: list[dict[str, str]] = []
    folder.index["left_out"] = refused
    save_at, logged_at = -inf, monotonic()
    try:
        for batch in same_sized(source, remaining, prepare, refused):
            pixels = torch.stack([image.pixels for image in batch.values()])
            (maps,) = in_parts(
                lambda part: [*finite_features(reader, part, [reader.layers])], pixels
            )
            if (began := monotonic()) > save_at:  # before the first map, which tells whose it is
                folder.save_index()
                save_at = monotonic() + max(SAVED_EVERY, TIMES_SAVING * (monotonic() - began))
            for (index, image), features in zip(batch.items(), maps, strict=True):
                number = rewritten.pop(image.identity.path, None)
                number = next(numbers) if number is None else number
                folder.write(number, source.name(index), features, image)
            if monotonic() - logged_at > PROGRESS_EVERY:
                log.info("%d of %d images", len(folder) - done, len(remaining))
                logged_at = monotonic()
    finally:
        if len(folder):
            folder.save_index()
    reasons = [f"{entry['name']}: {entry['reason']}" for entry in refused]
    if not len(folder):
        raise ValueError(none_left(reasons, prepare))
    for note in left_out(reasons):
        log.warning(note)


def same_sized(
    source: Source, indices: Sequence[int], prepare: Preparation, refused: list[dict[str, str]]
) -> Iterator[dict[int, Prepared]]:
    """Images by index, neighbours of one size together; those that cannot be used are noted."""

    def read(index: int) -> Prepared | str:
        try:
            image = source.open(index)
            prepare.statistics.check(image)
            identity = identity_of(source, index, image)  # before a file is decoded: it may change
            unit = prepare.in_range(image.read(prepare.shortest), source.name(index))
        except ImageError as error:
            return str(error)
        fed = prepare.normalised(prepare.resized(unit, image.size))
        return Prepared(fed, image.size, identity)

    batch: dict[int, Prepared] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for index, image in in_order(read, indices, THREADS, pool):
            if isinstance(image, str):
                refused.append({"name": source.name(index), "reason": image})
                continue
            first = next(iter(batch.values()), image)
            if len(batch) == BATCH or first.pixels.shape != image.pixels.shape:
                yield batch
                batch = {}
            batch[index] = image
    if batch:
        yield batch


def draw_pictures(folder: FeatureFolder) -> None:
    """Draw the maps of a folder as colours that mean the same in all of them."""
    basis = common_basis(folder)
    for number, entry in enumerate(folder.index["images"]):
        colours, _ = pca_colours(folder.map(number)[None], basis)
        picture = to_pil(interpolate(colours, entry["fed"], mode="bilinear")[0])
        write_whole(folder.picture(number), partial(picture.save, format="PNG"))


def common_basis(folder: FeatureFolder) -> Basis:
    """The components that colours are made of, from cells of maps spread over all."""
    cells = []
    for number in islice(evenly(len(folder), MAPS_OF_BASIS), MAPS_OF_BASIS):
        features = folder.map(number).flatten(1)
        cells.append(features[:, :: -(-features.shape[1] // CELLS_OF_BASIS)])
    _, basis = pca_colours(torch.cat(cells, dim=1)[None, :, :, None])
    return basis
