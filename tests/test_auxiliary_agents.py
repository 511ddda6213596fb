"""SAC-AE, DeepMDP, Flare and Flow: their losses against slow references, and who learns from which."""

import copy

import numpy as np
import pytest
import torch

from agents import deepmdp_sac, flare_sac, flow_sac, sac_ae
from tests.tiny_agents import ACTIONS, SIZE, make_agent, make_replay, receivers
from wrappers.errors import UserError

LINEAGE = [sac_ae, flare_sac]
"""agents whose targets see with an encoder of their own, as SAC-AE's do"""


def prepare(agent, batch):
    return agent.augment(batch) if hasattr(agent, "augment") else agent.tensors(batch)


# ---- SAC-AE ----


def test_quantised_target_equals_a_slow_reference():
    rgb = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    noise = torch.rand(rgb.shape)
    goal = sac_ae.quantise(rgb, noise)
    for value, u, got in zip(rgb.flatten().tolist(), noise.flatten().tolist(), goal.flatten().tolist(), strict=True):
        level = int(np.floor(value / 8))  # 32 levels
        assert got == pytest.approx(level / 32 + u / 32 - 0.5, abs=1e-5)
    assert sac_ae.quantise(rgb, torch.zeros(rgb.shape)).unique().numel() == 32
    assert goal.min() >= -0.5
    assert goal.max() <= 0.5


def test_autoencoder_loss_equals_a_slow_reference_and_reaches_encoder_and_decoder_alone(tmp_path):
    agent = make_agent(sac_ae, latent_coef=0.1)
    rgb = agent.tensors(make_replay(tmp_path, flow=False, annotate=False).sample(8))[0]
    torch.manual_seed(3)
    loss, metrics = agent.autoencoder_loss(rgb)
    assert receivers(agent, loss) == {"encoder", "project", "decoder"}

    torch.manual_seed(3)
    noise = torch.rand_like(rgb, dtype=torch.float32)
    with torch.no_grad():
        z = agent.project(agent.encoder(rgb / 255 - 0.5).permute(0, 2, 3, 1).flatten(1))
        difference = agent.decoder(z) - (torch.div(rgb, 8, rounding_mode="floor") / 32 + noise / 32 - 0.5)
    want = sum(float((sample**2).sum()) for sample in difference) / difference.numel()
    penalty = sum(0.5 * float((row**2).sum()) for row in z) / len(z)
    assert float(metrics["reconstruction_loss"]) == pytest.approx(want, abs=1e-5)
    assert float(metrics["latent_loss"]) == pytest.approx(penalty, abs=1e-5)
    assert float(loss.detach()) == pytest.approx(want + 0.1 * penalty, abs=1e-5)


@pytest.mark.parametrize("strides", [(2, 1, 1, 1), (2, 2, 1, 1)])
@pytest.mark.parametrize("size", [36, 41, 64, 84])
def test_decoder_gives_frames_of_the_encoders_size(strides, size):
    encoder, decoder = sac_ae.Encoder(9, strides), sac_ae.Decoder(5, 9, strides, size)
    assert decoder(torch.zeros(2, 5)).shape == (2, 9, size, size)
    assert [type(layer) for layer in decoder].count(torch.nn.ConvTranspose2d) == len(strides)
    maps = encoder(torch.zeros(2, 9, size, size)).shape
    assert decoder[1](decoder[0](torch.zeros(2, 5))).shape == maps


def test_weight_decay_is_the_decoders_alone_and_reconstruction_improves():
    agent = make_agent(sac_ae)
    encoder, decoder = agent.optimizers["autoencoder"].param_groups
    assert {id(p) for p in decoder["params"]} == {id(p) for p in agent.decoder.parameters()}
    assert (encoder["weight_decay"], decoder["weight_decay"]) == (0, 1e-7)
    frames = torch.zeros(8, 9, SIZE, SIZE, dtype=torch.uint8)
    for index, frame in enumerate(frames):
        frame[:, : 6 * index] = 255
    losses = []
    for _ in range(60):
        loss, metrics = agent.autoencoder_loss(frames)
        agent.optimize("autoencoder", loss)
        losses.append(metrics["reconstruction_loss"].item())
    assert losses[-1] < 0.5 * losses[0]


