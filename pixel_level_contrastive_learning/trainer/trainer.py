"""`pretrain`: from images to a backbone. `fit` is the training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from inspect import Parameter, Signature
from itertools import chain, pairwise, repeat
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_layout
from ..backbones.checkpoint import save_backbone
from ..backbones.custom import handing_over
from ..backbones.state_dict import load_state
from ..checks import duration
from ..data.dataset import TwoViewBatch
from ..data.loader import TwoViewLoader
from . import build
from .config import PretrainConfig
from .config_io import settings_of, to_config
from .logging import LOG, logging_to, quiet_lightning
from .memory import TRIED_ON, choose_accumulate, estimate
from .metrics import MetricsWriter, build_loggers
from .resume import find_resume_point, prepare, write_config
from .run_dir import RunDir
from .setup import Setup, check_places, dry_run, set_up
from .signals import Interrupted, StopSignal
from .system import is_writer
from .training_step import BACKBONE, TrainingStep
from .validation import FeaturePictures, Probe, draw_batch, probe_scores

TIMED_STEPS, TIMED_FOR = 8, 20.0
"""Steps that a dry run takes, and the seconds after which it takes no more."""
WORKERS_END = 1.0
"""Seconds in which the loader's workers end of themselves, unless they hang."""


@dataclass(frozen=True)
class PretrainResult:
    """The result of a run.

    Attributes:
        backbone: The pretrained network on the CPU, as its library builds it. None after a dry run,
            and on processes that do not write.
        metrics: The metrics of the last step, by their names in `metrics.jsonl`; for a dry run, its
            findings.
        run_dir: The folder of the run.
    """

    backbone: nn.Module | None
    metrics: dict[str, Any]
    run_dir: Path

    def __repr__(self) -> str:
        """In a line: of the backbone its class, of the metrics the step and the loss."""
        metrics = {name: self.metrics[name] for name in ("step", "loss") if name in self.metrics}
        kind = type(self.backbone).__name__
        return f"PretrainResult(backbone={kind}, metrics={metrics}, run_dir={str(self.run_dir)!r})"


def fit(
    setup: Setup, step: TrainingStep, run_dir: RunDir, stop: StopSignal, colours: Tensor | None
) -> dict[str, float]:
    """Train until the last step, or until asked to stop; the metrics of the last step.

    Raises:
        Interrupted: The run was asked to stop, and has saved.
    """
    plan, fabric, steps = setup.plan, step.fabric, setup.plan.schedule.steps
    folder = run_dir.path if fabric.is_global_zero else None
    loader = build.build_train_loader(plan, setup.data, fabric.global_rank, folder)
    loader.start_at(step.samples)
    loggers = build_loggers(plan.loggers, folder, step.step) if folder else []
    metrics = MetricsWriter(fabric, folder, plan, lambda: loader.waited, loggers)
    if folder and step.step == steps:
        metrics.last = run_dir.last_metrics()
    pictures, probe = build_validation(setup, run_dir, colours, metrics)
    save = partial(save_checkpoint, step, run_dir, setup, metrics, pictures)

    with ending(loader), metrics.recording(step.step):
        with stop.resting():
            if pictures:
                pictures.draw(step)
            if plan.probe_every and (step.step % plan.probe_every == 0 or step.step == steps):
                if probe and step.step not in probe.scores():  # else the run was killed in between
                    probe.run(step)
                fabric.barrier()
        metrics.start_clock()
        for batch in take(loader, steps - step.step, stop):
            drawn = metrics.batch is None or due(plan.picture_every, step.step)
            keep_features = metrics.begin_step(step.step, batch)
            metrics.end_step(step(batch, keep_features=keep_features))
            if folder and plan.compares_pixels and drawn:
                draw_batch(batch, step.learner, step.normalise, plan, folder)
            if due(plan.checkpoint_every, step.step):
                save()
            if stop.received_anywhere(fabric, step.step):
                break
            if pictures and due(plan.picture_every, step.step):
                pictures.draw(step)
            if plan.probe_every and (due(plan.probe_every, step.step) or step.step == steps):
                save()
                if probe:
                    probe.run(step)
                fabric.barrier()
            metrics.start_clock()
        metrics.settle()
        save()
        if stop.number is not None and step.step:
            LOG.warning(
                "stopped at step %d of %d and saved; continue with --resume", step.step, steps
            )
        stop.exit_if_received()
        if pictures:
            pictures.draw(step)
        if probe:
            probe.log_best()
        metrics.amend()
    return metrics.last


def due(interval: int, step: int) -> bool:
    """Whether something happens after a step; 0 is never."""
    return interval > 0 and step % interval == 0


@contextmanager
def ending(loader: TwoViewLoader) -> Iterator[None]:
    """A context after which the loader's workers end: the end of the process would wait for them.

    Torch waits for each; those that hang in a file are ended.
    """
    try:
        yield
    finally:
        batches: Any = loader.loader._iterator
        if hasattr(batches, "_shutdown_workers"):
            timer = Timer(WORKERS_END, lambda: [worker.terminate() for worker in batches._workers])
            timer.start()
            batches._shutdown_workers()
            timer.cancel()


