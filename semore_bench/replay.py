"""A replay that stores every frame once, on disk, and survives the process.

Frames lie in one ring per environment, in the order in which they were seen, last frames of episodes included. A
transition is a position in a ring; stacks, n-step returns and the true next frame are put together when sampled.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from semore_bench.name_table import NameTable
from semore_bench.storage import Storage
from semore_bench.transitions import AnnotatedBatch, Batch, Step, frames_back
from wrappers.backends.annotation import MAX_CLASSES, Annotation

# What follows a frame in its ring.
NEWEST, CONTINUES, TERMINATED, TRUNCATED, LIFE_LOST = range(5)

_FRAMES_PER_STEP = 2  # the last one of an episode and the first one of the next
_ANNOTATIONS_PER_STEP = 96  # at most, of an environment: as many as wait and are under way, see `AsyncQueue`
_NOTES = ("owner", "classes", "importance", "probabilities")  # arrays with a row per annotation
_CHUNK = 64  # frames that are described at a time

Describe = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""uint8 rgb (N, H, W, 3) and flow (N, H, W, 2) -> features, float32 (N, F); of each frame from itself alone"""


class Replay:
    """Frame-deduplicating, memory-mapped replay with n-step returns and late annotations.

    Args:
        directory: folder of the memory-mapped arrays; what is in it is taken over by `load_state_dict`.
        observation_space: Dict with `rgb`, and `flow` in bytes if there is any, or with `state` alone, which is kept as
            features (one environment's, without stacking).
        action_dim: length of an action, None for discrete ones: int64 numbers.
        capacity: transitions that can be sampled, all environments together.
        num_envs: number of environments, each with its own ring.
        frame_stack: frames per stack; the first frame of an episode is repeated to fill its first stacks.
        n_step: length of n-step returns.
        discount: discount factor per agent step.
        seed: seeds the sampling.
        annotate_every: agent steps between annotated frames, 0 for none; sizes the annotation store.
        grid, embedding_dim: patches per side and length of the text embeddings of the annotations.
        features: numbers per frame that `describe` computes, 0 for none.
        slack: frames per ring that may be written from one checkpoint to the next; twice as many are kept beyond the
            capacity, so that a run that returns to the older one of two checkpoints finds what its replay held then.

    Raises:
        UserError: the disk is too small, with the bytes needed and available.
    """

    def __init__(
        self,
        directory: str | Path,
        observation_space: spaces.Dict,
        action_dim: int | None,
        *,
        capacity: int,
        num_envs: int = 1,
        frame_stack: int = 3,
        n_step: int = 1,
        discount: float = 0.99,
        seed: int = 0,
        annotate_every: int = 0,
        grid: int = 8,
        embedding_dim: int = 64,
        features: int = 0,
        slack: int = 1250,
    ):
        self.directory = Path(directory)
        self.frame_stack, self.n_step, self.discount, self.num_envs = frame_stack, n_step, discount, num_envs
        self.embedding_dim = embedding_dim
        self.has_rgb, self.has_flow, self.has_state = (
            name in observation_space.spaces for name in ("rgb", "flow", "state")
        )
        # one frame in 50 for the last frames of episodes, which are no transitions
        self.window = -(-capacity // num_envs) * 51 // 50
        self.slack = slack + _FRAMES_PER_STEP
        self.slots = self.window + 2 * self.slack + frame_stack + n_step + 2
        # some more than one frame in so many: the first frame of every episode is annotated, too
        annotations = min(self.slots, self.slots * 5 // (4 * annotate_every) + 64) if annotate_every else 0
        self.annotation_window = annotations * num_envs
        # the same here, while `slack` frames are written
        annotations = slack * 5 // (4 * annotate_every) + 8 + _ANNOTATIONS_PER_STEP if annotate_every else 0
        self.annotation_slack = annotations * num_envs
        self.annotation_slots = self.annotation_window + 2 * self.annotation_slack

        ring, notes = (num_envs * self.slots,), (self.annotation_slots,)
        layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "action": (ring, np.int64) if action_dim is None else ((*ring, action_dim), np.float32),
            "reward": (ring, np.float32),
            "follows": (ring, np.uint8),
            "episode_step": (ring, np.int32),
        }
        if self.has_rgb:
            layout["rgb"] = ((*ring, *observation_space["rgb"].shape), np.uint8)
        if self.has_flow:
            layout["flow"] = ((*ring, *observation_space["flow"].shape), np.uint8)
        if annotations:
            layout |= {
                "owner": (notes, np.int64),
                "classes": ((*notes, MAX_CLASSES), np.int32),
                "importance": ((*notes, MAX_CLASSES), np.float16),
                "probabilities": ((*notes, MAX_CLASSES, grid, grid), np.uint8),
            }
        self._storage = Storage(self.directory, layout)
        self._arrays, self.nbytes = self._storage.arrays, self._storage.nbytes
        self._rng = np.random.default_rng([seed, 1])
        # A stream of its own: an agent without guidance draws the same transitions as one with it.
        self._annotation_rng = np.random.default_rng([seed, 2])
        self._newest = np.full(num_envs, -1, np.int64)  # frames written per ring, minus one
        self._annotated = 0
        self._actions: list[list[np.ndarray | np.int64]] = [[] for _ in range(num_envs)]  # of the running episodes
        self._saved: tuple[np.ndarray, int] | None = None  # `_newest` and `_annotated` of the last checkpoint
        self._names = NameTable(
            2 * MAX_CLASSES * self.annotation_window,
            lambda: np.unique(self._arrays["classes"][self._live_notes()]).tolist(),
        )
        # In memory, and whole in every checkpoint: all of them change when they are recomputed.
        width = observation_space["state"].shape[0] if self.has_state else features
        self._features = np.zeros((num_envs * self.slots, width), np.float32)
        self.describe: Describe | None = None
        self.annotations_dropped = 0

    # ---- writing ----

    def begin(self, env: int, observation: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """Stores the first frame of an episode of environment `env`."""
        self._describe([self._write(env, observation, 0, info)])

    def add(self, steps: Sequence[Step]) -> None:
        """Stores one step of every environment: action, reward, the frame it led to (the true last one where the
        episode ended) and, there, the first frame of the next episode."""
        rows = []
        for env, step in enumerate(steps):
            row = self._row(env, self._newest[env])
            self._arrays["action"][row] = step.action
            self._arrays["reward"][row] = step.reward
            self._arrays["follows"][row] = LIFE_LOST if step.info.get("life_lost") else CONTINUES
            self._actions[env].append(step.action.copy())
            rows.append(self._write(env, step.observation, self._arrays["episode_step"][row] + 1, step.info))
            if step.next_episode is not None:
                self._arrays["follows"][rows[-1]] = TERMINATED if step.terminated else TRUNCATED
                observation, info = step.next_episode
                rows.append(self._write(env, observation, 0, info))
        self._describe(rows)

    def redescribe(self) -> None:
        """Recomputes the features of all stored frames, by a `describe` that has changed."""
        for env in range(self.num_envs):
            oldest = max(0, self._newest[env] - self.window - self.frame_stack)
            rows = self._row(env, np.arange(oldest, self._newest[env] + 1))
            for start in range(0, len(rows), _CHUNK):
                self._describe(rows[start : start + _CHUNK])

    def _describe(self, rows: Sequence[int]) -> None:
        if self.describe is not None:
            flow = self._arrays["flow"][rows] if self.has_flow else None
            self._features[rows] = self.describe(self._arrays["rgb"][rows], flow)

    def _write(self, env: int, observation: dict[str, np.ndarray], episode_step: int, info: dict[str, Any]) -> int:
        self._newest[env] += 1
        row, arrays = self._row(env, self._newest[env]), self._arrays
        if self.has_rgb:
            arrays["rgb"][row] = observation["rgb"]
        if self.has_state:
            self._features[row] = observation["state"]
        if self.has_flow:
            arrays["flow"][row] = observation["flow"]
        arrays["follows"][row] = NEWEST
        arrays["episode_step"][row] = episode_step
        if episode_step == 0:
            self._actions[env] = []
        for annotation, age in zip(info.get("annotations", ()), info.get("annotation_ages", ()), strict=True):
            self.attach(env, annotation, age)
        return row

    def attach(self, env: int, annotation: Annotation, age: int) -> bool:
        """Gives an annotation, however late, to the frame stored `age` frames before the newest one of `env`.

        Returns:
            False if that frame is gone, or there is no room.
        """
        is_there = 0 <= age < min(self.window, self._newest[env] + 1)
        # More at once than anybody has under way; without a checkpoint between, the older one would lose its own.
        is_full = self._saved is not None and self._annotated - self._saved[1] >= self.annotation_slack
        if not is_there or is_full:
            self.annotations_dropped += 1
            return False
        arrays, note = self._arrays, self._annotated % self.annotation_slots
        classes = len(annotation.class_names)
        arrays["owner"][note] = (self._newest[env] - age) * self.num_envs + env
        arrays["classes"][note] = -1
        arrays["classes"][note, :classes] = [
            self._names.number(*pair) for pair in zip(annotation.class_names, annotation.class_embeddings, strict=True)
        ]
        arrays["importance"][note] = 0
        arrays["importance"][note, : len(annotation.objects)] = [thing.relevance for thing in annotation.objects]
        arrays["probabilities"][note] = 0
        arrays["probabilities"][note, :classes] = np.rint(255 * annotation.patch_probabilities)
        self._annotated += 1
        return True

    # ---- reading ----

    def __len__(self) -> int:
        """Frames that a transition may be drawn at."""
        return int(np.minimum(self._newest, self.window).clip(0).sum())

    @property
    def annotated_frames(self) -> int:
        """Annotations that may be drawn, if their frames are still there."""
        return min(self._annotated, self.annotation_window)

    def latest(self) -> dict[str, np.ndarray]:
        """The newest stack of every environment, of what there is: uint8 rgb (N, k, H, W, 3), flow (N, k-1, H, W, 2),
        float32 features (N, k, F)."""
        stack = zip(("rgb", "flow", "features"), self._stack(np.arange(self.num_envs), self._newest), strict=True)
        return {name: array for name, array in stack if array is not None}

    def sample(self, batch_size: int) -> Batch:
        """Draws transitions uniformly from the window.

        Raises:
            ValueError: no transition is complete yet.
        """
        env, position = self._draw(batch_size)
        reward, discount, end, _ = self._returns(env, position)
        if self.n_step == 1:  # s and s' share frames: read them once
            parts: Iterable[tuple] = [
                (None, None) if part is None else (part[:, :-1], part[:, 1:]) for part in self._stack(env, end, more=1)
            ]
        else:
            parts = zip(self._stack(env, position), self._stack(env, end), strict=True)
        (rgb, next_rgb), (flow, next_flow), (features, next_features) = parts
        action = self._arrays["action"][self._row(env, position)]
        return Batch(rgb, next_rgb, flow, next_flow, action, reward, discount, features, next_features)

    def sample_annotated(self, batch_size: int) -> AnnotatedBatch | None:
        """Draws annotated frames uniformly, with replacement; None if there are none."""
        if not self.annotated_frames:
            return None
        arrays = self._arrays
        notes = np.empty(0, np.int64)
        for _ in range(20):
            drawn = self._annotated - 1 - self._annotation_rng.integers(self.annotated_frames, size=batch_size)
            drawn %= self.annotation_slots
            position, env = np.divmod(arrays["owner"][drawn], self.num_envs)
            kept = position >= self._newest[env] - self.window
            notes = np.concatenate([notes, drawn[kept]])[:batch_size]
            if len(notes) == batch_size:
                break
        if not len(notes):
            return None
        notes = np.resize(notes, batch_size)
        position, env = np.divmod(arrays["owner"][notes], self.num_envs)
        return AnnotatedBatch(
            rgb=arrays["rgb"][self._row(env, position)],
            patch_probabilities=arrays["probabilities"][notes].astype(np.float32) / 255,
            classes=arrays["classes"][notes].astype(np.int64),
            importance=arrays["importance"][notes].astype(np.float32),
        )

    @property
    def names(self) -> dict[int, tuple[str, np.ndarray]]:
        """The names that annotations use: number -> name and text embedding, float32 (d,)."""
        return self._names.names()

    def named(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each annotation in the store, in no order of meaning: `classes` and `importance` of `AnnotatedBatch`."""
        if not self.annotated_frames:
            return np.empty((0, MAX_CLASSES), np.int64), np.empty((0, MAX_CLASSES), np.float32)
        classes, importance = (self._arrays[name][self._live_notes()] for name in ("classes", "importance"))
        return classes.astype(np.int64), importance.astype(np.float32)

    def feature_stacks(self, limit: int = 10_000) -> np.ndarray:
        """Features of frames with those before them, float32 (n, k, F): of all that can be sampled, or of at most
        `limit` in equal distances."""
        stacks = []
        for env, count in enumerate(np.minimum(self._newest + 1, self.window)):
            step = -(-count * self.num_envs // limit)
            positions = self._newest[env] - np.arange(0, count, max(step, 1))[::-1]
            back = frames_back(self.frame_stack, self._arrays["episode_step"][self._row(env, positions)])
            stacks.append(self._features[self._row(env, positions[:, None] - back)])
        return np.concatenate(stacks)

    def _row(self, env: Any, position: Any) -> Any:
        return env * self.slots + position % self.slots

    def _draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of complete transitions, by rejection: last frames and unfinished n-step returns are redrawn."""
        lengths = np.minimum(self._newest, self.window).clip(0)
        ends = np.cumsum(lengths)
        env = position = np.empty(0, np.int64)
        for _ in range(200):
            if not ends[-1]:
                break
            flat = self._rng.integers(ends[-1], size=count)
            drawn_env = np.searchsorted(ends, flat, side="right")
            drawn = self._newest[drawn_env] - 1 - (ends[drawn_env] - 1 - flat)
            complete = self._returns(drawn_env, drawn)[3]
            env = np.concatenate([env, drawn_env[complete]])[:count]
            position = np.concatenate([position, drawn[complete]])[:count]
            if len(env) == count:
                return env, position
        raise ValueError("the replay holds no complete transition yet")

    def _returns(self, env: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, ...]:
        """Discounted n-step reward, discount of the value at its end, the end, and whether the return is complete."""
        follows = self._arrays["follows"]
        reward, discount = np.zeros(len(env), np.float32), np.ones(len(env), np.float32)
        end = position.copy()
        for _ in range(self.n_step):
            row = self._row(env, end)
            loses = follows[row] == LIFE_LOST
            continues = (loses | (follows[row] == CONTINUES)) & (discount > 0)
            reward += np.where(continues, discount * self._arrays["reward"][row], 0)
            discount *= np.where(continues, np.where(loses, np.float32(0), np.float32(self.discount)), 1)
            end += continues
        last = follows[self._row(env, end)]
        full = (end - position == self.n_step) | (discount == 0)
        complete = (full | (last == TERMINATED) | (last == TRUNCATED)) & (end > position)
        return reward, discount * (last != TERMINATED), end, complete

    def _stack(self, env: np.ndarray, position: np.ndarray, more: int = 0) -> tuple[np.ndarray | None, ...]:
        """Stacks of rgb, flow and features; None for what there is not."""
        back = frames_back(self.frame_stack + more, self._arrays["episode_step"][self._row(env, position)])
        rows = self._row(env[:, None], position[:, None] - back)
        return (
            self._arrays["rgb"][rows] if self.has_rgb else None,
            self._arrays["flow"][rows[:, 1:]] if self.has_flow else None,
            self._features[rows] if self.has_state or self.describe is not None else None,
        )

    def _live_notes(self) -> np.ndarray:
        """Rows of the annotations that may be drawn, oldest first."""
        return np.arange(self._annotated - self.annotated_frames, self._annotated) % max(1, self.annotation_slots)

    # ---- checkpoints ----

    @property
    def checkpoint_due(self) -> bool:
        """Whether the next step might overwrite what the checkpoint before the newest one needs."""
        if self._saved is None:
            return False
        newest, annotated = self._saved
        frames, annotations = (self._newest - newest).max(), self._annotated - annotated
        return bool(
            frames > self.slack - _FRAMES_PER_STEP
            or annotations > max(0, self.annotation_slack - _ANNOTATIONS_PER_STEP * self.num_envs)
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the replay: counters, names, features, random states, the actions of running
        episodes, and digests of all that it needs of the files, which are written through to the disk."""
        self._storage.flush()
        needed, changed = self._needed(), self._needed(self._saved)
        self._saved = self._newest.copy(), self._annotated
        return {
            "digests": {name: self._storage.digest(name, needed[name], changed[name]) for name in self._arrays},
            "actions": [[action.tolist() for action in actions] for actions in self._actions],
            "newest": self._newest.tolist(),
            "annotated": self._annotated,
            **self._names.state_dict(),
            "features": torch.from_numpy(self._features[self._used_rows()]),
            "random": [json.dumps(rng.bit_generator.state) for rng in (self._rng, self._annotation_rng)],
        }

    def _needed(self, since: tuple[np.ndarray, int] | None = None) -> dict[str, np.ndarray]:
        """Rows of every array that may be read, oldest first; with `since`, those of them that were written since."""
        oldest = (self._newest - self.window - self.frame_stack - self.n_step).clip(0)
        notes = self._live_notes()
        if since is not None:
            # what follows the frame that was the newest then was not known yet
            oldest = np.maximum(oldest, since[0])
            notes = notes[max(0, len(notes) - self._annotated + since[1]) :]
        frames, steps = (
            np.concatenate([self._row(env, np.arange(oldest[env], end[env])) for env in range(self.num_envs)])
            for end in (self._newest + 1, self._newest)
        )
        rows = dict.fromkeys(("action", "reward", "follows"), steps) | dict.fromkeys(_NOTES, notes)
        return {name: rows.get(name, frames) for name in self._arrays}

    def _used_rows(self) -> np.ndarray:
        used = np.minimum(self._newest + 1, self.slots)
        return np.concatenate([env * self.slots + np.arange(count) for env, count in enumerate(used)])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a `state_dict` of the same files, which may have been written further since.

        Raises:
            Damaged: a file does not hold any more what it held.
        """
        self._newest[:] = state["newest"]
        self._annotated = state["annotated"]
        for name, rows in self._needed().items():
            self._storage.check(name, rows, state["digests"][name])
        self._saved = self._newest.copy(), self._annotated
        dtype = self._arrays["action"].dtype
        self._actions = [[np.array(action, dtype)[()] for action in actions] for actions in state["actions"]]
        self._names.load_state_dict(state)
        self._features[self._used_rows()] = state["features"].numpy()
        for rng, text in zip((self._rng, self._annotation_rng), state["random"], strict=True):
            rng.bit_generator.state = json.loads(text)
        self._arrays["follows"][self._row(np.arange(self.num_envs), self._newest)] = NEWEST

    def difference(self, env: int, observation: dict[str, np.ndarray]) -> float:
        """Mean difference between the newest stored frame of `env` and an observation: in grey levels, or of states."""
        row = self._row(env, self._newest[env])
        if self.has_rgb:
            return float(np.abs(self._arrays["rgb"][row].astype(np.int16) - observation["rgb"]).mean())
        return float(np.abs(self._features[row] - observation["state"]).mean())

    @property
    def episode_actions(self) -> list[list[np.ndarray | np.int64]]:
        """Actions taken so far in the running episode of every environment, each float32 (A,) or an int64 number."""
        return self._actions
