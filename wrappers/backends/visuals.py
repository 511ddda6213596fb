"""What a distraction makes of the looks of an environment, step by step; in pixels where there is no simulation."""

from __future__ import annotations

import cv2
import gymnasium as gym
import numpy as np

from wrappers.backends.backdrops import Backdrop, Footage, Textures
from wrappers.backends.textures import SPLITS, Split
from wrappers.errors import UserError

IN_PIXELS = frozenset(("background", "colour"))
"""kinds that can do without a simulation"""
BACKDROPS = 60
"""how many backdrops hard draws from: as many as the Distracting Control Suite has videos for training"""
GAIN, OFFSET, OVERLAY = 0.6, 0.3, 0.5
"""in pixels, at hard: how much contrast and lightness of each channel change, and how opaque the picture on top is"""

_PURPOSES = ("backdrop", "colour", "texture", "camera", "light", "gain", "offset")


class Drift:
    """Numbers that go to and fro in [-1, 1] at speeds of their own, and at any time are uniformly distributed there.

    From one end to the other takes 75 to 150 steps.
    """

    def __init__(self, random: np.random.Generator, shape: tuple[int, ...]) -> None:
        self._phase = random.uniform(0.0, 2.0, shape)
        self._speed = random.choice((-1.0, 1.0), shape) / random.uniform(75.0, 150.0, shape)

    def at(self, time: int) -> np.ndarray:
        """The numbers after so many steps."""
        return 1.0 - 2.0 * np.abs((self._phase + self._speed * time) % 2.0 - 1.0)


class Visuals:
    """The looks of one environment's present episode: which kinds of distraction, how strong, and where they stand now.

    `share` of what hard does; `kinds` without "all". Nothing here touches the environment: renderers and
    `PixelObservation` ask what to draw.
    """

    def __init__(
        self, kinds: frozenset[str], share: float, seed: int, dynamic: bool, split: Split, folder: str | None
    ) -> None:
        self.kinds, self.share = kinds if share else frozenset(), share
        self._seed, self._split, self._dynamic = seed, split, dynamic
        self._pictures = Textures(split) if folder is None else Footage(folder, split)
        self.begin([0, 0])

    def begin(self, episode: list[int]) -> None:
        """Starts an episode whose looks follow from its numbers, the distraction's seed and its split."""
        self.episode, self._time = tuple(episode), 0
        self._drifts: dict[tuple[str, tuple[int, ...]], Drift] = {}
        self._backdrop: Backdrop | None = None

    def advance(self) -> None:
        """One step later."""
        self._time += self._dynamic

    def drift(self, purpose: str, *shape: int) -> np.ndarray:
        """Numbers in [-1, 1] of a shape, for one of `_PURPOSES`, as they are at this step."""
        if (purpose, shape) not in self._drifts:
            self._drifts[purpose, shape] = Drift(self._random(purpose), shape)
        return self._drifts[purpose, shape].at(self._time)

    def fixed(self, purpose: str, *shape: int) -> np.ndarray:
        """Numbers in [-1, 1] of a shape that stay what they are for an episode."""
        return self._random(purpose).uniform(-1.0, 1.0, shape)

    def backdrop(self, height: int, width: int) -> np.ndarray:
        """The picture behind the scene at this step, uint8 (height, width, 3)."""
        if self._backdrop is None:
            random = self._random("backdrop")
            number = int(random.integers(max(1, round(BACKDROPS**self.share))))
            self._backdrop = Backdrop(self._pictures.frames(number, self._seed), random, self.share)
        return self._backdrop.at(self._time, height, width)

    def check_pixels(self, name: str) -> None:
        """Raises `UserError` if there is nothing that can be done to pixels alone."""
        if self.kinds and not self.kinds & IN_PIXELS:
            raise UserError(
                f"the distraction {' and '.join(sorted(self.kinds))} needs a MuJoCo simulation that PixelObservation "
                f"draws, and the pixels of {name} come from elsewhere; for those there are background and colour"
            )

    def on_pixels(self, picture: np.ndarray) -> np.ndarray:
        """The stand-in where no simulation is drawn: each channel's contrast and lightness, and a picture laid over.

        uint8 (H, W, 3) to the same. Nothing says what is in front here: what matters is covered as well.
        """
        if "background" in self.kinds:
            opacity = OVERLAY * self.share
            picture = cv2.addWeighted(picture, 1.0 - opacity, self.backdrop(*picture.shape[:2]), opacity, 0.0)
        if "colour" in self.kinds:
            gain = 1.0 + GAIN * self.share * self.drift("gain", 3)
            offset = 127.5 + 255.0 * OFFSET * self.share * self.drift("offset", 3)
            picture = np.clip((picture - 127.5) * gain + offset, 0.0, 255.0).astype(np.uint8)
        return picture

    def _random(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, SPLITS.index(self._split), _PURPOSES.index(purpose), *self.episode])


def find_visuals(env: gym.Env) -> Visuals | None:
    """The looks that the `Distraction` around an environment gives it; None if there is none."""
    while isinstance(env, gym.Wrapper):
        if isinstance(visuals := vars(env).get("visuals"), Visuals):
            return visuals
        env = env.env
    return None
