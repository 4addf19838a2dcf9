"""The shape of the package: its files and its door. Who imports whom stands in pyproject.toml."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from grimp import build_graph

PACKAGE = "pixel_level_contrastive_learning"
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST = 420
LOADED = "print([name for name in ('torch', 'kornia') if name in sys.modules])"

door = importlib.import_module(PACKAGE)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_file_has_a_noun_for_a_name() -> None:
    rooms = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not HOMELESS & rooms


def test_no_file_is_called_like_a_name_at_the_door() -> None:
    assert not {path.stem for path in (ROOT / PACKAGE).iterdir()} & set(door.__all__)


def test_the_guide_names_every_room() -> None:
    guide = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path for path in (ROOT / PACKAGE).iterdir() if path.suffix in ("", ".py")]
    assert [path.stem for path in rooms if path.stem[0] != "_" and path.stem not in guide] == []


def test_no_module_imports_one_that_the_guide_draws_below_it() -> None:
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```text")[1].split("```")[0]
    graph, folder, rows = build_graph(PACKAGE), "", {}
    for number, line in enumerate(drawing.splitlines()):
        if line[:1].strip():
            folder = f"{line.split('/')[0]}." if re.match(r"\w+/", line) else ""
        for word in re.findall(r"\w+", line):
            rows.setdefault(f"{PACKAGE}.{folder}{word}", number)
    drawn = rows.keys() & graph.modules
    assert len(drawn) > 60
    upside_down = [
        (one, other)
        for one in drawn
        for other in graph.find_modules_directly_imported_by(one)
        if rows.get(other, 0) > rows[one]
    ]
    assert not upside_down


def test_the_door_opens_without_torch() -> None:
    assert run(f"import sys, {PACKAGE} as door; dir(door); {LOADED}") == "[]"


def test_the_learner_loads_without_kornia() -> None:
    assert run(f"import sys; from {PACKAGE} import PixelCL; {LOADED}") == "['torch']"


def test_every_name_at_the_door_leads_somewhere() -> None:
    assert {"PPM", "PixelCL", "View"} <= set(door.__all__) <= set(dir(door))
    for name in door.__all__:
        thing = getattr(door, name)
        assert thing.__name__ == name
        assert thing.__module__.startswith(f"{PACKAGE}.")


def test_any_other_name_is_refused() -> None:
    with pytest.raises(AttributeError) as error:
        door.PixPro  # noqa: B018
    assert str(error.value) == f"module '{PACKAGE}' has no attribute 'PixPro'"
