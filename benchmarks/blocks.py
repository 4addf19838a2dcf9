"""Time of propagation and the pixel losses in blocks against the plain form with whole tables.

python benchmarks/blocks.py
python benchmarks/blocks.py --sides 64 --channels 256 --batch 4

Forward and backward in float32. The plain form is that of ``tests/reference.py``, which holds the
whole ``(b, n, n)`` table in memory. Both know the same view maps and make their matches of them.
They run in this process, in turns.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import Figures, in_turns, machine, median, ratio, report
from torch import Tensor

from pixel_level_contrastive_learning.geometry import Positives, box_to_map, positive_mask
from pixel_level_contrastive_learning.losses import pixcontrast_loss, pixpro_loss
from pixel_level_contrastive_learning.modules.ppm import PPM

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reference  # stands beside the tests

THRESHOLD, TEMPERATURE, GAMMA = 0.7, 0.3, 2.0


def forms(side: int, batch: int, channels: int) -> dict[str, dict[str, Callable[[], None]]]:
    """Each part of the work, in blocks and plain: forward and backward, once a call."""
    online = torch.randn(batch, channels, side, side, requires_grad=True)
    target = torch.randn(batch, channels, side * side)
    boxes = torch.tensor([[0.0, 0, 80, 80], [20, 20, 100, 100]])
    one, two = box_to_map(boxes, torch.zeros(2, dtype=torch.bool)).split(1)
    where = one.expand(batch, 2, 3), two.expand(batch, 2, 3), (side, side), (side, side), THRESHOLD
    ppm = PPM(chan=channels, gamma=GAMMA)

    def run(forward: Callable[[], Tensor]) -> None:
        online.grad = None
        forward().backward()

    return {
        "propagation": {
            "blocks": partial(run, lambda: ppm(online).square().mean()),
            "plain": partial(
                run,
                lambda: reference.plain_propagate(online, ppm.transform_net, GAMMA).square().mean(),
            ),
        },
        "PixPro": {
            "blocks": partial(
                run, lambda: pixpro_loss(online.flatten(2), target, Positives(*where))
            ),
            "plain": partial(
                run,
                lambda: reference.plain_pixpro_loss(
                    online.flatten(2), target, positive_mask(*where)
                ),
            ),
        },
        "PixContrast": {
            "blocks": partial(
                run,
                lambda: pixcontrast_loss(online.flatten(2), target, Positives(*where), TEMPERATURE),
            ),
            "plain": partial(
                run,
                lambda: reference.plain_pixcontrast_loss(
                    online.flatten(2), target, positive_mask(*where), TEMPERATURE
                ),
            ),
        },
    }


def timed(call: Callable[[], None], least: float = 0.2) -> Figures:
    """Seconds a call, over as many calls as take ``least`` seconds."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < least:
        call()
        calls += 1
    return {"seconds": (time.perf_counter() - start) / calls}


def main() -> None:
    """Compare every part at every size."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 64])
    flags.add_argument("--batch", type=int, default=2)
    flags.add_argument("--channels", type=int, default=64)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--save", action="store_true", help="record the ratios")
    args = flags.parse_args()
    torch.manual_seed(0)
    ratios, details = {}, {}
    print("| cells | part | blocks, ms | plain, ms |\n|---|---|---|---|")
    for side in args.sides:
        for part, calls in forms(side, args.batch, args.channels).items():
            contenders = {name: partial(timed, call) for name, call in calls.items()}
            results = in_turns(contenders, args.rounds)
            name = f"blocks / plain, {part}, {side} x {side}"
            ratios[name] = ratio(results["blocks"], results["plain"])
            ms = {form: 1000 * median(figures, "seconds") for form, figures in results.items()}
            details[name] = ms
            print(f"| {side} x {side} | {part} | {ms['blocks']:.2f} | {ms['plain']:.2f} |")
    setting = f"batch {args.batch}, {args.channels} channels, float32"
    report("blocks", setting, ratios, details, where=machine(), save=args.save)


if __name__ == "__main__":
    main()
