"""The rooms of the package: the table of contents, and who may import whom."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "pixel_level_contrastive_learning"
ROOMS = (
    "checks",
    "files",
    "blocks",
    "geometry",
    "losses",
    "views",
    "inputs",
    "augment",
    "modules.hooks",
    "modules.feature_info",
    "modules.ppm",
    "modules.encoder",
    "pixel_cl",
    "backbones.stem",
    "backbones.state_dict",
    "backbones.factory",
    "backbones.checkpoint",
    "backbones.export",
    "data.image",
    "data.decoding",
    "data.shards",
    "data.sources",
    "data.statistics",
    "data.crops",
    "data.dataset",
    "data.loader",
    "data.segmentation",
    "data.shard_writer",
    "evaluation.features",
    "evaluation.health",
    "evaluation.correspondence",
    "evaluation.metrics",
    "evaluation.probes",
    "evaluation.finetuning",
    "evaluation.baselines",
    "evaluation.results",
    "evaluation.evaluate",
    "visualization.matches",
    "visualization.pca",
    "visualization.curves",
    "visualization.explorer",
    "visualization.report",
    "trainer.config",
    "trainer.config_io",
    "trainer.auto",
    "trainer.system",
    "trainer.logging",
    "trainer.run_dir",
    "trainer.signals",
    "trainer.training_step",
    "trainer.memory",
    "trainer.metrics",
    "trainer.build",
    "trainer.validation",
    "trainer.trainer",
    "demo.scenes",
    "demo.demo",
    "cli",
    "__main__",
)
"""Every file in reading order: each imports only what stands above it."""
HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}

spec = importlib.util.find_spec(PACKAGE)
assert spec is not None
assert spec.origin is not None
FOLDER = Path(spec.origin).parent
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(source: str, room: str) -> set[str]:
    """The modules of the package that a room names in its imports, wherever they stand.

    ``from .x import y`` may name the room ``x.y`` or a thing in ``x``: it is ``x.y`` where there
    is such a file. What names no room, such as the package itself, comes back as it was named.
    """
    found = set()
    here = [PACKAGE, *room.split(".")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: -node.level] if node.level else []
            base = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                known = inner.removeprefix(f"{PACKAGE}.") in (*FILES, *ROOMS)
                found.add(inner if known else base)
    ours = {name for name in found if name.split(".")[0] == PACKAGE}
    return {name.removeprefix(PACKAGE).removeprefix(".") for name in ours}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The reader of imports, which must not be fooled.


@pytest.mark.parametrize(
    ("source", "room", "expected"),
    [
        ("from .checks import above", "geometry", {"checks"}),
        ("from . import checks, views as v", "geometry", {"checks", "views"}),
        ("from ..checks import above", "modules.ppm", {"checks"}),
        ("from .hooks import Tap", "modules.ppm", {"modules.hooks"}),
        ("from . import hooks", "modules.ppm", {"modules.hooks"}),
        ("from .modules import hooks", "pixel_cl", {"modules.hooks"}),
        ("from .modules.hooks import Tap", "pixel_cl", {"modules.hooks"}),
        ("def f():\n    from .views import View", "geometry", {"views"}),
        ("if TYPE_CHECKING:\n    from .views import View", "geometry", {"views"}),
        (f"import {PACKAGE}.views", "geometry", {"views"}),
        (f"from {PACKAGE} import checks", "geometry", {"checks"}),
        (f"from {PACKAGE}.views import View", "geometry", {"views"}),
        ("from . import View", "geometry", {""}),
        (f"from {PACKAGE} import View", "geometry", {""}),
        ("from .modules import PPM", "pixel_cl", {"modules"}),
        ("import torch\nfrom torch import nn\nfrom views import View", "geometry", set()),
    ],
)
def test_imports_are_read_wherever_they_stand(source, room, expected) -> None:
    assert imports(source, room) == expected


# The rooms.


def test_every_file_is_in_the_list_and_the_list_in_the_package() -> None:
    assert sorted(FILES) == sorted(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


@pytest.mark.parametrize("room", FILES)
def test_a_room_imports_only_rooms_above_it(room) -> None:
    above = set(ROOMS[: ROOMS.index(room)])
    assert imports(FILES[room].read_text(), room) - above == set()


@pytest.mark.parametrize("room", FILES)
def test_a_room_has_a_noun_for_a_name(room) -> None:
    assert not HOMELESS & set(room.split("."))


def test_no_room_is_called_like_a_thing_at_the_door() -> None:
    door = importlib.import_module(PACKAGE)
    assert not {room.split(".")[0] for room in ROOMS} & set(door.__all__)


@pytest.mark.parametrize("room", [room for room in FILES if room != "cli"])
def test_nothing_is_printed_in_a_room(room) -> None:
    names = {
        node.id
        for node in ast.walk(ast.parse(FILES[room].read_text()))
        if isinstance(node, ast.Name)
    }
    assert "print" not in names


# The door.

LOADED = "print([name for name in ('torch', 'kornia') if name in sys.modules])"


def test_the_door_opens_without_torch() -> None:
    assert run(f"import sys, {PACKAGE} as door; dir(door); {LOADED}") == "[]"


def test_the_learner_loads_without_kornia() -> None:
    assert run(f"import sys; from {PACKAGE} import PixelCL; {LOADED}") == "['torch']"


def test_every_name_at_the_door_leads_somewhere() -> None:
    door = importlib.import_module(PACKAGE)
    assert {"PPM", "PixelCL", "View"} <= set(door.__all__) <= set(dir(door))
    for name in door.__all__:
        thing = getattr(door, name)
        assert thing.__name__ == name
        assert thing.__module__.startswith(f"{PACKAGE}.")


def test_any_other_name_is_refused() -> None:
    door = importlib.import_module(PACKAGE)
    with pytest.raises(AttributeError) as error:
        door.PixPro  # noqa: B018
    assert str(error.value) == f"module '{PACKAGE}' has no attribute 'PixPro'"


def test_the_guide_names_every_room_in_this_order() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("```text\n")[1].split("```")[0]
    tops = list(dict.fromkeys(room.split(".")[0] for room in ROOMS if room != "__main__"))
    named = [line.split()[0].rstrip("/") for line in block.splitlines() if not line.startswith(" ")]
    assert named == tops
    words = set(re.findall(r"\w+", block))
    assert [room for room in ROOMS[:-1] if room.split(".")[-1] not in words] == []
