"""Cutting rasters that fit no memory into tiles: seconds, and the largest resident size.

python benchmarks/tiles.py
python benchmarks/tiles.py --side 1024    # a short form

Two files are made in a temporary folder, and removed: three bands uncompressed in one strip, and
twelve in deflated tiles, both uint16. `write_shards` cuts each in a process of its own, 512 pixels
a tile. Beside its seconds stand those of writing and syncing a file as large as the values are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Figures, machine, report, resident_peak
from tifffile import imwrite

TILE = 512


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Values of a sensor of 12 bits."""
    return np.random.default_rng(0).integers(0, 4096, shape, dtype=np.uint16)


def strips(side: int) -> Iterator[np.ndarray]:
    """The rows of an image of three bands, a few at a time."""
    rows = noise((TILE, side, 3))
    for start in range(0, side, TILE):
        yield rows[: min(TILE, side - start)]


def blocks(side: int, bands: int) -> Iterator[bytes]:
    """The deflated tiles of an image, the same one again and again."""
    block = zlib.compress(noise((TILE, TILE, bands)).tobytes(), 1)
    for _ in range((-(-side // TILE)) ** 2):
        yield block


def make(path: Path, side: int, bands: int) -> None:
    """Write a file of so many bands."""
    shape = (side, side, bands)
    if bands == 3:
        rows = (row for part in strips(side) for row in part)
        options = {"photometric": "rgb"}
        imwrite(path, rows, shape=shape, dtype="uint16", bigtiff=True, metadata=None, **options)
        return
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "deflate"}
    tiles = blocks(side, bands)
    imwrite(path, tiles, shape=shape, dtype="uint16", tile=(TILE, TILE), bigtiff=True, **options)


def cut(path: str, out: str) -> None:
    """Cut a file, and print what it took."""
    from pixel_level_contrastive_learning.data.shard_writer import write_shards

    before, start = resident_peak(), time.perf_counter()
    written = write_shards(path, out, tile=TILE)
    seconds = time.perf_counter() - start
    figures = {"seconds": seconds, "MiB": resident_peak(), "imports, MiB": before}
    print(json.dumps(figures | {"tiles": written.images}))


def copied(path: Path, size: int) -> float:
    """Seconds that writing and syncing so many bytes takes."""
    part = os.urandom(2**20)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // 2**20):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    return time.perf_counter() - start


def measured(side: int, bands: int) -> Figures:
    """What cutting a file of so many pixels and bands takes."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "a.tif", Path(folder) / "out"
        make(path, side, bands)
        command = [sys.executable, __file__, "--cut", str(path), str(out)]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures: Figures = json.loads(process.stdout.splitlines()[-1])
        return figures | {"writing, s": copied(out / "plain", side * side * bands * 2)}


def main() -> None:
    """Measure both files."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--side", type=int, help="of both, in place of 20000 and 10980")
    flags.add_argument("--save", action="store_true", help="record the figures")
    flags.add_argument("--cut", nargs=2, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.cut:
        cut(*args.cut)
        return
    for side, bands in ((args.side or 20000, 3), (args.side or 10980, 12)):
        figures = measured(side, bands)
        ratios = {
            "memory / 2 GiB": figures["MiB"] / 2048,
            "cutting / writing": figures["seconds"] / figures["writing, s"],
        }
        print(", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
        setting = f"{side} x {side} x {bands} uint16"
        report("tiles", setting, ratios, figures, where=machine(), save=args.save)


if __name__ == "__main__":
    main()
