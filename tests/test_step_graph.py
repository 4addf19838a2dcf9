"""Steps as one graph: captured and replayed, compared with steps as they are, or refused.

A stand-in for CUDA graphs takes the step again, on the same tensors. That nothing in a step reads a
tensor's value is shown on tensors that have none.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_nets import SmallNet, overlapping_views
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pixel_level_contrastive_learning import CapturedStep, PixelCL, View, augment, step_graph
from pixel_level_contrastive_learning.augment import VIEW_ONE, VIEW_TWO, Factors, change_both
from pixel_level_contrastive_learning.step_graph import (
    WARM_UP,
    CaptureError,
    StepGraph,
    check_changes,
    check_memory,
    check_results,
    each_tensor,
    tensors_in,
    why_not,
)

STEPS = WARM_UP + 4
RATE = 0.05


def parts(dropout: float = 0.0, **settings: Any) -> tuple[PixelCL, torch.optim.Optimizer]:
    """A small learner, the same at every call, and its optimiser: Adam would magnify rounding."""
    torch.manual_seed(0)
    small = {"projection_size": 16, "projection_hidden_size": 32, "moving_average_decay": 0.25}
    net = SmallNet()
    net.deep = nn.Sequential(net.deep, nn.Dropout(dropout))
    learner = PixelCL(net, 64, **small, **settings)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    return learner, torch.optim.SGD(trained, lr=RATE, momentum=0.9, fused=True)


def batches() -> Iterator[tuple[View, View]]:
    torch.manual_seed(1)
    for _ in range(STEPS):
        yield overlapping_views()


def decay(number: int) -> float | None:
    """Now the learner's own, now another."""
    return 0.5 if number % 2 else None


def taken_one_by_one(**settings: Any) -> tuple[PixelCL, list[float]]:
    """A learner after some steps of a plain loop, and their losses."""
    learner, opt = parts(**settings)
    losses = []
    for number, views in enumerate(batches()):
        opt.param_groups[0]["lr"] = RATE / (1 + number)
        loss = learner(views)
        opt.zero_grad()
        loss.backward()
        opt.step()
        learner.update_moving_average(decay(number))
        losses.append(loss.item())
    return learner, losses


def captured(step: CapturedStep, opt: torch.optim.Optimizer) -> list[float]:
    """The losses of the same steps, captured."""
    losses = []
    for number, views in enumerate(batches()):
        opt.param_groups[0]["lr"] = RATE / (1 + number)
        losses.append(step(views, decay(number)))
    return [loss.item() for loss in losses]  # each its own, whatever the graph does later


