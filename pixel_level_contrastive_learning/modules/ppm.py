"""The Pixel Propagation Module (arXiv:2011.10043, sec. 3.2)."""

from einops import einsum, rearrange
from torch import Tensor, nn

from ..blocks import Block, by_blocks
from ..checks import LIMITS, raise_together
from ..losses import unit


def transform_net(chan: int, num_layers: int) -> nn.Module:
    """The transform ``g``: 0 layers are the identity, 1 is linear, 2 have a hidden layer."""
    if num_layers == 0:
        return nn.Identity()
    if num_layers == 1:
        return nn.Conv2d(chan, chan, 1)
    return nn.Sequential(
        nn.Conv2d(chan, chan, 1), nn.BatchNorm2d(chan), nn.ReLU(), nn.Conv2d(chan, chan, 1)
    )


class PPM(nn.Module):
    """Pixel Propagation Module: rebuild each pixel from the pixels it resembles.

    ``y_i = sum_j relu(cos(x_i, x_j)) ** gamma * g(x_j)`` (arXiv:2011.10043, sec. 3.2), with ``g``
    scaled to length 1 as in the authors' code. Maps ``(b, c, h, w)`` to the same shape, in at least
    float32; differentiable once. Time grows with ``(h * w) ** 2``, memory with ``h * w``.

    Args:
        chan: Channels ``c``.
        num_layers: Depth of ``g``: 0 identity, 1 linear, 2 with a hidden layer.
        gamma: Exponent of the similarity, at least 1; higher is sharper.

    Raises:
        ValueError: A depth other than 0, 1 or 2, or ``gamma`` below 1.

    >>> import torch
    >>> PPM(chan=8)(torch.rand(2, 8, 7, 7)).shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(self, *, chan: int, num_layers: int = 1, gamma: float = 2.0) -> None:
        super().__init__()
        raise_together(
            LIMITS["ppm_num_layers"]("num_layers", num_layers), LIMITS["ppm_gamma"]("gamma", gamma)
        )
        self.gamma = gamma
        self.transform_net = transform_net(chan, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        pixels = unit(rearrange(x, "b c h w -> b (h w) c"))
        values = unit(rearrange(self.transform_net(x), "b c h w -> b (h w) c"))

        def spread(block: Block, pixels: Tensor, values: Tensor) -> Tensor:
            rows = pixels[:, block.rows]
            likeness = einsum(rows, pixels, "b i c, b j c -> b i j").relu().pow(self.gamma)
            return einsum(likeness, values, "b i j, b j c -> b i c")

        b, n, _ = pixels.shape
        propagated = by_blocks(spread, (b, n, n), pixels, values)
        return rearrange(propagated, "b (h w) c -> b c h w", h=x.shape[-2])
