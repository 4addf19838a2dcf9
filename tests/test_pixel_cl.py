"""The learner as a whole: what its loss is made of, what it takes and what it refuses."""

import copy
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from small_nets import Calls, SmallNet, overlapping_views
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import default_collate
from torchvision import models

from pixel_level_contrastive_learning import PixelCL, View, blocks
from pixel_level_contrastive_learning.geometry import box_to_map


def small_learner(**settings: Any) -> PixelCL:
    """A learner on a small network, the same at every call, whose target has fallen behind."""
    torch.manual_seed(0)
    small = {"projection_size": 8, "projection_hidden_size": 16}
    learner = PixelCL(SmallNet(settings.get("channels", 3)), 64, **small | settings)
    with torch.no_grad():
        for parameter in learner.online_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return learner


def view(boxes: list[list[float]], size: tuple[int, int], *, mirrored: bool = False) -> View:
    """A noisy float64 view of each image; boxes are ``(x0, y0, x1, y1)``."""
    maps = box_to_map(torch.tensor(boxes).double(), torch.full((len(boxes),), mirrored))
    return View(torch.rand(len(boxes), 3, *size).double(), maps)


LEVELS = {"hidden_layer_pixel": ["deep", "stem"]}
"""Two levels, of strides 16 and 8."""
HERE, ASIDE, BELOW, FAR = [0, 0, 96, 64], [30, 10, 110, 70], [10, 20, 74, 68], [500, 0, 596, 64]
"""Boxes in an image: three that overlap, one that overlaps none."""


def ragged_views() -> tuple[View, View]:
    """Views of 4x6 and 3x4 cells of three images, the last of which has no pair."""
    return (
        view([HERE, ASIDE, HERE], (64, 96)),
        view([ASIDE, BELOW, FAR], (48, 64), mirrored=True),
    )


INSTANCE_HEADS = "online_encoder.instance_projector", "online_predictor"


def trained(learner: PixelCL) -> list[nn.Parameter]:
    """The parameters that the loss reaches."""
    idle = learner.unreached_parameters()
    named = learner.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and name not in idle]


