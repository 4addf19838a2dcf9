"""Tables walked in blocks: every entry once, and nothing but the memory shows it."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from pixel_level_contrastive_learning import blocks as room
from pixel_level_contrastive_learning.blocks import Block, blocks, by_blocks
from pixel_level_contrastive_learning.geometry import Positives

TINY = [1, 2, 7, 13, 22, 40, 10**9]
"""Entries that may be held, from less than a row to more than a table."""
sizes = st.integers(0, 9)


def walk(shape: tuple[int, int, int], entries: int) -> list[Block]:
    """The blocks of a table where ``entries`` may be held at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "ENTRIES", entries)
        return list(blocks(shape))


@settings(max_examples=200)
@given(shape=st.tuples(sizes, sizes, sizes), entries=st.integers(1, 30) | st.integers(1, 700))
@example(shape=(2, 5, 4), entries=10)
@example(shape=(0, 5, 5), entries=10)
@example(shape=(3, 0, 5), entries=10)
@example(shape=(3, 5, 0), entries=10)
def test_blocks_cover_every_row_of_every_image_once_and_in_order(shape, entries) -> None:
    images, rows, columns = shape
    seen = []
    for block in walk(shape, entries):
        of_images = range(images)[block.images]
        of_rows = range(rows)[block.rows]
        # Slices name their ends: what is left over at the end is no longer than it is.
        assert (block.images.stop, block.rows.stop) == (of_images.stop, of_rows.stop)
        count = len(of_images) * len(of_rows) * columns
        assert count <= entries or len(of_images) == len(of_rows) == 1
        seen.append([(image, row) for image in of_images for row in of_rows])
    flat = [place for places in seen for place in places]
    assert sorted(flat) == [(image, row) for image in range(images) for row in range(rows)]
    firsts = [places[0] for places in seen]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (100, [(0, 4, 0, 3)]),  # all of it at once
        (30, [(0, 2, 0, 3), (2, 4, 0, 3)]),  # two images of 15 entries each
        (29, [(i, i + 1, 0, 3) for i in range(4)]),
        (10, [(i, i + 1, *rows) for i in range(4) for rows in ((0, 2), (2, 3))]),
        (1, [(i, i + 1, j, j + 1) for i in range(4) for j in range(3)]),
    ],
)
def test_blocks_are_as_large_as_may_be(entries, expected) -> None:
    walked = walk((4, 3, 5), entries)
    assert [(i.start, i.stop, r.start, r.stop) for i, r in walked] == expected


def test_large_tables_are_never_held_whole() -> None:
    largest = room.ENTRIES
    assert largest <= 2**24  # 64 MiB in float32
    for shape in ((2, 64 * 64, 64 * 64), (1024, 49, 49), (1, 3, 2**22)):
        counts = [(i.stop - i.start) * (r.stop - r.start) * shape[2] for i, r in blocks(shape)]
        assert max(counts) <= max(largest, shape[2])
        assert sum(counts) == shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize("entries", TINY)
def test_by_blocks_keeps_the_order(entries, monkeypatch) -> None:
    monkeypatch.setattr(room, "ENTRIES", entries)
    rows, columns = torch.arange(4 * 5).view(4, 5), torch.arange(4 * 6).view(4, 6)

    def table(block: Block, one: Tensor, two: Tensor) -> Tensor:
        return 100 * one[:, block.rows].unsqueeze(-1) + two.unsqueeze(-2)

    whole = 100 * rows.unsqueeze(-1) + columns.unsqueeze(-2)
    assert torch.equal(by_blocks(table, (4, 5, 6), rows, columns), whole)
    columns_gone = by_blocks(lambda *given: table(*given).sum(dim=-1), (4, 5, 6), rows, columns)
    assert torch.equal(columns_gone, whole.sum(dim=-1))
    by_block = by_blocks(lambda block, *_: whole[block], (4, 5, 6), rows)
    assert torch.equal(by_block, whole)


def attend(block: Block, one: Tensor, two: Tensor, values: Tensor) -> Tensor:
    """A table whose every input matters in a way of its own."""
    return (one[:, block.rows] @ two.mT).softmax(dim=-1) @ values.cos()


