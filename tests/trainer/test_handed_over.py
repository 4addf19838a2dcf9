"""Runs on a network, or on a function that builds one, that is handed over in Python."""

import copy
import logging

import pytest
import run_folders
import torch
from torch import nn

from pixel_level_contrastive_learning import evaluate, export, load_backbone, pretrain, visualize
from pixel_level_contrastive_learning.backbones.checkpoint import read_card


class Net(nn.Sequential):
    """A small network that no file holds."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
        )


def equal(one: nn.Module, two: nn.Module) -> bool:
    return run_folders.equal(one.state_dict(), two.state_dict())


@pytest.mark.parametrize(
    ("model", "name"), [(Net(), "Net"), (Net, "Net"), (lambda: Net(), "function")]
)
def test_a_network_without_a_file_is_trained_resumed_and_read(
    tmp_path, settings, images, labelled, caplog, model, name
) -> None:
    before = copy.deepcopy(model)
    with caplog.at_level(logging.INFO):
        result = pretrain(**settings(model=model))
    message = f"the run cannot rebuild {name}: pass it as model= to load_backbone, evaluate"
    assert caplog.text.count(message) == 1
    run = result.run_dir
    is_module = isinstance(model, nn.Module)
    assert ("all layers of the given weights are trained" in caplog.text) == is_module
    assert run_folders.config(run)["lr"] == (1e-3 if is_module else 2e-3)
    assert not is_module or equal(model, before)  # a copy learns
    assert not equal(result.backbone, model if is_module else Net())
    assert equal(load_backbone(run, model=model), result.backbone)

    run_folders.forget(run, "step-00000006", "last")
    resumed, done = (pretrain(out=run, data=images, model=model, resume=True) for _ in range(2))
    assert equal(resumed.backbone, result.backbone)
    assert done.metrics == resumed.metrics
    assert done.metrics["step"] == 6

    card = read_card(run / "backbone.safetensors")
    assert card.model == f"object:{name}"
    rows = evaluate(run, data=labelled, model=model).rows
    names = ["random weights", *["start (as handed over)"] * is_module, str(run)]
    assert [row.name for row in rows] == names
    page = visualize(run, images=str(images), out=tmp_path / "report.html", model=model, count=2)
    assert page.is_file()
    exported = export(run, "state-dict", model=model)
    assert (
        torch.load(exported.path, weights_only=True).keys() == result.backbone.state_dict().keys()
    )
    assert "net = ...  # your network, as passed to pretrain" in exported.how_to


def test_without_the_network_it_is_said_what_to_pass(tmp_path, settings, images) -> None:
    run = pretrain(**settings(model=Net())).run_dir
    for read in (
        lambda: load_backbone(run),
        lambda: evaluate(run, images=images),
        lambda: visualize(run, images=str(images), out=tmp_path / "report.html"),
        lambda: export(run, "safetensors"),
        lambda: pretrain(out=run, resume=True, steps=8),
    ):
        with pytest.raises(
            ValueError, match=r"handed over in Python \(Net\).* pass it again as mo"
        ):
            read()
    with pytest.raises(ValueError, match="other weights: model from 'object:Net' to 'object:func"):
        pretrain(out=run, resume=True, steps=8, model=lambda: Net())


@pytest.mark.parametrize("added", [True, False])
def test_code_that_changed_since_the_run_is_refused_by_name(settings, labelled, added) -> None:
    small, large = Net(), Net()
    large[0].extra = nn.Conv2d(3, 8, 1)  # a layer that does not change what is read
    before, now = (small, large) if added else (large, small)
    run = pretrain(**settings(model=before)).run_dir
    for use in (
        lambda: load_backbone(run, model=now),
        lambda: evaluate(run, data=labelled, model=now),
        lambda: export(run, "safetensors", model=now),
        lambda: pretrain(out=run, resume=True, model=now),
    ):
        with pytest.raises(ValueError, match=r"changed since the run: .*0\.extra\.bias is"):
            use()


def test_code_that_computes_something_else_since_the_run_is_told(settings, images) -> None:
    """As many weights, of the same names and shapes."""
    model, now = Net(), Net()
    now[2] = nn.Tanh()
    run = pretrain(**settings(model=model)).run_dir
    for use in (
        lambda: load_backbone(run, model=now),
        lambda: evaluate(run, images=images, model=now),
        lambda: export(run, "safetensors", model=now),
        lambda: pretrain(out=run, data=images, resume=True, steps=8, model=now),
    ):
        with pytest.warns(UserWarning, match="gives different results than during the run"):
            use()
    load_backbone(run, model=now)  # it went on with this code


def test_random_weights_beside_a_network_are_not_its_own(tmp_path, settings, images) -> None:
    model = Net()
    with torch.no_grad():
        model[0].weight.zero_()  # all spots look the same to it
        model[0].bias.zero_()
    run = pretrain(**settings(model=model, steps=1, lr=1e-9, final_lr=0.0)).run_dir
    random, start, _ = evaluate(run, images=images, model=model).rows
    assert random.scores["spread"] > 0.1
    assert start.scores["spread"] == pytest.approx(0, abs=1e-3)


def test_channels_that_the_network_does_not_take_are_adapted(tmp_path, settings) -> None:
    gray = [torch.rand(1, 40, 48) for _ in range(12)]
    for model, out in ((Net(), "module"), (Net, "class")):
        options = settings(model=model, data=gray, out=str(tmp_path / out), steps=1)
        assert pretrain(**options).backbone[0].weight.shape[1] == 1
    assert run_folders.config(tmp_path / "class")["model"] == "object:Net"
