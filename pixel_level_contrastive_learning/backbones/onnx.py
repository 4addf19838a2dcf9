"""A backbone as an ONNX program: images in, the pooled vector and the trained map out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import import_extra
from ..modules.feature_info import FeatureInfo, duplicate, unfreeze
from ..modules.hooks import FeatureHooks, as_map, as_vector
from .checkpoint import BackboneCard

INPUT, VECTOR, MAP = "images", "vector", "map"
"""The names of what goes in and comes out; several maps are ``map``, ``map_1`` and so on."""
AXES = {"batch": 0, "height": 2, "width": 3}
"""Axes of the images whose length may be left open."""
TOLERANCE = 1e-3
"""How much the program may differ from the network, as a share of the largest value."""


class Program(NamedTuple):
    """An ONNX program as bytes, and which `AXES` of its images may have any length."""

    content: bytes
    free: tuple[str, ...]


class Features(nn.Module):
    """A copy of a network that gives what was trained: vector ``(b, c)``, maps ``(b, c, h, w)``."""

    def __init__(self, net: nn.Module, card: BackboneCard) -> None:
        super().__init__()
        self.net = unfreeze(duplicate(net)).eval()
        info = FeatureInfo(self.net, card.channels, card.image_size)
        self.pixel_hooks = info.pixel_hooks(card.pixel_layer, 1)
        self.instance_hook = info.hook(card.instance_layer, pixel=False)
        self.hooks = FeatureHooks(*self.pixel_hooks, self.instance_hook)
        self.hooks.attach(self.net)  # never detached: a program is traced with them

    @property
    def names(self) -> list[str]:
        """What the outputs are called."""
        return [VECTOR, MAP, *(f"{MAP}_{level}" for level in range(1, len(self.pixel_hooks)))]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.net(images)
        outputs, size = self.hooks.outputs, (images.shape[2], images.shape[3])
        vector = as_vector(outputs[self.instance_hook.name], self.instance_hook.layout)
        return vector, *(as_map(outputs[hook.name], hook.layout, size) for hook in self.pixel_hooks)


def onnx_program(net: nn.Module, card: BackboneCard) -> Program:
    """The program of a network, checked with onnxruntime; its axes are free where they can be.

    Args:
        net: The network.
        card: Its layers, and channels and size of its images.

    Raises:
        ValueError: It cannot be traced, or the program computes something else.
        ModuleNotFoundError: The extra ``onnx`` is not installed.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(library)
    features, (height, width) = Features(net, card), card.image_size
    dice = torch.Generator().manual_seed(0)

    def images(count: int, *size: int) -> Tensor:
        drawn = torch.rand(count, card.channels, *size, generator=dice)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (card.mean, card.std))
        return (drawn - mean) / std

    error: Exception | None = None
    for free in (tuple(AXES), ("batch",), ()):
        shapes = [(2, height, width)]
        shapes += [(3, height, width)] if "batch" in free else []
        shapes += [(1, 2 * height, width)] if "height" in free else []
        try:
            content = traced(features, images(2, height, width), free)
            compare(features, content, [images(*shape) for shape in shapes])
        except Exception as caught:  # the exporter and the runtime raise all kinds of errors
            error = caught
        else:
            return Program(content, free)
    raise ValueError(
        f"{card.model} cannot be exported to ONNX: {error}; use another format"
    ) from error


def traced(features: Features, images: Tensor, free: Sequence[str]) -> bytes:
    """The program that torch's exporter makes, these axes left open."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of deprecated parts of torch itself
        program: Any = torch.onnx.export(
            features,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=features.names,
            dynamic_shapes=({AXES[name]: name for name in free},),
        )
    content: bytes = program.model_proto.SerializeToString()
    return content


def compare(features: Features, content: bytes, batches: Sequence[Tensor]) -> None:
    """Refuse a program that computes something else than the network."""
    runtime = import_extra("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for images in batches:
        answers = session.run(features.names, {INPUT: images.numpy()})
        with torch.no_grad():
            wanted = features(images)
        for name, answer, expected in zip(features.names, answers, wanted, strict=True):
            difference = (torch.from_numpy(answer) - expected).abs().max()
            largest = expected.abs().max()
            if not difference <= TOLERANCE * largest:  # NaN, too
                raise ValueError(
                    f"the program's {name} differs from the network's by {difference / largest:.2g}"
                    f" of its largest value for images of shape {tuple(images.shape)}"
                )