def gradients(learner: PixelCL, loss: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the loss, of which none may be missing."""
    return torch.autograd.grad(loss, trained(learner))


# The method, composed of the paper's loops.


def composed(
    learner: PixelCL,
    views: tuple[View, View],
    *,
    alpha: float = 1.0,
    instance_weight: float = 1.0,
    use_pixpro: bool = True,
    distance_thres: float = 0.7,
    similarity_temperature: float = 0.3,
    ppm_num_layers: int = 1,
    ppm_gamma: float = 2.0,
    hidden_layer_pixel: Sequence[str] = (),
    level_weights: Sequence[float] = (),
) -> dict[str, Tensor]:
    """The terms of a step, put together from slow loops on the projections of the two networks."""
    online_one, online_two = (learner.online_encoder(view.pixels) for view in views)
    target_one, target_two = (learner.target_encoder(view.pixels) for view in views)
    maps = [view.to_image for view in views]
    levels = len(hidden_layer_pixel) or 1
    modules = [learner.propagate_pixels] if levels == 1 else learner.propagate_pixels
    pixels, pixel_cosines, masks = [], [], []
    for level, propagate in zip(range(levels), modules, strict=True):
        grids = [tuple(view.pixel[level].shape[2:]) for view in (online_one, online_two)]
        mask = reference.positive_mask(*maps, *grids, distance_thres)
        pixel, cosines = 0, []
        for online, target, pairs in (
            (online_one, target_two, mask),
            (online_two, target_one, mask.mT),
        ):
            values, targets = online.pixel[level], target.pixel[level].flatten(2)
            if use_pixpro:
                values = reference.propagate(values, propagate.transform_net, ppm_gamma).flatten(2)
                pixel = pixel + reference.pixpro_loss(values, targets, pairs)
            else:
                values = values.flatten(2)
                temperature = similarity_temperature
                pixel = pixel + reference.pixcontrast_loss(values, targets, pairs, temperature)
            for image in range(len(pairs)):
                if pairs[image].any():
                    one_image = (part[image, None] for part in (values, targets, pairs))
                    cosines.append(1 - reference.pixpro_loss(*one_image) / 2)
        pixels.append(pixel)
        pixel_cosines.append(sum(cosines) / len(cosines))
        masks.append(mask)
    instance, likeness = 0, []
    for online, target in ((online_one, target_two), (online_two, target_one)):
        prediction = learner.online_predictor(online.instance)
        instance = instance + reference.instance_loss(prediction, target.instance)
        likeness += map(reference.cosine, prediction, target.instance)
    weights = level_weights or [1.0] * levels

    def mean(values: list[Tensor]) -> Tensor:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    return {
        "loss": alpha * mean(pixels) + instance_weight * instance,
        "pixel_loss": mean(pixels),
        "instance_loss": instance,
        "pixel_cosine": mean(pixel_cosines),
        "instance_cosine": sum(likeness) / len(likeness),
        "positive_pairs": masks[0].sum(),
        "images_without_pairs": (masks[0].sum(dim=(1, 2)) == 0).sum(),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 0.3, "instance_weight": 2.5},
        {"distance_thres": 1.4},
        {"ppm_gamma": 1, "ppm_num_layers": 0},
        {"ppm_num_layers": 2},
        {"use_pixpro": False},
        {"use_pixpro": False, "similarity_temperature": 0.1, "alpha": 0.5},
        LEVELS,
        {"hidden_layer_pixel": ("stem", "deep"), "level_weights": [3, 1], "alpha": 0.5},
        LEVELS | {"use_pixpro": False},
    ],
    ids=str,
)
def test_terms_and_gradients_agree_with_the_loops(settings) -> None:
    learner, views = small_learner(**settings).double().eval(), ragged_views()
    expected = composed(learner, views, **settings)
    terms = learner(views, return_terms=True)
    assert terms._fields == tuple(expected)
    assert terms.images_without_pairs == 1
    for name, value in expected.items():
        torch.testing.assert_close(getattr(terms, name), value, rtol=1e-10, atol=1e-10, msg=name)
    both = gradients(learner, terms.loss), gradients(learner, expected["loss"])
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("use_pixpro", [True, False])
@pytest.mark.parametrize("weight", [{"alpha": 0}, {"instance_weight": 0}], ids=str)
def test_a_branch_without_weight_leaves_the_other(weight, use_pixpro) -> None:
    settings = weight | {"use_pixpro": use_pixpro}
    learner, views = small_learner(**settings).double().eval(), ragged_views()
    expected = composed(learner, views, **settings)
    skipped = ("pixel", "instance")["instance_weight" in weight]
    expected |= {f"{skipped}_loss": torch.zeros(()), f"{skipped}_cosine": torch.zeros(())}
    if skipped == "pixel":  # then nobody asks which cells match
        expected["positive_pairs"] = torch.tensor(0)
        expected["images_without_pairs"] = torch.tensor(len(views[0].pixels))
    terms = learner(views, return_terms=True)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(terms, name), value, check_dtype=False, msg=name)


@pytest.mark.parametrize("weight", [{}, {"alpha": 0}, {"instance_weight": 0}], ids=str)
def test_the_loss_has_the_precision_of_the_network_and_not_of_the_maps(weight) -> None:
    views = tuple(View(pixels, to_image.double()) for pixels, to_image in overlapping_views())
    terms = small_learner(**weight)(views, return_terms=True)
    assert {term.dtype for term in terms if term.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("use_pixpro", [True, False])
@pytest.mark.parametrize(
    ("weight", "skipped"),
    [
        ({"alpha": 0}, ["pixel_projector", "propagate_pixels"]),
        ({"instance_weight": 0}, ["instance_projector", "online_predictor"]),
        ({}, []),
    ],
    ids=str,
)
def test_a_branch_without_weight_is_not_computed(weight, skipped, use_pixpro) -> None:
    learner = small_learner(**weight, use_pixpro=use_pixpro)
    heads = "pixel_projector", "propagate_pixels", "instance_projector", "online_predictor"
    ran = set()
    for name, module in learner.named_modules():
        if name.endswith(heads):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    learner(overlapping_views())
    if not use_pixpro:
        skipped = [*skipped, "propagate_pixels"]
    assert {name.split(".")[-1] for name in ran} == set(heads) - set(skipped)


# Conventions, by hand.


@pytest.mark.parametrize(
    ("threshold", "pairs"),
    [(0.7, 24), (0.71, 24 + 2 * (4 * 5 + 3 * 6)), (1.01, 24 + 2 * (4 * 5 + 3 * 6) + 4 * 3 * 5)],
)
def test_convention_two_views_of_the_same_spot_match_cell_by_cell(threshold, pairs) -> None:
    """A neighbour's centre lies at 0.7071 diagonals of a square cell, a corner neighbour's at 1."""
    learner = small_learner(distance_thres=threshold).double()
    spot = view([HERE, ASIDE, HERE], (64, 96))
    square = View(spot.pixels, box_to_map(torch.tensor([HERE] * 3).double(), torch.zeros(3) > 0))
    loss, positive_pairs = learner((square, square), return_positive_pairs=True)
    assert positive_pairs.item() == 3 * pairs
    assert positive_pairs.dtype == torch.int64
    assert positive_pairs.ndim == loss.ndim == 0
    assert loss.requires_grad


@pytest.mark.parametrize("settings", [{}, {"use_pixpro": False}, LEVELS], ids=str)
@pytest.mark.parametrize("weight", [1, 0.25, 0])
def test_convention_without_a_pair_the_loss_is_that_of_instances(settings, weight) -> None:
    learner = small_learner(**settings, instance_weight=weight)
    one, two = overlapping_views()
    views = one, two._replace(to_image=two.to_image + 1000)
    terms = learner(views, return_terms=True)
    assert terms.loss.item() == pytest.approx(weight * terms.instance_loss.item(), abs=1e-6)
    assert (terms.instance_loss > 0) == (weight > 0)
    assert terms.pixel_loss == terms.pixel_cosine == terms.positive_pairs == 0
    assert terms.images_without_pairs == len(one.pixels)
    learner.zero_grad()
    terms.loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in trained(learner)
    )


def test_what_is_returned_hangs_on_the_question_alone() -> None:
    learner, views = small_learner().eval(), overlapping_views()
    loss, pairs = learner(views, return_positive_pairs=True)
    terms = learner(views, return_terms=True)
    assert learner(views) == loss == terms.loss
    assert pairs == terms.positive_pairs > 0
    assert [name for name, term in terms._asdict().items() if term.requires_grad] == ["loss"]


def test_views_come_as_data_loaders_collate_them() -> None:
    learner, views = small_learner().eval(), overlapping_views()
    samples = [tuple(View(*parts) for parts in zip(*view, strict=True)) for view in views]
    assert learner(default_collate(list(zip(*samples, strict=True)))) == learner(views)


def test_images_are_cut_into_views_and_the_views_compared() -> None:
    learner, images = small_learner().eval(), torch.rand(3, 3, 80, 100)
    torch.manual_seed(1)
    loss = learner(images)
    torch.manual_seed(1)
    one, two = learner.views(images)
    assert one.pixels.shape == two.pixels.shape == (3, 3, 64, 64)
    assert learner((one, two)) == loss


# What the keywords do to the views.

SHADES = (torch.arange(80 * 100).view(80, 100) % 7 / 7).expand(4, 3, 80, 100)
"""Images of seven shades."""


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({"image_size": (48, 80)}, lambda view: view.pixels.shape == (4, 3, 48, 80)),
        ({"image_size": 48}, lambda view: view.pixels.shape == (4, 3, 48, 48)),
        ({"prob_rand_hflip": 0}, lambda view: (view.to_image[:, 0, 0] > 0).all()),
        ({"prob_rand_hflip": 1}, lambda view: (view.to_image[:, 0, 0] < 0).all()),
        ({"prob_rand_vflip": 0}, lambda view: (view.to_image[:, 1, 1] > 0).all()),
        ({"prob_rand_vflip": 1}, lambda view: (view.to_image[:, 1, 1] < 0).all()),
        ({"max_rotation": 0}, lambda view: (view.to_image[:, 1, 0] == 0).all()),
        ({"max_rotation": 30}, lambda view: (view.to_image[:, 1, 0] != 0).all()),
        (
            {"cutout_ratio_range": (0.25, 0.25), "prob_rand_hflip": 0},
            lambda view: view.to_image[:, :, :2].allclose(torch.diag(torch.tensor([25.0, 20]))),
        ),
        (
            {"cutout_interpolate_mode": "nearest"},
            lambda view: torch.isclose(view.pixels * 7, (view.pixels * 7).round(), atol=1e-4).all(),
        ),
        (
            {"cutout_interpolate_mode": "bilinear"},
            lambda view: not (view.pixels * 7).isclose((view.pixels * 7).round(), atol=0.1).all(),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_convention_each_keyword_does_to_both_views_what_it_says(settings, holds) -> None:
    plain = {"image_size": 64, "augment_fn": lambda pixels: pixels}
    learner = PixelCL(SmallNet(), hidden_layer_pixel="act", **plain | settings)
    assert all(map(holds, learner.views(SHADES)))


def brighter(pixels: Tensor) -> Tensor:
    """A change of the user's."""
    return pixels + 1


def darker(pixels: Tensor) -> Tensor:
    """Another one."""
    return pixels - 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"augment_fn": brighter}, (1.5, 1.5)),
        ({"augment_fn": brighter, "augment_fn2": darker}, (1.5, -0.5)),
        ({"augment_fn": brighter, "mean": [0.5] * 3}, (1 / 0.229, 1 / 0.229)),
        ({"augment_fn": brighter, "mean": [0.5] * 3, "std": [0.25] * 3}, (4, 4)),
    ],
    ids=["one for both", "one each", "with a mean", "with mean and std"],
)
def test_convention_a_change_of_ones_own_replaces_colour_and_normalisation(
    changes, expected
) -> None:
    views = small_learner(**changes).views(torch.full((2, 3, 80, 80), 0.5))
    for view, value in zip(views, expected, strict=True):
        torch.testing.assert_close(view.pixels[:, 0], torch.full((2, 64, 64), value).float())


