"""Examples, notebooks and loops run as for a reader, and leave behind what they promise."""

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from PIL import Image
from torchvision import models
from transformers import AutoModel

from pixel_level_contrastive_learning import PixelCL, cli, export
from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone, save_backbone
from pixel_level_contrastive_learning.demo.scenes import save_scenes
from pixel_level_contrastive_learning.geometry import Positives
from pixel_level_contrastive_learning.views import Placement, draw_maps

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP = (ROOT / "docs/loop.md").read_text(encoding="utf-8")
SITE = (ROOT / "docs/site_pages.py").read_text(encoding="utf-8")
"""It names the files outside ``docs/`` and ``examples/`` that the site has, too."""
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = "--size", "64", "--batch", "2", "--steps", "2", "--out", "net.pt"
OF_LIGHTNING = "-W", "ignore:`isinstance(treespec", "-W", "ignore:The 'train_dataloader' does not"
WITHOUT = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method("spawn")  # as on Windows and macOS, a worker imports the script
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: it cannot be imported
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def started(script: str, *arguments: str, cwd: Path, without: str = "") -> Any:
    """An example that was run in a process of its own with warnings as errors.

    ``without`` names modules, by commas, that are not there.
    """
    command = [sys.executable, "-W", "error", *OF_LIGHTNING]
    command += ["-c", WITHOUT, without or "nothing"]
    command += [str(EXAMPLES / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run(script: str, *arguments: str, cwd: Path, without: str = "") -> str:
    """What an example prints."""
    done = started(script, *arguments, cwd=cwd, without=without)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    save_scenes(tmp_path / "scenes", {"train": 4, "val": 1}, size=(96, 120))
    return tmp_path / "scenes"


def test_the_loop_refuses_what_it_would_turn_white(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("I;16", (160, 160), 9000).save(tmp_path / "deep" / "a.png")
    done = started("pretrain_loop.py", "deep", *SHORT, cwd=tmp_path)
    assert done.returncode == 2
    refused = "deep/a.png is 16-bit or float; `pixelcl pretrain` scales such"
    assert done.stderr.splitlines()[-1] == f"pretrain_loop.py: error: {refused}"
    assert "Traceback" not in done.stderr


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command of pixelcl prints."""

    def answer(*arguments: object) -> str:
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    return answer


def test_the_loop_pretrains_a_resnet_on_a_folder(scenes, said, tmp_path) -> None:
    """What it writes is taken by torch, and by whatever takes weights here."""
    out = run("pretrain_loop.py", "scenes/images/train", *SHORT, cwd=tmp_path)
    assert out.count("pixel_cosine") == 2
    weights = tmp_path / "net.pt"
    torch.manual_seed(0)
    net = models.resnet18(weights=None)
    before = net.conv1.weight.clone()
    net.load_state_dict(torch.load(weights))
    assert not torch.equal(net.conv1.weight, before)

    judged = said("evaluate", weights, "--data", scenes, "--protocol", "knn")
    assert "times random weights" in judged
    assert "hit@1" in said("evaluate", weights, "--images", scenes / "images" / "val")
    assert "matched 122 of 122 keys" in said("export", weights, "--format", "timm")
    small = "--model", "torchvision/resnet18", "--image-size", 32, "--projection-hidden-size", 8
    short = "--steps", 1, "--batch-size", 4, "--workers", 0, "--weights", weights
    assert "run:" in said("pretrain", scenes / "images", "--out", tmp_path / "run", *small, *short)


def test_the_loop_needs_nothing_but_the_four_dependencies(scenes, tmp_path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {line.partition(">")[0] for line in project["optional-dependencies"]["train"]}
    extra -= {"pillow"}  # torchvision brings it
    modules = [
        module
        for module, names in packages_distributions().items()
        if extra & {name.lower().replace("_", "-") for name in names}
    ]
    assert {"rich", "safetensors", "timm"} <= set(modules)
    out = run("pretrain_loop.py", "scenes", *SHORT, cwd=tmp_path, without=",".join(modules))
    assert "pixel_cosine" in out
    assert len(torch.load(tmp_path / "net.pt")) == 122
    assert not (tmp_path / "net.json").exists()


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_the_loop_says_where_it_finds_no_image(folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    done = started("pretrain_loop.py", folder, *SHORT, cwd=tmp_path)
    assert done.returncode == 2
    assert f"there is no image below {folder}; give a folder of JPEGs" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_loop_makes_the_folder_of_its_weights(scenes, tmp_path) -> None:
    run("pretrain_loop.py", "scenes", *SHORT[:-1], "new/deep/net.pt", cwd=tmp_path)
    assert len(torch.load(tmp_path / "new/deep/net.pt")) == 122


def test_the_loop_takes_real_photographs(streets: Path, tmp_path: Path) -> None:
    out = run("pretrain_loop.py", str(streets / "images" / "val"), *SHORT, cwd=tmp_path)
    assert "pixel_cosine" in out
    assert (tmp_path / "net.pt").stat().st_size > 0


@pytest.mark.filterwarnings("ignore:unclosed file")  # a picture that a notebook shows
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if "outputs" in cell]
    assert not any(cell["outputs"] for cell in cells)
    for cell in cells:
        exec("".join(cell["source"]), names)
    evaluation = names["evaluation"]
    assert Path("run/backbone.safetensors").exists()
    assert "mIoU" in str(evaluation)


# The loops of the README and of the page about them.


@pytest.mark.parametrize("page", [README.split("## In your own training loop")[1], LOOP])
def test_a_loop_leaves_weights_that_pixelcl_takes(
    page: str, scenes, said, tmp_path, monkeypatch
) -> None:
    loop, card = PYTHON.findall(page)[0], PYTHON.findall(LOOP)[1]
    names: dict[str, Any] = {"loader": [torch.rand(2, 3, 80, 80)] * 2}
    monkeypatch.chdir(tmp_path)
    for lines in (loop, card):
        for large, small in (("resnet50", "resnet18"), ("256", "128"), ("2048", "16")):
            lines = lines.replace(large, small)
        exec(lines, names)
    network = models.resnet18()
    network.load_state_dict(torch.load("improved-resnet.pt"))
    assert torch.equal(network.conv1.weight, names["resnet"].conv1.weight)
    weights = "improved-resnet.pt"
    assert weights in said("evaluate", weights, "--data", scenes, "--protocol", "knn")


def test_an_image_is_prepared_as_the_recipe_says(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    net, card, _ = read_backbone("random:torchvision/resnet18")
    card = replace(card, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    save_backbone(tmp_path / "runs/slides/backbone.safetensors", net, card)
    Image.new("RGB", (40, 32), (51, 102, 255)).save("slide.png")
    recipes = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(PYTHON.findall(recipes.split("## An image for the network")[1])[0], names)
    assert names["image"][:, 0, 0].tolist() == pytest.approx([0.2, 0.8, 3.5])
    assert torch.equal(names["output"], net.eval()(names["image"][None]))


def test_crops_of_small_sides_leave_images_without_pairs() -> None:
    """What the page about the loop says to do then is the way that helps."""

    def without_pairs(*sides: float) -> float:
        crops = Placement(ratio_range=sides)
        one, two = (draw_maps(640, (480, 640), crops) for _ in range(2))
        pairs = Positives(one, two, (8, 8), (8, 8), threshold=0.7).count()
        return (pairs == 0).float().mean().item()

    default = inspect.signature(PixelCL).parameters["cutout_ratio_range"].default
    assert without_pairs(*default) == without_pairs(0.5, 1.0) == 0
    assert 0 < without_pairs(0.3, 1.0) < without_pairs(0.05, 1.0) < without_pairs(0.05, 0.8)
    advice = " ".join(LOOP.split("## Is it working?")[1].split())
    assert "raise the lower bound of `cutout_ratio_range` (or `--crop-area`)" in advice


def test_a_network_of_ones_own_on_five_channels(tmp_path: Path) -> None:
    out = run("custom_backbone.py", cwd=tmp_path)
    assert out.count("pixel_cosine") == 5
    assert "never trained: online_encoder.net.head.bias, online_encoder.net.head.weight" in out
    assert torch.load(tmp_path / "satellite-net.pt")["stages.0.0.weight"].shape[1] == 5


@pytest.mark.parametrize("script", sorted(file.name for file in EXAMPLES.glob("*.py")))
def test_an_example_fits_on_a_page(script: str) -> None:
    lines = (EXAMPLES / script).read_text().splitlines()
    assert len(lines) <= (120 if script == "detection.py" else 62)


@pytest.mark.parametrize(
    ("script", "steps"), [("lightning_module.py", 1), ("fabric_loop.py", 5)], ids=str
)
def test_a_loop_of_lightning_leaves_a_plain_resnet(script, steps, tmp_path: Path) -> None:
    out = run(script, cwd=tmp_path)
    assert out.count("pixel_cosine") == steps
    torch.manual_seed(0)
    net = models.resnet18(weights=None)
    before = net.conv1.weight.clone()
    net.load_state_dict(torch.load(tmp_path / "improved-resnet.pt"))
    assert not torch.equal(net.conv1.weight, before)


def test_a_network_of_transformers_goes_back_there(tmp_path: Path) -> None:
    out = run("transformers_backbone.py", cwd=tmp_path)
    assert out.count("pixel_cosine") == 5
    assert "pixel layer: layernorm (8x8 cells)" in out
    net = AutoModel.from_pretrained(tmp_path / "improved-dinov2")
    assert type(net).__name__ == "Dinov2Model"


@pytest.mark.filterwarnings("ignore:`isinstance", "ignore:The 'train_dataloader' does not")
def test_the_target_moves_with_the_optimiser_where_batches_are_accumulated(
    tmp_path, monkeypatch
) -> None:
    moved: list[int] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PixelCL, "update_moving_average", lambda _: moved.append(1))
    monkeypatch.setattr(lightning, "Trainer", partial(lightning.Trainer, accumulate_grad_batches=2))
    trainer = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["trainer"]
    assert len(moved) == trainer.global_step == 2


def detection() -> dict[str, Any]:
    """What the example defines."""
    return runpy.run_path(str(EXAMPLES / "detection.py"))


def test_a_detector_is_trained_from_an_exported_backbone(tmp_path: Path) -> None:
    net, card, _ = read_backbone("random:torchvision/resnet18", image_size=(64, 64))
    save_backbone(tmp_path / "backbone.safetensors", net, card)
    export(tmp_path, "torchvision")
    few = "--steps", "2", "--scenes", "2", "--size", "96", "--batch", "2"
    weights = "random:torchvision/resnet18", "backbone-torchvision.pth"
    out = run("detection.py", *weights, *few, cwd=tmp_path).splitlines()
    assert [line.split(": AP50 ")[0] for line in out] == list(weights)
    assert all(0 <= float(line.split()[-1]) <= 1 for line in out)


def test_boxes_are_the_edges_of_connected_shapes() -> None:
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[3:13, 5:25] = 2
    mask[20:30, 5:11] = 2
    mask[35:38, 5:7] = 2  # too small
    mask[0:40, 50:60] = 1
    boxes = detection()["boxes_in"](mask)
    assert boxes["boxes"].tolist() == [[50, 0, 60, 40], [5, 3, 25, 13], [5, 20, 11, 30]]
    assert boxes["labels"].tolist() == [1, 2, 2]
    assert detection()["boxes_in"](torch.zeros(9, 9))["boxes"].shape == (0, 4)


def test_average_precision_by_hand() -> None:
    """Two true boxes; of three guesses the best and the last hit: (1/1 + 2/3) / 2."""
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])}
    guesses = [[0.0, 0, 10, 10], [1.0, 0, 10, 10], [20, 21, 30, 30]]
    predictions = {"boxes": torch.tensor(guesses), "scores": torch.tensor([0.9, 0.8, 0.7])}
    for boxes in (truth, predictions):
        boxes["labels"] = torch.ones(len(boxes["boxes"]), dtype=torch.int64)
    measure = detection()["average_precision"]
    assert measure([predictions], [truth]) == pytest.approx((1 + 2 / 3) / 2)
    other = predictions | {"labels": torch.full((3,), 2)}
    assert measure([other], [truth]) == 0


# The pages.


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
            name = linked.relative_to(ROOT).as_posix()
            assert name.startswith(("docs/", "examples/")) or f'"{name}"' in SITE, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_imports_is_there(page: Path) -> None:
    for block in PYTHON.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    assert hasattr(import_module(node.module), alias.name), alias.name


def test_a_run_opens_no_connection(scenes: Path, tmp_path: Path) -> None:
    """The README says that nothing is sent or downloaded."""
    code = (
        "import sys\n"
        "events = ('socket.connect', 'socket.getaddrinfo', 'urllib.Request')\n"
        "def audit(event, arguments):\n"
        "    downloads = event == 'subprocess.Popen' and arguments[0] == 'curl'\n"
        "    if downloads or event in events: print('connects:', arguments, flush=True)\n"
        "sys.addaudithook(audit)\n"
        "from pixel_level_contrastive_learning.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    small = "--model", "torchvision/resnet18", "--image-size", "32", "--projection-hidden-size", "8"
    short = "--steps", "1", "--batch-size", "4", "--workers", "0"
    command = ["pretrain", str(scenes / "images"), "--out", str(tmp_path / "run"), *small, *short]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "connects:" not in done.stdout
