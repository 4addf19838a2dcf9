"""Feature info: which layers serve, which are the default, and how the others are refused."""

import random

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from small_nets import Calls, SmallNet, chain
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision import models

from pixel_level_contrastive_learning import PixelCL
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo
from pixel_level_contrastive_learning.modules.hooks import (
    FeatureHooks,
    Layout,
    as_map,
    first_weight,
)
from pixel_level_contrastive_learning.modules.layer import default_maps, inside_blocks

# The layers that are taken where none is named.


def vit() -> nn.Module:
    """The transformer of torchvision, made small."""
    return models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )


@pytest.mark.parametrize(
    ("build", "side", "pixel", "cells", "instance"),
    [
        (models.resnet18, 64, "layer3", 4, "avgpool"),
        (models.resnet18, 128, "layer4", 4, "avgpool"),
        (models.resnet18, 224, "layer4", 7, "avgpool"),
        (models.resnet50, 128, "layer4", 4, "avgpool"),
        (models.resnet50, 64, "layer3", 4, "avgpool"),  # not what layer4 begins with
        (SmallNet, 64, "deep", 4, "pool"),
        (vit, 64, "encoder", 4, "encoder"),
        (models.mobilenet_v2, 128, "features", 4, "features"),  # its dropout is no pooled vector
        (models.mobilenet_v2, 64, "features.13", 4, "features"),  # which it pools by a function
    ],
)
def test_convention_the_default_is_the_deepest_map_of_four_by_four_and_the_pooled_vector(
    build, side, pixel, cells, instance
) -> None:
    info = FeatureInfo(build(), 3, (side, side))
    assert info.default_pixels() == [pixel]
    assert info.default_instance(pixel) == instance
    assert info.hook(pixel, pixel=True).layout.grid == (cells, cells)


@pytest.mark.parametrize("width", [64, 96, 196], ids=str)
@pytest.mark.parametrize(
    ("layers", "pixel", "axes"),
    [
        (lambda c: {"turn": Calls(lambda _, x: x.mT), "norm": nn.LayerNorm(c)}, "norm", "b n c"),
        (
            lambda c: {
                "norm": Calls(lambda net, x: net.inner(x.mT), inner=nn.LayerNorm(c)),
                "mix": Calls(
                    lambda net, x: x + net.mlp(x.mT).mT,
                    mlp=nn.Sequential(nn.Linear(196, 64), nn.GELU(), nn.Linear(64, 196)),
                ),
                "after": nn.LayerNorm(c),
            },
            "after",
            "b n c",
        ),
        (lambda _: {}, "flat", "b c n"),
    ],
    ids=["transformer", "mixer", "CNN"],
)
def test_channels_are_not_read_as_tokens(layers, width, pixel, axes) -> None:
    net = chain(stem=nn.Conv2d(3, width, 16, 16), flat=nn.Flatten(2), **layers(width))
    info = FeatureInfo(net, 3, (224, 224))
    assert info.default_pixels() == [pixel]
    hook = info.hook(pixel, pixel=True)
    assert hook.layout[:4] == (axes, width, (14, 14), 0)
    x = torch.rand(2, 3, 224, 224)
    if pixel == "flat":
        output = FeatureHooks(hook).run(net, x)["flat"]
        assert torch.equal(as_map(output, hook.layout, (224, 224)), net.stem(x))
    unreadable = [layer.name for layer in info.layers if layer.layout is None]
    assert unreadable == [name for name in ("mix.mlp.0", "mix.mlp.1") if info.get(name)]
    for layer in info.layers:
        assert layer.layout is None or layer.layout.channels == width


@pytest.mark.parametrize(
    ("build", "levels"),
    [
        (models.resnet18(), ["layer4", "layer3", "layer2"]),
        (
            smp.Unet("resnet18", encoder_weights=None),
            ["decoder.center", "decoder.blocks.0", "decoder.blocks.1"],
        ),
        (
            smp.FPN("resnet18", encoder_weights=None),
            [f"decoder.seg_blocks.0.block.{block}.block" for block in (0, 1, 2)],
        ),
    ],
    ids=["resnet", "unet", "fpn"],
)
def test_default_levels_are_the_deepest_map_of_each_finer_stride(build, levels) -> None:
    info = FeatureInfo(build, 3, (128, 128))
    assert info.default_pixels(3) == levels
    cells = [info.hook(name, pixel=True).layout.grid for name in levels]
    assert cells == [(4, 4), (8, 8), (16, 16)]