def test_a_change_of_the_second_view_alone_leaves_the_first_its_default() -> None:
    one, two = small_learner(augment_fn2=darker).views(torch.full((2, 3, 80, 80), 0.5))
    assert (two.pixels == -0.5).all()
    assert one.pixels.abs().max() < 3  # normalised


def test_the_two_views_are_changed_as_the_authors_do() -> None:
    """Solarised is the second view alone: a fifth of its bright images turn dark."""
    learner = small_learner(mean=[0.0] * 3, std=[1.0] * 3)
    one, two = learner.views(torch.ones(100, 3, 32, 32))
    dark = [(view.pixels.mean(dim=(1, 2, 3)) < 0.5).sum() for view in (one, two)]
    assert dark[0] == 0
    assert 10 <= dark[1] <= 30


def test_the_two_views_of_an_image_lie_in_places_of_their_own() -> None:
    views = small_learner(prob_rand_hflip=0.5).views(torch.rand(300, 3, 16, 16))
    origins = torch.cat([view.to_image[:, :, 2] for view in views], dim=1)
    sides = torch.stack([view.to_image[:, 1, 1] for view in views], dim=1)
    for places in (origins, sides):
        between = torch.corrcoef(places.T)[: places.shape[1] // 2, places.shape[1] // 2 :]
        assert between.abs().max() < 5 / math.sqrt(300)


@pytest.mark.parametrize("place", [0, 1])
def test_a_ready_view_without_values_is_refused(place) -> None:
    views = overlapping_views()
    views[place].pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^image 1 of the batch has NaN"):
        small_learner()(views)


# Arguments.

PUBLISHED = (
    "net, image_size, hidden_layer_pixel=None, hidden_layer_instance=None, projection_size=256, "
    "projection_hidden_size=2048, augment_fn=None, augment_fn2=None, prob_rand_hflip=0.25, "
    "moving_average_decay=0.99, ppm_num_layers=1, ppm_gamma=2, distance_thres=0.7, "
    "similarity_temperature=0.3, alpha=1.0, use_pixpro=True, cutout_ratio_range=(0.6, 0.8), "
    "cutout_interpolate_mode='bilinear', coord_cutout_interpolate_mode=None"
)
"""What the published class takes."""
ADDED = (
    "channels=3, instance_weight=1.0, prob_rand_vflip=0.0, max_rotation=0.0, mean=None, std=None, "
    "pixel_levels=1, level_weights=()"
)
"""Ours, by keyword only."""


def test_convention_the_published_keywords_are_kept_and_new_ones_have_to_be_named() -> None:
    parameters = inspect.signature(PixelCL).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(bare)) == f"({PUBLISHED}, *, {ADDED})"


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("image_size", (0, -64, 64.5, True, "64", (64,), (64, 0), (64, 64, 3)), "whole number"),
        ("projection_size", (0, 1.5, "8"), "whole number of at least 1"),
        ("projection_hidden_size", (0, 1.5), "whole number of at least 1"),
        ("prob_rand_hflip", (-0.1, 1.1, "often", None), "from 0 to 1"),
        ("prob_rand_vflip", (-0.1, 1.1), "from 0 to 1"),
        ("max_rotation", (-1, 181), "from 0 to 180"),
        ("moving_average_decay", (-0.1, 1.5, float("nan")), "from 0 to 1"),
        ("ppm_num_layers", (3, -1, 1.0), "0, 1, 2"),
        ("ppm_gamma", (0.5, 0, -2), "at least 1"),
        ("distance_thres", (0, -0.7, float("inf")), "above 0"),
        ("similarity_temperature", (0, -0.3), "above 0"),
        ("alpha", (-1, float("nan"), None), "at least 0"),
        ("instance_weight", (-1, "1"), "at least 0"),
        ("cutout_ratio_range", ((0.8, 0.6), (0, 0.5), (0.5, 1.1), 0.7, (0.5,)), "0 < low <= high"),
        ("cutout_interpolate_mode", ("area", "linear", None), "bilinear"),
        ("channels", (0, 3.0, None), "whole number of at least 1"),
        ("mean", ([0.5], [0.5] * 4, ["a"] * 3, 0.5), "3 numbers, one per channel"),
        ("std", ([0.5], 0.5), "3 numbers, one per channel"),
        ("std", ([0.2, 0.2, 0.0], [0.2, -0.2, 0.2]), "above 0"),
        ("augment_fn", ("blur",), "callable"),
        ("use_pixpro", ("pixcontrast", "no", None, 1), "one of True, False"),
        ("augment_fn2", ("blur",), "callable"),
        ("net", (SmallNet, None), "must be a network, such as models.resnet18()"),
        ("hidden_layer_pixel", (3.0, [], ["deep", 3], ("stem", "deep", "stem")), "name"),
        ("hidden_layer_instance", (3.0, ("stem", "deep")), "must be a name or an index"),
        ("pixel_levels", (0, 1.5, None), "whole number of at least 1"),
        ("level_weights", ([0.0], [-1.0], 1.0, ["a"], [1.0, 2.0]), "above 0, one per pixel layer"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(name, values, allowed) -> None:
    for value in values:
        with pytest.raises(ValueError, match=re.escape(allowed)) as error:
            PixelCL(**{"net": SmallNet(), "image_size": 64, name: value})
        assert name in str(error.value)
        assert repr(value) in str(error.value)


def test_statistics_may_be_tensors() -> None:
    mean, std = [0.25, 0.5, 0.75], [0.125, 0.25, 0.5]
    learner = small_learner(mean=torch.tensor(mean), std=torch.tensor(std))
    normalise = learner.views.augment.one.normalise
    assert normalise.mean.flatten().tolist() == mean
    assert normalise.std.flatten().tolist() == std


def test_nothing_is_built_where_nothing_learns() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="inference_mode is 'on'; it must be off here"),
    ):
        small_learner()


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = {"image_size": 0, "ppm_gamma": 0.5, "distance_thres": 0, "channels": 0}
    with pytest.raises(ValueError) as error:
        PixelCL(SmallNet(), **wrong, alpha=0, instance_weight=0)
    *said, last = str(error.value).splitlines()
    assert [line.split(" is ")[0] for line in said] == list(wrong)
    assert last.startswith("alpha and instance_weight are both 0")


