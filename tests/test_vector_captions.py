"""The vectorised CaptionObservation says what single ones would, with one call for all sub-environments."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space

import tests.toy_env  # noqa: F401  (registers Toy-v0)
from tests.fakes import fake_annotator
from tests.toy_vectors import N, assert_equal, make_toy
from tests.waiting import poll_until
from wrappers import CaptionObservation as SingleCaptionObservation
from wrappers import UserError
from wrappers.vector import CaptionObservation


def make_vector(mode=AutoresetMode.NEXT_STEP, **options) -> CaptionObservation:
    envs = SyncVectorEnv([make_toy] * N, autoreset_mode=mode)
    return CaptionObservation(envs, **{"annotator": fake_annotator(), "every": 4, **options})


def make_singles(**options) -> SyncVectorEnv:
    """The same, wrapped one by one."""

    def make():
        return SingleCaptionObservation(make_toy(), **{"annotator": fake_annotator(), "every": 4, **options})

    return SyncVectorEnv([make] * N)


@pytest.mark.parametrize("text", [False, True])
def test_observations_and_infos_are_those_of_single_wrappers(text):
    ours, theirs = make_vector(text=text), make_singles(text=text)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space == batch_space(ours.single_observation_space, N)
    ours.action_space.seed(0)
    assert_equal(ours.reset(seed=1), theirs.reset(seed=1))
    ends = 0
    for _ in range(80):
        actions = ours.action_space.sample()
        mine, other = ours.step(actions), theirs.step(actions)
        assert_equal(mine, other)
        assert mine[0] in ours.observation_space
        ends += (mine[2] | mine[3]).sum()
    assert ends > 2 * N


def test_frames_that_are_due_together_are_one_batch():
    envs = make_vector()
    envs.reset(seed=0)
    for _ in range(8):
        envs.step(np.zeros((N, 2), np.float32))
    assert envs.annotator.captioner.batches == [N, N, N]


def test_sub_environments_are_reset_by_mask():
    envs = make_vector(AutoresetMode.DISABLED)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.zeros((N, 2), np.float32))
    before = [track.frame_step for track in envs._tracks]
    mask = np.array([False, True, False])
    observations, infos = envs.reset(seed=[None, 7, None], options={"reset_mask": mask})
    assert before == [2, 2, 2]
    assert infos["_annotations"].tolist() == infos["_frame_step"].tolist() == mask.tolist()
    assert [len(annotations or ()) for annotations in infos["annotations"]] == [0, 1, 0]
    assert observations["caption_age"].tolist() == [[2], [0], [2]]
    *_, infos = envs.step(np.zeros((N, 2), np.float32))
    assert infos["frame_step"].tolist() == [3, 1, 3]
    assert infos["annotations"].tolist() == [(), (), ()]
    *_, infos = envs.step(np.zeros((N, 2), np.float32))
    assert infos["annotation_ages"].tolist() == [(0,), (), (0,)]


def test_late_annotations_reach_the_frames_that_they_are_about():
    annotator = fake_annotator()
    envs = CaptionObservation(
        AsyncVectorEnv([make_toy] * N, shared_memory=True, copy=False, context="spawn"),
        annotator,
        every=3,
        mode="async",
    )
    envs.action_space.seed(0)
    annotator.captioner.gate.clear()
    frames: list[list[np.ndarray]] = [[] for _ in range(N)]
    known: list[dict] = [{} for _ in range(N)]
    due: list[set[int]] = [set() for _ in range(N)]

    def take(observations, infos):
        for index in range(N):
            now = len(frames[index])
            frames[index].append(observations["rgb"][index].copy())
            if infos["frame_step"][index] % 3 == 0:
                due[index].add(now)
            for annotation, age in zip(infos["annotations"][index], infos["annotation_ages"][index], strict=True):
                known[index][now - age] = annotation

    take(*envs.reset(seed=0))
    for _ in range(40):  # would hang if a step waited for the captioner
        observations, *_, infos = envs.step(envs.action_space.sample())
        take(observations, infos)
    assert not any(known)
    annotator.captioner.gate.set()
    asked = [set(frames) for frames in due]
    while not all(now <= set(then) for now, then in zip(asked, known, strict=True)):
        observations, *_, infos = envs.step(envs.action_space.sample())
        take(observations, infos)
        poll_until(lambda: not envs.statistics()["pending"])
    for index in range(N):
        for frame, annotation in known[index].items():
            [expected] = fake_annotator().annotate([frames[index][frame]], [annotation.frame_step])
            assert annotation == expected
    assert envs.statistics()["drops"] == 0
    envs.close()


def test_wrong_arguments_are_explained():
    with pytest.raises(UserError, match="wrap them one by one"):
        make_vector(annotator="simulator")
    with pytest.raises(UserError, match="every must be"):
        make_vector(every=0)
    with pytest.raises(UserError, match="needs a Dict observation with 'rgb'"):
        CaptionObservation(SyncVectorEnv([lambda: gym.make("Toy-v0")]), fake_annotator())
