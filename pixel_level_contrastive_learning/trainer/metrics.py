"""The metrics of each step: checked, written, logged; and warnings when a run goes wrong."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from .. import run_layout
from ..data.dataset import TwoViewBatch
from ..evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD, effective_rank, spread
from ..files import cannot_write, write_whole
from .auto import RunPlan
from .logging import LOG, ProgressBar, metrics_line
from .training_step import METRIC_NAMES, StepResult

SMOOTHING = 0.98
"""Share of the running means that stays at each step."""
HEALTH_EVERY = 20
"""Steps between measurements of spread and effective rank, which take some milliseconds."""
LOG_EVERY = 10
"""Steps between metrics for TensorBoard and the like, which get the last step, too."""
WRITE_EVERY = 2.0
"""Seconds that lines of metrics are held before they are written."""
PRINT_EVERY = 30.0
"""Seconds between lines of metrics in the log."""


class NotFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite: the run cannot go on."""


class HealthMonitor:
    """Warns in words when a run collapses or diverges, once each time it begins to.

    Of ``images`` a step most should have a matching pair; 0 where the pixel loss is off.
    Collapse: the spread of features falls under `COLLAPSED_SPREAD`, or their effective rank under
    `COLLAPSED_RANK`. Divergence: after the warm-up the running means of both cosines are at most
    0, no better than chance, or the gradient is a thousand times its running mean.
    """

    def __init__(self, warmup_steps: int, images: int = 0) -> None:
        self.warmup_steps, self.images = warmup_steps, images
        self.means: dict[str, float] = {}
        self.seen = 0
        self.active: set[str] = set()

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        """The warnings about a step that were not given for the step before."""
        usual = self.means.get("grad_norm", metrics["grad_norm"])
        decay = SMOOTHING * (1 - SMOOTHING**self.seen) / (1 - SMOOTHING ** (self.seen + 1))
        for name in ("pixel_cosine", "instance_cosine", "grad_norm", "images_without_pairs"):
            before = self.means.get(name, metrics[name])
            self.means[name] = decay * before + (1 - decay) * metrics[name]
        self.seen += 1
        settled = metrics["step"] > self.warmup_steps and self.seen > 1 / (1 - SMOOTHING)
        cosine = max(self.means["pixel_cosine"], self.means["instance_cosine"])
        advice = "Lower lr, lengthen the warm-up, or raise target_momentum"
        warnings: dict[str, str] = {}
        if warning := few_pairs(self.means["images_without_pairs"], self.images):
            warnings["images_without_pairs"] = warning
        if metrics.get("spread", 1) < COLLAPSED_SPREAD:
            warnings["spread"] = (
                f"the features are collapsing: their spread is {metrics['spread']:.3g}, below "
                f"{COLLAPSED_SPREAD} (1 is healthy, 0 means all pixels look the same). {advice}"
            )
        if metrics.get("effective_rank", COLLAPSED_RANK) < COLLAPSED_RANK:
            warnings["effective_rank"] = (
                "the features are collapsing: their effective rank is "
                f"{metrics['effective_rank']:.3g}, below {COLLAPSED_RANK}: they vary in hardly any "
                f"direction. {advice}"
            )
        if settled and cosine <= 0:
            warnings["cosine"] = (
                "the run is diverging: the network predicts its target no better than chance "
                "(mean cosines at most 0). Lower lr or lengthen the warm-up"
            )
        if settled and metrics["grad_norm"] > 1000 * usual > 0:
            warnings["grad_norm"] = (
                f"the run is diverging: the gradient norm is {metrics['grad_norm']:.3g}, over a "
                f"thousand times its usual {usual:.3g}. Lower lr, or set clip_grad to 1"
            )
        new = [warning for name, warning in warnings.items() if name not in self.active]
        self.active = set(warnings)
        return new


def few_pairs(count: float, images: int) -> str | None:
    """The warning about images of which more than half have no matching pair."""
    if count <= images / 2 or not images:
        return None
    return (
        f"{count:.3g} of {images} images have no matching pairs, so the pixel loss ignores them. "
        "Raise crop_area or distance_thres"
    )


class Sent(NamedTuple):
    """A step whose metrics are on their way to the host."""

    result: StepResult
    event: Any
    batch: TwoViewBatch
    measured: dict[str, float]


