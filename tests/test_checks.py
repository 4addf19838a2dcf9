"""Error messages of the checks, and the table of limits."""

import math
import subprocess
import sys
from fractions import Fraction
from functools import partial
from importlib.metadata import version

import pytest

from pixel_level_contrastive_learning.checks import (
    LIMITS,
    above,
    at_least,
    check_limits,
    installed_version,
    is_number,
    one_of,
    per_channel,
    raise_together,
    ratio_range,
    share,
    size_pair,
    something_to_learn,
    whole,
    within,
)

NO_NUMBERS = [None, "1", True, False, 1j, [1], math.nan, math.inf, -math.inf]
RANGE = "(low, high) with 0 < low <= high <= 1"


def test_checks_load_no_torch() -> None:
    code = "import sys; import pixel_level_contrastive_learning.checks; assert 'torch' not in {}"
    subprocess.run([sys.executable, "-c", code.format("sys.modules")], check=True)


def test_every_problem_is_raised_together() -> None:
    raise_together()
    raise_together(None, None)
    with pytest.raises(ValueError) as error:
        raise_together(None, "a is 1; it must be 2", None, "b is 3; it must be 4")
    assert str(error.value) == "a is 1; it must be 2\nb is 3; it must be 4"


@pytest.mark.parametrize("value", [0, -1, 2.5, Fraction(1, 3)])
def test_real_numbers_are_numbers(value) -> None:
    assert is_number(value)


@pytest.mark.parametrize(
    ("check", "allowed", "refused", "words"),
    [
        (partial(at_least, low=1), [1, 7.5], [0.99, *NO_NUMBERS], "a number of at least 1"),
        (partial(above, low=0), [1e-9], [0, -2, *NO_NUMBERS], "a number above 0"),
        (
            partial(within, low=0, high=1),
            [0, 0.5, 1],
            [-0.1, 1.1, *NO_NUMBERS],
            "a number from 0 to 1",
        ),
        (share, [1e-9, 1], [0, 1.1, *NO_NUMBERS], "a number above 0, at most 1"),
        (
            partial(whole, low=1),
            [1, 10**30],
            [0, -3, 1.0, 2.5, "2", True, None, math.nan],
            "a whole number of at least 1",
        ),
        (
            LIMITS["level_weights"],
            [(), [1e-9], (2, 0.5)],
            [0, 1.5, None, [1, 0], [-1.0], ["1"], [True], [math.nan], "12"],
            "a list of numbers above 0, one per pixel layer",
        ),
        (partial(one_of, allowed=(0, 1, 2)), [0, 1, 2], [3, 7, 1.0, True, None], "one of 0, 1, 2"),
        (
            ratio_range,
            [(0.6, 0.8), [0.2, 1.0], (0.5, 0.5), (1, 1), (1e-6, 1)],
            [None, 0.6, "ab", (0.6,), (0.2, 0.4, 0.6), ("a", "b"), (0.6, None), (True, True)],
            f"{RANGE}, such as (0.6, 0.8)",
        ),
        (
            ratio_range,
            [],
            [(0, 0.5), (-0.1, 0.5), (0.5, 1.01), (60, 80)],
            f"{RANGE}: a share of the image's side",
        ),
        (LIMITS["crop_area"], [(1, 1)], [(0, 0.5)], f"{RANGE}: a share of the image's area"),
        (LIMITS["seed"], [0], [-1, 0.5], "a whole number of at least 0"),
        (LIMITS["seed"], [2**63 - 1], [2**63], f"a whole number of at most {2**63 - 1}"),
        (ratio_range, [], [(0.8, 0.6)], f"{RANGE}; swap the two: (0.6, 0.8)"),
        (
            size_pair,
            [224, 1, (224, 320), [1, 2]],
            [0, -1, 224.0, "224", None, True, (224,), (1, 2, 3), (224, 0), (224, 1.5), (None, 3)],
            "a whole number of pixels or (height, width), such as 224",
        ),
        (
            partial(per_channel, channels=3),
            [None, (0.5, 0, -1)],
            [(0.5,), [0.5] * 4, (), (0.5, None, 0.5), "abc", (0.5, math.nan, 0.5), 0.5],
            "3 numbers, one per channel",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_check_allows_its_range_and_names_it_for_all_else(check, allowed, refused, words) -> None:
    for value in allowed:
        assert check("n", value) is None
    for value in refused:
        assert check("n", value) == f"n is {value!r}; it must be {words}"


@pytest.mark.parametrize(
    ("value", "allowed", "words"),
    [
        (
            "biliner",
            ("bilinear", "nearest", "bicubic"),
            "'bilinear', 'nearest', 'bicubic' (perhaps 'bilinear')",
        ),
        ("xyz", ("bilinear",), "'bilinear'"),
        ("1", (0, 1, 2), "0, 1, 2 (perhaps 1)"),  # never what was given
    ],
)
def test_one_of_names_the_nearest_choice(value, allowed, words) -> None:
    assert one_of("mode", value, allowed) == f"mode is {value!r}; it must be one of {words}"


def test_something_to_learn_is_a_weight_above_0() -> None:
    for weights in ((1, 0), (0, 1), (1, 1), (0.0, 0.1)):
        assert something_to_learn(*weights) is None
    for zero in (0, 0.0):
        assert something_to_learn(zero, 0) == (
            "alpha and instance_weight are both 0; set at least one of them above 0"
        )


@pytest.mark.parametrize("value", [(0.5, 0.0), (0.5, -1)])
def test_deviations_lie_above_zero(value) -> None:
    assert per_channel("std", [0.5], 1) is None
    assert per_channel("std", value, 2) == f"std is {value!r}; every value must be above 0"
    assert per_channel("mean", value, 2) is None


# The table that the learner and the trainer share.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in LIMITS if "prob" in name or name in ("alpha", "instance_weight")),
        ("pixel_levels", 1),
        *(
            (name, value)
            for name in ("moving_average_decay", "target_momentum")
            for value in (0, 1)
        ),
        *(("ppm_num_layers", depth) for depth in (0, 1, 2)),
        ("max_rotation", 180),
        ("ppm_gamma", 1),
        ("distance_thres", 1e-9),
        ("projection_size", 1),
        ("cutout_interpolate_mode", "bicubic"),
        ("augment_fn", None),
        ("augment_fn2", abs),
    ],
)
def test_a_bound_is_part_of_the_range(name, value) -> None:
    assert check_limits({name: value}) == []


# What PixelCL takes is in its own tests.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_area", (0.5, 1.1)),
        *((name, 1.1) for name in ("prob_hflip", "prob_vflip", "max_broken", "target_momentum")),
        ("seed", -1),
    ],
)
def test_every_limit_refuses_what_lies_beyond(name, value) -> None:
    [message] = check_limits({"other": None, name: value})
    assert message.startswith(f"{name} is {value!r}; it must be ")


def test_messages_follow_the_order_of_the_values_by_any_table() -> None:
    messages = check_limits({"alpha": -1, "other": None, "channels": 0, "seed": 1})
    assert [message.split()[0] for message in messages] == ["alpha", "channels"]
    limits = {"lr": lambda name, value: None if value else f"{name} is {value}"}
    assert check_limits({"alpha": -1, "lr": 0}, limits) == ["lr is 0"]


def test_the_version_of_what_is_not_installed_is_unknown() -> None:
    assert installed_version("torch") == version("torch")
    assert installed_version("no-such-library") == "unknown"
