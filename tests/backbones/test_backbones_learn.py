"""Well-known backbones learn, whatever they are made of, and come out clean."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from transformers import AutoConfig, AutoModel

from pixel_level_contrastive_learning import PixelCL

SIDE = 64


def five_bands() -> nn.Module:
    """A custom network for five channels, with a head that is never reached."""
    return nn.Sequential(
        nn.Conv2d(5, 16, 4, 4),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 4, 4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def short_vit_b_16() -> nn.Module:
    """ViT-B/16 with two of its twelve blocks: all of them take a quarter of a minute."""
    sizes = {"num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}
    return models.VisionTransformer(image_size=SIDE, patch_size=16, num_layers=2, **sizes)


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """How to build a network of timm."""
    return lambda: timm.create_model(name, **settings)


def transformers_model(family: str, **settings: Any) -> Callable[[], nn.Module]:
    """How to build a network of transformers with so few weights."""
    return lambda: AutoModel.from_config(AutoConfig.for_model(family, **settings))


STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOWS = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "window_size": 4}

Backbone = tuple[Callable[[], nn.Module], dict[str, Any]]
BACKBONES: dict[str, Backbone] = {
    "torchvision/resnet18": (models.resnet18, {}),
    "torchvision/resnet50": (models.resnet50, {}),
    "torchvision/convnext_tiny": (models.convnext_tiny, {}),
    "torchvision/swin_t": (models.swin_t, {}),
    "torchvision/vit_b_16": (short_vit_b_16, {}),
    "torchvision/mobilenet_v3_small": (models.mobilenet_v3_small, {}),
    "timm/resnet26": (timm_model("resnet26"), {}),
    "timm/convnext_atto": (timm_model("convnext_atto"), {}),
    "timm/vit_tiny": (timm_model("vit_tiny_patch16_224", img_size=SIDE), {}),
    "timm/swin_tiny": (timm_model("swin_tiny_patch4_window7_224", img_size=SIDE), {}),
    "timm/efficientnet_b0": (timm_model("efficientnet_b0"), {}),
    "transformers/resnet": (transformers_model("resnet", embedding_size=8, **STAGES), {}),
    "transformers/convnext": (transformers_model("convnext", **STAGES), {}),
    "transformers/vit": (transformers_model("vit", image_size=SIDE, **TOKENS), {}),
    "transformers/swin": (transformers_model("swin", **WINDOWS), {}),
    "transformers/dinov2": (transformers_model("dinov2", **TOKENS, patch_size=16), {}),
    "smp/unet": (
        lambda: smp.Unet("resnet18", encoder_weights=None),
        {"hidden_layer_pixel": "decoder.blocks.2"},
    ),
    "smp/unet, levels": (
        lambda: smp.Unet("resnet18", encoder_weights=None),
        {"hidden_layer_pixel": [f"decoder.blocks.{block}" for block in (0, 1, 2)]},
    ),
    "smp/fpn": (
        lambda: smp.FPN("resnet18", encoder_weights=None),
        {"hidden_layer_pixel": ["decoder.p4", "decoder.p3"]},
    ),
    "our own": (five_bands, {"channels": 5}),
}


class Run(NamedTuple):
    """A learner after three steps, and what it was before them."""

    learner: PixelCL
    before: dict[str, Tensor]
    """Its state dict."""
    losses: list[Tensor]


@pytest.fixture(scope="module", params=BACKBONES)
def run(request: pytest.FixtureRequest) -> Run:
    """Three steps of training."""
    build, settings = BACKBONES[request.param]
    torch.manual_seed(0)
    net = build()
    learner = PixelCL(net, SIDE, projection_size=32, projection_hidden_size=64, **settings)
    assert learner.net is net
    before = copy.deepcopy(learner.state_dict())
    # Adam without decay: every weight that gets a gradient moves, however small the gradient.
    opt = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(3):
        loss = learner(torch.rand(2, learner.views.channels, 80, 96))
        opt.zero_grad()
        loss.backward()
        opt.step()
        learner.update_moving_average()
        losses.append(loss.detach())
    return Run(learner, before, losses)


def trainable(learner: PixelCL) -> dict[str, nn.Parameter]:
    """The parameters that may have a gradient, by name."""
    return {n: weight for n, weight in learner.named_parameters() if weight.requires_grad}


def test_the_loss_is_finite(run) -> None:
    assert all(loss.isfinite() for loss in run.losses)


def test_default_layers_hold_features(run) -> None:
    """Attention weights may look like a map: as many keys as a square has cells."""
    hook = run.learner.online_encoder.pixel_hooks[0]
    assert min(hook.layout.grid) >= 4
    assert ".attn" not in hook.name


def test_unreached_are_exactly_the_parameters_without_gradient(run) -> None:
    without = [name for name, weight in trainable(run.learner).items() if weight.grad is None]
    assert run.learner.unreached_parameters() == sorted(without)
    assert all(name.startswith("online_encoder.net.") for name in without)


def test_every_reached_weight_moves_and_the_target_behind_it(run) -> None:
    now, reached = run.learner.state_dict(), set(trainable(run.learner))
    reached -= set(run.learner.unreached_parameters())
    for name in reached:
        assert now[name].ne(run.before[name]).any(), name
        target = name.replace("online_encoder", "target_encoder")
        if target != name:
            assert now[target].ne(run.before[target]).any(), target
            assert now[target].ne(now[name]).any(), target


def test_unreached_weights_stay(run) -> None:
    now = run.learner.state_dict()
    for name in run.learner.unreached_parameters():
        assert torch.equal(now[name], run.before[name]), name


FRESH = """
import sys, torch
torch.set_num_threads(1)
for folder in map(str.strip, sys.stdin):
    net = torch.load(f"{folder}/net.pt", weights_only=False)
    images, expected = torch.load(f"{folder}/output.pt")
    with torch.no_grad():
        output = net(images)
    output = output if isinstance(output, torch.Tensor) else output[0]  # of transformers
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    imported = "pixel_level_contrastive_learning" in sys.modules
    print(len(net.state_dict()), torch.equal(output, expected), hooks, imported, flush=True)
"""
"""Loads backbones in a process that has never heard of this package."""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[Path], str]]:
    """Ask another process about a backbone that was saved in a folder."""
    command = [sys.executable, "-c", FRESH]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes) as process:

        def ask(folder: Path) -> str:
            print(folder, file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        yield ask
        process.stdin.close()


def test_the_backbone_can_be_loaded_without_this_package(run, fresh, tmp_path) -> None:
    net, images = run.learner.net.eval(), torch.rand(2, run.learner.views.channels, SIDE, SIDE)
    torch.save(net, tmp_path / "net.pt")
    with torch.no_grad():
        output = net(images)
    torch.save(
        (images, output if isinstance(output, Tensor) else output[0]), tmp_path / "output.pt"
    )
    answer = fresh(tmp_path)
    (tmp_path / "net.pt").unlink()  # 100 MiB, some of them
    names = [name for name in run.before if name.startswith("online_encoder.net.")]
    assert answer == f"{len(names)} True False False"
