"""Semore and its twin: who receives which gradient, when the grounder is trained on what, what the extras change."""

import numpy as np
import pytest
import torch

from agents import drq_sac, semore_sac
from semore_bench.grounder import grounding_loss
from semore_bench.things import MOTION, STATIC, THINGS
from tests.tiny_agents import (
    ACTIONS,
    GRID,
    SIZE,
    agent_features,
    assert_random_shift_is_a_crop_of_the_padded_image,
    make_agent,
    make_replay,
    make_semore,
    random_annotation,
    receivers,
)
from wrappers.errors import UserError
from wrappers.flow import relative_flow


@pytest.mark.parametrize("pixels", [False, True])
def test_gradient_routing_is_the_table_of_the_method(tmp_path, pixels):
    """Class maps teach the grounder alone, critic, reward and dynamics never do; flow is measured, not learned."""
    agent, replay = make_semore(tmp_path, pixels=pixels, heads=pixels)
    batch = replay.sample_annotated(4)
    target, named = agent.vocabulary.targets(batch, agent.vocabulary.places(replay.named()[0], replay.names))
    loss = grounding_loss(
        agent.grounder(batch.rgb), torch.from_numpy(target), torch.from_numpy(named), torch.ones(THINGS + 1)
    )
    assert receivers(agent, loss) == {"grounder"}

    loss, z, _ = agent.critic_loss(*agent.augment(replay.sample(8)))
    beside = {"encoder", "project", "heads"} if pixels else set()
    assert receivers(agent, loss) == {"critic"} | beside

    before = {name: value.clone() for name, value in agent.named_parameters()}
    agent.zero_grad()
    agent.optimize("actor", agent.actor_loss(z.detach())[0])
    assert {name.split(".")[0] for name, value in agent.named_parameters() if not torch.equal(value, before[name])} == {
        "actor"
    }
    grounder = {name: value.clone() for name, value in agent.grounder.state_dict().items()}
    agent.learn(replay, 0)
    assert all(torch.equal(value, grounder[name]) for name, value in agent.grounder.state_dict().items())


def test_the_grounder_learns_in_bouts_in_the_first_half_and_numbers_stand_still_between(tmp_path):
    agent, replay = make_semore(tmp_path, ground_every=4, total_env_steps=240, random_steps=0)  # of 60 decisions
    moved = []
    for number in range(62):
        before = {name: value.clone() for name, value in agent.grounder.state_dict().items()}
        stored = replay.latest()["features"].copy()
        agent.update(replay, number)
        if not all(torch.equal(value, before[name]) for name, value in agent.grounder.state_dict().items()):
            moved.append(number)
            assert not np.array_equal(stored, replay.latest()["features"]), "numbers of a grounder that is gone"
        else:
            assert np.array_equal(stored, replay.latest()["features"])
    assert moved == [4, 12, 28]
    still, _ = make_semore(tmp_path / "still", ground_every=0)
    metrics = [still.update(replay, number) for number in range(12)]
    assert not any("grounder_loss" in row for row in metrics)


@pytest.mark.parametrize("motion", [True, False])
def test_stored_numbers_equal_fresh_ones_and_those_of_an_evaluation(tmp_path, motion):
    agent, replay = make_semore(tmp_path, motion=motion)
    agent.ground(replay, agent.args.ground_every)  # a second round
    observation = replay.latest()
    if not motion:
        replay.describe = lambda rgb, flow: agent.describe(rgb, None)
        replay.redescribe()
        observation = {name: value for name, value in replay.latest().items() if name != "flow"}
    stored = observation.pop("features")
    fresh = agent.features_of(observation).reshape(1, 3, THINGS, -1)
    stored = stored.reshape(1, 3, THINGS, -1)
    assert np.allclose(fresh[..., :STATIC], stored[..., :STATIC], atol=1e-4)
    assert np.allclose(fresh[:, 1:], stored[:, 1:], atol=1e-4)  # the oldest frame's motion is not looked at
    assert stored[..., STATIC:].any() == motion
    assert stored[:, :, 0, :STATIC].any()
    assert not stored[:, :, 1:].any(), "numbers of a thing without a name"
    same = agent.act({**observation, "features": stored.reshape(1, 3, -1)}, deterministic=True)
    assert np.allclose(agent.act(observation, deterministic=True), same, atol=1e-4)


def test_without_interaction_flow_is_pooled_over_the_image(tmp_path):
    agent, replay = make_semore(tmp_path, interaction=False)
    stacks = replay.feature_stacks().reshape(-1, THINGS, STATIC + MOTION)
    flow = relative_flow(replay._arrays["flow"][: replay._newest[0] + 1].astype(float))
    assert np.allclose(np.unique(stacks[:, 0, STATIC]), np.unique(4 * flow.mean((1, 2))[:, 0]), atol=1e-3)


@pytest.mark.parametrize("late", [0, 20])
def test_until_there_are_names_the_agent_sees_pixels_and_then_it_learns_anew(tmp_path, late):
    agent = make_agent(semore_sac, grounder_frames=16)
    replay = make_replay(tmp_path, annotate=False, store=True, features=agent_features())
    replay.describe = agent.describe
    for number in range(late):
        agent.update(replay, number)
        assert agent.sees_pixels
        assert not agent.sees_things
    before = {name: value.clone() for name, value in agent.critic.state_dict().items()}
    rng = np.random.default_rng(0)
    for age in range(16):
        assert replay.attach(0, random_annotation(rng, age), age)
    metrics = agent.update(replay, late)
    assert agent.vocabulary.names == ("ball",)
    assert not agent.sees_pixels
    assert metrics["things"] == 1
    assert replay.latest()["features"].any()
    assert not all(torch.equal(value, before[name]) for name, value in agent.critic.state_dict().items())
    learned = agent.optimizers["critic"].state[next(agent.critic.parameters())]["step"].item()
    assert learned == late + 1, "what was learned from pixels is caught up with"


