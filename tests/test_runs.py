"""Runs that are killed, stopped, damaged, repeated or misused."""

import json
import shutil
import signal
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from agents import drq_sac, semore_sac
from semore_bench.checkpoint import Checkpoints
from semore_bench.records import read_clock
from tests.toy_runs import TOY, agent_step, assert_same, call, equal, finish, outcome, start, wait_for

# Two environments with looks of their own in each episode, and an evaluation in another setting at the end.
TWO = {"num_envs": 2, "distraction": "background-medium", "evaluations": ("colour-hard:1",)}
CARTPOLE = {"env_id": "dm_control/cartpole-balance-v0", "action_repeat": 8, "total_env_steps": 1300}
CARTPOLE |= {"eval_every": 1000, "eval_episodes": 1}
# Named things early and often: annotated frames come in batches, and the grounder learns before and after each kill.
SEMORE = CARTPOLE | {
    "annotate_every": 2,
    "grounder_frames": 8,
    "grounder_updates": 6,
    "grounder_batch": 4,
    "ground_every": 40,
}


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    """An uninterrupted run of the twin on two toy environments."""
    directory = tmp_path_factory.mktemp("toy") / "run"
    call(drq_sac, directory, **TWO)
    return directory


def test_semore_killed_gives_what_an_uninterrupted_run_gives(tmp_path, request):
    reference = start(semore_sac, tmp_path / "whole", **SEMORE)
    killed = tmp_path / "killed"
    # Agent steps: while learning, in the second episode.
    for moment in (70, 130) if request.config.getoption("--long") else (45,):
        process = start(semore_sac, killed, **SEMORE)
        wait_for(process, killed, lambda moment=moment: _agent_step_now(killed) >= moment)
        process.kill()
        process.wait()
    call(semore_sac, killed, **SEMORE)
    wait_for(reference, tmp_path / "whole", lambda: reference.poll() is not None)
    assert reference.returncode == 0
    assert "named things: pole, cart" in (tmp_path / "whole.log").read_text()
    assert_same(killed, tmp_path / "whole")


def _agent_step_now(run_dir: Path) -> int:
    try:
        rows = (run_dir / "metrics.csv").read_text().splitlines()[1:]
    except FileNotFoundError:
        return 0
    logged = int(rows[-1].split(",")[1]) if rows else 0
    return max(logged, agent_step(run_dir))


def test_two_environments_killed_in_the_middle_of_their_episodes(tmp_path, toy_run):
    killed = tmp_path / "killed"
    process = start(drq_sac, killed, **TWO)
    wait_for(process, killed, lambda: agent_step(killed) >= 150)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=300)[1], "workers outlived the learner"
    call(drq_sac, killed, **TWO)
    assert_same(killed, toy_run)


def test_interrupt_saves_at_once_and_the_run_goes_on(tmp_path, toy_run):
    stopped = tmp_path / "stopped"
    process = start(drq_sac, stopped, **TWO)
    wait_for(process, stopped, lambda: agent_step(stopped) >= 60)
    process.send_signal(signal.SIGINT)
    wait_for(process, stopped, lambda: process.poll() is not None)
    assert process.returncode == 130
    assert json.loads((stopped / "status.json").read_text())["state"] == "stopped"
    call(drq_sac, stopped, **TWO)
    assert_same(stopped, toy_run)
    assert json.loads((stopped / "status.json").read_text())["state"] == "finished"


def test_logs_have_the_promised_columns_and_count_simulator_steps(toy_run):
    train, evaluation = pd.read_csv(toy_run / "train.csv"), pd.read_csv(toy_run / "eval.csv")
    columns = "env_step agent_step episode episode_return episode_length success_any success_last".split()
    assert list(train) == columns
    assert list(evaluation) == [*columns[:3], "eval_episode", *columns[3:], "setting"]
    assert train.env_step.is_monotonic_increasing
    assert (train.episode_length <= 25).all(), "the time limit is in simulator steps"
    assert train.episode_length.sum() <= train.env_step.iloc[-1]
    found = {place: rows.eval_episode.tolist() for place, rows in evaluation.groupby(["env_step", "setting"])}
    steps = evaluation.env_step.unique().tolist()
    assert found == {(step, "background-medium"): [0, 1, 2] for step in steps} | {(steps[-1], "colour-hard"): [0]}
    assert len(steps) == 3
    assert evaluation.env_step.max() >= 500, "the last evaluation is at the end of the budget"
    assert (train.success_any >= train.success_last).all()
    steps, seconds = read_clock(toy_run)
    assert set(evaluation.env_step) <= set(steps), "times are those of evaluations"
    assert seconds[-1] <= json.loads((toy_run / "status.json").read_text())["wall_seconds"] + 0.1
    config = json.loads((toy_run / "config.json").read_text())
    assert {"agent", "env_id", "seed", "args", "commit", "versions", "hardware", "guidance"} <= config.keys()
    for settings, source in (({}, "embedded"), ({"semantic": False, "motion": False}, "none")):
        assert semore_sac.Args(**settings).guidance_source == source


