"""Feature hooks: how layers are found, read and laid out."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from small_nets import Calls, SmallNet, chain
from torch import Tensor, nn

from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo
from pixel_level_contrastive_learning.modules.hooks import (
    WRAPPERS,
    FeatureHook,
    FeatureHooks,
    Layout,
    find_layer,
    layout_of,
)

ANY = Layout("b c h w", 8, (4, 4))
"""A layout for tests that do not look at it."""


def caught(net: nn.Module, name: str, x: Tensor, **hook: bool) -> Tensor | None:
    """What a hook on one layer catches."""
    return FeatureHooks(FeatureHook(name, ANY, **hook)).run(net, x).get(name)


# Layout a layer while the network runs.


@pytest.mark.parametrize("name", ["stem", "deep", "pool"])
def test_a_hook_catches_what_its_layer_gives(name) -> None:
    net, x = SmallNet().eval(), torch.rand(2, 3, 64, 64)
    expected = x
    for child, layer in net.named_children():
        expected = layer(expected)
        if child == name:
            break
    assert torch.equal(caught(net, name, x), expected)


def test_a_layer_that_runs_twice_is_caught_the_second_time() -> None:
    net = Calls(lambda net, x: net.add(net.add(x)), add=Calls(lambda _, x: x + 1))
    assert caught(net, "add", torch.zeros(1)) == 2


class Hidden(dict[str, Tensor]):
    """As layers of transformers give it."""

    last_hidden_state = property(lambda self: self["last_hidden_state"])


@pytest.mark.parametrize(
    "several",
    [
        lambda x: (x + 1, x.flatten(2)),
        lambda x: [x + 1, None],
        lambda x: Hidden(pooled=x, last_hidden_state=x + 1),
    ],
    ids=["tuple", "list", "last hidden state"],
)
@pytest.mark.parametrize("overwritten", [True, False])
def test_of_several_values_the_first_tensor_is_caught(several, overwritten) -> None:
    net = chain(stem=nn.Conv2d(3, 8, 8, 8), several=Calls(lambda _, x: several(x)))
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(caught(net, "several", x, overwritten=overwritten), net.stem(x) + 1)
    info = FeatureInfo(net, 3, (64, 64))
    assert info.default_pixels() == ["several"]
    assert info.hook("several", pixel=True).layout[:3] == ("b c h w", 8, (8, 8))


@pytest.mark.parametrize(
    ("several", "count"),
    [
        (lambda x, fine, deep: [x, fine, deep], 3),
        (lambda _, fine, deep: (fine, fine + deep.mean()), 2),
        (lambda _, fine, deep: [fine.flatten(2).mT, deep.flatten(2).mT], 2),
    ],
    ids=["sizes", "one size", "tokens"],
)
def test_of_several_maps_none_stands_for_their_layer(several, count) -> None:
    def forward(net: nn.Module, x: Tensor) -> Sequence[Tensor]:
        fine = net.fine(x)
        return several(x, fine, net.deep(fine))

    encoder = Calls(forward, fine=nn.Conv2d(3, 8, 4, 4), deep=nn.Conv2d(8, 12, 2, 2))
    net = Calls(lambda net, x: net.encoder(x)[-1].mean(), encoder=encoder)
    info = FeatureInfo(net, 3, (64, 64))
    assert info.default_pixels() == ["encoder.deep"]
    text = rf"'encoder' gives {count} values .* \(name a layer inside it\).*: .*encoder\.deep \("
    with pytest.raises(ValueError, match=text):
        info.hook("encoder", pixel=True)


def test_a_layer_that_does_not_run_is_not_caught() -> None:
    net = Calls(lambda net, x: net.used(x), used=nn.Identity(), spare=nn.Identity())
    assert caught(net, "spare", torch.zeros(1)) is None


@pytest.mark.parametrize("overwritten", [True, False])
def test_a_layer_changed_in_place_is_caught_as_it_was(overwritten) -> None:
    net, x = SmallNet().eval(), torch.rand(2, 3, 64, 64)
    before = net.norm(net.stem(x))
    expected = before if overwritten else before.relu()
    assert before.min() < 0  # else the two are the same
    assert torch.equal(caught(net, "norm", x, overwritten=overwritten), expected)


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_hooks_are_on_the_network_only_while_it_runs(fails) -> None:
    seen = []

    def count(_: nn.Module, x: Tensor) -> Tensor:
        seen.append(len(net.stem._forward_hooks))
        if fails:
            raise RuntimeError("out of memory")
        return x

    net = chain(stem=nn.Conv2d(3, 8, 8), end=Calls(count))
    hooks = FeatureHooks(FeatureHook("stem", ANY))
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                hooks.run(net, torch.rand(1, 3, 8, 8))
        else:
            hooks.run(net, torch.rand(1, 3, 8, 8))
        assert not net.stem._forward_hooks
        assert not hooks.outputs
    assert seen == [1, 1]


def test_one_thread_at_a_time_reads_a_network() -> None:
    both = threading.Barrier(2)
    met = []

    def meet(_: nn.Module, x: Tensor) -> Tensor:
        with suppress(threading.BrokenBarrierError):
            met.append(both.wait(timeout=0.3))
        return x

    net, images = chain(stem=Calls(meet)), [torch.zeros(1), torch.ones(1)]
    hooks = [FeatureHooks(FeatureHook("stem", ANY)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda hook, x: hook.run(net, x), hooks, images))
    assert [output["stem"] for output in outputs] == images
    assert not met


# Finding a layer by name, whatever was wrapped around it.


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_a_layer_is_found_through_wrappers(wrapper) -> None:
    inner = chain(stem=nn.Identity(), block=chain(act=nn.ReLU()))
    act = inner.block.act
    inner.block = chain(**{wrapper: inner.block})
    outer = chain(**{wrapper: inner})
    assert find_layer(outer, "block.act") is act
    assert find_layer(outer, "stem") is inner.stem


def test_a_layer_under_its_name_is_found_without_a_look_at_all_others(monkeypatch) -> None:
    net = nn.DataParallel(chain(module=nn.Sequential(nn.ReLU())))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", None)
        assert find_layer(net.module, "module.0") is net.module.module[0]
        assert find_layer(net, "module") is net.module.module
        assert find_layer(net, "module.module") is net.module.module
    with pytest.raises(ValueError, match="no longer has the layer 'weight'"):
        find_layer(nn.Linear(2, 2), "weight")


@pytest.mark.parametrize("name", ["module", "module.0"])
def test_a_layer_may_be_called_like_a_wrapper(name) -> None:
    """Many networks keep a part of theirs under ``module``."""
    net = chain(module=nn.Sequential(nn.Conv2d(3, 8, 8, 8)), head=nn.Conv2d(8, 5, 1))
    hook = FeatureInfo(net, 3, (64, 64)).hook(name, pixel=True)
    assert hook.layout.channels == 8
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(caught(net, hook.name, x), net.module(x))


def test_a_layer_that_was_taken_out_is_named() -> None:
    net = SmallNet()
    del net.deep
    with pytest.raises(ValueError, match=r"(?s)(?=.*no longer)(?=.*'deep')(?=.*new learner)"):
        find_layer(net, "deep")


# What an output can be read as.


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 7, 4, 6), ("b c h w", 7, (4, 6), 0)),
        ((2, 4, 6, 7), ("b h w c", 7, (4, 6), 0)),
        ((2, 64, 96, 3), ("b h w c", 3, (64, 96), 0)),
        ((2, 24, 7), ("b n c", 7, (4, 6), 0)),
        ((2, 25, 7), ("b n c", 7, (4, 6), 1)),
        ((2, 29, 7), ("b n c", 7, (4, 6), 5)),
        ((2, 7), ("b c", 7, (1, 1), 0)),
        ((2, 7, 1, 1), ("b c h w", 7, (1, 1), 0)),
        ((2, 24, 1), ("b c n", 24, (1, 1), 0)),
    ],
    ids=str,
)
def test_convention_how_a_shape_is_read(shape, expected) -> None:
    """Images of 64 x 96 and a stride of 16 make 4 x 6 cells."""
    assert layout_of(torch.zeros(shape), (64, 96), batch=2)[:4] == expected


@pytest.mark.parametrize(
    "output",
    [
        (torch.zeros(2, 7, 4, 6),),
        {"out": torch.zeros(2, 7, 4, 6)},
        None,
        torch.zeros(2, 7, 4, 6, dtype=torch.int64),
        torch.zeros(5, 7, 4, 6),
        torch.zeros(2, 0, 4, 6),
        torch.zeros(2, 7, 1, 4, 6),
        torch.zeros(2),
    ],
    ids=["tuple", "dict", "nothing", "integers", "other batch", "empty", "five axes", "one axis"],
)
def test_what_is_neither_map_nor_tokens_nor_vector_cannot_be_read(output) -> None:
    assert layout_of(output, (64, 96), batch=2) is None


def test_copies_on_several_devices_are_refused() -> None:
    net = nn.DataParallel(SmallNet())
    net.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel over 2 devices.*DistributedDataParallel"):
        find_layer(net, "stem")


def test_an_import_changes_nothing_of_the_compiler() -> None:
    code = """
from torch._dynamo import config
before = config.get_config_copy()
from pixel_level_contrastive_learning import PixelCL
from pixel_level_contrastive_learning.evaluation import features
assert config.get_config_copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