def same_weights(one: PixelCL, two: PixelCL) -> None:
    for (name, tensor), other in zip(
        one.state_dict().items(), two.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_captured_steps_do_what_a_plain_loop_does(dropout, repeated) -> None:
    expected, losses = taken_one_by_one(dropout=dropout)
    learner, opt = parts(dropout=dropout)
    step = CapturedStep(learner, opt)
    assert captured(step, opt) == pytest.approx(losses, abs=1e-4)
    assert step.refused is None
    assert step.graph.graph.replays == STEPS - WARM_UP
    same_weights(learner, expected)
    rate = opt.param_groups[0]["lr"]
    assert (type(rate), rate) == (float, RATE / STEPS)  # as a checkpoint has it


def test_on_a_cpu_steps_are_taken_as_they_are() -> None:
    expected, losses = taken_one_by_one()
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    assert captured(step, opt) == pytest.approx(losses, abs=1e-4)
    assert step.refused == "CUDA graphs run on GPUs of NVIDIA, and the device is cpu"
    same_weights(learner, expected)


def forget_the_target(graph: StepGraph) -> None:
    graph.learner.update_moving_average = lambda _: None  # type: ignore[method-assign]


def forget_the_optimiser(graph: StepGraph) -> None:
    graph.optimizer.step = lambda: None  # type: ignore[method-assign]


def keep_the_first_rate(graph: StepGraph) -> None:
    graph.rates = [torch.tensor(RATE)]


def see_another_batch(graph: StepGraph) -> None:
    graph.fixed = each_tensor(graph.fixed, lambda x: x.square() if x.ndim == 4 else x)


def give_another_loss(graph: StepGraph) -> None:
    step = graph.step
    graph.step = lambda *batch: tuple(result * 1.1 for result in step(*batch))


def fail(_: StepGraph) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def fail_without_a_word(_: StepGraph) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (forget_the_target, "CaptureError: the graph leaves target that differ"),
        (forget_the_optimiser, "CaptureError: the graph leaves weights that differ"),
        (keep_the_first_rate, "CaptureError: the graph leaves weights that differ"),
        (see_another_batch, "CaptureError: the graph leaves weights that differ"),
        (give_another_loss, "CaptureError: the graph gives results that differ"),
        (fail, "RuntimeError: operation not permitted when stream is capturing"),
        (fail_without_a_word, "AssertionError"),
    ],
)
def test_a_graph_that_does_something_else_is_refused_and_no_step_is_lost(
    spoil, why, repeated, monkeypatch
) -> None:
    expected, losses = taken_one_by_one()
    learner, opt = parts()
    step = CapturedStep(learner, opt)

    def spoilt(graph: StepGraph) -> Any:
        kept.update(vars(graph))
        spoil(graph)
        return repeated(graph)

    kept: dict[str, Any] = {}
    monkeypatch.setattr(StepGraph, "recorded", spoilt)
    found = []
    for number, views in enumerate(batches()):
        opt.param_groups[0]["lr"] = RATE / (1 + number)
        found.append(step(views, decay(number)).item())
        if number == WARM_UP:
            assert step.refused.startswith(why)
            vars(step.graph).update({name: kept[name] for name in ("fixed", "rates", "step")})
            learner.__dict__.pop("update_moving_average", None)
            opt.__dict__.pop("step", None)
    assert found == pytest.approx(losses, abs=1e-4)
    same_weights(learner, expected)


def replace_a_buffer(_: StepGraph, net: nn.Module) -> None:
    net.norm.running_mean = net.norm.running_mean * 1.0


def run_out_of_memory(graph: StepGraph, _: nn.Module) -> None:
    if graph.calls == WARM_UP + 1 and not graph.refused:
        raise torch.OutOfMemoryError("no memory for both")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (replace_a_buffer, "CaptureError: the step puts new tensors in the place of old ones"),
        (run_out_of_memory, "OutOfMemoryError: no memory for both"),
    ],
)
@pytest.mark.usefixtures("repeated")
def test_a_comparison_that_fails_loses_no_step(spoil, why) -> None:
    expected, losses = taken_one_by_one()
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    taken = step.graph.step

    def spoilt(*batch: Any) -> tuple[torch.Tensor, ...]:
        results = taken(*batch)
        spoil(step.graph, learner.net)
        return results

    step.graph.step = spoilt
    assert captured(step, opt) == pytest.approx(losses, abs=1e-4)
    assert step.refused == why
    same_weights(learner, expected)


@pytest.mark.usefixtures("repeated")
def test_what_a_graph_does_not_follow_ends_it() -> None:
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    captured(step, opt)
    torch.optim.lr_scheduler.ConstantLR(opt)
    step(overlapping_views())
    assert step.refused is None
    opt.load_state_dict(opt.state_dict())
    step(overlapping_views())
    assert step.refused == "CaptureError: the optimiser holds another state than when captured"
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    captured(step, opt)
    opt.param_groups[0]["momentum"] = 0.5
    step(overlapping_views())
    assert step.refused.endswith("a number of the optimiser changed that is no learning rate")


def freeze_the_stem(learner: PixelCL) -> None:
    learner.net.stem.requires_grad_(False)


def freeze_batch_norm(learner: PixelCL) -> None:
    learner.net.norm.eval()


def turn_the_pixel_loss_off(learner: PixelCL) -> None:
    learner.alpha = 0


@pytest.mark.usefixtures("repeated")
@pytest.mark.parametrize("change", [freeze_the_stem, freeze_batch_norm, turn_the_pixel_loss_off])
def test_a_graph_ends_where_the_learner_is_changed(change) -> None:
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    captured(step, opt)
    change(learner)
    step(overlapping_views())
    assert step.refused == (
        "CaptureError: a setting or mode of the learner changed, or which weights learn"
    )


