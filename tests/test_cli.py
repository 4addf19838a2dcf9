"""The command line: its flags, its help without torch, its refusals and exit codes."""

import json
import re
import resource
import subprocess
import sys
from importlib.metadata import version
from typing import get_args, get_type_hints

import pytest
import torch
from torchvision import models

from pixel_level_contrastive_learning import arguments, cli, load_backbone
from pixel_level_contrastive_learning.backbones.export import FORMATS
from pixel_level_contrastive_learning.evaluation import evaluate, finetuning
from pixel_level_contrastive_learning.evaluation.comparison import PROTOCOLS
from pixel_level_contrastive_learning.files import CannotWriteError
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo
from pixel_level_contrastive_learning.trainer.config import PretrainConfig

PACKAGE = "pixel_level_contrastive_learning"
FLAGS_OF_PRETRAIN = """
--out --config --recipe --resume --overwrite --dry-run --pages --nodata --model --weights --channels
--pixel-layer --pixel-levels --level-weights --instance-layer --zero-init-residual --image-size
--crop-area --aspect-ratio --prob-hflip --prob-vflip --max-rotation --jitter --prob-jitter
--prob-gray --prob-blur --blur-sigma --prob-solarise --loss --alpha --instance-weight
--projection-size --projection-hidden-size --ppm-num-layers --ppm-gamma --distance-thres
--similarity-temperature --batch-size --accumulate --epochs --steps --optimizer --lr --weight-decay
--warmup-epochs --final-lr --target-momentum --clip-grad --seed --precision --workers --cache
--accelerator --devices --num-nodes --strategy --graph --checkpoint-every --keep-checkpoints
--max-broken --loggers --picture-every --probe --ids --colours --probe-protocol --probe-every
"""
FLAGS = FLAGS_OF_PRETRAIN.split()


def help_of(*arguments: str, flag: str = "--help", capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, flag])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_the_flags_are_frozen() -> None:
    """A name here is in somebody's script: add to the list, never take away."""
    import dataclasses

    names = [field.name for field in dataclasses.fields(PretrainConfig)]
    assert ["data", *(flag[2:].replace("-", "_") for flag in FLAGS)] == names


def test_help_all_names_every_flag_in_groups(capsys) -> None:
    text = help_of("pretrain", flag="--help-all", capsys=capsys)
    assert [flag for flag in FLAGS if not re.search(f" {flag}[ \n]", text)] == []
    _, *parts = re.split(r"^ (\w+) options +$", text, flags=re.MULTILINE)
    groups = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(groups) == ["run", "data", "network", "views", "loss", "training", "machine"]
    for group, flag in (("data", "pages"), ("network", "model"), ("run", "probe"), ("run", "out")):
        assert f" --{flag} " in groups[group]
    line = " ".join(text.split())
    assert "--seed INT Random seed. (default: 0)" in line
    assert "--nodata FLOAT Value that means" in line


def test_help_names_the_flags_that_matter_first(capsys) -> None:
    text = help_of("pretrain", capsys=capsys)
    shown = [flag for flag in FLAGS if re.search(f"^ +{flag} ", text, re.MULTILINE)]
    assert len(shown) == len(arguments.FIRST) - 1  # all but the positional data
    assert {"--out", "--model", "--weights", "--epochs", "--steps", "--resume"} <= set(shown)
    assert "--help-all" in text
    assert text.count("\n") < 90


def test_help_names_every_command(capsys) -> None:
    text = help_of(capsys=capsys)
    for command in ("pretrain", "evaluate", "visualize", "export", "layers", "demo"):
        assert command in text
    assert "pixelcl --version" in " ".join(text.split())


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate=0.1"])
def test_a_flag_by_its_name_elsewhere_is_refused_with_ours(flag) -> None:
    with pytest.raises(ValueError, match=r"'learning_rate' is no setting; perhaps lr;"):
        cli.parse_config(["images", flag, "0.1"][: 2 if "=" in flag else 3])