def test_the_mode_of_coordinates_is_accepted_and_does_nothing() -> None:
    with pytest.warns(DeprecationWarning, match="coordinates are exact") as caught:
        learner = small_learner(coord_cutout_interpolate_mode="bilinear")
    assert caught[0].filename == __file__
    assert learner.eval()(overlapping_views()) == small_learner().eval()(overlapping_views())


@pytest.mark.parametrize("layer", ["deep", 3, -4])
def test_layers_are_named_or_counted(layer) -> None:
    learner = small_learner(hidden_layer_pixel=layer, hidden_layer_instance=layer)
    assert learner.online_encoder.pixel_layer == "deep"
    assert learner.online_encoder.instance_hook.name == "deep"


def names(learner: PixelCL) -> list[str]:
    """The names of all weights and buffers."""
    return [*learner.state_dict()]


def test_a_level_alone_keeps_the_names_of_its_weights_and_several_are_counted() -> None:
    alone, listed = small_learner(), small_learner(hidden_layer_pixel=["deep"])
    views = overlapping_views()
    assert listed(views) == alone(views)
    assert names(listed) == names(alone)
    heads = "online_encoder.pixel_projector.", "target_encoder.pixel_projector."
    heads = *heads, "propagate_pixels.transform_net."
    assert all(any(name.startswith(head) for name in names(alone)) for head in heads)
    several = names(small_learner(**LEVELS))
    for head in heads:
        part = head.removesuffix("transform_net.")
        inner = [name.removeprefix(part) for name in names(alone) if name.startswith(head)]
        counted = [f"{part}{level}.{name}" for level in (0, 1) for name in inner]
        assert [name for name in several if name.startswith(part)] == counted


