"""DrQ-v2: losses against a plain re-derivation, the noise and its schedule, and who learns from what."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agents import curl_sac, drq_sac, drqv2, rad_sac, sac_pixel, svea_sac
from tests.tiny_agents import (
    ACTIONS,
    SIZE,
    assert_random_shift_is_a_crop_of_the_padded_image,
    make_agent,
    make_replay,
    receivers,
)
from wrappers.errors import UserError


@pytest.fixture
def batch(tmp_path):
    return make_replay(tmp_path, flow=False, annotate=False).sample(8)


def disturb(module: nn.Module) -> None:
    """Makes a target that cannot be mistaken for what it follows, and biases and scales that matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


# ---- losses, re-derived sample by sample ----


def plain_maps(encoder, rgb):
    x = rgb.double() / 255 - 0.5
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight.double(), layer.bias.double(), layer.stride).clamp(min=0)
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def plain_mlp(layers, x):
    for layer in layers:
        x = layer.weight.double() @ x + layer.bias.double() if isinstance(layer, nn.Linear) else x.clamp(min=0)
    return x


def plain_projection(project, maps):
    linear, norm, _ = project
    x = linear.weight.double() @ maps + linear.bias.double()
    x = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
    return torch.tanh(x * norm.weight.double() + norm.bias.double())


def plain_action(actor, maps, std, noise):
    mean = torch.tanh(plain_mlp(actor.trunk, plain_projection(actor.project, maps)))
    return torch.tensor(
        [min(max(m + min(max(std * e, -0.3), 0.3), -1 + 1e-6), 1 - 1e-6) for m, e in zip(mean, noise, strict=True)]
    ).double()


def plain_value(critic, maps, action):
    x = torch.cat([plain_projection(critic.project, maps), action.double()])
    return [float(plain_mlp(q, x)) for q in (critic.q1, critic.q2)]


@torch.no_grad()
def test_losses_equal_a_plain_re_derivation(batch):
    agent = make_agent(drqv2)
    disturb(agent)
    agent.std.fill_(0.4)  # about half of the noise is clipped
    rgb, next_rgb, action, reward, _ = agent.augment(batch)
    discount = torch.tensor([0.99**3] * 6 + [0.99, 0])  # three steps, one at the end of an episode, a termination

    torch.manual_seed(2)
    loss, maps, metrics = agent.critic_loss(rgb, next_rgb, action, reward, discount)
    torch.manual_seed(2)
    noise = torch.randn(8, ACTIONS)
    errors = []
    for i, (here, there) in enumerate(
        zip(plain_maps(agent.encoder, rgb), plain_maps(agent.encoder, next_rgb), strict=True)
    ):
        next_action = plain_action(agent.actor, there, 0.4, noise[i])
        goal = float(reward[i]) + float(discount[i]) * min(plain_value(agent.target, there, next_action))
        errors.append([(q - goal) ** 2 for q in plain_value(agent.critic, here, action[i])])
    assert float(loss) == pytest.approx(np.mean(errors, 0).sum(), rel=1e-5, abs=1e-5)
    assert metrics["critic_loss"] == loss

    torch.manual_seed(3)
    loss = agent.actor_loss(maps)
    torch.manual_seed(3)
    noise = torch.randn(8, ACTIONS)
    values = [
        min(plain_value(agent.critic, here, plain_action(agent.actor, here, 0.4, noise[i])))
        for i, here in enumerate(plain_maps(agent.encoder, rgb))
    ]
    assert float(loss) == pytest.approx(-np.mean(values), rel=1e-5, abs=1e-5)


def test_gradient_passes_where_the_action_is_cut_off():
    actor = drqv2.Actor(6, 5, ACTIONS, 16)
    maps = torch.randn(32, 6)
    action = actor(maps, torch.tensor(5.0))
    assert action.abs().max() < 1
    assert (action.abs() > 0.999).any()
    gradient, plain = (torch.autograd.grad(x.sum(), list(actor.parameters())) for x in (action, actor.mean(maps)))
    assert all(torch.allclose(a, b) for a, b in zip(gradient, plain, strict=True))


def test_gradient_routing(batch):
    agent = make_agent(drqv2)
    loss, maps, _ = agent.critic_loss(*agent.augment(batch))
    assert receivers(agent, loss) == {"encoder", "critic"}
    agent.zero_grad()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.optimize("actor", agent.actor_loss(maps.detach()))
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}
    assert all(parameter.grad is None for parameter in agent.critic.parameters()), "gradients that nobody uses"


# ---- noise ----


