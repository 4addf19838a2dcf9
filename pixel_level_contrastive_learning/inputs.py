"""What the learner accepts: images or ready views, checked without waiting for the device."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .views import View

DIVISORS = {torch.uint8: " / 255", torch.uint16: " / 65535", torch.bool: ""}
"""What makes images of a dtype lie in [0, 1]; in others white may be either."""
LARGEST = 16.0
"""Images should lie in [0, 1]; even normalised images lie within this."""


def check_images(images: object, channels: int, smallest: int = 1) -> Tensor:
    """The images, if they are floats ``(b, channels, height, width)`` and not too small."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images are a {type(images).__name__}; they must be a float tensor (b, {channels}, "
            "height, width), or a pair of View(pixels, to_image)"
        )
    if not images.is_floating_point():
        over = DIVISORS.get(images.dtype, " / 255 or / 65535, the value of white in the files")
        raise ValueError(
            f"images have dtype {images.dtype}; they must be floats in [0, 1]: "
            f"pass images.float(){over}"
        )
    if images.ndim != 4 or 0 in images.shape:
        hint = "; add a batch dimension with images[None]" if images.ndim == 3 else ""
        raise ValueError(
            f"images have shape {tuple(images.shape)}; they must be (b, {channels}, height, "
            f"width), all above 0{hint}"
        )
    if images.shape[1] != channels:
        hint = f"a network for {images.shape[1]} to PixelCL(..., channels={images.shape[1]})"
        if images.shape[3] == channels:
            hint = "images.permute(0, 3, 1, 2)"
        elif images.shape[1] == 1:
            hint = f"images.expand(-1, {channels}, -1, -1)"
        raise ValueError(
            f"images have {images.shape[1]} channels (shape {tuple(images.shape)}); this learner "
            f"was built for {channels}: pass {hint}"
        )
    if min(images.shape[2:]) < smallest:
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]}; they must be at least {smallest}x"
            f"{smallest}, the stride of the pixel layer: use an earlier layer or larger images"
        )
    return images


def check_views(views: Sequence[Any], channels: int) -> tuple[View, View]:
    """Two views of the same images, if shapes, dtypes and devices agree."""
    is_batch = len(views) > 0 and isinstance(views[0], Tensor) and views[0].ndim == 4
    alone = "; if the batch holds more than images, pass only these: batch[0]" if is_batch else ""
    if len(views) > 0 and all(isinstance(view, Tensor) and view.ndim == 3 for view in views):
        alone = "; if they have one size, make a batch of them: torch.stack(images)"
    if len(views) != 2:
        raise ValueError(f"got {len(views)} views; the learner takes (view_one, view_two){alone}")
    for view in views:
        if not isinstance(view, tuple) or len(view) != 2:
            raise ValueError(
                f"a view is a {type(view).__name__}; it must be View(pixels (b, c, h, w), to_image "
                f"(b, 2, 3)), since the loss needs the position of each pixel{alone}"
            )
        check_images(view[0], channels)
        pixels, to_image = view
        found: object = None  # what is wrong with the map, if anything
        hint = ""
        if not isinstance(to_image, Tensor):
            found = type(to_image).__name__
        elif (
            to_image.dtype not in (torch.float32, torch.float64) or to_image.device != pixels.device
        ):
            found = f"{to_image.dtype} on {to_image.device}"
            if to_image.is_floating_point() and to_image.device == pixels.device:
                hint = (
                    " and keep its precision (Lightning Fabric rounds what a wrapped module is "
                    "given: pass a precision plugin whose convert_input returns its argument)"
                )
        elif to_image.shape != (len(pixels), 2, 3):
            found = tuple(to_image.shape)
        if found is not None:
            raise ValueError(
                f"to_image of a view is {found}; it must be a tensor ({len(pixels)}, 2, 3) of "
                "float32 or float64 on the device of the pixels, one map per image: make it with "
                f"geometry.box_to_map{hint}"
            )
    one, two = (View(*view) for view in views)
    if len(one.pixels) != len(two.pixels):
        raise ValueError(
            f"view one holds {len(one.pixels)} images and view two {len(two.pixels)}; both must "
            "hold the same images in the same order"
        )
    return one, two


class ValueWatch:
    """Checks the values of each batch without making the device wait.

    On the CPU at once; on a GPU the extremes of a batch are copied to the host while work goes on,
    and checked by a later call, once they have arrived.
    """

    def __init__(self) -> None:
        self.warned = False
        self.pending: list[tuple[Tensor, Any]] = []  # extremes, and the event of their arrival

    def __getstate__(self) -> dict[str, object]:
        return {"warned": self.warned, "pending": []}  # events neither pickle nor copy

    def __call__(self, images: Tensor, *, in_unit_range: bool) -> None:
        """Refuse NaN, infinite and, ``in_unit_range``, values beyond 16; warn of those beyond 1."""
        lowest, highest = torch.aminmax(images.detach().flatten(1), dim=1)
        extremes = torch.stack((lowest, highest))
        if not in_unit_range:  # finite values become 0; NaN and infinity become NaN
            extremes = extremes * 0
        if images.device.type == "cpu":
            self.judge(extremes)
        elif images.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            arriving = torch.empty_like(extremes, device="cpu", pin_memory=True)
            arriving.copy_(extremes, non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
            event.record(torch.cuda.current_stream(images.device))  # the present GPU may be another
            self.pending.append((arriving, event))
            self.judge_arrived()

    def judge_arrived(self) -> None:
        """Check the batches whose extremes have reached the host."""
        while self.pending and self.pending[0][1].query():
            self.judge(self.pending.pop(0)[0])

    def judge(self, extremes: Tensor) -> None:
        """Refuse or warn, given the lowest and highest value ``(2, b)`` of each image."""
        lowest, highest = extremes
        worst = torch.maximum(lowest.abs(), highest.abs())
        image = int(worst.argmax())  # NaN counts as the largest
        low, high = float(lowest[image]), float(highest[image])
        if not worst[image] <= LARGEST:
            found = f"values from {low:.4g} to {high:.4g}" if low - low == 0 == high - high else ""
            raise ValueError(
                f"image {image} of the batch has {found or 'NaN or infinite values'}; values must "
                "be in [0, 1]: divide by the largest value of the format (255, 65535), and look "
                "for broken files"
            )
        if not self.warned and (lowest.min() < -1e-3 or highest.max() > 1 + 1e-3):
            self.warned = True
            warnings.warn(
                f"images have values from {float(lowest.min()):.4g} to {float(highest.max()):.4g}; "
                "[0, 1] is expected, since colour augmentation clips to it: divide by the largest "
                "value of the format and do not normalise (warned once)",
                stacklevel=2,
            )
