"""Keys: which weights of a file belong where, and what is said of the rest."""

import copy
import pickle
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings
from transformers import ViTConfig, ViTModel

from pixel_level_contrastive_learning.backbones.state_dict import (
    KeyReport,
    load_weights,
    read_state_dict,
)
from pixel_level_contrastive_learning.backbones.stem import adapt_input_conv


def small(classes: int = 10, channels: int = 3) -> nn.Module:
    """A network with a stem, a batch norm and a classifier."""
    net = nn.Module()
    net.stem = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4))
    net.head = nn.Linear(4, classes)
    return net


def same(one: nn.Module, two: nn.Module) -> bool:
    """Whether two networks hold the same weights."""
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


NAMES = list(small().state_dict())

# Names, and what is wrapped around them.


@pytest.mark.parametrize(
    "beginning",
    ["", "module.", "backbone.", "encoder.", "module._orig_mod.", "online_encoder.net."],
)
def test_whatever_was_wrapped_around_is_taken_off(beginning, tmp_path) -> None:
    given, net = small(), small()
    state = {beginning + name: value for name, value in given.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    report = load_weights(net, tmp_path / "weights.pt")
    plain = beginning.replace("_orig_mod.", "")
    assert report == KeyReport(NAMES, [], [], [], {}, (plain,))
    assert str(report) == f"matched 9 of 9 keys{f', those of {plain}' * bool(plain)}"
    assert report.complete
    assert same(net, given)


@pytest.mark.parametrize("key", ["state_dict", "model", "whatever"])
def test_a_checkpoint_may_hold_the_weights_anywhere(key, tmp_path) -> None:
    given, net = small(), small()
    optimizer = torch.optim.Adam(given.parameters())
    state = {f"module.{name}": value for name, value in given.state_dict().items()}
    value = {"epoch": 3, key: state, "optimizer": optimizer.state_dict(), "note": "mine"}
    torch.save(value, tmp_path / "checkpoint.pth")
    assert load_weights(net, tmp_path / "checkpoint.pth").complete
    assert same(net, given)


@pytest.mark.parametrize(
    ("prefixes", "taken"),
    [
        (("a.", "b."), "a."),
        (("student.module.", "teacher."), "teacher."),
        (("teacher.", "student."), "teacher."),
        (("state_dict.", "state_dict_ema."), "state_dict_ema."),
    ],
    ids=str,
)
def test_of_two_networks_in_a_file_the_average_or_first_is_taken(prefixes, taken, tmp_path) -> None:
    nets, net = {prefix: small() for prefix in prefixes}, small()
    both = {p + n: tensor for p, given in nets.items() for n, tensor in given.state_dict().items()}
    torch.save(both, tmp_path / "both.pt")
    report = load_weights(net, tmp_path / "both.pt")
    assert same(net, nets[taken])
    [other] = {*prefixes} - {taken}
    assert str(report) == f"matched 9 of 9 keys, those of {taken}; also fits: {other}"


@pytest.mark.filterwarnings("ignore:.* fills only")
def test_of_two_networks_in_a_file_the_one_that_fits_is_taken(tmp_path) -> None:
    other = {name: torch.zeros(9, 9) for name in [*NAMES, "neck.weight"]}
    given, net = small(), small()
    state = given.state_dict()
    torch.save(
        {"large": other, "small": {"stem.0.weight": state["stem.0.weight"]}}, tmp_path / "two.pt"
    )
    assert load_weights(net, tmp_path / "two.pt").matched == ["stem.0.weight"]


@pytest.mark.parametrize("beginning", ["state_dict.", "module.", "state_dict.online_encoder.net."])
def test_prefixes_on_both_sides_are_matched(beginning, tmp_path) -> None:
    given, whole = small(), nn.ModuleDict({"backbone": small(), "decoder": nn.Linear(4, 4)})
    state = {beginning + name: value for name, value in given.state_dict().items()}
    torch.save(state | {"optimizer.0.exp": torch.zeros(3)}, tmp_path / "nested.pt")
    report = load_weights(whole, tmp_path / "nested.pt")
    assert report.missing == ["decoder.weight", "decoder.bias"]
    assert report.prefixes == (beginning,)
    assert same(whole["backbone"], given)


def test_a_file_of_a_part_fills_the_part(tmp_path) -> None:
    given, whole = small(), nn.ModuleDict({"encoder": small(), "decoder": nn.Linear(4, 4)})
    torch.save(given.state_dict(), tmp_path / "encoder.pt")
    report = load_weights(whole, tmp_path / "encoder.pt")
    assert report.matched == [f"encoder.{name}" for name in NAMES]
    assert report.missing == ["decoder.weight", "decoder.bias"]
    assert same(whole["encoder"], given)


def test_a_run_directory_is_its_backbone(tmp_path) -> None:
    given, net = small(), small()
    save_file(given.state_dict(), tmp_path / "backbone.safetensors")
    assert load_weights(net, tmp_path).complete
    assert same(net, given)


# What does not fit.


def test_what_does_not_fit_is_named_and_left_as_it_was(tmp_path) -> None:
    given, net = small(classes=7), small()
    state = given.state_dict()
    del state["head.bias"], state["stem.1.num_batches_tracked"]
    state["neck.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "weights.pt")
    before = net.head.weight.clone()
    report = load_weights(net, tmp_path / "weights.pt")
    assert report.matched == NAMES[:-3]
    assert report.missing == ["stem.1.num_batches_tracked", "head.bias"]
    assert report.mismatched == ["head.weight"]
    assert report.unexpected == ["neck.weight"]
    assert not report.complete
    assert str(report) == (
        "matched 6 of 9 keys\n"
        "missing 2: stem.1.num_batches_tracked, head.bias\n"
        "mismatched 1: head.weight (7, 4) for (10, 4)\n"
        "unexpected 1: neck.weight"
    )
    assert torch.equal(net.head.weight, before)


def test_a_long_list_is_cut() -> None:
    report = KeyReport(["a"], [f"layer{k}" for k in range(7)], [], [], {})
    assert str(report) == (
        "matched 1 of 8 keys\nmissing 7: layer0, layer1, layer2, layer3, layer4, and 2 more"
    )


def test_nothing_that_fits_is_an_error_that_shows_both_sides(tmp_path) -> None:
    path = tmp_path / "other.pt"
    other = {"trunk.conv.weight": torch.zeros(1), "stem.1.num_batches_tracked": torch.tensor(7)}
    torch.save(other, path)
    net = small()
    before = copy.deepcopy(net)
    with pytest.raises(ValueError) as error:
        load_weights(net, path)
    assert str(error.value) == (
        f"nothing in {path} fits Module: the file begins with trunk.conv.weight, "
        "stem.1.num_batches_tracked, the network with stem.0.weight, stem.0.bias, stem.1.weight; "
        "give weights of this model, or build the model they belong to"
    )
    assert same(net, before)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="the file begins with no tensor at all"):
        load_weights(net, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_weights_that_hold_nan_are_refused_and_nothing_is_loaded(tmp_path, dtype) -> None:
    net, state = small(), {name: value.to(dtype) for name, value in small().state_dict().items()}
    state["stem.0.weight"].view(torch.uint8)[..., -1] = 255  # NaN in each of these types
    state["stem.0.weight"].view(torch.uint8)[..., -2] = 255
    before = copy.deepcopy(net)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"NaN in 1 of 9 tensors \(stem.0.weight\), .* earlier"):
        load_weights(net, tmp_path / "net.safetensors")
    assert same(net, before)
    state["stem.0.weight"] = net.stem[0].weight.detach()
    state["unused"] = torch.tensor([torch.nan])
    save_file(state, tmp_path / "net.safetensors")
    assert load_weights(net, tmp_path / "net.safetensors").unexpected == ["unused"]


def test_biases_and_classifiers_alone_are_no_match_and_little_is_a_warning(tmp_path) -> None:
    given, net = small(), small()
    net.stem[0] = nn.Conv2d(3, 40, 3)
    net.stem.append(nn.Conv2d(40, 4, 3))
    torch.save(given.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"nothing in .* fits Module"):  # but batch norm and head
        load_weights(net, tmp_path / "weights.pt")
    net.stem[2], given.stem = nn.Conv2d(4, 4, 3), nn.Sequential(*given.stem, nn.Conv2d(4, 4, 3))
    torch.save(given.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"fills only 13% of Module .*model\? matched 9 of 11"):
        load_weights(net, tmp_path / "weights.pt")


# What is fitted.


def test_a_stem_is_spread_to_other_channels(tmp_path) -> None:
    given, net = small(), small(channels=5)
    torch.save(given.state_dict(), tmp_path / "rgb.pt")
    report = load_weights(net, tmp_path / "rgb.pt")
    assert report.complete
    assert report.shapes == {"stem.0.weight": ((4, 3, 3, 3), (4, 5, 3, 3))}
    assert "adapted to this input 1: stem.0.weight (4, 3, 3, 3) for (4, 5, 3, 3)" in str(report)
    torch.testing.assert_close(net.stem[0].weight, adapt_input_conv(5, given.stem[0].weight))


def test_position_embeddings_of_torchvision_are_resampled(tmp_path) -> None:
    sizes = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    given = models.VisionTransformer(image_size=64, **sizes)
    nn.init.normal_(given.encoder.pos_embedding)
    net = models.VisionTransformer(image_size=32, **sizes)
    torch.save(given.state_dict(), tmp_path / "vit.pt")
    assert load_weights(net, tmp_path / "vit.pt").complete
    expected = interpolate_embeddings(32, 8, given.state_dict())["encoder.pos_embedding"]
    assert torch.equal(net.encoder.pos_embedding, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's resampling, about its own indexing
@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_position_embeddings_of_timm_are_resampled_as_timm_does(name, tmp_path) -> None:
    blocks = {"depths": (1, 1, 1, 1), "embed_dim": 24} if "swin" in name else {}
    given = timm.create_model(name, **blocks)
    net = timm.create_model(name, img_size=(96, 128), **blocks)
    save_file(given.state_dict(), tmp_path / "vit.safetensors")
    report = load_weights(net, tmp_path / "vit.safetensors")
    assert report.complete, report
    assert report.shapes
    overlay = {"file": str(tmp_path / "vit.safetensors"), "custom_load": False}
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(96, 128), **blocks
    )
    assert same(net, expected)


class Own(nn.Module):
    """A network with a table of its own, under a name of transformers."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 16, 16)
        self.position_embeddings = nn.Parameter(torch.rand(1, (side // 16) ** 2, 16))


def of_transformers(side: int) -> nn.Module:
    """A small ViT of transformers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTModel(ViTConfig(image_size=side, patch_size=16, intermediate_size=32, **sizes))


def of_timm(side: int) -> nn.Module:
    """A small ViT of timm."""
    return timm.create_model("test_vit", img_size=side)


@pytest.mark.parametrize(
    ("build", "table"),
    [
        (of_transformers, "embeddings.position_embeddings"),
        (of_timm, "pos_embed"),
        (Own, None),
    ],
    ids=["transformers", "timm", "own"],
)
@pytest.mark.parametrize("name", ["", "vit."], ids=["itself", "a part"])
def test_position_embeddings_are_resampled_by_the_part_that_has_them(
    build, table, name, tmp_path
) -> None:
    wrap = (lambda net: nn.ModuleDict({"vit": net})) if name else (lambda net: net)
    given, net = wrap(build(64)), wrap(build(96))
    torch.save(given.state_dict(), tmp_path / "weights.pt")
    report = load_weights(net, tmp_path / "weights.pt")
    assert report.mismatched == ([] if table else [f"{name}position_embeddings"])
    if table:
        assert f"{name}{table}" in report.matched
        assert list(report.shapes) == [f"{name}{table}"]
        assert report.complete


def square(side: int) -> nn.Module:
    """A small ViT of torchvision; other tables than that of a square are none it can resize."""
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    return models.VisionTransformer(image_size=side, patch_size=16, **sizes)


@pytest.mark.parametrize("build", [of_timm, square])
def test_position_embeddings_that_cannot_be_resampled_are_mismatched(
    build, tmp_path, caplog
) -> None:
    net = build(96)
    state = build(64).state_dict()
    [name] = [key for key in state if key.endswith(("pos_embed", "pos_embedding"))]
    state[name] = torch.zeros(1, 24, state[name].shape[-1])
    torch.save(state, tmp_path / "weights.pt")
    before = net.state_dict()[name].clone()
    report = load_weights(net, tmp_path / "weights.pt")
    assert report.mismatched == [name]
    assert torch.equal(net.state_dict()[name], before)
    assert f"{name} cannot be resized (do class or register tokens differ?)" in caplog.text


# Files that are not what they seem.


def test_a_checkpoint_with_the_arguments_of_its_script_is_read(tmp_path) -> None:
    net = small()
    checkpoint = {"state_dict": net.state_dict(), "args": Namespace(lr=0.1, data=Namespace())}
    torch.save(checkpoint, tmp_path / "net.pth")
    assert load_weights(small(), tmp_path / "net.pth").complete


@pytest.mark.parametrize("kind", ["network", "checkpoint", "model", "tensors", "model and ema"])
def test_classes_are_refused_with_lines_that_take_the_weights_alone(
    tmp_path, kind, monkeypatch
) -> None:
    path, net = tmp_path / "net.pt", small()
    state = net.state_dict()
    contents = {
        "network": net,
        "checkpoint": {"state_dict": state, "share": Fraction()},
        "model": {"model": state, "config": {"share": Fraction()}},
        "tensors": {**state, "share": Fraction()},
        "model and ema": {"model": net, "model_ema": state | {"share": Fraction()}, "epoch": 3},
    }
    torch.save(contents[kind], path)
    with pytest.raises(ValueError, match="If you trust it, save its weights alone: ") as error:
        load_weights(net, path)
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).rpartition("alone: ")[2], {"torch": torch})
    report = load_weights(small(), "weights.pt")
    assert report.complete
    assert ("model." in str(report)) == kind.startswith("model")


class Bomb:
    """Something that touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_file_is_run(tmp_path) -> None:
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    for name in ("evil.pt", "evil.pth"):
        with pytest.raises(ValueError, match="could run any code when loaded"):
            load_weights(small(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"whole"], ids=["empty", "text", "cut"])
def test_damaged_files_are_refused(name, content, tmp_path) -> None:
    path = tmp_path / name
    if content == b"whole":
        state = small().state_dict()
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_state_dict(path)


def test_where_there_is_nothing_is_said(tmp_path) -> None:
    with pytest.raises(ValueError) as error:
        load_weights(small(), tmp_path / "no.pt")
    assert str(error.value) == (
        f"there are no weights at {tmp_path / 'no.pt'}; give a run directory or a .safetensors, "
        ".pt or .pth file (--weights takes 'pretrained', too)"
    )
    with pytest.raises(ValueError, match=r"has no backbone\.safetensors and no checkpoints"):
        load_weights(small(), tmp_path)
    (tmp_path / "config.yaml").write_text("checkpoint_every: 40\n")
    with pytest.raises(
        ValueError, match=r"its run is training or ended early, and first saves at step 40"
    ):
        load_weights(small(), tmp_path)