def test_schedule_is_linear_in_agent_steps():
    agent = make_agent(drqv2, std_start=0.9, std_end=0.3, std_steps=200)
    assert [agent.schedule(step) for step in (0, 50, 100, 200, 5000)] == pytest.approx([0.9, 0.75, 0.6, 0.3, 0.3])


def test_schedule_is_that_of_agent_steps_however_many_updates_there_are(tmp_path):
    replay = make_replay(tmp_path, flow=False)
    stds = []
    for updates in (1, 4):
        agent = make_agent(drqv2, std_steps=1000, random_steps=100, update_every=1, updates_per_step=updates)
        stds.append(agent.update(replay, 40 * updates)["std"].item())
    assert stds[0] == pytest.approx(1 - 0.9 * 140 / 1000)
    assert stds[1] == stds[0]


@pytest.mark.parametrize("name", ["std_steps", "update_every"])
def test_schedules_of_no_steps_are_refused(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        drqv2.Args(**{name: 0}).resolve()


def test_updates_are_every_second_agent_step_and_the_noise_shrinks_in_every_one(tmp_path):
    agent, replay = make_agent(drqv2, std_steps=1000, random_steps=100), make_replay(tmp_path, flow=False)
    assert agent.state_dict()["std"] == 1, "a checkpoint must know the noise"
    for number in range(4):
        before = [parameter.clone() for parameter in agent.parameters()]
        target = [parameter.clone() for parameter in agent.target.parameters()]
        metrics = agent.update(replay, number)
        same = [torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True)]
        assert float(agent.std) == pytest.approx(1 - 0.9 * (100 + number) / 1000)
        if number % 2:
            assert metrics == {}
            assert all(same)
        else:
            assert metrics.keys() == {"critic_loss", "q", "actor_loss", "std"}
            assert not any(same)
            for old, now, online in zip(target, agent.target.parameters(), agent.critic.parameters(), strict=True):
                assert torch.allclose(now, 0.99 * old + 0.01 * online, atol=1e-6)
    logged = agent.update(replay, 4)["std"]
    value = float(logged)
    agent.update(replay, 400)
    assert float(logged) == value, "metrics are read later: they must not change any more"


def test_acting_explores_without_a_clip_and_evaluation_does_not_explore():
    agent = make_agent(drqv2)
    agent.std.fill_(0.5)
    observation = {"rgb": np.random.default_rng(0).integers(0, 256, (1, 3, SIZE, SIZE, 3), dtype=np.uint8)}
    mean = agent.act(observation, deterministic=True)
    assert np.array_equal(mean, agent.act(observation, deterministic=True))
    noise = np.stack([agent.act(observation) - mean for _ in range(200)])
    assert np.abs(noise).max() > 0.6
    assert 0.35 < noise.std() < 0.6
    assert mean.shape == (1, ACTIONS)


# ---- what is done for speed changes nothing ----


@pytest.mark.parametrize("module", [drqv2, sac_pixel, rad_sac, curl_sac, svea_sac])
def test_encoding_in_pieces_is_encoding(module):
    torch.manual_seed(0)
    encoder = module.Encoder(9, (2, 2, 1, 1))
    rgb = torch.randint(0, 256, (130, 9, 36, 36), dtype=torch.uint8)
    scaled = rgb / 255 - 0.5
    maps = encoder(rgb if module is drqv2 else scaled)
    want = nn.Sequential.forward(encoder, scaled)
    assert torch.allclose(maps, want, atol=1e-5)
    weight = torch.randn_like(want)
    gradients = [torch.autograd.grad((x * weight).sum(), list(encoder.parameters())) for x in (maps, want)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("module", [drqv2, svea_sac])
def test_random_shift(module):
    assert_random_shift_is_a_crop_of_the_padded_image(module)
    frames, offset = torch.randint(0, 256, (9, 3, 12, 12, 3), dtype=torch.uint8), torch.randint(-4, 5, (9, 2))
    assert torch.equal(module.random_shift(frames, offset.int()), module.random_shift(frames, offset))


@pytest.mark.parametrize("module", [drqv2, svea_sac])
def test_every_offset_is_drawn(module, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "random_shift", lambda x, o: (seen.append(o), drq_sac.random_shift(x, o))[1])
    agent = make_agent(module, shift=2)
    for _ in range(30):
        agent.augment(batch)
    for offsets in (seen[::2], seen[1::2]):
        drawn = {tuple(offset) for each in offsets for offset in each.tolist()}
        assert drawn == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    assert not torch.equal(seen[0], seen[1]), "next frames have an offset of their own"
