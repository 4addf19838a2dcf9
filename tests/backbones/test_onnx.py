"""ONNX programs: run where neither torch nor this package is needed, and checked before."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pixel_level_contrastive_learning import export
from pixel_level_contrastive_learning.backbones import onnx
from pixel_level_contrastive_learning.backbones.checkpoint import BackboneCard, save_backbone
from pixel_level_contrastive_learning.backbones.factory import build_backbone

SIZE = (64, 96)


def run_with(
    folder: Path, net: nn.Module, model: str, pixel: str | tuple[str, ...], instance: str
) -> BackboneCard:
    """A run directory with a network; four channels are 16-bit ones."""
    channels = 4 if "resnet18" in model else 3
    card = BackboneCard(
        model=model,
        channels=channels,
        image_size=SIZE,
        mean=tuple(0.25 + i / 64 for i in range(channels)),
        std=tuple(0.5 + i / 64 for i in range(channels)),
        low=(100.0, 101.0, 102.0, 103.0) if channels == 4 else None,
        high=(4000.0, 4001.0, 4002.0, 4003.0) if channels == 4 else None,
        pixel_layer=pixel,
        instance_layer=instance,
    )
    save_backbone(folder / "backbone.safetensors", net, card)
    return card


def outputs(how_to: str, raw: np.ndarray) -> list[np.ndarray]:
    """What the program gives for raw images, run as the export says."""
    names: dict[str, Any] = {}
    exec(how_to, names)
    found: list[np.ndarray] = names["net"](names["prepared"](raw))
    return found


def close(found: np.ndarray, expected: Tensor) -> bool:
    return torch.allclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_convolutional_network_takes_any_batch_and_size(tmp_path) -> None:
    net = build_backbone("torchvision/resnet18", channels=4).eval()
    card = run_with(tmp_path, net, "torchvision/resnet18", ("layer4", "layer3"), "avgpool")
    done = export(tmp_path, "onnx")
    assert done.path == tmp_path / "backbone-onnx.onnx"
    assert done.report.complete
    assert "# (batch, 4, height, width) float32: vector (batch, c), map" in done.how_to
    raw = np.random.default_rng(0).integers(0, 4095, (1, 4, 96, 128)).astype(np.uint16)
    vector, deep, fine = outputs(done.how_to, raw)
    x = torch.from_numpy(raw.astype(np.float32))
    low, high, mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (card.low, card.high, card.mean, card.std)
    )
    x = (((x - low) / (high - low)).clamp(0, 1) - mean) / std
    x = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
    assert close(fine, x)
    assert close(deep, net.layer4(x))
    assert close(vector, net.layer4(x).mean((2, 3)))


@torch.no_grad()
def test_a_network_of_fixed_size_takes_any_batch(tmp_path) -> None:
    net = build_backbone("timm/test_vit", image_size=SIZE).eval()
    card = run_with(tmp_path, net, "timm/test_vit", "norm", "norm")
    done = export(tmp_path, "onnx")
    assert "# (batch, 3, 64, 96) float32, of this size only: vector" in done.how_to
    raw = np.random.default_rng(0).integers(0, 255, (5, 3, *SIZE)).astype(np.uint8)
    vector, tokens = outputs(done.how_to, raw)
    x = torch.from_numpy(raw) / 255
    x = (x - torch.tensor(card.mean).view(-1, 1, 1)) / torch.tensor(card.std).view(-1, 1, 1)
    expected = net.forward_features(x)
    assert close(vector, expected.mean(1))
    assert close(tokens, expected[:, 1:].mT.unflatten(2, (4, 6)))


class Pairs(nn.Module):
    """Takes the map of two images and no more."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4, 8, 12)


def test_a_network_that_allows_no_freedom_is_exported_as_it_is(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), Pairs())
    run_with(tmp_path, net, "object:Sequential", "1", "1")
    done = export(tmp_path, "onnx", model=net)
    assert "# (2, 3, 64, 96) float32, of this size only: vector" in done.how_to


def test_features_that_are_all_zero_are_exported(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU())
    nn.init.constant_(net[0].bias, -9.0)
    run_with(tmp_path, net, "object:Sequential", "1", "1")
    done = export(tmp_path, "onnx", model=net)
    assert not np.any(outputs(done.how_to, np.zeros((1, 3, *SIZE), np.uint8))[1])


def test_a_program_that_computes_something_else_is_not_written(tmp_path, monkeypatch) -> None:
    run_with(tmp_path, build_backbone("timm/test_resnet"), "timm/test_resnet", "layer4", "layer4")
    trace = onnx.traced

    def other(features: nn.Module, *given: Any) -> bytes:
        with torch.no_grad():
            features.net.bn1.bias += 0.5
        content = trace(features, *given)
        with torch.no_grad():
            features.net.bn1.bias -= 0.5
        return content

    monkeypatch.setattr(onnx, "traced", other)
    differs = r"the program's vector differs from the network's by [\d.]+ of its largest value for"
    with pytest.raises(ValueError, match=rf"test_resnet cannot be exported to ONNX: {differs} im"):
        export(tmp_path, "onnx")
    assert not (tmp_path / "backbone-onnx.onnx").exists()


def test_the_extra_is_asked_for_where_it_is_missing(tmp_path, monkeypatch) -> None:
    run_with(tmp_path, build_backbone("timm/test_resnet"), "timm/test_resnet", "layer4", "layer4")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"pixel-level-contrastive-learning\[onnx\]"):
        export(tmp_path, "onnx")
