"""What a run is called, and what is said of it."""

from dataclasses import replace

import pytest

from pixel_level_contrastive_learning.evaluation.results import Evaluation, Row
from pixel_level_contrastive_learning.visualization.verdict import findings, judge_run


@pytest.mark.parametrize(
    ("end", "heading"),
    [(0.9, "The features look healthy"), (0.1, "Healthy features, little learned")],
)
def test_a_run_that_learned_nothing_is_not_called_healthy(end, heading) -> None:
    metrics = {"step": [1, 2], "pixel_cosine": [0.2, end], "spread": [0.8], "effective_rank": [9]}
    assert judge_run(metrics, []).heading == heading
    del metrics["pixel_cosine"]
    assert judge_run(metrics, []).heading == "The features look healthy"


def test_a_quick_loader_is_not_worth_a_word() -> None:
    assert findings({"step": [1, 2], "waiting": [0.1, 0.1]}) == []


def run(
    cosine: float, rank: float, spread: float, unchanged: float, hit1: float
) -> dict[str, list]:
    """The figures of a run whose cells found their spot in 47 % of cases before the first step."""
    return {
        "step": [1, 2],
        "pixel_cosine": [0.1, cosine],
        "effective_rank": [60, rank],
        "spread": [0.8, spread],
        "hit1_colours_kept": [0.47, unchanged],
        "hit1": [0.475, hit1],
    }


@pytest.mark.parametrize(
    ("figures", "well", "heading"),
    [
        # The runs of docs/healthy-run.md.
        (run(0.75, 11, 0.75, 0.63, 0.59), True, "The run looks healthy"),
        (run(0.76, 1.6, 0.56, 0.48, 0.36), False, "The features are collapsing"),
        (run(0.80, 17, 0.65, 0.60, 0.45), False, "Matching relies on colour"),
        # Variations.
        (run(0.80, 17, 0.65, 0.90, 0.60), True, "The run looks healthy"),  # not alone
        (run(0.82, 21, 0.78, 0.50, 0.49), True, "Healthy features, little learned"),
        (run(0.87, 2.5, 0.46, 0.50, 0.43), False, "Worse than at the start"),
        (run(0.05, 21, 0.78, 0.58, 0.54), True, "Healthy features, little learned"),
        (run(0.87, 1.1, 0.46, 0.58, 0.54), False, "Something is wrong with this run"),
    ],
)
def test_what_a_run_is_called(figures, well, heading) -> None:
    verdict = judge_run(figures, [])
    assert (verdict.healthy, verdict.heading) == (well, heading)


@pytest.mark.parametrize(
    ("hit1", "cells", "heading"),
    [
        (0.43, 50, "Healthy features, little learned"),  # a deviation is 0.07
        (0.43, 5000, "Worse than at the start"),
        (0.54, 50, "Healthy features, little learned"),
        (0.54, 5000, "The run looks healthy"),
        (0.335, 50, "Worse than at the start"),
    ],
)
def test_chance_is_not_taken_for_learning(hit1, cells, heading) -> None:
    figures = run(0.8, 9, 0.7, 0.5, hit1) | {"hit_cells": [cells, cells]}
    assert judge_run(figures, []).heading == heading


def test_correspondence_counts_once_it_was_measured_after_training() -> None:
    figures = run(0.8, 9, 0.7, 0.5, 0.475)  # what was found before the first step, repeated
    assert judge_run(figures, []).heading == "The features look healthy"
    assert "was not measured after training" in " ".join(findings(figures))
    measured = figures | {"hit_step": [0, 2]}  # measured, and found to be the same
    assert judge_run(measured, []).heading == "Healthy features, little learned"
    assert "48% of the time, 48% before" in " ".join(findings(measured))
    late = {
        name: values[:1] * 99 + values[1:] for name, values in run(0.8, 9, 0.7, 0.6, 0.54).items()
    }
    assert judge_run(late, []).heading == "The run looks healthy"


def test_what_is_said_of_correspondence() -> None:
    good, colour = run(0.8, 9, 0.7, 0.58, 0.54), run(0.8, 21, 0.7, 0.63, 0.41)
    assert (
        "Cells find the same spot in another view 54% of the time, 48% before the first step."
        in findings(good)
    )
    assert not any("colour augmentation" in sentence for sentence in findings(good))
    assert any(
        "unchanged, 63% of the time: use stronger colour" in sentence
        for sentence in findings(colour)
    )