def test_more_levels_than_strides_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"is 2, but Vision.* 1 stride at 64x64: encoder \("):
        FeatureInfo(vit(), 3, (64, 64)).default_pixels(2)


@pytest.mark.parametrize(
    ("build", "pixel"),
    [
        (models.mobilenet_v3_small, "features.8"),
        (models.efficientnet_b0, "features.5"),
        (models.regnet_y_400mf, "trunk_output.block3"),
        (models.convnext_tiny, "features.5"),
        (models.densenet121, "features.denseblock3"),
    ],
)
def test_the_default_is_what_a_stage_gives_and_not_how_the_next_begins(build, pixel) -> None:
    """All of these expand, normalise or mix at the finer stride before they go coarser."""
    info = FeatureInfo(build(), 3, (64, 64))
    assert info.default_pixels() == [pixel]
    assert info.hook(pixel, pixel=True).layout.grid == (4, 4)
    assert f" {pixel} (" in info.advice(pixel=True)


def head(*layers: nn.Module) -> nn.Sequential:
    """A network whose maps have one stride, with layers that end it."""
    body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU())
    return chain(body=body, head=nn.Sequential(*layers))


def gated(net: nn.Module, x: Tensor) -> Tensor:
    """A map whose cells are weighed, four by one number."""
    features = net.body(x)
    return features * net.gate(features).repeat_interleave(2, 2).repeat_interleave(2, 3)


GATE = nn.Sequential(nn.Conv2d(8, 1, 2, 2), nn.BatchNorm2d(1))


@pytest.mark.parametrize(
    ("net", "side", "expected"),
    [
        (head(nn.Conv2d(8, 5, 1)), 64, "body"),
        (head(nn.Conv2d(8, 5, 1), nn.Identity()), 64, "body"),
        (head(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)), 64, "head"),  # a narrow end, not scores
        (head(nn.Conv2d(8, 8, 1)), 64, "head"),
        (head(nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)), 64, "head"),
        (head(nn.Conv2d(8, 9, 1), nn.Conv2d(9, 4, 1)), 64, "head.0"),
        (Calls(gated, body=nn.Conv2d(3, 8, 8, 8), gate=GATE), 64, "body"),
        (chain(scores=nn.Conv2d(3, 2, 8, 8)), 64, "scores"),  # better than nothing
        (chain(fine=nn.Conv2d(3, 8, 32, 32), coarse=nn.Conv2d(8, 8, 2, 2)), 256, "fine"),
    ],
)
def test_neither_class_scores_nor_strides_above_32_are_taken_unasked(net, side, expected) -> None:
    assert FeatureInfo(net, 3, (side, side)).default_pixels() == [expected]


@pytest.mark.parametrize(
    ("build", "pixel", "cells"),
    [(smp.PSPNet, "decoder", 16), (smp.PAN, "decoder.gau3", 8)],  # of pools of 6x6, 4x4 and less
)
def test_coarser_context_inside_a_block_is_not_taken_unasked(build, pixel, cells) -> None:
    info = FeatureInfo(build("resnet18", encoder_weights=None), 3, (128, 128))
    assert info.default_pixels() == [pixel]
    assert info.get(pixel).layout.grid == (cells, cells)


@pytest.mark.parametrize("aux", [False, True])  # an auxiliary head runs last and reads layer3
def test_the_answer_of_a_segmentation_network_is_not_taken_unasked(aux) -> None:
    """Its head runs at the stride of the backbone, and ends in dropout and scores."""
    net = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=aux)
    info = FeatureInfo(net, 3, (64, 64))
    assert info.get("classifier").stride == info.get("backbone.layer4").stride == 8
    assert info.default_pixels() == ["classifier.2"]


def test_images_too_small_for_a_default_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)(?=.*4x4)(?=.*16x16)(?=.*larger images)"):
        FeatureInfo(SmallNet(), 3, (16, 16)).default_pixels()


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), "deep"), ((63, 64), "act"), ((128, 48), "act")], ids=str
)
def test_a_default_has_four_cells_either_way(size, expected) -> None:
    assert FeatureInfo(SmallNet(), 3, size).default_pixels() == [expected]


