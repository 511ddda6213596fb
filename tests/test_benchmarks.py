"""The benchmarks run, compare what they say they compare, and explain what goes wrong. No test is about speed."""

import re

import pytest

from semore_bench.benchmarks import agents as benchmarked_agents
from semore_bench.benchmarks import guidance
from semore_bench.benchmarks.agents import Agents
from semore_bench.benchmarks.envs import Envs
from semore_bench.benchmarks.stepper import Block, Stepper
from semore_bench.cli import run
from semore_bench.listing import AGENTS
from wrappers.errors import UserError

TOY = "--env-id tests.toy_env:Toy-v0 --image-size 40 --batch-size 4 --random-steps 6 --device cpu".split()
HERE = {"PYTHONPATH": str(AGENTS.parent)}


def test_an_agent_trains_a_block_at_a_time():
    with Stepper(AGENTS / "drq_sac.py", TOY, HERE) as stepper:
        random = stepper.run(5)
        learning = stepper.run(10)
    assert random.update == random.sample == 0 < random.turn
    assert 0 < learning.sample < learning.update < learning.turn
    assert learning.act + learning.update + learning.wait + learning.add < learning.turn
    assert len(learning.busy) == 10
    assert sum(learning.busy) == pytest.approx(10 * (learning.act + learning.update))
    assert 40 * 40 * 3 < learning.replay_bytes < 1.1 * 40 * 40 * 3 + 100
    assert learning.memory >= random.memory > 50
    assert not learning.flow
    assert stepper._process.returncode is not None, "ended with its context"


def test_turns_without_an_update_are_told_apart():
    with Stepper(AGENTS / "drqv2.py", [*TOY, "--update-every", "2"], HERE) as stepper:
        stepper.run(8)
        busy = stepper.run(10).busy
    assert max(busy[0::2]) < min(busy[1::2]) or max(busy[1::2]) < min(busy[0::2])


def test_an_agent_that_ends_is_quoted():
    with (
        Stepper(AGENTS / "drq_sac.py", [*TOY, "--frame-stack", "0"], HERE) as stepper,
        pytest.raises(UserError, match="--frame-stack must be at least 1"),
    ):
        stepper.run(5)


def test_flow_and_captions_are_compared_with_rgb(capsys):
    numbers = "--image-size 36 --blocks 2 --block-steps 4 --training-blocks 0".split()
    names = "--env-ids InvertedPendulum-v5 --annotator simulator".split()
    assert not run(["benchmark", "guidance", *numbers, *names])
    row = next(line for line in capsys.readouterr().out.splitlines() if "InvertedPendulum" in line)
    assert len(re.findall(r"\d\.\d\d \(\d\.\d\d-\d\.\d\d\)", row)) == 2


def test_frames_per_second_of_environments(capsys):
    """Discrete actions too; the annotator is left out where it cannot be had."""
    short = "--image-size 36 --blocks 2 --seconds 0.05".split()
    discrete = "--env-ids tests.toy_env:ToyDiscrete-v0 --annotator none --num-envs 1 2".split()
    assert not run(["benchmark", "envs", *short, *discrete])
    rows = [line for line in capsys.readouterr().out.splitlines() if "ToyDiscrete" in line]
    assert [len(re.findall(r"\d+ \(\d+-\d+\)", row)) for row in rows] == [2, 2]
    captions = "--env-ids InvertedPendulum-v5 --annotator simulator --num-envs 1".split()
    assert not run(["benchmark", "envs", *short, *captions])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "InvertedPendulum" in line]
    assert len(re.findall(r"\d+ \(\d+-\d+\)", row)) == 3


@pytest.mark.parametrize(
    ("command", "measured"),
    [
        (Envs(env_ids=("First-v0", "Second-v0"), num_envs=(1,), annotator="none"), "_measure"),
        (guidance.Guidance(env_ids=("First-v0", "Second-v0")), "_environment"),
    ],
    ids=["envs", "guidance"],
)
def test_what_was_measured_before_an_interruption_is_shown(monkeypatch, capsys, command, measured):
    def measure(self, env_id, *_):
        if env_id == ends_at:
            raise KeyboardInterrupt
        return {name: [70.0, 80.0, 90.0] for name in ("rgb", "flow", "captions")[: 2 if measured == "_measure" else 3]}

    monkeypatch.setattr(type(command), measured, measure)
    ends_at = "Second-v0"
    with pytest.raises(KeyboardInterrupt):
        command.run()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "-v0" in line]
    assert "First-v0" in row
    assert "80" in row
    ends_at = "First-v0"  # nothing was measured: an empty table says nothing
    with pytest.raises(KeyboardInterrupt):
        command.run()
    assert not capsys.readouterr().out.strip()


class _Stepped:
    """Stands for `Stepper`: an interruption comes after so many measured blocks."""

    measured = 0
    interrupted_after = 0

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, turns):
        if turns == BLOCK_STEPS:
            if _Stepped.measured == _Stepped.interrupted_after:
                raise KeyboardInterrupt
            _Stepped.measured += 1
        return Block(*[40.0] * 9, flow=False, busy=[40.0])


BLOCK_STEPS = 7
TWO_AGENTS = Agents(names=("sac_pixel",), env_id="InvertedPendulum-v5", block_steps=BLOCK_STEPS)
TRAINING = guidance.Guidance(env_ids=("First-v0",), training_steps=BLOCK_STEPS)


