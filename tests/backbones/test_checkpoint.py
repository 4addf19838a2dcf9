"""Weights: a backbone out to a file and its card, and in again."""

import json
import logging
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_cards import TWO_CHANNELS as CARD
from torch import Tensor, nn

from pixel_level_contrastive_learning import PixelCL
from pixel_level_contrastive_learning.augment import IMAGENET_MEAN, IMAGENET_STD
from pixel_level_contrastive_learning.backbones.checkpoint import (
    BackboneCard,
    card_of,
    load_backbone,
    read_backbone,
    read_card,
    save_backbone,
    save_card,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.backbones.state_dict import load_weights

MODEL = "timm/test_resnet"


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's weights."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same, in any order."""
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name]) for name, value in one.items()
    )


@pytest.fixture
def net() -> nn.Module:
    return build_backbone(MODEL, channels=2)


# The card.

FULL_CARD = replace(
    CARD,
    model="torchvision/resnet18",
    low=(0.0, 1.5),
    high=(4095.0, 2000.0),
    start="Gewichte für später.pth",
    seed=7,
)
FIELDS = json.loads(FULL_CARD.to_json())


def test_a_card_comes_back_as_it_was_and_can_be_read_by_anyone() -> None:
    assert BackboneCard.from_json(FULL_CARD.to_json()) == FULL_CARD
    assert FULL_CARD.version == version("pixel-level-contrastive-learning")
    assert (FIELDS["image_size"], FIELDS["high"]) == ([64, 64], [4095.0, 2000.0])
    assert "später" in FULL_CARD.to_json()


def test_fields_with_a_default_may_be_left_out() -> None:
    optional = ("low", "high", "start", "seed", "version")
    card = BackboneCard.from_json(
        json.dumps({name: value for name, value in FIELDS.items() if name not in optional})
    )
    assert (card.low, card.high, card.start, card.seed) == (None, None, "random", 0)


def test_one_side_is_a_square() -> None:
    assert BackboneCard.from_json(json.dumps(FIELDS | {"image_size": 96})).image_size == (96, 96)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps(FIELDS | {"channels": 0}), "channels is 0; it must be a whole number of at"),
        (json.dumps(FIELDS | {"mean": [0.1]}), "mean is (0.1,); it must be 2 numbers, one per"),
        (json.dumps(FIELDS | {"std": [0.1, 0]}), "std is (0.1, 0); every value must be above 0"),
        (json.dumps(FIELDS | {"image_size": [0, 3]}), "image_size is (0, 3)"),
        (json.dumps(FIELDS | {"sede": 3}), "field is 'sede'; it must be one of 'model', "),
        ("{", "Expecting property name"),
        (json.dumps(FIELDS | {"mean": None}), "mean is (); it must be 2 numbers"),
        (json.dumps(FIELDS | {"std": None}), "std is (); it must be 2 numbers"),
        (json.dumps(FIELDS | {"pixel_layer": []}), "pixel_layer is (); it must name a layer"),
        (json.dumps(FIELDS | {"pixel_layer": ["a", 3]}), "pixel_layer is ('a', 3); it must name"),
        (json.dumps(FIELDS | {"instance_layer": None}), "instance_layer is None; it must name"),
        ("[]", "it is a list, not an object with fields"),
        ('{"model": "x"}', "missing 6 required keyword-only arguments: 'channels', 'image_size',"),
    ],
)
def test_a_wrong_card_is_refused(text, complaint, tmp_path) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_card(tmp_path / "net.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'net.json'} is not a backbone's card: ")
    assert complaint in str(error.value)


def test_a_missing_card_says_what_to_do(tmp_path) -> None:
    path = tmp_path / "net.pth"
    with pytest.raises(ValueError) as error:
        read_card(path)
    assert str(error.value) == (
        f"{path} has no card net.json next to it to say which network it is of; "
        f"put the card there, name a library's model with it, as in timm/NAME={path}, or load "
        "the file into your network: load_weights(net, path)"
    )


