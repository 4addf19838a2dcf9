"""The benchmarks still run, in their tiniest forms, and count what they say they count."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

from pixel_level_contrastive_learning import PixelCL

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py"))


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str) -> ModuleType:
    """A room of the benchmarks, as its neighbours import it."""
    return importlib.import_module(name)


def run(script: str, *arguments: str) -> str:
    """What a script prints, run in a process of its own."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_loads_and_says_what_it_is_for(script: str) -> None:
    module = load(script)
    assert module.__doc__
    assert not hasattr(module, "main") or f"python benchmarks/{script}.py" in module.__doc__


def test_a_step_is_measured_against_the_floor() -> None:
    tiny = "--size", "64", "--batch", "2", "--rounds", "1", "--steps", "1", "--threads", "1"
    out = run("step", *tiny)
    assert "resnet18 at 64 px, batch 2, float32, cpu" in out
    assert "| ours / floor |" in out


def test_a_raster_is_cut_beside_writing_it() -> None:
    out = run("tiles", "--side", "700")
    assert out.count(", tiles 4.0, ") == 2
    assert out.count("| memory / 2 GiB |") == 2


def test_the_peer_must_not_be_this_package() -> None:
    with pytest.raises(AssertionError, match="an environment of its own"):
        run("step", "--size", "64", "--batch", "2", "--serve", "published")


def test_every_part_of_a_step_is_timed_once() -> None:
    learner = PixelCL(resnet18(), 64, projection_size=8, projection_hidden_size=8)
    watch = load("step").Stopwatch("cpu")
    watch.follow(learner)
    learner(torch.rand(2, 3, 64, 64))
    assert set(watch.spent) == {"views", "colour", "online", "target", "propagation", "losses"}
    assert min(watch.spent.values()) > 0
    assert watch.open == []


def test_memory_of_the_losses_is_the_peak_of_a_process_of_its_own() -> None:
    small = "--batch", "1", "--channels", "8", "--hidden", "8", "--limit", "8"
    out = run("memory", "--child", "--part", "losses", "--sides", "32", *small)
    # A float32 table of 32 x 32 cells against as many has 4 MiB; maps have a hundredth of that.
    assert 1 < json.loads(out)["mib"] < 400


def test_a_step_on_64_by_64_cells_takes_less_than_a_gib() -> None:
    size = "--sides", "64", "--batch", "2", "--channels", "64", "--hidden", "2048"
    assert 0 < json.loads(run("memory", "--child", *size, "--limit", "8"))["mib"] < 1024


def test_memory_over_the_limit_is_said_and_no_larger_map_tried() -> None:
    small = "--batch", "2", "--channels", "64", "--hidden", "8", "--limit", "0"
    out = run("memory", "--part", "losses", "--sides", "32", "64", *small)
    assert "| 32 x 32 | over the limit |" in out
    assert "| 64 x 64 | not tried |" in out


def test_the_slope_is_of_the_two_largest_sides_that_double() -> None:
    memory = load("memory")
    assert memory.slope({32: 1.0, 64: 4.0, 96: 9.0, 128: 16.0}, [32, 64, 96, 128]) == 1
    assert memory.slope({64: 1.0, 128: 16.0}, [64, 128]) == 2
    assert memory.slope({64: 1.0}, [64, 128]) is None


def test_blocks_and_plain_form_do_the_same_work() -> None:
    grads: list[Tensor] = []
    for both in load("blocks").forms(6, 2, 8).values():
        for work in both.values():
            work()
            online = work.args[0].__closure__  # what forward reads, the map with the gradient
            grads += [
                cell.cell_contents.grad.clone()
                for cell in online
                if isinstance(cell.cell_contents, Tensor) and cell.cell_contents.requires_grad
            ]
    assert len(grads) == 6
    for in_blocks, in_full in zip(grads[::2], grads[1::2], strict=True):
        assert in_blocks.abs().max() > 0
        torch.testing.assert_close(in_blocks, in_full)


def test_ratios_are_medians_of_rounds() -> None:
    measure = load("measure")
    measured = [{"seconds": s} for s in (2.0, 3.0, 40.0)]
    base = [{"seconds": s} for s in (1.0, 1.0, 10.0)]
    assert measure.ratio(measured, base) == 3