def test_layers_are_named_by_name_or_by_index() -> None:
    info = FeatureInfo(SmallNet(), 3, (64, 64))
    assert info.hook(3, pixel=True) == info.hook("deep", pixel=True)
    assert info.hook(-3, pixel=False) == info.hook("pool", pixel=False)
    assert info.hook("deep", pixel=True)[:2] == ("deep", Layout("b c h w", 12, (4, 4)))
    assert info.hook("-4", pixel=True) == info.hook("3", pixel=True) == info.hook(3, pixel=True)
    compiled = FeatureInfo(torch.compile(SmallNet(), backend="eager"), 3, (64, 64))
    assert compiled.hook(-4, pixel=True) == info.hook("deep", pixel=True)


def test_a_name_of_digits_is_a_name() -> None:
    net = nn.Sequential(nn.Identity(), *(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3)))[1:]
    info = FeatureInfo(net, 3, (64, 64))  # its children keep the names "1" to "3"
    assert [info.hook(name, pixel=True).name for name in ("1", "2", "0", 0)] == ["1", "2", "1", "1"]


def test_every_name_of_a_shared_layer_is_its_name() -> None:
    act = nn.ReLU()
    convolutions = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 12, 1)
    net = nn.Sequential(convolutions[0], act, convolutions[1], act, convolutions[2])
    info = FeatureInfo(net, 3, (64, 64))
    # Of a shared layer the last output is read; the child of index 3 is that of name "4".
    assert [info.hook(name, pixel=True).name for name in ("1", "3", 3)] == ["1", "1", "4"]
    assert info.hook("3", pixel=True).layout[:3] == ("b c h w", 8, (8, 8))
    block = chain(deep=nn.Conv2d(3, 3, 2, 2))
    info = FeatureInfo(chain(one=block, two=block), 3, (64, 64))
    assert info.hook("two.deep", pixel=True).name == "one.deep"


def test_a_layer_that_runs_twice_is_read_as_it_is_caught() -> None:
    net = SmallNet()
    net.deep = nn.Sequential(nn.Conv2d(8, 12, 2, 2), net.act)
    assert FeatureInfo(net, 3, (64, 64)).hook("act", pixel=True).layout[:3] == (
        "b c h w",
        12,
        (4, 4),
    )


@pytest.mark.parametrize(
    ("layer", "overwritten"), [("stem", False), ("norm", True), ("act", False)]
)
def test_layers_changed_in_place_are_noticed(layer, overwritten) -> None:
    assert FeatureInfo(SmallNet(), 3, (64, 64)).hook(layer, pixel=True).overwritten is overwritten


@pytest.mark.parametrize(
    "layers",
    [
        {"flat": nn.Flatten(), "drop": nn.Dropout(0.5, inplace=True), "head": nn.Linear(8, 5)},
        {"drop": nn.Dropout2d(0.5, inplace=True)},
    ],
    ids=["of a view", "of the whole"],
)
def test_dropout_in_place_is_noticed_though_it_is_idle_in_eval_mode(layers) -> None:
    net = chain(stem=nn.Conv2d(3, 8, 8, 8), pool=nn.AdaptiveAvgPool2d(1), **layers)
    info, x = FeatureInfo(net, 3, (64, 64)), torch.rand(8, 3, 64, 64)
    assert not info.hook("stem", pixel=True).overwritten
    assert not info.hook("drop", pixel=False).overwritten
    hook = info.hook("pool", pixel=False)
    assert hook.overwritten
    assert torch.equal(FeatureHooks(hook).run(net.train(), x)["pool"], net.pool(net.stem(x)))


# What feature info must leave alone.


def test_feature_info_draws_nothing_and_changes_nothing() -> None:
    net = chain(
        stem=nn.Conv2d(3, 8, 8, 8),
        norm=nn.BatchNorm2d(8),
        drop=nn.Dropout(0.5),
        noise=Calls(lambda _, x: x + torch.rand_like(x)),
    )
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for training in (False, True):
        FeatureInfo(net, 3, (64, 64), training=training)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_feature_info_is_the_same_on_any_default_device() -> None:
    net = SmallNet()
    with torch.device("meta"):
        elsewhere = FeatureInfo(net, 3, (64, 64))
    here = FeatureInfo(net, 3, (64, 64))
    assert torch.equal(elsewhere.images, here.images)
    assert list(map(str, elsewhere.layers)) == list(map(str, here.layers))


# Refusals: what was found, and what would do.

STEM, STILL = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 1)