def test_where_nothing_matters_it_stays_with_pixels_and_says_so_once(tmp_path, capsys):
    agent, replay = make_agent(semore_sac), make_replay(tmp_path, features=agent_features())
    replay.describe = agent.describe
    replay._arrays["importance"][:] = 0  # a scene that the annotator does not know
    for number in range(25):
        agent.update(replay, number)
    assert agent.sees_pixels
    said = capsys.readouterr().err
    assert said.count("no annotation names what matters so far: seeing pixels, as drq_sac does") == 1
    assert len(said.splitlines()) == 1


def test_unnamed_things_count_as_background_whichever_the_grounder_says():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, 4)
    target = torch.zeros(1, 3, 2, 2)
    target[:, 0, 0, 0], target[:, 2] = 0.5, 1 - target[:, 0]
    named, weight = torch.tensor([[True, False]]), torch.tensor([2.0, 1.0, 0.5])
    share = torch.nn.functional.avg_pool2d(logits.softmax(1), 2)
    want = -(2 * target[:, 0] * (share[:, 0] + 1e-6).log() + 0.5 * target[:, 2] * (1 - share[:, 0] + 1e-6).log()).mean()
    assert torch.allclose(grounding_loss(logits, target, named, weight), want, atol=1e-4)


def test_the_grounder_learns_to_find_what_was_named(tmp_path):
    agent, replay = make_semore(tmp_path, grounder_updates=150, grounder_batch=16)
    batch = replay.sample_annotated(32)
    maps = torch.nn.functional.adaptive_avg_pool2d(
        agent.grounder.maps(batch.rgb, agent.vocabulary)[:, :1], GRID
    ).numpy()
    true = batch.patch_probabilities[:, :1]
    assert np.minimum(maps, true).sum() / np.maximum(maps, true).sum() > 0.6


def test_with_every_extra_off_semore_is_its_twin_bit_for_bit(tmp_path, capsys):
    weights = []
    twins = (
        ("semore", semore_sac, {"annotator": "none"}),
        ("off", semore_sac, {"semantic": False}),
        ("twin", drq_sac, {}),
    )
    for name, module, flags in twins:
        agent, replay = make_agent(module, **flags), make_replay(tmp_path / name, flow=False, annotate=False)
        torch.manual_seed(7)
        for number in range(6):
            agent.update(replay, number)
        observation = replay.latest()
        weights.append((agent.state_dict(), agent.act(observation), agent.act(observation, deterministic=True)))
    *others, (twin, *twin_actions) = weights
    for state, *actions in others:
        assert state.keys() == twin.keys()
        assert all(torch.equal(state[key], twin[key]) for key in twin)
        assert all(np.array_equal(x, y) for x, y in zip(actions, twin_actions, strict=True))
    assert "nothing is named, so this is DrQ-SAC" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [{"motion": False}, {"interaction": False}, {"pixels": True}, {"pixels": True, "heads": True}, {"frame_stack": 2}],
)
def test_every_ablation_trains(tmp_path, flags):
    agent = make_agent(semore_sac, **flags)
    stack = agent.args.frame_stack
    replay = make_replay(tmp_path, flow=agent.args.motion, features=agent_features(), stack=stack)
    replay.describe = agent.describe
    metrics = agent.update(replay, 0) | agent.update(replay, 1)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert ("heads_loss" in metrics) == flags.get("heads", False)
    assert agent.sees_pixels == flags.get("pixels", False)
    assert agent.act(replay.latest()).shape == (1, ACTIONS)


def test_what_an_agent_explains_has_names_and_maps(tmp_path):
    agent, replay = make_semore(tmp_path)
    ((name, maps),) = agent.explain(replay.latest())
    assert name == "ball"
    assert maps.shape == (SIZE // 2, SIZE // 2)
    assert make_agent(semore_sac).explain(replay.latest()) == []  # there are no names yet


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"heads": True}, "add --pixels"),
        ({"frame_stack": 1}, "--frame-stack 2"),
        ({"grounder_updates": 0}, "--grounder-updates must be at least 1"),
        ({"ground_every": -1}, "--ground-every"),
        ({"noise_floor": 0.0}, "--noise-floor must be above 0"),
        ({"true_maps": True, "interaction": False}, "leave --no-"),
        ({"true_maps": True, "semantic": False}, "leave --no-"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        semore_sac.Args(**flags).resolve()


def test_true_maps_have_less_noise_and_any_floor_can_be_set():
    for flags, floor in (({}, 0.03), ({"true_maps": True}, 0.003), ({"true_maps": True, "noise_floor": 0.1}, 0.01)):
        agent = make_agent(semore_sac, **flags)
        assert agent.standardise.floor == pytest.approx(floor)


@pytest.mark.parametrize("module", [drq_sac, semore_sac])
def test_random_shift_is_the_crop_of_the_padded_image_and_takes_every_offset(module):
    assert_random_shift_is_a_crop_of_the_padded_image(module)


def test_all_offsets_are_drawn(tmp_path, monkeypatch):
    seen = []
    original = semore_sac.random_shift
    monkeypatch.setattr(semore_sac, "random_shift", lambda x, o: (seen.append(o), original(x, o))[1])
    agent, replay = make_agent(semore_sac, annotator="none"), make_replay(tmp_path, annotate=False)
    for _ in range(80):
        agent.augment(replay.sample(8))
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