def take(loader: TwoViewLoader, steps: int, stop: StopSignal) -> Iterator[TwoViewBatch]:
    """``steps`` batches of a loader, epoch after epoch; a signal while one is awaited ends them."""
    batches = chain.from_iterable(repeat(loader))
    for _ in range(steps):
        try:
            with stop.resting():
                batch = next(batches)
        except Interrupted:
            return
        except (RuntimeError, OSError, EOFError) as error:  # by where a worker was that died
            if stop.number is not None:
                return
            if isinstance(error, RuntimeError) or getattr(error, "filename", None):
                raise
            raise RuntimeError(
                f"a loader worker was killed ({error!r}), perhaps because memory ran out; "
                "resume the run (--resume), with fewer --workers if it happens again"
            ) from error
        yield batch


def save_checkpoint(
    step: TrainingStep,
    run_dir: RunDir,
    setup: Setup,
    metrics: MetricsWriter,
    pictures: FeaturePictures | None,
) -> None:
    """Save a step once, if its metrics are finite; every process takes part, one writes."""
    if step.saved_at == step.step:
        return
    metrics.settle()
    checkpoint = step.state_dict() | {
        "statistics": asdict(setup.data.statistics),
        "colours": pictures.colours if pictures else None,
    }
    if step.fabric.is_global_zero:
        run_dir.save_checkpoint(checkpoint, step.step, setup.plan.keep_checkpoints)
        (run_dir.path / run_layout.WEIGHTS).unlink(missing_ok=True)  # of an earlier end
    step.saved_at = step.step


def build_validation(
    setup: Setup, run_dir: RunDir, colours: Tensor | None, metrics: MetricsWriter
) -> tuple[FeaturePictures | None, Probe | None]:
    """What looks at the network, on the process that writes and holds all of it."""
    plan, latest = setup.plan, metrics.latest
    if not is_writer() or plan.sharded:
        return None, None
    card = build.build_card(plan, setup.data.statistics)
    pictures = probe = None
    if plan.picture_every:
        pictures = FeaturePictures(run_dir.path, card, setup.data, colours, latest)
    if setup.probe_splits:
        probe = Probe(run_dir, card, setup.probe_splits, plan.probe_protocol, latest)
    return pictures, probe


def pretrain(data: Any = None, out: str | Path | None = None, **settings: Any) -> PretrainResult:
    """Pretrain a backbone on unlabelled images.

    Args:
        data: A folder of images, or several; a text file of paths; WebDataset shards; or a Python
            sequence of tensors, arrays or PIL images, or a torch data set.
        out: Folder of the run.
        **settings: The settings of `PretrainConfig` by name, as listed by
            `pixelcl pretrain --help-all`. ``model`` may also be a network, of which a copy is
            trained from its current weights, or a function that builds one; pass it again to
            everything that reads the run.

    Returns:
        The backbone, the metrics of the last step, and the folder.

    Raises:
        ValueError: A setting unknown or out of range (all at once), a folder in use, images or
            weights that cannot be read.
        NotFiniteError: The loss became NaN; the last good checkpoint, if any, is kept.
        Interrupted: The run was asked to stop, and has saved.
    """
    places, objects = split_data(data)
    paths = {name: str(value) for name, value in settings.items() if isinstance(value, Path)}
    with handing_over(settings.get("model")) as model_name:
        model = {} if model_name is None else {"model": model_name}
        given = settings | paths | places | model | ({} if out is None else {"out": str(out)})
        return run(to_config(settings_of(given)), objects)


def signature() -> Signature:
    """The signature of `pretrain`, for editors and `help`: the settings are its keywords."""
    settings = [field for field in fields(PretrainConfig) if field.name not in ("data", "out")]
    kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    positional = [Parameter(name, kinds[0], default=None) for name in ("data", "out")]
    keywords = [Parameter(f.name, kinds[1], default=f.default, annotation=f.type) for f in settings]
    return Signature([*positional, *keywords], return_annotation=PretrainResult)


setattr(pretrain, "__signature__", signature())  # noqa: B010  # functions have no such field


def split_data(data: Any) -> tuple[dict[str, Any], Any]:
    """Data that is named, as settings; or the Python object that it is."""
    if data is None:
        return {}, None
    if isinstance(data, (str, Path)):
        return {"data": (str(data),)}, None
    if isinstance(data, (tuple, list)) and all(isinstance(one, (str, Path)) for one in data):
        return {"data": tuple(str(one) for one in data)}, None
    return {}, data


