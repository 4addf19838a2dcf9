"""What the learner promises to everyone who hands it a backbone, one section a promise."""

import copy
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Calls, SmallNet, overlapping_views
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchvision import models

from pixel_level_contrastive_learning import PixelCL, View


def draw(_: nn.Module, x: Tensor) -> Tensor:
    """Some noise on a map."""
    return x + torch.rand(()) + torch.rand_like(x)


class Net(SmallNet):
    """A small network whose deep layer is a block; a noisy one draws random numbers there."""

    def __init__(self, channels: int = 3, noisy: bool = False) -> None:
        super().__init__(channels)
        noise = (nn.Dropout(0.5), Calls(draw)) if noisy else ()
        self.deep = nn.Sequential(self.deep, nn.Tanh(), *noise)


def learner_of(net: nn.Module, **settings: Any) -> PixelCL:
    """A learner with small heads, the same for the same weights."""
    torch.manual_seed(0)
    return PixelCL(net, 64, projection_size=8, projection_hidden_size=16, **settings)


def small_learner(channels: int = 3, **settings: Any) -> PixelCL:
    """A learner on a small network, the same at every call."""
    torch.manual_seed(0)
    return learner_of(Net(channels), channels=channels, **settings)


def train(learner: PixelCL, steps: int = 3, side: int = 80) -> list[float]:
    """The losses of a short run on noise."""
    opt = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = learner(torch.rand(4, learner.views.channels, side, side))
        opt.zero_grad()
        loss.backward()
        opt.step()
        learner.update_moving_average()
        losses.append(loss.item())
    return losses


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its weights and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether names and numbers are equal, bit for bit."""
    return one.keys() == two.keys() and all(map(torch.equal, one.values(), two.values()))


settings_of_both = pytest.mark.parametrize("settings", [{}, {"use_pixpro": False}], ids=str)


# 1. Building a learner leaves the backbone as it was.


def hooks(net: nn.Module) -> dict[str, list[Any]]:
    """Every hook of every kind on every module, and everything else that a module has."""
    found = {}
    for name, module in net.named_modules():
        for attribute, value in vars(module).items():
            hooked = "hook" in attribute and isinstance(value, (dict, OrderedDict))
            found[f"{name}.{attribute}"] = list(value.items()) if hooked else None
    return found


def note(*_: Any) -> None:
    """A hook of the user's."""


def test_building_leaves_weights_modes_and_hooks_as_they_were() -> None:
    net = Net(noisy=True)
    net.deep.eval()
    net.norm.eval()
    net.stem.weight.requires_grad_(False)
    net.deep.register_forward_hook(note)
    net.stem.register_forward_pre_hook(note)
    net.pool.register_full_backward_hook(note)
    before = state(net), hooks(net), [module.training for module in net.modules()]
    assert sum(bool(value) for value in before[1].values()) == 3
    tensors = [id(tensor) for tensor in (*net.parameters(), *net.buffers())]
    grads = [(parameter.requires_grad, parameter.grad) for parameter in net.parameters()]

    learner = learner_of(net)
    assert learner.net is net
    assert same_state(state(net), before[0])
    assert hooks(net) == before[1]
    assert [module.training for module in net.modules()] == before[2]
    assert [id(tensor) for tensor in (*net.parameters(), *net.buffers())] == tensors
    assert [(parameter.requires_grad, parameter.grad) for parameter in net.parameters()] == grads


def test_building_draws_for_the_heads_alone() -> None:
    """A network that draws and one that does not leave the same to draw."""
    others = random.getstate(), str(np.random.get_state())
    drawn = []
    for noisy in (True, False):
        learner = learner_of(Net(noisy=noisy).train())
        drawn.append((torch.get_rng_state(), *learner.online_predictor.parameters()))
    assert all(map(torch.equal, *drawn))
    assert (random.getstate(), str(np.random.get_state())) == others


# 2. What is saved is the backbone alone; what is restored is the learner whole.


@pytest.mark.parametrize("steps", [0, 2])
def test_a_trained_backbone_holds_nothing_of_ours(steps) -> None:
    net = models.resnet18()
    names = list(net.state_dict())
    clean = hooks(net)
    train(learner_of(net), steps)
    assert hooks(net) == clean
    assert list(net.state_dict()) == names
    saved = io.BytesIO()
    torch.save(net, saved)
    assert b"pixel_level" not in saved.getvalue()
    saved.seek(0)
    for copied in (copy.deepcopy(net), torch.load(saved, weights_only=False)):
        assert type(copied) is models.ResNet
        assert hooks(copied) == clean
        assert same_state(state(copied), state(net))