def test_a_file_of_settings_may_name_one_folder_as_a_text(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("data: slides\nsteps: 2\n")
    assert cli.parse_config(["--config", f"{tmp_path}/mine.yaml"]).data == ("slides",)


def test_help_comes_without_torch_and_soon() -> None:
    code = (
        f"import sys; from {PACKAGE}.cli import main\n"
        "try: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'lightning', 'kornia', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    bare = seconds_of("-c", "pass")
    assert seconds_of("-m", PACKAGE, "--help") < bare + 1.0  # 0.2 on an idle machine


def seconds_of(*arguments: str) -> float:
    """Processor time that Python takes, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_flags_become_settings() -> None:
    config = cli.parse_config(
        [
            *("a", "b", "--out", "run", "--crop-area", "0.1", "0.5", "--image-size", "96", "128"),
            *("--batch-size", "auto", "--epochs", "7", "--max-broken", "0.5", "--dry-run"),
            *(
                "--pixel-layer",
                "layer3",
                "--checkpoint-every",
                "5",
                "--loggers",
                "csv",
                "tensorboard",
            ),
        ]
    )
    assert config == PretrainConfig(
        data=("a", "b"),
        out="run",
        crop_area=(0.1, 0.5),
        image_size=(96, 128),
        epochs=7,
        max_broken=0.5,
        dry_run=True,
        pixel_layer="layer3",
        checkpoint_every=5,
        loggers=("csv", "tensorboard"),
    )


@pytest.mark.parametrize(
    ("given", "in_order"),
    [
        ("--protocol finetune RUN --data D", "RUN --protocol finetune --data D"),
        ("--protocol knn linear RUN OTHER --json", "RUN OTHER --protocol knn linear --json"),
        ("--fractions 0.1 1 RUN --data=D", "RUN --fractions 0.1 1 --data=D"),
        ("--size 64 RUN --nodata -1", "RUN --size 64 --nodata -1"),
        ("--size 64 96 RUN", "RUN --size 64 96"),
        ("--json RUN --layers a b", "RUN --json --layers a b"),
        ("--seeds None RUN", "RUN --seeds None"),
        ("--datta x RUN", "--datta x RUN"),  # likewise
    ],
)
def test_flags_of_several_values_take_no_word_that_cannot_be_one(given, in_order) -> None:
    assert arguments.positionals_first(cli.evaluate, given.split()) == in_order.split()


def test_words_before_data_are_settings_where_they_can_be() -> None:
    given = ["--image-size", "96", "DATA", "--loggers", "csv", "MORE", "--no-resume", "--seed", "3"]
    config = cli.parse_config(given)
    assert (config.data, config.image_size) == (("DATA", "MORE"), 96)
    assert (config.loggers, config.seed) == (("csv",), 3)
    assert cli.parse_config(["DATA", "--ppm-num-layers", "2"]).ppm_num_layers == 2
    layers = "--pixel-layer", "layer3", "layer2", "--config", "x"
    assert arguments.positionals_first(PretrainConfig, layers) == [*layers]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "pretrain --pixel-layer layer3 DATA",
            "left for DATA; put it first: DATA --pixel-layer",
        ),
        ("evaluate --layers layer4 RUN --data D", "left for WEIGHTS; put it first: RUN --layers"),
    ],
)
def test_a_flag_of_names_that_took_all_words_is_told(given, message, capsys) -> None:
    assert message in refusal(*given.split(), capsys=capsys)


def test_flags_count_more_than_the_file_and_the_recipe(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("data: [x]\nsteps: 300\nlr: 1e-4\nbatch_size: 8\n")
    config = cli.parse_config(
        ["--config", str(tmp_path / "mine.yaml"), "--epochs", "3", "--out=run"]
    )
    assert (config.data, config.steps, config.epochs) == (("x",), None, 3)
    assert (config.lr, config.batch_size) == (1e-4, 8)
    config = cli.parse_config(["a", "--recipe", "pixpro-100ep", "--batch-size", "64"])
    assert (config.optimizer, config.batch_size, config.epochs) == ("lars", 64, 100)


def test_resuming_takes_the_settings_of_the_run(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("data: [x]\nsteps: 30\nmodel: torchvision/resnet18\n")
    config = cli.parse_config(["--out", str(tmp_path), "--resume", "--steps", "40"])
    assert (config.resume, config.steps, config.model) == (True, 40, "torchvision/resnet18")


@pytest.mark.parametrize("words", [["--epochs", "auto"], ["--epochs=auto"]])
def test_a_flag_counts_though_it_says_what_holds_by_default(tmp_path, words) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 300\n")
    config = cli.parse_config(["a", "--config", str(tmp_path / "mine.yaml"), *words])
    assert (config.steps, config.epochs) == (None, "auto")


def test_a_switch_that_is_on_already_may_be_given_or_turned_off(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("data: [x]\nsteps: 3\nzero_init_residual: true\n")
    for start in (
        ("a", "--recipe", "pixpro-100ep"),
        ("--config", str(tmp_path / "config.yaml")),
        ("--out", str(tmp_path), "--resume"),
    ):
        assert cli.parse_config([*start]).zero_init_residual
        assert cli.parse_config([*start, "--zero-init-residual"]).zero_init_residual
        assert not cli.parse_config([*start, "--no-zero-init-residual"]).zero_init_residual


@pytest.mark.parametrize(
    "code", ["from {0}.__main__ import main; main()", "from {0} import pretrain"]
)
def test_without_the_extras_the_error_says_how_to_install_them(code) -> None:
    block = "import sys; sys.modules |= dict.fromkeys(('tyro', 'yaml', 'lightning'))\n"
    done = subprocess.run(
        [sys.executable, "-c", block + code.format(PACKAGE)], capture_output=True, text=True
    )
    message = done.stderr.splitlines()[-1]
    assert message.endswith(
        " is not installed; everything beside PixelCL itself needs the extra train: pip install "
        "'pixel-level-contrastive-learning[train]'"
    )


def test_warnings_of_a_command_show_no_code() -> None:
    code = (
        f"import sys, warnings; from {PACKAGE}.__main__ import main; sys.argv[1:] = ['--version']; "
        "main(); warnings.warn('as it is told')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: as it is told\n"


def exit_code(arguments: tuple[str, ...]) -> object:
    """The code a command ends with, whoever ends it."""
    try:
        return cli.main(list(arguments))
    except SystemExit as done:
        return done.code


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says, its exit code being 2."""
    assert exit_code(arguments) == 2
    said = capsys.readouterr().err
    return " ".join(word for word in said.split() if word.strip("│╭╮╰╯─"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epohs", "3"], "--epochs"),
        (["--pixel-layr", "layer3"], "--pixel-layer"),
        (["--epochs", "0", "--seed", "-1"], "epochs is 0; it must be a whole number"),
        (["--epochs", "many"], "--epochs is 'many'; it must be a whole number or 'auto'"),
        (["--loss", "pixpr", "--lr", "None"], "it must be 'pixpro' or 'pixcontrast' (perhaps"),
        (["--crop-area", "0.1"], "--crop-area"),
        (["--config", "/nowhere/x.yaml"], "cannot be read"),
        (["--recipe", "pixpro-200ep"], "must be one of 'pixpro-100ep', 'pixpro-400ep' (perhaps"),
    ],
)
def test_mistakes_in_flags_are_refused_with_a_hint(given, message, capsys) -> None:
    assert message in refusal("pretrain", "x", "--out", "y", *given, capsys=capsys)


def test_both_mistakes_are_reported(capsys) -> None:
    said = refusal("pretrain", "x", "--epochs", "0", "--lr", "0", capsys=capsys)
    assert "epochs is 0" in said
    assert "lr is 0" in said


def test_unknown_commands_are_refused_with_the_known_ones(capsys) -> None:
    said = refusal("pretrian", "x", capsys=capsys)
    assert "'layers', 'demo' (perhaps 'pretrain')" in said


def test_without_a_word_the_help_is_shown(capsys) -> None:
    assert exit_code(()) == 0
    assert "{pretrain,prepare," in capsys.readouterr().out


def test_all_that_is_wrong_is_told_at_once(capsys) -> None:
    said = refusal("evaluate", "--protocol", "lin", "RUN", "--seeds", "two", capsys=capsys)
    assert "--protocol is 'lin'; it must be 'linear' or" in said
    assert "--seeds is 'two'; it must be a whole number" in said


def test_the_version_is_that_of_the_package(capsys) -> None:
    assert exit_code(("--version",)) == 0
    assert capsys.readouterr().out.strip() == version("pixel-level-contrastive-learning")


def test_out_and_data_are_asked_for(capsys) -> None:
    assert "out is not given" in refusal("pretrain", "x", capsys=capsys)
    assert "data is not given" in refusal("pretrain", "--out", "y", capsys=capsys)


def test_every_format_of_export_can_be_asked_for() -> None:
    allowed = get_type_hints(cli.export)["format"]
    assert [get_args(option) for option in get_args(allowed)] == [tuple(FORMATS), ()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dry-run", "--dry-run needs --push OWNER/NAME; add it, or leave --dry-run out"),
        ("--private --licence mit", "--private, --licence needs --push"),
        ("--push me/net --format onnx", "--format does not go with --push, which writes no file"),
        ("--push me/net --out x.pth", "--out does not go with --push"),
    ],
)
def test_flags_of_export_that_would_not_be_read_are_refused(flags, message, capsys) -> None:
    assert message in refusal("export", "run", *flags.split(), capsys=capsys)


@pytest.mark.parametrize("command", ["evaluate", "features"])
def test_commands_that_take_weights_name_all_kinds(capsys, command) -> None:
    assert exit_code((command, "--help")) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    kinds = "file, torchvision/NAME[=FILE], timm/NAME[=FILE], hf://OWNER/NAME or random:MODEL"
    assert kinds in said


@pytest.mark.parametrize("command", ["pretrain", "prepare"])
def test_what_cannot_be_written_ends_a_command_and_only_a_run_resumes(
    monkeypatch, capsys, command
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise CannotWriteError("oh")

    monkeypatch.setattr(f"{PACKAGE}.trainer.trainer.run", broken)
    monkeypatch.setattr(f"{PACKAGE}.data.shard_writer.write_shards", broken)
    assert exit_code((command, "x", "--out", "y")) == 1
    resume = " (continue the run with --resume)" * (command == "pretrain")
    assert capsys.readouterr().err == f"error: oh{resume}\n"


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    evaluate = "pixel_level_contrastive_learning.evaluation.evaluate.evaluate"
    monkeypatch.setattr(evaluate, interrupted)
    assert exit_code(["evaluate", "random:torchvision/resnet18", "--images", "x"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_flags_of_evaluate_arrive(monkeypatch) -> None:
    asked: list[dict[str, object]] = []
    names: list[tuple[str, ...]] = []

    def noted(weights: tuple[str, ...], **settings: object) -> evaluate.Evaluation:
        names.append(weights)
        asked.append(settings)
        raise ValueError

    monkeypatch.setattr(evaluate, "evaluate", noted)
    reading = ("--pages", "first", "--nodata", "-1", "--ids", "0:0", "--colours", "c.txt")
    more = ("--steps", "2000", "--fraction", "0.1", "--device", "cpu", "--fractions", "0.1", "1")
    for flags in ((), (*more, *reading)):
        cli.main(["evaluate", "v", "w", "--data", "d", "--protocol", "finetune", "knn", *flags])
    assert [one["steps"] for one in asked] == [finetuning.STEPS, 2000]
    assert [one["fraction"] for one in asked] == [1.0, 0.1]
    assert [one["fractions"] for one in asked] == [None, (0.1, 1.0)]
    assert [one["protocol"] for one in asked] == [("finetune", "knn")] * 2
    assert names == [("v", "w")] * 2
    assert get_args(cli.Protocol) == tuple(PROTOCOLS)
    assert [one["device"] for one in asked] == [None, "cpu"]
    names = ("pages", "nodata", "ids", "colours")
    assert [asked[0][name] for name in names] == [None, None, None, None]
    assert [asked[1][name] for name in names] == ["first", -1, "0:0", "c.txt"]


def test_layers_are_listed_of_one_look_at_the_network(capsys, monkeypatch) -> None:
    look, looks = FeatureInfo.look, []
    monkeypatch.setattr(FeatureInfo, "look", lambda info: looks.append(info) or look(info))
    assert cli.main(["layers", "torchvision/resnet18", "--image-size", "64"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    [row] = [line for line in table if " layer3 " in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "layer3",
        "Sequential",
        "16",
        "256",
        "4x4",
    ]
    assert last == (
        "by default: layer3 (from random weights also layer2) for the pixel level, avgpool for the "
        "instance level"
    )
    assert len(looks) == 1


def test_layers_are_listed_as_json(capsys) -> None:
    assert cli.main(["layers", "torchvision/resnet18", "--image-size", "64", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["pixel_layer"], listed["instance_layer"]) == ("layer3", "avgpool")
    [row] = [row for row in listed["layers"] if row["layer"] == "layer3"]
    assert row == {
        "layer": "layer3",
        "type": "Sequential",
        "stride": 16,
        "channels": 256,
        "cells": [4, 4],
    }


def test_dry_run_and_export_print_json_and_nothing_else(labelled, tmp_path, capsys) -> None:
    images = str(labelled / "images")
    small = "--model", "torchvision/resnet18", "--image-size", "32", "--projection-hidden-size", "8"
    start = "pretrain", images, "--out", str(tmp_path / "run"), *small, "--batch-size", "4"
    assert cli.main([*start, "--json", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metrics"]["positive_pairs"] > 0
    assert "preview written to" in printed.err
    assert cli.main([*start, "--steps", "1", "--workers", "0", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["run"], done["metrics"]["step"]) == (str(tmp_path / "run"), 1)
    assert cli.main(["export", str(tmp_path / "run"), "--format", "timm", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["path"] == str(tmp_path / "run" / "backbone-timm.safetensors")
    assert "matched 122 of 122 keys" in written["report"]


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = f"{sys.executable} -m {PACKAGE} pretrain --help-all | head -1"
    done = subprocess.run(code, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage")
    assert done.stderr == ""


def test_long_names_of_layers_are_shown_whole_also_where_no_layer_is_the_default(
    capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["layers", "torchvision/vit_b_16", "--image-size", "32", "32"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    cells = [line.strip("│ ").split("│")[0].strip() for line in table]
    assert last.startswith("by default: VisionTransformer has no map of at least 4x4")
    assert "encoder.layers.encoder_layer_0.mlp" in "".join(cells)


@pytest.mark.slow
def test_each_command_takes_what_the_one_before_it_left(labelled, tmp_path, capsys) -> None:
    """A folder, shards, a run, figures, a page, a file that plain torchvision reads."""
    images, shards, run = labelled / "images" / "train", tmp_path / "shards", tmp_path / "run"
    page, weights = tmp_path / "report.html", tmp_path / "resnet.pth"

    def said(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    assert "10 images in 1 shard," in said("prepare", images, "--out", shards)
    small = "--model", "torchvision/resnet18", "--image-size", 32, "--projection-hidden-size", 8
    short = "--steps", 2, "--batch-size", 4, "--workers", 0
    lines = said("pretrain", shards, "--out", run, *small, *short).splitlines()
    after = f"next: pixelcl visualize {run}", f"      pixelcl evaluate {run} --data LABELLED"
    assert lines == [f"run: {run}", *after]
    table = said("evaluate", run, "--data", labelled, "--protocol", "knn", "--out", run)
    assert "random weights" in table
    assert "mIoU" in table
    assert (run / "evaluation.json").exists()
    assert "--out" not in table
    content = json.loads(said("evaluate", run, "--data", labelled, "--protocol", "knn", "--json"))
    assert content == json.loads((run / "evaluation.json").read_text())
    cut = tmp_path / "tiles"
    text = said("prepare", images, "--out", cut, "--tile", 64, "--overlap", 8, "--keep-empty")
    assert text.splitlines()[-1] == f"shards: {cut}"
    figures = said("evaluate", run, "--images", cut)
    assert "hit@1" in figures
    assert figures.splitlines()[-1].startswith(f"(--out {run} keeps this with the run")
    how = "--images", images, "--out", page, "--pages", "first", "--nodata", -1
    assert cli.main([str(word) for word in ("visualize", run, *how)]) == 0
    written = capsys.readouterr()
    assert f"report: {page}" in written.out
    verdict = written.err.splitlines()[-1].split(". ")[0]
    assert f"{verdict}" in page.read_text()
    assert "random weights" in page.read_text()
    assert "matched 122 of 122 keys" in said(
        "export", run, "--format", "torchvision", "--out", weights
    )
    net = models.get_model("resnet18", weights=None)
    net.load_state_dict(torch.load(weights, weights_only=True))
    trained = load_backbone(run).state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in net.state_dict().items())


def test_a_recipe_is_not_laid_over_a_run_or_file_that_it_made(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: pixpro-100ep\nbatch_size: 4\nsteps: 2\n")
    for start in (["--out", str(tmp_path), "--resume"], ["--config", f"{tmp_path}/config.yaml"]):
        config = cli.parse_config([*start, "--seed", "3"])
        assert (config.batch_size, config.steps, config.seed) == (4, 2, 3)
    config = cli.parse_config(["images", "--recipe", "pixpro-100ep", "--batch-size", "4"])
    assert (config.batch_size, config.epochs, config.optimizer) == (4, 100, "lars")


@pytest.mark.parametrize("flags", [["images", "--out"], ["images", "--resume=1"]])
def test_a_flag_without_its_value_is_told_in_words(flags, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["pretrain", *flags])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out


def test_commands_of_a_file_of_settings_run_only_where_the_command_line_says_so(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("PIXELCL_ALLOW_COMMANDS", "")  # and nothing is left of it afterwards
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran, file = tmp_path / "ran", tmp_path / "config.yaml"
    file.write_text(f"data: ['pipe:touch {ran}']\nallow_commands: true\n")
    words = ["pretrain", "--config", str(file), "--out", str(tmp_path / "run"), "--dry-run"]
    assert cli.main(words) == 2
    assert "allow_commands" in capsys.readouterr().err  # no setting
    file.write_text(f"data: ['pipe:touch {ran}']\n")
    assert cli.main(words) == 2
    assert "give --allow-commands" in capsys.readouterr().err
    assert not ran.exists()
    assert cli.main([*words, "--allow-commands"]) == 2  # what it prints is no shard
    assert ran.exists()
