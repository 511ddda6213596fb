"""The agents' networks and losses: who receives which gradient, what the extras change, and random shift."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces

from agents import drq_sac, semore_sac
from semore_bench.envs import Step
from semore_bench.replay import Replay
from wrappers.backends.annotation import Annotation, SceneObject

SIZE, GRID, DIM, ACTIONS = 48, 4, 16, 2
CPU = torch.device("cpu")


def make_replay(path, flow=True, annotate=True, steps=60, seed=3) -> Replay:
    """Episodes of seven random frames, annotated at random, from a generator of their own."""
    rng = np.random.default_rng(seed)
    space = {"rgb": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)}
    if flow:
        space["flow"] = spaces.Box(-8, 8, (SIZE, SIZE, 2), np.float32)
    notes = {"annotate_every": 2, "grid": GRID, "embedding_dim": DIM} if annotate else {}
    replay = Replay(path, spaces.Dict(space), ACTIONS, capacity=100, seed=5, **notes)

    def frame(number):
        observation = {"rgb": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)}
        motion = rng.uniform(-8, 8, (SIZE, SIZE, 2)).astype(np.float32)
        note = random_annotation(rng, number)
        if flow:
            observation["flow"] = motion
        return observation, {"annotations": (note,), "annotation_ages": (0,)} if annotate and number % 2 == 0 else {}

    number = 0
    replay.begin(0, *frame(number))
    for step in range(1, steps):
        number += 1
        observation, info = frame(number)
        action, reward = rng.uniform(-1, 1, ACTIONS).astype(np.float32), float(rng.normal())
        following = None
        if ended := step % 7 == 0:
            number += 1
            following = frame(number)
        replay.add([Step(action, reward, False, ended, observation, info, following)])
    return replay


def random_annotation(rng, number) -> Annotation:
    def unit(rows):
        x = rng.normal(size=(rows, DIM)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    classes = 3
    probabilities = rng.dirichlet(np.ones(classes), (GRID, GRID)).astype(np.float32).transpose(2, 0, 1)
    return Annotation(
        caption=f"a ball {number % 5}",
        objects=(SceneObject("ball", 0.8),),
        caption_embedding=unit(1)[0],
        class_names=("ball", "floor", "sky"),
        class_embeddings=unit(classes),
        patch_probabilities=probabilities,
        relevance=0.8 * probabilities[0],
        frame_step=number,
        source="test",
    )


def make_agent(module, **kwargs):
    args = module.Args(image_size=SIZE, batch_size=8, **kwargs)
    args.resolve()
    torch.manual_seed(0)
    extra = (GRID, DIM) if module is semore_sac else ()
    return module.Agent(ACTIONS, args, CPU, *extra)


def receivers(agent, loss) -> set[str]:
    """Names of the parts that a loss sends a gradient other than zero to."""
    agent.zero_grad()
    loss.backward()
    return {
        name.split(".")[0] + ("." + name.split(".")[1] if name.startswith("guidance") else "")
        for name, parameter in agent.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }


@pytest.fixture
def open_gates():
    """An agent whose paths do interact: with closed gates, what a leak would carry is multiplied by zero."""
    agent = make_agent(semore_sac)
    with torch.no_grad():
        agent.interaction.gate.fill_(0.5)
    return agent


def test_gradient_routing_is_the_table_of_the_method(tmp_path, open_gates):
    agent, replay = open_gates, make_replay(tmp_path)
    batch = replay.sample(8)
    taught = agent.taught(replay, batch)

    agent.args.motion = False
    assert receivers(agent, agent.guidance_loss(*taught)[0]) == {"encoder", "guidance.classes", "guidance.caption"}
    agent.args.motion, agent.args.semantic = True, False
    assert receivers(agent, agent.guidance_loss(*taught)[0]) == {"motion_encoder", "guidance.flow"}
    agent.args.semantic = True

    body = {"encoder", "motion_encoder", "interaction", "project"}
    agent.args.reward_coef = 0.0
    loss, z, _ = agent.critic_loss(*agent.augment(batch))
    assert receivers(agent, loss) == body | {"critic"}
    agent.args.reward_coef = 1.0
    with_reward, _, _ = agent.critic_loss(*agent.augment(batch))
    assert receivers(agent, with_reward) == body | {"critic", "reward"}

    # The actor's step differentiates by the actor's parameters alone, and its input is cut off from the encoders.
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.zero_grad()
    agent.step("actor", agent.actor_loss(z.detach())[0])
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}


@pytest.mark.parametrize("rate", [0.0, 1e-3, 1e-2])
def test_guidance_moves_both_paths_and_their_heads_at_a_rate_of_its_own(tmp_path, rate):
    agent, replay = make_agent(semore_sac, guidance_learning_rate=rate), make_replay(tmp_path)
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
    agent.guide(replay, replay.sample(8))
    steps = {name: (parameter - before[name]).abs().max().item() for name, parameter in agent.named_parameters()}
    moved = {name for name in steps if name.split(".")[0] in ("encoder", "motion_encoder", "guidance")}
    assert all(step == 0 for name, step in steps.items() if name not in moved)
    # a first step of Adam is as long as the rate, however small the loss
    assert all(steps[name] == pytest.approx(rate, rel=0.1) for name in moved)


def test_closed_gates_make_two_independent_paths(open_gates):
    interact = open_gates.interaction
    semantics, other_semantics = torch.rand(2, 4, interact.pool_semantics.shape[1], 32)
    motion, other_motion = torch.rand(2, 4, interact.pool_motion.shape[1], 32)
    assert not torch.allclose(interact(semantics, motion)[0], interact(semantics, other_motion)[0])
    assert not torch.allclose(interact(semantics, motion)[1], interact(other_semantics, motion)[1])
    with torch.no_grad():
        interact.gate[0] = 0
    assert torch.equal(interact(semantics, motion)[0], semantics)
    assert not torch.equal(interact(semantics, motion)[1], motion)
    with torch.no_grad():
        interact.gate[1] = 0
    for seen in (motion, other_motion):
        assert torch.equal(interact(semantics, seen)[0], semantics)
        assert torch.equal(interact(semantics, seen)[1], seen)
    assert not make_agent(semore_sac).interaction.gate.any(), "the gates must begin closed"


@pytest.mark.parametrize("widths", [(3, 1), (5, 5), (7, 5), (11, 9), (35, 14)])
def test_interaction_is_gated_attention_on_pooled_maps(widths):
    """Each path's share by PyTorch's own pooling, attention and nearest neighbours."""
    torch.manual_seed(0)
    interact = semore_sac.Interaction(widths)
    torch.nn.init.normal_(interact.gate)
    maps = [torch.rand(3, 32, width, width) for width in widths]
    sizes, parts = [max(1, min(7, width // 2)) for width in widths], (interact.semantics, interact.motion)
    tokens = [F.adaptive_avg_pool2d(x, size).flatten(2).mT for x, size in zip(maps, sizes, strict=True)]
    query, key, value = zip(*(part(x).split(32, -1) for part, x in zip(parts, tokens, strict=True)), strict=True)
    results = interact(*(x.flatten(2).mT for x in maps))
    for this, (result, gate) in enumerate(zip(results, interact.gate, strict=True)):
        taken = F.scaled_dot_product_attention(query[this], key[1 - this], value[1 - this])
        taken = (gate * taken).mT.unflatten(2, (sizes[this], sizes[this]))
        want = maps[this] + F.interpolate(taken, (widths[this], widths[this]))
        assert torch.allclose(result.mT.unflatten(2, (widths[this], widths[this])), want, atol=1e-5)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("with_flow", [True, False])
def test_motion_path_sees_differences_and_flow_at_half_the_resolution(with_flow, size):
    rgb, flow = torch.rand(2, 9, size, 6) - 0.5, torch.randint(0, 256, (2, 4, size, 6), dtype=torch.uint8)
    rgb, flow = (x.contiguous(memory_format=torch.channels_last) for x in (rgb, flow))
    seen = semore_sac.motion_input(rgb, flow if with_flow else None)
    want = [rgb[:, 3:6] - rgb[:, :3], rgb[:, 6:] - rgb[:, 3:6], (flow.float() - 128) / 127]
    want = torch.cat(want if with_flow else want[:2], 1)[:, :, :6]  # an odd row has no half
    want = sum(want[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    assert torch.allclose(seen, want, atol=1e-6)
    assert seen.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("motion", [True, False])
def test_without_annotations_the_semantic_loss_is_exactly_zero_and_training_runs(tmp_path, motion):
    agent, replay = make_agent(semore_sac, annotator="none"), make_replay(tmp_path, annotate=False)
    taught = agent.taught(replay, replay.sample(8))
    whole, metrics = agent.guidance_loss(*taught)
    assert metrics.keys() == {"motion_loss"}
    assert whole == metrics["motion_loss"]
    agent = make_agent(semore_sac, annotator="none", motion=motion)
    for number in range(4):
        metrics = agent.update(replay, number)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    guided = agent.optimizers["guidance"].state
    assert not any(p in guided for p in agent.encoder.parameters()), "a step of the semantic path without annotations"
    assert all(p in guided for p in agent.motion_encoder.parameters()) if motion else not guided


def test_unweighted_motion_loss_is_a_plain_huber_mean():
    predicted, flow = torch.randn(2, 3, 2, 4, 4).unbind(0)
    want = torch.nn.functional.huber_loss(predicted, flow) * 2  # summed over the two components
    assert torch.allclose(semore_sac.motion_loss(predicted, flow, torch.zeros(3, 4, 4)), want)


def test_map_loss_equals_a_slow_reference():
    torch.manual_seed(1)
    features, classes = torch.randn(2, 5, 3, 3), torch.nn.functional.normalize(torch.randn(2, 4, 5), dim=-1)
    present = torch.tensor([[True, True, True, False], [True, True, False, False]])
    probabilities = torch.rand(2, 4, 3, 3) * present[:, :, None, None]
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    total = 0.0
    for b in range(2):
        kinds = [k for k in range(4) if present[b, k]]
        for y in range(3):
            for x in range(3):
                f = features[b, :, y, x] / features[b, :, y, x].norm()
                q = torch.softmax(torch.stack([50 * f @ classes[b, k] for k in kinds]), 0)
                p = probabilities[b, kinds, y, x]
                total += sum(p[i] * (p[i] / q[i]).log() for i in range(len(kinds)))
    assert torch.allclose(semore_sac.map_loss(features, classes, present, probabilities), total / 18, rtol=1e-4)


def test_caption_loss_knows_equal_captions():
    captions = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)[[0, 1, 0, 2]]
    same = torch.tensor([0, 1, 0, 2])
    right = semore_sac.caption_loss(captions, captions, same)
    wrong = semore_sac.caption_loss(captions[[1, 0, 1, 3]], captions, same)
    assert right < wrong
    # the two equal captions cannot be told apart: that they share the probability costs them nothing extra
    assert right < 0.6


def test_with_every_extra_off_semore_is_its_twin_bit_for_bit(tmp_path):
    off = {"semantic": False, "motion": False, "interaction": False, "reward_head": False}
    semore, twin = make_agent(semore_sac, **off), make_agent(drq_sac)
    weights = []
    for name, agent in (("semore", semore), ("twin", twin)):
        replay = make_replay(tmp_path / name, flow=False, annotate=False)
        torch.manual_seed(7)
        for number in range(6):
            agent.update(replay, number)
        observation = replay.latest()
        weights.append((agent.state_dict(), agent.act(observation), agent.act(observation, deterministic=True)))
    (a, *actions), (b, *twin_actions) = weights
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(np.array_equal(x, y) for x, y in zip(actions, twin_actions, strict=True))


@pytest.mark.parametrize(
    "off",
    [{"semantic": False}, {"motion": False}, {"interaction": False}, {"reward_head": False}, {"flow_input": False}],
)
def test_every_ablation_trains(tmp_path, off):
    agent, replay = make_agent(semore_sac, pretrain_updates=2, **off), make_replay(tmp_path)
    metrics = agent.update(replay, 0) | agent.update(replay, 1)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert ("map_loss" in metrics) == off.get("semantic", True)
    assert ("motion_loss" in metrics) == off.get("motion", True)
    assert ("reward_loss" in metrics) == off.get("reward_head", True)


@pytest.mark.parametrize("module", [drq_sac, semore_sac])
def test_random_shift_is_the_crop_of_the_padded_image_and_takes_every_offset(module):
    frames = torch.randint(0, 256, (81, 3, 12, 12, 2), dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(-4, 5), torch.arange(-4, 5))
    shifted = module.random_shift(frames, offsets)
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    for i, (y, x) in enumerate(offsets.tolist()):
        crop = padded[i, :, 4 + y : 16 + y, 4 + x : 16 + x]
        assert np.array_equal(shifted[i].numpy(), crop.transpose(0, 3, 1, 2).reshape(6, 12, 12))
    assert torch.equal(module.random_shift(frames, offsets * 0), module.stack_channels(frames))


def test_all_offsets_are_drawn_and_flow_moves_with_its_frames(tmp_path, monkeypatch):
    seen = []
    original = semore_sac.random_shift
    monkeypatch.setattr(semore_sac, "random_shift", lambda x, o: (seen.append(o), original(x, o))[1])
    agent, replay = make_agent(semore_sac), make_replay(tmp_path)
    for _ in range(80):
        agent.augment(replay.sample(8))
    for first in range(0, len(seen), 4):
        rgb, flow, next_rgb, next_flow = seen[first : first + 4]
        assert torch.equal(rgb, flow)
        assert torch.equal(next_rgb, next_flow)
    drawn = {tuple(offset) for offsets in seen for offset in offsets.tolist()}
    assert drawn == {(y, x) for y in range(-4, 5) for x in range(-4, 5)}


def test_log_probability_is_that_of_the_squashed_gaussian():
    torch.manual_seed(0)
    actor = drq_sac.Actor(5, ACTIONS, 16)
    z = torch.randn(4, 5)
    torch.manual_seed(1)
    action, log_prob = actor(z)
    mean, log_std = actor.trunk(z).chunk(2, -1)
    normal = torch.distributions.Normal(mean, (-10 + 6 * (torch.tanh(log_std) + 1)).exp())
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
    assert torch.allclose(log_prob, squashed.log_prob(action).sum(-1), atol=1e-3)
