"""Semore-DQN and its twin: targets, exploration, rewards, and what the extras change."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from agents import drq_dqn, drq_sac, semore_dqn, semore_sac
from semore_bench.transitions import Step
from tests.tiny_agents import CPU, SIZE, agent_features, make_replay
from tests.toy_runs import assert_same, call
from wrappers.errors import UserError

ACTIONS = 3
TOY = {"env_id": "tests.toy_env:ToyDiscrete-v0", "total_env_steps": 240, "eval_every": 160, "eval_episodes": 1}


def make_agent(module, **kwargs):
    if module is semore_dqn:
        kwargs = {"grounder_updates": 3, "grounder_batch": 4, **kwargs}
    args = module.Args(image_size=SIZE, batch_size=8, n_step=1, **kwargs)
    args.resolve()
    torch.manual_seed(0)
    return module.Agent(ACTIONS, args, CPU)


def make_discrete_replay(path, **kwargs):
    return make_replay(path, actions=ACTIONS, **kwargs)


@pytest.mark.parametrize("flags", [{"annotator": "none"}, {"semantic": False}])
def test_with_every_extra_off_semore_is_its_twin_bit_for_bit(tmp_path, flags):
    call(drq_dqn, tmp_path / "twin", **TOY)
    call(semore_dqn, tmp_path / "semore", **TOY, **flags)
    assert_same(tmp_path / "semore", tmp_path / "twin")


def test_what_the_twins_share_with_those_for_continuous_actions_is_the_same():
    """Copied, as single files have it; so that a change of one is not forgotten in the others."""
    frames = torch.randint(0, 256, (6, 3, 12, 12, 3), dtype=torch.uint8)
    offset = torch.randint(-4, 5, (6, 2), dtype=torch.int32)
    for module in (drq_dqn, semore_dqn, semore_sac):
        assert torch.equal(module.random_shift(frames, offset), drq_sac.random_shift(frames, offset))
        assert torch.equal(module.stack_channels(frames), drq_sac.stack_channels(frames))
        assert str(module.Encoder(9, (2, 2, 1, 1))) == str(drq_sac.Encoder(9, (2, 2, 1, 1)))


def test_the_online_network_chooses_and_the_target_values(tmp_path):
    agent = make_agent(drq_dqn, shift=0)
    with torch.no_grad():
        for weight in agent.target.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    batch = make_discrete_replay(tmp_path, flow=False, annotate=False).sample(8)
    loss, metrics = agent.critic_loss(*agent.augment(batch))
    errors, values = [], []
    with torch.no_grad():
        for i in range(8):
            q, next_q, target = (
                network(agent.encode(drq_dqn.stack_channels(torch.from_numpy(frames[i : i + 1]))))[0]
                for network, frames in (
                    (agent.critic, batch.rgb), (agent.critic, batch.next_rgb), (agent.target, batch.next_rgb)
                )
            )  # fmt: skip
            goal = batch.reward[i] + batch.discount[i] * target[int(next_q.argmax())]
            values.append(q[int(batch.action[i])])
            error = abs(float(values[-1] - goal))
            errors.append(error**2 / 2 if error < 1 else error - 0.5)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-3)
    assert metrics["q"].item() == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.parametrize("module", [drq_dqn, semore_dqn])
def test_frames_are_centred_by_what_is_usual_so_that_the_ground_does_not_matter(tmp_path, module):
    """On darker and on brighter ground the same is learned, and kept in checkpoints."""
    batch = make_discrete_replay(tmp_path, flow=False, annotate=False).sample(8)
    batch = replace(batch, rgb=batch.rgb // 2, next_rgb=batch.next_rgb // 2)
    brighter = replace(batch, rgb=batch.rgb + np.uint8(100), next_rgb=batch.next_rgb + np.uint8(100))
    learned = []
    for one in (batch, brighter):
        agent = make_agent(module, shift=0, **({"semantic": False} if module is semore_dqn else {}))
        for number in range(3):
            agent.update(SimpleNamespace(sample=lambda size, one=one: one), number)
        learned.append(agent.act({"rgb": one.rgb}, True).tolist())
        with torch.no_grad():
            learned[-1].append(agent.critic(agent.encode(module.stack_channels(torch.from_numpy(one.rgb)))).numpy())
    np.testing.assert_allclose(learned[0].pop(), learned[1].pop(), atol=1e-4)
    assert learned[0] == learned[1]
    mean = one.rgb.reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(agent.state_dict()["colour"].flatten(), np.tile(mean, 3), atol=1e-5)


def test_advantages_are_about_their_mean():
    agent = make_agent(drq_dqn)
    z = torch.randn(4, agent.args.feature_dim)
    with torch.no_grad():
        assert torch.allclose(agent.critic(z).mean(1), agent.critic.value(z)[:, 0], atol=1e-5)


def test_the_share_of_random_actions_falls_and_evaluation_has_none(tmp_path):
    args = drq_dqn.Args(random_steps=100, epsilon_steps=200, epsilon=0.25)
    assert [args.epsilon_at(step) for step in (0, 100, 200, 300, 9999)] == [1, 1, 0.625, 0.25, 0.25]
    short = drq_dqn.Args(total_env_steps=4000)
    short.resolve()
    assert short.epsilon_steps == 250
    agent = make_agent(drq_dqn)
    observation = make_discrete_replay(tmp_path, flow=False, annotate=False).latest()
    observation = {"rgb": np.repeat(observation["rgb"], 600, 0)}
    best = agent.act(observation, deterministic=True)
    assert np.array_equal(agent.act(observation), best)
    assert len(set(best.tolist())) == 1
    counts = np.bincount(agent.act(observation, epsilon=0.6), minlength=ACTIONS)
    assert counts[best[0]] == pytest.approx(600 * (0.4 + 0.6 / 3), abs=60)
    assert counts.min() > 60


def test_learning_is_from_clipped_rewards_and_logs_are_of_true_ones(tmp_path):
    step = Step(np.int64(1), -7.5, False, False, {}, {})
    assert [clipped.reward for clipped in drq_dqn.clipped([step])] == [-1]
    call(drq_dqn, tmp_path / "run", **TOY | {"action_repeat": 8})
    returns, lengths = pd.read_csv(tmp_path / "run" / "train.csv")[["episode_return", "episode_length"]].to_numpy().T
    assert (returns > np.ceil(lengths / 8)).any()


@pytest.mark.parametrize(
    "flags", [{}, {"motion": False}, {"interaction": False}, {"pixels": True}, {"frame_stack": 2}, {"n_step": 3}]
)
def test_every_ablation_trains(tmp_path, flags):
    agent = make_agent(semore_dqn, **{"shift": 4, **{k: v for k, v in flags.items() if k != "n_step"}})
    stack = agent.args.frame_stack
    replay = make_discrete_replay(tmp_path, flow=agent.args.motion, features=agent_features(), stack=stack)
    replay.describe = agent.describe
    metrics = agent.update(replay, 0) | agent.update(replay, 1)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert agent.vocabulary.names == ("ball",)
    assert metrics["things"] == 1
    assert agent.sees_pixels == flags.get("pixels", False)
    action = agent.act(replay.latest(), epsilon=0.5)
    assert action.shape == (1,)
    assert 0 <= action[0] < ACTIONS
    ((name, _),) = agent.explain(replay.latest())
    assert name == "ball"


def test_the_q_function_never_teaches_the_grounder(tmp_path):
    agent = make_agent(semore_dqn)
    replay = make_discrete_replay(tmp_path, features=agent_features())
    replay.describe = agent.describe
    agent.ground(replay, 0)
    loss, _ = agent.critic_loss(*agent.augment(replay.sample(8)))
    agent.zero_grad()
    loss.backward()
    moved = {
        name.split(".")[0] for name, weight in agent.named_parameters() if weight.grad is not None and weight.grad.any()
    }
    assert moved == {"critic"}


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (drq_dqn, {"epsilon": 1.5}, "--epsilon is a probability"),
        (drq_dqn, {"sticky_actions": -0.1}, "--sticky-actions is a probability"),
        (semore_dqn, {"frame_stack": 1}, "--frame-stack 2"),
        (semore_dqn, {"grounder_updates": 0}, "--grounder-updates must be at least 1"),
        (semore_dqn, {"ground_every": -1}, "--ground-every"),
    ],
)
def test_flags_that_make_no_sense_are_refused(module, flags, message):
    with pytest.raises(UserError, match=message):
        module.Args(**flags).resolve()
