"""The names of classes that annotations use, as numbers."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch


class NameTable:
    """Numbers of names, with their text embeddings; a number is never given twice: what lies on disk keeps its meaning.

    Args:
        limit: names from which on those that are not used any more are dropped; a model may give every frame new ones.
        used: the numbers in use.
    """

    def __init__(self, limit: int, used: Callable[[], Iterable[int]]):
        self.limit, self._used = limit, used
        self._numbers: dict[str, int] = {}
        self._embeddings: dict[int, np.ndarray] = {}
        self._next = 0

    def number(self, name: str, embedding: np.ndarray) -> int:
        """The number of a name, which may be new."""
        if name not in self._numbers:
            if len(self._numbers) >= self.limit:
                self._drop_unused()
            self._numbers[name] = self._next
            self._embeddings[self._next] = np.array(embedding, np.float32)
            self._next += 1
        return self._numbers[name]

    def names(self) -> dict[int, tuple[str, np.ndarray]]:
        """Number -> name and text embedding, float32 (d,)."""
        return {number: (name, self._embeddings[number]) for name, number in self._numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        embeddings = {number: torch.from_numpy(embedding) for number, embedding in self._embeddings.items()}
        return {"names": self._numbers, "name_embeddings": embeddings, "next_name": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a `state_dict`, which may hold more than that."""
        self._numbers, self._next = dict(state["names"]), state["next_name"]
        self._embeddings = {number: tensor.numpy() for number, tensor in state["name_embeddings"].items()}

    def _drop_unused(self) -> None:
        used = set(self._used())
        self._numbers = {name: number for name, number in self._numbers.items() if number in used}
        self._embeddings = {number: self._embeddings[number] for number in self._numbers.values()}
