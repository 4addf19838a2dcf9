"""Detection: Faster R-CNN with FPN on pretrained ResNets, on synthetic scenes with boxes.

pixelcl demo --out demo && pixelcl export demo/run --format torchvision
python examples/detection.py random:torchvision/resnet18 demo/run/backbone-torchvision.pth
"""

import argparse
from collections.abc import Sequence

import torch
from scipy import ndimage
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_iou, masks_to_boxes

from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone
from pixel_level_contrastive_learning.demo.scenes import CLASSES, draw_scene

SMALLEST = 30  # pixels of a shape; a partly hidden one may show fewer
Boxes = dict[str, Tensor]  # boxes (n, 4) as edges, labels (n,), and scores (n,) of detections


def boxes_in(mask: Tensor) -> Boxes:
    """A box around each connected shape of a mask ``(h, w)`` of class ids, 0 the background."""
    boxes, labels = [torch.empty(0, 4)], []
    for label in range(1, len(CLASSES)):
        parts, count = ndimage.label(mask.numpy() == label)
        for part in range(1, count + 1):
            shape = torch.from_numpy(parts == part)
            if shape.sum() >= SMALLEST:
                edges = torch.tensor([0, 0, 1, 1])  # the last pixel ends one pixel further
                boxes.append(masks_to_boxes(shape[None]) + edges)
                labels.append(label)
    return {"boxes": torch.cat(boxes), "labels": torch.tensor(labels, dtype=torch.int64)}


def detector(weights: str, size: int) -> FasterRCNN:
    """A detector around a ResNet, fed as the backbone was in pretraining."""
    net, card, _ = read_backbone(weights)
    stages = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    widths = [net.inplanes // 8, net.inplanes // 4, net.inplanes // 2, net.inplanes]
    anchors = AnchorGenerator(((16,), (32,), (48,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(
        BackboneWithFPN(net, stages, widths, out_channels=128),
        num_classes=len(CLASSES),
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_train=100,  # a scene has few shapes
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
        image_mean=card.mean,
        image_std=card.std,
        min_size=size,
        max_size=size,
    )


def average_precision(
    found: Sequence[Boxes], truth: Sequence[Boxes], overlap: float = 0.5
) -> float:
    """AP at this IoU, the mean over the classes: each true box is found once, best scores first."""
    figures = []
    for label in range(1, len(CLASSES)):
        remaining = [boxes["boxes"][boxes["labels"] == label] for boxes in truth]
        total, hits, precisions = sum(map(len, remaining)), 0, []
        guesses = [
            (score.item(), image, box)
            for image, prediction in enumerate(found)
            for score, box, predicted in zip(
                prediction["scores"], prediction["boxes"], prediction["labels"], strict=True
            )
            if predicted == label
        ]
        for rank, (_, image, box) in enumerate(sorted(guesses, key=lambda guess: -guess[0]), 1):
            overlaps = box_iou(box[None], remaining[image])[0]
            if len(overlaps) and overlaps.max() >= overlap:
                keep = torch.arange(len(overlaps)) != overlaps.argmax()
                remaining[image] = remaining[image][keep]
                hits += 1
                precisions.append(hits / rank)
        figures += [sum(precisions) / total] if total else []
    return sum(figures) / len(figures)


def main() -> None:
    """Train a detector from each set of weights, and print its AP50 on unseen scenes."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument(
        "weights", nargs="+", help="exported ResNets of torchvision, or random:MODEL"
    )
    for flag, default in {"--steps": 300, "--scenes": 60, "--size": 160, "--batch": 4}.items():
        flags.add_argument(flag, type=int, default=default)
    args = flags.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scenes = [draw_scene(index, (args.size, args.size)) for index in range(2 * args.scenes)]
    truth = [boxes_in(scene.mask) for scene in scenes]
    for weights in args.weights:
        torch.manual_seed(0)
        model = detector(weights, args.size).to(device).train()
        opt = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-4)
        for _ in range(args.steps):
            picked = torch.randint(args.scenes, (args.batch,)).tolist()
            images = [scenes[index].image.to(device) for index in picked]
            targets = [{k: v.to(device) for k, v in truth[index].items()} for index in picked]
            loss = sum(model(images, targets).values())
            opt.zero_grad()
            loss.backward()
            opt.step()
        model.eval()
        with torch.no_grad():
            images = [scene.image.to(device) for scene in scenes[args.scenes :]]
            found = [{k: v.cpu() for k, v in model([image])[0].items()} for image in images]
        print(f"{weights}: AP50 {average_precision(found, truth[args.scenes :]):.3f}", flush=True)


if __name__ == "__main__":
    main()
