"""Signs that a run goes wrong, memory, signals: the parts beside the steps."""

from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pixel_level_contrastive_learning import PixelCL
from pixel_level_contrastive_learning.evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD
from pixel_level_contrastive_learning.trainer.auto import Schedule
from pixel_level_contrastive_learning.trainer.logging import LOG, logging_to
from pixel_level_contrastive_learning.trainer.memory import (
    Estimate,
    blank_views,
    estimate,
    parts_by,
    saved_bytes,
    try_size,
    unchanged,
)
from pixel_level_contrastive_learning.trainer.metrics import (
    HealthMonitor,
    MetricsWriter,
    NotFiniteError,
)

HEALTHY = {
    "loss": 4.0,
    "pixel_cosine": 0.5,
    "instance_cosine": 0.5,
    "grad_norm": 1.0,
    "images_without_pairs": 4.0,
    "spread": 0.8,
    "effective_rank": 20.0,
}
FULL_DISK = Path("/dev/full")
SCHEDULE = Schedule(9, 1, 1, 1.0, 0.0, 0.99)
PLAN = SimpleNamespace(schedule=SCHEDULE, batch_size=8, compares_pixels=True)


def told(monitor: HealthMonitor, steps: range, **changed: float) -> list[str]:
    return [message for step in steps for message in monitor(HEALTHY | changed | {"step": step})]


def test_a_healthy_run_is_told_nothing() -> None:
    assert told(HealthMonitor(10), range(1, 300)) == []


@pytest.mark.parametrize(
    ("figure", "value"),
    [("spread", COLLAPSED_SPREAD * 0.9), ("effective_rank", COLLAPSED_RANK * 0.9)],
)
def test_collapse_is_told_at_once_and_once(figure, value) -> None:
    monitor = HealthMonitor(10)
    [sentence] = told(monitor, range(1, 4), **{figure: value})
    assert "the features are collapsing" in sentence
    assert told(monitor, range(4, 6)) == []  # it recovers,
    assert len(told(monitor, range(6, 9), **{figure: value})) == 1  # and collapses again


def test_predictions_no_better_than_chance_are_told_after_the_warm_up() -> None:
    lost = {"pixel_cosine": -0.1, "instance_cosine": -0.2}
    assert told(HealthMonitor(100), range(1, 101), **lost) == []
    [sentence] = told(HealthMonitor(100), range(1, 200), **lost)
    assert "no better than chance" in sentence


@pytest.mark.parametrize(("compared", "warnings"), [(8, 1), (16, 0), (0, 0)])
def test_images_without_pairs_are_told_once_they_are_most(compared, warnings) -> None:
    messages = told(HealthMonitor(10, compared), range(1, 100), images_without_pairs=8.0)
    start = "8 of 8 images have no matching pairs, so the pixel loss ignores them. "
    assert messages == [start + "Raise crop_area or distance_thres"][:warnings]


def test_one_branch_switched_off_is_no_divergence() -> None:
    assert told(HealthMonitor(1), range(1, 200), instance_cosine=0.0) == []


def test_a_gradient_of_a_thousand_times_its_running_mean_is_told() -> None:
    monitor = HealthMonitor(10)
    told(monitor, range(1, 1000))
    # The mean becomes 0.98 * 1 + 0.02 * 101.
    assert told(monitor, range(1000, 1001), grad_norm=101.0) == []
    [sentence] = told(monitor, range(1001, 1002), grad_norm=3010.0)
    assert "the gradient norm is 3.01e+03, over a thousand times its usual 3." in sentence


@pytest.mark.parametrize(("norm", "warnings"), [(990.0, 0), (1010.0, 1)])
def test_an_exploding_gradient_is_told(norm, warnings) -> None:
    monitor = HealthMonitor(10)
    told(monitor, range(1, 100))
    assert len(told(monitor, range(100, 101), grad_norm=norm)) == warnings


def test_parts_by_estimate_leave_a_margin() -> None:
    needed = Estimate(fixed=100, per_image=10)
    assert parts_by(needed, 32, 1000) == 1  # 0.8 * 1000 - 100 = 70 images
    assert parts_by(needed, 32, 250) == 4  # 10 images
    assert parts_by(needed, 32, 0) == 16  # never less than two


