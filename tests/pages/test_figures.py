import warnings
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from alignblind_mi.pages import figures

ROLES = ("base", "aligned")
NAN = float("nan")


def rate(value: float, n: int = 40, invalid: float = 0.1) -> dict[str, float]:
    ends = {"low": value - 0.1, "high": value + 0.1, "template_min": value - 0.2, "template_max": value + 0.2}
    return {"n": n, "rate": value, "invalid_share": invalid, "worst": value - 0.15, "best": value + 0.15, **ends}


@pytest.fixture
def behaviour() -> pd.DataFrame:
    rows = [{"role": role, "kind": kind, "category": category, **rate(0.3 + 0.1 * i + 0.05 * j + 0.2 * k, invalid=0.1 * (i + j))}
            for k, kind in enumerate(("implicit", "explicit")) for j, category in enumerate(("one", "two", "pooled"))
            for i, role in enumerate(ROLES)]
    return pd.DataFrame(rows)


@pytest.fixture
def log_odds() -> pd.DataFrame:
    rows = [{"role": role, "category": category, "n": 40, "mean": i + j, "low": i + j - 0.5, "high": i + j + 0.5}
            for j, category in enumerate(("one", "two", "pooled")) for i, role in enumerate(ROLES)]
    return pd.DataFrame(rows)


@pytest.fixture
def position() -> pd.DataFrame:
    rows = [{"role": role, "template": template, "n": 30, "rate": 0.4 + 0.1 * i + 0.2 * j, "low": 0.3, "high": 0.9,
             "position": 0.5 - 0.1 * j, "position_low": 0.2, "position_high": 0.8}
            for j, template in enumerate(("first", "second")) for i, role in enumerate(ROLES)]
    return pd.DataFrame(rows)


@pytest.fixture
def curves() -> pd.DataFrame:
    rows = [{"question": question, "role": role, "word": word, "layer": layer, "n": 12, "mean": 0.1 * i - 0.02 * layer + 0.05 * j,
             "low": -0.5, "high": 0.5, "unpatched": 0.25 + 0.5 * i}
            for question in ("paper", "about") for layer in range(4) for i, role in enumerate(ROLES) for j, word in enumerate((" a", " b"))]
    return pd.DataFrame(rows)


@pytest.fixture
def scores() -> pd.DataFrame:
    rows = [{"question": question, "role": role, "control": control, "n": 12, "r_blind": 0.3 * i + j, "low": 0.3 * i + j - 0.1,
             "high": 0.3 * i + j + 0.1}
            for question in ("paper", "about") for i, role in enumerate(ROLES) for j, control in enumerate(("", "random"))]
    return pd.DataFrame(rows)


@pytest.fixture
def steering() -> pd.DataFrame:
    rows = [{"family": "untreated", "sense": "", "start": -1, **rate(0.8)}]
    rows += [{"family": "steering" if sense == "meant" else "placebo", "sense": sense, "start": start,
              **rate(0.3 + 0.1 * start + 0.05 * j, invalid=0.05 * start)}
             for j, sense in enumerate(("meant", "other", "control")) for start in range(3)]
    return pd.DataFrame(rows)


@pytest.fixture
def lora() -> pd.DataFrame:
    rows = [{"label": label, "kind": kind, **rate(0.3 + 0.1 * i + 0.2 * j)}
            for i, label in enumerate(("untreated", "early", "late")) for j, kind in enumerate(("implicit", "explicit"))]
    return pd.DataFrame(rows)


@pytest.fixture
def comparison() -> pd.DataFrame:
    rows = [{"label": f"treatment number {i}", "implicit": 0.3 + 0.1 * i, "explicit": 0.2, "explicit_low": 0.1, "explicit_high": 0.3,
             "r_blind": 0.1 * i, "r_blind_low": 0.1 * i - 0.05, "r_blind_high": 0.1 * i + 0.05, **rate(0.3 + 0.1 * i)} for i in range(4)]
    return pd.DataFrame(rows)


def heights(axis: object, label: str) -> list[float]:
    container = next(c for c in axis.containers if c.get_label() == label)    # type: ignore[attr-defined]
    return [bar.get_height() for bar in container]


def line(axis: object, label: str) -> np.ndarray:
    return next(drawn for drawn in axis.lines if drawn.get_label() == label).get_xydata()    # type: ignore[attr-defined]


