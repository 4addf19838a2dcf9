"""Pretraining on maps of several strides, for settings.py: the whole step is one CUDA graph.

`PixelCL` reads one map and keeps nothing near its start; this learner does both, out of the same
heads, losses and views.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchvision.models.feature_extraction import create_feature_extractor

from pixel_level_contrastive_learning import augment
from pixel_level_contrastive_learning.geometry import Positives
from pixel_level_contrastive_learning.losses import instance_loss, pixcontrast_loss, pixpro_loss
from pixel_level_contrastive_learning.modules import encoder
from pixel_level_contrastive_learning.modules.ppm import PPM
from pixel_level_contrastive_learning.trainer.system import native_bfloat16
from pixel_level_contrastive_learning.views import Placement, cut_views, lay_maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, WIDTH = 2048, 256


def half() -> torch.autocast:
    """bfloat16 where the device has it."""
    known = native_bfloat16(DEVICE)
    return torch.autocast(DEVICE, torch.bfloat16, enabled=known, cache_enabled=False)


class Branch(nn.Module):
    """A backbone with a pixel projector a level and an instance projector."""

    def __init__(self, net: nn.Module, layers: list[str], levels: list[int]) -> None:
        super().__init__()
        names = {name: str(level) for level, name in enumerate(layers, 1)}
        self.maps, self.levels = create_feature_extractor(net, names), [str(i) for i in levels]
        with torch.no_grad():
            blank = torch.zeros(1, 3, 64, 64, device=DEVICE)
            probed = copy.deepcopy(self.maps).eval()(blank)
        channels = {level: own.shape[1] for level, own in probed.items()}
        self.pixel = nn.ModuleList(
            encoder.map_projector(channels[level], HIDDEN, WIDTH) for level in self.levels
        )
        self.instance = encoder.vector_projector(channels["4"], HIDDEN, WIDTH)

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        maps = self.maps(pixels)
        deepest = maps["4"].float()
        pixel = [head(maps[level]) for head, level in zip(self.pixel, self.levels, strict=True)]
        return pixel, self.instance(deepest.mean(dim=(2, 3))), deepest


class Learner(nn.Module):
    """PixPro or PixContrast on several levels, perhaps held near the features of the start."""

    def __init__(self, net: nn.Module, layers: list[str], config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.online = Branch(net, layers, config["levels"])
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.teacher = copy.deepcopy(self.online.maps).requires_grad_(False)
        self.propagate = nn.ModuleList(PPM(chan=WIDTH) for _ in config["levels"])
        self.predict = encoder.predictor(WIDTH, HIDDEN)

    def pixel_loss(self, level: int, online: Tensor, target: Tensor, maps: list[Tensor]) -> Tensor:
        """Of one level, one way."""
        grid = (online.shape[2], online.shape[3])
        pairs = Positives(*maps, grid, grid, 0.7)
        if self.config["loss"] == "pixcontrast":
            return pixcontrast_loss(online.flatten(2), target.flatten(2), pairs, 0.3)
        return pixpro_loss(self.propagate[level](online).flatten(2), target.flatten(2), pairs)

    def forward(self, views: list[Tensor], maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss; and its parts: pixel, instance and drift from the start."""
        online = [self.online(view) for view in views]
        with torch.no_grad():
            target = [self.target(view) for view in views]
        pixel = instance = drift = torch.zeros((), device=DEVICE)
        for own, other, way in ((0, 1, maps), (1, 0, maps[::-1])):
            levels = zip(online[own][0], target[other][0], strict=True)
            losses = [self.pixel_loss(i, *both, way) for i, both in enumerate(levels)]
            pixel = pixel + torch.stack(losses).mean()
            instance = instance + instance_loss(self.predict(online[own][1]), target[other][1])
            if self.config["distill"]:
                with torch.no_grad():
                    start = self.teacher(views[own])["4"].float()
                drift = drift + (1 - cosine_similarity(online[own][2], start, dim=1)).mean()
        loss = pixel + self.config["instance"] * instance + self.config["distill"] * drift
        return loss, torch.stack((pixel, instance, drift)).detach()


