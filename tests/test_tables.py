"""Tables account for every seed, equal rliable's numbers, and are the same bytes every time."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from rliable import library, metrics
from scipy.stats import trim_mean

from semore_bench import estimates
from semore_bench.collect import collect, open_results
from semore_bench.estimates import aggregate, bootstrap, iqm, probability_of_improvement
from semore_bench.generalisation import generalisation
from semore_bench.names import PUBLISHED
from semore_bench.results import results
from semore_bench.scores import ALL, load, save
from semore_bench.table_text import as_markdown
from semore_bench.tables import latex, make_table, markdown, seed_census, table, write_table
from tests.synthetic_runs import REACH, REACHER, WALKER, write_distracted_sweep, write_run, write_suite, write_sweep
from wrappers.errors import UserError


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Fewer bootstrap samples wherever the digits of an interval are not the point."""
    if "intervals" not in request.node.name:
        monkeypatch.setattr(estimates, "REPETITIONS", 100)


@pytest.fixture
def suite(tmp_path):
    return write_suite(tmp_path / "tiny.toml", WALKER, REACHER)


def row(made, agent, task=ALL) -> pd.Series:
    (found,) = [r for _, r in made.rows.iterrows() if (r.agent, r.task) == (agent, task)]
    return found


# ---- the numbers ----


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 10])
def test_aggregates_are_rliables(seeds):
    rng = np.random.default_rng(seeds)
    x, y = rng.random((seeds, 4)) * 1.2, rng.integers(0, 3, (seeds + 1, 4)) / 2  # with ties, and above the bound
    tasks = [x[:, [k]] for k in range(4)]
    theirs = [
        metrics.aggregate_mean(x),
        metrics.aggregate_median(x),
        metrics.aggregate_iqm(x),
        metrics.aggregate_optimality_gap(x),
    ]
    np.testing.assert_allclose(aggregate(*tasks), theirs)
    np.testing.assert_allclose(iqm(x), trim_mean(x, 0.25, axis=0))
    x[0] = y[0]
    tasks = [x[:, [k]] for k in range(4)] + [y[:, [k]] for k in range(4)]
    assert probability_of_improvement(*tasks).item() == pytest.approx(metrics.probability_of_improvement(x, y))


