"""The loader against a plain pipeline that does the same: decode, two random resized crops.

python benchmarks/loader.py STREETS              # a folder of street scenes
python benchmarks/loader.py STREETS --size 128

Both run in this process on one thread, in turns, and are counted in images per second of processor
time, that is: per core, whatever else the machine is doing. The plain pipeline is torchvision's
transforms v2 on Pillow images in torch's DataLoader. Ours does more: flips, maps, colour factors.
"Kept" are images that were decoded in an earlier pass (`--cache`).
JPEGs of 12 megapixels are made from the street scenes, with the grain of a sensor. "Shards" are
the same images after `pixelcl prepare --max-side 640`, read by our loader.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from pixel_level_contrastive_learning.data.cache import DecodedCache
from pixel_level_contrastive_learning.data.image import to_tensor
from pixel_level_contrastive_learning.data.loader import build_loader
from pixel_level_contrastive_learning.data.shard_writer import write_shards
from pixel_level_contrastive_learning.data.sources import Source, open_source
from pixel_level_contrastive_learning.data.statistics import measure

BATCH = 16
AREA = (0.08, 1.0)


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """Two random resized crops of each image, as one writes it with torchvision."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.crop = v2.Compose([v2.RandomResizedCrop(size, AREA, antialias=True), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.crop(image), self.crop(image)


def grainy(path: Path, place: Path, seed: int) -> None:
    """Write a scene as a JPEG of 4000 x 3000 with noise, about as large as a camera's."""
    image = Image.open(path).convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 4, (3000, 4000, 1))
    pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(place / f"{seed:02d}.jpg", quality=90)


def passes(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[int]:
    """Batch after batch without end: how many images each has."""
    while True:
        for one, _ in loader:
            yield len(one)


def ours(folder: Path | list[Path], size: int, *, kept: bool = False) -> Iterator[int]:
    """Batch after batch of this package's loader; with images kept, from their third pass on."""
    source: Source = open_source(folder)
    if kept:
        source = DecodedCache(source, 2**31)
    loader = build_loader(source, measure(source), image_size=(size, size), batch_size=BATCH)
    for _ in range(2 if kept else 0):
        list(loader)
    while True:
        for pairs in loader:
            yield len(pairs.one)


def rate(batches: Iterator[int], images: int) -> float:
    """Images per second of processor time."""
    start, count = time.process_time(), 0
    while count < images:
        count += next(batches)
    return count / (time.process_time() - start)


def parts(paths: list[Path], size: int) -> dict[str, float]:
    """Milliseconds that the steps of the plain way take for one image, by median."""
    crop = v2.RandomResizedCrop(size, AREA, antialias=True)
    spent: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.process_time()
        result = call()
        spent.setdefault(name, []).append(1000 * (time.process_time() - start))
        return result

    for path in paths:
        timed("read", path.read_bytes)
        image = timed("decode", lambda path=path: Image.open(path).convert("RGB"))
        assert isinstance(image, Image.Image)
        views = timed("crop and resize twice", lambda image=image: (crop(image), crop(image)))
        assert isinstance(views, tuple)
        timed("copy", lambda views=views: [to_tensor(view) for view in views])
    return {name: statistics.median(values) for name, values in spent.items()}


def compare(name: str, folder: Path, shards: Path, size: int, images: int, rounds: int) -> None:
    """Print one row: the rates, and their ratios to the plain one by median."""
    paths = sorted(folder.rglob("*.jpg"))
    plain = passes(DataLoader(Plain(paths, size), BATCH, shuffle=True, drop_last=True))
    packed = ours(sorted(shards.glob("*.tar")), size)
    contenders = plain, ours(folder, size), packed, ours(folder, size, kept=True)
    for contender in contenders:
        next(contender)  # imports, caches
    rates = [[rate(contender, images) for contender in contenders] for _ in range(rounds)]
    plain_rate, *others = (statistics.median(column) for column in zip(*rates, strict=True))
    ratios = [statistics.median(turn[k] / turn[0] for turn in rates) for k in (1, 2, 3)]
    columns = " | ".join(f"{a:.0f} | {b:.2f}" for a, b in zip(others, ratios, strict=True))
    where = ", ".join(f"{part} {ms:.1f}" for part, ms in parts(paths[:32], size).items())
    print(f"| {name} | {size} | {plain_rate:.0f} | {columns} | {where} |")


def main() -> None:
    """Compare on street scenes and on 12-megapixel JPEGs, and print a table in Markdown."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("streets", type=Path)
    flags.add_argument("--size", type=int, nargs="+", default=[128, 224])
    flags.add_argument("--rounds", type=int, default=5)
    args = flags.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = " | ".join(f"{way} | x plain" for way in ("ours", "shards", "kept"))
    print(f"| images | view | plain, images/s | {heads} | plain, ms |\n|{'---|' * 10}")
    with tempfile.TemporaryDirectory() as folder:
        large, streets, small = (Path(folder) / name for name in ("large", "streets", "small"))
        large.mkdir()
        for seed, path in enumerate(sorted(args.streets.rglob("*.jpg"))[::20][:16]):
            grainy(path, large, seed)
        write_shards(args.streets, streets, max_side=640)
        write_shards(large, small, max_side=640)
        for size in args.size:
            compare("street scenes", args.streets, streets, size, 160, args.rounds)
            compare("12 megapixels", large, small, size, 16, args.rounds)


if __name__ == "__main__":
    main()
