"""Suites: the shipped ones are right, and a mistake in one's own is answered with file, key and what was expected."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semore_bench import listing, suites
from semore_bench.args import CommonArgs
from semore_bench.envs import make_env
from semore_bench.eval_settings import Setting, all_settings, read_word
from semore_bench.workers import ACTION_SPACES
from wrappers.errors import UserError

CONTINUOUS = ["smoke", "dmc-lite", "dmc-100k", "dmc-100k-lite", "metaworld-lite", "metaworld", "driving-lite"]
CONTINUOUS += ["dmc-generalization-lite", "dmc-distractions-lite"]

GOOD = """
name = "mine"

[settings]
preset = "lite"
batch_size = 8

[agents.drq_sac]
n_step = 3
tau = 1

[agents.semore_no_motion]
agent = "semore_sac"
motion = false

[[evaluations]]
name = "clean"
distraction = "none"

[[evaluations]]
name = "wild"
distraction = "background-hard"
episodes = 7
when = "always"

[[evaluations]]
name = "colour-easy"
distraction = "colour-easy"

[[tasks]]
env_id = "A-v0"
total_env_steps = 100
action_repeat = 2
bounds = [0, 500.0]

[[tasks]]
env_id = "B-v0"
total_env_steps = 200
n_step = 5

[tasks.agents.drq_sac]
n_step = 7
batch_size = 9
"""

WORDS = ["clean=none", "wild=background-hard:7:always", "colour-easy=colour-easy"]

OWN_AGENT = """
from dataclasses import dataclass
from semore_bench.args import CommonArgs
import helper_of_mine

@dataclass
class Args(CommonArgs):
    strength: float | None = None
    layers: tuple[int, ...] = (1,)
    n_step: int = 1