def test_contenders_take_turns_after_a_round_that_is_forgotten() -> None:
    calls: list[str] = []

    def contender(name: str) -> dict[str, int]:
        calls.append(name)
        return {"turn": len(calls)}

    contenders = {name: lambda name=name: contender(name) for name in "ab"}
    results = load("measure").in_turns(contenders, 2)
    assert "".join(calls) == "ababab"
    assert results == {"a": [{"turn": 3}, {"turn": 5}], "b": [{"turn": 4}, {"turn": 6}]}


def test_a_dead_contender_tells_its_last_words() -> None:
    measure = load("measure")
    with (
        measure.Contender([sys.executable, "-c", "raise SystemExit('no such card')"]) as dead,
        pytest.raises(RuntimeError, match="no such card"),
    ):
        dead()


def test_records_are_replaced_by_setting_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = load("measure")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for value, where in ((1.5, "here"), (1.25, "here"), (2.0, "there")):
        measure.report("step", "small", {"x": value}, {}, where=where, save=True)
    entries = json.loads((tmp_path / "step.json").read_text())
    assert [(e["machine"], e["ratios"]["x"]) for e in entries] == [("here", 1.25), ("there", 2.0)]
    assert "| x | 1.250 | 1.500 |" in capsys.readouterr().out


def test_counts_of_a_resnet_are_what_hand_arithmetic_says() -> None:
    scaling = load("scaling")
    step = scaling.count("resnet18", 64, 2, scaling.Hardware())
    # At 224 px a ResNet-18 takes 1.814 G multiply-adds an image without its classifier, and those
    # of each layer grow with its map: (64 / 224) ** 2 of it at 64 px. Four passes of two images.
    backbone = 4 * 2 * 2 * 1.814e9 * (64 / 224) ** 2
    assert backbone < step.forward.flops < 1.2 * backbone
    # Two of the passes go back, by two products each, but none to the images.
    assert step.backward.flops == pytest.approx(step.forward.flops, rel=0.05)
    assert step.norms == (20 + 2 * 2 + 1, 20 + 2 * 2)  # the backbone's, the heads', the predictor's


def test_depthwise_convolutions_go_back_at_twice_their_price() -> None:
    scaling = load("scaling")
    net = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    with scaling.Roofline(scaling.Hardware()) as forward:
        y = net(x).sum()
    with scaling.Roofline(scaling.Hardware()) as backward:
        y.backward()
    assert forward.flops == 2 * 9 * 16 * 8 * 8
    assert backward.flops == 2 * forward.flops


def test_collectives_by_hand() -> None:
    hardware = load("scaling").Hardware(wire_share=1)
    assert hardware.all_reduce(8e9, 1) == 0
    assert hardware.all_reduce(8e9, 8) == pytest.approx(2 * 7e9 / 450e9)
    assert hardware.all_reduce(8e9, 16) == pytest.approx(2 * (7e9 / 450e9 + 0.5e9 / 50e9))
    assert hardware.roundtrip(1) == 0
    assert hardware.roundtrip(32) == pytest.approx(40e-6)


def test_scaling_is_written_between_the_marks_of_a_page(tmp_path: Path) -> None:
    begin, end = load("scaling").MARKS
    page = tmp_path / "scaling.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    run("scaling", "--models", "resnet18", "--size", "64", "--write", str(page))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| resnet18 | 512 | 16384 | 32 |" in text
    assert "--peak 9.89e+14 --bandwidth 3.35e+12" in text


def test_a_setting_is_what_differs_from_the_base_of_its_start() -> None:
    settings = load("settings")
    changes = settings.parsed("steps 3000, lr 3e-4, levels 3 4", "mobilenet")
    assert changes == {"steps": 3000, "levels": [3, 4]}  # the rate is this start's own
    assert settings.label(changes) == "steps 3000, levels 3 4"
    assert settings.parsed(settings.label(changes), "mobilenet") == changes
    assert settings.parsed("base", "random") == {}
    with pytest.raises(SystemExit, match="'stepz 3' is no setting; write KEY VALUE, keys being st"):
        settings.parsed("stepz 3", "random")
    with pytest.raises(SystemExit, match="norm is one of data, imagenet"):
        settings.parsed("norm own", "random")