def run(config: PretrainConfig, objects: Any = None) -> PretrainResult:
    """Do what the settings say; ``objects`` are Python objects in place of ``config.data``.

    Raises:
        ValueError: See `pretrain`.
    """
    if objects is not None:
        config = replace(config, data=())  # of a file of settings, perhaps
    run_dir = check_places(config, objects)
    with logging_to(terminal=is_writer()) as log, quiet_lightning(), StopSignal() as stop:
        try:
            with stop.resting():
                setup = set_up(config, objects, run_dir)
                if config.dry_run:
                    results = dry_run(setup, run_dir) if is_writer() else {}
            if config.dry_run:
                return PretrainResult(None, results | time_steps(setup, stop), run_dir.path)
            if not is_writer():
                return train(setup, run_dir, stop)
            with run_dir.locked():  # only now: what was refused leaves no trace
                run_dir.check(resume=config.resume, overwrite=config.overwrite)
                if config.overwrite:
                    run_dir.remove_run()
                is_new = not run_dir.holds_run()
                run_dir.checkpoints.mkdir(exist_ok=True)  # with it the folder holds a run
                log.open(run_dir.path / run_layout.TRAIN_LOG)
                try:
                    return train(setup, run_dir, stop)
                except Interrupted:
                    if is_new and not run_dir.checkpoint_paths():
                        run_dir.remove_run()
                    raise
        except Exception as error:
            LOG.error("%s: %s", type(error).__name__, error, extra={"file_only": True})
            raise


def train(setup: Setup, run_dir: RunDir, stop: StopSignal) -> PretrainResult:
    """Train, from the newest checkpoint where the run is resumed, and export the backbone.

    Raises:
        Interrupted: The run was asked to stop, and has saved.
    """
    begin, steps = find_resume_point(setup, run_dir), setup.plan.schedule.steps
    if is_writer():
        prepare(setup, run_dir, begin)
    lacking = begin.step == steps and lacks_probe(setup, run_dir)
    if begin.checkpoint is not None and begin.step >= steps and not lacking:
        LOG.info("all %d steps are already done", steps)
        weights, metrics = begin.checkpoint["state_dict"], run_dir.last_metrics()
    else:
        step = build_step(setup, begin.checkpoint, stop)
        if is_writer():
            write_config(setup, run_dir, step.accumulate)
        metrics = fit(setup, step, run_dir, stop, (begin.checkpoint or {}).get("colours"))
        weights = step.weights()
    backbone = export_backbone(setup, run_dir, weights) if is_writer() else None
    stop.exit_if_received()
    return PretrainResult(backbone, metrics, run_dir.path)


def lacks_probe(setup: Setup, run_dir: RunDir) -> bool:
    """Whether the last step is still to be probed: a run may end after its last checkpoint."""
    plan, path = setup.plan, run_dir.path / run_layout.PROBE
    return plan.probe_every > 0 and plan.schedule.steps not in probe_scores(path)


def build_step(setup: Setup, resumed: Mapping[str, Any] | None, stop: StopSignal) -> TrainingStep:
    """The step on the devices, with the state that a resumed run goes on with."""
    plan = setup.plan
    by_trial = plan.device in TRIED_ON and not plan.sharded
    stop.alone = plan.processes == 1
    with stop.resting():
        needed = None if by_trial or plan.accumulate else estimate(setup.learner, plan)
        fabric = build.build_fabric(plan, setup.devices)
        with stop.killing(setup.devices.nodes > 1):
            fabric.launch()
        torch.backends.cudnn.benchmark = plan.device == "cuda"
        step = TrainingStep(fabric, setup.learner, plan, setup.normalise)
        if resumed is not None:
            step.load_state_dict(resumed)
        step.accumulate = plan.accumulate or choose_accumulate(step, needed)
        if plan.captured:
            step.capture()
    if stop.received_anywhere(fabric, 0):
        stop.exit_if_received()
    return step


def time_steps(setup: Setup, stop: StopSignal) -> dict[str, float]:
    """The seconds of a step with its data, by a few steps that are taken and thrown away."""
    plan, steps = setup.plan, setup.plan.schedule.steps
    step = build_step(setup, None, stop)
    loader = build.build_train_loader(plan, setup.data, step.fabric.global_rank, None)
    ends = [time.perf_counter()]
    with ending(loader):
        for batch in take(loader, min(TIMED_STEPS, steps), stop):
            step(batch).metrics.tolist()  # waits for the device
            ends.append(time.perf_counter())
            if step.fabric.broadcast(ends[-1] - ends[0] > TIMED_FOR):  # no process waits for one
                break
    stop.exit_if_received()
    first, *later = (end - begin for begin, end in pairwise(ends))
    seconds = median(later) if later else first
    LOG.info(
        f"a step takes about {seconds:.2g} s, the run about {duration(seconds * steps)}, without "
        "pictures and probes"
    )
    return {"seconds_per_step": seconds} if is_writer() else {}


def export_backbone(setup: Setup, run_dir: RunDir, weights: Mapping[str, Tensor]) -> nn.Module:
    """Write the backbone of a checkpoint's weights; it on the CPU, as its library builds it."""
    card = build.build_card(setup.plan, setup.data.statistics)
    net = card.build()
    state = {n.removeprefix(BACKBONE): t for n, t in weights.items() if n.startswith(BACKBONE)}
    load_state(net, state)
    path = run_dir.path / run_layout.WEIGHTS
    save_backbone(path, net, card)
    LOG.info("backbone written to %s", path)
    return net
