"""A whole training step against the bare backbone and against the published package.

python benchmarks/step.py --model resnet50 --size 256 --batch 8
python benchmarks/step.py --model resnet50 --size 256 --batch 8 --precision bfloat16 --channels-last
python benchmarks/step.py --peer PEER/bin/python   # its interpreter, with version 0.1.1 installed
python benchmarks/step.py --densecl PEER/bin/python  # one that has lightly installed
python benchmarks/step.py --device cuda --graph    # and steps launched as one CUDA graph
python benchmarks/step.py --profile                # where the time of our step goes

Ours is ``learner(images)`` with drawing, colour, losses, backward, optimiser and target update.
The floor is the least that the method can do: the same backbone up to its last map, the same
heads and optimiser on two ready-made views in the same precision, two forward and backward passes
and two passes of the target without gradient. The published package runs with its defaults, in
float32; DenseCL, put together of lightly's blocks with its own transforms, in the precision asked
for. It trains on one of the two views only, half the passes of all others: compare images a second,
not ways of learning. Each contender is a process of its own, and they take turns.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from measure import (
    Contender,
    Figures,
    in_turns,
    machine,
    median,
    ratio,
    report,
    resident_peak,
    serve,
    wait,
)
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import to_pil_image

PIXEL_LAYER, INSTANCE_LAYER = "layer4", "avgpool"  # of torchvision's ResNets
HIDDEN, OUT = 2048, 256  # of the heads, as both packages have them by default
OPTIMISER_LR = 1e-4

Step = Callable[[], object]
"""One training step, from images to an updated target."""


class Stopwatch:
    """Adds up the time of each part of a step; time inside an inner part counts for it alone.

    Args:
        device: Waited for wherever a part begins or ends, so that its work counts where it was
            asked for. The sum is therefore longer than a step that nobody watches.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = 0.0

    def mark(self) -> None:
        """Charge the time since the last mark to the innermost open part."""
        wait(self.device)
        now = time.perf_counter()
        if self.open:
            self.spent[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step."""
        self.enter(name)
        yield
        self.leave()

    def enter(self, name: str) -> None:
        """A part begins."""
        self.mark()
        self.open.append(name)

    def leave(self) -> None:
        """The innermost part ends."""
        self.mark()
        self.open.pop()

    def follow(self, learner: nn.Module) -> None:
        """Watch the parts of a learner from outside, by hooks on its modules."""
        parts = {
            "": "losses",  # what is left of the learner's forward when its modules are taken away
            "views": "views",
            "views.augment": "colour",
            "online_encoder": "online",
            "online_predictor": "online",
            "propagate_pixels": "propagation",
            "target_encoder": "target",
        }
        for path, name in parts.items():
            module = learner.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
            module.register_forward_hook(lambda *_: self.leave())


def precision(args: argparse.Namespace) -> torch.autocast:
    """The context that a forward pass runs in."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bfloat16")


def placed(module: nn.Module, args: argparse.Namespace) -> nn.Module:
    """A module on the device, in the memory format asked for."""
    format_ = torch.channels_last if args.channels_last else torch.preserve_format
    return module.to(args.device, memory_format=format_)


class Plain(nn.Module):
    """The backbone up to its last map, with a projector on the map and one on its average.

    Args:
        net: A ResNet of torchvision.
    """

    def __init__(self, net: models.ResNet) -> None:
        super().__init__()
        from pixel_level_contrastive_learning.modules.encoder import map_projector, vector_projector

        width = net.fc.in_features
        self.body = create_feature_extractor(net, {PIXEL_LAYER: "map"})
        self.pixel = map_projector(width, HIDDEN, OUT)
        self.instance = vector_projector(width, HIDDEN, OUT)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels)["map"]
        return self.pixel(features), self.instance(features.mean((2, 3)))