class MetricsWriter:
    """Checks, writes and logs the metrics of each step.

    Metrics leave a GPU without anyone waiting for them, and are checked when they have arrived, a
    step or two later. What is measured seldom (health, correspondence, probe) stands in the lines
    of all steps until it is measured again.

    ``folder`` is None on processes that do not write; ``waited`` gives the seconds spent waiting
    for data so far.

    Attributes:
        batch: Of the step at hand, or of the one that was found to be broken.
        last: The metrics of the last step that has arrived.
        latest: What was measured seldom, by name.
    """

    def __init__(
        self,
        fabric: Fabric,
        folder: Path | None,
        plan: RunPlan,
        waited: Callable[[], float],
        loggers: list[Logger],
    ) -> None:
        self.fabric, self.folder, self.waited, self.loggers = fabric, folder, waited, loggers
        schedule, compared = plan.schedule, plan.batch_size * plan.compares_pixels
        self.steps, self.monitor = schedule.steps, HealthMonitor(schedule.warmup_steps, compared)
        self.bar = ProgressBar()
        self.sent: deque[Sent] = deque()
        self.lines: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.written_at = self.printed_at = self.step_began = time.perf_counter()
        self.printed_step: float = 0
        self.first: tuple[float, int] | None = None  # when the first step was noted, and which
        self.waited_before = 0.0
        self.batch: TwoViewBatch | None = None

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """A context that shows the bar, and writes what there is however it is left."""
        self.bar.add_task("pretrain", total=self.steps, completed=step, metrics="")
        status = "failed"
        try:
            with self.bar if self.folder is not None else nullcontext():
                yield
            status = "success"
        except NotFiniteError:
            self.save_bad_batch()
            raise
        finally:
            self.write()
            for logger in self.loggers:
                logger.finalize(status)
        if self.folder is not None and self.last and self.last["step"] != self.printed_step:
            LOG.info("%s", metrics_line(self.last, self.steps))

    def start_clock(self) -> None:
        """Time a step from now on: what was done between steps is not part of one."""
        self.step_began, self.waited_before = time.perf_counter(), self.waited()

    def begin_step(self, step: int, batch: TwoViewBatch) -> bool:
        """Note the batch; whether its features are to be kept, to measure health on."""
        due = self.batch is None or step % HEALTH_EVERY == 0
        self.batch = batch
        return due and self.folder is not None

    def end_step(self, result: StepResult) -> None:
        """Send a step's metrics on their way, and note those that have arrived.

        Raises:
            NotFiniteError: Some of these are NaN or infinite.
        """
        assert self.batch is not None
        now, waited = time.perf_counter(), self.waited()
        seconds = max(now - self.step_began, 1e-9)
        measured = {
            "images_per_second": result.images / seconds,
            "waiting": min(1.0, (waited - self.waited_before) / seconds),
        }
        if result.features is not None:
            features = result.features.cpu()
            self.latest |= {
                "spread": float(spread(features)),
                "effective_rank": float(effective_rank(features)),
            }
        event = None
        if result.metrics.device.type == "cuda":
            host_metrics = torch.empty_like(result.metrics, device="cpu", pin_memory=True)
            host_metrics.copy_(result.metrics, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
            event.record()
            result = result._replace(metrics=host_metrics)
        self.sent.append(Sent(result, event, self.batch, measured | self.latest))
        self.note_arrived()
        if now - self.written_at > WRITE_EVERY:
            self.write()
        if self.folder is not None and self.last:
            self.bar.show(self.last)

    def note_arrived(self, *, wait: bool = False) -> None:
        """Check and note the steps whose metrics have arrived; all steps, if told to wait.

        Raises:
            NotFiniteError: Some are NaN or infinite.
        """
        while self.sent and (wait or self.has_arrived()):
            sent = self.sent.popleft()
            if sent.event is not None:
                sent.event.synchronize()
            self.note(sent)

    def has_arrived(self) -> bool:
        """Whether the oldest metrics sent can be checked.

        Several processes check the same step, all but the newest: were one to find a NaN a step
        before the others, these would wait for it in the next step for ever.
        """
        event = self.sent[0].event
        if event is None:
            return True
        return len(self.sent) > 1 if self.fabric.world_size > 1 else bool(event.query())

    def note(self, sent: Sent) -> None:
        """Note the metrics of a step that have arrived."""
        result = sent.result
        values = dict(zip(METRIC_NAMES, result.metrics.tolist(), strict=True))
        schedules = {"lr": result.lr, "target_momentum": result.target_momentum}
        self.last = {"step": result.step, **values, **sent.measured, **schedules}
        if not all(map(isfinite, values.values())):
            self.batch = sent.batch
            terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise NotFiniteError(
                f"step {result.step} gave a NaN or infinite loss or gradient ({terms}); the last "
                "good checkpoint, if any, is kept: continue from it with --resume (without one, "
                "start again with --overwrite) and a lower --lr, a longer --warmup-epochs, "
                "--clip-grad 1 or --precision float32"
            )
        if self.folder is None:
            return
        self.lines.append(self.last)
        for warning in self.monitor(self.last):
            LOG.warning("step %d: %s", result.step, warning)
        if result.step % LOG_EVERY == 0 and result.step < self.steps:  # `amend` logs the last
            for logger in self.loggers:
                logger.log_metrics(self.last, step=result.step)
        now = time.perf_counter()
        began, step = self.first = self.first or (now, result.step)
        if now - self.printed_at > PRINT_EVERY or result.step == 1:
            self.printed_at, self.printed_step = now, result.step
            done = result.step - step  # without the first step, which takes longer
            seconds_left = (now - began) / done * (self.steps - result.step) if done else None
            LOG.info("%s", metrics_line(self.last, self.steps, seconds_left))

    def save_bad_batch(self) -> None:
        """Keep the batch that broke the run, to be looked at."""
        batch = self.batch
        if self.folder is None or batch is None:
            return
        contents = {
            name: getattr(batch, name) for name in ("one", "two", "map_one", "map_two", "index")
        }
        for view in ("factors_one", "factors_two"):
            contents |= {
                f"{view}.{name}": factor for name, factor in getattr(batch, view)._asdict().items()
            }
        path = self.folder / run_layout.BAD_BATCH
        write_whole(path, lambda file: torch.save(contents, file))
        LOG.error("the batch of this step is saved in %s", path)

    def write(self) -> None:
        """Write the lines held to `metrics.jsonl`."""
        self.written_at = time.perf_counter()
        if self.folder is not None and self.lines:
            append_lines(self.folder / run_layout.METRICS, self.lines)
            self.lines = []

    def amend(self) -> None:
        """Write the last step's line anew, with what was measured after it, and log that step."""
        if self.folder is None or not self.last:
            return
        before, self.last = self.last, self.last | self.latest
        if before != self.last:
            path = self.folder / run_layout.METRICS
            try:
                os.truncate(path, path.stat().st_size - len(as_lines([before]).encode()))
            except OSError as error:
                raise cannot_write(path, error) from error
            append_lines(path, [self.last])
        for logger in self.loggers:
            logger.log_metrics(self.last, step=int(self.last["step"]))

    def settle(self) -> None:
        """Check and write everything up to the present step, so that nothing broken is saved."""
        self.note_arrived(wait=True)
        self.write()


def as_lines(lines: list[dict[str, float]]) -> str:
    """JSON lines as text."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def append_lines(path: Path, lines: list[dict[str, float]]) -> None:
    """Append JSON lines to a file.

    Raises:
        CannotWriteError: The disk is full, or similar.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(as_lines(lines))
    except OSError as error:
        raise cannot_write(path, error) from error


def check_loggers(names: tuple[str, ...]) -> None:
    """Refuse loggers that are not installed."""
    for name in ("wandb", "mlflow"):
        if name in names and find_spec(name) is None:
            raise ValueError(
                f"loggers names {name!r}, which is not installed; pip install {name}, or use csv: "
                "metrics.jsonl is always written"
            )


def build_loggers(names: tuple[str, ...], folder: Path, step: int) -> list[Logger]:
    """Lightning's loggers by name, writing into the run's folder from a step on."""

    def rare(kind: str, *args: Any, **kwargs: Any) -> Logger:
        logger: Logger = getattr(import_module("lightning.pytorch.loggers"), kind)(*args, **kwargs)
        return logger

    resumed = f"from-step-{step:08d}" if step else ""  # its CSV would replace the one before
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(  # steps that were taken back are hidden
            folder, name="tensorboard", version="", purge_step=step + 1 if step else None
        ),
        "csv": lambda: CSVLogger(folder, name="csv", version=resumed, flush_logs_every_n_steps=1),
        "wandb": lambda: rare("WandbLogger", save_dir=folder, name=folder.name),
        "mlflow": lambda: rare("MLFlowLogger", folder.name, tracking_uri=f"file:{folder}/mlflow"),
    }
    loggers = [makers[name]() for name in names]
    for logger in loggers:
        _ = getattr(logger, "experiment", None)  # opens its files now, not at the first metrics
    return loggers
