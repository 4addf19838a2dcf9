"""The course of a run: the order of things, and what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from ..backbones import build_backbone
from ..evaluation.labelled import open_labelled
from ..keys import LAST, WEIGHTS, tensors_of
from ..weights import load_backbone, save_backbone, save_card
from . import assembly, engine
from .callbacks import Checkpoints, StopWhenAsked
from .config import PretrainConfig
from .directory import PREVIEW, RunDirectory, read_checkpoint
from .figures import Figures
from .interruption import Interruption
from .machine import described, devices, free_memory, is_writer
from .memory import FitMemory, estimate
from .plan import clock_of, decided, workers
from .preview import Preview, draw_pairs
from .resumption import compared, refuse_idle_changes, refuse_misfits
from .settings import as_yaml
from .task import cut
from .watching import Probe, Watching

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
        engine.check_loggers(config)
        LOG.info("%s", described(self.devices))
        if config.resume:
            compared(config, directory)
        data = objects if objects is not None else config.data
        self.images = assembly.images_of(data, config, directory if config.resume else None)
        self.labelled = open_labelled(config.probe) if config.probe is not None else None
        self.facts = assembly.facts_of(self.images, self.devices)
        config = decided(config, self.facts)
        assembly.check_batch(config, self.devices)
        self.clock = clock_of(config, self.facts.images)
        torch.manual_seed(config.seed)
        goes_on = config.resume and bool(directory.checkpoint_paths())
        net = assembly.backbone_of(config, self.facts.channels, empty=goes_on)
        self.learner = assembly.learner_of(config, net, self.facts.channels)
        self.config = assembly.fitted(config, self.learner)
        self.task = assembly.task_of(self.config, self.learner, self.images.statistics, self.clock)

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
            *assembly.view_size(c),
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
            if not (self.directory.path / assembly.STATISTICS_FILE).exists():
                assembly.save_statistics(self.images, self.directory)
            # Now, not at the end: with it the checkpoints can be evaluated while the run goes on.
            card = assembly.card_of(self.config, self.images.statistics)
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
        stream = engine.Stream(
            lambda rank: engine.loader_of(self.config, self.images, self.facts, rank, folder),
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
        trainer = engine.trainer_of(
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
            size = assembly.view_size(c)
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
        card = assembly.card_of(c, self.images.statistics)
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
        save_backbone(path, net, assembly.card_of(self.config, self.images.statistics))
        LOG.info("the backbone is in %s", path)
        return load_backbone(self.directory.path)

    def whole_backbone(self) -> nn.Module:
        """The backbone, of which this process holds a shard, out of the last checkpoint."""
        found = self.directory.newest_checkpoint()
        assert found is not None
        state = read_checkpoint(found[0])["state_dict"]
        size = assembly.view_size(self.config)
        net = build_backbone(self.config.model, channels=self.facts.channels, image_size=size)
        own = {n.removeprefix(IN_TASK): t for n, t in state.items() if n.startswith(IN_TASK)}
        net.load_state_dict(own)
        return net

    def tried(self) -> PretrainResult:
        """A dry run: what a batch looks like, and what it will take."""
        self.tell()
        loader = engine.loader_of(self.config, self.images, self.facts, 0, None)
        batch = cut(next(iter(loader)), slice(TRIED))
        found: dict[str, Any] = {}
        with torch.no_grad():
            terms = self.learner(self.task.views(batch), return_terms=True)
        found["positive_pairs"] = float(terms.positive_pairs) / len(batch.one)
        found["images_without_pairs"] = int(terms.images_without_pairs)
        assert isinstance(self.config.batch_size, int)
        each = self.config.batch_size // self.devices.processes
        taken = estimate(self.task, assembly.view_size(self.config), str(self.config.precision))
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
            [path] = draw_pairs(self.task, batch, folder, self.config.distance_thres, 1)
            LOG.info("a preview is in %s", path)
        return PretrainResult(None, found, self.directory.path)


def rounded(values: Sequence[float] | None) -> str:
    """Some numbers as a text of three digits each."""
    return "-" if values is None else ", ".join(f"{value:.3g}" for value in values)