def test_steps_without_a_rank_hide_no_collapse() -> None:
    figures = run(0.76, 1.6, 0.56, 0.48, 0.36)
    figures |= {"effective_rank": [float("nan"), 60, 1.6]}
    assert judge_run(figures, []).heading == "The features are collapsing"


def test_a_run_that_was_never_looked_at_is_judged_by_its_features() -> None:
    metrics = {"step": [1, 2], "spread": [0.8], "effective_rank": [9], "hit1": [float("nan")]}
    assert judge_run(metrics, []).heading == "The features look healthy"


def test_the_likeness_of_pairs_alone_makes_no_run_healthy() -> None:
    metrics = {"step": [1, 2], "spread": [0.8] * 2, "effective_rank": [9] * 2}
    verdict = judge_run(metrics | {"pixel_cosine": [0.2, 0.8]}, [])
    assert verdict.heading == "The features look healthy"
    assert "was not measured" in "".join(verdict.findings)
    verdict = judge_run(metrics | {"pixel_cosine": [0.8, 0.2]}, [])
    assert verdict.heading == "Healthy features, little learned"


def test_a_run_of_the_instance_loss_alone_is_judged_by_what_it_has() -> None:
    figures = run(0.8, 11, 0.75, 0.63, 0.59)
    figures |= {"pixel_cosine": [0.0, 0.0], "positive_pairs": [0, 0], "instance_cosine": [0.1, 0.6]}
    assert judge_run(figures, []).heading == "The run looks healthy"
    sentences = findings(figures)
    assert sentences[0].startswith("The similarity of two views of an image rose from 0.10 to 0.60")
    assert any(
        "alpha is 0, or no two views see the same spot" in sentence for sentence in sentences
    )
    figures |= {"pixel_cosine": [0.1, 0.3], "positive_pairs": [9, 9]}
    sentences = findings(figures)
    assert sentences[0].startswith(
        "The similarity of cells that see the same spot rose from 0.10 to 0.30"
    )
    assert "Each image has 9 matching pairs of cells on average." in sentences


def test_a_probe_is_told_of() -> None:
    figures = run(0.8, 11, 0.75, 0.63, 0.59)
    assert not any("probe" in sentence for sentence in findings(figures))
    sentences = findings(figures | {"probe_miou": [0.25, float("nan"), 0.31, 0.29]})
    assert any(
        "A probe reaches 0.290 mIoU; 0.250 before the first step, 0.310 at best." in sentence
        for sentence in sentences
    )


def test_a_probe_that_was_best_before_the_first_step_has_no_checkpoint() -> None:
    (told,) = findings({"step": [1, 2, 3], "probe_miou": [0.4, 0.3, 0.35]})
    assert told == (
        "A probe reaches 0.350 mIoU; 0.400 before the first step, and no probe after it was better."
    )


def test_probes_that_began_late_tell_nothing_of_the_start() -> None:
    (told,) = findings({"step": [1, 2, 3], "probe_miou": [float("nan"), 0.4, 0.35]})
    assert told == (
        "A probe reaches 0.350 mIoU, 0.400 at best. best.ckpt has the best weights that were "
        "probed."
    )


@pytest.mark.parametrize(
    ("miou", "well", "heading"),
    [
        ((0.2, 0.22, 0.3), True, "The run looks healthy"),
        ((0.2, 0.22, 0.24), True, "Healthy features, no clear gain"),  # another draw may reach it
        ((0.2, 0.3, 0.3), True, "Healthy features, no clear gain"),
        ((0.2, 0.3, 0.28), False, "Worse than the starting weights"),
        ((0.2, 0.22, 0.18), False, "Worse than random weights"),
    ],
)
def test_a_stored_evaluation_overrules_what_looks_sound(miou, well, heading) -> None:
    names = "random weights", "start (torchvision/resnet18)", "runs/slides"
    random, start, run_row = (
        Row.of(name, [{"mIoU": score}], baselines=names[:2] if name == names[2] else ())
        for name, score in zip(names, miou, strict=True)
    )
    evaluation = Evaluation(
        weights="a",
        data="b",
        protocol="knn",
        settings={},
        rows=(random, start, run_row),
        sentence="",
    )
    good = run(0.75, 11, 0.75, 0.63, 0.59)
    verdict = judge_run(good, [], evaluation)
    assert (verdict.healthy, verdict.heading) == (well, heading)
    several = replace(evaluation, rows=(*evaluation.rows, run_row))  # not known which is the run
    assert judge_run(good, [], several).heading == "The run looks healthy"
    collapsed = judge_run(run(0.87, 1.1, 0.46, 0.58, 0.54), [], evaluation)
    assert collapsed.heading == "Something is wrong with this run"
