"""Features as files: what is in them, and that an interruption costs nothing."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from evil_run import diverge
from filelock import FileLock
from PIL import Image
from torch import nn

from pixel_level_contrastive_learning import cli, features
from pixel_level_contrastive_learning.augment import IMAGENET_MEAN, IMAGENET_STD
from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone
from pixel_level_contrastive_learning.evaluation.baselines import random_net
from pixel_level_contrastive_learning.evaluation.probes import DivergedError
from pixel_level_contrastive_learning.visualization import feature_files

NET = "random:torchvision/resnet18"


@pytest.fixture
def images(labelled):
    return labelled / "images" / "val"


@pytest.mark.parametrize("kind", ["npy", "safetensors", "zarr"])
def test_a_map_is_what_the_layer_gives_for_the_image(images, tmp_path, kind) -> None:
    if kind == "zarr":
        pytest.importorskip("zarr")
    folder = features(NET, images, out=tmp_path / "f", layer="layer3", format=kind, size=(64, 96))
    assert len(folder) == 4
    pixels = torch.from_numpy(np.array(Image.open(images / "1.png"))).permute(2, 0, 1) / 255
    pixels = nn.functional.interpolate(pixels[None], (64, 96), mode="bilinear", antialias=True)
    mean, std = (
        torch.tensor(folder.index["normalisation"][name]).view(3, 1, 1) for name in ("mean", "std")
    )
    net = random_net(read_backbone(NET).card, seed=0).eval()
    outputs = []
    net.layer3.register_forward_hook(lambda *hook: outputs.append(hook[2].detach()))
    net((pixels - mean) / std)
    assert torch.allclose(folder.map(1), outputs[0][0], atol=1e-4)


def test_the_index_says_what_the_files_are(images, tmp_path, monkeypatch) -> None:
    folder = features(NET, images, out=tmp_path / "f", size=64)
    index = json.loads((tmp_path / "f" / "features.json").read_text())
    assert index == json.loads(folder.to_json())
    assert (index["weights"], index["layer"], index["channels"]) == (NET, "layer4", 512)
    assert index["normalisation"] == {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "low": None,
        "high": None,
    }
    [first, *_] = index["images"]
    assert first["name"] == str(images / "0.png")
    assert (first["size"], first["fed"]) == ([32, 48], [64, 96])
    assert (first["grid"], first["stride"]) == ([2, 3], [32, 32])
    assert np.load(tmp_path / "f" / first["file"]).shape == (512, 2, 3)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that a clock shows, which stands still; images are run one by one."""
    now = [0.0]
    monkeypatch.setattr(feature_files, "monotonic", lambda: now[0])
    monkeypatch.setattr(feature_files, "BATCH", 1)
    return now


@pytest.mark.parametrize(("saving", "saves"), [(0.1, 5), (5, 2)])
def test_an_index_that_takes_long_to_write_is_written_less_often(
    images, tmp_path, monkeypatch, clock, saving, saves
) -> None:
    write, save = feature_files.FeatureFolder.write, feature_files.FeatureFolder.save_index
    saved = []

    def slow_write(*args) -> None:
        clock[0] += 11
        write(*args)

    def slow_save(folder) -> None:
        clock[0] += saving
        saved.append(len(folder))
        save(folder)

    monkeypatch.setattr(feature_files.FeatureFolder, "write", slow_write)
    monkeypatch.setattr(feature_files.FeatureFolder, "save_index", slow_save)
    features(NET, images, out=tmp_path / "f", size=64)
    assert len(saved) == saves
    assert saved[-1] == 4


@pytest.mark.parametrize(("seconds", "done"), [(11, 2), (1, 0)])
def test_what_a_killed_process_left_half_done_is_done_again(
    images, tmp_path, monkeypatch, clock, seconds, done
) -> None:
    """Maps are written before the index names them; after a kill some are not named, or torn."""
    expected = features(NET, images, out=tmp_path / "whole", size=64)
    write, written = feature_files.FeatureFolder.write, []

    def dies(folder, *args) -> None:
        if len(written) == done:  # the file of the next one is torn
            torn = folder.folder / expected.index["images"][done]["file"]
            torn.parent.mkdir(exist_ok=True)
            torn.write_bytes(b"half")
            folder.save_index = lambda: None  # a killed process runs no finally
            raise SystemExit
        written.append(args)
        clock[0] += seconds
        write(folder, *args)

    monkeypatch.setattr(feature_files.FeatureFolder, "write", dies)
    with pytest.raises(SystemExit):
        features(NET, images, out=tmp_path / "killed", size=64)
    monkeypatch.undo()
    calls = []
    prepared = feature_files.Preparation.resized
    monkeypatch.setattr(
        feature_files.Preparation, "resized", lambda *args: calls.append(args) or prepared(*args)
    )
    resumed = features(NET, images, out=tmp_path / "killed", size=64)
    assert len(calls) == 4 - done
    assert resumed.index["images"] == expected.index["images"]
    for number in range(4):
        assert resumed.map(number).shape == (512, 2, 3)


