"""The settings: ranges, sources, file, and what is told of mistakes."""

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.config_io import (
    as_yaml,
    differences,
    read_settings,
    settings_of,
    to_config,
)

DEFAULTS = {
    "graph": "off",
    "model": "torchvision/resnet50",
    "crop_area": (0.2, 1.0),
    "aspect_ratio": (3 / 4, 4 / 3),
    "prob_hflip": 0.5,
    "prob_vflip": 0.0,
    "max_rotation": 0.0,
    "jitter": (0.4, 0.4, 0.4, 0.0),  # weaker than the authors', and no hue
    "prob_jitter": 0.8,
    "prob_gray": 0.2,
    "prob_blur": (0.5, 0.5),
    "prob_solarise": (0.0, 0.0),
    "loss": "pixpro",
    "alpha": 1.0,
    "instance_weight": 0.1,
    "projection_size": 256,  # from here to the temperature as in the paper
    "projection_hidden_size": 2048,
    "ppm_num_layers": 1,
    "ppm_gamma": 2.0,
    "distance_thres": 0.7,
    "similarity_temperature": 0.3,
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "final_lr": 1e-6,
    "target_momentum": 0.99,
    "clip_grad": 0.0,
    "seed": 0,
    "num_nodes": 1,
    "keep_checkpoints": 3,
    "max_broken": 0.01,
    "loggers": ("tensorboard",),
    "probe_protocol": "knn",
}


def test_the_defaults_are_those_that_were_chosen() -> None:
    """Another default is another method: it changes with `docs/decisions.md`."""
    defaults = {field.name: field.default for field in fields(PretrainConfig)}
    assert {name: defaults.pop(name) for name in DEFAULTS} == DEFAULTS
    assert {str(value) for value in defaults.values()} == {"auto", "None", "False", "()"}


def test_every_setting_has_its_help() -> None:
    import ast
    from inspect import getsource

    body = ast.parse(getsource(PretrainConfig)).body[0].body[1:]
    named = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    helped = [
        before.target.id
        for before, after in pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    ]
    assert named == helped == [field.name for field in fields(PretrainConfig)]


def test_everything_out_of_range_is_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        PretrainConfig(epochs=0, lr=-1.0, crop_area=(0.9, 0.1), precision="half", seed=-1)
    assert str(error.value).splitlines() == [
        "crop_area is (0.9, 0.1); it must be (low, high) with 0 < low <= high <= 1; swap the two: "
        "(0.1, 0.9)",
        "epochs is 0; it must be a whole number of at least 1, or 'auto'",
        "lr is -1.0; it must be a number above 0, or 'auto'",
        "seed is -1; it must be a whole number of at least 0",
        "precision is 'half'; it must be one of 'auto', 'float32', '32', '32-true', 'fp32', "
        "'bfloat16', 'bf16', 'bf16-mixed'",
    ]


@pytest.mark.parametrize("field", [f.name for f in fields(PretrainConfig)])
def test_no_setting_takes_just_anything(field) -> None:
    with pytest.raises(ValueError, match=field):
        PretrainConfig(**{field: object()})


def test_an_empty_text_is_refused_as_such() -> None:
    with pytest.raises(ValueError, match="out is ''; it must be a text that is not empty"):
        PretrainConfig(out="")


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="keep the run"):
        PretrainConfig(resume=True, overwrite=True)


def test_a_run_has_one_length(tmp_path) -> None:
    with pytest.raises(ValueError, match="steps is 9 and epochs is 2; give one of them"):
        to_config(settings_of({"steps": 9, "epochs": 2, "recipe": "pixpro-100ep"}))
    assert to_config(settings_of({"steps": 9, "recipe": "pixpro-100ep"})).epochs == "auto"
    path = tmp_path / "two.yaml"
    path.write_text("steps: 9\nepochs: 2\n")
    with pytest.raises(ValueError, match=r"two\.yaml: steps is 9 and epochs is 2"):
        settings_of({"config": str(path)})


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'epohs' is no setting; perhaps epochs"):
        settings_of({"epohs": 3})


