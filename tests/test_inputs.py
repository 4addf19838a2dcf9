"""What the learner accepts, and how it says no to the rest."""

import copy
import pickle
import re
import threading
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pixel_level_contrastive_learning.inputs import ValueWatch, check_images, check_views
from pixel_level_contrastive_learning.views import View


def view(count: int = 2, channels: int = 3) -> View:
    """A ready view of nothing in particular."""
    return View(torch.zeros(count, channels, 8, 8), torch.zeros(count, 2, 3))


# Images.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_float_images_pass_as_they_are(channels, dtype) -> None:
    images = torch.zeros(2, channels, 5, 6, dtype=dtype)
    assert check_images(images, channels) is images
    assert check_images(images, channels, smallest=5) is images


PAIR = "or a pair of View(pixels, to_image)"
FLOATS = "they must be floats in [0, 1]: pass images.float()"
WHITE = "the value of white in the files"
FORM = "they must be (b, 3, height, width), all above 0"
MORE = "a network for {0} to PixelCL(..., channels={0})"
BUILT = "this learner was built for 3: pass"


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([1, 2], f"a list; they must be a float tensor (b, 3, height, width), {PAIR}"),
        (None, f"a NoneType; they must be a float tensor (b, 3, height, width), {PAIR}"),
        (torch.uint8, f"dtype torch.uint8; {FLOATS} / 255"),
        (torch.uint16, f"dtype torch.uint16; {FLOATS} / 65535"),
        (torch.bool, f"dtype torch.bool; {FLOATS}"),
        (torch.int64, f"dtype torch.int64; {FLOATS} / 255 or / 65535, {WHITE}"),
        (torch.int16, f"dtype torch.int16; {FLOATS} / 255 or / 65535, {WHITE}"),
        ((3, 8, 8), f"shape (3, 8, 8); {FORM}; add a batch dimension with images[None]"),
        ((8, 8), f"shape (8, 8); {FORM}"),
        ((1, 2, 3, 8, 8), f"shape (1, 2, 3, 8, 8); {FORM}"),
        ((0, 3, 8, 8), f"shape (0, 3, 8, 8); {FORM}"),
        ((2, 3, 8, 0), f"shape (2, 3, 8, 0); {FORM}"),
        ((2, 4, 8, 8), f"4 channels (shape (2, 4, 8, 8)); {BUILT} {MORE.format(4)}"),
        ((2, 2, 8, 8), f"2 channels (shape (2, 2, 8, 8)); {BUILT} {MORE.format(2)}"),
        ((2, 1, 8, 8), f"1 channels (shape (2, 1, 8, 8)); {BUILT} images.expand(-1, 3, -1, -1)"),
        ((2, 8, 9, 3), f"8 channels (shape (2, 8, 9, 3)); {BUILT} images.permute(0, 3, 1, 2)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_images_are_refused_with_the_way_to_make_them_right(images, text) -> None:
    if isinstance(images, torch.dtype):
        images = torch.zeros(2, 3, 8, 8, dtype=images)
    elif isinstance(images, tuple):
        images = torch.zeros(images)
    with pytest.raises(ValueError) as error:
        check_images(images, 3)
    verb = "have" if isinstance(images, torch.Tensor) else "are"
    assert str(error.value) == f"images {verb} {text}"


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
def test_images_smaller_than_the_stride_are_refused(size) -> None:
    height, width = size
    with pytest.raises(ValueError) as error:
        check_images(torch.zeros(2, 3, height, width), 3, smallest=32)
    assert str(error.value) == (
        f"images are {height}x{width}; they must be at least 32x32, the stride of the pixel "
        "layer: use an earlier layer or larger images"
    )
    check_images(torch.zeros(2, 3, 32, 32), 3, smallest=32)


# Ready views.


@pytest.mark.parametrize("container", [tuple, list])
def test_two_views_pass_with_their_tensors_untouched(container) -> None:
    one, two = view(), View(torch.ones(2, 3, 4, 6), torch.ones(2, 2, 3).double())
    for given in ((one, two), (tuple(one), two)):  # plain pairs of tensors become views
        checked = check_views(container(given), 3)
        assert [type(some) for some in checked] == [View, View]
        for some, expected in zip(checked, (one, two), strict=True):
            assert some.pixels is expected.pixels
            assert some.to_image is expected.to_image


NO_VIEW = (
    "it must be View(pixels (b, c, h, w), to_image (b, 2, 3)), since the loss needs the position "
    "of each pixel"
)
MAPS = (
    "it must be a tensor (2, 2, 3) of float32 or float64 on the device of the pixels, one map per "
    "image: make it with geometry.box_to_map"
)


def mapped(to_image: object) -> View:
    """A view with this map."""
    return view()._replace(to_image=to_image)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.zeros(2, 3, 8), f"a view is a Tensor; {NO_VIEW}"),
        (list(view()), f"a view is a list; {NO_VIEW}"),
        ((*view(), 1), f"a view is a tuple; {NO_VIEW}"),
        (None, f"a view is a NoneType; {NO_VIEW}"),
        *(
            (mapped(torch.zeros(shape)), f"to_image of a view is {shape}; {MAPS}")
            for shape in ((2, 3), (1, 2, 3), (2, 4), (2, 3, 3))  # one map, two images' one, boxes
        ),
        (mapped(None), f"to_image of a view is NoneType; {MAPS}"),
        *(
            (mapped(torch.zeros(2, 2, 3, dtype=dtype)), f"of a view is {dtype} on cpu; {MAPS}")
            for dtype in (torch.int64, torch.float16, torch.bfloat16)  # too coarse for coordinates
        ),
        (
            mapped(torch.zeros(2, 2, 3).half()),
            "map and keep its precision (Lightning Fabric rounds",
        ),
        (mapped(torch.zeros(2, 2, 3, device="meta")), f"is torch.float32 on meta; {MAPS}"),
        (view(channels=4), "images have 4 channels (shape (2, 4, 8, 8)); this learner was built"),
        (
            view()._replace(pixels=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
            "images have dtype torch.uint8; they must be floats in [0, 1]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_view_is_refused(wrong, text, place) -> None:
    views = [view(), view()]
    views[place] = wrong
    with pytest.raises(ValueError, match=re.escape(text)):
        check_views(views, 3)


@pytest.mark.parametrize(
    ("views", "text"),
    [
        *(
            ([torch.zeros(2, 3, 8, 8), *rest], "pass only these: batch[0]")
            for rest in ([], [torch.zeros(2)], [torch.zeros(2), [1, 2]])
        ),
        *(
            ([torch.zeros(3, 8, 8)] * count, "make a batch of them: torch.stack(images)")
            for count in (2, 3)
        ),
        *(
            ([view()] * count, f"got {count} views; the learner takes (view_one, view_two)")
            for count in (0, 1, 3)
        ),
        (
            [view(2), view(5)],
            "view one holds 2 images and view two 5; both must hold the same images in the same "
            "order",
        ),
    ],
)
def test_views_that_are_no_pair_of_the_same_images_are_refused(views, text) -> None:
    with pytest.raises(ValueError) as error:
        check_views(views, 3)
    assert str(error.value).endswith(text)


# Values.


def with_value(value: float, image: int = 2) -> Tensor:
    """Four good images, but for one pixel."""
    images = torch.full((4, 3, 5, 6), 0.5)
    images[image, 1, 3, 4] = value
    return images


ADVICE = (
    "values must be in [0, 1]: divide by the largest value of the format (255, 65535), and look "
    "for broken files"
)


@pytest.mark.parametrize("image", [0, 2, 3])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (17.0, "values from 0.5 to 17"),
        (-16.5, "values from -16.5 to 0.5"),
        (65535.0, "values from 0.5 to 6.554e+04"),
        (float("nan"), "NaN or infinite values"),
        (float("inf"), "NaN or infinite values"),
        (float("-inf"), "NaN or infinite values"),
    ],
)
def test_impossible_values_are_refused_and_the_image_named(value, found, image) -> None:
    with pytest.raises(ValueError) as error:
        ValueWatch()(with_value(value, image), in_unit_range=True)
    assert str(error.value) == f"image {image} of the batch has {found}; {ADVICE}"