def test_saved_bytes_are_those_of_the_activations() -> None:
    class Doubling(nn.Module):
        """Keeps its input, once, for the backward pass of a square."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square()

    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: Doubling()(x * 1), PixelCL(net(), 32)) == 4000


def test_an_estimate_counts_what_a_step_holds_and_what_each_image_leaves() -> None:
    learner, size = PixelCL(net(), (32, 64)), (32, 64)
    needed = estimate(
        learner, SimpleNamespace(precision="float32", view_size=size, optimizer="adamw")
    )
    online = sum(parameter.nbytes for parameter in learner.parameters() if parameter.requires_grad)
    target = sum(parameter.nbytes for parameter in learner.target_encoder.parameters())
    buffers = sum(buffer.nbytes for buffer in learner.buffers())
    assert needed.fixed == 4 * online + target + buffers  # weights, gradients and two of Adam's
    views = blank_views(6, learner, size, torch.device("cpu"))
    assert views[0].to_image[5].tolist() == [[64, 0, 0], [0, 32, 0]]
    assert needed.per_image == pytest.approx(
        saved_bytes(lambda: learner(views), learner) / 6, rel=0.1
    )


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))


def test_a_trial_leaves_the_learner_and_the_dice_as_they_were() -> None:
    learner = PixelCL(net(), 32)
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    dice = torch.get_rng_state()
    with unchanged(learner):
        learner(blank_views(4, learner, (32, 32), torch.device("cpu"))).backward()
    assert all(torch.equal(before[n], b) for n, b in learner.named_buffers())
    assert all(p.grad is None for p in learner.parameters())
    assert torch.equal(dice, torch.get_rng_state())


@pytest.mark.parametrize(("state", "tensors"), [({}, 2), ({"a weight": "its moments"}, 0)])
def test_a_trial_makes_room_for_the_optimiser_unless_it_is_there(state, tensors, monkeypatch):
    learner, tensors_made, empty_like = PixelCL(net(), 32), [], torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda tensor: tensors_made.append(tensor) or empty_like(tensor)
    )
    step = SimpleNamespace(
        learner=learner,
        fabric=SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext),
        plan=SimpleNamespace(optimizer="adamw", view_size=(32, 32)),
        optimizer=SimpleNamespace(state=state),
    )
    try_size(step, 2)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    counts = [sum(parameter is tensor for tensor in tensors_made) for parameter in trained]
    assert counts == [tensors] * len(trained)
    assert any(parameter.grad is not None for parameter in trained)


class Arriving:
    """The event of a copy that the device has not done."""

    def query(self) -> bool:
        return False


@pytest.mark.parametrize(("processes", "judged"), [(1, [False, False]), (2, [False, True])])
def test_processes_judge_the_same_step_however_fast_their_devices_are(processes, judged) -> None:
    figures = MetricsWriter(SimpleNamespace(world_size=processes), None, PLAN, lambda: 0.0, [])
    arrived = []
    for _ in judged:
        figures.sent.append(SimpleNamespace(event=Arriving()))
        arrived.append(figures.has_arrived())
    assert arrived == judged


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "success"), (NotFiniteError, "failed"), (KeyboardInterrupt, "failed")],
)
def test_loggers_are_told_how_a_run_ended(error, status) -> None:
    ended: list[str] = []
    logger = SimpleNamespace(finalize=ended.append)
    writer = MetricsWriter(SimpleNamespace(world_size=1), None, PLAN, lambda: 0.0, [logger])
    with suppress(NotFiniteError, KeyboardInterrupt), writer.recording(0):
        if error is not None:
            raise error
    assert ended == [status]


@pytest.mark.skipif(not FULL_DISK.exists(), reason="no device stands for a full disk here")
def test_a_log_on_a_full_disk_hides_no_error(capsys) -> None:
    def broken() -> None:
        with logging_to(terminal=False) as log:
            log.open(FULL_DISK)
            LOG.info("lost")
            raise NotFiniteError("step 3")

    with pytest.raises(NotFiniteError, match="step 3"):
        broken()
    assert capsys.readouterr().err == ""


def test_a_trial_waits_for_no_other_process() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4))
    net[1].requires_grad_(False)
    with unchanged(net):
        assert [module.training for module in net] == [True, False, True]
    assert [module.training for module in net] == [True, True, True]
