"""`pretrain`: from images to a backbone, in one call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from ..augment import Photometry
from ..backbones.checkpoint import load_backbone, save_backbone, save_card
from ..backbones.factory import build_backbone
from ..backbones.state_dict import LAST, WEIGHTS, tensors_of
from ..data.loader import StatefulLoader, build_loader
from ..data.segmentation import open_labelled
from . import build
from .auto import Facts, clock_of, decided, workers
from .build import Images, view_size
from .config import PretrainConfig
from .config_io import CONFIG_FILE, as_yaml, configured, settings_of
from .logging import logged
from .memory import FitMemory, estimate
from .metrics import Figures
from .run_dir import (
    LOG_FILE,
    PREVIEW,
    RunDirectory,
    WholeCheckpoints,
    compared,
    read_checkpoint,
    refuse_idle_changes,
    refuse_misfits,
)
from .signals import Interruption
from .system import Devices, described, devices, free_memory, is_writer
from .training_step import cut
from .validation import Checkpoints, Preview, Probe, Watching, draw_batch_pairs


def loader_of(
    config: PretrainConfig, images: Images, facts: Facts, rank: int, directory: Path | None
) -> StatefulLoader:
    """The loader of this process."""
    assert isinstance(config.batch_size, int)
    assert config.blur_sigma != "auto"
    photometry = [
        Photometry(
            jitter=config.jitter,
            prob_jitter=config.prob_jitter,
            prob_gray=config.prob_gray,
            prob_blur=blur,
            sigma=config.blur_sigma,
            prob_solarise=solarise,
        )
        for blur, solarise in zip(config.prob_blur, config.prob_solarise, strict=True)
    ]
    return build_loader(
        images.training,
        images.statistics,
        image_size=view_size(config),
        batch_size=config.batch_size // facts.processes,
        crop_area=config.crop_area,
        aspect_ratio=config.aspect_ratio,
        prob_hflip=config.prob_hflip,
        prob_vflip=config.prob_vflip,
        max_rotation=config.max_rotation,
        photometry=(photometry[0], photometry[1]),
        seed=config.seed,
        workers=workers(config, facts),
        rank=rank,
        world=facts.processes,
        max_broken=config.max_broken,
        skipped_file=None if directory is None else directory / "skipped.txt",
        pin_memory=facts.device == "cuda",
    )


class Stream:
    """The batches of the rest of a run, epoch after epoch, as one pass.

    Lightning then has no epochs to count and none to get wrong when a run is resumed: the loader
    is the clock, and is set by samples. It is made when first asked for a batch, since only then
    does a process know its rank.

    Args:
        make: Makes the loader of a rank.
        samples: Samples seen before, over all processes.
        steps: Batches to give.
        told_to_stop: Whether the run was told to stop: then workers that died are no error, and
            the stream ends.
    """

    def __init__(
        self,
        make: Callable[[int], StatefulLoader],
        samples: int,
        steps: int,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self.make = make
        self.told_to_stop = told_to_stop
        self.samples = samples
        self.steps = steps
        self.loader: StatefulLoader | None = None
        self.running: Generator[Any, None, None] | None = None
        self.seconds_waited = 0.0

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.seconds_waited if self.loader is None else float(self.loader.waited)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        self.running = self.batches()
        return self.running

    def batches(self) -> Generator[Any, None, None]:
        """The batches."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.loader = self.make(torch.distributed.get_rank() if together else 0)
        self.loader.start_at(self.samples)
        given = 0
        while given < self.steps:
            batches = iter(self.loader)
            while given < self.steps:
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                except (RuntimeError, OSError, EOFError):  # by where the worker was when it died
                    if self.told_to_stop():
                        return
                    raise
                yield batch
                given += 1

    def close(self) -> None:
        """Let the workers go, wherever the run stopped: else its end would wait for them."""
        if self.running is not None:
            self.running.close()
        if self.loader is not None:
            self.seconds_waited = self.waited
        self.running = self.loader = None


