"""What happens to colour: against hand arithmetic and torchvision."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision

from pixel_level_contrastive_learning import augment
from pixel_level_contrastive_learning.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIEW_ONE,
    VIEW_TWO,
    Augmentation,
    BothAugmentations,
    Colour,
    Factors,
    Normalise,
    Photometry,
    TwoViews,
    change_colour,
    statistics,
)
from pixel_level_contrastive_learning.views import Placement

NEUTRAL = {
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,
    "sigma": 0.0,
    "solarise": False,
}
STRONG = {
    "brightness": 1.3,
    "contrast": 0.7,
    "saturation": 1.2,
    "hue": 0.5,
    "sigma": 1.4,
    "solarise": True,
}
"""One value that changes something for each factor."""
ROUNDING = 1e-3
"""Gray is 0.299 or 0.2989 red, by library."""


def factors(count: int = 1, **some: object) -> Factors:
    """Neutral factors but for those given: a value for all samples or a list with one for each."""
    filled = {}
    for name, value in {**NEUTRAL, **some}.items():
        values = value if isinstance(value, list) else [value] * count
        filled[name] = torch.tensor(values)
    return Factors(**filled)


def strong(which: list[int], count: int) -> Factors:
    """Every change for these samples of so many, none for the others."""
    return factors(
        **{
            name: [value if i in which else NEUTRAL[name] for i in range(count)]
            for name, value in STRONG.items()
        }
    )


def images(*shape: int, seed: int = 0) -> Tensor:
    """Values in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gray_of(pixel: list[float]) -> float:
    """How bright a pixel of three channels is (ITU-R BT.601)."""
    red, green, blue = pixel
    return 0.299 * red + 0.587 * green + 0.114 * blue


# Each change by itself.


@pytest.mark.parametrize(
    ("pixels", "change", "expected"),
    [
        ([0.0, 0.2, 0.5, 0.9], {"brightness": 1.4}, [0, 0.28, 0.7, 1]),  # clipped
        ([0.0, 0.2, 0.5, 0.9], {"brightness": 0.6}, [0, 0.12, 0.3, 0.54]),
        ([0.0, 0.2, 0.4, 1.0], {"contrast": 0.5}, [0.2, 0.3, 0.4, 0.7]),  # from the mean, 0.4
        ([0.0, 0.2, 0.4, 1.0], {"contrast": 1.4}, [0, 0.12, 0.4, 1]),  # clipped at both ends
        ([0.0, 0.4999, 0.5, 0.6, 1.0, 0.1], {"solarise": True}, [0, 0.4999, 0.5, 0.4, 0, 0.1]),
    ],
)
def test_convention_what_a_change_does_to_gray_values(pixels, change, expected) -> None:
    changed = change_colour(torch.tensor(pixels).view(1, 1, 2, -1), factors(**change))
    assert changed.flatten().tolist() == pytest.approx(expected)


def test_convention_contrast_of_colours_is_the_distance_from_the_mean_gray() -> None:
    pixels = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])  # red and blue
    mean = (gray_of([1, 0, 0]) + gray_of([0, 0, 1])) / 2
    less = change_colour(pixels.T.view(1, 3, 1, 2), factors(contrast=0.5))
    expected = [0.5 + mean / 2, mean / 2, mean / 2, mean / 2, mean / 2, 0.5 + mean / 2]
    assert less[0, :, 0].flatten().tolist() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.2])
def test_convention_saturation_is_the_distance_from_gray(factor) -> None:
    pixel = [0.8, 0.4, 0.2]
    gray = gray_of(pixel)
    changed = change_colour(torch.tensor(pixel).view(1, 3, 1, 1), factors(saturation=factor))
    expected = [gray + factor * (value - gray) for value in pixel]
    assert changed.flatten().tolist() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("hue", [0.0, 0.5])
def test_convention_without_saturation_all_channels_are_the_same_gray(hue) -> None:
    pixels = images(2, 3, 4, 5)
    gray = change_colour(pixels, factors(2, saturation=0.0, hue=hue))
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 0], gray[:, 2])
    by_hand = gray_of(pixels[1, :, 2, 3].tolist())
    assert gray[1, 0, 2, 3].item() == pytest.approx(by_hand, abs=ROUNDING)


