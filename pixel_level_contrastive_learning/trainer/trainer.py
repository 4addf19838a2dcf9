"""`pretrain`: from images to a backbone. `fit` is the training loop."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from .. import run_layout
from ..backbones.checkpoint import begin_card, load_backbone, save_backbone
from ..backbones.custom import handing_over
from ..backbones.state_dict import check_code, tensors_of
from ..data.dataset import TwoViewBatch
from ..data.loader import TwoViewLoader
from ..pixel_cl import PixelCL
from . import build
from .config import PretrainConfig
from .config_io import as_yaml, check_idle_changes, resume_changes, settings_of, to_config
from .logging import LOG, logging_to, quiet_lightning
from .memory import TRIED_ON, choose_accumulate, estimate
from .metrics import MetricsWriter, build_loggers
from .run_dir import RunDir
from .setup import Setup, check_places, dry_run, set_up
from .signals import StopSignal
from .system import is_writer
from .training_step import BACKBONE, LEARNER, TrainingStep
from .validation import FeaturePictures, Probe, draw_batch


@dataclass(frozen=True)
class PretrainResult:
    """What a run gives.

    Attributes:
        backbone: The pretrained network on the CPU, as its library builds it. None after a dry
            run, and on the processes of a run that do not write.
        metrics: The metrics of the last step, by the names of `metrics.jsonl`; of a dry run, what
            was found out.
        run_dir: The folder of the run.
    """

    backbone: nn.Module | None
    metrics: dict[str, Any]
    run_dir: Path


class ResumePoint(NamedTuple):
    """Where a run goes on: the checkpoint's contents, the steps done, the images seen."""

    held: Mapping[str, Any]
    step: int
    samples: int


def fit(
    fabric: Fabric,
    setup: Setup,
    step: TrainingStep,
    run_dir: RunDir,
    stop: StopSignal,
    colours: Tensor | None,
) -> dict[str, float]:
    """Train until the last step, or until asked to stop; the metrics of the last step."""
    plan, schedule = setup.plan, setup.plan.schedule
    folder = run_dir.path if fabric.is_global_zero else None
    stream = BatchStream(setup, fabric.global_rank, folder, step, stop)
    loggers = build_loggers(plan.loggers, folder, step.step) if folder else []
    metrics = MetricsWriter(
        fabric, folder, schedule.steps, schedule.warmup_steps, lambda: stream.waited, loggers
    )
    pictures, probe = build_validation(setup, run_dir, colours, metrics)
    saver = CheckpointSaver(step, run_dir, setup, metrics, pictures)

    with closing(stream), metrics.recording(step.step):
        if pictures:
            pictures.draw(step)
        if plan.probe_every and step.step % plan.probe_every == 0:
            if probe and step.step not in probe.scores():  # else the run was killed in between
                probe.run(step)
            fabric.barrier()
        for batch in stream:
            first = metrics.batch is None
            if folder and plan.compares_pixels and (first or due(plan.picture_every, step.step)):
                draw_batch(batch, step.learner, step.normalise, plan, folder)
            keep_features = metrics.begin_step(step.step, batch)
            metrics.end_step(step(batch, keep_features=keep_features))
            if due(plan.checkpoint_every, step.step):
                saver.save()
            if stop.received_anywhere(fabric, step.step):
                break
            if pictures and due(plan.picture_every, step.step):
                pictures.draw(step)
            if plan.probe_every and (
                due(plan.probe_every, step.step) or step.step == schedule.steps
            ):
                saver.save()
                if probe:
                    probe.run(step)
                fabric.barrier()
        metrics.settle()
        saver.save()
        if pictures:
            pictures.draw(step)
    return metrics.last


def due(every: int, step: int) -> bool:
    """Whether something happens after a step; 0 is never."""
    return every > 0 and step % every == 0


class BatchStream:
    """The batches of the rest of a run, epoch after epoch.

    Args:
        setup: Plan and data.
        rank: Of this process.
        folder: Where unreadable images are listed; None on processes that do not write.
        step: How far the run has come.
        stop: A loader worker that died after a signal is no error, and ends the stream.
    """

    def __init__(
        self, setup: Setup, rank: int, folder: Path | None, step: TrainingStep, stop: StopSignal
    ) -> None:
        self.loader: TwoViewLoader | None
        self.loader = build.build_train_loader(setup.plan, setup.data, rank, folder)
        self.loader.start_at(step.samples)
        self.batches = take(self.loader, setup.plan.schedule.steps - step.step, stop)

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.loader.waited if self.loader is not None else 0.0

    def __iter__(self) -> Iterator[TwoViewBatch]:
        return self.batches

    def close(self) -> None:
        """Let the workers end now: else the end of the process would wait for them."""
        self.batches.close()
        self.loader = None


