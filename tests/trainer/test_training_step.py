"""A training step: a batch made ready and split, batch norm over GPUs."""

import copy
import logging
from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.fabric import Fabric
from run_folders import checkpoint, forget, metrics, steps
from small_nets import SmallNet, overlapping_views
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pixel_level_contrastive_learning import PixelCL, augment, pretrain, step_graph
from pixel_level_contrastive_learning.augment import (
    VIEW_ONE,
    VIEW_TWO,
    Factors,
    Normalise,
    Photometry,
    change_colour,
)
from pixel_level_contrastive_learning.data.dataset import TwoViewBatch
from pixel_level_contrastive_learning.step_graph import WARM_UP, StepGraph, why_not
from pixel_level_contrastive_learning.trainer import auto, training_step
from pixel_level_contrastive_learning.trainer.auto import Schedule
from pixel_level_contrastive_learning.trainer.memory import blank_views
from pixel_level_contrastive_learning.trainer.training_step import (
    METRIC_NAMES,
    TrainingStep,
    features_of,
    make_views,
    split_batch,
    step_seed,
)


def batch(images: int) -> TwoViewBatch:
    each = torch.arange(images)
    factors = Factors(*(each for _ in Factors._fields))
    return TwoViewBatch(each, each, each, each, factors, factors, each)


@pytest.mark.parametrize(
    ("images", "parts", "sizes"),
    [
        (24, 4, [6, 6, 6, 6]),
        (25, 8, [3, 3, 3, 3, 3, 3, 3, 4]),
        (9, 5, [2, 2, 2, 3]),
        (7, 3, [2, 2, 3]),
        (5, 1, [5]),
        (3, 3, [3]),
        (1, 1, [1]),
    ],
)
def test_no_part_is_a_single_image(images, parts, sizes) -> None:
    parts_made = list(split_batch(batch(images), parts))
    assert [len(part.one) for part in parts_made] == sizes
    assert torch.equal(torch.cat([part.index for part in parts_made]), torch.arange(images))
    assert torch.equal(
        torch.cat([part.factors_two.hue for part in parts_made]), torch.arange(images)
    )


