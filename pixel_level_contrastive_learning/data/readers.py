"""Readers of more formats: functions from a file's bytes to an array with named axes.

A user's package registers its readers as entry points of `GROUP`, each named by its file extension;
those of `formats` are registered the same way, and import their library only when called.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ..checks import EXTRAS, not_installed
from .arrays import NamedArray
from .image import NO_WARNINGS, ImageError, decoder_message
from .reading import in_time

log = logging.getLogger(__name__)

GROUP = "pixel_level_contrastive_learning.readers"
"""Entry points of readers, each called by an ending: ``.abc`` of files, ``.abc/`` of folders."""
DICOM, DICOM_MARK = ".dcm", slice(128, 132)
"""The ending of a DICOM file; and where its bytes are ``DICM``, whatever its ending."""
FORMATS = {
    "read_dicom": (DICOM, ".dicom", ".ima"),
    "read_nifti": (".nii", ".nii.gz"),
    "read_heic": (".heic", ".heif"),
    "read_npz": (".npz",),
    "read_zarr": (".zarr/",),
}
"""The readers in `formats`, and the endings of their files."""


@cache
def all_readers() -> dict[str, EntryPoint]:
    """The readers by ending, in lower case; one that is installed comes before ours."""
    builtin = {
        ending: EntryPoint(ending, f"{__package__}.formats:{function}", GROUP)
        for function, endings in FORMATS.items()
        for ending in endings
    }
    installed = {entry.name.lower(): entry for entry in entry_points(group=GROUP)}
    for name, entry in installed.items():
        if not name.startswith("."):
            value = entry.value
            log.warning(
                "%s is not used: its entry point is %r; it must be '.%s'", value, name, name
            )
    return builtin | installed


def call_reader(ending: str, content: bytes | str) -> NamedArray:
    """What a reader makes of the bytes of a file, or of the path of a folder.

    Raises:
        ImageError: It is not installed, fails, does not answer, or returns something else.
    """
    entry = all_readers()[ending]
    try:
        with NO_WARNINGS:
            place = content if isinstance(content, str) else None  # bytes have been read
            return NamedArray.of(in_time(lambda: entry.load()(content), place))
    except (Exception, SystemExit) as error:  # a reader may raise any error
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            raise ImageError(not_installed(error.name)) from error
        builtin = entry.module.startswith(f"{__package__}.")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if builtin or isinstance(error, ImageError):
            reason = str(error) if isinstance(error, ImageError) else decoder_message(error)
        raise ImageError(
            reason if builtin else f"its reader, {entry.value}, failed: {reason}"
        ) from error
