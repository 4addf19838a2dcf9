"""The Hugging Face Hub: networks and weights in repositories, read with the Hub's own client."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fake_hub import COMMIT, serving
from huggingface_hub import constants, errors
from huggingface_hub.utils import httpx
from safetensors.torch import save_file
from small_cards import TWO_CHANNELS as CARD
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from pixel_level_contrastive_learning import export, load_backbone
from pixel_level_contrastive_learning.backbones.checkpoint import (
    is_file,
    read_backbone,
    save_backbone,
    save_card,
)
from pixel_level_contrastive_learning.backbones.factory import (
    build_backbone,
    default_image_size,
    default_layers,
    default_statistics,
)
from pixel_level_contrastive_learning.backbones.hub import (
    Repository,
    explain_hub_errors,
    hub_config,
    place_of,
)
from pixel_level_contrastive_learning.backbones.push import push
from pixel_level_contrastive_learning.backbones.state_dict import load_weights
from pixel_level_contrastive_learning.files import CannotWriteError
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo

MODEL = "timm/test_resnet"
TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    with serving(tmp_path / "hub", monkeypatch) as root:
        yield root


def of_ours(root: Path, **card: Any) -> nn.Module:
    """A repository ``me/ours``."""
    net = build_backbone(MODEL, channels=2)
    fields = json.loads(CARD.to_json()) | card
    save_backbone(root / "me/ours/backbone.safetensors", net, CARD)
    (root / "me/ours/backbone.json").write_text(json.dumps(fields))
    return net


def of_timm(root: Path, **settings: Any) -> nn.Module:
    """A repository ``me/timm``, as timm writes it."""
    net = timm.create_model("test_vit", num_classes=7, **settings)
    timm.models.save_for_hf(net, root / "me/timm", model_args=settings)
    return net


def of_transformers(root: Path, family: str = "vit", **settings: Any) -> nn.Module:
    """A repository ``me/transformers`` of a classifier, which has the backbone under a prefix."""
    config = AutoConfig.for_model(family, **settings or TOKENS)
    net = AutoModelForImageClassification.from_config(config)
    net.save_pretrained(root / "me/transformers")
    fed = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (root / "me/transformers/preprocessor_config.json").write_text(json.dumps(fed))
    return net


def same(one: nn.Module, two: nn.Module) -> bool:
    """Whether the second network has all weights of the first."""
    weights = two.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


# Names.


def test_a_name_is_a_repository_a_revision_and_a_file() -> None:
    assert place_of("hf://me/net") == ("me/net", None, None)
    assert place_of("hf://me/net@v1/sub/net.pth") == ("me/net", "v1", "sub/net.pth")
    assert place_of("hf://me/net@refs/pr/3/a@b.pth") == ("me/net", "refs/pr/3", "a@b.pth")
    assert place_of("hf://me/net@refs/convert/a") == ("me/net", "refs/convert/a", None)
    for name in ("hf://me", "hf://", "hf:///net", "hf://me/net@"):
        with pytest.raises(ValueError, match="is no repository; give hf://OWNER/NAME or hf://"):
            place_of(name)
    with pytest.raises(ValueError, match="a file; give the repository alone: hf://me/net"):
        build_backbone("hf://me/net/net.pth")


# Weights.


def test_the_one_file_of_weights_is_taken_and_safetensors_first(hub) -> None:
    net = build_backbone(MODEL, channels=2)
    save_file(net.state_dict(), hub / "net.safetensors")
    (hub / "me/net").mkdir(parents=True)
    torch.save({"state_dict": net.state_dict()}, hub / "me/net/net.pth")
    fresh = build_backbone(MODEL, channels=2)
    assert load_weights(fresh, "hf://me/net").complete
    assert same(fresh, net)

    other = {name: value + 1 for name, value in net.state_dict().items()}
    save_file(other, hub / "me/net/model.safetensors")
    load_weights(fresh, "hf://me/net")
    assert not same(fresh, net)
    load_weights(fresh, f"hf://me/net@{COMMIT}/net.pth")
    assert same(fresh, net)

    save_file(other, hub / "me/net/open_clip_model.safetensors")
    load_weights(fresh, "hf://me/net")
    assert same(fresh, net) is False
    (hub / "me/net/model.safetensors").rename(hub / "me/net/best.safetensors")
    with pytest.raises(ValueError) as error:
        load_weights(fresh, "hf://me/net")
    assert str(error.value) == (
        "hf://me/net has several files of weights: best.safetensors, open_clip_model.safetensors; "
        "name a file as weights: --weights hf://me/net/best.safetensors"
    )
    save_backbone(hub / "me/net/backbone.safetensors", net, CARD)
    load_weights(fresh, "hf://me/net")
    assert same(fresh, net)


def test_the_weights_of_torch_are_told_from_arguments_and_shards_are_refused(hub) -> None:
    net = build_backbone(MODEL, channels=2)
    (hub / "me/net").mkdir(parents=True)
    torch.save(net.state_dict(), hub / "me/net/pytorch_model.bin")
    torch.save({"lr": 0.1}, hub / "me/net/training_args.bin")
    assert load_weights(build_backbone(MODEL, channels=2), "hf://me/net").complete
    save_file(net.state_dict(), hub / "me/net/a-00001-of-00002.safetensors")
    (hub / "me/net/pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="hf://me/net has sharded weights, which are not"):
        load_weights(net, "hf://me/net")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("hf://me/nothing", "there is no repository me/nothing on the Hub, or it is private; che"),
        ("hf://me/net@v9", "there is no hf://me/net@v9; for the revisions see https://hugging"),
        ("hf://me/net/a.pth", "hf://me/net has no file a.pth; it has README.md"),
        ("hf://me/net", "hf://me/net has no weights; name a file as weights: --weights hf"),
        ("hf://m e/net", "hf://m e/net is not a valid repository name: "),
    ],
)
def test_what_is_not_on_the_hub_is_named(hub, name, complaint) -> None:
    (hub / "me/net").mkdir(parents=True)
    (hub / "me/net/README.md").write_text("# Net")
    with pytest.raises(ValueError) as error:
        load_weights(nn.Linear(1, 1), name)
    assert str(error.value).startswith(complaint)


def answered(status: int) -> Exception:
    """What the Hub's client raises for an answer of this status."""
    response = httpx.Response(status, request=httpx.Request("GET", "x:"))
    return errors.HfHubHTTPError("oh", response=response)


