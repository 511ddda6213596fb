"""The embedded models in tiny, and what they learn from in tests."""

import numpy as np

from semore_bench.guidance.frames import MASK_SIZE, Frames
from semore_bench.guidance.models import Sizes
from semore_bench.guidance.training import Settings
from wrappers.backends.annotation import SceneObject
from wrappers.backends.scenes import BACKGROUND

TINY = Sizes(embedding=16, width=64, layers=2, text_width=32, text_layers=1, caption_width=32, caption_layers=1)

DENSE = Settings(updates=60, batch_size=16, learning_rate=4e-3, weight_decay=0.01)


def toy_frames(domain: str, count: int, seed: int) -> Frames:
    """A white or an orange square on blue ground: what the models have to tell is known by construction."""
    random = np.random.default_rng(seed)
    images = np.full((count, 64, 64, 3), (40, 60, 120), np.uint8)
    classes = np.full((count, MASK_SIZE, MASK_SIZE), 1 + BACKGROUND.index("floor"), np.uint8)
    captions = []
    for index in range(count):
        top, left = random.integers(40, size=2)
        colour = random.choice(["white", "orange"])
        images[index, top : top + 20, left : left + 20] = {"white": (240, 240, 240), "orange": (220, 120, 30)}[colour]
        classes[index, 2 * top : 2 * top + 40, 2 * left : 2 * left + 40] = 0
        captions.append(f"a {domain}; it is {colour}")
    return Frames(domain, images, classes, tuple(captions), (SceneObject("square", 1.0),), ("square", *BACKGROUND))