def test_the_worst_image_is_named() -> None:
    images = with_value(17.0, 0)
    images[3] = 40.0
    with pytest.raises(ValueError, match=r"^image 3 of the batch has values from 40 to 40;"):
        ValueWatch()(images, in_unit_range=True)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^image 1 of the batch has NaN"):
        ValueWatch()(images, in_unit_range=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_judged_in_every_precision(dtype) -> None:
    for value in (17.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^image 2 "):
            ValueWatch()(with_value(value).to(dtype), in_unit_range=True)
    ValueWatch()(with_value(1.0).to(dtype), in_unit_range=True)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.0005, 1.0005])
def test_values_in_the_unit_range_pass_in_silence(value) -> None:
    watch = ValueWatch()
    watch(with_value(value), in_unit_range=True)  # a warning would be an error
    assert watch.warned is False


SAID_ONCE = r"\[0, 1\] is expected.*\(warned once\)$"


def look_three_times(watch: ValueWatch, images: Tensor) -> None:
    """Three batches of a training loop."""
    for _ in range(3):
        watch(images, in_unit_range=True)


@pytest.mark.parametrize("value", [-0.002, 1.002, -3.0, 16.0, -16.0])
def test_values_beside_the_unit_range_are_one_warning(value) -> None:
    low, high = min(value, 0.5), max(value, 0.5)
    with pytest.warns(UserWarning, match=SAID_ONCE) as warned:
        look_three_times(ValueWatch(), with_value(value))
    assert [str(warning.message) for warning in warned] == [
        f"images have values from {low:.4g} to {high:.4g}; [0, 1] is expected, since colour "
        "augmentation clips to it: divide by the largest value of the format and do not normalise "
        "(warned once)"
    ]


