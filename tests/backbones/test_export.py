"""Exports: files that other libraries load without this package."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torchvision import models

from pixel_level_contrastive_learning.backbones.checkpoint import (
    BackboneCard,
    load_backbone,
    read_backbone,
    save_backbone,
)
from pixel_level_contrastive_learning.backbones.export import (
    FORMATS,
    TIMM_ALIKE,
    Exported,
    export,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.backbones.snippets import building, feeding, how_to
from pixel_level_contrastive_learning.backbones.stem import adapt_channels
from pixel_level_contrastive_learning.evaluation.features import Preparation

SOURCE = """
from torch import nn

class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)

def build():
    return nn.Sequential(Doubled(3, 4, 3), nn.ReLU(), nn.Flatten())
"""
CASES = [
    ("torchvision/squeezenet1_1", "torchvision", 3, (64, 64)),
    ("torchvision/resnet18", "torchvision", 5, (64, 64)),
    ("torchvision/resnet18", "timm", 5, (64, 64)),
    ("torchvision/resnet18", "smp", 2, (64, 64)),
    ("torchvision/mobilenet_v3_small", "safetensors", 1, (64, 64)),
    ("torchvision/mnasnet0_5", "torchvision", 3, (64, 64)),
    ("torchvision/mnasnet0_5", "safetensors", 2, (64, 64)),
    ("torchvision/googlenet", "state-dict", 3, (64, 64)),
    ("timm/test_resnet", "timm", 3, (64, 64)),
    ("timm/test_resnet", "smp", 5, (64, 64)),
    ("timm/resnet18.a1_in1k", "torchvision", 2, (64, 64)),
    ("timm/test_vit", "timm", 2, (64, 96)),
    ("timm/test_vit", "state-dict", 3, (64, 96)),
    ("timm/test_convnext", "safetensors", 4, (64, 96)),
    ("own", "safetensors", 3, (32, 32)),
    ("own", "state-dict", 4, (32, 32)),
]
FRESH = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
answers = []
for case in json.loads(sys.argv[1]):
    names = {}
    exec(case["how_to"], names)
    net, expected = names["net"], torch.load(case["expected"])
    part = net.encoder if hasattr(net, "encoder") and hasattr(net, "decoder") else net
    if part is not net:  # names are its own: compare the stage's features
        part.eval()
        output = part(expected["images"])[-1]
        same = torch.allclose(output, expected["features"], atol=1e-4, rtol=1e-3)
    else:
        net.eval()
        same = torch.equal(net(expected["images"]), expected["output"])
    fed = torch.equal(names["prepared"](expected["raw"]), expected["images"])
    answers.append([same, fed])
print(json.dumps([answers, [name for name in sys.modules if name.startswith("pixel_level")]]))
"""
"""Runs what each export says, in a process that has never heard of this package."""


def save(folder: Path, model: str, channels: int, size: tuple[int, int]) -> nn.Module:
    """A run directory with a backbone whose batch norm has seen images."""
    net = build_backbone(model, channels=channels, image_size=size)
    with torch.no_grad():
        net.train()(torch.rand(4, channels, *size))
    save_backbone(folder / "backbone.safetensors", net, card_for(model, channels, size))
    return net.eval()


def card_for(model: str, channels: int, size: tuple[int, int]) -> BackboneCard:
    """A card with statistics that no two channels share; four channels are 16-bit ones."""
    deep = channels == 4
    return BackboneCard(
        model=model,
        channels=channels,
        image_size=size,
        mean=tuple(0.25 + i / 64 for i in range(channels)),
        std=tuple(0.5 + i / 64 for i in range(channels)),
        low=tuple(100.0 + i for i in range(channels)) if deep else None,
        high=tuple(4000.0 + i for i in range(channels)) if deep else None,
        pixel_layer="any",
        instance_layer="any",
    )