def refused(net: nn.Module, layer: str | int, pixel: bool, texts: list[str]) -> None:
    """Assert that a hook on a layer of a network that can be read is refused in these words."""
    info = FeatureInfo(net, 3, (64, 64))
    with pytest.raises(ValueError) as error:
        info.hook(layer, pixel=pixel)
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("layer", "pixel", "texts"),
    [
        ("layer44", True, ["'layer44'", "perhaps", "layer4", "layer3 (256 channels, 4x4 cells)"]),
        ("nowhere", True, ["'nowhere'", "usable layers", "layer4 (512 channels, 2x2 cells)"]),
        ("nowhere", False, ["'nowhere'", "usable layers", "avgpool"]),
        (10, True, ["10 children", "no child 10", "from -10 to 9", "layer3 "]),
        (-11, False, ["10 children", "no child -11", "from -10 to 9", "avgpool"]),
        (-2, True, ["'avgpool'", "1x1", "(2, 512, 1, 1)", "layer3 (256 channels, 4x4 cells)"]),
        ("fc", True, ["'fc'", "(2, 1000)", "vector", "layer3 "]),
    ],
)
def test_layers_of_a_resnet_that_will_not_do_are_refused(layer, pixel, texts) -> None:
    refused(models.resnet18(), layer, pixel, texts)


def checkpointed(net: nn.Module, x: Tensor) -> Tensor:
    """A network whose block runs without gradient, and again in the backward pass."""
    return net.after(checkpoint(net.block, net.stem(x), use_reentrant=True))


@pytest.mark.parametrize(
    ("net", "layer", "texts"),
    [
        (
            Calls(
                lambda net, x: net.end(net.named(x)["x"]),
                named=Calls(lambda _, x: {"x": x}),
                end=STEM,
            ),
            "named",
            ["'named'", "dict", "end (8 channels, 8x8 cells)"],
        ),
        (
            Calls(lambda net, x: net.end(x), spare=nn.Conv2d(3, 8, 1), end=STEM),
            "spare",
            ["'spare'", "did not run", "end (8 channels, 8x8 cells)"],
        ),
        (
            Calls(checkpointed, stem=STEM, block=nn.Sequential(STILL, nn.ReLU()), after=nn.ReLU()),
            "block.0",
            [
                "'block.0'",
                "re-entrant",
                "use block.1 (8 channels, 8x8 cells) instead",
                "use_reentrant=False",
            ],
        ),
        (
            chain(stem=nn.Conv2d(3, 8, 8, 8).requires_grad_(False), end=nn.Identity()),
            "end",
            ["'end'", "frozen", "unfreeze"],
        ),
    ],
    ids=["dict", "never run", "re-entrant checkpoint", "frozen"],
)
@pytest.mark.parametrize("pixel", [True, False], ids=["pixel", "instance"])
def test_layers_that_cannot_be_read_are_refused(net, layer, texts, pixel) -> None:
    refused(net, layer, pixel, texts if pixel else texts[:2])  # other layers would do for both


class Masked(nn.Module):
    """Tokens of patches in the order of chance, as masked autoencoders give them."""

    def __init__(self, shuffled: bool, width: int = 8) -> None:
        super().__init__()
        mlp = nn.Linear(8, width), nn.Linear(width, 8)
        self.patches, self.norm = nn.Conv2d(3, 8, 8, 8), nn.Sequential(*mlp, nn.LayerNorm(8))
        self.shuffled = shuffled

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        if self.shuffled:
            tokens = torch.stack([sample[torch.randperm(len(sample))] for sample in tokens])
        return self.norm(tokens + 0.1 * torch.rand_like(tokens).mul(tokens))


def test_tokens_in_the_order_of_chance_are_refused_and_a_little_noise_is_not() -> None:
    assert FeatureInfo(Masked(shuffled=False), 3, (64, 64)).hook("norm", pixel=True)
    info = FeatureInfo(Masked(shuffled=True), 3, (64, 64))
    with pytest.raises(ValueError, match=r"'norm' gives different tokens .*masked autoenc"):
        info.hook("norm", pixel=True)


