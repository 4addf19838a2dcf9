"""What the trainer adds to a step, and how long it waits for images.

python benchmarks/overhead.py STREETS
python benchmarks/overhead.py STREETS --model torchvision/resnet50 --size 224 --batch 8

The trainer runs as `pixelcl pretrain` does, with its log, its figures and its checkpoints. The
plain loop takes the same batches from the same loader, through the same learner and optimiser, and
writes nothing. Both take turns in this process; a step's time is that from one step's end to the
next one's, the first step left out. What it costs to look at the network (pictures and
correspondence, ten times a run) is timed by itself.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import Figures, in_turns, machine, median, ratio, report, wait

from pixel_level_contrastive_learning import pretrain
from pixel_level_contrastive_learning.augment import Normalise
from pixel_level_contrastive_learning.trainer import build
from pixel_level_contrastive_learning.trainer.auto import resolve, view_size
from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.system import find_devices
from pixel_level_contrastive_learning.trainer.training_step import make_views, move_batch
from pixel_level_contrastive_learning.trainer.validation import FeaturePictures

RUN, LOOKS = 500, 11
"""Steps of a short run, and how often it looks at the network unless told otherwise."""
CHECKPOINT_EVERY = 20
"""Steps between checkpoints, so that some are written in what is timed: by default a run of so few
steps writes one at its end."""


def trained(settings: dict[str, Any]) -> Figures:
    """The trainer's seconds a step, and its share of time spent waiting."""
    looks: list[float] = []
    draw = FeaturePictures.draw

    def timed(pictures: FeaturePictures, step: Any) -> None:
        begin = time.perf_counter()
        draw(pictures, step)
        looks.append(time.perf_counter() - begin)

    # Looked at before the first step and after the last, outside of what is timed.
    with tempfile.TemporaryDirectory() as folder, patch.object(FeaturePictures, "draw", timed):
        pretrain(out=folder, picture_every=10**9, checkpoint_every=CHECKPOINT_EVERY, **settings)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()][1:]
    batch = settings["batch_size"]
    seconds = [batch / line["images_per_second"] for line in lines]
    waiting = sum(s * line["waiting"] for s, line in zip(seconds, lines, strict=True))
    step = statistics.fmean(seconds)
    return {"seconds": step, "waiting": waiting / sum(seconds), "look": looks[-1]}


def looped(settings: dict[str, Any]) -> Figures:
    """The plain loop's seconds a step."""
    config = PretrainConfig(**settings | {"data": (str(settings["data"]),)})
    data = build.open_data(config.data, config, None)
    size, channels = view_size(config, data.statistics.median_size), data.statistics.channels
    torch.manual_seed(config.seed)
    net = build.build_net(config, size, channels, load=True)
    learner = build.build_learner(config, net, size, channels)
    plan = resolve(config, build.find_info(config, data, find_devices(config), learner))
    device, schedule = torch.device(plan.device), plan.schedule
    learner.to(device)
    normalise = Normalise(data.statistics.mean, data.statistics.std).to(device)
    optimiser = build.build_optimizer(learner, plan, set(learner.unreached_parameters()))
    loader = build.build_train_loader(plan, data, 0, None)
    half = torch.autocast(plan.device, torch.bfloat16, enabled=plan.precision == "bfloat16")
    ends: list[float] = []
    while len(ends) < schedule.steps:
        for batch in loader:
            for group in optimiser.param_groups:
                group["lr"] = schedule.lr(len(ends))
            with half:
                loss = learner(make_views(move_batch(batch, device), normalise, plan))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            learner.update_moving_average(schedule.momentum(len(ends)))
            if not ends:
                wait(plan.device)
            ends.append(time.perf_counter())
            if len(ends) == schedule.steps:
                break
    wait(plan.device)
    ends[-1] = time.perf_counter()
    return {"seconds": (ends[-1] - ends[0]) / (len(ends) - 1)}


def main() -> None:
    """Compare the two."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("images", type=Path)
    flags.add_argument("--model", default="torchvision/resnet18")
    flags.add_argument("--size", type=int, default=128)
    flags.add_argument("--batch", type=int, default=24)
    flags.add_argument("--steps", type=int, default=60)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--save", action="store_true", help="record the ratios")
    args = flags.parse_args()
    logging.getLogger("pixel_level_contrastive_learning").setLevel(logging.ERROR)
    settings = {"data": str(args.images), "model": args.model, "image_size": args.size}
    settings |= {"batch_size": args.batch, "steps": args.steps}
    results = in_turns(
        {"plain": lambda: looped(settings), "trainer": lambda: trained(settings)}, args.rounds
    )
    ratios = {"trainer / plain loop": ratio(results["trainer"], results["plain"])}
    ratios["share of time waiting for images"] = median(results["trainer"], "waiting")
    look, step = (median(results["trainer"], name) for name in ("look", "seconds"))
    ratios[f"share of {RUN} steps spent looking at the network"] = LOOKS * look / (RUN * step)
    setting = f"{args.model} at {args.size} px, batch {args.batch}, {args.steps} steps"
    where = machine(find_devices(PretrainConfig()).kind)
    report("overhead", setting, ratios, results, where=where, save=args.save)


if __name__ == "__main__":
    main()