def strategy_of(config: PretrainConfig, devices: Devices) -> Strategy | str:
    """How devices share the work.

    FSDP is torch's second (`fully_shard`), which keeps parameters whole tensors to the eye: the
    first flattens them, and the target could not follow.
    """
    if devices.processes == 1:
        return "auto"
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=devices.processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    # Batch norm's buffers are each process's own: in training nobody reads them.
    return DDPStrategy(
        find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def check_loggers(config: PretrainConfig) -> None:
    """Find out whether the loggers that are asked for are installed.

    Raises:
        ValueError: One is not.
    """
    for name in ("wandb", "mlflow"):
        if name in config.loggers and find_spec(name) is None:
            raise ValueError(
                f"loggers names {name!r}, which is not installed; pip install {name}, or take csv: "
                "metrics.jsonl is written in any case"
            )


def loggers_of(config: PretrainConfig, folder: Path, step: int) -> list[Logger]:
    """Lightning's loggers by name, writing into the folder of the run from a step on."""
    part = f"from-step-{step:08d}" if step else ""  # its CSV would replace the one that is there
    makers: dict[str, Any] = {
        "tensorboard": lambda: TensorBoardLogger(folder, name="tensorboard", version=""),
        "csv": lambda: CSVLogger(folder, name="csv", version=part, flush_logs_every_n_steps=1),
        "wandb": lambda: WandbLogger(save_dir=folder, name=folder.name),
        "mlflow": lambda: MLFlowLogger(folder.name, tracking_uri=f"file:{folder / 'mlflow'}"),
    }
    return [makers[name]() for name in config.loggers]


def trainer_of(
    config: PretrainConfig,
    devices: Devices,
    folder: Path,
    done: int,
    steps: int,
    callbacks: list[Callback],
) -> Trainer:
    """Lightning's trainer for so many steps."""
    plugins: list[Any] = [WholeCheckpoints()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # --resume does it, and says so
    return Trainer(
        accelerator={"cuda": "gpu"}.get(devices.kind, devices.kind),
        devices=devices.each_node,
        num_nodes=devices.nodes,
        strategy=strategy_of(config, devices),
        precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        max_steps=steps,
        logger=loggers_of(config, folder, done) if is_writer() else False,
        callbacks=callbacks,
        plugins=plugins,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=devices.kind == "cuda",
        default_root_dir=folder,
    )


ASK_EVERY = 10
"""Steps between the processes' asking each other whether one was told to stop."""


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


LOG = logging.getLogger("pixel_level_contrastive_learning")
TRIED = 16
"""Images that a dry run takes through the network, at most."""
IN_TASK = "learner.online_encoder.net."
"""How the names of the backbone's weights begin in a checkpoint."""


@dataclass(frozen=True)
class PretrainResult:
    """What came of a run.

    Attributes:
        backbone: The pretrained network on the CPU, as its library builds it. None after a dry
            run, and on the processes of a run that do not write.
        metrics: The figures of the last step, by the names of `metrics.jsonl`; of a dry run, what
            was found out.
        run_dir: The folder of the run.
    """

    backbone: nn.Module | None
    metrics: dict[str, Any]
    run_dir: Path


class Run:
    """A run, put together.

    Args:
        config: The settings as given.
        objects: Images that are Python objects, or None.
        directory: Its folder, which may not be there yet.
        interruption: What notes that it is told to stop.
    """

    def __init__(
        self,
        config: PretrainConfig,
        objects: Any,
        directory: RunDirectory,
        interruption: Interruption,
    ) -> None:
        self.directory = directory
        self.interruption = interruption
        self.devices = devices(config)
        check_loggers(config)
        LOG.info("%s", described(self.devices))
        if config.resume:
            compared(config, directory)
        data = objects if objects is not None else config.data
        self.images = build.images_of(data, config, directory if config.resume else None)
        self.labelled = open_labelled(config.probe) if config.probe is not None else None
        self.facts = build.facts_of(self.images, self.devices)
        config = decided(config, self.facts)
        build.check_batch(config, self.devices)
        self.clock = clock_of(config, self.facts.images)
        torch.manual_seed(config.seed)
        goes_on = config.resume and bool(directory.checkpoint_paths())
        net = build.backbone_of(config, self.facts.channels, empty=goes_on)
        self.learner = build.learner_of(config, net, self.facts.channels)
        self.config = build.fitted(config, self.learner)
        self.task = build.task_of(self.config, self.learner, self.images.statistics, self.clock)

    @property
    def shards(self) -> bool:
        """Whether no process holds the whole network."""
        return self.devices.processes > 1 and self.config.strategy == "fsdp"

    def done(self) -> PretrainResult:
        """What comes of it."""
        self.tell()
        checkpoint = self.start()
        remaining = self.clock.steps - self.task.done
        figures: dict[str, Any] = {}
        if remaining > 0:
            figures = self.trained(checkpoint, remaining)
        elif checkpoint is not None:
            LOG.info("all %d steps are done already", self.clock.steps)
            self.task.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
        return PretrainResult(self.exported(), figures, self.directory.path)

    def tell(self) -> None:
        """Log what was decided."""
        c, statistics = self.config, self.images.statistics
        LOG.info(
            "%d images to train on, %d held out, typically %d x %d with %d channels; mean %s, "
            "std %s%s",
            len(self.images.training),
            len(self.images.held_out),
            *statistics.median_size,
            statistics.channels,
            rounded(statistics.mean),
            rounded(statistics.std),
            ""
            if statistics.low is None
            else f"; values from {rounded(statistics.low)} to {rounded(statistics.high)} become "
            "0 to 1",
        )
        LOG.info(
            "%d steps of %d images (%d an epoch, %d of warm-up), learning rate up to %.3g, %s, "
            "views of %d x %d pixels, layers %s and %s, %s workers",
            self.clock.steps,
            c.batch_size,
            self.clock.steps_per_epoch,
            self.clock.warmup,
            self.task.practice.lr.peak,
            c.precision,
            *build.view_size(c),
            c.pixel_layer,
            c.instance_layer,
            workers(c, self.facts),
        )
        if self.facts.images < (c.batch_size if isinstance(c.batch_size, int) else 0):
            LOG.warning(
                "there are fewer images (%d) than a batch has (%d): some come twice in a batch",
                self.facts.images,
                c.batch_size,
            )
        level = logging.INFO if c.dry_run else logging.DEBUG
        LOG.log(level, "settings:\n%s", as_yaml(c))

    def start(self) -> Path | None:
        """Prepare the folder for the first step; the checkpoint to go on from, if there is one."""
        found = None
        if self.config.resume:
            changed = compared(self.config, self.directory)
            for name, (old, new) in changed.items():
                LOG.warning("changed: %s was %r and is now %r", name, old, new)
            found = self.directory.newest_checkpoint()
            if found is None:
                LOG.warning("no checkpoint in %s: starting at step 0", self.directory.checkpoints)
            else:
                held = read_checkpoint(found[0])
                refuse_misfits(tensors_of(self.task), held["state_dict"])
                self.task.done, self.task.samples = self.clock_at(held)
                refuse_idle_changes(changed, self.task.done, self.clock.steps)
                LOG.info("going on at step %d, from %s", self.task.done, found[0])
        step = found[1] if found else 0
        counted_otherwise = found is not None and self.task.done != step
        if is_writer():
            dropped = self.directory.cut_metrics(step)
            if dropped:
                LOG.info("dropped %d lines of metrics after step %d", dropped, step)
            self.directory.forget_after(step)
            if found and counted_otherwise:
                self.directory.renumber(found[0], step, self.task.done)
            self.directory.write_config(as_yaml(self.config))
            if not (self.directory.path / build.STATISTICS_FILE).exists():
                build.save_statistics(self.images, self.directory)
            # Now, not at the end: with it the checkpoints can be evaluated while the run goes on.
            card = build.card_of(self.config, self.images.statistics)
            save_card(self.directory.path / WEIGHTS, card)
        if counted_otherwise:
            return self.directory.checkpoints / LAST  # the others may have moved meanwhile
        return found[0] if found else None

    def clock_at(self, held: Mapping[str, Any]) -> tuple[int, int]:
        """Step and samples to go on at; where the batch changed, a run in epochs counts samples."""
        step, samples = int(held["steps_done"]), int(held["samples"])
        if self.config.steps is None:
            assert isinstance(self.config.batch_size, int)
            step = samples // self.config.batch_size
        return step, samples

    def trained(self, checkpoint: Path | None, remaining: int) -> dict[str, Any]:
        """Train, and give the figures of the last step.

        Raises:
            Interrupted: The run was told to stop, and has saved.
        """
        writes = is_writer()
        folder = self.directory.path if writes else None
        stream = Stream(
            lambda rank: loader_of(self.config, self.images, self.facts, rank, folder),
            self.task.samples,
            remaining,
            lambda: self.interruption.signal is not None,
        )
        figures = Figures(
            self.directory if writes else None,
            lambda: stream.waited,
            self.clock.steps,
            self.clock.warmup,
        )
        trainer = trainer_of(
            self.config,
            self.devices,
            self.directory.path,
            self.task.done,
            remaining,
            self.callbacks(figures),
        )
        try:
            trainer.fit(self.task, stream, ckpt_path=checkpoint, weights_only=True)
        finally:
            stream.close()
        if self.interruption.signal is not None:
            LOG.warning(
                "stopped at step %d of %d as told, and saved; --resume goes on",
                self.task.done,
                self.clock.steps,
            )
            self.interruption.leave()
        return figures.last

    def callbacks(self, figures: Figures) -> list[Callback]:
        """What happens beside the steps, in this order."""
        c = self.config
        assert isinstance(c.checkpoint_every, int)
        assert isinstance(c.batch_size, int)
        each = c.batch_size // self.devices.processes
        checkpoints = Checkpoints(self.directory, c.checkpoint_every, c.keep_checkpoints, figures)
        wanted: list[Callback] = [figures, checkpoints, StopWhenAsked(self.interruption)]
        if c.accumulate == "auto":
            size = build.view_size(c)
            # With a shard each, processes would have to try the same sizes at the same time.
            to_try = self.devices.kind == "cuda" and not self.shards
            taken = None if to_try else estimate(self.task, size, str(c.precision))
            wanted.insert(0, FitMemory(each, size, taken))
        assert isinstance(c.picture_every, int)
        if c.alpha > 0:
            folder = self.directory.path / PREVIEW
            wanted.append(Preview(folder, c.distance_thres, c.picture_every))
        if self.shards:
            if c.probe is not None:
                LOG.warning(
                    "with fsdp no process has the whole network: nothing is probed or drawn"
                )
            return wanted
        # Figures first of the two: what is measured here stands in the lines of the next steps.
        card = build.card_of(c, self.images.statistics)
        held_out = len(self.images.held_out) > 0
        if c.picture_every and is_writer():
            wanted.append(
                Watching(
                    self.directory,
                    figures,
                    card,
                    self.images.held_out if held_out else self.images.training,
                    held_out=held_out,
                    statistics=self.images.statistics,
                    every=c.picture_every,
                )
            )
        if self.labelled is not None:
            assert isinstance(c.probe_every, int)
            every = c.probe_every * self.clock.steps_per_epoch
            wanted.append(
                Probe(
                    self.directory,
                    figures,
                    checkpoints,
                    card,
                    self.labelled,
                    protocol=c.probe_protocol,
                    every=every,
                    steps=self.clock.steps,
                )
            )
        return wanted

    def exported(self) -> nn.Module | None:
        """Write the backbone, and read it as whoever uses it will."""
        if not is_writer():
            return None
        path = self.directory.path / WEIGHTS
        net = self.whole_backbone() if self.task.sharded else self.learner.net
        save_backbone(path, net, build.card_of(self.config, self.images.statistics))
        LOG.info("the backbone is in %s", path)
        return load_backbone(self.directory.path)

    def whole_backbone(self) -> nn.Module:
        """The backbone, of which this process holds a shard, out of the last checkpoint."""
        found = self.directory.newest_checkpoint()
        assert found is not None
        state = read_checkpoint(found[0])["state_dict"]
        size = build.view_size(self.config)
        net = build_backbone(self.config.model, channels=self.facts.channels, image_size=size)
        own = {n.removeprefix(IN_TASK): t for n, t in state.items() if n.startswith(IN_TASK)}
        net.load_state_dict(own)
        return net

    def tried(self) -> PretrainResult:
        """A dry run: what a batch looks like, and what it will take."""
        self.tell()
        loader = loader_of(self.config, self.images, self.facts, 0, None)
        batch = cut(next(iter(loader)), slice(TRIED))
        found: dict[str, Any] = {}
        with torch.no_grad():
            terms = self.learner(self.task.views(batch), return_terms=True)
        found["positive_pairs"] = float(terms.positive_pairs) / len(batch.one)
        found["images_without_pairs"] = int(terms.images_without_pairs)
        assert isinstance(self.config.batch_size, int)
        each = self.config.batch_size // self.devices.processes
        taken = estimate(self.task, build.view_size(self.config), str(self.config.precision))
        found["memory_mib"] = taken.of(each) / 2**20
        LOG.info(
            "%.1f matching pairs an image; %d of %d images have none",
            found["positive_pairs"],
            found["images_without_pairs"],
            len(batch.one),
        )
        device = torch.device(self.devices.kind)
        free = free_memory(device) / 2**20
        LOG.info("%s; %.0f MiB are free on %s", taken.told(each), free, device)
        if self.config.alpha > 0:
            folder = self.directory.path / PREVIEW
            folder.mkdir(parents=True, exist_ok=True)
            [path] = draw_batch_pairs(self.task, batch, folder, self.config.distance_thres, 1)
            LOG.info("a preview is in %s", path)
        return PretrainResult(None, found, self.directory.path)


def rounded(values: Sequence[float] | None) -> str:
    """Some numbers as a text of three digits each."""
    return "-" if values is None else ", ".join(f"{value:.3g}" for value in values)


def pretrain(data: Any = None, out: str | Path | None = None, **settings: Any) -> PretrainResult:
    """Pretrain a backbone on images without labels.

    Args:
        data: A folder of images, or several; a text file of paths; WebDataset shards; or a Python
            sequence of tensors, arrays or PIL images, or a torch data set.
        out: Folder of the run.
        **settings: The settings of `PretrainConfig` by name, each as `pixelcl pretrain --help`
            tells it.

    Returns:
        The backbone, the figures of the last step, and the folder.

    Raises:
        ValueError: A setting unknown or out of range (all at once), a folder in use, images or
            weights that cannot be read.
        NotFiniteError: The loss became NaN; the last good checkpoint is kept, if there was one.
        Interrupted: The run was told to stop, and has saved.
    """
    named, objects = told_apart(data)
    paths = {name: str(value) for name, value in settings.items() if isinstance(value, Path)}
    given = settings | paths | named | ({} if out is None else {"out": str(out)})
    return run(configured(settings_of(given)), objects)


def signature() -> Signature:
    """The signature of `pretrain` as its settings make it, for editors and `help`."""
    own = [field for field in fields(PretrainConfig) if field.name not in ("data", "out")]
    kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    first = [Parameter(name, kinds[0], default=None) for name in ("data", "out")]
    rest = [Parameter(f.name, kinds[1], default=f.default, annotation=f.type) for f in own]
    return Signature([*first, *rest], return_annotation=PretrainResult)


setattr(pretrain, "__signature__", signature())  # noqa: B010  # functions have no such field


def told_apart(data: Any) -> tuple[dict[str, Any], Any]:
    """Data given by name, as settings; or the Python object that it is."""
    if data is None:
        return {}, None
    if isinstance(data, (str, Path)):
        return {"data": (str(data),)}, None
    if isinstance(data, (tuple, list)) and all(isinstance(one, (str, Path)) for one in data):
        return {"data": tuple(str(one) for one in data)}, None
    return {}, data


def run(config: PretrainConfig, objects: Any = None) -> PretrainResult:
    """Do what the settings say.

    Args:
        config: The settings.
        objects: Images that are Python objects, in place of `config.data`.

    Raises:
        ValueError: See `pretrain`.
    """
    if config.out is None:
        raise ValueError("out is not given; name the folder of the run, such as --out runs/mine")
    directory = RunDirectory(Path(config.out).expanduser().absolute())
    if not config.data and objects is None:
        if config.resume and not (directory.path / CONFIG_FILE).is_file():
            raise ValueError(
                f"out is {config.out!r}, where no run is to go on with; name the folder of one, or "
                "name images to begin a new one"
            )
        if config.resume:
            raise ValueError(
                f"data is not given, and the run in {config.out!r} was given Python objects: pass "
                "the same to pretrain()"
            )
        if directory.holds_run():
            raise ValueError(
                f"data is not given; {config.out!r} holds a run, with which --resume goes on. For "
                "a new one name a folder of images"
            )
        raise ValueError("data is not given; name a folder of images")
    if directory.path.resolve() in [Path(place).expanduser().resolve() for place in config.data]:
        raise ValueError(
            f"out is {config.out!r}, where the images are, too; give the run a folder of its own"
        )
    if is_writer():
        directory.check(resume=config.resume, overwrite=config.overwrite)
        if config.overwrite:
            directory.refuse_within([*config.data, *([config.probe] if config.probe else [])])
    with (
        logged(to_terminal=is_writer()) as log,
        quiet_lightning(),
        Interruption() as interruption,
    ):
        try:
            planned = Run(config, objects, directory, interruption)
            interruption.leave()
            if config.dry_run:
                found = planned.tried()
                interruption.leave()
                return found
            if is_writer():  # only now: what was refused leaves no trace
                directory.prepare(overwrite=config.overwrite)
                log.open(directory.path / LOG_FILE)
            return planned.done()
        except Exception as error:
            LOG.error("%s: %s", type(error).__name__, error, extra={"file_only": True})
            raise


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """A context in which Lightning says only what is wrong."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings(
                "ignore", message="FSDP2-wrapped module"
            )  # ours add nothing in place
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
