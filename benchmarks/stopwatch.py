"""Where the time of a learner's step goes, watched from outside."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def wait(device: str) -> None:
    """Return when the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up the time of each part of a step; time inside an inner part counts for it alone.

    Args:
        device: Waited for wherever a part begins or ends, so that its work counts where it was
            asked for. The sum is therefore longer than a step that nobody watches.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = 0.0

    def mark(self) -> None:
        """Charge the time since the last mark to the innermost open part."""
        wait(self.device)
        now = time.perf_counter()
        if self.open:
            self.spent[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step."""
        self.enter(name)
        yield
        self.leave()

    def enter(self, name: str) -> None:
        """A part begins."""
        self.mark()
        self.open.append(name)

    def leave(self) -> None:
        """The innermost part ends."""
        self.mark()
        self.open.pop()

    def follow(self, learner: nn.Module) -> None:
        """Watch the parts of a learner from outside, by hooks on its modules."""
        parts = {
            "": "losses",  # what is left of the learner's forward when its modules are taken away
            "views": "views",
            "views.augment": "colour",
            "online_encoder": "online",
            "online_predictor": "online",
            "propagate_pixels": "propagation",
            "target_encoder": "target",
        }
        for path, name in parts.items():
            module = learner.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
            module.register_forward_hook(lambda *_: self.leave())
