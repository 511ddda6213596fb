"""SAC-pixel, RAD, CURL and SVEA: what they do to frames, their losses against slow references, who learns from what."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import curl_sac, rad_sac, sac_pixel, svea_sac
from tests.tiny_agents import SIZE, make_agent, make_replay, receivers
from wrappers.errors import UserError

VARIANTS = [sac_pixel, rad_sac, curl_sac, svea_sac]


@pytest.fixture
def batch(tmp_path):
    return make_replay(tmp_path, flow=False, annotate=False).sample(8)


def losses(agent, batch):
    """The critics' loss and the representation, from whatever the agent does to a batch."""
    prepared = getattr(agent, "augment", None) or agent.tensors
    rgb, *others = prepared(batch)
    return agent.critic_loss(rgb, *(others[1:] if hasattr(agent, "contrastive_loss") else others))


# ---- all of them ----


@pytest.mark.parametrize("module", VARIANTS)
def test_critics_teach_the_encoder_and_the_actor_learns_alone(module, batch):
    agent = make_agent(module)
    loss, z, _ = losses(agent, batch)
    assert receivers(agent, loss) == {"encoder", "project", "critic"}
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.optimize("actor", agent.actor_loss(z.detach())[0])
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}


@pytest.mark.parametrize("module", VARIANTS)
def test_targets_follow_at_their_own_pace_in_every_second_update(module, tmp_path):
    agent, replay = make_agent(module, tau=0.1, encoder_tau=0.3), make_replay(tmp_path, flow=False, annotate=False)
    pairs = (("target", "critic", 0.1), ("target_encoder", "encoder", 0.3), ("target_project", "project", 0.3))
    if module is curl_sac:  # its own step comes last and would move the encoder once more
        agent.optimizers["contrast"].param_groups[0]["lr"] = 0.0
    for number in range(2):
        before = {name: [parameter.clone() for parameter in getattr(agent, name).parameters()] for name, _, _ in pairs}
        metrics = agent.update(replay, number)
        assert all(torch.isfinite(value) for value in metrics.values())
        for name, online, tau in pairs:
            share = tau if number == 0 else 0
            weights = (getattr(agent, part).parameters() for part in (name, online))
            for old, now, new in zip(before[name], *weights, strict=True):
                assert torch.allclose(now, (1 - share) * old + share * new, atol=1e-6)


@pytest.mark.parametrize("module", VARIANTS)
def test_values_come_from_the_targets_and_actions_from_the_online_encoder(module, batch):
    agent = make_agent(module)
    torch.manual_seed(5)
    first = losses(agent, batch)[0]
    with torch.no_grad():
        agent.target_project[0].weight.mul_(-1)
    torch.manual_seed(5)
    assert not torch.equal(losses(agent, batch)[0], first)
    assert not any(parameter.requires_grad for name, parameter in agent.named_parameters() if "target" in name)
    temperature = agent.optimizers["temperature"].param_groups[0]
    assert (temperature["lr"], temperature["betas"]) == (1e-4, (0.5, 0.999))


# ---- SAC-pixel ----


def test_sac_pixel_sees_frames_as_they_are(batch):
    rgb, next_rgb, *_ = make_agent(sac_pixel).tensors(batch)
    for seen, stored in ((rgb, batch.rgb), (next_rgb, batch.next_rgb)):
        assert np.array_equal(seen.numpy(), stored.transpose(0, 1, 4, 2, 3).reshape(8, 9, SIZE, SIZE))


# ---- crops and translations ----


@pytest.mark.parametrize("module", [rad_sac, curl_sac])
def test_crop_is_a_slice_at_every_offset(module):
    frames = torch.randint(0, 256, (25, 3, 12, 12, 3), dtype=torch.uint8)
    offsets = torch.cartesian_prod(*[torch.arange(5, dtype=torch.int32)] * 2)  # 4 is the last row and column
    crops = module.random_crop(frames, offsets, 8)
    for frame, crop, (y, x) in zip(frames.numpy(), crops.numpy(), offsets.tolist(), strict=True):
        assert np.array_equal(crop, frame[:, y : y + 8, x : x + 8].transpose(0, 3, 1, 2).reshape(9, 8, 8))
    assert crops.is_contiguous(memory_format=torch.channels_last)


