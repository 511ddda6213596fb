"""Comparison by time: what runs say of it, how soon an agent is where another ends, and what is done without it."""

import json
import shutil

import numpy as np
import pytest

from semore_bench import estimates, logs
from semore_bench.collect import collect
from semore_bench.logs import RunLogs
from semore_bench.plots import plot, plot_curves, plot_time, results_curves
from semore_bench.records import UnusableRun, read_clock, seconds_at
from semore_bench.report import page_content
from semore_bench.results import results
from semore_bench.scores import ALL, load
from semore_bench.tables import latex, make_table, markdown
from semore_bench.wall_clock import Timed, share_of_time
from tests.synthetic_runs import REACHER, WALKER, write_clock, write_run, write_suite, write_sweep, write_timed_sweep
from wrappers.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer bootstrap samples: no digit of an interval is compared here."""
    monkeypatch.setattr(estimates, "REPETITIONS", 100)


@pytest.fixture
def suite(tmp_path):
    return write_suite(tmp_path / "tiny.toml", WALKER, REACHER)


def row(made, agent, task=ALL):
    (found,) = [r for _, r in made.rows.iterrows() if (r.agent, r.task) == (agent, task)]
    return found


# ---- what runs say ----


def test_the_clock_of_a_run_stands_still_between_a_kill_and_its_continuation(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    first = {}
    for began, wall_before, steps in ((1000.0, 0.0, (800, 1600)), (90_000.0, 25.0, (2400, 3200))):
        now = began
        with logs.contextlib.ExitStack() as stack:
            run = RunLogs(tmp_path, 4000, stack)
            run.csv["metrics"].restore(first.get("state"))
            run.wall_before = wall_before  # as the checkpoint says
            for step in steps:
                now += 10
                run.write_metrics(step, step // 8, {})
            first["state"] = run.csv["metrics"].state()
    steps, seconds = read_clock(tmp_path)
    assert (steps, seconds) == ([0, 800, 1600, 2400, 3200], [0, 10, 20, 35, 45])
    assert [seconds_at((steps, seconds), step) for step in (800, 2000, 3200)] == [10, 27.5, 45]
    assert seconds_at((steps, seconds), 4000) == 45 * 4000 / 3200, "behind the last row"


def test_a_run_without_metrics_has_no_times(tmp_path):
    assert read_clock(tmp_path) == ([], [])
    assert np.isnan(seconds_at(([], []), 5))
    (tmp_path / "metrics.csv").write_text("env_step,agent_step,metric,value\n800,100,critic_loss,1.5\n")
    assert read_clock(tmp_path) == ([], [])


@pytest.mark.parametrize(
    "row",
    ["900,1,speed/wall_seconds,1", "900,1,speed/wall_seconds,nan", "900,1,speed/wall_seconds,inf"]
    + ["700,1,speed/wall_seconds,9", "900,1,speed/wall_seconds,x", "900", "900,1,speed/wall_seconds,\x1b[31m"],
)
def test_a_damaged_clock_costs_the_times_alone(tmp_path, suite, row):
    root = write_timed_sweep(tmp_path / "tiny")
    run = root / WALKER.replace("/", "_") / "drq_sac" / "seed-1"
    (run / "metrics.csv").write_text(f"env_step,agent_step,metric,value\n800,1,speed/wall_seconds,5\n{row}\n")
    with pytest.raises(UnusableRun, match="metrics.csv is damaged: .*line 3|metrics.csv is damaged: could not convert"):
        read_clock(run)
    made = make_table(collect([root], suite))
    assert any("metrics.csv is damaged" in note and "its times were left out" in note for note in made.notes)
    assert f"drq_sac on {WALKER}: seed 1 left out of times, which are not known" in made.notes
    assert made.rows.set_index(["task", "agent"]).scored[WALKER, "drq_sac"] == 3


# ---- tables ----


def test_time_to_the_baselines_end_is_a_share_of_the_baselines_time(tmp_path, suite):
    made = make_table(collect([write_timed_sweep(tmp_path / "tiny")], suite), baseline="drq_sac")
    # Walker: half of the budget gives 155 to 165, drq_sac ends with 110 to 130; reacher: 205 to 215, and 210 to 230.
    for task, share in ((WALKER, 21 / 102), (REACHER, 42 / 102), (ALL, 21 / 102)):
        found = row(made, "semore_sac", task)
        assert (found.seconds, found.time_share) == pytest.approx((42, share))
        assert found.time_share_low <= share <= found.time_share_high
        assert np.isnan(row(made, "drq_sac", task).time_share)
    text = markdown(made)
    assert "| seconds per run | time to drq_sac's IQM [95%] |" in text
    assert "| 42 | 0.21 [0." in text
    assert "drq_sac has at the end, as a share of drq_sac's seconds per run" in text
    assert "times, which are not known" not in text
    assert "seconds per run" in markdown(make_table(collect([tmp_path / "tiny"], suite)))


def test_what_is_never_reached_is_infinite(tmp_path, suite):
    made = make_table(collect([write_timed_sweep(tmp_path / "tiny")], suite), baseline="semore_sac")
    assert row(made, "drq_sac").time_share == np.inf
    assert "| 102 | ∞ [∞, ∞] |" in markdown(made)
    assert r"$\infty$" in latex(made)
    rows = page_content(collect([tmp_path / "tiny"], suite), "semore_sac")["settings"][0]["rows"]
    assert {r["time_share"] for r in rows if r["agent"] == "drq_sac"} == {"never"}


def test_the_share_is_that_of_a_slow_loop():
    random = np.random.default_rng(0)

    def runs(seeds: int, speed: float) -> Timed:
        scores = np.sort(random.uniform(0, 500, (seeds, 4)), 1)
        return Timed(
            np.arange(1, 5) / 4, scores, scores / 1000, speed * np.arange(1, 5) * random.uniform(1, 2, (seeds, 1))
        )

    for _ in range(30):
        own, theirs = [runs(4, 1.0), runs(5, 2.0)], [runs(4, 3.0), runs(2, 1.0)]
        target = estimates.iqm_of_all(*(task.scores[:, -1:] for task in theirs)).item()
        whole = sum(task.seconds[:, -1].mean() for task in theirs)
        expected = np.inf
        for moment in reversed(range(4)):
            if estimates.iqm_of_all(*(task.scores[:, [moment]] for task in own)).item() >= target:
                expected = sum(task.seconds[:, moment].mean() for task in own) / whole
        share, low, high = share_of_time(own, theirs, normalised=False)
        assert share == pytest.approx(expected)
        assert low <= high


def test_runs_without_times_are_left_out_and_named(tmp_path, suite):
    root = write_timed_sweep(tmp_path / "tiny")
    for seed in (2, 3):
        (root / WALKER.replace("/", "_") / "semore_sac" / f"seed-{seed}" / "metrics.csv").unlink()
    made = make_table(collect([root], suite), baseline="drq_sac")
    assert f"semore_sac on {WALKER}: seeds 2, 3 left out of times, which are not known" in made.notes
    assert row(made, "semore_sac", WALKER).seconds == 41
    assert row(made, "semore_sac", WALKER).scored == 3


def test_runs_on_other_hardware_are_left_out_of_times_and_named(tmp_path, suite):
    root = write_timed_sweep(tmp_path / "tiny")
    for seed in (4, 5, 6, 7):  # more than the baseline has elsewhere
        run = write_run(root, WALKER, "semore_sac", seed, {1000: [1.0], 2000: [150.0]}, hardware=("A GPU", "Other"))
        write_clock(run, {2000: 3.0})
    made = make_table(collect([root], suite), baseline="drq_sac")
    reason = "are those of A GPU (Other), not of A Processor"
    assert f"semore_sac on {WALKER}: seeds 4, 5, 6, 7 left out of times, which {reason}" in made.notes
    assert row(made, "semore_sac", WALKER).seconds == 42
    assert row(made, "semore_sac", WALKER).scored == 7
    results("build", (root,), suite, "drq_sac", output=tmp_path / "kept")
    kept = load(tmp_path / "kept")
    assert kept.evaluations.wall_seconds.notna().all(), "what was measured is kept"
    assert kept.hardware == "A Processor"
    assert kept.choose(None).scores().wall_seconds.isna().sum() == 4
    run = write_run(root, WALKER, "drq_sac", 9, {1000: [1.0], 2000: [150.0]}, hardware=("A GPU", "Other"))
    write_clock(run, {2000: 3.0})
    made = make_table(collect([root], suite), baseline="drq_sac")
    assert row(made, "drq_sac", WALKER).seconds == 102, "the hardware of most of the baseline's runs counts"


def test_without_any_time_tables_are_as_they_always_were(tmp_path, suite):
    made = make_table(collect([write_sweep(tmp_path / "tiny")], suite), baseline="drq_sac")
    assert not {"seconds", "time_share"} & set(made.rows)
    assert not [note for note in made.notes if "time" in note]


def test_an_agent_of_other_tasks_has_seconds_and_no_share(tmp_path, suite):
    root = write_timed_sweep(tmp_path / "tiny")
    write_clock(write_run(root, WALKER, "lone", 1, {1000: [5.0], 2000: [400.0]}), {2000: 7.0})
    made = make_table(collect([root], suite), baseline="drq_sac")
    assert row(made, "lone").seconds == row(made, "lone", WALKER).seconds == 7
    assert np.isnan(row(made, "lone").time_share)
    assert row(made, "lone", WALKER).time_share == pytest.approx(7 / 102)


# ---- results that are kept ----


def test_times_are_kept_and_made_again(tmp_path, suite):
    write_timed_sweep(tmp_path / "tiny")
    kept = tmp_path / "kept"
    results("build", (tmp_path / "tiny",), suite, "drq_sac", output=kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert before["evaluations.csv"].decode().splitlines()[0].endswith(",success_last,wall_seconds")
    assert {"efficiency-time.png", "efficiency-time.svg"} <= before.keys()
    (tmp_path / "tiny.toml").unlink()  # a suite may have other tasks by then
    shutil.rmtree(tmp_path / "tiny")
    results("rebuild", (kept,))
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    write_run(tmp_path / "more", WALKER, "drq_sac", 4, {1000: [1.0], 2000: [2.0]})
    found = collect([tmp_path / "more", kept])
    assert found.evaluations.wall_seconds.isna().sum() == 2


def test_who_trained_the_guidance_is_kept_and_a_footnote(tmp_path, suite):
    write_sweep(tmp_path / "tiny")
    kept = tmp_path / "kept"
    results("build", (tmp_path / "tiny",), suite, "drq_sac", output=kept)
    line = "- guidance of semore_sac is simulator: the simulator itself names things and knows their masks"
    assert line in (kept / "table.md").read_text().replace("\\(", "(")
    provenance = json.loads((kept / "provenance.json").read_text())
    assert list(provenance["teachers"]) == ["simulator"]
    provenance["teachers"]["simulator"] = "as it was said then"
    (kept / "provenance.json").write_text(json.dumps(provenance))
    assert collect([kept]).teachers == load(kept).teachers == {"simulator": "as it was said then"}
    del provenance["teachers"]  # as all once were: their tables stay as they are, and the page says it all the same
    (kept / "provenance.json").write_text(json.dumps(provenance))
    old = load(kept)
    assert "guidance of" not in markdown(make_table(old))
    assert "privileged" in page_content(old)["guidance"]["simulator"]


# ---- figures and page ----


def test_curves_and_efficiency_over_time(tmp_path, suite):
    found = collect([write_timed_sweep(tmp_path / "tiny")], suite)
    curves = {(c.env_id, c.agent, c.seed): c for c in results_curves(found, x="time")}
    assert curves[WALKER, "semore_sac", 1].steps.tolist() == [0, 20.5, 41]
    assert plot_curves(list(curves.values()), x="time").get_supxlabel() == "seconds of a run on one worker"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in plot_time(found).axes[0].lines}
    assert drawn["semore_sac"] == pytest.approx(np.array([[0.1, 0.011], [21, 0.185], [42, 0.37]]))
    for kind in ("curves", "efficiency"):
        plot((tmp_path / "tiny",), tmp_path / f"{kind}.svg", kind=kind, x="time")
        assert "one worker" in (tmp_path / f"{kind}.svg").read_text()
    with pytest.raises(UserError, match="--x time is for --kind curves and efficiency, not for profiles"):
        plot((tmp_path / "tiny",), tmp_path / "a.svg", kind="profiles", x="time")


@pytest.mark.parametrize("kind", ["curves", "efficiency"])
def test_there_is_nothing_to_draw_over_time_without_any(tmp_path, kind):
    write_sweep(tmp_path / "tiny")
    with pytest.raises(UserError, match="nothing to draw: .* time"):
        plot((tmp_path / "tiny",), tmp_path / "a.svg", kind=kind, x="time")


def test_the_page_has_the_times_of_points(tmp_path, suite):
    content = page_content(collect([write_timed_sweep(tmp_path / "tiny")], suite), "drq_sac")
    shown = content["settings"][0]
    curve = shown["curves"][WALKER]["semore_sac"]
    assert curve["seconds"].tolist() == [0, 21, 42]
    assert curve["seeds"][0]["seconds"].tolist() == [0, 20.5, 41]
    assert shown["curves"][ALL]["drq_sac"]["seconds"].tolist() == [0, 51, 102]
    plain = page_content(collect([write_sweep(tmp_path / "plain")]))["settings"][0]
    assert "seconds" not in plain["curves"][ALL]["drq_sac"] | plain["curves"][WALKER]["drq_sac"]
    assert "seconds" not in plain["rows"][0]
