"""On an accelerator: the same numbers, no waiting for the device, and errors a step later."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_cards import preparation
from small_nets import SmallNet, overlapping_views
from torch import Tensor, nn

from pixel_level_contrastive_learning import CapturedStep, PixelCL, View, blocks, pretrain
from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.evaluation.finetuning import CROP_DETAIL, finetune
from pixel_level_contrastive_learning.evaluation.metrics import PreparedSplit
from pixel_level_contrastive_learning.evaluation.probes import ProbeTask, run_probes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_pixpro": False},
    {"alpha": 0},
    {"instance_weight": 0},
    {"ppm_num_layers": 2, "max_rotation": 30, "cutout_ratio_range": (0.1, 1.0)},
]


def small_learner(**settings: Any) -> PixelCL:
    """A learner on a small network on the CPU, the same at every call."""
    torch.manual_seed(0)
    return PixelCL(SmallNet(), 64, projection_size=16, projection_hidden_size=32, **settings)


def views(device: str) -> tuple[View, View]:
    """Ready views that overlap, the same on each device."""
    torch.manual_seed(1)
    one, two = (View(*(part.to(device) for part in view)) for view in overlapping_views())
    return one, two


@pytest.fixture(params=[20, blocks.ENTRIES], ids=["several blocks", "one block"], autouse=True)
def _blocks(request, monkeypatch) -> None:
    """Tables of cells in several blocks and in one."""
    monkeypatch.setattr(blocks, "ENTRIES", request.param)


@pytest.fixture
def _full_float32() -> Iterator[None]:
    """Convolutions that do not round to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradients_are_those_of_the_cpu(settings) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        learner = small_learner(**settings).to(device)
        terms = learner(views(device), return_terms=True)
        terms.loss.backward()
        grads = [weight.grad for weight in learner.parameters() if weight.grad is not None]
        runs.append([tensor.detach().cpu() for tensor in (*terms, *grads)])
    # Biases before a batch norm have no gradient but rounding, beside others of about 1.
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ready", [True, False], ids=["views", "images"])
def test_a_step_never_waits_for_the_device(settings, ready, no_waiting) -> None:
    learner = small_learner(**settings).cuda()
    opt = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    images: Any = views("cuda") if ready else torch.rand(4, 3, 300, 200, device="cuda")

    def step() -> None:
        terms = learner(images, return_terms=True)
        opt.zero_grad()
        terms.loss.backward()
        opt.step()
        learner.update_moving_average()

    step()  # what is loaded and allocated at first may wait
    with no_waiting():
        for _ in range(3):
            step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_a_float32_loss_near_that_of_float32(dtype) -> None:
    learner, pair = small_learner().cuda().eval(), views("cuda")
    expected = learner(pair)
    with torch.autocast("cuda", dtype=dtype):
        loss = learner(pair)
    loss.backward()
    assert loss.dtype == torch.float32
    off = 4 * torch.finfo(dtype).eps  # cosines are rounded by eps / 2, in layers before and in them
    torch.testing.assert_close(loss, expected, rtol=0, atol=off)
    grads = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_are_taken_under_autocast(dtype) -> None:
    learner = small_learner().cuda()
    images = torch.rand(16, 3, 80, 100, device="cuda")  # some blurred in the second view, some not
    with torch.autocast("cuda", dtype=dtype):
        views, loss = learner.views(images), learner(images)
    assert [view.pixels.dtype for view in views] == [torch.float32] * 2
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("value", "text"), [(torch.nan, "NaN or infinite"), (300.0, "values from")], ids=["NaN", "300"]
)
def test_a_broken_image_is_named_a_step_later(value, text) -> None:
    learner, images = small_learner().cuda(), torch.rand(4, 3, 80, 80, device="cuda")
    broken = images.clone()
    broken[2, 0, 0, 0] = value

    def two_steps() -> None:
        learner(broken)
        torch.cuda.synchronize()
        learner(images)

    with pytest.raises(ValueError, match=rf"image 2 of the batch has {text}"):
        two_steps()


