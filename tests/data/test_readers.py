"""Readers, one's own and ours: their pixels, and that a broken one costs its file alone."""

import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from pixel_level_contrastive_learning.data import (
    decoding,
    folders,
    formats,
    pages,
    readers,
    reading,
)
from pixel_level_contrastive_learning.data.arrays import NamedArray
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.loader import build_loader
from pixel_level_contrastive_learning.data.readers import GROUP
from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.data.shard_writer import write_shards
from pixel_level_contrastive_learning.data.sources import Source, open_source
from pixel_level_contrastive_learning.data.statistics import measure
from pixel_level_contrastive_learning.data.tiles import Tiling

DICE = np.random.default_rng(0)
VALUES = DICE.integers(0, 256, (2, 3, 24, 32)).astype(np.uint8)  # n c h w


def read_raw(content: bytes) -> tuple[np.ndarray, str]:
    """A format of one's own: numbers from 0 to 255, 24 x 32 of them an image."""
    return np.frombuffer(content, np.uint8).reshape(-1, 24, 32), "ZYX"


def read_folder(path: str) -> np.ndarray:
    return np.load(f"{path}/values.npy")


def leaves(content: bytes) -> None:
    sys.exit("gone")


def hangs(content: bytes) -> None:
    time.sleep(60)


def gives_words(content: bytes) -> str:
    return "no array"


def misnames(content: bytes) -> tuple[np.ndarray, str]:
    return np.zeros((4, 4)), "YZ"


OWN = dict.fromkeys((".raw", ".bmp", ".both"), "read_raw")
OWN |= dict.fromkeys((".set/", ".both/"), "read_folder")
OWN |= {f".{name}": name for name in ("leaves", "hangs", "gives_words", "misnames", "is_not_there")}


@pytest.fixture(autouse=True)
def own_readers(monkeypatch):
    """Readers of one's own, as an installed package brings them."""
    entry_points = [EntryPoint(ending, f"{__name__}:{name}", GROUP) for ending, name in OWN.items()]
    entry_points.append(EntryPoint(".far", "no_such_package:read", GROUP))
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or this_module())
    monkeypatch.setattr(
        readers, "entry_points", lambda group: entry_points if group == GROUP else ()
    )
    forget()
    yield
    forget()


def this_module():
    """This file as a module, under whatever name pytest has run it."""
    from types import SimpleNamespace

    return SimpleNamespace(**globals())


def forget() -> None:
    readers.all_readers.cache_clear()
    decoding.image_suffixes.cache_clear()


def pixels(source: Source) -> list[np.ndarray]:
    return [source.open(index).read().numpy() for index in range(len(source))]


# One's own.


@pytest.mark.parametrize(("name", "workers"), [("a.RAW", 0), ("a.bmp", 2)])
def test_a_reader_of_ones_own_is_used_wherever_images_are(tmp_path, name, workers) -> None:
    (tmp_path / name).write_bytes(VALUES[0].tobytes())
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(3)] == [f"{tmp_path}/{name}[{i}]" for i in range(3)]
    for image, expected in zip(pixels(source), VALUES[0], strict=True):
        assert image.dtype == np.uint8
        assert (image == expected).all()
    assert source.open(0).channels == 1
    measured = measure(source)
    assert measured.mean[0] == pytest.approx((VALUES[0] / 255).mean(), abs=0.01)
    loader = build_loader(
        source, measured, image_size=(16, 16), batch_size=3, workers=workers, max_broken=0
    )
    assert next(iter(loader)).one.shape == (3, 1, 16, 16)
    joined = open_source(tmp_path, pages="channels")
    assert (pixels(joined)[0] == VALUES[0]).all()
    report = write_shards(tmp_path, tmp_path / "out")
    assert report.images == 3
    for image, expected in zip(pixels(open_source(tmp_path / "out")), VALUES[0], strict=True):
        assert (image[0] == expected).all()
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "b", "raw": VALUES[0].tobytes()})
    assert (pixels(open_source(f"{tmp_path}/a.tar"))[2] == VALUES[0, 2]).all()


def test_an_ending_without_a_dot_is_told(monkeypatch, caplog) -> None:
    entry = EntryPoint("frames", f"{__name__}:read_raw", GROUP)
    monkeypatch.setattr(readers, "entry_points", lambda group: [entry])
    readers.all_readers()
    assert (
        f"{__name__}:read_raw is not used: its entry point is 'frames'; it must be '.frames'"
        in (caplog.text)
    )


