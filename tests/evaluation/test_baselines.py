"""Contenders: which networks stand beside those that were asked for, and with which weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_cards import small_card

from pixel_level_contrastive_learning import PixelCL
from pixel_level_contrastive_learning.backbones.checkpoint import (
    card_of,
    save_backbone,
    save_card,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.evaluation.baselines import (
    kinds_of,
    line_up,
    random_net,
    reading_of,
    sizing_contender,
)


def run(folder, model, shift, **settings):
    """A run whose weights are those of seed 0 plus a number."""
    net = random_net(small_card(model, **settings), 0)
    with torch.no_grad():
        net.body.bias += shift
    save_backbone(folder / "backbone.safetensors", net, small_card(model, **settings))
    return folder


def biases(contenders) -> list[torch.Tensor]:
    return [contender.build(0).body.bias for contender in contenders]


def line_up_labelled(labelled, *weights):
    return line_up(weights, open_source(str(labelled / "images")))


def test_random_weights_stand_alone(labelled, model) -> None:
    contenders, _ = line_up_labelled(labelled, f"random:{model}")
    assert [contender.name for contender in contenders] == ["random weights"]
    assert (contenders[0].card.model, contenders[0].card.channels) == (model, 3)
    (random,) = contenders
    state = torch.get_rng_state()
    one, again, other = (random.build(seed).body.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_file_of_a_model_is_the_same_by_any_path(model, monkeypatch) -> None:
    """A run records it by its absolute path."""
    monkeypatch.chdir(Path(model).parent)
    cards = small_card(model), small_card(Path(model).name)
    one, two = kinds_of(["run", f"random:{Path(model).name}"], cards, None)
    assert one == two


def test_a_run_from_random_weights_stands_beside_others(labelled, model, tmp_path) -> None:
    folder = run(tmp_path / "run", model, 1.0)
    contenders, notes = line_up_labelled(labelled, folder)
    assert [contender.name for contender in contenders] == ["random weights", str(folder)]
    assert [contender.by_seed for contender in contenders] == [True, False]
    random, trained = biases(contenders)
    torch.testing.assert_close(trained, random + 1)
    assert contenders[-1].card == small_card(model)
    assert notes == []


def test_what_a_loop_of_ones_own_has_saved_stands_beside_others(labelled, model, tmp_path) -> None:
    net = random_net(small_card(model), 0)
    learner = PixelCL(net, 32, projection_size=8, projection_hidden_size=8)
    with torch.no_grad():
        learner.net.body.bias += 1
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    save_card(path, card_of(learner, model))
    contenders, _ = line_up_labelled(labelled, path)
    assert [contender.name for contender in contenders] == ["random weights", str(path)]
    random, trained = biases(contenders)
    torch.testing.assert_close(trained, random + 1)


def test_weights_that_a_run_started_from_stand_between(labelled, model, tmp_path) -> None:
    before = run(tmp_path / "before", model, 1.0)
    folder = run(tmp_path / "run", model, 2.0, start=str(before / "backbone.safetensors"))
    contenders, _ = line_up_labelled(labelled, folder)
    names = [contender.name for contender in contenders]
    assert names == ["random weights", "start (backbone.safetensors)", str(folder)]
    random, start, trained = biases(contenders)
    torch.testing.assert_close(start, random + 1)
    torch.testing.assert_close(trained, random + 2)


def test_random_weights_that_began_shut_stand_between(labelled, tmp_path) -> None:
    resnet = small_card("torchvision/resnet18", pixel_layer="layer4", instance_layer="avgpool")
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, random_net(resnet, 3), replace(resnet, start="zero-init residual"))
    contenders, _ = line_up_labelled(labelled, path)
    names = [contender.name for contender in contenders]
    assert names == ["random weights", "start (zero-init residual)", str(path)]
    assert [contender.by_seed for contender in contenders] == [True, True, False]
    for seed in (0, 1):
        random, start = (contender.build(seed).layer4[1] for contender in contenders[:2])
        assert torch.equal(random.conv2.weight, start.conv2.weight)
        assert random.bn2.weight.all()
        assert not start.bn2.weight.any()


def test_where_nothing_can_begin_shut_random_weights_are_the_start(
    labelled, model, tmp_path
) -> None:
    folder = run(tmp_path / "run", model, 1.0, start="zero-init residual")
    contenders, _ = line_up_labelled(labelled, folder)
    assert [contender.name for contender in contenders] == ["random weights", str(folder)]


def test_weights_that_are_gone_are_noted(labelled, model, tmp_path) -> None:
    gone = str(tmp_path / "gone.pt")
    runs = [str(run(tmp_path / name, model, 2.0, start=gone)) for name in ("run", "other")]
    contenders, notes = line_up_labelled(labelled, *runs)
    assert [contender.name for contender in contenders] == ["random weights", *runs]
    (note,) = notes  # once
    assert note.startswith(f"The starting weights ({tmp_path / 'gone.pt'}) are not available: ")


def test_fresh_weights_scale_deep_values_by_what_is_found(tmp_path, model) -> None:
    from numpy import save

    for number in range(3):
        values = torch.rand(40, 40, 3) * 1000 + 500
        save(tmp_path / f"{number}.npy", values.numpy())
    contenders, _ = line_up([f"random:{model}"], open_source(str(tmp_path)))
    assert contenders[-1].card.low == pytest.approx((500,) * 3, rel=0.02)
    assert contenders[-1].card.high == pytest.approx((1500,) * 3, rel=0.02)


def test_fresh_weights_take_the_channels_of_the_images(tmp_path, model) -> None:
    from PIL import Image

    for number in range(3):
        Image.new("L", (40, 40), 60 * number).save(tmp_path / f"{number}.png")
    contenders, _ = line_up([f"random:{model}"], open_source(str(tmp_path)))
    assert contenders[-1].card.channels == 1
    assert contenders[0].build(0).stem.in_channels == 1


def test_libraries_give_their_own_weights(labelled, monkeypatch) -> None:
    """Pretrained weights come from the internet: here they are random ones that stand in."""
    from pixel_level_contrastive_learning.backbones import checkpoint

    asked = []

    def built(model, **settings):
        asked.append(settings.pop("pretrained"))
        return build_backbone(model, **settings)

    monkeypatch.setattr(checkpoint, "build_backbone", built)
    contenders, _ = line_up_labelled(labelled, "torchvision/resnet18")
    names = [contender.name for contender in contenders]
    assert names == ["random weights", "torchvision/resnet18"]
    assert asked == [True]
    assert contenders[-1].card.start == "pretrained"
    assert replace(contenders[-1].card, low=None) == contenders[-1].card


def test_weights_that_are_not_there_are_refused(labelled, tmp_path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        line_up_labelled(labelled, tmp_path / "nowhere")


def test_several_weights_share_what_they_must_beat(labelled, model, tmp_path) -> None:
    before = run(tmp_path / "before", model, 1.0)
    start = str(before / "backbone.safetensors")
    one, two = (run(tmp_path / name, model, 2.0, start=start) for name in ("one", "two"))
    other = tmp_path / "other" / "backbone.safetensors"
    resnet = small_card("torchvision/resnet18", pixel_layer="layer4", instance_layer="avgpool")
    save_backbone(other, random_net(resnet, 3), resnet)
    contenders, notes = line_up_labelled(labelled, one, other, two)
    random, resnets = f"random weights ({model})", "random weights (torchvision/resnet18)"
    start_name = "start (backbone.safetensors)"
    assert {contender.name: contender.baselines for contender in contenders} == {
        random: (),
        resnets: (),
        start_name: (),
        str(one): (random, start_name),
        str(other): (resnets,),
        str(two): (random, start_name),
    }
    assert notes == []
    assert sizing_contender(contenders).card == contenders[3].card
    contenders, _ = line_up_labelled(labelled, f"random:{model}", other, one)
    assert sizing_contender(contenders).card == resnet  # of the first file


def test_runs_of_one_model_on_other_channels_are_told_apart(labelled, model, tmp_path) -> None:
    start = str(run(tmp_path / "before", model, 1.0) / "backbone.safetensors")
    runs = [
        run(tmp_path / f"{n}", model, 2.0, start=start, channels=n, mean=(0.5,) * n, std=(0.2,) * n)
        for n in range(1, 5)
    ]
    contenders, _ = line_up_labelled(labelled, *runs)
    names = [contender.name for contender in contenders]
    words = ["1 channel", *(f"{n} channels" for n in (2, 3, 4))]
    assert names[:4] == [f"random weights ({word})" for word in words]
    assert names[4:8] == [f"start (backbone.safetensors, {word})" for word in words]
    assert [contender.build(0).stem.in_channels for contender in contenders] == [1, 2, 3, 4] * 3
    assert [contender.baselines for contender in contenders[8:]] == [
        (names[k], names[k + 4]) for k in range(4)
    ]


def test_starts_of_one_file_name_are_told_apart(labelled, model, tmp_path) -> None:
    starts = [str(run(tmp_path / name, model, 1.0) / "backbone.safetensors") for name in "ab"]
    runs = [run(tmp_path / f"{k}", model, 2.0, start=path) for k, path in enumerate(starts)]
    contenders, _ = line_up_labelled(labelled, *runs)
    names = [contender.name for contender in contenders]
    assert names[1:3] == [f"start ({path})" for path in starts]
    assert [contender.baselines[1] for contender in contenders[3:]] == names[1:3]


def test_runs_that_are_read_or_fed_otherwise_have_their_own_random_weights(
    labelled, model, tmp_path
) -> None:
    """Figures of random weights change with the layer and with how images are normalised."""
    start = str(run(tmp_path / "before", model, 1.0) / "backbone.safetensors")
    several = {
        "deep": {},
        "alike": {},
        "shallow": {"pixel_layer": "stem"},
        "bright": {"mean": (0.7,) * 3},
        "scaled": {"low": (0.0,) * 3, "high": (9.0,) * 3},
    }
    runs = [
        run(tmp_path / name, model, 2.0, start=start, **settings)
        for name, settings in several.items()
    ]
    body = [f"body, preprocessing of {name}" for name in ("deep", "bright", "scaled")]
    words = [body[0], "stem", *body[1:]]
    for order in (runs, runs[::-1]):
        contenders, _ = line_up_labelled(labelled, *order)
        by_name = {contender.name: contender for contender in contenders}
        for path in runs:
            contender = by_name[str(path)]
            for name in contender.baselines:
                assert replace(by_name[name].card, start=start) == contender.card
            assert len(contender.baselines) == 2
        assert len(contenders) == 4 + 4 + 5
    contenders, _ = line_up_labelled(labelled, *runs)
    assert [contender.name for contender in contenders[:8]] == [
        *(f"random weights ({word})" for word in words),
        *(f"start (backbone.safetensors, {word})" for word in words),
    ]
    contenders, _ = line_up(runs[:3], open_source(str(labelled / "images")), ["act"])
    assert [contender.name for contender in contenders[:2]] == [
        "random weights",
        "start (backbone.safetensors)",
    ]


@pytest.mark.parametrize(("name", "kinds"), [("vit_tiny_patch16_224", 2), ("resnet10t", 1)])
def test_networks_of_a_fixed_size_are_alike_only_at_that_size(name, kinds) -> None:
    card = small_card(f"timm/{name}", pixel_layer="norm")
    small, large = (replace(card, image_size=(side, side)) for side in (64, 96))
    result = kinds_of(["a", "b", "c"], [small, large, small], None)
    assert len(set(result)) == kinds


def test_images_are_read_as_the_runs_read_theirs(tmp_path) -> None:
    settings = {"a": "pages: first\nnodata: -9999.0", "b": "nodata: -9999.0", "c": "nodata: 0"}
    for name, lines in settings.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(lines)
    one, two, other = (str(tmp_path / name) for name in settings)
    assert reading_of([one]) == {"pages": "first", "nodata": -9999}
    assert reading_of([one, two, "random:timm/a"]) == {"pages": "first", "nodata": -9999}
    assert reading_of([one], pages="images", nodata=7.0) == {"pages": "images", "nodata": 7}
    assert reading_of(["torchvision/resnet18"]) == {"pages": None, "nodata": None}
    checkpoint = tmp_path / "a" / "checkpoints" / "best.ckpt"
    checkpoint.touch()
    assert reading_of([checkpoint]) == {"pages": "first", "nodata": -9999}
    with pytest.raises(ValueError) as error:
        reading_of([one, two, other])
    assert str(error.value) == (
        f"nodata is None, and the runs were trained with different values (-9999.0 in {two}, 0 in "
        f"{other}); give nodata (--nodata), or evaluate them one by one"
    )
    assert reading_of([one, other], nodata=0.0)["nodata"] == 0


def test_nan_is_no_value_beside_what_was_not_measured(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("nodata: .nan")
    both = str(tmp_path / "a"), str(tmp_path / "b")
    assert reading_of(both)["nodata"] is None
    (tmp_path / "b" / "config.yaml").write_text("nodata: 7.0")
    assert reading_of(both)["nodata"] == 7
    assert reading_of(both, nodata=float("nan"))["nodata"] is None  # not that of a run


def test_weights_named_twice_are_refused(labelled, model) -> None:
    with pytest.raises(ValueError, match=r"weights names random:.* twice; name each once"):
        line_up_labelled(labelled, f"random:{model}", f"random:{model}")


def test_weights_called_as_a_row_beside_them_are_refused(
    labelled, model, tmp_path, monkeypatch
) -> None:
    folder = run(tmp_path / "random weights", model, 1.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        line_up_labelled(labelled, "random weights")
    assert str(error.value).startswith("weights names random weights, which is what a row to")
    assert str(error.value).endswith(f"give it as {folder}")
    contenders, _ = line_up_labelled(labelled, str(folder))
    assert [contender.name for contender in contenders] == ["random weights", str(folder)]
