"""Stems: the first convolution, for any number of channels."""

import pytest
import timm.models
import torch
from torch import nn
from torchvision import models
from transformers import AutoConfig, AutoModel

from pixel_level_contrastive_learning.backbones.stem import (
    adapt_channels,
    adapt_input_conv,
    find_stem,
)

STEMS = {
    "resnet18": "conv1",
    "convnext_tiny": "features.0.0",
    "swin_t": "features.0.0",
    "mobilenet_v3_small": "features.0.0",
    "densenet121": "features.conv0",
    "shufflenet_v2_x0_5": "conv1.0",
    "vit_b_32": "conv_proj",
}

STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
TOKENS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
SMALL = {
    "resnet": STAGES | {"embedding_size": 8},
    "convnext": STAGES | {"num_stages": 2},
    "vit": TOKENS | {"patch_size": 14},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
    "dinov2": TOKENS,
}


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
def test_kernels_are_spread_as_timm_spreads_them(channels) -> None:
    kernels = torch.randn(8, 3, 5, 5)
    expected = timm.models.adapt_input_conv(channels, kernels)
    torch.testing.assert_close(adapt_input_conv(channels, kernels), expected)


@pytest.mark.parametrize("channels", [1, 6])
def test_a_gray_image_gives_what_it_gave(channels) -> None:
    conv, gray = nn.Conv2d(3, 8, 3), torch.rand(2, 1, 9, 9)
    expected = conv(gray.expand(-1, 3, -1, -1))
    adapted = adapt_channels(nn.Sequential(conv), channels)
    torch.testing.assert_close(adapted(gray.expand(-1, channels, -1, -1)), expected)


@pytest.mark.parametrize(("name", "stem"), STEMS.items())
def test_the_stem_of_well_known_networks(name, stem) -> None:
    with torch.device("meta"):
        net = models.get_model(name, weights=None)
    found = find_stem(net)
    assert found is not None
    assert found[0] == stem
    assert found[1].in_channels == 3


def test_the_stem_alone_changes_in_place() -> None:
    net = models.resnet18()
    conv, before = net.conv1, {name: value.clone() for name, value in net.state_dict().items()}
    assert adapt_channels(net, 5) is net
    assert net.conv1 is conv
    assert (conv.in_channels, conv.stride, conv.padding) == (5, (2, 2), (3, 3))
    assert conv.weight.requires_grad
    changed = [
        name for name, value in net.state_dict().items() if value.shape != before[name].shape
    ]
    assert changed == ["conv1.weight"]
    assert all(
        torch.equal(value, before[name])
        for name, value in net.state_dict().items()
        if name != changed[0]
    )
    assert net.eval()(torch.rand(2, 5, 64, 64)).shape == (2, 1000)


def test_what_fits_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    weight = net[0].weight
    assert adapt_channels(net, 4)[0].weight is weight


def test_unlearned_kernels_are_drawn_anew_and_keep_the_spread_of_the_outputs() -> None:
    net = adapt_channels(nn.Sequential(nn.Conv2d(3, 64, 7)), 12, keep=False)
    kernels = net[0].weight
    assert kernels.shape == (64, 12, 7, 7)
    assert not torch.equal(kernels[:, 0], kernels[:, 3])
    # Uniform in +-1/sqrt(3 * 49) before: a variance of 1 / (3 * 3 * 49), a quarter of it now.
    assert kernels.var().item() == pytest.approx(1 / (3 * 3 * 49) / 4, rel=0.05)


def test_inputs_taken_apart_by_colour_are_no_longer() -> None:
    net = models.googlenet(aux_logits=False, init_weights=False, transform_input=True)
    assert adapt_channels(net, 3).transform_input
    assert not adapt_channels(net, 2).transform_input


def test_a_network_without_convolution_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        adapt_channels(nn.Sequential(nn.Linear(3, 3)), 2)
    assert str(error.value) == (
        "Sequential has no Conv2d to adapt to 2 channels; give the function that builds it a "
        "parameter channels"
    )


def test_a_grouped_stem_and_senseless_channels_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match=r"the stem '0' of Sequential has 2 groups"):
        adapt_channels(net, 3)
    with pytest.raises(ValueError, match=r"channels is 0; it must be a whole number of at least 1"):
        adapt_channels(net, 0)


@pytest.mark.parametrize("family", ["resnet", "convnext", "vit", "swin", "dinov2"])
def test_a_network_of_transformers_takes_the_channels_it_is_adapted_to(family) -> None:
    """Its layers count them, too, and so does what is written of it."""
    net = adapt_channels(AutoModel.from_config(AutoConfig.for_model(family, **SMALL[family])), 5)
    assert net(torch.rand(1, 5, 56, 56)).last_hidden_state.isfinite().all()
    assert net.config.num_channels == 5
    again = AutoModel.from_config(net.config).state_dict()
    assert {name: tensor.shape for name, tensor in again.items()} == {
        name: tensor.shape for name, tensor in net.state_dict().items()
    }