@pytest.mark.parametrize(("ending", "in_file"), [("set", 0), ("both", 3)])
def test_a_reader_may_take_folders(tmp_path, ending, in_file) -> None:
    """A file with the ending is an image only where there is a reader of such files, too."""
    folder = tmp_path / "b" / f"one.{ending}"
    folder.mkdir(parents=True)
    np.save(folder / "values.npy", VALUES)
    (tmp_path / f"c.{ending}").write_bytes(VALUES[0].tobytes())
    for place, others in ((tmp_path, in_file), (folder, 0)):
        images = pixels(open_source(place))
        assert len(images) == 2 + others
        assert (np.stack(images[:2]) == VALUES).all()
        assert all((a == b).all() for a, b in zip(images[2:], VALUES[0, :others], strict=True))


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("leaves", "failed: SystemExit: gone"),
        ("hangs", r"failed: its content was not decoded within 0\.3 s"),
        ("gives_words", "failed: it returned str; it must return an array"),
        (
            "misnames",
            r"failed: an array of shape \(4, 4\) with axes 'YZ'; they must be one letter",
        ),
        ("is_not_there", "failed: AttributeError: "),
        ("far", "failed: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_broken_reader_costs_its_file_alone(tmp_path, monkeypatch, ending, reason) -> None:
    monkeypatch.setattr(reading, "READER_PATIENCE", 0.3)
    for number in range(3):
        (tmp_path / f"{number}.raw").write_bytes(VALUES[0, 0].tobytes())
    (tmp_path / f"x.{ending}").write_bytes(b"content")
    source = open_source(tmp_path)
    assert len(source) == 4
    with pytest.raises(
        ImageError, match=rf"^its reader, \S*{ending}\S*, {reason}|^its reader, no_"
    ):
        source.open(3)
    loader = build_loader(
        source, measure(source), image_size=(16, 16), batch_size=4, max_broken=0.5, workers=1
    )
    assert len(next(iter(loader)).index) == 4
    assert list(loader.broken) == [str(tmp_path / f"x.{ending}")]
    assert not reading.STUCK  # nothing is wrong with the folder


@pytest.mark.parametrize(
    ("shape", "axes", "size", "channels", "images"),
    [
        ((5, 7), "", (5, 7), 1, 1),
        ((5, 7, 3), "", (5, 7), 3, 1),
        ((3, 5, 7), "", (5, 7), 3, 1),
        ((2, 5, 7, 3), "", (5, 7), 3, 2),
        ((7, 5), "xy", (5, 7), 1, 1),
        ((7, 2, 5, 4, 3), "XTYZC", (5, 7), 3, 8),
        ((2, 3, 5, 7), "CSYX", (5, 7), 6, 1),
    ],
)
def test_named_axes_are_put_in_order(shape, axes, size, channels, images) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    named = NamedArray.of((array, axes) if axes else array)
    assert (named.size, named.channels, named.stack.images) == (size, channels, images)
    planes = [named.plane(number) for number in range(images)]
    assert {plane.shape for plane in planes} == {(channels, *size)}
    assert len(np.unique(np.stack(planes))) == array.size
    part = named.plane(images - 1, slice(1, 3), slice(4, 6))
    assert (part == planes[-1][:, 1:3, 4:6]).all()
    if axes == "XTYZC":
        assert (planes[5][1] == array[:, 1, :, 1, 1].T).all()


def test_the_reader_in_the_guide_reads_its_frames(tmp_path, monkeypatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
    [code] = re.findall(r"```python\n(import numpy.*?)```", guide, re.DOTALL)
    [ending, module, function] = re.findall(r'"(\.\w+)" = "(\w+):(\w+)"', guide)[0]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint(ending, f"{module}:{function}", GROUP)
    monkeypatch.setattr(readers, "entry_points", lambda group: [entry])
    frames = DICE.integers(0, 65536, (2, 480, 640)).astype("<u2")
    (tmp_path / "a.frames").write_bytes(bytes(64) + frames.tobytes())
    assert (np.stack(pixels(open_source(tmp_path)))[:, 0] == frames).all()


# DICOM.


def dicom(path, array: np.ndarray, photometric: str = "MONOCHROME2", **tags: object) -> str:
    """A file as pydicom writes it."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    colour = photometric in ("RGB", "YBR_FULL")
    file.SamplesPerPixel = 3 if colour else 1
    sides = array.shape[:-1] if colour else array.shape
    file.Rows, file.Columns = sides[-2:]
    if len(sides) > 2:
        file.NumberOfFrames = sides[0]
    if colour:
        file.PlanarConfiguration = 0
    file.PhotometricInterpretation = photometric
    file.BitsAllocated = file.BitsStored = 8 * array.dtype.itemsize
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(array.dtype.kind == "i")
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = array.tobytes()
    file.save_as(path, enforce_file_format=True)
    return str(path)


CT = DICE.integers(-1024, 3000, (24, 32)).astype(np.int16)
GRAY = VALUES[0, 0]
RGB = np.ascontiguousarray(VALUES[0].transpose(1, 2, 0))


def test_a_ct_keeps_its_negative_values(tmp_path) -> None:
    dicom(tmp_path / "a.dcm", CT, RescaleSlope=2, RescaleIntercept=-1000)
    source = open_source(tmp_path)
    [image] = pixels(source)
    assert image.dtype == np.float32
    assert (image[0] == 2.0 * CT - 1000).all()
    opened = source.open(0)
    assert (opened.size, opened.channels, opened.high_depth) == ((24, 32), 1, True)
    measured = measure(source)
    assert measured.low[0] < -2900
    assert (
        next(iter(build_loader(source, measured, image_size=(16, 16), batch_size=1))).one.max() <= 1
    )
    write_shards(tmp_path, tmp_path / "out")
    written = open_source(tmp_path / "out")
    assert (pixels(written)[0] == image).all()
    assert np.load(io.BytesIO(written.content(0))).dtype == np.int16
    write_shards(tmp_path, tmp_path / "tiles", tile=16)
    assert len(open_source(tmp_path / "tiles")) == 4
    assert (pixels(open_source(tmp_path / "tiles"))[0] == image[:, :16, :16]).all()


@pytest.mark.parametrize(
    ("array", "tags", "expected"),
    [
        (GRAY, {}, GRAY),
        (GRAY, {"RescaleSlope": 1, "RescaleIntercept": 0}, GRAY),
        (GRAY, {"photometric": "MONOCHROME1"}, 255 - GRAY),
        (
            GRAY // 16,
            {"photometric": "MONOCHROME1", "BitsStored": 4, "HighBit": 3},
            15 - GRAY // 16,
        ),
        (GRAY, {"RescaleSlope": 0.5, "RescaleIntercept": -3}, GRAY * 0.5 - 3),
        (GRAY.view(np.int8), {}, GRAY.view(np.int8).astype(float)),
        (GRAY, {"RescaleSlope": None, "RescaleIntercept": None, "ModalityLUTSequence": []}, GRAY),
        (CT, {"RescaleSlope": None, "RescaleIntercept": -5, "PixelPaddingValue": None}, CT - 5.0),
        (CT, {"RescaleSlope": 0, "RescaleIntercept": 7}, CT * 0.0 + 7),
        (CT, {"photometric": "MONOCHROME1"}, -1.0 - CT),
        (CT.astype(np.uint16), {"photometric": "MONOCHROME1"}, 65535.0 - CT.astype(np.uint16)),
    ],
)
def test_gray_values_of_dicom(tmp_path, array, tags, expected) -> None:
    dicom(tmp_path / "a.dcm", array, **tags)
    [image] = pixels(open_source(tmp_path))
    assert image.dtype == (np.uint8 if expected.dtype == np.uint8 else np.float32)
    assert (image[0] == expected).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_table_of_dicom_holds_for_stored_values(tmp_path, photometric) -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [16, 0, 16], "US"
    squares = (np.arange(16) ** 2).tolist()
    table.add_new("LUTData", "US", squares)
    dicom(tmp_path / "a.dcm", GRAY // 16, photometric, ModalityLUTSequence=[table])
    [image] = pixels(open_source(tmp_path))
    expected = (GRAY // 16).astype(np.float32) ** 2
    assert (image[0] == (expected if photometric == "MONOCHROME2" else 65535 - expected)).all()


def test_frames_of_dicom_are_converted_one_by_one(tmp_path) -> None:
    frames = np.broadcast_to(CT, (100, *CT.shape)).copy()
    content = Path(dicom(tmp_path / "a.dcm", frames, RescaleSlope=2)).read_bytes()
    named = readers.call_reader(".dcm", content)
    tracemalloc.start()
    assert (named.array[99] == 2.0 * CT).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * frames.size


def test_colours_of_dicom(tmp_path) -> None:
    dicom(tmp_path / "rgb.dcm", RGB, "RGB")
    ycbcr = np.array(Image.fromarray(RGB).convert("YCbCr"))
    dicom(tmp_path / "ybr.dcm", ycbcr, "YBR_FULL")
    rgb, ybr = pixels(open_source(tmp_path))
    assert (rgb == VALUES[0]).all()
    near = np.array(Image.fromarray(ycbcr, "YCbCr").convert("RGB")).transpose(2, 0, 1)
    assert np.abs(ybr.astype(int) - near).max() <= 2
    table = np.arange(256, dtype=np.uint8)
    palettes = {
        f"{colour}PaletteColorLookupTable{field}": value
        for colour, entries in (("Red", table), ("Green", table[::-1]), ("Blue", table // 2))
        for field, value in (("Descriptor", [256, 0, 8]), ("Data", entries.tobytes()))
    }
    path = dicom(tmp_path / "palette.dcm", GRAY, "PALETTE COLOR", **palettes)
    [image] = pixels(open_source(path))
    assert image.dtype == np.uint8
    assert (image == np.stack([GRAY, 255 - GRAY, GRAY // 2])).all()


@pytest.mark.parametrize("ends", [(-2000,), (-2000, -1990), (-1990, -2000)])
def test_padding_of_dicom_was_not_measured(tmp_path, ends) -> None:
    padded = CT.copy()
    padded[:3] = np.linspace(ends[0], ends[-1], 32).astype(CT.dtype)
    tags = dict(zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), ends, strict=False))
    dicom(tmp_path / "a.dcm", padded, RescaleSlope=2, RescaleIntercept=5, **tags)
    source = open_source(tmp_path)
    assert pixels(source)[0].min() == 2 * CT[3:].min() + 5  # the lowest that was measured
    assert measure(source).low[0] > -2048 + 5


def test_frames_of_dicom_are_images_each_with_its_scale(tmp_path, caplog) -> None:
    from pydicom.dataset import Dataset

    caplog.set_level("INFO")
    frames = DICE.integers(0, 3000, (3, 24, 32)).astype(np.uint16)

    def scaled(slope: float) -> Dataset:
        inner, group = Dataset(), Dataset()
        inner.RescaleSlope, inner.RescaleIntercept = slope, 1
        group.PixelValueTransformationSequence = [inner]
        return group

    each = [scaled(slope) for slope in (1, 2, 4)]
    dicom(tmp_path / "pet", frames, PerFrameFunctionalGroupsSequence=each)
    images = pixels(open_source(tmp_path))
    assert "1 file of 3 pages: read as 3 images" in caplog.text
    for image, frame, slope in zip(images, frames, (1, 2, 4), strict=True):
        assert (image[0] == slope * frame.astype(np.float32) + 1).all()
    dicom(tmp_path / "pet", frames, SharedFunctionalGroupsSequence=[scaled(3)])
    assert (pixels(open_source(tmp_path, pages="channels"))[0] == 3.0 * frames + 1).all()


@pytest.mark.parametrize(
    "syntax", ["RLELossless", "JPEG2000Lossless", "DeflatedExplicitVRLittleEndian"]
)
def test_compressed_dicom_is_read(tmp_path, syntax) -> None:
    import pydicom

    large = np.tile(CT, (4, 4))
    file = pydicom.dcmread(dicom(tmp_path / "a.dcm", large))
    if syntax.startswith("Deflated"):
        file.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    else:
        file.compress(getattr(pydicom.uid, syntax))
    file.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert (pixels(open_source(tmp_path))[0][0] == large).all()


@pytest.mark.parametrize("name", ["IM1", "1.2.840.113619.2", "a.CT", "deep/I0"])
def test_dicom_is_found_without_an_ending(tmp_path, name) -> None:
    (tmp_path / "deep").mkdir()
    dicom(tmp_path / name, CT)
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_text("words" * 99)
    for place in (tmp_path, tmp_path / name):
        [image] = pixels(open_source(place))
        assert (image[0] == CT).all()
    if "CT" not in name:
        (tmp_path / "tar").mkdir()
        with tarfile.open(tmp_path / "tar" / "a.tar", "w") as tar:
            tar.add(tmp_path / name, "series/IM1")
            tar.add(tmp_path / "README", "README")
        [image] = pixels(open_source(tmp_path / "tar"))
        assert (image[0] == CT).all()


def test_of_an_unknown_ending_a_few_files_are_looked_at(tmp_path, monkeypatch) -> None:
    paths = []
    is_dicom = folders.is_dicom
    monkeypatch.setattr(folders, "is_dicom", lambda path: paths.append(path) or is_dicom(path))
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for number in range(30):
        (tmp_path / f"{number}.xml").write_text("<>")
        (tmp_path / f"x.{number}").write_text("<>")
    assert len(open_source(tmp_path)) == 1
    assert len([path for path in paths if path.endswith(".xml")]) == folders.UNLIKE
    assert len(paths) == folders.UNLIKE + 30


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no dicom", r"a DICOM without pixels \(unknown\)|damaged"),
        (bytes(128) + b"DICM", r"a DICOM without pixels|damaged"),
    ],
)
def test_dicom_without_pixels_is_refused(tmp_path, content, reason) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        open_source(tmp_path).open(0)


# NIfTI.


def nifti(path, array: np.ndarray, codes: str = "LPS") -> str:
    """A file as nibabel writes it, its axes along the directions named."""
    import nibabel

    ornt = nibabel.orientations.axcodes2ornt(codes)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (along, sign) in enumerate(ornt.astype(int)):
        affine[along, axis] = sign
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return str(path)


VOLUME = DICE.integers(-500, 500, (6, 5, 4)).astype(np.int16)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("codes", "turned"),
    [
        ("LPS", lambda a: a.T),  # rows to the back, columns to the left: as it is seen
        ("RAS", lambda a: a[::-1, ::-1].T),
        ("LAS", lambda a: a[:, ::-1].T),
        ("PSR", lambda a: a[:, ::-1].T),  # sagittal: the head up, the face to the left
        ("RIA", lambda a: a[::-1].T),  # coronal
        ("IPL", lambda a: a),  # stored by columns
    ],
)
def test_slices_of_nifti_are_upright(tmp_path, codes, turned, ending) -> None:
    source = open_source(nifti(tmp_path / f"a{ending}", VOLUME, codes))
    assert len(source) == 4
    assert source.name(3) == f"{tmp_path}/a{ending}[3]"
    for number, image in enumerate(pixels(source)):
        assert image.dtype == np.float32
        assert (image[0] == turned(VOLUME[..., number])).all()


def test_nifti_is_scaled_and_bytes_stay_bytes(tmp_path) -> None:
    scaled = VOLUME.astype(np.float64) * 0.5 - 7
    nifti(tmp_path / "a.nii", scaled)
    (tmp_path / "b").mkdir()
    small = VOLUME[..., 0].astype(np.uint8)
    nifti(tmp_path / "b" / "b.nii.gz", small)
    assert (pixels(open_source(tmp_path / "a.nii"))[1][0] == scaled[..., 1].T).all()
    [unscaled] = pixels(open_source(tmp_path / "b"))
    assert unscaled.dtype == np.uint8
    assert (unscaled[0] == small.T).all()
    import nibabel

    image = nibabel.Nifti1Image(VOLUME, np.diag((-1, -1, 1, 1)))
    image.header.set_slope_inter(2, 1)
    nibabel.save(image, tmp_path / "c.nii")
    expected = np.asarray(nibabel.load(tmp_path / "c.nii").dataobj)
    assert (pixels(open_source(tmp_path / "c.nii"))[0][0] == expected[..., 0].T).all()


def test_colours_of_nifti(tmp_path) -> None:
    colours = np.ascontiguousarray(VALUES.transpose(3, 2, 0, 1))  # x y z c
    stored = colours.view([(name, "u1") for name in "RGB"])[..., 0]
    images = pixels(open_source(nifti(tmp_path / "a.nii.gz", stored)))
    assert images[0].dtype == np.uint8
    assert (np.stack(images) == VALUES).all()


def test_the_slices_of_a_volume_are_counted_by_its_header(tmp_path) -> None:
    noise = DICE.integers(0, 60000, (60, 60, 40)).astype(np.uint16)
    whole = Path(nifti(tmp_path / "a.nii.gz", noise)).read_bytes()
    assert len(whole) > 2 * pages.HEAD
    (tmp_path / "a.nii.gz").write_bytes(whole[: pages.HEAD])
    source = open_source(tmp_path)
    assert len(source) == 40
    with pytest.raises(ImageError, match="damaged"):
        source.open(39)


@pytest.mark.parametrize("tile", [None, 4])
def test_a_volume_is_read_once_for_its_slices_by_any_number_of_threads(
    tmp_path, monkeypatch, tile
) -> None:
    from nibabel.arrayproxy import ArrayProxy

    nifti(tmp_path / "a.nii.gz", VOLUME)
    source, read, unpacked = open_source(tmp_path), [], []
    assert pickle.loads(pickle.dumps(source)).last is None
    tiling = tile and Tiling(source.paths, tile)
    source.last = None

    def noted(calls, call):
        return lambda *given: calls.append(time.sleep(0.1)) or call(*given)

    monkeypatch.setattr(formats, "read_nifti", noted(read, formats.read_nifti))
    monkeypatch.setattr(ArrayProxy, "get_unscaled", noted(unpacked, ArrayProxy.get_unscaled))
    with ThreadPoolExecutor(4) as threads:
        if tile:
            cut = threads.map(lambda n: tiling.cut(*tiling.locate(n)), range(len(tiling)))
            assert len({one.about["page"] for one in cut}) == 4
        else:
            images = list(threads.map(lambda n: source.open(n).read(), range(4)))
            assert not images[0].equal(images[1])
            assert source.open(2).read().equal(images[2])
    assert (len(read), len(unpacked)) == (1, 1)


def test_a_volume_too_large_for_memory_is_refused_with_what_can_be_done(
    tmp_path, monkeypatch
) -> None:
    source = open_source(nifti(tmp_path / "a.nii", VOLUME))
    monkeypatch.setattr("pixel_level_contrastive_learning.data.arrays.MAX_BYTES", 200)
    shape = "x".join(map(str, VOLUME.shape))
    with pytest.raises(ImageError, match=f"^an array of {shape} values would take more .*OME-Zarr"):
        source.open(0)


def test_volumes_have_volumes_of_masks(labelled) -> None:
    for split, count in (("train", 10), ("val", 4)):
        masks = [np.array(Image.open(labelled / f"masks/{split}/{i}.png")) for i in range(count)]
        images = [
            np.array(Image.open(labelled / f"images/{split}/{i}.png").convert("L"))
            for i in range(count)
        ]
        for folder, arrays in (("images", images), ("masks", masks)):
            for path in (labelled / folder / split).iterdir():
                path.unlink()
            volume = np.stack(arrays).transpose(2, 1, 0)
            codes = "LPS" if folder == "images" else "RAS"  # stored otherwise, the same place
            stored = volume if codes == "LPS" else volume[::-1, ::-1]
            nifti(labelled / folder / split / "a.nii.gz", stored, codes)
    train, val = open_labelled(labelled)
    assert (len(train), len(val)) == (10, 4)
    assert train.name(3) == "a.nii.gz[3]"
    for index in range(4):
        sample = val.read(index)
        assert sample.pixels[0].numpy().tolist() == images[index].tolist()
        assert sample.mask.numpy().tolist() == masks[index].tolist()


# Others.


def test_heic_is_read_upright_with_its_depth(tmp_path) -> None:
    import pillow_heif

    smooth = np.dstack(
        [np.mgrid[:48, :64][0] * 5, np.mgrid[:48, :64][1] * 3, np.full((48, 64), 90)]
    )
    photo = Image.fromarray(smooth.astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # libheif turns the pixels by a box of its own, and leaves this behind
    pillow_heif.from_pillow(photo).save(tmp_path / "a.heic", quality=95)
    turned = pillow_heif.from_pillow(photo)
    turned.save(tmp_path / "b.heif", quality=95, exif=exif.tobytes())
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(smooth[..., 0] < 100, 0, 255).astype(np.uint8)))
    pillow_heif.from_pillow(clear).save(tmp_path / "c.heic", quality=95)
    deep = (smooth.astype(np.uint16) << 8)[..., :1].repeat(3, -1)
    pillow_heif.encode("RGB;16", (64, 48), deep.tobytes(), tmp_path / "d.heic", quality=-1)
    a, b, c, d = pixels(open_source(tmp_path))
    expected = smooth.transpose(2, 0, 1)
    assert a.dtype == np.uint8
    assert np.abs(a.astype(int) - expected).max() < 16
    assert np.abs(b.astype(int) - np.rot90(smooth, -1).transpose(2, 0, 1)).max() < 16
    assert c[:, smooth[..., 0] < 90].max() < 16
    assert np.abs(c.astype(int) - expected)[:, smooth[..., 0] > 110].max() < 20
    assert d.dtype == np.float32
    assert np.abs(d - deep.transpose(2, 0, 1)).max() <= 256  # of 10 bits


def test_arrays_in_npz(tmp_path) -> None:
    np.savez_compressed(tmp_path / "a.npz", anything=CT)
    np.savez(tmp_path / "b.npz", labels=np.arange(2), images=VALUES)
    source = open_source(tmp_path)
    images = pixels(source)
    assert (images[0][0] == CT).all()
    assert (np.stack(images[1:]) == VALUES).all()
    np.savez(tmp_path / "b.npz", one=CT, two=CT)
    with pytest.raises(
        ImageError, match="it holds the arrays one, two; name the one with the images"
    ):
        open_source(tmp_path / "b.npz").open(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_zarr_is_read_by_its_named_axes(tmp_path, workers) -> None:
    import zarr

    plain = zarr.create_array(str(tmp_path / "a.zarr"), shape=(24, 32), dtype="i2", chunks=(8, 8))
    plain[:] = CT
    group = zarr.open_group(str(tmp_path / "b.zarr"), mode="w")
    for name, step in (("0", 1), ("1", 2)):
        small = VALUES[:, :, ::step, ::step].astype(np.int16) - 300
        group.create_array(name, data=small)
    axes = [{"name": name} for name in ("z", "c", "y", "x")]
    scales = [{"path": "0"}, {"path": "1"}]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": scales}]
    assert (pixels(open_source(tmp_path / "a.zarr"))[0][0] == CT).all()
    source = open_source(tmp_path / "b.zarr")
    assert (np.stack(pixels(source)) == VALUES.astype(float) - 300).all()
    loader = build_loader(
        source, measure(source), image_size=(8, 8), batch_size=2, workers=workers, max_broken=0
    )
    assert next(iter(loader)).one.shape == (2, 3, 8, 8)
    assert len(open_source(tmp_path)) == 3  # of both, and nothing inside of them
    (tmp_path / "list.txt").write_text("b.zarr\n")
    assert len(open_source(tmp_path / "list.txt")) == 2
    write_shards(tmp_path / "a.zarr", tmp_path / "tiles", tile=16)
    assert (pixels(open_source(tmp_path / "tiles"))[0][0] == CT[:16, :16]).all()


def test_one_of_several_arrays_of_zarr_is_read_by_a_link(tmp_path, monkeypatch) -> None:
    import zarr

    group = zarr.open_group(str(tmp_path / "two.zarr"), mode="w")
    with pytest.raises(ImageError, match=r"^it holds no array$"):
        open_source(tmp_path / "two.zarr").open(0)
    for name in ("a", "b"):
        group.create_array(name, data=CT)
    with pytest.raises(
        ImageError, match=r"^it holds a, b; make a link that ends in \.zarr to the one"
    ) as error:
        open_source(tmp_path / "two.zarr").open(0)
    monkeypatch.chdir(tmp_path)
    subprocess.run(str(error.value).rpartition(": ")[2].split(), check=True)
    assert (pixels(open_source("images.zarr"))[0][0] == CT).all()


@pytest.mark.parametrize(
    ("name", "extra", "library"),
    [
        ("a.dcm", "dicom", "pydicom"),
        ("a.nii", "nifti", "nibabel"),
        ("a.heic", "heic", "pillow_heif"),
        ("a.zarr", "zarr", "zarr"),
    ],
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, name, extra, library) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    if extra == "zarr":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ValueError) as error:
        measure(open_source(tmp_path))
    message = f"{library} is not installed; reading "
    assert message in str(error.value)
    assert f"pip install 'pixel-level-contrastive-learning[{extra}]'" in str(error.value)
    assert os.path.join(tmp_path, name) in str(error.value)
