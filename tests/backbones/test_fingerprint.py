"""Fingerprints: code that changed is noticed, weights and machines are not."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from small_nets import Calls, chain
from torch import nn
from transformers import AutoConfig, AutoModel

from pixel_level_contrastive_learning import load_backbone
from pixel_level_contrastive_learning.backbones import fingerprint
from pixel_level_contrastive_learning.backbones.checkpoint import (
    BackboneCard,
    read_backbone,
    read_card,
    save_backbone,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.backbones.fingerprint import (
    differs,
    fingerprint_of,
    fixed_noise,
)

SIZE = (48, 64)
SAYS = "the model's code gives different results than during the run"


def convolutions(act: Callable[[], nn.Module] = nn.ReLU, residual: float = 1.0) -> nn.Module:
    """A network whose code has parts to change that have no weights."""
    block = chain(conv=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8), act=act())
    stem = chain(conv=nn.Conv2d(3, 8, 4, 4), act=act())
    return Calls(
        lambda net, x: (y := net.stem(x)) + residual * net.block(y), stem=stem, block=block
    )


def transformer(act: str = "gelu", **settings: object) -> nn.Module:
    tokens = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
    tokens |= {"num_hidden_layers": 3, "hidden_act": act, "image_size": SIZE}
    return AutoModel.from_config(AutoConfig.for_model("vit", **tokens, **settings))


CHANGES = {
    "activation": (convolutions, lambda: convolutions(nn.GELU)),
    "factor": (convolutions, lambda: convolutions(residual=0.95)),
    "no residual": (convolutions, lambda: convolutions(residual=0.0)),
    "activation of a transformer": (transformer, lambda: transformer("relu")),
    "padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    ),
    "normalisation": (
        lambda: nn.Conv2d(3, 4, 3),
        lambda: chain(n=nn.InstanceNorm2d(3), c=nn.Conv2d(3, 4, 3)),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_code_has_another_fingerprint(name) -> None:
    before, after = (fingerprint_of(build(), 3, SIZE) for build in CHANGES[name])
    assert len(before) == 8
    assert differs(before, after)


@pytest.mark.parametrize("build", [convolutions, transformer])
def test_weights_modes_and_precisions_do_not_change_it(build) -> None:
    net = build()
    before = fingerprint_of(net, 3, SIZE)
    assert net.training
    state = copy.deepcopy(net.state_dict())
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    net.eval()
    generator = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            for same in (net, net.bfloat16(), net.to(memory_format=torch.channels_last)):
                assert not differs(before, fingerprint_of(same, 3, SIZE))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), generator)
    assert next(net.parameters()).dtype == torch.bfloat16
    assert not all(torch.equal(value.float(), state[n]) for n, value in net.state_dict().items())


def test_it_is_the_same_with_every_version() -> None:
    """What is drawn depends on no generator and no rounding: whole numbers, mixed."""
    values = fixed_noise().double()
    for place in (0, 1, 65_520):
        number = place + 1
        for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):
            number = number * factor % 2**32
            number ^= number >> 15
        assert values[place] == pytest.approx(number / 2**31 - 1, abs=1e-6)
    assert -1 <= values.min() < -0.99 < 0.99 < values.max() <= 1
    assert values.mean().abs() < 0.01
    assert (values[1:] * values[:-1]).mean().abs() < 0.01


@pytest.mark.parametrize(
    "net",
    [
        nn.Linear(3, 3),  # takes no image
        Calls(lambda _, x: {"no": "tensor"}),
        Calls(lambda net, x: net.conv(x) * torch.inf, conv=nn.Conv2d(3, 3, 1)),
    ],
)
def test_what_gives_no_figures_has_none(net) -> None:
    assert fingerprint_of(net, 3, SIZE) is None


# On cards.

SOURCE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
"""


@pytest.fixture
def run(tmp_path):
    """A run on code of one's own."""
    (tmp_path / "mine.py").write_text(SOURCE)
    model = f"{tmp_path / 'mine.py'}:build"
    card = BackboneCard(
        model=model,
        channels=3,
        image_size=SIZE,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        pixel_layer="2",
        instance_layer="2",
    )
    save_backbone(tmp_path / "backbone.safetensors", build_backbone(model), card)
    return tmp_path


def test_code_that_computes_something_else_is_told(run) -> None:
    load_backbone(run)  # a warning would be an error
    (run / "mine.py").write_text(SOURCE.replace("ReLU", "Tanh"))
    with pytest.warns(UserWarning, match=rf"backbone\.safetensors: {SAYS}"):
        load_backbone(run)
    read_backbone(run, image_size=(32, 32))  # at another size it would not be the same


@pytest.mark.parametrize("fingerprint", [None, (), (1.0, 2.0), "absent"])
def test_a_card_without_a_fingerprint_of_ours_works_as_before(run, fingerprint) -> None:
    fields = json.loads((run / "backbone.json").read_text())
    assert len(fields["fingerprint"]) == 8
    fields["fingerprint"] = fingerprint
    if fingerprint == "absent":
        del fields["fingerprint"], fields["config"]
    (run / "backbone.json").write_text(json.dumps(fields))
    (run / "mine.py").write_text(SOURCE.replace("ReLU", "Tanh"))
    load_backbone(run)
    known = read_card(run / "backbone.safetensors").fingerprint
    assert known == (None if fingerprint == "absent" else fingerprint)


def test_a_fingerprint_that_cannot_be_computed_is_no_other_code(run, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(fingerprint, "duplicate", full)
    assert isinstance(load_backbone(run), nn.Module)  # a warning would be an error


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_weights_without_values_are_no_obstacle(shape) -> None:
    net = nn.Conv2d(3, 4, 3)
    net.empty = nn.Parameter(torch.zeros(shape))
    assert fingerprint_of(net, 3, SIZE) is not None
