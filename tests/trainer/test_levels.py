"""Runs whose pixel loss reads several layers, such as those of a decoder."""

import logging

import pytest
import torch
from run_folders import checkpoint, config, forget
from torch import nn
from torchvision.models import resnet18

from pixel_level_contrastive_learning import load_backbone, pretrain
from pixel_level_contrastive_learning.backbones.checkpoint import read_card
from pixel_level_contrastive_learning.backbones.factory import finer_layer
from pixel_level_contrastive_learning.cli import parse_config
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo
from pixel_level_contrastive_learning.trainer.build import build_learner
from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.config_io import settings_of, to_config

DECODERS = """
import segmentation_models_pytorch as smp


def fpn(channels=3):
    size = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}
    return smp.FPN("resnet18", encoder_weights=None, in_channels=channels, **size)


def unet(channels=3):
    size = {"encoder_depth": 5, "decoder_channels": (32, 16, 16, 8, 8)}
    return smp.Unet("resnet18", encoder_weights=None, in_channels=channels, **size)
"""


def test_a_run_of_two_levels_is_resumed_repeated_and_read(
    tmp_path, settings, labelled, caplog
) -> None:
    options = settings(pixel_layer=["6", "2"], picture_every=3, probe=str(labelled))
    result = pretrain(**options | {"out": str(tmp_path / "whole")})
    pretrain(**options)
    run = tmp_path / "run"
    forget(run, "step-00000003", "step-00000004", "step-00000006", "last")
    pretrain(out=run, resume=True)
    assert "resuming at step 2" in caplog.text
    file = config(run)
    assert (file["pixel_layer"], file["pixel_levels"], file["level_weights"]) == (["6", "2"], 2, [])
    resumed, uninterrupted = checkpoint(run)["state_dict"], checkpoint(result.run_dir)["state_dict"]
    for level in (0, 1):
        assert f"learner.propagate_pixels.{level}.transform_net.weight" in resumed
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    card = read_card(run / "backbone.safetensors")
    assert (card.pixel_layer, card.shown_layer) == (("6", "2"), "6")
    repeated = pretrain(config=run / "config.yaml", out=tmp_path / "again")
    for name, value in result.backbone.state_dict().items():
        assert torch.equal(value, repeated.backbone.state_dict()[name])


def test_a_run_keeps_its_levels(tmp_path, settings) -> None:
    options = settings(pixel_levels=2, steps=2)
    pretrain(**options)
    assert config(tmp_path / "run")["pixel_layer"] == ["6", "2"]
    for other in ({"pixel_levels": 1}, {"pixel_layer": "6"}, {"pixel_layer": ["2", "6"]}):
        with pytest.raises(ValueError, match=r"other weights: pixel_layer from \('6', '2'\) to"):
            pretrain(out=tmp_path / "run", resume=True, steps=4, **other)
    same = {"pixel_levels": 2, "level_weights": [3, 1], "pixel_layer": ["6", "2"]}
    pretrain(out=tmp_path / "run", resume=True, steps=4, **same)
    assert config(tmp_path / "run")["level_weights"] == [3, 1]
    with pytest.raises(ValueError, match=r"level_weights is \(1.0,\); give 2 numbers above 0"):
        pretrain(out=tmp_path / "run", resume=True, steps=6, level_weights=(1.0,))