def test_a_file_without_a_card_is_read_as_weights_of_the_model_named_before_it(tmp_path) -> None:
    net = build_backbone(MODEL)
    state = {f"module.encoder.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "moco=1.pth")
    source = f"timm/test_resnet={tmp_path / 'moco=1.pth'}"
    read, card, report = read_backbone(source)
    assert same(read.state_dict(), net.state_dict())
    assert report is not None
    assert report.complete
    assert (card.model, card.start) == ("timm/test_resnet", str(tmp_path / "moco=1.pth"))
    assert replace(card, start="random") == read_backbone("random:timm/test_resnet").card
    wide = read_backbone(source, channels=5)
    assert (wide.card.channels, wide.net.conv1[0].in_channels) == (5, 5)
    with pytest.raises(ValueError, match=r"missing\.pth"):
        read_backbone(f"timm/test_resnet={tmp_path / 'missing.pth'}")
    with pytest.raises(ValueError, match="timm has no such network"):
        read_backbone(f"random:{source}")


def test_files_that_an_export_wrote_into_a_run_name_the_run(net, tmp_path) -> None:
    save_backbone(tmp_path / "backbone.safetensors", net, CARD)
    for name in ("backbone-smp.pth", "backbone-onnx.onnx"):
        with pytest.raises(ValueError, match=r"which network it is of; give the folder of the run"):
            read_card(tmp_path / name)
    (tmp_path / "alone.onnx").touch()
    with pytest.raises(ValueError, match=r"alone.onnx holds a computation, .* folder of the run"):
        load_weights(net, tmp_path / "alone.onnx")


def test_weights_in_any_folder_have_their_own_card(tmp_path) -> None:
    """Only a run's checkpoints have that of the run, which lies above them."""
    path = tmp_path / "checkpoints" / "improved.pt"
    path.parent.mkdir()
    path.with_suffix(".json").write_text(FULL_CARD.to_json())
    (tmp_path / "backbone.json").write_text(replace(FULL_CARD, seed=8).to_json())
    assert read_card(path).seed == 7
    assert read_card(path.with_name("step-00000001.ckpt")).seed == 8


# Out and in.


@pytest.mark.parametrize("folder", ["{}", "~"])
def test_a_backbone_comes_back_as_it_was(net, tmp_path, monkeypatch, folder) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_backbone(f"{folder.format(tmp_path)}/backbone.safetensors", net, CARD)
    assert sorted(os.listdir(tmp_path)) == ["backbone.json", "backbone.safetensors"]
    for source in (tmp_path, str(tmp_path), tmp_path / "backbone.safetensors"):
        loaded = read_backbone(source)
        assert loaded.card == CARD
        assert loaded.report is not None
        assert loaded.report.complete
        assert same(state_of(loaded.net), state_of(net))
        assert type(loaded.net) is type(net)
    assert same(state_of(load_backbone(tmp_path)), state_of(net))


def test_the_key_report_is_told(net, tmp_path, caplog) -> None:
    save_backbone(tmp_path / "backbone.safetensors", net, CARD)
    with caplog.at_level(logging.INFO, "pixel_level_contrastive_learning"):
        load_backbone(tmp_path)
    count = len(net.state_dict())
    assert f"matched {count} of {count} keys" in caplog.text


def test_a_backbone_that_is_not_filled_wholly_warns(net, tmp_path) -> None:
    save_backbone(tmp_path / "backbone.safetensors", nn.Linear(3, 3), CARD)
    with pytest.raises(ValueError, match=r"nothing in .* fits ResNet"):
        load_backbone(tmp_path)
    net.fc = nn.Linear(net.num_features, 3)
    save_backbone(tmp_path / "backbone.safetensors", net, CARD)
    with pytest.warns(UserWarning, match=r"does not fill all of timm/test_resnet: matched"):
        loaded = read_backbone(tmp_path)
    assert loaded.report is not None
    assert loaded.report.mismatched == ["fc.weight", "fc.bias"]


def test_a_classifier_that_is_not_there_is_no_warning(net, tmp_path, caplog) -> None:
    save_backbone(tmp_path / "backbone.safetensors", net, CARD)
    without = {n: tensor for n, tensor in net.state_dict().items() if not n.startswith("fc.")}
    assert len(without) < len(net.state_dict())
    save_file(without, tmp_path / "backbone.safetensors")
    with caplog.at_level("INFO"):
        load_backbone(tmp_path)
    assert f"matched {len(without)} of" in caplog.text


def test_what_was_wrapped_around_is_not_written(net, tmp_path) -> None:
    expected = state_of(net)
    wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(net).to(memory_format=torch.channels_last)
    save_backbone(tmp_path / "backbone.safetensors", torch.compile(wrapped), CARD)
    assert load_file(tmp_path / "backbone.safetensors").keys() == expected.keys()
    loaded = load_backbone(tmp_path)
    assert same(state_of(loaded), expected)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in loaded.modules())