def test_a_state_dict_restores_the_learner_with_its_target() -> None:
    trained = small_learner()
    train(trained)
    torch.manual_seed(1)
    restored = PixelCL(Net(), 64, projection_size=8, projection_hidden_size=16)
    assert not same_state(state(restored), state(trained))
    restored.load_state_dict(trained.state_dict())
    assert same_state(state(restored), state(trained))
    target = state(trained.target_encoder)
    assert not same_state(target, state(trained.online_encoder))
    pair = overlapping_views()
    assert restored(pair) == trained(pair)
    runs = []
    for learner in (restored, trained):
        torch.manual_seed(2)
        runs.append((train(learner), state(learner)))
    assert runs[0][0] == runs[1][0]
    assert same_state(runs[0][1], runs[1][1])


def reloaded(learner: PixelCL) -> PixelCL:
    """The learner after it went to disk and back."""
    saved = io.BytesIO()
    torch.save(learner, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pytest.mark.parametrize("copies", [copy.deepcopy, reloaded])
def test_a_learner_can_be_copied_and_saved_whole(copies) -> None:
    learner, pair = small_learner(), overlapping_views()
    train(learner)
    other = copies(learner)
    assert other.net is not learner.net
    assert other(pair) == learner(pair)
    train(other)
    assert other.net.stem.weight.ne(learner.net.stem.weight).all()


# 3. One seed fixes a run.


def run(seed: int, others: int, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """A run with everything drawn that can be, and what Python and numpy draw beside it."""
    random.seed(others)
    np.random.seed(others)
    torch.manual_seed(seed)
    net = Net(noisy=True)
    learner = PixelCL(
        net,
        64,
        projection_size=8,
        projection_hidden_size=16,
        prob_rand_vflip=0.5,
        max_rotation=20,
        **settings,
    )
    return train(learner), state(learner)


@settings_of_both
def test_one_seed_fixes_a_run_bit_for_bit(settings) -> None:
    losses, weights = run(1, 1, **settings)
    again, same_weights = run(1, 2, **settings)
    assert losses == again
    assert same_state(weights, same_weights)
    different, _ = run(2, 1, **settings)
    assert not set(losses) & set(different)


# 6. Any image.


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(64, 64), (20, 33), (300, 90), (97, 640)], ids=str)
def test_images_of_any_size_and_channels_are_learned_from(channels, size) -> None:
    learner = small_learner(channels)
    learner(torch.rand(2, channels, *size)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in learner.net.stem.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_images_of_any_float_are_learned_from(dtype) -> None:
    learner, images = small_learner().eval(), (torch.rand(2, 3, 80, 80) * 255).round() / 256
    losses = []
    for kind in (torch.float32, dtype):  # even bfloat16 holds multiples of 1 / 256
        torch.manual_seed(1)
        losses.append(learner(images.to(kind)))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


GOOD = torch.rand(2, 3, 80, 80)


# What else is refused, and how: tests of the inputs.
@pytest.mark.parametrize(
    ("images", "texts"),
    [
        ((GOOD * 255).byte(), ["torch.uint8", "float", "images.float() / 255"]),
        (GOOD[:, :1], ["1 channels", "built for 3", "images.expand(-1, 3, -1, -1)"]),
        (GOOD[..., :8], ["80x8", "at least 16x16"]),
        (GOOD * 255, ["values from", "[0, 1]", "255"]),
        ((GOOD, GOOD), ["View", "to_image"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_no_image_is_refused_with_what_to_do(images, texts) -> None:
    with pytest.raises(ValueError) as error:
        small_learner()(images)
    for text in texts:
        assert text in str(error.value)


# 7. No batch makes it crash or go NaN.


@settings_of_both
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_stay_finite(value, settings) -> None:
    learner = small_learner(**settings)
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(2):
        terms = learner(torch.full((2, 3, 80, 80), value), return_terms=True)
        opt.zero_grad()
        terms.loss.backward()
        opt.step()
        learner.update_moving_average()
        assert all(term.isfinite() for term in terms)
    assert all(tensor.isfinite().all() for tensor in state(learner).values())


@settings_of_both
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_features_of_zero_stay_finite(mode, settings) -> None:
    """A dead layer gives vectors without direction."""
    learner = getattr(small_learner(**settings), mode)()
    nn.init.zeros_(learner.net.deep[0].weight)
    nn.init.zeros_(learner.net.deep[0].bias)
    nn.init.zeros_(learner.online_encoder.pixel_projector[-2].weight)
    learner.reset_moving_average()
    loss = learner(overlapping_views())
    loss.backward()
    assert loss.isfinite()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in learner.parameters()
    )


@settings_of_both
@pytest.mark.parametrize(
    ("mode", "weight"), [("train", 0), ("eval", 1)], ids=["pixels alone", "eval mode"]
)
def test_a_batch_of_one_is_learned_from_where_batch_norm_allows_it(mode, weight, settings) -> None:
    learner = getattr(small_learner(instance_weight=weight, **settings), mode)()
    loss = learner(torch.rand(1, 3, 80, 80))
    loss.backward()
    assert loss.isfinite()
    assert learner.net.stem.weight.grad.isfinite().all()


@pytest.mark.parametrize("part", ["", "online_encoder"], ids=["all of it", "online in eval mode"])
def test_a_batch_of_one_is_refused_in_train_mode_with_what_to_do(part) -> None:
    learner = small_learner()
    if part:
        learner.online_encoder.eval()
        learner.online_predictor.eval()
    with pytest.raises(ValueError) as error:
        learner(torch.rand(1, 3, 80, 80))
    for text in ("batch of 1", "at least 2 images", "drop_last=True", "instance_weight=0", "eval"):
        assert text in str(error.value)


# 8. The backbone may be converted, compiled or wrapped later.


def to_sync_batch_norm(learner: PixelCL) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    assert isinstance(learner.net.norm, nn.SyncBatchNorm)


def wrap_in_compile(learner: PixelCL, backend: Any = "eager") -> None:
    learner.online_encoder.net = torch.compile(learner.net, backend=backend)


def compile_in_place(learner: PixelCL, backend: Any = "eager") -> None:
    learner.net.compile(backend=backend)


def compile_a_layer(learner: PixelCL) -> None:
    learner.net.deep = torch.compile(learner.net.deep, backend="eager")


def wrap_in_checkpoint(learner: PixelCL) -> None:
    learner.net.deep = checkpoint_wrapper(learner.net.deep)


def wrap_in_data_parallel(learner: PixelCL) -> None:
    learner.online_encoder.net = nn.DataParallel(learner.net)


changes = pytest.mark.parametrize(
    "change",
    [
        to_sync_batch_norm,
        wrap_in_compile,
        compile_in_place,
        compile_a_layer,
        wrap_in_checkpoint,
        wrap_in_data_parallel,
    ],
)
compiling = pytest.mark.usefixtures("fresh_compiler")
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@changes
@compiling
@quiet
@pytest.mark.parametrize("layer", ["norm", "deep", "deep.0"])
def test_hooks_survive_what_is_done_to_the_backbone_later(change, layer) -> None:
    pair, runs = overlapping_views(), []
    for prepare in (lambda _: None, change):
        learner = small_learner(hidden_layer_pixel=layer)
        learner(pair)
        prepare(learner)
        for _ in range(2):
            learner.zero_grad()
            loss = learner(pair)
            loss.backward()
            learner.update_moving_average(0.5)
        grads = [weight.grad for weight in learner.parameters() if weight.requires_grad]
        runs.append((loss, grads, list(learner.target_encoder.buffers())))
    torch.testing.assert_close(*runs)


@compiling
@quiet
@pytest.mark.parametrize("compile_net", [wrap_in_compile, compile_in_place])
@pytest.mark.parametrize("first", ["net", "learner"])
def test_a_compiled_backbone_may_be_used_beside_the_learner(compile_net, first) -> None:
    """As by a probe between two steps: the numbers stay, and the code stays compiled."""
    compilations, executions = [], []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)

        def execute(*inputs: Any) -> Any:
            executions.append(graph)
            return graph.forward(*inputs)

        return execute

    pair, runs = overlapping_views(), []
    for prepare in (lambda *_: None, compile_net):
        learner = small_learner(hidden_layer_pixel="deep")
        prepare(learner, backend)
        if first == "net":
            learner.net(pair[0].pixels)
        losses = []
        for _ in range(3):
            before = len(executions)
            losses.append(learner(pair))
            assert (len(executions) > before) == (prepare is compile_net)
            assert not learner.online_encoder.hooks.outputs
            learner.net(pair[0].pixels)
        runs.append((losses, list(learner.buffers())))
    torch.testing.assert_close(*runs)
    assert len(compilations) <= 2  # one for each use


@compiling
@quiet
def test_a_backbone_compiled_and_used_before_the_learner_is_built_is_read() -> None:
    net, pair = small_learner().net, overlapping_views()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as it is where torch starts
        net.compile(backend="eager")
        net(pair[0].pixels)
        assert PixelCL(net, 64, projection_size=8, projection_hidden_size=16)(pair).isfinite()


# On an accelerator nothing waits for the device: data on `meta` cannot be looked at by the host.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_pixpro": False},
        {"alpha": 0},
        {"instance_weight": 0},
        {"ppm_num_layers": 2, "max_rotation": 30, "cutout_ratio_range": (0.1, 1.0)},
        {"cutout_interpolate_mode": "bicubic", "distance_thres": 100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("ready", [True, False], ids=["views", "images"])
def test_nothing_reads_what_is_on_the_device(settings, ready) -> None:
    learner = small_learner(**settings).to("meta")
    images: Any = torch.rand(4, 3, 500, 90, device="meta")
    if ready:
        images = tuple(View(*(part.to("meta") for part in view)) for view in overlapping_views())
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(2):
        terms = learner(images, return_terms=True)
        loss, pairs = learner(images, return_positive_pairs=True)
        opt.zero_grad()
        (loss + terms.loss).backward()
        opt.step()
        learner.update_moving_average()
    learner.reset_moving_average()
    assert {term.device.type for term in (*terms, pairs)} == {"meta"}