@pytest.mark.parametrize("after", [1, STEPS])
def test_weights_may_join_the_optimiser_later(after, repeated) -> None:
    learner, _ = parts()
    heads = [p for n, p in learner.named_parameters() if p.requires_grad and "encoder.net" not in n]
    opt = torch.optim.SGD(heads, lr=RATE, fused=True)
    step, views = CapturedStep(learner, opt), overlapping_views()
    for _ in range(after):
        step(views)
    stem = learner.net.stem.weight
    before = stem.detach().clone()
    opt.add_param_group({"params": list(learner.net.parameters()), "lr": RATE / 2})
    step(views)
    torch.testing.assert_close(stem, before - RATE / 2 * stem.grad)
    assert (step.refused is None) == (after == 1)


def test_the_first_cause_of_a_failed_capture_is_told() -> None:
    learner, opt = parts()
    graph = CapturedStep(learner, opt).graph
    try:
        try:
            raise RuntimeError("the network asks for a value")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        graph.give_up(error)
    assert graph.refused == "RuntimeError: the network asks for a value"


@pytest.mark.parametrize(
    ("found", "agrees"),
    [((2.0, 1.5, 300.0), True), ((2.08, 1.5, 300.0), True), ((0.0, 1.5, 300.0), False)],
)
def test_each_of_a_few_results_is_compared_by_itself(found, agrees) -> None:
    expected = (torch.tensor([2.0, 1.5, 300.0]),)
    with nullcontext() if agrees else pytest.raises(CaptureError, match="differ by 2 from the"):
        check_results((torch.tensor(found),), expected)


def test_changes_are_compared_tensor_by_tensor() -> None:
    old, new = torch.zeros(100), torch.ones(100)
    flags, mask = torch.tensor([True]), torch.tensor([-torch.inf])
    before = {"buffers": [old, torch.zeros(2), flags, mask]}
    after = {"buffers": [new, torch.ones(2), flags, mask]}
    check_changes(after, before, after)
    stuck = {"buffers": [new, torch.zeros(2), flags, mask]}
    with pytest.raises(CaptureError, match="leaves a tensor of the buffers that the step moves"):
        check_changes(stuck, before, after)
    off = {"buffers": [new, torch.full((2,), 6.0), flags, mask]}  # by 10, where all moved by 102
    check_changes(off, before, after)
    counted = ({"optimiser": [torch.tensor(count)]} for count in (2.0, 1.0, 3.0))
    with pytest.raises(CaptureError, match=r"counts to 2.* in the optimiser, the step to 3"):
        check_changes(*counted)


def test_without_memory_for_the_comparison_steps_are_taken_as_they_are(
    repeated, monkeypatch
) -> None:
    def full(_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(step_graph, "copies", full)
    expected, losses = taken_one_by_one()
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    assert captured(step, opt) == pytest.approx(losses, abs=1e-4)
    assert step.refused == "OutOfMemoryError: no memory"
    same_weights(learner, expected)


def test_a_graph_that_fills_the_gpu_is_refused(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 8 * 2**30))
    check_memory(gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**29, 8 * 2**30))
    with pytest.raises(CaptureError, match="leaves 512 MiB of 8192 free"):
        check_memory(gpu)
    check_memory(gpu, spare=2**29)


def test_a_batch_of_another_shape_is_refused_with_the_way_out() -> None:
    learner, opt = parts()
    step = CapturedStep(learner, opt)
    step(overlapping_views(4))
    with pytest.raises(ValueError, match=r"\(3, 3, 64, 64\) where the first one had \(4, 3, 64"):
        step(overlapping_views(3))


def test_settings_that_cannot_be_are_refused() -> None:
    learner, opt = parts()
    with pytest.raises(ValueError, match=r"dtype is torch\.float16; it must be torch\.bfloat16"):
        CapturedStep(learner, opt, torch.float16)
    with pytest.raises(ValueError, match="learner is a DataParallel; it must be the PixelCL its"):
        CapturedStep(nn.DataParallel(learner), opt)
    assert CapturedStep(torch.compile(learner, backend="eager"), opt).refused
    with pytest.raises(ValueError, match="decay is 2; it must be a number from 0 to 1"):
        CapturedStep(learner, opt)(overlapping_views(), decay=2)