def test_convention_a_third_of_a_turn_makes_red_green() -> None:
    red, green, blue = torch.eye(3).view(3, 1, 3, 1, 1)
    third = factors(hue=2 * math.pi / 3)
    assert torch.allclose(change_colour(red, third), green, atol=1e-5)
    assert torch.allclose(change_colour(green, third), blue, atol=1e-5)
    assert torch.allclose(change_colour(green, factors(hue=-2 * math.pi / 3)), red, atol=1e-5)


@pytest.mark.parametrize("without", ["hue", "saturation", "nothing"])
def test_changes_come_in_the_order_that_is_told(without) -> None:
    # Brightness, contrast, saturation, hue, sharpness, solarised: each order looks different.
    changes = {name: value for name, value in STRONG.items() if name != without}
    pixels = images(1, 3, 16, 16)
    expected = torchvision.adjust_brightness(pixels, changes["brightness"])
    expected = torchvision.adjust_contrast(expected, changes["contrast"])
    expected = torchvision.adjust_saturation(expected, changes.get("saturation", 1.0))
    expected = torchvision.adjust_hue(expected, changes.get("hue", 0.0) / (2 * math.pi))
    expected = torchvision.gaussian_blur(expected, [13, 13], [changes["sigma"]] * 2)
    expected = torchvision.solarize(expected, 0.5)
    assert torch.allclose(change_colour(pixels, factors(**changes)), expected, atol=2 * ROUNDING)


# The blur.


def blurred(pixels: Tensor, sigma: float, kernel: tuple[int, int]) -> Tensor:
    """Torchvision's Gaussian blur with a kernel of so many rows and columns."""
    return torchvision.gaussian_blur(pixels, [*kernel[::-1]], [sigma, sigma])


@pytest.mark.parametrize(
    ("size", "sigma", "kernel", "largest"),
    [
        *(((14, 15), sigma, (13, 13), ()) for sigma in (0.1, 0.7, 2.0)),
        # Never larger than the view.
        ((5, 7), 1.5, (5, 7), ()),
        ((6, 20), 1.5, (5, 13), ()),
        ((2, 2), 1.5, (1, 1), ()),
        ((3, 1), 1.5, (3, 1), ()),
        ((1, 1), 1.5, (1, 1), ()),
        # Three of the largest deviations to either side; 0.9 shows where a default kernel goes on.
        *(((12, 11), 0.3, (n, n), (largest,)) for largest, n in ((0.3, 3), (1.0, 7), (1.1, 9))),
        ((12, 11), 0.9, (7, 7), (1.0,)),
    ],
)
def test_blur_equals_torchvisions(size, sigma, kernel, largest) -> None:
    pixels = images(1, 1, *size)
    changed = change_colour(pixels, factors(sigma=sigma), *largest)
    assert torch.allclose(changed, blurred(pixels, sigma, kernel), atol=1e-5)


# What is left alone.


def test_neutral_factors_change_nothing() -> None:
    pixels = images(3, 3, 8, 8) * 3 - 1  # not even clipped
    assert torch.equal(change_colour(pixels, factors(3)), pixels)