@pytest.mark.parametrize("command", [TWO_AGENTS, TRAINING], ids=["agents", "training"])
@pytest.mark.parametrize(("blocks", "rows"), [(1, 0), (2, 2), (5, 2)])
def test_whole_rounds_before_an_interruption_are_shown(monkeypatch, capsys, command, blocks, rows):
    _Stepped.measured, _Stepped.interrupted_after = 0, blocks
    monkeypatch.setattr(benchmarked_agents, "Stepper", _Stepped)
    monkeypatch.setattr(guidance, "Stepper", _Stepped)
    monkeypatch.setattr(guidance.Guidance, "_environment", lambda *_: {"rgb": [9.0], "flow": [9.0], "captions": [9.0]})
    monkeypatch.setattr(Agents, "_environment_milliseconds", lambda self: {None: 5.0, "dis": 6.0})
    with pytest.raises(KeyboardInterrupt):
        command.run()
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if " 40.0 " in line]) == rows
    if rows and command is TWO_AGENTS:
        assert f"medians of {blocks // 2} blocks" in " ".join(printed.split())


@pytest.mark.parametrize(("annotated_at", "steps"), [(None, 6), (1, 6), (17, 17), (10**6, 48)])
def test_models_are_loaded_before_anything_is_timed(annotated_at, steps):
    """They are loaded for the first batch of frames, long after the first frame."""
    taken = []
    guidance.warm_up(
        lambda: taken.append(1), lambda: annotated_at and float(len(taken) >= annotated_at), annotate_every=2
    )
    assert len(taken) == steps


def test_training_goes_on_beside_a_slow_captioner(monkeypatch, trained):
    """With its real server and client; what the captions say is found in the replay of the run."""
    monkeypatch.setattr(guidance, "SLOW_SECONDS", 0.2)
    flags = [
        "--image-size",
        "32",
        "--batch-size",
        "4",
        "--annotate-every",
        "2",
        "--env-id",
        "InvertedPendulum-v5",
    ]
    with guidance._slow_server() as url:
        flags += ["--annotator", f"openai:{url}#slow", "--clip", str(trained[0] / "clip"), "--random-steps", "10"]
        flags += ["--grounder-frames", "8", "--grounder-updates", "2", "--grounder-batch", "4"]
        with Stepper(AGENTS / "semore_sac.py", flags) as stepper:
            for _ in range(60):  # however slow the machine is
                stepper.run(20)
                metrics = (next(stepper.folder.rglob("metrics.csv"))).read_text()
                annotations = re.findall(r"guidance/annotations,(\d+)", metrics)
                if annotations and int(annotations[-1]) > 20 and "grounder_loss" in metrics:
                    break
    assert int(annotations[-1]) > 20
    assert re.search(r"grounder_loss,\d", metrics)
    assert float(re.findall(r"guidance/age_frames,([\d.]+)", metrics)[-1]) > 1, "they came late, and were used"


OFFICIAL = """
import hydra, torch, utils

class DrQV2Agent:
    def __init__(self, obs_shape, action_shape, **settings):
        self.obs_shape, self.action_shape = obs_shape, action_shape

    def update(self, batches, step):
        obs, action, reward, discount, next_obs = next(batches)
        assert obs.shape == next_obs.shape == (4, *self.obs_shape) and obs.dtype == torch.uint8
        assert action.shape == (4, *self.action_shape) and reward.shape == discount.shape == (4, 1)
        utils.calls += 1
"""


def test_an_official_update_takes_turns_with_ours(tmp_path, capsys):
    (tmp_path / "drqv2.py").write_text(OFFICIAL)
    (tmp_path / "utils.py").write_text("calls = 0")
    against = ["--against", "drqv2-official", str(tmp_path)]
    assert not run(["benchmark", "agents", *against, "--batch-size", "4", "--blocks", "1"])
    assert re.search(r"84 px, batch 4, \w+,\s+\d+\s+threads", capsys.readouterr().out)
    import sys

    assert sys.modules.pop("utils").calls == 8, "warm-up and timed pair, each twice"
    del sys.modules["drqv2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("agents --names drq_sak", "there is no agent 'drq_sak'"),
        ("agents --against drqv2-official /nowhere", "no drqv2.py in /nowhere"),
        ("agents --against tdmpc2 /nowhere", "expected drqv2-official"),
        ("agents --blocks 0", "at least 1"),
        ("guidance --block-steps 0", "at least 1"),
        ("envs --num-envs 1 0", "at least 1"),
    ],
)
def test_mistakes_are_explained(words, said, capsys):
    assert run(["benchmark", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_agents_are_measured_beside_those_with_the_same_kind_of_actions():
    from semore_bench.benchmarks.agents import _actions
    from semore_bench.listing import agents

    assert {name for name in agents() if _actions(name) == "discrete"} == {"drq_dqn", "semore_dqn"}
    assert {_actions(name) for name in agents()} == {"discrete", "continuous"}
    assert _actions("nobody") == ""


@pytest.mark.parametrize(
    "words",
    [
        "envs --num-envs",
        "envs --num-envs 0",
        "envs --seconds 0",
        "guidance --env-ids",
        "guidance --block-steps 0",
        "agents --blocks 0",
        "agents --names nobody",
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(capfd, words):
    assert run(["benchmark", *words.split()])
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search("must be at least 1|is empty; name|there is no agent 'nobody'; expected", line)