def test_levels_are_named_or_so_many_are_chosen() -> None:
    learner = small_learner(pixel_levels=2)
    assert learner.online_encoder.pixel_layer == ("deep", "act")
    assert learner.online_encoder.instance_hook.name == "pool"
    assert learner.views.smallest == 16  # what the coarser of the two can show
    assert PixelCL(SmallNet(), (64, 96)).views.smallest == 16
    assert small_learner(**LEVELS, pixel_levels=2).online_encoder.pixel_layer == ("deep", "stem")
    with pytest.raises(ValueError, match="pixel_levels is 3, but 2 pixel layers are named; leave"):
        small_learner(**LEVELS, pixel_levels=3)
    with pytest.raises(ValueError, match=r"is 3, but SmallNet has maps of 2 strides at 64x64"):
        small_learner(pixel_levels=3)


def test_without_its_pixel_loss_a_learner_of_levels_has_the_figures_of_one() -> None:
    views = overlapping_views()
    both = [small_learner(alpha=0, **settings) for settings in ({}, LEVELS)]
    one, several = (learner(views, return_terms=True) for learner in both)
    assert one.pixel_loss == several.pixel_loss == several.pixel_cosine == 0
    assert several.positive_pairs == 0
    assert several.images_without_pairs == one.images_without_pairs