def take(
    loader: TwoViewLoader, steps: int, stop: StopSignal
) -> Generator[TwoViewBatch, None, None]:
    """``steps`` batches of a loader, epoch after epoch."""
    given = 0
    while given < steps:
        batches = iter(loader)
        while given < steps:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except (RuntimeError, OSError, EOFError) as error:  # by where a worker was that died
                if stop.received():
                    return
                if isinstance(error, RuntimeError) or getattr(error, "filename", None):
                    raise
                raise RuntimeError(
                    f"a loader worker was killed ({error!r}), perhaps since memory ran out; "
                    "resume the run (--resume), with fewer --workers if it happens again"
                ) from error
            yield batch
            given += 1


class CheckpointSaver:
    """Saves a step's checkpoint, once; every process takes part, one writes."""

    def __init__(
        self,
        step: TrainingStep,
        run_dir: RunDir,
        setup: Setup,
        metrics: MetricsWriter,
        pictures: FeaturePictures | None,
    ) -> None:
        self.step, self.run_dir, self.keep = step, run_dir, setup.plan.keep_checkpoints
        self.statistics = asdict(setup.data.statistics)
        self.metrics, self.pictures = metrics, pictures
        self.saved_at = step.step

    def save(self) -> None:
        """Save now, unless this step is saved already or its metrics are not finite."""
        if self.saved_at == self.step.step:
            return
        self.metrics.settle()
        held = self.step.state_dict()
        held["statistics"] = self.statistics
        held["colours"] = self.pictures.colours if self.pictures else None
        if self.step.fabric.is_global_zero:
            self.run_dir.save_checkpoint(held, self.step.step, self.keep)
        self.saved_at = self.step.step


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
    """Pretrain a backbone on images without labels.

    Args:
        data: A folder of images, or several; a text file of paths; WebDataset shards; or a Python
            sequence of tensors, arrays or PIL images, or a torch data set.
        out: Folder of the run.
        **settings: The settings of `PretrainConfig` by name, as `pixelcl pretrain --help` describes
            them. ``model`` may also be a network, of which a copy is trained from the weights that
            it has, or a function that builds one; pass it again to whatever reads the run.

    Returns:
        The backbone, the metrics of the last step, and the folder.

    Raises:
        ValueError: A setting unknown or out of range (all at once), a folder in use, images or
            weights that cannot be read.
        NotFiniteError: The loss became NaN; the last good checkpoint is kept, if there was one.
        Interrupted: The run was asked to stop, and has saved.
    """
    places, objects = split_data(data)
    paths = {name: str(value) for name, value in settings.items() if isinstance(value, Path)}
    with handing_over(settings.get("model")) as handed:
        model = {} if handed is None else {"model": handed}
        given = settings | paths | places | model | ({} if out is None else {"out": str(out)})
        return run(to_config(settings_of(given)), objects)


def signature() -> Signature:
    """The signature of `pretrain`, for editors and `help`: the settings are its keywords."""
    own = [field for field in fields(PretrainConfig) if field.name not in ("data", "out")]
    kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    first = [Parameter(name, kinds[0], default=None) for name in ("data", "out")]
    rest = [Parameter(f.name, kinds[1], default=f.default, annotation=f.type) for f in own]
    return Signature([*first, *rest], return_annotation=PretrainResult)


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
    run_dir = check_places(config, objects)
    with logging_to(terminal=is_writer()) as log, quiet_lightning(), StopSignal() as stop:
        try:
            setup = set_up(config, objects, run_dir)
            stop.exit_if_received()
            if config.dry_run:
                result = PretrainResult(None, dry_run(setup, run_dir), run_dir.path)
            elif is_writer():  # only now: what was refused leaves no trace
                with run_dir.locked():
                    run_dir.check(resume=config.resume, overwrite=config.overwrite)
                    if config.overwrite:
                        run_dir.remove_run()
                    log.open(run_dir.path / run_layout.TRAIN_LOG)
                    result = train(setup, run_dir, stop)
            else:
                result = train(setup, run_dir, stop)
            stop.exit_if_received()
            return result
        except Exception as error:
            LOG.error("%s: %s", type(error).__name__, error, extra={"file_only": True})
            raise


