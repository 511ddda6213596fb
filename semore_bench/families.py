"""Families of environments: how their ids begin, which package registers them, and how their episodes are scored."""

import importlib
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Environments of one origin.

    `prefix`: how their ids begin. `package`: registers them when it is imported. `by_success`: whether the score is the
    success rate rather than the episode return. `bounds`: the scores that count as 0 and 1, None where they differ
    from task to task or nobody knows them.
    """

    prefix: str
    package: str
    by_success: bool = False
    bounds: tuple[float, float] | None = None


META_WORLD, ATARI = "Meta-World/", "ALE/"
FAMILIES = (
    Family("dm_control/", "shimmy", bounds=(0.0, 1000.0)),
    Family(META_WORLD, "metaworld", by_success=True, bounds=(0.0, 1.0)),
    Family(ATARI, "ale_py"),
    Family("MiniGrid-", "minigrid"),
    Family("BabyAI-", "minigrid"),
    Family("MiniWorld-", "miniworld"),
)
"""those whose ids Gymnasium does not know by itself; for others, users type `module:id`"""


def family_of(env_id: str) -> Family | None:
    """The family of an id; None if it is in none of them."""
    return next((family for family in FAMILIES if env_id.startswith(family.prefix)), None)


def register(env_id: str) -> None:
    """Has Gymnasium know the id, if the family's package is installed."""
    family = family_of(env_id)
    if family is not None and importlib.util.find_spec(family.package) is not None:
        importlib.import_module(family.package)


@dataclass(frozen=True)
class Task:
    """An environment with a budget, as results compare agents on it.

    `total_env_steps`: the budget at whose end agents are compared. `bounds`: the scores that count as 0 and 1, None
    where nobody knows them. The score is the episode return, in Meta-World the success rate.
    """

    env_id: str
    total_env_steps: int
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bounds is None:
            family = family_of(self.env_id)
            object.__setattr__(self, "bounds", family.bounds if family else None)

    @property
    def success(self) -> bool:
        """Whether the score is the success rate."""
        family = family_of(self.env_id)
        return family is not None and family.by_success