@pytest.mark.parametrize("name", STRONG)
def test_only_the_chosen_samples_change(name) -> None:
    pixels = images(4, 3, 16, 16)
    neutral, strong = NEUTRAL[name], STRONG[name]
    changed = change_colour(pixels, factors(4, **{name: [neutral, strong, neutral, strong]}))
    assert torch.equal(changed[[0, 2]], pixels[[0, 2]])
    for sample in (1, 3):
        assert not torch.allclose(changed[sample], pixels[sample], atol=0.01)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_sample_does_not_hang_on_the_others_of_its_batch(channels) -> None:
    pixels = images(4, channels, 16, 15)
    batch = factors(
        brightness=[1.3, 1.0, 0.7, 1.1],
        contrast=[1.0, 0.6, 1.4, 0.9],
        saturation=[0.0, 1.0, 1.2, 0.8],
        hue=[0.3, -0.6, 0.0, 0.1],
        sigma=[2.0, 0.5, 0.0, 0.1],
        solarise=[False, True, True, False],
    )
    together = change_colour(pixels, batch)
    for i in range(4):
        alone = Factors(*(factor[i : i + 1] for factor in batch))
        assert torch.allclose(change_colour(pixels[i : i + 1], alone)[0], together[i], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", [[0, 1], [0]], ids=["all samples", "some samples"])
def test_changing_keeps_the_input_as_it_was_and_its_dtype(dtype, which) -> None:
    pixels = images(2, 3, 8, 8).to(dtype)
    before = pixels.clone()
    assert change_colour(pixels, strong(which, 2)).dtype == dtype
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_have_no_colour_to_lose(channels) -> None:
    pixels = images(2, channels, 8, 8)
    assert torch.equal(change_colour(pixels, factors(2, saturation=0.0, hue=1.0)), pixels)

    changed = change_colour(pixels, factors(2, brightness=0.7, contrast=0.5))
    darker = pixels * 0.7
    mean = darker.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(changed, mean + 0.5 * (darker - mean), atol=1e-6)

    changed = change_colour(pixels, factors(2, sigma=1.0))
    assert torch.allclose(changed, blurred(pixels, 1.0, (7, 7)), atol=1e-5)  # 8 rows hold 7


def test_the_default_device_has_no_say() -> None:
    pixels, drawn = images(8, 3, 16, 16), VIEW_TWO.draw(8)
    expected = change_colour(pixels, drawn)
    with torch.device("meta"):
        assert torch.equal(change_colour(pixels, drawn), expected)
        assert {factor.device.type for factor in VIEW_TWO.draw(4)} == {"cpu"}


# Drawing factors.

MANY = 4000


def share(hits: Tensor, expected: float) -> bool:
    """Whether a share is as expected, within five standard deviations (exactly, for 0 and 1)."""
    slack = 5 * math.sqrt(expected * (1 - expected) / len(hits))
    return abs(hits.float().mean().item() - expected) <= slack


def uniform(values: Tensor, low: float, high: float) -> bool:
    """Whether values fill a range evenly: bounds, mean and variance."""
    spread = high - low
    filled = values.max() - values.min() > 0.98 * spread
    inside = low - 1e-5 <= values.min() and values.max() <= high + 1e-5
    even = abs(values.mean() - (low + high) / 2) < 5 * spread / math.sqrt(12 * len(values))
    return bool(filled and inside and even and abs(values.std() * 12**0.5 / spread - 1) < 0.05)


def test_the_two_views_are_the_authors() -> None:
    alike = {
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "prob_jitter": 0.8,
        "prob_gray": 0.2,
        "sigma": (0.1, 2.0),
    }
    assert vars(VIEW_ONE) == {**alike, "prob_blur": 1.0, "prob_solarise": 0.0}
    assert vars(VIEW_TWO) == {**alike, "prob_blur": 0.1, "prob_solarise": 0.2}


@pytest.mark.parametrize("view", [VIEW_ONE, VIEW_TWO], ids=["one", "two"])
def test_factors_come_as_often_and_as_strong_as_asked(view) -> None:
    drawn = view.draw(MANY)
    assert all(factor.shape == (MANY,) for factor in drawn)
    assert all(factor.device.type == "cpu" for factor in drawn)
    assert drawn.solarise.dtype == torch.bool

    jittered = drawn.brightness != 1
    assert share(jittered, 0.8)
    assert uniform(drawn.brightness[jittered], 0.6, 1.4)
    assert uniform(drawn.contrast[jittered], 0.6, 1.4)
    assert uniform(drawn.hue[jittered], -0.2 * math.pi, 0.2 * math.pi)  # a tenth of a turn
    gray = drawn.saturation == 0
    assert share(gray, 0.2)
    assert uniform(drawn.saturation[jittered & ~gray], 0.8, 1.2)
    # Jitter comes as a whole or not at all.
    assert (drawn.contrast[~jittered] == 1).all()
    assert (drawn.hue[~jittered] == 0).all()
    assert (drawn.saturation[~jittered & ~gray] == 1).all()

    blurred = drawn.sigma > 0
    assert share(blurred, view.prob_blur)
    assert uniform(drawn.sigma[blurred], 0.1, 2.0)
    assert share(drawn.solarise, view.prob_solarise)


def test_factors_hang_together_with_nothing() -> None:
    drawn = Photometry(prob_blur=0.5, prob_solarise=0.5, prob_gray=0.5).draw(MANY)
    jittered = drawn.brightness != 1
    figures = torch.stack(
        [
            drawn.brightness[jittered],
            drawn.contrast[jittered],
            drawn.hue[jittered],
            (drawn.saturation == 0)[jittered].float(),
            (drawn.sigma > 0)[jittered].float(),
            drawn.solarise[jittered].float(),
        ]
    )
    assert (torch.corrcoef(figures) - torch.eye(6)).abs().max() < 5 / math.sqrt(jittered.sum())
    assert share(drawn.solarise[~jittered], 0.5)
    assert share((drawn.saturation == 0)[~jittered], 0.5)


def test_a_seed_fixes_the_factors_and_takes_nine_numbers_a_sample() -> None:
    drawn, states = [], []
    for draw in (VIEW_ONE.draw, VIEW_ONE.draw, VIEW_TWO.draw, lambda count: torch.rand(9, count)):
        torch.manual_seed(5)
        drawn.append(draw(6))
        states.append(torch.get_rng_state())
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert all(torch.equal(state, states[0]) for state in states)
    assert len(drawn[0].brightness.unique()) > 1
    assert len(drawn[0].sigma.unique()) == 6


# The modules.


def test_colour_draws_for_each_sample_and_changes_accordingly() -> None:
    pixels = images(6, 3, 16, 16)
    torch.manual_seed(2)
    changed = Colour(VIEW_TWO, 3)(pixels)
    torch.manual_seed(2)
    assert torch.equal(changed, change_colour(pixels, VIEW_TWO.draw(6)))
    assert not torch.equal(changed, pixels)


def test_colour_blurs_with_its_own_kernel() -> None:
    pixels = images(1, 1, 12, 12)
    soft = Photometry(prob_jitter=0, prob_gray=0, sigma=(1.0, 1.0))
    assert torch.allclose(Colour(soft, 1)(pixels), blurred(pixels, 1.0, (7, 7)), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colour_solarises_three_channels_only(channels) -> None:
    bright = Photometry(prob_jitter=0, prob_gray=1, prob_blur=0, prob_solarise=1)
    pixels = images(3, channels, 4, 4)
    assert torch.equal(Colour(bright, channels)(pixels), pixels)
    whites = torch.ones(3, 3, 4, 4)
    assert torch.allclose(Colour(bright, 3)(whites), torch.zeros(3, 3, 4, 4), atol=1e-6)


def test_convention_normalising_takes_the_mean_and_divides() -> None:
    pixels = torch.tensor([0.5, 1.0, 0.0]).view(1, 3, 1, 1)
    normalised = Normalise((0.5, 0.5, 0.25), (0.1, 0.25, 0.5))(pixels)
    assert normalised.flatten().tolist() == pytest.approx([0, 2, -0.5])


def test_normalising_keeps_the_dtype_and_leaves_no_trace_in_a_state() -> None:
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert normalise(images(1, 3, 2, 2).to(dtype)).dtype == dtype
    assert normalise.state_dict() == {}


def test_statistics_default_to_imagenets() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert statistics(3, None, None) == (mean, std)
    for channels in (1, 2, 5):
        gray = statistics(channels, None, None)
        assert gray[0] == pytest.approx((0.449,) * channels)  # the average of the three
        assert gray[1] == pytest.approx((0.226,) * channels)
    assert statistics(2, [0.1, 0.2], None) == ((0.1, 0.2), pytest.approx((0.226,) * 2))
    assert statistics(3, None, [1, 2, 3]) == (mean, (1, 2, 3))


def test_augmenting_changes_first_and_normalises_after() -> None:
    half = Augmentation(lambda pixels: pixels / 2, Normalise((0.25,), (0.125,)))
    assert half(torch.ones(1, 1, 2, 2)).flatten().tolist() == [2] * 4
    bare = Augmentation(lambda pixels: pixels / 2, None)
    assert bare(torch.ones(1, 1, 2, 2)).flatten().tolist() == [0.5] * 4
    assert bare(torch.zeros(1, 1, 2, 2)).flatten().tolist() == [0] * 4


@pytest.mark.parametrize(
    ("change", "into"),
    [(lambda pixels: pixels[..., 1:, 1:], "(2, 1, 7, 7)"), (lambda pixels: [*pixels], "list")],
)
def test_augmenting_must_not_move_pixels(change, into) -> None:
    with pytest.raises(ValueError) as error:
        Augmentation(change, Normalise((0.5,), (0.5,)))(torch.ones(2, 1, 8, 8))
    assert str(error.value) == (
        f"augment_fn turned views (2, 1, 8, 8) into {into}; it must keep the shape and the "
        "position of every pixel: change only colour there, and set geometry with "
        "cutout_ratio_range, prob_rand_hflip, prob_rand_vflip and max_rotation"
    )


@pytest.mark.parametrize("normalise", [None, Normalise((0.5,), (0.5,))])
def test_augmenting_must_return_floats(normalise) -> None:
    into_bytes = Augmentation(lambda pixels: (255 * pixels).byte(), normalise)
    with pytest.raises(ValueError, match=r"views of torch\.float32 into torch\.uint8; .* by 255"):
        into_bytes(torch.ones(2, 1, 8, 8))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 3.0)])
