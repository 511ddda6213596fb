"""Environments made from ids: spaces, seeds, workers, and clients that were not written for them."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig, make_env
from semore_bench.evaluation import FIRST_SEED, Episode, FrameStack, evaluate
from semore_bench.transitions import Step
from semore_bench.workers import Workers, _Maker, _worker, episode_seed
from tests import odd_envs
from wrappers import ActionRepeat, SeededMetaWorld, VectorAction
from wrappers.errors import UserError
from wrappers.flow import encode_flow

ROOT = Path(__file__).parents[1]
SMALL = EnvConfig(image_size=40, action_repeat=2, annotator="simulator", annotate_every=2, text=True)
TOY = "tests.toy_env:Toy-v0"
MUJOCO = ["dm_control/cartpole-swingup-v0", "Meta-World/reach-v3", "HalfCheetah-v5"]


def make(env_id: str, **changes) -> gym.Env:
    settings = {**vars(SMALL), **changes}
    if env_id not in MUJOCO:
        settings["annotator"] = "none"
    return make_env(env_id, EnvConfig(**settings))


def episode(env: gym.Env, seed: int, steps: int = 12) -> list:
    rng = np.random.default_rng(0)
    seen = [env.reset(seed=seed)]
    for _ in range(steps):
        seen.append(env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


@pytest.mark.filterwarnings("ignore:.*np_random:UserWarning")
@pytest.mark.parametrize("env_id", [*MUJOCO, "CarRacing-v3", TOY])
def test_check_env_passes(env_id):
    env = make(env_id)
    check_env(env, skip_render_check=True)
    assert env.action_space.low.min() == -1
    assert env.action_space.high.max() == 1
    assert {"rgb", "flow"} <= set(env.observation_space.spaces)
    env.close()


@pytest.mark.parametrize("env_id", [*MUJOCO, "CarRacing-v3", TOY])
def test_the_seed_determines_the_episode(env_id):
    """Also in an environment that has played another episode before, and with another global random state."""
    env, other = make(env_id), make(env_id)
    first = episode(env, 3)
    episode(other, 8)
    np.random.seed(99)  # noqa: NPY002
    again, different = episode(other, 3), episode(other, 4)
    for a, b in zip(first, again, strict=True):
        assert data_equivalence(a[:-1], b[:-1])
        assert a[-1].get("caption") == b[-1].get("caption")
    assert not data_equivalence(first[0][0]["rgb"], different[0][0]["rgb"])
    env.close(), other.close()


def test_meta_world_goals_come_from_the_seed():
    env = make("Meta-World/reach-v3", annotator="none", flow=None)

    def goal(seed):
        env.reset(seed=seed)
        return env.unwrapped._target_pos.copy()

    goals = {seed: goal(seed) for seed in range(4)}
    assert all(np.array_equal(goal(seed), goals[seed]) for seed in reversed(range(4)))
    assert len({tuple(g) for g in goals.values()}) == 4
    env.reset()  # without a seed the generator goes on, as Gymnasium has it
    after = env.unwrapped._target_pos.copy()
    env.reset()
    assert not np.array_equal(after, env.unwrapped._target_pos)
    env.close()


def test_meta_world_reports_success_and_stops_at_its_time_limit():
    env = make("Meta-World/reach-v3", annotator="none", flow=None, action_repeat=50)
    env.reset(seed=0)
    steps = 0
    while True:
        *_, terminated, truncated, info = env.step(np.zeros(4, np.float32))
        steps += 1
        assert "success" in info
        if terminated or truncated:
            break
    assert (steps, info["env_step"], terminated) == (10, 500, False)
    env.close()


def test_meta_world_by_hand_is_seeded_too():
    import metaworld  # noqa: F401  (registers its ids)

    env = gym.make("Meta-World/MT1", env_name="reach-v3", seed=0)
    goals = []
    for seed in (1, 2, 1):
        SeededMetaWorld(env).reset(seed=seed)
        goals.append(env.unwrapped._target_pos.copy())
    assert np.array_equal(goals[0], goals[2])
    assert not np.array_equal(goals[0], goals[1])
    env.close()


ODD = EnvConfig(image_size=40, action_repeat=2, flow=None)


@pytest.mark.parametrize("name", odd_envs.INFOS)
def test_what_an_environment_says_in_info_stays_in_its_worker(name):
    """But for success and what the harness counts: everything else is of any shape, or cannot be sent at all."""
    number = list(odd_envs.INFOS).index(name)
    makers = [_Maker(f"tests.odd_envs:OddInfo{number}-v0", ODD, index) for index in range(2)]
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    envs.reset(seed=[0, 1])
    for count in (2, 4):
        *_, infos = envs.step(np.zeros((2, 2), np.float32))
        pickle.dumps(infos)
        assert set(infos) <= {name for key in ("env_step", "success", "success_any") for name in (key, f"_{key}")}
        assert infos["env_step"].tolist() == [count, count]
    reports = name in ("bool", "float", "array", "is-success", "now-and-then")
    assert ("success_any" in infos) == reports
    if reports:
        assert infos["success_any"].tolist() == [True, True], "at the third simulator step, inside a repeat"
    envs.close()


@pytest.mark.parametrize(
    ("options", "passed"), [({}, None), (None, None), ({"actions": [[]]}, None), ({"a": 1}, {"a": 1})]
)
def test_options_are_none_where_there_are_none(options, passed):
    env = _Maker("tests.odd_envs:Odd-v0", ODD, 0)()
    env.reset(seed=0, options=options)
    assert env.unwrapped.options == passed


def test_workers_step_whatever_the_infos_are():
    config = replace(ODD, action_repeat=1)
    number = list(odd_envs.INFOS).index("everything")
    with Workers(f"tests.odd_envs:OddInfo{number}-v0", config, num_envs=2) as workers:
        workers.reset([0, 1])
        for _ in range(15):
            workers.send(np.zeros((2, 2), np.float32))
            steps = workers.receive(iter([2, 3]))
            assert all(set(step.info) <= {"env_step", "success", "success_any"} for step in steps)


@pytest.mark.parametrize(("action_repeat", "last"), [(1, 0), (2, 1), (3, 0), (6, 0)])
def test_success_is_counted_at_every_simulator_step(action_repeat, last):
    class Lucky(odd_envs.Odd):
        def step(self, action):
            *rest, _ = super().step(action)
            return *rest, {"success": self.count in (5, 12 * last)}

    env, counted = ActionRepeat(Lucky(), action_repeat), Episode(seed=0)
    env.reset(seed=0)
    while True:
        observation, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        counted.add(Step(np.zeros(2), reward, terminated, truncated, observation, info))
        if terminated or truncated:
            break
    assert (counted.success_any, counted.success_last) == (1, last)


@pytest.mark.parametrize("name", odd_envs.ACTIONS)
def test_actions_of_any_shape_and_type(name):
    number = list(odd_envs.ACTIONS).index(name)
    env = make_env(f"tests.odd_envs:OddAction{number}-v0", ODD)
    space, inner = env.action_space, odd_envs.ACTIONS[name]
    if not isinstance(inner, gym.spaces.Box):
        assert space == inner
        return
    assert space.shape == (int(np.prod(inner.shape)),)
    assert (space.low == -1).all()
    assert (space.high == 1).all()
    env.reset(seed=0)
    for value in (-1.0, 0.0, 1.0, 1.5):
        env.step(np.full(space.shape, value, np.float32))
    lowest, middle, highest, clipped = env.unwrapped.taken[::2]
    assert np.array_equal(lowest, inner.low)
    assert np.array_equal(highest, inner.high)
    assert np.array_equal(clipped, inner.high)
    expected = (inner.low.astype(float) + inner.high) / 2
    assert middle == pytest.approx(expected, abs=0.5 if inner.dtype.kind in "iu" else 1e-6)
    env.close()


def test_integers_have_equal_shares_of_the_range():
    number = list(odd_envs.ACTIONS).index("integers")
    env = make_env(f"tests.odd_envs:OddAction{number}-v0", replace(ODD, action_repeat=1))
    env.reset(seed=0)
    for value in np.linspace(-1, 1, 100):
        env.step(np.full(2, value, np.float32))
    assert np.bincount([action[0] for action in env.unwrapped.taken]).tolist() == [20] * 5


def test_unbounded_actions_are_refused():
    env = odd_envs.Odd()
    env.action_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(UserError, match="bounded"):
        VectorAction(env)


def test_seeds_of_episodes_fit_in_an_int32():
    seeds = [episode_seed(seed, episode) for seed in range(20) for episode in range(20)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == 400


@pytest.mark.parametrize("name", ["OddNoRenderMode-v0", "OddHumanAlone-v0"])
def test_a_constructor_that_knows_no_rgb_array(name):
    env = make_env(f"tests.odd_envs:{name}", ODD)
    assert env.reset(seed=0)[0]["rgb"].mean() > 30
    env.close()


def test_where_pixels_come_from_can_be_chosen():
    symbols = make_env("MiniGrid-Empty-5x5-v0", replace(ODD, pixel_key="image"))
    assert symbols.reset(seed=0)[0]["rgb"].max() < 20
    drawn = make_env("tests.odd_envs:Odd-v0", replace(ODD, pixel_source="render"))
    drawn.unwrapped.render = lambda: np.full((40, 40, 3), 7, np.uint8)
    assert (drawn.reset(seed=0)[0]["rgb"] == 7).all()


def test_an_annotator_that_looks_into_the_environment_is_waited_for():
    from wrappers.backends.simulator import SimulatorAnnotator

    env = make_env("dm_control/cartpole-swingup-v0", replace(SMALL, annotator=SimulatorAnnotator()))
    assert env.get_wrapper_attr("mode") == "sync"
    env.close()


def test_an_environment_without_a_time_limit_gets_one(monkeypatch):
    gym.register("ToyForever-v0", "tests.toy_env:Toy", kwargs={"still": True})
    monkeypatch.setattr("semore_bench.envs.DEFAULT_TIME_LIMIT", 7)
    env = make("ToyForever-v0", action_repeat=1)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[3] for _ in range(7)]
    assert ends == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("dm_control/cartpole-swngup-v0", "dm_control/cartpole-swingup-v0"),
        ("HalfCheeta-v5", "HalfCheetah-v5"),
        ("Meta-World/reach", "Meta-World/reach-v3"),
        ("no.such.module:Env-v0", "missing"),
        ("tests.toy_env:Blind-v0", "rgb_array"),
    ],
)
def test_a_wrong_id_is_answered_with_what_may_have_been_meant(env_id, words):
    with pytest.raises(UserError, match=words) as error:
        make_env(env_id)
    assert "\n" not in str(error.value)


def test_the_simulator_cannot_annotate_what_it_does_not_simulate():
    with pytest.raises(UserError, match="MuJoCo"):
        make_env("CarRacing-v3", SMALL)


def test_a_backend_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(UserError, match="egl"):
        make_env("dm_control/cartpole-balance-v0")


def test_workers_give_what_the_environment_in_this_process_gives():
    env = make("dm_control/cartpole-swingup-v0")
    rng = np.random.default_rng(1)
    with Workers("dm_control/cartpole-swingup-v0", SMALL, num_envs=2) as workers:
        seeds = [episode_seed(1, 0), episode_seed(1, 1)]
        first = workers.reset(seeds)
        observation, info = env.reset(seed=seeds[1])
        assert first[1][1]["annotations"] == info["annotations"]
        assert data_equivalence(first[1][0]["rgb"], observation["rgb"])
        for number in range(5):
            actions = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
            workers.send(actions)
            steps = workers.receive()
            observation, reward, _, _, info = env.step(actions[1])
            assert steps[1].reward == reward
            assert steps[1].info["env_step"] == info["env_step"] == 2 * (number + 1)
            assert steps[1].info.get("annotations", ()) == info["annotations"]
            assert ("annotations" in steps[1].info) == bool(info["annotations"])  # what is no news is not sent
            observation["flow"] = encode_flow(observation["flow"], env.get_wrapper_attr("bound"))
            assert steps[1].observation["flow"].dtype == np.uint8
            assert set(steps[1].observation) == {"rgb", "flow", "caption"}  # of annotations what was asked for
            for key in ("rgb", "flow"):
                assert np.array_equal(steps[1].observation[key], observation[key]), key
    env.close()


def test_workers_hand_over_the_last_frame_and_the_next_episode():
    config = EnvConfig(image_size=40, action_repeat=1, flow=None)
    env = make(TOY, action_repeat=1, flow=None)
    with Workers(TOY, config, num_envs=2) as workers:
        workers.reset([1, 2])
        env.reset(seed=1)
        seeds = iter([7, 8])
        for _ in range(25):
            action = np.array([[1.0, 0.2], [0.0, 0.0]], np.float32)
            workers.send(action)
            steps = workers.receive(seeds)
            observation, _, terminated, truncated, _ = env.step(action[0])
            assert np.array_equal(steps[0].observation["rgb"], observation["rgb"])
            assert (steps[0].terminated, steps[0].truncated) == (terminated, truncated)
            if terminated or truncated:
                observation, _ = env.reset(seed=7)
                assert np.array_equal(steps[0].next_episode[0]["rgb"], observation["rgb"])
                assert not np.array_equal(steps[0].observation["rgb"], observation["rgb"])
                break
        assert terminated, "the episode should have ended at the border"
        assert steps[1].next_episode is None


def _worker_without_a_learner(env_fn):
    """In this process: one of an AsyncVectorEnv that holds the other end of the pipe no more."""
    pipe, other_end = multiprocessing.Pipe()
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    _worker(0, env_fn, pipe, other_end, None, errors, AutoresetMode.DISABLED, None)


def test_a_worker_whose_learner_is_gone_ends_without_a_word():
    closed = []

    class Env(gym.Wrapper):
        def close(self):
            closed.append(True)

    _worker_without_a_learner(lambda: Env(gym.make(TOY)))
    assert closed


def test_a_connection_that_the_environment_itself_has_lost_is_told():
    def unreachable():
        raise ConnectionRefusedError("no simulator at port 2000")

    with pytest.raises(ConnectionRefusedError, match="no simulator"):
        _worker_without_a_learner(unreachable)


def test_an_interrupted_episode_is_run_again_up_to_where_it_was():
    config = EnvConfig(image_size=40, action_repeat=2)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.3, 0.3, (2, 6, 2)).astype(np.float32)
    with Workers(TOY, config, num_envs=2) as workers:
        workers.reset([5, 6])
        for step in range(6):
            workers.send(actions[:, step])
            steps = workers.receive()
        want = [{key: value.copy() for key, value in step.observation.items()} for step in steps]
        again = workers.reset([5, 6], [actions[0], actions[1]])
        for env in range(2):
            assert np.array_equal(again[env][0]["rgb"], want[env]["rgb"])
            assert np.array_equal(again[env][0]["flow"], want[env]["flow"])
            assert again[env][1]["env_step"] == 12


def test_evaluation_plays_its_fixed_seeds_whatever_the_number_of_workers():
    config = EnvConfig(image_size=40, action_repeat=2)

    def policy(observation):
        assert observation["rgb"].dtype == observation["flow"].dtype == np.uint8
        assert observation["rgb"].shape[1:] == (3, 40, 40, 3)
        return 0.02 * (observation["rgb"].mean((1, 2, 3))[:, :2] - 8)

    outcomes = []
    for count in (1, 3):
        with Workers(TOY, config, num_envs=count) as workers:
            outcomes.append(evaluate(policy, workers, 5, frame_stack=3))
    assert outcomes[0] == outcomes[1]
    assert [episode.seed for episode in outcomes[0]] == list(range(FIRST_SEED, FIRST_SEED + 5))
    assert len({episode.episode_return for episode in outcomes[0]}) == 5


@pytest.mark.parametrize("env_id", [*MUJOCO, "Pendulum-v1"])
def test_states_are_observed_flat_and_nothing_is_rendered(env_id):
    config = EnvConfig(action_repeat=2, state=True)
    env = make_env(env_id, config)
    assert not env.has_wrapper_attr("renderer")
    for observation, *_ in episode(env, 3):
        assert set(observation) == {"state"}
        assert env.observation_space.contains(observation)
    with Workers(env_id, config) as workers:
        ((shown, _),) = workers.reset([3])
        first = {"state": shown["state"].copy()}  # the worker writes the next one over it
        assert np.array_equal(first["state"], env.reset(seed=3)[0]["state"])
        stack = FrameStack(1, 2)
        stack.begin(0, first)
        workers.send(np.zeros((1, *workers.action_space.shape)))
        (step,) = workers.receive()
        stack.push(0, step.observation)
        assert np.array_equal(stack.stack()["features"][0], [first["state"], step.observation["state"]])
    env.close()


def test_pixels_are_no_state():
    with pytest.raises(UserError, match="observes pixels and no state"):
        make_env(TOY, EnvConfig(state=True))
    with pytest.raises(UserError, match="no true maps; leave --true-maps out"):
        make_env(TOY, EnvConfig(true_things=True))


def test_frame_stack_repeats_the_first_frame():
    stack = FrameStack(1, 3)

    def frame(value):
        return {"rgb": np.full((4, 4, 3), value, np.uint8), "flow": np.full((4, 4, 2), value, np.uint8)}

    stack.begin(0, frame(1))
    assert stack.stack()["rgb"][0, :, 0, 0, 0].tolist() == [1, 1, 1]
    stack.push(0, frame(2))
    assert stack.stack()["rgb"][0, :, 0, 0, 0].tolist() == [1, 1, 2]
    assert stack.stack()["flow"].shape == (1, 2, 4, 4, 2)
    stack.begin(0, frame(5))
    assert stack.stack()["rgb"][0, :, 0, 0, 0].tolist() == [5, 5, 5]


def test_evaluation_imports_neither_a_vlm_nor_clip(tmp_path):
    """In the process that evaluates and in its workers."""
    script = f"""