def test_random_numbers_for_images_are_one_warning() -> None:
    watch = ValueWatch()
    with pytest.warns(UserWarning, match=SAID_ONCE) as warned:
        look_three_times(watch, torch.randn(4, 3, 16, 16))
    assert len(warned) == 1
    # Another learner speaks for itself; and a warned one still refuses what it must.
    with pytest.warns(UserWarning, match=SAID_ONCE):
        ValueWatch()(torch.randn(4, 3, 16, 16), in_unit_range=True)
    with pytest.raises(ValueError, match=r"^image 2 "):
        watch(with_value(17.0), in_unit_range=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_ready_views_must_be_finite_and_no_more(value) -> None:
    for large in (-3.0, 17.0, 1e30):
        ValueWatch()(with_value(large), in_unit_range=False)
    with pytest.raises(ValueError, match=r"^image 2 of the batch has NaN or infinite values;"):
        ValueWatch()(with_value(value), in_unit_range=False)


def test_watching_leaves_images_and_their_graph_alone() -> None:
    images = with_value(0.3).requires_grad_()
    before = images.detach().clone()
    ValueWatch()(images, in_unit_range=True)
    assert torch.equal(images, before)
    assert images.grad_fn is None


# Values that arrive later.


class Arrival:
    """An event that has come when it is told so; like a device's, it can be neither copied."""

    def __init__(self, arrived: bool = False) -> None:
        self.arrived = arrived
        self.lock = threading.Lock()

    def query(self) -> bool:
        return self.arrived


def extremes(value: float) -> Tensor:
    """The lowest and highest values ``(2, b)`` of four images, one of which holds ``value``."""
    images = with_value(value).flatten(1)
    return torch.stack((images.amin(dim=1), images.amax(dim=1)))


def test_nothing_is_judged_before_it_has_arrived() -> None:
    watch, event = ValueWatch(), Arrival()
    watch.pending.append((extremes(float("nan")), event))
    watch.judge_arrived()
    watch.judge_arrived()
    assert len(watch.pending) == 1
    event.arrived = True
    with pytest.raises(ValueError, match=r"^image 2 of the batch has NaN or infinite values;"):
        watch.judge_arrived()
    assert watch.pending == []
    watch.judge_arrived()  # what was said is not said again


def test_arrivals_are_judged_in_the_order_of_the_batches() -> None:
    watch = ValueWatch()
    events = [Arrival(), Arrival(arrived=True), Arrival()]
    for event, value in zip(events, (0.5, 17.0, 18.0), strict=True):
        watch.pending.append((extremes(value), event))
    watch.judge_arrived()  # the second has come, the first has not
    assert [event for _, event in watch.pending] == events
    events[0].arrived = True
    with pytest.raises(ValueError, match="to 17;"):
        watch.judge_arrived()
    assert [event for _, event in watch.pending] == events[2:]


def test_a_late_warning_is_given_once_too() -> None:
    watch = ValueWatch()
    for value in (1.5, 2.5):
        watch.pending.append((extremes(value), Arrival(arrived=True)))
    with pytest.warns(UserWarning, match="values from 0.5 to 1.5;") as warned:
        watch.judge_arrived()
    assert len(warned) == 1
    assert watch.pending == []


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda watch: pickle.loads(pickle.dumps(watch))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_watch_with_work_pending_can_be_copied(copied) -> None:
    watch = ValueWatch()
    watch.pending.append((extremes(17.0), Arrival()))
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(watch.pending)
    other = copied(watch)
    assert other.pending == []
    assert len(watch.pending) == 1
    other.judge_arrived()
    with pytest.raises(ValueError, match=r"^image 2 "):
        other(with_value(17.0), in_unit_range=True)


def test_a_copy_remembers_what_it_has_said() -> None:
    watch = ValueWatch()
    with pytest.warns(UserWarning, match=SAID_ONCE):
        watch(with_value(2.0), in_unit_range=True)
    other = pickle.loads(pickle.dumps(watch))
    with warnings.catch_warnings(record=True) as warned:
        other(with_value(2.0), in_unit_range=True)
    assert warned == []


def test_an_arrival_is_awaited_on_the_gpu_of_the_images(monkeypatch) -> None:
    class Event(Arrival):
        streams: ClassVar[list[object]] = []

        def record(self, stream: object = "of the present GPU") -> None:
            self.streams.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    with FakeTensorMode():
        ValueWatch()(torch.empty(2, 3, 8, 8, device="cuda:1"), in_unit_range=True)
    assert Event.streams == ["of cuda:1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_verdict_comes_later_and_nothing_waits(no_waiting) -> None:
    watch = ValueWatch()
    images = with_value(float("nan")).cuda()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # the device is busy when the watch looks
    with no_waiting():
        watch(images, in_unit_range=True)
        watch(images, in_unit_range=False)
    assert len(watch.pending) == 2
    torch.cuda.synchronize()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^image 2 "):
            watch.judge_arrived()
