"""The curves: what is read, what is drawn, and what is said of them."""

import json
import re
from math import isnan, nan

import pytest
from matplotlib.figure import Figure

from pixel_level_contrastive_learning.visualization import curves
from pixel_level_contrastive_learning.visualization.curves import (
    CHARTS,
    chart_svg,
    chart_words,
    charts_of,
    curve,
    curves_figure,
    lines_of,
    read_metrics,
    running_mean,
)

COSINES = CHARTS[0]
METRICS = {"step": [1.0, 2, 3], "pixel_cosine": [0.1, 0.2, 0.6], "spread": [nan, 0.5, 0.5]}


def test_metrics_are_read_into_columns(tmp_path) -> None:
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2, "spread": 0.5}, {"step": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = read_metrics(tmp_path)
    assert metrics["step"] == [1, 2, 3]
    assert metrics["loss"][:2] == [2.5, 2]
    assert isnan(metrics["loss"][2])
    assert [isnan(value) for value in metrics["spread"]] == [True, False, True]


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_metrics(file) == {"step": [1], "loss": [2]}


def test_any_other_broken_line_is_named(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError) as error:
        read_metrics(file)
    assert str(error.value) == (
        f"{file}, line 2, is 'nonsense', which is not a JSON object; the file was changed after "
        "the run: fix or delete the line"
    )


def test_long_runs_are_drawn_as_means_of_neighbours() -> None:
    steps = [float(step) for step in range(10 * curves.MAX_POINTS)]
    x, y = curve({"step": steps, "loss": [2 * step for step in steps]}, "loss")
    assert len(x) == curves.MAX_POINTS
    assert x[:2] == [4.5, 14.5]
    assert y == [2 * place for place in x]


def test_what_is_measured_seldom_is_drawn_where_it_was_measured() -> None:
    metrics = {"step": [1, 2, 3, 4, 5], "probe_miou": [0.2, 0.2, 0.2, 0.4, 0.4]}
    metrics |= {"hit1": [0.3, 0.3, 0.3, 0.3, 0.6], "hit_step": [nan, 0, 0, 3, 5]}
    assert curve(metrics, "probe_miou") == ([1, 4], [0.2, 0.4])
    assert curve(metrics, "hit1") == ([0, 3, 5], [0.3, 0.3, 0.6])
    del metrics["hit_step"]  # by an older version
    assert curve(metrics, "hit1") == ([1, 5], [0.3, 0.6])


def test_what_no_loss_reads_is_not_drawn() -> None:
    [line] = lines_of(COSINES, METRICS | {"instance_cosine": [0.0, 0.0, 0.0]})
    assert line.label == "pixel"


def test_a_schedule_is_drawn_as_it_is() -> None:
    rates = [float(abs(place - 50)) for place in range(100)]
    [chart] = [chart for chart in CHARTS if chart.title == "Learning rate"]
    [line] = lines_of(chart, {"step": range(100), "lr": rates})
    assert line.mean == line.values == rates


@pytest.mark.parametrize(
    ("values", "points"),
    [([nan, 5, 7], ([2, 3], [5, 7])), ([5], ([1], [5])), ([nan] * 3, ([], [])), ([], ([], []))],
)
def test_gaps_are_left_out(values, points) -> None:
    assert curve({"step": [1, 2, 3], "loss": values}, "loss") == points
    assert curve({"loss": values}, "loss") == ([], [])


def test_a_running_mean_keeps_a_line_and_its_length() -> None:
    line = [float(value) for value in range(100)]
    mean = running_mean(line)
    assert len(mean) == 100
    assert mean[20:80] == pytest.approx(line[20:80])
    assert running_mean([1.0, 5.0, 1.0]) == [1.0, 5.0, 1.0]  # too few to smooth


def test_only_figures_that_are_there_are_drawn() -> None:
    titles = [chart.title for chart, _ in charts_of(METRICS)]
    assert titles == ["Similarity of pairs", "Spread"]
    figure = curves_figure(METRICS)
    assert isinstance(figure, Figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "mean cosine, -1 to 1",
        "0 collapsed, 1 even",
    ]


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        curves_figure({})
    assert str(error.value) == ("metrics hold no steps yet; let the run take a few steps first")


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_a_chart_on_a_page_wears_the_colours_of_the_page(chart) -> None:
    names = [name for name, _ in chart.curves]
    metrics = {"step": [1.0, 2, 3]} | {name: [0.5, 30.0, 2.0] for name in names}
    text = chart_svg(chart, lines_of(chart, metrics))
    assert text.startswith("<svg ")
    assert "var(--one)" in text
    assert ("var(--two)" in text) == (len(names) > 1)
    assert ("var(--bad)" in text) == (chart.bound is not None)
    assert not re.search("#0[1-5]0[1-5]0[1-5]", text)
    for forbidden in ("<style", "<metadata", "<script", "http://www.w3.org/1999/02"):
        assert forbidden not in text
    assert chart_svg(chart, lines_of(chart, metrics)) == text
    assert ">step<" in text
    assert f">{chart.unit}<" in text


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e-9, 1e9], [0.01] * 9])
@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_no_figures_upset_a_chart(chart, values) -> None:
    steps = [float(step) for step in range(len(values))]
    metrics = {"step": steps} | {name: values for name, _ in chart.curves}
    assert "<svg" in chart_svg(chart, lines_of(chart, metrics))  # warnings are errors


def test_a_chart_is_told_chart_words() -> None:
    assert chart_words(COSINES, lines_of(COSINES, METRICS)) == (
        "Similarity of pairs, mean cosine, -1 to 1: pixel from 0.1 at step 1 to 0.6 at step 3, "
        "between 0.1 and 0.6."
    )