@pytest.mark.parametrize("one_by_one", [(), ("cpu",)], ids=["as one", "one by one"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
def test_each_view_has_the_colours_and_the_map_drawn_for_it(kind, one_by_one, monkeypatch) -> None:
    monkeypatch.setattr(augment, "ONE_BY_ONE", one_by_one)
    raw = torch.randint(256, (2, 6, 3, 20, 16), dtype=torch.uint8)
    one, two = raw if kind == torch.uint8 else raw / 255
    maps = torch.rand(2, 6, 2, 3)
    factors = VIEW_ONE.draw(6), VIEW_TWO.draw(6)
    normalise = Normalise((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    plan = SimpleNamespace(photometry=(Photometry(sigma=(0.1, 2.0)),) * 2)
    views = make_views(TwoViewBatch(one, two, *maps, *factors, torch.arange(6)), normalise, plan)
    for view, pixels, colours, to_image in zip(views, raw, factors, maps, strict=True):
        assert torch.equal(view.to_image, to_image)
        expected = normalise(change_colour(pixels / 255, colours, 2.0))
        torch.testing.assert_close(view.pixels, expected, atol=1e-5, rtol=0)
        assert view.pixels.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_over_gpus_keeps_the_activations_in_it(monkeypatch) -> None:
    """timm's layers hold one; torch's own conversion leaves it out."""
    net = timm.create_model("test_efficientnet", num_classes=0)
    learner = PixelCL(net, 64, projection_size=8, pixel_levels=2)
    views = blank_views(3, learner, (64, 64), torch.device("cpu"))
    expected = learner(views)
    gpus = SimpleNamespace(
        world_size=2,
        device=SimpleNamespace(type="cuda"),
        setup_module=lambda module: module,
        setup_optimizers=lambda optimizer: optimizer,
    )
    monkeypatch.setattr(training_step, "build_optimizer", lambda *_: torch.optim.Optimizer)
    monkeypatch.setattr(Normalise, "to", lambda normalise, _: normalise)
    step = TrainingStep(gpus, learner, SimpleNamespace(accumulate=1), Normalise((0.5,), (0.5,)))
    norms = [module for module in step.learner.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) > 20
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    torch.testing.assert_close(step.learner(views), expected)


@pytest.mark.parametrize("images", [1, 3, 16, 32])
def test_features_are_those_of_many_cells_and_images(images, monkeypatch) -> None:
    monkeypatch.setattr(training_step, "FEATURES", 32)
    learner = PixelCL(SmallNet(), 64, projection_size=8, projection_hidden_size=8)
    cells, numbers = torch.arange(16.0).reshape(4, 4), torch.arange(float(images))
    maps = torch.zeros(images, 12, 4, 4)
    maps[:, 0], maps[:, 1] = cells, numbers[:, None, None]
    collected: list[torch.Tensor] = []
    with features_of(learner, collected):
        learner.eval().online_encoder.pixel_projector(maps)
    assert len(collected[0]) == min(32, 16 * images)
    counts = [len(collected[0][:, channel].unique()) for channel in (0, 1)]
    assert (counts[0] >= 15, counts[1]) == (True, images)


DONE = 5
"""Steps that were taken before the one below."""
SCHEDULE = Schedule(10, 1, 0, 0.5, 0.0, 0.9)


def one_step(without: int = 1, **changed: float) -> tuple[dict[str, Tensor], PixelCL, PixelCL]:
    """The metrics of a step on 7 images, some without pairs; the learner after and before.

    Batch norm uses its running statistics, so that an image does not hang on the others.
    """
    images = 7
    torch.manual_seed(0)
    heads = {"projection_size": 8, "projection_hidden_size": 8}
    learner = PixelCL(SmallNet(), 64, pixel_levels=2, **heads).eval()
    usual = {"accumulate": 1, "clip_grad": 0, "weight_decay": 0, "seed": 0, "sharded": False}
    photometry = (Photometry(sigma=(0.1, 2.0)),) * 2
    plan = SimpleNamespace(
        schedule=SCHEDULE, optimizer="momentum", photometry=photometry, **usual | changed
    )
    (one, map_one), (two, map_two) = overlapping_views(images)
    map_two = map_two.clone()
    map_two[:without, :, 2] += 1000
    factors = VIEW_ONE.draw(images), VIEW_TWO.draw(images)
    step_batch = TwoViewBatch(one, two, map_one, map_two, *factors, torch.arange(images))
    before = copy.deepcopy(learner)
    fabric = Fabric(accelerator="cpu", devices=1)
    normalise = Normalise((0.5,), (0.2,))
    step = TrainingStep(fabric, learner, plan, normalise)
    step.step = DONE
    result = step(step_batch, keep_features=True)
    assert not result.metrics.requires_grad  # else the whole graph stays in memory
    assert not result.features.requires_grad
    terms = before(make_views(step_batch, normalise, plan), return_terms=True)
    expected = terms._replace(positive_pairs=terms.positive_pairs / images)
    torch.testing.assert_close(result.metrics[:-1], torch.stack(expected).detach())
    return dict(zip(METRIC_NAMES, result.metrics, strict=True)), learner, before


@pytest.mark.parametrize(("parts", "without"), [(2, 1), (3, 1), (2, 6), (3, 7)])
def test_taking_a_batch_in_parts_changes_nothing(parts, without) -> None:
    expected_metrics, expected, before = one_step(without)
    metrics, learner, _ = one_step(without, accumulate=parts)
    assert expected_metrics["images_without_pairs"] == without
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(metrics, expected_metrics, **near)
    torch.testing.assert_close(learner.state_dict(), expected.state_dict(), **near)
    assert distance(expected, before) > 0.1


def test_a_gradient_is_clipped_to_the_norm_asked_for() -> None:
    metrics, learner, before = one_step(clip_grad=0.01)
    assert metrics["grad_norm"] > 0.1  # before it was clipped
    assert distance(learner, before) == pytest.approx(SCHEDULE.lr(DONE) * 0.01, rel=1e-3)


def test_the_target_follows_by_the_momentum_of_the_step() -> None:
    _, learner, before = one_step()
    moves, differences = (
        [now - was for now, was in zip(parameters(learner), parameters(before), strict=True)]
        for parameters in (
            lambda network: list(network.target_encoder.parameters()),
            lambda network: [p.detach() for p in network.online_encoder.parameters()],
        )
    )
    torch.testing.assert_close(
        moves, [(1 - SCHEDULE.momentum(DONE)) * difference for difference in differences]
    )


def distance(one: PixelCL, other: PixelCL) -> float:
    """The norm of the difference in what the optimiser moves."""
    pairs = zip(online(one), online(other), strict=True)
    return torch.cat([(a - b).flatten() for a, b in pairs]).norm().item()


def online(learner: PixelCL) -> list[Tensor]:
    named = learner.named_parameters()
    return [
        parameter.detach() for name, parameter in named if not name.startswith("target_encoder")
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_step_of_each_process_has_a_seed_of_its_own(rank, monkeypatch) -> None:
    monkeypatch.setattr(Fabric, "global_rank", rank)
    one_step()
    assert torch.initial_seed() == step_seed(0, DONE, rank)
    numbers = [(0, 2, 3), (1, 2, 3), (0, 3, 3), (0, 2, 4)]
    assert len({step_seed(*key) for key in numbers}) == len(numbers)


@pytest.mark.parametrize("extra", [{}, {"accumulate": 2, "clip_grad": 0.5, "loss": "pixcontrast"}])
def test_a_captured_run_is_the_run(
    extra, tmp_path, settings, repeated, monkeypatch, caplog
) -> None:
    options = settings(steps=9, optimizer="sgd", lr=0.05, picture_every=4, graph="auto", **extra)
    uncaptured = pretrain(**options | {"out": str(tmp_path / "plain"), "graph": "off"})
    monkeypatch.setattr(auto, "CAPTURED_ON", ("cpu",))
    graphs = []
    monkeypatch.setattr(
        StepGraph, "recorded", lambda graph: graphs.append(graph) or repeated(graph)
    )
    captured = pretrain(**options)
    assert [graph.graph.replays for graph in graphs] == [9 - WARM_UP]
    assert "kernel by kernel" not in caplog.text
    for name in ("loss", "grad_norm", "positive_pairs", "lr", "target_momentum", "effective_rank"):
        expected = [line[name] for line in metrics(uncaptured.run_dir)]
        values = [line[name] for line in metrics(captured.run_dir)]
        assert values == pytest.approx(expected, rel=5e-2), name
    captured_run, reference = (checkpoint(done.run_dir) for done in (captured, uncaptured))
    for one, two in zip(
        *(contents["optimizer_states"] for contents in (captured_run, reference)), strict=True
    ):
        assert one["param_groups"] == two["param_groups"]
    for name, tensor in captured_run["state_dict"].items():
        torch.testing.assert_close(tensor, reference["state_dict"][name], rtol=1e-3, atol=1e-4)


def test_a_captured_run_is_resumed(tmp_path, settings, repeated, monkeypatch) -> None:
    monkeypatch.setattr(auto, "CAPTURED_ON", ("cpu",))
    options = settings(steps=12, checkpoint_every=6, graph="auto")
    expected = pretrain(**options | {"out": str(tmp_path / "whole")})
    pretrain(**options)
    forget(tmp_path / "run", "step-00000012", "last")
    resumed = pretrain(out=tmp_path / "run", resume=True)
    assert resumed.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": "lamb"}, "Lamb reads its learning rate on the host"),
        ({}, "RuntimeError: not permitted"),
    ],
)
def test_what_cannot_be_captured_runs_kernel_by_kernel_and_says_so_once(
    change, reason, settings, repeated, monkeypatch, caplog
) -> None:
    def fail(_: StepGraph) -> None:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(StepGraph, "recorded", fail)
    monkeypatch.setattr(auto, "CAPTURED_ON", ("cpu",))
    if change:
        monkeypatch.setattr(
            step_graph, "why_not", lambda optimizer, _: why_not(optimizer, torch.device("cuda"))
        )
    caplog.set_level(logging.INFO)
    done = pretrain(**settings(steps=8, graph="auto", **change))
    assert steps(done.run_dir) == list(range(1, 9))
    message = f"steps are launched kernel by kernel, not as one CUDA graph: {reason}"
    assert caplog.text.count(message) == 1