def test_tied_weights_are_written_twice(tmp_path) -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    save_backbone(tmp_path / "tied.safetensors", tied, CARD)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert load_weights(fresh, tmp_path / "tied.safetensors").complete


def test_a_broken_backbone_is_not_written(net, tmp_path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, net, CARD)
    before = path.read_bytes()
    with torch.no_grad():
        net.fc.bias[3] = torch.nan
        net.conv1[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError) as error:
        save_backbone(path, net, replace(CARD, seed=5))
    assert str(error.value) == (
        "conv1.0.weight, fc.bias of ResNet hold NaN or infinite values, so the backbone is not "
        f"written (2 of {len(net.state_dict())} tensors); use the last good checkpoint"
    )
    assert path.read_bytes() == before
    assert json.loads(path.with_suffix(".json").read_text())["seed"] == 0


def test_a_mask_may_hold_infinity_and_a_statistic_may_not(net, tmp_path) -> None:
    path = tmp_path / "backbone.safetensors"
    net.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    save_backbone(path, net, CARD)
    assert load_file(path)["mask"].tolist() == [[0, -torch.inf], [0, 0]]
    net.bn1.running_var[0] = torch.inf
    with pytest.raises(ValueError, match=r"^bn1\.running_var of ResNet hold NaN or infinite"):
        save_backbone(path, net, CARD)
    net.bn1.running_var[0] = 1
    net.mask[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^mask of ResNet hold NaN or infinite"):
        save_backbone(path, net, CARD)


class Counting(nn.Linear):
    """A layer that keeps more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_extra_state_is_left_out_with_a_word(tmp_path, caplog) -> None:
    path = tmp_path / "backbone.safetensors"
    net = Counting(4, 4)
    save_backbone(path, net, CARD)
    assert "['_extra_state'] of Counting are not tensors and are left out" in caplog.text
    assert load_file(path).keys() == {"weight", "bias"}
    fresh = Counting(4, 4)
    assert load_weights(fresh, path).complete
    assert torch.equal(fresh.weight, net.weight)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert load_weights(Counting(4, 4), tmp_path / "net.pt").matched == ["weight", "bias"]


def test_another_suffix_is_refused(net, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"it must end in \.safetensors"):
        save_backbone(tmp_path / "backbone.pt", net, CARD)


# The card of a custom training loop.


def learner_of(net: nn.Module, **settings: Any) -> PixelCL:
    return PixelCL(net, (64, 96), projection_size=8, projection_hidden_size=8, **settings)


def test_a_learner_knows_the_card_of_its_backbone() -> None:
    card = card_of(learner_of(build_backbone(MODEL), hidden_layer_pixel="layer3"), MODEL)
    assert card == BackboneCard(
        model=MODEL,
        channels=3,
        image_size=(64, 96),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        pixel_layer="layer3",
        instance_layer="global_pool",
    )


def test_a_card_is_told_what_its_learner_cannot_know(net) -> None:
    learner = learner_of(net, channels=2, mean=(0.1, 0.2), std=(0.3, 1e-4))
    card = card_of(learner, MODEL, low=(0, 5), high=(65535, 4095), start="pretrained")
    assert (card.mean, card.std) == ((0.1, 0.2), (0.3, 1e-4))
    assert (card.low, card.high, card.start) == ((0, 5), (65535, 4095), "pretrained")
    assert card_of(learner, MODEL, std=(0.5, 0.6)).std == (0.5, 0.6)
    with pytest.raises(ValueError, match=r"low is \(0,\); it must be 2 numbers"):
        card_of(learner, MODEL, low=(0,))
    with pytest.raises(ValueError, match="timm has no such network: perhaps timm/test_resnet"):
        card_of(learner, "timm/test_resnett")


def test_unknown_statistics_are_asked_for(net) -> None:
    learner = learner_of(net, channels=2, augment_fn=nn.Identity())
    for given in ({}, {"mean": (0.1, 0.2)}):
        with pytest.raises(ValueError) as error:
            card_of(learner, MODEL, **given)
        assert str(error.value) == (
            "the learner's augment_fn normalises by itself, and its mean and std are not known; "
            "give both to card_of, for values in [0, 1]"
        )
    card = card_of(learner, MODEL, mean=(0.1, 0.2), std=(0.3, 0.4))
    assert (card.mean, card.std) == ((0.1, 0.2), (0.3, 0.4))
    both = learner_of(net, channels=2, augment_fn=nn.Identity(), mean=(0.1, 0.2), std=(0.3, 0.4))
    assert card_of(both, MODEL) == card


@pytest.mark.parametrize("kind", [str, Path])
def test_a_card_beside_a_state_dict_is_enough(net, tmp_path, kind) -> None:
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    save_card(kind(path), CARD)
    loaded = read_backbone(path)
    assert loaded.card == CARD
    assert same(state_of(loaded.net), state_of(net))
    assert sorted(os.listdir(tmp_path)) == ["net.json", "net.pt"]


# Custom networks.

SOURCE = """
from torch import nn

def build(channels, width=4):
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU())
"""


def test_a_custom_network_comes_back_from_anywhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    net = build_backbone("mine.py:build", channels=2)
    run = tmp_path / "runs" / "one"
    save_backbone(run / "backbone.safetensors", net, replace(CARD, model="mine.py:build"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = read_backbone(run)
    assert loaded.card.model == f"{tmp_path / 'mine.py'}:build"
    assert same(state_of(loaded.net), state_of(net))

    (tmp_path / "mine.py").rename(run / "mine.py")  # moved together with the run
    assert same(state_of(load_backbone(run)), state_of(net))

    (run / "mine.py").unlink()
    with pytest.raises(ValueError) as error:
        load_backbone(run)
    assert str(error.value) == (
        f"{run / 'backbone.json'} names {tmp_path / 'mine.py'}, which does not exist; put the file "
        'beside the card, or set "model" in the card to where it is now'
    )


# Other sources.


def test_random_weights_of_any_model() -> None:
    torch.manual_seed(5)
    net, card, report = read_backbone("random:timm/test_resnet", channels=2, image_size=(64, 64))
    torch.manual_seed(5)
    assert same(state_of(net), state_of(build_backbone(MODEL, channels=2)))
    assert report is None
    assert (card.model, card.channels, card.start) == (MODEL, 2, "random")
    assert (card.mean, card.std) == ((0.5, 0.5), (0.5, 0.5))
    assert (card.image_size, card.instance_layer) == ((64, 64), "global_pool")
    assert card.pixel_layer in dict(net.named_modules())


def test_random_weights_of_a_custom_model(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    loaded = read_backbone(f"random:{tmp_path / 'mine.py'}:build", channels=1)
    assert loaded.card.pixel_layer == "1"


def test_pretrained_weights_by_name(monkeypatch) -> None:
    given = build_backbone("timm/test_vit").state_dict()
    hub = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(hub, lambda *_, **__: dict(given))
    net, card, report = read_backbone("timm/test_vit")
    assert same(state_of(net), given)
    assert report is None
    assert (card.start, card.channels, card.image_size) == ("pretrained", 3, (160, 160))


def test_a_transformer_is_read_for_images_of_another_size(tmp_path) -> None:
    given, card, _ = read_backbone("random:timm/test_vit", image_size=(64, 64))
    save_backbone(tmp_path / "backbone.safetensors", given, card)
    net, kept, report = read_backbone(tmp_path, image_size=(96, 128))
    assert net.pos_embed.shape[1] == 6 * 8 + 1
    assert kept == card
    assert report is not None
    assert list(report.shapes) == ["pos_embed"]


def test_images_of_other_channels_are_refused(net, tmp_path) -> None:
    save_backbone(tmp_path / "backbone.safetensors", net, CARD)
    assert read_backbone(tmp_path, channels=2).card == CARD
    with pytest.raises(ValueError, match="takes images of 2 channels, not 3; give it images of 2"):
        read_backbone(tmp_path, channels=3)


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="there are no weights at"):
        read_backbone(tmp_path / "nothing")
    with pytest.raises(ValueError, match="torchvision has no such network: perhaps"):
        read_backbone("torchvision/resnet5O")
    with pytest.raises(ValueError, match="it has no library: perhaps torchvision/resnet18"):
        read_backbone("random:resnet18")
