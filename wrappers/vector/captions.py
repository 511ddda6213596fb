"""Captions for vectorised environments: the frames of all sub-environments are annotated in one batch."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from wrappers.backends.annotation import Annotation, Annotator
from wrappers.backends.queues import Request
from wrappers.captions import (
    REQUESTS,
    CaptionTrack,
    Mode,
    annotation_spaces,
    check_arguments,
    default_mode,
    find_annotator,
    keep_in_array_conversion,
    track_statistics,
)
from wrappers.errors import UserError


class CaptionObservation(VectorWrapper, RecordConstructorArgs):
    """Adds what an annotator says about every N-th frame of each sub-environment: see `wrappers.CaptionObservation`.

    Observations and infos are those of the wrapper for single environments, batched as Gymnasium does. Frames that
    are due at the same time are annotated in one batch, with every autoreset mode and "reset_mask"; with SAME_STEP
    an episode's last frame is in `infos["final_obs"]` and `infos["final_info"]`, as ever.

    Args:
        env: a vectorised environment whose observation is a Dict that has `rgb`.
        annotator: "embedded", another name that `make_annotator` knows, or an `Annotator`; not "simulator", which has
            to see into each sub-environment.
        every: the first frame of each episode is annotated, then every such agent step.
        text: puts the captions into the observation.
        mode: "sync", "pipelined" or "async"; by default "async" for the names "transformers:..." and "openai:...".

    Raises:
        UserError: if an argument is not as said above.

    Example:
        >>> import gymnasium as gym
        >>> from wrappers import PixelObservation
        >>> from wrappers.backends.annotation import Annotation, HashingTextEncoder
        >>> class Blank:
        ...     source, embedding_dim, grid = "blank", 16, 4
        ...
        ...     def annotate(self, frames, frame_steps):
        ...         print(f"a batch of {len(frames)}")
        ...         embedding = HashingTextEncoder(16).encode(["nothing to see"])
        ...         ones, zeros = np.ones((1, 4, 4), np.float32), np.zeros((4, 4), np.float32)
        ...         about = ("nothing to see", (), embedding[0], ("background",), embedding, ones, zeros)
        ...         return [Annotation(*about, frame_step, "blank") for frame_step in frame_steps]
        >>> make = lambda: PixelObservation(gym.make("CartPole-v1", render_mode="rgb_array"), size=64)
        >>> envs = CaptionObservation(gym.vector.SyncVectorEnv([make, make]), annotator=Blank())
        >>> observations, infos = envs.reset(seed=0)
        a batch of 2
        >>> observations["relevance"].shape, infos["caption"].tolist()
        ((2, 4, 4), ['nothing to see', 'nothing to see'])
    """

    def __init__(
        self,
        env: VectorEnv,
        annotator: str | Annotator = "embedded",
        every: int = 8,
        text: bool = False,
        mode: Mode | None = None,
    ):
        # An annotator is recorded as it is: models and connections are shared, not copied.
        options = {"every": every, "text": text, "mode": mode}
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, annotator=annotator, **options)
        VectorWrapper.__init__(self, env)
        check_arguments(env.single_observation_space, every, mode)
        self._autoreset_mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.every, self.mode = every, mode or default_mode(annotator)
        self.annotator = find_annotator(annotator)
        if hasattr(self.annotator, "attach"):
            raise UserError(
                f"annotator {self.annotator.source!r} has to see into each environment: wrap them one by one in "
                "wrappers.CaptionObservation before they are vectorised"
            )
        added = annotation_spaces(self.annotator, text)
        self.single_observation_space = spaces.Dict({**env.single_observation_space.spaces, **added})
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        keep_in_array_conversion()
        self._requests = REQUESTS[self.mode](self.annotator)
        self._tracks = [CaptionTrack(self.annotator, text) for _ in range(env.num_envs)]
        self._ended = np.zeros(env.num_envs, bool)
        # Finished annotations of each sub-environment that were not handed over yet.
        self._finished: list[dict[int, Annotation]] = [{} for _ in range(env.num_envs)]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Resets the sub-environments, or those in `options["reset_mask"]`, and annotates their first frames."""
        is_reset = np.array((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        observations, infos = self.env.reset(seed=seed, options=options)
        self._ended &= ~is_reset
        return self._add_annotations(observations, infos, is_reset, is_reset, np.zeros_like(is_reset))

    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps the sub-environments and annotates the frames whose turn it is, or asks for that."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        before, self._ended = self._ended, terminated | truncated
        every_one, nobody = np.ones_like(before), np.zeros_like(before)
        is_first = before if self._autoreset_mode == AutoresetMode.NEXT_STEP else nobody
        is_last = self._ended if self._autoreset_mode == AutoresetMode.SAME_STEP else nobody
        observations, infos = self._add_annotations(observations, infos, every_one, is_first, is_last)
        return observations, rewards, terminated, truncated, infos

    def statistics(self) -> dict[str, float]:
        """Numbers since construction: those of the annotators, `annotated_share` of frames, `age_frames` on average."""
        return self._requests.statistics() | track_statistics(self._tracks)

    def close(self, **kwargs: Any) -> None:
        """Closes the environments; annotations under way are given up."""
        self._requests.close()
        super().close(**kwargs)

    def _add_annotations(
        self,
        observations: dict[str, Any],
        infos: dict[str, Any],
        is_new: np.ndarray,
        is_first: np.ndarray,
        is_last: np.ndarray,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`is_new`: which sub-environments show a new frame; `is_first`: the first of an episode; `is_last`: in `infos`
        there is the last one of an episode, and the one shown is the first of the next."""
        requests = []
        for index in np.flatnonzero(is_new):
            track = self._tracks[index]
            track.next_frame(bool(is_first[index]))
            rgb = infos["final_obs"][index]["rgb"] if is_last[index] else observations["rgb"][index]
            if track.frame_step % self.every == 0:
                requests.append(Request((index, track.frame), rgb, track.frame_step))
            if is_last[index]:
                requests.append(Request((index, track.frame + 1), observations["rgb"][index], 0))
        if requests:
            self._requests.request(requests)
        for (index, frame), annotation in self._requests.finished().items():
            self._finished[index][frame] = annotation
        for index in np.flatnonzero(is_last):
            infos = self._end_episode(index, infos)
        for index in np.flatnonzero(is_new):
            infos = self._add_info(infos, self._tracks[index].receive(self._take(index)), index)
        rows = [track.observation() for track in self._tracks]
        added = {
            key: tuple(row[key] for row in rows) if key == "caption" else np.stack([row[key] for row in rows])
            for key in rows[0]
        }
        return {**observations, **added}, infos

    def _end_episode(self, index: int, infos: dict[str, Any]) -> dict[str, Any]:
        """Adds what is known of an episode's last frame to what Gymnasium keeps of it, and begins the next one."""
        track = self._tracks[index]
        notes = track.receive(self._take(index, until=track.frame))
        final_obs = infos["final_obs"].copy()
        final_obs[index] = {**final_obs[index], **track.observation()}
        track.next_frame(is_first=True)
        return {**infos, "final_obs": final_obs, "final_info": self._add_info(infos["final_info"], notes, index)}

    def _take(self, index: int, until: int | None = None) -> dict[int, Annotation]:
        """Annotations of a sub-environment that were not handed over yet, of frames up to number `until`."""
        finished = self._finished[index]
        taken = {frame: note for frame, note in finished.items() if until is None or frame <= until}
        self._finished[index] = {frame: note for frame, note in finished.items() if frame not in taken}
        return taken
