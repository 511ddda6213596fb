"""MaDi and SGQN: what they keep of the frames, their losses against slow references, and who learns from which."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agents import drq_sac, madi_sac, sgqn_sac
from tests.tiny_agents import ACTIONS, make_replay, receivers
from tests.tiny_agents import make_agent as make_any_agent
from wrappers.errors import UserError

MASKING = [madi_sac, sgqn_sac]


def make_agent(module, **kwargs):
    return make_any_agent(module, **({} if module is drq_sac else {"overlay_limit": 4}) | kwargs)


@pytest.fixture
def batch(tmp_path):
    return make_replay(tmp_path, flow=False, annotate=False).sample(8)


def make_twins(module, **kwargs):
    """An agent, and DrQ-SAC with the same weights."""
    agent, twin = make_agent(module, **kwargs), make_agent(drq_sac)
    twin.load_state_dict({name: value for name, value in agent.state_dict().items() if name in twin.state_dict()})
    return agent, twin


def assert_they_learn_the_same(agent, twin, path):
    replays = [make_replay(path / name, flow=False, annotate=False) for name in ("own", "twin")]
    for number in range(4):
        metrics = []
        for learner, replay in zip((agent, twin), replays, strict=True):
            torch.manual_seed(number)
            metrics.append(learner.update(replay, number))
        assert {name: float(metrics[0][name]) for name in metrics[1]} == {k: float(v) for k, v in metrics[1].items()}
    own = agent.state_dict()
    assert all(torch.equal(own[name], value) for name, value in twin.state_dict().items())


@pytest.mark.parametrize("module", MASKING)
def test_the_actor_learns_alone_and_evaluation_is_exact(module, batch):
    agent = make_agent(module)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.optimize("actor", agent.actor_loss(torch.randn(8, 50))[0])
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}
    actions = [agent.act({"rgb": batch.rgb}, deterministic=True) for _ in range(2)]
    assert actions[0].shape == (8, ACTIONS)
    assert np.array_equal(*actions)


@pytest.mark.parametrize(
    ("module", "settings", "named"),
    [
        (madi_sac, {"alpha": -0.1}, "--alpha"),
        (madi_sac, {"masker_filters": 0}, "--masker-filters"),
        (sgqn_sac, {"quantile": 1.5}, "--quantile"),
        (sgqn_sac, {"attribution_every": 0}, "--attribution-every"),
    ],
)
def test_settings_that_cannot_work_are_refused(module, settings, named):
    with pytest.raises(UserError, match=named):
        module.Args(image_size=64, **settings).resolve()


# ---- MaDi ----


def test_masker_weighs_pixels_of_each_frame_by_itself_between_0_and_1():
    torch.manual_seed(0)
    masker = madi_sac.Masker(5)
    rgb = torch.randint(0, 256, (70, 9, 12, 14), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mask = masker(rgb)
    assert mask.shape == rgb.shape
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask.std() > 0
    for sample in (0, 69):  # in another piece
        for frame in range(3):
            alone = torch.sigmoid(
                nn.Sequential.forward(masker, rgb[sample : sample + 1, 3 * frame : 3 * frame + 3] / 255)
            )
            for colour in range(3):
                assert torch.allclose(mask[sample, 3 * frame + colour], alone[0, 0], atol=1e-6)


def test_masker_has_a_quarter_of_its_filters_where_all_is_small():
    filters = {}
    for preset in ("lite", "reference"):
        args = madi_sac.Args(preset=preset)
        args.resolve()
        filters[preset] = args.masker_filters
    assert filters == {"lite": 8, "reference": 32}


def test_both_views_teach_the_masker_and_goals_do_not(batch):
    agent = make_agent(madi_sac)
    rgb, strong, next_rgb, *others = agent.augment(batch)
    assert not torch.equal(rgb, strong)
    gradients = {}
    for alpha in (0.0, 0.5, 1.0):
        agent.args.alpha = alpha
        torch.manual_seed(1)
        loss, _, metrics = agent.critic_loss(rgb, strong, next_rgb, *others)
        assert receivers(agent, loss) == {"masker", "encoder", "project", "critic"}
        gradients[alpha] = torch.cat([parameter.grad.flatten() for parameter in agent.masker.parameters()])
    assert torch.allclose(gradients[0.5], (gradients[0.0] + gradients[1.0]) / 2, rtol=1e-3, atol=1e-6)
    assert metrics.keys() == {"critic_loss", "q", "mask"}
    before = [parameter.clone() for parameter in agent.masker.parameters()]
    agent.optimize("critic", agent.critic_loss(rgb, strong, next_rgb, *others)[0])
    assert not all(torch.equal(old, new) for old, new in zip(before, agent.masker.parameters(), strict=True))


def test_masked_loss_equals_a_slow_reference(batch):
    agent = make_agent(madi_sac, alpha=0.3)
    rgb, strong, next_rgb, action, reward, discount = agent.augment(batch)
    torch.manual_seed(1)
    loss, z, metrics = agent.critic_loss(rgb, strong, next_rgb, action, reward, discount)
    torch.manual_seed(1)

    def see(frames):
        masked = torch.zeros(frames.shape)
        for frame in range(3):
            channels = slice(3 * frame, 3 * frame + 3)
            logits = nn.Sequential.forward(agent.masker, frames[:, channels] / 255)
            masked[:, channels] = frames[:, channels] / 255 / (1 + torch.exp(-logits))
        return agent.project(agent.encoder(masked - 0.5).permute(0, 2, 3, 1).flatten(1))

    with torch.no_grad():
        next_z = see(next_rgb)
        next_action, log_prob = agent.actor(next_z)
        value = agent.target(next_z, next_action)
        clean, hard = agent.critic(see(rgb), action), agent.critic(see(strong), action)
        assert torch.allclose(z, see(rgb), atol=1e-5), "the actor sees the masked clean frames"
    total = 0.0
    for i in range(8):
        goal = float(reward[i]) + float(discount[i]) * (float(value[:, i].min()) - 0.1 * float(log_prob[i]))
        for critic in range(2):
            total += 0.3 * (float(clean[critic, i]) - goal) ** 2 + 0.7 * (float(hard[critic, i]) - goal) ** 2
    assert float(loss.detach()) == pytest.approx(total / 8, rel=1e-4)
    assert float(metrics["mask"]) == pytest.approx(float(agent.masker(rgb).detach().mean()), rel=1e-5)


def test_what_is_masked_out_is_not_acted_upon(batch):
    agent = make_agent(madi_sac)
    with torch.no_grad():
        agent.masker[-1].weight.zero_()
        agent.masker[-1].bias.fill_(-200.0)
    actions = agent.act({"rgb": batch.rgb}, deterministic=True)
    assert np.array_equal(actions, np.repeat(actions[:1], 8, 0))


def test_with_an_open_mask_and_no_pictures_it_is_its_twin_bit_for_bit(tmp_path):
    agent, twin = make_twins(madi_sac)
    with torch.no_grad():
        agent.masker[-1].weight.zero_()
        agent.masker[-1].bias.fill_(200.0)  # the sigmoid of that is 1, and its slope 0
    agent.overlay = lambda rgb: rgb  # half of the loss twice is the whole, exactly
    assert_they_learn_the_same(agent, twin, tmp_path)


# ---- SGQN ----


def test_guided_backpropagation_equals_a_slow_reference():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1),
    )  # fmt: skip
    x = torch.randn(4, 2, 6, 6, requires_grad=True)
    with sgqn_sac.guided(network):
        value = network(x)
    (saliency,) = torch.autograd.grad(value.sum(), x)

    with torch.no_grad():
        first = F.conv2d(x, network[0].weight, network[0].bias)
        second = F.conv2d(first.relu(), network[2].weight, network[2].bias)
        third = F.linear(second.relu().flatten(1), network[5].weight, network[5].bias)
        back = network[7].weight.expand(4, -1)
        back = (back.clamp(min=0) * (third > 0)) @ network[5].weight
        back = F.conv_transpose2d(back.view_as(second).clamp(min=0) * (second > 0), network[2].weight)
        want = F.conv_transpose2d(back.clamp(min=0) * (first > 0), network[0].weight)
    assert torch.allclose(saliency, want, atol=1e-6)
    (plain,) = torch.autograd.grad(network(x).sum(), x)
    assert not torch.allclose(saliency, plain, atol=1e-3), "and afterwards gradients are what they were"


def test_saliency_is_the_first_critics_and_leaves_no_gradient_behind(batch):
    agent = make_agent(sgqn_sac)
    rgb, _, action, *_ = agent.augment(batch)
    saliency = agent.saliency(rgb, action)
    assert saliency.shape == rgb.shape
    assert saliency.abs().sum() > 0
    assert all(parameter.grad is None for parameter in agent.parameters())
    with torch.no_grad():
        for parameter in agent.critic.q2.parameters():
            parameter.mul_(-2)
    assert torch.equal(agent.saliency(rgb, action), saliency)
    with torch.no_grad():
        for parameter in agent.critic.q1.parameters():
            parameter.mul_(-2)
    assert not torch.equal(agent.saliency(rgb, action), saliency)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.95, 1.0])
def test_masks_keep_what_lies_above_numpys_quantile_of_each_frame(quantile):
    saliency = torch.randn(3, 9, 7, 11)
    saliency[1, :3] = 0  # a frame that nothing depends on
    saliency[2, 3:6].round_()  # ties
    mask = sgqn_sac.uppermost(saliency, quantile).numpy()
    assert mask.shape == (3, 3, 7, 11)
    for sample, frame in np.ndindex(3, 3):
        strength = saliency[sample, 3 * frame : 3 * frame + 3].abs().numpy().max(0)
        assert np.array_equal(mask[sample, frame], strength >= np.quantile(strength, quantile))


def test_all_but_the_kept_pixels_get_one_brightness_that_changes():
    rgb = torch.randint(20, 200, (4, 9, 8, 8), dtype=torch.uint8)
    mask = torch.rand(4, 3, 8, 8) < 0.3
    paints = set()
    for _ in range(50):
        painted = sgqn_sac.paint_over(rgb, mask)
        assert painted.dtype == torch.uint8
        kept = mask[:, :, None].expand(-1, -1, 3, -1, -1).reshape(4, 9, 8, 8)
        assert torch.equal(painted[kept], rgb[kept])
        (paint,) = painted[~kept].unique().tolist()
        paints.add(paint)
    assert len(paints) > 20
    assert min(paints) >= int(rgb.min())
    assert max(paints) <= int(rgb.max())


def test_consistency_equals_a_slow_reference_and_teaches_what_the_critics_teach(batch):
    agent = make_agent(sgqn_sac)
    rgb, next_rgb, *others = agent.augment(batch)
    action = others[0]
    painted = sgqn_sac.paint_over(rgb, sgqn_sac.uppermost(agent.saliency(rgb, action), 0.9))
    torch.manual_seed(1)
    loss, z, metrics = agent.critic_loss(rgb, painted, next_rgb, *others)
    with torch.no_grad():
        difference = agent.critic(agent.encode(rgb), action) - agent.critic(agent.encode(painted), action)
    want = sum(float(difference[critic, i]) ** 2 for critic in range(2) for i in range(8)) / 8
    assert float(metrics["consistency_loss"]) == pytest.approx(want, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(metrics["critic_loss"]) + 0.5 * want, rel=1e-5)
    assert torch.allclose(z, agent.encode(rgb)), "the actor sees the whole frames"
    assert receivers(agent, loss) == {"encoder", "project", "critic"}
    assert metrics.keys() == {"critic_loss", "q", "consistency_loss"}


def test_attribution_is_predicted_under_pictures_and_teaches_encoder_and_decoder(batch):
    agent = make_agent(sgqn_sac)
    rgb, _, action, *_ = agent.augment(batch)
    mask = sgqn_sac.uppermost(agent.saliency(rgb, action), 0.9)
    strong = agent.overlay(rgb)
    loss = agent.attribution_loss(strong, action, mask)
    assert receivers(agent, loss) == {"encoder", "project", "decoder"}
    with torch.no_grad():
        share = torch.sigmoid(agent.decoder(torch.cat([agent.encode(strong), action], -1)))
    want = -torch.where(mask, share, 1 - share).log().mean()
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-4)

    parts = {id(p) for part in (agent.encoder, agent.project, agent.decoder) for p in part.parameters()}
    (group,) = agent.optimizers["attribution"].param_groups
    assert {id(p) for p in group["params"]} == parts
    assert group["lr"] == 3e-4
    assert agent.optimizers["critic"].param_groups[0]["weight_decay"] == 1e-5
    for _ in range(20):
        now = agent.attribution_loss(strong, action, mask)
        agent.optimize("attribution", now)
    assert float(now.detach()) < 0.8 * float(loss.detach())


@pytest.mark.parametrize("size", [36, 41, 64, 84])
def test_decoder_gives_a_map_per_frame_of_the_frames_size(size):
    assert sgqn_sac.AttributionDecoder(5, 3, size)(torch.zeros(2, 5)).shape == (2, 3, size, size)


def test_prediction_is_trained_every_second_time(tmp_path):
    agent, replay = make_agent(sgqn_sac), make_replay(tmp_path, flow=False, annotate=False)
    for number in range(4):
        before = [parameter.clone() for parameter in agent.decoder.parameters()]
        metrics = agent.update(replay, number)
        same = [torch.equal(old, new) for old, new in zip(before, agent.decoder.parameters(), strict=True)]
        assert ("attribution_loss" in metrics) == (number % 2 == 0)
        assert all(same) == (number % 2 == 1)
        assert all(torch.isfinite(value) for value in metrics.values())


def test_without_its_losses_it_is_its_twin_bit_for_bit(tmp_path, monkeypatch):
    agent, twin = make_twins(sgqn_sac, consistency_coef=0.0, weight_decay=0.0, attribution_learning_rate=0.0)
    monkeypatch.setattr(sgqn_sac, "paint_over", lambda rgb, mask: rgb)  # it and the pictures draw random numbers
    agent.overlay = lambda rgb: rgb
    assert_they_learn_the_same(agent, twin, tmp_path)