def not_kept(cause: Exception) -> Exception:
    """What it raises where the file is not in the cache either."""
    error = errors.LocalEntryNotFoundError("oh")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (answered(403), ValueError, "the Hub refuses hf://me/net: oh; log in with"),
        *((answered(n), ConnectionError, "the Hub does not serve") for n in (429, 500, 503)),
        (not_kept(answered(503)), ConnectionError, "the Hub does not serve"),
        (not_kept(answered(403)), ValueError, "the Hub refuses hf://me/net: oh; log in with"),
        (not_kept(httpx.ConnectError("oh")), ConnectionError, "could not be reached: oh; check"),
        (httpx.ConnectError("oh"), ConnectionError, "hf://me/net could not be reached: oh; check"),
        (ConnectionResetError(104, "oh"), ConnectionError, "hf://me/net could not be reached: "),
        (OSError(28, "No space"), CannotWriteError, "hf://me/net could not be cached: "),
        (PermissionError(13, "oh", "/x"), CannotWriteError, "set HF_HOME to a writable folder"),
    ],
)
def test_what_fails_is_told_from_what_is_refused(error, kind, message) -> None:
    place = Repository("me/net", None, None)
    with pytest.raises(kind, match=message), explain_hub_errors(place):
        raise error from error.__cause__


def test_a_cache_that_cannot_be_written_is_not_taken_for_the_connection(
    hub, tmp_path, monkeypatch
) -> None:
    of_ours(hub)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CannotWriteError, match="hf://me/ours could not be cached"):
        load_backbone("hf://me/ours")