def replayable(
    step: Callable[[], None], module: nn.Module, optimiser: torch.optim.Optimizer
) -> Callable[[], None]:
    """The step as one CUDA graph, module and optimiser left as they were; on a CPU the step."""
    if DEVICE == "cpu":
        return step
    before = {key: value.clone() for key, value in module.state_dict().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    module.load_state_dict(before)
    for state in optimiser.state.values():
        for value in state.values():
            value.zero_()
    return graph.replay


def batches(
    images: Tensor, normalise: nn.Module, config: dict[str, Any], seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Two views of each image of a batch and their maps without end, 12 batches made at a time."""
    dice = torch.Generator().manual_seed(1000 + seed)
    view, batch = config["view"], config["batch"]
    place = Placement(area_range=(0.2, 1.0), prob_hflip=0.5)
    size = torch.tensor((images.shape[3], images.shape[2]), dtype=torch.float32)
    jitter, sigma = config["jitter"], augment.blur_of(view)
    colour = augment.Photometry((jitter, jitter, jitter, 0.0), prob_blur=0.5, sigma=sigma)

    def drawn(pixels: Tensor) -> tuple[Tensor, Tensor]:
        to_image = lay_maps(torch.rand(7, len(pixels), generator=dice), size, place)
        factors = colour.factors(torch.rand(augment.DICE, len(pixels), generator=dice))
        cut = cut_views(pixels, to_image, (view, view))
        return normalise(augment.change_colour(cut, factors, sigma[1])), to_image.to(DEVICE)

    waiting, most = torch.empty(0, dtype=torch.long), batch * min(12, config["steps"])
    while True:
        while len(waiting) < most:
            waiting = torch.cat((waiting, torch.randperm(len(images), generator=dice)))
        pixels = images[waiting[:most].to(DEVICE)].float() / 255
        waiting = waiting[most:]
        both = (*drawn(pixels), *drawn(pixels))
        yield from zip(*(own.split(batch) for own in both), strict=True)


def pretrain(
    net: nn.Module,
    layers: list[str],
    images: Tensor,
    normalise: nn.Module,
    config: dict[str, Any],
    seed: int,
) -> list[list[float]]:
    """Pretrain a network in place.

    Args:
        net: The network, on the device.
        layers: Its maps of strides 4, 8, 16 and 32.
        images: ``(n, 3, h, w)`` uint8, on the device.
        normalise: Views in [0, 1] to what the network takes.
        config: A value for each setting of settings.py.
        seed: Decides the views and their order; heads are drawn from torch's generator.

    Returns:
        The parts of the loss (pixel, instance, drift) at some six steps.
    """
    learner = Learner(net, layers, config).to(DEVICE, memory_format=torch.channels_last).train()
    heads = (learner.online.pixel, learner.online.instance, learner.propagate, learner.predict)
    groups = [
        {
            "params": [p for own in part for p in own.parameters() if (p.ndim > 1) == matrices],
            "weight_decay": 1e-4 if matrices else 0.0,
            "lr": torch.zeros((), device=DEVICE),  # a tensor, which a CUDA graph reads anew
        }
        for part in ([learner.online.maps], heads)
        for matrices in (True, False)
    ]
    graphed = DEVICE == "cuda"
    optimiser = torch.optim.AdamW(groups, fused=graphed, capturable=graphed)
    online, target = list(learner.online.parameters()), list(learner.target.parameters())
    steps, alone, warm = config["steps"], config["head_steps"], max(1, config["steps"] // 10)
    peak = config["lr"] * math.sqrt(config["batch"] / 256)
    follow, parts = torch.zeros((), device=DEVICE), torch.zeros(3, device=DEVICE)
    stream = batches(images, normalise, config, seed)
    held = [own.clone() for own in next(stream)]
    held[::2] = (own.contiguous(memory_format=torch.channels_last) for own in held[::2])

    def step() -> None:
        optimiser.zero_grad()
        with half():
            loss, found = learner([held[0], held[2]], [held[1], held[3]])
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            change = torch._foreach_sub(online, target)
            torch._foreach_mul_(change, follow)
            torch._foreach_add_(target, change)
            parts.copy_(found)

    def rate(now: int, of: int) -> float:
        down = math.cos(math.pi * max(0, now - warm) / max(1, of - warm))
        return peak * min(1, 0.01 + 0.99 * now / warm) * (1 + down) / 2

    run, curve = replayable(step, learner, optimiser), []
    for now in range(steps):
        if now:
            for own, new in zip(held, next(stream), strict=True):
                own.copy_(new)
        inner = rate(now - alone, steps - alone) if now >= alone else 0.0
        rates = inner, inner, rate(now, steps), rate(now, steps)
        for group, lr in zip(optimiser.param_groups, rates, strict=True):
            group["lr"].fill_(lr)
        follow.fill_((1 - config["momentum"]) * (math.cos(math.pi * (now + 1) / steps) + 1) / 2)
        run()
        if now % max(1, steps // 5) == 0 or now == steps - 1:
            curve.append([round(part, 3) for part in parts.tolist()])
    return curve
