"""What passes between environments, replay and agents: steps, and batches of what the replay keeps of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np


def frames_back(frame_stack: int, episode_step: np.ndarray | int) -> np.ndarray:
    """How many frames before each frame the frames of its stack lie, oldest first: `episode_step` (...) -> (..., k).

    Before the first frame of its episode a stack repeats that frame.
    """
    return np.minimum(np.arange(frame_stack - 1, -1, -1), np.asarray(episode_step)[..., None])


@dataclass(frozen=True)
class Step:
    """What one environment did: the action, its reward, the frame it led to, and the next episode where one ended.

    `action`: float32 (A,) in [-1, 1], or an int64 number where actions are discrete. `observation` is the last one of
    the episode if `terminated` or `truncated`; then `next_episode` holds the first observation and info of the episode
    that follows, if one was asked for.
    """

    action: np.ndarray | np.int64
    reward: float
    terminated: bool
    truncated: bool
    observation: dict[str, np.ndarray]
    info: dict[str, Any]
    next_episode: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Batch:
    """Transitions s_t -> s_{t+m}, m = min(n_step, steps left in the episode).

    `rgb`, `next_rgb`: uint8 (B, k, H, W, 3), oldest frame first, or None. `flow`, `next_flow`: uint8 (B, k-1, H, W, 2)
    as `wrappers.flow.encode_flow` stores it, or None. `action`: float32 (B, A) in [-1, 1], or int64 (B,). `reward`:
    float32 (B,), the discounted sum of m rewards. `discount`: float32 (B,), discount**m, or 0 where the episode
    terminated (not where a time limit cut it) or a life was lost, which ends the sum too. `features`, `next_features`:
    float32 (B, k, F), or None, see `Replay.describe`.
    """

    rgb: np.ndarray | None
    next_rgb: np.ndarray | None
    flow: np.ndarray | None
    next_flow: np.ndarray | None
    action: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    features: np.ndarray | None = None
    next_features: np.ndarray | None = None


@dataclass(frozen=True)
class AnnotatedBatch:
    """Annotated frames, without the frames before them; K = MAX_CLASSES, absent classes have zero probability.

    `rgb`: uint8 (B, H, W, 3). `patch_probabilities`: float32 (B, K, G, G), exact to 1/510. `classes`: int64 (B, K), the
    numbers of the classes' names in `Replay.names`, -1 where there is none. `importance`: float32 (B, K), how much each
    class matters for the task, 0-1; 0 for the background.
    """

    rgb: np.ndarray
    patch_probabilities: np.ndarray
    classes: np.ndarray
    importance: np.ndarray