# ---- DeepMDP ----


def test_model_losses_equal_a_slow_reference():
    agent = make_agent(deepmdp_sac)
    z, next_z, action, reward = torch.randn(6, 50), torch.randn(6, 50), torch.randn(6, ACTIONS), torch.randn(6)
    reward_loss, transition_loss = agent.model_losses(z, action, reward, next_z)
    rewards = transitions = 0.0
    with torch.no_grad():
        for i in range(6):
            x = torch.cat([z[i], action[i]])
            rewards += float(agent.reward(x)[0] - reward[i]) ** 2 / 6
            transitions += sum(float(d) ** 2 for d in agent.transition(x) - next_z[i]) / (6 * 50)
    assert float(reward_loss.detach()) == pytest.approx(rewards, abs=1e-5)
    assert float(transition_loss.detach()) == pytest.approx(transitions, abs=1e-5)


def test_both_ends_of_a_transition_teach_the_encoder(tmp_path):
    agent = make_agent(deepmdp_sac)
    rgb, next_rgb, action, reward, discount = agent.augment(make_replay(tmp_path, flow=False).sample(8))
    z, next_z = agent.encode(rgb), agent.encode(next_rgb)
    reward_loss, _ = agent.model_losses(z, action, reward, next_z)
    assert receivers(agent, reward_loss) == {"encoder", "project", "reward"}
    _, transition_loss = agent.model_losses(z.detach(), action, reward, agent.encode(next_rgb))
    assert receivers(agent, transition_loss) == {"encoder", "project", "transition"}
    _, transition_loss = agent.model_losses(agent.encode(rgb), action, reward, next_z.detach())
    assert receivers(agent, transition_loss) == {"encoder", "project", "transition"}

    # In the whole loss too: what is left of it without critics and reward is the transition's, from both ends.
    agent.args.reward_coef = 0.0
    loss, _, metrics = agent.critic_loss(rgb, next_rgb, action, reward, discount)
    assert receivers(agent, loss) == {"encoder", "project", "critic", "transition"}
    agent.args.transition_coef = 0.0
    without, _, _ = agent.critic_loss(rgb, next_rgb, action, reward, discount)
    assert receivers(agent, without) == {"encoder", "project", "critic"}
    assert metrics.keys() == {"critic_loss", "q", "reward_loss", "transition_loss"}


# ---- Flare ----


def test_latent_flow_and_its_gradient_equal_a_slow_reference():
    maps = torch.randn(2, 4, 3, 5, 5, requires_grad=True)
    weight = torch.randn(2, 6, 3, 5, 5)
    out = flare_sac.latent_flow(maps)
    (out * weight).sum().backward()
    gradient = torch.zeros_like(maps)
    for b in range(2):
        for t in range(1, 4):
            assert torch.equal(out[b, t - 1], maps[b, t])
            assert torch.allclose(out[b, 2 + t], maps[b, t] - maps[b, t - 1], atol=1e-6)
            gradient[b, t] = weight[b, t - 1] + weight[b, 2 + t]  # nothing comes from being the frame before
    assert torch.allclose(maps.grad, gradient, atol=1e-5)