def test_images_that_are_new_are_added_and_broken_ones_named(images, tmp_path, caplog):
    features(NET, images, out=tmp_path / "f", size=64)
    Image.new("RGB", (64, 64), "red").save(images / "00.png")
    (images / "torn.png").write_bytes(b"no image")
    folder = features(NET, images, out=tmp_path / "f", size=64)
    assert [entry["name"] for entry in folder.index["images"]][-1] == str(images / "00.png")
    assert len(folder) == len({entry["file"] for entry in folder.index["images"]}) == 5
    [entry] = folder.index["left_out"]
    assert entry["name"] == str(images / "torn.png")
    assert "left out" in caplog.text


def maps_by_name(folder) -> dict[str, torch.Tensor]:
    return {
        entry["name"]: folder.map(number) for number, entry in enumerate(folder.index["images"])
    }


def test_images_of_another_folder_are_not_said_to_be_done(labelled, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    for split in ("val", "val", "train"):
        folder = features(NET, labelled / "images" / split, out=tmp_path / "f", size=32)
    assert len(folder) == 14
    messages = [message for message in caplog.messages if "4 images" in message]
    assert messages == [
        "4 images done, 0 left",
        "the folder holds features of 4 images that were not given; adding 10",
    ]


def test_other_images_of_the_same_names_are_done_again(tmp_path, monkeypatch) -> None:
    """Arrays in memory, paths from another folder, and a file that was written anew."""
    first, second = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    settings = {"size": 64}
    expected = features(NET, list(second), out=tmp_path / "own", **settings)
    features(NET, list(first), out=tmp_path / "items", **settings)
    folder = features(NET, list(second), out=tmp_path / "items", **settings)
    assert len(folder) == 2
    assert all(torch.equal(folder.map(number), expected.map(number)) for number in range(2))

    for name in ("one", "two"):
        (tmp_path / name / "here").mkdir(parents=True)
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / name / "here" / "a.png")
        monkeypatch.chdir(tmp_path / name)
        folder = features(NET, "here", out=tmp_path / "files", **settings)
    assert len(folder) == 2
    assert not torch.equal(folder.map(0), folder.map(1))

    Image.new("RGB", (96, 64), "red").save("here/a.png")
    Image.new("RGB", (64, 64), "blue").save("here/0.png")  # which comes before it
    folder = features(NET, "here", out=tmp_path / "files", **settings)
    sizes = {entry["file"]: entry["size"] for entry in folder.index["images"]}
    assert sorted(sizes.values()) == [[64, 64], [64, 64], [64, 96]]
    # None is left of the image as it was.
    assert {f"maps/{path.name}" for path in (folder.folder / "maps").iterdir()} == set(sizes)


@pytest.mark.parametrize("settings", [{}, {"nodata": 7.0}])
def test_images_in_memory_are_read_once(run_maker, tmp_path, settings) -> None:
    indices = []

    class Counted(list):
        def __getitem__(self, index):
            indices.append(index)
            return super().__getitem__(index)

    images = Counted(torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8))
    run = run_maker("run")
    folder = features(run, images, out=tmp_path / "f", **settings)
    assert sorted(indices) == [0, 1, 2, 3, 4]
    repeated = features(run, images, out=tmp_path / "f", **settings)
    assert repeated.to_json() == folder.to_json()
    assert len(indices) == 10