def floor(args: argparse.Namespace) -> Step:
    """The least that a step can do."""
    from pixel_level_contrastive_learning.modules.encoder import predictor

    online = placed(Plain(getattr(models, args.model)(weights=None)), args)
    target = deepcopy(online).requires_grad_(False)
    head = placed(predictor(OUT, HIDDEN), args)
    weights = [*online.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(weights, OPTIMISER_LR, capturable=args.serve in GRAPHS)
    views = [torch.randn(args.batch, 3, args.size, args.size, device=args.device) for _ in "12"]
    if args.channels_last:
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]

    def step() -> None:
        loss = torch.zeros((), device=args.device)
        with precision(args):
            for view in views:
                pixel, instance = online(view)
                loss = loss + pixel.relu().mean() + head(instance).relu().mean()
            with torch.no_grad():
                for view in views:
                    target(view)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return as_one_graph(step) if args.serve in GRAPHS else step


def as_one_graph(step: Step) -> Step:
    """A step that is captured as a CUDA graph once, and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    captured = graph, step  # the graph reads the weights and views that the step holds
    return lambda: captured[0].replay()


def ours(args: argparse.Namespace, watch: Stopwatch | None = None) -> Step:
    """A step of this package; ``watch`` is told when each part begins and ends."""
    from pixel_level_contrastive_learning import CapturedStep, PixelCL
    from pixel_level_contrastive_learning.step_graph import WARM_UP

    net = getattr(models, args.model)(weights=None)
    learner = placed(PixelCL(net, args.size, PIXEL_LAYER, INSTANCE_LAYER), args)
    optimiser = torch.optim.Adam(learner.parameters(), OPTIMISER_LR)
    images = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    if watch is not None:
        watch.follow(learner)
    part = nullcontext if watch is None else watch.part
    module = torch.compile(learner) if args.serve == "ours, compiled" else learner
    if args.serve in GRAPHS:
        half = torch.bfloat16 if args.precision == "bfloat16" else None
        captured = CapturedStep(learner, optimiser, half)
        for _ in range(WARM_UP + 1):
            captured(images)
        if captured.refused:
            raise SystemExit(f"the step was not captured: {captured.refused}")
        return lambda: captured(images)

    def step() -> None:
        with precision(args):
            loss = module(images)
        with part("backward"):
            optimiser.zero_grad()
            loss.backward()
        with part("optimiser"):
            optimiser.step()
        with part("target update"):
            learner.update_moving_average()

    return step


def peer(args: argparse.Namespace) -> Step:
    """A step of the published package, with its defaults and in its precision."""
    import pixel_level_contrastive_learning as package

    if Path(package.__file__).resolve().is_relative_to(Path(__file__).resolve().parents[1]):
        raise SystemExit(
            f"--peer runs this package ({package.__file__}); pass the Python of an environment of "
            "its own, with pixel-level-contrastive-learning==0.1.1 installed"
        )
    net = getattr(models, args.model)(weights=None).to(args.device)
    learner = package.PixelCL(net, args.size, PIXEL_LAYER, INSTANCE_LAYER)
    optimiser = torch.optim.Adam(learner.parameters(), OPTIMISER_LR)
    images = torch.rand(args.batch, 3, args.size, args.size, device=args.device)

    def step() -> None:
        loss = learner(images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        learner.update_moving_average()

    return step


def densecl(args: argparse.Namespace) -> Step:
    """A step of DenseCL as lightly's guide puts it together: transforms, two branches, queues."""
    from lightly.transforms import DenseCLTransform
    from peers import DenseCL

    learner = placed(DenseCL(getattr(models, args.model)(weights=None)), args)
    optimiser = torch.optim.Adam(learner.online.parameters(), OPTIMISER_LR)
    transform = DenseCLTransform(input_size=args.size)
    images = (torch.rand(args.batch, 3, args.size, args.size) * 255).to(torch.uint8)
    pictures = [to_pil_image(image) for image in images]

    def step() -> None:
        views = [torch.stack(pair) for pair in zip(*map(transform, pictures), strict=True)]
        with precision(args):
            loss = learner(*(view.to(args.device) for view in views))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


GRAPHS = ("floor, one graph", "ours, one graph")
STEPS = {
    **dict.fromkeys(("floor", "floor, one graph"), floor),
    **dict.fromkeys(("ours", "ours, one graph"), ours),
    "ours, compiled": ours,
    "published": peer,
    "DenseCL (lightly)": densecl,
}


