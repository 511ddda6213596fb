"""Learning curves show what the CSV files hold, and damaged or unfinished runs are dealt with."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semore_bench import estimates
from semore_bench.collect import collect
from semore_bench.looks import COLOURS, agent_looks, save
from semore_bench.plots import (
    Curve,
    aggregate_seeds,
    load_curve,
    plot,
    plot_curves,
    plot_efficiency,
    plot_profiles,
    plot_runs,
    plot_settings,
    results_curves,
)
from semore_bench.records import UnusableRun, find_runs
from tests import synthetic_runs
from tests.synthetic_runs import REACHER, WALKER, write_distracted_sweep, write_suite, write_sweep
from wrappers.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer bootstrap samples: no digit of an interval is compared here."""
    monkeypatch.setattr(estimates, "REPETITIONS", 100)


TRAIN_HEADER = "env_step,agent_step,episode,episode_return,episode_length,success_any,success_last,wall_seconds\n"
EVAL_HEADER = TRAIN_HEADER.strip() + ",eval_episode\n"


def write_run(root: Path, env_id="env-v0", agent="drq", seed=0, evaluations=None, training=None) -> Path:
    """A run directory; `evaluations` and `training` map env steps to returns: {1000: [1, 3]} is two episodes."""
    run = root / env_id.replace("/", "_") / agent / f"seed-{seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"agent": agent, "env_id": env_id, "seed": seed}))
    for name, header, results in (("eval", EVAL_HEADER, evaluations), ("train", TRAIN_HEADER, training)):
        if results is not None:
            rows = [
                f"{step},{step // 2},7,{value},500,{float(value > 2)},0.0,1.5" + (f",{index}" if name == "eval" else "")
                for step, values in results.items()
                for index, value in enumerate(values)
            ]
            (run / f"{name}.csv").write_text(header + "".join(f"{row}\n" for row in rows))
    return run


def lines(figure, panel=0) -> dict[str, tuple[list, list]]:
    return {
        line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in figure.axes[panel].lines
    }


def test_every_seed_is_drawn_and_their_mean(tmp_path):
    write_run(tmp_path, seed=0, evaluations={0: [0, 2], 1000: [4, 6]})
    write_run(tmp_path, seed=1, evaluations={0: [3, 3], 1000: [9, 9]})
    figure = plot_runs([tmp_path])
    assert lines(figure) == {
        "drq seed 0": ([0, 1000], [1, 5]),
        "drq seed 1": ([0, 1000], [3, 9]),
        "drq": ([0, 1000], [2, 7]),
    }
    mean, seed = figure.axes[0].lines[-1], figure.axes[0].lines[0]
    assert mean.get_linewidth() > 2 * seed.get_linewidth()


def test_a_panel_per_environment_and_a_colour_per_agent(tmp_path):
    for env_id in ("b-v0", "a-v0"):
        for agent in ("semore", "drq"):
            write_run(tmp_path, env_id, agent, evaluations={0: [1], 10: [2]})
    figure = plot_runs([tmp_path])
    assert [axis.get_title() for axis in figure.axes] == ["a-v0", "b-v0"]
    for axis in figure.axes:
        colours = {line.get_label(): line.get_color() for line in axis.lines}
        assert (colours["drq"], colours["semore"]) == COLOURS[:2]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["drq (1 seed)", "semore (1 seed)"]
    assert figure.get_supxlabel() == "environment steps"
    assert figure.get_supylabel() == "episode return"


@pytest.mark.parametrize("panels", range(1, 9))
def test_no_panel_is_left_empty(panels):
    curves = [Curve(f"env-{index}", "a", 0, np.arange(3), np.arange(3), True) for index in range(panels)]
    assert len(plot_curves(curves).axes) == panels