def test_an_optimiser_that_reads_its_rate_on_the_host_is_named() -> None:
    weights, gpu = [nn.Parameter(torch.zeros(3))], torch.device("cuda")
    message = "SGD reads its learning rate on the host"
    assert why_not(torch.optim.SGD(weights, lr=0.1), gpu) == message
    assert why_not(torch.optim.SGD(weights, lr=0.1, fused=True), gpu) is None
    assert why_not(torch.optim.AdamW(weights), gpu) is None


def test_images_are_taken_as_the_learner_takes_them() -> None:
    learner, _ = parts()
    images = torch.rand(4, 3, 90, 70)
    torch.manual_seed(5)
    expected = learner(images).item()
    step = CapturedStep(*parts())
    torch.manual_seed(5)
    found = step(images)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert not found.requires_grad


# Nothing on a device is read.


def without_values(nested: Any, device: str) -> Any:
    """The same tensors or module, on a device, without values."""
    if not isinstance(nested, nn.Module):
        return each_tensor(nested, lambda x: torch.empty(x.shape, dtype=x.dtype, device=device))
    for module in nested.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return nested


@pytest.fixture
def _reads_no_factor(monkeypatch) -> None:
    """Colour as on a device whose factors are not read."""
    monkeypatch.setattr(augment, "READ_AT_ONCE", ())


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_pixpro": False}, {"pixel_levels": 2}, {"alpha": 0}, {"instance_weight": 0}],
    ids=str,
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_step_reads_no_value(device, settings, monkeypatch) -> None:
    """On a GPU without one the forward pass alone can be asked for; the CPU does the rest."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("pixel_level_contrastive_learning.inputs.ValueWatch.judge", lambda *_: None)
    learner, opt = parts(**settings)
    step = CapturedStep(learner, opt)
    views = overlapping_views()
    with FakeTensorMode(), nullcontext() if device == "cpu" else torch.no_grad():
        without_values(learner, device)
        if device == "cuda":
            assert learner(without_values(views, device)).device.type == "cuda"
            learner.update_moving_average(torch.zeros((), device=device))
            return
        trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        step.graph.optimizer = torch.optim.AdamW(trained, fused=True)
        step.graph.optimizer.param_groups[0]["lr"] = torch.zeros(())
        [loss] = step.step(*without_values(views, device), torch.zeros(()))
        assert loss.shape == ()


@pytest.mark.usefixtures("_reads_no_factor")
def test_colour_is_changed_by_factors_that_are_never_read() -> None:
    factors = VIEW_ONE.draw(6), VIEW_TWO.draw(6)
    pixels = torch.rand(6, 3, 40, 30)
    with FakeTensorMode():
        one, two = (without_values(drawn, "cuda") for drawn in factors)
        given = without_values((pixels, pixels), "cuda")
        changed, _ = change_both(given, (Factors(*one), Factors(*two)))
    assert (changed.shape, changed.device.type) == (pixels.shape, "cuda")


def test_colour_by_masks_is_colour_sample_by_sample(monkeypatch) -> None:
    torch.manual_seed(3)
    pixels = torch.rand(2, 32, 3, 40, 30)
    factors = VIEW_ONE.draw(32), VIEW_TWO.draw(32)
    expected = change_both(tuple(pixels), factors)
    monkeypatch.setattr(augment, "READ_AT_ONCE", ())
    found = change_both(tuple(pixels), factors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(len(set(factor.tolist())) > 2 for factor in factors[0][:2])
    assert 0 < factors[1].solarise.sum() < 32
    assert 0 < (factors[1].sigma > 0).sum() < 32


def test_tensors_of_nested_tuples() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    nested = (View(one, two), (two, [one]))
    assert [len(tensor) for tensor in tensors_in(nested)] == [1, 2, 2, 1]
    changed = each_tensor(nested, lambda tensor: tensor + 1)
    assert isinstance(changed[0], View)
    assert changed[1][1][0].item() == 1
