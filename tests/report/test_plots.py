import pandas as pd
import pytest

from dwc.metrics.calibration import CalibrationCounts
from dwc.report import plots
from dwc.report.results import read_results
from tests.report.studies import DWC, ENSEMBLE, write_pooled, write_study

POOLED = "HNBW MAP"
KINDS = {POOLED: "pooled", ENSEMBLE: "ensemble", DWC: "dwc"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return read_results(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture
def drawn(monkeypatch):
    """Call a chart and return its figure instead of a file."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))

    def draw(chart, *arguments, **options):
        chart(*arguments, "nowhere.png", **options)
        return figures[-1]

    return draw


def table_figure(draw, results):
    kinds = dict(zip(results.rows["row"], results.rows["kind"], strict=True))
    figure = draw(plots.table_plot, results.table, kinds, results.volumes, results.groups, table_sd=results.table_sd)
    return {axis.get_title(): axis for axis in figure.axes}


def test_the_table_has_a_panel_per_column_with_means_over_their_volumes(study, drawn):
    panels = table_figure(drawn, study)
    assert list(panels) == ["H", "N", "B", "W", "Avg.", "A"]
    assert panels["H"].get_yticklabels()[5].get_text() == "H → N"
    lines = [line for line in panels["A"].lines if 5 in line.get_ydata()]
    ticks, mean = (list(line.get_xdata()) for line in lines[:2])
    assert mean == pytest.approx([100 * study.table.loc["H->N", "A"]])
    volumes = study.volumes[(study.volumes["row"] == "H->N") & (study.volumes["site"] == "A")]
    assert ticks == pytest.approx((100 * volumes["dice"]).tolist())


def test_seeds_add_bars_of_their_standard_deviation(tmp_path, drawn):
    pooled = read_results(write_pooled(tmp_path, seeds=2))
    bars = [path for bar in table_figure(drawn, pooled)["Avg."].collections for path in bar.get_segments()]
    (low, y), (high, _) = bars[0]
    assert (y, (high - low) / 2) == (0, pytest.approx(100 * pooled.table_sd["Avg."].iloc[0]))


def test_classes_are_sorted_by_size_and_those_no_truth_has_are_left_out(study, drawn):
    classes = study.classes.copy()
    classes.loc[classes["name"] == "CSF", "dice"] = None
    classes.loc[classes["name"] == "Cerebellum", "truth_mm3"] = 1e9
    figure = drawn(plots.class_plot, classes, KINDS, {"H, N": ["H", "N"], "A (unseen)": ["A"]})
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (names[0], len(names)) == ("Cerebellum", 7)
    assert not {"CSF", study.classes["name"].iloc[0]} & set(names)
    part = classes[(classes["row"] == POOLED) & (classes["site"] == "A") & (classes["name"] == "Cerebellum")]
    assert figure.axes[1].containers[0].lines[0].get_xdata()[0] == pytest.approx(100 * part["dice"].mean())


def test_calibration_shows_rates_of_bins_that_hold_enough_voxels(drawn):
    counts = CalibrationCounts(9)
    few, n = plots.FEWEST - 1, 1000
    counts.add(*(pd.Series(values).to_numpy() for values in ([0.31] * few + [0.92] * n, [1.5] * few + [0.2] * n,
                                                             [True] * few + [True] * 700 + [False] * 300)))  # fmt: skip
    frame = counts.frame().assign(row=DWC, site="H")
    reliability, errors = drawn(plots.calibration_plot, frame, {DWC: "dwc"}, {"H": ["H"]}).axes
    line = reliability.lines[1]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([pytest.approx(0.92)], [pytest.approx(0.7)])
    (line,) = errors.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([pytest.approx(0.2)], [pytest.approx(0.3)])
    expected = 100 * (n * 0.22 + few * 0.69) / (n + few)
    assert reliability.get_legend_handles_labels()[1] == [f"H → N+B+W → H (DWC): ECE {expected:.2f} %"]


def test_training_curves_mark_where_each_network_reached_its_plateau(study, drawn):
    logs = {site: (study.log(f"{site} MAP"), study.log(f"H->{site}")) for site in ("N", "W")}
    speed = study.speed.assign(map_plateau_step=300, vcl_plateau_step=[100, 120, None])
    figure = drawn(plots.training_plot, logs, speed, origin="H")
    loss_n, loss_w, dice_n, _ = figure.axes
    assert [list(line.get_xdata()) for line in loss_n.lines if line.get_linestyle() == ":"] == [[300, 300], [100, 100]]
    assert [list(line.get_xdata()) for line in loss_w.lines if line.get_linestyle() == ":"] == [[300, 300]]
    assert list(loss_n.lines[0].get_ydata()) == study.log("N MAP")["nll"].tolist()
    assert dice_n.lines[0].get_ydata()[-1] == pytest.approx(100 * study.log("N MAP")["dice"].iloc[-1])


def test_a_chart_is_a_whole_png(study, tmp_path):
    path = plots.class_plot(study.classes, KINDS, {"A": ["A"]}, tmp_path / "classes.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["classes.png"]