@pytest.mark.parametrize("entries", TINY)
@pytest.mark.parametrize("learning", [(0, 1, 2), (0,), (1,), (2,), (0, 2)])
def test_by_blocks_gives_the_value_and_gradient_of_the_whole(
    entries, learning, monkeypatch
) -> None:
    monkeypatch.setattr(room, "ENTRIES", entries)
    given = [torch.randn(3, n, 4, dtype=torch.float64) for n in (5, 7, 7)]
    wanted = [given[i].requires_grad_() for i in learning]
    pull = torch.randn(3, 5, 4, dtype=torch.float64)
    found = by_blocks(attend, (3, 5, 7), *given)
    whole = attend(Block(slice(3), slice(5)), *given)
    assert torch.allclose(found, whole, rtol=0, atol=1e-12)
    both = [torch.autograd.grad(result, wanted, pull) for result in (found, whole)]
    for part, expected in zip(*both, strict=True):
        assert torch.allclose(part, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("entries", [10, 10**9])
def test_what_is_given_twice_gets_both_gradients(entries, monkeypatch) -> None:
    monkeypatch.setattr(room, "ENTRIES", entries)
    pixels = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = by_blocks(attend, (2, 5, 5), pixels, pixels, pixels)
    whole = attend(Block(slice(2), slice(5)), pixels, pixels, pixels)
    both = [torch.autograd.grad(result.square().sum(), pixels)[0] for result in (found, whole)]
    assert torch.allclose(*both, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_compiled_code_walks_the_same_blocks(monkeypatch) -> None:
    monkeypatch.setattr(room, "ENTRIES", 10)
    torch.compiler.reset()

    def compute(pixels: Tensor) -> Tensor:
        return by_blocks(attend, (2, 5, 5), pixels, pixels, pixels).square()

    pixels = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    graphs = counters["stats"]["unique_graphs"]
    results = compute(pixels), torch.compile(compute, backend="eager")(pixels)
    assert counters["stats"]["unique_graphs"] > graphs
    assert torch.equal(*results)
    assert torch.equal(*[torch.autograd.grad(found.sum(), pixels)[0] for found in results])


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_a_table_without_entries_is_empty(shape) -> None:
    b, rows, columns = shape
    given = torch.ones(b, rows, 3, requires_grad=True), torch.ones(b, columns, 3)
    found = by_blocks(
        lambda _, one, two: (one @ two.mT).sum(dim=-1),
        shape,
        *given,
    )
    assert torch.equal(found, torch.zeros(b, rows))
    found.sum().backward()


@pytest.mark.parametrize("entries", [10, 10**9])
def test_blocks_are_walked_without_autocast_forth_and_back(entries, monkeypatch) -> None:
    monkeypatch.setattr(room, "ENTRIES", entries)
    seen = []

    def table(block: Block, one: Tensor, two: Tensor) -> Tensor:
        product = one[:, block.rows] @ two.mT
        seen.append(product.dtype)
        return product.sum(dim=-1)

    one, two = torch.ones(2, 4, 3, requires_grad=True), torch.ones(2, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_blocks(table, (2, 4, 5), one, two).sum().backward()
    assert len(seen) == (8 if entries == 10 else 1)
    assert set(seen) == {torch.float32}


def test_by_blocks_makes_a_block_again_in_backward_instead_of_keeping_it(monkeypatch) -> None:
    rows = torch.randn(2, 4, 3, requires_grad=True)
    calls = []

    def table(block: Block, given: Tensor) -> Tensor:
        calls.append(block)
        return given[:, block.rows].exp()

    def walked(entries: int) -> tuple[list[Block], list[Block]]:
        """The blocks that were made on the way forth and on the way back."""
        monkeypatch.setattr(room, "ENTRIES", entries)
        calls.clear()
        result = by_blocks(table, (2, 4, 5), rows)
        forth = list(calls)
        result.sum().backward()
        return forth, calls[len(forth) :]

    forth, back = walked(10)
    assert len(forth) == 4
    assert forth == back
    forth, back = walked(40)
    assert len(forth) == 1
    assert not back
    with torch.no_grad():
        by_blocks(table, (2, 4, 5), rows)
    assert len(calls) == 2


def positives() -> Positives:
    """Matches of three images: the same view, some overlap, none at all."""
    one = torch.tensor([[12.0, 0, 0], [0, 8, 0]], dtype=torch.float64).repeat(3, 1, 1)
    two = one.clone()
    two[1, 0, 2], two[2, 0, 2] = 5, 500
    return Positives(one, two, (3, 4), (2, 5), 0.7)


@pytest.mark.parametrize("entries", TINY[:-1])
def test_matches_are_counted_alike_in_blocks_of_any_size(entries, monkeypatch) -> None:
    monkeypatch.setattr(room, "ENTRIES", entries)
    by_hand = positives().rows(0, 12).sum(dim=(1, 2)).tolist()
    assert by_hand[0] > by_hand[1] > by_hand[2] == 0
    assert positives().count().tolist() == by_hand
    assert positives().mT.count().tolist() == by_hand
