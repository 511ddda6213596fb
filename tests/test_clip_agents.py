"""Agents with a frozen CLIP: its features, its reward, and that it stays frozen and out of checkpoints."""

import numpy as np
import pytest
import torch

from agents import clip_sac, vlm_reward_sac
from semore_bench.transitions import Step
from tests.tiny_agents import ACTIONS, CPU, SIZE, make_replay, receivers
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
    assert own <= {"encoder", "project", "critic", "actor", "target", "log_temperature", "mean", "whiten"} | {
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
def test_what_is_projected_equals_a_slow_reference(folder, grid):
    agent, stacks = make_agent(clip_sac, folder, clip_grid=grid), random_frames(2, 3)
    clip, rows = agent.features.clip, []
    for stack in stacks:
        if grid == 0:
            rows.append(np.concatenate([clip.image_embeddings([frame])[0] for frame in stack]))
            continue
        patches = np.concatenate([clip.patch_features([frame])[0] for frame in stack], -1)  # the stack as channels
        side = len(patches) // grid
        cells = [
            patches[y * side : (y + 1) * side, x * side : (x + 1) * side].mean((0, 1))
            for y in range(grid)
            for x in range(grid)
        ]
        rows.append(np.concatenate(cells))
    got = agent.on_grid(agent.look(stacks))
    np.testing.assert_allclose(got.numpy(), rows, atol=5e-4)  # kept in half precision
    assert agent.mean.shape == got.shape[1:]


def test_shifts_move_patches_and_repeat_the_border(tmp_path, folder, monkeypatch):
    agent, stacks = make_agent(clip_sac, folder, clip_grid=4), random_frames(9, 3)
    offsets = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).int()
    seen, shifted = agent.look(stacks), agent.look(stacks, offsets)
    padded = torch.nn.functional.pad(seen.float(), (1, 1, 1, 1), mode="replicate")
    for i, (y, x) in enumerate(offsets.tolist()):
        assert torch.equal(shifted[i].float(), padded[i, :, 1 + y : 5 + y, 1 + x : 5 + x])

    drawn, look = [], agent.look
    monkeypatch.setattr(agent, "look", lambda rgb, offset: (drawn.append(offset), look(rgb, offset))[1])
    agent.augment(make_replay(tmp_path, flow=False, annotate=False).sample(64))
    assert len(drawn) == 2
    assert not torch.equal(*drawn)
    assert {tuple(o) for o in drawn[0].tolist()} == {tuple(o) for o in offsets.tolist()}


def test_each_distinct_frame_is_looked_at_once_and_alone(folder, monkeypatch):
    features = clip_sac.ClipFeatures(ClipGrounding(folder, device="cpu"), True, capacity=100)
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
    fresh = clip_sac.ClipFeatures(features.clip, True, capacity=100)
    assert np.array_equal(fresh(stacks[2:3])[0], first[2])


def test_memory_forgets_the_oldest_frames_and_what_it_forgot_comes_back(folder):
    features = clip_sac.ClipFeatures(ClipGrounding(folder, device="cpu"), False, capacity=4)
    stacks = random_frames(3, 3)
    first = features(stacks)  # more frames than it remembers
    assert len(features.memory) == 4
    assert np.array_equal(features(stacks), first)


def test_frames_of_an_evaluation_take_no_room(folder, monkeypatch):
    agent = make_agent(clip_sac, folder)
    looked, look = [], agent.features.look
    monkeypatch.setattr(agent.features, "look", lambda frame: (looked.append(frame), look(frame))[1])
    film = random_frames(1, 100)
    for step in range(98):
        agent.act({"rgb": film[:, step : step + 3]}, deterministic=True)
    assert not agent.features.memory
    assert len(agent.features.recent) <= 64
    assert len(looked) == 100, "each was looked at once nonetheless"
    agent.act({"rgb": film[:, :3]})
    assert len(agent.features.memory) == 3


def test_components_are_whitened_once_by_what_the_replay_holds(tmp_path, folder):
    agent = make_agent(clip_sac, folder, components=5)
    replay = make_replay(tmp_path, flow=False, annotate=False)
    agent.update(replay, 0)
    mean, whiten = agent.mean.clone(), agent.whiten.clone()
    seen = (agent.on_grid(agent.look(replay.sample(2000).rgb)) - mean) @ whiten
    assert seen.shape == (2000, 5)
    assert torch.allclose(seen.mean(0), torch.zeros(5), atol=0.2)
    assert torch.allclose(torch.cov(seen.T), torch.eye(5), atol=0.2)
    agent.update(replay, 1)
    assert torch.equal(agent.mean, mean)
    assert torch.equal(agent.whiten, whiten)
    assert {"mean", "whiten"} <= agent.state_dict().keys()


def test_fewer_frames_than_components_leave_the_others_dark(folder):
    agent = make_agent(clip_sac, folder, components=50)
    agent.find_components(torch.randn(8, len(agent.mean)))
    assert torch.isfinite(agent.whiten).all()
    assert not agent.whiten[:, 8:].any()
    agent.find_components(torch.ones(8, len(agent.mean)))  # a scene in which nothing moves
    assert torch.isfinite(agent.encode(agent.look(random_frames(2, 3)))).all()


def test_projection_and_critics_learn_from_features(tmp_path, folder):
    agent, replay = make_agent(clip_sac, folder), make_replay(tmp_path, flow=False, annotate=False)
    loss, z, _ = agent.critic_loss(*agent.augment(replay.sample(8)))
    assert receivers(agent, loss) == {"project", "critic"}
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.optimize("actor", agent.actor_loss(z.detach())[0])
    assert {n.split(".")[0] for n, v in agent.state_dict().items() if not torch.equal(v, before[n])} == {"actor"}


@pytest.mark.parametrize(("grid", "message"), [(-1, "at least 0"), (5, "at most 4")])
def test_impossible_grids_are_refused(folder, grid, message):
    with pytest.raises(UserError, match=f"--clip-grid must be {message}"):
        make_agent(clip_sac, folder, clip_grid=grid)
    with pytest.raises(UserError, match="--components must be at least 1"):
        make_agent(clip_sac, folder, components=0)


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


@pytest.mark.parametrize(
    ("env_id", "goal"),
    [
        ("dm_control/finger-spin-v0", "the spinner is turning"),
        ("dm_control/finger-turn_easy-v0", "the tip of the spinner is at the target"),
        ("dm_control/cartpole-swingup-v0", "the pole points up"),
        ("Meta-World/reach-v3", "reach, done"),
    ],
)
def test_goals_are_those_of_the_task(env_id, goal):
    args = vlm_reward_sac.Args(env_id=env_id)
    args.resolve()
    assert args.goal == goal
    assert args.guidance_source == "CLIP embedded", "what results say of it"
