"""Says of a frame how bright it is; without PyTorch, so that a worker is there at once."""

import numpy as np

from wrappers.backends.annotation import Annotation, SceneObject


class TinyAnnotator:
    """In a pipeline of its own it is late, and its answers outlive the episode they are about."""

    embedding_dim, grid, source = 4, 2, "tiny"

    def __str__(self) -> str:
        return self.source

    def annotate(self, frames, frame_steps) -> list[Annotation]:
        return [self._annotation(frame, step) for frame, step in zip(frames, frame_steps, strict=True)]

    def _annotation(self, frame: np.ndarray, step: int) -> Annotation:
        light = np.full((2, 2), frame.mean() / 255, np.float32)
        unit = np.eye(4, dtype=np.float32)
        return Annotation(
            caption=f"light {light[0, 0]:.3f}",
            objects=(SceneObject("light", 1.0),),
            caption_embedding=unit[0],
            class_names=("light", f"floor {int(frame.sum()) % 5}"),
            class_embeddings=unit[:2],
            patch_probabilities=np.stack([light, 1 - light]),
            relevance=light,
            frame_step=step,
            source=self.source,
        )