def test_flare_encodes_frame_by_frame():
    agent = make_agent(flare_sac)
    rgb = torch.randint(0, 256, (3, 9, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        first, second, third = (agent.encoder(rgb[:, i : i + 3] / 255 - 0.5) for i in (0, 3, 6))
        rows = torch.cat([part.flatten(1) for part in (second, third, second - first, third - second)], 1)
        assert torch.allclose(agent.encode(rgb), agent.project(rows), atol=1e-5)


def test_flare_moves_frames_and_next_frames_alike(tmp_path, monkeypatch):
    seen = []
    original = flare_sac.random_shift
    monkeypatch.setattr(flare_sac, "random_shift", lambda x, o: (seen.append(o), original(x, o))[1])
    agent, replay = make_agent(flare_sac), make_replay(tmp_path, flow=False, annotate=False)
    agent.augment(replay.sample(8))
    agent.augment(replay.sample(8))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert len(seen[0].unique(dim=0)) > 1, "each sample must move by itself"


# ---- Flow ----


def test_both_streams_learn_and_flow_is_seen(tmp_path):
    agent, replay = make_agent(flow_sac), make_replay(tmp_path, annotate=False)
    (rgb, flow), *others = agent.augment(replay.sample(8))
    loss, _, _ = agent.critic_loss((rgb, flow), *others)
    assert receivers(agent, loss) == {"encoder", "motion_encoder", "project", "critic"}
    assert not torch.allclose(agent.encode(rgb, flow), agent.encode(rgb, flow.flip(0)))


# ---- all ----


@pytest.mark.parametrize("module", LINEAGE)
def test_targets_follow_each_at_its_own_pace(tmp_path, module):
    agent, replay = make_agent(module, tau=0.25, encoder_tau=0.5), make_replay(tmp_path, flow=False, annotate=False)
    before = copy.deepcopy(agent.state_dict())
    agent.update(replay, 0)
    after = agent.state_dict()
    for target, online, share in (
        ("target", "critic", 0.25),
        ("target_encoder", "encoder", 0.5),
        ("target_project", "project", 0.5),
    ):
        for name in (name for name in before if name.startswith(f"{target}.")):
            learned = after[name.replace(target, online, 1)]
            if module is sac_ae and target != "target":  # the autoencoder's step comes after the targets'
                assert not torch.equal(after[name], before[name])
            else:
                assert torch.allclose(after[name], before[name].lerp(learned, share), atol=1e-6)


@pytest.mark.parametrize("module", LINEAGE)
def test_value_of_what_follows_is_the_targets(tmp_path, module):
    agent = make_agent(module)
    tensors = prepare(agent, make_replay(tmp_path, flow=False, annotate=False).sample(8))
    rgb, next_rgb, action, reward, discount = tensors
    with torch.no_grad():  # as if they had followed from afar
        for part in (agent.target, agent.target_encoder, agent.target_project):
            for parameter in part.parameters():
                parameter.mul_(0.9)
    torch.manual_seed(5)
    _, z, metrics = agent.critic_loss(*tensors)
    torch.manual_seed(5)
    with torch.no_grad():
        next_action, log_prob = agent.actor(agent.encode(next_rgb))
        value = agent.target(agent.encode(next_rgb, target=True), next_action).min(0).values
        goal = reward + discount * (value - agent.log_temperature.exp() * log_prob)
        want = sum(float(((q - goal) ** 2).mean()) for q in agent.critic(agent.encode(rgb), action))
    assert float(metrics["critic_loss"]) == pytest.approx(want, abs=1e-5)
    assert torch.allclose(z, agent.encode(rgb))


@pytest.mark.parametrize("module", [*LINEAGE, deepmdp_sac, flow_sac])
def test_actor_step_changes_the_actor_alone(tmp_path, module):
    agent, replay = make_agent(module), make_replay(tmp_path, annotate=False)
    _, z, _ = agent.critic_loss(*prepare(agent, replay.sample(8)))
    before = copy.deepcopy(agent.state_dict())
    agent.optimize("actor", agent.actor_loss(z.detach())[0])
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}


@pytest.mark.parametrize("module", [*LINEAGE, deepmdp_sac, flow_sac])
def test_no_parameter_is_left_without_an_optimizer(module):
    agent = make_agent(module)
    owned = {
        id(parameter)
        for optimizer in agent.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {name for name, p in agent.named_parameters() if p.requires_grad and id(p) not in owned} == set()
    assert not any(id(p) in owned for name, p in agent.named_parameters() if name.startswith("target"))


@pytest.mark.parametrize("module", [flare_sac, flow_sac])
def test_motion_needs_two_frames(module):
    with pytest.raises(UserError, match="--frame-stack 2"):
        module.Args(frame_stack=1).resolve()