def deepest(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the last stage of a ResNet gives."""
    seen = []
    handle = net.layer4.register_forward_hook(lambda *value: seen.append(value[2]))
    net(images)
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> list[Exported]:
    """Every case exported."""
    return [prepare(tmp_path_factory.mktemp("run"), *case) for case in CASES]


def prepare(
    folder: Path, model: str, form: str | None, channels: int, size: tuple[int, int]
) -> Exported:
    """A run directory exported, with what its network gives for some images beside it."""
    torch.manual_seed(0)
    if model == "own":
        (folder / "mine.py").write_text(SOURCE)
        model = f"{folder / 'mine.py'}:build"
    net, raw = save(folder, model, channels, size), torch.randint(0, 256, (2, channels, *size))
    raw = (raw * 20).to(torch.uint16) if channels == 4 else raw.to(torch.uint8)
    fed = Preparation.of(card_for(model, channels, size))  # as images are fed here
    images = torch.stack(
        [fed.in_range(one if channels != 4 else one.float(), "any") for one in raw]
    )
    images = fed.normalised(images)
    expected = {"raw": raw, "images": images}
    with torch.no_grad():
        expected["output"] = net(images)
        if form == "smp":
            expected["features"] = deepest(net, images)
    torch.save(expected, folder / "expected.pt")
    return export(folder, form)


@pytest.fixture(scope="module")
def fresh(exports, tmp_path_factory) -> list[Any]:
    """What another process, far away, says of each export, and which modules of ours it has."""
    cases = [
        {"how_to": one.how_to, "expected": str(one.path.parent / "expected.pt")} for one in exports
    ]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("far_away"),
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(map(str, c)) for c in CASES])
def test_an_export_loads_and_is_fed_where_this_package_is_not(index, fresh) -> None:
    answers, imported = fresh
    assert imported == []
    same, fed = answers[index]
    assert same
    assert fed


def test_every_key_is_accounted_for(exports) -> None:
    for case, one in zip(CASES, exports, strict=True):
        headless = one.format == "smp"
        assert one.format == case[1]
        assert one.path.name == f"backbone-{one.format}{FORMATS[one.format]}"
        assert one.report.missing == (["fc.weight", "fc.bias"] if headless else [])
        assert one.report.mismatched == one.report.unexpected == []


def test_an_adapted_stem_is_said(exports) -> None:
    said = exports[CASES.index(("torchvision/resnet18", "torchvision", 5, (64, 64)))]
    assert said.how_to == (
        "import torch\n"
        "from torchvision import models\n"
        "\n"
        "net = models.get_model('resnet18', weights=None)\n"
        "stem = net.get_submodule('conv1')\n"
        "stem.in_channels = 5\n"
        "stem.weight = torch.nn.Parameter(stem.weight.new_empty(64, 5, 7, 7))\n"
        f"net.load_state_dict(torch.load({str(said.path)!r}, weights_only=True))\n"
        "# The run trained no classifier: replace fc after loading.\n"
        "\n"
        "mean = torch.tensor([0.25, 0.265625, 0.28125, 0.296875, 0.3125]).view(-1, 1, 1)\n"
        "std = torch.tensor([0.5, 0.515625, 0.53125, 0.546875, 0.5625]).view(-1, 1, 1)\n"
        "\n"
        "\n"
        "def prepared(x):  # (b, 5, h, w), 8-bit values: net(prepared(x))\n"
        "    x = x.float() / 255\n"
        "    return (x - mean) / std\n"
    )
    plain = exports[CASES.index(("torchvision/squeezenet1_1", "torchvision", 3, (64, 64)))]
    assert "stem" not in plain.how_to


def test_a_transformer_of_torchvision_is_said_with_its_size() -> None:
    card = card_for("torchvision/vit_b_32", 2, (64, 64))
    with torch.device("meta"):
        net = build_backbone("torchvision/vit_b_32", image_size=(64, 64))
        lines = how_to("torchvision", adapt_channels(net, 2), card, Path("net.pth"))
        lines = lines.replace("torch.load('net.pth', weights_only=True)", "state")
        names: dict[str, Any] = {"state": net.state_dict()}
        exec(lines, names)
    assert "image_size=64" in lines
    assert names["net"].conv_proj.in_channels == 2


def test_an_export_prints_what_a_user_needs(exports) -> None:
    one = exports[CASES.index(("timm/test_resnet", "timm", 3, (64, 64)))]
    count = len(one.report.matched)
    assert str(one) == (
        f"{one.path}\n"
        f"matched {count} of {count} keys\n"
        "\n"
        "import torch\n"
        "import timm\n"
        "\n"
        "net = timm.create_model('test_resnet', pretrained=True,\n"
        f"    pretrained_cfg_overlay={{'file': {str(one.path)!r}, 'input_size': (3, 64, 64)}},\n"
        ")  # the run trained no classifier: add num_classes=N, or features_only=True for maps\n"
        "\n"
        "mean = torch.tensor([0.25, 0.265625, 0.28125]).view(-1, 1, 1)\n"
        "std = torch.tensor([0.5, 0.515625, 0.53125]).view(-1, 1, 1)\n"
        "\n"
        "\n"
        "def prepared(x):  # (b, 3, h, w), 8-bit values, red green blue: net(prepared(x))\n"
        "    x = x.float() / 255\n"
        "    return (x - mean) / std"
    )


@pytest.mark.parametrize("form", ["timm", "smp"])
def test_older_timm_is_told_to_leave_a_stem_of_other_channels_as_it_is(tmp_path, form) -> None:
    for channels in (3, 5):
        folder = tmp_path / str(channels)
        save(folder, "timm/test_resnet", channels, (64, 64))
        said = "'first_conv': None" in export(folder, form).how_to
        assert said == (channels != 3)  # with three it is what adapts them to other images


@pytest.mark.parametrize("other", ["num_classes=5", "num_classes=0", "features_only=True"])
@pytest.mark.parametrize(
    ("model", "channels", "size"),
    [
        ("torchvision/resnet18", 5, (64, 64)),
        ("timm/test_vit", 2, (64, 96)),
        ("timm/vit_tiny_patch16_224", 3, (32, 32)),  # whose own weights are no plain file
    ],
)
def test_timm_takes_an_export_with_another_classifier(
    tmp_path, model, channels, size, other
) -> None:
    state = save(tmp_path, model, channels, size).state_dict()
    names: dict[str, Any] = {}
    code = export(tmp_path, "timm").how_to
    assert ("'custom_load': False" in code) == model.startswith("timm/vit_tiny")
    exec(re.sub(r"(create_model\('[\w.]+')", rf"\1, {other}", code), names)
    loaded = {n.removeprefix("model."): value for n, value in names["net"].state_dict().items()}
    lost = [n for n in state if n not in loaded or not torch.equal(state[n], loaded[n])]
    assert len(lost) <= 4
    assert all(name.startswith(("fc.", "head.", "norm.")) for name in lost)


def test_deep_values_are_fed_by_their_own_scale() -> None:
    statistics = {"mean": (0.25, 0.5), "std": (0.5, 0.25), "low": (0, 100), "high": (1000, 300)}
    card = replace(card_for("any", 2, (64, 64)), **statistics)
    names: dict[str, Any] = {"torch": torch}
    exec(feeding(card), names)
    raw = torch.tensor([[250, 1000, 2000], [100, 200, 0]], dtype=torch.uint16)  # beyond: clipped
    fed = names["prepared"](raw.view(1, 2, 1, 3))
    assert fed.tolist() == [[[[0, 1.5, 1.5]], [[-2, 0, -2]]]]
    assert "# (b, 2, h, w), 16-bit or float values: net(prepared(x))" in feeding(card)


def test_an_export_is_read_here_as_well(exports) -> None:
    for one in exports:
        if one.format == "smp":
            continue
        expected = torch.load(one.path.parent / "expected.pt")
        net = load_backbone(one.path).eval()
        with torch.no_grad():
            assert torch.equal(net(expected["images"]), expected["output"])


def test_an_export_to_the_other_library_names_its_model(exports) -> None:
    there = exports[CASES.index(("torchvision/resnet18", "timm", 5, (64, 64)))]
    assert read_backbone(there.path).card.model == "timm/resnet18"


@pytest.mark.parametrize("pixel", ["relu", ("layer2", "layer4.1.relu")], ids=str)
def test_an_export_to_the_other_library_names_its_layers(tmp_path, pixel) -> None:
    card = card_for("torchvision/resnet18", 3, (64, 64))
    card = replace(card, pixel_layer=pixel, instance_layer="avgpool")
    save_backbone(tmp_path / "backbone.safetensors", build_backbone(card.model), card)
    there = export(tmp_path, "timm")
    back = read_backbone(export(there.path, "torchvision").path).card
    card_there = read_backbone(there.path).card
    net = build_backbone("timm/resnet18")
    names = {name for name, _ in net.named_modules()}
    assert {*card_there.pixel_layers, card_there.instance_layer} <= names
    assert (card_there.instance_layer, back.instance_layer) == ("global_pool", "avgpool")


def test_an_export_replaces_no_card_of_other_weights(tmp_path) -> None:
    save(tmp_path, "timm/resnet18", 3, (64, 64))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"backbone\.json exists and is the card of other w"):
        export(tmp_path, "torchvision", tmp_path / "backbone.pth")
    (tmp_path / "net.json").write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match=r"net\.json exists and is not a card: name another"):
        export(tmp_path, "state-dict", tmp_path / "net.pth")
    assert (tmp_path / "net.json").read_text() == '{"my": "notes"}'
    assert all(path.read_bytes() == content for path, content in before.items())


def test_weights_in_one_folder_have_exports_of_their_own(tmp_path) -> None:
    net = save(tmp_path, "timm/test_resnet", 3, (64, 64))
    card = read_backbone(tmp_path).card
    for name in "ab":
        save_backbone(tmp_path / f"{name}.safetensors", net, card)
        assert export(tmp_path / f"{name}.safetensors").path.name == f"{name}-timm.safetensors"
    assert export(tmp_path).path.name == "backbone-timm.safetensors"


@pytest.mark.parametrize("name", sorted(TIMM_ALIKE))
def test_torchvision_and_timm_build_these_alike(name) -> None:
    with torch.device("meta"):
        one, two = (
            {key: value.shape for key, value in net.state_dict().items()}
            for net in (build_backbone(f"torchvision/{name}"), build_backbone(f"timm/{name}"))
        )
    assert one == two


@pytest.mark.parametrize(
    ("model", "first"),
    [
        ("torchvision/squeezenet1_1", "torchvision"),
        ("timm/test_vit", "timm"),
        ("own", "safetensors"),
    ],
)
def test_by_default_the_first_format_that_has_the_model_is_written(tmp_path, model, first) -> None:
    done = prepare(tmp_path, model, None, 3, (64, 64))
    assert (done.format, done.path.stem) == (first, f"backbone-{first}")


# Detection and segmentation frameworks.


def test_a_resnet_goes_to_detectron2(tmp_path) -> None:
    net = save(tmp_path, "torchvision/resnet18", 3, (64, 64))
    done = export(tmp_path, "detectron2")
    value = pickle.loads(done.path.read_bytes())
    assert value["matching_heuristics"] is True
    assert len(value["model"]) == len(net.state_dict()) - 2
    stem = torch.from_numpy(value["model"]["stem.conv1.weight"])
    assert torch.equal(stem, net.conv1.weight)
    assert str(done).splitlines()[2:4] == [
        "missing 2: fc.weight, fc.bias",
        "(nothing is lost: detectron2 does not use the classifier)",
    ]
    assert done.how_to == (
        "MODEL:\n"
        f'  WEIGHTS: "{done.path}"\n'
        "  PIXEL_MEAN: [63.75, 67.7344, 71.7188]\n"
        "  PIXEL_STD: [127.5, 131.4844, 135.4688]\n"
        "  RESNETS: {DEPTH: 18, STRIDE_IN_1X1: False, RES2_OUT_CHANNELS: 64}\n"
        "INPUT: {FORMAT: RGB}\n"
    )


def test_a_resnet_goes_to_mmseg(tmp_path) -> None:
    save(tmp_path, "torchvision/resnet18", 2, (64, 64))
    card = json.loads((tmp_path / "backbone.json").read_text())
    card |= {"low": [0, 100], "high": [1000, 300]}
    (tmp_path / "backbone.json").write_text(json.dumps(card))
    done = export(tmp_path, "mmseg", tmp_path / "sub" / "mine.pth")
    assert set(torch.load(done.path, weights_only=True)) == {
        name for name in models.resnet18().state_dict() if not name.startswith("fc.")
    }
    names: dict[str, Any] = {}
    exec(done.how_to, names)
    assert done.how_to.startswith("# images with 2 channels need your own mapper")
    assert names["backbone"]["in_channels"] == 2
    assert names["backbone"]["init_cfg"]["checkpoint"] == str(done.path)
    # 16 and 17 of 64 parts of the way from low to high, and 32 and 33 of that way.
    assert names["data_preprocessor"]["mean"] == [250, 153.125]
    assert names["data_preprocessor"]["std"] == [500, 103.125]


def test_a_path_with_quotes_is_one_in_yaml(tmp_path) -> None:
    save(tmp_path, "torchvision/resnet18", 3, (64, 64))
    path = tmp_path / "my 'café' \\ \"net\".pkl"
    said = yaml.safe_load(export(tmp_path, "detectron2", path).how_to)
    assert said["MODEL"]["WEIGHTS"] == str(path)


def test_gray_images_are_read_as_gray(tmp_path) -> None:
    save(tmp_path, "torchvision/resnet18", 1, (64, 64))
    assert "INPUT: {FORMAT: L}\n" in export(tmp_path, "detectron2").how_to
    assert "color_type='grayscale'" in export(tmp_path, "mmseg").how_to


# Refusals.


def test_formats_that_do_not_know_the_model_are_refused(tmp_path) -> None:
    save(tmp_path, "timm/test_vit", 3, (64, 64))
    with pytest.raises(ValueError) as error:
        export(tmp_path, "torchvision")
    assert str(error.value) == (
        "format is 'torchvision', which does not fit timm/test_vit; choose from timm, safetensors, "
        "state-dict, onnx"
    )
    with pytest.raises(ValueError, match=r"it must be one of 'torchvision', .* \(perhaps 'timm'\)"):
        export(tmp_path, "tim")
    with pytest.raises(ValueError, match=r"for timm it must end in \.safetensors"):
        export(tmp_path, "timm", tmp_path / "net.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backbone.json",
        "backbone.safetensors",
    ]


def test_the_weights_of_the_run_are_not_written_over(tmp_path) -> None:
    save(tmp_path, "timm/test_vit", 3, (64, 64))
    weights = tmp_path / "backbone.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ValueError, match=r"the weights that are exported; name another file"):
        export(tmp_path, "timm", weights)
    assert weights.read_bytes() == before


def test_without_a_backbone_there_is_nothing_to_export(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no backbone\.safetensors"):
        export(tmp_path, "state-dict")


def test_weights_that_the_run_does_not_have_are_not_exported(tmp_path) -> None:
    """The code of the model gained a layer after the run: its weights are random."""
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    save(tmp_path, f"{file}:build", 3, (32, 32))
    file.write_text(SOURCE.replace("nn.ReLU()", "nn.Conv2d(4, 4, 3)"))
    changed = r"changed since the run: .*safetensors 1\.weight is missing, 1\.bias is missing;"
    for use in (load_backbone, lambda path: export(path, "safetensors")):
        with pytest.raises(ValueError, match=changed):
            use(tmp_path)
    assert not list(tmp_path.glob("backbone-*"))


def test_weights_that_the_model_no_longer_has_are_not_dropped(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE.replace("nn.ReLU()", "nn.Conv2d(4, 4, 3)"))
    save(tmp_path, f"{file}:build", 3, (32, 32))
    file.write_text(SOURCE)
    with pytest.raises(ValueError, match=r"changed since .* 1\.bias is unexpected, 1\.weight is"):
        export(tmp_path, "safetensors")


def test_an_encoder_is_exported_without_the_classifier_it_does_not_have(tmp_path) -> None:
    net = save(tmp_path, "torchvision/resnet18", 3, (64, 64))
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pth")
    done = export(tmp_path / "backbone.pth", "mmseg")
    assert torch.load(done.path, weights_only=True).keys() == state.keys()


def test_the_lines_that_build_a_network_are_python(tmp_path) -> None:
    """Also of a file whose name is none, and of a stem that is told its padding in words."""
    (tmp_path / "my-net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    conv = nn.Conv2d(3, 4, 3, padding='same', padding_mode='reflect', bias=False)\n"
        "    return nn.Sequential(conv, nn.ReLU())\n"
    )
    card = card_for(f"{tmp_path / 'my-net.py'}:build", 5, (32, 32))
    value: dict[str, Any] = {"torch": torch}
    exec("\n".join(building(build_backbone(card.model, channels=5), card)), value)
    conv = value["net"][0]
    assert (conv.in_channels, conv.padding, conv.padding_mode) == (5, "same", "reflect")