def test_translation_moves_the_whole_frame_over_black():
    frames = torch.randint(1, 256, (25, 3, 12, 12, 3), dtype=torch.uint8)
    offsets = torch.cartesian_prod(*[torch.arange(5, dtype=torch.int32)] * 2)
    for frame, seen, (y, x) in zip(
        frames.numpy(), rad_sac.translate(frames, offsets, 16).numpy(), offsets.tolist(), strict=True
    ):
        want = np.zeros((9, 16, 16), np.uint8)
        want[:, y : y + 12, x : x + 12] = frame.transpose(0, 3, 1, 2).reshape(9, 12, 12)
        assert np.array_equal(seen, want)


@pytest.mark.parametrize(
    ("module", "settings", "sizes"),
    [
        (rad_sac, {}, {100: 84, 84: 71, 64: 54}),
        (rad_sac, {"augmentation": "translate"}, {100: 108, 84: 91, 64: 69}),
        (curl_sac, {}, {100: 84, 84: 71, 64: 54}),
    ],
)
def test_sizes_are_the_papers_or_keep_their_shares(module, settings, sizes):
    assert {size: module.Args(image_size=size, **settings).input_size for size in sizes} == sizes


@pytest.mark.parametrize(
    ("module", "settings"), [(rad_sac, {}), (rad_sac, {"augmentation": "translate"}), (curl_sac, {})]
)
def test_all_offsets_are_drawn_and_evaluation_takes_the_middle(module, settings, batch, monkeypatch):
    name = "translate" if settings else "random_crop"
    seen, original = [], getattr(module, name)
    agent = make_agent(module, crop=0.92, **settings)
    monkeypatch.setattr(module, name, lambda x, o, s: (seen.append((o, s)), original(x, o, s))[1])
    for _ in range(40):
        rgb = agent.augment(batch)[0]
    assert rgb.shape == (8, 9, agent.args.input_size, agent.args.input_size)
    assert agent.max_offset == 4
    views = 3 if module is curl_sac else 2
    for view in range(views):
        drawn = {tuple(offset) for offsets, _ in seen[view::views] for offset in offsets.tolist()}
        assert drawn == {(y, x) for y in range(5) for x in range(5)}
    # next frames, and CURL's keys, are placed by themselves, but translations move all frames alike
    assert torch.equal(seen[0][0], seen[1][0]) == bool(settings)

    seen.clear()
    frames = batch.rgb[:1]
    action = agent.act({"rgb": frames}, deterministic=True)
    assert (seen[0][0] == 2).all()
    if not settings:  # what lies outside of the middle crop is not looked at
        changed = frames.copy()
        changed[:, :, :2] = changed[:, :, -2:] = changed[:, :, :, :2] = changed[:, :, :, -2:] = 0
        assert np.array_equal(agent.act({"rgb": changed}, deterministic=True), action)
        changed[:, :, 2] = 0
        assert not np.array_equal(agent.act({"rgb": changed}, deterministic=True), action)


@pytest.mark.parametrize(
    ("module", "settings", "named"),
    [
        (rad_sac, {"crop": 0.2}, "--crop"),
        (rad_sac, {"crop": 1.1}, "--crop"),
        (rad_sac, {"augmentation": "translate", "canvas": 0.9}, "--canvas"),
        (curl_sac, {"crop": 0.2}, "--crop"),
        (curl_sac, {"crop": 1.1}, "--crop"),
        (svea_sac, {"alpha": 1.5}, "--alpha"),
    ],
)
def test_settings_that_cannot_work_are_refused(module, settings, named):
    with pytest.raises(UserError, match=named):
        module.Args(image_size=64, **settings).resolve()


# ---- CURL ----


def test_contrastive_loss_equals_a_slow_reference():
    torch.manual_seed(0)
    queries, keys, product = torch.randn(6, 5), torch.randn(6, 5), torch.rand(5, 5)
    total = 0.0
    for i in range(6):
        logits = []
        for j in range(6):
            logits.append(sum(float(queries[i, a] * product[a, b] * keys[j, b]) for a in range(5) for b in range(5)))
        total += np.log(np.exp(logits).sum()) - logits[i]
    assert float(curl_sac.info_nce(queries, keys, product)) == pytest.approx(total / 6, rel=1e-5)


