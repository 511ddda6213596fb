"""Named things as numbers: which names a run agrees on, moments of their maps, and standardising."""

from collections.abc import Mapping

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from semore_bench.replay import AnnotatedBatch
from wrappers.errors import UserError

THINGS = 8
"""names in a vocabulary at most"""
STATIC, MOTION = 6, 6
"""numbers of a thing's map, and of the flow within it; see `moments`"""
SYNONYMS = 0.9
"""cosine of two names' text embeddings from which on they are one, unless a frame tells them apart"""
COMMON = 0.05
"""share of the annotated frames that a name must occur in"""
FAINT = 0.1
"""cells of mass from which on a thing has a position: less, a doubtful rest at the border, is drawn to the centre"""
HAZE = 0.02
"""probabilities below are taken for 0: spread over an image they would pull its things to the centre"""


class Vocabulary(nn.Module):
    """The names that annotations agree on, in order of weight; fixed once chosen, and kept in checkpoints.

    A name's weight is its relevance, averaged over all annotated frames: what is rarely named, or hardly matters,
    comes last. Names that mean nearly the same are one (see `SYNONYMS`).

    Attributes:
        names: at most `THINGS`; empty until there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()
        self._embeddings = np.empty((0, 0), np.float32)

    def __len__(self) -> int:
        return len(self.names)

    def choose(self, classes: np.ndarray, importance: np.ndarray, names: Mapping[int, tuple[str, np.ndarray]]) -> None:
        """Chooses from annotations, whatever their order: see `Replay.named` and `Replay.names`."""
        if not names:
            return
        numbers = np.array(sorted(names, key=lambda number: names[number][0]))
        named = ((classes[:, :, None] == numbers) & (importance[:, :, None] > 0)).any(1)  # (frames, names)
        weight = np.where(classes[:, :, None] == numbers, importance[:, :, None], 0).sum((0, 1))
        embeddings = np.stack([names[number][1] for number in numbers])
        similar, together = embeddings @ embeddings.T > SYNONYMS, occur_together(classes, numbers)
        chosen: list[int] = []
        joined = np.zeros(len(numbers))  # weight, with that of synonyms
        for index in np.lexsort((np.arange(len(numbers)), -weight)):
            synonyms = [other for other in chosen if similar[index, other] and not together[index, other]]
            if synonyms:
                joined[synonyms[0]] += weight[index]
                named[:, synonyms[0]] |= named[:, index]
            elif weight[index] > 0:
                chosen.append(index)
                joined[index] = weight[index]
        kept = [index for index in chosen if named[:, index].mean() >= COMMON]
        kept = sorted(kept, key=lambda index: (-joined[index], names[numbers[index]][0]))[:THINGS]
        self.names = tuple(names[numbers[index]][0] for index in kept)
        self._embeddings = embeddings[kept]

    def places(self, classes: np.ndarray, names: Mapping[int, tuple[str, np.ndarray]]) -> dict[int, int]:
        """Number of a name in the replay -> its place in the vocabulary, that of a synonym too; -1 for others.

        A synonym's text embedding is similar, and no annotation has both (`classes`, see `Replay.named`). Background
        classes stand in every annotation, so none is taken for a thing, however alike a text model finds the words.
        """
        numbers = np.array(sorted(names))
        together = occur_together(classes, numbers)
        columns = {names[number][0]: column for column, number in enumerate(numbers)}
        places = {}
        for column, number in enumerate(numbers.tolist()):
            name, embedding = names[number]
            if name in self.names:
                places[number] = self.names.index(name)
                continue
            similarity = self._embeddings @ embedding
            for place, other in enumerate(self.names):
                if other in columns and together[column, columns[other]]:
                    similarity[place] = -1
            places[number] = int(similarity.argmax()) if similarity.max(initial=-1) > SYNONYMS else -1
        return places

    @staticmethod
    def targets(batch: AnnotatedBatch, places: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Shares of things, then of all else, float32 (B, THINGS + 1, G, G), and which things a frame's annotation
        names, bool (B, THINGS)."""
        numbers, inverse = np.unique(batch.classes, return_inverse=True)
        place = np.array([places.get(number, -1) for number in numbers.tolist()])[inverse].reshape(batch.classes.shape)
        is_at = place[:, None] == np.array([*range(THINGS), -1])[:, None]  # (B, THINGS + 1, K)
        shares = np.einsum("bsk,bkij->bsij", is_at.astype(np.float32), batch.patch_probabilities)
        return shares, is_at[:, :-1].any(2)

    def get_extra_state(self) -> dict[str, object]:
        return {"names": list(self.names), "embeddings": torch.from_numpy(self._embeddings)}

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.names, self._embeddings = tuple(state["names"]), state["embeddings"].numpy()


