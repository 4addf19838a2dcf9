"""Fingerprints: what a network's code computes, whatever its weights are."""

from __future__ import annotations

import logging
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..modules.feature_info import duplicate

PERIOD = 65_521
"""Values after which the noise repeats: a prime, so that no two rows of a weight are equal."""
FIGURES = 8
"""Numbers in a fingerprint, each of about 1."""
TOLERANCE = 0.01
"""How much the figures of the same code may differ: machines round differently."""
GAIN = 3.0
"""The square of a layer's largest weight, times its inputs: signals stay near 1."""
log = logging.getLogger(__name__)


def fingerprint_of(
    net: nn.Module, channels: int, size: tuple[int, int]
) -> tuple[float, ...] | None:
    """Figures of what a network gives for a fixed image, every weight replaced by fixed noise.

    So two networks with the same names and shapes of weights have one fingerprint if their code
    does the same. It is computed on a copy, in float32 on the CPU and in eval mode.

    Args:
        net: The network.
        channels: Channels of its images.
        size: Their ``(height, width)``.

    Returns:
        The figures; None where it cannot be computed, such as for want of memory, or the network
        takes no such image or gives no finite tensor.
    """
    try:
        figures = figures_of(net, (1, channels, *size))
    except Exception as error:  # a failed check must not lose what was trained
        log.debug("no fingerprint of %s: %s", type(net).__name__, error)
        return None
    known = bool(figures.isfinite().all() and figures.any())
    return tuple(figures.round(decimals=5).tolist()) if known else None


def figures_of(net: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The figures of a network for an image of this shape, whatever they are."""
    copied = duplicate(getattr(net, "_orig_mod", net)).cpu().float().eval()
    block = fixed_noise()
    for name, tensor in copied.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.copy_(fixed_weight(name, tensor, block))
    image = stretched(block, "image", shape)
    precision = torch.get_float32_matmul_precision()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.default_generator.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.compiler.set_stance("force_eager"):
                given = tree_leaves(copied(image))
        finally:
            torch.set_float32_matmul_precision(precision)
    figures = torch.zeros(FIGURES, dtype=torch.float64)
    for tensor in given:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            flat = tensor.double().flatten()
            flat = flat / flat.norm()
            against = (stretched(block, str(salt), flat.shape) for salt in range(FIGURES))
            figures += torch.stack([(flat * noise).sum() for noise in against])
    return figures


def fixed_noise() -> Tensor:
    """Noise from -1 to 1, from whole numbers: the same with every version of torch."""
    bits = torch.arange(1, PERIOD + 1)
    for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):  # of xxHash and MurmurHash
        bits = bits * factor % 2**32
        bits = bits ^ (bits >> 15)
    return bits.double().div(2**31).sub(1).float()


def stretched(block: Tensor, salt: str, shape: tuple[int, ...]) -> Tensor:
    """Noise in a shape, from another place for each salt; float32."""
    count, start = torch.Size(shape).numel(), crc32(salt.encode()) % PERIOD
    return block.repeat((start + count) // PERIOD + 1)[start : start + count].view(shape)


def fixed_weight(name: str, tensor: Tensor, block: Tensor) -> Tensor:
    """Noise in place of a weight, so scaled that a signal neither dies nor explodes."""
    values = stretched(block, name, tuple(tensor.shape))
    if tensor.numel() and tensor.ndim in (2, 4, 5):  # linear layers and convolutions
        return values.mul((GAIN / tensor[0].numel()) ** 0.5)
    return 0.25 * values + (tensor.ndim == 1 and name.endswith(("weight", "var")))


def differs(one: tuple[float, ...] | None, two: tuple[float, ...] | None) -> bool:
    """Whether two fingerprints are known, and of code that computes different results."""
    if one is None or two is None or len(one) != len(two):
        return False
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) > TOLERANCE
