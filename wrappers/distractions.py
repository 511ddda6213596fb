"""Visual distractions that leave an environment's dynamics alone."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, NamedTuple, SupportsFloat, get_args

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from wrappers.backends.textures import SPLITS, Split
from wrappers.backends.visuals import Visuals
from wrappers.errors import UserError

Kind = Literal["background", "colour", "camera", "light", "all"]

DISTRACTIONS: tuple[str, ...] = get_args(Kind)
DIFFICULTIES = {"easy": 1 / 3, "medium": 2 / 3, "hard": 1.0}
"""shares of the ranges that hard ones have"""


class Setting(NamedTuple):
    """What a distraction's name says: `background-hard`, `colour-easy-static`, `camera-0.5`."""

    kind: str
    difficulty: float
    dynamic: bool


def parse_distraction(spec: str) -> Setting | None:
    """What `<kind>-<difficulty>` or `<kind>-<difficulty>-static` means; None for "none".

    A difficulty is easy, medium, hard, or a number from 0 (nothing changes) to 1 (hard). Raises `UserError` with the
    nearest name for one that there is not.
    """
    if spec == "none":
        return None
    match = re.fullmatch(r"(\w+)-([a-z]+|[\d.]+)(-static)?", spec)
    if match and match[1] in DISTRACTIONS and (difficulty := _share(match[2])) is not None:
        return Setting(match[1], difficulty, dynamic=match[3] is None)
    known = [f"{kind}-{difficulty}{static}" for kind in DISTRACTIONS for difficulty in DIFFICULTIES for static in _ENDS]
    nearest = difflib.get_close_matches(spec, ["none", *known], n=3)
    raise UserError(
        f"unknown distraction {spec!r}; "
        + (f"the nearest are {', '.join(nearest)}; " if nearest else "")
        + f"expected none or <kind>-<difficulty>[-static], of the kinds {', '.join(DISTRACTIONS)} and the difficulties "
        f"{', '.join(DIFFICULTIES)}, or a number from 0 to 1"
    )


_ENDS = ("", "-static")


def check_distraction(spec: str) -> None:
    """Raises `UserError` for the name of a distraction that there is not."""
    parse_distraction(spec)


def _share(difficulty: str | float) -> float | None:
    """A difficulty as a share of hard's ranges; None if it is none."""
    if difficulty in DIFFICULTIES:
        return DIFFICULTIES[str(difficulty)]
    try:
        share = float(difficulty)
    except ValueError:
        return None
    return share if 0.0 <= share <= 1.0 else None


class Distraction(gym.Wrapper, RecordConstructorArgs):
    """Changes how an environment looks, not what happens in it; it belongs below `PixelObservation`.

    `kind` is one of `DISTRACTIONS`. `difficulty` is hard, whose ranges are given here; medium or easy, two thirds and a
    third of them; or another share from 0, which changes no pixel, to 1. In the manner of the Distracting Control Suite
    (arXiv 2101.02722), whose camera ranges these are, and of DMC-GB (arXiv 2011.13389):

    - background: one of 60 moving pictures (medium 15, easy 4) in place of the sky. Hard ones cover floor, walls and
      tables as well, medium ones half of these, easy ones nothing of them.
    - colour: red, green and blue of each material, of shapes without one, and of each texture (for the episode) are
      shifted by up to 0.6 of 0-1, in a texture as far as its pattern stays visible.
    - camera: up to 27° to each side, 27° up (or down, but not below the floor) and 27° rolled, around the point that it
      looks at; 15% nearer to 45% farther away, or farther where things would leave the picture otherwise.
    - light: up to 60% brighter or darker, each channel 30% more or less, and 45° from where it came from.
    - all: these four at once.

    What is drawn is uniform in these ranges and then, if `dynamic`, goes to and fro with each step of this wrapper, so
    put it above `ActionRepeat`: 75 to 150 from end to end; backdrops drift by up to 2.5% of their width a step.

    The looks of an episode follow from `seed`, `split` and the seed of `reset` (without one: that of the last, and how
    many resets came since), and nothing of the dynamics from them. `split` "test" has seeds and families of textures
    that "train" never shows. `folder` has videos or pictures to use instead: see `wrappers.backends.backdrops.Footage`.

    Every renderer that finds the environment's simulation draws all this, annotators' and true flow's included. Without
    a simulation, or where the environment draws by itself, a stand-in changes pixels: contrast and lightness of each
    channel for colour, a picture laid over everything, half transparent at hard, for background. Raises `UserError` for
    what there is not; `PixelObservation` does for camera and light without a simulation.

    >>> from wrappers import PixelObservation
    >>> env = Distraction(gym.make("CartPole-v1", render_mode="rgb_array"), "background", "hard", seed=1)
    >>> observation, _ = PixelObservation(env, size=64).reset(seed=0)
    >>> observation["rgb"].shape
    (64, 64, 3)
    """

    def __init__(
        self,
        env: gym.Env,
        kind: str,
        difficulty: str | float = "medium",
        seed: int = 0,
        dynamic: bool = True,
        split: Split = "train",
        folder: str | None = None,
    ) -> None:
        settings = {"seed": seed, "dynamic": dynamic, "split": split, "folder": folder}
        RecordConstructorArgs.__init__(self, kind=kind, difficulty=difficulty, **settings)
        super().__init__(env)
        if kind not in DISTRACTIONS:
            check_distraction(kind)
        if (share := _share(difficulty)) is None:
            check_distraction(f"{kind}-{difficulty}")
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r} of distractions: expected 'train' or 'test'")
        if seed < 0:
            raise UserError(f"the seed of a distraction must not be negative, got {seed}")
        kinds = set(DISTRACTIONS) - {"all"} if kind == "all" else {kind}
        self.visuals = Visuals(frozenset(kinds), share, seed, dynamic, split, folder)
        self._episode = [0, 0]  # the seed that was last given to `reset`, and how many resets without one came since

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draws what the next episode looks like, from the seed if there is one."""
        self._episode = [self._episode[0], self._episode[1] + 1] if seed is None else [seed, 0]
        self.visuals.begin(self._episode)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        self.visuals.advance()
        return self.env.step(action)
