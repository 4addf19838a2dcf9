"""Stems: the first convolution of a backbone, adapted to any number of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_limits, raise_together
from ..modules.hooks import patch_of


def find_stem(net: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Name and module of the first ``Conv2d`` in order of registration; None if there is none."""
    layers = net.named_modules()
    return next(((name, conv) for name, conv in layers if isinstance(conv, nn.Conv2d)), None)


def patch_size(net: nn.Module) -> tuple[int, int]:
    """Height and width of the patches that a network cuts images into; 1 if it does not."""
    stem = find_stem(net)
    return (1, 1) if stem is None else patch_of(stem[1])


def adapt_channels(net: nn.Module, channels: int, *, keep: bool = True) -> nn.Module:
    """The same network, its stem adapted in place to images of ``channels`` channels.

    The first ``Conv2d`` gets other input channels; its stride, padding and name stay. A network
    whose stem takes that many channels already is left as it is.

    Args:
        net: A backbone whose first ``Conv2d`` sees the image.
        channels: Channels of the images.
        keep: Adapt the weights as timm does (`adapt_input_conv`); otherwise draw them anew from a
            normal distribution that keeps the variance of the outputs.

    Raises:
        ValueError: There is no ``Conv2d``, it is grouped, or ``channels`` is not a whole number of
            at least 1.

    >>> adapt_channels(nn.Sequential(nn.Conv2d(3, 8, kernel_size=3)), 5)
    Sequential(
      (0): Conv2d(5, 8, kernel_size=(3, 3), stride=(1, 1))
    )
    """
    raise_together(*check_limits({"channels": channels}))
    stem = find_stem(net)
    if stem is None:
        raise ValueError(
            f"{type(net).__name__} has no Conv2d to adapt to {channels} channels; give the "
            "function that builds it a parameter channels"
        )
    name, conv = stem
    if conv.in_channels == channels:
        return net
    if conv.groups != 1:
        raise ValueError(
            f"the stem {name!r} of {type(net).__name__} has {conv.groups} groups and cannot be "
            f"adapted to {channels} channels; give the function that builds it a parameter channels"
        )
    with torch.no_grad():
        old = conv.weight
        if keep:
            weight = adapt_input_conv(channels, old)
        else:
            # More inputs with smaller weights each: the variance of the outputs stays.
            std = old.std().item() * (conv.in_channels / channels) ** 0.5
            weight = old.new_empty(old.shape[0], channels, *old.shape[2:]).normal_(std=std)
    for module in net.modules():  # layers of transformers refuse another number of channels
        if getattr(module, "num_channels", None) == conv.in_channels and conv in module.modules():
            setattr(module, "num_channels", channels)  # noqa: B010  # no declared attribute
    if getattr(getattr(net, "config", None), "num_channels", None) == conv.in_channels:
        net.config.num_channels = channels  # type: ignore[union-attr]  # of transformers
    conv.in_channels = channels
    conv.weight = nn.Parameter(weight, old.requires_grad)
    # torchvision's GoogLeNet and Inception rescale red, green and blue one by one.
    if hasattr(net, "transform_input"):
        setattr(net, "transform_input", False)  # noqa: B010  # no declared attribute
    return net


def adapt_input_conv(in_chans: int, conv_weight: Tensor) -> Tensor:
    """As `timm.models.adapt_input_conv`, from any number of channels, not only from three."""
    if in_chans == 1:
        return conv_weight.sum(dim=1, keepdim=True)
    given = conv_weight.shape[1]
    repeated = torch.arange(in_chans, device=conv_weight.device) % given
    return conv_weight[:, repeated] * (given / in_chans)
