"""Captions as observations: what an annotator says about every N-th frame."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.backends.annotation import (
    MAX_CAPTION_LENGTH,
    PRINTABLE,
    Annotation,
    Annotator,
)
from wrappers.backends.queues import AsyncQueue, PipelinedQueue, Request, SyncQueue
from wrappers.backends.specs import is_vlm
from wrappers.errors import UserError

Mode = Literal["sync", "pipelined", "async"]


REQUESTS = {"sync": SyncQueue, "pipelined": PipelinedQueue, "async": AsyncQueue}


class CaptionObservation(gym.Wrapper, RecordConstructorArgs):
    """Adds what an annotator says about every N-th frame to a Dict observation that has `rgb`.

    Observation, from the newest annotation of the running episode (G and d are the annotator's):

    - `caption_embedding`: float32 (d,), unit norm; zeros before the first annotation.
    - `relevance`: float32 (G, G) in 0-1, how much each patch matters for the task; zeros before the first.
    - `caption_age`: int32 (1,), agent steps since the annotated frame; -1 before the first.
    - `caption`: with `text=True`, at most 256 printable ASCII characters; "" before the first.

    Info:

    - `frame_step`: agent steps since the first frame of the episode, which is 0.
    - `annotations`: tuple of the annotations finished since the last step, those of earlier episodes too.
    - `annotation_ages`: for each of them, how many frames ago this wrapper gave out the frame that it is about;
      frames are counted over the ends of episodes.
    - `caption`: the newest caption of the episode.

    Args:
        env: an environment with a Dict observation that has `rgb`, as `PixelObservation` gives.
        annotator: "simulator" (MuJoCo only, exact and privileged), "embedded", another name that `make_annotator`
            knows, or an `Annotator`.
        every: the first frame of each episode is annotated, then every such agent step.
        text: puts the caption into the observation.
        mode: "sync": `reset` and `step` return when the annotation is done, so that results are deterministic.
            "pipelined": eight frames at a time are annotated while the environment goes on, and handed over with the
            next eight, or when the episode is over; deterministic too, and it hardly ever blocks.
            "async": it never blocks, and annotations come when they are done. By default "async" for the names
            "transformers:..." and "openai:...", "sync" for everything else.
        frame_size: the annotator gets a picture of its own, drawn with this height and width in pixels, where a
            `PixelObservation` draws a MuJoCo simulation; elsewhere, and by default, it gets `rgb`.

    Raises:
        UserError: if an argument is not as said above, or the annotator cannot work with this environment.

    Example:
        >>> import gymnasium as gym
        >>> from wrappers.captions import CaptionObservation
        >>> from wrappers.pixels import PixelObservation
        >>> env = PixelObservation(gym.make("shimmy:dm_control/cartpole-balance-v0"), size=64)
        >>> env = CaptionObservation(env, annotator="simulator", every=4)
        >>> observation, info = env.reset(seed=0)
        >>> info["caption"]
        'the cart is in the centre; the pole points straight up; the cart is still; the pole is not turning'
        >>> [(thing.name, thing.relevance) for thing in info["annotations"][0].objects]
        [('pole', 1.0), ('cart', 0.8)]
        >>> observation["relevance"].shape, observation["caption_age"]
        ((16, 16), array([0], dtype=int32))
    """

    def __init__(
        self,
        env: gym.Env,
        annotator: str | Annotator = "simulator",
        every: int = 8,
        text: bool = False,
        mode: Mode | None = None,
        frame_size: int | None = None,
    ):
        # An annotator is recorded as it is: models and connections are shared, not copied.
        options = {"every": every, "text": text, "mode": mode, "frame_size": frame_size}
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, annotator=annotator, **options)
        gym.Wrapper.__init__(self, env)
        check_arguments(env.observation_space, every, mode)
        self.every, self.text = every, text
        self.mode = mode or default_mode(annotator)
        self.annotator = find_annotator(annotator)
        if hasattr(self.annotator, "attach"):
            if self.mode != "sync":
                raise UserError(f"annotator {self.annotator.source!r} sees the present alone: use mode='sync'")
            # `env.spec` may build several environments from one annotator: what it is attached to must not be shared.
            self.annotator = copy.copy(self.annotator)
            self.annotator.attach(env)
        added = annotation_spaces(self.annotator, text)
        self.observation_space = spaces.Dict({**env.observation_space.spaces, **added})
        self._requests = REQUESTS[self.mode](self.annotator)
        self._track = CaptionTrack(self.annotator, text)
        self._renderer = _own_renderer(env, frame_size)
        keep_in_array_conversion()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Resets the environment and annotates the first frame, or asks for that."""
        observation, info = self.env.reset(seed=seed, options=options)
        if isinstance(self._requests, PipelinedQueue):
            self._requests.flush()  # an episode leaves nothing behind that the next one's seed does not determine
        return self._add_annotation(observation, info, is_first=True)

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Steps the environment and annotates the frame if it is its turn, or asks for that."""
        if self._track.frame < 0:
            raise gym.error.ResetNeeded("cannot call step() before reset(): the first frame is annotated there")
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation, info = self._add_annotation(observation, info, is_first=False)
        return observation, reward, terminated, truncated, info

    def statistics(self) -> dict[str, float]:
        """Numbers since construction: those of the annotators, `annotated_share` of frames, `age_frames` on average."""
        return self._requests.statistics() | track_statistics([self._track])

    def close(self) -> None:
        """Closes the environment; annotations under way are given up."""
        self._requests.close()
        if self._renderer is not None:
            self._renderer.close()
        super().close()

    def _add_annotation(
        self, observation: dict[str, Any], info: dict[str, Any], is_first: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        track = self._track
        track.next_frame(is_first)
        if track.frame_step % self.every == 0:
            frame = observation["rgb"] if self._renderer is None else self._renderer.rgb()
            self._requests.request([Request(track.frame, frame, track.frame_step)])
        notes = track.receive(self._requests.finished())
        return {**observation, **track.observation()}, {**info, **notes}


class CaptionTrack:
    """Where one environment stands: which frame it shows, and what is known about its running episode.

    Attributes:
        frame: number of the newest frame since construction, the first is 0.
        frame_step: number of the newest frame in its episode, the first is 0.
    """

    def __init__(self, annotator: Annotator, text: bool):
        self.frame = self.frame_step = -1
        self._dim, self._grid, self._text = annotator.embedding_dim, annotator.grid, text
        self._newest: Annotation | None = None
        self._newest_frame = 0  # of the running episode; before there is one, the episode's first frame
        self.annotated, self.total_age = 0, 0

    def next_frame(self, is_first: bool) -> None:
        """Counts a frame; `is_first` in its episode."""
        self.frame += 1
        self.frame_step = 0 if is_first else self.frame_step + 1
        if is_first:
            self._newest, self._newest_frame = None, self.frame

    def receive(self, finished: Mapping[int, Annotation]) -> dict[str, Any]:
        """Takes in annotations by the frame that they are about, and returns what `info` says of them."""
        ages = tuple(self.frame - frame for frame in finished)
        for frame, annotation in finished.items():
            if frame >= self._newest_frame:
                self._newest, self._newest_frame = annotation, frame
        self.annotated += len(ages)
        self.total_age += sum(ages)
        return {
            "frame_step": self.frame_step,
            "annotations": tuple(finished.values()),
            "annotation_ages": ages,
            "caption": self._newest.caption if self._newest else "",
        }

    def observation(self) -> dict[str, Any]:
        """What is added to the observation."""
        newest = self._newest
        if newest is None:
            added = {
                "caption_embedding": np.zeros(self._dim, np.float32),
                "relevance": np.zeros((self._grid, self._grid), np.float32),
                "caption_age": np.array([-1], np.int32),
            }
        else:
            added = {
                "caption_embedding": newest.caption_embedding.copy(),
                "relevance": newest.relevance.copy(),
                "caption_age": np.array([self.frame_step - newest.frame_step], np.int32),
            }
        return {**added, "caption": newest.caption if newest else ""} if self._text else added


def annotation_spaces(annotator: Annotator, text: bool) -> dict[str, spaces.Space]:
    """The spaces of what `CaptionTrack.observation` returns."""
    dim, grid = annotator.embedding_dim, annotator.grid
    added: dict[str, spaces.Space] = {
        "caption_embedding": spaces.Box(-1, 1, (dim,), np.float32),
        "relevance": spaces.Box(0, 1, (grid, grid), np.float32),
        "caption_age": spaces.Box(-1, np.iinfo(np.int32).max, (1,), np.int32),
    }
    if text:
        added["caption"] = spaces.Text(MAX_CAPTION_LENGTH, min_length=0, charset=PRINTABLE)
    return added


def track_statistics(tracks: list[CaptionTrack]) -> dict[str, float]:
    """`annotated_share` of the frames of all tracks, and `age_frames`, how late their annotations came on average."""
    frames, annotated = sum(track.frame + 1 for track in tracks), sum(track.annotated for track in tracks)
    total_age = sum(track.total_age for track in tracks)
    return {"annotated_share": annotated / max(frames, 1), "age_frames": total_age / max(annotated, 1)}


def check_arguments(space: spaces.Space, every: int, mode: Mode | None) -> None:
    """Raises `UserError` if what both wrappers are given is not as their documentation says."""
    if not isinstance(space, spaces.Dict) or "rgb" not in space.spaces:
        raise UserError(
            f"CaptionObservation needs a Dict observation with 'rgb', got {space}; "
            "wrap the env in PixelObservation first"
        )
    if not isinstance(every, int) or every < 1:
        raise UserError(f"every must be a number of agent steps, at least 1, got {every!r}")
    if mode is not None and mode not in REQUESTS:
        raise UserError(f"unknown mode {mode!r}: expected one of {', '.join(REQUESTS)}")


def keep_in_array_conversion() -> None:
    """Lets captions and annotations in `info` pass through Gymnasium's NumpyToTorch and its kin as they are."""
    try:
        from gymnasium.wrappers.array_conversion import array_conversion
    except (ImportError, gym.error.DependencyNotInstalled):  # then these wrappers cannot be used
        return
    for kind in (str, Annotation):
        array_conversion.register(kind, _unchanged)


def _unchanged(value: Any, *_: Any, **__: Any) -> Any:
    return value


def default_mode(annotator: str | Annotator) -> Mode:
    """ "async" for names of models that are slow or far away."""
    return "async" if is_vlm(annotator) else "sync"


def find_annotator(annotator: str | Annotator) -> Annotator:
    """Makes the annotator that was named; one that exists is returned as it is."""
    found = annotator
    if isinstance(annotator, str):
        from wrappers.backends.annotators import make_annotator  # with everything about VLMs: for those who ask for one

        found = make_annotator(annotator)
    if not isinstance(found, Annotator):
        raise UserError(
            f"unknown annotator {annotator!r}: expected 'simulator', 'embedded', another name that `make_annotator` "
            "knows, or an Annotator; leave the wrapper out for no captions"
        )
    return found


def _own_renderer(env: gym.Env, size: int | None) -> Any:
    renderer = env.get_wrapper_attr("renderer") if env.has_wrapper_attr("renderer") else None
    if size is None or renderer is None:
        return None
    from wrappers.backends.mujoco import Renderer
    from wrappers.backends.simulation import find_simulation

    return Renderer(find_simulation(env), size, size, renderer.camera, renderer.quality)