def test_behaviour_bars_are_the_rates_of_the_table(behaviour, log_odds):
    implicit, explicit, points, strip, *_ = figures.behaviour_figure(behaviour, log_odds).axes
    for axis, kind in ((implicit, "implicit"), (explicit, "explicit")):
        assert len(axis.containers) == len(ROLES)
        for role in ROLES:
            rows = behaviour[(behaviour["kind"] == kind) & (behaviour["role"] == role)]
            assert heights(axis, role) == pytest.approx(rows["rate"].tolist())
    for role in ROLES:
        rows = behaviour[(behaviour["kind"] == "implicit") & (behaviour["role"] == role)]
        assert heights(strip, role) == pytest.approx(rows["invalid_share"].tolist())
        assert line(points, role)[:, 1] == pytest.approx(log_odds[log_odds["role"] == role]["mean"].tolist())


def test_both_intervals_are_drawn_at_their_ends(behaviour, log_odds):
    axis = figures.behaviour_figure(behaviour, log_odds).axes[0]
    ends = {tuple(np.round(segment[:, 1], 6)) for lines in axis.collections for segment in lines.get_segments()}
    for _, row in behaviour[behaviour["kind"] == "implicit"].iterrows():
        assert (round(row["low"], 6), round(row["high"], 6)) in ends
        assert (round(row["template_min"], 6), round(row["template_max"], 6)) in ends


def test_a_rate_without_valid_answers_is_said_and_not_drawn_as_zero(behaviour, log_odds):
    behaviour.loc[0, ["rate", "template_min", "template_max"]] = NAN
    behaviour.loc[0, ["low", "high", "invalid_share"]] = (0.0, 1.0, 1.0)
    axis = figures.behaviour_figure(behaviour, log_odds).axes[0]
    assert sum(text.get_text() == "no valid answer" for text in axis.texts) == 1
    assert np.isnan(heights(axis, "base")[0])


def test_position_draws_association_and_position(position):
    association, moved = figures.position_figure(position).axes
    for role in ROLES:
        rows = position[position["role"] == role]
        assert line(association, role)[:, 0] == pytest.approx(rows["rate"].tolist())
        assert line(moved, role)[:, 0] == pytest.approx(rows["position"].tolist())
    assert [label.get_text() for label in association.get_yticklabels()] == ["first\nn = 30", "second\nn = 30"]


def test_awareness_has_a_line_a_role_and_says_the_unpatched_probability(curves, scores):
    axes = figures.awareness_figure(curves, scores).axes
    assert len(axes) == 6
    for axis, question, word in ((axes[0], "paper", " a"), (axes[1], "paper", " b"), (axes[3], "about", " a"), (axes[4], "about", " b")):
        for role in ROLES:
            rows = curves[(curves["question"] == question) & (curves["word"] == word) & (curves["role"] == role)]
            assert line(axis, role) == pytest.approx(rows[["layer", "mean"]].to_numpy(float))
        assert any("base 0.25, aligned 0.75" in text.get_text() for text in axis.texts)
    assert line(axes[5], "aligned")[:, 0] == pytest.approx([0.3, 1.3])
    assert [label.get_text() for label in axes[5].get_yticklabels()] == ["identifiers\nn = 12", "random vector\nn = 12"]


def test_readings_have_a_row_an_instrument_and_their_controls(scores):
    profile = pd.DataFrame([{"panel": panel, "role": role, "layer": layer, "n": 12, "mean": 0.1 * layer - i, "low": -1.0, "high": 1.0}
                            for panel in ("patchscope", "probe") for i, role in enumerate(ROLES) for layer in range(4)])
    named = scores.rename(columns={"r_blind": "mean", "question": "panel"}).replace({"panel": {"paper": "patchscope", "about": "probe"}})
    axes = figures.readings_figure(profile, named).axes
    assert len(axes) == 4
    assert line(axes[2], "aligned")[:, 1] == pytest.approx([-1.0, -0.9, -0.8, -0.7])
    assert line(axes[3], "base")[:, 0] == pytest.approx([0.0, 1.0])


