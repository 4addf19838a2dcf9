"""What is installed: the source archive builds the wheel, and the wheel works on its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata

PACKAGE = "pixel_level_contrastive_learning"
ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"


def said(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source archive gives, built in a copy."""
    place = tmp_path_factory.mktemp("dist")
    source = place / "source"
    cached = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=cached)
    for name in ("README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    said(sys.executable, "-c", BUILD.format("sdist", str(place)), cwd=source)
    [archive] = place.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(place / "unpacked", filter="data")
    [unpacked] = (place / "unpacked").iterdir()
    said(sys.executable, "-c", BUILD.format("wheel", str(place)), cwd=unpacked)
    [built] = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of a fresh environment with the wheel; all else comes from this one."""
    place = wheel.parent / "environment"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    pip = "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"
    said(sys.executable, *pip, wheel, cwd=place)
    [site] = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file())
    packaged = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    assert f"{PACKAGE}/visualization/report.html" in packaged
    with ZipFile(wheel) as opened:
        assert {name for name in opened.namelist() if ".dist-info/" not in name} == packaged


def test_the_source_archive_has_no_tests_without_what_they_need(wheel: Path) -> None:
    [unpacked] = (wheel.parent / "unpacked").iterdir()
    assert (unpacked / PACKAGE / "cli.py").is_file()
    assert not (unpacked / "tests").exists()


def test_the_metadata_are_valid_and_the_newest_change_is_this_version(wheel: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with ZipFile(wheel) as opened:
        [name] = [member for member in opened.namelist() if member.endswith("/METADATA")]
        metadata = Metadata.from_email(opened.read(name), validate=True)
    assert str(metadata.version) == version
    assert metadata.description_content_type == "text/markdown"
    assert metadata.license_expression == "MIT"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.split("\n## ")[1].startswith(f"{version} (")


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_repository(installed: Path, tmp_path) -> None:
    import_it = f"import {PACKAGE} as lib; from {PACKAGE}.visualization.report import visualize; "
    found = said(installed / "python", "-c", f"{import_it} print(lib.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)
    assert "--steps" in said(installed / "pixelcl", "demo", "--help", cwd=tmp_path)
    listed = said(installed / "pixelcl", "layers", "torchvision/resnet18", cwd=tmp_path)
    assert "by default: layer4 (from random weights also layer3) for the pixel level" in listed
