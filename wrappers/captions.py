"""Captions as observations: what an annotator says about every N-th frame."""

import copy
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.backends.annotation import MAX_CAPTION_LENGTH, PRINTABLE, Annotation, Annotator
from wrappers.errors import UserError


class CaptionObservation(gym.Wrapper, RecordConstructorArgs):
    """Adds what an annotator says about every N-th frame to a Dict observation that has `rgb`.

    Observation, from the newest annotation of the running episode (G and d are the annotator's):

    - `caption_embedding`: float32 (d,), unit norm; zeros before the first annotation.
    - `relevance`: float32 (G, G) in 0-1, how much each patch matters for the task; zeros before the first.
    - `caption_age`: int32 (1,), agent steps since the annotated frame; -1 before the first.
    - `caption`: with `text=True`, at most 256 printable ASCII characters; "" before the first.

    Info:

    - `frame_step`: agent steps since the first frame of the episode, which is 0.
    - `annotations`: tuple of the annotations finished at this step.
    - `annotation_ages`: for each of them, how many frames ago this wrapper gave out the frame that it is about.
    - `caption`: the newest caption of the episode.

    Args:
        env: an environment with a Dict observation that has `rgb`, as `PixelObservation` gives.
        annotator: "simulator" (MuJoCo only, exact and privileged) or an `Annotator`.
        every: the first frame of each episode is annotated, then every such agent step.
        text: puts the caption into the observation.
        mode: "sync": `reset` and `step` return when the annotation is done, so that results are deterministic.

    Raises:
        UserError: if an argument is not as said above, or the annotator cannot work with this environment.

    Example:
        >>> import gymnasium as gym
        >>> from wrappers import CaptionObservation, PixelObservation
        >>> env = PixelObservation(gym.make("shimmy:dm_control/cartpole-balance-v0"), size=64)
        >>> env = CaptionObservation(env, annotator="simulator", every=4)
        >>> observation, info = env.reset(seed=0)
        >>> info["caption"]
        'the cart is in the centre; the pole points straight up; the cart is still; the pole is not turning'
        >>> [(thing.name, thing.relevance) for thing in info["annotations"][0].objects]
        [('pole', 1.0), ('cart', 0.8)]
        >>> observation["relevance"].shape, observation["caption_age"]
        ((8, 8), array([0], dtype=int32))
    """

    def __init__(
        self,
        env: gym.Env,
        annotator: Literal["simulator"] | Annotator = "simulator",
        every: int = 8,
        text: bool = False,
        mode: Literal["sync"] = "sync",
    ):
        RecordConstructorArgs.__init__(self, annotator=annotator, every=every, text=text, mode=mode)
        gym.Wrapper.__init__(self, env)
        if not isinstance(env.observation_space, spaces.Dict) or "rgb" not in env.observation_space.spaces:
            raise UserError(
                f"CaptionObservation needs a Dict observation with 'rgb', got {env.observation_space}; "
                "wrap the env in PixelObservation first"
            )
        if not isinstance(every, int) or every < 1:
            raise UserError(f"every must be a number of agent steps, at least 1, got {every!r}")
        if mode != "sync":
            raise UserError(f"unknown mode {mode!r}: expected 'sync'")
        self.every, self.text = every, text
        self.annotator = _make_annotator(annotator)
        if hasattr(self.annotator, "attach"):
            self.annotator.attach(env)
        dim, grid = self.annotator.embedding_dim, self.annotator.grid
        added: dict[str, spaces.Space] = {
            "caption_embedding": spaces.Box(-1, 1, (dim,), np.float32),
            "relevance": spaces.Box(0, 1, (grid, grid), np.float32),
            "caption_age": spaces.Box(-1, np.iinfo(np.int32).max, (1,), np.int32),
        }
        if text:
            added["caption"] = spaces.Text(MAX_CAPTION_LENGTH, min_length=0, charset=PRINTABLE)
        self.observation_space = spaces.Dict({**env.observation_space.spaces, **added})
        self._frame_step = 0
        self._newest: Annotation | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Resets the environment and annotates the first frame."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._frame_step, self._newest = 0, None
        return self._add_annotation(observation, info)

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Steps the environment and annotates the frame if it is its turn."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._frame_step += 1
        observation, info = self._add_annotation(observation, info)
        return observation, reward, terminated, truncated, info

    def _add_annotation(
        self, observation: dict[str, Any], info: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        finished: list[Annotation] = []
        if self._frame_step % self.every == 0:
            finished = self.annotator.annotate([observation["rgb"]], [self._frame_step])
        if finished:
            self._newest = finished[-1]
        added = self._describe(self._newest)
        caption = added.pop("caption")
        if self.text:
            added["caption"] = caption
        notes = {
            "frame_step": self._frame_step,
            "annotations": tuple(finished),
            "annotation_ages": tuple(self._frame_step - annotation.frame_step for annotation in finished),
            "caption": caption,
        }
        return {**observation, **added}, {**info, **notes}

    def _describe(self, newest: Annotation | None) -> dict[str, Any]:
        if newest is None:
            embedding, relevance = self.observation_space["caption_embedding"], self.observation_space["relevance"]
            return {
                "caption_embedding": np.zeros(embedding.shape, np.float32),
                "relevance": np.zeros(relevance.shape, np.float32),
                "caption_age": np.array([-1], np.int32),
                "caption": "",
            }
        return {
            "caption_embedding": newest.caption_embedding.copy(),
            "relevance": newest.relevance.copy(),
            "caption_age": np.array([self._frame_step - newest.frame_step], np.int32),
            "caption": newest.caption,
        }


def _make_annotator(annotator: Literal["simulator"] | Annotator) -> Annotator:
    if isinstance(annotator, str) and annotator == "simulator":
        from wrappers.backends.simulator import SimulatorAnnotator

        return SimulatorAnnotator()
    if not isinstance(annotator, Annotator):
        raise UserError(f"unknown annotator {annotator!r}: expected 'simulator' or an object that is an Annotator")
    # `env.spec` may build several environments from one annotator: what it is attached to must not be shared.
    return copy.copy(annotator)