def test_many_agents_are_drawn_differently():
    curves = [Curve("env", f"agent {index}", 0, np.arange(3), np.arange(3), True) for index in range(12)]
    bold = [line for line in plot_curves(curves).axes[0].lines if "seed" not in line.get_label()]
    assert len({(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in bold}) == len(bold) == 12


def test_training_episodes_stand_in_for_missing_evaluations_dashed(tmp_path):
    write_run(tmp_path, agent="with", evaluations={0: [1], 10: [2]}, training={5: [100]})
    write_run(tmp_path, agent="without", training={5: [3], 15: [4]})
    figure = plot_runs([tmp_path])
    drawn = lines(figure)
    assert drawn["with"] == ([0, 10], [1, 2])
    assert drawn["without"] == ([5, 15], [3, 4])
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles == {"with seed 0": "-", "with": "-", "without seed 0": "--", "without": "--"}
    assert "training episodes" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_mean_ends_with_the_shortest_seed_and_interpolates_between_points():
    seeds = [
        Curve("env", "a", 0, np.array([0, 10, 20]), np.array([0.0, 10, 20]), True),
        Curve("env", "a", 1, np.array([5, 15]), np.array([1.0, 3]), True),
    ]
    steps, values, (low, high) = aggregate_seeds(seeds)
    assert steps.tolist() == [5, 10, 15]
    assert values.tolist() == [3, 6, 9]
    assert low.tolist() == [1, 2, 3]  # of two seeds, the lower and the higher
    assert high.tolist() == [5, 10, 15]


def test_interquartile_mean_ignores_the_best_and_the_worst_quarter():
    seeds = [
        Curve("env", "a", seed, np.array([0]), np.array([value]), True)
        for seed, value in enumerate((-1e9, 1.0, 3.0, 1e9))
    ]
    assert aggregate_seeds(seeds, "iqm")[1].tolist() == [2]


def test_seeds_without_a_common_step_have_no_mean():
    seeds = [Curve("env", "a", seed, np.array([seed, seed + 0.5]), np.zeros(2), True) for seed in range(2)]
    assert aggregate_seeds(seeds)[0].tolist() == []
    assert aggregate_seeds(seeds, "iqm")[1].tolist() == []
    plot_curves(seeds)


def test_success_rate(tmp_path):
    run = write_run(tmp_path, evaluations={0: [0, 1], 1000: [1, 3, 4, 0]})
    assert load_curve(run, "success_any").values.tolist() == [0, 0.5]
    assert plot_runs([run], metric="success_any").get_supylabel() == "success rate (any step)"


def test_a_half_written_row_is_left_out(tmp_path):
    run = write_run(tmp_path, evaluations={0: [1], 1000: [5]})
    with (run / "eval.csv").open("a") as file:
        file.write("2000,1000,7,12")  # of 1234.5
    curve = load_curve(run)
    assert (curve.steps.tolist(), curve.values.tolist()) == ([0, 1000], [1, 5])


@pytest.mark.parametrize("content", ["", EVAL_HEADER, EVAL_HEADER.strip(), "\n\n", EVAL_HEADER + "1000,500"])
def test_an_evaluation_file_without_rows_counts_as_none(tmp_path, content):
    run = write_run(tmp_path, training={5: [3]})
    (run / "eval.csv").write_text(content)
    assert not load_curve(run).from_evaluation
    (run / "train.csv").unlink()
    with pytest.raises(UnusableRun, match=r"no episode return in eval\.csv or train\.csv yet"):
        load_curve(run)


@pytest.mark.parametrize("row", ["\0\0", "2000,,,,,,,,", "3000,1500,7,8.0,500,0.0,0.0,1.5,0,many", "4000,2000,7,9"])
def test_rows_that_are_not_as_they_were_written_are_named(tmp_path, row):
    run = write_run(tmp_path, evaluations={0: [1], 1000: [5]})
    with (run / "eval.csv").open("a") as file:
        file.write(f"{row}\n2000,500,7,9.0,500,0,0,1.5,0\n")
    with pytest.raises(UnusableRun, match=r"eval\.csv is damaged: line 4"):
        load_curve(run)


def test_a_file_without_the_column_is_named(tmp_path):
    run = write_run(tmp_path)
    (run / "eval.csv").write_text("env_step,score\n1,2\n")
    with pytest.raises(UnusableRun, match=r"eval\.csv is damaged: it has no column episode_return"):
        load_curve(run)


@pytest.mark.parametrize(
    "config", ["", "{", "[]", "null", '{"agent": "a"}', '{"agent": "a", "env_id": "b", "seed": "x"}']
)
def test_a_damaged_config_is_told_from_a_missing_result(tmp_path, config):
    run = write_run(tmp_path, evaluations={0: [1]})
    (run / "config.json").write_text(config)
    with pytest.raises(UnusableRun, match=r"config\.json is damaged"):
        load_curve(run)


def test_runs_are_found_below_folders_and_only_once(tmp_path):
    runs = [write_run(tmp_path, seed=seed, evaluations={0: [1]}) for seed in range(3)]
    assert sorted(find_runs([tmp_path, runs[1], runs[1] / ".." / "seed-2"]).runs) == runs


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no run directory"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])


def test_command_draws_what_is_there_and_names_what_is_not(tmp_path, capsys):
    write_run(tmp_path / "runs", "dm_control/walker-walk-v0", evaluations={0: [1], 5000: [300]})
    broken = write_run(tmp_path / "runs", seed=1)
    output = tmp_path / "new" / "curves.png"
    plot((tmp_path / "runs",), output)
    shown = capsys.readouterr().out
    assert f"skipped {broken.resolve()}: no episode return" in shown
    assert f"drew 1 of 2 runs: {output}" in shown
    with Image.open(output) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**24)}
    assert tuple(bytes.fromhex(COLOURS[0][1:])) in colours


