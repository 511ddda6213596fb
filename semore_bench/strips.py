"""A strip of every distraction at every difficulty, for the eye."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from semore_bench.envs import EnvConfig, make_env
from semore_bench.smooth_actions import smooth_action
from semore_bench.videos import BACKGROUND, FAINT, GAP, TITLE_HEIGHT, TITLE_SIZE, font
from wrappers.backends.visuals import IN_PIXELS
from wrappers.distractions import DIFFICULTIES, DISTRACTIONS
from wrappers.errors import UserError

COLOURS = 256
"""in the file: pictures of textures do not shrink otherwise"""


def distraction_strip(env_id: str, config: EnvConfig, steps: int, seed: int) -> Image.Image:
    """The last of so many steps of one episode: a row per kind, clean and then from easy to hard.

    Kinds that an environment cannot have, for want of a simulation, are left out.
    """
    columns = {"clean": "0"} | {name: name for name in DIFFICULTIES}
    rows: dict[str, list[np.ndarray]] = {}
    for kind in DISTRACTIONS:
        try:
            specs = [f"{kind}-{difficulty}" for difficulty in columns.values()]
            rows[kind] = [_picture(env_id, replace(config, distraction=spec), steps, seed) for spec in specs]
        except UserError:
            if kind in (*IN_PIXELS, "all"):
                raise
    height, width = next(iter(rows.values()))[0].shape[:2]
    left, text = TITLE_SIZE * 6, font(TITLE_SIZE)
    size = left + len(columns) * (width + GAP), TITLE_HEIGHT + len(rows) * (height + GAP)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * (width + GAP), TITLE_HEIGHT // 2), name, FAINT, text, anchor="lm")
    for row, (kind, pictures) in enumerate(rows.items()):
        top = TITLE_HEIGHT + row * (height + GAP)
        draw.text((GAP, top + height // 2), kind, FAINT, text, anchor="lm")
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (left + column * (width + GAP), top))
    return canvas


def save_strip(strip: Image.Image, output: Path) -> None:
    """Writes a strip as a small PNG file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    strip.quantize(COLOURS, method=Image.Quantize.FASTOCTREE).save(output, optimize=True)


def _picture(env_id: str, config: EnvConfig, steps: int, seed: int) -> np.ndarray:
    random, action = np.random.default_rng(seed), None
    with make_env(env_id, replace(config, flow=None, annotator="none")) as env:
        env.action_space.seed(seed)
        observation, _ = env.reset(seed=seed)
        for _ in range(steps):
            action = smooth_action(env.action_space, action, random)
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
        return observation["rgb"]