def test_a_learner_can_be_copied_while_values_are_under_way() -> None:
    learner = small_learner().cuda()
    images = torch.rand(4, 3, 80, 80, device="cuda")
    learner(images)
    assert copy.deepcopy(learner)(images).isfinite()


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_probes_judge_as_on_the_cpu(labelled, protocol) -> None:
    train, val = open_labelled(labelled)
    rows = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 4, 1)).to(device)
        reader = Reader(net, ["0"], 3, (32, 48))
        task = ProbeTask(protocol, PreparedSplit(train, preparation(32)), ("0",))
        (scored,) = run_probes(reader, [task], PreparedSplit(val, preparation(32)), keep=[1])
        rows.append((scored.scores.miou, scored.kept[1]))
    (expected, known), (found, predicted) = rows
    assert predicted.device.type == "cpu"
    assert found == pytest.approx(expected, abs=0.01)
    assert (predicted == known).float().mean() > 0.99


def test_fine_tuning_runs_where_the_network_is(labelled) -> None:
    train, val = open_labelled(labelled)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2)).cuda()
    crops, whole = (
        PreparedSplit(train, preparation(32), CROP_DETAIL),
        PreparedSplit(val, preparation(32)),
    )
    scored = finetune(net, crops, whole, steps=60, batch=4)
    assert scored.scores.miou > 0.6
    assert next(net.parameters()).device.type == "cuda"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [*SETTINGS, {"pixel_levels": 2}], ids=str)
def test_fifty_captured_steps_do_what_fifty_steps_do(settings, dtype) -> None:
    pairs = [overlapping_views() for _ in range(50)]

    def trained(*, by_graph: bool) -> tuple[PixelCL, list[float]]:
        learner = small_learner(**settings).cuda()
        weights = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        opt = torch.optim.SGD(weights, lr=0.01, momentum=0.9, fused=True)
        step, losses = CapturedStep(learner, opt, dtype), []
        if not by_graph:
            step.graph.refused = "is compared"
        for pair in pairs:
            views = tuple(View(*(part.cuda() for part in view)) for view in pair)
            losses.append(step(views))
        assert by_graph == (step.refused is None), step.refused
        assert by_graph == (step.graph.graph is not None)
        return learner, [loss.item() for loss in losses]

    (one, expected), (two, losses) = trained(by_graph=False), trained(by_graph=True)
    assert losses == pytest.approx(expected, rel=0.02, abs=0.02)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0.1, atol=0.02, msg=name)


def test_a_replayed_step_never_waits_and_follows_the_learning_rate(no_waiting) -> None:
    learner = small_learner().cuda()
    opt = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    step = CapturedStep(learner, opt)
    pair = views("cuda")
    for _ in range(5):
        step(pair)
    assert step.refused is None
    with no_waiting():
        step(pair)
    before = learner.online_encoder.net.stem.weight.clone()
    opt.param_groups[0]["lr"] = 0.0
    step(pair)
    assert torch.equal(learner.online_encoder.net.stem.weight, before)


def test_a_network_that_asks_the_device_is_trained_kernel_by_kernel() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if x.sum().item() > 1e9 else 1)

    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Dropout(), Asks(), nn.Conv2d(8, 12, 2, 2))
    learner = PixelCL(net, 64, projection_size=16, projection_hidden_size=32).cuda()
    step = CapturedStep(learner, torch.optim.AdamW(learner.parameters(), lr=1e-3))
    losses = [step(views("cuda")).item() for _ in range(8)]
    assert step.refused
    assert len(set(losses)) == 8  # dropout goes on drawing, and weights change


def test_a_run_on_a_gpu_is_captured(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    images = [torch.rand(3, 80, 80) for _ in range(32)]
    small = {"model": "torchvision/resnet18", "image_size": 64, "batch_size": 8, "steps": 12}
    done = [
        pretrain(images, tmp_path / graph, graph=graph, workers=0, lr=1e-4, **small)
        for graph in ("off", "auto")
    ]
    assert "kernel by kernel" not in caplog.text
    off, auto = (run.metrics for run in done)
    assert auto["loss"] == pytest.approx(off["loss"], rel=0.1)