@pytest.mark.filterwarnings("ignore:images have values")
def test_views_to_change_lie_in_the_range_of_the_images(mode, low, high) -> None:
    seen: list[Tensor] = []

    def keep(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels

    how = {"mode": mode, "mean": None, "std": None, "smallest": 1}
    views = TwoViews((40, 40), 3, (keep, None), Placement((0.6, 0.8)), **how)
    images = (torch.rand(4, 3, 32, 32) > 0.5) * (high - low) + low
    views(images)
    assert len(seen) == 2
    rounding = 1e-5
    assert all(low - rounding <= pixels.min() for pixels in seen)
    assert all(pixels.max() <= high + rounding for pixels in seen)


USUAL = Normalise((0.5,) * 3, (0.25,) * 3)


class Darker(Colour):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) / 2


@pytest.mark.parametrize("kinds", [(), ("cpu",)], ids=["as one", "one by one"])
@pytest.mark.parametrize(
    ("second", "passes"),
    [
        (Augmentation(Colour(VIEW_TWO, 3), USUAL), (1, 2)),
        (Augmentation(Colour(Photometry(sigma=(0.1, 1.0)), 3), USUAL), (2, 2)),
        (Augmentation(Colour(VIEW_TWO, 3), None), (1, 2)),
        (Augmentation(lambda pixels: pixels / 2, USUAL), (1, 1)),
        (Augmentation(Darker(VIEW_TWO, 3), USUAL), (2, 2)),
    ],
    ids=["alike", "other kernels", "other statistics", "one's own", "made of ours"],
)
def test_both_views_become_what_each_would_alone(second, passes, kinds, monkeypatch) -> None:
    monkeypatch.setattr(augment, "ONE_BY_ONE", kinds)
    first = Augmentation(Colour(VIEW_ONE, 3), USUAL)
    one, two = images(5, 3, 24, 20), images(5, 3, 24, 20).flip(0)
    torch.manual_seed(3)
    alone = first(one), second(two)
    made = []
    monkeypatch.setattr(
        augment, "change_colour", lambda *asked: made.append(asked) or change_colour(*asked)
    )
    torch.manual_seed(3)
    together = BothAugmentations(first, second)(one, two)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert len(made) == passes[len(kinds)]