def test_gains_are_over_the_same_start_with_the_rate_that_val_chose() -> None:
    def cell(changes: dict[str, int], slow: list[float], fast: list[float]) -> dict[str, object]:
        tuned = {
            rate: {"val": val, "test": [1 - score for score in val]}
            for rate, val in (("0.0003", slow), ("0.001", fast))
        }
        linear = {"val": [0.0, val := slow[0] / 2], "test": [0.0, val]}
        named = {"start": "random", "settings": changes, "domain": "town", "seed": 0}
        return named | {"linear": linear, "finetuned": tuned}

    start, base = cell({"steps": 0}, [0.5, 0.25], [0.25, 0.25]), cell({}, [0.25, 0.25], [0.75, 0.5])
    single = cell({"steps": 9}, [0.5], [0.25])
    lines = load("settings").tables([start, base, single], ["town"], "test").splitlines()
    assert lines[3:] == [
        "| steps 0 | 0 | 62.5 (25.0) |  |",
        "| base | 0 | -25.0 (-12.5) | -25.00 (-12.5) |",
        "| steps 9 | 0 | -12.5* (+0.0) | -12.50 (+0.0) |",
    ]


@pytest.mark.parametrize("domains", [["iddlite", "neuseg", "salt"], ["camvid", "nuclei"]])
def test_the_tables_of_settings_are_those_of_the_record(domains: list[str]) -> None:
    cells = json.loads((BENCHMARKS / "results" / "settings.json").read_text())["cells"]
    tables = load("settings").tables(cells, domains, "val")
    assert tables in (BENCHMARKS / "README.md").read_text()


def test_pretraining_on_two_levels_moves_the_backbone_when_its_turn_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_memory = load("in_memory")
    monkeypatch.setattr(in_memory, "DEVICE", "cpu")
    small = {"steps": 2, "batch": 2, "view": 64, "levels": [3, 4], "distill": 1.0}
    images = torch.randint(256, (3, 3, 64, 80), dtype=torch.uint8)
    moved = []
    for alone in (2, 1):
        net = resnet18()
        before = [weight.clone() for weight in net.layer1.parameters()]
        config = load("settings").BASE | small | {"head_steps": alone}
        layers = load("settings").STARTS["random"].layers
        arguments = net, layers, images, torch.nn.Identity(), config, 0
        curve = in_memory.pretrain(*arguments, projection_hidden_size=8)
        assert len(curve) == 2
        assert all(0 <= part <= 8.001 for parts in curve for part in parts[:2])
        assert not net.layer4._forward_hooks
        after = net.layer1.parameters()
        moved.append(any((a != b).any() for a, b in zip(before, after, strict=True)))
    assert moved == [False, True]


def test_stages_learn_at_their_share_of_the_rate_and_are_trainable_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_memory, settings = load("in_memory"), load("settings")
    monkeypatch.setattr(in_memory, "DEVICE", "cpu")
    net, layers = resnet18(), settings.STARTS["random"].layers
    names = {id(weight): name.partition(".")[0] for name, weight in net.named_parameters()}
    shares = in_memory.learning_shares(net, layers, [0.0, 0.0, 0.5, 1.0])
    by_stage = {(names[id(weight)], share, weight.requires_grad) for weight, share in shares}
    still, half, whole = ("conv1", "bn1", "layer1", "layer2"), ("layer3",), ("layer4", "fc")
    expected = {(name, 0.0, False) for name in still} | {(name, 0.5, True) for name in half}
    assert by_stage == expected | {(name, 1.0, True) for name in whole}

    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    small = {"steps": 2, "batch": 2, "view": 64, "rates": [0.0, 0.0, 0.5, 1.0]}
    images = torch.randint(256, (3, 3, 64, 80), dtype=torch.uint8)
    given = net, layers, images, torch.nn.Identity(), settings.BASE | small, 0
    in_memory.pretrain(*given, projection_hidden_size=8)
    moved = {
        name.partition(".")[0]
        for name, weight in net.named_parameters()
        if (weight != before[name]).any()
    }
    assert moved == {"layer3", "layer4"}
    assert all(weight.requires_grad for weight in net.parameters())
