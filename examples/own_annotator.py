"""An annotator of your own: anything with these three attributes and this method names what matters in a frame.

This one knows the colours of a game; yours may ask a detector, a segmentation model or a person.
"""

from collections.abc import Sequence

import numpy as np

from semore_bench.envs import EnvConfig, make_env
from wrappers.backends.annotation import Annotation, HashingTextEncoder, SceneObject, relevance_map

COLOURS = {"ball": (255, 160, 0), "paddle": (80, 160, 255)}


class ColourAnnotator:
    """Says which share of each patch has the colour of which thing."""

    source, embedding_dim, grid = "colours", 64, 12

    def __init__(self) -> None:
        self._texts = HashingTextEncoder(self.embedding_dim)

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation]:
        return [self._annotation(frame, step) for frame, step in zip(frames, frame_steps, strict=True)]

    def _annotation(self, frame: np.ndarray, frame_step: int) -> Annotation:
        names = (*COLOURS, "background")
        has_colour = [(abs(frame.astype(int) - colour).max(-1) < 60) for colour in COLOURS.values()]
        size = frame.shape[0] // self.grid
        patches = np.stack(has_colour).reshape(len(COLOURS), self.grid, size, self.grid, size)
        shares = patches.mean((2, 4), dtype=np.float32)
        shares = np.concatenate([shares, 1 - shares.sum(0, keepdims=True)])
        objects = tuple(SceneObject(name, relevance=1.0) for name in COLOURS)
        caption = " and ".join(
            f"the {name} is there" for name, share in zip(names, shares[:-1], strict=False) if share.any()
        )
        return Annotation(
            caption=caption or "nothing is there",
            objects=objects,
            caption_embedding=self._texts.encode([caption])[0],
            class_names=names,
            class_embeddings=self._texts.encode(names),
            patch_probabilities=shares,
            relevance=relevance_map(objects, shares),
            frame_step=frame_step,
            source=self.source,
        )


if __name__ == "__main__":
    config = EnvConfig(
        image_size=48, action_repeat=1, annotator=ColourAnnotator(), annotate_every=1, caption_mode="sync"
    )
    env = make_env("examples.own_environment:Catch-v0", config)
    observation, info = env.reset(seed=0)
    for _ in range(5):
        observation, *_, info = env.step(env.action_space.sample())
        for annotation in info["annotations"]:
            y, x = np.argwhere(annotation.patch_probabilities[0] > 0.5)[0]
            print(f"step {annotation.frame_step}: {annotation.caption}; the ball in patch ({y}, {x})")