def test_offline_the_cache_is_read_and_what_it_lacks_is_said(hub, monkeypatch) -> None:
    net = of_ours(hub)
    first = load_backbone("hf://me/ours")
    hub_config.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load_backbone("hf://me/ours"), net)
    assert same(first, net)
    for name in ("hf://me/other", "hf://me/other/net.pth"):
        with pytest.raises(ConnectionError) as error:
            load_weights(net, name)
        said = str(error.value)
        assert said.startswith("hf://me/other could not be reached: ")
        assert said.endswith("download the files on another machine and give their path")


def test_without_its_client_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs the extra hub: pip install 'pixel-.*\[hu"
    ):
        load_backbone("hf://me/net")


# Networks.


def test_a_repository_of_ours_is_a_backbone_with_its_card(hub) -> None:
    net = of_ours(hub)
    for name in ("hf://me/ours", f"hf://me/ours@{COMMIT}", "hf://me/ours/backbone.safetensors"):
        loaded = read_backbone(name)
        assert loaded.card == CARD
        assert same(loaded.net, net)
    assert is_file("hf://me/ours")
    assert not is_file("random:hf://me/ours")
    assert not same(read_backbone("random:hf://me/ours", channels=2).net, net)
    assert build_backbone("hf://me/ours", channels=5).conv1[0].in_channels == 5
    started = build_backbone("hf://me/ours", channels=2, pretrained=True)
    assert same(started, net)
    assert default_statistics("hf://me/ours", 2) == ((0.1, 0.2), (0.3, 0.4))


@pytest.mark.parametrize("run", ["", "runs/first/"])
def test_a_checkpoint_of_a_run_on_the_hub_has_the_card_of_its_run(hub, run) -> None:
    net, folder = build_backbone(MODEL, channels=2), hub / "me/runs" / run
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"backbone": net.state_dict()}, folder / "checkpoints/last.ckpt")
    save_card(folder / "backbone.json", CARD)
    loaded = read_backbone(f"hf://me/runs/{run}checkpoints/last.ckpt")
    assert loaded.card == CARD
    assert same(loaded.net, net)


@pytest.mark.parametrize("model", ["/home/me/mine.py:build", "os.path:join", "object:Net"])
def test_no_code_that_a_repository_names_is_run(hub, model) -> None:
    net = of_ours(hub, model=model)
    for use in (
        lambda: load_backbone("hf://me/ours"),
        lambda: build_backbone("hf://me/ours"),
        lambda: export("hf://me/ours", "safetensors", hub / "net.safetensors"),
        lambda: push("hf://me/ours", "me/other", dry_run=True),
    ):
        with pytest.raises(ValueError, match=r"has weights of .*, but not its code; g"):
            use()
    given = load_backbone("hf://me/ours", model=lambda: build_backbone(MODEL, channels=2))
    assert same(given, net)


