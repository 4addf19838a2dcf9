"""Pushing a backbone to the Hub, and reading it back."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from fake_hub import PUBLIC, serving
from huggingface_hub import constants
from safetensors.torch import load_file
from small_cards import TWO_CHANNELS
from torch import nn

from pixel_level_contrastive_learning import cli, load_backbone
from pixel_level_contrastive_learning.backbones.checkpoint import (
    BackboneCard,
    read_backbone,
    save_backbone,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.backbones.push import push, without_folder

CARD = replace(TWO_CHANNELS, start="/home/me/secret/start.pth")
EVALUATION = {
    "protocol": "linear",
    "data": "/home/me/secret/masks",
    "rows": [
        {"name": "random weights", "scores": {"mIoU": 0.25}},
        {"name": "/home/me/secret/moved run", "scores": {"mIoU": 0.375}},
        {"name": "RUN", "scores": {"mIoU": 0.5, "accuracy": 0.75}},
    ],
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    with serving(tmp_path / "hub", monkeypatch) as root:
        yield root


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with everything that a page is written from."""
    folder = tmp_path / "run"
    save_backbone(folder / "backbone.safetensors", build_backbone(CARD.model, channels=2), CARD)
    settings = {"data": ["/home/me/secret"], "loss": "pixcontrast", "steps": 300, "epochs": "auto"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "statistics.json").write_text(json.dumps({"images": 1234}))
    found = json.dumps(EVALUATION).replace("RUN", str(folder))
    (folder / "evaluation.json").write_text(found)
    return folder


def same(one: nn.Module, two: nn.Module) -> bool:
    both = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in both)


def test_what_is_pushed_is_read_back_by_its_name(hub, run, capsys) -> None:
    before = {file.name for file in run.iterdir()}
    words = "--push", "me/net", "--private", "--licence", "mit"
    assert cli.main(["export", str(run), *words]) == 0
    assert {file.name for file in run.iterdir()} == before
    assert huggingface_hub.HfApi.private is True
    names = sorted(file.name for file in (hub / "me/net").iterdir())
    assert names == ["README.md", "backbone.json", "backbone.safetensors"]
    said = capsys.readouterr().out
    page = (hub / "me/net/README.md").read_text()
    assert said.startswith("uploaded to hf://me/net:\n  backbone.safetensors  ")
    assert said.rstrip().endswith(page.rstrip())
    for file in (hub / "me/net").iterdir():
        assert b"secret" not in file.read_bytes()

    loaded = read_backbone("hf://me/net")
    assert same(loaded.net, load_backbone(run))
    assert loaded.card.start == "start.pth"
    facts = yaml.safe_load(page.split("---")[1])
    library = "pixel-level-contrastive-learning"  # timm finds no config.json there
    assert (facts["library_name"], facts["license"]) == (library, "mit")
    assert facts["tags"][-1] == "pixcontrast"
    for line in (
        "A backbone pretrained at pixel level, without labels, on 1234 images by",
        "`pixel-level-contrastive-learning` (PixContrast, [arXiv:2011.10043]"
        "(https://arxiv.org/abs/2011.10043)).",
        "net = load_backbone('hf://me/net')",
        "net.load_state_dict(load_file('backbone.safetensors'))",
        "| started from | start.pth |",
        "| steps | 300 |",
        "## linear on masks",
        "|  | mIoU | accuracy |",
        "| random weights | 0.250 |  |",
        "| moved run | 0.375 |  |",
        "| run | 0.500 | 0.750 |",
        "Of the weights: mit.",
    ):
        assert line in page.splitlines() or line in page
    assert "epochs" not in page


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/gone (1)/run/", "run"),
        ("~/secret/run", "run"),
        ("secret\\run.pth", "run.pth"),
        ("random weights", "random weights"),
        ("random weights (/home/me/nets.py:build)", "random weights (nets.py:build)"),
        ("start (secret/start.pth)", "start (start.pth)"),
        ("random weights (timm/resnet18)", "random weights (timm/resnet18)"),
        ("start (timm/resnet18, fed as /home/me/run)", "start (timm/resnet18, run)"),
        *((name, name) for name in ("torchvision/resnet18", "hf://me/net", "mine.py:build")),
    ],
)
def test_a_row_is_named_without_its_folder_there_or_not(name, shown) -> None:
    assert without_folder(name) == shown