def test_contrast_teaches_encoder_and_similarity_and_keys_are_the_slow_copys(batch):
    agent = make_agent(curl_sac)
    rgb, key_rgb, *_ = agent.augment(batch)
    loss = agent.contrastive_loss(rgb, key_rgb)
    assert receivers(agent, loss) == {"encoder", "project", "bilinear"}
    with torch.no_grad():
        agent.target_project[0].weight.mul_(-1)
        want = curl_sac.info_nce(agent.encode(rgb), agent.encode(key_rgb, target=True), agent.bilinear)
        assert agent.contrastive_loss(rgb, key_rgb) == want != loss


def test_crops_of_one_frame_come_to_be_known_by_each_other(batch):
    agent = make_agent(curl_sac)
    colours = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 1, 3), dtype=np.uint8)
    batch = replace(batch, rgb=np.broadcast_to(colours, batch.rgb.shape).copy())
    history = []
    for _ in range(60):
        loss = agent.contrastive_loss(*agent.augment(batch)[:2])
        agent.optimize("contrast", loss)
        agent.polyak_update(agent.target_encoder, agent.encoder, 0.05)
        agent.polyak_update(agent.target_project, agent.project, 0.05)
        history.append(float(loss.detach()))
    assert np.mean(history[-5:]) < 0.5 * np.log(8)


# ---- SVEA ----


def test_random_convolution_equals_a_slow_reference():
    torch.manual_seed(0)
    rgb = torch.randint(0, 256, (2, 6, 5, 7), dtype=torch.uint8)
    weight = torch.randn(2, 3, 3, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = svea_sac.random_convolution(rgb.contiguous(memory_format=layout), weight)
        for b in range(2):
            for channel in range(6):
                frame, out = divmod(channel, 3)  # a frame's colours mix, frames do not, and all share the kernels
                for y in range(5):
                    for x in range(7):
                        total = 0.0
                        for c in range(3):
                            for dy in range(3):
                                for dx in range(3):
                                    row, column = min(max(y + dy - 1, 0), 4), min(max(x + dx - 1, 0), 6)
                                    value = float(rgb[b, 3 * frame + c, row, column]) / 255
                                    total += value * float(weight[b, out, c, dy, dx])
                        assert float(got[b, channel, y, x]) == pytest.approx(255 / (1 + np.exp(-total)), abs=1e-3)


def test_mixed_loss_equals_a_slow_reference(batch):
    agent = make_agent(svea_sac, alpha=0.3)
    rgb, strong, next_rgb, action, reward, discount = agent.augment(batch)
    torch.manual_seed(1)
    loss, z, _ = agent.critic_loss(rgb, strong, next_rgb, action, reward, discount)
    torch.manual_seed(1)
    with torch.no_grad():
        next_action, log_prob = agent.actor(agent.encode(next_rgb))
        value = agent.target(agent.encode(next_rgb, target=True), next_action)
        clean, hard = agent.critic(agent.encode(rgb), action), agent.critic(agent.encode(strong), action)
    total = 0.0
    for i in range(8):
        goal = float(reward[i]) + float(discount[i]) * (float(value[:, i].min()) - 0.1 * float(log_prob[i]))
        for critic in range(2):
            total += 0.3 * (float(clean[critic, i]) - goal) ** 2 + 0.7 * (float(hard[critic, i]) - goal) ** 2
    assert float(loss.detach()) == pytest.approx(total / 8, rel=1e-5)
    assert torch.allclose(z, agent.encode(rgb)), "the actor sees the clean frames"


def test_strong_view_leaves_goals_alone_and_half_the_loss_is_its_own(batch):
    agent = make_agent(svea_sac)
    rgb, strong, *others = agent.augment(batch)
    assert strong.shape == rgb.shape
    assert strong.min() >= 0
    assert strong.max() <= 255
    results = {}
    for alpha in (0.0, 0.5, 1.0):
        agent.args.alpha = alpha
        for name, view in (("strong", strong), ("black", torch.zeros_like(strong)), ("clean", rgb)):
            torch.manual_seed(1)
            results[alpha, name] = agent.critic_loss(rgb, view, *others)[0].item()
    assert results[1.0, "strong"] == results[1.0, "black"] == pytest.approx(results[0.0, "clean"], rel=1e-5)
    assert results[0.5, "strong"] == pytest.approx((results[1.0, "strong"] + results[0.0, "strong"]) / 2, rel=1e-5)
    assert results[0.0, "strong"] != results[0.0, "black"]
