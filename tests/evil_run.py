"""A small run whose names and settings try to break the page."""

import json
from pathlib import Path

import torch
import yaml
from small_cards import small_card
from torchvision.transforms.functional import to_pil_image

from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone, save_backbone
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.demo.scenes import draw_scene

EVIL = "</script><script>window.hacked=1</script>"
NAMES = (
    '"><img src=x onerror=window.hacked=2>.png',
    "</script><script>window.hacked=3</script>.png",  # a folder and a file: a name has no slash
    "{{cargo}} & 'quoted' <!--.png",
    "ordinary.png",
)
MODEL = """
from torch import nn

def small(channels=3):
    widths = channels, 16, 32, 48
    stages = (
        nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
        for i, o in zip(widths, widths[1:])
    )
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def make_images(folder: Path, count: int = len(NAMES)) -> Path:
    """Drawn scenes under names that are trouble."""
    for number in range(count):
        path = folder / (NAMES[number] if number < len(NAMES) else f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(draw_scene(number, (72, 96)).image).save(path)
    return folder


def diverge(run: Path) -> None:
    """Have the features of a run be beyond all numbers."""
    net, card, _ = read_backbone(run)
    with torch.no_grad():
        for stage in net[:2]:
            stage[0].weight *= 1e25
            stage[1].running_var.fill_(1e-5)
    save_backbone(run / "backbone.safetensors", net, card)


def make_run(folder: Path, images: Path, **settings: object) -> Path:
    """A run directory of a small network of one's own, with figures of twenty steps."""
    folder.mkdir(parents=True)
    (folder / "small.py").write_text(MODEL)
    model = f"{folder / 'small.py'}:small"
    torch.manual_seed(1)
    net = build_backbone(model, channels=3, image_size=(32, 32))
    card = small_card(model, pixel_layer="2", instance_layer="3")
    save_backbone(folder / "backbone.safetensors", net, card)
    config = {"data": [str(images)], "distance_thres": 0.7, "note": EVIL, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = (
        {
            "step": step,
            "loss": 8 - step / 5,
            "pixel_cosine": step / 25,
            "instance_cosine": step / 30,
            "positive_pairs": 40.0,
            "spread": 0.8,
            "effective_rank": 9.0,
            "grad_norm": 3.0,
            "lr": 1e-3,
            "images_per_second": 100.0,
            "waiting": 0.4,
        }
        for step in range(1, 21)
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
