"""Formats that need a library of their own, each read by a function from bytes to a named array.

See `readers`, which calls them. The libraries come with extras, and each function imports its own.
"""

from __future__ import annotations

import os
from functools import partial
from gzip import GzipFile
from io import BytesIO
from typing import Any

import numpy as np

from .arrays import Deferred
from .image import MAX_BYTES, ImageError

Named = tuple[Any, str]
"""An array and its axes, see `arrays.NamedArray`."""
USUAL = ("image", "images", "img", "data", "arr_0")
"""What the array of images is called in an NPZ that holds several."""
GZIP = b"\x1f\x8b"


# DICOM.


def read_dicom(content: bytes) -> Named:
    """The frames of a DICOM file: what they measure, brighter where more is."""
    from pydicom import dcmread

    file = dcmread(BytesIO(content), force=True)
    if "Rows" not in file or not any(
        f"{kind}PixelData" in file for kind in ("", "Float", "DoubleFloat")
    ):
        raise ImageError(f"a DICOM without pixels ({file.get('Modality', 'unknown')})")
    frames = int(file.get("NumberOfFrames") or 1)
    palette = file.PhotometricInterpretation == "PALETTE COLOR"
    colours = (3,) if palette or file.SamplesPerPixel == 3 else ()
    several = (frames,) if frames > 1 else ()
    axes = "Z" * len(several) + "YX" + "S" * len(colours)
    shape = (*several, file.Rows, file.Columns, *colours)
    return Deferred(shape, dicom_type(file), partial(dicom_values, file, shape)), axes


def dicom_type(file: Any) -> str:
    """The type of values that the pixels of a DICOM file become."""
    if "PixelData" not in file or file.BitsAllocated > 8:
        return "float32"
    if file.PhotometricInterpretation == "PALETTE COLOR":
        return "uint8" if file.RedPaletteColorLookupTableDescriptor[2] <= 8 else "float32"
    scaled = file.get("ModalityLUTSequence") or {*dicom_scaling(file)} != {(1.0, 0.0)}
    plain = not scaled and not file.get("PixelRepresentation")
    return ("bool" if file.BitsAllocated == 1 else "uint8") if plain else "float32"


def dicom_scaling(file: Any) -> list[tuple[float, float]]:
    """Rescale slope and intercept: of each frame where these have their own, else of all."""
    holders = [file]
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        sequences = [
            group.get("PixelValueTransformationSequence") for group in file.get(groups) or ()
        ]
        holders = [sequence[0] for sequence in sequences if sequence] or holders
    return [
        (number_in(holder, "RescaleSlope", 1), number_in(holder, "RescaleIntercept", 0))
        for holder in holders
    ]


def number_in(file: Any, name: str, default: float) -> float:
    """A number in a DICOM file, where its element may be empty."""
    value = file.get(name)
    return default if value is None else float(value)


def dicom_values(file: Any, shape: tuple[int, ...]) -> Any:
    """The pixels of a DICOM file, all its frames, one converted after the other."""
    stored: Any = file.pixel_array  # YBR has become RGB
    values = np.empty(shape, dicom_type(file))
    scaling = dicom_scaling(file)
    single = int(file.get("NumberOfFrames") or 1) == 1
    frames, converted = (stored[None], values[None]) if single else (stored, values)
    scaling = scaling * len(frames) if len(scaling) == 1 else scaling
    for number, (frame, scale) in enumerate(zip(frames, scaling, strict=True)):
        converted[number] = dicom_frame(file, frame, scale, values.dtype)
    return values