def test_no_code_is_run_that_the_configuration_in_a_card_names(hub, monkeypatch) -> None:
    net = of_ours(hub, config={"model": "evil:build"})
    (hub / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(hub)
    done = export("hf://me/ours", "state-dict", hub / "net.pth", model=net)
    assert "net = ...  # your network" in done.how_to


def test_an_export_of_a_repository_is_not_written_into_its_cache(hub) -> None:
    net = of_ours(hub)
    with pytest.raises(
        ValueError, match="out is None, and hf://me/ours is not a run's folder; name"
    ):
        export("hf://me/ours", "state-dict")
    done = export("hf://me/ours", "state-dict", hub / "net.pth")
    assert same(load_backbone(done.path), net)


def test_a_repository_of_timm_is_built_and_filled(hub) -> None:
    net = of_timm(hub, depth=3)
    assert not is_file("hf://me/timm")
    loaded = read_backbone("hf://me/timm")
    assert same(loaded.net, net)
    assert (loaded.card.start, loaded.card.image_size) == ("pretrained", (160, 160))
    assert loaded.card.mean == timm.get_pretrained_cfg("test_vit").mean
    sized = build_backbone("hf://me/timm", channels=2, image_size=(64, 96), pretrained=True)
    assert sized.pos_embed.shape[1] == 4 * 6 + 1
    assert torch.equal(sized.head.weight, net.head.weight)
    assert not same(read_backbone("random:hf://me/timm").net, net)


def test_weights_that_a_repository_lacks_are_told(hub) -> None:
    state = of_timm(hub).state_dict()
    del state["blocks.0.norm1.weight"]
    save_file(state, hub / "me/timm/model.safetensors")
    with pytest.warns(
        UserWarning, match=r"does not fill all of hf://me/timm: (?s:.*)missing 1: bl"
    ):
        build_backbone("hf://me/timm", pretrained=True)


def test_a_repository_of_transformers_is_built_and_filled(hub) -> None:
    net = of_transformers(hub)
    loaded = read_backbone("hf://me/transformers")
    weights = {n: v for n, v in loaded.net.state_dict().items() if not n.startswith("pooler")}
    assert all(torch.equal(value, net.vit.state_dict()[name]) for name, value in weights.items())
    card = loaded.card
    assert (card.image_size, card.pixel_layer, card.instance_layer) == (
        (64, 64),
        "layernorm",
        "layernorm",
    )
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert default_image_size("hf://me/transformers") == (64, 64)


@pytest.mark.parametrize(
    ("fed", "statistics"),
    [
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (0, 1)),
        ({"do_rescale": True}, (0, 1)),  # as of MobileViT, which normalises nothing
        ({"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (0.5, 0.5)),
    ],
    ids=["off", "never", "on"],
)
def test_images_are_normalised_as_the_repository_says(hub, fed, statistics) -> None:
    of_transformers(hub)
    (hub / "me/transformers/preprocessor_config.json").write_text(json.dumps(fed))
    for channels in (3, 2):
        stats = default_statistics("hf://me/transformers", channels)
        assert stats == tuple((value,) * channels for value in statistics)


@pytest.mark.parametrize("flips", [True, False])
def test_a_network_for_blue_green_red_takes_red_green_blue(hub, flips, tmp_path) -> None:
    small = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7}
    library = of_transformers(hub, "mobilevit", **small).mobilevit.conv_stem.convolution
    fed = {"do_rescale": True, "do_flip_channel_order": flips}
    (hub / "me/transformers/preprocessor_config.json").write_text(json.dumps(fed))
    images = torch.rand(1, 3, 64, 64)
    expected = library(images.flip(1) if flips else images)

    name = "hf://me/transformers"
    loaded = read_backbone(name).net
    by_weights = build_backbone(name)
    load_weights(by_weights, name)
    exported = export(name, "transformers", tmp_path / "exported")
    assert "red green blue" in exported.how_to
    for net in (loaded, by_weights, AutoModel.from_pretrained(exported.path)):
        torch.testing.assert_close(net.conv_stem.convolution(images), expected)
    gray = build_backbone(name, channels=1)
    load_weights(gray, name)
    stem = gray.conv_stem.convolution.weight
    torch.testing.assert_close(stem, library.weight.sum(1, keepdim=True))


def test_a_config_of_transformers_that_names_a_model_is_no_card_of_ours(hub) -> None:
    net = of_transformers(hub)
    path = hub / "me/transformers/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "vit"}))
    loaded = read_backbone("hf://me/transformers")
    assert loaded.net.layernorm.weight.equal(net.vit.layernorm.weight)


@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_networks_of_transformers_are_fitted_to_the_images(hub, size) -> None:
    net = of_transformers(hub)
    fitted = build_backbone("hf://me/transformers", channels=2, image_size=size, pretrained=True)
    table = fitted.embeddings.position_embeddings
    assert table.shape[1] == size[0] // 16 * size[1] // 16 + 1
    assert torch.equal(table[:, 0], net.vit.embeddings.position_embeddings[:, 0])
    assert table[:, 1:].abs().min() > 0
    assert fitted(torch.rand(1, 2, *size)).last_hidden_state.shape[1] == table.shape[1]
    stem = fitted.embeddings.patch_embeddings.projection.weight
    assert torch.allclose(
        stem[:, 0], 1.5 * net.vit.embeddings.patch_embeddings.projection.weight[:, 0]
    )


WINDOWS = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "image_size": [64, 64]}