@pytest.mark.parametrize("decay", [None, 0.5, 0])
def test_the_target_follows_by_the_decay_of_the_learner_or_of_the_call(decay) -> None:
    learner = small_learner(moving_average_decay=0.75)
    target, online = learner.target_encoder, learner.online_encoder
    before = copy.deepcopy(target)
    learner.update_moving_average(decay)
    keeps = 0.75 if decay is None else decay
    for old, new, other in zip(
        *(net.parameters() for net in (before, target, online)), strict=True
    ):
        torch.testing.assert_close(new, keeps * old + (1 - keeps) * other)
    learner.reset_moving_average()
    for parameter, other in zip(target.parameters(), online.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, ()),
        (LEVELS, ()),
        ({"use_pixpro": False}, ("propagate_pixels",)),
        ({"alpha": 0}, ("online_encoder.pixel_projector", "propagate_pixels")),
        (LEVELS | {"alpha": 0}, ("online_encoder.pixel_projector", "propagate_pixels")),
        ({"instance_weight": 0}, INSTANCE_HEADS),
        (LEVELS | {"instance_weight": 0}, INSTANCE_HEADS),
    ],
    ids=str,
)
def test_unreached_parameters_are_those_that_get_no_gradient(settings, idle) -> None:
    learner = small_learner(**settings)
    learner(overlapping_views()).backward()
    without = [
        name
        for name, parameter in learner.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert learner.unreached_parameters() == sorted(without)
    behind = "online_encoder.net.head"
    assert {name.rpartition(".")[0] for name in without} >= {behind}
    assert all(name.startswith((behind, *idle)) for name in without)
    assert all(any(name.startswith(prefix) for name in without) for prefix in idle)


def test_a_layer_that_is_thawed_later_is_unreached_from_then_on() -> None:
    net = SmallNet()
    net.stem.requires_grad_(False)
    net.head.requires_grad_(False)
    learner = PixelCL(net, 64, projection_size=8, projection_hidden_size=16)
    assert learner.unreached_parameters() == []
    net.requires_grad_(True)
    head = [f"online_encoder.net.head.{name}" for name in ("bias", "weight")]
    assert learner.unreached_parameters() == head


def test_unreached_parameters_are_found_in_a_wrapper_and_in_a_target_that_was_unfrozen() -> None:
    learner = small_learner()
    learner.online_encoder.net = torch.compile(learner.net, backend="eager")
    head = [f"online_encoder.net._orig_mod.head.{name}" for name in ("bias", "weight")]
    assert learner.unreached_parameters() == head
    learner.requires_grad_(True)
    target = [f"target_encoder.{name}" for name, _ in learner.target_encoder.named_parameters()]
    assert learner.unreached_parameters() == head + sorted(target)


def test_the_network_of_a_learner_is_not_replaced_unnoticed() -> None:
    learner = small_learner()
    with pytest.raises(AttributeError, match=r"(?s)(?=.*new PixelCL)(?=.*net\.compile\(\))"):
        learner.net = SmallNet()
    assert not any(name.startswith("net.") for name in learner.state_dict())


def test_a_network_of_lazy_layers_is_taken_once_it_has_run() -> None:
    net = nn.Sequential(nn.LazyConv2d(8, 8, 8), nn.ReLU())
    with pytest.raises(ValueError, match=r"lazy layers.*run it once"):
        PixelCL(net, 64)
    net(torch.rand(2, 3, 64, 64))
    assert PixelCL(net, 64)(overlapping_views()).isfinite()


def test_a_layer_that_lost_its_gradient_is_refused_with_a_later_one() -> None:
    learner = small_learner(hidden_layer_pixel="stem")
    learner.net.stem.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"'stem' has an output without gradient.* use norm \(8 chan"
    ):
        learner(overlapping_views())


def test_a_batch_norm_without_statistics_is_found_by_what_it_was_given(monkeypatch) -> None:
    words = "other words of a later torch"

    def verify(size: list[int]) -> None:
        if refuses(size):
            raise ValueError(words)

    monkeypatch.setattr(nn.functional, "_verify_batch_size", verify)
    refuses = lambda size: size[0] == 1 and len(size) == 2  # noqa: E731
    with pytest.raises(ValueError, match=rf"batch of 1 \({words}\).*drop_last=True"):
        small_learner()(overlapping_views(1))
    with pytest.raises(ValueError, match="or set instance_weight=0, or put"):
        small_learner()(overlapping_views(1))
    refuses = lambda size: True  # noqa: E731
    with pytest.raises(ValueError, match=f"^{words}$"):
        small_learner()(overlapping_views(1))


def test_a_pooling_branch_of_the_network_lacks_statistics_whatever_the_losses() -> None:
    def pooled(net: nn.Module, x: Tensor) -> Tensor:
        return net.stem(x) + net.norm(net.stem(x).mean((2, 3), keepdim=True))

    net = Calls(pooled, stem=nn.Conv2d(3, 8, 8, 8), norm=nn.BatchNorm2d(8))
    learner = PixelCL(net, 64, "stem", instance_weight=0)
    with pytest.raises(ValueError, match=r"data loader\), or put batch norm into eval mode"):
        learner(overlapping_views(1))


def test_a_network_that_fails_in_train_mode_alone_is_told_so() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        if net.training:
            raise AssertionError("no targets")
        return net.stem(x)

    learner = PixelCL(Calls(forward, stem=nn.Conv2d(3, 8, 8, 8)), 64, instance_weight=0)
    with pytest.raises(ValueError, match=r"Calls runs .* not in train mode: no targets; pass"):
        learner(overlapping_views())
    learner.net.train(False).register_forward_hook(lambda *_: 1 + "")
    with pytest.raises(TypeError, match="unsupported operand"):
        learner(overlapping_views())


