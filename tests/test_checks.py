"""Error messages of the checks, and the table of limits."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest

from pixel_level_contrastive_learning.checks import (
    LIMITS,
    above,
    at_least,
    check_limits,
    is_number,
    one_of,
    per_channel,
    raise_together,
    ratio_range,
    size_pair,
    something_to_learn,
    whole,
    within,
)

NO_NUMBERS = [None, "1", True, False, 1j, [1], math.nan, math.inf, -math.inf]


def test_checks_load_no_torch() -> None:
    code = "import sys; import pixel_level_contrastive_learning.checks; assert 'torch' not in {}"
    subprocess.run([sys.executable, "-c", code.format("sys.modules")], check=True)


# All at once.


def test_every_problem_is_raised_together() -> None:
    with pytest.raises(ValueError) as error:
        raise_together(None, "a is 1; it must be 2", None, "b is 3; it must be 4")
    assert str(error.value) == "a is 1; it must be 2\nb is 3; it must be 4"


def test_without_problems_nothing_is_raised() -> None:
    raise_together()
    raise_together(None, None)


# Numbers.


@pytest.mark.parametrize("value", [0, -1, 2.5, Fraction(1, 3)])
def test_real_numbers_are_numbers(value) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_all_else_is_no_number(value) -> None:
    assert not is_number(value)
    assert at_least("n", value, -5) == f"n is {value!r}; it must be a number of at least -5"
    assert above("n", value, -5) == f"n is {value!r}; it must be a number above -5"
    assert within("n", value, -5, 5) == f"n is {value!r}; it must be a number from -5 to 5"


def test_at_least_allows_its_bound() -> None:
    assert at_least("gamma", 1, 1) is None
    assert at_least("gamma", 7.5, 1) is None
    assert at_least("gamma", 0.99, 1) == "gamma is 0.99; it must be a number of at least 1"


def test_above_forbids_its_bound() -> None:
    assert above("lr", 1e-9, 0) is None
    assert above("lr", 0, 0) == "lr is 0; it must be a number above 0"
    assert above("lr", -2, 0) == "lr is -2; it must be a number above 0"


def test_within_allows_both_bounds() -> None:
    for value in (0, 0.5, 1):
        assert within("p", value, 0, 1) is None
    for value in (-0.1, 1.1):
        assert within("p", value, 0, 1) == f"p is {value}; it must be a number from 0 to 1"


def test_whole_takes_whole_numbers_from_its_bound() -> None:
    assert whole("n", 1, 1) is None
    assert whole("n", 10**30, 1) is None
    for value in (0, -3, 1.0, 2.5, "2", True, None, math.nan):
        found = whole("n", value, 1)
        assert found == f"n is {value!r}; it must be a whole number of at least 1"


@pytest.mark.parametrize("value", [0, 1.5, None, [1, 0], [-1.0], ["1"], [True], [math.nan], "12"])
def test_weights_are_numbers_above_0_in_a_list(value) -> None:
    [found] = check_limits({"level_weights": value})
    assert found == (
        f"level_weights is {value!r}; it must be a list of numbers above 0, one a pixel layer"
    )


# Choices.


def test_one_of_takes_what_is_allowed() -> None:
    for value in (0, 1, 2):
        assert one_of("n", value, (0, 1, 2)) is None
    assert one_of("mode", "nearest", ("bilinear", "nearest")) is None


@pytest.mark.parametrize("value", [3, 7, 1.0, True, None])
def test_one_of_names_what_is_allowed(value) -> None:
    assert one_of("n", value, (0, 1, 2)) == f"n is {value!r}; it must be one of 0, 1, 2"


def test_one_of_names_the_nearest_choice() -> None:
    assert one_of("mode", "biliner", ("bilinear", "nearest", "bicubic")) == (
        "mode is 'biliner'; it must be one of 'bilinear', 'nearest', 'bicubic' (perhaps 'bilinear')"
    )
    assert one_of("mode", "xyz", ("bilinear",)) == "mode is 'xyz'; it must be one of 'bilinear'"


def test_one_of_never_advises_what_was_given() -> None:
    assert one_of("n", "1", (0, 1, 2)) == "n is '1'; it must be one of 0, 1, 2 (perhaps 1)"


# Pairs.


@pytest.mark.parametrize("value", [(0.6, 0.8), [0.2, 1.0], (0.5, 0.5), (1, 1), (1e-6, 1)])
def test_a_ratio_range_lies_in_the_side(value) -> None:
    assert ratio_range("r", value) is None


@pytest.mark.parametrize(
    "value",
    [None, 0.6, "ab", (0.6,), (0.2, 0.4, 0.6), ("a", "b"), (0.6, None), (True, True)],
    ids=repr,
)
def test_a_ratio_range_is_a_pair_of_numbers(value) -> None:
    assert ratio_range("r", value) == (
        f"r is {value!r}; it must be (low, high) with 0 < low <= high <= 1, such as (0.6, 0.8)"
    )


def test_a_ratio_range_the_wrong_way_round_is_to_be_swapped() -> None:
    assert ratio_range("r", (0.8, 0.6)) == (
        "r is (0.8, 0.6); it must be (low, high) with 0 < low <= high <= 1; swap the two: "
        "(0.6, 0.8)"
    )


@pytest.mark.parametrize("value", [(0, 0.5), (-0.1, 0.5), (0.5, 1.01), (60, 80)])
def test_a_ratio_range_beyond_the_side_is_refused(value) -> None:
    assert ratio_range("r", value) == (
        f"r is {value!r}; it must be (low, high) with 0 < low <= high <= 1: a share of the "
        "image's side"
    )


@pytest.mark.parametrize("value", [224, 1, (224, 320), [1, 2]])
def test_a_size_is_a_side_or_a_height_and_a_width(value) -> None:
    assert size_pair("size", value) is None


@pytest.mark.parametrize(
    "value",
    [0, -1, 224.0, "224", None, True, (224,), (1, 2, 3), (224, 0), (224, 1.5), (None, 3)],
    ids=repr,
)
def test_any_other_size_is_refused(value) -> None:
    assert size_pair("size", value) == (
        f"size is {value!r}; it must be a whole number of pixels or (height, width), such as 224"
    )


# The learner's own.


@pytest.mark.parametrize(("alpha", "instance_weight"), [(1, 0), (0, 1), (1, 1), (0.0, 0.1)])
def test_one_weight_is_enough_to_learn(alpha, instance_weight) -> None:
    assert something_to_learn(alpha, instance_weight) is None


@pytest.mark.parametrize("zero", [0, 0.0])
def test_without_any_weight_there_is_nothing_to_learn(zero) -> None:
    assert something_to_learn(zero, 0) == (
        "alpha and instance_weight are both 0; set at least one of them above 0"
    )


def test_statistics_are_one_number_a_channel() -> None:
    assert per_channel("mean", None, 3) is None
    assert per_channel("mean", (0.5, 0, -1), 3) is None
    assert per_channel("std", [0.5], 1) is None
    for value in ((0.5,), [0.5] * 4, (), (0.5, None, 0.5), "abc", (0.5, math.nan, 0.5)):
        assert per_channel("mean", value, 3) == (
            f"mean is {value!r}; it must be 3 numbers, one a channel"
        )


def test_a_single_number_is_no_list_of_statistics() -> None:
    assert per_channel("mean", 0.5, 1) == "mean is 0.5; it must be 1 numbers, one a channel"


@pytest.mark.parametrize("value", [(0.5, 0.0), (0.5, -1)])
def test_deviations_lie_above_zero(value) -> None:
    assert per_channel("std", value, 2) == f"std is {value!r}; every value must be above 0"
    assert per_channel("mean", value, 2) is None


# The table that the learner and the trainer share.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in LIMITS if "prob" in name or name in ("alpha", "instance_weight")),
        ("pixel_levels", 1),
        *(("level_weights", weights) for weights in ((), [1e-9], (2, 0.5))),
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


def test_messages_follow_the_order_of_the_values() -> None:
    messages = check_limits({"alpha": -1, "other": None, "channels": 0, "seed": 1})
    assert [message.split()[0] for message in messages] == ["alpha", "channels"]


def test_another_table_may_be_asked() -> None:
    assert check_limits({"alpha": -1, "lr": 0}, {"lr": at_least_one}) == ["lr is 0"]


def at_least_one(name: str, value: object) -> str | None:
    return None if value else f"{name} is {value}"