def occur_together(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Which names some annotation has side by side: classes (frames, K), of which `numbers` (n,) -> bool (n, n)."""
    occurs = (classes[:, :, None] == numbers).any(1).astype(int)
    return occurs.T @ occurs > 0


def quarters(rgb: np.ndarray, shares: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each frame a quarter that most likely shows something named: four times as many frames for the same work.

    One of nine half-overlapping quarters; three in four are drawn by what they show of each thing, in units of the
    thing's usual share, the others uniformly. Draws from PyTorch's generator.

    Args:
        rgb: uint8 (B, H, W, 3); with an H or W that 4 does not divide the frames stay whole.
        shares: float32 (B, THINGS + 1, G, G), see `Vocabulary.targets`; likewise.
        share: (THINGS + 1,), their means over many frames.
    """
    (count, height, width, _), grid = rgb.shape, shares.shape[-1]
    if height % 4 or width % 4 or grid % 4:
        return rgb, shares
    interest = np.einsum("bkij,k->bij", shares[:, :-1], 1 / np.maximum(share[:-1], 1e-4))
    cells = interest.reshape(count, 4, grid // 4, 4, grid // 4).sum((2, 4))
    inside = np.stack([cells[:, y : y + 2, x : x + 2].sum((1, 2)) for y in range(3) for x in range(3)], 1)
    inside = 0.75 * inside / np.maximum(inside.sum(1, keepdims=True), 1e-6) + 0.25 / 9
    y, x = np.divmod(torch.multinomial(torch.from_numpy(inside), 1)[:, 0].numpy(), 3)

    def cut(array: np.ndarray, axis: int, start: np.ndarray) -> np.ndarray:
        size = array.shape[axis]
        index = (start * size // 4)[:, None] + np.arange(size // 2)
        shape = [count if i == 0 else size // 2 if i == axis else 1 for i in range(array.ndim)]
        return np.take_along_axis(array, index.reshape(shape), axis)

    return cut(cut(rgb, 1, y), 2, x), cut(cut(shares, 2, y), 3, x)


def moments(maps: Tensor, flow: Tensor | None, whole: bool = False) -> Tensor:
    """Where each thing is, how it lies, and how it moves, turns and stretches: (B, K, STATIC + MOTION).

    With positions p from -1 to 1 (x right, y down), for each map: its mass over the image's width in cells; centroid
    (x, y); second central moments (xx, xy, yy), times 4; mean flow (x, y), times 4; mean of (p - centroid) times flow
    (x of both, x and y, y and x, y of both), times 8. A map without mass gives zeros, see `FAINT`.

    Args:
        maps: (B, K, h, w), 0-1.
        flow: (B, 2, h, w) over its bound, -1 to 1; None for no motion: zeros.
        whole: flow over the whole image instead of within each thing.
    """
    batch, things, height, width = maps.shape
    y, x = (2 * (torch.arange(n, device=maps.device) + 0.5) / n - 1 for n in (height, width))
    y, x = y[:, None].expand(height, width).flatten(), x.expand(height, width).flatten()
    shape = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], 1)
    maps = maps.flatten(2)
    mass, *sums = (maps @ shape).unbind(-1)
    share = mass + FAINT
    cx, cy, xx, xy, yy = (value / share for value in sums)
    static = [mass / (height * width) ** 0.5, cx, cy, 4 * (xx - cx * cx), 4 * (xy - cx * cy), 4 * (yy - cy * cy)]
    if flow is None:
        return torch.cat([torch.stack(static, -1), maps.new_zeros(batch, things, MOTION)], -1)
    if whole:
        maps, share, cx, cy = torch.ones_like(maps), torch.full_like(share, height * width), 0 * cx, 0 * cy
    u, v = flow.flatten(2).unbind(1)
    moving = torch.stack([u, v, x * u, x * v, y * u, y * v], -1)
    u, v, xu, xv, yu, yv = ((maps @ moving) / share[..., None]).unbind(-1)
    motion = [4 * u, 4 * v, 8 * (xu - cx * u), 8 * (xv - cx * v), 8 * (yu - cy * u), 8 * (yv - cy * v)]
    return torch.stack(static + motion, -1)


def history(numbers: Tensor) -> Tensor:
    """Numbers of the last k frames (B, k, K * (STATIC + MOTION)) -> (B, K * k * (STATIC + MOTION)): where things were
    in each frame, the last change of that, and how they moved in all frames but the oldest."""
    numbers = numbers.unflatten(-1, (-1, STATIC + MOTION))
    static, motion = numbers.split([STATIC, MOTION], -1)
    parts = [static, static[:, -1:] - static[:, -2:-1], motion[:, 1:]]
    return torch.cat(parts, 1).flatten(1)


def history_size(frames: int) -> int:
    """Length of what `history` makes of `frames` frames, per thing."""
    return STATIC * (frames + 1) + MOTION * (frames - 1)


class TrueThings(gym.Wrapper):
    """Adds `state`: the numbers of `moments`, float32 (THINGS * (STATIC + MOTION),), of the simulator's own class maps.

    Privileged: what perfect grounding would give. The things are the scene's, in its order. As those of the simulator's
    annotations, the maps are averages of finer masks: a pole is one or two of the observation's pixels wide.

    Args:
        env: of MuJoCo, with `rgb` and perhaps `flow` in its observation.
        grid: patches per side of the class maps.
    """

    def __init__(self, env: gym.Env, grid: int = 32):
        super().__init__(env)
        from wrappers.backends.mujoco import Renderer
        from wrappers.backends.simulation import find_simulation
        from wrappers.backends.simulator import finer_renderer

        self._simulation, self._grid, self._model = find_simulation(env), grid, None
        renderer = env.get_wrapper_attr("renderer") if env.has_wrapper_attr("renderer") else None
        if not isinstance(renderer, Renderer):
            raise UserError(f"{env.unwrapped} is not drawn by MuJoCo, so it has no true maps; leave --true-maps out")
        self._renderer = finer_renderer(self._simulation, renderer, grid)
        space = spaces.Box(-np.inf, np.inf, (THINGS * (STATIC + MOTION),), np.float32)
        self.observation_space = spaces.Dict({**env.observation_space.spaces, "state": space})

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return self._add_state(observation), info

    def step(self, action):
        observation, *rest = self.env.step(action)
        return self._add_state(observation), *rest

    def _add_state(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from wrappers.backends.scenes import find_scene
        from wrappers.backends.simulator import View

        if self._simulation.model is not self._model:
            self._model, self._scene = self._simulation.model, find_scene(self._simulation.model)
        shares = View(self._simulation, self._scene, self._renderer.geometry()).patch_probabilities(self._grid)
        maps = torch.zeros(1, THINGS, self._grid, self._grid)
        maps[0, : len(self._scene.parts)] = torch.from_numpy(shares[: len(self._scene.parts)])
        flow = observation.get("flow")
        if flow is not None:
            flow = torch.from_numpy(flow / self.observation_space["flow"].high.max()).permute(2, 0, 1)[None]
            flow = nn.functional.adaptive_avg_pool2d(flow, maps.shape[2:])
        return {**observation, "state": moments(maps, flow).flatten().numpy()}


class Standardise(nn.Module):
    """Subtracts the mean and divides by the standard deviation that `fit` found; at most 5 deviations remain.

    Args:
        size: numbers.
        floor: added to the deviation, so that the noise of what hardly varies is not blown up. The numbers of `moments`
            have a natural scale, half an image's width: what varies by much less than this share of that stays small.
    """

    def __init__(self, size: int, floor: float):
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    def fit(self, values: Tensor) -> None:
        """Takes mean and deviation from values (n, size)."""
        self.mean.copy_(values.mean(0))
        self.deviation.copy_(values.std(0, correction=0) + self.floor)

    def forward(self, values: Tensor) -> Tensor:
        return ((values - self.mean) / self.deviation).clamp(-5, 5)