def test_an_instrument_without_a_reading_says_so_beside_ones_that_read_and_the_layout_holds(scores):
    profile = pd.DataFrame([{"panel": panel, "role": role, "layer": layer, "n": 12, "mean": NAN if panel == "probe" else 0.1 * layer,
                             "low": -1.0, "high": 1.0} for panel in ("patchscope", "probe") for role in ROLES for layer in range(4)])
    named = scores.rename(columns={"r_blind": "mean", "question": "panel"}).replace({"panel": {"paper": "patchscope", "about": "probe"}})
    figure = figures.readings_figure(profile, named)
    reads, _, silent, none = figure.axes
    assert [text.get_text() for text in silent.texts] == ["no layer gives a reading"]
    assert [len(line(silent, f"no reading, {role}")) for role in ROLES] == [4, 4]
    assert not none.axison
    assert not [drawn for drawn in reads.lines if "no reading" in str(drawn.get_label())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")    # matplotlib warns where it gives the layout up
        figures.to_png(figure)


def test_steering_has_a_line_a_sense_beside_the_untreated_one(steering):
    axis, strip = figures.steering_figure(steering).axes
    for sense, label in (("meant", "meant"), ("other", "placebo: other"), ("control", "placebo: control")):
        assert line(axis, label)[:, 1] == pytest.approx(steering[steering["sense"] == sense]["rate"].tolist())
    assert set(line(axis, "untreated")[:, 1]) == {0.8}
    shares = [tuple(drawn.get_ydata()) for drawn in strip.lines]
    assert shares[0] == pytest.approx(steering[steering["sense"] == "meant"]["invalid_share"].tolist())


def test_noise_is_a_band_of_its_draws(steering):
    noise = steering[steering["sense"] == "other"].assign(sense="noise", draws=5, draw_low=0.2, draw_high=[0.6, 0.7, 0.8])
    axis, _ = figures.steering_figure(pd.concat([steering.assign(draws=1), noise], ignore_index=True)).axes
    (band,) = [drawn for drawn in axis.collections if type(drawn).__name__ == "FillBetweenPolyCollection"]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.2, 0.8)
    assert line(axis, "placebo: noise")[:, 1] == pytest.approx(noise["rate"].tolist())


def test_lora_bars_are_the_rates_of_the_table(lora):
    axis, strip = figures.lora_figure(lora).axes
    for kind in ("implicit", "explicit"):
        assert heights(axis, kind) == pytest.approx(lora[lora["kind"] == kind]["rate"].tolist())
        assert heights(strip, kind) == pytest.approx(lora[lora["kind"] == kind]["invalid_share"].tolist())


def test_comparison_has_a_row_a_treatment(comparison):
    implicit, explicit, invalid, blind = figures.comparison_figure(comparison).axes
    assert line(implicit, "implicit")[:, 0] == pytest.approx(comparison["implicit"].tolist())
    assert line(explicit, "explicit")[:, 0] == pytest.approx(comparison["explicit"].tolist())
    assert line(blind, "r_blind")[:, 0] == pytest.approx(comparison["r_blind"].tolist())
    assert [bar.get_width() for bar in invalid.patches] == pytest.approx(comparison["invalid_share"].tolist())
    assert [bar.get_width() for bar in implicit.patches] == pytest.approx((comparison["best"] - comparison["worst"]).tolist())
    assert [label.get_text() for label in implicit.get_yticklabels()] == [f"treatment number {i} (n = 40)" for i in range(4)]


def test_comparison_without_explicit_answers_and_readings(comparison):
    columns = [name for name in comparison if not name.startswith(("explicit", "r_blind"))]
    _, explicit, _, blind = figures.comparison_figure(comparison[columns]).axes
    assert {drawn.get_label() for drawn in (*explicit.lines, *blind.lines)}.isdisjoint({"explicit", "r_blind"})


@pytest.fixture
def all_figures(behaviour, log_odds, position, curves, scores, steering, lora, comparison, patched, depth, selfie
                ) -> list[Callable[[], Figure]]:
    return [lambda: figures.behaviour_figure(behaviour, log_odds), lambda: figures.position_figure(position),
            lambda: figures.awareness_figure(curves, scores), lambda: figures.steering_figure(steering),
            lambda: figures.lora_figure(lora), lambda: figures.comparison_figure(comparison),
            lambda: figures.patch_heatmap(patched), lambda: figures.depth_figure(depth), lambda: figures.selfie_figure(*selfie)]


def test_nothing_is_clipped_at_the_edge(all_figures):
    for draw in all_figures:
        figure = draw()
        figures.to_png(figure)
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 > -0.02
        assert box.y0 > -0.02
        assert box.x1 < width + 0.02
        assert box.y1 < height + 0.02


def test_files_are_images_and_the_same_each_time(lora):
    assert figures.to_png(figures.lora_figure(lora)).startswith(b"\x89PNG")
    first, second = (figures.to_svg(figures.lora_figure(lora)) for _ in range(2))
    assert b"<svg" in first
    assert first == second


def test_the_settings_of_matplotlib_stay_as_they_were(all_figures):
    before = dict(mpl.rcParams)
    for draw in all_figures:
        draw()
    assert dict(mpl.rcParams) == before


def test_numbers_have_two_digits():
    assert [figures.number(value) for value in (0.18812, 0.4, 12.4, NAN)] == ["0.19", "0.40", "12", "none"]
    assert figures.percent(0.973) == "97"


