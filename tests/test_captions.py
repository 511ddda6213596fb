"""CaptionObservation: which frames are annotated, what of it is observed, and which frame an annotation is about."""

import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import tests.toy_env  # noqa: F401  (registers Toy-v0)
from wrappers import ActionRepeat, CaptionObservation, PixelObservation
from wrappers.backends.annotation import Annotation, HashingTextEncoder
from wrappers.errors import UserError

CARTPOLE = "shimmy:dm_control/cartpole-swingup-v0"


class Looker:
    """An annotator that looks at the pixels alone; it has nothing to say when called as often as is in `blind`."""

    source, embedding_dim, grid = "looker", 8, 4

    def __init__(self, blind: tuple[int, ...] = ()):
        self.blind = blind
        self.calls = 0

    def annotate(self, frames, frame_steps):
        self.calls += 1
        if self.calls - 1 in self.blind:
            return [None] * len(frames)
        return [self.look(*pair) for pair in zip(frames, frame_steps, strict=True)]

    def look(self, frame: np.ndarray, frame_step: int) -> Annotation:
        y, x = np.argwhere(frame.sum(2)).mean(0)
        caption = f"the light is at {x:.2f}, {y:.2f}"
        encode = HashingTextEncoder(self.embedding_dim).encode
        return Annotation(
            caption=caption,
            objects=(),
            caption_embedding=encode([caption])[0],
            class_names=("background",),
            class_embeddings=encode(["background"]),
            patch_probabilities=np.ones((1, 4, 4), np.float32),
            relevance=np.full((4, 4), frame.mean() / 255, np.float32),
            frame_step=frame_step,
            source=self.source,
        )


def toy(**options) -> CaptionObservation:
    return CaptionObservation(PixelObservation(gym.make("Toy-v0"), size=40), **{"annotator": Looker(), **options})


def cartpole(size: int = 48, **options) -> CaptionObservation:
    return CaptionObservation(PixelObservation(ActionRepeat(gym.make(CARTPOLE), 2), size=size), **options)


def rollout(env: gym.Env, steps: int, seed: int = 0):
    """Yields observation and info, episode after episode."""
    env.action_space.seed(seed)
    yield env.reset(seed=seed)
    for _ in range(steps):
        observation, _, terminated, truncated, info = env.step(env.action_space.sample())
        yield observation, info
        if terminated or truncated:
            yield env.reset()


@pytest.mark.parametrize("every", [1, 3, 8])
def test_every_nth_frame_of_an_episode_is_annotated(every):
    env = toy(every=every)
    infos = [info for _, info in rollout(env, 60)]
    steps = [info["frame_step"] for info in infos]
    assert steps.count(0) >= 3, "several episodes"
    annotated = [annotation.frame_step for info in infos for annotation in info["annotations"]]
    assert annotated == [step for step in steps if step % every == 0]
    assert env.annotator.calls == len(annotated)


def test_observation_holds_the_newest_annotation_and_its_age():
    looker = Looker()
    frames, newest = [], None
    for observation, info in rollout(toy(every=3, text=True), 60):
        if info["frame_step"] == 0:
            frames = []
        frames.append(observation["rgb"])
        assert len(info["annotations"]) == len(info["annotation_ages"]) == (info["frame_step"] % 3 == 0)
        for annotation, age in zip(info["annotations"], info["annotation_ages"], strict=True):
            assert annotation == looker.look(frames[-1 - age], annotation.frame_step)
            newest = annotation
        assert observation["caption_age"] == info["frame_step"] % 3
        about = frames[info["frame_step"] - observation["caption_age"][0]]
        assert observation["caption"] == info["caption"] == newest.caption == looker.look(about, 0).caption
        np.testing.assert_array_equal(observation["caption_embedding"], newest.caption_embedding)
        np.testing.assert_array_equal(observation["relevance"], newest.relevance)


def test_pipelined_annotations_come_with_the_next_batch_or_episode_however_long_they_take():
    class Dawdler(Looker):
        def annotate(self, frames, frame_steps):
            time.sleep(float(random.exponential(0.002)))
            sizes.append(len(frames))
            return super().annotate(frames, frame_steps)

    random, sizes = np.random.default_rng(), []  # another course each time
    waiting, under_way, handed_over, frame = [], [], 0, -1
    at_once = rollout(toy(every=1, text=True), 80)
    for (observation, info), (_, now) in zip(
        rollout(toy(every=1, annotator=Dawdler(), mode="pipelined", text=True), 80), at_once, strict=True
    ):
        frame += 1
        if info["frame_step"] == 0:
            expected, waiting, under_way = under_way + waiting, [], []
        else:
            expected = []
        waiting += [(annotation, frame) for annotation in now["annotations"]]
        if len(waiting) == 8:
            expected, under_way, waiting = expected + under_way, waiting, []
        assert info["annotations"] == tuple(annotation for annotation, _ in expected)
        assert info["annotation_ages"] == tuple(frame - number for _, number in expected)
        handed_over += len(expected)
        if info["frame_step"] == 0:
            assert observation["caption_age"] == -1, "what comes late is about the episode before"
    assert handed_over > 30
    assert max(sizes) == 8


