"""Pretraining on images that lie on the device already, for settings.py.

The trainer decodes files and keeps a run's folder; this loop around `PixelCL` does neither, and can
train the heads alone at first, or hold features near those of the start.
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pixel_level_contrastive_learning import PixelCL, View, augment
from pixel_level_contrastive_learning.evaluation.features import native_bfloat16
from pixel_level_contrastive_learning.views import Placement, cut_views, lay_maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batches(
    images: Tensor, normalise: nn.Module, config: dict[str, Any], seed: int
) -> Iterator[tuple[View, View]]:
    """Two views of each image of a batch without end, 12 batches made at a time."""
    dice = torch.Generator().manual_seed(1000 + seed)
    view, batch = config["view"], config["batch"]
    place = Placement(area_range=(0.2, 1.0), prob_hflip=0.5)
    size = torch.tensor((images.shape[3], images.shape[2]), dtype=torch.float32)
    jitter, sigma = config["jitter"], augment.blur_of(view)
    colour = augment.Photometry((jitter, jitter, jitter, 0.0), prob_blur=0.5, sigma=sigma)

    def drawn(pixels: Tensor) -> View:
        to_image = lay_maps(torch.rand(7, len(pixels), generator=dice), size, place)
        factors = colour.factors(torch.rand(augment.DICE, len(pixels), generator=dice))
        cut = cut_views(pixels, to_image, (view, view))
        changed = normalise(augment.change_colour(cut, factors, sigma[1]))
        return View(changed.contiguous(memory_format=torch.channels_last), to_image.to(DEVICE))

    waiting, most = torch.empty(0, dtype=torch.long), batch * min(12, config["steps"])
    while True:
        while len(waiting) < most:
            waiting = torch.cat((waiting, torch.randperm(len(images), generator=dice)))
        pixels = images[waiting[:most].to(DEVICE)].float() / 255
        waiting = waiting[most:]
        both = drawn(pixels), drawn(pixels)
        for start in range(0, most, batch):
            one, two = (View(*(part[start : start + batch] for part in view)) for view in both)
            yield one, two


class Drift:
    """How far the deepest map has turned from that of the start, over both views of a step."""

    def __init__(self, net: nn.Module, layer: str) -> None:
        self.start = copy.deepcopy(net).requires_grad_(False)
        self.maps: dict[bool, list[Tensor]] = {True: [], False: []}
        self.handles = [
            module.get_submodule(layer).register_forward_hook(
                lambda *given, trained=module is net: self.maps[trained].append(given[-1].float())
            )
            for module in (net, self.start)
        ]

    def __call__(self, views: tuple[View, View]) -> Tensor:
        """After the network has seen the views."""
        with torch.no_grad():
            for view in views:
                self.start(view.pixels)
        pairs = zip(self.maps[True], self.maps[False], strict=True)
        found = sum((1 - cosine_similarity(*pair, dim=1)).mean() for pair in pairs)
        for maps in self.maps.values():
            maps.clear()
        return torch.as_tensor(found)


def learning_shares(
    net: nn.Module, layers: list[str], rates: list[float]
) -> Iterator[tuple[nn.Parameter, float]]:
    """Each of the network's weights with its share of the learning rate, by the map it leads to.

    Weights of a stage with a share of 0 are frozen; those behind the last map have its share.
    """
    weights = list(net.named_parameters())
    ends = [
        max(place for place, (name, _) in enumerate(weights) if name.startswith(f"{layer}."))
        for layer in layers
    ]
    for place, (_, weight) in enumerate(weights):
        share = rates[min(bisect_left(ends, place), len(rates) - 1)]
        weight.requires_grad_(share > 0)
        yield weight, share


def pretrain(
    net: nn.Module,
    layers: list[str],
    images: Tensor,
    normalise: nn.Module,
    config: dict[str, Any],
    seed: int,
    **heads: int,
) -> list[list[float]]:
    """Pretrain a network in place.

    Args:
        net: The network, on the device.
        layers: Its maps of strides 4, 8, 16 and 32.
        images: ``(n, 3, h, w)`` uint8, on the device.
        normalise: Views in [0, 1] to what the network takes.
        config: A value for each setting of settings.py.
        seed: Decides the views and their order; heads are drawn from torch's generator.
        **heads: Sizes of the heads as `PixelCL` takes them, in place of its own.

    Returns:
        The parts of the loss (pixel, instance, drift) at some six steps.
    """
    learner = PixelCL(
        net,
        config["view"],
        hidden_layer_pixel=[layers[level - 1] for level in sorted(config["levels"], reverse=True)],
        hidden_layer_instance=layers[-1],
        use_pixpro=config["loss"] == "pixpro",
        instance_weight=config["instance"],
        **heads,
    )
    learner = learner.to(DEVICE, memory_format=torch.channels_last).train()
    drift = Drift(net, layers[-1]) if config["distill"] else None
    shares = {id(weight): share for weight, share in learning_shares(net, layers, config["rates"])}
    groups = [
        {
            "params": [
                weight
                for weight in learner.parameters()
                if weight.requires_grad
                and shares.get(id(weight)) == share
                and (weight.ndim > 1) == matrices
            ],
            "weight_decay": 1e-4 if matrices else 0.0,
            "share": share,
        }
        for share in (*dict.fromkeys(config["rates"]), None)
        for matrices in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, fused=DEVICE == "cuda")
    steps, alone, warm = config["steps"], config["head_steps"], max(1, config["steps"] // 10)
    peak = config["lr"] * math.sqrt(config["batch"] / 256)

    def rate(now: int, of: int) -> float:
        down = math.cos(math.pi * max(0, now - warm) / max(1, of - warm))
        return peak * min(1, 0.01 + 0.99 * now / warm) * (1 + down) / 2

    curve = []
    for now, views in zip(range(steps), batches(images, normalise, config, seed), strict=False):
        slow = rate(now - alone, steps - alone) if now >= alone else 0.0
        for group in optimiser.param_groups:
            share = group["share"]
            group["lr"] = rate(now, steps) if share is None else share * slow
        optimiser.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=native_bfloat16(DEVICE)):
            terms = learner(views, return_terms=True)
            turned = drift(views) if drift else torch.zeros((), device=DEVICE)
        (terms.loss + config["distill"] * turned).backward()
        optimiser.step()
        follow = (1 - config["momentum"]) * (math.cos(math.pi * (now + 1) / steps) + 1) / 2
        learner.update_moving_average(1 - follow)
        if now % max(1, steps // 5) == 0 or now == steps - 1:
            parts = terms.pixel_loss, terms.instance_loss, turned.detach()
            curve.append([round(float(part), 3) for part in parts])
    for handle in drift.handles if drift else []:
        handle.remove()
    net.requires_grad_()  # fine-tuning trains all of it
    return curve