@pytest.fixture
def patched() -> pd.DataFrame:
    return pd.DataFrame([{"panel": panel, "layer": layer, "place": place, "mean": 0.3 * layer - 0.4 * j - i, "n": 5 + i}
                         for i, panel in enumerate(("denoise", "noise")) for layer in range(4)
                         for j, place in enumerate(("3 first", "4 second", "9 third"))])


def test_the_heat_map_s_cells_are_the_table_s_means_on_a_symmetric_scale(patched):
    patched.loc[0, "mean"] = NAN
    first, second, bar = figures.patch_heatmap(patched, across="token").axes
    for axis, panel in ((first, "denoise"), (second, "noise")):
        (image,) = axis.images
        wanted = patched[patched["panel"] == panel].pivot(index="layer", columns="place", values="mean").to_numpy()
        assert np.ma.filled(image.get_array(), NAN) == pytest.approx(wanted, nan_ok=True)
        assert image.get_clim() == (-1.8, 1.8)
        assert image.origin == "lower"
        assert [label.get_text() for label in axis.get_xticklabels()] == ["3 first", "4 second", "9 third"]
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["denoise (n = 5 pairs)", "noise (n = 6 pairs)"]
    assert len(first.texts) == 11
    assert {text.get_text() for text in second.texts} >= {"−1.00", "−0.10"}
    assert bar.get_ylabel().startswith("effect")


def test_a_heat_map_of_many_tokens_has_a_panel_below_the_other(patched):
    wide = pd.concat([patched.assign(place=f"{i} word") for i in range(30)]).drop_duplicates(["panel", "layer", "place"])
    first, second, _ = figures.patch_heatmap(wide).axes
    assert first.get_position().y0 > second.get_position().y1 - 0.05
    assert not first.texts
    small = figures.patch_heatmap(patched.assign(mean=0.01)).axes[0].images[0]
    assert small.get_clim() == (-1, 1), "a small effect is not made to look large"


@pytest.fixture
def depth() -> pd.DataFrame:
    return pd.DataFrame([{"direction": direction, "layer": layer, "n": 6, "mean": 0.9 - 0.2 * layer - 0.1 * i, "low": 0.1, "high": 0.95,
                          "control_low": -0.1, "control_high": 0.3 - 0.1 * layer}
                         for i, direction in enumerate(("denoise", "noise")) for layer in range(4)])


def test_depth_has_a_panel_a_direction_and_the_controls_band(depth):
    first, second = figures.depth_figure(depth).axes
    assert line(first, "denoise")[:, 1] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert line(second, "noise")[:, 1] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert first.get_title(loc="left") == "denoise (n = 6 pairs)"
    controls = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (controls.min(), controls.max()) == pytest.approx((-0.1, 0.3))


def shares(one: float, two: float) -> dict[str, float]:
    ends = {f"{name}_{end}": value for name, share in (("one", one), ("two", two), ("rest", 1 - one - two))
            for end, value in (("share", share), ("low", max(0.0, share - 0.1)), ("high", min(1.0, share + 0.1)))}
    return {"n": 12, **ends}


@pytest.fixture
def selfie() -> tuple[pd.DataFrame, pd.DataFrame]:
    layers = [{"panel": role, "layer": layer, **shares(0.2 + 0.1 * layer, 0.5 - 0.2 * i)}
              for i, role in enumerate(ROLES) for layer in range(3)]
    controls = [{"panel": role, "control": control, **shares(0.3, 0.3 + 0.1 * i)}
                for role in ROLES for i, control in enumerate(("", "anchor_group", "random"))]
    return pd.DataFrame(layers), pd.DataFrame(controls)


def test_open_readings_are_stacked_to_a_whole_by_layer_and_by_control(selfie):
    figure = figures.selfie_figure(*selfie)
    left, right, second, _ = figure.axes
    assert heights(left, "one") == pytest.approx([0.2, 0.3, 0.4])
    assert heights(second, "two") == pytest.approx([0.3, 0.3, 0.3])
    tops = [bar.get_y() + bar.get_height() for bar in next(c for c in left.containers if c.get_label() == "rest")]
    assert tops == pytest.approx([1, 1, 1])
    widths = [bar.get_width() for bar in next(c for c in right.containers if c.get_label() == "two")]
    assert widths == pytest.approx([0.3, 0.4, 0.5])
    assert left.get_title(loc="left") == "base: readings by layer (n = 12 a layer)"
    assert [label.get_text().split("\n")[0] for label in right.get_yticklabels()] == ["identifiers", "words of the group sense",
                                                                                     "random vector"]
    ends = {tuple(np.round(segment[:, 1], 6)) for lines in left.collections for segment in lines.get_segments()}
    assert ends == {(0.1, 0.3), (0.2, 0.4), (0.3, 0.5)}
