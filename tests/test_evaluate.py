"""Trained agents are loaded from their runs and evaluated as they were in training, or elsewhere."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from agents import drq_sac
from semore_bench import cli, evaluation
from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.evaluation import Episode, Evaluator
from semore_bench.trained import find_trained, load_trained
from tests.toy_runs import ROOT, call
from wrappers.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run of the twin on the toy environment, in a folder as a sweep has it."""
    directory = tmp_path_factory.mktemp("runs") / "toy" / "drq_sac" / "seed-1"
    call(drq_sac, directory, total_env_steps=60, eval_every=1000, eval_episodes=2)
    return directory


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "evaluations" not in path.parts
    }


def test_a_loaded_agent_plays_as_it_did_in_its_last_evaluation(run, capsys):
    before = files(run)
    assert cli.run(["evaluate", str(run.parents[2]), "--episodes", "2", "--device", "cpu"]) is None
    assert files(run) == before, "a run that goes on would miss it"
    trained, now = pd.read_csv(run / "eval.csv"), pd.read_csv(run / "evaluations" / "clean.csv")
    for column in ("env_step", "eval_episode", "episode_return", "episode_length", "success_any", "success_last"):
        assert now[column].tolist() == trained[column].tolist(), column
    assert now.seed.tolist() == [10_000, 10_001]
    said = capsys.readouterr().out
    assert f"{trained.episode_return.mean():.1f}" in said or f"{trained.episode_return.mean():.3f}" in said
    assert "clean" in said


def test_it_is_evaluated_elsewhere_under_distraction_and_filmed(run):
    words = ["--env-id", "tests.toy_env:ToyShort-v0", "--distraction", "colour-hard", "--episodes", "1", "--seed", "5"]
    assert cli.run(["evaluate", str(run), *words, "--capture-video"]) is None
    (file,) = (run / "evaluations").glob("*/colour-hard.csv")
    (row,) = pd.read_csv(file).itertuples()
    assert (row.setting, row.env_id, row.seed) == ("colour-hard", "tests.toy_env:ToyShort-v0", 5)
    assert row.episode_length <= 10  # this environment's, not the run's
    assert file.with_suffix(".mp4").stat().st_size > 1000


def test_an_agent_of_ones_own_is_named_and_what_a_run_says_of_files_is_not_followed(run, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text((ROOT / "agents" / "drq_sac.py").read_text())
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"agent": "mine", "command": [str(own)]}))
    with pytest.raises(UserError, match=r"its agent mine is none of agents/; name its file with --agent"):
        find_trained(copied)
    trained = load_trained(find_trained(copied, own))
    newest = max((run / "checkpoint").glob("*.pt"))
    weights = torch.load(newest, weights_only=True)["agent"]
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in trained.agent.state_dict().items())
    assert trained.env_step == 60


def spoilt(folder: Path, run: Path, what: str) -> Path:
    """A copy of the run with something wrong."""
    copied = folder / "copied"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("evaluations"))
    config = json.loads((copied / "config.json").read_text())
    if what == "no checkpoint":
        shutil.rmtree(copied / "checkpoint")
    elif what == "damaged checkpoints":
        for file in (copied / "checkpoint").iterdir():
            file.write_bytes(b"x")
    elif what == "foreign":
        (copied / "config.json").unlink()
    elif what == "unknown flag":
        config["args"]["strength"] = 3
    elif what == "wrong kind":
        config["args"]["image_size"] = "large"
    elif what == "another size":
        config["args"]["feature_dim"] = 7
    if what != "foreign":
        (copied / "config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize(
    ("what", "words", "message"),
    [
        ("no checkpoint", [], "has no checkpoint yet"),
        ("damaged checkpoints", [], "can be read"),
        ("foreign", [], "has no run directory in it"),
        ("unknown flag", [], "a flag --strength, which"),
        ("wrong kind", [], 'image_size is "large"'),
        ("another size", [], "has its file been changed?"),
        ("", ["--env-id", "Pendulum-v1"], "does not fit Pendulum-v1, where actions (of size 1)"),
        ("", ["--env-id", "tests.toy_env:ToyDiscrete-v0"], "has Discrete actions and this agent needs continuous"),
        ("", ["--env-id", "Toi-v0"], "unknown environment id"),
        ("", ["--distraction", "backgruond-hard"], "background-hard"),
        ("", ["--episodes", "0"], "--episodes must be at least 1"),
        ("", ["--seed", "-1"], "--seed must be from 0"),
        ("", ["--agent", "nothing.py"], "there is no agent file nothing.py"),
    ],
)
def test_mistakes_are_answered_in_one_line(run, tmp_path, capsys, what, words, message):
    copied = spoilt(tmp_path, run, what)
    assert cli.run(["evaluate", str(copied), *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: checkpoint")]
    assert len(error) == 1
    assert message in error[0]
    assert not (copied / "evaluations").exists()


def test_settings_have_their_time(monkeypatch, tmp_path):
    """Those for the end are not evaluated before; the environments of the usual one alone are kept."""
    opened, filmed = [], []

    def workers(env_id, config, number):
        opened.append((config.distraction, config.visual_split, config.annotator, number))
        return contextlib.ExitStack()

    def evaluate(policy, where, episodes, frame_stack, on_step):
        return [Episode(seed) for seed in range(episodes)]

    monkeypatch.setattr(evaluation, "Workers", workers)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "film", lambda *words: filmed.append((words[2].distraction, words[3].name)))
    args = CommonArgs(eval_episodes=3, evaluations=("camera-easy", "wild=all-hard:1:always"))
    evaluator = Evaluator(args, EnvConfig(annotator="simulator"))
    for at_end in (False, True):
        found = evaluator.run(None, at_end, tmp_path / "step-7", lambda: None)
        expected = {"clean": 3, "camera-easy": 3, "wild": 1} if at_end else {"clean": 3, "wild": 1}
        assert {name: len(episodes) for name, episodes in found.items()} == expected
    assert [place[0] for place in opened] == ["none", "all-hard", "camera-easy", "all-hard"]
    assert {place[1:3] for place in opened} == {("test", "none")}
    assert sorted(name for _, name in filmed)[-1] == "step-7.mp4", "the newest video that is found is the usual one's"
    assert filmed[-3:] == [
        ("none", "step-7.mp4"),
        ("camera-easy", "step-7-camera-easy.mp4"),
        ("all-hard", "step-7-wild.mp4"),
    ]
