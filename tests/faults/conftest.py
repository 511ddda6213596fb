"""The fault suite: what is done to runs, files and answers, and how much of it was survived."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from semore_bench import cli, estimates
from tests.synthetic_runs import WALKER, write_run


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


@pytest.fixture
def quick(monkeypatch):
    """Intervals from few resamples."""
    monkeypatch.setattr(estimates, "REPETITIONS", 20)


@pytest.fixture
def runs(tmp_path, monkeypatch, quick) -> Path:
    """A folder with a run each of two agents; the first is for spoiling."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs")
    write_run(folder, WALKER, "drq_sac", 1, {1000: [5.0], 2000: [10.0]})
    write_run(folder, WALKER, "semore_sac", 1, {1000: [6.0], 2000: [20.0]})
    return folder


@pytest.fixture
def answer(capsys, faults) -> Callable[..., str]:
    """Types a command; returns what it said once that is known to be an orderly answer."""

    def type_(*words: object, status: int | tuple[int, ...] = (0, 2)) -> str:
        with faults.made():
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                cli.main([str(word) for word in words])
            said = capsys.readouterr()
            both = said.out + said.err
            assert (ended.value.code or 0) in ((status,) if isinstance(status, int) else status), both
            assert "Traceback" not in both
            longest = 1 if said.err.startswith("semore-bench:") else 20  # tyro explains a flag at length
            assert len(said.err.splitlines()) <= longest, said.err
            assert "\x1b" not in both
            if ended.value.code == 2:
                assert said.err.strip(), "nothing was said"
            return both

    return type_
