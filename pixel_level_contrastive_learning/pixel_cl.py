"""PixelCL: the method, composed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, NoReturn

import torch
from einops import rearrange
from torch import Tensor, nn

from .augment import Change, TwoViews
from .checks import check_limits, per_channel, raise_together, something_to_learn, unless
from .geometry import Positives
from .losses import PixelLoss, Terms, instance_loss, pixcontrast, pixpro
from .modules.encoder import (
    Branches,
    Encoder,
    Projections,
    TargetEncoder,
    each_level,
    fails_now,
    grids_of,
    lacks_batch_statistics,
    map_projector,
    per_level,
    predictor,
    relative_weights,
    too_few_images,
    vector_projector,
)
from .modules.feature_info import FeatureInfo, is_too_small, refusal
from .modules.hooks import NoGradientError, first_weight, plain_name
from .modules.ppm import PPM
from .views import Placement, View


class PixelCL(nn.Module):
    """Pretrains any backbone at pixel level on unlabelled images (arXiv:2011.10043).

    ``loss = learner(images)``, ``loss.backward()``, ``opt.step()``,
    ``learner.update_moving_average()``; then save ``net``, the same object you passed in.

    Args:
        net: The backbone. Forward hooks read it while it runs; nothing in it is replaced. It is
            trained in its current mode: eval mode freezes its batch norm and turns off its dropout,
            while the target's stay active; ``learner.train()`` ends this.
        image_size: Size of the *views* in pixels, an int or ``(height, width)``. Images may have
            any size and aspect ratio.
        hidden_layer_pixel: Layer whose output goes to the pixel loss, a name such as ``layer4`` or
            an index into the network's children; ``None`` takes the deepest map of at least 4x4
            cells with a stride of at most 32. A list of several, preferably coarse to fine: each
            has its own heads, and the pixel loss is their mean.
        hidden_layer_instance: Layer whose average goes to the instance loss; ``None`` takes the
            pooled vector.
        projection_size: Channels of the projections.
        projection_hidden_size: Hidden channels of the projectors and the predictor.
        augment_fn: Changes the views ``(b, c, h, w)`` instead of the default colour augmentation
            and normalisation (the authors': blur of up to 2 pixels at any view size); it must not
            change the geometry. Given alone, it is used for both views.
        augment_fn2: The same for the second view; given alone, the first keeps its default.
        prob_rand_hflip: Probability that a view is flipped left to right.
        moving_average_decay: EMA decay: the fraction the target keeps at each update, in [0, 1].
        ppm_num_layers: Depth of the propagation module's transform: 0, 1 or 2.
        ppm_gamma: Exponent of the propagation module's similarity, at least 1; higher is sharper.
        distance_thres: Two cells match if they are closer than this, in diagonals of the larger of
            the two views' cells.
        similarity_temperature: Temperature of the pixel contrast loss.
        alpha: Weight of the pixel loss; 0 skips its branch.
        use_pixpro: PixPro if true, pixel contrast if false.
        cutout_ratio_range: Smallest and largest *side* of a crop as a fraction of the image's,
            drawn for each image and view; (0.6, 0.8) keeps 36 to 64 % of the area.
        cutout_interpolate_mode: How views are cut: ``bilinear``, ``nearest`` or ``bicubic``.
        coord_cutout_interpolate_mode: No longer has an effect, since coordinates are exact.
        channels: Channels of the images.
        instance_weight: Weight of the instance loss; 0 skips its branch.
        prob_rand_vflip: Probability that a view is flipped upside down.
        max_rotation: Largest rotation of a view, in degrees, either way.
        mean: Per-channel mean to normalise the views with, for values in [0, 1]. Default:
            ImageNet's for three channels, its average for any other number. With your own
            `augment_fn`, nothing is normalised unless `mean` or `std` is given.
        std: Per-channel standard deviation, likewise.
        pixel_levels: How many layers ``hidden_layer_pixel=None`` uses: its default, then the
            deepest map of each finer stride.
        level_weights: Relative weight of each pixel layer in the mean of their losses. Default:
            equal.

    Raises:
        ValueError: A value out of its range (all at once), an unknown layer, or a layer that
            outputs no map.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    >>> learner = PixelCL(net, image_size=64, projection_size=16, projection_hidden_size=32)
    >>> learner(torch.rand(2, 3, 80, 100)).backward()
    >>> learner.update_moving_average()
    """

    def __init__(
        self,
        net: nn.Module,
        image_size: int | tuple[int, int],
        hidden_layer_pixel: str | int | Sequence[str | int] | None = None,
        hidden_layer_instance: str | int | None = None,
        projection_size: int = 256,
        projection_hidden_size: int = 2048,
        augment_fn: Change | None = None,
        augment_fn2: Change | None = None,
        prob_rand_hflip: float = 0.25,
        moving_average_decay: float = 0.99,
        ppm_num_layers: int = 1,
        ppm_gamma: float = 2,
        distance_thres: float = 0.7,
        similarity_temperature: float = 0.3,
        alpha: float = 1.0,
        use_pixpro: bool = True,
        cutout_ratio_range: tuple[float, float] = (0.6, 0.8),
        cutout_interpolate_mode: str = "bilinear",
        coord_cutout_interpolate_mode: str | None = None,
        *,
        channels: int = 3,
        instance_weight: float = 1.0,
        prob_rand_vflip: float = 0.0,
        max_rotation: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixel_levels: int = 1,
        level_weights: Sequence[float] = (),
    ) -> None:
        mean, std = (stat.tolist() if isinstance(stat, Tensor) else stat for stat in (mean, std))
        raise_together(
            *check_limits(locals()),
            unless(not torch.is_inference_mode_enabled(), "torch.inference_mode", "on", "off here"),
            unless(isinstance(net, nn.Module), "net", net, "a network, such as models.resnet18()"),
            something_to_learn(alpha, instance_weight),
            per_channel("mean", mean, channels),
            per_channel("std", std, channels),
        )
        super().__init__()
        if coord_cutout_interpolate_mode is not None:
            warnings.warn(
                "coord_cutout_interpolate_mode has no effect: coordinates are exact; leave it out",
                DeprecationWarning,
                stacklevel=2,
            )
        height, width = image_size if isinstance(image_size, (tuple, list)) else (image_size,) * 2
        self.moving_average_decay = moving_average_decay
        self.distance_thres = distance_thres
        self.similarity_temperature = similarity_temperature
        self.alpha = alpha
        self.instance_weight = instance_weight
        self.use_pixpro = use_pixpro
        self.shared_branches = Branches()  # those whose gradients processes share

        info = FeatureInfo(net, channels, (height, width))
        pixel_hooks = info.pixel_hooks(hidden_layer_pixel, pixel_levels)
        instance = hidden_layer_instance
        instance = info.default_instance(pixel_hooks[0].name) if instance is None else instance
        instance_hook = info.hook(instance, pixel=False)
        self.level_weights = relative_weights(level_weights, len(pixel_hooks))
        grids = [hook.layout.grid for hook in pixel_hooks]
        self.views = TwoViews(
            (height, width),
            channels,
            (augment_fn, augment_fn2),
            Placement(cutout_ratio_range, prob_rand_hflip, prob_rand_vflip, max_rotation),
            mode=cutout_interpolate_mode,
            mean=mean,
            std=std,
            smallest=ceil(max(max(height / rows, width / columns) for rows, columns in grids)),
        )
        self.unreached_by_pixel = set.intersection(*(set(info.unreached(h)) for h in pixel_hooks))
        self.unreached_by_instance = set(info.unreached(instance_hook))

        hidden, out = projection_hidden_size, projection_size
        self.online_encoder = Encoder(
            net,
            pixel_hooks,
            instance_hook,
            per_level([map_projector(hook.layout.channels, hidden, out) for hook in pixel_hooks]),
            vector_projector(instance_hook.layout.channels, hidden, out),
        )
        self.online_predictor = predictor(out, hidden)
        self.propagate_pixels = per_level(
            [PPM(chan=out, num_layers=ppm_num_layers, gamma=ppm_gamma) for _ in pixel_hooks]
        )
        weight = first_weight(net, torch.empty(0))
        heads = self.online_encoder.pixel_projector, self.online_encoder.instance_projector
        for head in (*heads, self.online_predictor, self.propagate_pixels):
            head.to(weight.device, weight.dtype)
        self.target_encoder = TargetEncoder(self.online_encoder)

    @property
    def net(self) -> nn.Module:
        """The backbone: the same object you passed in."""
        return self.online_encoder.net

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register it as a submodule that the property hides.
        if name == "net":
            raise AttributeError(
                "learner.net cannot be replaced: hooks, heads and target belong to this network; "
                "build a new PixelCL for another network, or change this one in place "
                "(learner.net.compile() compiles it)"
            )
        super().__setattr__(name, value)

    def forward(
        self,
        images: Tensor | tuple[View, View],
        return_positive_pairs: bool = False,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | Terms:
        """The loss of a batch.

        Two views of each image go through the online network; the target network, a moving average
        of it, sees them without gradient. A pixel of one view matches a pixel of the other if both
        show the same place. The propagation module rebuilds each online pixel from the pixels of
        its view that it resembles; the result is compared with the target's features of its matches
        in the other view, at each level on its own grid. A predictor does the same for the views as
        a whole. Both directions are added.

        Args:
            images: ``(b, channels, height, width)`` float in [0, 1], of any size; or two views cut
                elsewhere, which are used as they are.
            return_positive_pairs: Return ``(loss, positive_pairs)``, the second a 0-d int64 tensor:
                matched cells of the whole batch, first direction and first pixel layer (0 if
                ``alpha`` is 0).
            return_terms: Return `Terms` instead.

        Returns:
            The loss, 0-d, with gradient, in at least float32, or what you asked for.

        Raises:
            ValueError: Wrong images or views; a batch or layer that cannot be trained; no loss.
        """
        self.check_branches()
        one, two = self.views(images)
        online_one = self.project(self.predictions, one)
        online_two = self.project(self.predictions, two)
        target_one = self.project(self.target_encoder, one)
        target_two = self.project(self.target_encoder, two)
        # Lists here and below: torch 2.6 and 2.7 compile no zip within which a graph ends.
        levels = list(zip(grids_of(online_one.pixel), grids_of(online_two.pixel), strict=True))
        maps = one.to_image, two.to_image
        matches = [Positives(*maps, *grids, self.distance_thres) for grids in levels]
        back = [found.mT for found in matches]
        directions = ((online_one, target_two, matches), (online_two, target_one, back))
        pixels = [self.pixel_loss(o, t, m, return_terms) for o, t, m in directions]
        pixel = torch.stack([found.loss for found in pixels]).sum()
        instance = torch.stack([self.instance_loss(o, t, m) for o, t, m in directions]).sum()
        loss = self.alpha * pixel + self.instance_weight * instance

        if return_terms:
            cosines = torch.stack([found.cosine for found in pixels])
            return self.terms((loss, pixel, instance), cosines, matches)
        return (loss, matches[0].count().sum()) if return_positive_pairs else loss

    def project(
        self, network: Callable[[Tensor, Branches], Projections], view: View
    ) -> Projections:
        """A network's projections of a view; errors say what to do."""
        try:
            return network(view.pixels, self.branches)
        except NoGradientError as error:
            _, channels, height, width = view.pixels.shape
            info = FeatureInfo(self.net, channels, (height, width), training=self.net.training)
            raise NoGradientError(error.kind, error.name, info.alternative(error.name)) from None
        except RuntimeError as error:  # of an auxiliary head, which runs in train mode alone
            if not is_too_small(error):
                raise
            raise refusal(type(self.net).__name__, view.pixels, error) from error
        except ValueError as error:
            if not lacks_batch_statistics(error):
                raise
            raise too_few_images(error, len(view.pixels), self.branches) from error
        except (TypeError, AssertionError) as error:
            size = view.pixels.shape[2], view.pixels.shape[3]
            if not self.net.training and size == self.views.size:
                raise
            raise fails_now(error, self.net, size, self.views.size) from error

    def predictions(self, pixels: Tensor, branches: Branches) -> Projections:
        """The online network's projections, its pixels propagated and its instance predicted."""
        pixel, instance = self.online_encoder(pixels, branches)
        if pixel and self.use_pixpro:
            levels = list(zip(each_level(self.propagate_pixels), pixel, strict=True))
            pixel = tuple(propagate(level) for propagate, level in levels)
        if instance is not None:
            instance = self.online_predictor(instance)
        return Projections(pixel, instance)

    def pixel_loss(
        self, online: Projections, target: Projections, matches: list[Positives], with_cosine: bool
    ) -> PixelLoss:
        """The levels' mean, cosines ``(levels, b)``, of one direction; 0 if it is skipped."""
        if not online.pixel:
            reach = matches[0].reach.float()
            return PixelLoss(reach.new_zeros(()), torch.zeros_like(reach)[None])
        levels = list(zip(online.pixel, target.pixel, matches, strict=True))
        losses = [self.level_loss(*level, with_cosine) for level in levels]
        loss = self.over_levels([level.loss for level in losses])
        return PixelLoss(loss, torch.stack([level.cosine for level in losses]))

    def level_loss(
        self, online: Tensor, target: Tensor, matches: Positives, with_cosine: bool
    ) -> PixelLoss:
        """PixPro or pixel contrast of one level, in one direction."""
        pixels, targets = (rearrange(level, "b d h w -> b d (h w)") for level in (online, target))
        if self.use_pixpro:
            return pixpro(pixels, targets, matches)
        temperature = self.similarity_temperature
        return pixcontrast(pixels, targets, matches, temperature, with_cosine=with_cosine)

    def over_levels(self, values: list[Tensor]) -> Tensor:
        """The weighted mean of each level's value; of a skipped branch there is one, 0."""
        weighted = zip(self.level_weights, values, strict=False)
        return torch.stack([weight * value for weight, value in weighted]).sum()

    def instance_loss(
        self, online: Projections, target: Projections, matches: list[Positives]
    ) -> Tensor:
        """The instance loss of one direction; 0 if the branch is skipped."""
        if online.instance is None or target.instance is None:
            return matches[0].reach.new_zeros((), dtype=torch.float32)
        return instance_loss(online.instance, target.instance)

    @torch.no_grad()
    def terms(self, losses: Sequence[Tensor], cosines: Tensor, matches: list[Positives]) -> Terms:
        """The losses and their figures, from cosines ``(2, levels, b)``."""
        loss, pixel, instance = losses
        with_pairs = [(level.count() > 0).sum() for level in matches]
        levels = zip(cosines.unbind(dim=1), with_pairs, strict=True)
        means = [cosine.sum() / (2 * images.clamp(min=1)) for cosine, images in levels]
        pairs = matches[0].count()
        return Terms(
            loss=loss,
            pixel_loss=pixel.detach(),
            instance_loss=instance.detach(),
            pixel_cosine=self.over_levels(means).clamp(-1, 1),
            instance_cosine=(1 - instance / 4) * self.branches.instance,
            positive_pairs=pairs.sum(),
            images_without_pairs=len(pairs) - with_pairs[0],
        )

    def update_moving_average(self, decay: float | Tensor | None = None) -> None:
        """Move the target towards the online network; call this after every optimiser step.

        Args:
            decay: EMA decay, in [0, 1]; default ``moving_average_decay``. A 0-d tensor on the
                learner's device is used unchecked, without waiting for it.

        Raises:
            ValueError: A decay outside [0, 1], or a network with other weights than before.
        """
        decay = self.moving_average_decay if decay is None else decay
        self.target_encoder.update(self.online_encoder, decay)

    def reset_moving_average(self) -> None:
        """Make the target a copy of the online network again."""
        self.target_encoder.reset(self.online_encoder)

    def load_state_dict(self, *given: Any, **how: Any) -> Any:
        """As of any module; the error about a state that does not fit says what to do."""
        try:
            return super().load_state_dict(*given, **how)
        except RuntimeError as error:
            raise RuntimeError(
                "this state does not fit the learner; build PixelCL with the same arguments, or "
                f"load the backbone only: see docs/loop.md, or pixelcl pretrain --weights. {error}"
            ) from error

    @property
    def branches(self) -> Branches:
        """Which losses have weight."""
        return Branches(pixel=self.alpha > 0, instance=self.instance_weight > 0)

    def check_branches(self) -> None:
        """Refuse a loss without terms, or one that `DistributedDataParallel` was to leave out."""
        raise_together(something_to_learn(self.alpha, self.instance_weight))
        pixel, instance = self.branches
        if pixel > self.shared_branches.pixel or instance > self.shared_branches.instance:
            raise ValueError(
                f"alpha is {self.alpha:g} and instance_weight {self.instance_weight:g}, but one "
                "was 0 when DistributedDataParallel was built, which leaves its heads out; rebuild "
                "it, or start above 0, for example at 1e-8"
            )

    def unreached_parameters(self) -> list[str]:
        """The names, as in `named_parameters`, of trainable parameters that the loss never reaches.

        A classifier head behind the hooked layers, the heads of a skipped branch, or a target that
        was unfrozen. They are never trained, and ``DistributedDataParallel`` ignores them.
        """
        pixel, instance = self.branches
        hooked = (self.unreached_by_pixel, pixel), (self.unreached_by_instance, instance)
        in_net = set.intersection(*(names for names, used in hooked if used))
        idle = {f"online_encoder.net.{plain_name(name)}" for name in in_net}
        parts = {
            "online_encoder.pixel_projector.": pixel,
            "propagate_pixels.": pixel and self.use_pixpro,
            "online_encoder.instance_projector.": instance,
            "online_predictor.": instance,
            "target_encoder.": False,
        }
        unused = tuple(part for part, used in parts.items() if not used)
        trainable = (name for name, parameter in self.named_parameters() if parameter.requires_grad)
        return sorted(n for n in trainable if n.startswith(unused) or plain_name(n) in idle)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by ``DistributedDataParallel`` when it is built, of a compiled learner too."""
        self.shared_branches = self.branches
        return [way + name for name in self.unreached_parameters() for way in ("", "_orig_mod.")]

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Called by ``DataParallel`` on several devices."""
        words = "PixelCL does not support torch.nn.DataParallel, whose replicas share hooks"
        raise RuntimeError(f"{words}; use torch.nn.parallel.DistributedDataParallel")
