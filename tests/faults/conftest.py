"""The fault suite: what is done to runs, files and answers, and how much of it was survived."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Faults:
    """Counts faults; a test that fails in the middle of one has not survived it.

    Attributes:
        long: whether the long form is asked for (`pytest --long`), to choose how many faults to make.
    """

    def __init__(self, long: bool):
        self.long = long
        self.counts = {"made": 0, "survived": 0}

    @contextmanager
    def made(self, number: int = 1) -> Iterator[None]:
        """Counts `number` faults as made, and as survived if what is done with them raises nothing."""
        self.counts["made"] += number
        yield
        self.counts["survived"] += number


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    """Counts what the test makes and survives: `with faults.made(): ...`; the sum is printed at the end."""
    counted = Faults(request.config.getoption("--long"))
    yield counted
    request.node.user_properties.append(("faults", counted.counts))