def test_an_unknown_key_in_a_file_names_file_and_nearest(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("bach-size: 3\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: 'bach-size' is no setting; perhaps batch_"):
        settings_of({"config": str(tmp_path / "mine.yaml")})


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "words", "a: [", "seed: &a 3\nsteps: *a\n", None])
def test_a_file_without_settings_is_refused(tmp_path, text) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="epochs: 100"):
        read_settings(path)


def test_off_is_a_word_and_true_is_none(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("cache: off\ngraph: off\nzero_init_residual: true\n")
    settings = settings_of({"config": str(tmp_path / "mine.yaml")})
    assert settings == {"cache": "off", "graph": "off", "zero_init_residual": True} | {
        "config": str(tmp_path / "mine.yaml")
    }


def test_later_sources_count_more(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("epochs: 3\nlr: 1e-3\nseed: 7\nmodel: torchvision/resnet18\n")
    (tmp_path / "file.yaml").write_text("lr: 0.5\nrecipe: pixpro-100ep\nepochs: 5\n")
    settings = settings_of(
        {"out": str(run), "resume": True, "config": str(tmp_path / "file.yaml"), "seed": 9}
    )
    assert (settings["epochs"], settings["lr"], settings["seed"]) == (5, 0.5, 9)
    assert settings["model"] == "torchvision/resnet50"  # the file's recipe over the run's
    assert settings["optimizer"] == "lars"


def test_a_file_may_name_the_run_that_is_resumed(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\nlr: 1e-3\n")
    (tmp_path / "mine.yaml").write_text(f"out: {tmp_path}\nlr: 0.5\nresume: true\n")
    settings = settings_of({"config": str(tmp_path / "mine.yaml")})
    assert (settings["seed"], settings["lr"]) == (7, 0.5)
    assert "seed" not in settings_of({"config": str(tmp_path / "mine.yaml"), "resume": False})


def test_a_run_is_resumed_where_it_is_named_and_not_where_one_stands(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: 7\nout: {tmp_path}\n")
    monkeypatch.chdir(tmp_path)
    assert settings_of({"resume": True}) == {"resume": True}


def test_a_recipe_that_is_given_counts_more_than_a_file(tmp_path) -> None:
    (tmp_path / "file.yaml").write_text("epochs: 5\nseed: 4\n")
    settings = settings_of({"config": str(tmp_path / "file.yaml"), "recipe": "pixpro-400ep"})
    assert (settings["epochs"], settings["seed"]) == (400, 4)


def test_steps_take_the_place_of_epochs_and_back(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 300\nbatch_size: 8\naccumulate: 4\n")
    settings = settings_of({"config": str(tmp_path / "a.yaml"), "epochs": 2, "batch_size": 16})
    assert (settings["steps"], settings["epochs"], settings["accumulate"]) == (None, 2, "auto")
    settings = settings_of({"config": str(tmp_path / "a.yaml")})
    assert (settings["steps"], settings["accumulate"]) == (300, 4)


@pytest.mark.parametrize(
    ("name", "value"), [("ids", "0:0"), ("colours", "c.txt"), ("probe_every", 3)]
)
def test_what_is_for_probes_needs_one_unless_it_was_written_by_a_run(tmp_path, name, value) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r} without probe; add probe, or leave"):
        settings_of({name: value})
    assert settings_of({name: value, "probe": "masks"})[name] == value
    (tmp_path / "config.yaml").write_text("probe: null\nids: null\nprobe_every: 3\n")
    assert settings_of({"config": str(tmp_path / "config.yaml")})["probe_every"] == 3


def written_by_a_run(tmp_path, **settings: object) -> str:
    config = to_config({"image_size": 96, "lr": 1e-3, "warmup_epochs": 2.0} | settings)
    (tmp_path / "config.yaml").write_text(as_yaml(config, ("lr", "warmup_epochs", "image_size")))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("changes", "rechosen"),
    [
        ({}, []),
        ({"seed": 3, "model": "torchvision/resnet50"}, []),  # the model is as it was
        ({"optimizer": "sgd"}, ["lr"]),
        ({"weights": "pretrained", "lr": 0.5}, []),
        ({"steps": 30}, ["warmup_epochs"]),
        ({"data": ["others"]}, ["warmup_epochs", "image_size"]),
        ({"recipe": "pixpro-100ep"}, []),  # which names all of them itself
    ],
    ids=str,
)
def test_what_a_run_chose_is_chosen_anew_by_other_settings(tmp_path, changes, rechosen) -> None:
    settings = settings_of({"config": written_by_a_run(tmp_path)} | changes)
    assert [
        name for name in ("lr", "warmup_epochs", "image_size") if settings[name] == "auto"
    ] == rechosen
    assert to_config(settings).lr == settings["lr"]


def test_what_follows_from_a_choice_is_chosen_anew_with_it(tmp_path) -> None:
    config = to_config({"image_size": 96, "blur_sigma": (0.1, 0.9)})
    (tmp_path / "config.yaml").write_text(as_yaml(config, ("image_size", "blur_sigma")))
    settings = settings_of({"config": str(tmp_path / "config.yaml"), "data": ["others"]})
    assert (settings["image_size"], settings["blur_sigma"]) == ("auto", "auto")


def test_a_value_changed_by_hand_is_no_choice_of_the_run(tmp_path) -> None:
    path = Path(written_by_a_run(tmp_path))
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.005", 1))
    assert settings_of({"config": str(path), "optimizer": "sgd"})["lr"] == 0.005


def test_numbers_with_exponents_are_numbers_in_a_file(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nfinal_lr: 1.5E-6\nout: e3\n")
    assert read_settings(tmp_path / "a.yaml") == {"lr": 0.001, "final_lr": 1.5e-6, "out": "e3"}


def test_the_file_holds_what_repeats_a_run(tmp_path) -> None:
    config = to_config({"data": [str(tmp_path)], "out": str(tmp_path / "run"), "lr": 1e-4})
    text = as_yaml(config)
    assert not {"resume", "overwrite", "dry_run", "config"} & set(yaml.safe_load(text))
    (tmp_path / "config.yaml").write_text(text)
    assert to_config(read_settings(tmp_path / "config.yaml")) == config
    (tmp_path / "config.yaml").write_text(as_yaml(config, ("lr", "crop_area")))
    assert to_config(read_settings(tmp_path / "config.yaml")) == config


def test_numbers_of_numpy_are_numbers() -> None:
    settings = {"lr": np.float32(0.5), "crop_area": (np.float64(0.25), 1), "steps": np.int64(3)}
    config = to_config(settings | {"graph": "off", "resume": False})
    assert to_config(yaml.safe_load(as_yaml(config))) == config
    assert [type(value) for value in (config.lr, *config.crop_area, config.steps)] == [
        *(float, float, int, int)
    ]


def test_places_in_the_file_are_absolute_and_urls_stay(tmp_path, monkeypatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(as_yaml(to_config({"data": ["images", "https://x/a-{00..99}.tar"]})))
    assert content["data"] == [str(tmp_path / "images"), "https://x/a-{00..99}.tar"]


def test_differences_are_named() -> None:
    old = {"epochs": 3, "crop_area": (0.2, 1.0), "out": "a", "resume": True}
    assert differences(old, to_config({"epochs": 4, "out": "b"})) == {"epochs": (3, 4)}


def test_places_are_written_down_for_wherever_they_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pretrained", "images", "runs"):
        (tmp_path / name).mkdir()

    def written(**settings: object) -> dict[str, object]:
        return yaml.safe_load(as_yaml(PretrainConfig(**settings)))

    assert written(weights="pretrained")["weights"] == "pretrained"
    assert written(weights="runs")["weights"] == str(tmp_path / "runs")
    shards = "s-{000..001}.tar::t.tar", "https://a.org/s-{0..9}.tar", "pipe:cat s.tar"
    assert written(data=shards)["data"] == [
        f"{tmp_path}/s-{{000..001}}.tar::{tmp_path}/t.tar",
        *shards[1:],
    ]
    assert written(data=("images",))["data"] == [str(tmp_path / "images")]


def test_what_moved_with_a_run_is_no_other_model(tmp_path) -> None:
    old = {"model": "/gone/net.py:tiny", "data": ("/gone/images",), "weights": None}
    moved = PretrainConfig(model=f"{tmp_path}/net.py:tiny", data=("/here/images",))
    assert differences(old, moved) == {"data": (("/gone/images",), ("/here/images",))}
    for other in (f"{tmp_path}/net.py:large", "other.py:tiny", "timm/net"):
        assert "model" in differences(old, PretrainConfig(model=other))