def dicom_frame(file: Any, stored: Any, scale: tuple[float, float], kind: np.dtype[Any]) -> Any:
    """What one frame of a DICOM file shows."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    if file.PhotometricInterpretation == "PALETTE COLOR":
        return apply_color_lut(stored, file)
    inverted = file.PhotometricInterpretation == "MONOCHROME1"  # white is the lowest
    values, white = stored, 2**file.BitsStored - 1
    if tables := file.get("ModalityLUTSequence"):
        values, white = apply_modality_lut(stored, file), 2 ** tables[0].LUTDescriptor[2] - 1
    elif file.get("PixelRepresentation"):
        white = -1
    if inverted:
        values = white - values.astype(np.int64)
    if kind == np.float32 and not tables:
        slope, intercept = scale
        values = values * slope + intercept
    values = values.astype(kind)
    if kind == np.float32 and file.get("PixelPaddingValue") is not None:
        ends = (
            file.PixelPaddingValue,
            number_in(file, "PixelPaddingRangeLimit", file.PixelPaddingValue),
        )
        values[(stored >= min(ends)) & (stored <= max(ends))] = np.nan
    return values


# NIfTI.


def read_nifti(content: bytes) -> Named:
    """The slices of a NIfTI along its last axis in space, upright as radiologists see them."""
    import nibabel

    stream: Any = BytesIO(content)
    if content.startswith(GZIP):
        stream = GzipFile(fileobj=stream)
    second = b"\x1c\x02" in (stream.read(2), stream.read(2)[::-1])  # a header of 540 bytes
    stream.seek(0)
    image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_stream(stream)
    dtype, shape, scaled = image.get_data_dtype(), image.shape, image.dataobj
    plain = scaled.slope == 1 and scaled.inter == 0
    # For each axis in the file: its axis in space (right, anterior, superior), and 1 if along it.
    (first, along_first), (other, along_other), *_ = nibabel.io_orientation(image.affine)
    flipped = tuple(i for i, along in enumerate((along_first, along_other)) if along > 0)
    axes = (("YX" if first > other else "XY") + "ZTCUV")[: len(shape)]

    def values() -> Any:
        if not plain:
            return np.flip(image.get_fdata(caching="unchanged", dtype=np.float32), flipped)
        stored = scaled.get_unscaled()
        if dtype.names:  # colours
            stored = np.ascontiguousarray(stored).view("u1").reshape(*shape, len(dtype.names))
        return np.flip(stored, flipped)

    if dtype.names:
        return Deferred((*shape, len(dtype.names)), "u1", values), f"{axes}S"
    return Deferred(shape, dtype if plain else "float32", values), axes


# Others.


def read_heic(content: bytes) -> Named:
    """The pictures of full size in a HEIC, transparent parts over black."""
    import pillow_heif

    file = pillow_heif.open_heif(content, convert_hdr_to_8bit=False)
    same = [image for image in file if (image.size, image.mode) == (file.size, file.mode)]
    bands = len(file.mode.split(";")[0])
    alpha = bands in (2, 4)
    colours = (3,) if bands > 2 else ()
    dtype = np.dtype("u2" if ";" in file.mode else "u1")

    def values() -> Any:
        pixels = np.stack([np.asarray(image) for image in same])
        if alpha:
            share = pixels[..., -1:] / np.iinfo(dtype).max
            pixels = (pixels[..., :-1] * share).round().astype(dtype)
        return pixels.reshape(len(same), *file.size[::-1], *colours)

    shape = (len(same), *file.size[::-1], *colours)
    return Deferred(shape, dtype, values), "ZYX" + "S" * len(colours)


def read_npz(content: bytes) -> Any:
    """The array in an NPZ, or the one with a usual name."""
    with np.load(BytesIO(content), allow_pickle=False) as file:
        usual = [name for name in USUAL if name in file.files]
        if not usual and len(file.files) != 1:
            raise ImageError(
                f"it holds the arrays {', '.join(file.files)}; name the one with the images 'image'"
            )
        if sum(member.file_size for member in file.zip.infolist()) > MAX_BYTES:
            raise ImageError(f"its arrays take more than {MAX_BYTES // 2**30} GiB")
        return file[(usual or file.files)[0]]


def read_zarr(path: str) -> Any:
    """The array in a Zarr folder, of an OME-Zarr the one of full size; read when it is indexed."""
    import zarr

    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Group):
        attributes = dict(node.attrs)
        if scales := attributes.get("ome", attributes).get("multiscales"):
            axes = scales[0].get("axes", "tczyx")
            names = [axis["name"] if isinstance(axis, dict) else axis for axis in axes]
            return node[scales[0]["datasets"][0]["path"]], letters(names)
        arrays = dict(node.arrays())
        if len(arrays) != 1:
            if not (keys := sorted(node)):
                raise ImageError("it holds no array")
            raise ImageError(
                f"it holds {', '.join(keys)}; make a link that ends in .zarr to the one with the "
                f"images, and give it as data: ln -s {os.path.abspath(path)}/{keys[0]} images.zarr"
            )
        [node] = arrays.values()
    dimensions = getattr(node.metadata, "dimension_names", None)
    dimensions = dimensions or node.attrs.get("_ARRAY_DIMENSIONS")
    return (node, letters(dimensions)) if dimensions and {"x", "y"} <= set(dimensions) else node


def letters(names: list[str]) -> str:
    """Names of axes as letters."""
    known = {"y": "Y", "x": "X", "c": "C", "channel": "C", "band": "C"}
    others = iter("ZTUVWPQR")
    return "".join(known[name] if name in known else next(others) for name in names)
