"""The card of a backbone: what is needed to use its weights."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

from pixel_level_contrastive_learning.backbones.checkpoint import BackboneCard, read_card

CARD = BackboneCard(
    model="torchvision/resnet18",
    channels=2,
    image_size=(64, 96),
    mean=(0.1, 0.2),
    std=(0.3, 0.4),
    low=(0.0, 1.5),
    high=(4095.0, 2000.0),
    pixel_layer="layer4",
    instance_layer="avgpool",
    start="Gewichte für später.pth",
    seed=7,
)


def test_a_card_comes_back_as_it_was() -> None:
    assert BackboneCard.from_json(CARD.to_json()) == CARD
    assert CARD.version == version("pixel-level-contrastive-learning")


def test_a_card_can_be_read_by_anyone() -> None:
    held = json.loads(CARD.to_json())
    assert held["image_size"] == [64, 96]
    assert held["high"] == [4095.0, 2000.0]
    assert "später" in CARD.to_json()


def test_fields_with_a_default_may_be_left_out() -> None:
    held = json.loads(CARD.to_json())
    for name in ("low", "high", "start", "seed", "version"):
        del held[name]
    card = BackboneCard.from_json(json.dumps(held))
    assert (card.low, card.high, card.start, card.seed) == (None, None, "random", 0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"channels": 0}, "channels is 0; it must be a whole number of at least 1"),
        ({"mean": [0.1]}, "mean is (0.1,); it must be 2 numbers, one a channel"),
        ({"std": [0.1, 0]}, "std is (0.1, 0); every value must be above 0"),
        ({"image_size": [0, 3]}, "image_size is (0, 3)"),
        (
            {"sede": 3},
            "field is 'sede'; it must be one of 'model', 'channels', 'image_size', 'mean'",
        ),
    ],
)
def test_a_wrong_card_is_refused(change, complaint, tmp_path) -> None:
    held = json.loads(CARD.to_json()) | change
    (tmp_path / "net.json").write_text(json.dumps(held))
    with pytest.raises(ValueError) as error:
        read_card(tmp_path / "net.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'net.json'} is not a backbone's card: ")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting property name"),
        ("[]", "it is a list, not an object with fields"),
        (
            '{"model": "x"}',
            "missing 6 required keyword-only arguments: 'channels', 'image_size', 'mean'",
        ),
    ],
)
def test_what_is_no_card_is_refused(text, complaint, tmp_path) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_card(tmp_path / "net.safetensors")
    assert complaint in str(error.value)


def test_without_a_card_one_is_told_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError) as error:
        read_card(tmp_path / "net.pth")
    assert str(error.value) == (
        f"{tmp_path / 'net.pth'} has no card net.json beside it, which says what network it is of; "
        "put the card there, or load it into a network of your own: load_weights(net, path)"
    )


def test_weights_in_any_folder_have_their_own_card(tmp_path) -> None:
    """Only a run's checkpoints have that of the run, which lies above them."""
    own = tmp_path / "checkpoints" / "improved.pt"
    own.parent.mkdir()
    own.with_suffix(".json").write_text(CARD.to_json())
    (tmp_path / "backbone.json").write_text(replace(CARD, seed=8).to_json())
    assert read_card(own).seed == 7
    assert read_card(own.with_name("step-00000001.ckpt")).seed == 8