@pytest.mark.parametrize("train", [True, False])
def test_a_network_that_takes_one_size_says_so_of_views_of_another(train) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        if x.shape[3] != 64:
            raise AssertionError("no 96")  # pytest would add to the words of an assert
        return net.stem(x)

    learner = PixelCL(Calls(forward, stem=nn.Conv2d(3, 8, 8, 8)), 64, instance_weight=0)
    learner.net.train(train)
    views = [View(torch.rand(4, 3, 64, 96), view.to_image) for view in overlapping_views()]
    with pytest.raises(ValueError) as error:
        learner(tuple(views))
    ran, now = (" in eval mode", " in train mode") if train else ("", "")
    assert str(error.value) == (
        f"Calls runs on views of 64x64{ran} but not on views of 64x96{now}: no 96; cut views to "
        "64x64, the image_size"
        + ", or pass the part without its losses, such as net.backbone"
        * train
    )


def test_a_branch_that_processes_do_not_share_is_not_switched_on() -> None:
    learner, views = small_learner(alpha=0), overlapping_views()
    learner.alpha = 1.0  # nothing has asked what is left out
    assert learner(views).isfinite()
    learner.alpha = 0.0
    assert learner._ddp_params_and_buffers_to_ignore
    learner.instance_weight = 0.5
    assert learner(views).isfinite()
    learner.alpha = 1.0
    with pytest.raises(ValueError, match=r"alpha is 1 and .* rebuild it, or start above 0"):
        learner(views)
    assert set(learner._ddp_params_and_buffers_to_ignore) > set(learner.unreached_parameters())
    assert learner.unreached_parameters() == small_learner().unreached_parameters()
    assert learner(views).isfinite()


def test_a_loss_that_lost_its_terms_is_refused() -> None:
    learner = small_learner(alpha=0)
    learner.instance_weight = 0
    with pytest.raises(ValueError, match="are both 0; set at least one of them above 0"):
        learner(overlapping_views())


@pytest.mark.parametrize(
    "change",
    [
        lambda net: nn.utils.parametrizations.weight_norm(net.deep),
        lambda net: setattr(net, "head", nn.Linear(12, 7)),
    ],
)
@pytest.mark.parametrize("follow", [PixelCL.update_moving_average, PixelCL.reset_moving_average])
def test_a_target_that_cannot_follow_says_so(change, follow) -> None:
    learner = small_learner()
    change(learner.net)
    assert learner(overlapping_views()).isfinite()
    with pytest.raises(ValueError, match=r"SmallNet has other weights .*: build a new learner"):
        follow(learner)


def test_a_state_of_another_learner_is_refused_with_what_to_do() -> None:
    state, learner = small_learner().state_dict(), small_learner(projection_size=4)
    with pytest.raises(RuntimeError, match=r"(?s)build PixelCL with.*--weights.*size mismatch for"):
        learner.load_state_dict(state)
    published = {n.replace("projector.", "projector.net."): value for n, value in state.items()}
    with pytest.raises(RuntimeError, match=r"(?s)load the backbone only: see.*Missing key"):
        small_learner().load_state_dict(published)
    assert small_learner().load_state_dict(published, strict=False).missing_keys


def test_data_parallel_is_refused_with_what_does_the_same() -> None:
    with pytest.raises(RuntimeError, match=r"DataParallel.*use torch\.nn\.parallel\.Distrib"):
        small_learner()._replicate_for_data_parallel()


# Precision, memory layout, accumulation.