def test_intervals_are_rliables_and_leave_the_global_generator_alone():
    scores = np.random.default_rng(0).random((4, 3))
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    point, interval = bootstrap([scores[:, [k]] for k in range(3)], aggregate)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    again = bootstrap([scores[:, [k]] for k in range(3)], aggregate)[1]
    assert interval.tolist() == again.tolist()
    _, theirs = library.get_interval_estimates({"a": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=4000)
    np.testing.assert_allclose(interval[:, 2], theirs["a"][:, 0], atol=0.03)  # other draws
    assert interval[0, 2] < point[2] < interval[1, 2]


def test_a_single_seed_has_no_interval():
    point, interval = bootstrap([np.array([[0.3]]), np.array([[0.5]])], aggregate)
    assert point[0] == pytest.approx(0.4)
    assert np.isnan(interval).all()


def published_extract(path):
    """Three tasks in the shape of published curves; steps of the second agent end an evaluation before 100,000."""
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        write = csv.writer(file).writerow
        write("source agent task seed env_step episode_return".split())
        for task in ("walker_walk", "reacher_easy", "humanoid_run"):
            for agent, spacing in (("curl", 20_000), ("dreamer", 9_000)):
                for seed in range(10 if (agent, task) != ("dreamer", "reacher_easy") else 8):
                    for step in range(0, 100_001, spacing):
                        write(["x", agent, task, seed, step, round(rng.random() * step / 100, 1)])
    return path


@pytest.mark.parametrize("at", [40_000, 100_000])
def test_published_rows_have_rliables_iqm_and_are_marked(tmp_path, at):
    file = published_extract(tmp_path / "published.csv")
    suite = write_suite(tmp_path / "tiny.toml", WALKER, REACHER, total_env_steps=100_000)
    write_run(tmp_path / "runs" / "tiny", WALKER, "drq_sac", 1, {at: [500.0]})
    made = make_table(collect([tmp_path / "runs"], suite, file), at)
    text = pd.read_csv(file)
    text = text[text.task.isin(["walker_walk", "reacher_easy"]) & (text.env_step <= at)]
    last = text.groupby(["agent", "task", "seed"]).episode_return.last() / 1000
    curl = last["curl"].unstack("task").to_numpy()
    assert curl.shape == (10, 2)
    assert row(made, "curl" + PUBLISHED).iqm == pytest.approx(metrics.aggregate_iqm(curl))
    assert row(made, "dreamer" + PUBLISHED).iqm == pytest.approx(trim_mean(last["dreamer"], 0.25))  # 18 runs
    assert row(made, "dreamer" + PUBLISHED).source == "published"
    assert (row(made, "dreamer" + PUBLISHED).missing, row(made, "curl" + PUBLISHED).missing) == (2, 0)
    notes = "\n".join(made.notes)
    assert "humanoid_run" in notes
    assert "were not measured here" in notes


def test_scores_are_those_of_the_last_evaluation_until_the_step(tmp_path, suite):
    # An evaluation takes place at the first decision that reaches its step: 1003 is the one of 1000.
    write_run(tmp_path / "runs", WALKER, "drq_sac", 1, {1003: [100.0, 200.0], 2001: [300.0]})
    write_run(tmp_path / "runs", WALKER, "drq_sac", 2, {1003: [50.0]}, state="running")
    found = collect([tmp_path / "runs"], suite)
    assert found.evaluations.env_step.tolist() == [1000, 2000, 1000]
    assert found.scores(1000).score.tolist() == [150, 50]
    assert found.scores(1999).score.tolist() == [150]  # seed 2 has not got there
    assert found.scores().score.tolist() == [300]
    assert found.scores(fraction=0.5).normalised.tolist() == [0.15, 0.05]


def test_success_rates_and_returns_of_other_environments(tmp_path):
    suite = write_suite(tmp_path / "a.toml", REACH, "CarRacing-v3")
    for seed, done in ((1, [1, 0]), (2, [1, 1])):
        write_run(tmp_path / "runs", REACH, "drq_sac", seed, {2000: [900.0, 10.0]}, success={2000: done})
        write_run(tmp_path / "runs", "CarRacing-v3", "drq_sac", seed, {2000: [-50.0]})
    made = make_table(collect([tmp_path / "runs"], suite))
    reach, race, whole = (row(made, "drq_sac", task) for task in (REACH, "CarRacing-v3", ALL))
    assert (reach["mean"], reach.success_rate) == (0.75, 0.75)
    assert whole["mean"] == 0.75
    assert (race["mean"], race.tasks) == (-50, 1)
    assert np.isnan(race.optimality_gap)
    assert np.isnan(race.success_rate)
    assert any("CarRacing-v3 is not in `all tasks`" in note for note in made.notes)
    suite = write_suite(tmp_path / "b.toml", "CarRacing-v3", bounds=[-100, 900])
    assert row(make_table(collect([tmp_path / "runs"], suite)), "drq_sac")["mean"] == 0.05


def test_probability_of_improvement_against_the_baseline(tmp_path, suite):
    made = make_table(collect([write_sweep(tmp_path / "tiny")], suite), baseline="drq_sac")
    assert row(made, "semore_sac").p_improvement == 1
    assert np.isnan(row(made, "drq_sac").p_improvement)
    assert made.rows[made.rows.task == ALL].agent.tolist() == ["semore_sac", "drq_sac"]
    with pytest.raises(UserError, match="--baseline curl is not among the agents: drq_sac, semore_sac"):
        make_table(collect([tmp_path], suite), baseline="curl")


# ---- every seed ----


def census(found, agent, task):
    rows = seed_census(found, found.scores())
    return rows[(rows.agent == agent) & (rows.task == task)].iloc[0]


def test_failed_missing_unfinished_and_extra_seeds_are_told_apart_and_shown(tmp_path, suite):
    root = write_sweep(tmp_path / "runs" / "tiny")
    write_run(root, WALKER, "semore_sac", 4, {0: [1.0]}, state="failed", error="Traceback ...\nValueError: a | bug")
    shutil.rmtree(root / REACHER.replace("/", "_") / "drq_sac" / "seed-2")
    shutil.rmtree(root / WALKER.replace("/", "_") / "drq_sac" / "seed-1")
    write_run(root, WALKER, "drq_sac", 1, {1000: [7.0]}, state="running")
    never = root / REACHER.replace("/", "_") / "semore_sac" / "seed-5"  # crashed before there was a config.json
    never.mkdir()
    (never / "status.json").write_text(json.dumps({"state": "failed", "error": "ended with exit status 1"}))

    found = collect([tmp_path / "runs"], suite)
    semore = census(found, "semore_sac", WALKER)
    assert (semore.scored, semore.failed, semore.extra) == ([1, 2, 3], [4], [4])
    assert census(found, "drq_sac", REACHER).missing == [2]
    assert census(found, "drq_sac", WALKER).unfinished == [1]
    assert census(found, "semore_sac", REACHER).failed == [5]
    made = make_table(found)
    text = markdown(made)
    assert f"drq_sac on {REACHER}: seed 2 missing" in text
    assert f"drq_sac on {WALKER}: seed 1 not there yet" in text
    assert f"semore_sac on {WALKER}: seed 4 failed (ValueError: a \\| bug)" in text
    assert "ended with exit status 1" in text
    assert "numbers of seeds are unequal" in text
    for shown in (text, latex(made)):
        for word in ("failed", "missing", "unfinished", "extra"):
            assert word in shown
    assert row(made, "drq_sac")[["scored", "failed", "unfinished", "missing"]].tolist() == [4, 0, 1, 1]


def test_an_extra_seed_changes_the_table(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    before = markdown(make_table(collect([root], suite)))
    write_run(root, WALKER, "drq_sac", 9, {2000: [120.0]})
    after = markdown(make_table(collect([root], suite)))
    assert before != after
    assert f"drq_sac on {WALKER}: seed 9 extra" in after
    write_run(root, REACHER, "drq_sac", 9, {2000: [120.0]})  # now half of all have it, and the others should
    assert f"semore_sac on {WALKER}, {REACHER}: seed 9 missing" in markdown(make_table(collect([root], suite)))


def test_an_agent_that_misses_a_task_is_ranked_last_and_said_to(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    write_run(root, WALKER, "lucky", 1, {2000: [1000.0]})
    write_run(root, WALKER, "lame", 1, {2000: [10.0]})
    made = make_table(collect([root], suite))
    assert made.rows[made.rows.task == ALL].agent.tolist() == ["semore_sac", "drq_sac", "lucky", "lame"]
    text = markdown(made)
    assert text.count("1 of 2 | 1 | 0 |") == 2  # one seed on the one task that it ran
    assert f"lame, lucky: no score on {REACHER}; over all tasks they are compared on the others only" in text
    reacher = text.split(f"## {REACHER}")[1].split("##")[0]
    assert "drq_sac" in reacher
    assert "lucky" not in reacher  # a row of dashes would say no more than the note
    assert "nothing was run on" not in text


def test_agents_of_more_tasks_come_first_whatever_they_score(tmp_path):
    cheetah = "dm_control/cheetah-run-v0"
    root = write_sweep(tmp_path / "tiny", tasks=(WALKER, REACHER, cheetah))
    for task in (WALKER, REACHER):
        write_run(root, task, "two", 1, {2000: [500.0]})
    write_run(root, WALKER, "one", 1, {2000: [1000.0]})
    made = make_table(collect([root], write_suite(tmp_path / "three.toml", WALKER, REACHER, cheetah)))
    ranked = made.rows[made.rows.task == ALL]
    assert ranked.agent.tolist() == ["semore_sac", "drq_sac", "two", "one"]
    assert ranked.tasks.tolist() == [3, 3, 2, 1]
    assert made.rows[made.rows.task == WALKER].agent.tolist() == ["one", "two", "semore_sac", "drq_sac"]


def test_what_nobody_ran_is_one_note_and_no_table(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    shutil.rmtree(root / REACHER.replace("/", "_"))
    text = markdown(make_table(collect([root], suite)))
    assert f"nothing was run on {REACHER}" in text
    assert f"## {REACHER}" not in text
    assert "no score" not in text


def test_damaged_runs_and_half_written_rows(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    walker = root / WALKER.replace("/", "_") / "drq_sac"
    with open(walker / "seed-1" / "eval.csv", "a") as file:
        file.write("2000,500,7,9,99")
    (walker / "seed-2" / "config.json").write_text("{")
    found = collect([root], suite)
    assert census(found, "drq_sac", WALKER).missing == [2]
    assert found.scores().query("agent == 'drq_sac' and seed == 1").score.tolist() == [110, 210]
    assert "config.json is damaged" in markdown(make_table(found))


# ---- evaluation settings ----


def test_the_setting_of_the_training_is_compared_and_others_on_request(tmp_path, suite):
    root = write_distracted_sweep(tmp_path / "tiny")
    (tmp_path / "old").mkdir()
    found = collect([root], suite)
    assert found.eval_settings == ["clean", "hard", "mild"]
    old = collect([write_sweep(tmp_path / "old")], suite)  # files without the column
    assert old.eval_settings == ["clean"]
    assert row(make_table(found), "semore_sac", WALKER)["mean"] == row(make_table(old), "semore_sac", WALKER)["mean"]
    hard = make_table(found.choose("hard"))
    assert row(hard, "drq_sac", REACHER)["mean"] == pytest.approx(22)
    assert "evaluated in hard" in hard.caption
    with pytest.raises(UserError, match="--setting head: nothing was evaluated there; expected clean or hard or mild"):
        found.choose("head")


def test_generalisation_is_a_share_of_ones_own_return_with_its_interval(tmp_path, suite):
    root = write_distracted_sweep(tmp_path / "tiny")
    write_run(root, WALKER, "drq_sac", 4, {2000: [500.0]})  # was not evaluated in the others
    summary = generalisation(collect([root], suite))
    rows = {(r.task, r.agent): r for r in summary.rows.itertuples()}
    assert [r.agent for r in summary.rows.itertuples() if r.task == ALL] == ["semore_sac", "drq_sac"]
    for task, clean in ((WALKER, 320), (REACHER, 420), (ALL, 0.37)):
        semore = rows[task, "semore_sac"]
        assert (semore.usual, semore.others, semore.share) == pytest.approx((clean, 0.625 * clean, 0.625))
        # The same seeds are drawn in all settings: what is the same share of every seed has no spread.
        assert (semore.share_low, semore.share_high) == pytest.approx((0.625, 0.625))
        assert semore.others_low < semore.others < semore.others_high
    assert rows[WALKER, "drq_sac"].seeds_high == 3
    text = as_markdown(summary.document)
    assert f"drq_sac on {WALKER}: left out seeds 4, which were not evaluated in all settings" in text
    line = "| drq_sac | 120.0 [110.0, 130.0] | 36.0 [33.0, 39.0] | 0.300 [0.300, 0.300] | 12.0 | 60.0 | 3 |"
    assert line in text.split(f"## {WALKER}")[1].splitlines()
    assert generalisation(collect([write_sweep(tmp_path / "plain")], suite)) is None


def test_results_keep_every_setting(tmp_path, suite):
    write_distracted_sweep(tmp_path / "tiny")
    results("build", (tmp_path / "tiny",), suite, "drq_sac", tmp_path / "kept")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    stems = "table-hard", "table-mild", "generalisation"
    texts = {f"{stem}.{kind}" for stem in stems for kind in ("md", "csv", "tex")}
    assert {*texts, "settings.png", "settings.svg"} <= kept.keys()
    assert b"evaluated in hard" in kept["table-hard.md"]
    for name in kept.keys() - {"evaluations.csv", "provenance.json"}:
        (tmp_path / "kept" / name).unlink()
    results("rebuild", (tmp_path / "kept",))
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == kept
    again = collect([tmp_path / "kept"], suite)
    pd.testing.assert_frame_equal(again.evaluations, collect([tmp_path / "tiny"], suite).evaluations)
    duplicate = kept["evaluations.csv"].decode().splitlines()
    (tmp_path / "kept" / "evaluations.csv").write_text("\n".join([*duplicate, duplicate[1]]) + "\n")
    with pytest.raises(UserError, match="are of the same evaluation"):
        load(tmp_path / "kept")


def test_clean_results_are_kept_as_they_always_were(tmp_path, suite):
    """Whatever was kept before there were settings is regenerated byte for byte."""
    results("build", (write_sweep(tmp_path / "tiny"),), suite, output=tmp_path / "kept")
    header = (tmp_path / "kept" / "evaluations.csv").read_text().splitlines()[0]
    assert header == "agent,task,seed,env_step,episodes,episode_return,success_any,success_last"
    assert "usual" not in json.loads((tmp_path / "kept" / "provenance.json").read_text())
    assert not [path for path in (tmp_path / "kept").iterdir() if "-" in path.name or "settings" in path.name]


def test_training_under_distraction_makes_that_the_usual_setting(tmp_path, suite):
    others = {"clean": {2000: [900.0]}}
    for seed in (1, 2):
        write_run(tmp_path / "tiny", WALKER, "drq_sac", seed, {2000: [100.0]}, None, others, "background-medium")
    found = collect([tmp_path / "tiny"], suite, None)
    assert found.eval_settings == ["background-medium", "clean"]
    assert row(make_table(found), "drq_sac", WALKER)["mean"] == 100
    save(found, tmp_path / "kept")
    assert load(tmp_path / "kept").usual == "background-medium"
    (tmp_path / "p.csv").write_text(
        "agent,task,seed,env_step,episode_return,setting\na,walker_walk,1,2000,400,\na,walker_walk,1,2000,300,clean\n"
    )
    both = open_results([tmp_path / "kept"], None, tmp_path / "p.csv")
    theirs = [row(make_table(both.choose(name)), "a" + PUBLISHED, WALKER)["mean"] for name in both.eval_settings]
    assert theirs == [400, 300]


# ---- files ----


def test_the_same_runs_give_the_same_bytes(tmp_path, suite):
    write_sweep(tmp_path / "runs" / "tiny")
    for name in ("first", "second"):
        np.random.seed(None)  # noqa: NPY002
        table((tmp_path / "runs",), suite, "drq_sac", output=tmp_path / name)
    for kind in ("md", "csv", "tex"):
        assert (tmp_path / "first" / f"table.{kind}").read_bytes() == (
            tmp_path / "second" / f"table.{kind}"
        ).read_bytes()


def test_texts_hold_the_numbers_and_hostile_names_do_no_harm(tmp_path, suite):
    name = "a|<b>[x](y)%_&"
    root = write_sweep(tmp_path / "tiny", agents=(name, "drq_sac"))
    made = make_table(collect([root], suite), baseline="drq_sac")
    text, tex = markdown(made), latex(made)
    assert r"| drq_sac | 0.370 [0.3" in text  # returns 310 to 330 and 410 to 430
    assert "a\\|\\<b\\>[x]\\(y)%_&" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert len({line.replace("\\|", "").count("|") for line in rows if "1 of" in line or "2 of" in line}) == 1
    assert r"a|<b>[x](y)\%\_\&" in tex
    write_table(made, tmp_path / "out")
    saved = pd.read_csv(tmp_path / "out" / "table.csv")
    assert saved.iqm.tolist() == pytest.approx(made.rows.iqm.tolist(), abs=1e-6)


def test_a_row_of_latex_does_not_begin_with_what_the_row_before_would_take(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny", agents=("[ours]", "*theirs"))
    text = latex(make_table(collect([root], suite)))
    assert "\n{}[ours] & " in text
    assert "\n{}*theirs & " in text


def test_results_can_be_built_and_made_again_from_their_csv(tmp_path, suite):
    write_sweep(tmp_path / "runs" / "tiny")
    write_run(tmp_path / "runs" / "tiny", WALKER, "drq_sac", 4, {1000: [1.0]}, state="failed", error="Boom: x")
    results("build", (tmp_path / "runs",), suite, "drq_sac", tmp_path / "kept")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    names = {f"{stem}.{kind}" for stem in ("curves", "profiles", "efficiency") for kind in ("png", "svg")}
    names |= {"table.md", "table.csv", "table.tex", "report.html", "evaluations.csv", "provenance.json"}
    assert set(kept) == names
    provenance = json.loads(kept["provenance.json"])
    assert provenance["seeds"] == [1, 2, 3, 4]
    assert provenance["guidance"] == {"drq_sac": ["none"], "semore_sac": ["simulator"]}
    assert provenance["wall_seconds"] == pytest.approx(4 * (101 + 102 + 103) + 104)
    assert provenance["environments"][0]["commit"] == "0123456789abcdef"
    assert str(tmp_path) not in kept["provenance.json"].decode()
    for name in names - {"evaluations.csv", "provenance.json"}:
        (tmp_path / "kept" / name).unlink()
    shutil.rmtree(tmp_path / "runs")
    results("rebuild", (tmp_path / "kept",))
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == kept


def test_saved_results_are_what_was_collected(tmp_path, suite):
    found = collect([write_sweep(tmp_path / "tiny")], suite)
    save(found, tmp_path / "kept")
    again = load(tmp_path / "kept")
    pd.testing.assert_frame_equal(found.evaluations, again.evaluations)
    assert (found.runs, found.tasks, found.environments) == (again.runs, again.tasks, again.environments)
    assert found.settings == again.settings


def test_results_of_another_machine_are_added_to_runs(tmp_path, suite):
    """A sweep in pieces: the first one's runs are gone, their results are left; together they are one sweep."""
    whole = write_sweep(tmp_path / "whole")
    first = write_sweep(tmp_path / "first", seeds=(1,))
    results("build", (first,), suite, output=tmp_path / "kept")
    shutil.rmtree(first)
    rest = write_sweep(tmp_path / "rest", seeds=(2, 3))
    results("build", (rest, tmp_path / "kept"), suite, output=tmp_path / "kept")
    together, want = load(tmp_path / "kept"), collect([whole], suite)
    pd.testing.assert_frame_equal(together.evaluations, want.evaluations)
    assert [run | {"video": None} for run in want.runs] == list(together.runs)
    assert (together.settings, together.environments) == (want.settings, want.environments)
    alone = collect([tmp_path / "kept"], suite)
    assert alone.runs == together.runs
    with pytest.raises(UserError, match="kept and .*seed-2 both have drq_sac"):
        collect([rest, tmp_path / "kept"], suite)


def test_a_finished_run_replaces_what_was_kept_of_it(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    run = root / WALKER.replace("/", "_") / "drq_sac" / "seed-1"
    shutil.rmtree(run)
    write_run(root, WALKER, "drq_sac", 1, {1000: [7.0]}, state="running")
    results("build", (root,), suite, output=tmp_path / "kept")
    shutil.rmtree(run)
    write_run(tmp_path / "later", WALKER, "drq_sac", 1, {2000: [110.0]})
    for folders in ((tmp_path / "later", tmp_path / "kept"), (tmp_path / "kept", tmp_path / "later")):
        found = collect(folders, suite)
        assert len(found.runs) == 12
        assert census(found, "drq_sac", WALKER).scored == [1, 2, 3]


def test_kept_runs_are_not_lost_to_a_new_build(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    results("build", (root,), suite, output=tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    write_run(tmp_path / "new", WALKER, "drq_sac", 9, {2000: [1.0]})
    with pytest.raises(UserError, match="keeps 12 runs that would be lost, such as drq_sac on .* with seed 1"):
        results("build", (tmp_path / "new",), suite, output=tmp_path / "kept")
    one_task = write_suite(tmp_path / "one.toml", WALKER)
    with pytest.raises(UserError, match="keeps 6 runs that would be lost"):
        results("build", (tmp_path / "kept",), one_task, output=tmp_path / "kept")
    with pytest.raises(UserError, match="--baseline typo"):
        results("build", (tmp_path / "kept",), suite, "typo", tmp_path / "kept")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_seeds_with_other_settings_or_of_another_file_are_named(tmp_path, suite):
    root = write_sweep(tmp_path / "tiny")
    assert not any("differ" in note for note in make_table(collect([root], suite)).notes)
    for seed, change in ((2, {"args": {"batch_size": 999}}), (3, {"agent": "other"})):
        file = root / WALKER.replace("/", "_") / "drq_sac" / f"seed-{seed}" / "config.json"
        config = json.loads(file.read_text())
        args = config["args"] | change.get("args", {})
        file.write_text(json.dumps(config | change | {"args": args}))
    notes = make_table(collect([root], suite)).notes
    assert f"drq_sac on {WALKER}: seeds differ in batch_size: 64 for seed 1, 999 for seed 2, 64 for seed 3" in notes
    assert any('differ in agent: "drq_sac" for seed 1' in note and '"other" for seed 3' in note for note in notes)


def test_a_folder_of_results_is_compared_with_published_numbers_and_by_suite(tmp_path):
    env_id = "Toy/track-v0"
    suite = write_suite(tmp_path / "track.toml", env_id, WALKER, name="track", bounds=[-100, 900])
    write_sweep(tmp_path / "track", tasks=(env_id, WALKER))
    kept = tmp_path / "kept"
    results("build", (tmp_path / "track",), suite, output=kept)
    published = tmp_path / "p.csv"
    published.write_text("agent,task,seed,env_step,episode_return\ntheirs,walker_walk,1,2000,400\n")
    found = open_results([kept], None, published)
    assert found.agents[-1] == "theirs" + PUBLISHED
    assert found.title == "track"
    assert [task.bounds for task in found.tasks if task.env_id == env_id] == [(-100, 900)], "lost the bounds"
    one_task = write_suite(tmp_path / "one.toml", WALKER, name="one")
    assert [task.env_id for task in open_results([kept], one_task).tasks] == [WALKER]


def test_tasks_without_a_known_best_return_have_tables_curves_and_a_page(tmp_path):
    suite = write_suite(tmp_path / "track.toml", "Toy/track-v0", name="track")
    results("build", (write_sweep(tmp_path / "track", tasks=("Toy/track-v0",)),), suite, output=tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"table.md", "curves.png", "report.html"} <= names
    assert not {"profiles.png", "efficiency.png"} & names


def test_a_success_rate_of_one_seed_keeps_its_digits(tmp_path):
    suite = write_suite(tmp_path / "tiny.toml", REACH)
    write_run(tmp_path / "tiny", REACH, "drq_sac", 1, {2000: [5.0] * 20}, {2000: [1] * 7 + [0] * 13})
    assert "| drq_sac | 0.350 |" in markdown(make_table(collect([tmp_path / "tiny"], suite))).split("## Meta-World")[1]


def test_every_evaluation_of_a_long_budget_counts(tmp_path):
    """A thirtieth of the budget has no end in decimals."""
    suite = write_suite(tmp_path / "long.toml", WALKER, total_env_steps=3_000_000)
    evaluations = {step: [float(step)] for step in range(100_000, 3_000_001, 100_000)}
    file = write_run(tmp_path / "tiny", WALKER, "drq_sac", 1, evaluations) / "config.json"
    config = json.loads(file.read_text())
    config["args"] |= {"total_env_steps": 3_000_000, "eval_every": 100_000}
    file.write_text(json.dumps(config))
    found = collect([tmp_path / "tiny"], suite)
    assert [found.scores(fraction=f).score.tolist() for f in found.fractions] == [[float(s)] for s in evaluations]


@pytest.mark.parametrize(
    ("published", "words"),
    [
        ("agent,task\na,walker_walk\n", "no column seed, env_step"),
        ("agent,task,seed,env_step,episode_return\n" + "a,walker_walk,1,0,5\n" * 2, "more than once"),
        (None, "there is no such file"),
    ],
)
def test_mistakes_in_published_files_are_named(tmp_path, suite, published, words):
    file = tmp_path / "published.csv"
    if published:
        file.write_text(published)
    with pytest.raises(UserError, match=words):
        collect([write_sweep(tmp_path / "tiny")], suite, file)


def test_mistakes_are_answered_with_what_to_do(tmp_path, suite):
    with pytest.raises(UserError, match="no run directory"):
        collect([tmp_path], suite)
    root = write_sweep(tmp_path / "one")
    write_sweep(tmp_path / "two", agents=("drq_sac",))
    with pytest.raises(UserError, match="both have drq_sac on .* with seed 1; name the folder"):
        collect([tmp_path], suite)
    with pytest.raises(UserError, match="--at"):
        make_table(collect([root], suite), at=5000)
    with pytest.raises(UserError, match="no complete results"):
        load(root)
