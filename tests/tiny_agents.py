"""Agents on small images, what they learn from, and what is asked of several of them."""

import numpy as np
import torch
from gymnasium import spaces

from agents import semore_sac
from semore_bench.replay import Replay
from semore_bench.things import MOTION, STATIC, THINGS
from semore_bench.transitions import Step
from wrappers.backends.annotation import Annotation, SceneObject
from wrappers.flow import encode_flow

SIZE, GRID, DIM, ACTIONS = 48, 4, 16, 2
CPU = torch.device("cpu")


def make_replay(
    path, flow=True, annotate=True, steps=60, seed=3, features=0, stack=3, store=None, actions=None
) -> Replay:
    """Episodes of seven noisy frames with a red square, every other one annotated, from a generator of their own.

    `actions`: how many discrete ones there are; None for vectors.
    """
    rng = np.random.default_rng(seed)
    space = {"rgb": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)}
    if flow:
        space["flow"] = spaces.Box(1, 255, (SIZE, SIZE, 2), np.uint8)
    notes = {"annotate_every": 2, "grid": GRID, "embedding_dim": DIM} if annotate or store else {}
    notes |= {"features": features, "frame_stack": stack}
    replay = Replay(path, spaces.Dict(space), None if actions else ACTIONS, capacity=100, seed=5, **notes)

    def frame(number):
        observation = {"rgb": rng.integers(0, 100, (SIZE, SIZE, 3), dtype=np.uint8)}
        cell, y, x = SIZE // GRID, number % GRID, number // GRID % GRID
        observation["rgb"][cell * y : cell * (y + 1), cell * x : cell * (x + 1), 0] = 255
        motion = rng.uniform(-8, 8, (SIZE, SIZE, 2)).astype(np.float32)
        note = random_annotation(rng, number)
        if flow:
            observation["flow"] = encode_flow(motion, 8.0)
        return observation, {"annotations": (note,), "annotation_ages": (0,)} if annotate and number % 2 == 0 else {}

    number = 0
    replay.begin(0, *frame(number))
    for step in range(1, steps):
        number += 1
        observation, info = frame(number)
        action = rng.integers(actions) if actions else rng.uniform(-1, 1, ACTIONS).astype(np.float32)
        reward = float(rng.normal())
        following = None
        if ended := step % 7 == 0:
            number += 1
            following = frame(number)
        replay.add([Step(action, reward, False, ended, observation, info, following)])
    return replay


def random_annotation(rng, number) -> Annotation:
    """The red square of `make_replay`'s frames is the ball; floor and sky share the rest."""
    probabilities = np.zeros((3, GRID, GRID), np.float32)
    y, x = number % GRID, number // GRID % GRID
    probabilities[0, y, x] = 1
    probabilities[1:] = 0.5 * (1 - probabilities[0])
    embeddings = np.eye(DIM, dtype=np.float32)[:3]
    return Annotation(
        caption=f"a ball {number % 5}",
        objects=(SceneObject("ball", 0.8),),
        caption_embedding=embeddings[0],
        class_names=("ball", "floor", "sky"),
        class_embeddings=embeddings,
        patch_probabilities=probabilities,
        relevance=0.8 * probabilities[0],
        frame_step=number,
        source="test",
    )


def make_agent(module, **kwargs):
    if module is semore_sac:
        kwargs = {"grounder_updates": 3, "grounder_batch": 4, **kwargs}
    args = module.Args(image_size=SIZE, batch_size=8, **kwargs)
    args.resolve()
    torch.manual_seed(0)
    return module.Agent(ACTIONS, args, CPU)


def agent_features() -> int:
    return THINGS * (STATIC + MOTION)


def make_semore(path, **kwargs):
    """An agent whose grounder had its first round, and its replay."""
    agent, replay = make_agent(semore_sac, **kwargs), make_replay(path, features=agent_features())
    replay.describe = agent.describe
    agent.ground(replay, 0)
    return agent, replay


def receivers(agent, loss) -> set[str]:
    """Names of the parts that a loss sends a gradient other than zero to."""
    agent.zero_grad()
    loss.backward()
    return {
        name.split(".")[0]
        for name, parameter in agent.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }


def assert_random_shift_is_a_crop_of_the_padded_image(module):
    """Of every offset, by comparison with NumPy."""
    frames = torch.randint(0, 256, (81, 3, 12, 12, 2), dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(-4, 5), torch.arange(-4, 5))
    shifted = module.random_shift(frames, offsets)
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    for i, (y, x) in enumerate(offsets.tolist()):
        crop = padded[i, :, 4 + y : 16 + y, 4 + x : 16 + x]
        assert np.array_equal(shifted[i].numpy(), crop.transpose(0, 3, 1, 2).reshape(6, 12, 12))
    assert torch.equal(module.random_shift(frames, offsets * 0), module.stack_channels(frames))
