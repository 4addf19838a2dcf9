"""Where a run goes on: its newest checkpoint, held against settings and network of now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import run_layout
from ..backbones.checkpoint import begin_card
from ..backbones.state_dict import check_code, tensors_of
from ..checks import counted
from ..files import write_whole
from ..pixel_cl import PixelCL
from . import build
from .config_io import as_yaml, check_idle_changes, chosen_in, resume_changes
from .logging import LOG
from .run_dir import RunDir, step_of
from .setup import Setup
from .training_step import BACKBONE, LEARNER


class ResumePoint(NamedTuple):
    """Where a run begins."""

    checkpoint: Mapping[str, Any] | None  # its contents; None for a start at step 0
    path: Path | None  # its file
    number: int  # the step by which the checkpoint goes, with batches of its own size
    step: int  # steps done, of batches of the present size


def find_resume_point(setup: Setup, run_dir: RunDir) -> ResumePoint:
    """Where the run begins; writes nothing.

    Raises:
        ValueError: A checkpoint that does not fit, or changes that nothing is trained with.
    """
    plan = setup.plan
    newest = None if setup.before is None else run_dir.newest_checkpoint()
    # The checkpoint's own: config.yaml may have been changed by hand, or by damage.
    before = newest[1].get("settings", setup.before) if newest is not None else setup.before
    changed = resume_changes(plan.settings, before or {})
    for name, (old, new) in changed.items():
        LOG.warning("changed: %s was %r and is now %r", name, old, new)
    if newest is None:
        if setup.before is not None:
            LOG.warning("no checkpoint in %s: starting at step 0", run_dir.checkpoints)
        return ResumePoint(None, None, 0, 0)
    path, checkpoint = newest
    check_shapes(setup.learner, checkpoint["state_dict"])
    check_statistics(setup, run_dir, checkpoint)
    step = int(checkpoint["steps_done"])
    number = step_of(path) if step_of(path) >= 0 else step
    if plan.settings.steps is None:  # a run in epochs counts images
        step = int(checkpoint["samples"]) // plan.batch_size
    check_idle_changes(changed, step, plan.schedule.steps)
    LOG.info("resuming at step %d, from %s", step, path)
    return ResumePoint(checkpoint | {"steps_done": step}, path, number, step)


def prepare(setup: Setup, run_dir: RunDir, begin: ResumePoint) -> None:
    """Write what a run begins with, and take back what came after the step that it begins at."""
    if dropped := run_dir.truncate(begin.number):
        LOG.info("dropped %s of metrics after step %d", counted(dropped, "line"), begin.number)
    run_dir.discard_after(begin.number)
    if begin.path is not None and begin.step != begin.number:
        run_dir.renumber(begin.path, begin.number, begin.step)
    write_config(setup, run_dir, None if begin.checkpoint is None else begin.checkpoint["parts"][0])
    build.save_statistics(setup.data, run_dir.path)
    # Now, not at the end: with it the checkpoints can be evaluated while the run goes on.
    card = build.build_card(setup.plan, setup.data.statistics)
    resumed = begin.path is not None
    begin_card(run_dir.path / run_layout.WEIGHTS, setup.learner.net, card, resumed)


def write_config(setup: Setup, run_dir: RunDir, accumulate: int | None) -> None:
    """Write the settings, and which of them the run chose; once it is known ``accumulate``, too."""
    settings, chosen = setup.plan.settings, setup.plan.chosen
    if accumulate is not None and settings.accumulate == "auto":
        settings, chosen = replace(settings, accumulate=accumulate), (*chosen, "accumulate")
    path = run_dir.path / run_layout.CONFIG
    earlier = chosen_in(path, asdict(settings))
    write_whole(path, as_yaml(settings, (*chosen, *earlier)))


def check_statistics(setup: Setup, run_dir: RunDir, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a file of statistics other than those of a checkpoint; warn where there is no file."""
    statistics, file = asdict(setup.data.statistics), run_dir.path / run_layout.STATISTICS
    if checkpoint.get("statistics", statistics) != statistics:
        if file.exists():
            raise ValueError(
                f"{file} does not belong to this run; delete it to have it measured again"
            )
        LOG.warning("the image statistics differ from those of the run")


def check_shapes(learner: PixelCL, weights: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights do not fit, before anything of the run is changed."""
    expected = {BACKBONE + name for name in learner.net.state_dict()}
    stored = {name for name in weights if name.startswith(BACKBONE)}
    check_code("the checkpoint", sorted(expected - stored), sorted(stored - expected))
    for name, tensor in tensors_of(learner).items():
        saved = weights.get(LEARNER + name)
        if saved is not None and tuple(saved.shape) != tuple(tensor.shape):
            raise ValueError(
                f"a run cannot resume with other weights: {LEARNER}{name} has the shape "
                f"{tuple(saved.shape)} in the checkpoint and {tuple(tensor.shape)} now; leave "
                "image_size and the model unchanged, or start a new run in another folder with "
                "--weights"
            )
