"""Stems: the first convolution of a backbone, and its kernels for any number of channels."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor, nn

from ..checks import raise_together, whole


def stem_of(net: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The name and the module of the convolution that sees the image; None if there is none.

    It is the first ``Conv2d`` in the order of registration, as in all of torchvision and timm.
    """
    layers = net.named_modules()
    return next(((name, own) for name, own in layers if isinstance(own, nn.Conv2d)), None)


def adapt_channels(net: nn.Module, channels: int, *, keep: bool = True) -> nn.Module:
    """The very network handed in, its stem made ready for images of ``channels`` channels.

    The first ``Conv2d`` is changed in place: same kernels, stride, padding and name, other input
    channels. A network whose stem takes that many already is left as it is.

    Args:
        net: A backbone whose first ``Conv2d`` sees the image.
        channels: Channels of the images.
        keep: Whether the kernels have learned something, see `spread_kernels`; otherwise they are
            drawn anew, from a normal distribution that keeps the spread of the outputs.

    Raises:
        ValueError: There is no ``Conv2d``, it is grouped, or ``channels`` is no whole number above
            0.
    """
    raise_together(whole("channels", channels, 1))
    stem = stem_of(net)
    if stem is None:
        raise ValueError(
            f"{type(net).__name__} has no Conv2d that could be adapted to {channels} channels; "
            "build it for them: let the function that builds it take channels="
        )
    name, conv = stem
    if conv.in_channels == channels:
        return net
    if conv.groups != 1:
        raise ValueError(
            f"the stem {name!r} of {type(net).__name__} has {conv.groups} groups and cannot be "
            f"adapted to {channels} channels; let the function that builds it take channels="
        )
    with torch.no_grad():
        old = conv.weight
        if keep:
            kernels = spread_kernels(old, channels)
        else:
            # As many inputs more, so much less of each: the outputs keep their variance.
            spread = old.std().item() * (conv.in_channels / channels) ** 0.5
            kernels = old.new_empty(old.shape[0], channels, *old.shape[2:]).normal_(std=spread)
    conv.in_channels = channels
    conv.weight = nn.Parameter(kernels, old.requires_grad)
    # GoogLeNet and Inception of torchvision pick red, green and blue out of their input.
    if hasattr(net, "transform_input"):
        setattr(net, "transform_input", False)  # noqa: B010  # no declared attribute
    return net


def spread_kernels(kernels: Tensor, channels: int) -> Tensor:
    """Learned kernels for another number of channels, so that gray images look about the same.

    One channel takes their sum; more take the kernels in turn, scaled by the counts' ratio (as
    timm does).

    Args:
        kernels: ``(o, c, h, w)`` weights of a convolution.
        channels: Channels wanted.

    Returns:
        ``(o, channels, h, w)`` weights.
    """
    if channels == 1:
        return reduce(kernels, "o c h w -> o 1 h w", "sum")
    given = kernels.shape[1]
    turn = torch.arange(channels, device=kernels.device) % given
    return kernels[:, turn] * (given / channels)