@pytest.mark.parametrize("settings", [{}, {"use_pixpro": False}, LEVELS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entries", [20, blocks.ENTRIES])
def test_autocast_gives_a_float32_loss_near_that_of_float32(
    dtype, settings, entries, monkeypatch
) -> None:
    monkeypatch.setattr(blocks, "ENTRIES", entries)
    learner, views = small_learner(**settings).eval(), overlapping_views()
    expected = learner(views, return_terms=True)
    with torch.autocast("cpu", dtype=dtype):
        terms = learner(views, return_terms=True)
    terms.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(learner))
    off = 4 * torch.finfo(dtype).eps  # cosines are rounded by eps / 2, in layers before and in them
    for name, value in expected._asdict().items():
        term = getattr(terms, name)
        assert term.dtype == value.dtype
        torch.testing.assert_close(term, value, rtol=0, atol=off, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_views_as_they_are(dtype) -> None:
    learner, images = small_learner(), torch.rand(8, 3, 80, 100)
    torch.manual_seed(1)
    expected = learner.views(images)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        found = learner.views(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # dtypes as well


@pytest.mark.parametrize("settings", [{}, LEVELS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_learner_cast_as_a_whole_gives_a_loss_in_at_least_float32(dtype, settings) -> None:
    learner, views = small_learner(**settings).eval(), overlapping_views()
    expected = learner(views)
    loss = learner.to(dtype)(views)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_heads_have_the_precision_of_the_network(dtype) -> None:
    learner = PixelCL(SmallNet().to(dtype), 64, projection_size=8, projection_hidden_size=16)
    assert {parameter.dtype for parameter in trained(learner)} == {dtype}
    assert learner(overlapping_views()).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_state_in_half_precision_leaves_the_target_in_float32(dtype) -> None:
    """Else it would stand still: a step of one per cent rounds away."""
    learner = small_learner()
    halves = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in small_learner().state_dict().items()
    }
    learner.load_state_dict(halves, assign=True)
    assert {weight.dtype for weight in trained(learner)} == {dtype}
    target = learner.target_encoder
    assert {weight.dtype for weight in target.parameters()} == {torch.float32}
    before = copy.deepcopy(target)
    with torch.no_grad():
        for weight in trained(learner):
            weight.mul_(2)
    learner.update_moving_average(0.999)
    assert not any(map(torch.equal, before.parameters(), target.parameters()))


def test_channels_last_changes_nothing() -> None:
    learner, images = small_learner().eval(), torch.rand(2, 3, 80, 100)
    losses = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        learner.to(memory_format=memory_format)
        torch.manual_seed(1)
        losses.append(learner(images.to(memory_format=memory_format)))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("settings", [{}, {"use_pixpro": False}, LEVELS], ids=str)
def test_two_halves_of_a_batch_add_up_to_the_whole(settings) -> None:
    learner, views = small_learner(**settings).eval(), overlapping_views(4)
    for part in (slice(0, 2), slice(2, 4)):
        half = tuple(View(*(tensor[part] for tensor in view)) for view in views)
        (learner(half) / 2).backward()
    both = [parameter.grad for parameter in trained(learner)], gradients(learner, learner(views))
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# Compiling.


def steps(learner: PixelCL, forward: Any, count: int) -> list[Tensor]:
    """The losses of a short run in float64, each on a batch of its own."""
    opt = torch.optim.SGD(trained(learner), lr=0.1)
    losses = []
    for _ in range(count):
        loss = forward(torch.rand(4, 3, 80, 100).double())
        opt.zero_grad()
        loss.backward()
        opt.step()
        learner.update_moving_average()
        losses.append(loss.detach())
    return losses


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
@pytest.mark.parametrize(
    ("backend", "settings", "entries"),
    [
        ("eager", {}, blocks.ENTRIES),
        ("eager", {}, 20),
        ("eager", {"use_pixpro": False}, 20),
        pytest.param("aot_eager", {"use_pixpro": False}, blocks.ENTRIES, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_learner_learns_the_same_and_is_compiled_once(
    backend, settings, entries, monkeypatch
) -> None:
    monkeypatch.setattr(blocks, "ENTRIES", entries)
    # In float64, since compiled batch norm is rounded otherwise in float32 and steps add to that.
    plain, learner = small_learner(**settings).double(), small_learner(**settings).double()
    compiled = torch.compile(learner, backend=backend)
    torch.manual_seed(1)
    expected = steps(plain, plain, 3)
    torch.manual_seed(1)
    losses = steps(learner, compiled, 1)
    graphs = counters["stats"]["unique_graphs"]
    losses += steps(learner, compiled, 2)
    assert counters["stats"]["unique_graphs"] == graphs > 0
    torch.testing.assert_close(losses, expected)
    for one, two in zip(learner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# The loop that users of the published package have.


def test_the_published_loop_runs_as_it_is(tmp_path: Path) -> None:
    resnet = models.resnet50(weights=None)
    learner = PixelCL(
        resnet,
        image_size=64,
        hidden_layer_pixel="layer4",
        hidden_layer_instance=-2,
        projection_size=256,
        projection_hidden_size=2048,
        moving_average_decay=0.99,
        ppm_num_layers=1,
        ppm_gamma=2,
        distance_thres=0.7,
        similarity_temperature=0.3,
        alpha=1.0,
        use_pixpro=True,
        cutout_ratio_range=(0.6, 0.8),
    )
    opt = torch.optim.Adam(learner.parameters(), lr=1e-4)

    def sample_batch_images() -> Tensor:
        return torch.randn(2, 3, 64, 64)

    def loop() -> tuple[Tensor, Tensor]:
        for _ in range(2):
            images = sample_batch_images()
            loss = learner(images)
            opt.zero_grad()
            loss.backward()
            opt.step()
            learner.update_moving_average()
        return learner(sample_batch_images(), return_positive_pairs=True)

    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    with pytest.warns(UserWarning, match="values from") as warned:
        loss, positive_pairs = loop()
    assert len(warned) == 1
    assert loss.isfinite()
    assert positive_pairs.dtype == torch.int64

    torch.save(resnet, tmp_path / "improved-resnet.pt")
    improved = torch.load(tmp_path / "improved-resnet.pt", weights_only=False)
    assert type(improved) is models.ResNet
    assert improved.state_dict().keys() == before.keys()
    assert not torch.equal(improved.conv1.weight, before["conv1.weight"])
