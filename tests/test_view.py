"""`semore-bench view` shows what the wrappers give, moved by smooth actions that a seed decides."""

import av
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from semore_bench.smooth_actions import smooth_action
from semore_bench.view import view
from wrappers.errors import UserError

ENV_ID = "dm_control/cartpole-swingup-v0"


def walk(space: spaces.Space, seed: int, steps: int = 300) -> list:
    random, action, actions = np.random.default_rng(seed), None, []
    space.seed(seed)
    for _ in range(steps):
        action = smooth_action(space, action, random)
        actions.append(action)
    return actions


def test_continuous_actions_are_valid_smooth_and_use_the_range():
    space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 10], np.float32))
    actions = walk(space, seed=0)
    assert all(space.contains(action) for action in actions)
    path = np.array(actions)
    independent = np.random.default_rng(0).uniform(space.low, space.high, path.shape)
    assert (np.abs(np.diff(path, axis=0)).mean(0) < 0.7 * np.abs(np.diff(independent, axis=0)).mean(0)).all()
    assert (np.ptp(path, axis=0) > 0.8 * (space.high - space.low)).all()


def test_discrete_actions_are_held_for_a_while_and_all_occur():
    actions = walk(spaces.Discrete(4), seed=0)
    assert set(actions) == {0, 1, 2, 3}
    changes = sum(action != before for before, action in zip(actions, actions[1:], strict=False))
    assert 10 < changes < 100


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (3,)), spaces.Discrete(5), spaces.MultiDiscrete([3, 4])])
def test_the_seed_decides_the_actions(space):
    first, again, other = (walk(space, seed, steps=50) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_video_has_a_picture_per_step_and_moves(tmp_path, capsys):
    output = tmp_path / "view.mp4"
    view(ENV_ID, output, steps=12, image_size=64)
    with av.open(output) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(frames) == 12
    assert np.abs(frames[0].astype(int) - frames[-1])[:, : frames.shape[2] // 3].max() > 50
    shown = capsys.readouterr().out
    assert str(output) in shown
    assert "flow" in shown
    assert "(64, 64, 3)" in shown


def test_strip_shows_six_moments_of_every_signal(tmp_path):
    output = tmp_path / "strips" / "strip.png"
    view(ENV_ID, output, steps=6, image_size=64, annotator="simulator", annotate_every=2)
    with Image.open(output) as image:
        strip = np.array(image)
    columns = np.split(strip, 6, axis=1)
    assert (columns[0] != columns[-1]).any()
    view(ENV_ID, tmp_path / "again.png", steps=6, image_size=64, annotator="simulator", annotate_every=2)
    with Image.open(tmp_path / "again.png") as image:
        np.testing.assert_array_equal(np.array(image), strip)
    view(ENV_ID, tmp_path / "plain.png", steps=2, image_size=64, flow="none")
    with Image.open(tmp_path / "plain.png") as image:
        assert image.width == strip.shape[1] / 3  # fewer steps than moments
        assert image.height < strip.shape[0] / 2  # no flow, no relevance


def test_distractions_are_shown_one_or_all_at_once(tmp_path):
    for name in ("none", "background-hard"):
        view(ENV_ID, tmp_path / f"{name}.png", steps=1, image_size=64, flow="none", distraction=name)
    clean, hard = (np.array(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("none", "background-hard"))
    assert np.abs(hard - clean).mean() > 10
    view("CartPole-v1", tmp_path / "all.png", steps=2, image_size=64, distraction="all")
    with Image.open(tmp_path / "all.png") as strip:
        assert 3 * 64 < strip.height < 4 * 64  # background, colour and both: camera and light need a simulation
        assert strip.width > 4 * 64


def test_mistakes_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.mp4 or \.png"):
        view(ENV_ID, tmp_path / "view.gif")
    with pytest.raises(UserError, match="unknown distraction 'fog-hard'"):
        view(ENV_ID, tmp_path / "view.png", distraction="fog-hard")
    with pytest.raises(UserError, match=r"makes a strip: give --output a name that ends in \.png"):
        view(ENV_ID, tmp_path / "view.mp4", distraction="all")
    with pytest.raises(UserError, match="--steps must be at least 1, got 0"):
        view(ENV_ID, tmp_path / "view.mp4", steps=0)
    with pytest.raises(UserError, match="dm_control/cartpole-swingup-v0"):
        view("dm_control/cartpole-swingupp-v0", tmp_path / "view.mp4")
    assert list(tmp_path.iterdir()) == []
