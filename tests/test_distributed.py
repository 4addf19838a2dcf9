"""Two processes learn what one learns on the joined batch. Run as a script, this is one of them."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pixel_level_contrastive_learning import PixelCL, View, blocks
from pixel_level_contrastive_learning.geometry import box_to_map

PROCESSES, IMAGES = 2, 2
"""Images are counted for each process."""
LOSSES: dict[str, dict[str, Any]] = {
    "pixpro": {},
    "pixcontrast": {"use_pixpro": False},
    "instances alone": {"alpha": 0},
    "pixels alone": {"instance_weight": 0},
    "two levels": {"pixel_levels": 2},
}
WITHOUT_PAIRS: dict[str, list[int]] = {"none": [], "the second": [2, 3], "both": [0, 1, 2, 3]}
"""Which process has no pair in its batch: its images."""
CASES = [(loss, without) for loss in LOSSES for without in WITHOUT_PAIRS]


def build(loss: str) -> PixelCL:
    """A learner in float64 on a narrow ResNet, batch norm in eval mode."""
    torch.manual_seed(0)
    net = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16))
    sizes = {"projection_size": 8, "projection_hidden_size": 16}
    return PixelCL(net, 64, **sizes, **LOSSES[loss]).double().eval()


def views(without: str, of: slice = slice(None)) -> tuple[View, View]:
    """Ready views of the joined batch, or of one process's part of it."""
    generator = torch.Generator().manual_seed(1)
    count = PROCESSES * IMAGES
    pixels = torch.rand(2, count, 3, 64, 64, generator=generator).double()
    boxes = torch.tensor([[0.0, 0, 96, 96], [30, 10, 110, 90]]).double()
    maps = box_to_map(boxes, torch.tensor([False, True]))[:, None].repeat(1, count, 1, 1)
    maps[1, WITHOUT_PAIRS[without]] += 1000
    one, two = (View(cut[of], to_image[of]) for cut, to_image in zip(pixels, maps, strict=True))
    return one, two


def learn(learner: PixelCL, forward: nn.Module, batch: tuple[View, View]) -> dict[str, Any]:
    """Two steps: the loss and the gradients of the second, None where there are none."""
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(2):  # a parameter without gradient stops a process at the second
        opt.zero_grad()
        loss: Tensor = forward(batch)
        loss.backward()
        opt.step()
        learner.update_moving_average(0.9)
    named = ((name, weight) for name, weight in learner.named_parameters() if weight.requires_grad)
    return {"loss": loss.detach(), "gradients": {name: weight.grad for name, weight in named}}


def work(rank: int, folder: Path) -> None:
    """One process's part of every case, the results in files."""
    torch.set_num_threads(1)
    blocks.ENTRIES = 20  # the one process that is compared has tables of one block
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    part = slice(rank * IMAGES, (rank + 1) * IMAGES)
    for loss, without in CASES:
        print(f"process {rank}: {loss}, without pairs: {without}", file=sys.stderr, flush=True)
        learner = build(loss)
        parallel = DistributedDataParallel(learner, find_unused_parameters=False)
        result = learn(learner, parallel, views(without, part))
        result["ignored"] = sorted(parallel.parameters_to_ignore)
        torch.save(result, folder / f"{loss}, {without}, {rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their results."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(said)
    return folder


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("without", WITHOUT_PAIRS)
def test_processes_learn_what_one_learns_on_the_joined_batch(folder, loss, without) -> None:
    learner = build(loss)
    expected = learn(learner, learner, views(without))
    results = [torch.load(folder / f"{loss}, {without}, {rank}.pt") for rank in range(PROCESSES)]
    for result in results:
        assert result["ignored"] == sorted(learner._ddp_params_and_buffers_to_ignore)
        idle = [name for name, gradient in result["gradients"].items() if gradient is None]
        assert sorted(idle) == learner.unreached_parameters()
        assert {"online_encoder.net.fc.weight", "online_encoder.net.fc.bias"} <= set(idle)
        for name, gradient in expected["gradients"].items():
            measured = result["gradients"][name]
            torch.testing.assert_close(measured, gradient, rtol=1e-7, atol=1e-12, msg=name)
    mean = torch.stack([result["loss"] for result in results]).mean()
    torch.testing.assert_close(mean, expected["loss"])


def test_a_compiled_learner_in_a_process_waits_for_no_idle_parameter(tmp_path) -> None:
    learner = build("pixpro")
    alone = learn(learner, learner, views("none"))
    learner = build("pixpro")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        compiled = DistributedDataParallel(torch.compile(learner, backend="eager"))
        with torch.compiler.set_stance("force_eager"):  # the names alone matter
            together = learn(learner, compiled, views("none"))
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(together["loss"], alone["loss"])


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