"""


def write(folder: Path, text: str) -> str:
    file = folder / "mine.toml"
    file.write_text(text)
    return str(file)


def load(folder: Path, text: str) -> suites.Suite:
    suite = suites.load_suite(write(folder, text))
    suites.check(suite)
    return suite


def test_every_shipped_suite_is_tested():
    assert set(listing.suites()) == {*CONTINUOUS, "discrete-lite"}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_shipped_suite_fits_every_agent(name):
    suite = suites.load_suite(name)
    assert suite.name == name
    assert suites.check(suite, listing.agents())
    assert_same_terms(suite, ["drq_sac", "semore_sac"])


def test_the_discrete_suite_fits_its_agents():
    suite = suites.load_suite("discrete-lite")
    assert suites.check(suite, ["drq_dqn", "semore_dqn"])
    assert_same_terms(suite, ["drq_dqn", "semore_dqn"])


@pytest.mark.parametrize("name", [*CONTINUOUS, "discrete-lite"])
def test_every_environment_of_the_shipped_suites_can_be_made_and_described(name):
    suite = suites.load_suite(name)
    (agent,) = suites.check(suite, ["drq_dqn" if name == "discrete-lite" else "drq_sac"])
    known = {env_id for ids in listing.env_ids().values() for env_id in ids}
    for number, task in enumerate(suite.tasks):
        args = agent.args(**suite.flags(agent, task))
        args.resolve()
        assert args.task_description
        if number > 2 and task.env_id in known:  # those before are of the same family, and Meta-World's take seconds
            continue
        config = args.env_config()
        env = make_env(task.env_id, config)
        assert isinstance(env.action_space, ACTION_SPACES[config.actions])
        assert env.observation_space["rgb"].shape == (args.image_size, args.image_size, 3)
        env.close()


def test_there_are_enough_tasks_on_known_terms():
    assert len(suites.load_suite("metaworld").tasks) >= 10
    assert len(suites.load_suite("metaworld-lite").tasks) == 3
    for name in ("discrete-lite", "driving-lite"):  # nobody knows the scale of their returns otherwise
        assert all(task.scored.bounds for task in suites.load_suite(name).tasks)


def assert_same_terms(suite: suites.Suite, names: list[str]) -> None:
    for task in suite.tasks:
        args = [agent.args(**suite.flags(agent, task)) for agent in suites.check(suite, names)]
        for one in args:
            one.resolve()
        fields = "preset image_size batch_size conv_strides hidden_dim action_repeat total_env_steps eval_every"
        assert len({tuple(getattr(one, name) for name in fields.split()) for one in args}) == 1, "not the same terms"


@pytest.mark.parametrize("name", ["dmc-100k", "dmc-100k-lite"])
def test_the_planet_benchmark_is_as_published(name):
    suite = suites.load_suite(name)
    repeats = {task.env_id.split("/")[1].removesuffix("-v0"): task.flags["action_repeat"] for task in suite.tasks}
    assert repeats == {
        "cartpole-swingup": 8,
        "reacher-easy": 4,
        "cheetah-run": 4,
        "walker-walk": 2,
        "finger-spin": 2,
        "ball_in_cup-catch": 4,
    }
    assert {task.flags["total_env_steps"] for task in suite.tasks} == {100_000}
    (agent,) = suites.check(suite, ["drq_sac"])
    for task in suite.tasks:
        args = agent.args(**suite.flags(agent, task))
        assert (args.random_steps, args.eval_every, args.eval_episodes) == (1000, 10_000, 10)


def test_what_helps_every_agent_at_100k_steps_is_alike_for_all():
    suite = suites.load_suite("dmc-100k-lite")
    names = "drq_sac semore_sac semore_true_maps drqv2 curl_sac state_sac keypoint_sac flow_sac".split()
    for task in suite.tasks:
        args = [agent.args(**suite.flags(agent, task)) for agent in suites.check(suite, names)]
        shared = {(a.updates_per_step, a.critic_layer_norm, a.discount, a.n_step, a.tau) for a in args}
        assert shared == {(2, True, 0.99, 3, 0.05)}
        noisy = args[names.index("drqv2")]
        assert noisy.std_steps == task.scored.total_env_steps // noisy.action_repeat // 2
        assert noisy.update_every == 1


def test_the_more_special_setting_wins(tmp_path):
    suite = load(tmp_path, GOOD)
    drq, ablation = suites.check(suite, ["drq_sac", "semore_no_motion"])
    a, b = suite.tasks
    assert suite.flags(drq, a) == {
        "env_id": "A-v0",
        "evaluations": WORDS,
        "preset": "lite",
        "batch_size": 8,
        "n_step": 3,
        "tau": 1,
        "total_env_steps": 100,
        "action_repeat": 2,
    }
    assert (suite.flags(drq, b)["n_step"], suite.flags(drq, b)["batch_size"]) == (7, 9)
    assert (ablation.name, ablation.file.stem) == ("semore_no_motion", "semore_sac")
    assert suite.flags(ablation, b) == {
        "env_id": "B-v0",
        "evaluations": WORDS,
        "preset": "lite",
        "batch_size": 8,
        "motion": False,
        "total_env_steps": 200,
        "n_step": 5,
    }


def test_flags_as_they_are_typed_are_understood_by_the_agents_own_parser(tmp_path):
    import tyro

    (tmp_path / "helper_of_mine.py").write_text("")
    (tmp_path / "own.py").write_text(OWN_AGENT)
    flags = {"strength": 0.5, "layers": [4, 5], "compile": True, "cuda": False, "env_id": "A-v0", "seed": 3}
    agent = suites.load_suite("smoke").agent(str(tmp_path / "own.py"))
    args = tyro.cli(agent.args, args=suites.command_line(flags))
    assert args == agent.args(**flags | {"layers": (4, 5)})


def test_listed_evaluations_become_the_settings_of_every_run(tmp_path):
    suite = load(tmp_path, GOOD)
    (drq,) = suites.check(suite, ["drq_sac"])
    args = drq.args(**suite.flags(drq, suite.tasks[0]))
    assert args.eval_settings == (
        Setting("clean", "none", None, "always"),
        Setting("wild", "background-hard", 7, "always"),
        Setting("colour-easy", "colour-easy"),
    )
    alone = load(
        tmp_path,
        GOOD.replace("[[tasks]]", "[agents.drq_sac]\nevaluations = []\n\n[[tasks]]", 1).replace(
            "[agents.drq_sac]\nn_step = 3\ntau = 1\n", ""
        ),
    )
    assert [setting.name for setting in drq.args(**alone.flags(drq, alone.tasks[0])).eval_settings] == ["clean"]


def test_the_usual_setting_is_that_of_the_training():
    assert [s.name for s in all_settings("none", ["wild=all-hard:3"])] == ["clean", "wild"]
    assert all_settings("colour-easy", ["none"]) == (
        Setting("colour-easy", "colour-easy", when="always"),
        Setting("clean", "none"),
    )
    (suite,) = (suites.load_suite("dmc-distractions-lite"),)
    (agent,) = suites.check(suite, ["drq_sac"])
    assert [s.name for s in agent.args(**suite.flags(agent, suite.tasks[0])).eval_settings] == [
        "background-medium",
        "clean",
    ]


@given(
    st.from_regex(r"\w[\w.-]{0,59}", fullmatch=True).filter(str.isascii),
    st.sampled_from(["none", "background-hard", "camera-0.5-static"]),
    st.none() | st.integers(1, 999_999),
    st.sampled_from(["end", "always"]),
)
def test_a_setting_is_read_as_it_is_typed(name, distraction, episodes, when):
    setting = Setting(name, distraction, episodes, when)
    assert read_word(setting.word) == setting


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backgruond-hard"], "background-hard"),
        (["a=background-hard:0"], "background-hard:0"),
        (["a=background-hard:always:3"], "background-hard:always"),
        (["=background-hard"], "up to 60 letters"),
        (["a/b=background-hard"], "up to 60 letters"),
        (["background-hard", "background-hard"], "names background-hard twice"),
        (["clean=background-hard"], "clean is what every run is evaluated in"),
        (["none:3"], "clean is what every run is evaluated in"),
        (["a\nb"], "unknown distraction"),
    ],
)
def test_misspelt_settings_are_answered_in_one_line(words, message):
    with pytest.raises(UserError) as caught:
        CommonArgs(evaluations=tuple(words)).resolve()
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_agents_of_ones_own(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("")
    (tmp_path / "own.py").write_text(OWN_AGENT)
    suite = load(tmp_path, GOOD + '[agents.strong]\nagent = "own.py"\nstrength = 2\nlayers = [2, 3]\n')
    assert suite.agent("strong").file == tmp_path / "own.py", "found beside the suite"
    assert suite.agent(str(tmp_path / "own.py")).name == "own"
    with pytest.raises(UserError, match=r"\[agents.strong\]: layers must be a list, each a whole number, got \['x'\]"):
        load(tmp_path, GOOD + '[agents.strong]\nagent = "own.py"\nlayers = ["x"]\n')


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', "", "name is missing; expected a text in quotes"),
        ('name = "mine"', 'name = "../mine"', "names a folder"),
        ('name = "mine"', 'name = "mine', "is not TOML"),
        ('name = "mine"', 'name = "mine"\nsettigns = {}', "'settigns'; did you mean 'settings'?"),
        (
            "batch_size = 8",
            "batch_sise = 8",
            "[settings]: drq_sac has no flag 'batch_sise'; did you mean 'batch_size'?",
        ),
        ("batch_size = 8", 'batch_size = "8"', '[settings]: batch_size must be a whole number, got "8"'),
        ("batch_size = 8", "batch_size = 8.5", "batch_size must be a whole number, got 8.5"),
        ("batch_size = 8", "batch_size = true", "batch_size must be a whole number, got true"),
        ("batch_size = 8", "batch_size = 1", "[[tasks]] A-v0: --batch-size must be at least 2"),
        ("batch_size = 8", "seed = 8", "seed is the sweep's to say; use --seeds"),
        ("batch_size = 8", 'run_dir = "x"', "run_dir is the sweep's to say; use --runs-dir"),
        ("batch_size = 8", 'env_id = "x"', "[settings]: drq_sac has no flag 'env_id'"),
        ('"lite"', '"light"', 'preset must be one of "auto", "reference", "lite", got "light"'),
        ("tau = 1", 'tau = "1"', '[agents.drq_sac]: tau must be a number, got "1"'),
        ("tau = 1", "motion = true", "[agents.drq_sac]: drq_sac has no flag 'motion'"),
        ("motion = false", "motion = 0", "motion must be true or false, got 0"),
        ("[agents.drq_sac]", "[agents.drq_sak]", "there is no agent 'drq_sak'; did you mean 'drq_sac'?"),
        ('agent = "semore_sac"', 'agent = "semore"', "there is no agent 'semore'; did you mean 'semore_sac'?"),
        ('agent = "semore_sac"', 'agent = "own.py"', "there is no agent file"),
        ('name = "wild"', "", "[[evaluations]] number 2: name is missing"),
        ('name = "wild"', 'name = "a/b"', "[[evaluations]] number 2: name must be up to 60 letters"),
        ('name = "wild"', 'name = "clean"', "[[tasks]] A-v0: --evaluations clean=background-hard"),
        ('name = "wild"', 'name = "colour-easy"', "--evaluations names colour-easy twice"),
        ('"background-hard"', '"backgruond-hard"', "[[evaluations]] number 2: unknown distraction 'backgruond-hard'"),
        ("episodes = 7", "episodes = 0", "[[evaluations]] number 2: episodes must be a whole number of at least 1"),
        ("episodes = 7", "episode = 7", "[[evaluations]] number 2: unknown key 'episode'"),
        ('"always"', '"often"', '[[evaluations]] number 2: when must be one of "end", "always", got "often"'),
        ('env_id = "A-v0"', "", "[[tasks]] number 1: env_id is missing"),
        (
            "total_env_steps = 100",
            "",
            "A-v0: total_env_steps is missing; expected a whole number of at least 1",
        ),
        ("total_env_steps = 100", 'total_env_steps = "all"', 'must be a whole number of at least 1, got "all"'),
        ("action_repeat = 2", "action_repeat = 0", "--action-repeat must be at least 1"),
        (
            "bounds = [0, 500.0]",
            "bounds = [0]",
            "must be a list of a finite number and a finite number, got [0]",
        ),
        ("bounds = [0, 500.0]", "bounds = [0, 0]", "bounds must be two numbers, the lower one first, got [0, 0]"),
        ("bounds = [0, 500.0]", "bounds = [9, 1]", "bounds must be two numbers, the lower one first, got [9, 1]"),
        ("bounds = [0, 500.0]", "bounds = [0, inf]", "bounds must be a list of a finite number"),
        ("bounds = [0, 500.0]", "bounds = [nan, 1]", "bounds must be a list of a finite number"),
        ("total_env_steps = 100", "total_env_steps = 0", "must be a whole number of at least 1, got 0"),
        ('"B-v0"', '"A-v0"', "A-v0 is there more than once"),
        ("n_step = 7", "n_stop = 7", "[tasks.agents.drq_sac]: drq_sac has no flag 'n_stop'; did you mean 'n_step'?"),
    ],
)
def test_mistakes_are_answered_with_file_key_and_what_was_expected(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    if "no agent" not in message:
        assert str(tmp_path / "mine.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "no dataclass Args"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("from dataclasses import dataclass\n@dataclass\nclass Args:\n    seed: int = 1", "no dataclass Args"),
    ],
)
def test_files_that_are_no_agents(tmp_path, content, message):
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(UserError, match=message):
        suites.check(suites.load_suite("smoke"), [str(tmp_path / "own.py")])


def test_names_that_do_not_exist():
    with pytest.raises(UserError, match="did you mean 'dmc-lite'"):
        suites.load_suite("dmc-light")
    with pytest.raises(UserError, match="no file"):
        suites.load_suite("nowhere/mine.toml")
    with pytest.raises(UserError, match="did you mean 'drq_sac'"):
        suites.check(suites.load_suite("smoke"), ["drqsac"])
    with pytest.raises(UserError, match="twice"):
        suites.check(suites.load_suite("smoke"), ["drq_sac", "drq_sac"])