@pytest.mark.parametrize(
    ("family", "settings", "size"),
    [("dinov2", TOKENS, (64, 96)), ("hiera", WINDOWS, (128, 128)), ("hiera", WINDOWS, (128, 192))],
)
def test_networks_that_take_one_form_of_size_take_all_images(hub, family, settings, size) -> None:
    of_transformers(hub, family, **settings)
    net = build_backbone("hf://me/transformers", channels=2, image_size=size)
    pixel, _ = default_layers(FeatureInfo(net, 2, size))
    stride = 16 if family == "dinov2" else 32
    grid = FeatureInfo(net, 2, size).hook(pixel, pixel=True).layout.grid
    assert grid == (size[0] // stride, size[1] // stride)


def test_a_network_of_square_images_alone_is_refused_when_it_is_built(hub, monkeypatch) -> None:
    config = AutoConfig.for_model("clip_vision_model", **TOKENS).to_dict()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"hf://me/transformers cannot be built for images of 64x96: .*; it is made for 64x64"
    with pytest.raises(ValueError, match=message):
        build_backbone("hf://me/transformers", image_size=(64, 96), config=config)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_a_network_with_a_text_part_the_vision_part_is_taken(hub, family) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    config = AutoConfig.for_model(family, vision_config=TOKENS, text_config=text)
    net = AutoModel.from_config(config)
    net.save_pretrained(hub / "me/both")
    loaded = build_backbone("hf://me/both", image_size=96, pretrained=True)
    vision = dict(net.vision_model.named_parameters())
    assert {n for n, p in loaded.named_parameters() if n in vision and not p.equal(vision[n])} == {
        "embeddings.position_embedding.weight"
    }
    assert default_layers(FeatureInfo(loaded, 3, (96, 96)))[0]


def test_a_run_records_what_rebuilds_its_network(hub, tmp_path) -> None:
    """Without the repository: the card has its configuration."""
    of_transformers(hub, "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    net, card, _ = read_backbone("hf://me/transformers", channels=2)
    save_backbone(tmp_path / "run/backbone.safetensors", net, card)
    hub_config.cache_clear()
    for file in (hub / "me/transformers").iterdir():
        file.unlink()
    assert same(load_backbone(tmp_path / "run"), net)


@pytest.mark.parametrize("content", ["{}", "[]", None])
def test_a_repository_that_describes_no_network_is_refused(hub, content) -> None:
    (hub / "me/net").mkdir(parents=True)
    if content is not None:
        (hub / "me/net/config.json").write_text(content)
    with pytest.raises(ValueError, match=r"hf://me/net describes no network: .* --weights hf://me"):
        build_backbone("hf://me/net")


def test_a_network_that_transformers_does_not_know_is_refused(hub) -> None:
    (hub / "me/net").mkdir(parents=True)
    (hub / "me/net/config.json").write_text('{"model_type": "vitt"}')
    with pytest.raises(ValueError, match="no networks of the kind 'vitt'; update transformers"):
        build_backbone("hf://me/net")


# Exports of such networks.


@pytest.mark.parametrize(
    ("repository", "form"),
    [
        ("transformers", "transformers"),
        ("transformers", "safetensors"),
        ("timm", "timm"),
        ("timm", "state-dict"),
        ("ours", "timm"),
    ],
)
def test_a_network_of_the_hub_is_exported_with_what_builds_it(
    hub, tmp_path, repository, form
) -> None:
    {"transformers": of_transformers, "timm": of_timm, "ours": of_ours}[repository](hub)
    net, card, _ = read_backbone(f"random:hf://me/{repository}", channels=2, image_size=(96, 64))
    save_backbone(tmp_path / "run/backbone.safetensors", net, card)
    hub_config.cache_clear()
    for file in (hub / "me" / repository).iterdir():
        file.unlink()
    done = export(tmp_path / "run", form)
    assert done.report.complete
    names: dict[str, Any] = {}
    exec(done.how_to, names)
    assert type(names["net"]) is type(net)
    assert same(names["net"], net)
    if form == "transformers":
        assert done.path == tmp_path / "run/backbone-transformers"
        given = export(tmp_path / "run", form, tmp_path / "other", model=net)
        assert same(AutoModel.from_pretrained(given.path), net)
    elif repository != "transformers":
        with pytest.raises(
            ValueError, match="format is 'transformers', which does not fit hf://me"
        ):
            export(tmp_path / "run", "transformers")
