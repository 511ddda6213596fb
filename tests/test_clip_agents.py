"""Agents with a frozen CLIP: its features, its reward, and that it stays frozen and out of checkpoints."""

import numpy as np
import pytest
import torch

from agents import clip_sac, vlm_reward_sac
from semore_bench.envs import Step
from tests.test_agents import ACTIONS, CPU, SIZE, make_replay, receivers
from tests.tiny_models import save_clip
from wrappers.backends.clip import ClipGrounding
from wrappers.errors import UserError

MODULES = [clip_sac, vlm_reward_sac]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("models") / "clip"))


def make_agent(module, folder, **kwargs):
    args = module.Args(image_size=SIZE, batch_size=8, clip=folder, **kwargs)
    args.resolve()
    torch.manual_seed(0)
    return module.Agent(ACTIONS, args, CPU)


def random_frames(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("module", MODULES)
def test_clip_is_neither_trained_nor_saved(tmp_path, folder, module):
    agent, replay = make_agent(module, folder), make_replay(tmp_path, flow=False, annotate=False)
    clip = agent.features.clip if module is clip_sac else agent.clip
    before = {name: value.clone() for name, value in clip._model.state_dict().items()}
    for number in range(3):
        agent.update(replay, number)
    assert all(torch.equal(value, before[name]) for name, value in clip._model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in clip._model.parameters())

    own = {name.split(".")[0] for name in agent.state_dict()}
    assert own <= {"encoder", "project", "critic", "actor", "target", "log_temperature", "mean", "deviation"} | {
        "newest_reward"
    }
    ids = {id(parameter) for parameter in clip._model.parameters()}
    assert not ids & {id(parameter) for parameter in agent.parameters()}
    assert not ids & {
        id(parameter)
        for optimizer in agent.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# ---- CLIP-SAC ----


@pytest.mark.parametrize("grid", [0, 1, 2, 4])
def test_features_equal_a_slow_reference(folder, grid):
    clip, stacks = ClipGrounding(folder, device="cpu"), random_frames(2, 3)
    features = clip_sac.ClipFeatures(clip, grid, capacity=100)
    rows = []
    for stack in stacks:
        row = []
        for frame in stack:
            if grid == 0:
                row.append(clip.image_embeddings([frame])[0])
                continue
            patches = clip.patch_features([frame])[0]
            side = len(patches) // grid
            cells = [
                [patches[y * side : (y + 1) * side, x * side : (x + 1) * side].mean((0, 1)) for x in range(grid)]
                for y in range(grid)
            ]
            row.append(np.array(cells).transpose(2, 0, 1).ravel())
        rows.append(np.concatenate(row))
    got = features(stacks)
    assert got.shape == (2, 3 * features.size)
    np.testing.assert_allclose(got, rows, atol=5e-4)  # kept in half precision


def test_each_distinct_frame_is_looked_at_once_and_alone(folder, monkeypatch):
    features = clip_sac.ClipFeatures(ClipGrounding(folder, device="cpu"), 2, capacity=100)
    looked, look = [], features.look
    monkeypatch.setattr(features, "look", lambda frame: (looked.append(frame), look(frame))[1])
    stacks = random_frames(4, 3)
    stacks[1] = stacks[0]
    first = features(stacks)
    assert len(looked) == 9
    assert all(frame.shape == (SIZE, SIZE, 3) for frame in looked)
    assert np.array_equal(features(stacks[::-1]), first[::-1])
    assert len(looked) == 9
    # an empty memory, and other frames around it, as after a crash
    fresh = clip_sac.ClipFeatures(features.clip, 2, capacity=100)
    assert np.array_equal(fresh(stacks[2:3])[0], first[2])


def test_memory_forgets_the_oldest_frames_and_what_it_forgot_comes_back(folder):
    features = clip_sac.ClipFeatures(ClipGrounding(folder, device="cpu"), 1, capacity=4)
    stacks = random_frames(3, 3)
    first = features(stacks)  # more frames than it remembers
    assert len(features.memory) == 4
    assert np.array_equal(features(stacks), first)


def test_features_are_standardised_once_by_what_the_replay_holds(tmp_path, folder):
    agent, replay = make_agent(clip_sac, folder), make_replay(tmp_path, flow=False, annotate=False)
    agent.update(replay, 0)
    mean, deviation = agent.mean.clone(), agent.deviation.clone()
    seen = (torch.from_numpy(agent.features(replay.sample(256).rgb)) - mean) / deviation
    assert seen.mean().abs() < 0.1
    assert seen.std() == pytest.approx(1, abs=0.1)
    agent.update(replay, 1)
    assert torch.equal(agent.mean, mean)
    assert torch.equal(agent.deviation, deviation)
    assert {"mean", "deviation"} <= agent.state_dict().keys()


def test_projection_and_critics_learn_from_features(tmp_path, folder):
    agent, replay = make_agent(clip_sac, folder), make_replay(tmp_path, flow=False, annotate=False)
    loss, z, _ = agent.critic_loss(*agent.tensors(replay.sample(8)))
    assert receivers(agent, loss) == {"project", "critic"}
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.step("actor", agent.actor_loss(z.detach())[0])
    assert {n.split(".")[0] for n, v in agent.state_dict().items() if not torch.equal(v, before[n])} == {"actor"}


@pytest.mark.parametrize(("grid", "message"), [(-1, "at least 0"), (5, "at most 4")])
def test_impossible_grids_are_refused(folder, grid, message):
    with pytest.raises(UserError, match=f"--clip-grid must be {message}"):
        make_agent(clip_sac, folder, clip_grid=grid)


# ---- VLM-reward SAC ----


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_reward_equals_a_slow_reference(alpha):
    random = np.random.default_rng(4)
    unit = [x / np.linalg.norm(x) for x in random.normal(size=(7, 8))]
    *seen, goal, baseline = unit
    rewards = vlm_reward_sac.vlm_reward(*(torch.from_numpy(np.array(x)) for x in (seen, goal, baseline)), alpha)
    for x, got in zip(seen, rewards.tolist(), strict=True):
        direction = goal - baseline
        along = sum((x - baseline) * direction) / sum(direction**2)
        projected = baseline + along * direction
        mixed = alpha * projected + (1 - alpha) * x
        assert got == pytest.approx(1 - 0.5 * sum((mixed - goal) ** 2), abs=1e-5)
        if alpha == 0:
            assert got == pytest.approx(sum(x * goal), abs=1e-5)  # the cosine similarity
    best = vlm_reward_sac.vlm_reward(*(torch.from_numpy(np.array(x)) for x in ([goal], goal, baseline)), alpha)
    assert best.item() == pytest.approx(1, abs=1e-5)


def test_stored_reward_is_the_environments_and_the_weighted_bonus(folder):
    agent = make_agent(vlm_reward_sac, folder, vlm_reward_coef=0.25, goal="a ball in a cup", baseline="a ball")
    frames = random_frames(2)
    steps = [Step(np.zeros(ACTIONS), float(i), False, i == 1, {"rgb": frames[i]}, {"env_step": 8}) for i in range(2)]
    clip = ClipGrounding(folder, device="cpu")
    goal, baseline = torch.from_numpy(clip.encode(["a ball in a cup", "a ball"]))
    want = vlm_reward_sac.vlm_reward(torch.from_numpy(clip.image_embeddings(frames)), goal, baseline, 0.5)
    for step, given, bonus in zip(agent.add_reward(steps), steps, want.tolist(), strict=True):
        assert step.reward == pytest.approx(given.reward + 0.25 * bonus, abs=1e-5)
        assert (step.observation, step.info, step.truncated) == (given.observation, given.info, given.truncated)
    assert agent.newest_reward.item() == pytest.approx(want.mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("env_id", "goal", "baseline"),
    [
        ("dm_control/cartpole-swingup-v0", "the pole points up", "a pole on a cart"),
        ("dm_control/ball_in_cup-catch-v0", "the ball is at the cup", "a ball and a cup"),
        ("Meta-World/drawer-open-v3", "drawer open, done", "drawer open"),
        ("tests.toy_env:Toy-v0", "Toy, done", "Toy"),
    ],
)
def test_sentences_follow_from_the_environment_unless_given(env_id, goal, baseline):
    args = vlm_reward_sac.Args(env_id=env_id)
    args.resolve()
    assert (args.goal, args.baseline) == (goal, baseline)
    args = vlm_reward_sac.Args(env_id=env_id, goal="it is done")
    args.resolve()
    assert (args.goal, args.baseline) == ("it is done", baseline)


def test_reward_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="--vlm-reward-alpha must be between 0 and 1"):
        vlm_reward_sac.Args(vlm_reward_alpha=1.5).resolve()
    with pytest.raises(UserError, match="must differ"):
        vlm_reward_sac.Args(goal="a pole", baseline="a pole").resolve()