class Queried(nn.Module):
    """Cells with tokens behind them as of YOLOS, and queries that ask them as of DETR."""

    def __init__(self, behind: int, queries: int, width: int) -> None:
        super().__init__()
        self.patches, self.behind = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.rand(1, behind, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 64, 0, batch_first=True)
        self.queries = nn.Parameter(torch.rand(1, queries, 16))
        self.decoder = nn.TransformerDecoderLayer(16, 2, width, 0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.patches(x).flatten(2).mT
        cells = self.encoder(torch.cat([cells, self.behind.expand(len(x), -1, -1)], dim=1))
        return self.decoder(self.queries.expand(len(x), -1, -1), cells)


@pytest.mark.parametrize("queries", [16, 64, 100])
def test_queries_are_no_cells(queries) -> None:
    info = FeatureInfo(Queried(behind=0, queries=queries, width=8), 3, (64, 64))
    assert info.get("decoder").is_map
    assert info.default_pixels() == ["encoder"]
    assert "decoder" not in info.advice(pixel=True)
    assert info.hook("decoder", pixel=True)  # by its name


@pytest.mark.parametrize("behind", [10, 100])
def test_tokens_behind_those_of_the_cells_are_told(behind) -> None:
    info = FeatureInfo(Queried(behind, queries=16, width=999), 3, (64, 64))
    with pytest.warns(UserWarning, match=r"Queried gives .* in 'decoder', which cannot be read"):
        assert info.default_pixels() == ["patches"]


class Heads(nn.Module):
    """Class scores of two depths, enlarged and added up, as of LR-ASPP."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.early = nn.Conv2d(16, 7, 1), nn.Conv2d(8, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        deep, early = x
        return self.early(early) + functional.interpolate(self.deep(deep), early.shape[2:])


def test_the_sum_of_heads_is_no_feature() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        early = net.stem(x)
        return net.heads((net.block(early), early))

    net = Calls(forward, stem=nn.Conv2d(3, 8, 4, 4), block=nn.Conv2d(8, 16, 2, 2), heads=Heads())
    assert FeatureInfo(net, 3, (64, 64)).default_pixels(2) == ["block", "stem"]


def test_most_of_a_network_is_not_left_out_without_a_word() -> None:
    def tokens(batch_first: bool) -> FeatureInfo:
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=batch_first)
        order = (lambda _, x: x.mT) if batch_first else (lambda _, x: x.permute(2, 0, 1))
        stem = {"stem": nn.Conv2d(3, 16, 8, 8), "flat": nn.Flatten(2), "turn": Calls(order)}
        return FeatureInfo(chain(**stem, encoder=nn.Sequential(layer, layer)), 3, (64, 64))

    assert tokens(batch_first=True).default_pixels() == ["encoder"]
    text = (
        r"gives \(64, 2, 16\) in 'encoder', which .* only the \d+% of its weights .* as \(b, n, c\)"
    )
    with pytest.warns(UserWarning, match=text):
        assert tokens(batch_first=False).default_pixels() != ["encoder"]
    with pytest.warns(UserWarning, match="Masked gives .* in 'norm', which cannot be read"):
        FeatureInfo(Masked(shuffled=True, width=999), 3, (64, 64)).default_pixels()


def test_a_network_without_layers_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"Conv2d has no inner layers.*nn\.Sequential\(net\)"):
        FeatureInfo(nn.Conv2d(3, 8, 8, 8), 3, (64, 64)).default_pixels()
    compiled = torch.compile(chain(stem=nn.Conv2d(3, 8, 8, 8)), backend="eager")
    assert list(FeatureInfo(compiled, 3, (64, 64)).names) == ["stem"]


def test_a_network_that_wants_more_than_images_is_told_so() -> None:
    net = Calls(lambda net, x: net.stem(x["image"]), stem=nn.Conv2d(3, 8, 8, 8))
    with pytest.raises(
        ValueError, match=r"Calls cannot take .* run as net\(images\) on one tensor"
    ):
        FeatureInfo(net, 3, (64, 64))


@pytest.mark.parametrize("channels", [1, 5])
def test_a_network_that_refuses_the_images_is_reported(channels) -> None:
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{channels}, 64, 64)(?=.*image_size)"):
        FeatureInfo(SmallNet(), channels, (64, 64))


def test_images_too_small_for_a_network_are_refused_with_what_would_do() -> None:
    """Below 75 pixels for the body of Inception, below 139 for its auxiliary head."""
    net = models.inception_v3(weights=None, init_weights=False)
    with pytest.raises(
        ValueError, match=r"Inception3 cannot .* \(2, 3, 74, 74\): .*; give larger im"
    ):
        FeatureInfo(net, 3, (74, 74))
    learner = PixelCL(net, 96, projection_size=8, projection_hidden_size=8)
    with pytest.raises(
        ValueError, match=r"Inception3 cannot .* \(2, 3, 96, 96\): .*; give larger im"
    ):
        learner(torch.rand(2, 3, 96, 96))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
def test_torchscript_is_refused_and_passed_over_inside_a_network() -> None:
    scripted = torch.jit.script(chain(stem=nn.Conv2d(3, 8, 8, 8)))
    with pytest.raises(
        ValueError, match=r"Sequential is a TorchScript network, .*scripted\.state_"
    ):
        FeatureInfo(scripted, 3, (64, 64))
    net = chain(scripted=scripted, after=nn.Conv2d(8, 8, 1))
    assert [layer.name for layer in FeatureInfo(net, 3, (64, 64)).layers] == ["after"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_a_network_that_cannot_be_copied_is_refused_with_what_to_do(norm) -> None:
    net = chain(stem=norm(nn.Conv2d(3, 8, 8, 8)))
    net(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"Sequential cannot be copied.*utils\.parametrizations"):
        FeatureInfo(net, 3, (64, 64))
    better = getattr(nn.utils.parametrizations, norm.__name__)
    net = chain(stem=better(nn.Conv2d(3, 8, 8, 8)))
    net(torch.rand(2, 3, 64, 64))
    assert FeatureInfo(net, 3, (64, 64)).default_pixels() == ["stem"]


# Parameters that a loss on a hook would never reach.


@pytest.mark.parametrize(
    ("layer", "idle"),
    [
        ("pool", ["head.weight", "head.bias"]),
        ("act", ["deep.weight", "deep.bias", "head.weight", "head.bias"]),
    ],
)
def test_parameters_behind_a_hook_are_unreached(layer, idle) -> None:
    info = FeatureInfo(SmallNet(), 3, (64, 64))
    assert info.unreached(info.hook(layer, pixel=False)) == idle


def test_frozen_parameters_are_looked_at_as_if_they_learned() -> None:
    net = SmallNet()
    net.stem.requires_grad_(False)
    net.head.requires_grad_(False)
    info = FeatureInfo(net, 3, (64, 64))
    assert info.unreached(info.hook("pool", pixel=False)) == ["head.weight", "head.bias"]
    assert not any(
        parameter.requires_grad for parameter in (*net.stem.parameters(), *net.head.parameters())
    )


def test_what_joins_a_layer_after_it_was_read_is_unreached() -> None:
    """A residual sum in place gives the hooked tensor a past that a copy of it does not have."""

    def joined(net: Calls, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.block(x)
        y += net.side(x)
        return net.after(y)

    parts = {name: nn.Conv2d(8, 8, 1) for name in ("block", "side", "after")}
    net = Calls(joined, stem=nn.Conv2d(3, 8, 8, 8), **parts)
    info = FeatureInfo(net, 3, (64, 64))
    hook = info.hook("block", pixel=True)
    assert hook.overwritten
    behind = ["side.weight", "side.bias", "after.weight", "after.bias"]
    assert info.unreached(hook) == behind
    FeatureHooks(hook).run(net, torch.rand(2, 3, 64, 64))["block"].sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == behind


def test_a_table_of_indices_is_no_weight() -> None:
    net = SmallNet()
    net.stem.table = nn.Parameter(torch.arange(4), requires_grad=False)
    first = nn.Sequential()
    first.table = nn.Parameter(torch.arange(4), requires_grad=False)
    first.add_module("net", net)
    info = FeatureInfo(first, 3, (64, 64))
    assert info.images.dtype == torch.float32
    idle = info.unreached(info.hook("net.pool", pixel=False))
    assert idle == ["table", "net.stem.table", "net.head.weight", "net.head.bias"]
    assert first_weight(first, torch.empty(0)) is net.stem.weight


class Closed(torch.autograd.Function):
    """A function that says nothing of the weights it uses and leaves gradients in them itself."""

    @staticmethod
    def forward(ctx, x: Tensor, block: nn.Module) -> Tensor:
        ctx.x, ctx.block = x.detach(), block
        return block(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return x.grad, None


@pytest.mark.parametrize(
    "forward",
    [checkpointed, lambda net, x: net.after(Closed.apply(net.stem(x), net.block))],
    ids=["re-entrant checkpoint", "a function of one's own"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_the_graph_does_not_show_are_reached(forward, frozen) -> None:
    parts = {
        "stem": nn.Conv2d(3, 8, 8, 8),
        "block": nn.Conv2d(8, 8, 1),
        "after": nn.Conv2d(8, 4, 1),
        "head": nn.Conv2d(4, 2, 1),
    }
    net = Calls(lambda net, x: net.head(forward(net, x)), **parts)
    net.block.requires_grad_(not frozen)
    info = FeatureInfo(net, 3, (64, 64))
    hooks = [info.hook(name, pixel=True) for name in ("after", "stem")]
    behind = ["head.weight", "head.bias"]
    assert info.unreached(hooks[0]) == behind
    inside = ["block.weight", "block.bias", "after.weight", "after.bias"]
    assert info.unreached(hooks[1]) == inside + behind
    assert all(parameter.grad is None for parameter in net.parameters())


# Blocks that make the map coarser, for good or for a while.


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        # A block that halves the map: what is as fine as before is half done.
        ({"a.conv": (4, 4), "a.pool": (4, 8), "a": (4, 8)}, {"a.conv"}),
        # However deep it lies, and a border's cell more or less.
        ({"a.b.conv": (3.8, 3.8), "a.b": (4, 8), "a": (4, 8.2)}, {"a.b.conv"}),
        # A row of blocks is no block: what its first gives is whole.
        ({"all.0": (4, 4), "all.1": (4, 8), "all.2": (8, 16), "all": (4, 16)}, set()),
        # A block that keeps the map, one that makes it finer, one that is given none.
        ({"a.conv": (4, 4), "a": (4, 4)}, set()),
        ({"up.conv": (8, 8), "up": (8, 4)}, set()),
        ({"a.conv": (4, 4), "a": (0, 8)}, set()),
        # A small block that keeps the map: what is coarser in it is context, unless it is all.
        ({"small.pool": (8, 21), "small": (8, 8)}, {"small.pool"}),
        ({"small.pool": (8, 10), "small": (8, 8)}, set()),
        ({"large.deep": (8, 16), "large": (8, 8)}, set()),
        ({"small.deep": (2, 16), "small": (1, 1)}, set()),
        # Names that only begin alike.
        ({"a": (4, 8), "ab.conv": (4, 4), "ab": (4, 4)}, set()),
    ],
)
def test_a_layer_inside_a_block_that_ends_at_another_stride_is_found(strides, expected) -> None:
    assert inside_blocks(strides, {"small"}) == expected


def test_the_inside_of_a_block_is_a_default_where_there_is_nothing_else() -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1))
    net = nn.Sequential(block, nn.AdaptiveAvgPool2d(1))
    layers = FeatureInfo(net, 3, (8, 8)).layers
    assert [(layer.name, layer.is_default) for layer in layers if layer.is_map] == [
        ("0.0", False),
        ("0.1", True),
        ("0", True),
    ]
    assert [layer.name for layer in default_maps(layers)] == ["0.1", "0"]
    assert [layer.name for layer in default_maps(layers[:1])] == ["0.0"]


def test_class_scores_are_told_by_what_they_are_and_not_by_where_they_lie() -> None:
    """Tensors that are gone leave their addresses to later ones, such as the scores."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.body(x)
        with torch.no_grad():
            passing = [x * k for k in range(200)]
            for tensor in passing:
                net.side(tensor)
        remaining = passing[::2]  # noqa: F841  # half of the addresses stay taken
        del passing, tensor
        return net.scores(x)

    scores = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 5, 1, bias=False))
    parts = {"body": nn.Conv2d(3, 8, 8, 8), "side": nn.Conv2d(8, 9, 1), "scores": scores}
    info = FeatureInfo(Calls(forward, **parts), 3, (64, 64))
    assert not info.get("scores").is_default
    assert info.default_pixels() == ["body"]


def test_images_whose_border_no_patch_covers_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 14, 14), nn.ReLU())
    assert FeatureInfo(net, 3, (70, 71)).pixel_hooks(None, 1)[0].layout.grid == (5, 5)
    with pytest.raises(ValueError, match=r"patches of 14x14 pixels, .* give 70x56 or 70x70"):
        FeatureInfo(net, 3, (70, 64)).pixel_hooks(None, 1)
    padded = nn.Sequential(nn.ZeroPad2d((0, 6, 0, 0)), net)
    assert FeatureInfo(padded, 3, (70, 64)).pixel_hooks(None, 1)[0].layout.grid == (5, 5)
