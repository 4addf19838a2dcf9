"""What happens beside the steps: checkpoints, and stopping when asked."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ..keys import LAST
from .directory import RunDirectory
from .figures import Figures
from .interruption import Interruption
from .task import PretrainTask

ASK_EVERY = 10
"""Steps between the processes' asking each other whether one was told to stop."""


class Checkpoints(Callback):
    """Saves every so many steps, at the end, and when the run was asked to stop.

    Args:
        directory: The folder of the run.
        every: Steps between checkpoints.
        keep: How many to keep.
        figures: Judged before each checkpoint, so that no broken network is ever saved.
    """

    def __init__(self, directory: RunDirectory, every: int, keep: int, figures: Figures) -> None:
        self.directory = directory
        self.every = every
        self.keep = keep
        self.figures = figures
        self.saved = -1

    def on_train_start(self, _: Trainer, task: Any) -> None:
        self.saved = task.done

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if task.done % self.every == 0:
            self.save(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        self.save(trainer, task)

    def save(self, trainer: Trainer, task: PretrainTask) -> None:
        """Save now, once a step; every process takes part, one writes."""
        if self.saved == task.done:
            return
        self.figures.settle(trainer)
        path = self.directory.checkpoint_path(task.done)
        trainer.save_checkpoint(path, weights_only=False)
        self.saved = task.done
        if trainer.is_global_zero:
            self.directory.name_also(path, LAST)
            self.directory.prune(self.keep)


class StopWhenAsked(Callback):
    """Ends the run after the step in which one of its processes was told to stop.

    Args:
        interruption: What notes the signal.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption

    def on_train_start(self, trainer: Trainer, _: Any) -> None:
        self.interruption.watch()
        # Lightning asks every process at every step, and waits for the device to hear the answer.
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if trainer.world_size > 1:
            if task.done % ASK_EVERY:
                return
            told = torch.tensor(self.interruption.signal or 0, device=task.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.interruption.signal = int(told) or None
        if self.interruption.signal is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, _: Any) -> None:
        if self.interruption.signal is not None:  # the workers are gone, and with them the batches
            trainer.should_stop = True