import json, sys
import numpy as np
from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.workers import Workers
from semore_bench.evaluation import evaluate
if __name__ == "__main__":
    config = EnvConfig(image_size=40, action_repeat=5)
    with Workers("{TOY}", config, num_envs=1) as workers:
        evaluate(lambda o: np.zeros((1, 2)), workers, 1, 3)
        loaded = workers._envs.call("loaded_modules")[0]
    print(json.dumps([sorted(sys.modules), loaded]))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    result = subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True
    )
    here, worker = json.loads(result.stdout.splitlines()[-1])
    for modules in (here, worker):
        packages = {name.split(".")[0] for name in modules}
        assert "semore_bench" in packages
        assert not packages & {"transformers", "open_clip", "openai", "timm"}
        assert not {"wrappers.backends.clip", "wrappers.backends.embedded"} & set(modules)
    assert "torch" not in worker, "it would cost every worker seconds and memory"


@pytest.mark.parametrize("annotator", ["transformers", "embedded"])
def test_models_are_loaded_by_the_worker_alone(tmp_path, annotator):
    """The learner needs the shapes of annotations, not the models; workers say how their annotators fare."""
    from tests.tiny_models import save_clip, save_vlm

    if annotator == "transformers":
        save_clip(tmp_path / "clip")
        annotator = f"transformers:{save_vlm(tmp_path / 'captioner')}"
        clip, caption, cache, mode, grid = tmp_path / "clip", "a cart with a pole", tmp_path / "cache", "async", 6
    else:
        clip, caption, cache, mode, grid = None, "", tmp_path / "unused", "pipelined", 16
    script = f"""
import json, sys
import numpy as np
from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.workers import Workers
if __name__ == "__main__":
    settings = dict(clip={clip and str(clip)!r}, annotation_cache={str(cache)!r}, annotation_grid={grid})
    config = EnvConfig(image_size=40, annotator={annotator!r}, **settings)
    with Workers("{TOY}", config) as workers:
        workers.reset([0])
        seeds, captions = iter(range(1, 10**6)), []
        while len(captions) < 3:
            workers.send(np.zeros((1, 2)))
            (step,) = workers.receive(seeds)
            infos = [step.info] + ([step.next_episode[1]] if step.next_episode else [])
            captions += [annotation.caption for info in infos for annotation in info.get("annotations", ())]
        shape, sent = workers.annotation_shape, sorted(workers.observation_space)
        print(json.dumps([sorted(sys.modules), workers._envs.call("loaded_modules")[0], captions, shape, sent,
                          workers._envs.get_attr("mode")[0], workers.statistics()]))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    result = subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True
    )
    here, there, captions, shape, sent, chosen, statistics = json.loads(result.stdout.splitlines()[-1])
    assert "transformers" in there
    assert not {"transformers", "open_clip"} & {name.split(".")[0] for name in here}
    assert len(captions) >= 3
    assert all(said.startswith(caption) for said in captions)
    assert (shape[0], chosen) == (grid, mode)
    assert sent == ["flow", "rgb"]  # annotations come in info alone
    assert statistics["annotations"] >= 3
    assert 0 < statistics["annotated_share"] <= 0.5
    assert ("cache_misses" in statistics) == (mode == "async") == cache.exists()


def test_the_grid_of_annotations_reaches_the_environment():
    args = CommonArgs(annotator="simulator", annotation_grid=5)
    args.resolve()
    env = make_env("dm_control/pendulum-swingup-v0", EnvConfig(image_size=40, **args.guidance))
    assert env.observation_space["relevance"].shape == (5, 5)
    assert env.reset(seed=0)[1]["annotations"][0].patch_probabilities.shape == (5, 5, 5)
    env.close()
    with pytest.raises(UserError, match="--annotation-grid must be at least 1, got 0"):
        CommonArgs(annotation_grid=0).resolve()


def test_a_model_is_not_loaded_by_several_workers():
    with pytest.raises(UserError, match="serve it .*or use one environment"):
        Workers(TOY, EnvConfig(annotator="transformers:SmolVLM"), num_envs=2)


def test_unknown_annotators_are_explained():
    with pytest.raises(UserError, match="expected none, simulator, embedded"):
        make_env(TOY, EnvConfig(annotator="oracle"))


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("env_id", ["dm_control/cartpole-balance-v0"])
def test_stable_baselines3_trains_on_the_observations_as_they_are(env_id):
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = make(env_id, text=False)
    model = stable_baselines3.PPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(256)
    after = model.policy.state_dict()
    assert model.num_timesteps == 256
    assert any(not after[name].equal(value) for name, value in before.items())
    assert all(value.isfinite().all() for value in after.values())
    env.close()