def test_command_without_any_result_is_refused(tmp_path):
    write_run(tmp_path)
    with pytest.raises(UserError, match="nothing to draw"):
        plot((tmp_path,), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_svg_has_its_texts_as_text(tmp_path):
    write_run(tmp_path, "dm_control/walker-walk-v0", evaluations={0: [1], 5000: [300]})
    plot_runs([tmp_path], tmp_path / "curves.svg")
    texts = "".join(ElementTree.parse(tmp_path / "curves.svg").getroot().itertext())
    assert "dm_control/walker-walk-v0" in texts
    assert "environment steps" in texts


@pytest.mark.parametrize("name", ["curves", "curves.xyz", "curves.png.txt"])
def test_unknown_formats_are_refused(tmp_path, name):
    write_run(tmp_path, evaluations={0: [1]})
    with pytest.raises(UserError, match=r"ends in \.png, \.svg, \.pdf"):
        plot_runs([tmp_path], tmp_path / name)


# ---- over all tasks ----


def test_profiles_and_bars_show_the_known_shares_and_scores(tmp_path):
    suite = write_suite(tmp_path / "tiny.toml", WALKER, REACHER)
    results = collect([write_sweep(tmp_path / "tiny")], suite)  # finals: 110, 120, 130 and 210, 220, 230; 200 more
    profile = {line.get_label(): line.get_data() for line in plot_profiles(results).axes[0].lines}
    limits, share = profile["drq_sac"]
    assert share[np.isclose(limits, 0.1)] == 1
    assert share[np.isclose(limits, 0.15)] == 0.5
    assert share[np.isclose(limits, 0.22)] == pytest.approx(1 / 6)  # more than, not as much as
    assert share[np.isclose(limits, 0.24)] == 0
    axis = plot_efficiency(results).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["50% of the budget", "100% of the budget"]
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == pytest.approx([0.085, 0.185, 0.17, 0.37], abs=1e-3)


def test_an_agent_that_ran_fewer_tasks_is_labelled_so_and_one_that_did_not_finish_has_a_label(tmp_path):
    suite = write_suite(tmp_path / "tiny.toml", WALKER, REACHER, "dm_control/hopper-hop-v0")
    root = write_sweep(tmp_path / "tiny")
    synthetic_runs.write_run(root, WALKER, "lucky", 1, {1000: [900.0], 2000: [1000.0]})
    for env_id in (WALKER, REACHER):
        synthetic_runs.write_run(root, env_id, "slow", 1, {1000: [5.0]}, state="running")
    results = collect([root], suite)
    assert [line.get_label() for line in plot_profiles(results).axes[0].lines] == [
        "drq_sac",
        "semore_sac",
        "lucky (1 of 2 tasks)",
    ]
    (legend,) = plot_efficiency(results).legends
    assert {text.get_text() for text in legend.texts} == {"drq_sac", "lucky (1 of 2 tasks)", "semore_sac", "slow"}


def test_the_same_run_twice_is_refused(tmp_path):
    for name in ("smoke", "lite"):
        write_sweep(tmp_path / name, tasks=(WALKER,), seeds=(1,))
    with pytest.raises(UserError, match="drq_sac on .* with seed 1 is there more than once"):
        plot((tmp_path,), tmp_path / "a.png")


def test_a_setting_is_drawn_on_request(tmp_path):
    write_distracted_sweep(tmp_path / "runs")
    run = next((tmp_path / "runs").glob("*walker*/drq_sac/seed-1"))
    assert load_curve(run).values.tolist() == [55, 110]
    assert load_curve(run, setting="mild").values.tolist() == [55]
    with pytest.raises(UnusableRun, match=r"of the setting head in eval\.csv"):
        load_curve(run, setting="head")
    plot((tmp_path / "runs",), tmp_path / "mild.svg", setting="mild")
    found = collect([tmp_path / "runs"])
    assert results_curves(found.choose("hard"))[0].steps.tolist() == [2000]
    bars = plot_settings(found).axes[0]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["clean", "hard", "mild"]
    heights = sorted(bar.get_height() for bar in bars.patches)
    assert heights == pytest.approx([0.017, 0.085, 0.17, 0.185, 0.2775, 0.37])


@pytest.mark.parametrize("kind", ["curves", "profiles", "efficiency", "settings"])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_runs_give_the_same_file(tmp_path, kind, ending):
    suite = write_suite(tmp_path / "tiny.toml", WALKER, REACHER)
    write_sweep(tmp_path / "runs" / "tiny", seeds=(1, 2))
    files = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for file in files:
        plot((tmp_path / "runs",), file, kind=kind, suite=suite)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_interval_is_shaded_where_there_are_two_seeds(tmp_path):
    write_run(tmp_path, agent="one", seed=0, evaluations={0: [1], 10: [2]})
    for seed, value in enumerate((2.0, 4.0, 9.0)):
        write_run(tmp_path, agent="three", seed=seed, evaluations={0: [value], 10: [value]})
    bands = [band.get_paths() for band in plot_runs([tmp_path]).axes[0].collections]
    assert [len(paths) for paths in bands] == [0, 1]
    corners = bands[1][0].vertices[:, 1]
    assert 2 <= corners.min() < 5 < corners.max() <= 9


def test_agents_differ_without_colour(tmp_path):
    looks = agent_looks([f"agent {number}" for number in range(8)])
    assert len({look.marker for look in looks.values()}) == len({look.hatch for look in looks.values()}) == 8
    assert len({look.colour for look in looks.values()}) == 8


def test_more_agents_than_safe_colours_differ_by_colour_and_marker():
    looks = agent_looks([f"agent {number}" for number in range(20)]).values()
    assert {look.colour for look in looks} == set(COLOURS)
    assert len({(look.colour, look.marker) for look in looks}) == 20
    assert len({(look.colour, look.hatch) for look in looks}) == 20


def test_a_long_legend_leaves_the_axes_their_room(tmp_path):
    write_sweep(tmp_path / "runs", agents=[f"agent_number_{n}" for n in range(24)], tasks=(WALKER,), seeds=(1,))
    results = collect([tmp_path / "runs"])
    for number, draw in enumerate((plot_profiles, plot_efficiency)):
        figure = draw(results)
        save(figure, tmp_path / f"{number}.png")
        assert figure.axes[0].get_window_extent().height / figure.dpi > 2  # inches


def test_agents_on_most_tasks_come_first(tmp_path):
    for agent, task in (("all", WALKER), ("all", REACHER), ("about_one", WALKER), ("both", WALKER), ("both", REACHER)):
        synthetic_runs.write_run(tmp_path, task, agent, 1, {1000: [1.0], 2000: [2.0]})
    labels = [text.get_text() for text in plot_runs([tmp_path]).legends[0].get_texts()]
    assert labels == ["all (1 seed)", "both (1 seed)", "about_one (1 seed)"]
    assert collect([tmp_path]).agents == ["all", "both", "about_one"]  # the same in the other figures and on the page


NAMES = ("a$x_$b", "_mine", "[ours]", r"\frac{", "x" * 200)


@pytest.mark.parametrize("kind", ["curves", "profiles", "efficiency"])
def test_names_stand_in_legends_as_they_are(tmp_path, kind):
    """Matplotlib takes dollars for mathematics, and leaves out what begins with an underscore."""
    suite = write_suite(tmp_path / "tiny.toml", WALKER)
    results = collect([write_sweep(tmp_path / "tiny", agents=NAMES, tasks=(WALKER,))], suite)
    draw = {"profiles": plot_profiles, "efficiency": plot_efficiency}.get(kind)
    figure = draw(results) if draw else plot_curves(results_curves(results))
    save(figure, tmp_path / "a.svg")
    shown = [text.get_text().removesuffix(" (3 seeds)") for text in figure.legends[0].get_texts()]
    assert sorted(name[:50] for name in shown) == sorted(name[:50] for name in NAMES)
    drawn = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert all(name in drawn for name in NAMES[:-1])