def test_a_finished_run_is_left_alone(toy_run, capsys):
    before = (toy_run / "eval.csv").read_bytes()
    call(drq_sac, toy_run, **TWO)
    assert "is finished" in capsys.readouterr().out
    assert (toy_run / "eval.csv").read_bytes() == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, toy_run, capsys, monkeypatch):
    run_dir, update = tmp_path / "run", drq_sac.Agent.update

    def crash(agent, replay, number):
        if number == 80:
            raise ZeroDivisionError("a bug of the user's")
        return update(agent, replay, number)

    with monkeypatch.context() as patch:
        patch.setattr(drq_sac.Agent, "update", crash)
        with pytest.raises(ZeroDivisionError):
            call(drq_sac, run_dir, **TWO)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", "ZeroDivisionError: a bug of the user's")
    newest = max((run_dir / "checkpoint").glob("*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    unfinished = newest.with_name(f".{newest.name}.4711")  # as a kill leaves it
    unfinished.write_bytes(content[:100])
    call(drq_sac, run_dir, **TWO)
    assert not unfinished.exists()
    assert "cannot be read" in capsys.readouterr().err
    assert_same(run_dir, toy_run)


def test_killed_in_the_last_evaluation_all_settings_are_evaluated_again(tmp_path, toy_run):
    """Some rows of it are written then, and the checkpoint before it is the newest."""
    run_dir = tmp_path / "run"
    shutil.copytree(toy_run, run_dir)
    max((run_dir / "checkpoint").glob("*.pt")).unlink()
    rows = (run_dir / "eval.csv").read_text().splitlines(keepends=True)
    assert rows[-1].endswith(",colour-hard\n")
    (run_dir / "eval.csv").write_text("".join(rows[:-2]))
    call(drq_sac, run_dir, **TWO)
    assert_same(run_dir, toy_run)


def test_a_checkpoint_is_read_to_the_cpu_from_where_modules_and_generators_take_it(toy_run):
    state = next(Checkpoints(toy_run / "checkpoint").states())
    assert {tensor.device.type for tensor in (state["torch_random"], *state["agent"].values())} == {"cpu"}


def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away(tmp_path, capsys):
    run_dir = tmp_path / "run"
    call(drq_sac, run_dir, total_env_steps=120, eval_every=1000)
    for path in (run_dir / "checkpoint").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    train = (run_dir / "train.csv").read_bytes()
    with pytest.raises(SystemExit) as stop:
        call(drq_sac, run_dir, total_env_steps=120, eval_every=1000)
    assert stop.value.code == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert (run_dir / "train.csv").read_bytes() == train


def refused(capsys, module, run_dir, **settings) -> str:
    with pytest.raises(SystemExit) as stop:
        call(module, run_dir, **settings)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_changed_setting_is_refused_and_named(toy_run, capsys):
    message = refused(capsys, drq_sac, toy_run, **TWO, batch_size=5, seed=4)
    assert "--batch-size was 4 and now is 5" in message
    assert "--seed was 1 and now is 4" in message
    assert "--fresh" in message
    assert "--agent was drq_sac and now is semore_sac" in refused(capsys, semore_sac, toy_run, **TWO)


def test_fresh_starts_over(tmp_path):
    run_dir = tmp_path / "run"
    settings = {"total_env_steps": 60, "eval_every": 1000, "eval_episodes": 1}
    call(drq_sac, run_dir, **settings)
    first = outcome(run_dir)
    call(drq_sac, run_dir, **settings, seed=2, fresh=True)
    assert not equal(outcome(run_dir)["state"]["agent"], first["state"]["agent"])
    call(drq_sac, run_dir, **settings, fresh=True)
    assert equal(outcome(run_dir), first)


@pytest.mark.parametrize("mistake", [{"env_id": "tests.toy_env:Tyo-v0"}, {"replay_capacity": 10**13}])
def test_fresh_loses_nothing_where_the_new_run_does_not_start(tmp_path, toy_run, capsys, mistake):
    run_dir = tmp_path / "run"
    shutil.copytree(toy_run, run_dir)
    mistake |= {"total_env_steps": 10**13} if "replay_capacity" in mistake else {}
    refused(capsys, drq_sac, run_dir, fresh=True, **mistake)
    assert_same(run_dir, toy_run)
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(path.name for path in toy_run.iterdir())


def test_an_agent_that_was_changed_is_said_to_be(tmp_path, toy_run, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(toy_run, run_dir)
    monkeypatch.setattr("semore_bench.runs.refuse_changes", lambda *_: None)
    assert "has its file been changed" in refused(capsys, drq_sac, run_dir, **TWO, feature_dim=7)


def test_a_folder_that_is_no_run_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "no config.json" in refused(capsys, drq_sac, tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_two_processes_in_one_directory(tmp_path, capsys):
    process = start(drq_sac, tmp_path / "run")
    try:
        wait_for(process, tmp_path / "run", lambda: (tmp_path / "run" / "config.json").exists())
        assert "another process is training" in refused(capsys, drq_sac, tmp_path / "run")
    finally:
        process.kill()
        process.wait()


def test_nan_from_the_environment_stops_the_run_and_keeps_its_checkpoint(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert "reward" in refused(capsys, drq_sac, run_dir, env_id="tests.toy_env:ToyNaN-v0")
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "failed"
    assert "finite" in status["error"]
    assert agent_step(run_dir) > 0


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    run_dir = tmp_path / "run"
    message = refused(capsys, drq_sac, run_dir, learning_rate=1e30, checkpoint_every=10, total_env_steps=2000)
    assert "nan" in message.lower() or "inf" in message.lower()
    assert "checkpoint is kept" in message
    state = torch.load(max((run_dir / "checkpoint").glob("*.pt")), weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["agent"].values())


def test_a_worker_that_dies_is_reported_in_a_line(tmp_path, capsys):
    message = refused(capsys, drq_sac, tmp_path / "run", env_id="tests.toy_env:ToyCrash-v0")
    assert "worker process" in message
    assert "continues the run" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"env_id": "dm_control/cartpole-swngup-v0"}, ["cartpole-swingup-v0", "semore-bench list"]),
        ({"env_id": "Meta-World/reech-v3"}, ["Meta-World/reach-v3"]),
        ({"env_id": "tests.toy_env:ToyDiscrete-v0"}, ["Discrete", "continuous", "agents/drq_dqn.py"]),
        ({"env_id": "tests.toy_env:Blind-v0"}, ["human", "rgb_array"]),
        ({"device": "cuda:7"}, ["--device cpu", "doctor"]),
        ({"device": "gpu"}, ["unknown --device"]),
        ({"total_env_steps": 0}, ["--total-env-steps must be at least 1"]),
        ({"image_size": 8}, ["--image-size", "64"]),
        ({"replay_capacity": 10**13, "total_env_steps": 10**13}, ["bytes on disk", "--replay-capacity"]),
    ],
)
def test_mistakes_are_answered_with_one_helpful_line(tmp_path, capsys, settings, words):
    message = refused(capsys, drq_sac, tmp_path / "run", **settings)
    for word in words:
        assert word in message


def test_the_command_line_answers_a_misspelt_id_without_a_traceback(tmp_path):
    result = finish("semore_sac", tmp_path / "run", TOY | {"env_id": "dm_control/cartpole-swngup-v0"})
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "dm_control/cartpole-swingup-v0" in result.stderr


def test_a_mistake_that_a_worker_finds_is_answered_in_one_line_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # needs a display
    monkeypatch.delenv("DISPLAY", raising=False)
    result = finish("drq_sac", tmp_path / "run", TOY | CARTPOLE)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "Traceback" in line] == []
    assert "libegl1" in result.stderr.splitlines()[-1]


def test_cleanrl_spellings_are_understood():
    import tyro

    args = tyro.cli(drq_sac.Args, args=["--total-timesteps", "123", "--no-cuda"])
    args.resolve()
    assert (args.total_env_steps, args.device) == (123, "cpu")


def test_even_the_shortest_run_learns():
    for settings, expected in (
        ({"total_env_steps": 2000}, 125),
        ({"total_env_steps": 100_000}, 500),
        ({"total_env_steps": 2000, "random_steps": 300}, 300),
    ):
        args = drq_sac.Args(action_repeat=4, **settings)
        args.resolve()
        assert args.random_steps == expected
