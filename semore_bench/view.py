"""`semore-bench view`: what an agent would see in an environment, as a video or an image strip."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from semore_bench.envs import EnvConfig, make_env
from semore_bench.smooth_actions import smooth_action
from semore_bench.strips import distraction_strip, save_strip
from semore_bench.videos import compose_frame, write_video
from wrappers.backends.annotators import check_annotator
from wrappers.distractions import check_distraction
from wrappers.errors import UserError

STRIP_MOMENTS = 6
EVERY = "all"
"""as `--distraction`: every kind and difficulty, side by side"""


def view(
    env_id: str,
    output: Path = Path("view.mp4"),
    steps: int = 200,
    seed: int = 0,
    image_size: int = EnvConfig.image_size,
    action_repeat: int = EnvConfig.action_repeat,
    pixel_source: Literal["observation", "render"] | None = None,
    pixel_key: str | None = None,
    flow: Literal["dis", "farneback", "simulator", "none"] = "dis",
    annotator: str = "none",
    annotate_every: int = EnvConfig.annotate_every,
    task_description: str = "",
    clip: str | None = None,
    distraction: str = "none",
    distraction_folder: str | None = None,
    fps: float = 25,
) -> None:
    """Record the wrapped observations of an environment under smooth random actions.

    Args:
        env_id: An environment id; `semore-bench list envs` shows them.
        output: A video (.mp4), or a strip of a few moments (.png).
        steps: Agent steps to show.
        seed: Seeds episodes and actions.
        image_size: Height and width of the observation in pixels.
        action_repeat: Simulator steps per agent step.
        pixel_source: Source of the pixels, see an agent's `--help`.
        pixel_key: Key of the image in a Dict observation that has several.
        flow: Optical flow estimator.
        annotator: Annotator of frames: none, simulator, embedded, embedded:<folder>, transformers:<model or folder> or
            openai:<base url>#<model>.
        annotate_every: Agent steps between annotated frames.
        task_description: Description of the task in a sentence, for a vision-language model's prompt.
        clip: CLIP that locates objects, see an agent's `--help`.
        distraction: How pictures are changed, see an agent's `--help`; all makes a strip of every kind and difficulty.
        distraction_folder: Folder with videos or pictures for backgrounds.
        fps: Frames per second of the video, in agent steps.
    """
    if output.suffix.lower() not in (".mp4", ".png"):
        raise UserError(f"cannot write {output}: expected a name that ends in .mp4 or .png")
    numbers = {"image-size": image_size, "action-repeat": action_repeat, "annotate-every": annotate_every}
    for flag, value in ({"steps": steps} | numbers).items():
        if value < 1:
            raise UserError(f"--{flag} must be at least 1, got {value}")
    if not 0 < fps <= 1000:
        raise UserError(f"--fps must be more than 0 and at most 1000, got {fps}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    check_annotator(annotator)
    if distraction == EVERY and output.suffix.lower() != ".png":
        raise UserError(f"--distraction {EVERY} makes a strip: give --output a name that ends in .png, not {output}")
    if distraction != EVERY:
        check_distraction(distraction)
    config = EnvConfig(
        image_size=image_size,
        action_repeat=action_repeat,
        pixel_source=pixel_source,
        pixel_key=pixel_key,
        flow=None if flow == "none" else flow,
        annotator=annotator,
        annotate_every=annotate_every,
        task_description=task_description,
        clip=clip,
        distraction_folder=distraction_folder,
    )
    console = Console(highlight=False, soft_wrap=True)
    if distraction == EVERY:
        save_strip(distraction_strip(env_id, config, steps, seed), output)
        console.print(f"every distraction of {escape(env_id)} after {steps} agent steps: {escape(str(output))}")
        return
    env = make_env(env_id, replace(config, distraction=distraction))
    try:
        for key, space in env.observation_space.items():
            console.print(f"{key:18} {escape(str(space.dtype))} {space.shape}")
        pictures = moments(env, env_id, seed, vertical=output.suffix.lower() == ".png")
        if output.suffix.lower() == ".mp4":
            write_video(output, islice(pictures, steps), fps)
        else:
            every = max(1, steps // STRIP_MOMENTS)
            strip = np.hstack(list(islice(pictures, every - 1, steps, every))[:STRIP_MOMENTS])
            output.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(strip).save(output)
    finally:
        env.close()
    console.print(f"{steps} agent steps of {escape(env_id)}: {escape(str(output))}")


def moments(env: gym.Env, env_id: str, seed: int, vertical: bool = False) -> Iterator[np.ndarray]:
    """Composed pictures of what is seen, for ever; where an episode ends the next one begins."""
    random = np.random.default_rng(seed)
    env.action_space.seed(seed)
    flow_space = env.observation_space.spaces.get("flow")
    flow_bound = 8.0 if flow_space is None else float(flow_space.high.max())
    action, episode = None, 0
    while True:
        env.reset(seed=seed + episode)
        episode_return, ended = 0.0, False
        while not ended:
            action = smooth_action(env.action_space, action, random)
            observation, reward, terminated, truncated, info = env.step(action)
            episode_return, ended = episode_return + float(reward), terminated or truncated
            footer = f"env step {info['env_step']} · return {episode_return:.1f}"
            yield compose_frame(
                observation["rgb"],
                observation.get("flow"),
                observation.get("relevance"),
                info.get("caption"),
                flow_bound=flow_bound / 2,  # most motion is far from the bound; drawn so, it is seen better
                size=192 if vertical else 256,
                footer=footer if vertical else f"{env_id} · {footer}",
                vertical=vertical,
            )
        episode += 1
