"""The stream of samples, cut into batches: for any process, from any sample on."""

from itertools import islice

import pytest
import torch

from pixel_level_contrastive_learning.data.order import Order, Place, dice, epoch_order


def stream(order: Order, passes: int = 1) -> list[Place]:
    """The samples of some passes, the clock moved as a loader moves it."""
    found = []
    for _ in range(passes):
        for batch in islice(order, order.left):
            found += batch
            order.start_at(order.samples + order.step)
    return found


def test_every_image_comes_once_an_epoch() -> None:
    found = stream(Order(10, 4, seed=0), passes=5)  # two batches a pass: 40 samples
    assert [place.epoch for place in found] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    assert [place.position for place in found] == list(range(10)) * 4
    for start in range(0, 40, 10):
        assert sorted(place.index for place in found[start : start + 10]) == list(range(10))
    assert found[:10] != found[10:20]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert stream(Order(50, 5, seed=1)) == stream(Order(50, 5, seed=1))
    assert stream(Order(50, 5, seed=1)) != stream(Order(50, 5, seed=2))
    assert not torch.equal(epoch_order(0, 1, 50), epoch_order(1, 0, 50))


def test_the_runs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    stream(Order(50, 5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_share_the_same_batches(world) -> None:
    alone = list(islice(Order(30, 8, seed=3), 9))
    ranks = [Order(30, 8 // world, seed=3, rank=rank, world=world) for rank in range(world)]
    shared = islice(zip(*ranks, strict=True), 9)
    assert [[place for part in parts for place in part] for parts in shared] == alone


def test_fewer_images_than_a_batch_wrap_round() -> None:
    order = Order(3, 8, seed=0)
    assert len(order) == 1
    batch = next(iter(order))
    assert [place.epoch for place in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 7])
def test_a_run_goes_on_where_it_stood(stop) -> None:
    whole = stream(Order(13, 4, seed=0), passes=4)
    order = Order(13, 4, seed=0)
    order.load_state_dict({"samples": 4 * stop})
    assert order.state_dict() == {"samples": 4 * stop}
    rest = stream(order, passes=4 - stop // 3)
    assert rest == whole[4 * stop :]


def test_a_run_goes_on_with_another_batch_size() -> None:
    whole = stream(Order(100, 5, seed=0), passes=2)
    order = Order(100, 10, seed=0)
    order.start_at(30)
    assert stream(order) == whole[30:100]  # to the end of the epoch
    assert stream(order) == whole[100:200]


def test_the_clock_may_go_on_while_batches_are_made_ahead() -> None:
    order = Order(12, 4, seed=0)
    batches = iter(order)
    first = next(batches)
    order.start_at(4)
    assert first + next(batches) + next(batches) == list(map(order.place, range(12)))


def test_dice_differ_with_every_number() -> None:
    numbers = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 0), (1, 1, 11), (1, 11, 1)]
    throws = {torch.rand(2, generator=dice(*some)).sum().item() for some in numbers}
    assert len(throws) == len(numbers)
    assert torch.rand(1, generator=dice(1, 2)) == torch.rand(1, generator=dice(1, 2))


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        Order(0, 0, seed=-1, rank=2, world=2)
    assert str(error.value).splitlines() == [
        "count is 0; it must be a whole number of at least 1",
        "batch_size is 0; it must be a whole number of at least 1",
        "seed is -1; it must be a whole number of at least 0",
        "rank is 2; it must be below world (2)",
    ]
    with pytest.raises(ValueError, match=r"samples is 1.5; it must be a whole number"):
        Order(3, 1, seed=0).start_at(1.5)