def contend(args: argparse.Namespace) -> None:
    """The contender's process: warm up, then measure whenever asked."""
    begin = time.perf_counter()
    step = STEPS[args.serve](args)
    step()
    wait(args.device)
    first = time.perf_counter() - begin
    step()

    def measure() -> Figures:
        wait(args.device)
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        wait(args.device)
        seconds = (time.perf_counter() - start) / args.steps
        peak = resident_peak()
        if args.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.empty_cache()  # the others live on the same card
        return {"seconds": seconds, "peak_mib": peak, "first": first}

    serve(measure)


def profile(args: argparse.Namespace) -> None:
    """Print where the time of our step goes."""
    watch = Stopwatch(args.device)
    step = ours(args, watch)
    step()
    watch.spent.clear()
    for _ in range(args.steps * args.rounds):
        step()
    total = sum(watch.spent.values())
    print(f"\nOur step, {setting(args)}\n\n| part | ms | share |\n|---|---|---|")
    for name, seconds in sorted(watch.spent.items(), key=lambda item: -item[1]):
        milliseconds = 1000 * seconds / (args.steps * args.rounds)
        print(f"| {name} | {milliseconds:.1f} | {seconds / total:.1%} |")


def setting(args: argparse.Namespace) -> str:
    """What is measured, in words."""
    layout = ", channels last" if args.channels_last else ""
    return (
        f"{args.model} at {args.size} px, batch {args.batch}, {args.precision}{layout}, "
        f"{args.device}"
    )


def compare(args: argparse.Namespace) -> None:
    """Run all contenders in turns and print their table and ratios."""
    pythons = {"floor": sys.executable, "ours": sys.executable}
    pythons |= {"ours, compiled": sys.executable} if args.compile else {}
    pythons |= dict.fromkeys(GRAPHS, sys.executable) if args.graph else {}
    pythons |= {"published": args.peer} if args.peer else {}
    pythons |= {"DenseCL (lightly)": args.densecl} if args.densecl else {}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender([python, *sys.argv, "--serve", name]))
            for name, python in pythons.items()
        }
        results = in_turns(contenders, args.rounds)
    print("| step | ms | images/s | x floor | peak MiB | first step, s |\n|---" + "|---" * 5 + "|")
    options = ("model", "size", "batch", "precision", "channels_last", "device", "threads")
    details: Figures = {"asked": {name: getattr(args, name) for name in options}}
    for name, figures in results.items():
        seconds, peak = median(figures, "seconds"), median(figures, "peak_mib")
        details[name] = {"seconds": seconds, "images_per_second": args.batch / seconds}
        details[name] |= {"peak_mib": peak, "first_step_seconds": figures[0]["first"]}
        times = ratio(figures, results["floor"])
        print(
            f"| {name} | {1000 * seconds:.1f} | {args.batch / seconds:.1f} | {times:.2f} | "
            f"{peak:.0f} | {figures[0]['first']:.1f} |"
        )
    ratios = {
        f"{name} / floor": ratio(results[name], results["floor"]) for name in list(results)[1:]
    }
    if args.peer:
        ratios["published / ours"] = ratio(results["published"], results["ours"])
    if args.graph:
        ratios["ours / floor, both one graph"] = ratio(results[GRAPHS[1]], results[GRAPHS[0]])
    where = machine(args.device)
    report("step", setting(args), ratios, details, where=where, save=args.save)


def main() -> None:
    """Compare the contenders, or be one."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", default="resnet18", help="a ResNet of torchvision")
    flags.add_argument("--size", type=int, default=128, help="of images and views, in pixels")
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--channels-last", action="store_true")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--steps", type=int, default=3, help="steps a contender takes in a turn")
    flags.add_argument("--threads", type=int, help="of each process; default: torch's choice")
    flags.add_argument("--compile", action="store_true", help="and torch.compile(learner)")
    flags.add_argument("--graph", action="store_true", help="and steps as one CUDA graph")
    flags.add_argument("--peer", help="a Python that has the published package installed")
    flags.add_argument("--densecl", help="a Python that has lightly installed")
    flags.add_argument("--profile", action="store_true", help="only show where our time goes")
    flags.add_argument("--save", action="store_true", help="record the ratios")
    flags.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.graph and args.device != "cuda":
        flags.error("--graph needs --device cuda")
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.serve:
        contend(args)
    elif args.profile:
        profile(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
