"""What each step gave: judged, written down, shown."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ..evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD, effective_rank, spread
from ..files import write_whole
from .logging import Bar, as_line
from .run_dir import METRICS_FILE, MetricsFile, RunDirectory
from .training_step import FIGURES, NotFiniteError, Step, not_finite

if TYPE_CHECKING:
    from ..data.dataset import Pairs

SMOOTHING = 0.98
"""Share of the running means that stays at each step."""


class Watch:
    """Says in words that a run collapses or diverges, once each time it begins to.

    Collapse: the spread of features falls under `COLLAPSED_SPREAD`, or their effective rank under
    `COLLAPSED_RANK`. Divergence: after the warm-up the running means of both cosines are at most
    0, no better than chance, or the gradient is a thousand times its running mean.

    Args:
        settled: Step from which on divergence is judged.
    """

    def __init__(self, settled: int) -> None:
        self.settled = settled
        self.means: dict[str, float] = {}
        self.seen = 0
        self.said: set[str] = set()

    def __call__(self, line: dict[str, float]) -> list[str]:
        """The sentences about a step, none of which was said before without a recovery between."""
        found: dict[str, str] = {}
        if line.get("spread", 1) < COLLAPSED_SPREAD:
            found["spread"] = (
                f"the features collapse: their spread is {line['spread']:.3g}, under "
                f"{COLLAPSED_SPREAD} (1 is healthy, 0 means every pixel looks alike). Lower lr, "
                "lengthen the warm-up, or raise target_momentum"
            )
        if line.get("effective_rank", COLLAPSED_RANK) < COLLAPSED_RANK:
            found["effective_rank"] = (
                f"the features collapse: their effective rank is {line['effective_rank']:.3g}, "
                f"under {COLLAPSED_RANK}: they vary in hardly any direction. Lower lr, lengthen "
                "the warm-up, or raise target_momentum"
            )
        usual = self.means.get("grad_norm", line["grad_norm"])
        for name in ("pixel_cosine", "instance_cosine", "grad_norm"):
            kept = SMOOTHING * (1 - SMOOTHING**self.seen) / (1 - SMOOTHING ** (self.seen + 1))
            before = self.means.get(name, line[name])
            self.means[name] = kept * before + (1 - kept) * line[name]
        self.seen += 1
        if line["step"] > self.settled and self.seen > 1 / (1 - SMOOTHING):
            if max(self.means["pixel_cosine"], self.means["instance_cosine"]) <= 0:
                found["cosine"] = (
                    "the run diverges: the network predicts its target no better than chance "
                    "(mean cosines at most 0). Lower lr or lengthen the warm-up"
                )
            if line["grad_norm"] > 1000 * usual > 0:
                found["grad_norm"] = (
                    f"the run diverges: the gradient's norm is {line['grad_norm']:.3g}, a thousand "
                    f"times its usual {usual:.3g}. Lower lr, or set clip_grad to 1"
                )
        new = [sentence for name, sentence in found.items() if name not in self.said]
        self.said = set(found)
        return new


LOG = logging.getLogger("pixel_level_contrastive_learning")
HEALTH_EVERY = 20
"""Steps between measurements of spread and rank, which cost some milliseconds."""
LOGGERS_EVERY = 10
"""Steps between figures for TensorBoard and the like."""
WRITE_EVERY = 2.0
"""Seconds that lines of metrics are held before they are written."""
LINE_EVERY = 30.0
"""Seconds between lines of figures in the log."""
BAD_BATCH = "bad_batch.pt"


class Sent(NamedTuple):
    """A step whose figures are on their way to the host."""

    step: Step
    figures: Tensor
    event: Any
    batch: Pairs
    measured: dict[str, float]


class Figures(Callback):
    """Writes what each step gave, and says in words when something is wrong.

    Figures leave a GPU without anyone waiting for them, and are judged when they have arrived, a
    step or two later. Spread and effective rank are measured every `HEALTH_EVERY` steps, on up to
    256 features of the layer that the pixel loss reads; the lines between repeat the last values.

    Args:
        directory: The folder of the run; None on processes that do not write.
        waited: Seconds spent waiting for data so far.
        steps: Steps of the run.
        settled: Step from which on collapse and divergence are judged: the end of the warm-up.
    """

    def __init__(
        self,
        directory: RunDirectory | None,
        waited: Callable[[], float],
        steps: int,
        settled: int,
    ) -> None:
        self.directory = directory
        self.file = None if directory is None else MetricsFile(directory.path / METRICS_FILE)
        self.waited = waited
        self.watch = Watch(settled)
        self.bar = Bar(steps) if directory is not None else None
        self.sent: deque[Sent] = deque()
        self.lines: list[dict[str, object]] = []
        self.last: dict[str, float] = {}
        self.health: dict[str, float] = {}
        self.written = self.shown = self.ended = time.perf_counter()
        self.waited_before = 0.0
        self.batch: Pairs | None = None
        self.kept = False  # whether the batch that broke the run was kept

    def on_train_start(self, _: Trainer, task: Any) -> None:
        self.ended, self.waited_before = time.perf_counter(), self.waited()
        if self.bar is not None:
            self.bar.start(task.done)

    def on_train_batch_start(self, _: Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        due = batch_idx == 0 or task.done % HEALTH_EVERY == 0
        task.wants_features = due and self.directory is not None

    def on_train_batch_end(self, trainer: Trainer, task: Any, _: Any, batch: Any, *__: Any) -> None:
        step: Step = task.latest
        now, waited = time.perf_counter(), self.waited()
        seconds = max(now - self.ended, 1e-9)
        measured = {
            "images_per_second": step.images / seconds,
            "waiting": min(1.0, (waited - self.waited_before) / seconds),
        }
        self.ended, self.waited_before = now, waited
        if task.features is not None:
            features = task.features.cpu()
            self.health |= {
                "spread": float(spread(features)),
                "effective_rank": float(effective_rank(features)),
            }
        self.send(step, batch, measured | self.health)
        self.judge_arrived(trainer)
        if now - self.written > WRITE_EVERY:
            self.write()
        if self.bar is not None and self.last:
            self.bar.show(self.last)

    def send(self, step: Step, batch: Pairs, measured: dict[str, float]) -> None:
        """Start the figures of a step on their way to the host."""
        figures, event = step.figures, None
        if figures.device.type == "cuda":
            arriving = torch.empty_like(figures, device="cpu", pin_memory=True)
            arriving.copy_(figures, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
            event.record()
            figures = arriving
        self.sent.append(Sent(step, figures, event, batch, measured))

    def judge_arrived(self, trainer: Trainer, *, wait: bool = False) -> None:
        """Judge and note the steps whose figures have arrived; of all steps, if told to wait.

        Raises:
            NotFiniteError: One of them is NaN or infinite.
        """
        while self.sent and (wait or self.has_arrived(trainer)):
            sent = self.sent.popleft()
            if sent.event is not None:
                sent.event.synchronize()
            values = sent.figures.tolist()
            self.note(trainer, sent, dict(zip(FIGURES, values, strict=True)))

    def has_arrived(self, trainer: Trainer) -> bool:
        """Whether the oldest figures sent can be judged.

        Several processes judge the same step, all but the newest: were one to find a NaN a step
        before the others, these would wait for it in the next step for ever.
        """
        event = self.sent[0].event
        if event is None:
            return True
        return len(self.sent) > 1 if trainer.world_size > 1 else bool(event.query())

    def note(self, trainer: Trainer, sent: Sent, figures: dict[str, float]) -> None:
        """Note the figures of a step that have arrived."""
        step = sent.step
        line = {
            "step": step.number,
            **figures,
            **sent.measured,
            "lr": step.lr,
            "target_momentum": step.target_momentum,
        }
        self.last = line
        if not all(value - value == 0 for value in figures.values()):
            self.save_bad_batch(sent.batch)
            raise NotFiniteError(not_finite(step.number, list(figures.values())))
        if self.directory is None:
            return
        self.lines.append(dict(line))
        for sentence in self.watch(line):
            LOG.warning("step %d: %s", step.number, sentence)
        if step.number % LOGGERS_EVERY == 0:
            for logger in trainer.loggers:
                logger.log_metrics(line, step=step.number)
        now = time.perf_counter()
        if now - self.shown > LINE_EVERY or step.number == 1:
            self.shown = now
            LOG.info("%s", as_line(line))

    def save_bad_batch(self, batch: Pairs) -> None:
        """Keep the batch that broke the run, to be looked at."""
        if self.directory is None:
            return
        self.kept = True
        held = {
            name: getattr(batch, name).cpu()
            for name in ("one", "two", "map_one", "map_two", "index")
        }
        held |= {
            f"{view}.{name}": value
            for view in ("factors_one", "factors_two")
            for name, value in getattr(batch, view)._asdict().items()
        }
        path = self.directory.path / BAD_BATCH
        write_whole(path, lambda file: torch.save(held, file))
        LOG.error("the batch that did it is kept in %s", path)

    def write(self) -> None:
        """Write the lines held."""
        self.written = time.perf_counter()
        if self.file is not None and self.lines:
            self.file.append(self.lines)
            self.lines = []

    def settle(self, trainer: Trainer) -> None:
        """Judge and write everything up to the present step."""
        self.judge_arrived(trainer, wait=True)
        self.write()

    def on_train_end(self, trainer: Trainer, _: Any) -> None:
        self.settle(trainer)
        if self.bar is not None:
            self.bar.stop()
        if self.directory is not None and self.last:
            LOG.info("%s", as_line(self.last))

    def on_exception(self, _: Trainer, __: Any, error: BaseException) -> None:
        if self.bar is not None:
            self.bar.stop()
        if isinstance(error, NotFiniteError) and not self.kept and self.batch is not None:
            self.save_bad_batch(self.batch)  # found before its step was taken
        self.write()
