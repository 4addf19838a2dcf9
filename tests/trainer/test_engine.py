"""How the trainer is handed its batches, when workers die."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pixel_level_contrastive_learning.trainer.engine import Stream


class Dying:
    """A loader of two batches, whose workers then die."""

    waited = 0.0

    def __init__(self, error: Exception) -> None:
        self.error = error

    def start_at(self, samples: int) -> None:
        assert samples == 0

    def __iter__(self) -> Iterator[str]:
        yield from ("first", "second")
        raise self.error


# What a reader of the workers' queue meets: their end noted, a pipe closed in the middle of a
# tensor, a socket that nobody serves any more.
DEATHS = [
    RuntimeError("DataLoader worker (pid 1) exited unexpectedly"),
    EOFError(),
    ConnectionResetError(104, "Connection reset by peer"),
    FileNotFoundError(2, "No such file or directory"),
]


def stream(error: Exception, *, told: bool) -> Stream:
    return Stream(lambda _: Dying(error), 0, 10, lambda: told)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_workers_that_die_after_the_run_was_told_to_stop_end_the_stream(error) -> None:
    assert list(stream(error, told=True)) == ["first", "second"]


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_workers_that_die_unasked_are_an_error(error) -> None:
    batches = iter(stream(error, told=False))
    assert [next(batches), next(batches)] == ["first", "second"]
    with pytest.raises(type(error)):
        next(batches)