@pytest.mark.parametrize("name", ["me/net@v2", "hf://me/net@refs/pr/1", "me/net/net.pth"])
def test_a_revision_or_file_is_no_place_to_push_to(hub, run, name) -> None:
    with pytest.raises(
        ValueError, match=f"repository is '{name}'; it must be OWNER/NAME alone: the new"
    ):
        push(run, name)
    assert not (hub / "me").exists()


def test_nothing_private_goes_into_a_public_repository(hub, run) -> None:
    (hub / "me/net" / PUBLIC).mkdir(parents=True)
    with pytest.raises(ValueError, match="hf://me/net already exists and is public; make it"):
        push(run, "me/net", private=True)
    assert not (hub / "me/net" / "README.md").exists()
    push(run, "me/net")


def test_the_lines_on_the_page_load_the_weights(hub, run, monkeypatch) -> None:
    push(run, "hf://me/net")
    assert huggingface_hub.HfApi.private is False
    monkeypatch.chdir(hub / "me/net")
    page = Path("README.md").read_text()
    assert "Of the weights: not stated by their owner." in page
    assert "license" not in page.split("---")[1]
    for lines in page.split("```python\n")[1:]:
        names: dict[str, nn.Module] = {}
        exec(lines.split("```")[0], names)
        assert same(names["net"], load_backbone(run))


def test_a_dry_run_uploads_nothing_and_says_what_it_would(hub, run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["export", str(run), "--push", "me/net", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(
        "would upload to hf://me/net:\n  backbone.safetensors"
    )
    assert not (hub / "me").exists()
    assert cli.main(["export", str(run), "--push", "me/net", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["repository"], result["dry_run"]) == ("hf://me/net", True)
    weights = (run / "backbone.safetensors").stat().st_size
    assert result["files"]["backbone.safetensors"] == pytest.approx(weights, rel=0.01)
    assert "# net" in result["page"]


def test_a_run_on_code_of_ones_own_is_pushed_without_it(hub, tmp_path) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(2, 4, 3))\n"
    )
    model = f"{folder / 'mine.py'}:build"
    net = build_backbone(model, channels=2)
    card = BackboneCard(**(vars(CARD) | {"model": model, "pixel_layer": "0"}))
    save_backbone(folder / "backbone.safetensors", net, card)
    pushed = push(folder, "me/own")
    assert b"secret" not in pushed.files["README.md"] + pushed.files["backbone.json"]
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"has weights of mine\.py:build, but not its code; get"):
        load_backbone("hf://me/own")
    assert same(load_backbone("hf://me/own", model=net), net)


def test_a_repository_that_may_not_be_written_is_refused(hub, run, monkeypatch) -> None:
    error = huggingface_hub.errors.LocalTokenNotFoundError("no token")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"the Hub refuses hf://me/net: no token; log in with"):
        push(run, "me/net")
    error = huggingface_hub.errors.OfflineModeIsEnabled("offline")
    with pytest.raises(
        ConnectionError, match="hf://me/net could not be reached: offline; check the"
    ):
        push(run, "me/net")


def test_weights_that_are_missing_are_not_pushed(hub, run) -> None:
    path = run / "backbone.safetensors"
    state = load_file(path)
    del state["layer4.0.conv1.weight"]
    torch.save(state, run / "less.pth")
    (run / "less.json").write_text((run / "backbone.json").read_text())
    with (
        pytest.warns(UserWarning, match="does not fill all"),
        pytest.raises(ValueError, match="does not have all weights of its model"),
    ):
        push(run / "less.pth", "me/net")
    assert not (hub / "me").exists()