def test_a_dry_run_names_levels_and_grids(settings, caplog) -> None:
    with caplog.at_level(logging.INFO):
        one = pretrain(**settings(dry_run=True)).metrics
        two = pretrain(**settings(dry_run=True, pixel_levels=2)).metrics
    assert "pixel loss on 6 (8x8 cells), instance loss on 7" in caplog.text
    assert "pixel loss on 6 (8x8 cells), 2 (16x16 cells), instance loss on 7" in caplog.text
    assert two["memory_mib"] > one["memory_mib"]
    assert two["positive_pairs"] == one["positive_pairs"]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("fpn", ("decoder.p5", "decoder.p4", "decoder.p3")),
        ("unet", ("decoder.blocks.0", "decoder.blocks.1")),
    ],
)
def test_encoder_and_decoder_are_pretrained_and_given_back(
    tmp_path, settings, model, layers
) -> None:
    (tmp_path / "decoders.py").write_text(DECODERS)
    options = settings(model=f"{tmp_path / 'decoders.py'}:{model}", image_size=64, steps=2)
    options |= {"pixel_layer": layers, "lr": 0.1}
    run = pretrain(**options)
    net = load_backbone(run.run_dir)
    assert type(net).__name__.lower() == model
    stored = {name.removeprefix("learner.online_encoder.net."): tensor
            for name, tensor in checkpoint(run.run_dir)["state_dict"].items()}  # fmt: skip
    assert all(torch.equal(tensor, stored[name]) for name, tensor in net.state_dict().items())
    torch.manual_seed(0)
    start = pretrain(
        **options | {"out": str(tmp_path / "begun"), "steps": 1, "lr": 1e-9, "final_lr": 0.0}
    )
    moved = {
        name
        for name, parameter in start.backbone.named_parameters()
        if not parameter.allclose(stored[name])
    }
    for name in ("encoder.conv1.weight", "encoder.layer4.1.conv2.weight"):
        assert name in moved
    assert all(any(name.startswith(layer) for name in moved) for layer in layers)


def test_levels_are_flags_lines_and_keywords(tmp_path) -> None:
    expected = PretrainConfig(data=("d",), out="r", pixel_layer=("layer4", "layer3"))
    (tmp_path / "a.yaml").write_text("pixel_layer: [layer4, layer3]\n")
    flags = ["d", "--out", "r", "--pixel-layer", "layer4", "layer3"]
    assert parse_config(flags) == expected
    assert parse_config([*flags[:3], "--config", str(tmp_path / "a.yaml")]).pixel_layer == (
        expected.pixel_layer
    )
    assert to_config({"pixel_layer": ["layer4", "layer3"]}).pixel_layer == expected.pixel_layer
    weighed = parse_config([*flags, "--level-weights", "2", "0.5"])
    assert weighed.level_weights == (2.0, 0.5)


def test_how_many_levels_takes_the_place_of_which_and_back(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("pixel_layer: [layer4, layer3]\npixel_levels: 2\n")
    file = {"config": str(tmp_path / "a.yaml")}
    settings = settings_of(file)
    assert (settings["pixel_layer"], settings["pixel_levels"]) == (("layer4", "layer3"), 2)
    settings = settings_of(file | {"pixel_levels": 3})
    assert (settings["pixel_layer"], settings["pixel_levels"]) == ("auto", 3)
    settings = settings_of(file | {"pixel_layer": "layer2"})
    assert (settings["pixel_layer"], settings["pixel_levels"]) == ("layer2", "auto")


@pytest.mark.parametrize("value", [(), ("layer4", 3), ("layer4", ""), 4])
def test_what_names_no_layer_is_refused(value) -> None:
    with pytest.raises(ValueError, match=r"pixel_layer is .*a text or a list of texts"):
        PretrainConfig(pixel_layer=value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("layer4", "layer3")),
        ({"weights": "pretrained"}, "layer4"),
        ({"pixel_levels": 1}, "layer4"),
        ({"pixel_layer": "layer3"}, "layer3"),
        ({"pixel_levels": 3}, ("layer4", "layer3", "layer2")),
        ({"alpha": 0}, "layer4"),
    ],
    ids=str,
)
def test_from_random_weights_a_network_learns_at_two_strides(changes, expected) -> None:
    learner = build_learner(PretrainConfig(**changes), resnet18(), (128, 128), 3)
    assert learner.online_encoder.pixel_layer == expected


def test_a_second_layer_is_not_taken_where_it_is_finer_than_8_pixels() -> None:
    convs = [nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*convs)
    learner = build_learner(PretrainConfig(), net, (64, 64), 3)
    assert learner.online_encoder.pixel_layer == "3"
    deeper = nn.Sequential(*convs, nn.Conv2d(4, 4, 3, 2, 1))
    assert finer_layer(FeatureInfo(deeper, 3, (64, 64))) == "3"