def train(setup: Setup, run_dir: RunDir, stop: StopSignal) -> PretrainResult:
    """Train, from the newest checkpoint where the run is resumed, and export the backbone.

    Raises:
        Interrupted: The run was asked to stop, and has saved.
    """
    plan, steps = setup.plan, setup.plan.schedule.steps
    resumed = find_resume_point(setup, run_dir)
    if resumed is not None and resumed.step >= steps:
        LOG.info("all %d steps are done already", steps)
        state = resumed.held["state_dict"]
        setup.learner.load_state_dict({n.removeprefix(LEARNER): t for n, t in state.items()})
        return PretrainResult(export_backbone(setup, run_dir, setup.learner.net), {}, run_dir.path)
    tried = plan.device in TRIED_ON and not plan.sharded
    needed = None if tried or plan.accumulate else estimate(setup.learner, plan)  # before sharding
    fabric = build.build_fabric(plan, setup.devices)
    fabric.launch()
    torch.backends.cudnn.benchmark = plan.device == "cuda"
    step = TrainingStep(fabric, setup.learner, plan, setup.normalise)
    colours = None
    if resumed is not None:
        step.load_state_dict(resumed.held)
        step.step, step.samples = resumed.step, resumed.samples
        colours = resumed.held.get("colours")
    step.accumulate = plan.accumulate or choose_accumulate(fabric, step, plan, needed)
    metrics = fit(fabric, setup, step, run_dir, stop, colours)
    if stop.received():
        LOG.warning(
            "stopped at step %d of %d as asked, and saved; --resume goes on", step.step, steps
        )
        stop.exit_if_received()
    net = whole_backbone(setup, run_dir) if plan.sharded else step.learner.net
    return PretrainResult(export_backbone(setup, run_dir, net), metrics, run_dir.path)


def find_resume_point(setup: Setup, run_dir: RunDir) -> ResumePoint | None:
    """Prepare the folder for the first step; where to go on, None for a new run.

    Raises:
        ValueError: A checkpoint that does not fit, or changes that nothing is trained with.
    """
    plan, point, number = setup.plan, None, 0
    found = None if setup.before is None else run_dir.newest_checkpoint()
    # The checkpoint's own: config.yaml may have been changed by hand, or by damage.
    before = found[1].get("settings", setup.before) if found is not None else setup.before
    changed = resume_changes(plan.settings, before or {})
    for name, (old, new) in changed.items():
        LOG.warning("changed: %s was %r and is now %r", name, old, new)
    if found is not None:
        path, held = found
        check_shapes(setup.learner, held["state_dict"])
        done, samples = int(held["steps_done"]), int(held["samples"])
        # A run in epochs counts images, so that another batch size gives another step.
        step = done if plan.settings.steps is not None else samples // plan.batch_size
        numbered = path.stem.removeprefix("step-")
        number = int(numbered) if numbered.isdecimal() else done
        point = ResumePoint(held, step, samples)
        statistics, file = asdict(setup.data.statistics), run_dir.path / run_layout.STATISTICS
        if held.get("statistics", statistics) != statistics:
            if file.exists():
                raise ValueError(f"{file} is not the run's; remove it, and they are measured again")
            LOG.warning("the statistics of the images are not those of the run")
        check_idle_changes(changed, step, plan.schedule.steps)
        LOG.info("going on at step %d, from %s", step, path)
    elif setup.before is not None:
        LOG.warning("no checkpoint in %s: starting at step 0", run_dir.checkpoints)
    if is_writer():
        run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
        dropped = run_dir.truncate(number)
        if dropped:
            LOG.info("dropped %d lines of metrics after step %d", dropped, number)
        run_dir.discard_after(number)
        if found is not None and point is not None and point.step != number:
            run_dir.renumber(found[0], number, point.step)
        run_dir.write_config(as_yaml(plan.settings))
        build.save_statistics(setup.data, run_dir.path)
        # Now, not at the end: with it the checkpoints can be evaluated while the run goes on.
        card = build.build_card(plan, setup.data.statistics)
        begin_card(run_dir.path / run_layout.WEIGHTS, setup.learner.net, card, point is not None)
    return point


def check_shapes(learner: PixelCL, held: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights do not fit, before anything of the run is changed."""
    now = {BACKBONE + name for name in learner.net.state_dict()}
    then = {name for name in held if name.startswith(BACKBONE)}
    check_code("the checkpoint", sorted(now - then), sorted(then - now))
    for name, own in tensors_of(learner).items():
        there = held.get(LEARNER + name)
        if there is not None and tuple(there.shape) != tuple(own.shape):
            raise ValueError(
                f"a run cannot go on with other weights: {LEARNER}{name} has the shape "
                f"{tuple(there.shape)} in the checkpoint and {tuple(own.shape)} now; leave "
                "image_size and the model as they were, or start a new run in another folder with "
                "--weights"
            )


def export_backbone(setup: Setup, run_dir: RunDir, net: nn.Module) -> nn.Module | None:
    """Write the backbone, and load it as its users will; None on processes that do not write."""
    if not is_writer():
        return None
    path = run_dir.path / run_layout.WEIGHTS
    save_backbone(path, net, build.build_card(setup.plan, setup.data.statistics))
    LOG.info("the backbone is in %s", path)
    return load_backbone(run_dir.path)


def whole_backbone(setup: Setup, run_dir: RunDir) -> nn.Module:
    """The backbone, of which this process holds a shard, from the last checkpoint."""
    found = run_dir.newest_checkpoint()
    assert found is not None
    state = found[1]["state_dict"]
    net = build.build_card(setup.plan, setup.data.statistics).build()
    own = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
    net.load_state_dict(own)
    return net