def test_mistakes_of_a_pipelined_annotator_come_out():
    class Broken(Looker):
        def annotate(self, frames, frame_steps):
            raise RuntimeError("a bug")

    env = toy(every=2, annotator=Broken(), mode="pipelined")
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="a bug"):
        env.reset()
    env.close()


def test_nothing_is_observed_before_the_first_annotation_nor_left_over_from_the_last_episode():
    env = toy(every=2, annotator=Looker(blind=(0, 2, 4, 6)), text=True)  # steps 0 and 4 of two episodes
    for _ in range(2):
        observation, info = env.reset()
        ages = [int(observation["caption_age"][0])]
        for _ in range(6):
            if len(ages) <= 2:
                assert observation["caption"] == info["caption"] == ""
                assert not observation["caption_embedding"].any()
                assert not observation["relevance"].any()
                assert env.observation_space.contains(observation)
            observation, _, _, _, info = env.step(np.zeros(2))
            ages.append(int(observation["caption_age"][0]))
        assert ages == [-1, -1, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("text", [False, True])
def test_spaces_are_exact(text):
    env = toy(every=2, text=text)
    assert set(env.observation_space) == {
        "rgb",
        "caption_embedding",
        "relevance",
        "caption_age",
        *(["caption"] if text else []),
    }
    assert env.observation_space["rgb"] == env.env.observation_space["rgb"]
    for observation, _ in rollout(env, 10):
        assert env.observation_space.contains(observation)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("make", [toy, cartpole])
def test_gymnasiums_checker_passes(make, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(make(every=1, text=text), skip_render_check=True)


def test_spec_rebuilds_the_environment():
    env = cartpole(every=3, text=True)
    rebuilt = env.spec.make()
    assert isinstance(rebuilt, CaptionObservation)
    assert rebuilt.observation_space == env.observation_space
    for (mine, info), (theirs, their_info) in zip(rollout(env, 7), rollout(rebuilt, 7), strict=True):
        assert info["caption"] == their_info["caption"]
        assert info["annotations"] == their_info["annotations"]
        assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


def test_environments_made_with_one_annotator_do_not_see_each_other():
    from wrappers.backends.simulator import SimulatorAnnotator

    annotator = SimulatorAnnotator()
    left, right = cartpole(annotator=annotator, every=1), cartpole(annotator=annotator, every=1)
    for env, speed in [(left, -1.0), (right, 1.0), (left, -1.0)]:
        env.reset(seed=0)
        for _ in range(8):
            _, _, _, _, info = env.step(np.array([speed]))
        assert f"the cart is moving {'left' if speed < 0 else 'right'}" in info["caption"]


def test_same_seed_same_captions():
    first, second, other = (
        [info["annotations"] for _, info in rollout(cartpole(every=2), 20, seed)] for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_observations_belong_to_the_caller():
    env = toy(every=4)
    first, _ = env.reset(seed=0)
    kept = {key: value.copy() for key, value in first.items()}
    second, *_ = env.step(env.action_space.sample())
    for value in second.values():
        value += 1
    third, *_ = env.step(env.action_space.sample())
    assert all(np.array_equal(first[key], kept[key]) for key in kept)
    np.testing.assert_array_equal(third["relevance"], kept["relevance"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 0}, "every must be"),
        ({"every": 2.5}, "every must be"),
        ({"mode": "later"}, "unknown mode 'later'"),
        ({"annotator": "oracle"}, "unknown annotator 'oracle'"),
        ({"annotator": object()}, "expected 'simulator', 'embedded'"),
        ({"annotator": "none"}, "leave the wrapper out"),
        ({"annotator": "simulator", "mode": "async"}, "use mode='sync'"),
        ({"annotator": "simulator", "mode": "pipelined"}, "use mode='sync'"),
        ({"annotator": "simulator"}, "not simulated by MuJoCo"),
    ],
)
def test_wrong_arguments_are_explained(options, complaint):
    with pytest.raises(UserError, match=complaint):
        toy(**options)


def test_an_observation_without_pixels_is_explained():
    with pytest.raises(UserError, match="wrap the env in PixelObservation"):
        CaptionObservation(gym.make("Toy-v0"), annotator=Looker())