def test_a_folder_by_two_spellings_is_one(images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(images)
    before = features(NET, "../val", out=tmp_path / "f", size=64).index["images"]
    for place in (str(images), f"{images.parent}/./val"):
        assert features(NET, place, out=tmp_path / "f", size=64).index["images"] == before


@pytest.mark.parametrize("lacking", ["a map", "the state"])
def test_what_is_not_whole_is_made_again(images, tmp_path, lacking) -> None:
    """A map that is gone, or an index of a version that noted no state."""
    folder = features(NET, images, out=tmp_path / "f", size=64)
    expected, entry = maps_by_name(folder), folder.index["images"][1]
    (tmp_path / "f" / entry["file"]).unlink()
    if lacking == "the state":
        np.save(tmp_path / "f" / folder.index["images"][2]["file"], 0 * folder.map(2).numpy())
        for image in folder.index["images"]:
            del image["path"], image["state"]
        folder.save_index()
    repeated = features(NET, images, out=tmp_path / "f", size=64, pca=3)
    maps = maps_by_name(repeated)
    assert maps.keys() == expected.keys()
    assert all(torch.allclose(maps[name], expected[name], atol=1e-4) for name in expected)
    assert len(list((tmp_path / "f" / "maps").iterdir())) == 4


def test_a_map_that_is_gone_with_its_image_is_forgotten(images, tmp_path) -> None:
    folder = features(NET, images, out=tmp_path / "f", size=64)
    entry = folder.index["images"][1]
    (tmp_path / "f" / entry["file"]).unlink()
    (images / "1.png").unlink()
    repeated = features(NET, images, out=tmp_path / "f", size=64, pca=3)
    assert [image["name"] for image in repeated.index["images"]] == [
        str(images / f"{number}.png") for number in (0, 2, 3)
    ]
    assert len({image["file"] for image in repeated.index["images"]}) == 3


def test_images_that_are_new_are_normalised_as_those_before(tmp_path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(deep / "0.png")
    before = features(NET, deep, out=tmp_path / "f", size=64).index["normalisation"]
    Image.fromarray(values).save(deep / "1.png")
    Image.fromarray(values * 9).save(deep / "2.png")
    folder = features(NET, deep, out=tmp_path / "f", size=64)
    assert folder.index["normalisation"] == json.loads(json.dumps(before))
    assert torch.allclose(folder.map(1), folder.map(0), atol=1e-4)
    assert len(folder) == 3


def test_features_that_are_no_numbers_are_refused(images, run_maker, tmp_path) -> None:
    run = run_maker("diverged")
    diverge(run)
    with pytest.raises(DivergedError, match="2 of this network give NaN or inf"):
        features(run, images, out=tmp_path / "f")
    assert [path.name for path in (tmp_path / "f").iterdir()] == [".lock"]


def test_images_are_read_as_those_of_the_run(images, run_maker, tmp_path) -> None:
    run = run_maker("run", nodata=-9999.0, pages="first")
    index = features(run, images, out=tmp_path / "f").index
    assert (index["nodata"], index["pages"]) == (-9999.0, "first")
    index = features(run, images, out=tmp_path / "g", nodata=7.0, pages="images").index
    assert (index["nodata"], index["pages"]) == (7.0, "images")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"nodata": -9999}, "other settings (nodata)"),
        ({"pages": "first"}, "other settings (pages)"),
        ({"layer": "layer3"}, "other settings (layer, channels)"),
        ({"size": 32}, "other settings (size)"),
        ({"format": "safetensors"}, "other settings (format)"),
        ({"weights": "random:torchvision/resnet34"}, "other settings (model, weights_digest)"),
    ],
)
def test_other_settings_are_not_mixed_in(images, tmp_path, settings, named) -> None:
    features(NET, images, out=tmp_path / "f", size=64)
    weights = settings.pop("weights", NET)
    with pytest.raises(ValueError, match=re.escape(named)):
        features(weights, images, out=tmp_path / "f", **{"size": 64} | settings)


def test_two_calls_never_write_into_one_folder(images, tmp_path) -> None:
    out = tmp_path / "f"
    out.mkdir()
    with (
        FileLock(out / ".lock"),
        pytest.raises(ValueError, match="another call is writing; wait for its end"),
    ):
        features(NET, images, out=out, size=64)
    assert len(features(NET, images, out=out, size=64)) == 4


def test_a_damaged_index_is_named(images, tmp_path) -> None:
    (tmp_path / "features.json").write_text('{"model": "')
    with pytest.raises(
        ValueError, match=r"features\.json is not a file of pixelcl features \(Unterm"
    ):
        features(NET, images, out=tmp_path, size=64)


def test_a_folder_of_something_else_is_left_alone(images) -> None:
    with pytest.raises(ValueError, match="holds other files"):
        features(NET, images, out=images.parent)
    with pytest.raises(ValueError, match=r"out is '.*val', the folder of the images; give another"):
        features(NET, [images.parent, images], out=images)
    (images.parent / "bad").mkdir()
    (images.parent / "bad" / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 1 images looked at"):
        features(NET, images.parent / "bad", out=images.parent / "f")
    assert not (images.parent / "f").exists()


def test_colours_mean_the_same_in_all_pictures(images, tmp_path, capsys) -> None:
    """What is red in two images has one colour in both pictures, and what is blue another."""
    for path in images.iterdir():
        path.unlink()
    picture = Image.new("RGB", (128, 64), "blue")
    picture.paste("red", (0, 0, 64, 64))
    picture.save(images / "0.png")
    Image.new("RGB", (64, 64), "red").save(images / "1.png")
    out = tmp_path / "f"
    arguments = "features", NET, images, "--out", out, "--pca", 3, "--size", 64, "--layer", "layer1"
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"features: {out} (2 images, layer1, 64 channels)",
        f"pictures: {out / 'pictures'}",
    ]
    one, two = (np.array(Image.open(path), int) for path in sorted((out / "pictures").iterdir()))
    assert (one.shape, two.shape) == ((64, 128, 3), (64, 64, 3))
    red, blue, alone = one[32, 32], one[32, 96], two[32, 32]
    assert abs(red - alone).max() < 10
    assert abs(red - blue).max() > 60


def test_zarr_is_asked_for_where_it_is_missing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zarr", None)
    arguments = "features", NET, images, "--out", tmp_path / "f", "--format", "zarr"
    assert cli.main([str(argument) for argument in arguments]) == 1
    assert "pip install 'pixel-level-contrastive-learning[zarr]'" in capsys.readouterr().err


def test_the_index_is_all_that_json_prints(images, tmp_path, capsys) -> None:
    arguments = "features", NET, images, "--out", tmp_path / "f", "--json"
    assert cli.main([str(argument) for argument in arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "f" / "features.json").read_text())
