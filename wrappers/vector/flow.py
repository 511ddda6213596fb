"""Optical flow for vectorised environments: that of all sub-environments in one call."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from wrappers.backends.flow import FlowEstimator, flows, make_estimator
from wrappers.errors import UserError
from wrappers.flow import bounds_of, flow_space


class OpticalFlowObservation(VectorWrapper, RecordConstructorArgs):
    """Adds `flow`, float32 (N, H, W, 2), to each sub-environment's observation: see `wrappers.OpticalFlowObservation`.

    Observations and infos are those of the wrapper for single environments, batched as Gymnasium does; what moved in
    all of them is computed in one call where the estimator has a `batch`. Every autoreset mode is supported, and resets
    with a "reset_mask"; with SAME_STEP the flow to an episode's last frame is in `infos["final_obs"]`.

    `estimator`: "dis", "farneback" or a `FlowEstimator` that has no state of its own, so not "simulator". Raises
    `UserError` where there is no `rgb` observation, and for another estimator.

    >>> import gymnasium as gym
    >>> from wrappers import PixelObservation
    >>> make = lambda: PixelObservation(gym.make("CartPole-v1", render_mode="rgb_array"), size=64)
    >>> envs = OpticalFlowObservation(gym.vector.SyncVectorEnv([make, make]))
    >>> envs.reset(seed=0)[0]["flow"].shape
    (2, 64, 64, 2)
    """

    def __init__(self, env: VectorEnv, estimator: str | FlowEstimator = "dis", bound: float | None = None) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, estimator=estimator, bound=bound)
        VectorWrapper.__init__(self, env)
        single = env.single_observation_space
        self._bounds = bounds_of(single, bound)
        self.bound = float(self._bounds.max())
        self.single_observation_space = spaces.Dict({**single.spaces, "flow": flow_space(single, self._bounds)})
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._estimator = make_estimator(estimator) if isinstance(estimator, str) else estimator
        if hasattr(self._estimator, "attach") or hasattr(self._estimator, "reset"):
            raise UserError(
                f"the flow estimator {estimator!r} has to see into each environment: wrap them one by one in "
                "wrappers.OpticalFlowObservation before they are vectorised"
            )
        self._autoreset_mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._ended = np.zeros(env.num_envs, bool)
        self._previous = np.zeros((env.num_envs, *single["rgb"].shape), np.uint8)
        self._flow = np.zeros((env.num_envs, *single["rgb"].shape[:2], 2), np.float32)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Resets the sub-environments, or those in `options["reset_mask"]`, whose flow is 0 then."""
        is_reset = np.array((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        observations, infos = self.env.reset(seed=seed, options=options)
        self._ended &= ~is_reset
        return self._add_flow(observations, np.where(is_reset[:, None, None, None], 0, self._flow)), infos

    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps the sub-environments."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        before, self._ended = self._ended, terminated | truncated
        flow, current = np.zeros_like(self._flow), observations["rgb"]
        if self._autoreset_mode == AutoresetMode.SAME_STEP and self._ended.any():
            current = current.copy()  # where an episode ended, the frame that it ended with
            for index in np.flatnonzero(self._ended):
                current[index] = infos["final_obs"][index]["rgb"]
        moves = ~before if self._autoreset_mode == AutoresetMode.NEXT_STEP else np.ones_like(before)
        if moves.any():
            flow[moves] = np.clip(flows(self._estimator, self._previous[moves], current[moves]), *self._limits)
        if current is not observations["rgb"]:
            final_obs = infos["final_obs"].copy()
            for index in np.flatnonzero(self._ended):
                final_obs[index] = {**final_obs[index], "flow": flow[index].copy()}
            infos, flow[self._ended] = {**infos, "final_obs": final_obs}, 0
        return self._add_flow(observations, flow), rewards, terminated, truncated, infos

    @property
    def _limits(self) -> tuple[np.ndarray, np.ndarray]:
        return -self._bounds, self._bounds

    def _add_flow(self, observations: dict[str, Any], flow: np.ndarray) -> dict[str, Any]:
        # Kept apart from what was given out, which the environments and their users may write into.
        self._previous[:], self._flow[:] = observations["rgb"], flow
        return {**observations, "flow": self._flow.copy()}
