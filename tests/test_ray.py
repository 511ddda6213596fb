"""Sweeps on a Ray cluster of this machine: a node dies, a sweep is stopped, no cluster is there."""

import re
import signal
import sys

import pytest

from semore_bench import executors
from tests.toy_sweeps import (
    FAKE,
    count,
    finish,
    gone,
    nothing_is_left,  # noqa: F401  a fixture
    processes,
    run_dirs,
    start,
    states,
)
from tests.waiting import ended, wait_until
from wrappers.errors import UserError

pytest.importorskip("ray", reason="needs Ray: pip install ray")
SLOW = FAKE.replace("total_env_steps = 40", "total_env_steps = 100\ndelay = 0.06")


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes for one run each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "120000")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def on_ray(address: str, seeds: int) -> tuple[str, ...]:
    arguments = ("--agents", "counter", "--seeds", str(seeds), "--executor", "ray", "--ray-address", address)
    return (*arguments, "--memory-per-run", "0.1")


def test_one_of_two_nodes_dies_and_all_runs_finish_nonetheless(tmp_path, cluster):
    process = start(tmp_path, SLOW, *on_ray(cluster.address, 3))
    wait_until(lambda: sum(0 < count(run) < 90 for run in run_dirs(tmp_path)) == 2, process)
    before = [processes(run) for run in run_dirs(tmp_path)]
    cluster.remove_node(*cluster.worker_nodes, allow_graceful=False)  # SIGKILL
    assert ended(process) == 0, (tmp_path / "sweep.log").read_text()
    assert set(states(tmp_path).values()) == {"finished"}
    assert len(states(tmp_path)) == 3
    assert sorted(len(processes(run)) for run in run_dirs(tmp_path)) == [1, 1, 2], "one was cut off and continued"
    assert all(gone(ids) for ids in before)

    # On the node that is left: a sweep that is stopped, and goes on.
    arguments = on_ray(cluster.address, 4)
    process = start(tmp_path, SLOW, *arguments)
    wait_until(lambda: any(0 < count(run) < 90 for run in run_dirs(tmp_path)), process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == 130, (tmp_path / "sweep.log").read_text()
    assert sorted(states(tmp_path).values()) == ["finished"] * 3 + ["stopped"]
    assert all(gone(processes(run)) for run in run_dirs(tmp_path))
    assert finish(tmp_path, SLOW, *arguments).returncode == 0
    assert list(states(tmp_path).values()) == ["finished"] * 4


def test_an_address_where_nobody_answers(tmp_path):
    refused = finish(tmp_path, FAKE, *on_ray("127.0.0.1:9", 1))
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert re.search("no Ray cluster answers at 127.0.0.1:9 .*refused.*ray start --head", line)
    assert run_dirs(tmp_path) == []


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        executors.RayExecutor(None, 1, 0, 10**9)
